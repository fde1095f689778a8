"""Local data as users have it: every format, and everything that can be wrong with it."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_files import (
    FORMATS,
    as_csv,
    as_jsonl,
    as_parquet_of_bytes,
    as_saved,
    encoded,
    picture,
    row,
    solutions,
    write_jsonl,
)
from PIL import Image

from mr1fast.data.dataset import load_split
from mr1fast.data.tasks import TASKS


def test_other_columns_are_for_reward_functions_without_images_and_bytes(folder):
    rows = [row(n, level=f"level {n}", tags=["a", n % 2 and "b"]) for n in range(3)]
    first = {"level": "level 0", "tags": ["a", 0]}
    assert load_split(as_jsonl(folder, rows), "all")[0].columns == first
    mixed = write_jsonl(folder / "mixed.jsonl", [row(0), rows[1]])
    assert load_split(mixed, "all")[0].columns == {"level": None, "tags": None}
    assert load_split("vc", "test")[0].columns.keys() == {"reasoning"}
    assert load_split("vc", "test")[0].reward_columns().keys() == {"problem", "choices", "reasoning"}
    with_more = [row(n, level=0.5, raw=b"bytes", pictures=[{"bytes": b"x", "path": None}]) for n in range(3)]
    for write in (as_parquet_of_bytes, as_saved):
        columns = load_split(write(folder, with_more), "all")[0].columns
        assert {name: value for name, value in columns.items() if value is not None} == {"level": 0.5}


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_examples(folder, write):
    dataset = load_split(write(folder, [row(n) for n in range(5)]), "all")
    assert len(dataset) == 5
    assert not dataset.skipped
    for number in range(5):
        example = dataset[number]
        assert (example.problem, example.solution) == (f"question {number}?", str(number))
        assert example.image.mode == "RGB"
        assert example.image.getpixel((0, 0)) == (number, 50, 90)


# ---- rows that are not clean ----------------------------------------------------------------------------------------

ROWS = [
    (row(1), "1", None),
    (row(2, solution="7"), "7", "answer without tags"),
    (row(3, solution=7), "7", "answer is a number, not text"),
    (row(4, solution=7.0), "7", "answer is a number, not text"),
    (row(5, solution=0.5), "0.5", "answer is a number, not text"),
    (row(6, solution=["<answer>9</answer>"]), "9", "answer taken out of a list"),
    (row(7, solution="<answer> 4"), "4", "answer with broken tags"),
    (row(8, problem=12), "8", "question is a number, not text"),
    (row(9, problem="<image>\nWhat?"), "9", "image marker removed from the question"),
    (row(10, image=["10.png"]), "10", None),
    (row(11, solution=None), None, "no answer"),
    (row(12, solution=float("nan")), None, "no answer"),
    (row(13, solution="  "), None, "no answer"),
    (row(14, solution="<answer> </answer>"), None, "no answer"),
    (row(15, solution=["1", "2"]), None, "answer is neither text nor a number"),
    (row(16, solution={"a": 1}), None, "answer is neither text nor a number"),
    (row(17, solution=True), None, "answer is neither text nor a number"),
    ({"image": "18.png", "problem": "no solution here"}, None, "no answer"),
    (row(19, problem=None), None, "no question"),
    (row(20, problem="<image>"), None, "no question"),
    (row(21, image=None), "21", "no image, asked in text alone"),
    (row(22, image=""), "22", "no image, asked in text alone"),
    (row(23, image=7), None, "image is neither a path nor image bytes"),
    (row(24, image="https://example.org/a.png"), None, "image is a web address, not a file"),
    (row(25, image=["1.png", "2.png"]), "25", None),
    (row(30, image=["1.png", None]), None, "image is neither a path nor image bytes"),
    (row(31, image=["1.png", "nowhere.png"]), None, "image file not found"),
    (row(32, image=[], problem="<image>What?"), None, "question marks the place of an image, but the row has none"),
    (row(26, image="nowhere.png"), None, "image file not found"),
    (row(27, image="."), None, "image cannot be read"),
    (row(28, image="data.jsonl"), None, "image cannot be read"),
    (row(29, image="a\0b.png"), None, "image cannot be read"),
    ('{"image": "1.png", "problem": "broken', None, "line is not JSON"),
    ("[1, 2]", None, "row is not an object with columns"),
    ("[" * 100_000, None, "line is not JSON"),
]


def test_rows_that_are_not_clean(folder):
    file = write_jsonl(folder / "data.jsonl", [r for r, _, _ in ROWS])
    with file.open("ab") as stream:
        stream.write(b'{"image": "1.png", "problem": "\xff", "solution": "1"}\n')
    dataset = load_split(file, "all")
    assert solutions(dataset) == [solution for _, solution, _ in ROWS if solution is not None]
    assert dataset[8].problem == "What?"
    reasons = Counter(reason for _, solution, reason in ROWS if solution is None)
    assert dataset.skipped == reasons + Counter(["line is not UTF-8"])
    notes = Counter(note for _, solution, note in ROWS if solution is not None and note)
    # An untagged number is both.
    assert dataset.notes == notes + Counter({"answer without tags": 3})
    assert "data/all: 13 examples; skipped 23: 5 x no answer, " in dataset.summary()
    assert "1 x answer with broken tags" in dataset.summary()


def test_csv_that_is_not_clean(folder):
    file = folder / "data.csv"
    file.write_bytes(
        b'image, problem,solution\r\n0.png,"two\nlines, one cell",3\r\n'
        b"1.png,short row\r\n2.png,a,b,too many\r\n3.png,\xff \xc3\xa9\xc3\xa9?,4\r\n4.png,?,4\xff\r\n"
    )
    dataset = load_split(file, "all")
    assert [(e.problem, e.solution) for e in (dataset[0], dataset[1])] == [
        ("two\nlines, one cell", "3"),
        ("\ufffd éé?", "4"),
    ]
    assert dataset.skipped == {
        "no answer": 1,
        "line has more fields than there are columns": 1,
        "answer has broken characters": 1,
    }
    assert dataset.notes["broken characters in the question replaced"] == 1


def test_an_image_that_breaks_late_is_replaced_and_counted_once(folder):
    rows = [row(n) for n in range(4)]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for number in (1, 2):
        # A JPEG's header is whole when its data is not.
        rows[number]["image"] = f"{number}.jpg"
        (folder / f"{number}.jpg").write_bytes(encoded(noise, "JPEG")[:2000])
    dataset = load_split(as_jsonl(folder, rows), "all")
    assert len(dataset) == 4
    assert [dataset[i].solution for i in (3, 2, 1, 0, 1)] == ["3", "3", "3", "0", "3"]
    assert dataset.skipped == {"image file is truncated": 2}
    assert dataset.summary() == "data/all: 2 examples; skipped 2: 2 x image file is truncated"
    (folder / "0.png").unlink()
    (folder / "3.png").unlink()
    with pytest.raises(ValueError, match="no row that can be used: 2 x image"):
        dataset[0]


# ---- mistakes -------------------------------------------------------------------------------------------------------


def empty_folder(folder):
    return folder


def only_images(folder):
    picture().save(folder / "1.png")
    return folder


def empty_file(folder):
    return write_jsonl(folder / "data.jsonl", [])


def missing_column(folder):
    return write_jsonl(folder / "data.jsonl", [{"image": "1.png", "ask": "a", "solution": "b"}])


def nothing_readable(folder):
    return write_jsonl(folder / "data.jsonl", [row(1), row(2)])


def text_file(folder):
    (folder / "data.txt").write_text("hello")
    return folder / "data.txt"


def broken_parquet(folder):
    (folder / "data.parquet").write_bytes(b"PAR1 not really")
    return folder


def broken_saved(folder):
    (folder / "state.json").write_text("{}")
    return folder


def too_few_rows(folder):
    picture().save(folder / "1.png")
    return write_jsonl(folder / "data.jsonl", [row(1)])


MISTAKES = [
    (lambda folder: "vcc", r"data 'vcc' does not exist \(did you mean 'vc'\?\)"),
    (lambda folder: folder / "nowhere", "does not exist"),
    (empty_folder, "has no .jsonl, .json, .csv or .parquet file"),
    (only_images, "has images, but no metadata.jsonl or metadata.csv"),
    (empty_file, "no readable row for test: there are no rows"),
    (
        missing_column,
        r"no column 'problem' \(or question, .* messages\); its columns are ask, image, solution; say which it is with",
    ),
    (nothing_readable, "no readable row for all: 2 x image file not found"),
    (text_file, "is not a .jsonl, .json, .csv or .parquet file"),
    (broken_parquet, "not readable as Parquet"),
    (broken_saved, "not readable as a saved data set"),
    (too_few_rows, "no readable row for test: there are too few rows"),
]


@pytest.mark.parametrize(("write", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_mistakes_are_one_sentence(tmp_path, write, message):
    split = "all" if write is nothing_readable else "test"
    with pytest.raises(ValueError, match=message) as error:
        load_split(write(tmp_path), split)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_without_datasets_only_parquet_and_saved_data_cannot_be_read(folder):
    rows = [row(n) for n in range(5)]
    files = [as_jsonl(folder, rows), as_csv(folder, rows), as_parquet_of_bytes(folder, rows), as_saved(folder, rows)]
    code = (
        "import sys; sys.modules |= {'datasets': None, 'pyarrow': None}\n"
        "from mr1fast import evaluate, train\nfrom mr1fast.training import loop\n"
        "from mr1fast.data.dataset import load_split\n"
        "for source in 'vc', *sys.argv[1:3]: load_split(source, 'train')\n"
        "print(train.main(['--data', sys.argv[3]]), evaluate.main(['--data', sys.argv[4]]))"
    )
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *files],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 2\n"
    for error, file in zip(done.stderr.splitlines(), files[2:], strict=True):
        assert error.startswith(f"error: data '{file}' needs the package 'datasets' (")
        assert error.endswith("): pip install datasets")


def test_without_math_verify_only_formulas_cannot_be_answers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert len(load_split(as_jsonl(folder, [row(n) for n in range(3)]), "all")) == 3
    formula = as_jsonl(folder, [row(0), row(1, solution=r"2\sqrt{3}")])
    with pytest.raises(ValueError, match=r"'2\\\\sqrt\{3\}' is not a plain number and needs .*pip install math-verify"):
        load_split(formula, "all")


def test_unknown_split(folder):
    with pytest.raises(ValueError, match="split must be one of train, validation, test, vehicles, far, got 'tset'"):
        load_split("vc", "tset")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'vehicles'"):
        load_split(as_jsonl(folder, [row(0)]), "vehicles")


def test_a_task_has_more_splits_and_wordings():
    vehicles = load_split("vc", "vehicles", count=12, reworded=True)
    drawn = [TASKS["vc"].example("vehicles", index, reworded=True) for index in range(12)]
    assert [vehicles[index] for index in range(12)] == drawn
    assert {example.problem for example in drawn} == set(TASKS["vc"].questions)

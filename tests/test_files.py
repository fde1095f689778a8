"""What is in whole files: encodings and separators of CSV, types of Parquet columns, shards unlike the others."""

import base64
import datetime
import decimal
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_files import as_jsonl, encoded, picture, row, solutions, with_bytes, write_jsonl
from PIL import Image

from mr1fast.data.dataset import load_split
from mr1fast.errors import UserError

# ---- text -----------------------------------------------------------------------------------------------------------

GERMAN, TYPOGRAPHIC, CHINESE = "Wie groß? Größe über 3 °C; ½", "“How many” – € …", "图中有几个物体？三角形"
ENCODINGS = [
    ("utf-8", GERMAN, ""),
    ("utf-8-sig", CHINESE, ""),
    ("utf-16", GERMAN + CHINESE, ""),
    ("utf-16-le", CHINESE, ""),  # with a byte order mark, see below
    ("utf-16-be", GERMAN, ""),
    ("utf-32", CHINESE, ""),
    ("latin-1", GERMAN, "Windows-1252"),
    ("cp1252", TYPOGRAPHIC, "Windows-1252"),
    ("gb18030", CHINESE, "GB 18030"),
]


def csv_file(folder, question, separator=",", encoding="utf-8"):
    lines = [separator.join(("image", "problem", "solution"))]
    lines += [separator.join((f"{n}.png", f'"{question}"', str(n))) for n in range(5)]
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (folder / "data.csv").write_bytes((mark + "\r\n".join(lines)).encode(encoding))
    return folder / "data.csv"


@pytest.mark.parametrize(("encoding", "question", "said"), ENCODINGS)
def test_csv_in_every_encoding(folder, encoding, question, said):
    dataset = load_split(csv_file(folder, question, encoding=encoding), "all")
    assert [dataset[i].problem for i in range(5)] == [question] * 5
    assert not dataset.skipped
    assert (f"data.csv is not UTF-8, read as {said}" in dataset.notes) == bool(said)
    assert (f"read as {said}" in dataset.summary()) == bool(said)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_csv_with_every_separator(folder, separator, encoding):
    question = "a, b; c\td | é?"
    dataset = load_split(csv_file(folder, question, separator, encoding), "all")
    assert [(dataset[i].problem, dataset[i].solution) for i in range(5)] == [(question, str(n)) for n in range(5)]
    assert not dataset.skipped


def test_a_few_broken_bytes_do_not_make_another_encoding(folder):
    file = csv_file(folder, CHINESE)
    file.write_bytes(file.read_bytes() + b"\r\n5.png,caf\xe9?,5\r\n")
    dataset = load_split(file, "all")
    assert [dataset[i].problem for i in (0, 4, 5)] == [CHINESE, CHINESE, "caf\ufffd?"]
    assert "read as" not in dataset.summary()


def test_an_image_longer_than_the_longest_cell_of_pythons_csv(folder):
    noise = Image.frombytes("RGB", (300, 300), random.Random(0).randbytes(270_000))
    url = "data:image/png;base64," + base64.b64encode(encoded(noise)).decode()
    assert len(url) > 2**17
    (folder / "data.csv").write_text(f'image,problem,solution\n"{url}",How many?,3\n1.png,How many?,4\n')
    dataset = load_split(folder / "data.csv", "all")
    assert dataset[0].image.tobytes() == noise.tobytes()
    assert solutions(dataset) == ["3", "4"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_json_with_a_byte_order_mark(folder, encoding, name):
    rows = [row(n, problem=f"{CHINESE} \u2028 {n}") for n in range(3)]
    text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (folder / name).write_bytes(text.encode(encoding))
    dataset = load_split(folder / name, "all")
    assert [dataset[i].problem for i in range(3)] == [r["problem"] for r in rows]


def test_latin_1_in_json_lines_is_left_out_and_counted(folder):
    lines = [json.dumps(row(n, problem=text), ensure_ascii=False) for n, text in enumerate(("How many?", "Größe?"))]
    (folder / "data.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    dataset = load_split(folder / "data.jsonl", "all")
    assert (len(dataset), dataset.skipped) == (1, {"line is not UTF-8": 1})


# ---- Parquet --------------------------------------------------------------------------------------------------------

A, D, P = pyarrow.array, decimal.Decimal, pyarrow
COLUMNS = {
    "decimal": (A([D("1.50"), D("2.00"), None], P.decimal128(10, 2)), ["1.5", "2"]),
    "long decimal": (A([D("1.50"), D("-0.25"), None], P.decimal256(60, 2)), ["1.5", "-0.25"]),
    "float32": (A([0.1, 3.0, None], P.float32()), ["0.1", "3"]),
    "float16": (A([0.1, 3.0, float("nan")], P.float16()), ["0.1", "3"]),
    "float64": (A([0.1, 1e-05, None], P.float64()), ["0.1", "1e-05"]),
    "list of float32": (A([[0.1], [1e-05], []], P.list_(P.float32())), ["0.1", "1e-05"]),
    "large list": (A([["7"], ["8"], ["1", "2"]], P.large_list(P.string())), ["7", "8"]),
    "list of a list": (A([[["7"]], [["8"]], [[]]], P.list_(P.list_(P.string()))), ["7", "8"]),
    "int8": (A([7, -8, None], P.int8()), ["7", "-8"]),
    "uint64": (A([2**64 - 1, 0, None], P.uint64()), [str(2**64 - 1), "0"]),
    "large string": (A(["7", "8", None], P.large_string()), ["7", "8"]),
    "string view": (A(["7", "8", None], P.string_view()), ["7", "8"]),
    "dictionary": (A(["7", "8", None]).dictionary_encode(), ["7", "8"]),
    "binary": (A(["7°".encode(), b"8", None], P.binary()), ["7°", "8"]),
    "null": (A([None] * 3, P.null()), []),
    "bool": (A([True, False, None]), []),
    "date": (A([datetime.date(2024, 1, 2), None, None]), []),
    "timestamp": (A([datetime.datetime(2024, 1, 2), None, None]), []),
    "struct": (A([{"a": 1}, None, None]), []),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet_columns_of_every_type(folder, kind):
    """Read rightly, or left out and counted; with a column of a type that `datasets` does not know beside it."""
    column, expected = COLUMNS[kind]
    table = pyarrow.table(
        {
            "image": ["0.png", "1.png", "2.png"],
            "problem": ["a", "b", "c"],
            "solution": column,
            "other": A([[("a", 1)], None, None], P.map_(P.string(), P.int64())),
        }
    )
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    if expected:
        dataset = load_split(folder / "data.parquet", "all")
        assert solutions(dataset) == expected
        assert dataset.skipped.total() == 3 - len(expected)
    else:
        with pytest.raises(UserError, match=r"has no readable row for all: \d x (no answer|answer is neither text)"):
            load_split(folder / "data.parquet", "all")


@pytest.mark.parametrize("saved", [False, True])
def test_classes_go_by_their_names(folder, saved):
    rows = [row(n, solution=n % 2) for n in range(4)] + [row(4, solution=-1)]
    features = datasets.ClassLabel(names=["circle", "square"])
    data = with_bytes(folder, rows).cast_column("solution", features)
    if saved:
        data.save_to_disk(folder / "saved")
    else:
        data.to_parquet(folder / "saved.parquet")
    dataset = load_split(folder / ("saved" if saved else "saved.parquet"), "all")
    assert solutions(dataset) == ["circle", "square", "circle", "square"]
    assert dataset.skipped == {"no answer": 1}


def test_lists_of_classes(folder):
    features = datasets.Features(
        image=datasets.Value("string"),
        problem=datasets.Value("string"),
        solution=datasets.List(datasets.ClassLabel(names=["circle", "square"])),
    )
    rows = [row(n, solution=[n]) for n in range(2)]
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "data.parquet")
    assert solutions(load_split(folder / "data.parquet", "all")) == ["circle", "square"]


def shard(folder, number, rows):
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / f"train-0000{number}-of-00009.parquet")


def test_shards_that_are_not_like_the_others(folder):
    """No bytes, no rows, another schema, a missing column, not Parquet: what is good is read, the rest is counted."""
    shard(folder, 0, [row(n) for n in range(3)])
    (folder / "train-00001-of-00009.parquet").touch()
    empty = pyarrow.table({name: pyarrow.array([], pyarrow.string()) for name in ("image", "problem", "solution")})
    pyarrow.parquet.write_table(empty, folder / "train-00002-of-00009.parquet")
    shard(folder, 3, [{"more": 1, **row(3, solution=3.0, image={"bytes": encoded(picture(3)), "path": None})}])
    shard(folder, 4, [{"image": "4.png", "problem": "no solution here"}])
    (folder / "train-00005-of-00009.parquet").write_bytes(b"PAR1 half a download")
    dataset = load_split(folder, "train", used=("train",))
    assert sorted(solutions(dataset)) == ["0", "1", "2", "3"]
    assert dataset.skipped["no answer"] == 1
    assert dataset.skipped["train-00001-of-00009.parquet is empty"] == 1
    assert dataset.skipped.total() == 3
    assert "train-00005-of-00009.parquet is not readable as Parquet: " in dataset.summary()


def test_shards_none_of_which_is_good(folder):
    (folder / "a.parquet").touch()
    (folder / "b.parquet").write_bytes(b"PAR1 half a download")
    message = "has no readable row for test: 1 x a.parquet is empty, 1 x b.parquet is not readable as Parquet: "
    with pytest.raises(UserError, match=message):
        load_split(folder, "test")


def test_empty_text_files_among_good_ones(folder):
    as_jsonl(folder, [row(n) for n in range(3)])
    for name in ("a.jsonl", "b.json", "c.csv"):
        (folder / name).touch()
    write_jsonl(folder / "d.jsonl", [])
    assert len(load_split(folder, "all")) == 3


def test_choices_in_single_precision(folder):
    table = pyarrow.table({name: [value] for name, value in row(0).items()})
    table = table.append_column("choices", A([[0.1, 2.5]], P.list_(P.float32())))
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    assert load_split(folder / "data.parquet", "all")[0].choices == ("0.1", "2.5")

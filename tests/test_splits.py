"""Which rows of local data, and which problems of the embedded tasks, are in which split."""

from itertools import chain

import datasets
import pytest
from data_files import (
    ANYWHERE,
    as_jsonl,
    as_parquet_of_bytes,
    as_parquet_of_images,
    as_saved,
    as_saved_of_image_lists,
    picture,
    row,
    shown,
    solutions,
    with_bytes,
    write_jsonl,
)

from mr1fast.data.dataset import ENDLESS, load_split, split_sizes
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError


def test_unnamed_data_is_cut_80_10_10_disjoint_and_the_same_every_time(folder):
    file = as_jsonl(folder, [row(n) for n in range(30)])
    parts = {split: solutions(load_split(file, split)) for split in ("train", "validation", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 24, "validation": 3, "test": 3}
    assert sorted(chain(*parts.values()), key=int) == [str(n) for n in range(30)]
    assert parts["test"] == solutions(load_split(file, "test"))


@pytest.mark.parametrize(
    "write", [as_jsonl, as_parquet_of_bytes, as_parquet_of_images, as_saved, as_saved_of_image_lists]
)
def test_questions_about_one_image_stay_in_one_split(folder, write):
    file = write(folder, [row(n % 10, solution=str(n)) for n in range(30)])
    images = [
        {dataset[i].image.getpixel((0, 0)) for i in range(len(dataset))}
        for dataset in (load_split(file, split) for split in ("train", "validation", "test"))
    ]
    assert [len(seen) for seen in images] == [8, 1, 1]
    assert len(set.union(*images)) == 10


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"train.jsonl": 20, "val.jsonl": 5, "test.jsonl": 4}, (20, 5, 4)),
        (
            {"data/train-00000-of-2.jsonl": 8, "data/train-00001-of-2.jsonl": 8, "data/test-0.jsonl": 4},
            (14, 2, 4),
        ),
        ({"train/metadata.jsonl": 10, "validation/metadata.jsonl": 3}, (9, 3, 1)),
        ({"rows.jsonl": 20, "test.jsonl": 7}, (18, 2, 7)),
    ],
)
def test_names_decide_the_split(tmp_path, layout, expected):
    number = 0
    for name, length in layout.items():
        write_jsonl(tmp_path / name, [row(number + n) for n in range(length)])
        for n in range(number, number + length):
            picture(n).save((tmp_path / name).parent / f"{n}.png")
        number += length
    parts = [solutions(load_split(tmp_path, split)) for split in ("train", "validation", "test")]
    assert tuple(map(len, parts)) == expected
    assert len(set(chain(*parts))) == number


def test_a_line_says_where_the_splits_come_from(folder):
    write_jsonl(folder / "part" / "train.jsonl", [row(f"../{n}") for n in range(20)])
    write_jsonl(folder / "part" / "test.jsonl", [row(f"../{n}") for n in range(20, 30)])
    as_jsonl(folder, [row(n) for n in range(30)])
    named, unnamed = (
        split_sizes([load_split(source, split, reading=ANYWHERE) for split in ("train", "validation", "test")])
        for source in (folder / "part", folder / "data.jsonl")
    )
    assert named == "part: train 18, validation 2 (cut from train), test 10"
    rest = "(cut from the unnamed rows)"
    assert unnamed == f"data: train 24, validation 3 {rest}, test 3 {rest}"


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_data_without_a_readable_row_says_why(folder, rows):
    file = as_jsonl(folder, [row("gone") for _ in range(rows)])
    for split in ("train", "validation", "test"):
        with pytest.raises(UserError, match=f"no readable row for {split}: {rows} x image file not found"):
            load_split(file, split)
    file = as_jsonl(folder, [row(1), row(2)])
    with pytest.raises(UserError, match="no readable row for test: there are too few rows for it"):
        load_split(file, "test")


def test_a_folder_with_a_test_split_alone(folder):
    write_jsonl(folder / "test.jsonl", [row(n) for n in range(30)])
    with pytest.raises(UserError, match="no readable row for train: all rows are of test"):
        load_split(folder, "train")


def test_saved_splits(folder):
    parts = {"train": range(6), "validation": range(6, 8), "test": range(8, 12)}
    saved = datasets.DatasetDict({name: with_bytes(folder, [row(n) for n in part]) for name, part in parts.items()})
    saved.save_to_disk(folder / "saved")
    assert solutions(load_split(folder / "saved", "test")) == ["8", "9", "10", "11"]


def test_count_is_of_good_rows(folder):
    rows = [row(n) for n in range(10)]
    rows[0]["image"] = "missing.png"
    dataset = load_split(as_jsonl(folder, rows), "all", count=3)
    assert solutions(dataset) == ["1", "2", "3"]
    assert len(load_split(folder / "data.jsonl", "all", count=100)) == 9


def test_embedded_tasks():
    dataset = load_split("vc", "test", count=3)
    assert (dataset.name, len(dataset), dataset.summary()) == ("vc", 3, "vc/test: 3 examples")
    assert dataset[2].solution == TASKS["vc"].example("test", 2).solution
    assert len(load_split("vc", "train")) == ENDLESS
    assert len(load_split("gr", "train")) == ENDLESS
    assert len(load_split("gr", "test")) == 200
    assert len(load_split("gr", "test", count=400)) == 200, "a problem would come twice"
    assert len(load_split("gr", "test", count=7)) == 7
    assert len(load_split("gr", "validation", count=128)) == 80
    with pytest.raises(IndexError):
        dataset[3]


# ---- what is cut, and when ------------------------------------------------------------------------------------------


def test_without_validation_its_share_is_trained_on(folder):
    file = as_jsonl(folder, [row(n) for n in range(30)])
    everything = {split: shown(load_split(file, split)) for split in ("train", "validation", "test")}
    assert shown(load_split(file, "train", used=("train", "test"))) == everything["train"] | everything["validation"]
    assert shown(load_split(file, "test", used=("train", "test"))) == everything["test"]
    assert shown(load_split(file, "train", used=("train",))) == set(range(30))


def test_with_a_test_split_of_its_own_and_without_validation_all_is_trained_on(folder):
    write_jsonl(folder / "train.jsonl", [row(n) for n in range(20)])
    write_jsonl(folder / "test.jsonl", [row(n) for n in range(20, 30)])
    assert len(load_split(folder, "train", used=("train", "test"))) == 20


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("test.jsonl", "test"),
        ("test-00000-of-00001.jsonl", "test"),
        ("clevr_test_200.jsonl", "test"),
        ("eval.jsonl", "test"),
        ("val.jsonl", "validation"),
        ("dev.jsonl", "validation"),
        ("test/metadata.jsonl", "test"),
        ("validation/metadata.jsonl", "validation"),
    ],
)
def test_a_lone_file_is_the_split_that_its_name_says(folder, name, split):
    file = write_jsonl(folder / name, [row(n, image=str(folder / f"{n}.png")) for n in range(10)])
    dataset = load_split(file, split, reading=ANYWHERE)
    assert (len(dataset), dataset.split, dataset.cut_from) == (10, split, "")
    for other in {"train", "validation", "test"} - {split}:
        with pytest.raises(UserError, match=f"no readable row for {other}: all rows are of {split}"):
            load_split(file, other, reading=ANYWHERE)
    assert len(load_split(file, "all", reading=ANYWHERE)) == 10
    dataset = load_split(file, None, reading=ANYWHERE)
    assert (len(dataset), dataset.split) == (10, "test" if split == "test" else "all")


@pytest.mark.parametrize(("name", "cut_from"), [("train.jsonl", "train"), ("rows.jsonl", "the unnamed rows")])
def test_a_lone_file_of_another_name_is_cut_for_training_alone(folder, name, cut_from):
    file = write_jsonl(folder / name, [row(n) for n in range(10)])
    splits = [load_split(file, split) for split in ("train", "validation", "test")]
    assert [(len(one), one.cut_from) for one in splits] == [(8, ""), (1, cut_from), (1, cut_from)]
    dataset = load_split(file, None)
    assert (len(dataset), dataset.split, dataset.cut_from) == (10, "all", "")


@pytest.mark.parametrize(("name", "split"), [("test", "test"), ("val", "validation"), ("Evaluation", "test")])
def test_a_folder_named_after_a_split_is_that_split(folder, name, split):
    write_jsonl(folder / name / "rows.jsonl", [row(n, image=str(folder / f"{n}.png")) for n in range(10)])
    assert len(load_split(folder / name, split, reading=ANYWHERE)) == 10
    with pytest.raises(UserError, match=f"all rows are of {split}"):
        load_split(folder / name, "train", reading=ANYWHERE)


def test_a_word_in_the_name_of_the_whole_folder_says_nothing(folder):
    for name in ("my-test-project", "training_data_val"):
        write_jsonl(folder / name / "rows.jsonl", [row(n, image=str(folder / f"{n}.png")) for n in range(10)])
        assert len(load_split(folder / name, "train", reading=ANYWHERE)) == 8


def test_a_saved_split_alone(folder):
    data = datasets.DatasetDict({name: with_bytes(folder, [row(n) for n in range(6)]) for name in ("train", "test")})
    data.save_to_disk(folder / "saved")
    assert len(load_split(folder / "saved" / "test", "test")) == 6
    assert load_split(folder / "saved", "train", used=("train", "test")).shown_in == {"test": 6}


def test_no_split_is_the_test_split_where_there_is_one(folder):
    write_jsonl(folder / "parts" / "train.jsonl", [row(f"../{n}") for n in range(20)])
    assert [(d.split, len(d), d.cut_from) for d in [load_split(folder / "parts", None, reading=ANYWHERE)]] == [
        ("test", 2, "train")
    ]
    write_jsonl(folder / "parts" / "test.jsonl", [row(f"../{n}") for n in range(20, 25)])
    assert [(d.split, len(d), d.cut_from) for d in [load_split(folder / "parts", None, reading=ANYWHERE)]] == [
        ("test", 5, "")
    ]
    assert load_split("gr", None).split == "test"


def test_a_named_split_without_rows_says_so(folder):
    write_jsonl(folder / "train.jsonl", [row(n) for n in range(20)])
    write_jsonl(folder / "test.jsonl", [])
    with pytest.raises(UserError, match="no readable row for test: there are no rows"):
        load_split(folder, "test")

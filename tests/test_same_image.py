"""One image, spelt and kept in many ways, is known as one: no image of a split that was cut is trained on."""

import random

import pytest
from data_files import ANYWHERE, as_jsonl, row, shown, spellings, with_bytes, write_jsonl
from PIL import Image

from mr1fast.data.dataset import load_split


def test_rows_with_the_same_image_stay_together_however_it_is_spelt(folder):
    rows = [row(number, image=image) for number in range(10) for image in spellings(folder, number)]
    random.Random(0).shuffle(rows)
    file = as_jsonl(folder, rows)
    splits = [load_split(file, split) for split in ("train", "validation", "test")]
    assert [len(one) for one in splits] == [8 * 13, 13, 13]
    assert [len(shown(one)) for one in splits] == [8, 1, 1]
    assert len(set.union(*map(shown, splits))) == 10


def test_bytes_in_parquet_and_a_file_are_the_same_image(folder):
    rows = [row(n) for n in range(10)]
    as_jsonl(folder, rows)
    with_bytes(folder, rows).to_parquet(folder / "more.parquet")
    splits = [load_split(folder, split) for split in ("train", "validation", "test")]
    assert [len(one) for one in splits] == [16, 2, 2]
    assert len(set.union(*map(shown, splits))) == sum(len(shown(one)) for one in splits) == 10


def test_images_that_differ_only_in_the_middle_are_different(folder):
    """As uncompressed ones on a plain background do: their ends and their lengths are the same."""
    rows = []
    for number in range(10):
        image = Image.new("RGB", (100, 100), "white")
        image.putpixel((50, 50), (number, 0, 0))
        image.save(folder / f"{number}.bmp")
        rows.append(row(number, image=f"{number}.bmp"))
    assert [len(load_split(as_jsonl(folder, rows), split)) for split in ("train", "validation", "test")] == [8, 1, 1]


NAMED = [("train.jsonl", range(20)), ("test.jsonl", (3, 4, 25)), ("val.jsonl", (4, 5, 26, 27))]


@pytest.fixture
def overlapping(folder):
    for name, numbers in NAMED:
        rows = [row(n, image=spellings(folder, n)[7 if name == "test.jsonl" else 0]) for n in numbers]
        write_jsonl(folder / "parts" / name, [r | {"image": str(folder / r["image"])} for r in rows])
    return folder / "parts"


def test_splits_that_are_named_stay_as_they_are_and_what_they_share_is_said(overlapping):
    train, validation, test = (
        load_split(overlapping, split, reading=ANYWHERE) for split in ("train", "validation", "test")
    )
    assert [shown(one) for one in (train, test, validation)] == [set(numbers) for _, numbers in NAMED]
    assert train.shown_in == {"test": 2, "validation": 2}
    said = "parts/train: 20 examples; warning: 2 of them show an image of the test split; warning: 2 of them show"
    assert train.summary().startswith(said)
    assert not test.shown_in + validation.shown_in


def test_of_a_split_that_is_not_used_nothing_is_said(overlapping):
    assert load_split(overlapping, "train", used=("train", "test"), reading=ANYWHERE).shown_in == {"test": 2}
    assert not load_split(overlapping, "train", used=("train",), reading=ANYWHERE).shown_in


def test_splits_without_an_image_in_common(folder):
    for name, numbers in (("train.jsonl", range(10)), ("test.jsonl", range(10, 15))):
        write_jsonl(folder / name, [row(n) for n in numbers])
    train = load_split(folder, "train")
    assert not train.shown_in
    assert train.summary() == f"{folder.name}/train: 9 examples"

"""One image, spelt and kept in many ways, is in one split; and none of a held-out split is trained on."""

import random

import pytest
from data_files import as_jsonl, row, shown, spellings, with_bytes, write_jsonl
from PIL import Image

from mr1fast.data.dataset import load_split
from mr1fast.errors import UserError


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


def test_an_image_of_a_named_split_is_not_trained_on(overlapping):
    train, validation, test = (load_split(overlapping, split) for split in ("train", "validation", "test"))
    assert shown(test) == {3, 4, 25}
    assert shown(validation) == {4, 5, 26, 27}
    assert shown(train) == set(range(20)) - {3, 4, 5}
    assert train.skipped == {"image is also in the test split": 2, "image is also in the validation split": 1}
    assert "parts/train: 17 examples; skipped 3: 2 x image is also in the test split, 1 x" in train.summary()
    assert not test.skipped
    assert not validation.skipped


def test_a_split_that_is_not_used_takes_nothing_away(overlapping):
    train = load_split(overlapping, "train", used=("train", "test"))
    assert shown(train) == set(range(20)) - {3, 4}
    assert train.skipped == {"image is also in the test split": 2}
    assert shown(load_split(overlapping, "train", used=("train",))) == set(range(20))


def test_validation_is_cut_from_what_the_test_split_leaves(overlapping):
    (overlapping / "val.jsonl").unlink()
    train, validation, test = (load_split(overlapping, split) for split in ("train", "validation", "test"))
    assert (len(train), len(validation), validation.cut_from) == (16, 2, "train")
    assert not shown(test) & (shown(train) | shown(validation))
    assert shown(train) | shown(validation) == set(range(20)) - {3, 4}


def test_training_on_nothing_but_test_images_is_refused(folder):
    for name in ("train.jsonl", "test.jsonl"):
        write_jsonl(folder / name, [row(n) for n in range(3)])
    with pytest.raises(UserError, match="no readable row for train: 3 x image is also in the test split"):
        load_split(folder, "train")

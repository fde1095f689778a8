"""Data by its name on the Hugging Face hub: its splits where there is a network, else how to have it as a folder."""

import datasets
import pytest
from data_files import encoded, picture, row, solutions
from train_program import main

from mr1fast import evaluate
from mr1fast.data.dataset import load_split
from mr1fast.data.sources import data_name, source_of, sources_of
from mr1fast.errors import UserError
from mr1fast.options.parse import parse_arguments

NAME = "leonardPKU/clevr_cogen_a_train"


def part(numbers):
    images = [{"bytes": encoded(picture(n)), "path": None} for n in numbers]
    rows = [row(n, image=image) for n, image in zip(numbers, images)]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_a_data_set_on_the_hub_with_its_splits(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    on_hub = {
        "somebody/shapes": {"train": part(range(20)), "test": part(range(20, 24))},
        NAME: {"train": part(range(9))},
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or datasets.DatasetDict(on_hub[name]))
    test = load_split("somebody/shapes", None)
    assert (test.name, test.split, test.cut_from, solutions(test)) == ("shapes", "test", "", ["20", "21", "22", "23"])
    assert len(load_split("somebody/shapes", "train", used=("train", "test"))) == 20
    assert asked == ["somebody/shapes"]  # once
    assert [len(load_split(NAME, split)) for split in ("train", "validation", "test")] == [7, 1, 1]
    assert test[0].image.getpixel((0, 0))[0] == 20


def test_what_is_a_name_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert (source_of(NAME), data_name(NAME)) == (NAME, "clevr_cogen_a_train")
    for path in ("there", "there/mistyped", "./a/b", "a/b/c", "missing", "vc"):
        assert source_of(path) == str(tmp_path / path.removeprefix("./"))
    assert sources_of(f"vc, {NAME},there") == ("vc", NAME, str(tmp_path / "there"))
    (tmp_path / "a,b.jsonl").touch()
    assert sources_of("a,b.jsonl") == (str(tmp_path / "a,b.jsonl"),)
    assert parse_arguments(["--data", NAME, "--test-data", "gr"]).config.resolved()["data"] == NAME


def test_without_a_network_a_sentence_says_how_to_save_it(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def fail(name):
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    says = (
        "data 'a/b' is no path here, and as a data set on the Hugging Face hub it cannot be had (Couldn't reach 'a/b'"
    )
    how = "where there is a network, hf download a/b --repo-type dataset --local-dir DIR, then give --data DIR"
    for program in (main, lambda *arguments: evaluate.main(arguments)):
        assert program("--data", "a/b") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {says}")
        assert error.endswith(f"{how}\n")
        assert error.count("\n") == 1
    with pytest.raises(UserError, match="hf download a/b"):
        load_split("a/b", "train")

"""The paper's four data sets, a few rows of each in its real format, and a run on them."""

import json

import datasets
import pytest
from data_files import encoded, picture, write_jsonl
from train_program import SMALL, main

from mr1fast import evaluate
from mr1fast.data.dataset import load_split
from mr1fast.model.load import EMBEDDED

COUNT = "How many different items are there in the image?"
ANGLE = "As shown in the figure, if angle 1 = 50.0, then the degree of angle 2 is ()"


def as_downloaded(folder, rows, shards):
    """Parquet with images as `datasets` writes it, in the folders that `hf download` makes."""
    rows = [
        {"image": {"bytes": encoded(picture(n)), "path": f"{n}.png"}, "problem": p, "solution": s} for n, p, s in rows
    ]
    (folder / "data").mkdir(parents=True)
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "data.json").write_text("{}")
    (folder / "README.md").write_text("---\ndataset_info: {}\n---\n")
    for number in range(shards):
        data = datasets.Dataset.from_list(rows[number::shards]).cast_column("image", datasets.Image())
        data.to_parquet(folder / "data" / f"train-{number:05d}-of-{shards:05d}.parquet")


@pytest.fixture
def r1v(tmp_path):
    folder = tmp_path / "r1v"
    as_downloaded(folder / "clevr", [(n, COUNT, f"<answer> {n % 8 + 3} </answer>") for n in range(20)], shards=2)
    angles = ["145°", "2√{3}", "9π", "10米", "A"]
    as_downloaded(folder / "geoqa", [(n, ANGLE, f"<answer> {s} </answer>") for n, s in enumerate(angles)], shards=1)
    for path in ("images/superCLEVR_new_0250{:02d}.png", "Geo170K/images/test/{}.png"):
        for number in range(6):
            file = folder / path.format(number)
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(100 + number).save(file)
    lists = {
        "superclevr_test200_counting_problems": ("./images/superCLEVR_new_0250{:02d}.png", COUNT, "{}"),
        "geoqa_test_prompts": ("./Geo170K/images/test/{}.png", ANGLE, "{}°"),
    }
    for name, (path, question, truth) in lists.items():
        rows = [{"image_path": path.format(n), "question": question, "ground_truth": truth.format(n)} for n in range(6)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def test_the_four_formats(r1v):
    clevr, geoqa = (load_split(r1v / name, "train", used=("train",)) for name in ("clevr", "geoqa"))
    assert (len(clevr), clevr[0].problem, clevr[0].solution) == (20, COUNT, "3")
    assert sorted(geoqa[i].solution for i in range(5)) == ["10米", "145°", "2√{3}", "9π", "A"]
    assert not clevr.is_remarkable
    for name, solution in (("superclevr_test200_counting_problems", "5"), ("geoqa_test_prompts", "5°")):
        dataset = load_split(r1v / f"{name}.jsonl", None)
        assert (len(dataset), dataset[5].solution) == (6, solution)
        assert dataset[5].image.getpixel((0, 0)) == (105, 50, 90)
        assert not dataset.skipped


@pytest.mark.slow
def test_a_preset_on_them(r1v, monkeypatch, capsys):
    """Few-shot, in two epochs, tested on both lists, whose images are elsewhere; the small model stands for 2B."""
    monkeypatch.chdir(r1v)
    (r1v.parent / "pictures").mkdir()
    for name in ("images", "Geo170K"):
        (r1v / name).rename(r1v.parent / "pictures" / name)
    lists = "superclevr_test200_counting_problems.jsonl,geoqa_test_prompts.jsonl"
    arguments = ["--preset=vc-2b", "--data=clevr", f"--test-data={lists}", f"--model={EMBEDDED}", "--output-dir=run"]
    small = ["--train-samples=5", "--eval-steps=0", "--max-pixels=3136", *SMALL]
    assert main(*arguments, *small) == 2
    assert "has no readable row for test: 6 x image file not found" in capsys.readouterr().err
    assert main(*arguments, *small, "--image-root=../pictures") == 0
    result = json.loads((r1v / "run" / "result.json").read_text())
    tested = {"superclevr_test200_counting_problems", "geoqa_test_prompts"}
    assert set(result["before"]) == set(result["cross_task"]["clevr"]) == tested
    config = result["config"]
    assert (config["max_steps"], config["beta_max"], config["top_k"], config["train_samples"]) == (5, 0.1, 50, 5)
    assert config["image_root"] == str(r1v.parent / "pictures")
    options = ["--image-root=../pictures", "--columns=problem=question", "--sampled=0", "--output-dir=evaluated"]
    assert evaluate.main(["--model=run/clevr/model", "--data=geoqa_test_prompts.jsonl", *options]) == 0
    assert json.loads((r1v / "evaluated" / "evaluation.json").read_text())["n"] == 6
    assert "columns: question as problem, ground_truth as solution, image_path as image" in capsys.readouterr().out

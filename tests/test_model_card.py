"""README.md beside a trained model."""

import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from mr1fast.data.dataset import load_split
from mr1fast.model.load import EMBEDDED
from mr1fast.options.config import TrainConfig
from mr1fast.options.parse import parse_arguments
from mr1fast.training.model_card import hub_name, write_card

BEFORE = {"n": 40, "greedy_accuracy": 0.425, "format_accuracy": 1.0}
AFTER = {"n": 40, "greedy_accuracy": 0.765, "format_accuracy": 0.5}


def card(folder, name="vc", result=None, **options):
    """The card of a model that was trained with these options, as the hub reads it."""
    setup = SimpleNamespace(
        config=TrainConfig(**options),
        train={name: load_split("vc", "train", count=7)},
        validation={},
        tests={name: load_split("vc", "test", count=5)},
    )
    folder.mkdir(exist_ok=True)
    write_card(folder, setup, name, result or {"before": {}, "after": {}, "cross_task": {}})
    return ModelCard.load(folder / "README.md")


def command(page):
    """The options of the command on the card."""
    words = shlex.split(re.search(r"```\n(python -m mr1fast.train.*?)```", page.content, re.S)[1].replace("\\\n", ""))
    return parse_arguments(words[3:]).given


def test_what_the_hub_reads(tmp_path):
    page = card(tmp_path / "m", "shapes", model="Qwen/Qwen2-VL-2B-Instruct", data="leonardPKU/GEOQA_R1V_Train_8K")
    assert page.data.to_dict() == {
        "base_model": "Qwen/Qwen2-VL-2B-Instruct",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mr1fast", "grpo-d"],
        "datasets": ["leonardPKU/GEOQA_R1V_Train_8K"],
    }
    (tmp_path / "m" / "adapter_config.json").touch()
    page = card(tmp_path / "m", "shapes", model=str(tmp_path / "m"), data=str(tmp_path), method="sft")
    assert page.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mr1fast", "sft"],
    }
    assert "peft.PeftModel" in page.text
    assert str(tmp_path) not in page.content


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-2B-Instruct"),
        ("/root/.cache/hub/models--Qwen--Qwen2-VL-2B-Instruct/snapshots/895c3a49bc", "Qwen/Qwen2-VL-2B-Instruct"),
        ("models/Qwen2-VL-2B/instruct", None),
        ("/data/models", None),
        ("./models", None),
        (str(EMBEDDED), None),
        (None, None),
    ],
)
def test_names_on_the_hub(path, name):
    assert hub_name(path) == name


def test_figures(tmp_path):
    result = {"before": {"vc": BEFORE, "gr": BEFORE}, "after": {"vc": AFTER}, "cross_task": {"vc": {"gr": AFTER}}}
    page = card(tmp_path / "m", result=result)
    rows = [line for line in page.text.splitlines() if line.startswith(("| vc", "| gr"))]
    assert rows == [
        "| vc | 40 | greedy accuracy | 42.5 | 76.5 |",
        "| vc | 40 | well-formed answers | 100.0 | 50.0 |",
        "| gr | 40 | greedy accuracy | 42.5 | 76.5 |",
        "| gr | 40 | well-formed answers | 100.0 | 50.0 |",
    ]
    assert "It has not been measured." in card(tmp_path / "m").text
    assert "- vc/train: 7 examples\n- vc/test: 5 examples\n" in page.text
    assert f"torch {torch.__version__}, transformers " in page.text


def test_the_command_has_what_differs_from_the_defaults(tmp_path):
    given = {"max_steps": 3, "reward_weights": "accuracy=1,a.b:c=2", "lora_rank": 4, "merge": True}
    given |= {"loss": "loss_type=dapo,delta=3", "dynamic_sampling": True}
    elsewhere = {"output_dir": "o", "device": "cpu", "eval_batch_size": 3, "report_to": "none"}
    assert command(card(tmp_path / "m", task="gr,vc", **given, **elsewhere)) == {"task": "vc", **given}
    assert command(card(tmp_path / "m", learning_rate={"vc": 1e-5, "gr": 1e-4}))["learning_rate"] == 1e-5
    page = card(tmp_path / "m", "my shapes", data="/home/me/my shapes", image_root="/home/me", method="sft", seed=1)
    assert command(page) == {"data": "my shapes", "method": "sft", "seed": 1}
    assert "/home" not in page.content


def test_what_the_card_says_about_its_use_works(tmp_path, capsys, monkeypatch):
    shutil.copytree(EMBEDDED, tmp_path / "m")
    page = card(tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    Image.new("RGB", (56, 56)).save("picture.png")
    exec(re.search("```python\n(.*?)```", page.content, re.S)[1], {})
    assert re.search("<answer>.*</answer>", capsys.readouterr().out)

"""What a run saves: the files that Qwen published, which old and new versions of transformers load."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from model_folders import KINDS, hub_folder
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from mr1fast.data.example import Example
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import encode_prompts
from mr1fast.model.save import flat_config, save_processor
from mr1fast.options.prompt import PROMPT_SUFFIX

# A Python with transformers 4.49 (and torch and pillow), or the test that needs it is skipped:
#   python3.11 -m venv old && old/bin/pip install torch==2.13.0 && old/bin/pip install transformers==4.49.0 pillow
OLD_PYTHON = os.environ.get("MR1FAST_TRANSFORMERS_4_PYTHON")


def saved(base, folder):
    folder.mkdir()
    dtype = AutoConfig.from_pretrained(base).dtype
    policy = Policy(load_model(base, dtype=dtype), load_processor(base))
    policy.save(folder)
    return folder


def content(file):
    return json.loads(file.read_text(encoding="utf-8"))


def weight_names(folder):
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_what_tokenizers_cannot_write_is_an_os_error(tmp_path):
    """As where the disk is full, which is one sentence of the program then. Its own exceptions have no type."""
    (tmp_path / "vocab.json").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        save_processor(load_processor(), tmp_path, "qwen2_vl")


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_that_were_published(kind, tmp_path):
    base = hub_folder(tmp_path / "base", **KINDS[kind])
    folder = saved(base, tmp_path / "saved")
    whole = {file.name for file in base.iterdir() if not file.name.startswith("model")} | {"model.safetensors"}
    assert {file.name for file in folder.iterdir()} == whole
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1, "another user can read the weights, too"
    assert weight_names(folder) == weight_names(base)
    for file in ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        before, after = content(base / file), content(folder / file)
        news = {name for name, value in before.items() if after.get(name) != value}
        assert news <= {"transformers_version", "sliding_window", "vision_config", "add_bos_token"}, file
        assert before.get("vision_config", {}).items() <= after.get("vision_config", {}).items()
    for file in ("chat_template.json", "vocab.json", "merges.txt"):
        assert (folder / file).read_text().split() == (base / file).read_text().split()
    text = "<|im_start|>How many?<|image_pad|><tool_call>数\n"
    ids = [AutoTokenizer.from_pretrained(one)(text)["input_ids"] for one in (base, folder)]
    assert ids[0] == ids[1]
    configs = [AutoConfig.from_pretrained(one).to_dict() | {"_name_or_path": ""} for one in (base, folder)]
    assert configs[0] == configs[1]


def test_a_folder_of_transformers_5_is_saved_as_one_of_old(tmp_path):
    folder = saved(EMBEDDED, tmp_path / "saved")
    before, after = content(EMBEDDED / "config.json"), content(folder / "config.json")
    rope = before["text_config"].pop("rope_parameters")
    assert after["rope_theta"] == rope["rope_theta"] == 1e4
    assert after["rope_scaling"] == {"type": "mrope", "mrope_section": rope["mrope_section"]}
    del before["text_config"]["model_type"]
    assert before["text_config"].items() <= after.items()
    assert after["tie_word_embeddings"]
    assert "dtype" not in after
    assert content(folder / "preprocessor_config.json")["max_pixels"] == 3136
    assert content(folder / "tokenizer_config.json")["chat_template"] == (EMBEDDED / "chat_template.jinja").read_text()


def test_a_longer_context_keeps_its_rope():
    """YaRN, as Qwen2.5-VL's model card advises for long prompts."""
    yarn = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4.0, "original_max_position_embeddings": 32768}
    flat = {"model_type": "qwen2_5_vl", "rope_theta": 1e6, "rope_scaling": yarn, "dtype": "bfloat16"}
    config = AutoConfig.for_model(**json.loads(json.dumps(flat)))
    again = flat_config(config.to_dict())
    assert again["rope_theta"] == 1e6
    assert again["rope_scaling"] == yarn | {"rope_type": "yarn"}
    text = AutoConfig.for_model(**json.loads(json.dumps(again))).get_text_config()
    assert text.rope_parameters == config.get_text_config().rope_parameters


@pytest.mark.skipif(OLD_PYTHON is None, reason="MR1FAST_TRANSFORMERS_4_PYTHON names no Python with transformers 4.49")
@pytest.mark.parametrize("kind", ["embedded", *KINDS])
def test_transformers_4_computes_the_same(kind, tmp_path, one_thread):
    folder = saved(EMBEDDED if kind == "embedded" else hub_folder(tmp_path / "base", **KINDS[kind]), tmp_path / "saved")
    image, question = tmp_path / "image.png", "How many? <think> 数"
    Image.effect_noise((130, 90), 90).convert("RGB").save(image)
    (tmp_path / "questions.json").write_text(json.dumps([[str(image), f"{question} {PROMPT_SUFFIX}"]]))
    command = [OLD_PYTHON, Path(__file__).parent / "load_in_transformers_4.py", folder]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [*command, tmp_path / "questions.json", tmp_path / "out.pt"], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    theirs = torch.load(tmp_path / "out.pt")
    about = theirs["about"]
    assert about["version"].startswith("4.")
    assert not about["wrong"]
    assert about["tied"] == ("7B" not in kind)
    prefix = "Qwen2_5_VL" if "2.5" in kind else "Qwen2VL"
    assert about["processor"] == f"{prefix}Processor"
    assert about["model"] == f"{prefix}ForConditionalGeneration"
    model, processor = load_model(folder).eval(), load_processor(folder)
    inputs = encode_prompts(processor, [Example(Image.open(image), question, "")])
    (answer,) = theirs["answers"]
    assert torch.equal(inputs["input_ids"], answer["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, answer["logits"], atol=1e-5, rtol=1e-5)

"""--prompt-suffix and --system-prompt: what a model is told beside the question."""

import json
import re
import shutil

import pytest
from model_folders import hub_folder
from train_program import SMALL, main

from mr1fast import evaluate
from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import encode_prompts, prompt_length, prompt_text
from mr1fast.options.config import TrainConfig
from mr1fast.options.prompt import PROMPT_FILE, PROMPT_SUFFIX, Prompt, recorded_prompt
from mr1fast.training.setup import doubts

BOXED = r"Reason step by step, and put your answer within \boxed{}."


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / "model")


def test_the_default_is_the_prompt_of_r1_vs_evaluations(hub):
    """Written out; R1-V puts its QUESTION_TEMPLATE into Qwen2-VL's chat template with no system turn of its own."""
    assert prompt_text(load_processor(hub), "How many?") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>How many? Output the thinking process in <think> </think> and "
        "final answer (number) in <answer> </answer> tags.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("prompt", "system", "asked"),
    [
        (Prompt(BOXED), "You are a helpful assistant.", f"How many? {BOXED}"),
        (Prompt("\nThink {{ first }}."), "You are a helpful assistant.", "How many?\nThink {{ first }}."),
        (Prompt("", "Be {brief}.\n{% raw %}"), "Be {brief}.\n{% raw %}", "How many?"),
        (Prompt(system="数 <think>"), "数 <think>", f"How many? {PROMPT_SUFFIX}"),
    ],
)
def test_text_is_taken_as_it_is(prompt, system, asked, hub):
    processor = load_processor(hub, prompt=prompt)
    assert prompt_text(processor, "How many?", images=0) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    )
    example = Example(None, "How many?", "1")
    assert prompt_length(processor, example) == encode_prompts(processor, [example])["input_ids"].numel()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt-suffix=Look at <|image_pad|>."], r"--prompt-suffix contains <\|image_pad\|>, which is no text"),
        (["--prompt-suffix=see <image>"], "--prompt-suffix contains <image>, which is no text"),
        (["--system-prompt=One.<|im_end|>"], r"--system-prompt contains <\|im_end\|>, which is no text"),
        (["--prompt-suffix={Question} Think."], r"--prompt-suffix contains \{Question\}, but nothing is filled in"),
        (["--system-prompt=\udcff"], "--system-prompt is not valid Unicode"),
        (["--system-prompt= "], "--system-prompt must be text, got ' '"),
    ],
)
def test_what_cannot_be_part_of_a_prompt_is_one_sentence(options, says, capsys, tmp_path):
    assert main("--task=vc", *options, "--output-dir", tmp_path / "run") == 2
    assert evaluate.main(["--task=vc", *options]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(re.match(f"error: {says}", error) for error in errors), errors
    assert not (tmp_path / "run").exists()


def test_a_template_that_leaves_the_system_prompt_out(hub, tmp_path):
    folder = shutil.copytree(hub, tmp_path / "model")
    template = json.loads((hub / "chat_template.json").read_text())["chat_template"]
    template = "{% set messages = messages[1:] if messages[0].role == 'system' else messages %}" + template
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    load_processor(folder)
    with pytest.raises(UserError, match="it must write the system prompt, the question and"):
        load_processor(folder, prompt=Prompt(system="Be brief."))


def test_a_trained_model_is_evaluated_as_it_was_trained(tmp_path, one_thread):
    run = tmp_path / "run"
    given = ["--prompt-suffix", BOXED, "--system-prompt=Be brief."]
    options = [*SMALL, "--task=vc", "--method=sft", "--max-steps=1", "--eval-steps=0", "--top-k=5", "--top-p=0.9"]
    assert main(*options, *given, "--output-dir", run) == 0
    trained, config = run / "vc" / "model", json.loads((run / "config.json").read_text())
    assert (config["prompt_suffix"], config["system_prompt"]) == (BOXED, "Be brief.")
    assert recorded_prompt(trained) == load_processor(trained).prompt == Prompt(BOXED, "Be brief.")
    assert TrainConfig(model=str(trained)).resolved()["prompt_suffix"] == BOXED
    assert TrainConfig(model=str(trained), prompt_suffix="").prompt == Prompt("", "Be brief.")

    arguments = ["--task=vc", "--samples=2", "--device=cpu", "--top-k=3", f"--model={trained}"]
    for name, more, suffix in (("as", [], BOXED), ("other", [f"--prompt-suffix={PROMPT_SUFFIX}"], PROMPT_SUFFIX)):
        assert evaluate.main([*arguments, *more, f"--output-dir={tmp_path / name}"]) == 0
        settings = json.loads((tmp_path / name / "evaluation.json").read_text())["settings"]
        assert (settings["prompt_suffix"], settings["system_prompt"]) == (suffix, "Be brief.")
        assert (settings["top_k"], settings["top_p"]) == (3, 1.0)


def test_the_papers_prompt_leaves_no_file(hub, tmp_path, monkeypatch):
    Policy(load_model(hub), load_processor(hub)).save(tmp_path)
    assert not (tmp_path / PROMPT_FILE).exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / PROMPT_FILE).write_text("of another program")
    for model in (hub, "Qwen/Qwen2-VL-2B-Instruct", None):
        assert recorded_prompt(model) == Prompt()


def test_a_prompt_that_asks_for_no_tags_is_doubtful():
    says = "neither --prompt-suffix nor --system-prompt asks for <answer> tags, without which"
    boxed, tagged = BOXED, "Answer in <answer> </answer>."
    for options, doubtful in (
        ({}, False),
        ({"prompt_suffix": boxed}, True),
        ({"prompt_suffix": boxed, "method": "sft"}, False),
        ({"prompt_suffix": boxed, "system_prompt": tagged}, False),
        ({"prompt_suffix": boxed, "reward_weights": "r1v-geometry=1"}, False),
    ):
        found = doubts(TrainConfig(**options))
        assert len(found) == doubtful
        assert all(doubt.startswith(says) for doubt in found)
    (found,) = doubts(TrainConfig(warmup_steps=5, max_steps=5))
    assert found.startswith("--warmup-steps 5 is not below --max-steps 5: ")


@pytest.mark.parametrize("content", ["{", "[]", '{"suffix": 1, "system": null}', '{"system": null}'])
def test_a_broken_record_is_named(content, tmp_path):
    (tmp_path / PROMPT_FILE).write_text(content)
    with pytest.raises(UserError, match=f"{PROMPT_FILE} (is not valid JSON|must have)"):
        recorded_prompt(tmp_path)

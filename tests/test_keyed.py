"""Options with keys, --lora, --eval and --save: one option in --help, and each key one of its own."""

import argparse
import json
import re

import pytest

from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.config_file import read_options
from mr1fast.options.keyed import KEYED
from mr1fast.options.parse import FIELDS, build_parser, parse_arguments, printed_config

LORA = {"lora_rank": 16, "lora_alpha": 8.0, "lora_targets": "q_proj,v_proj", "merge": True}


def given(*arguments):
    return parse_arguments([str(argument) for argument in arguments]).given


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--lora rank=16,alpha=8,targets=q_proj,v_proj,merge=yes", LORA),
        ("--lora targets=q_proj,v_proj,merge,rank=16 --lora-alpha 8", LORA),
        ("--lora=rank=16,alpha=8 --lora targets=q_proj,v_proj --merge", LORA),
        ("--lora-rank 16 --lora-alpha 8 --lora-targets q_proj,v_proj --lora-merge", LORA),
        (
            "--eval steps=50,samples=400,validation-samples=7,sampled=0,batch_size=3",
            {"eval_steps": 50, "eval_samples": 400, "eval_validation_samples": 7, "eval_sampled": 0}
            | {"eval_batch_size": 3},
        ),
        ("--save only-model", {"save_only_model": True}),
        ("--save steps=5,total_limit=3,only_model=no",
         {"save_steps": 5, "save_total_limit": 3, "save_only_model": False}),
        ("--eval steps=5 --eval-steps 6", {"eval_steps": 6}),
        ("--eval-steps 6 --eval steps=5", {"eval_steps": 5}),
    ],
)  # fmt: skip
def test_keys_are_short_for_options(arguments, expected):
    assert given(*arguments.split()) == expected


@pytest.mark.parametrize(
    "text",
    [
        "lora: {rank: 16, alpha: 8, targets: [q_proj, v_proj], merge: true}",
        "lora: rank=16,alpha=8,targets=q_proj,v_proj,merge",
        "lora-rank: 16\nlora_alpha: 8\nlora_targets: q_proj,v_proj\nmerge: yes",
        "lora:\n  rank: 16\n  alpha: 8\nlora_targets: q_proj,v_proj\nlora_merge: on\neval:\nsave: {steps: null}",
    ],
)
def test_a_file_has_a_mapping_or_the_long_names(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert given("--config", file) == LORA
    assert given("--config", file, "--lora", "rank=4,merge=no") == LORA | {"lora_rank": 4, "merge": False}
    printed = printed_config(parse_arguments(["--config", str(file)]).config)
    assert "\nlora_rank: 16\nlora_alpha: 8.0\nlora_targets: q_proj,v_proj\nmerge: true\n" in printed


@pytest.mark.parametrize("off", ["--no-merge", "--no-lora-merge", "--lora=merge=no"])
def test_what_a_file_turns_on_the_command_line_can_turn_off(off, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_rank: 4\nmerge: true\nsave_only_model: true")
    config = parse_arguments(["--config", str(file), off, "--no-save-only-model"]).config
    assert (config.lora_rank, config.merge, config.save_only_model) == (4, False, False)


def test_what_older_runs_recorded_is_still_read():
    recorded = {"schema_version": 1, **LORA, "eval_steps": 5, "save_only_model": True, "columns": "problem=q"}
    options, unknown = read_options(json.loads(json.dumps(recorded)), "config.json")
    assert unknown == []
    assert TrainConfig(**options, data="x").eval_steps == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lora rnk=4", "--lora: a key must be one of rank, alpha, targets, merge, got 'rnk' (did you mean 'rank'?)"),
        ("--lora-rnk 4", "unknown option --lora-rnk (did you mean '--lora-rank'?)"),
        (
            "--lora rank",
            "--lora must be KEY=VALUE, separated by commas, such as rank=16,alpha=32,targets=q_proj,v_proj",
        ),
        ("--lora rank=4,8", "--lora must be KEY=VALUE"),
        ("--lora rank=4,rank=8", "--lora names rank twice"),
        ("--lora rank=0", "--lora-rank must be at least 1, got 0"),
        ("--lora rank=4,merge=maybe", "--merge must be yes or no, got 'maybe'"),
        ("--lora rank=4,targets=", "--lora-targets must be text, got ''"),
        ("--lora alpha=4", "--lora-alpha and --lora-targets need --lora-rank"),
        ("--eval step=4", "(did you mean 'steps'?)"),
        ("--save", "expected one argument"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse_arguments(arguments.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: {rnk: 4}", "run.yaml: unknown option 'lora_rnk' (did you mean 'lora_rank'?)"),
        ("lora: rnk=4", "run.yaml: lora: a key must be one of rank"),
        ("lroa: {rank: 4}", "run.yaml: unknown option 'lroa' (did you mean 'lora'?)"),
        ("lora: {rank: 0}", "run.yaml: lora_rank must be at least 1, got 0"),
        ("lora: {rank: 4, merge: 1}", "run.yaml: merge must be yes or no, got 1"),
        ("lora: 16", "run.yaml: lora must have keys, as KEY=VALUE"),
        ("eval: [steps]", "run.yaml: eval must have keys"),
        ("eval: {steps: 1}\nseed: 1\neval_steps: 2", "option 'eval_steps' is set in line 1 and again in line 3"),
        ("eval:\n  steps: 1\n  steps: 2", "option 'eval_steps' is set in line 2 and again in line 3"),
        ("eval: steps=1\neval_steps: 2", "option 'eval_steps' is set in line 1 and again in line 2"),
        ("merge: true\nlora_merge: true", "option 'merge' is set in line 1 and again in line 2"),
    ],
)
def test_mistakes_in_a_file(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(file)])
    assert message in str(error.value)


def test_help_lists_an_option_once_and_no_more_than_sixty():
    listed = [action for action in build_parser()._actions if action.help != argparse.SUPPRESS]
    assert len(listed) <= 60
    assert len(re.findall(r"^ +-", build_parser().format_help(), re.MULTILINE)) <= 60
    strings = [string for action in listed for string in action.option_strings]
    assert {f"--{option}" for option in KEYED} <= set(strings)
    assert {field.metadata["key_of"] for field in FIELDS.values()} == {"", *KEYED}
    assert not [string for string in strings if string.startswith(tuple(f"--{option}-" for option in KEYED))]
    assert "--eval steps=50,samples=400 is --eval-steps 50 --eval-samples 400" in " ".join(
        build_parser().format_help().split()
    )

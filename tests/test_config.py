import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mr1fast.errors import UserError
from mr1fast.options.config import KL_DEFAULTS, RECIPES, TrainConfig, flag
from mr1fast.options.parse import FIELDS, build_parser, parse_arguments


def config(*arguments) -> TrainConfig:
    return parse_arguments([str(argument) for argument in arguments]).config


def test_defaults_by_task():
    vc, gr = (config().for_task(name) for name in ("vc", "gr"))
    assert (vc.prompts_per_step, vc.learning_rate, vc.max_steps) == (16, 3e-4, 200)
    assert (gr.prompts_per_step, gr.learning_rate, gr.max_steps) == (32, 2e-4, 200)
    assert (vc.beta_min, vc.beta_max, vc.kl_schedule, vc.explore_fraction) == (0, 0.04, "paper", 0.3)
    assert vc.beta is None
    assert config().tasks == ("vc", "gr")
    assert config("--task", "gr, vc").tasks == ("gr", "vc")


def test_defaults_by_method_and_model():
    assert config("--method", "grpo").for_task("vc").beta == 0.04
    assert config("--method", "grpo").for_task("vc").beta_max is None
    assert config("--method", "sft").for_task("gr").beta is None
    other = config("--model", "somewhere").for_task("gr")
    assert (other.learning_rate, other.max_completion_length) == (1e-6, 512)
    assert config("--data", "folder").tasks == ()
    assert config("--data", "folder").for_task("data").prompts_per_step == RECIPES["vc"]["prompts_per_step"]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_only_the_papers_schedule_has_an_explore_fraction(schedule):
    filled = config("--kl-schedule", schedule).for_task("vc")
    assert (filled.kl_schedule, filled.explore_fraction, filled.beta_max) == (schedule, None, 0.04)
    assert filled.for_task("vc") == filled


def test_what_is_set_is_not_filled_in():
    filled = config("--learning-rate", "1e-3", "--beta-max", "0.1").for_task("gr")
    assert (filled.learning_rate, filled.beta_max, filled.prompts_per_step) == (1e-3, 0.1, 32)
    assert filled.for_task("gr") == filled


def test_command_line_beats_yaml_beats_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 1e-6\nnum_generations: 4\nseed: 7\ntask: gr\nbeta-max: null\n")
    chosen = config("--config", file, "--seed", 8)
    assert chosen.learning_rate == 1e-6
    assert isinstance(chosen.learning_rate, float)
    assert (chosen.num_generations, chosen.seed, chosen.task, chosen.temperature) == (4, 8, "gr", 1.0)
    request = parse_arguments(["--config", str(file), "--seed", "8"])
    assert request.given == {"learning_rate": 1e-6, "num_generations": 4, "task": "gr", "seed": 8}


def test_a_config_written_as_json_is_read_back(tmp_path):
    file = tmp_path / "config.json"
    before = config("--method", "grpo", "--beta", "0.01", "--task", "vc")
    file.write_text(json.dumps(dataclasses.asdict(before)))
    assert config("--config", file) == before


def test_resume():
    assert parse_arguments([]).resume is None
    assert parse_arguments(["--resume"]).resume == ""
    assert parse_arguments(["--resume", "runs/x", "--seed", "1"]).resume == "runs/x"


BAD_ARGUMENTS = [
    ("--task nonsense", "--task must be one of vc, gr, got 'nonsense'"),
    ("--task vc,vc", "--task vc,vc names a task twice"),
    ("--task vc --data x", "exclude each other"),
    ("--method grpod", "(did you mean 'grpo-d'?)"),
    ("--num-generations 1", "--num-generations must be at least 2, got 1"),
    ("--num-generations 2.5", "--num-generations must be a whole number, got '2.5'"),
    ("--beta-min .2 --beta-max .1", "--beta-min must not be above --beta-max, got 0.2 and 0.1"),
    ("--beta-min .2", "--beta-min must not be above --beta-max, got 0.2 and 0.04"),
    ("--beta .1", "--beta belongs to --method grpo, and the method is grpo-d"),
    ("--method sft --beta-max .1", "--beta-max belongs to --method grpo-d"),
    ("--learning-rate -1", "--learning-rate must be above 0, got -1.0"),
    ("--learning-rate nan", "--learning-rate must be a finite number, got nan"),
    ("--learning-rate inf", "--learning-rate must be a finite number, got inf"),
    ("--learning-rate fast", "--learning-rate must be a number, got 'fast'"),
    ("--temperature 0", "--temperature must be above 0"),
    ("--explore-fraction 1", "--explore-fraction must be below 1"),
    ("--kl-schedule linear --explore-fraction 0.5", "--explore-fraction belongs to --kl-schedule paper"),
    ("--kl-schedule papr", "--kl-schedule must be one of paper, linear"),
    ("--kl-schedule papr", "(did you mean 'paper'?)"),
    ("--kl-schedule adaptive", "--target-kl and --kl-schedule adaptive go together"),
    ("--target-kl 0.1", "--target-kl and --kl-schedule adaptive go together"),
    ("--kl-schedule adaptive --target-kl 0", "--target-kl must be above 0, got 0"),
    ("--dtype float16", "--dtype must be one of auto, float32, bfloat16"),
    ("--learning-rat 1", "unknown option --learning-rat (did you mean '--learning-rate'?)"),
    ("--lerning-rate=1", "(did you mean '--learning-rate'?)"),
    ("nonsense", "unknown argument nonsense"),
    ("--seed", "expected one argument"),
    ("--seed -1", "--seed must be at least 0"),
    ("--seed 99999999999999999999", "--seed must be at most 9223372036854775807"),
    (f"--seed {10**400}", "--seed must be at most 9223372036854775807"),
    ("--gradient-accumulation-steps 3", "must divide --prompts-per-step, got 3 and 16"),
    ("--num-iterations 2 --method sft", "--num-iterations"),
    ("--accuracy-weight 0 --format-weight 0", "nothing would be rewarded"),
    ("--config missing.yaml", "--config missing.yaml cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_one_sentence_for_each_mistake(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        parse_arguments(arguments.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown option 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("seed: true", "seed must be a whole number, got True"),
        ("task: [vc, gr]", "task must be text, got ['vc', 'gr']"),
        ("method: grpo-e", "run.yaml: method must be one of grpo-d, grpo, sft"),
        ("kl-schedule: quick", "run.yaml: kl-schedule must be one of"),
        ("num_generations: 1", "run.yaml: num_generations must be at least 2"),
        ("seed: 1\nmax_steps: [", "run.yaml is not valid YAML in line 2: expected the node content"),
        ("seed: 1: 2", "run.yaml is not valid YAML in line 1: mapping values are not allowed here"),
        ("seed: \0", "run.yaml is not valid YAML: special characters are not allowed"),
        ("seed: 2026-99-01", "run.yaml is not valid YAML: month must be in 1..12"),
        ("seed: 1\nseed: 2", "run.yaml: option 'seed' is in line 1 and again in line 2"),
        ("max_steps: 1\nseed: 2\nmax-steps: 3", "option 'max_steps' is in line 1 and again in line 3"),
        ("- a\n- b", "must hold lines of the form"),
        ("3", "must hold lines of the form"),
    ],
)
def test_yaml_mistakes(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(file)])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_that_is_not_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        parse_arguments(["--config", str(file)])
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        parse_arguments(["--config", str(tmp_path)])


def test_help_explains_every_option_with_its_default():
    text = " ".join(build_parser().format_help().split())
    for name, field in FIELDS.items():
        assert flag(name) in text
        assert field.metadata["help"].split(";")[0].split(",")[0] in text
        if field.default is not None:
            assert f"[default: {field.default}]" in text
    assert "0.0003 for vc and local data, 0.0002 for gr, 1e-06 with --model" in text
    assert all(set(values) <= set(FIELDS) for values in (*RECIPES.values(), *KL_DEFAULTS.values()))


def test_a_mistake_is_answered_without_torch():
    code = "import sys, mr1fast.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", ["paper-vc", "paper-gr"])
def test_the_papers_settings_are_valid(name):
    file = Path(__file__).parent.parent / "examples" / f"{name}.yaml"
    paper = config("--config", file, "--data", "somewhere").for_task("data")
    assert (paper.num_generations, paper.learning_rate, paper.temperature) == (8, 1e-6, 0.9)
    assert (paper.beta_min, paper.beta_max) == {"paper-vc": (0.04, 0.1), "paper-gr": (0.0, 0.02)}[name]
    rows = {"paper-vc": 100, "paper-gr": 8031}[name]
    assert 2 <= paper.max_steps * paper.prompts_per_step / rows < 2.1, "two epochs"
    assert paper.eval_steps == 0, "validation would be cut out of these rows"

"""--preset: the paper's experiments, and what takes precedence over them."""

import pytest

from benchmarks.models import in_proportion
from mr1fast.errors import UserError
from mr1fast.options.parse import parse_arguments, printed_config
from mr1fast.options.preset import PRESETS
from mr1fast.training.plan_run import report


def config(*arguments):
    return parse_arguments([str(argument) for argument in arguments]).config


@pytest.mark.parametrize("name", ["gr-2b", "gr-7b", "vc-2b", "vc-7b"])
def test_a_preset_is_the_papers_setting(name, tmp_path):
    chosen = config("--preset", name)
    task, size = name.split("-")
    assert chosen.model == f"Qwen/Qwen2-VL-{size.upper()}-Instruct"
    assert chosen.train_samples == {"vc-2b": 100, "vc-7b": 120}.get(name)
    data = {"vc": "leonardPKU/clevr_cogen_a_train", "gr": "leonardPKU/GEOQA_R1V_Train_8K"}[task]
    assert (chosen.data, chosen.eval_steps) == (data, 0), "validation would be cut out of these rows"
    run = chosen.with_steps({data: chosen.train_samples or 8031}).for_task(data)
    assert (run.beta_min, run.beta_max) == {"vc": (0.04, 0.1), "gr": (0.0, 0.02)}[task]
    assert (run.kl_schedule, run.explore_fraction, run.method) == ("paper", 0.3, "grpo-d")
    assert (run.num_generations, run.learning_rate, run.temperature, run.top_k) == (8, 1e-6, 1.0, 50)
    assert run.reward_weights == {"accuracy": 1.0, "format": 1.0}
    assert run.max_steps == {"vc-2b": 13, "vc-7b": 15}.get(name, 1004), "two epochs of 16 prompts a step"
    assert run.gradient_accumulation_steps is run.tokens_per_microbatch is None, "as the planner chooses"
    assert PRESETS == ("gr-2b", "gr-7b", "vc-2b", "vc-7b")
    file = tmp_path / "run.yaml"
    file.write_text(printed_config(chosen))
    assert config("--config", file).resolved() == chosen.resolved()


def test_the_config_file_takes_precedence_over_a_preset_and_the_command_line_over_both(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_samples: 7\nmax_steps: 3\ntemperature: 0.5\n")
    chosen = config("--preset", "vc-2b", "--config", file, "--temperature", 0.7)
    assert (chosen.train_samples, chosen.max_steps, chosen.epochs, chosen.temperature) == (7, 3, None, 0.7)
    assert (chosen.beta_max, chosen.top_k) == (0.1, 50)
    assert config("--preset", "vc-2b", "--reward", "r1v-counting").rewards == {
        "accuracy": 1.0, "format": 1.0, "r1v-counting": 1.0,
    }  # fmt: skip


def test_what_other_options_exclude_is_not_left_of_a_preset():
    grpo = config("--preset", "gr-2b", "--method", "grpo", "--beta", 0.01, "--data", "x")
    assert (grpo.with_steps({"x": 16}).for_task("x").beta_max, grpo.beta_min, grpo.epochs) == (0.01, None, 2)
    assert config("--preset", "gr-2b", "--method", "sft").for_task("x").beta_max == 0
    assert config("--preset", "vc-2b", "--kl-schedule", "linear").beta_max == 0.1
    assert config("--preset", "vc-2b", "--task", "gr").tasks == ("gr",)
    assert config("--preset", "vc-2b", "--lora-rank", 16).for_task("x").learning_rate == 1e-5
    assert config("--preset", "vc-2b", "--lora-rank", 16, "--learning-rate", 2e-5).for_task("x").learning_rate == 2e-5


def test_the_plan_of_a_preset(tmp_path):
    """Before its data is there, so without the number of its steps."""
    in_proportion(2, 400).save_pretrained(tmp_path)
    plan, fits = report(config("--preset", "vc-2b", "--model", tmp_path, "--prompts-per-step", 2), gigabytes=80)
    assert fits
    assert "2 prompts, 2 at a time, each of 512 tokens of an image" in plan


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--preset vc-2", "--preset must be one of gr-2b, gr-7b, vc-2b, vc-7b, got 'vc-2' (did you mean 'vc-2b'?)"),
        ("--preset vc-2b --preset vc-7b", "--preset is given twice"),
        ("--preset vc-2b --resume run", "--preset is for a new run, and --resume continues one with its own options"),
    ],
)
def test_mistakes_are_one_sentence(arguments, says):
    with pytest.raises(UserError) as error:
        parse_arguments(arguments.split())
    assert says in str(error.value)

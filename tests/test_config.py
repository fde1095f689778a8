import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mr1fast import train
from mr1fast.errors import UserError
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import option_string
from mr1fast.options.keyed import key_of
from mr1fast.options.parse import FIELDS, build_parser, field_type, parse_arguments
from mr1fast.options.recipes import KL_DEFAULTS, R1_V, RECIPES, is_small


def config(*arguments) -> TrainConfig:
    return parse_arguments([str(argument) for argument in arguments]).config


def model_folder(path: Path, **changes) -> Path:
    """A folder with a config.json like the embedded model's and no weights: enough to tell its size."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(EMBEDDED | changes))
    return path


EMBEDDED = json.loads((Path(train.__file__).parent / "embedded" / "config.json").read_text())
# As Qwen/Qwen2-VL-2B-Instruct has it on the hub: without text_config.
TWO_BILLION = {
    "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "vocab_size": 151936, "tie_word_embeddings": True, "vision_config": {"depth": 32, "embed_dim": 1280},
}  # fmt: skip


def test_defaults_by_task():
    vc, gr = (config().for_task(name) for name in ("vc", "gr"))
    assert (vc.prompts_per_step, vc.learning_rate, vc.max_steps) == (16, 3e-4, 200)
    assert (gr.prompts_per_step, gr.learning_rate, gr.max_steps) == (32, 2e-4, 200)
    assert (vc.beta_min, vc.beta_max, vc.kl_schedule, vc.explore_fraction) == (0, 0.04, "paper", 0.3)
    assert config().tasks == ("vc", "gr")
    assert config("--task", "gr, vc").tasks == ("gr", "vc")


def test_defaults_by_method():
    grpo, sft = (config("--method", method).for_task("vc") for method in ("grpo", "sft"))
    assert (grpo.kl_schedule, grpo.beta_min, grpo.beta_max) == ("constant", 0.04, 0.04)
    assert config("--method", "grpo", "--beta", "0.1").for_task("vc").beta_max == 0.1
    assert sft.beta_max == 0


def test_the_size_of_the_model_picks_the_recipe_and_no_name_does(tmp_path):
    small = model_folder(tmp_path / "model")
    large = model_folder(tmp_path / "vc" / "large", text_config=None, **TWO_BILLION)
    assert [is_small(each) for each in (EMBEDDED, TWO_BILLION, {}, {"text_config": {"hidden_size": "x"}})] == [
        True, False, False, False,
    ]  # fmt: skip
    tower = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128}  # Qwen2.5-VL's
    assert is_small(EMBEDDED | {"vision_config": tower})
    assert not is_small(EMBEDDED | {"vision_config": tower | {"depth": 32, "hidden_size": 1280}})
    for data in ("x/gr", "x/vc", "x/model", "x/r1-v"):
        for name in ("gr", "model", Path(data).name):
            assert config("--data", data).for_task(name).learning_rate == RECIPES["vc"]["learning_rate"]
            assert config("--data", data, "--model", small).for_task(name).learning_rate == 3e-4
            assert config("--data", data, "--model", large).for_task(name).learning_rate == 1e-6
    assert config("--model", small).for_task("gr") == config().for_task("gr")
    for other in (large, "Qwen/Qwen2-VL-2B-Instruct", tmp_path / "missing", tmp_path):
        assert config("--model", other).for_task("gr").max_completion_length == 512
        assert config("--model", other).defaults_from("gr") == "defaults of R1-V"
    assert config("--data", "x/gr").defaults_from("gr") == "defaults of vc for small models"


def test_pieces_of_a_step_are_left_to_the_planner_for_a_large_model():
    def pieces(*arguments):
        chosen = config("--task", "gr", *arguments)
        task, recorded = chosen.for_task("gr"), chosen.resolved()
        found = task.gradient_accumulation_steps, task.tokens_per_microbatch
        assert found == tuple(map(recorded.get, ("gradient_accumulation_steps", "tokens_per_microbatch")))
        return found

    assert pieces() == (1, None)
    assert pieces("--model", "nobody/large") == (None, None)
    assert pieces("--model", "nobody/large", "--prompts-per-step", 6, "--gradient-accumulation-steps", 2) == (2, None)
    for model in ((), ("--model", "nobody/large")):
        assert pieces(*model, "--tokens-per-microbatch", 5000) == (None, 5000)
    with pytest.raises(UserError, match="both divide a step into pieces; give one"):
        config("--tokens-per-microbatch", 5000, "--gradient-accumulation-steps", 2)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_only_some_schedules_have_an_explore_fraction(schedule):
    assert "explore_fraction" not in config("--kl-schedule", schedule).resolved()
    assert config("--kl-schedule", "reversed").resolved()["explore_fraction"] == 0.3
    assert config("--kl-schedule", schedule).for_task("vc").beta_max == 0.04


def test_what_is_set_is_not_filled_in():
    filled = config("--learning-rate", "1e-3", "--beta-max", "0.1").for_task("gr")
    assert (filled.learning_rate, filled.beta_max, filled.prompts_per_step) == (1e-3, 0.1, 32)


def test_command_line_beats_yaml_beats_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning-rate: 1e-6\nnum_generations: 4\nseed: 7\ntask: gr\nbeta-max: null\n")
    chosen = config("--config", file, "--seed", 8)
    assert chosen.learning_rate == 1e-6
    assert isinstance(chosen.learning_rate, float)
    assert (chosen.num_generations, chosen.seed, chosen.task, chosen.temperature) == (4, 8, "gr", 1.0)
    request = parse_arguments(["--config", str(file), "--seed", "8"])
    assert request.given == {"learning_rate": 1e-6, "num_generations": 4, "task": "gr", "seed": 8}


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_resume():
    assert parse_arguments([]).resume is None
    assert parse_arguments(["--resume"]).resume == ""
    assert parse_arguments(["--resume", "runs/x", "--seed", "1"]).resume == "runs/x"


BAD_ARGUMENTS = [
    ("--task nonsense", "--task must be one of vc, gr, got 'nonsense'"),
    ("--task vc,vc", "--task vc,vc names a task twice"),
    ("--task vc --data x", "exclude each other"),
    ("--method grpod", "(did you mean 'grpo-d'?)"),
    ("--report-to wandb,tensorbord", "--report-to: a logger must be one of tensorboard, wandb, trackio, none"),
    ("--report-to none,wandb", "--report-to none,wandb: none is given with something else"),
    ("--report-to wandb,wandb", "--report-to wandb,wandb names a logger twice"),
    ("--num-generations 1", "--num-generations must be at least 2, got 1"),
    ("--num-generations 2.5", "--num-generations must be a whole number, got '2.5'"),
    ("--beta-min .2 --beta-max .1", "--beta-min must not be above --beta-max, got 0.2 and 0.1"),
    ("--beta-min .2", "--beta-min must not be above --beta-max, got 0.2 and 0.04"),
    ("--beta .1", "--beta belongs to --method grpo, and the method is grpo-d"),
    ("--method sft --beta-max .1", "--beta-max belongs to --method grpo-d"),
    ("--sft-reasoning", "--sft-reasoning belongs to --method sft, and the method is grpo-d"),
    ("--learning-rate -1", "--learning-rate must be at least 1e-12, got -1.0"),
    ("--learning-rate nan", "--learning-rate must be a finite number, got nan"),
    ("--learning-rate inf", "--learning-rate must be a finite number, got inf"),
    ("--learning-rate fast", "--learning-rate must be a number, got 'fast'"),
    ("--temperature 1e-40", "--temperature must be at least 0.01, got 1e-40: logits are divided by it"),
    ("--temperature 1e6", "--temperature must be at most 100.0, got 1000000.0"),
    ("--max-completion-length 1000000000", "at most 1,000,000, got 1000000000: no such model accepts that many"),
    ("--max-steps 1000000000000000000", "--max-steps must be at most 1,000,000,000, got 1000000000000000000"),
    ("--prompts-per-step 1000000", "--prompts-per-step must be at most 4,096, got 1000000: they are held in memory"),
    ("--learning-rate 1e308", "--learning-rate must be at most 1.0, got 1e+308: AdamW moves each weight by about that"),
    ("--beta-max 1e308", "--beta-max must be at most 1,000, got 1e+308: rewards are of the order of 1"),
    ("--max-grad-norm 1e-300", "--max-grad-norm must be at least 1e-06, got 1e-300: AdamW treats gradients"),
    ("--reward-weights accuracy=1e300", "the weight of accuracy must be 0, or from 1e-06 to 1e+06, got 1e300"),
    ("--temperature 0", "--temperature must be at least 0.01, got 0.0: logits are divided by it"),
    ("--explore-fraction 1", "--explore-fraction must be below 1"),
    ("--kl-schedule linear --explore-fraction 0.5", "--explore-fraction belongs to --kl-schedule paper or reversed"),
    ("--kl-schedule papr", "--kl-schedule must be one of paper, linear"),
    ("--kl-schedule papr", "(did you mean 'paper'?)"),
    ("--kl-schedule adaptive", "--target-kl and --kl-schedule adaptive go together"),
    ("--target-kl 0.1", "--target-kl and --kl-schedule adaptive go together"),
    ("--kl-schedule adaptive --target-kl 0", "--target-kl must be at least 1e-06, got 0"),
    ("--dtype float16", "--dtype must be one of auto, float32, bfloat16"),
    ("--learning-rat 1", "unknown option --learning-rat (did you mean '--learning-rate'?)"),
    ("--lerning-rate=1", "(did you mean '--learning-rate'?)"),
    ("nonsense", "unknown argument nonsense"),
    ("--seed", "expected one argument"),
    ("--seed -1", "--seed must be at least 0"),
    ("--seed 99999999999999999999", "--seed must be at most 9223372036854775807"),
    (f"--seed {10**400}", "--seed must be at most 9223372036854775807, got a number of 401 digits"),
    ("--gradient-accumulation-steps 3", "must divide --prompts-per-step, got 3 and 16"),
    ("--num-iterations 2 --method sft", "--num-iterations"),
    ("--dynamic-sampling --method sft", "--dynamic-sampling needs sampled completions, and --method sft samples none"),
    (
        "--freeze visoin",
        "--freeze: a part must be one of vision, merger, language, got 'visoin' (did you mean 'vision'?)",
    ),
    ("--freeze vision,merger,language", "--freeze vision,merger,language leaves nothing to train"),
    ("--reward-weights accuracy=0,format=0", "nothing would be rewarded"),
    ("--reward-weights accuracy", "must be name=weight, separated by commas, such as accuracy=1,format=0.5"),
    ("--reward-weights acuracy=1", "or a function of your own as module:function, got 'acuracy' (did you mean"),
    ("--reward-weights accuracy=1,accuracy=2", "names accuracy twice"),
    ("--reward-weights accuracy=much", "the weight of accuracy must be a number, got 'much'"),
    ("--reward-weights accuracy=-1", "the weight of accuracy must be 0, or from 1e-06 to 1e+06, got -1"),
    ("--reward-weights accuracy=nan", "the weight of accuracy must be 0, or from"),
    ("--reward-weights =1", "must be name=weight"),
    ("--data=", "--data must be text, got ''"),
    ("--output-dir=", "--output-dir must be text, got ''"),
    ("--model=", "--model must be text, got ''"),
    ("--config missing.yaml", "--config missing.yaml cannot be read: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_one_sentence_for_each_mistake(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        parse_arguments(arguments.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


ABSURD = ["1e308", "-1e308", "1e-320", str(2**63), "1" + 5000 * "0", "-1", "nan", "inf"]


@pytest.mark.parametrize("name", [name for name in FIELDS if field_type(name) in (int, float)])
def test_absurd_numbers_are_answered_in_one_sentence(name):
    harmless = {"beta": 1, "beta_min": 1, "beta_max": 1, "explore_fraction": 1, "max_grad_norm": 2}
    taken = 0
    for value in ABSURD:
        try:
            chosen = config("--method", "grpo" if name == "beta" else "grpo-d", f"{option_string(name)}={value}")
        except UserError as mistake:
            error = str(mistake)
        else:
            taken += math.isfinite(getattr(chosen, name))
            continue
        if not error.startswith((option_string(name), "--target-kl", "--beta-min")) or len(error) > 200:
            pytest.fail(error)
    assert taken <= harmless.get(name, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown option 'lerning_rate' (did you mean 'learning_rate'?)"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("seed: true", "seed must be a whole number, got True"),
        ("task: [vc, gr]", "task must be text, got ['vc', 'gr']"),
        ("seed: {vc: 1}", "seed must be a whole number, got {'vc': 1}"),
        ("max_steps: {vc: many}", "max_steps: vc must be a whole number, got 'many'"),
        ("max_steps: {vc: {}}", "max_steps: vc must be a whole number, got {}"),
        ("max_steps: {vc: 0}", "max_steps: vc must be at least 1, got 0"),
        ("max_steps: {cv: 1}", "--max-steps: a task must be one of vc, gr, got 'cv'"),
        ("data: x\nmax_steps: {vc: 1}", "--max-steps must be one value with --data"),
        ('output_dir: "a\\0b"', "output_dir must be text"),
        ("seed: " + "[" * 5_000, "is not valid YAML: it is nested too deeply"),
        ("method: grpo-e", "run.yaml: method must be one of grpo-d, grpo, sft"),
        ("kl-schedule: quick", "run.yaml: kl-schedule must be one of"),
        ("num_generations: 1", "run.yaml: num_generations must be at least 2"),
        ("seed: 1\nmax_steps: [", "run.yaml is not valid YAML in line 2: expected the node content"),
        ("seed: 1: 2", "run.yaml is not valid YAML in line 1: mapping values are not allowed here"),
        ("seed: \0", "run.yaml is not valid YAML: special characters are not allowed"),
        ("seed: 2026-99-01", "run.yaml is not valid YAML: month must be in 1..12"),
        ("seed: 0x" + "f" * 5_000, "run.yaml is not valid YAML: a number of 5,002 digits"),
        ("seed: [vc, 1" + "0" * 5_000 + "]", "run.yaml is not valid YAML: a number of 5,001 digits"),
        ("seed: !!int ''", "run.yaml is not valid YAML: a tag does not fit its value"),
        ("seed: !!timestamp x", "run.yaml is not valid YAML: a tag does not fit its value"),
        ("seed: 1\nseed: 2", "run.yaml: option 'seed' is set in line 1 and again in line 2"),
        ("max_steps: 1\nseed: 2\nmax-steps: 3", "option 'max_steps' is set in line 1 and again in line 3"),
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
        own = f" {option_string(name)} "
        if field.default is True:  # a switch is shown in the form that changes its default
            own = own.replace("--", "--no-")
        assert (f" {key_of(name)}=" if field.metadata["key_of"] else own) in text
        assert field.metadata["help"].split(";")[0].split(",")[0] in text
        if field.default is not None:
            shown = field.metadata["shown"] or ("no" if field.default is False else field.default)
            assert f"[default: {shown}]" in text
    assert "[default: 0.0003 (gr: 0.0002) for small models, 1e-06 for others; ten times that for LoRA]" in text
    assert "(paper, linear, constant, cosine, exponential, reversed, adaptive)" in text
    assert all(set(values) <= set(FIELDS) for values in (*RECIPES.values(), *KL_DEFAULTS.values()))
    assert all(set(values) == set(RECIPES[R1_V]) for values in RECIPES.values())


def test_a_mistake_is_answered_without_torch():
    code = "import sys, mr1fast.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

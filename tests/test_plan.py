"""The planner: against the allocator's own account of true steps, and against numbers worked out by hand."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2VLConfig

from benchmarks.models import QWEN_2B, QWEN_7B, config
from benchmarks.plan_check import random_advantages, true_trainer
from mr1fast import train
from mr1fast.errors import UserError
from mr1fast.kernels import dispatch, linear
from mr1fast.model import load as models
from mr1fast.model.load import EMBEDDED
from mr1fast.options.config import TrainConfig
from mr1fast.options.preset import sizes_of
from mr1fast.training import device_memory, plan_run, plan_step, setup
from mr1fast.training import plan as plan_module
from mr1fast.training import trainer as trainer_module
from mr1fast.training.open_run import OpenRun
from mr1fast.training.plan import CATEGORIES, GIB, Plan, StepShape, plan, plan_for, remedy
from mr1fast.training.run_folder import RunFolder

P, G, L = 4, 2, 6
TEXT, IMAGE = 100, 16  # tokens of a prompt
PIXELS = IMAGE * 14**2


def shape(*, dtype="float32", device="cpu", text_tokens=TEXT, **options) -> StepShape:
    """Steps of the embedded model: 3 layers of 2 key-value heads of width 32, and 2 layers of vision."""
    given = {"prompts_per_step": P, "num_generations": G, "max_completion_length": L, "max_pixels": PIXELS, **options}
    model = Qwen2VLConfig.from_pretrained(EMBEDDED)
    return StepShape(model, TrainConfig(data="none", **given), dtype=dtype, device=device, text_tokens=text_tokens)


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan(shape(dtype="bfloat16", gradient_accumulation_steps=2))


# ---- true steps -----------------------------------------------------------------------------------------------------


def allocated(step) -> int:
    """Bytes that are allocated during a call, at most, above those allocated before it; C++ included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "changes",
    [
        slow({"max_completion_length": 20}),
        slow({"gradient_accumulation_steps": 4, "max_completion_length": 20, "attention": "eager"}),
        slow({"gradient_accumulation_steps": 2, "freeze": "vision,merger"}),
        {"method": "sft"},
        {"method": "grpo", "beta": 0.0, "loss": "importance_sampling_level=sequence", "gradient_accumulation_steps": 2},
        {"dtype": "bfloat16", "gradient_accumulation_steps": 2, "lora_rank": 4},
        slow({"tokens_per_microbatch": 420, "gradient_checkpointing": "on", "max_completion_length": 20}),
        slow({"share_prefix": False, "max_completion_length": 20}),
    ],
    ids=lambda changes: ", ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_plan_is_what_a_true_step_allocates(changes, one_thread, monkeypatch):
    chosen = shape(**changes)
    monkeypatch.setattr(trainer_module, "group_advantages", random_advantages)
    trainer = true_trainer(chosen)
    trainer.step()  # makes the moments
    models = {id(policy.model): policy.model for policy in (trainer.policy, trainer.reference) if policy}.values()
    held = [t for model in models for t in (*model.parameters(), *model.buffers())]
    held += [*trainer.optimizer.masters, *(t for s in trainer.optimizer.adamw.state.values() for t in s.values())]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    assert plan(chosen).peak == pytest.approx(before + allocated(trainer.step), rel=0.07)


# ---- what is held ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "parameters"), [(QWEN_2B, 2_208_985_600), (QWEN_7B, 8_291_375_616)])
def test_parameters_of_the_papers_models(model, parameters):
    built, _ = plan_step.build_models(dataclasses.replace(shape(method="sft"), model=model), "meta")
    assert sum(weight.numel() for weight in built.parameters()) == parameters


@pytest.mark.parametrize("size", ["2B", "7B"])
def test_largest_image_of_the_papers_models(size):
    """As published: 16,384 tokens, unless --max-pixels says less."""
    folder = sizes_of(f"Qwen/Qwen2-VL-{size}-Instruct")
    assert models.most_pixels(folder) == 16_384 * 28**2


def test_bytes_of_each_category(planned):
    model, _ = plan_step.build_models(shape(method="sft"), "cpu")
    N, tensors = sum(weight.numel() for weight in model.parameters()), len(list(model.parameters()))
    buffers = 4 * sum(buffer.numel() for buffer in model.buffers())
    assert (planned.parameters, planned.trainable) == (N, N)
    for held in planned.phases.values():
        assert held["weights"] == held["reference"] == 2 * N + buffers
        assert held["masters"] == 4 * N
        assert held["moments"] == 8 * N + 4 * tensors  # each with the number of its step
    # Each is freed as soon as there is its float32 copy.
    assert 4 * N <= planned.phases["optimizer"]["gradients"] < 5 * N
    assert planned.phases["rollout"]["gradients"] == 0
    assert planned.phases["policy"]["gradients"] == 2 * N
    assert 20 * N <= planned.least < 21.5 * N
    assert planned.least < planned.peak


def test_what_processes_share(planned):
    """FSDP2: each has its part throughout, and beside it what is gathered at a time."""
    alone, both = planned.phases, planned.shared(2).phases
    every = planned.parameters
    for phase in alone:
        for name in ("masters", "moments"):
            assert both[phase][name] == -(-alone[phase][name] // 2)
        for name in ("key-value cache", "logits", "activations"):
            assert both[phase][name] == alone[phase][name]
    weights = alone["policy"]["weights"]
    gathered = weights * planned.at_a_time // every
    assert 0 < planned.at_a_time < every
    assert both["rollout"]["weights"] == -(-weights // 2) + weights
    assert both["policy"]["weights"] == -(-weights // 2) + gathered
    assert both["optimizer"]["weights"] == both["reference"]["weights"] == -(-weights // 2)
    assert both["reference"]["reference"] == -(-weights // 2) + gathered
    assert both["policy"]["reference"] == -(-weights // 2)


def test_bytes_of_the_key_value_cache():
    """Prompts are not repeated. Completions are so long that there is most in memory while they are sampled."""
    length, token = 200, 3 * 2 * 2 * 32 * 2  # bytes of a token: layers, keys and values, heads, width, bfloat16
    long = plan(shape(dtype="bfloat16", gradient_accumulation_steps=2, max_completion_length=length))
    assert long.phases["rollout"]["key-value cache"] == token * P * (TEXT + IMAGE + G * length)


@pytest.mark.parametrize(("device", "rows"), [("cpu", P * G * 20 // 2), ("cuda", P * G * 20)])
def test_logits_are_a_block_as_large_as_on_the_device(device, rows):
    chosen = shape(device=device, max_completion_length=20)
    chosen.model.text_config.vocab_size = 300_000  # 183 MiB of logits: more than a block of a CPU's
    assert plan(chosen).phases["reference"]["logits"] == rows * 300_000 * 4


def test_parts_that_are_frozen():
    model, _ = plan_step.build_models(shape(method="sft"), "cpu")
    merger = sum(weight.numel() for weight in model.model.visual.merger.parameters())
    vision = sum(weight.numel() for weight in model.model.visual.parameters()) - merger
    whole = plan(shape())
    assert whole.trainable == whole.parameters
    assert plan(shape(freeze="vision")).trainable == whole.parameters - vision
    assert plan(shape(freeze="vision,merger")).trainable == whole.parameters - vision - merger


def test_the_largest_image():
    def image_tokens(**changes):
        return shape(**{"max_pixels": None} | changes).image_tokens

    assert image_tokens(max_pixels=16 * 14**2) == 16
    assert image_tokens() == 2048 - L - TEXT  # the model takes no more, and a token has 14 x 14 pixels
    assert image_tokens(max_prompt_length=130) == 130 - TEXT
    assert image_tokens(max_prompt_length=10) == 1
    for pixels, tokens in ((401_408, 512), (3136, 4), (784, 1), (100 * 784 + 5, 100)):
        width, height = plan_step._largest(pixels, 28)
        assert (width % 28, height % 28, width * height // 784) == (0, 0, tokens)
        assert height <= width <= 3 * height


def test_a_plan_leaves_the_trainer_as_it_was():
    def patched():
        functions = trainer_module.batch_logps, trainer_module.pieces_of
        return dispatch.BACKENDS, dict(linear.BLOCKS), functions

    before, numbers = patched(), torch.get_rng_state()
    plan(shape(device="cuda", lora_rank=2))
    assert patched() == before
    assert torch.equal(torch.get_rng_state(), numbers)


def test_rewards_of_the_users_are_not_called_to_plan():
    """They may be programs that cost something. This one cannot even be imported."""
    assert plan(shape(reward_weights="no.such.module:judge=1")).peak == plan(shape()).peak


# ---- what fits ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_is_offloaded_where_that_makes_it_fit(planned):
    waiting = planned.with_reference_offloaded()
    assert waiting.phases["reference"] == planned.phases["reference"]
    for phase in ("rollout", "policy", "optimizer"):
        assert waiting.phases[phase] == planned.phases[phase] | {"reference": 0}
    assert waiting.peak < planned.peak
    chosen = shape(dtype="bfloat16", gradient_accumulation_steps=2, device="cuda")
    assert not plan_for(chosen, planned.peak).offload_reference
    assert plan_for(chosen, planned.peak - 1).offload_reference
    assert not plan_for(chosen, waiting.peak - 1).offload_reference
    assert not plan_for(dataclasses.replace(chosen, device="cpu"), planned.peak - 1).offload_reference


def test_what_is_left_open_is_chosen_so_that_a_step_fits(monkeypatch):
    """With a formula in the place of plans: 100 fixed, of it 20 the reference; 10 for each prompt in the model, of
    which 8 are not held where layers run again. At 100 000 tokens a prompt, and 6 prompts in a step."""

    def formula(shape):
        activations = shape.prompts_at_a_time * (2 if shape.checkpoints else 10)
        held = {"weights": 80, "reference": 20, "activations": activations}
        phases = {"reference": held | {"activations": 0}, "policy": held}
        return Plan(1, 1, {phase: dict.fromkeys(CATEGORIES, 0) | values for phase, values in phases.items()})

    monkeypatch.setattr(plan_module, "plan", formula)
    model = Qwen2VLConfig.from_pretrained(EMBEDDED)
    options = TrainConfig(model="a/large", data="none", prompts_per_step=6, max_pixels=PIXELS)
    chosen = StepShape(model, options)
    assert chosen.group_tokens == IMAGE * 5 + 128 + 8 * 512

    def found(usable):
        planned = plan_for(chosen, usable)
        pieces, odd = divmod(planned.options["tokens_per_microbatch"], chosen.group_tokens)
        assert not odd
        return planned.offload_reference, planned.options.get("gradient_checkpointing", "off"), pieces, planned.peak

    assert found(1000) == (False, "off", 6, 160)
    assert found(149) == (False, "off", 4, 140)
    assert found(110) == (False, "off", 1, 110)
    assert found(109) == (True, "off", 2, 100)
    assert found(99) == (False, "on", 1, 102), "the reference's own turn needs 100"


@pytest.mark.parametrize(
    ("usable", "options"),
    [
        (1319, "--gradient-accumulation-steps 2"),
        (1159, "--gradient-accumulation-steps 4"),
        (1079, "--gradient-accumulation-steps 4 --freeze vision"),
        (999, "--gradient-accumulation-steps 4 --freeze vision"),
        (979, "--gradient-accumulation-steps 4 --lora-rank 16"),
        (89, "--gradient-accumulation-steps 4 --lora-rank 16 --max-completion-length 5"),
        (49, "--gradient-accumulation-steps 4 --lora-rank 16 --max-completion-length 5 --num-generations 4"),
        (29, None),
    ],
)
def test_what_makes_it_fit(usable, options, monkeypatch):
    """With a formula in the place of plans: a fixed amount, and 1 for each token of completions at a time."""

    def formula(shape):
        task, trained = shape.task, 900 if shape.options.frozen_parts else 1000
        tokens = task.prompts_per_step // task.gradient_accumulation_steps * task.num_generations
        fixed = 10 if shape.options.trains_adapter else trained
        held = {"weights": fixed, "activations": tokens * task.max_completion_length}
        return Plan(1, 1, {"policy": dict.fromkeys(CATEGORIES, 0) | held})

    monkeypatch.setattr(plan_module, "plan", formula)
    chosen = shape(num_generations=8, max_completion_length=10)
    assert formula(chosen).peak == 1320
    assert remedy(chosen, formula(chosen), usable) == options


# ---- the program ----------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path) -> Path:
    """A folder with no file but config.json, of a model as wide as 2B with two layers."""
    config({"num_hidden_layers": 2}, {"depth": 2}).save_pretrained(tmp_path)
    return tmp_path


def said(capsys, *arguments) -> tuple[int, list[str], str]:
    """(exit code, lines of stdout, stderr) of a program's run."""
    code = train.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_plan_of_the_embedded_model(capsys):
    code, lines, _ = said(capsys, "--plan", "--device", "cpu", "--task", "vc")
    assert code == 0
    assert lines[0] == f"{EMBEDDED} on vc: 704,128 parameters, 704,128 of them trained, in float32"
    assert lines[1] == (
        "16 prompts, 16 at a time, each of 16 tokens of an image and 128 of text, with 8 completions of 32 tokens"
    )
    assert lines[3].split() == ["MiB", "rollout", "reference", "policy", "optimizer"]
    assert lines[-1].startswith("a step needs up to ")
    assert " and fits cpu, where " in lines[-1]


@pytest.mark.slow
def test_plan_for_a_card(large, capsys):
    options = ("--model", large, "--data", large, "--max-pixels", 100_000)
    code, lines, _ = said(capsys, "--plan", 24, *options, "--epochs", 2)
    assert code == 0
    assert "in bfloat16" in lines[0]
    assert lines[-1].endswith("and fits a GPU with 24 GB, where 21.6 GiB can be used")
    code, lines, _ = said(capsys, "--plan", 7, *options)
    assert code == 1
    assert "does not fit a GPU with 7 GB, where 6.0 GiB can be used; it fits with --" in lines[-1]


def test_plan_of_a_model_on_the_hub(capsys, monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", offline)
    code, _, err = said(capsys, "--plan", "--model", "nobody/nothing", "--data", Path(__file__).parent)
    assert code == 2
    assert "error: model 'nobody/nothing' cannot be loaded: We couldn't connect to the hub" in err
    assert err.rstrip().endswith("; for --plan, a folder with its config.json is enough")


def test_plan_of_an_adapter(tmp_path, capsys):
    """As a folder: rank 2 on the queries of 3 layers, 128 wide."""
    content = {"base_model_name_or_path": str(EMBEDDED), "r": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "adapter_model.safetensors").touch()  # not read
    code, lines, _ = said(capsys, "--plan", "--model", tmp_path, "--device", "cpu", "--task", "vc")
    assert code == 0
    assert f" {704_128 + 3 * 2 * 256:,} parameters, {3 * 2 * 256:,} of them trained" in lines[0]


def test_plan_takes_a_number_of_gigabytes(capsys):
    for wrong in ("0", "24GB", "1.5"):
        code, _, err = said(capsys, "--plan", wrong)
        assert code == 2
        assert f"got {wrong}" in err.replace("'", "")


def test_a_run_that_cannot_fit(large, planned, monkeypatch, capsys):
    options = TrainConfig(model=str(large), data=str(large), device="cpu")
    monkeypatch.setattr(plan_run, "plan_for", lambda *_: planned)
    monkeypatch.setattr(plan_run, "remedy", lambda *_: "--lora-rank 16")

    def with_free(free):
        monkeypatch.setattr(plan_run, "free_memory", lambda _: free)
        return plan_run.plans_before(options)

    assert with_free(planned.peak) == {"data": planned}
    assert capsys.readouterr().err == ""
    assert with_free(planned.least) == {"data": planned}  # it may be enough for short completions
    warning = (
        r"warning: a step needs up to .* and does not fit cpu, where .* can be used; it fits with --lora-rank 16\n"
    )
    assert re.fullmatch(warning, capsys.readouterr().err)
    with pytest.raises(UserError, match=r"take .* MiB, and cpu has .* MiB free; it fits with --lora-rank 16"):
        with_free(planned.least - 1)


def test_a_run_says_so_before_it_loads_anything(monkeypatch, capsys, tmp_path):
    def cannot_fit(_, **__):
        raise UserError("it cannot fit")

    monkeypatch.setattr(setup, "plans_before", cannot_fit)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    code, _, err = said(capsys, "--task", "vc", "--output-dir", tmp_path / "run")
    assert (code, err) == (2, "error: it cannot fit\n")
    assert not (tmp_path / "run").exists()


def test_a_run_offloads_the_reference_if_the_plan_says_so(planned, monkeypatch, tmp_path):
    options = TrainConfig(task="vc", eval_steps=0, eval_samples=1, max_steps=1)
    for plans, offloads in (({}, False), ({"vc": planned}, False), ({"vc": planned.with_reference_offloaded()}, True)):
        monkeypatch.setattr(setup, "plans_before", lambda _, plans=plans, **__: plans)
        prepared = setup.prepare(OpenRun(RunFolder(tmp_path), options))
        assert prepared.offloads_reference is offloads
        assert ("the reference waits in the CPU's memory" in prepared.description()) is offloads


def test_a_run_does_without_a_plan_that_fails(large, monkeypatch, capsys):
    def fails(*_):
        raise NotImplementedError("an operation of tomorrow")

    monkeypatch.setattr(plan_run, "plan_for", fails)
    assert plan_run.plans_before(TrainConfig(model=str(large), data=str(large), device="cpu")) == {}
    warning = "warning: no plan of the memory that a step takes (NotImplementedError: an operation of tomorrow)\n"
    assert capsys.readouterr().err == warning


def test_a_small_model_is_not_planned_for(monkeypatch):
    monkeypatch.setattr(plan_run, "plan_for", None)
    assert plan_run.plans_before(TrainConfig()) == {}


# ---- the device -----------------------------------------------------------------------------------------------------


def group(folder, limit, usage, cached, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, usage, f"{names[3]} {cached}")):
        (folder / name).write_text(f"{text}\n")


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")


@pytest.mark.parametrize(
    ("member", "top", "names"), [("0::/a/b", ".", VERSION_2), ("4:memory:/a/b", "memory", VERSION_1)]
)
def test_limits_of_control_groups(tmp_path, member, top, names):
    membership = tmp_path / "cgroup"
    membership.write_text(f"9:cpu,cpuacct:/x\n{member}\n")
    assert device_memory._of_groups(membership, tmp_path) == 2**63  # the groups of another namespace
    group(tmp_path / top / "a" / "b", "1000", 300, 50, names)
    assert device_memory._of_groups(membership, tmp_path) == 750
    group(tmp_path / top / "a", "900", 400, 0, names)
    assert device_memory._of_groups(membership, tmp_path) == 500


def test_memory_of_this_machine():
    assert 0 < device_memory.free_memory(torch.device("cpu")) < 2**50
    assert device_memory.usable_memory("cpu", 100) == 100
    assert device_memory.usable_memory("cuda", 80 * GIB) == int(79.5 * 0.92 * GIB)

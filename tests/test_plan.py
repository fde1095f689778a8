"""The planner: against the allocator's own account of true steps, and against numbers worked out by hand."""

import dataclasses

import pytest
from tiny import tiny_model
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2VLConfig

from benchmarks.plan_check import QWEN_2B, QWEN_7B, random_advantages, true_trainer
from mr1fast.kernels import dispatch, linear
from mr1fast.model.load import EMBEDDED
from mr1fast.options.config import TrainConfig
from mr1fast.training import device_memory, plan_step
from mr1fast.training import trainer as trainer_module
from mr1fast.training.plan import StepShape, cheapest_remedy, plan, report, report_of_run

P, G, L = 4, 2, 6
TOKENS = 40  # of a prompt's text


def shape(**changes) -> StepShape:
    """Steps of the embedded model on the CPU; what is no field of StepShape is an option of the trainer's."""
    fields = {field.name for field in dataclasses.fields(StepShape)}
    options = {"prompts_per_step": P, "num_generations": G, "max_completion_length": L}
    options |= {name: value for name, value in changes.items() if name not in fields}
    settings = {
        "model": Qwen2VLConfig.from_pretrained(EMBEDDED),
        "config": dataclasses.replace(TrainConfig(task="vc", method=options.pop("method", "grpo-d")), **options),
        "dtype": "float32",
        "device": "cpu",
        "text_tokens": TOKENS,
        "image_pixels": 4096,
    }
    settings["config"] = settings["config"].for_task("vc")
    return StepShape(**settings | {name: value for name, value in changes.items() if name in fields})


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 4, "max_completion_length": 40},
        {"dtype": "bfloat16", "freeze": ("vision", "merger")},
        {"method": "sft", "max_completion_length": 21, "reference": "none"},
        {"lora_rank": 4, "reference": "shared"},
        {"image_pixels": None, "reference": "none", "method": "grpo", "beta": 0.0},
    ],
    ids=lambda changes: ", ".join(f"{name}={value}" for name, value in changes.items()) or "defaults",
)
def test_plan_is_what_a_true_step_allocates(changes, one_thread, monkeypatch):
    planned = shape(**changes)
    monkeypatch.setattr(trainer_module, "group_advantages", random_advantages)
    trainer = true_trainer(planned)
    trainer.step()  # makes the moments
    models = [trainer.policy.model, *([trainer.reference.model] if trainer.reference else [])]
    held = [t for model in models for t in (*model.parameters(), *model.buffers())]
    held += [*trainer.optimizer.masters, *(t for s in trainer.optimizer.adamw.state.values() for t in s.values())]
    before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
    assert plan(planned).peak == pytest.approx(before + allocated(trainer.step), rel=0.05)


def test_parameters_of_the_papers_models():
    shapes = [shape(model=model, reference="none") for model in (QWEN_2B, QWEN_7B)]
    models = [plan_step.build_models(one, "meta")[0] for one in shapes]
    assert [sum(weight.numel() for weight in model.parameters()) for model in models] == [2_208_985_600, 8_291_375_616]


@pytest.fixture
def tiny() -> Qwen2VLConfig:
    """2 layers of 2 key-value heads of width 8; images of 16 tokens; 1 layer of vision."""
    return tiny_model().config


def test_bytes_of_each_category(tiny):
    one = shape(model=tiny, dtype="bfloat16", image_pixels=1024, gradient_accumulation_steps=2)
    model, buffers = tiny_model(), 4 * sum(buffer.numel() for buffer in tiny_model().buffers())
    N, tensors = sum(weight.numel() for weight in model.parameters()), len(list(model.parameters()))
    planned = plan(one)
    assert (planned.parameters, planned.trainable) == (N, N)
    for held in planned.phases.values():
        assert held["weights"] == held["reference"] == 2 * N + buffers
        assert held["masters"] == 4 * N
        assert held["moments"] == 8 * N + 4 * tensors  # each with the number of its step
    # The gradients and their float32 copies; whatever is in the memory of clipping is of one tensor at a time.
    assert 6 * N <= planned.phases["optimizer"]["gradients"] < 6.5 * N
    assert planned.phases["rollout"]["gradients"] == 0


def test_bytes_of_the_key_value_cache(tiny):
    planned = plan(shape(model=tiny, dtype="bfloat16", image_pixels=1024, num_generations=32))
    token = 2 * 2 * 2 * 8 * 2  # bytes: layers, keys and values, heads, width, bfloat16
    prompts = P * (TOKENS + 16)
    # Of the prompts, of the prompt of every completion, and that once more with room for the completion.
    expected = token * (prompts + 32 * prompts + 32 * (prompts + P * L))
    assert planned.phases["rollout"]["key-value cache"] == expected


def test_logits_are_one_block(tiny):
    tiny.text_config.vocab_size = 20_000
    rows = P * G * 20
    planned = plan(shape(model=tiny, image_pixels=1024, max_completion_length=20))
    assert planned.phases["policy"]["logits"] == rows * 20_000 * 4
    limited = plan(shape(model=tiny, image_pixels=1024, max_completion_length=20, device="cuda"))
    assert limited.phases["policy"]["logits"] == rows * 20_000 * 4  # still below a GPU's block


def test_trainable_parameters(tiny):
    model = tiny_model()
    vision = sum(weight.numel() for weight in model.model.visual.parameters())
    merger = sum(weight.numel() for weight in model.model.visual.merger.parameters())
    N = sum(weight.numel() for weight in model.parameters())
    changes = {"model": tiny, "image_pixels": 1024}
    assert plan(shape(**changes, freeze=("vision",))).trainable == N - vision + merger
    assert plan(shape(**changes, freeze=("vision", "merger"))).trainable == N - vision
    adapter = plan(shape(**changes, lora_rank=2, lora_targets=("q_proj",), reference="shared"))
    assert adapter.trainable == 2 * 2 * (32 + 32)  # layers, rank, in and out
    assert adapter.phases["policy"]["reference"] == 0


def test_reference_that_is_offloaded(tiny):
    changes = {"model": tiny, "image_pixels": 1024}
    loaded, offloaded = plan(shape(**changes)), plan(shape(**changes, reference="offloaded"))
    assert offloaded.phases["reference"] == loaded.phases["reference"]
    for phase in ("rollout", "policy", "optimizer"):
        assert offloaded.phases[phase] == loaded.phases[phase] | {"reference": 0}


def test_what_would_make_it_fit(tiny):
    one = shape(model=tiny, image_pixels=1024, max_completion_length=30)
    peaks = [
        plan(shape(model=tiny, image_pixels=1024, max_completion_length=30, gradient_accumulation_steps=n)).peak
        for n in (1, 2, 4)
    ]
    assert peaks[0] > peaks[1] > peaks[2]
    said, fits = report(one, peaks[0])
    assert fits
    assert f"{plan(one).parameters:,} parameters" in said
    assert "key-value cache" in said
    said, fits = report(one, peaks[0] - 1)
    assert not fits
    assert said.endswith("it fits with --gradient-accumulation-steps 2")
    assert cheapest_remedy(one, peaks[1] - 1) == "--gradient-accumulation-steps 4"
    assert cheapest_remedy(one, peaks[2] - 1).startswith("--gradient-accumulation-steps 4 --")
    assert cheapest_remedy(one, 1) is None
    assert "no option of this program makes it fit" in report(one, 1)[0]


@pytest.mark.parametrize(
    ("method", "last"), [("grpo-d", "8 completions of 32 tokens"), ("sft", "a target of 32 tokens")]
)
def test_report_of_a_run(method, last):
    """The embedded model, of whose folder no weight is read, in memory that is enough for it anywhere."""
    said, fits = report_of_run(TrainConfig(method=method, task="vc", device="cpu").for_task("vc"), EMBEDDED)
    lines = said.splitlines()
    assert lines[0] == "704,128 parameters, 704,128 of them trained, in float32"
    assert lines[1] == f"16 prompts in 1 piece, each of 128 tokens of text and an image of 16 tokens, with {last}"
    assert fits
    assert "MiB and fits" in lines[-1]


def test_largest_image():
    for pixels, tokens in ((401_408, 512), (3136, 4), (784, 1), (100 * 784 + 5, 100)):
        width, height = plan_step._largest(pixels, 28)
        assert (width % 28, height % 28, width * height // 784) == (0, 0, tokens)
        assert height <= width <= 3 * height


def test_a_plan_leaves_the_trainer_as_it_was(tiny):
    before = dispatch.BACKENDS, dict(linear.CHUNK_BYTES), dict(linear.MIN_ROWS), trainer_module.batch_logps
    plan(shape(model=tiny, image_pixels=1024, device="cuda"))
    assert before == (dispatch.BACKENDS, linear.CHUNK_BYTES, linear.MIN_ROWS, trainer_module.batch_logps)


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
    assert 0 < device_memory.usable_memory("cpu") < 2**50
    assert device_memory.usable_of_gpu(80 * 2**30) == int(79.5 * 0.92 * 2**30)

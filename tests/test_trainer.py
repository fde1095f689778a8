import math

import pytest
import torch
from train_program import Drawings

from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.options.reward_weights import Reward
from mr1fast.training import scoring
from mr1fast.training import trainer as trainer_module
from mr1fast.training.checkpoint import load_state, save_checkpoint, save_model
from mr1fast.training.run_folder import checkpoints
from mr1fast.training.trainer import Trainer, sft_target
from tests.run_files import untimed

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {
    "task": "vc",
    "max_steps": 6,
    "prompts_per_step": 2,
    "num_generations": 4,
    "max_completion_length": 10,
    "warmup_steps": 1,
    "learning_rate": 1e-2,  # high, so that a few steps change what is sampled
}


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def make_trainer(processor, folder=None, **options) -> Trainer:
    config = TrainConfig(**{**SMALL, **options}).for_task("vc")
    reference = Policy(load_model(), processor).freeze() if config.needs_reference else None
    policy = Policy(load_model() if folder is None else load_model(folder), processor)
    trainer = Trainer(config, policy, reference, Drawings())
    if folder is not None:
        trainer.load_state_dict(load_state(folder))
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.policy.model.state_dict().items()}


SETTINGS = {
    "grpo-d": {"method": "grpo-d", "temperature": 1.5},
    "grpo": {"method": "grpo", "temperature": 1.5, "gradient_accumulation_steps": 2},
    "grpo-d, 2 iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2, "temperature": 1.5},
    "refilled, 2 iterations": {
        "dynamic_sampling": True, "mask_truncated": True, "num_iterations": 2, "temperature": 1.5,
        "max_completion_length": 8,
    },
    "grpo-d, adaptive": {"kl_schedule": "adaptive", "target_kl": 0.1, "max_steps": 10, "temperature": 1.5},
    "grpo without KL": {"method": "grpo", "beta": 0.0, "num_iterations": 3},
    "sft": {"method": "sft", "gradient_accumulation_steps": 2},
}  # fmt: skip


# `make test` takes those that differ most.
SLOW = ("grpo", "grpo-d", "grpo without KL", "refilled, 2 iterations")


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SETTINGS]
)
def test_a_resumed_run_ends_with_the_same_weights(setting, processor, tmp_path):
    options = SETTINGS[setting]
    whole = make_trainer(processor, **options)
    metrics, states = [], []
    for step in range(1, 6):
        if step in (2, 4):  # stopped after step 1, in the middle of a batch with 2 or 3 iterations, and after 3
            states.append(save_checkpoint(whole.policy, whole.state_dict(), tmp_path, step=step - 1, keep=9))
        metrics.append(whole.step())
    base = load_model().state_dict()
    assert any(not torch.equal(base[name], value) for name, value in weights(whole).items())
    for folder in states:
        resumed = make_trainer(processor, folder, **options)
        for step in range(resumed.finished_steps, 5):
            again = resumed.step()
            assert untimed(again) == untimed(metrics[step])
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(resumed)[name]), name


def test_prompts_are_new_each_step_and_all_are_seen_in_an_epoch(processor):
    trainer = make_trainer(processor, num_iterations=2)
    names = []
    for step in range(14):
        trainer.finished_steps = step
        names.append([example.name for example in trainer.examples()])
    assert names[0] == names[1] != names[2]
    seen = [name for batch in names[::2] for name in batch]
    assert len(set(seen[:7])) == len(set(seen[7:14])) == 7
    assert seen[:7] != seen[7:14]


EXTREMES = [
    {"temperature": 0.01, "max_grad_norm": 1e308, "reward_weights": "accuracy=1e6,format=1e-6", "warmup_steps": 10**9},
    {"temperature": 100.0, "learning_rate": 1e-12, "seed": 2**63 - 1},
    {"learning_rate": 1.0, "max_grad_norm": 1e-6, "kl_schedule": "adaptive", "target_kl": 1e-6},
    {"method": "grpo", "beta": 1000.0, "max_steps": 10**9, "num_iterations": 10**9},
    {"kl_schedule": "reversed", "explore_fraction": 1e-320, "beta_min": 1e-320, "temperature": 1.5},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_the_bounds_of_the_options_are_numbers_one_can_train_with(extreme, processor):
    trainer = make_trainer(processor, **{"learning_rate": 1e-3, **extreme})
    for _ in range(2):
        metrics = trainer.step()
    assert metrics["skipped_steps"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_metrics_have_trls_names(processor):
    metrics = make_trainer(processor).step()
    assert set(metrics) >= {
        "loss", "grad_norm", "learning_rate", "num_tokens", "completions/mean_length", "completions/clipped_ratio",
        "rewards/accuracy_reward/mean", "rewards/accuracy_reward/std", "rewards/format_reward/mean", "reward",
        "rewards/unanswered",
        "reward_std", "frac_reward_zero_std", "kl", "entropy", "clip_ratio/low_mean", "step_time", "beta",
    }  # fmt: skip
    assert all(isinstance(value, float | int) for value in metrics.values())
    assert metrics["beta"] == 0.02  # the middle of 0 and 0.04
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["num_tokens"] > 0
    times = {name: metrics[f"step_time/{name}"] for name in ("rollout", "rewards", "reference", "policy", "optimizer")}
    assert all(seconds > 0 for seconds in times.values())
    assert sum(times.values()) == pytest.approx(metrics["step_time"])


def test_the_ratio_is_one_at_the_first_iteration_only(processor):
    trainer = make_trainer(processor, num_iterations=2, temperature=1.5, method="grpo", learning_rate=0.1)
    first = trainer.step()
    assert trainer.step_data.batch.old_per_token_logps is not None
    second = trainer.step()
    assert first["clip_ratio/region_mean"] == 0
    assert 0 <= first["sampling/sampling_logp_difference/mean"] <= first["sampling/sampling_logp_difference/max"] < 1e-4
    assert "sampling/sampling_logp_difference/max" not in second, "the policy is no longer the one that sampled"
    assert second["clip_ratio/region_mean"] > 0
    assert second["rewards/accuracy_reward/mean"] == first["rewards/accuracy_reward/mean"]


def test_pieces_change_how_much_is_held_and_not_the_gradient(processor):
    steps = []
    for pieces in ({}, {"gradient_accumulation_steps": 2}, {"tokens_per_microbatch": 1}):
        trainer = make_trainer(processor, **pieces, temperature=1.5)
        trainer.step_data = trainer.collect()
        completions = trainer.step_data.completions
        steps.append((completions, trainer.step(), trainer.step()))
    for other in steps[1:]:
        assert steps[0][0] == other[0]
        for one, two in zip(steps[0][1:], other[1:]):
            for name in ("grad_norm", "loss", "kl", "entropy", "reward", "completions/mean_length"):
                assert one[name] == pytest.approx(two[name], rel=2e-3, abs=1e-5), name


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, [1, 1]),
        ({"tokens_per_microbatch": 10_000}, [1, 1]),
        ({"gradient_accumulation_steps": 2}, [3, 3]),
        ({"tokens_per_microbatch": 10}, [3, 3]),
        ({"gradient_checkpointing": "on"}, [2, 2]),
        ({"share_prefix": False}, [2, 2]),
        ({"num_iterations": 2}, [1, 1]),
        ({"dynamic_sampling": True, "num_generations": 8, "max_completion_length": 5}, [11, 11]),  # all it may sample
    ],
    ids=str,
)
def test_prompts_that_were_run_to_sample_run_again_only_where_the_update_is_in_pieces(options, passes, processor):
    """Counted by the policy's vision tower."""
    trainer = make_trainer(processor, temperature=1.5, **options)
    runs = []
    trainer.policy.model.model.visual.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    found = []
    for _ in passes:
        before = len(runs)
        trainer.step()
        found.append(len(runs) - before)
        assert trainer.step_data.prefix is None, "what has been used is not held any longer"
    assert found == passes
    assert runs[0] == (passes[0] == 1), "a graph is kept only if it is used"


def test_a_step_that_is_skipped_does_not_keep_its_prompts(processor, monkeypatch):
    trainer = make_trainer(processor)
    monkeypatch.setattr(trainer_module, "useless", lambda *_: "no reason")
    trainer.step()
    assert trainer.step_data.prefix is None


class Mixed(Drawings):
    """Questions with and without an image, images of several sizes."""

    def __getitem__(self, index):
        example = TASKS["vc"].example("train", index)
        if index % 3 == 0:
            return Example(None, "What is 1+2?", "3", "text")
        size = (56 + 28 * (index % 3), 70)
        return Example(example.image.resize(size), example.problem * (index % 3), example.solution, example.name)


@pytest.mark.parametrize(("dtype", "attention"), [(torch.bfloat16, "sdpa"), (torch.float32, "eager")])
def test_mixed_data_in_every_dtype_and_attention(dtype, attention, processor):
    options = {**SMALL, "prompts_per_step": 6, "gradient_accumulation_steps": 3, "num_iterations": 2}
    policy, reference = (Policy(load_model(dtype=dtype, attention=attention), processor) for _ in range(2))
    trainer = Trainer(TrainConfig(**options).for_task("vc"), policy, reference.freeze(), Mixed())
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["skipped_steps"] == 0
        assert metrics["grad_norm"] > 0
    assert metrics["kl"] > 0
    assert policy.model.dtype == dtype


def test_the_reference_does_not_move(processor):
    trainer = make_trainer(processor, temperature=1.5)
    before = {name: value.clone() for name, value in trainer.reference.model.state_dict().items()}
    for _ in range(3):
        metrics = trainer.step()
    assert all(torch.equal(before[name], value) for name, value in trainer.reference.model.state_dict().items())
    assert metrics["kl"] > 0


def test_the_kl_weight_follows_the_schedule(processor):
    trainer = make_trainer(processor, beta_min=0.1, beta_max=0.3, kl_schedule="linear", max_steps=4)
    betas = []
    for _ in range(4):
        betas.append(trainer.step()["beta"])
    assert betas == pytest.approx([0.1, 0.15, 0.2, 0.25])


def test_the_adaptive_kl_weight_follows_the_measured_kl(processor, monkeypatch):
    options = {"kl_schedule": "adaptive", "target_kl": 0.1, "beta_min": 0.1, "beta_max": 0.3, "max_steps": 20}
    trainer = make_trainer(processor, **options)
    measured, betas = [0.11, math.nan, 0.0, 1.0, 1.0, 1.0], []
    real = trainer.update
    for kl in measured:
        monkeypatch.setattr(trainer, "update", lambda sampled, kl=kl: {**real(sampled), "kl": kl})
        betas.append(trainer.step()["beta"])
    # Per step at most 0.2 x 10 / max_steps of the weight; from the middle, and between the bounds.
    assert betas == pytest.approx([0.2, 0.21, 0.21, 0.189, 0.2079, 0.22869])


def test_sft_learns_its_target(processor):
    trainer = make_trainer(processor, method="sft", learning_rate=2e-3, max_steps=20)
    losses = [trainer.step()["loss"] for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]
    assert sft_target("3") == "<think>3</think><answer>3</answer>"
    ids = trainer.step_data.batch.completion_ids[0][trainer.step_data.batch.completion_mask[0]]
    assert processor.tokenizer.decode(ids) == trainer.step_data.completions[0] + processor.tokenizer.eos_token


def test_sft_with_reasoning(processor):
    trainer = make_trainer(processor, method="sft", sft_reasoning=True)
    examples = trainer.examples()
    trainer.step()
    shown = zip(trainer.step_data.completions, examples, strict=True)
    assert all(text == f"<think>{e.solution} items</think><answer>{e.solution}</answer>" for text, e in shown)


def test_the_weighted_sum_of_the_rewards(processor):
    both = make_trainer(processor, reward_weights="accuracy=0.25,format=2").step()
    means = [both[f"rewards/{name}/mean"] for name in ("accuracy_reward", "format_reward")]
    assert both["reward"] == pytest.approx(0.25 * means[0] + 2 * means[1])
    tags = make_trainer(processor, reward_weights="accuracy=0,format=2").step()
    assert tags["reward"] == pytest.approx(2 * tags["rewards/format_reward/mean"])
    assert "rewards/accuracy_reward/mean" not in tags  # a weight of 0 leaves a reward out


def test_a_reward_that_is_absent_is_left_out_of_its_group_counted_and_said(processor, monkeypatch, capsys):
    scoring._absent.clear()
    trainer = make_trainer(processor)
    values = [1.0, None, 3.0, math.nan] + [None] * 4  # of two prompts, 4 completions each
    monkeypatch.setattr(trainer, "rewards", [Reward("some", 2.0, lambda completions, solutions, **columns: values)])
    for _ in range(2):
        metrics = trainer.step()
    advantages = trainer.step_data.batch.advantages.tolist()
    assert advantages == pytest.approx([-(2**0.5) / 2, 0, 2**0.5 / 2, 0, *[0] * 4], abs=1e-3)
    assert metrics["skipped_steps"] == 0
    assert (metrics["rewards/some/absent"], metrics["rewards/some/mean"], metrics["reward"]) == (6, 2.0, 4.0)
    assert metrics["rewards/some/std"] == pytest.approx(2**0.5)
    assert metrics["reward_std"] == pytest.approx(8**0.5)
    errors = capsys.readouterr().err
    assert errors.count("warning: the reward some returned no number, for 6 of 8 completions: it counts as absent") == 1
    assert scoring.absent_summary() == "12 x some: absent rewards, whose completions had no advantage"


def test_a_step_whose_every_reward_is_absent_changes_no_weight(processor, monkeypatch, capsys):
    scoring._absent.clear()
    trainer = make_trainer(processor)
    trainer.step()  # the optimizer has momentum
    before = weights(trainer)
    good = Reward("good", 1.0, lambda completions, solutions, **columns: [1.0] * 7 + [0.0])
    monkeypatch.setattr(trainer, "rewards", [good, Reward("bad", 1.0, lambda *_, **columns: [1.0])])
    metrics = trainer.step()
    assert metrics["skipped_steps"] == 1
    assert trainer.skipped_sample["reason"] == "no completion has a reward"
    assert (metrics["rewards/bad/absent"], metrics["rewards/good/mean"]) == (8, 7 / 8)
    assert math.isnan(metrics["reward"])
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert "the reward bad returned 1 values for 8 completions" in capsys.readouterr().err


def test_a_reward_that_is_infinite_skips_the_step(processor, monkeypatch):
    trainer = make_trainer(processor, temperature=1.5)
    before = weights(trainer)
    monkeypatch.setattr(trainer, "rewards", [Reward("bad", 1.0, lambda completions, *_, **columns: [math.inf] * 8)])
    for step in (1, 2):
        metrics = trainer.step()
        assert metrics["skipped_steps"] == trainer.skipped_in_a_row == step
    assert trainer.skipped_sample["reason"] == "a reward is not a finite number"
    assert len(trainer.skipped_sample["completions"]) == 8
    assert trainer.skipped_sample["examples"][0]["problem"] == TASKS["vc"].questions[0]
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    monkeypatch.undo()
    metrics = trainer.step()
    assert metrics["skipped_steps"] == 2
    assert trainer.skipped_in_a_row == 0
    assert trainer.skipped_sample is None
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_gradient_that_is_no_number_skips_the_step(processor):
    trainer = make_trainer(processor, temperature=1.5)
    before = weights(trainer)
    hook = trainer.policy.model.model.visual.patch_embed.proj.weight.register_hook(lambda grad: grad * math.nan)
    metrics = trainer.step()
    assert math.isnan(metrics["grad_norm"])
    assert trainer.skipped_sample["reason"] == "grad_norm is nan"
    hook.remove()
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert math.isfinite(trainer.step()["grad_norm"])
    assert any(not torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_a_loss_that_is_no_number_skips_the_step(processor, monkeypatch):
    trainer = make_trainer(processor, num_iterations=2)
    before = weights(trainer)
    real = trainer_module.batch_logps
    monkeypatch.setattr(trainer_module, "batch_logps", lambda *arguments: real(*arguments) * math.nan)
    metrics = trainer.step()
    assert math.isnan(metrics["loss"])
    assert trainer.skipped_sample["reason"] == "loss is nan"
    assert trainer.step_data.batch.old_per_token_logps is None
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())


def test_checkpoints_are_whole_and_the_last_are_kept(processor, tmp_path):
    policy = Policy(load_model(), processor)
    for step in (1, 2, 3, 3):
        save_checkpoint(policy, {"step": step}, tmp_path, step=step, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-000002", "checkpoint-000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000002", "checkpoint-000003"]
    assert load_state(tmp_path / "checkpoint-000003") == {"step": 3}


def test_a_full_disk_leaves_the_last_whole_checkpoint(processor, tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    policy = Policy(load_model(), processor)
    save_checkpoint(policy, {}, tmp_path, step=1, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(UserError, match=r"000002 could not be written .*last whole checkpoint is .*000001"):
            save_checkpoint(policy, {}, tmp_path, step=2, keep=1)
        with pytest.raises(UserError, match="model could not be written"):
            save_model(policy, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]
    loaded = load_model(tmp_path / "checkpoint-000001").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in policy.model.state_dict().items())

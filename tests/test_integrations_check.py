"""Qwen2-VL with images in TRL's trainer and in ours, and the command that shows parity."""

import sys

import pytest
import tiny_trl
import torch
from trl import GRPOConfig, GRPOTrainer

from mr1fast.integrations import check, liger_linear
from mr1fast.integrations import trl as integration
from mr1fast.integrations.trl import GRPODConfig, GRPODTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow  # test_integrations_trl.py has the same with a smaller model
def test_qwen2_vl_steps_equal_trls_for_every_loss_type(tmp_path, monkeypatch):
    batches = []
    compute_loss = GRPODTrainer._compute_loss

    def watched(self, model, inputs):
        batches.append(inputs)
        return compute_loss(self, model, inputs)

    monkeypatch.setattr(GRPODTrainer, "_compute_loss", watched)
    settings = {"max_steps": 2 * len(tiny_trl.LOSS_TYPES), "before": tiny_trl.every_loss_type}
    theirs = check.train(GRPOTrainer, GRPOConfig, str(tmp_path), **settings)
    ours = check.train(GRPODTrainer, GRPODConfig, str(tmp_path), **settings)
    tiny_trl.assert_same_steps(ours, theirs, rtol=1e-3)  # fourteen steps of a KL of up to 15 nats
    tiny_trl.assert_every_loss_type_was_at_work(ours)
    assert all(batch["pixel_values"].numel() > 0 and "mm_token_type_ids" in batch for batch in batches)


def test_qwen2_vl_with_accumulation_and_a_schedule(tmp_path):
    """Micro-batches of two images each, beta down to exactly 0 and up again."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    schedule = {"beta_max": 0.2, "explore_fraction": 0.5}
    steps = check.train(GRPODTrainer, GRPODConfig, str(tmp_path), beta=0.2, **settings, **schedule)
    assert [step["beta"] for step in steps] == pytest.approx([0.1, 0.05, 0.0, 0.1])
    assert all(step["kl"] > 0 for step in steps[1:])


# ---- the command ----------------------------------------------------------------------------------------------------


def test_command_prints_both_and_ends_with_0(capsys):
    assert check.main(["--trl", "--liger", "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    for wanted in ("grpo, step 2: grad_norm", "TRL", "Liger", "sapo: gradient norm of lm_head", "no difference"):
        assert wanted in printed
    assert "<--" not in printed


@pytest.mark.slow
def test_command_finds_a_wrong_number(capsys, monkeypatch):
    right = liger_linear.linear_grpo_loss

    def wrong(*args, **keywords):
        return right(*args, **{**keywords, "beta": keywords["beta"] + 1.0})

    monkeypatch.setattr(liger_linear, "linear_grpo_loss", wrong)
    monkeypatch.setattr(integration, "linear_grpo_loss", wrong)
    assert check.main(["--liger", "--loss-type", "grpo"]) == 1
    assert "3 numbers differ" in capsys.readouterr().out  # the loss and two gradients, not KL and clip ratio
    assert check.main(["--trl", "--steps", "2"]) == 1
    marked = [line for line in capsys.readouterr().out.splitlines() if "<--" in line]
    assert "step 1: grad_norm" in marked[0] or "step 2: loss" in marked[0]


def test_command_needs_a_library_and_names_one_that_is_missing(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        check.main([])
    assert "choose --trl, --liger, --verl or several of them" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main(["--liger", "--loss-type", "luspo"])
    assert "cannot compare luspo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main(["--trl", "--steps", "0"])
    assert "--steps: must be at least 1, got 0" in capsys.readouterr().err

    def missing(*args):
        raise ModuleNotFoundError("No module named 'liger_kernel'", name="liger_kernel")

    monkeypatch.setattr(check, "check_liger", missing)
    assert check.main(["--liger"]) == 2
    assert "--liger: the package 'liger_kernel' is not installed" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "verl", None)
    assert check.main(["--verl"]) == 2
    assert "--verl: the package 'verl' is not installed" in capsys.readouterr().err


def test_compare_trl_on_ones_own_trainer(tmp_path):
    rows = []

    def compare(trainer):
        before = [p.clone() for p in trainer.model.parameters()]
        rows.extend(check.compare_trl(trainer))
        assert type(trainer) is GRPOTrainer
        assert all(torch.equal(p, b) and p.grad is None for p, b in zip(trainer.model.parameters(), before))

    folder = tiny_trl.build(tmp_path / "model")
    steps, _ = tiny_trl.train(folder, GRPOTrainer, GRPOConfig, tmp_path, beta=0.2, max_steps=2, before=compare)
    assert len(steps) == 2  # it trains as if nothing had happened
    values = {row.name: row for row in rows}
    assert {"loss", "kl", "entropy", "clip_ratio/region_mean", "gradient norm"} <= set(values)
    assert max(row.difference for row in rows) < 1e-3
    assert values["gradient norm"].theirs > 0.1
    assert values["|g - g'| / |g|"].ours < 1e-5
    assert "gradient norm" in check.table(rows, "TRL")

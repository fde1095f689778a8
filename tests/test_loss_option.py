"""--loss: keywords of the loss on the command line, and the step that is trained with them."""

import pytest
import torch
from oracle import group_relative, oracle
from test_trainer import make_trainer
from train_program import main

from mr1fast.errors import UserError
from mr1fast.kernels.loss_types import LOSS_TYPES
from mr1fast.model.load import load_processor
from mr1fast.options.parse import parse_arguments
from mr1fast.options.reward_weights import Reward
from mr1fast.training.batch import batch_logps


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def loss_of(*arguments):
    return parse_arguments(list(arguments)).config.for_task("vc").loss


def test_keywords_have_the_types_of_the_loss(tmp_path):
    assert loss_of() == {"loss_type": "grpo"}
    text = "loss_type=dapo, epsilon_high=0.28,scale_rewards=none,delta=none,use_bias_correction_kl=yes"
    expected = {
        "loss_type": "dapo", "epsilon_high": 0.28, "scale_rewards": "none", "delta": None,
        "use_bias_correction_kl": True,
    }  # fmt: skip
    assert loss_of("--loss", text) == expected
    file = tmp_path / "run.yaml"
    file.write_text("loss: {loss_type: dapo, epsilon_high: 0.28, scale_rewards: none, delta: none}\n")
    assert loss_of("--config", str(file)) == {name: expected[name] for name in list(expected)[:4]}
    assert loss_of("--config", str(file), "--loss", "delta=4") == {"loss_type": "grpo", "delta": 4}
    for loss_type in LOSS_TYPES:
        assert loss_of("--loss", f"loss_type={loss_type}")["loss_type"] == loss_type


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epsilon_hi=0.28", "--loss: a keyword must be one of .*, got 'epsilon_hi' (did you mean 'epsilon_high'?)"),
        ("loss_type=gpro", "--loss: loss_type must be one of grpo, .*, got 'gpro' (did you mean 'grpo'?)"),
        ("epsilon_high=wide", "--loss: epsilon_high must be a number >= 0, got 'wide'"),
        ("epsilon_high=-1", "--loss: epsilon_high must be a finite number >= 0, got -1.0"),
        ("use_bias_correction_kl=maybe", "--loss: use_bias_correction_kl must be True or False, got 'maybe'"),
        ("completion_mask=1", "--loss: a keyword must be one of"),
        ("temperature=0.9", "--loss: temperature is set by --temperature, not here"),
        ("reduction=sum", "--loss: reduction is set by the trainer, not here"),
        ("dapo", "--loss must be of the form loss_type=grpo,epsilon_high=0.28, got 'dapo'"),
        ("delta=3,delta=4", "--loss names delta twice"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(UserError) as error:
        parse_arguments(["--loss", text])
    for part in message.split(".*"):
        assert part in str(error.value)


def test_what_the_loss_refuses_is_said_before_the_run_starts(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main("--loss", "loss_type=gmpo,importance_sampling_level=sequence") == 2
    said = "importance_sampling_level must be 'token' with loss_type='gmpo', got 'sequence'"
    assert capsys.readouterr().err == f"error: --loss: {said}\n"
    assert main("--method=sft", "--loss", "loss_type=dapo") == 2
    assert "--loss is that of GRPO, and the method is sft" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


CASES = [
    {"loss_type": "bnpo", "epsilon_low": 0.01},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "dapo", "epsilon_high": 0.01, "scale_rewards": "batch", "entropy_coef": 0.1},
    {"loss_type": "luspo", "delta": 1.02},
    {"loss_type": "cispo", "epsilon_high": 1.02, "kl_estimator": "k1"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_bias_correction_kl": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["loss_type"])
def test_the_keywords_reach_advantages_and_loss_whatever_the_pieces(case, processor, one_thread):
    """The second update on a batch, which is off-policy, in two pieces that have different numbers of tokens."""
    loss, done = dict(case), {}
    rewards = [1.0, 0.0, 0.5, 0.0, 0.25, 0.0, 0.0, 2.0]
    for pieces in (1, 2):
        text = ",".join(f"{name}={value}" for name, value in case.items())
        options = {"loss": text, "num_iterations": 2, "temperature": 3.0, "method": "grpo", "beta": 0.1}
        trainer = make_trainer(processor, gradient_accumulation_steps=pieces, learning_rate=0.02, **options)
        trainer.rewards = [Reward("some", 1.0, lambda *_, **columns: rewards)]
        trainer.step()
        data = trainer.step_data
        with torch.no_grad():
            logps = batch_logps(trainer.policy, data.batch, 3.0).double()
        done[pieces] = trainer.step()
    batch, tokens = data.batch, data.batch.completion_mask.view(2, -1).sum(1)
    assert tokens[0] != tokens[1]
    advantages = torch.tensor(group_relative(rewards, 4, loss.pop("scale_rewards", "group")))
    torch.testing.assert_close(batch.advantages, advantages, atol=1e-5, rtol=1e-5)
    entropy_coef = loss.pop("entropy_coef", 0)
    expected = oracle(
        torch.stack([logps, torch.log1p(-logps.exp())], -1),  # of two tokens: ours, and all others as one
        torch.zeros_like(batch.completion_ids),
        advantages,
        completion_mask=batch.completion_mask,
        old_per_token_logps=batch.old_per_token_logps,
        ref_per_token_logps=batch.ref_per_token_logps,
        beta=0.1,
        max_completion_length=10,
        **loss,
    )
    assert expected["is_low_clipped"].any() or expected["is_high_clipped"].any()
    value = expected["loss"].item() - entropy_coef * done[2]["entropy"]
    assert done[2]["loss"] == pytest.approx(value, rel=1e-4, abs=1e-6)
    assert done[2]["grad_norm"] == pytest.approx(done[1]["grad_norm"], rel=1e-3)
    for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert done[2][name] == pytest.approx(_clip_ratio(expected, batch, name, loss), abs=1e-6)


def _clip_ratio(expected, batch, name, loss):
    flags = expected["is_low_clipped" if "low" in name else "is_high_clipped"]
    if "importance_sampling_level" in loss:
        return flags.any(1).double().mean().item()
    return (flags.sum() / batch.completion_mask.sum()).item()

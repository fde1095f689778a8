"""`--engine trl`: the same run as with our own loop, and what it cannot do in one sentence."""

import json
import math

import pytest
from train_program import main, metrics

from mr1fast.integrations.trl_engine import EngineTrainer
from mr1fast.model.load import load_model
from mr1fast.model.rollout import Sampler
from mr1fast.rewards import REWARDS
from mr1fast.training.run_folder import STATE

G = 4
STEPS = [
    "--task=vc", "--max-steps=4", "--num-iterations=2", "--prompts-per-step=2", f"--num-generations={G}",
    "--gradient-accumulation-steps=2", "--max-completion-length=12", "--temperature=2", "--eval-samples=0",
    "--eval-steps=0", "--warmup-steps=1", "--device=cpu", "--report-to=none", "--learning-rate=0.001",
    "--save-total-limit=9", "--save-steps=2",
]  # fmt: skip
SHARED = {
    "learning_rate", "beta", "loss", "grad_norm", "kl", "entropy", "reward", "reward_std", "frac_reward_zero_std",
    "rewards/accuracy_reward/mean", "rewards/accuracy_reward/std", "rewards/format_reward/mean", "num_tokens",
    "rewards/unanswered", "completions/mean_length", "completions/clipped_ratio", "skipped_steps",
}  # fmt: skip


@pytest.fixture
def same_completions(monkeypatch):
    """Records what our loop samples, and has TRL's trainer sample the same."""
    recorded, generate = [], Sampler.generate

    def record(self, examples, **keywords):
        rollout = generate(self, examples, **keywords)
        if keywords.get("num_generations") == G:
            pairs = zip(rollout.completion_ids, rollout.completion_mask)
            recorded.append([ids[mask].tolist() for ids, mask in pairs])
        return rollout

    def replay(self, prompt_ids, *_):
        assert len(prompt_ids) == len(recorded[0])
        return recorded[self.state.global_step // 2], None

    monkeypatch.setattr(Sampler, "generate", record)
    monkeypatch.setattr(EngineTrainer, "_generate_single_turn", replay)


def assert_same(ours, theirs):
    assert [(row["task"], row["step"]) for row in ours] == [(row["task"], row["step"]) for row in theirs]
    for mine, his in zip(ours, theirs):
        assert set(mine) & set(his) >= SHARED
        for name in SHARED:
            # TRL's means over tokens are means over a step's two pieces of those, ours over all tokens of the step.
            rel = 0.15 if name in ("kl", "entropy") else 1e-4
            assert his[name] == pytest.approx(mine[name], rel=rel, abs=1e-5), (name, mine["step"])


def varied(completions, *_, **columns):
    """A reward that differs within any group, whatever is sampled."""
    return [sum(map(ord, text)) % 11 / 10 for text in completions]


def test_both_engines_take_the_same_steps(tmp_path, same_completions, monkeypatch):
    """On the same completions: two batches, each used twice, in two pieces; and again after a resume."""
    monkeypatch.setitem(REWARDS, "format", varied)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(*STEPS, "--output-dir", ours) == 0
    assert main(*STEPS, "--engine=trl", "--output-dir", theirs) == 0
    rows = metrics(ours)
    assert rows[1]["kl"] > 1e-3
    assert rows[0]["grad_norm"] > 0.1
    assert rows[1]["clip_ratio/region_mean"] > 0
    assert_same(rows, metrics(theirs))
    weights = [dict(load_model(run / "vc" / "model").named_parameters()) for run in (ours, theirs)]
    base = dict(load_model().named_parameters())
    for name, weight in weights[0].items():
        moved, apart = (weight - base[name]).abs().max(), (weight - weights[1][name]).abs()
        assert apart.mean() <= 0.02 * moved  # AdamW's first steps take the sign of gradients that are rounding
    assert json.loads((theirs / "config.json").read_text())["engine"] == "trl"

    assert main("--resume", theirs / "vc" / "checkpoint-2") == 0
    assert_same(rows, metrics(theirs))


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(REWARDS, "format", lambda completions, *_, **columns: [math.inf] * len(completions))
    run = tmp_path / "run"
    replaced = ["--max-steps=30", "--save-steps=9"]
    arguments = [one for one in STEPS if one.partition("=")[0] not in ("--max-steps", "--save-steps")]
    assert main(*arguments, *replaced, "--engine=trl", "--output-dir", run) == 1
    assert "10 steps in a row were skipped (the last: a reward is not a finite number)" in capsys.readouterr().err
    assert len(list((run / "vc" / "skipped").iterdir())) == len(metrics(run)) == 10
    after = dict(load_model(run / "vc" / "checkpoint-9").named_parameters())
    assert all(weight.equal(after[name]) for name, weight in load_model().named_parameters())


@pytest.mark.slow
def test_an_adapter_is_resumed_and_merged(tmp_path):
    run, lora = tmp_path / "run", ["--lora-rank=2", "--merge", "--freeze=vision", "--trl", "adam_beta2=0.99"]
    assert main(*STEPS, *lora, "--engine=trl", "--output-dir", run) == 0
    before = metrics(run)
    assert before[1]["kl"] > 0
    assert (run / "vc" / "adapter" / "adapter_model.safetensors").exists()
    assert (run / "vc" / "checkpoint-2" / STATE).exists()
    assert main("--resume", run / "vc" / "checkpoint-2", "--max-steps=5") == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5]
    assert load_model(run / "vc" / "model").num_parameters() == load_model().num_parameters()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trl", "optim=sgd"], "--trl belongs to --engine trl, and the engine is mr1fast"),
        (["--engine=tlr"], "--engine must be one of mr1fast, trl, got 'tlr' (did you mean 'trl'?)"),
        (["--engine=trl", "--method=sft"], "--method sft has none; leave out --engine trl"),
        (["--engine=trl", "--reference-model=./"], "--engine trl cannot honour --reference-model ./; leave"),
        (["--engine=trl", "--kl-schedule=adaptive", "--target-kl=0.1"], "cannot honour --target-kl 0.1"),
        (["--engine=trl", "--device=cuda:1"], "set CUDA_VISIBLE_DEVICES=1 instead"),
        (["--engine=trl", "--trl", "optm=sgd"], "GRPOConfig has no option 'optm' (did you mean 'optim'?)"),
        (["--engine=trl", "--trl", "learning_rate=1"], "whichever engine trains; give --learning-rate instead"),
        (["--engine=trl", "--trl", "eval_strategy=no"], "--trl eval_strategy: that is set by mr1fast"),
        (["--engine=trl", "--trl", "use_vllm=maybe"], "--trl use_vllm must be true or false, got 'maybe'"),
        (["--engine=trl", "--trl", "adam_beta1=low"], "--trl adam_beta1 must be a number, got 'low'"),
        (["--engine=trl", "--trl", "epsilon=0.1"], "that is set by mr1fast, whichever engine trains; give --loss"),
        (["--engine=trl", "--loss", "loss_type=gmpo"], "--engine trl cannot honour --loss loss_type=gmpo; leave one"),
        (["--engine=trl", "--loss", "kl_clamp=3"], "--engine trl cannot honour --loss kl_clamp=3.0; leave one"),
        (["--engine=trl", "--trl", "sgd"], "--trl must be of the form optim=sgd,adam_beta2=0.99, got 'sgd'"),
        (["--engine=trl", "--trl", "optim=sgd", "--trl", "optim=adamw"], "--trl names optim twice"),
        (["--engine=trl", "--trl", "optim=best"], "--engine trl: best is not a valid OptimizerNames"),
        (["--engine=trl", "--plan"], "--plan knows what our own loop holds in memory, not --engine trl"),
    ],
)
def test_what_it_cannot_do_is_one_sentence(arguments, message, tmp_path, capsys):
    assert main("--task=vc", *arguments, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_block_of_yaml_is_what_the_command_line_says(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("engine: trl\ntrl:\n  adam_beta2: 0.95\n  deepspeed: {stage: 2, offload: null}\n  optim: sgd\n")
    written = 'adam_beta2=0.95,deepspeed={"stage": 2, "offload": null},optim=sgd'
    for arguments in (["--config", file], ["--engine=trl", "--trl", written]):
        assert main(*arguments, "--print-config") == 0
        assert f"trl: '{written}'" in capsys.readouterr().out.replace("\n  ", " ")

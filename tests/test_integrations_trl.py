"""GRPODTrainer against TRL 1.16's GRPOTrainer: the same steps from the same seed."""

import inspect
import json
import math
import runpy
from functools import partial

import pytest
import tiny_trl
import torch
import trl.trainer.utils
from peft import LoraConfig
from tiny_trl import assert_same_steps
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

from mr1fast import kl_weight
from mr1fast.integrations import trl as integration
from mr1fast.integrations import trl_head
from mr1fast.integrations.trl import GRPODConfig, GRPODTrainer, patch_trl, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_trl.build(tmp_path_factory.mktemp("model"))


def both(model, folder, beta=0.2, **settings):
    theirs, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, folder, beta=beta, **settings)
    ours, trainer = tiny_trl.train(model, GRPODTrainer, GRPODConfig, folder, beta=beta, **settings)
    assert_same_steps(ours, theirs)
    return ours, trainer


def test_ten_steps_equal_trls(model, tmp_path):
    steps, _ = both(model, tmp_path, max_steps=10)
    assert [s["beta"] for s in steps] == [0.2] * 10
    # The test is worth something only where clipping and the KL are at work.
    assert sum(s["clip_ratio/low_mean"] > 0 for s in steps) >= 3
    assert sum(s["clip_ratio/high_mean"] > 0 for s in steps) >= 3
    assert max(s["kl"] for s in steps) > 0.1


@pytest.mark.slow
def test_every_loss_type_with_accumulation(model, tmp_path):
    steps, _ = both(
        model,
        tmp_path,
        before=tiny_trl.every_loss_type,
        max_steps=2 * len(tiny_trl.LOSS_TYPES),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        temperature=0.9,
    )
    tiny_trl.assert_every_loss_type_was_at_work(steps)


@pytest.mark.parametrize(
    "settings",
    [
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "beta": 0.0},
        {"use_bias_correction_kl": False, "delta": 1.5, "epsilon_high": 0.3},
        {"entropy_coef": 0.05, "loss_type": "bnpo", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
        {"off_policy_mask_threshold": 0.01},
        {"mask_truncated_completions": True, "max_completion_length": 8, "beta": 0.0},
        {"steps_per_generation": 2, "num_iterations": 1, "per_device_train_batch_size": 2, "loss_type": "dapo"},
        {"model_init_kwargs": {"dtype": "bfloat16"}, "cast_lm_head_to_fp32": True, "gradient_checkpointing": True},
    ],
    ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items())[:60],
)
def test_other_settings(model, tmp_path, settings):
    both(model, tmp_path, **{"max_steps": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_adaptive_entropy": True, "entropy_target": 2.5, "entropy_coef": 0.02}, "use_adaptive_entropy=True"),
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
    ],
)
def test_outside_of_one_pass_trls_loss_runs_on_our_logprobs(model, tmp_path, monkeypatch, settings, reason):
    def never(*args, **kwargs):
        raise AssertionError("one pass")

    monkeypatch.setattr(integration, "linear_grpo_loss", never)
    scored = []
    score = trl_head.linear_token_logprobs
    monkeypatch.setattr(
        trl_head, "linear_token_logprobs", lambda *a, **k: scored.append(torch.is_grad_enabled()) or score(*a, **k)
    )
    _, trainer = both(model, tmp_path, max_steps=2, **settings)
    assert integration.outside_one_pass(trainer) == [reason]
    # Per batch of completions: old and reference log-probs without gradient, then two updates.
    assert scored == [False, False, True, True]


def test_bf16_autocast_agrees_to_bf16_rounding(model, tmp_path):
    settings = {"beta": 0.2, "bf16": True, "max_steps": 2, "learning_rate": 0.1}
    theirs, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, **settings)
    ours, _ = tiny_trl.train(model, GRPODTrainer, GRPODConfig, tmp_path, **settings)
    assert_same_steps(ours, theirs, rtol=0.05)


def test_moe_with_auxiliary_loss(tmp_path):
    folder = tiny_trl.build(
        tmp_path / "moe",
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        output_router_logits=True,
    )
    steps, trainer = both(folder, tmp_path, max_steps=2, router_aux_loss_coef=0.3)
    assert integration.outside_one_pass(trainer) == []
    assert all(step["aux_loss"] > 0 for step in steps)


def test_soft_capped_logits(tmp_path):
    folder = tiny_trl.build(
        tmp_path / "gemma",
        Gemma2Config,
        Gemma2ForCausalLM,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=3.0,
    )
    _, trainer = both(folder, tmp_path, max_steps=2)
    assert integration.outside_one_pass(trainer) == []


def test_lora(model, tmp_path):
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    steps, trainer = both(model, tmp_path, peft_config=LoraConfig(**lora), learning_rate=1.0)
    assert trainer.ref_model is None
    assert max(step["kl"] for step in steps) > 0
    assert trainer.model.get_base_model().get_output_embeddings().weight.grad is None


def test_evaluation(model, tmp_path):
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "beta": 0.2}
    theirs, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, **settings)
    ours, _ = tiny_trl.train(model, GRPODTrainer, GRPODConfig, tmp_path, **settings)
    evaluation, wanted = ours.pop(), theirs.pop()
    assert_same_steps(ours, theirs)
    assert evaluation["eval_beta"] == 0.2
    for name in ("eval_loss", "eval_kl", "eval_entropy", "eval_reward", "eval_clip_ratio/region_mean"):
        assert evaluation[name] == pytest.approx(wanted[name], rel=1e-4, abs=2e-5), name


# ---- the schedule ---------------------------------------------------------------------------------------------------

GEOMETRY = {"kl_schedule": "paper", "beta_min": 0.0, "beta_max": 0.2, "explore_fraction": 0.5}


def test_schedule_that_touches_zero(model, tmp_path):
    """At step 4 of 8 geometry's weight is exactly 0, within a batch of completions that later updates reuse."""
    steps, trainer = tiny_trl.train(
        model, GRPODTrainer, GRPODConfig, tmp_path, max_steps=8, num_iterations=4, learning_rate=0.1, **GEOMETRY
    )
    wanted = [kl_weight(s, 8, beta_min=0.0, beta_max=0.2, explore_fraction=0.5) for s in range(8)]
    assert [step["beta"] for step in steps] == wanted
    assert wanted[4] == 0.0
    assert trainer.ref_model is not None
    assert all(step["kl"] > 0 for step in steps[1:])  # reported at 0, too
    assert all(math.isfinite(step["loss"]) for step in steps)


@pytest.mark.parametrize("settings", [{}, {"loss_type": "vespo"}], ids=["ours", "TRL's"])
def test_each_update_uses_the_weight_of_its_step(model, tmp_path, settings):
    """A TRL trainer whose beta is set by hand before each step gives the same run."""

    class ByHand(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            self.beta = [0.1, 0.05, 0.2, 0.15][self.state.global_step]
            return super()._compute_loss(model, inputs)

        def _generate_and_score_completions(self, inputs):
            self.beta = 1.0
            return super()._generate_and_score_completions(inputs)

    theirs, _ = tiny_trl.train(model, ByHand, GRPOConfig, tmp_path, beta=0.1, **settings)

    class Ours(GRPODTrainer):
        def kl_weight(self):
            return [0.1, 0.05, 0.2, 0.15][self.state.global_step]

    ours, _ = tiny_trl.train(model, Ours, GRPODConfig, tmp_path, beta=0.1, **settings)
    assert_same_steps(ours, theirs)


def test_save_and_resume(model, tmp_path):
    """The schedule goes on exactly where it was: 6 steps, and 3 + 3 with the same total."""
    settings = {**GEOMETRY, "max_steps": 6, "num_iterations": 1, "save_strategy": "steps", "save_steps": 3}
    whole, _ = tiny_trl.train(model, GRPODTrainer, GRPODConfig, tmp_path, **settings)
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    resumed, _ = tiny_trl.train(
        model, GRPODTrainer, GRPODConfig, tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings
    )
    assert [step["beta"] for step in resumed] == [step["beta"] for step in whole]
    assert [step["loss"] for step in resumed] == pytest.approx([step["loss"] for step in whole], rel=1e-4, abs=1e-6)
    assert [step["step"] for step in resumed] == [1, 2, 3, 4, 5, 6]


def test_config_resolves_and_refuses(tmp_path):
    def config(**settings):
        return GRPODConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)

    assert config(beta_max=0.1).beta == 0.1  # TRL then prepares the reference
    assert config(beta=0.03).beta == 0.03
    assert config(beta=0.1, beta_max=0.1).beta == 0.1
    with pytest.raises(ValueError, match="beta_max must be given with beta_min"):
        config(beta_min=0.1)
    with pytest.raises(ValueError, match=r"beta must be left out .* 0\.1\), got 0\.2"):
        config(beta=0.2, beta_max=0.1)
    with pytest.raises(ValueError, match=r"kl_schedule must be one of .*did you mean 'cosine'"):
        config(beta_max=0.1, kl_schedule="cosin")
    with pytest.raises(ValueError, match="beta_max must be given with kl_schedule='linear'"):
        config(beta=0.1, kl_schedule="linear")
    with pytest.raises(ValueError, match="kl_schedule='adaptive' is not supported"):
        config(beta_max=0.1, kl_schedule="adaptive")
    with pytest.raises(ValueError, match="beta_min <= beta_max"):
        config(beta_min=0.2, beta_max=0.1)
    with pytest.raises(ValueError, match="explore_fraction"):
        config(beta_max=0.1, explore_fraction=1.0)


# ---- patch_trl ------------------------------------------------------------------------------------------------------


def test_patch_an_existing_trainer_and_undo_it(model, tmp_path, monkeypatch):
    theirs, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, beta=0.2)
    ours, trainer = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, beta=0.2, before=patch_trl)
    assert_same_steps(ours, theirs)
    assert type(trainer).__name__ == "GRPODGRPOTrainer"

    def patched_and_back(trainer):
        unpatch(patch_trl(trainer, beta_max=0.1))

    def never(*args, **kwargs):
        raise AssertionError("our loss")

    monkeypatch.setattr(integration, "linear_grpo_loss", never)
    monkeypatch.setattr(trl_head, "linear_token_logprobs", never)
    back, trainer = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, beta=0.2, before=patched_and_back)
    assert type(trainer) is GRPOTrainer
    assert trainer.beta == 0.2
    for mine, his in zip(back, theirs):
        assert {k: v for k, v in mine.items() if k != "step_time"} == {k: v for k, v in his.items() if k != "step_time"}


@pytest.mark.parametrize("settings", [{}, {"loss_type": "vespo"}], ids=["ours", "TRL's"])
def test_a_beta_that_a_callback_sets_is_kept_and_said_once(model, tmp_path, settings):
    class Sets(TrainerCallback):
        trainer = None

        def on_step_begin(self, args, state, control, **_):
            if state.global_step >= 1:
                self.trainer.beta = [0.05, 0.1, 0.3][state.global_step - 1]

    def before(trainer, patch=False):
        Sets.trainer = patch_trl(trainer) if patch else trainer
        trainer.add_callback(Sets())

    theirs, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, before=before, beta=0.2, **settings)
    with pytest.warns(UserWarning, match=r"trainer\.beta was set to 0\.05, .* \(0\.2\)") as warned:
        ours, trainer = tiny_trl.train(
            model, GRPOTrainer, GRPOConfig, tmp_path, before=partial(before, patch=True), beta=0.2, **settings
        )
    assert_same_steps(ours, theirs)
    assert [step["beta"] for step in ours] == [0.2, 0.05, 0.1, 0.3]
    assert sum("trainer.beta was set" in str(warning.message) for warning in warned) == 1
    assert unpatch(trainer).beta == 0.3


def test_gmpo_is_that_of_trls_gmpo_trainer(model, tmp_path):
    settings = {"beta": 0.2, "top_entropy_quantile": 0.6, "per_device_train_batch_size": 2, "max_steps": 2}
    settings["gradient_accumulation_steps"] = 2
    theirs, _ = tiny_trl.train(model, GMPOTrainer, GMPOConfig, tmp_path, **settings)
    settings |= {"loss_type": "gmpo", "epsilon": 0.4, "use_bias_correction_kl": False}
    ours, trainer = tiny_trl.train(model, GRPODTrainer, GRPODConfig, tmp_path, **settings)
    assert integration.outside_one_pass(trainer) == []
    assert ours[1]["clip_ratio/region_mean"] > 0
    assert_same_steps(ours, theirs)


@pytest.mark.slow
def test_a_trainer_with_an_objective_of_its_own_keeps_it(model, tmp_path):
    """GMPO's loss is TRL's own, on our log-probabilities."""
    theirs, _ = tiny_trl.train(model, GMPOTrainer, GMPOConfig, tmp_path, beta=0.2)
    ours, trainer = tiny_trl.train(model, GMPOTrainer, GMPOConfig, tmp_path, beta=0.2, before=patch_trl)
    assert integration.outside_one_pass(trainer) == ["GMPOTrainer._compute_loss"]
    assert_same_steps(ours, theirs)
    plain, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, beta=0.2)
    assert plain[1]["loss"] != pytest.approx(ours[1]["loss"], rel=0.05)  # where the objectives differ

    class ScalesLogprobs(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return 0.5 * logps, entropies, aux_loss

    theirs, _ = tiny_trl.train(model, ScalesLogprobs, GRPOConfig, tmp_path, beta=0.2)
    ours, trainer = tiny_trl.train(model, ScalesLogprobs, GRPOConfig, tmp_path, beta=0.2, before=patch_trl)
    assert integration.outside_one_pass(trainer) == ["ScalesLogprobs._get_per_token_logps_and_entropies"]
    assert_same_steps(ours, theirs)


def test_patch_with_a_schedule(model, tmp_path):
    def patch(trainer):
        patch_trl(trainer, kl_schedule="linear", beta_min=0.1, beta_max=0.2)

    steps, _ = tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, beta=0.2, before=patch)
    assert [step["beta"] for step in steps] == pytest.approx([0.1, 0.125, 0.15, 0.175])


def test_patch_refuses(model, tmp_path):
    def refuse(match, **settings):
        def check(trainer):
            with pytest.raises(ValueError, match=match):
                patch_trl(trainer, **settings)
            assert type(trainer) is GRPOTrainer

        return check

    def every(trainer):
        refuse(r"beta_max=0.1 needs a reference model.*built with beta=0\.0", beta_max=0.1)(trainer)
        refuse("beta_max must be given", beta_min=0.1)(trainer)
        refuse("beta_max must be given with kl_schedule='cosine'", kl_schedule="cosine")(trainer)
        refuse("did you mean 'linear'", beta_max=0.1, kl_schedule="linea")(trainer)

    tiny_trl.train(model, GRPOTrainer, GRPOConfig, tmp_path, max_steps=1, before=every)
    with pytest.raises(ValueError, match=r"trainer must be a trl\.GRPOTrainer, got str"):
        patch_trl("trainer")
    with pytest.raises(ValueError, match="patch_trl was given"):
        unpatch(object())
    _, trainer = tiny_trl.train(model, GRPODTrainer, GRPODConfig, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="has our loss already"):
        patch_trl(trainer)


# ---- what it rests on -----------------------------------------------------------------------------------------------


def test_every_model_input_of_trl_is_passed_on():
    """What TRL's own _compute_loss hands to the model is what ours does."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    call = source[source.index("_get_per_token_logps_and_entropies(") :]
    passed = {
        line.split("=")[0].strip() for line in call[: call.index("\n        )")].splitlines() if "inputs.get(" in line
    }
    assert passed == set(integration._MODEL_INPUTS)


def test_what_a_model_does_to_its_logits(model):
    class Config:
        model_type = "granite"
        logits_scaling = 4.0

        def get_text_config(self):
            return self

    module = torch.nn.Linear(1, 1)
    module.config = Config()
    assert trl_head.of_logits(module) == {"logit_scale": 0.25, "final_logit_softcapping": None}
    Config.model_type = "hyperclovax"
    assert trl_head.logit_scale(module) == 4.0
    Config.logit_scale = 0.5
    assert trl_head.logit_scale(module) == 0.5


def test_forward_is_put_back(model, tmp_path):
    _, trainer = tiny_trl.train(model, GRPODTrainer, GRPODConfig, tmp_path, max_steps=1, beta=0.1)
    module = trainer.accelerator.unwrap_model(trainer.model)
    before = module.__dict__["forward"]

    def fail(*tensors):
        raise RuntimeError("in the head")

    ids = torch.ones(1, 5, dtype=torch.int64)
    with trl_head.replaced_head(module, fail, 3, False), pytest.raises(RuntimeError, match="in the head"):
        module(input_ids=ids, labels=ids)
    assert module.__dict__["forward"] is before


def test_another_version_of_trl_goes_on_only_if_it_fits(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with pytest.warns(UserWarning, match=r"tested with trl 1\.16, not with 1\.99\.0"):
        assert "GRPODTrainer" in runpy.run_path(integration.__file__)
    monkeypatch.delattr(trl.trainer.utils, "FusedCausalLMOutput")
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, batch: None)
    wanted = r"trl 1\.99\.0 has no trainer\.utils\.FusedCausalLMOutput, GRPOTrainer\._compute_loss\(inputs\)"
    with pytest.raises(ImportError, match=wanted):
        runpy.run_path(integration.__file__)

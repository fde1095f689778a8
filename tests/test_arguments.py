"""Every bad argument raises ValueError that names it, says what came and what is wanted."""

import numpy as np
import pytest
import torch

from mr1fast import (
    GRPOLoss,
    KLSchedule,
    group_advantages,
    grpo_loss,
    grpo_loss_from_logps,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
)
from mr1fast.kernels.self_test import available_backends, random_batch

B, L, V = 4, 3, 11

BAD = [
    ("logits", torch.zeros(B, L), r"logits must be .* \[B, L, V\], got float32 \[4, 3\]"),
    ("logits", torch.zeros(B, L, V, dtype=torch.int32), "logits must be .* got int32"),
    ("logits", [[1.0]], r"logits must be .* got \[\[1.0\]\]"),
    ("logits", torch.zeros(B, L, V * 2)[..., ::2], "contiguous"),
    ("logits", torch.zeros(B, L, 0), r"logits must have .* size >= 1, got \[4, 3, 0\]"),
    ("logits", torch.zeros(B, L, V).numpy(), r"logits must be .* got ndarray float32 \[4, 3, 11\]"),
    ("inplace", "no", "inplace must be True or False, got 'no'"),
    ("use_bias_correction_kl", 1, "use_bias_correction_kl must be True or False, got 1"),
    ("completion_ids", torch.zeros(B, L + 1).long(), r"completion_ids must be .* \[4, 3\], got int64 \[4, 4\]"),
    ("completion_ids", torch.zeros(B, L), "completion_ids must be an int64"),
    ("completion_ids", torch.full((B, L), V), r"completion_ids \(ids\) must lie in \[0, 11\)"),
    ("completion_ids", torch.full((B, L), -100), r"completion_ids \(ids\) must lie in \[0, 11\).*-100"),
    ("advantages", torch.zeros(B + 1), r"advantages must be .* \[4\] or \[4, 3\], got float32 \[5\]"),
    ("advantages", None, "exactly one of advantages or rewards"),
    ("completion_mask", torch.ones(B), "completion_mask must be"),
    ("old_per_token_logps", torch.zeros(B), "old_per_token_logps must be"),
    ("ref_per_token_logps", torch.zeros(L, B), "ref_per_token_logps must be"),
    ("ref_per_token_logps", None, "ref_per_token_logps .* must be given unless beta is the float 0.0"),
    ("importance_sampling_ratio", torch.ones(L), r"importance_sampling_ratio must be .*\[4\] or \[4, 3\] or \[4, 1\]"),
    ("beta", -0.1, "beta must be .* >= 0"),
    ("beta", float("nan"), "beta must be"),
    ("beta", "0.1", "beta must be"),
    ("beta", torch.zeros(2), "beta must be"),
    ("beta", torch.tensor(0.1 + 1j), "beta must be real"),
    ("epsilon_low", -0.1, "epsilon_low"),
    ("epsilon_high", float("inf"), "epsilon_high"),
    ("delta", 0.0, "delta must be"),
    ("loss_type", "gpro", "loss_type must be one of .*did you mean 'grpo'"),
    ("loss_type", "dr_grpo", "max_completion_length must be given"),
    ("importance_sampling_level", "batch", "importance_sampling_level must be one of token, sequence, sequence_"),
    ("sampling_per_token_logps", torch.zeros(B), "sampling_per_token_logps must be"),
    ("sapo_temperature_pos", 0.0, "sapo_temperature_pos"),
    ("sapo_temperature_neg", -1.0, "sapo_temperature_neg"),
    ("entropy_coef", float("nan"), "entropy_coef"),
    ("max_completion_length", 0, "max_completion_length"),
    ("num_items_in_batch", -1, "num_items_in_batch"),
    ("temperature", 0.0, "temperature must be .* > 0"),
    ("temperature", torch.ones(L), r"temperature must be .* \[4\] or \[4, 3\] or \[\] or \[1\], got float32 \[3\]"),
    ("temperature", torch.tensor([1.0, 0.0, 1.0, -2.0]), r"temperature must be finite and > 0 .* got 0.0 \(6 such"),
    ("temperature", torch.full((B, L), torch.nan), r"temperature must be finite and > 0 .* got nan \(12 such"),
    ("temperature", torch.tensor(torch.inf), "temperature must be finite and > 0 wherever the mask is set, got inf"),
    ("temperature", torch.ones(B, device="meta"), "temperature must be on cpu"),
    ("temperature", "warm", "temperature must be a number > 0, got 'warm'"),
    ("logit_scale", 0.0, "logit_scale must be .* > 0"),
    ("logit_scale", torch.ones(B), r"logit_scale must be a number > 0, got float32 \[4\]"),
    ("final_logit_softcapping", 0.0, "final_logit_softcapping must be a finite number > 0, got 0.0"),
    ("final_logit_softcapping", -30, "final_logit_softcapping must be a finite number > 0"),
    ("final_logit_softcapping", float("nan"), "final_logit_softcapping must be a finite number > 0"),
    ("final_logit_softcapping", torch.ones(B), "final_logit_softcapping must be a number > 0"),
    ("reduction", "max", "reduction must be one of mean, sum, none"),
    ("kl_estimator", "k4", "kl_estimator must be one of k1, abs, k2, k3, low_var_kl, got 'k4'"),
    ("kl_clamp", 0.0, "kl_clamp must be a finite number > 0"),
    ("beta", torch.zeros(L, B), r"beta must be .* \[4\] or \[4, 3\]"),
    ("epsilon_low", torch.zeros(5), r"epsilon_low must be .* \[4\] or \[4, 3\]"),
    ("epsilon_high", torch.zeros(L), r"epsilon_high must be .* \[4\] or \[4, 3\]"),
    ("token_weight", torch.zeros(B), r"token_weight must be .* \[4, 3\], got float32 \[4\]"),
    ("num_sequences", 0, "num_sequences must be a finite number > 0"),
    ("num_sequences", torch.ones(2), "num_sequences must be"),
    ("backend", "cudaa", "backend must be one of"),
    ("scale_rewards", "grup", "did you mean 'group'"),
    ("num_generations", 3, "num_generations must be .* divides .*4.* got 3"),
    ("num_generations", None, "num_generations"),
    ("num_generations", True, "num_generations"),
    ("rewards", torch.zeros(B, 1), "rewards must be"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BAD)])
def test_grpo_loss(name, value, message):
    keywords = random_batch(B, L, V) | {"completion_mask": None, "beta": 0.1}
    if name in ("scale_rewards", "num_generations", "rewards"):
        keywords |= {"advantages": None, "rewards": torch.zeros(B), "num_generations": 2}
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(keywords | {name: value}))


@pytest.mark.parametrize("backend", available_backends())
def test_ids_out_of_range_on_every_backend(backend):
    batch = random_batch(B, L, V)
    batch["completion_ids"][0, 0] = V
    with pytest.raises(ValueError, match=r"\(ids\) must lie in"):
        grpo_loss(**batch, backend=backend)
    with pytest.raises(ValueError, match=r"\(ids\) must lie in"):
        token_logprobs(batch["logits"], batch["completion_ids"], backend=backend)


def test_a_level_that_the_loss_type_does_not_have():
    for loss_type, level in (("gmpo", "sequence"), ("dppo_tv", "sequence_token"), ("kl_cov", "sequence")):
        with pytest.raises(ValueError, match=f"level must be 'token' with loss_type='{loss_type}', got '{level}'"):
            grpo_loss(**random_batch(B, L, V), loss_type=loss_type, importance_sampling_level=level)


def test_the_mask_of_low_entropies_needs_them():
    batch = random_batch(B, L, V)
    with pytest.raises(ValueError, match=r"entropies must be given with top_entropy_quantile 0\.5, got None"):
        grpo_loss_from_logps(batch["old_per_token_logps"], batch["advantages"], top_entropy_quantile=0.5)


def test_both_advantages_and_rewards():
    with pytest.raises(ValueError, match=r"exactly one of advantages or rewards .* got both"):
        grpo_loss(**random_batch(B, L, V), rewards=torch.zeros(B), num_generations=2)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_without_normaliser_there_are_no_sequences_to_count(reduction):
    with pytest.raises(ValueError, match=f"num_sequences must be None with reduction='{reduction}'"):
        grpo_loss(**random_batch(B, L, V), num_sequences=3, reduction=reduction)


def test_entropy_bonus_needs_the_mean():
    with pytest.raises(ValueError, match="entropy_coef must be 0 with reduction='none'"):
        grpo_loss(**random_batch(B, L, V), entropy_coef=0.1, reduction="none")


def test_linear():
    batch = random_batch(B, L, V)
    del batch["logits"]
    hidden, weight = torch.zeros(B, L, 8), torch.zeros(V, 8)
    for bad, message in [
        ({"lm_head_weight": torch.zeros(V, 9)}, r"lm_head_weight must be \[V, H\] with H = 8"),
        ({"lm_head_weight": torch.zeros(V)}, "lm_head_weight"),
        ({"hidden": torch.zeros(B, 8)}, "hidden"),
        ({"hidden": torch.zeros(B, L, 0), "lm_head_weight": torch.zeros(V, 0)}, "hidden must be .* H >= 1"),
        ({"lm_head_bias": torch.zeros(V + 1)}, "lm_head_bias"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_grpo_loss(**({"hidden": hidden, "lm_head_weight": weight} | batch | bad))
        with pytest.raises(ValueError, match=message):
            linear_token_logprobs(
                **({"hidden": hidden, "lm_head_weight": weight} | {"ids": batch["completion_ids"]} | bad)
            )
    with pytest.raises(TypeError, match="inplace"):
        linear_grpo_loss(hidden, weight, **batch, inplace=True)


def test_token_logprobs():
    batch = random_batch(B, L, V)
    with pytest.raises(ValueError, match="ids must be"):
        token_logprobs(batch["logits"], batch["completion_ids"][:, :-1])
    with pytest.raises(ValueError, match="mask must be"):
        token_logprobs(batch["logits"], batch["completion_ids"], mask=torch.ones(L))
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(batch["logits"], batch["completion_ids"], temperature=-1.0)
    for name, value, message in BAD:
        if name in ("temperature", "logit_scale", "final_logit_softcapping"):
            with pytest.raises(ValueError, match=message):
                token_logprobs(batch["logits"], batch["completion_ids"], **{name: value})
            hidden, weight = torch.zeros(B, L, 8), torch.zeros(V, 8)
            with pytest.raises(ValueError, match=message):
                linear_token_logprobs(hidden, weight, batch["completion_ids"], **{name: value})


def test_group_advantages():
    with pytest.raises(ValueError, match=r"num_generations must be .* got 5"):
        group_advantages(torch.zeros(8), 5)
    with pytest.raises(ValueError, match="scale_rewards"):
        group_advantages(torch.zeros(8), 4, scale_rewards="all")
    with pytest.raises(ValueError, match="rewards"):
        group_advantages(torch.zeros(4, 2), 2)
    with pytest.raises(ValueError, match=r"eps must be .* >= 0, got -1"):
        group_advantages(torch.zeros(4), 2, eps=-1)
    assert group_advantages(torch.zeros(0), 10**30).shape == (0,)


def test_scale_rewards_without_rewards():
    with pytest.raises(ValueError, match="scale_rewards must be one of"):
        grpo_loss(**random_batch(B, L, V), scale_rewards="foo")


@pytest.mark.parametrize(
    "overlapping",
    [
        torch.zeros(1, L, V).expand(B, L, V),
        torch.zeros(B, 1, V).expand(B, L, V),
        torch.zeros(200).as_strided((B, L, V), (L * V, V - 1, 1)),
    ],
)
def test_logits_that_share_memory_cannot_be_overwritten(overlapping):
    batch = random_batch(B, L, V)
    with pytest.raises(ValueError, match="logits that will be overwritten must not overlap in memory"):
        grpo_loss(**(batch | {"logits": overlapping}), inplace=True)
    with pytest.raises(ValueError, match="logits that will be overwritten must not overlap in memory"):
        token_logprobs(overlapping, batch["completion_ids"], inplace_backward=True)
    grpo_loss(**(batch | {"logits": overlapping}))
    whole = torch.zeros(L + 1, B, 2 * V)  # views of torch's that do not overlap
    grpo_loss(**(batch | {"logits": whole[:L, :, :V].transpose(0, 1)}), inplace=True)


def test_module():
    criterion = GRPOLoss(kl_schedule=KLSchedule(10, beta_min=0.0, beta_max=0.1))
    batch = random_batch(B, L, V)
    with pytest.raises(ValueError, match="beta must not be given together with kl_schedule"):
        criterion(**batch, beta=0.1)


def test_numbers_may_be_numpys():
    batch = random_batch(B, L, V)
    plain = grpo_loss(**batch, beta=0.5, temperature=0.5)
    other = grpo_loss(**batch, beta=np.float32(0.5), temperature=np.float16(0.5))
    assert torch.equal(plain.loss, other.loss)

"""The options of the loss: what signatures, help and type checkers show, and what GRPOLoss says when it is built."""

import inspect
import math
import re
from pathlib import Path

import mypy.api
import numpy as np
import pytest
import torch
from oracle import oracle

from mr1fast import GRPOLoss, KLSchedule, group_advantages, grpo_loss, linear_grpo_loss
from mr1fast.kernels.loss_types import LOSS_TYPES
from mr1fast.kernels.reference import BatchwiseSpec
from mr1fast.kernels.self_test import random_batch

B, L, V = 4, 3, 11
POSITIONAL = {
    grpo_loss: ["logits", "completion_ids", "advantages"],
    linear_grpo_loss: ["hidden", "lm_head_weight", "completion_ids", "advantages"],
    GRPOLoss: [],
}
OWN = {
    grpo_loss: {"inplace": False, "backend": "auto"},
    linear_grpo_loss: {"lm_head_bias": None, "chunk_bytes": None, "backend": "auto"},
    GRPOLoss: {"kl_schedule": None, "inplace": False, "backend": "auto"},
}
DEFAULTS = {
    "cu_seqlens": None,
    "rewards": None,
    "num_generations": None,
    "scale_rewards": "group",
    "completion_mask": None,
    "old_per_token_logps": None,
    "ref_per_token_logps": None,
    "beta": 0.0,
    "kl_estimator": "k3",
    "kl_clamp": None,
    "epsilon_low": 0.2,
    "epsilon_high": 0.2,
    "delta": None,
    "clip_ratio_c": None,
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "use_bias_correction_kl": False,
    "importance_sampling_ratio": None,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
    "clip_cov_ratio": 0.0002,
    "clip_cov_lb": 1.0,
    "clip_cov_ub": 5.0,
    "kl_cov_ratio": 0.0002,
    "ppo_kl_coef": 0.1,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "sampling_per_token_logps": None,
    "token_weight": None,
    "entropy_coef": 0.0,
    "max_completion_length": None,
    "num_items_in_batch": None,
    "num_sequences": None,
    "temperature": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "reduction": "mean",
}


# ---- what is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda function: function.__name__)
def test_the_signature_shows_every_keyword_with_its_default(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert positional == POSITIONAL[function]
    assert keywords == DEFAULTS | OWN[function]
    assert len(parameters) == len(positional) + len(keywords), "no **options is left"
    assert {p.name: p.annotation for p in parameters}["sapo_temperature_pos"] is float


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda function: function.__name__)
def test_help_explains_every_keyword(function):
    text = inspect.getdoc(GRPOLoss.__init__ if function is GRPOLoss else function)
    for name in DEFAULTS | OWN[function]:
        assert re.search(rf"\n +(\w+, )*{name}(, \w+)*: ", text), name


def test_the_defaults_of_the_oracle_and_of_the_kernels_settings_are_these():
    stated = {p.name: p.default for p in inspect.signature(oracle).parameters.values() if p.default is not p.empty}
    padded = DEFAULTS | {"kl_clamp": math.inf}
    del padded["cu_seqlens"]  # the oracle takes one completion after the other
    assert {name: stated[name] for name in padded} == padded
    infinite = ("delta", "clip_ratio_c", "kl_clamp", "off_policy_mask_threshold", "final_logit_softcapping")
    spec = vars(BatchwiseSpec()) | dict.fromkeys(infinite)
    del spec["sampling_logps"]
    assert {name: DEFAULTS[name] for name in spec} == spec


@pytest.mark.slow  # mypy reads all of torch's types, unless its cache has them
def test_mypy_finds_a_misspelt_or_mistyped_keyword(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])  # where it finds the package and its cache
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from mr1fast import GRPOLoss, grpo_loss, linear_grpo_loss\n"
        "x, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2).long()\n"
        "grpo_loss(x, ids, epsilon_low=0.1, backend='torch', inplace=True)\n"
        "grpo_loss(x, ids, epsilon_hi=0.1)\n"
        "linear_grpo_loss(x, x[0], ids, loss_type=3)\n"
        "linear_grpo_loss(x, x[0], ids, inplace=True)\n"
        "GRPOLoss(epsilon_hi=0.28)\n"
    )
    said, _, _ = mypy.api.run([str(program), "--no-error-summary"])
    found = [(int(line), text) for line, text in re.findall(r"program\.py:(\d+): error: (.*)", said)]
    assert [line for line, _ in found] == [5, 6, 7, 8], said
    assert "epsilon_hi" in found[0][1]
    assert "epsilon_high" in found[0][1], "did you mean"
    assert '"loss_type"' in found[1][1]
    assert 'incompatible type "int"; expected "str"' in found[1][1]


# ---- unknown names --------------------------------------------------------------------------------------------------


def call(function, **options):
    batch = random_batch(B, L, V)
    if function is GRPOLoss:
        return GRPOLoss(**options)
    if function is linear_grpo_loss:
        logits = batch.pop("logits")
        return linear_grpo_loss(logits, torch.eye(V), **batch, **options)
    return grpo_loss(**batch, **options)


@pytest.mark.parametrize("function", POSITIONAL, ids=lambda function: function.__name__)
@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_an_unknown_keyword(error, function):
    """A ValueError, as every wrong argument of the loss is, and a TypeError, as it is everywhere else in Python."""
    with pytest.raises(error, match=rf"{function.__name__} .*'epsilon_hi' \(did you mean 'epsilon_high'\?\)"):
        call(function, epsilon_hi=0.28)
    with pytest.raises(error, match=rf"{function.__name__} .*'back_end' \(did you mean 'backend'\?\)"):
        call(function, back_end="cpp")
    with pytest.raises(error, match=r"unexpected keyword argument 'xyz'; its keywords are .*temperature.*"):
        call(function, xyz=1)


def test_linear_has_no_inplace():
    with pytest.raises(TypeError, match="'inplace'"):
        call(linear_grpo_loss, inplace=True)


def test_the_module_passes_on_what_a_call_gets():
    batch = random_batch(B, L, V)
    with pytest.raises(ValueError, match=r"'epsilon_hi' \(did you mean 'epsilon_high'\?\)"):
        GRPOLoss()(**batch, epsilon_hi=0.28)
    whole = grpo_loss(**batch, beta=0.1, epsilon_high=0.3, reduction="none", backend="torch")
    module = GRPOLoss(epsilon_high=0.3, backend="torch", beta=0.5)(**batch, beta=0.1, reduction="none")
    assert torch.equal(whole.loss, module.loss)


# ---- values that are wrong whatever the tensors are -----------------------------------------------------------------

WRONG = [
    ("inplace", "no", "inplace must be True or False"),
    ("backend", "cudaa", "backend must be one of .*did you mean 'cuda'"),
    ("loss_type", "gpro", "loss_type must be one of .*did you mean 'grpo'"),
    ("loss_type", ["grpo"], "loss_type must be one of"),
    ("importance_sampling_level", "sentence", "importance_sampling_level must be one of token, sequence, sequence_"),
    ("scale_rewards", "grup", "did you mean 'group'"),
    ("reduction", "max", "reduction must be one of mean, sum, none"),
    ("kl_estimator", "k4", "kl_estimator must be one of k1, abs"),
    ("kl_clamp", 0.0, "kl_clamp must be .* > 0"),
    ("num_sequences", 0, "num_sequences must be .* > 0"),
    ("logit_scale", 0.0, "logit_scale must be"),
    ("beta", -0.1, "beta must be .* >= 0"),
    ("beta", "0.1", "beta must be"),
    ("epsilon_low", -0.1, "epsilon_low must be"),
    ("epsilon_high", float("inf"), "epsilon_high must be"),
    ("epsilon_high", None, "epsilon_high must be"),
    ("delta", 0.0, "delta must be .* > 0"),
    ("clip_ratio_c", 1.0, "clip_ratio_c must be .* > 1"),
    ("top_entropy_quantile", 0.0, "top_entropy_quantile must be .* > 0"),
    ("top_entropy_quantile", 1.5, "top_entropy_quantile must be .* <= 1, got 1.5"),
    ("off_policy_mask_threshold", -0.1, "off_policy_mask_threshold must be .* >= 0"),
    ("kl_cov_ratio", 2, "kl_cov_ratio must be .* <= 1"),
    ("temperature", 0.0, "temperature must be .* > 0"),
    ("temperature", True, "temperature must be a number"),
    ("use_bias_correction_kl", 1, "use_bias_correction_kl must be True or False"),
    ("sapo_temperature_pos", 0.0, "sapo_temperature_pos must be"),
    ("entropy_coef", float("nan"), "entropy_coef must be"),
    ("num_generations", 0, "num_generations must be an integer >= 1, got 0"),
    ("num_generations", True, "num_generations must be an integer >= 1, got True"),
    ("num_generations", np.True_, "num_generations must be an integer"),
    ("num_generations", torch.tensor(True), "num_generations must be an integer"),
    ("num_generations", 2.5, "num_generations must be an integer >= 1, got 2.5"),
    ("num_generations", "2", "num_generations must be an integer"),
    ("num_generations", torch.tensor(2.5), "num_generations must be an integer"),
    ("num_generations", torch.tensor([2, 2]), "num_generations must be an integer"),
    ("max_completion_length", 0, "max_completion_length must be an integer >= 1"),
    ("max_completion_length", float("nan"), "max_completion_length must be an integer >= 1"),
    ("num_items_in_batch", -1, "num_items_in_batch must be"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=lambda value: str(value)[:20])
def test_the_module_says_so_when_it_is_built(name, value, message):
    with pytest.raises(ValueError, match=message):
        GRPOLoss(**{name: value})


def test_the_module_takes_what_is_right():
    GRPOLoss(beta=torch.tensor(0.1), delta=None, loss_type="dr_grpo", num_items_in_batch=torch.tensor(3))
    for loss_type in LOSS_TYPES:
        assert f"loss_type={loss_type!r}" in repr(GRPOLoss(loss_type=loss_type))
    with pytest.raises(ValueError, match="kl_schedule must be a KLSchedule or None"):
        GRPOLoss(kl_schedule=0.1)
    with pytest.raises(ValueError, match="beta must not be given together with kl_schedule"):
        GRPOLoss(kl_schedule=KLSchedule(10, beta_min=0.0, beta_max=0.1), beta=0.1)


# ---- numbers of other libraries -------------------------------------------------------------------------------------

TWO = [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2, dtype=torch.int8), 2.0, np.float32(2)]


@pytest.mark.parametrize("two", TWO, ids=lambda two: f"{type(two).__name__}-{getattr(two, 'dtype', '')}")
def test_whole_numbers_of_any_library(two):
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0])
    assert torch.equal(group_advantages(rewards, two), group_advantages(rewards, 2))
    batch = random_batch(B, L, V) | {"advantages": None, "rewards": rewards, "loss_type": "dr_grpo"}
    expected = grpo_loss(**batch, num_generations=2, max_completion_length=2)
    assert torch.equal(grpo_loss(**batch, num_generations=two, max_completion_length=two).loss, expected.loss)
    module = GRPOLoss(loss_type="dr_grpo", num_generations=two, max_completion_length=two)
    del batch["loss_type"]
    assert torch.equal(module(**batch).loss, expected.loss)
    if not isinstance(two, np.ndarray):
        batch |= {"loss_type": "dapo", "num_generations": 2}
        expected = grpo_loss(**batch, num_items_in_batch=2)
        assert torch.equal(grpo_loss(**batch, num_items_in_batch=two).loss, expected.loss)
    eye, batch = torch.eye(V), random_batch(B, L, V)
    logits = batch.pop("logits")
    assert torch.equal(
        linear_grpo_loss(logits, eye, **batch, chunk_bytes=two).loss,
        linear_grpo_loss(logits, eye, **batch, chunk_bytes=2).loss,
    )

"""grpo_loss against the float64 oracle: every backend, loss type, level, mask and option, forward and gradient."""

from itertools import product

import pytest
import torch
from loss_cases import (
    DISTINCT,
    FLAGS,
    OF_LOSS_TYPE,
    OF_NORMALISER,
    OF_POLICY,
    OF_SCORING,
    OPTIONS,
    PER_TOKEN,
    check,
    on,
    run,
    without_logits,
)
from oracle import oracle

from mr1fast import grpo_loss, token_logprobs
from mr1fast.kernels.loss_types import LOSS_TYPES, levels_of
from mr1fast.kernels.self_test import GRADIENT_FLOOR, assert_within_budget, device_of, every_backend, random_batch

BACKENDS = every_backend()


OF_LOGITS = {"temperature": torch.tensor([0.5, 0.8, 1.3]), "final_logit_softcapping": 3.0, "logit_scale": 0.7}
LEVELS = ("token", "sequence")
DISTINCT_KINDS = {(loss_type, "token") for loss_type in DISTINCT}


def combinations(options, in_full=False):
    """All (option, loss_type, level, backend), but for what would run the same code under another name.

    A kernel knows of a loss type no more than its policy term, and of any level but "token" nothing: there, all is
    ordinary torch after the scoring, so that it runs with the options of the scoring. Beside PPO's term, the others run
    with the options that they have to do with, unless in_full, and so do the normalisers.
    """
    kinds = [(loss_type, level) for loss_type in LOSS_TYPES for level in levels_of(loss_type) if level in LEVELS]
    kinds.append(("grpo", "sequence_token"))

    def shown(option, kind, backend):
        if kind == ("grpo", "token"):
            return True
        if kind == ("grpo", "sequence"):
            return in_full or backend == "torch" or option in OF_SCORING
        if kind in DISTINCT_KINDS and (in_full or option in OF_POLICY):
            return True
        return backend == "torch" and (in_full or option in OF_POLICY + OF_NORMALISER)

    return [
        (option, *kind, backend)
        for option, kind, backend in product(options, kinds, BACKENDS)
        if shown(option, kind, backend)
    ]


EACH = pytest.mark.parametrize(
    ("loss_type", "backend"),
    [(name, backend) for name, backend in product(LOSS_TYPES, BACKENDS) if backend == "torch" or name in DISTINCT],
)
KINDS = [names for _, *names in combinations(("",), in_full=True)]
# Where a kernel looks at no policy term; the interpreter is slow.
PLAIN_KINDS = [names for names in KINDS if names[0] == "grpo" or names[-1] != "triton"]


@pytest.mark.parametrize(("option", "loss_type", "level", "backend"), combinations(OPTIONS))
def test_float32(option, loss_type, level, backend, poisoned_memory):
    batch = random_batch(6, 2 if backend == "triton" else 3, 37, seed=len(option))
    settings = OF_LOSS_TYPE.get(loss_type, {}) | OPTIONS[option](batch)
    check(batch, backend, **({"loss_type": loss_type, "importance_sampling_level": level} | settings))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_with_every_backend(loss_type, backend):
    batch = random_batch(6, 2 if backend == "triton" else 3, 37, seed=5)
    settings = {"loss_type": loss_type, "beta": 0.1, "num_items_in_batch": 29, "num_sequences": 9}
    check(batch, backend, **(settings | OF_LOSS_TYPE.get(loss_type, {})))


DTYPES_16 = (torch.bfloat16, torch.float16)
# Triton's interpreter truncates float32 to bfloat16 instead of rounding.
IN_16_BITS = [
    names
    for names in combinations(DTYPES_16, in_full=True)
    if (names[0], names[-1], device_of(names[-1])) != (torch.bfloat16, "triton", "cpu")
]


@pytest.mark.parametrize(("dtype", "loss_type", "level", "backend"), IN_16_BITS)
def test_16_bits(dtype, loss_type, level, backend, poisoned_memory):
    batch = random_batch(4, 6, 130, dtype=dtype, seed=3)
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1}
    check(batch, backend, **(settings | OF_LOSS_TYPE.get(loss_type, {})))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2), (2, 3, 15), (3, 1, 256), (1, 2, 1027), (2, 2, 4099)], ids=str)
def test_shapes(shape, dtype, backend, poisoned_memory):
    batch = random_batch(*shape, dtype=dtype, seed=1)
    check(batch, backend, beta=0.2, entropy_coef=0.01)
    check(batch, backend, beta=0.2, completion_mask=None, importance_sampling_level="sequence")


@EACH
def test_reduction_none(loss_type, backend):
    batch = random_batch(4, 5, 33)
    check(batch, backend, loss_type=loss_type, beta=0.1, reduction="none", max_completion_length=5)
    output, _ = run(grpo_loss, batch["logits"], batch, backend=backend, beta=0.1, reduction="none")
    assert output["loss"].shape == (4, 5)
    assert (output["loss"][~batch["completion_mask"]] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_strided_logits_need_no_copy(backend, inplace):
    batch = random_batch(3, 6, 40)
    leaf = torch.cat([batch["logits"], torch.randn(3, 1, 40)], 1).requires_grad_()
    exact, exact_gradient = run(oracle, batch["logits"].double(), batch, beta=0.1)
    device = device_of(backend)
    shifted = (leaf.to(device) * 1)[:, :-1]
    output = grpo_loss(shifted, beta=0.1, inplace=inplace, backend=backend, **on(device, without_logits(batch)))
    output.loss.backward()
    torch.testing.assert_close(output.loss.cpu().double(), exact["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:, :-1].double(), exact_gradient, rtol=1e-4, atol=1e-7)
    assert (leaf.grad[:, -1] == 0).all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("loss_type", "level", "backend"), PLAIN_KINDS)
def test_masked_positions_may_hold_anything(loss_type, level, backend, softcap):
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 5, "beta": 0.1}
    settings |= {"entropy_coef": 0.1, "use_bias_correction_kl": True, "final_logit_softcapping": softcap}
    batch = random_batch(4, 5, 33)
    batch["importance_sampling_ratio"] = torch.rand(4, 5)
    clean, clean_gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    masked = ~batch["completion_mask"]
    inf, nan = float("inf"), float("nan")
    names = ("logits", "old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio")
    for poison in ((nan, inf, -inf, nan), (inf, nan, nan, inf)):
        dirty = {name: value.clone() for name, value in batch.items()}
        dirty["completion_ids"][masked] = -100
        for name, value in zip(names, poison):
            dirty[name][masked] = value
        output, gradient = run(grpo_loss, dirty["logits"], dirty, backend=backend, **settings)
        assert torch.equal(gradient, clean_gradient)
        for name in ("loss", *PER_TOKEN, *FLAGS):
            assert torch.equal(output[name], clean[name]), name
        for name in (*PER_TOKEN, *FLAGS):
            assert (output[name][masked] == 0).all(), name


@EACH
@pytest.mark.parametrize("with_old", [True, False])
def test_banned_tokens(loss_type, with_old, backend):
    batch = random_batch(2, 4, 20)
    batch["logits"][:, :, 3:7] = -float("inf")
    batch["completion_ids"] = batch["completion_ids"] % 3
    if not with_old:
        batch["old_per_token_logps"] = None
    settings = {"loss_type": loss_type, "max_completion_length": 4, "beta": 0.1, "entropy_coef": 0.2}
    check(batch, backend, **settings)
    # An id that was itself banned: logp -inf, KL 0, no gradient, and a finite loss.
    batch["completion_ids"][0, 1] = 4
    settings["entropy_coef"] = 0.0
    output, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    assert output["per_token_logps"][0, 1] == -float("inf")
    assert output["kl"][0, 1] == 0
    assert (gradient[0, 1] == 0).all()
    assert output["loss"].isfinite()
    assert gradient.isfinite().all()
    assert (gradient[1].abs().sum(-1) > 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_soft_cap(dtype, backend):
    """Of logits far beyond the cap and far below it, of banned ones, and of one that is NaN; per-token temperatures."""
    batch = random_batch(3, 4, 50, dtype=dtype, scale=30.0) | {"completion_mask": None}
    batch["logits"][..., 3:7] = -torch.inf
    batch["completion_ids"] %= 3
    of_logits = {"final_logit_softcapping": 20.0, "temperature": torch.linspace(0.5, 1.5, 12).reshape(3, 4)}
    settings = of_logits | {"beta": 0.1}
    for scale, entropy_coef in ((1, 0.2), (1 / 4096, 0.0)):
        scaled = batch | {"logits": batch["logits"] * scale}
        logps = token_logprobs(scaled["logits"].double(), batch["completion_ids"], **of_logits).float()
        near = {"old_per_token_logps": logps - 0.1, "ref_per_token_logps": logps + 0.3}
        check(scaled | near, backend, **settings, entropy_coef=entropy_coef)
    batch["completion_ids"][0, 1] = 4
    output, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    assert output["per_token_logps"][0, 1] == -torch.inf, "a cap must not allow what is banned"
    assert (gradient[0, 1] == 0).all()
    assert gradient.isfinite().all()
    batch["completion_ids"][0, 1] = 1
    batch["logits"][0, 1, 20] = torch.nan
    output, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, **settings)
    assert output["per_token_logps"].isnan().sum() == 1
    assert gradient.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_temperatures_may_be_anything(backend):
    batch = random_batch(4, 5, 33)
    temperature = torch.linspace(0.5, 1.5, 20).reshape(4, 5)
    clean, clean_gradient = run(grpo_loss, batch["logits"], batch, backend=backend, temperature=temperature)
    for poison in (0.0, -1.0, torch.nan, torch.inf):
        dirty = temperature.masked_fill(~batch["completion_mask"], poison)
        output, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, temperature=dirty)
        assert torch.equal(output["loss"], clean["loss"])
        assert torch.equal(gradient, clean_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [80.5, 100.0, 1e4])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_k3_does_not_overflow(gap, bias_correction, backend):
    batch = random_batch(2, 3, 16)
    batch["ref_per_token_logps"] = batch["ref_per_token_logps"] + gap
    output, gradient = run(
        grpo_loss, batch["logits"], batch, backend=backend, beta=0.04, use_bias_correction_kl=bias_correction
    )
    assert output["loss"].isfinite()
    assert gradient.isfinite().all()
    if not bias_correction:  # with it, the two exponentials cancel: the exact slope is -ratio * (ref_logp - logp)
        assert (gradient.abs().amax(-1)[batch["completion_mask"]] > 0).all(), "the pull towards the reference is lost"


@EACH
@pytest.mark.parametrize("gap", [-float("inf"), -1e4, -90.0, 90.0, 1e4])
def test_extreme_old_log_probs(gap, loss_type, backend):
    batch = random_batch(2, 3, 16)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + gap
    output, gradient = run(
        grpo_loss, batch["logits"], batch, backend=backend, loss_type=loss_type, beta=0.04, max_completion_length=3
    )
    assert output["loss"].isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits(backend):
    batch = random_batch(2, 3, 64, scale=3e3)
    check(batch, backend, beta=0.1)
    batch = random_batch(2, 3, 64)
    batch["logits"] += 1e4
    check(batch, backend, beta=0.1)


@EACH
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("name", ["logits", "old_per_token_logps", "ref_per_token_logps", "advantages"])
def test_nan_is_never_hidden(name, with_old, loss_type, backend):
    """At one token (advantages: one completion): the loss is NaN, and so is that token's gradient, and no other."""
    B, L = (2, 2) if backend == "triton" else (3, 4)  # the interpreter is slow
    batch = random_batch(B, L, 50) | {"completion_mask": None}
    batch[name].view(-1)[0] = torch.nan
    if not with_old and name != "old_per_token_logps":
        batch["old_per_token_logps"] = None
    output, gradient = run(
        grpo_loss, batch["logits"], batch, backend=backend, loss_type=loss_type, beta=0.1, max_completion_length=L
    )
    assert output["loss"].isnan()
    wrong = gradient.isnan().any(-1)
    if loss_type == "gmpo":  # all tokens of a completion that are not clipped have the same ratio
        assert wrong[0].any()
        assert not wrong[1:].any()
        return
    assert wrong[0, : L if name == "advantages" else 1].all()
    assert wrong.sum() == (L if name == "advantages" else 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_coefficient_gives_exactly_zero_gradient(backend):
    batch = random_batch(3, 4, 50) | {"advantages": torch.zeros(3)}
    _, gradient = run(grpo_loss, batch["logits"], batch, backend=backend, beta=0.0)
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_the_logits_stay(backend):
    batch = random_batch(3, 4, 50, device=device_of(backend))
    before = batch["logits"].clone()
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled):
            output = grpo_loss(batch["logits"], beta=0.1, inplace=True, backend=backend, **without_logits(batch))
    assert torch.equal(batch["logits"], before)
    assert not output.loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_incoming_gradient_scales(factor, inplace, backend):
    batch = random_batch(3, 4, 50)
    _, expected = run(grpo_loss, batch["logits"], batch, backend="torch", beta=0.1)
    device, logits = device_of(backend), batch["logits"].requires_grad_()
    logits_there = logits.to(device) * 1
    output = grpo_loss(logits_there, beta=0.1, inplace=inplace, backend=backend, **on(device, without_logits(batch)))
    (output.loss * factor).backward()
    torch.testing.assert_close(logits.grad, expected * factor, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("of_logits", [{"temperature": 0.8}, OF_LOGITS], ids=["temperature", "all"])
def test_token_logprobs(of_logits, dtype, inplace_backward, backend, poisoned_memory):
    batch = random_batch(3, 5, 70, dtype=dtype)
    results = []
    for source, name in ((batch["logits"].double(), "torch"), (batch["logits"], "torch"), (batch["logits"], backend)):
        leaf = source.clone().requires_grad_()
        there = on(device_of(name), batch)
        settings = on(device_of(name), of_logits) | {"mask": there["completion_mask"], "backend": name}
        logps, entropies = token_logprobs(
            leaf.to(device_of(name)) * 1, there["completion_ids"], entropy=True, inplace_backward=inplace_backward,
            **settings,
        )  # fmt: skip
        (logps.sin() * entropies.cos()).sum().backward()
        results.append((logps.detach().cpu(), entropies.detach().cpu(), leaf.grad))
    for name, exact, peer, actual in zip(("logps", "entropies", "gradient"), *results):
        assert_within_budget(name, actual, exact, peer, GRADIENT_FLOOR[dtype] if name == "gradient" else 5e-6)
    assert torch.equal(token_logprobs(there["logits"], there["completion_ids"], **settings), logps)


def test_float64_runs_on_torch_only():
    batch = random_batch(2, 3, 9)
    output, gradient = run(grpo_loss, batch["logits"].double(), batch, backend="auto", beta=0.1)
    assert output["loss"].dtype == gradient.dtype == torch.float64
    for backend in set(BACKENDS) - {"torch"}:
        with pytest.raises(ValueError, match="float64"):
            run(grpo_loss, batch["logits"].double(), batch, backend=backend, beta=0.1)

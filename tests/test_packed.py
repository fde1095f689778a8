"""Packed completions: [T] and cu_seqlens against the oracle on [B, L], and against the same backend there."""

import pytest
import torch
from linear_cases import EVERY
from loss_cases import FLAGS, OF_LOSS_TYPE, OPTIONS, PER_TOKEN, check_packed, on, packed_batch, run, without_logits
from test_loss import PLAIN_KINDS, combinations
from torch._dynamo.testing import CompileCounter

from mr1fast import (
    GRPOLoss,
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    shift_packed,
    token_logprobs,
)
from mr1fast.kernels.loss_types import LOSS_TYPES, levels_of
from mr1fast.kernels.self_test import available_backends, device_of, every_backend

BACKENDS = every_backend()
LENGTHS = (3, 1, 5, 0, 2, 4)  # one of them is empty


def settings_for(loss_type, level="token"):
    return {"loss_type": loss_type, "importance_sampling_level": level} | OF_LOSS_TYPE.get(loss_type, {})


# The kernels see packed tokens as one row: beside each option, each normaliser is shown once.
SHOWN = [
    names
    for names in combinations(OPTIONS)
    if names[0] == "rewards"
    or (names[1] == "grpo" and (names[-1] != "triton" or names[0] in ("entropy", "temperature_per_token")))
]


@pytest.mark.parametrize(("option", "loss_type", "level", "backend"), SHOWN)
def test_float32(option, loss_type, level, backend, poisoned_memory):
    settings = settings_for(loss_type, level)
    check_packed(LENGTHS, 37, backend, lambda batch: settings | OPTIONS[option](batch))


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(("loss_type", "level"), [(name, level) for name in LOSS_TYPES for level in levels_of(name)])
def test_bfloat16(loss_type, level, backend):
    check_packed(LENGTHS, 130, backend, dtype=torch.bfloat16, beta=0.1, **settings_for(loss_type, level))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("lengths", [(4,), (1, 1, 1), (0, 2), (3, 0), (0, 0, 5)], ids=str)
def test_lengths(lengths, reduction, backend):
    for level in ("token", "sequence"):
        settings = {"beta": 0.1, "importance_sampling_level": level, "reduction": reduction}
        check_packed(lengths, 20, backend, **settings)


def outcome(function, arguments, backend, **settings):
    device = device_of(backend)
    logits = arguments["logits"].detach().clone().to(device).requires_grad_()
    torch.manual_seed(0)  # clip_cov draws
    out = function(logits, backend=backend, **on(device, without_logits(arguments) | settings))
    out.loss.sum().backward()
    return out, logits.grad


@pytest.mark.parametrize(("loss_type", "level", "backend"), PLAIN_KINDS)
def test_packed_equals_padded(loss_type, level, backend):
    lengths = (5, 3, 1, 4, 6, 0) if backend == "triton" else (40, 7, 1, 23, 64, 0)
    batch, flat, select = packed_batch(lengths, 11, seed=2)
    of_logits = {"temperature": torch.linspace(0.5, 1.5, 6), "final_logit_softcapping": 4.0}
    settings = {"beta": 0.1, "entropy_coef": 0.01, **settings_for(loss_type, level), **of_logits}
    padded, padded_gradient = outcome(grpo_loss, batch, backend, **settings)
    for shape in ("[T, V]", "[1, T, V]"):
        arguments = dict(flat)
        if shape == "[1, T, V]":
            per_token = [name for name, value in flat.items() if value.shape[:1] == flat["logits"].shape[:1]]
            arguments |= {name: flat[name][None] for name in per_token}
        out, gradient = outcome(grpo_loss, arguments, backend, **settings)
        torch.testing.assert_close(out.loss, padded.loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(gradient.reshape(-1, 11), padded_gradient[select], rtol=1e-6, atol=1e-7)
        for name in (*PER_TOKEN, *FLAGS, "completion_mask"):
            torch.testing.assert_close(getattr(out, name), getattr(padded, name)[select], rtol=1e-6, atol=1e-6)
        assert out.metrics() == pytest.approx(padded.metrics(), rel=1e-6)


@pytest.mark.parametrize("backend", [*EVERY, *(["triton"] if "triton" in BACKENDS else [])])
@pytest.mark.parametrize(
    "settings",
    [{}, {"importance_sampling_level": "sequence"}, {"reduction": "none"}, {"loss_type": "gmpo"}],
    ids=str,
)
def test_hidden_states(settings, backend):
    _, flat, _ = packed_batch((6, 2, 0, 9, 1), 23, seed=4)
    hidden, weight = torch.randn(18, 5), torch.randn(23, 5, requires_grad=True)
    hidden[~flat["completion_mask"]] = torch.nan
    hidden.requires_grad_()
    device = device_of(backend)
    arguments = on(device, without_logits(flat)) | settings | {"beta": 0.1}
    there = (hidden.to(device), weight.to(device))
    out = linear_grpo_loss(*there, backend=backend, chunk_bytes=23 * 4 * 5, **arguments)
    gradients = torch.autograd.grad(out.loss.sum(), (hidden, weight))
    logits = hidden.nan_to_num() @ weight.T
    wanted = grpo_loss(logits, backend="torch", **without_logits(flat), **settings, beta=0.1)
    torch.testing.assert_close(out.loss.cpu(), wanted.loss, rtol=1e-5, atol=1e-6)
    for actual, exact in zip(gradients, torch.autograd.grad(wanted.loss.sum(), (hidden, weight))):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-6)
    for name in PER_TOKEN:
        assert getattr(out, name).shape == (18,)
        torch.testing.assert_close(getattr(out, name).cpu(), getattr(wanted, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", available_backends())
def test_log_probabilities(backend):
    batch, flat, select = packed_batch(LENGTHS, 29)
    temperature = torch.linspace(0.5, 1.5, 6)
    settings = {"entropy": True, "temperature": temperature, "backend": backend}
    wanted = token_logprobs(batch["logits"], batch["completion_ids"], mask=batch["completion_mask"], **settings)
    ids, mask = flat["completion_ids"], flat["completion_mask"]
    weight = torch.eye(29)
    settings["temperature"] = temperature[:, None].expand(select.shape)[select]
    for cu_seqlens in (None, flat["cu_seqlens"]):
        found = token_logprobs(flat["logits"], ids, mask=mask, cu_seqlens=cu_seqlens, **settings)
        linear = linear_token_logprobs(flat["logits"], weight, ids, mask=mask, cu_seqlens=cu_seqlens, **settings)
        for both in (found, linear):
            torch.testing.assert_close(both, tuple(value[select] for value in wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_in_place(inplace, backend):
    _, flat, _ = packed_batch(LENGTHS, 29)
    device, leaf = device_of(backend), flat["logits"].clone().requires_grad_()
    logits = leaf.to(device) * 1
    grpo_loss(logits, backend=backend, inplace=inplace, beta=0.1, **on(device, without_logits(flat))).loss.backward()
    _, exact = run(grpo_loss, flat["logits"], flat, backend="torch", beta=0.1)
    torch.testing.assert_close(leaf.grad, exact, rtol=1e-4, atol=1e-7)
    if inplace and backend != "torch":
        with pytest.raises(RuntimeError, match="already consumed"):
            grpo_loss(logits, backend=backend, **on(device, without_logits(flat)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_module_and_the_dtype_of_the_offsets(dtype):
    _, flat, _ = packed_batch(LENGTHS, 29)
    arguments = without_logits(flat) | {"cu_seqlens": flat["cu_seqlens"].to(dtype)}
    out = GRPOLoss(importance_sampling_level="sequence")(flat["logits"], **arguments)
    assert torch.equal(out.loss, grpo_loss(**flat, importance_sampling_level="sequence").loss)


def test_without_offsets_a_row_is_one_completion():
    _, flat, _ = packed_batch(LENGTHS, 29)
    row = {name: value[None] for name, value in flat.items() if name not in ("advantages", "cu_seqlens")}
    one = grpo_loss(**row, advantages=torch.ones(1))
    offsets = torch.tensor([0, 15])
    assert torch.equal(one.loss, grpo_loss(**(flat | {"advantages": torch.ones(1), "cu_seqlens": offsets})).loss)


def test_as_many_completions_as_tokens():
    """[S] and [T] then have the same shape: it is a value for each completion, and [1, T] one for each token."""
    ids, logits, offsets = torch.zeros(2, dtype=torch.int64), torch.randn(2, 5), torch.tensor([0, 2, 2])
    advantages = torch.tensor([3.0, 7.0])
    of_completions = grpo_loss(logits, ids, advantages, cu_seqlens=offsets, reduction="none")
    of_tokens = grpo_loss(logits, ids, advantages[None], cu_seqlens=offsets, reduction="none")
    assert of_completions.loss.tolist() == [-3, -3]
    assert of_tokens.loss.tolist() == [-3, -7]


def test_nothing_at_all():
    empty = {"completion_ids": torch.zeros(0, dtype=torch.int64), "cu_seqlens": torch.zeros(1, dtype=torch.int32)}
    out = grpo_loss(torch.zeros(0, 5, requires_grad=True), advantages=torch.zeros(0), **empty)
    assert out.loss.item() == 0
    assert out.per_token_logps.shape == (0,)


@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "auto"])
def test_compiled(backend, level):
    """One graph for all lengths and numbers of completions."""
    counter = CompileCounter()

    def step(logits, arguments):
        return grpo_loss(logits, backend=backend, beta=0.1, importance_sampling_level=level, **arguments).loss

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ((3, 4, 2), (5, 1, 1, 3), (2, 7)):
        _, flat, _ = packed_batch(lengths, 17)
        logits = flat["logits"].requires_grad_()
        arguments = without_logits(flat)
        torch.testing.assert_close(compiled(logits, arguments), step(logits, arguments))
    assert counter.frame_count == 1


def test_shifted():
    offsets = torch.tensor([0, 3, 3, 4, 6])
    ids, mask, old = shift_packed(
        offsets, torch.arange(10, 16), torch.tensor([0, 1, 1, 1, 0, 1]), torch.arange(6) / 10.0
    )
    assert mask.tolist() == [1, 1, 0, 0, 1, 0]
    assert ids.tolist() == [11, 12, 0, 0, 15, 0]
    torch.testing.assert_close(old, torch.tensor([0.1, 0.2, 0, 0, 0.5, 0]))
    ids, mask = shift_packed(offsets, torch.arange(10, 16)[None])
    assert mask.tolist() == [True, True, False, False, True, False]
    assert ids.shape == (6,)


def test_shifted_rows_give_the_same_loss():
    """The usual packed layout of a model's input, prompts and all, against its completions cut out by hand."""
    _, flat, _ = packed_batch((5, 4, 6), 13)
    input_ids, logits, offsets = flat["completion_ids"], flat["logits"], flat["cu_seqlens"]
    is_completion = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    ids, mask = shift_packed(offsets, input_ids, is_completion)
    out = grpo_loss(logits, ids, flat["advantages"], completion_mask=mask, cu_seqlens=offsets)
    at = is_completion.nonzero()[:, 0]
    lengths = torch.tensor([0, 3, 6, 8])
    wanted = grpo_loss(logits[at - 1], input_ids[at], flat["advantages"], cu_seqlens=lengths)
    torch.testing.assert_close(out.loss, wanted.loss)
    torch.testing.assert_close(out.per_token_logps[mask], wanted.per_token_logps)


BAD = [
    (
        "cu_seqlens",
        torch.tensor([0, 4, 2, 15]),
        r"cu_seqlens must .* never decreases .* \(15\), got \[0, 4, 2, 15\]",
    ),
    ("cu_seqlens", torch.tensor([0, 4, 5, 6, 8, 9, 10, 11, 12, 14]), r"ends at .*\(15\), got \[0, 4, .*, ..., 14\]"),
    ("cu_seqlens", torch.tensor([1, 4, 15]), "cu_seqlens must be .* starts at 0"),
    ("cu_seqlens", torch.tensor([0.0, 15.0]), "cu_seqlens must be an int32 or int64 .*, got float32"),
    ("cu_seqlens", torch.tensor([[0, 15]]), "cu_seqlens must be an int32 or int64"),
    ("cu_seqlens", torch.zeros(0, dtype=torch.int32), "cu_seqlens must be an int32 or int64"),
    ("cu_seqlens", [0, 15], r"cu_seqlens must be an int32 or int64 .*, got \[0, 15\]"),
    ("cu_seqlens", torch.tensor([0, 15], device="meta"), "cu_seqlens must be on cpu like the tokens, got meta"),
    (
        "cu_seqlens",
        None,
        r"logits must be .* \[B, L, V\], got float32 \[15, 9\]; packed, .* needs cu_seqlens",
    ),
    ("logits", torch.zeros(2, 15, 9), r"logits must be \[T, V\] .* with cu_seqlens, got \[2, 15, 9\]"),
    ("logits", torch.zeros(15), "logits must be"),
    (
        "completion_ids",
        torch.zeros(14).long(),
        r"completion_ids must be .* \[15\] or \[1, 15\] beside packed logits",
    ),
    ("advantages", torch.zeros(5), r"advantages must be .* \[6\] or \[15\] or \[1, 15\] .*, got float32 \[5\]"),
    ("completion_mask", torch.ones(6), "completion_mask must be"),
    ("old_per_token_logps", torch.zeros(6), "old_per_token_logps must be"),
    ("importance_sampling_ratio", torch.ones(6, 1), "importance_sampling_ratio must be"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_bad_arguments(name, value, message):
    _, flat, _ = packed_batch(LENGTHS, 9)
    with pytest.raises(ValueError, match=message):
        grpo_loss(**(flat | {name: value}))


def test_bad_rewards():
    _, flat, _ = packed_batch(LENGTHS, 9)
    with pytest.raises(ValueError, match=r"num_generations must be .* \(6\), got 4"):
        grpo_loss(**(flat | {"advantages": None, "rewards": torch.zeros(6), "num_generations": 4}))
    with pytest.raises(ValueError, match=r"rewards must be .* \[6\]"):
        grpo_loss(**(flat | {"advantages": None, "rewards": torch.zeros(15), "num_generations": 3}))

"""Checks the arguments of the public loss functions and brings them to one form.

Whatever is wrong raises ValueError with the argument's name, what came and what is wanted. Nothing here reads the value
of a tensor: that would be a synchronisation on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import described, flag, not_one_of, number
from mr1fast.kernels import reference
from mr1fast.kernels.reference import LOSS_TYPES, SCALE_REWARDS, LossBatch, LossSpec

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SPEC_FIELDS = tuple(field.name for field in fields(LossSpec))  # here: torch.compile cannot trace the question


def choice(name: str, value: object, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        raise ValueError(not_one_of(name, value, known))


def floating(name: str, tensor: Any, dims: str) -> Tensor:
    """A floating-point tensor whose number of dimensions is that of e.g. "[B, L, V]"."""
    if not isinstance(tensor, Tensor) or tensor.dim() != dims.count(",") + 1 or tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must be a float32, bfloat16, float16 or float64 tensor {dims}, got {described(tensor)}"
        )
    return tensor


def logits_shape(logits: Any, inplace: bool) -> tuple[int, int]:
    """(B, L) of logits [B, L, V] that a call may be about to write over."""
    B, L, V = floating("logits", logits, "[B, L, V]").shape
    if V == 0 or (logits.numel() and logits.stride(-1) != 1):
        raise ValueError(f"logits must have a contiguous last dimension of size >= 1, got {_layout(logits)}")
    if inplace and not torch.compiler.is_compiling() and _overlaps_itself(logits):
        raise ValueError(
            f"logits must not share memory among themselves to be overwritten, got {_layout(logits)} (expanded?); "
            "pass logits.contiguous(), or leave them alone (inplace=False, inplace_backward=False)"
        )
    return B, L


def _layout(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} with strides {list(tensor.stride())}"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements are one; a false alarm only for strides that interleave, which no view of torch's has."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def token_ids(ids: Any, shape: tuple[int, int], like: Tensor, name: str) -> Tensor:
    """ids [B, L] as int64 on the device of `like`."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be an int64 tensor [B, L] = {list(shape)}, got {described(ids)}")
    ids = _shaped(name, ids, [shape], like)
    return ids if ids.dtype == torch.int64 else ids.long()


def token_mask(mask: Any, shape: tuple[int, int], like: Tensor, name: str) -> Tensor | None:
    if mask is None:
        return None
    mask = _shaped(name, mask, [shape], like)
    return mask if mask.dtype == torch.bool else mask != 0


def loss_spec(
    *,
    loss_type: str,
    importance_sampling_level: str,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None,
    use_bias_correction_kl: bool,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    temperature: float,
) -> LossSpec:
    choice("loss_type", loss_type, LOSS_TYPES)
    choice("importance_sampling_level", importance_sampling_level, ("token", "sequence"))
    return LossSpec(
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=number("epsilon_low", epsilon_low, at_least=0),
        epsilon_high=number("epsilon_high", epsilon_high, at_least=0),
        delta=None if delta is None else number("delta", delta, above=0),
        use_bias_correction_kl=flag("use_bias_correction_kl", use_bias_correction_kl),
        sapo_temperature_pos=number("sapo_temperature_pos", sapo_temperature_pos, above=0),
        sapo_temperature_neg=number("sapo_temperature_neg", sapo_temperature_neg, above=0),
        temperature=number("temperature", temperature, above=0),
    )


def loss_settings(
    like: Tensor, shape: tuple[int, int], completion_ids: Tensor, advantages: Tensor | None, **keywords: Any
) -> tuple[LossSpec, LossBatch]:
    """The keywords that the loss functions share, checked and sorted into settings and tensors."""
    spec = loss_spec(**{name: keywords[name] for name in _SPEC_FIELDS})
    of_batch = {name: value for name, value in keywords.items() if name == "loss_type" or name not in _SPEC_FIELDS}
    return spec, loss_batch(like, shape, completion_ids, advantages, **of_batch)


def linear_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """(B, L) of hidden states [B, L, H] that go with a weight [V, H] and a bias [V] or None."""
    B, L, H = floating("hidden", hidden, "[B, L, H]").shape
    V = floating("lm_head_weight", weight, "[V, H]").shape[0]
    if H == 0:
        raise ValueError(f"hidden must be [B, L, H] with H >= 1, got {list(hidden.shape)}")
    if weight.shape[1] != H or V == 0:
        raise ValueError(f"lm_head_weight must be [V, H] with H = {H} and V >= 1, got {list(weight.shape)}")
    if bias is not None:
        _shaped("lm_head_bias", bias, [(V,)], None)
    for name, tensor in (("lm_head_weight", weight), ("lm_head_bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like the hidden states, got {tensor.device}")
        as_is = tensor.dtype in (hidden.dtype, torch.float32)  # float32: master weights of 16-bit hidden states
        if not (as_is or torch.is_autocast_enabled(hidden.device.type)):
            raise ValueError(f"{name} must be {hidden.dtype} like the hidden states, or float32, got {tensor.dtype}")
    return B, L


def chunk_bytes(value: int | None) -> int | None:
    return None if value is None else int(number("chunk_bytes", value, above=0))


def loss_batch(
    like: Tensor,
    shape: tuple[int, int],
    completion_ids: Tensor,
    advantages: Tensor | None,
    *,
    rewards: Tensor | None,
    num_generations: int | None,
    scale_rewards: str,
    completion_mask: Tensor | None,
    old_per_token_logps: Tensor | None,
    ref_per_token_logps: Tensor | None,
    beta: float | Tensor,
    loss_type: str,
    importance_sampling_ratio: Tensor | None,
    entropy_coef: float,
    max_completion_length: int | None,
    num_items_in_batch: int | Tensor | None,
    reduction: str,
) -> LossBatch:
    """Everything but the logits; `like` (logits or hidden states) gives dtype and device, `shape` is (B, L)."""
    B, L = shape
    dtype = reference.compute_dtype(like.dtype)
    choice("reduction", reduction, ("mean", "none"))
    choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    ids = token_ids(completion_ids, shape, like, "completion_ids")
    mask = token_mask(completion_mask, shape, like, "completion_mask")

    if (advantages is None) == (rewards is None):
        which = "neither" if rewards is None else "both"
        raise ValueError(
            f"advantages or rewards (with num_generations) must be given, exactly one of them, got {which}"
        )
    if rewards is None:
        advantages = _constant(_shaped("advantages", advantages, [(B,), (B, L)], like), dtype)
        advantages = advantages[:, None].expand(B, L) if advantages.dim() == 1 else advantages
        num_generations = 1
    else:
        rewards = _constant(_shaped("rewards", rewards, [(B,)], like), dtype)
        check_groups(B, num_generations, scale_rewards)

    def per_token(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> Tensor | None:
        if tensor is None:
            return None
        tensor = _constant(_shaped(name, tensor, shapes, like), dtype)
        return tensor if tensor.shape == (B, L) else tensor.expand(B, L)

    old_logps = per_token("old_per_token_logps", old_per_token_logps, (B, L))
    ref_logps = per_token("ref_per_token_logps", ref_per_token_logps, (B, L))
    is_ratio = per_token("importance_sampling_ratio", importance_sampling_ratio, (B, L), (B, 1))

    if isinstance(beta, Tensor):
        beta = _shaped("beta", beta, [(), (1,)], None).detach().reshape(()).to(like.device, dtype)
        no_kl = False
    else:
        no_kl = number("beta", beta, at_least=0) == 0
        beta = torch.full((), beta, dtype=dtype, device=like.device)
    if ref_logps is None and not no_kl:
        raise ValueError("ref_per_token_logps [B, L] must be given unless beta is the float 0.0, got None")

    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("max_completion_length must be given for loss_type='dr_grpo' (its normaliser), got None")
    if max_completion_length is not None:
        number("max_completion_length", max_completion_length, above=0)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = _shaped("num_items_in_batch", num_items_in_batch, [(), (1,)], None)
        num_items_in_batch = num_items_in_batch.detach().reshape(()).to(like.device)
    elif num_items_in_batch is not None:
        number("num_items_in_batch", num_items_in_batch, at_least=0)
    weight = reference.token_weight(ids, mask, dtype, loss_type, max_completion_length, num_items_in_batch)

    entropy_weight = None
    if entropy_coef := number("entropy_coef", entropy_coef):
        if reduction == "none":
            raise ValueError(f"entropy_coef must be 0 with reduction='none' (the bonus is a mean), got {entropy_coef}")
        tokens = reference.token_count(ids, mask)
        entropy_weight = torch.full((), entropy_coef, dtype=dtype, device=like.device) / tokens
    return LossBatch(
        ids=ids,
        mask=mask,
        advantages=advantages,
        rewards=rewards,
        num_generations=int(num_generations or 1),
        scale_rewards=scale_rewards,
        old_logps=old_logps,
        ref_logps=ref_logps,
        is_ratio=is_ratio,
        token_weight=weight,
        entropy_weight=entropy_weight,
        beta=beta,
    )


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Without gradient and in that dtype. What is so already is let be: a call into torch costs microseconds."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_groups(B: int, num_generations: Any, scale_rewards: str) -> None:
    choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    wrong_type = not isinstance(num_generations, int) or isinstance(num_generations, bool)
    if wrong_type or num_generations < 1 or B % num_generations:
        raise ValueError(
            f"num_generations must be an integer >= 1 that divides the number of rewards ({B}), got {num_generations}"
        )


def _shaped(name: str, tensor: Any, shapes: Sequence[tuple[int, ...]], like: Tensor | None) -> Tensor:
    """`tensor` has one of the shapes, and lies where `like` lies."""
    if not isinstance(tensor, Tensor) or tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be a tensor of shape {wanted}, got {described(tensor)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the logits, got {tensor.device}")
    return tensor

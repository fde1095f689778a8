"""Checks the arguments of the public loss functions and brings them into one form.

A wrong argument raises a ValueError that names it and says what was expected and what was given. Nothing here reads a
tensor's values, because the CPU would have to wait for the GPU. Checks that need no tensor are in options.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import described, integer
from mr1fast.kernels import reference
from mr1fast.kernels.normalisers import token_count
from mr1fast.kernels.reference import LossBatch, LossSpec

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SPEC_FIELDS = tuple(field.name for field in fields(LossSpec))  # here: torch.compile cannot trace the question


def floating(name: str, tensor: Any, dims: str) -> Tensor:
    """Check for a floating-point tensor with as many dimensions as `dims` names, e.g. "[B, L, V]"."""
    if not isinstance(tensor, Tensor) or tensor.dim() != dims.count(",") + 1 or tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"{name} must be a float32, bfloat16, float16 or float64 tensor {dims}, got {described(tensor)}"
        )
    return tensor


def logits_shape(logits: Any, inplace: bool) -> tuple[int, int]:
    """(B, L) of logits [B, L, V], which the call will overwrite if `inplace`."""
    B, L, V = floating("logits", logits, "[B, L, V]").shape
    if V == 0 or (logits.numel() and logits.stride(-1) != 1):
        raise ValueError(f"logits must have a contiguous last dimension of size >= 1, got {_layout(logits)}")
    if inplace and not torch.compiler.is_compiling() and _overlaps_itself(logits):
        raise ValueError(
            f"logits that will be overwritten must not overlap in memory, got {_layout(logits)} (expanded?); "
            "pass logits.contiguous(), or do not overwrite them (inplace=False, inplace_backward=False)"
        )
    return B, L


def _layout(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} with strides {list(tensor.stride())}"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory; wrongly true only for interleaved strides, which torch's views never have."""
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
    checked = _shaped(name, ids, [shape], like)
    return checked if checked.dtype == torch.int64 else checked.long()


def token_mask(mask: Any, shape: tuple[int, int], like: Tensor, name: str) -> Tensor | None:
    if mask is None:
        return None
    checked = _shaped(name, mask, [shape], like)
    return checked if checked.dtype == torch.bool else checked != 0


def linear_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """(B, L) of hidden states [B, L, H], after checking that weight [V, H] and bias ([V] or None) match them."""
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
    return None if value is None else integer("chunk_bytes", value, at_least=1)


def loss_call(
    like: Tensor, shape: tuple[int, int], completion_ids: Tensor, advantages: Tensor | None, options: Mapping[str, Any]
) -> tuple[LossSpec, LossBatch]:
    """The settings and the tensors of a call; options: as returned by `completed`.

    `like` (logits, hidden states or log-probabilities) gives dtype and device, `shape` is (B, L).
    """
    spec = LossSpec(**{name: options[name] for name in _SPEC_FIELDS})
    dtype = reference.compute_dtype(like.dtype)
    ids = token_ids(completion_ids, shape, like, "completion_ids")
    mask = token_mask(options["completion_mask"], shape, like, "completion_mask")
    beta = _beta(options, like.device, dtype)

    def per_token(name: str, *also: tuple[int, int]) -> Tensor | None:
        if options[name] is None:
            return None
        tensor = _constant(_shaped(name, options[name], [shape, *also], like), dtype)
        return tensor if tensor.shape == shape else tensor.expand(shape)

    return spec, LossBatch(
        ids=ids,
        mask=mask,
        **_advantages(like, shape, advantages, options),
        old_logps=per_token("old_per_token_logps"),
        ref_logps=per_token("ref_per_token_logps"),
        is_ratio=per_token("importance_sampling_ratio", (shape[0], 1)),
        token_weight=_token_weight(ids, mask, dtype, options),
        entropy_weight=_entropy_weight(ids, mask, dtype, options),
        beta=beta,
    )


def _advantages(
    like: Tensor, shape: tuple[int, int], advantages: Tensor | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of LossBatch from which each token gets its advantage."""
    B, L = shape
    dtype, rewards = reference.compute_dtype(like.dtype), options["rewards"]
    if (advantages is None) == (rewards is None):
        which = "neither" if rewards is None else "both"
        raise ValueError(f"exactly one of advantages or rewards (with num_generations) must be given, got {which}")
    if rewards is None:
        advantages = _constant(_shaped("advantages", advantages, [(B,), (B, L)], like), dtype)
        return {"advantages": advantages.unsqueeze(1).expand(B, L) if advantages.dim() == 1 else advantages}
    return {
        "rewards": _constant(_shaped("rewards", rewards, [(B,)], like), dtype),
        "num_generations": group_size(B, options["num_generations"]),
        "scale_rewards": options["scale_rewards"],
    }


def group_size(B: int, num_generations: int | None) -> int:
    if num_generations is None or B % num_generations:
        raise ValueError(
            f"num_generations must be an integer >= 1 that divides the number of rewards ({B}), got {num_generations}"
        )
    return num_generations


def _beta(options: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    beta = options["beta"]
    if options["ref_per_token_logps"] is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError("ref_per_token_logps [B, L] must be given unless beta is the float 0.0, got None")
    if isinstance(beta, Tensor):
        return _shaped("beta", beta, [(), (1,)], None).detach().reshape(()).to(device, dtype)
    return torch.full((), beta, dtype=dtype, device=device)


def _token_weight(ids: Tensor, mask: Tensor | None, dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor:
    items = options["num_items_in_batch"]
    if isinstance(items, Tensor):
        items = _shaped("num_items_in_batch", items, [(), (1,)], None).detach().reshape(()).to(ids.device)
    return reference.token_weight(ids, mask, dtype, options["loss_type"], options["max_completion_length"], items)


def _entropy_weight(ids: Tensor, mask: Tensor | None, dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor | None:
    entropy_coef = options["entropy_coef"]
    if entropy_coef == 0:
        return None
    if options["reduction"] == "none":
        raise ValueError(f"entropy_coef must be 0 with reduction='none' (the bonus is a mean), got {entropy_coef}")
    return torch.full((), entropy_coef, dtype=dtype, device=ids.device) / token_count(ids, mask)


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor detached and in that dtype. It is returned as is if possible: a call into torch costs microseconds."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _shaped(name: str, tensor: Any, shapes: Sequence[tuple[int, ...]], like: Tensor | None) -> Tensor:
    """Check that `tensor` has one of the shapes and is on the device of `like`."""
    if not isinstance(tensor, Tensor) or tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must be a tensor of shape {wanted}, got {described(tensor)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the logits, got {tensor.device}")
    return tensor

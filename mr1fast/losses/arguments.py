"""Checks the arguments of the public loss functions and brings them into one form.

A wrong argument raises a ValueError that names it and says what was expected and what was given. Nothing here reads a
tensor's values, because the CPU would have to wait for the GPU. Checks that need no tensor are in options.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mr1fast.checks import described, integer
from mr1fast.kernels import loss_types
from mr1fast.kernels.advantages import group_advantages
from mr1fast.kernels.normalisers import token_count
from mr1fast.kernels.reference import BatchwiseSpec, LogitMap, LossBatch, LossSpec
from mr1fast.losses.layout import Layout, check_values, floating, layout_of, shaped
from mr1fast.losses.options import OPTIONS

# Here, because torch.compile cannot trace the question.
_SPEC_FIELDS = tuple(field.name for field in fields(LossSpec))
_SAMPLING = "sampling_per_token_logps"
_BATCHWISE_FIELDS = tuple({field.name for field in fields(BatchwiseSpec)} - {*_SPEC_FIELDS, "sampling_logps"})


def logits_rows(logits: Any, overwritten: bool, **how: Any) -> tuple[Tensor, Layout]:
    """logits as [B, L, V], which the call may overwrite, and the layout of the call; `how` as for `layout_of`."""
    logits, layout = layout_of("logits", logits, "V", **how)
    if logits.shape[-1] == 0 or (logits.numel() and logits.stride(-1) != 1):
        raise ValueError(f"logits must have a contiguous last dimension of size >= 1, got {_strides(logits)}")
    if overwritten and not torch.compiler.is_compiling() and _overlaps_itself(logits):
        raise ValueError(
            f"logits that will be overwritten must not overlap in memory, got {_strides(logits)} (expanded?); "
            "pass logits.contiguous(), or do not overwrite them (inplace=False, inplace_backward=False)"
        )
    return logits, layout


def _strides(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} with strides {list(tensor.stride())}"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory; wrongly true only for interleaved strides, which torch's views never have."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def token_ids(ids: Any, layout: Layout, name: str) -> Tensor:
    """ids as int64 [B, L]."""
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be an int64 tensor [B, L] = {list(layout.shape)}, got {described(ids)}")
    checked = layout.per_token(name, ids)
    return checked if checked.dtype == torch.int64 else checked.long()


def token_mask(mask: Any, layout: Layout, name: str) -> Tensor | None:
    if mask is None:
        return None
    checked = layout.per_token(name, mask)
    return checked if checked.dtype == torch.bool else checked != 0


def hidden_rows(hidden: Any, weight: Any, bias: Any, **how: Any) -> tuple[Tensor, Layout]:
    """hidden as [B, L, H] and the layout of the call; weight [V, H] and bias ([V] or None) are checked to match."""
    hidden, layout = layout_of("hidden", hidden, "H", **how)
    H, V = hidden.shape[-1], floating("lm_head_weight", weight, "V", "H").shape[0]
    if H == 0:
        raise ValueError(f"hidden must be [B, L, H] with H >= 1, got {list(hidden.shape)}")
    if weight.shape[1] != H or V == 0:
        raise ValueError(f"lm_head_weight must be [V, H] with H = {H} and V >= 1, got {list(weight.shape)}")
    if bias is not None:
        shaped("lm_head_bias", bias, [(V,)], None)
    for name, tensor in (("lm_head_weight", weight), ("lm_head_bias", bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like the hidden states, got {tensor.device}")
        as_is = tensor.dtype in (hidden.dtype, torch.float32)  # float32: master weights of 16-bit hidden states
        if not (as_is or torch.is_autocast_enabled(hidden.device.type)):
            raise ValueError(f"{name} must be {hidden.dtype} like the hidden states, or float32, got {tensor.dtype}")
    return hidden, layout


def logit_map(dtype: torch.dtype, layout: Layout, mask: Tensor | None, **given: Any) -> LogitMap:
    """From the options temperature, logit_scale and final_logit_softcapping, not checked yet, of scoring."""
    options = {name: OPTIONS[name].check(name, value) for name, value in given.items()}
    temperature, softcap = options["temperature"], options["final_logit_softcapping"]
    scale = options["logit_scale"]
    if isinstance(temperature, Tensor):
        return LogitMap(1.0, softcap / scale, _temperatures(dtype, layout, mask, options))
    return LogitMap(temperature / scale, softcap / scale)


def _temperatures(dtype: torch.dtype, layout: Layout, mask: Tensor | None, options: Mapping[str, Any]) -> Tensor:
    """The temperature of each token, by which the logits as they were given are divided, [B, L]."""
    each = _used(mask, _constant(_setting("temperature", options["temperature"], layout), dtype))
    check_values("temperature", (each > 0) & (each < torch.inf), "finite and > 0 wherever the mask is set", each)
    return each if options["logit_scale"] == 1 else each / options["logit_scale"]


def _used(mask: Tensor | None, each: Tensor) -> Tensor:
    """A setting of each token, and 1 at masked ones: NaN would reach the gradient of masked logits as 0 / NaN."""
    return each if mask is None else torch.where(mask, each, 1)


def chunk_bytes(value: int | None) -> int | None:
    return None if value is None else integer("chunk_bytes", value, at_least=1)


def loss_call(
    dtype: torch.dtype, layout: Layout, ids: Tensor, advantages: Tensor | None, options: Mapping[str, Any]
) -> tuple[LossSpec, LossBatch]:
    """The settings and the tensors of a call; dtype: to compute in, options: as returned by `completed`."""
    values = {name: options[name] for name in _SPEC_FIELDS}
    mask = token_mask(options["completion_mask"], layout, "completion_mask")
    # What is given for each token goes into the batch, and the spec has a default that nobody reads.
    temperatures, epsilons = None, {}
    if isinstance(values["temperature"], Tensor):
        del values["temperature"]
        temperatures = _temperatures(dtype, layout, mask, options)
    else:
        values["temperature"] /= options["logit_scale"]
    values["final_logit_softcapping"] /= options["logit_scale"]
    for name in ("epsilon_low", "epsilon_high"):
        if isinstance(values[name], Tensor):
            each = _used(mask, _constant(_setting(name, values.pop(name), layout), dtype))
            check_values(name, (each >= 0) & (each < torch.inf), "finite and >= 0 wherever the mask is set", each)
            epsilons[name] = each
    batchwise = _batchwise(dtype, layout, options)
    spec = LossSpec(**values) if batchwise is None else BatchwiseSpec(**values, **batchwise)

    def per_token(name: str) -> Tensor | None:
        return None if options[name] is None else _constant(layout.per_token(name, options[name]), dtype)

    return spec, LossBatch(
        ids=ids,
        mask=mask,
        **_advantages(dtype, layout, advantages, options),
        old_logps=per_token("old_per_token_logps"),
        ref_logps=per_token("ref_per_token_logps"),
        is_ratio=_is_ratio(dtype, layout, options),
        token_weight=_token_weight(ids, mask, dtype, layout, options),
        entropy_weight=_entropy_weight(ids, mask, dtype, options),
        beta=_beta(options, layout, dtype),
        epsilons_low=epsilons.get("epsilon_low"),
        epsilons_high=epsilons.get("epsilon_high"),
        temperatures=temperatures,
        cu_seqlens=layout.cu_seqlens,
    )


def _batchwise(dtype: torch.dtype, layout: Layout, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields that BatchwiseSpec adds to LossSpec; None where the call needs no more than a token at a time."""
    loss_type, level, sampling = options["loss_type"], options["importance_sampling_level"], options[_SAMPLING]
    if level not in loss_types.levels_of(loss_type):
        raise ValueError(f"importance_sampling_level must be 'token' with loss_type={loss_type!r}, got {level!r}")
    if sampling is not None:
        sampling = _constant(layout.per_token(_SAMPLING, sampling), dtype)
    elif options["old_per_token_logps"] is None and options["off_policy_mask_threshold"] != math.inf:
        # No completion is off-policy then.
        options = {**options, "off_policy_mask_threshold": math.inf}
    masked = options["top_entropy_quantile"] < 1 or options["off_policy_mask_threshold"] != math.inf
    if not masked and loss_type in loss_types.ONE_PASS_LOSS_TYPES:
        return None
    return {"sampling_logps": sampling, **{name: options[name] for name in _BATCHWISE_FIELDS}}


def _advantages(
    dtype: torch.dtype, layout: Layout, advantages: Tensor | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields of LossBatch from which each token gets its advantage."""
    rewards, scale_rewards = options["rewards"], options["scale_rewards"]
    if (advantages is None) == (rewards is None):
        which = "neither" if rewards is None else "both"
        raise ValueError(f"exactly one of advantages or rewards (with num_generations) must be given, got {which}")
    if rewards is None:
        return {"advantages": _constant(layout.per_token_or_completion("advantages", advantages), dtype)}
    rewards = _constant(layout.per_completion("rewards", rewards), dtype)
    num_generations = group_size(layout.completions.size, options["num_generations"])
    if layout.packed:  # a kernel that computed them from the rewards would have to find each token's completion
        return {"advantages": layout.completions.spread(group_advantages(rewards, num_generations, scale_rewards))}
    return {"rewards": rewards, "num_generations": num_generations, "scale_rewards": scale_rewards}


def _is_ratio(dtype: torch.dtype, layout: Layout, options: Mapping[str, Any]) -> Tensor | None:
    name, broadcast = "importance_sampling_ratio", (layout.completions.size, 1)
    if options[name] is None:
        return None
    also = () if layout.packed else (broadcast,)
    return _constant(layout.per_token_or_completion(name, options[name], *also), dtype)


def group_size(B: int, num_generations: int | None) -> int:
    if num_generations is None or B % num_generations:
        raise ValueError(
            f"num_generations must be an integer >= 1 that divides the number of rewards ({B}), got {num_generations}"
        )
    return min(num_generations, max(B, 1))  # of no rewards, any number


def _beta(options: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> Tensor:
    beta = options["beta"]
    if options["ref_per_token_logps"] is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError("ref_per_token_logps [B, L] must be given unless beta is the float 0.0, got None")
    if not isinstance(beta, Tensor):
        return torch.full((), beta, dtype=dtype, device=layout.device)
    if beta.shape in ((), (1,)) and not beta.is_complex():
        return beta.detach().reshape(()).to(layout.device, dtype)
    return _constant(_setting("beta", beta, layout), dtype)


def _setting(name: str, tensor: Tensor, layout: Layout) -> Tensor:
    """A setting of the loss that was given as a tensor: 0-d, for each completion or for each token; as [B, L]."""
    return layout.per_token_or_completion(name, tensor, (), (1,))


def _token_weight(
    ids: Tensor, mask: Tensor | None, dtype: torch.dtype, layout: Layout, options: Mapping[str, Any]
) -> Tensor:
    reduction, given = options["reduction"], options["token_weight"]
    if reduction != "mean" and options["num_sequences"] is not None:
        raise ValueError(f"num_sequences must be None with reduction={reduction!r}, which has no normaliser")
    if reduction == "mean":
        weight = loss_types.token_weight(
            ids,
            mask,
            dtype,
            options["loss_type"],
            options["max_completion_length"],
            _count("num_items_in_batch", layout.device, options),
            layout.completions,
            _count("num_sequences", layout.device, options),
        )
    else:
        weight = torch.ones((), dtype=dtype, device=layout.device).expand(layout.shape)
    if given is None:
        return weight
    own = _constant(layout.per_token("token_weight", given), dtype)
    return weight * (own if mask is None else torch.where(mask, own, 0))


def _count(name: str, device: torch.device, options: Mapping[str, Any]) -> Tensor | float | None:
    count: Tensor | float | None = options[name]
    return shaped(name, count, [(), (1,)], None).detach().reshape(()).to(device) if isinstance(count, Tensor) else count


def _entropy_weight(ids: Tensor, mask: Tensor | None, dtype: torch.dtype, options: Mapping[str, Any]) -> Tensor | None:
    entropy_coef = options["entropy_coef"]
    if entropy_coef == 0:
        return None
    if options["reduction"] == "none":
        raise ValueError(f"entropy_coef must be 0 with reduction='none' (the bonus is a mean), got {entropy_coef}")
    if options["reduction"] == "sum":
        return torch.full((), entropy_coef, dtype=dtype, device=ids.device)
    return torch.full((), entropy_coef, dtype=dtype, device=ids.device) / token_count(ids, mask)


def _constant(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor detached and in that dtype. It is returned as is if possible: a call into torch costs microseconds."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return tensor if tensor.dtype == dtype else tensor.to(dtype)

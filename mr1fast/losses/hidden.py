"""The public loss functions from hidden states, in which no [N, V] tensor of logits ever exists.

Shapes as in `logits.py`: B completions, L tokens, V vocabulary, H hidden, N unmasked tokens.

What the weight may be:

- Tied to the input embedding: pass the embedding's weight, autograd adds the two gradients.
- A DTensor (FSDP2, tensor parallel): gathered once for the call; its gradient is averaged over the mesh, as FSDP does
  with every other parameter's.
- With LoRA on the lm_head: pass the merged weight, `base.weight + scaling * B @ A` (in PEFT `layer.weight +
  layer.get_delta_weight(name)`); the gradient of the merged weight reaches A and B through autograd.
- Frozen: the GEMM for its gradient is left out, as is the GEMM for hidden states that need no gradient.

The GEMMs run in the dtype of the hidden states, or in autocast's; a float32 weight (FSDP2 with a 16-bit `param_dtype`,
autocast) is cast for the call and gets its gradient in float32, summed over blocks in float32. On a GPU nothing is
rounded on the way; a CPU's 16-bit GEMM rounds the product of each block.
To torch.compile(fullgraph=True) each function is one node; the "torch" backend is traced, and keeps its logits.
"""

from __future__ import annotations

from typing import TypeVar, Unpack

import torch
from torch import Tensor

from mr1fast import checks
from mr1fast.kernels import linear_op
from mr1fast.kernels.reference import compute_dtype
from mr1fast.losses import arguments
from mr1fast.losses.keywords import completed, spelled_out
from mr1fast.losses.logits import GRPOLossOutput
from mr1fast.losses.options import LossOptions

_Weight = TypeVar("_Weight", Tensor, Tensor | None)


@spelled_out
def linear_grpo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    lm_head_bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
    **options: Unpack[LossOptions],
) -> GRPOLossOutput:
    """`grpo_loss(hidden @ lm_head_weight.T + lm_head_bias, ...)` with its gradients, in three GEMMs and little memory.

    Token-level objectives with reduction="mean" compute the gradients in forward, one block of rows after another, and
    backward returns them (so a call with gradients enabled pays for them). All others recompute the logits in backward
    (four GEMMs, see `linear_token_logprobs`), and so does float16, whose loss scale must be part of the gradient before
    it is rounded. Masked tokens cost nothing; tokens without a gradient (at beta 0, those with advantage 0 or clipped)
    cost only the first GEMM.

    Args:
        hidden: [B, L, H] float32, bfloat16 or float16 (float64 on "torch" only): the last hidden states, so that
            `hidden[:, t]` predicts `completion_ids[:, t]`; packed [T, H] or [1, T, H], see cu_seqlens. Anything at
            masked positions.
        lm_head_weight: [V, H] in the dtype of the hidden states or float32 (any under autocast); see above for what it
            may be.
        completion_ids, advantages: as in `grpo_loss`.
        lm_head_bias: [V] or None.
        chunk_bytes: size of the block of logits held at a time; None for 2.6 GB on a GPU, 160 MiB on a CPU. A block
            has at least 512 rows (64 on a CPU), because with fewer the GEMMs slow down. If all tokens fit into one, the
            weight's gradient comes out of it as it is. Over several it is summed in float32, which for a 16-bit weight
            takes 2 * V * H bytes besides the gradient; on a GPU they are part of chunk_bytes, but at most half of it.
            So peak memory on a GPU is inputs + gradients + chunk_bytes (where 2 * V * H is no more than half), on a CPU
            2 * V * H bytes more. Only rounding differs.
        backend: as in `grpo_loss`.
        **options: those of `mr1fast.losses.options.LossOptions`, which are:

    Returns:
        GRPOLossOutput; its `loss` is differentiable, once, with respect to hidden, lm_head_weight and lm_head_bias.

    Raises:
        ValueError: a bad argument, by name; on the CPU also an unmasked id out of range.
    """
    lm_head_weight, lm_head_bias = _gathered(lm_head_weight), _gathered(lm_head_bias)
    values = completed(linear_grpo_loss, options)
    hidden, layout = arguments.hidden_rows(hidden, lm_head_weight, lm_head_bias, cu_seqlens=values["cu_seqlens"])
    ids = arguments.token_ids(completion_ids, layout, "completion_ids")
    dtype = compute_dtype(hidden.dtype)
    spec, batch = arguments.loss_call(dtype, layout, ids, advantages, values)
    outputs = linear_op.grpo(
        hidden,
        lm_head_weight,
        lm_head_bias,
        batch,
        spec,
        reduction=values["reduction"],
        chunk_bytes=arguments.chunk_bytes(chunk_bytes),
        backend=backend,
    )
    return GRPOLossOutput.of(outputs, layout, batch, spec, advantages)


def linear_token_logprobs(
    hidden: Tensor,
    lm_head_weight: Tensor,
    ids: Tensor,
    *,
    lm_head_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` from hidden states [B, L, H] (packed [T, H]) and lm_head weight [V, H] (bias [V]).

    Log-probability of `ids` [B, L], float32 [B, L], 0 where `mask` is 0; with `entropy` also the entropies. Both are
    differentiable with respect to hidden states, weight and bias: backward recomputes the logits of tokens that have
    a gradient (four GEMMs in total). Without gradients, as for the old and the reference policy, nothing is saved.
    """
    lm_head_weight, lm_head_bias = _gathered(lm_head_weight), _gathered(lm_head_bias)
    hidden, layout = arguments.hidden_rows(
        hidden, lm_head_weight, lm_head_bias, cu_seqlens=cu_seqlens, needs_cu_seqlens=False
    )
    checked_mask = arguments.token_mask(mask, layout, "mask")
    scored = linear_op.token_logprobs(
        hidden,
        lm_head_weight,
        lm_head_bias,
        arguments.token_ids(ids, layout, "ids"),
        checked_mask,
        arguments.logit_map(
            compute_dtype(hidden.dtype),
            layout,
            checked_mask,
            temperature=temperature,
            logit_scale=logit_scale,
            final_logit_softcapping=final_logit_softcapping,
        ),
        chunk_bytes=arguments.chunk_bytes(chunk_bytes),
        backend=backend,
    )
    logps, entropies = map(layout.returned, scored)
    return (logps, entropies) if checks.flag("entropy", entropy) else logps


def _gathered(parameter: _Weight) -> _Weight:
    """A sharded parameter (DTensor) as a whole one; its gradient, which differs from rank to rank, is averaged."""
    if not torch.distributed.is_available():
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)

"""The peers of `linear`: what others have for log-probabilities or cross-entropy from hidden states.

What works on [B, L] is `reference.objective` for all but Liger's GRPO loss, as in cases_loss.py. A peer whose package
is missing raises ModuleNotFoundError, which timing.py reports in its row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import Call
from benchmarks.cases_loss import BETA, eager_loss, loss_of
from benchmarks.linear_inputs import Inputs


def eager(x: Inputs) -> Call:
    def run() -> None:
        eager_loss(nn.functional.linear(x.hidden, x.weight), x.batch).backward()

    return Call(run, x.clear)


def trl_chunked(x: Inputs) -> Call:
    """As TRL's patched forward calls it, with its own tile size; of the optional outputs the entropies only."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def run() -> None:
        logps, entropies, *_ = ChunkedLogProbFunction.apply(
            x.hidden.flatten(0, 1),
            x.weight,
            None,
            x.ids.flatten(),
            1.0,
            _CHUNKED_LOGPROB_CHUNK_SIZE,
            None,
            1.0,
            ("entropy",),
        )
        loss_of(logps.view(x.ids.shape), entropies.view(x.ids.shape).detach(), x.batch).backward()

    return Call(run, x.clear)


def trl_unmasked(x: Inputs) -> Call:
    """The same on the unmasked rows only, as TRL's forward selects them on a GPU."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def padded(values: Tensor) -> Tensor:
        return values.new_zeros(x.mask.shape).masked_scatter(x.mask, values)

    def run() -> None:
        rows = (x.hidden[x.mask], x.weight, None, x.ids[x.mask])
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",))
        logps, entropies, *_ = ChunkedLogProbFunction.apply(*rows, *options)
        loss_of(padded(logps), padded(entropies).detach(), x.batch).backward()

    return Call(run, x.clear)


def liger(x: Inputs, compiled: bool) -> Call:
    """Chunks of one completion, its default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, loss_type="grpo", use_ref_model=True)
    mask = x.mask.to(x.ids.dtype)

    def run() -> None:
        output = loss(
            x.hidden,
            x.weight,
            x.ids,
            mask,
            x.advantages,
            ref_per_token_logps=x.keywords["ref_per_token_logps"],
            old_per_token_logps=x.keywords["old_per_token_logps"],
        )
        output[0].backward()

    return Call(run, x.clear)


def liger_scaled_cross_entropy(x: Inputs, entropy: bool) -> Call:
    """Cross-entropies, and entropies if asked for; on compute capability 9.0 kernels that need nvidia-cutlass-dsl."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def run() -> None:
        outputs = LigerFusedLinearScaledCrossEntropyFunction.apply(
            x.hidden.flatten(0, 1), x.weight, x.ids.flatten(), return_entropy=entropy
        )
        nll, entropies = outputs if entropy else (outputs, torch.zeros_like(outputs))
        logps = -nll.view(x.ids.shape)
        loss_of(logps, entropies.view(x.ids.shape).detach().float(), x.batch).backward()

    return Call(run, x.clear)


def torch_linear_cross_entropy(x: Inputs) -> Call:
    """torch's own in chunks, its options as they come, per token; it computes no entropies."""
    cross_entropy = _torch_cross_entropy(x, "none")
    return Call(lambda: _from_cross_entropy(x, cross_entropy()).backward(), x.clear)


def torch_cross_entropy_only(x: Inputs) -> Call:
    """Less than the others do: the gradients of the mean cross-entropy, finished in forward, without a fourth GEMM."""
    cross_entropy = _torch_cross_entropy(x, "mean")
    return Call(lambda: cross_entropy().backward(), x.clear)


def _torch_cross_entropy(x: Inputs, reduction: str) -> Callable[[], Tensor]:
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        raise RuntimeError(f"it came with torch 2.13, this is {torch.__version__}")
    options = nn.LinearCrossEntropyOptions()
    return lambda: nn.functional.linear_cross_entropy(
        x.hidden.flatten(0, 1), x.weight, x.ids.flatten(), reduction=reduction, options=options
    )


def unsloth(x: Inputs) -> Call:
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

    def run() -> None:
        logps, entropies = fused_linear_logprobs(x.hidden, x.weight, x.ids, return_entropy=True)
        loss_of(logps, entropies.detach(), x.batch).backward()

    return Call(run, x.clear)


def cut_cross_entropy(x: Inputs) -> Call:
    """It computes no entropies, and leaves out gradients too small for bfloat16, which is its default."""
    from cut_cross_entropy import linear_cross_entropy

    def run() -> None:
        _from_cross_entropy(x, linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none")).backward()

    return Call(run, x.clear)


def quack(x: Inputs) -> Call:
    """Less than the others do: the gradients of the mean cross-entropy, as it offers no loss per token.

    On compute capability 9.0, in bfloat16 and with a vocabulary like Qwen2-VL's, it takes by itself its way without a
    pass over the logits.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run() -> None:
        chunked_linear_cross_entropy(x.hidden.flatten(0, 1), x.weight, x.ids.flatten()).backward()

    return Call(run, x.clear)


def _from_cross_entropy(x: Inputs, per_token: Tensor) -> Tensor:
    """GRPO's loss, from the cross-entropy of each token: its negative log-probability. Entropies are left out."""
    logps = -per_token.view(x.ids.shape).float()
    return loss_of(logps, torch.zeros_like(logps), x.batch)

"""From TRL's call of the model to a loss head of ours: the backbone runs, its hidden states come here."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import kernels as trl_kernels
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

from mr1fast.losses.hidden import linear_token_logprobs

# Runs in place of the lm_head and all that follows: (hidden [B, L, H], weight [V, H], bias, labels [B, L]).
Head = Callable[[Tensor, Tensor, Tensor | None, Tensor], FusedCausalLMOutput]


@contextmanager
def replaced_head(module: nn.Module, head: Head, completion_length: int, lm_head_in_float32: bool) -> Iterator[None]:
    """While this lasts, `module(..., labels=...)` runs the backbone and then `head` on the completion's positions.

    Replacing the forward, and not calling the parts from outside, keeps the hooks of DDP, FSDP and ZeRO at work. It is
    put back at once, since `generate` and TRL's other calls want the original.
    """

    def forward(self, *args, labels, fused_lm_head: bool = True, **kwargs):
        text_config = self.config.get_text_config()
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        outputs = self.base_model(*args, **kwargs, use_cache=False)
        lm_head = self.get_output_embeddings()
        weight, bias = lm_head.weight, lm_head.bias
        hidden = outputs.last_hidden_state[:, -completion_length - 1 : -1].to(weight.device)
        labels = labels[:, -completion_length:].to(weight.device)
        precision: AbstractContextManager = nullcontext()
        if lm_head_in_float32:
            hidden = hidden.float()
            precision = torch.autocast(hidden.device.type, enabled=False)
        with precision, maybe_gather_lm_head_ctx(weight, bias):
            result = head(hidden, weight, bias, labels)
        if kwargs.get("output_router_logits"):
            aux_loss: Any = load_balancing_loss_func(
                outputs.router_logits,
                text_config.num_experts,
                text_config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
            result.aux_loss = aux_loss
        return result

    own = module.__dict__.get("forward")
    module.forward = types.MethodType(forward, module)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def score(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, **of_logits: Any) -> FusedCausalLMOutput:
    logps, entropies = linear_token_logprobs(
        hidden, weight, labels, lm_head_bias=bias, mask=labels != -100, entropy=True, **of_logits
    )
    return FusedCausalLMOutput(log_probs=logps, entropy=entropies)


def of_logits(model: Any) -> dict[str, Any]:
    """What the model does to its logits, as keywords of our loss head."""
    softcapping = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return {"logit_scale": logit_scale(model), "final_logit_softcapping": softcapping}


def logit_scale(model: Any) -> float:
    """What the model multiplies its logits by, under each family's name."""
    config = model.config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


class ChunkedLogProbFunction:
    """`linear_token_logprobs` in the place of `trl.kernels.ChunkedLogProbFunction`, the head of all of TRL's trainers.

    >>> trl.trainer.utils._ChunkedLogProbFunction = ChunkedLogProbFunction

    It is no autograd function of its own: `apply` calls ours. What our head does not have (outputs besides
    log-probabilities and entropies) goes to TRL's function.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """(log-probabilities, entropies, None, None, None), float32 [N]; the entropies None if not in `outputs`.

        hidden: [N, H]; weight: [V, H]; bias: [V]; targets: [N]. `chunk_size` is for TRL's function: our blocks hold
        whole rows.
        """
        if logit_scale <= 0 or not set(outputs) <= {"log_probs", "entropy"}:
            rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return trl_kernels.ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *rest)
        if weight.dtype != torch.float32 and not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
        logps, entropies = linear_token_logprobs(
            hidden,
            weight,
            targets,
            lm_head_bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            final_logit_softcapping=final_logit_softcapping,
            entropy=True,
        )
        return logps, entropies if "entropy" in outputs else None, None, None, None

"""Liger's GRPO loss from hidden states by name and signature; `liger.py` says where it departs from Liger's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mr1fast.integrations.liger_terms import (
    VESPO_AS,
    loss_metrics,
    normaliser,
    padding_weight,
    per_completion,
    refuse_unsupported,
    vespo_column,
)
from mr1fast.losses.hidden import linear_grpo_loss, linear_token_logprobs


class LigerFusedLinearGRPOLoss(nn.Module):
    """`mr1fast.linear_grpo_loss` in the shape of `liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`.

    `compiled` and `chunk_size` are accepted and have no effect: nothing here is compiled, and the rows of a block are
    chosen by their size in bytes. Raises ValueError for a bad setting, by name.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        refuse_unsupported(loss_type, importance_sampling_level, None, use_bias_correction_kl)
        positive = {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg}
        for name, value in {**positive, "delta": delta}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input,
        lin_weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        vllm_is_ratio=None,
        num_items_in_batch=None,
    ):
        """(loss, metrics), metrics = (mean KL, clip ratio), or (clip ratio,) where beta is 0.

        _input, ref_input: [B, T, H]; lin_weight, ref_weight: [V, H]; selected_token_ids, attention_mask,
        ref_per_token_logps, old_per_token_logps: [B, T]; advantages [B]. Without a reference (`use_ref_model=False`)
        the policy is its own: the KL is 0.
        """
        has_kl = isinstance(self.beta, Tensor) or self.beta != 0
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.", stacklevel=2
            )
        if not (has_kl and self.use_ref_model):
            ref_per_token_logps = None
        elif ref_per_token_logps is None:
            if ref_input is None:
                raise ValueError("ref_per_token_logps or ref_input must be given with use_ref_model=True, got neither")
            ref_per_token_logps = self._score(ref_input, ref_weight, ref_bias, selected_token_ids, attention_mask)
        loss_type, epsilon_high = self.loss_type, self.epsilon_high
        if loss_type == "vespo":
            logps = self._score(_input, lin_weight, bias, selected_token_ids, attention_mask)
            k_and_lambda = (self.vespo_k_pos, self.vespo_lambda_pos, self.vespo_k_neg, self.vespo_lambda_neg)
            vllm_is_ratio = vespo_column(
                logps, old_per_token_logps, advantages, attention_mask, vllm_is_ratio, k_and_lambda
            )
            loss_type, old_per_token_logps, epsilon_high = VESPO_AS
        out = linear_grpo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            advantages,
            lm_head_bias=bias,
            completion_mask=attention_mask,
            old_per_token_logps=old_per_token_logps,
            ref_per_token_logps=ref_per_token_logps,
            beta=0.0 if ref_per_token_logps is None else self.beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=epsilon_high,
            delta=None if loss_type in ("cispo", "sapo") else self.delta,
            loss_type=loss_type,
            importance_sampling_level=self.importance_sampling_level,
            use_bias_correction_kl=self.use_bias_correction_kl,
            importance_sampling_ratio=per_completion(vllm_is_ratio),
            sapo_temperature_pos=self.sapo_temperature_pos,
            sapo_temperature_neg=self.sapo_temperature_neg,
            token_weight=padding_weight(attention_mask) if loss_type == "luspo" else None,
            max_completion_length=self.max_completion_length,
            num_items_in_batch=normaliser(loss_type, attention_mask, num_items_in_batch),
            temperature=self.temperature,
        )
        metrics = loss_metrics(out, attention_mask)
        if has_kl and out.kl is None:
            metrics.insert(0, torch.zeros_like(out.loss.detach()))
        return out.loss, tuple(metrics)

    @torch.no_grad()
    def _score(self, hidden, weight, bias, ids, mask) -> Any:
        return linear_token_logprobs(hidden, weight, ids, lm_head_bias=bias, temperature=self.temperature, mask=mask)


class LigerFusedLinearGRPOFunction:
    """`LigerFusedLinearGRPOLoss` as `liger_kernel.chunked_loss.grpo_loss.LigerFusedLinearGRPOFunction.apply`.

    It is no autograd function of its own: `apply` calls the loss, through which gradients flow.
    """

    @staticmethod
    def apply(
        _input,
        weight,
        selected_token_ids,
        attention_mask,
        advantages,
        bias=None,
        ref_per_token_logps=None,
        old_per_token_logps=None,
        ref_input=None,
        ref_weight=None,
        ref_bias=None,
        beta=0.04,
        epsilon_low=0.2,
        epsilon_high=0.2,
        loss_type="dapo",
        max_completion_length=None,
        importance_sampling_level="token",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        temperature=1.0,
        compiled=True,
        use_ref_model=True,
        chunk_size=1,
        vllm_is_ratio=None,
        delta=None,
        use_bias_correction_kl=False,
        vespo_k_pos=2.0,
        vespo_lambda_pos=3.0,
        vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
        num_items_in_batch=None,
    ):
        """(loss, metrics) of `LigerFusedLinearGRPOLoss`, whose settings and tensors these are, in Liger's order."""
        loss = LigerFusedLinearGRPOLoss(
            beta,
            compiled,
            use_ref_model,
            chunk_size,
            epsilon_low,
            epsilon_high,
            loss_type,
            max_completion_length,
            importance_sampling_level,
            sapo_temperature_pos,
            sapo_temperature_neg,
            temperature,
            delta,
            use_bias_correction_kl,
            vespo_k_pos,
            vespo_lambda_pos,
            vespo_k_neg,
            vespo_lambda_neg,
        )
        return loss(
            _input,
            weight,
            selected_token_ids,
            attention_mask,
            advantages,
            bias,
            ref_per_token_logps,
            old_per_token_logps,
            ref_input,
            ref_weight,
            ref_bias,
            vllm_is_ratio,
            num_items_in_batch,
        )

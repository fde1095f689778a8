"""TRL's GRPOTrainer (1.16) with our loss and GRPO-D's dynamic KL weight.

    from trl import GRPOConfig, GRPOTrainer                                    # before
    from mr1fast.integrations.trl import GRPODConfig, GRPODTrainer             # after

The loss is computed by `linear_grpo_loss` from the hidden states, log-probabilities by `linear_token_logprobs`; TRL
keeps everything else, and the names of its metrics. `loss_type` may be any of ours, those that TRL does not have too.
What is outside of it (see `outside_one_pass`) keeps the trainer's own `_compute_loss`, on our log-probabilities.
"""

from __future__ import annotations

import types
import warnings
from typing import Any

import torch
import trl
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from mr1fast.integrations.trl_config import GRPODConfig as GRPODConfig
from mr1fast.integrations.trl_config import checked_schedule
from mr1fast.integrations.versions import check_version
from mr1fast.kernels.loss_types import LOSS_TYPES
from mr1fast.losses.hidden import linear_grpo_loss
from mr1fast.losses.kl_weight import kl_weight
from mr1fast.losses.logits import GRPOLossOutput

TESTED = "1.16"
check_version(
    "trl",
    trl.__version__,
    TESTED,
    {
        "GRPOTrainer._compute_loss": (getattr(GRPOTrainer, "_compute_loss", None), ["model", "inputs"]),
        "GRPOTrainer._generate_and_score_completions": (
            getattr(GRPOTrainer, "_generate_and_score_completions", None),
            ["inputs"],
        ),
        "GRPOTrainer._get_per_token_logps_and_entropies": (
            getattr(GRPOTrainer, "_get_per_token_logps_and_entropies", None),
            ["model", "input_ids", "attention_mask", "logits_to_keep", "compute_entropy", "mm_token_type_ids"],
        ),
        "trainer.utils.FusedCausalLMOutput": (
            getattr(trl_utils, "FusedCausalLMOutput", None),
            ["loss", "log_probs", "entropy", "aux_loss"],
        ),
        "trainer.utils.maybe_gather_lm_head_ctx": (getattr(trl_utils, "maybe_gather_lm_head_ctx", None), []),
        "trainer.utils._ChunkedLogProbFunction": (
            getattr(getattr(trl_utils, "_ChunkedLogProbFunction", None), "forward", None),
            ["hidden", "weight", "bias", "targets", "temperature", "final_logit_softcapping", "logit_scale", "outputs"],
        ),
    },
)

from mr1fast.integrations import trl_head  # noqa: E402 (after the version has been checked)
from mr1fast.integrations.trl_head import ChunkedLogProbFunction as ChunkedLogProbFunction  # noqa: E402
from mr1fast.integrations.trl_metrics import BY_ITEMS, log_loss  # noqa: E402

# What TRL passes from its batch to the model.
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# What our loss and TRL call by the same names: tensors of a batch, attributes of the trainer, and of its arguments.
_TENSORS = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps", "importance_sampling_ratio")
_SETTINGS = (
    "beta",
    "epsilon_low",
    "epsilon_high",
    "loss_type",
    "importance_sampling_level",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "max_completion_length",
    "temperature",
)
_ARGUMENTS = ("delta", "use_bias_correction_kl", "sapo_temperature_pos", "sapo_temperature_neg")

# What the one-pass form takes the place of. An override of one of them by a trainer's own class is that class's method.
_REPLACED = ("_compute_loss", "_get_per_token_logps_and_entropies")


def outside_one_pass(trainer: Any) -> list[str]:
    """Why the trainer's own `_compute_loss` is kept, by setting or method; empty for the one-pass form."""
    overrides = {name: _owner(type(trainer), name) for name in _REPLACED}
    reasons = {
        **{f"{owner.__name__}.{name}": owner is not GRPOTrainer for name, owner in overrides.items()},
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSS_TYPES,
        # TRL takes the quantile over all processes.
        f"top_entropy_quantile={trainer.top_entropy_quantile}": (
            trainer.top_entropy_quantile < 1.0 and trainer.accelerator.num_processes > 1
        ),
        "use_adaptive_entropy=True": trainer.use_adaptive_entropy,
    }
    return [name for name, outside in reasons.items() if outside]


def _owner(trainer_class: type, method: str) -> type:
    """The class whose method `super()` reaches from `_GRPOD`."""
    classes = trainer_class.__mro__
    below = classes[classes.index(_GRPOD) + 1 :] if _GRPOD in classes else classes
    return next(each for each in below if method in vars(each))


class _GRPOD(GRPOTrainer):
    """What GRPODTrainer adds to GRPOTrainer, and `patch_trl` to any trainer derived from it."""

    args: Any  # GRPOConfig or GRPODConfig
    model: Any
    beta: float
    _head: trl_head.Head | None = None
    _patched_schedule: dict[str, Any] | None = None
    _last_beta: float | None = None  # the last value of the schedule; None before the first
    _keeps_beta: bool = False  # beta is somebody else's, such as a callback's

    @property
    def kl_schedule(self) -> dict[str, Any]:
        """The keywords of `mr1fast.losses.kl_weight` in use."""
        return self._patched_schedule or checked_schedule(self.args)

    def kl_weight(self) -> float:
        """beta of the next update: a function of the optimizer steps done, and so exact after a resume."""
        total = max(self.state.max_steps, 1)
        return kl_weight(min(self.state.global_step, total), total, **self.kl_schedule)

    def _move_beta(self) -> None:
        """beta to its value for the next update, unless it was set to one that is not the schedule's."""
        expected = self.args.beta if self._last_beta is None else self._last_beta
        if not self._keeps_beta and self.beta != expected:
            self._keeps_beta = True
            warnings.warn(
                f"trainer.beta was set to {self.beta}, which is not the KL schedule's value ({expected}); it is kept, "
                "and the schedule no longer moves it",
                stacklevel=3,
            )
        if not self._keeps_beta:
            self.beta = self._last_beta = self.kl_weight()

    def _generate_and_score_completions(self, inputs):
        # TRL asks for reference log-probs only where beta is not 0, but a later update may need those of this batch.
        beta = self.beta
        self.beta = max(beta, self.kl_schedule["beta_max"])
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.beta = beta

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        module = self._causal_lm(model)
        settings = {"temperature": self.temperature, **trl_head.of_logits(module)}
        head = self._head or (lambda *tensors: trl_head.score(*tensors, **settings))
        with trl_head.replaced_head(module, head, logits_to_keep, self.args.cast_lm_head_to_fp32):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )

    def _compute_loss(self, model, inputs):
        self._move_beta()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["beta"].append(self.beta)
        if outside_one_pass(self):
            return super()._compute_loss(model, inputs)

        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        loss_mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        steps = self.current_gradient_accumulation_steps if mode == "train" else 1
        scale, entropy_scale = 1 / steps, 1 / steps
        if self.loss_type in BY_ITEMS:
            scale = self.accelerator.num_processes
            if mode == "train":
                scale *= self.args.steps_per_generation / steps
        keywords = {
            **self._loss_keywords(inputs),
            **trl_head.of_logits(self._causal_lm(model)),
            "completion_mask": loss_mask,
            "entropy_coef": self.entropy_coef * entropy_scale / scale,
        }
        results: list[GRPOLossOutput] = []

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, _: Tensor) -> trl_utils.FusedCausalLMOutput:
            out = linear_grpo_loss(hidden, weight, ids, inputs["advantages"], lm_head_bias=bias, **keywords)
            results.append(out)
            return trl_utils.FusedCausalLMOutput(loss=out.loss, log_probs=out.per_token_logps, entropy=out.entropies)

        self._head = head
        try:
            # TRL's own code from the batch to the model's arguments, images included.
            _, _, aux_loss = self._get_per_token_logps_and_entropies(
                model,
                torch.cat([inputs["prompt_ids"], ids], dim=1),
                torch.cat([inputs["prompt_mask"], mask], dim=1),
                ids.size(1),
                compute_entropy=True,
                compute_aux_loss=self.aux_loss_enabled,
                **{name: inputs.get(name) for name in _MODEL_INPUTS},
            )
        finally:
            self._head = None
        (out,) = results
        log_loss(self, mode, out, loss_mask, self.entropy_coef * entropy_scale, scale, steps)
        if aux_loss is None:
            return out.loss * scale
        self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return out.loss * scale + self.router_aux_loss_coef * aux_loss / steps

    def _loss_keywords(self, inputs) -> dict[str, Any]:
        """What `linear_grpo_loss` is told of the trainer's settings and of the batch."""
        return {
            **{name: inputs.get(name) for name in _TENSORS},
            "num_items_in_batch": inputs["num_items_in_batch"],
            **{name: getattr(self, name) for name in _SETTINGS},
            **{name: getattr(self.args, name) for name in _ARGUMENTS},
        }

    def _causal_lm(self, model) -> nn.Module:
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if is_peft_model(model) else model


class GRPODTrainer(_GRPOD):
    """TRL's GRPOTrainer with our loss and the KL weight of GRPODConfig (a GRPOConfig keeps beta constant)."""


def patch_trl(
    trainer: Any,
    *,
    kl_schedule: str = "paper",
    beta_min: float | None = None,
    beta_max: float | None = None,
    explore_fraction: float = 0.3,
) -> Any:
    """Give an existing GRPOTrainer (or a subclass's object) our loss, and a KL schedule; returns the trainer.

    Without beta_max the weight stays the trainer's own. Undone by `unpatch`. Raises ValueError for anything but a
    GRPOTrainer, a trainer patched already, or a schedule on a trainer that was built without a reference (beta 0).
    """
    original: Any = type(trainer)
    if not issubclass(original, GRPOTrainer):
        raise ValueError(f"trainer must be a trl.GRPOTrainer, got {type(trainer).__name__}")
    if issubclass(original, _GRPOD):
        raise ValueError(f"trainer has our loss already (it is a {type(trainer).__name__})")
    if beta_max is None and beta_min is not None:
        raise ValueError(f"beta_max must be given with beta_min ({beta_min}), got None")
    options = types.SimpleNamespace(
        kl_schedule=kl_schedule,
        beta=trainer.args.beta,
        beta_min=beta_min,
        beta_max=beta_max,
        explore_fraction=explore_fraction,
    )
    schedule: dict[str, Any] | None = checked_schedule(options)
    if beta_max is None:
        schedule = None  # that of the trainer's arguments
    elif beta_max > 0 and trainer.args.beta == 0:
        raise ValueError(
            f"beta_max={beta_max} needs a reference model, and TRL prepared none: the trainer was built with "
            f"beta=0.0. Build it with GRPOConfig(beta={beta_max})"
        )
    trainer.__class__ = type(f"GRPOD{original.__name__}", (_GRPOD, original), {"_original_class": original})
    trainer._patched_schedule = schedule
    trainer._last_beta = None if schedule is None else trainer.beta  # a schedule that is asked for starts from any beta
    return trainer


def unpatch(trainer: Any) -> Any:
    """Undo `patch_trl`: the trainer's own loss, and the constant beta of its arguments (or what a callback set).

    Returns the trainer.
    """
    original = getattr(type(trainer), "_original_class", None)
    if original is None:
        raise ValueError(f"trainer must be one that patch_trl was given, got a {type(trainer).__name__}")
    if not trainer._keeps_beta:
        trainer.beta = trainer.args.beta
    trainer.__class__ = original
    for name in ("_patched_schedule", "_last_beta", "_keeps_beta"):
        vars(trainer).pop(name, None)
    return trainer

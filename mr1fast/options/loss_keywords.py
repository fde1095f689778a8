"""--loss: keywords of the loss, checked by the loss itself.

The loss needs torch, which is imported only where --loss is given.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from mr1fast.checks import not_one_of, pairs
from mr1fast.errors import UserError
from mr1fast.options.fields import SWITCH

DEFAULT_LOSS = "loss_type=grpo"  # the paper's
# Keywords of which the trainer takes care itself, and the options for them, if there are any.
TRAINERS_OWN = {
    "beta": "--beta, or --beta-min and --beta-max",
    "temperature": "--temperature",
    "num_generations": "--num-generations",
    "max_completion_length": "--max-completion-length",
    "num_items_in_batch": "",
    "num_sequences": "",
    "reduction": "",
    "logit_scale": "",
}


def parse_loss(text: str, source: str) -> dict[str, Any]:
    """Keyword -> value of "loss_type=dapo,epsilon_high=0.28". Raises UserError, which calls the text `source`."""
    if text == DEFAULT_LOSS:
        return {"loss_type": "grpo"}
    from mr1fast.losses.options import OPTIONS, LossOptions

    kinds = {name: typing.get_args(hint) or (hint,) for name, hint in typing.get_type_hints(LossOptions).items()}
    # All but the trainer's own and those that can only be tensors.
    known = [name for name in OPTIONS if name not in TRAINERS_OWN and {bool, int, float, str} & {*kinds[name]}]
    values: dict[str, Any] = {"loss_type": OPTIONS["loss_type"].default}
    for name, value in pairs(text, source, f"{DEFAULT_LOSS},epsilon_high=0.28").items():
        if name in TRAINERS_OWN:
            option = TRAINERS_OWN[name]
            raise UserError(f"{source}: {name} is set by {option or 'the trainer'}, not here")
        if name not in known:
            raise UserError(not_one_of(f"{source}: a keyword", name, known))
        values[name] = _as_typed(value, kinds[name])
        try:
            OPTIONS[name].check(name, values[name])
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
    return values


def _as_typed(text: str, kinds: tuple[Any, ...]) -> Any:
    """A text as the first of the keyword's types that it can be; else the text, for the check to refuse."""
    if str in kinds:
        return text
    if bool in kinds:
        return SWITCH.get(text.lower(), text)
    if type(None) in kinds and text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        return text


def try_loss(keywords: Mapping[str, Any], *, with_kl: bool, off_policy: bool) -> None:
    """Compute the loss of a single token, as training will. Raises UserError for keywords that it refuses together."""
    import torch

    from mr1fast.losses.hidden import linear_grpo_loss

    token = torch.zeros(1, 1)
    given = {name: value for name, value in keywords.items() if name != "scale_rewards"}  # that is for the advantages
    try:
        linear_grpo_loss(
            torch.zeros(1, 1, 1),
            torch.zeros(2, 1),
            torch.zeros(1, 1, dtype=torch.long),
            torch.ones(1),
            ref_per_token_logps=token if with_kl else None,
            old_per_token_logps=token if off_policy else None,
            beta=float(with_kl),
            max_completion_length=1,
            backend="torch",
            **given,
        )
    except ValueError as error:
        raise UserError(f"--loss: {error}") from None

"""The options of the loss: the keywords that all losses and `GRPOLoss` share, in one place.

To add one, declare it in `LossOptions`: its type, its default, the check of its value, and what it means. A tensor is
brought into shape in arguments.py. A number or a switch of the objective reaches every backend as soon as
`reference.LossSpec` has a field of the same name.
"""

import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import torch
from torch import Tensor

from mr1fast.checks import choice, flag, integer, nearest, number
from mr1fast.kernels import normalisers
from mr1fast.kernels.advantages import SCALE_REWARDS
from mr1fast.kernels.estimators import KL_ESTIMATORS
from mr1fast.kernels.loss_types import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, normalised_by

Check = Callable[[str, Any], Any]  # (name, value) -> the value as the loss needs it; ValueError if it is wrong
Function = TypeVar("Function", bound=Callable[..., Any])


def _any(name: str, value: Any) -> Any:
    """For tensors, whose shapes are not known yet."""
    return value


def _one_of(*known: str) -> Check:
    return partial(choice, known=known)


def _number(*, above: float | None = None, at_least: float | None = None) -> Check:
    return partial(number, above=above, at_least=at_least)


def _share(name: str, value: Any) -> float:
    share = number(name, value, above=0)
    if share > 1:
        raise ValueError(f"{name} must be a number > 0 and <= 1, got {share}")
    return share


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


_COUNT: Check = partial(integer, at_least=1)


def _or_none(name: str, value: Any, *, check: Check, instead: Any = None) -> Any:
    return instead if value is None else check(name, value)


def _or_tensor(name: str, value: Any, *, check: Check) -> Any:
    return value if isinstance(value, Tensor) else check(name, value)


class Option(NamedTuple):
    default: Any
    check: Check
    meaning: str


class LossOptions(TypedDict, total=False):
    """What `grpo_loss`, `linear_grpo_loss`, `grpo_loss_from_logps` and `GRPOLoss` take by keyword.

    Shapes: B completions, of which those of one prompt are adjacent, and L tokens. Packed (with cu_seqlens), S
    completions one after the other, T tokens in all: read [S] for [B], and [T] or [1, T] for [B, L].
    """

    cu_seqlens: Annotated[
        Tensor | None,
        Option(
            None,
            _any,
            "[S + 1] int32 or int64, where each of S packed completions begins, and where the last one ends: from 0 "
            "to T, never decreasing. All tensors are then packed: read [S] for [B] and [T] (or [1, T]) for [B, L]; "
            "results are [T]. None: [B, L], of which every row is one completion, also if B is 1.",
        ),
    ]

    rewards: Annotated[
        Tensor | None,
        Option(None, _any, "[B], used to compute group-relative advantages, see `group_advantages`."),
    ]
    num_generations: Annotated[
        int | None,
        Option(None, partial(_or_none, check=_COUNT), "number of completions of each prompt; required with rewards."),
    ]
    scale_rewards: Annotated[
        str,
        Option("group", _one_of(*SCALE_REWARDS), 'used with rewards: "group", "batch" or "none".'),
    ]
    completion_mask: Annotated[
        Tensor | None,
        Option(None, _any, "[B, L] bool or int, 0 where a token does not count; None for all ones."),
    ]
    old_per_token_logps: Annotated[
        Tensor | None,
        Option(None, _any, "[B, L], of the policy that sampled; None if on-policy (ratio 1, gradient flows)."),
    ]
    ref_per_token_logps: Annotated[
        Tensor | None,
        Option(None, _any, "[B, L], of the frozen reference; required unless beta is the float 0.0."),
    ]
    beta: Annotated[
        float | Tensor,
        Option(
            0.0,
            partial(_or_tensor, check=_number(at_least=0)),
            "KL weight, a float >= 0 or a tensor: 0-d (on any device), [B] or [B, L]. Changing it from call to call "
            "costs nothing.",
        ),
    ]
    kl_estimator: Annotated[
        str,
        Option(
            "k3",
            _one_of(*KL_ESTIMATORS),
            'with d = ref_logp - logp: "k1" is -d, "abs" |d|, "k2" d^2 / 2, "k3" e^d - d - 1, and "low_var_kl" k3 cut '
            "at 10, as verl, EasyR1 and OpenRLHF do (no gradient beyond).",
        ),
    ]
    kl_clamp: Annotated[
        float | None,
        Option(
            None,
            partial(_or_none, check=_number(above=0), instead=math.inf),
            "d is cut to [-kl_clamp, kl_clamp] first, without gradient beyond; None for no cut.",
        ),
    ]
    epsilon_low: Annotated[
        float | Tensor,
        Option(
            0.2,
            partial(_or_tensor, check=_number(at_least=0)),
            'the ratio is clipped where it is below 1 - epsilon_low ("gmpo": its logarithm below -epsilon_low); with '
            '"dppo_tv" and "dppo_kl", how far a probability may fall. A float, or a tensor as for beta.',
        ),
    ]
    epsilon_high: Annotated[
        float | Tensor,
        Option(
            0.2,
            partial(_or_tensor, check=_number(at_least=0)),
            'the ratio is clipped where it is above 1 + epsilon_high ("gmpo": its logarithm above epsilon_high); with '
            '"cispo", above epsilon_high itself; with "dppo_tv" and "dppo_kl", how far a probability may rise. A '
            "float, or a tensor as for beta.",
        ),
    ]
    delta: Annotated[
        float | None,
        Option(
            None,
            partial(_or_none, check=_number(above=0), instead=math.inf),
            "upper bound of the unclipped ratio (two-sided clipping); None for no bound.",
        ),
    ]
    clip_ratio_c: Annotated[
        float | None,
        Option(
            None,
            partial(_or_none, check=_number(above=1), instead=math.inf),
            'upper bound of the ratio where the advantage is negative (dual clip, as in verl); with "dppo_tv" and '
            '"dppo_kl" everywhere. None for no bound.',
        ),
    ]
    loss_type: Annotated[
        str,
        Option("grpo", _one_of(*LOSS_TYPES), f"one of {', '.join(LOSS_TYPES)}; see `kernels/reference.py`."),
    ]
    importance_sampling_level: Annotated[
        str,
        Option(
            "token",
            _one_of(*IMPORTANCE_SAMPLING_LEVELS),
            '"token"; "sequence" (GSPO: one ratio per completion); or "sequence_token" (GSPO-token: its value, but '
            "each token has a gradient of its own, as suits advantages [B, L]).",
        ),
    ]
    use_bias_correction_kl: Annotated[
        bool,
        Option(False, flag, "multiply the KL by the ratio, as TRL does by default (the paper does not)."),
    ]
    importance_sampling_ratio: Annotated[
        Tensor | None,
        Option(None, _any, "[B, L], [B] or [B, 1], correction for a rollout engine; multiplies the policy term."),
    ]
    sapo_temperature_pos: Annotated[
        float,
        Option(1.0, _number(above=0), '"sapo"\'s temperature where the advantage is positive.'),
    ]
    sapo_temperature_neg: Annotated[
        float,
        Option(1.05, _number(above=0), '"sapo"\'s temperature elsewhere.'),
    ]
    clip_cov_ratio: Annotated[
        float,
        Option(0.0002, _share, '"clip_cov": the share of tokens that is cut at most, but at least one token.'),
    ]
    clip_cov_lb: Annotated[
        float,
        Option(1.0, _number(), '"clip_cov": the covariance of a token that may be cut is above this'),
    ]
    clip_cov_ub: Annotated[
        float,
        Option(5.0, _number(), '"clip_cov": and below this.'),
    ]
    kl_cov_ratio: Annotated[
        float,
        Option(0.0002, _share, '"kl_cov": the share of tokens with the penalty, but at least one token.'),
    ]
    ppo_kl_coef: Annotated[
        float,
        Option(0.1, _number(at_least=0), '"kl_cov": the weight of that penalty, |logp - old_logp|.'),
    ]
    top_entropy_quantile: Annotated[
        float,
        Option(
            1.0,
            _share,
            "the share of the unmasked tokens, those with the highest entropies, that keep their policy term (TRL).",
        ),
    ]
    off_policy_mask_threshold: Annotated[
        float | None,
        Option(
            None,
            partial(_or_none, check=_number(at_least=0), instead=math.inf),
            "where the advantage is negative, a completion whose mean of sampling_logp - logp is above this loses its "
            "policy term (TRL); None for no such mask.",
        ),
    ]
    sampling_per_token_logps: Annotated[
        Tensor | None,
        Option(
            None,
            _any,
            "[B, L], of the engine that sampled, used by that mask alone; None to use old_per_token_logps.",
        ),
    ]
    token_weight: Annotated[
        Tensor | None,
        Option(
            None,
            _any,
            "[B, L], multiplies the loss of each token, KL included; the normaliser and the entropy bonus do not "
            "know of it.",
        ),
    ]
    entropy_coef: Annotated[
        float,
        Option(
            0.0,
            _number(),
            'the loss is lowered by entropy_coef * mean entropy of the unmasked tokens (with reduction="sum", by '
            "their sum).",
        ),
    ]
    max_completion_length: Annotated[
        int | None,
        Option(
            None,
            partial(_or_none, check=_COUNT),
            f"the normaliser of {_listed(normalised_by(normalisers.longest_completions))}, in tokens.",
        ),
    ]
    num_items_in_batch: Annotated[
        float | Tensor | None,
        Option(
            None,
            partial(_or_none, check=partial(_or_tensor, check=_number(at_least=0))),
            f"the normaliser of {_listed(normalised_by(normalisers.batch_tokens))}, in tokens (a number or a 0-d "
            "tensor); None to count unmasked tokens.",
        ),
    ]
    num_sequences: Annotated[
        float | Tensor | None,
        Option(
            None,
            partial(_or_none, check=partial(_or_tensor, check=_number(above=0))),
            f"number of completions over which {_listed(normalised_by(*normalisers.OVER_COMPLETIONS))} average, a "
            "number or a 0-d tensor, if this call has only a part of them; None for its own.",
        ),
    ]
    temperature: Annotated[
        float | Tensor,
        Option(
            1.0,
            partial(_or_tensor, check=_number(above=0)),
            "number by which the logits are divided, after logit_scale and final_logit_softcapping; a float, or a "
            "tensor as for beta, with values > 0.",
        ),
    ]
    logit_scale: Annotated[
        float,
        Option(
            1.0,
            _number(above=0),
            "number by which the model multiplies its logits, if those given (or computed here from hidden states) are "
            "not multiplied yet: Cohere's logit_scale, 1 / logits_scaling of Granite.",
        ),
    ]
    final_logit_softcapping: Annotated[
        float | None,
        Option(
            None,
            partial(_or_none, check=_number(above=0), instead=math.inf),
            "Gemma's soft cap: after logit_scale and before temperature, a logit z becomes cap * tanh(z / cap), if "
            "those given (or computed here from hidden states) are not capped yet; a logit of -inf stays banned. None "
            "for no cap.",
        ),
    ]
    reduction: Annotated[
        str,
        Option(
            "mean",
            _one_of("mean", "sum", "none"),
            '"mean"; or without normaliser "sum", or "none" for the loss of each token, [B, L].',
        ),
    ]


_TYPES = get_type_hints(LossOptions)
OPTIONS: dict[str, Option] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(LossOptions, include_extras=True).items()
}
_DEFAULTS = {name: option.check(name, option.default) for name, option in OPTIONS.items()}


def _default(name: str) -> Any:
    return _DEFAULTS[name]


# What torch.compiler.assume_constant_result does, without importing the compiler: a default is a constant of the graph.
# By itself torch.compile(dynamic=True) takes a number that it finds in a global for an input.
_default._dynamo_marked_constant = True  # type: ignore[attr-defined]


class UnknownOption(ValueError, TypeError):
    """An unknown keyword: a ValueError like any bad argument of the loss, and a TypeError as Python itself raises."""


def checked(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options given to the function, each with its value checked and converted to the form that the loss needs."""
    values = {}
    for name, value in options.items():
        if name not in OPTIONS:
            raise UnknownOption(_unknown(function, name))
        values[name] = OPTIONS[name].check(name, value)
    return values


def completed(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`checked`, with the defaults of the other options."""
    defaults = {name: _default(name) for name in OPTIONS} if torch.compiler.is_compiling() else _DEFAULTS
    return {**defaults, **checked(function, options)}


def _unknown(function: Callable[..., Any], name: str) -> str:
    known = inspect.signature(function).parameters
    near = nearest(name, known) or f"; its keywords are {', '.join(known)}"
    return f"{function.__name__} got an unexpected keyword argument {name!r}{near}"


def spelled_out(function: Function) -> Function:
    """Lets `inspect.signature` and `help` show what `**options: Unpack[LossOptions]` tells type checkers by itself.

    The meanings of the options go into the docstring, behind the line "**options: ...".
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_TYPES[name])
        for name, option in OPTIONS.items()
    ]
    positional = [p for p in own if p.kind is not p.KEYWORD_ONLY]
    keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
    function.__signature__ = signature.replace(parameters=[*positional, *options, *keywords])  # type: ignore[attr-defined]
    if function.__doc__:
        lines = function.__doc__.split("\n")
        at = next(i for i, line in enumerate(lines) if line.lstrip().startswith("**options:"))
        indent = lines[at][: -len(lines[at].lstrip())]
        for name, option in reversed(OPTIONS.items()):
            text = textwrap.fill(
                f"{name}: {option.meaning}", 120, initial_indent=indent, subsequent_indent=indent + "    "
            )
            lines.insert(at + 1, text)
        function.__doc__ = "\n".join(lines)
    return function

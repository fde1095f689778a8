"""The options of the loss: the keywords that all losses and `GRPOLoss` share, in one place.

To add one, declare it in `LossOptions`: its type, its default, the check of its value, and what it means. A tensor is
brought into shape in arguments.py. A number or a switch of the objective reaches every backend as soon as
`reference.LossSpec` has a field of the same name.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, TypedDict, get_type_hints

from torch import Tensor

from mr1fast.checks import flag
from mr1fast.kernels import normalisers
from mr1fast.kernels.advantages import SCALE_REWARDS
from mr1fast.kernels.estimators import KL_ESTIMATORS
from mr1fast.kernels.loss_types import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES, normalised_by
from mr1fast.losses.option import COUNT, Option, a_number, a_share, anything, one_of, or_none, or_tensor


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


class LossOptions(TypedDict, total=False):
    """What `grpo_loss`, `linear_grpo_loss`, `grpo_loss_from_logps` and `GRPOLoss` take by keyword.

    Shapes: B completions, of which those of one prompt are adjacent, and L tokens. Packed (with cu_seqlens), S
    completions one after the other, T tokens in all: read [S] for [B], and [T] or [1, T] for [B, L].
    """

    cu_seqlens: Annotated[
        Tensor | None,
        Option(
            None,
            anything,
            "[S + 1] int32 or int64, where each of S packed completions begins, and where the last one ends: from 0 "
            "to T, never decreasing. All tensors are then packed: read [S] for [B] and [T] (or [1, T]) for [B, L]; "
            "results are [T]. None: [B, L], of which every row is one completion, also if B is 1.",
        ),
    ]

    rewards: Annotated[
        Tensor | None,
        Option(None, anything, "[B], used to compute group-relative advantages, see `group_advantages`."),
    ]
    num_generations: Annotated[
        int | None,
        Option(None, partial(or_none, check=COUNT), "number of completions of each prompt; required with rewards."),
    ]
    scale_rewards: Annotated[
        str,
        Option("group", one_of(*SCALE_REWARDS), 'used with rewards: "group", "batch" or "none".'),
    ]
    completion_mask: Annotated[
        Tensor | None,
        Option(None, anything, "[B, L] bool or int, 0 where a token does not count; None for all ones."),
    ]
    old_per_token_logps: Annotated[
        Tensor | None,
        Option(None, anything, "[B, L], of the policy that sampled; None if on-policy (ratio 1, gradient flows)."),
    ]
    ref_per_token_logps: Annotated[
        Tensor | None,
        Option(None, anything, "[B, L], of the frozen reference; required unless beta is the float 0.0."),
    ]
    beta: Annotated[
        float | Tensor,
        Option(
            0.0,
            partial(or_tensor, check=a_number(at_least=0)),
            "KL weight, a float >= 0 or a tensor: 0-d (on any device), [B] or [B, L]. Changing it from call to call "
            "costs nothing.",
        ),
    ]
    kl_estimator: Annotated[
        str,
        Option(
            "k3",
            one_of(*KL_ESTIMATORS),
            'with d = ref_logp - logp: "k1" is -d, "abs" |d|, "k2" d^2 / 2, "k3" e^d - d - 1, and "low_var_kl" k3 cut '
            "at 10, as verl, EasyR1 and OpenRLHF do (no gradient beyond).",
        ),
    ]
    kl_clamp: Annotated[
        float | None,
        Option(
            None,
            partial(or_none, check=a_number(above=0), instead=math.inf),
            "d is cut to [-kl_clamp, kl_clamp] first, without gradient beyond; None for no cut.",
        ),
    ]
    epsilon_low: Annotated[
        float | Tensor,
        Option(
            0.2,
            partial(or_tensor, check=a_number(at_least=0)),
            'the ratio is clipped where it is below 1 - epsilon_low ("gmpo": its logarithm below -epsilon_low); with '
            '"dppo_tv" and "dppo_kl", how far a probability may fall. A float, or a tensor as for beta.',
        ),
    ]
    epsilon_high: Annotated[
        float | Tensor,
        Option(
            0.2,
            partial(or_tensor, check=a_number(at_least=0)),
            'the ratio is clipped where it is above 1 + epsilon_high ("gmpo": its logarithm above epsilon_high); with '
            '"cispo", above epsilon_high itself; with "dppo_tv" and "dppo_kl", how far a probability may rise. A '
            "float, or a tensor as for beta.",
        ),
    ]
    delta: Annotated[
        float | None,
        Option(
            None,
            partial(or_none, check=a_number(above=0), instead=math.inf),
            "upper bound of the unclipped ratio (two-sided clipping); None for no bound.",
        ),
    ]
    clip_ratio_c: Annotated[
        float | None,
        Option(
            None,
            partial(or_none, check=a_number(above=1), instead=math.inf),
            'upper bound of the ratio where the advantage is negative (dual clip, as in verl); with "dppo_tv" and '
            '"dppo_kl" everywhere. None for no bound.',
        ),
    ]
    loss_type: Annotated[
        str,
        Option("grpo", one_of(*LOSS_TYPES), f"one of {', '.join(LOSS_TYPES)}; see `kernels/reference.py`."),
    ]
    importance_sampling_level: Annotated[
        str,
        Option(
            "token",
            one_of(*IMPORTANCE_SAMPLING_LEVELS),
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
        Option(None, anything, "[B, L], [B] or [B, 1], correction for a rollout engine; multiplies the policy term."),
    ]
    sapo_temperature_pos: Annotated[
        float,
        Option(1.0, a_number(above=0), '"sapo"\'s temperature where the advantage is positive.'),
    ]
    sapo_temperature_neg: Annotated[
        float,
        Option(1.05, a_number(above=0), '"sapo"\'s temperature elsewhere.'),
    ]
    clip_cov_ratio: Annotated[
        float,
        Option(0.0002, a_share, '"clip_cov": the share of tokens that is cut at most, but at least one token.'),
    ]
    clip_cov_lb: Annotated[
        float,
        Option(1.0, a_number(), '"clip_cov": the covariance of a token that may be cut is above this'),
    ]
    clip_cov_ub: Annotated[
        float,
        Option(5.0, a_number(), '"clip_cov": and below this.'),
    ]
    kl_cov_ratio: Annotated[
        float,
        Option(0.0002, a_share, '"kl_cov": the share of tokens with the penalty, but at least one token.'),
    ]
    ppo_kl_coef: Annotated[
        float,
        Option(0.1, a_number(at_least=0), '"kl_cov": the weight of that penalty, |logp - old_logp|.'),
    ]
    top_entropy_quantile: Annotated[
        float,
        Option(
            1.0,
            a_share,
            "the share of the unmasked tokens, those with the highest entropies, that keep their policy term (TRL).",
        ),
    ]
    off_policy_mask_threshold: Annotated[
        float | None,
        Option(
            None,
            partial(or_none, check=a_number(at_least=0), instead=math.inf),
            "where the advantage is negative, a completion whose mean of sampling_logp - logp is above this loses its "
            "policy term (TRL); None for no such mask.",
        ),
    ]
    sampling_per_token_logps: Annotated[
        Tensor | None,
        Option(
            None,
            anything,
            "[B, L], of the engine that sampled, used by that mask alone; None to use old_per_token_logps.",
        ),
    ]
    token_weight: Annotated[
        Tensor | None,
        Option(
            None,
            anything,
            "[B, L], multiplies the loss of each token, KL included; the normaliser and the entropy bonus do not "
            "know of it.",
        ),
    ]
    entropy_coef: Annotated[
        float,
        Option(
            0.0,
            a_number(),
            'the loss is lowered by entropy_coef * mean entropy of the unmasked tokens (with reduction="sum", by '
            "their sum).",
        ),
    ]
    max_completion_length: Annotated[
        int | None,
        Option(
            None,
            partial(or_none, check=COUNT),
            f"the normaliser of {_listed(normalised_by(normalisers.longest_completions))}, in tokens.",
        ),
    ]
    num_items_in_batch: Annotated[
        float | Tensor | None,
        Option(
            None,
            partial(or_none, check=partial(or_tensor, check=a_number(at_least=0))),
            f"the normaliser of {_listed(normalised_by(normalisers.batch_tokens))}, in tokens (a number or a 0-d "
            "tensor); None to count unmasked tokens.",
        ),
    ]
    num_sequences: Annotated[
        float | Tensor | None,
        Option(
            None,
            partial(or_none, check=partial(or_tensor, check=a_number(above=0))),
            f"number of completions over which {_listed(normalised_by(*normalisers.OVER_COMPLETIONS))} average, a "
            "number or a 0-d tensor, if this call has only a part of them; None for its own.",
        ),
    ]
    temperature: Annotated[
        float | Tensor,
        Option(
            1.0,
            partial(or_tensor, check=a_number(above=0)),
            "number by which the logits are divided, after logit_scale and final_logit_softcapping; a float, or a "
            "tensor as for beta, with values > 0.",
        ),
    ]
    logit_scale: Annotated[
        float,
        Option(
            1.0,
            a_number(above=0),
            "number by which the model multiplies its logits, if those given (or computed here from hidden states) are "
            "not multiplied yet: Cohere's logit_scale, 1 / logits_scaling of Granite.",
        ),
    ]
    final_logit_softcapping: Annotated[
        float | None,
        Option(
            None,
            partial(or_none, check=a_number(above=0), instead=math.inf),
            "Gemma's soft cap: after logit_scale and before temperature, a logit z becomes cap * tanh(z / cap), if "
            "those given (or computed here from hidden states) are not capped yet; a logit of -inf stays banned. None "
            "for no cap.",
        ),
    ]
    reduction: Annotated[
        str,
        Option(
            "mean",
            one_of("mean", "sum", "none"),
            '"mean"; or without normaliser "sum", or "none" for the loss of each token, [B, L].',
        ),
    ]


OPTIONS: dict[str, Option] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(LossOptions, include_extras=True).items()
}

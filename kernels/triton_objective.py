"""The objective of one token in Triton, which follows `reference.objective`, and the group-relative advantage.

There is no autograd in a kernel: `token_objective` returns the loss of a token together with its slope, the derivative
with respect to the token's log-probability, which is all that the gradient of the logits needs. Everything is a float32
scalar; advantages are computed in float64, as everywhere.
"""

from collections import namedtuple

import triton
import triton.language as tl

from mr1fast.kernels import advantages, estimators, exponentials, policies, reference

EXP_LIMIT = tl.constexpr(exponentials.EXP_LIMIT)
ADVANTAGE_EPS = tl.constexpr(advantages.EPS)
REWARD_BLOCK = tl.constexpr(512)
NEG_INF = tl.constexpr(float("-inf"))

# The policy terms, in the order of policies.POLICIES, and the estimators of the KL, in that of estimators.ESTIMATORS.
CLIP, CISPO, SAPO, CISPO_TWO_SIDED, DPPO_TV, DPPO_KL = map(tl.constexpr, range(len(policies.POLICIES)))
K1, ABS, K2, K3, LOW_VAR_KL = map(tl.constexpr, range(len(estimators.ESTIMATORS)))
LOW_VAR_KL_LIMIT = tl.constexpr(estimators.LOW_VAR_KL_LIMIT)

# Declared without field types, which would repeat the names. As an argument of a kernel it counts as one parameter.
TokenSpec = namedtuple("TokenSpec", reference.SWITCHES + reference.NUMBERS)  # type: ignore[misc]


def token_spec(spec: reference.LossSpec) -> TokenSpec:
    """A spec for a kernel: switches are compiled in; numbers are arguments, so their values never compile it again."""
    return TokenSpec(*(tl.constexpr(switch) for switch in spec.switches), *(float(number) for number in spec.numbers))


@triton.jit
def _smaller(a, b):
    """The smaller one, or NaN if `a` is: tl.minimum would hide it."""
    return tl.where(a > b, b, a)


@triton.jit
def _kl(d, spec):
    """(kl, its derivative with respect to logp) from d = ref_logp - logp, whose own slope is -1, and 0 if it is cut."""
    held = (d > spec.kl_clamp) | (d < -spec.kl_clamp)
    d = tl.where(d > spec.kl_clamp, spec.kl_clamp, tl.where(d < -spec.kl_clamp, -spec.kl_clamp, d))
    if spec.estimator == K1:
        kl = -d
        slope = tl.where(d == d, 1.0, d)
    elif spec.estimator == ABS:
        kl = tl.where(d < 0, -d, d)
        slope = tl.where(d > 0, -1.0, tl.where(d < 0, 1.0, d))
    elif spec.estimator == K2:
        kl = d * d / 2
        slope = -d
    else:
        exp_d = tl.exp(_smaller(d, EXP_LIMIT))
        kl = exp_d - d - 1
        slope = 1 - exp_d
        if spec.estimator == LOW_VAR_KL:
            slope = tl.where(kl > LOW_VAR_KL_LIMIT, 0.0, slope)
            kl = _smaller(kl, LOW_VAR_KL_LIMIT)
    return kl, tl.where(held, 0.0, slope)


@triton.jit
def _moved_too_far(logp, old_logp, epsilon_low, epsilon_high, spec):
    """DPPO's conditions on the probability of a token, by total variation or KL: (it rose too far, it fell too far)."""
    p = tl.exp(logp)
    old_p = tl.exp(old_logp)
    if spec.policy == DPPO_TV:
        rose = p - old_p > epsilon_high
        fell = p - old_p < -epsilon_low
    else:
        # The probabilities of all other tokens; rounding may have made them negative.
        rest = tl.where(p > 1, 0.0, 1 - p) + 1e-8
        old_rest = tl.where(old_p > 1, 0.0, 1 - old_p) + 1e-8
        kl = old_p * (tl.where(old_logp < -1e30, -1e30, old_logp) - logp) + (1 - old_p) * tl.log(old_rest / rest)
        rose = (kl > epsilon_high) & (p > old_p)
        fell = (kl > epsilon_low) & (p < old_p)
    return rose, fell


@triton.jit
def token_objective(
    logp,
    old_logp,
    ref_logp,
    advantage,
    is_ratio,
    beta,
    epsilon_low,
    epsilon_high,
    spec,
):
    """(loss, dloss_dlogp, kl, is_low_clipped, is_high_clipped) of one token, before the normaliser.

    old_logp, ref_logp and is_ratio may be None, which is known at compile time; without ref_logp kl is 0. spec is a
    TokenSpec; the token's epsilons stand beside it. See `reference.objective` for where an exponential saturates, and
    for banned tokens (logp -inf), which get no gradient. The derivative of the ratio with respect to logp is the ratio
    itself.
    """
    dead = logp == NEG_INF
    live_logp = tl.where(dead, 0.0, logp)
    log_ratio = live_logp - live_logp  # on-policy the ratio is 1, or NaN where logp is
    if old_logp is not None:
        # Where the old policy alone banned the token this is +inf, and the ratio saturates. Where both did it would be
        # inf - inf: the ratio is then taken to be 1.
        log_ratio = tl.where(dead & (old_logp == NEG_INF), 0.0, logp - old_logp)
    ratio = tl.exp(_smaller(log_ratio, EXP_LIMIT))

    is_low = dead != dead
    is_high = is_low
    if spec.policy == CISPO:
        weight = _smaller(ratio, epsilon_high) * advantage  # a constant to the derivative
        loss = -weight * live_logp
        slope = -weight
        is_high = (ratio > epsilon_high) & (advantage > 0)
    elif spec.policy == CISPO_TWO_SIDED:
        is_low = ratio < 1.0 - epsilon_low
        is_high = ratio > 1.0 + epsilon_high
        weight = tl.where(is_low, 1.0 - epsilon_low, tl.where(is_high, 1.0 + epsilon_high, ratio)) * advantage
        loss = -weight * live_logp
        slope = -weight
    elif spec.policy == DPPO_TV or spec.policy == DPPO_KL:
        if old_logp is not None:
            rose, fell = _moved_too_far(logp, old_logp, epsilon_low, epsilon_high, spec)
            is_high = rose & (advantage > 0)
            is_low = fell & ~(advantage > 0)
        # Multiplied by 0, so that a NaN is not hidden.
        weight = _smaller(ratio, spec.clip_ratio_c) * advantage * tl.where(is_low | is_high, 0.0, 1.0)
        loss = -weight * live_logp
        slope = -weight
    elif spec.policy == SAPO:
        t = tl.where(advantage > 0, spec.sapo_temperature_pos, spec.sapo_temperature_neg)
        gate = tl.sigmoid(t * (ratio - 1))
        loss = -gate * 4 / t * advantage
        slope = -4 * advantage * gate * (1 - gate) * ratio  # gate' = t gate (1 - gate)
    else:
        ratio_low = 1.0 - epsilon_low
        ratio_high = 1.0 + epsilon_high
        beyond = (ratio > spec.clip_ratio_c) & (advantage < 0)
        dual = tl.where(beyond, spec.clip_ratio_c, ratio)
        bounded = _smaller(dual, spec.delta)
        clipped = _smaller(tl.where(dual < ratio_low, ratio_low, dual), ratio_high)
        loss = -_smaller(bounded * advantage, clipped * advantage)
        # The smaller side has the slope of its ratio, or slope 0 where a bound keeps that ratio constant.
        outside = (ratio < ratio_low) | (ratio > ratio_high)
        held = tl.where(bounded * advantage > clipped * advantage, outside, ratio > spec.delta)
        slope = tl.where(held | beyond, 0.0, -advantage * ratio)
        is_low = (bounded < ratio_low) & (advantage < 0)
        is_high = (bounded > ratio_high) & (advantage > 0)
    if is_ratio is not None:
        loss *= is_ratio
        slope *= is_ratio

    kl = 0.0
    if ref_logp is not None:
        d = tl.where(dead, 0.0, ref_logp - live_logp)
        kl, kl_slope = _kl(d, spec)
        if spec.use_bias_correction_kl:
            kl_slope = (kl_slope + kl) * ratio
            kl *= ratio
        # beta 0 switches the term off even where kl is inf.
        loss += tl.where(beta == 0, 0.0, beta * kl)
        slope += tl.where(beta == 0, 0.0, beta * kl_slope)
    return loss, tl.where(dead, 0.0, slope), kl, is_low, is_high


@triton.jit
def _moments(rewards_ptr, first, count, origin):
    """(mean - origin, unbiased std), both float64, of rewards[first : first + count] without the NaNs among them.

    The origin [] float64 is one of the rewards: if all equal it, their differences from it are 0, and so is their
    mean. The std of fewer than two is 0.
    """
    total = tl.zeros((), tl.float64)
    present = tl.zeros((), tl.float64)
    for start in range(0, count, REWARD_BLOCK):
        i = start + tl.arange(0, REWARD_BLOCK)
        beyond = tl.load(rewards_ptr + first + i, mask=i < count, other=float("nan")).to(tl.float64) - origin
        total += tl.sum(tl.where(beyond == beyond, beyond, 0.0))
        present += tl.sum(tl.where(beyond == beyond, 1.0, 0.0))
    mean = total / tl.maximum(present, 1.0)
    squares = tl.zeros((), tl.float64)
    for start in range(0, count, REWARD_BLOCK):
        i = start + tl.arange(0, REWARD_BLOCK)
        beyond = tl.load(rewards_ptr + first + i, mask=i < count, other=float("nan")).to(tl.float64) - origin
        centred = tl.where(beyond == beyond, beyond - mean, 0.0)
        squares += tl.sum(centred * centred)
    return mean, tl.sqrt(squares / tl.maximum(present - 1, 1.0))


@triton.jit
def group_advantage(rewards_ptr, completion, B, G, SCALE_REWARDS: tl.constexpr):
    """The group-relative advantage of one completion, float32: it follows `advantages.group_advantages`.

    rewards [B] float32, the G completions of a prompt adjacent; SCALE_REWARDS is "group", "batch" or "none".
    """
    reward = tl.load(rewards_ptr + completion).to(tl.float64)
    mean, std = _moments(rewards_ptr, completion // G * G, G, reward)
    if SCALE_REWARDS == "batch":
        _, std = _moments(rewards_ptr, 0, B, reward)
    advantage = 0.0 - mean  # the mean is relative to this very reward
    if SCALE_REWARDS != "none":
        advantage = advantage / (std + ADVANTAGE_EPS)
    return tl.where(reward == reward, advantage, 0.0).to(tl.float32)

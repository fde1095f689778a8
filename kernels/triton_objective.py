"""The objective of one token, spelled as Triton device functions: the counterpart of `reference.objective`.

No derivative is taken by machinery here: `token_objective` returns the loss of a token together with its slope with
respect to the token's log-probability, which is all the gradient of the logits needs. Everything is a float32 scalar.
"""

import triton
import triton.language as tl

# Mirrors of reference.py's EXP_LIMIT and of group_advantages' eps; a kernel can only read constexpr globals.
EXP_LIMIT = tl.constexpr(80.0)
ADVANTAGE_EPS = tl.constexpr(1e-4)
REWARD_BLOCK = tl.constexpr(512)
NEG_INF = tl.constexpr(float("-inf"))

# Which formula computes a loss type's policy term (`OBJECTIVE` below); all others share the clipped one.
FAMILIES = {"cispo": "cispo", "sapo": "sapo"}


@triton.jit
def _smaller(a, b):
    """The smaller one, or NaN if `a` is: tl.minimum would hide it."""
    return tl.where(a > b, b, a)


@triton.jit
def token_objective(
    logp,
    old_logp,
    ref_logp,
    advantage,
    is_ratio,
    beta,
    ratio_low,
    ratio_high,
    delta,
    sapo_temperature_pos,
    sapo_temperature_neg,
    OBJECTIVE: tl.constexpr,
    BIAS_CORRECTED_KL: tl.constexpr,
):
    """(loss, dloss_dlogp, kl, is_low_clipped, is_high_clipped) of one token, before the normaliser.

    old_logp, ref_logp and is_ratio may be None (constexpr), and kl is then 0. ratio_low and ratio_high bound the ratio
    (1 - eps_low and 1 + eps_high; cispo: no lower one, and eps_high itself), delta is inf where there is none.
    OBJECTIVE is "clip", "cispo" or "sapo". See `reference.objective` for the rules where an exponential saturates and
    for banned tokens (logp -inf), which get no gradient.
    """
    dead = logp == NEG_INF
    live_logp = tl.where(dead, 0.0, logp)
    log_ratio = live_logp - live_logp  # on-policy the ratio is 1, or NaN for all to see
    if old_logp is not None:
        # A ban by the old policy alone gives +inf here, and a saturated ratio; by both, inf - inf, is on-policy.
        log_ratio = tl.where(dead & (old_logp == NEG_INF), 0.0, logp - old_logp)
    ratio = tl.exp(_smaller(log_ratio, EXP_LIMIT))

    if OBJECTIVE == "cispo":
        weight = _smaller(ratio, ratio_high) * advantage
        loss = -weight * live_logp
        slope = -weight
        is_low = dead != dead
        is_high = (ratio > ratio_high) & (advantage > 0)
    elif OBJECTIVE == "sapo":
        t = tl.where(advantage > 0, sapo_temperature_pos, sapo_temperature_neg)
        gate = tl.sigmoid(t * (ratio - 1))
        loss = -gate * 4 / t * advantage
        slope = -4 * advantage * gate * (1 - gate) * ratio
        is_low = dead != dead
        is_high = is_low
    else:
        bounded = _smaller(ratio, delta)
        clipped = _smaller(tl.where(ratio < ratio_low, ratio_low, ratio), ratio_high)
        loss = -_smaller(bounded * advantage, clipped * advantage)
        # d ratio / d logp is the ratio itself; whichever side won passes it on unless a bound holds that side fast.
        outside = (ratio < ratio_low) | (ratio > ratio_high)
        held = tl.where(bounded * advantage > clipped * advantage, outside, ratio > delta)
        slope = tl.where(held, 0.0, -advantage * ratio)
        is_low = (bounded < ratio_low) & (advantage < 0)
        is_high = (bounded > ratio_high) & (advantage > 0)
    if is_ratio is not None:
        loss *= is_ratio
        slope *= is_ratio

    kl = 0.0
    if ref_logp is not None:
        d = tl.where(dead, 0.0, ref_logp - live_logp)
        exp_d = tl.exp(_smaller(d, EXP_LIMIT))
        kl = exp_d - d - 1
        kl_slope = 1 - exp_d
        if BIAS_CORRECTED_KL:
            kl_slope = (kl_slope + kl) * ratio
            kl *= ratio
        # beta 0 switches the term off even where kl is inf.
        loss += tl.where(beta == 0, 0.0, beta * kl)
        slope += tl.where(beta == 0, 0.0, beta * kl_slope)
    return loss, tl.where(dead, 0.0, slope), kl, is_low, is_high


@triton.jit
def _moments(rewards_ptr, first, count):
    """(mean, unbiased std) of rewards[first : first + count], NaN left out; std 0 for fewer than two."""
    total = 0.0
    present = 0.0
    for start in range(0, count, REWARD_BLOCK):
        i = start + tl.arange(0, REWARD_BLOCK)
        reward = tl.load(rewards_ptr + first + i, mask=i < count, other=float("nan"))
        total += tl.sum(tl.where(reward == reward, reward, 0.0))
        present += tl.sum(tl.where(reward == reward, 1.0, 0.0))
    mean = total / tl.maximum(present, 1.0)
    squares = 0.0
    for start in range(0, count, REWARD_BLOCK):
        i = start + tl.arange(0, REWARD_BLOCK)
        reward = tl.load(rewards_ptr + first + i, mask=i < count, other=float("nan"))
        centred = tl.where(reward == reward, reward - mean, 0.0)
        squares += tl.sum(centred * centred)
    return mean, tl.sqrt(squares / tl.maximum(present - 1, 1.0))


@triton.jit
def group_advantage(rewards_ptr, completion, B, G, SCALE_REWARDS: tl.constexpr):
    """The group-relative advantage of one completion: the counterpart of `reference.group_advantages`.

    rewards [B] float32, the G completions of a prompt adjacent; SCALE_REWARDS is "group", "batch" or "none".
    """
    mean, std = _moments(rewards_ptr, completion // G * G, G)
    if SCALE_REWARDS == "batch":
        _, std = _moments(rewards_ptr, 0, B)
    reward = tl.load(rewards_ptr + completion)
    advantage = reward - mean
    if SCALE_REWARDS != "none":
        advantage = advantage / (std + ADVANTAGE_EPS)
    return tl.where(reward == reward, advantage, 0.0)

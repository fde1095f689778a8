"""An independent float64 statement of every objective: one token at a time, in plain Python over 0-d tensors.

It shares no code with `kernels/reference.py`; gradients come from autograd through the scalars.
"""

import math

import torch


def group_relative(rewards, num_generations, scale_rewards="group", eps=1e-4):
    def deviation(values):
        if len(values) < 2:
            return 0.0
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))

    rewards = [float(r) for r in rewards]
    present = [r for r in rewards if not math.isnan(r)]
    result = []
    for start in range(0, len(rewards), num_generations):
        group = rewards[start : start + num_generations]
        valid = [r for r in group if not math.isnan(r)]
        scale = {"group": deviation(valid), "batch": deviation(present), "none": None}[scale_rewards]
        for r in group:
            centred = 0.0 if math.isnan(r) else r - sum(valid) / len(valid)
            result.append(centred if scale is None else centred / (scale + eps))
    return result


def _token(logits, token_id, temperature, cap):
    if cap is not None:
        banned = logits == -math.inf
        logits = torch.where(banned, logits, cap * (1 - 2 / (torch.exp(2 * logits.masked_fill(banned, 0) / cap) + 1)))
    z = logits / temperature
    top = z.detach().max()
    finite = z > -math.inf
    lse = top + torch.log(torch.exp(z[finite] - top).sum())
    log_p = z[finite] - lse
    return z[token_id] - lse, -(torch.exp(log_p) * log_p).sum()


def _kl(d, estimator):
    """An estimate of the KL from d = ref_logp - logp."""
    if estimator == "k1":
        return -d
    if estimator == "abs":
        return d if d > 0 else -d
    if estimator == "k2":
        return d * d / 2
    k3 = torch.expm1(d) - d
    return 0 * d + 10 if estimator == "low_var_kl" and k3 > 10 else k3


def _policy(loss_type, r, A, logp, old, eps_low, eps_high, s):
    """(policy term, cut from below, cut from above) of one token; r: the ratio, s: all settings."""
    if loss_type == "cispo":
        return -min(r.item(), eps_high) * A * logp, False, r.item() > eps_high and A.item() > 0
    if loss_type == "cispo_two_sided":
        weight = min(max(r.item(), 1 - eps_low), 1 + eps_high)
        return -weight * A * logp, r.item() < 1 - eps_low, r.item() > 1 + eps_high
    if loss_type in ("dppo_tv", "dppo_kl"):
        p, q = math.exp(logp.item()), math.exp(old.item())
        if loss_type == "dppo_tv":
            rose, fell = p - q > eps_high, q - p > eps_low
        else:
            kl = q * math.log(q / p) if q else 0.0
            kl += (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
            rose, fell = kl > eps_high and p > q, kl > eps_low and p < q
        low, high = fell and not A > 0, rose and A.item() > 0
        weight = 0.0 if low or high else r.item() if s["clip_ratio_c"] is None else min(r.item(), s["clip_ratio_c"])
        return -weight * A * logp, low, high
    if loss_type == "sapo":
        tau = s["sapo_temperature_pos"] if A > 0 else s["sapo_temperature_neg"]
        return -(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * A, False, False
    if loss_type == "kl_cov":
        return -A * r, False, False
    dual, delta = s["clip_ratio_c"], s["delta"]
    if dual is not None and A < 0 and r > dual:
        r = 0 * r + dual
    bounded = r if delta is None or r <= delta else 0 * r + delta
    inside = 1 - eps_low <= r.item() <= 1 + eps_high
    clipped = r if inside else 0 * r + min(max(r.item(), 1 - eps_low), 1 + eps_high)
    term = -(bounded * A if (bounded * A).item() <= (clipped * A).item() else clipped * A)
    return term, bounded.item() < 1 - eps_low and A.item() < 0, bounded.item() > 1 + eps_high and A.item() > 0


def _gmpo(tokens, averaged, log_ratios, advantages, epsilons, terms, low, high):
    """The policy terms of one completion, {t: term}, and its flags; averaged: the tokens in the geometric mean."""
    clipped = {}
    for t in tokens:
        d, A, (eps_low, eps_high) = log_ratios[t], advantages[t], epsilons[t]
        high[t] = d.item() > eps_high and A.item() > 0
        low[t] = d.item() < -eps_low and A.item() < 0
        clipped[t] = min(d, 0 * d + eps_high) if A > 0 else max(d, 0 * d - eps_low)
    mean = sum(clipped[t] for t in averaged) / max(len(averaged), 1)
    for t in tokens:
        terms[t] = -advantages[t] * torch.exp(torch.as_tensor(mean, dtype=torch.float64))


def _by_covariance(loss_type, used, logps, advantages, log_ratios, terms, low, high, s):
    """clip_cov and kl_cov, which change the terms of the tokens with the highest covariances."""
    at = [(b, t) for b, tokens in enumerate(used) for t in tokens]
    if not at:
        return
    mean_a = sum(advantages[b][t].item() for b, t in at) / len(at)
    mean_logp = sum(logps[b][t].item() for b, t in at) / len(at)
    cov = {(b, t): (advantages[b][t].item() - mean_a) * (logps[b][t].item() - mean_logp) for b, t in at}
    if loss_type == "kl_cov":
        for b, t in sorted(at, key=cov.get, reverse=True)[: max(int(s["kl_cov_ratio"] * len(at)), 1)]:
            terms[b][t] = terms[b][t] + s["ppo_kl_coef"] * abs(log_ratios[b][t])
        return
    free = [(b, t) for b, t in at if not (low[b][t] or high[b][t]) and s["clip_cov_lb"] < cov[b, t] < s["clip_cov_ub"]]
    drawn = torch.randperm(len(free)).tolist()[: max(int(s["clip_cov_ratio"] * len(at)), 1)]
    for row in (*low, *high):
        row[:] = [False] * len(row)
    for b, t in (free[i] for i in drawn):
        terms[b][t] = 0 * terms[b][t]
        low[b][t], high[b][t] = not advantages[b][t] > 0, advantages[b][t].item() > 0


def _quantile(values, q):
    """The q-quantile by linear interpolation."""
    values, at = sorted(values), q * (len(values) - 1)
    below = min(math.floor(at), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (at - below) * (values[above] - values[below])


def oracle(
    logits,
    ids,
    advantages=None,
    *,
    rewards=None,
    num_generations=None,
    scale_rewards="group",
    completion_mask=None,
    old_per_token_logps=None,
    ref_per_token_logps=None,
    beta=0.0,
    epsilon_low=0.2,
    epsilon_high=0.2,
    delta=None,
    clip_ratio_c=None,
    loss_type="grpo",
    importance_sampling_level="token",
    use_bias_correction_kl=False,
    importance_sampling_ratio=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
    clip_cov_ratio=0.0002,
    clip_cov_lb=1.0,
    clip_cov_ub=5.0,
    kl_cov_ratio=0.0002,
    ppo_kl_coef=0.1,
    top_entropy_quantile=1.0,
    off_policy_mask_threshold=None,
    sampling_per_token_logps=None,
    entropy_coef=0.0,
    max_completion_length=None,
    num_items_in_batch=None,
    temperature=1.0,
    logit_scale=1.0,
    final_logit_softcapping=None,
    reduction="mean",
    kl_estimator="k3",
    kl_clamp=math.inf,
    token_weight=None,
    num_sequences=None,
):
    """logits float64 [B, L, V]; returns the fields of GRPOLossOutput as a dict."""
    s = locals()
    B, L, _ = logits.shape
    zero = torch.zeros((), dtype=torch.float64)
    if rewards is not None:
        advantages = torch.tensor(group_relative(rewards, num_generations, scale_rewards), dtype=torch.float64)
    used = [[t for t in range(L) if completion_mask is None or completion_mask[b, t]] for b in range(B)]
    tokens = max(1, sum(map(len, used)))
    sequences = B if num_sequences is None else float(num_sequences)

    def setting(value, b, t):
        """The value of a setting for one token: a number, or a tensor [], [B], [B, 1] or [B, L]."""
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return float(value)
        return float(value[b] if value.dim() == 1 else value[b, t if value.shape[1] > 1 else 0])

    loss, terms = ([[zero] * L for _ in range(B)] for _ in range(2))
    logps, entropies, kls, A = ([[zero] * L for _ in range(B)] for _ in range(4))
    low, high = ([[False] * L for _ in range(B)] for _ in range(2))
    log_ratios, old = [{} for _ in range(B)], [{} for _ in range(B)]

    for b in range(B):
        for t in used[b]:
            warmth, cap = setting(temperature, b, t), final_logit_softcapping
            logps[b][t], entropies[b][t] = _token(logit_scale * logits[b, t], int(ids[b, t]), warmth, cap)
            given = old_per_token_logps
            old[b][t] = logps[b][t].detach() if given is None else given[b, t].double()
            log_ratios[b][t] = logps[b][t] - old[b][t]
            A[b][t] = (advantages[b] if advantages.dim() == 1 else advantages[b, t]).double()
    chosen = used  # the tokens that keep their policy term
    if top_entropy_quantile < 1 and any(used):
        least = _quantile([entropies[b][t].item() for b in range(B) for t in used[b]], 1 - top_entropy_quantile)
        chosen = [[t for t in used[b] if entropies[b][t].item() >= least] for b in range(B)]

    ratios = [{} for _ in range(B)]
    for b in range(B):
        epsilons = {t: (setting(epsilon_low, b, t), setting(epsilon_high, b, t)) for t in used[b]}
        for t in used[b]:
            mean = sum(log_ratios[b].values()) / len(used[b])
            own = logps[b][t] - logps[b][t].detach()
            log_ratio = {"token": log_ratios[b][t], "sequence": mean, "sequence_token": mean.detach() + own}
            r = ratios[b][t] = torch.exp(log_ratio[importance_sampling_level])
            if loss_type != "gmpo":
                found = _policy(loss_type, r, A[b][t], logps[b][t], old[b][t], *epsilons[t], s)
                terms[b][t], low[b][t], high[b][t] = found
        if loss_type == "gmpo":
            _gmpo(used[b], chosen[b], log_ratios[b], A[b], epsilons, terms[b], low[b], high[b])
    if loss_type in ("clip_cov", "kl_cov"):
        _by_covariance(loss_type, chosen, logps, A, log_ratios, terms, low, high, s)

    for b in range(B):
        drift = 0.0
        for t in used[b]:
            was = old[b][t] if sampling_per_token_logps is None else sampling_per_token_logps[b, t]
            drift += 0.0 if was.isnan() else (was - logps[b][t]).item() / len(used[b])
        for t in used[b]:
            term = terms[b][t]
            if loss_type != "gmpo" and t not in chosen[b]:
                term = 0 * term
            if off_policy_mask_threshold is not None and drift > off_policy_mask_threshold and A[b][t] < 0:
                term = 0 * term
            if importance_sampling_ratio is not None:
                term = term * setting(importance_sampling_ratio, b, t)
            if ref_per_token_logps is not None:
                d = ref_per_token_logps[b, t].double() - logps[b][t]
                d = d if abs(d.item()) <= kl_clamp else zero + math.copysign(kl_clamp, d.item())
                kls[b][t] = _kl(d, kl_estimator)
                if use_bias_correction_kl:
                    kls[b][t] = kls[b][t] * ratios[b][t]
                term = term + setting(beta, b, t) * kls[b][t]
            loss[b][t] = term if token_weight is None else term * float(token_weight[b, t])

    def stack(rows):
        return torch.stack([torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in row]) for row in rows])

    per_token = stack(loss)
    bonus = entropy_coef * sum((entropies[b][t] for b in range(B) for t in chosen[b]), zero)
    if reduction == "none":
        total = per_token
    elif reduction == "sum":
        total = per_token.sum() - bonus
    else:
        sums = per_token.sum(1)
        if loss_type in ("grpo", "sapo", "gmpo"):
            total = sum(sums[b] / max(1, len(used[b])) for b in range(B)) / sequences
        elif loss_type == "luspo":
            total = sums.sum() / sequences
        elif loss_type == "dr_grpo":
            total = sums.sum() / (sequences * max_completion_length)
        elif loss_type == "bnpo" or num_items_in_batch is None:
            total = sums.sum() / tokens
        else:
            total = sums.sum() / max(1.0, float(num_items_in_batch))
        total = total - bonus / max(1, sum(map(len, chosen)))
    return {
        "loss": total,
        "per_token_logps": stack(logps).detach(),
        "entropies": stack(entropies).detach(),
        "kl": None if ref_per_token_logps is None else stack(kls).detach(),
        "is_low_clipped": torch.tensor(low),
        "is_high_clipped": torch.tensor(high),
    }

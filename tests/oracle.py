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
    loss_type="grpo",
    importance_sampling_level="token",
    use_bias_correction_kl=False,
    importance_sampling_ratio=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
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

    loss = [[zero] * L for _ in range(B)]
    logps, entropies, kls = ([[zero] * L for _ in range(B)] for _ in range(3))
    low, high = ([[False] * L for _ in range(B)] for _ in range(2))

    for b in range(B):
        for t in used[b]:
            warmth, cap = setting(temperature, b, t), final_logit_softcapping
            logps[b][t], entropies[b][t] = _token(logit_scale * logits[b, t], int(ids[b, t]), warmth, cap)
        log_ratios = {}
        for t in used[b]:
            old = logps[b][t].detach() if old_per_token_logps is None else old_per_token_logps[b, t].double()
            log_ratios[t] = logps[b][t] - old
        if importance_sampling_level == "sequence" and used[b]:
            mean = sum(log_ratios.values()) / len(used[b])
            log_ratios = dict.fromkeys(used[b], mean)
        for t in used[b]:
            A = (advantages[b] if advantages.dim() == 1 else advantages[b, t]).double()
            r = torch.exp(log_ratios[t])
            eps_low, eps_high = setting(epsilon_low, b, t), setting(epsilon_high, b, t)
            if loss_type == "cispo":
                term = -min(r.item(), eps_high) * A * logps[b][t]
                high[b][t] = r.item() > eps_high and A.item() > 0
            elif loss_type == "sapo":
                tau = sapo_temperature_pos if A > 0 else sapo_temperature_neg
                term = -(4 / tau) / (1 + torch.exp(-tau * (r - 1))) * A
            else:
                bounded = r if delta is None or r <= delta else zero + delta
                clipped = min(max(r.item(), 1 - eps_low), 1 + eps_high)
                inside = 1 - eps_low <= r.item() <= 1 + eps_high
                clipped = r if inside else zero + clipped
                term = -(bounded * A if (bounded * A).item() <= (clipped * A).item() else clipped * A)
                low[b][t] = bounded.item() < 1 - eps_low and A.item() < 0
                high[b][t] = bounded.item() > 1 + eps_high and A.item() > 0
            if importance_sampling_ratio is not None:
                term = term * setting(importance_sampling_ratio, b, t)
            if ref_per_token_logps is not None:
                d = ref_per_token_logps[b, t].double() - logps[b][t]
                d = d if abs(d.item()) <= kl_clamp else zero + math.copysign(kl_clamp, d.item())
                kls[b][t] = _kl(d, kl_estimator)
                if use_bias_correction_kl:
                    kls[b][t] = kls[b][t] * r
                term = term + setting(beta, b, t) * kls[b][t]
            loss[b][t] = term if token_weight is None else term * float(token_weight[b, t])

    def stack(rows):
        return torch.stack([torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in row]) for row in rows])

    per_token = stack(loss)
    if reduction == "none":
        total = per_token
    elif reduction == "sum":
        total = per_token.sum() - entropy_coef * stack(entropies).sum()
    else:
        sums = per_token.sum(1)
        if loss_type in ("grpo", "sapo"):
            total = sum(sums[b] / max(1, len(used[b])) for b in range(B)) / sequences
        elif loss_type == "luspo":
            total = sums.sum() / sequences
        elif loss_type == "dr_grpo":
            total = sums.sum() / (sequences * max_completion_length)
        elif loss_type == "bnpo" or num_items_in_batch is None:
            total = sums.sum() / tokens
        else:
            total = sums.sum() / max(1.0, float(num_items_in_batch))
        total = total - entropy_coef * stack(entropies).sum() / tokens
    return {
        "loss": total,
        "per_token_logps": stack(logps).detach(),
        "entropies": stack(entropies).detach(),
        "kl": None if ref_per_token_logps is None else stack(kls).detach(),
        "is_low_clipped": torch.tensor(low),
        "is_high_clipped": torch.tensor(high),
    }

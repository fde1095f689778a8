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


ZERO = torch.zeros((), dtype=torch.float64)


class _Call:
    """The numbers of each token, as lists [B][L] of 0-d tensors, 0 where masked; s: what `oracle` was given."""

    def __init__(self, s):
        B, L, _ = s["logits"].shape
        self.s, self.completions = s, range(B)
        mask, advantages = s["completion_mask"], s["advantages"]
        self.used = [[t for t in range(L) if mask is None or mask[b, t]] for b in self.completions]
        self.chosen = self.used  # the tokens that keep their policy term
        if s["rewards"] is not None:
            relative = group_relative(s["rewards"], s["num_generations"], s["scale_rewards"])
            advantages = torch.tensor(relative, dtype=torch.float64)
        self.A = [[(row if row.dim() == 0 else row[t]).double() for t in range(L)] for row in advantages]
        self.logps, self.entropies, self.terms, self.kls = ([[ZERO] * L for _ in self.completions] for _ in range(4))
        self.low, self.high = ([[False] * L for _ in self.completions] for _ in range(2))
        self.old, self.log_ratios, self.ratios = ([{} for _ in self.completions] for _ in range(3))

    def setting(self, name, b, t):
        """The value of a setting for one token: a number, or a tensor [], [B], [B, 1] or [B, L]."""
        value = self.s[name]
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return float(value)
        return float(value[b] if value.dim() == 1 else value[b, t if value.shape[1] > 1 else 0])

    def score(self):
        s, given = self.s, self.s["old_per_token_logps"]
        for b in self.completions:
            for t in self.used[b]:
                z, warmth = s["logit_scale"] * s["logits"][b, t], self.setting("temperature", b, t)
                logp, self.entropies[b][t] = _token(z, int(s["ids"][b, t]), warmth, s["final_logit_softcapping"])
                self.logps[b][t] = logp
                self.old[b][t] = logp.detach() if given is None else given[b, t].double()
                self.log_ratios[b][t] = logp - self.old[b][t]

    def choose(self):
        top = self.s["top_entropy_quantile"]
        if top < 1 and any(self.used):
            entropies = [[self.entropies[b][t].item() for t in self.used[b]] for b in self.completions]
            least = _quantile([each for row in entropies for each in row], 1 - top)
            self.chosen = [
                [t for t, entropy in zip(self.used[b], entropies[b]) if entropy >= least] for b in self.completions
            ]

    def policy_terms(self, b):
        loss_type, level = self.s["loss_type"], self.s["importance_sampling_level"]
        epsilons = {t: (self.setting("epsilon_low", b, t), self.setting("epsilon_high", b, t)) for t in self.used[b]}
        rows = self.terms[b], self.low[b], self.high[b]
        for t in self.used[b]:
            logp, mean = self.logps[b][t], sum(self.log_ratios[b].values()) / len(self.used[b])
            sequence_token = mean.detach() + (logp - logp.detach())
            log_ratio = {"token": self.log_ratios[b][t], "sequence": mean, "sequence_token": sequence_token}[level]
            r = self.ratios[b][t] = torch.exp(log_ratio)
            if loss_type != "gmpo":
                found = _policy(loss_type, r, self.A[b][t], logp, self.old[b][t], *epsilons[t], self.s)
                for row, value in zip(rows, found):
                    row[t] = value
        if loss_type == "gmpo":
            _gmpo(self.used[b], self.chosen[b], self.log_ratios[b], self.A[b], epsilons, *rows)

    def drift(self, b):
        """The mean of sampling_logp - logp of a completion."""
        given = self.s["sampling_per_token_logps"]
        was = {t: self.old[b][t] if given is None else given[b, t] for t in self.used[b]}
        return sum((was[t] - self.logps[b][t]).item() for t in was if not was[t].isnan()) / max(len(was), 1)

    def loss(self, b, t, drift):
        """The loss of one token; drift: that of its completion."""
        s, term = self.s, self.terms[b][t]
        if s["loss_type"] != "gmpo" and t not in self.chosen[b]:
            term = 0 * term
        threshold = s["off_policy_mask_threshold"]
        if threshold is not None and drift > threshold and self.A[b][t] < 0:
            term = 0 * term
        if s["importance_sampling_ratio"] is not None:
            term = term * self.setting("importance_sampling_ratio", b, t)
        if s["ref_per_token_logps"] is not None:
            d = s["ref_per_token_logps"][b, t].double() - self.logps[b][t]
            d = d if abs(d.item()) <= s["kl_clamp"] else ZERO + math.copysign(s["kl_clamp"], d.item())
            kl = _kl(d, s["kl_estimator"])
            self.kls[b][t] = kl * self.ratios[b][t] if s["use_bias_correction_kl"] else kl
            term = term + self.setting("beta", b, t) * self.kls[b][t]
        return term if s["token_weight"] is None else term * float(s["token_weight"][b, t])

    def total(self, per_token):
        """The mean or the sum of the losses [B, L], with the entropy bonus."""
        s, tokens = self.s, max(1, sum(map(len, self.used)))
        bonus = s["entropy_coef"] * sum((self.entropies[b][t] for b in self.completions for t in self.chosen[b]), ZERO)
        if s["reduction"] == "sum":
            return per_token.sum() - bonus
        sums, loss_type, items = per_token.sum(1), s["loss_type"], s["num_items_in_batch"]
        sequences = len(self.used) if s["num_sequences"] is None else float(s["num_sequences"])
        if loss_type in ("grpo", "sapo", "gmpo"):
            total = sum(sums[b] / max(1, len(self.used[b])) for b in self.completions) / sequences
        elif loss_type == "luspo":
            total = sums.sum() / sequences
        elif loss_type == "dr_grpo":
            total = sums.sum() / (sequences * s["max_completion_length"])
        elif loss_type == "bnpo" or items is None:
            total = sums.sum() / tokens
        else:
            total = sums.sum() / max(1.0, float(items))
        return total - bonus / max(1, sum(map(len, self.chosen)))


def _stack(rows):
    return torch.stack([torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in row]) for row in rows])


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
    call = _Call(locals())
    call.score()
    call.choose()
    for b in call.completions:
        call.policy_terms(b)
    if loss_type in ("clip_cov", "kl_cov"):
        by_token = call.logps, call.A, call.log_ratios, call.terms, call.low, call.high
        _by_covariance(loss_type, call.chosen, *by_token, call.s)
    losses = [[ZERO] * logits.shape[1] for _ in call.completions]
    for b in call.completions:
        drift = call.drift(b)
        for t in call.used[b]:
            losses[b][t] = call.loss(b, t, drift)
    per_token = _stack(losses)
    return {
        "loss": per_token if reduction == "none" else call.total(per_token),
        "per_token_logps": _stack(call.logps).detach(),
        "entropies": _stack(call.entropies).detach(),
        "kl": None if ref_per_token_logps is None else _stack(call.kls).detach(),
        "is_low_clipped": torch.tensor(call.low),
        "is_high_clipped": torch.tensor(call.high),
    }

"""Sampling: G completions of each prompt with a key-value cache, the prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix


@dataclass(frozen=True)
class Rollout:
    """G completions of each of P prompts, B = P * G, those of a prompt adjacent."""

    completion_ids: Tensor  # [B, L] int64, the pad token after the end
    completion_mask: Tensor  # [B, L] bool, true up to and including the token that ends the completion
    per_token_logps: Tensor  # [B, L] float32, of the sampler at the temperature of sampling, 0 where masked
    completions: list[str]  # [B]


class Sampler:
    """Completes prompts. Another engine can stand behind `generate`; this one samples from the policy itself."""

    def __init__(self, policy: Policy, *, max_completion_length: int, generator: torch.Generator | None = None):
        """`generator`: on the policy's device; without one torch's global state is used."""
        self.policy, self.max_completion_length, self.generator = policy, max_completion_length, generator

    @torch.no_grad()
    def generate(
        self,
        examples: Sequence[Example],
        *,
        num_generations: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        prefix: Prefix | None = None,
    ) -> Rollout:
        """Complete each prompt `num_generations` times, up to its end or `max_completion_length` tokens.

        temperature: 0 takes the likeliest token. top_k, top_p: sample from the top_k likeliest tokens (0 for all), and
        of these from the likeliest whose probabilities reach top_p together (1 for all). That changes what is sampled
        and not `per_token_logps`, which are those of all tokens at the temperature, as in the loss. prefix: of these
        examples, if the caller has computed it.
        Raises UserError for a model whose hidden states are not finite.
        """
        policy = self.policy
        prefix = prefix or policy.encode_prefix(policy.encode(examples))
        prefix = prefix.take(prefix.prompts_of(len(prefix.last_hidden) * num_generations))
        cache, hidden = prefix.cache(room=self.max_completion_length), prefix.last_hidden
        if not hidden.isfinite().all():
            raise UserError("the model's hidden states are not finite: its weights are broken")
        finished = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        ids: list[Tensor] = []
        mask: list[Tensor] = []
        logps: list[Tensor] = []
        for t in range(self.max_completion_length):
            if t > 0:
                hidden = policy.extend(prefix, cache, ids[-1][:, None], t - 1)[:, 0]
            all_logps = (policy.logits(hidden).float() / (temperature or 1.0)).log_softmax(-1)  # [B, V]
            token = self._choose(all_logps, temperature, top_k, top_p).masked_fill(finished, policy.pad_id)
            ids.append(token)
            mask.append(~finished)
            logps.append(all_logps.gather(1, token[:, None])[:, 0].masked_fill(finished, 0))
            finished = finished | torch.isin(token, policy.end_ids)
            if finished.all():
                break
        completion_ids, completion_mask = torch.stack(ids, 1), torch.stack(mask, 1)
        completions = policy.decode(completion_ids, completion_mask)
        return Rollout(completion_ids, completion_mask, torch.stack(logps, 1), completions)

    def _choose(self, all_logps: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
        """A token [B] for each row of log-probabilities [B, V]."""
        allowed = all_logps.index_fill(1, self.policy.banned_ids, -torch.inf)
        if temperature == 0:
            return allowed.argmax(-1)
        # Not exp: the banned tokens may have had all of the probability.
        probabilities = likeliest(allowed, top_k, top_p).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]


def likeliest(logps: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities [B, V] with -inf for all but the tokens that `Sampler.generate` describes, one at least.

    Of tokens with the same probability at the border, top_k may leave some more.
    """
    if 0 < top_k < logps.shape[-1]:
        least = logps.topk(top_k).values[:, -1:]
        logps = logps.masked_fill(logps < least, -torch.inf)
    if top_p < 1:
        ordered, order = logps.softmax(-1).sort(descending=True, stable=True)
        enough = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones reach top_p without this token
        logps = logps.masked_fill(enough.scatter(1, order, enough), -torch.inf)
    return logps

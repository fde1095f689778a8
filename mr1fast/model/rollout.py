"""Sampling: G completions of each prompt with a key-value cache, the prompt computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.sampling import Choice, Streams
from mr1fast.model.steps import PACES, MergedSteps, Pace, Steps


@dataclass(frozen=True)
class Rollout:
    """G completions of each of P prompts, B = P * G, those of a prompt adjacent."""

    completion_ids: Tensor  # [B, L] int64, the pad token after the end
    completion_mask: Tensor  # [B, L] bool, true up to and including the token that ends the completion
    per_token_logps: Tensor  # [B, L] float32, of the sampler at the temperature of sampling, 0 where masked
    completions: list[str]  # [B]


class Sampler:
    """Completes prompts. Another engine can stand behind `generate`; this one samples from the policy itself."""

    def __init__(self, policy: Policy, *, max_completion_length: int, pace: Pace | None = None):
        """pace: by default the one for the policy's device."""
        self.policy, self.max_completion_length = policy, max_completion_length
        self.pace = pace or PACES.get(policy.device.type, PACES["cpu"])
        if policy.is_sharded:  # what gathers its layers cannot be captured, not even where it has nothing to do
            self.pace = replace(self.pace, graph=False)

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
        streams: Sequence[str] | None = None,
    ) -> Rollout:
        """Complete each prompt `num_generations` times, up to its end or `max_completion_length` tokens.

        temperature: 0 takes the likeliest token. top_k, top_p: sample from the top_k likeliest tokens (0 for all), and
        of these from the likeliest whose probabilities reach top_p together (1 for all). That changes what is sampled
        and not `per_token_logps`, which are those of all tokens at the temperature, as in the loss. prefix: of these
        examples, if the caller has computed it. streams: a name for each prompt, such as "seed/step/place"; completion
        g of a prompt is drawn with the random numbers of "name/g", whatever else is sampled with it. By default names
        are drawn from torch's global random state.
        Raises UserError for a model whose hidden states or logits are not finite.
        """
        policy, G = self.policy, num_generations
        prefix = prefix or policy.encode_prefix(policy.encode(examples))
        if not prefix.last_hidden.isfinite().all():
            raise UserError("the model's hidden states are not finite: its weights are broken")
        if streams is None:
            streams = [str(int(torch.randint(2**62, ()))) if temperature else "" for _ in prefix.last_hidden]
        names = Streams(f"{name}/{g}" for name in streams for g in range(G))
        choice = Choice(policy.banned_ids, temperature, top_k, top_p)
        # Under no_grad autograd still keeps books, which on a CPU takes a tenth of the time of sampling.
        with torch.no_grad() if self.pace.graph else torch.inference_mode():
            ids, logps = self._sample(prefix, prefix.prompts_of(len(prefix.last_hidden) * G), choice, names)
        mask = _until_end(ids, policy.end_ids)
        length = int(mask.sum(1).max())
        ids, mask, logps = ids[:, :length], mask[:, :length], logps[:, :length]
        if logps[mask].isnan().any():
            raise UserError("the model's logits are not finite: its weights are broken")
        ids, logps = ids.masked_fill(~mask, policy.pad_id), logps.masked_fill(~mask, 0)
        return Rollout(ids, mask, logps, policy.decode(ids, mask))

    def _sample(self, prefix: Prefix, prompts: Tensor, choice: Choice, streams: Streams) -> tuple[Tensor, Tensor]:
        """(ids, per_token_logps) [B, max_completion_length], with anything after the end of a completion."""
        policy, pace, L, device = self.policy, self.pace, self.max_completion_length, prompts.device
        rows = torch.arange(len(prompts), device=device)  # of the completions that are in the batch
        ids = torch.full((len(rows), L), policy.pad_id, device=device)
        logps = torch.zeros(len(rows), L, device=device)
        ended = torch.zeros_like(rows, dtype=torch.bool)
        room = min(pace.page, L)
        of = policy, prefix, prompts, choice
        steps = MergedSteps(*of, room=room) if pace.merge else Steps(*of, pace=pace, room=room)
        for start in range(0, L, pace.check):
            stop = min(start + pace.check, L)
            ids[rows, start:stop], logps[rows, start:stop] = steps.take(streams.next(stop - start, device))
            ended |= torch.isin(ids[rows, start:stop], policy.end_ids).any(1)
            alive = (~ended).nonzero()[:, 0]
            if len(alive) == 0:
                break
            room = min(-(-(stop + pace.check) // pace.page) * pace.page, L)
            leave = 0 < (len(rows) - len(alive)) * (L - stop) >= pace.leave
            if stop < L and (leave or room > steps.room):
                steps.keep(alive, room)
                streams.keep(alive.tolist())
                rows, ended = rows[alive], ended[alive]
        return ids, logps


def _until_end(ids: Tensor, end_ids: Tensor) -> Tensor:
    """[B, L] bool: true up to and including the first of the tokens that end a completion."""
    ends = torch.isin(ids, end_ids).int()
    return ends.cumsum(1) - ends == 0

"""Sampling: G completions of each prompt with a key-value cache, the prompt computed once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.decoding import Decoding
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.sampling import Choice, Streams


@dataclass(frozen=True)
class Rollout:
    """G completions of each of P prompts, B = P * G, those of a prompt adjacent."""

    completion_ids: Tensor  # [B, L] int64, the pad token after the end
    completion_mask: Tensor  # [B, L] bool, true up to and including the token that ends the completion
    per_token_logps: Tensor  # [B, L] float32, of the sampler at the temperature of sampling, 0 where masked
    completions: list[str]  # [B]


@dataclass(frozen=True)
class Pace:
    """How a sampler goes about it; what it samples does not depend on this, but for rounding.

    check: tokens after which it asks which completions have ended, which waits for a GPU. leave: these leave the batch
    if they are at least this share of it. page: tokens for which memory is taken at a time. graph: launch a token's
    kernels, some 1,300 for Qwen2-VL-2B, as one CUDA graph; it is captured anew after every change of shape.
    """

    check: int
    leave: float
    page: int
    graph: bool = False


# Measured on a CPU (benchmarks/LOG.md); presumed on a GPU.
PACES = {"cpu": Pace(check=4, leave=0.0, page=64), "cuda": Pace(check=16, leave=0.25, page=128, graph=True)}


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
        hidden: Tensor | None = prefix.last_hidden[prompts]
        decoding = Decoding(prefix, prompts, room=min(pace.page, L), static=pace.graph)
        steps = _Steps(policy, decoding, choice, rows, pace)
        for start in range(0, L, pace.check):
            stop = min(start + pace.check, L)
            numbers = streams.next(stop - start, device)
            ids[rows, start:stop], logps[rows, start:stop] = steps.take(numbers, hidden)
            hidden = None
            ended |= torch.isin(ids[rows, start:stop], policy.end_ids).any(1)
            alive = (~ended).nonzero()[:, 0]
            if len(alive) == 0:
                break
            room = min(-(-(stop + pace.check) // pace.page) * pace.page, L)
            leave = 0 < len(rows) - len(alive) >= pace.leave * len(rows)
            if stop < L and (leave or room > decoding.room):
                decoding.resize(alive, room)
                streams.keep(alive.tolist())
                rows, ended = rows[alive], ended[alive]
                steps = _Steps(policy, decoding, choice, steps.token[alive], pace)
        return ids, logps


class _Steps:
    """The next tokens of N completions, whose tensors stay in place as long as no completion leaves."""

    def __init__(self, policy: Policy, decoding: Decoding, choice: Choice, token: Tensor, pace: Pace):
        """token: [N] int64, the last one of each; anything before the first."""
        self.policy, self.decoding, self.choice = policy, decoding, choice
        self.token = token.clone()
        self.place = token.new_zeros(1)  # of the next token among the following, [N, tokens of a turn]
        self.numbers = torch.zeros(len(token), pace.check, dtype=torch.float64, device=token.device)
        self.ids = torch.zeros_like(self.numbers, dtype=torch.long)
        self.logps = torch.zeros_like(self.numbers, dtype=torch.float32)
        self.step: Callable[[], None] = Captured(self._step) if pace.graph else self._step

    def take(self, numbers: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """As many tokens as there are numbers [N, tokens]: (ids, log-probabilities), likewise.

        hidden: [N, H], from which the first is predicted if it is the first of all.
        """
        count = numbers.shape[1]
        self.numbers[:, :count] = numbers
        self.place.zero_()
        if hidden is not None:
            self._choose(hidden)
        for _ in range(count - (hidden is not None)):
            self.step()
            self.decoding.length += 1
        return self.ids[:, :count], self.logps[:, :count]

    def _step(self) -> None:
        self._choose(self.policy.next_hidden(self.decoding, self.token))

    def _choose(self, hidden: Tensor) -> None:
        numbers = self.numbers.index_select(1, self.place)[:, 0]
        token, logps = self.choice.of(self.policy.logits(hidden), numbers)
        self.token.copy_(token)
        self.ids.index_copy_(1, self.place, token[:, None])
        self.logps.index_copy_(1, self.place, logps[:, None])
        self.place += 1


class Captured:
    """A step on a GPU that is captured as a CUDA graph when it is called the second time, and replayed from then on.

    Where it cannot be captured, a warning says so, and this and all later ones go on as they are.
    """

    possible: ClassVar[bool] = True

    def __init__(self, step: Callable[[], None]):
        self.step, self.warm = step, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif not self.possible:
            self.step()
        elif not self.warm:  # a step like the others; what it sets up must not be part of the graph
            self.warm = True
            self._on_the_side()
        else:
            self._capture()

    def _on_the_side(self) -> None:
        """The step on a stream of its own, as capturing will have one."""
        here, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            self.step()
        here.wait_stream(stream)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # runs nothing
                self.step()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"sampling goes on without a CUDA graph, which is slower: {reason}", stacklevel=2)
            Captured.possible = False
        else:
            self.graph = graph
        self()


def _until_end(ids: Tensor, end_ids: Tensor) -> Tensor:
    """[B, L] bool: true up to and including the first of the tokens that end a completion."""
    ends = torch.isin(ids, end_ids).int()
    return ends.cumsum(1) - ends == 0

"""A token of each completion at a time: how a sampler goes about it.

Shapes: N completions that have not ended, D rows of the model, H hidden, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mr1fast.model.decoding import Decoding
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.sampling import Choice


@dataclass(frozen=True)
class Pace:
    """How a sampler goes about it; what it samples does not depend on this, but for rounding.

    check: tokens after which it asks which completions have ended, which waits for a GPU. leave: these leave the batch
    if, should they stay and others take as long as they may, at least this many tokens would be computed for nothing.
    page: tokens for which memory is taken at a time. graph: launch a token's hundreds of kernels as one CUDA graph,
    which is captured anew after every change of shape. merge: run completions of a prompt that are the same so far as
    one, which asks after every token which they are.
    """

    check: int
    leave: int
    page: int
    graph: bool = False
    merge: bool = False


# Measured (benchmarks/LOG.md). A change of shape costs a GPU 0.2 s, for a token without the graph and for its capture;
# a completion more costs 0.012 ms a token.
PACES = {
    "cpu": Pace(check=2, leave=0, page=64, merge=True),
    "cuda": Pace(check=16, leave=16_384, page=512, graph=True),
}


class Steps:
    """The next tokens of N completions, a row for each. Their tensors stay in place as long as no completion leaves."""

    def __init__(self, policy: Policy, prefix: Prefix, prompts: Tensor, choice: Choice, pace: Pace, room: int):
        """prompts: [N] int64, of the prefix, whose completions they are. room: for so many tokens of each."""
        self.policy, self.choice, self.pace = policy, choice, pace
        self.decoding = Decoding(prefix, prompts, room=room, static=pace.graph)
        self.hidden: Tensor | None = prefix.last_hidden[prompts]  # [N, H], from which the first tokens are predicted
        self._begin(prompts)

    def _begin(self, token: Tensor) -> None:
        """token: [N] int64, the last one of each; anything before the first."""
        self.token = token.clone()
        self.place = token.new_zeros(1)  # of the next token among the following, [N, tokens of a turn]
        self.numbers = torch.zeros(len(token), self.pace.check, dtype=torch.float64, device=token.device)
        self.ids = torch.zeros_like(self.numbers, dtype=torch.long)
        self.logps = torch.zeros_like(self.numbers, dtype=torch.float32)
        self.step: Callable[[], None] = Captured(self._step) if self.pace.graph else self._step

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """As many tokens as there are numbers [N, tokens]: (ids, log-probabilities), likewise."""
        count = numbers.shape[1]
        self.numbers[:, :count] = numbers
        self.place.zero_()
        first, self.hidden = self.hidden, None
        if first is not None:
            self._choose(first)
        for _ in range(count - (first is not None)):
            self.step()
            self.decoding.length += 1
        return self.ids[:, :count], self.logps[:, :count]

    @property
    def room(self) -> int:
        return self.decoding.room

    def keep(self, alive: Tensor, room: int) -> None:
        """Go on with these completions [M] int64, in order, and room for so many tokens of each."""
        self.decoding.resize(alive, room)
        self._begin(self.token[alive])

    def _step(self) -> None:
        self._choose(self.policy.next_hidden(self.decoding, self.token))

    def _choose(self, hidden: Tensor) -> None:
        numbers = self.numbers.index_select(1, self.place)[:, 0]
        token, logps = self.choice.of(self.policy.logits(hidden), numbers)
        self.token.copy_(token)
        self.ids.index_copy_(1, self.place, token[:, None])
        self.logps.index_copy_(1, self.place, logps[:, None])
        self.place += 1


class MergedSteps:
    """The next tokens of N completions, those that are the same so far in one row, until their tokens part.

    At first all completions of a prompt are. Those of short answers that a model is sure of hardly part at all.
    """

    def __init__(self, policy: Policy, prefix: Prefix, prompts: Tensor, choice: Choice, room: int):
        """As for `Steps`."""
        self.policy, self.choice, self.room = policy, choice, room
        self.hidden: Tensor | None = prefix.last_hidden
        self.row = prompts  # [N] int64, which of the D rows; where D is N, each has the row of its own number
        self.token = torch.zeros_like(prompts)  # [N], the last one of each
        self.decoding = Decoding(prefix, torch.arange(len(self.hidden), device=prompts.device), room=room)

    def take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """As many tokens as there are numbers [N, tokens]: (ids, log-probabilities), likewise."""
        taken = [self._take(each) for each in numbers.unbind(1)]
        ids, logps = (torch.stack(each, 1) for each in zip(*taken))
        return ids, logps

    def keep(self, alive: Tensor, room: int) -> None:
        """Go on with these completions [M] int64, in order, and room for so many tokens of each."""
        self.row, self.token, self.room = self.row[alive], self.token[alive], room

    def _take(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        hidden, self.hidden = self.hidden, None
        logits = self.policy.logits(self._next_hidden() if hidden is None else hidden)
        if len(logits) < len(self.row):
            logits = logits.index_select(0, self.row)
        self.token, logps = self.choice.of(logits, numbers)
        return self.token, logps

    def _next_hidden(self) -> Tensor:
        """[D, H], each row now with completions whose last token is the same."""
        first, row = distinct(self.row * len(self.policy.head_weight) + self.token)
        rows, decoding = self.row.index_select(0, first), self.decoding
        same = torch.equal(rows, torch.arange(len(decoding.position), device=rows.device))
        if not same or self.room != decoding.room:
            decoding.resize(rows, self.room)
        self.row = row
        hidden = self.policy.next_hidden(decoding, self.token.index_select(0, first))
        decoding.length += 1
        return hidden


def distinct(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(where each of the D different keys among [N] comes first, ascending [D]; which of them each key is [N])."""
    _, of = keys.unique(return_inverse=True)
    place = torch.arange(len(keys), device=keys.device)
    first = torch.full_like(place[: int(of.max()) + 1], len(keys)).scatter_reduce_(0, of, place, "amin")
    first, order = first.sort()
    return first, order.argsort().index_select(0, of)


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

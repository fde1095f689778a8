"""Which token comes next: drawn from logits by random numbers that depend on nothing but the completion.

`torch.multinomial` is neither fast on a CPU (114 of the 155 ms that a token of [32, 151936] takes) nor tied to a row:
what it draws for one depends on all rows before. Here a row has a number of its own, and is searched for the token
into whose share of the sum that number falls.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens that are summed in float32; from there on it is float64, in which the sums of 151,936 tokens lose none.
BLOCK = 512


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen: see `Sampler.generate`. banned: [N] int64, never sampled."""

    banned: Tensor
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def of(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [B] int64, their log-probabilities [B] float32 among all tokens), from logits [B, V], used up.

        numbers: [B] float64, uniform in [0, 1). NaN among a row's logits makes its log-probability NaN.
        """
        scores = logits.float()
        if self.temperature not in (0, 1):
            scores.div_(self.temperature)
        # Apart, as they may have all of the probability: exp() would leave nothing of the others beside them.
        banned = scores[:, self.banned].logsumexp(-1)
        scores.index_fill_(1, self.banned, -torch.inf)
        if self.temperature == 0:
            token, allowed = scores.argmax(-1), scores.logsumexp(-1)
        elif self.top_k or self.top_p < 1:
            token, allowed = draw(likeliest(scores, self.top_k, self.top_p), numbers)[0], scores.logsumexp(-1)
        else:
            token, allowed = draw(scores, numbers)
        return token, scores.gather(1, token[:, None])[:, 0] - torch.logaddexp(allowed, banned)


def draw(scores: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """(a token [B] int64 from each row's softmax, the row's log-sum-exp [B] float32), of scores [B, V] float32.

    numbers: [B] float64, uniform in [0, 1). First a block of tokens is searched for, then the token in it, so that no
    sum runs over the whole row in float32: each token's share is right to a part in 10^6 of itself, however small.
    """
    B, V = scores.shape
    most = scores.amax(-1, keepdim=True)
    if V <= BLOCK:
        token, _, total = _search((scores - most).exp_(), numbers)
        return token, most[:, 0] + total.log().float()
    weights = scores.new_empty(B, -(-V // BLOCK), BLOCK)
    whole = weights.view(B, -1)
    whole[:, V:] = 0
    torch.sub(scores, most, out=whole[:, :V]).exp_()
    block, within, total = _search(weights.sum(-1), numbers)
    tokens = weights.gather(1, block[:, None, None].expand(B, 1, BLOCK))[:, 0]
    token, _, _ = _search(tokens, within)
    token = (block * BLOCK + token).clamp_(max=V - 1)  # NaN leads beyond
    return token, most[:, 0] + total.log().float()


def _search(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the place of the weight whose share the number falls into, the number within that share, the sum), [B] each.

    weights: [B, N], not negative; one of 0 is never found. numbers: [B] float64 in [0, 1).
    """
    ends = weights.cumsum(-1, dtype=torch.float64)
    total = ends[:, -1:]
    target = torch.minimum(numbers[:, None] * total, total.nextafter(torch.zeros_like(total)))  # rounding may reach it
    place = torch.searchsorted(ends, target, right=True).clamp_(max=weights.shape[1] - 1)  # NaN is beyond all
    share = weights.gather(1, place).double()
    within = 1 - (ends.gather(1, place) - target) / share
    return place[:, 0], within[:, 0].clamp_(0, 1), total[:, 0]


def likeliest(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores [B, V] with -inf for all but the tokens that `Sampler.generate` describes, one at least.

    Of tokens with the same probability at the border, top_k may leave some more.
    """
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, order = scores.softmax(-1).sort(descending=True, stable=True)
        enough = ordered.cumsum(-1) - ordered >= top_p  # the likelier ones reach top_p without this token
        scores = scores.masked_fill(enough.scatter(1, order, enough), -torch.inf)
    return scores


class Streams:
    """A stream of random numbers for each completion, which depends on its name alone.

    Python's own generator: what it draws for a string is the same on every machine and in every version.
    """

    def __init__(self, names: Iterable[str]):
        self.streams = [random.Random(name) for name in names]

    def next(self, count: int, device: torch.device) -> Tensor:
        """The next numbers [B, count] float64, uniform in [0, 1)."""
        numbers = [[stream.random() for _ in range(count)] for stream in self.streams]
        return torch.tensor(numbers, dtype=torch.float64).to(device)

    def keep(self, rows: Sequence[int]) -> None:
        self.streams = [self.streams[row] for row in rows]

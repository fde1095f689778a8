"""Drawing tokens: against exact probabilities, with the random numbers given."""

import random

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from mr1fast.model.sampling import BLOCK, Choice, Streams, draw, likeliest

NONE = torch.tensor([], dtype=torch.long)
QWEN = 151_936


def uniform(n: int, seed=0) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scores_of(V: int, spread=2.0, seed=0) -> torch.Tensor:
    return spread * torch.randn(V, generator=torch.Generator().manual_seed(seed))


def chi_squared(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How likely counts are as far off as these, or farther."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


def inverse(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """By the definition, in float64: the first token with which the probabilities exceed the number."""
    return torch.searchsorted(scores.double().softmax(-1).cumsum(-1), numbers, right=True)


@pytest.mark.parametrize("V", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_the_token_is_the_one_in_whose_share_the_number_falls(V):
    scores, numbers = scores_of(V), torch.cat([uniform(2000), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)])
    tokens, total = draw(scores.expand(len(numbers), V), numbers)
    torch.testing.assert_close(total, scores.double().logsumexp(-1).float().expand_as(total))
    wrong = tokens != inverse(scores, numbers)
    assert wrong.float().mean() < 1e-3  # a number within rounding of a border
    assert (tokens - inverse(scores, numbers)).abs().max() <= 1


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 8, 1.0), (1.0, 0, 0.8)]
)
def test_frequencies(temperature, top_k, top_p):
    """Chi-squared of 5,000 draws of 40 tokens, two of them banned."""
    logits, n = scores_of(40), 5000
    banned = torch.tensor([3, 11])
    choice = Choice(banned, temperature, top_k, top_p)
    tokens, logps = choice.of(logits.repeat(n, 1), uniform(n, seed=1))
    allowed = (logits.double() / temperature).index_fill(0, banned, -torch.inf)[None]
    allowed = TopKLogitsWarper(top_k)(None, allowed) if top_k else allowed
    allowed = TopPLogitsWarper(top_p)(None, allowed) if top_p < 1 else allowed
    expected = n * allowed[0].softmax(-1)
    counts = torch.bincount(tokens, minlength=40).double()
    assert (counts[expected == 0] == 0).all()
    common = expected > 5
    assert common.sum() > 4
    rare = (expected > 0) & ~common
    counts, expected = (torch.cat([x[common], x[rare].sum()[None]]) for x in (counts, expected))
    kept = expected > 0
    assert chi_squared(counts[kept], expected[kept]) > 1e-3
    everything = (logits.double() / temperature).log_softmax(-1)  # whatever has been filtered or banned
    torch.testing.assert_close(logps.double(), everything[tokens], atol=1e-5, rtol=0)


def borders(scores: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """For each of these tokens the least number with which it, or one after it, is drawn; by bisection."""
    low, high = torch.zeros(len(tokens), dtype=torch.float64), torch.ones(len(tokens), dtype=torch.float64)
    for _ in range(56):
        middle = (low + high) / 2
        reached = draw(scores.expand(len(tokens), -1), middle)[0] >= torch.tensor(tokens)
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def test_unlikely_tokens_of_a_large_vocabulary_have_their_share():
    """The second half has 4e-7 of the probability, a token of it 5e-12: float32 sums of the row would lose them."""
    half = QWEN // 2
    scores = scores_of(QWEN, 1.0)
    scores[half:] -= 14.7
    exact = scores.double().softmax(-1)
    assert 1e-7 < exact[half:].sum() < 1e-6
    one = half + 30_000
    stretches = [(half // 2, half), (half, QWEN), (half + 100, half + 900), (QWEN - 5000, QWEN), (one, one + 1)]
    found = 1 - borders(scores, [token for pair in stretches for token in pair if token < QWEN])
    ends = iter([*found.tolist()])
    for start, stop in stretches:
        share = next(ends) - (next(ends) if stop < QWEN else 0)
        assert share == pytest.approx(float(exact[start:stop].sum()), rel=1e-3), (start, stop)


def test_banned_tokens_may_have_all_of_the_probability():
    logits = torch.zeros(3, 20)
    logits[:, 4] = 1000.0
    tokens, logps = Choice(torch.tensor([4])).of(logits, torch.tensor([0.0, 0.5, 0.99], dtype=torch.float64))
    assert tokens.tolist() == [0, 10, 19]
    assert logps.tolist() == [-1000.0] * 3


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_logits_have_no_log_probability(broken):
    logits = scores_of(2000).repeat(2, 1)
    logits[1, 700] = broken
    tokens, logps = Choice(NONE).of(logits, uniform(2))
    assert logps.isnan().tolist() == [False, True]
    assert 0 <= int(tokens[1]) < 2000


def test_half_precision_is_drawn_from_as_it_is():
    logits = scores_of(1000).bfloat16()
    tokens, logps = Choice(NONE, 0.8).of(logits.repeat(500, 1), uniform(500))
    exact = (logits.double() / 0.8).log_softmax(-1)
    torch.testing.assert_close(logps.double(), exact[tokens], atol=1e-5, rtol=0)


def test_top_k_and_top_p_leave_what_transformers_leaves():
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 7] = -torch.inf  # a banned token
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.7), (5, 0.7), (1, 1.0), (0, 1e-6), (100, 1.0)):
        expected = logits
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        left = likeliest(logits, top_k, top_p)
        assert torch.equal(left, expected), (top_k, top_p)
        assert left.isfinite().any(1).all()


def test_a_stream_goes_on_whoever_else_leaves():
    streams = Streams(["0/0", "0/1", "1/0"])
    first = streams.next(3, torch.device("cpu"))
    streams.keep([0, 2])
    rest = torch.cat([first[[0, 2]], streams.next(2, torch.device("cpu"))], 1)
    for row, name in zip(rest.tolist(), ("0/0", "1/0")):
        alone = random.Random(name)
        assert row == [alone.random() for _ in range(5)]

"""rollout_correction against the formulas of TRL 1.16 and NeMo-RL, written out a token at a time."""

import math

import pytest
import torch
from loss_cases import packed, packing

from mr1fast import grpo_loss_from_logps, rollout_correction

B, L = 5, 7
CASES = [(mode, level) for mode in ("tis", "mis", "icepop") for level in ("token", "sequence")] + [
    ("seq-mask-tis", "token")
]


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, L, generator=g) * 3
    rollout = logps + 0.2 * torch.randn(B, L, generator=g) + torch.tensor([-0.7, 0.0, 0.02, 0.0, 0.7])[:, None]
    rollout[0, 1] = torch.nan  # missing
    mask = torch.rand(B, L, generator=g) < 0.8
    mask[3] = False
    return logps, rollout, mask


def plain(logps, rollout, mask, mode, level, low, high):
    """(ratio, whether it is outside of the bounds), nested lists."""
    ratios, cuts = [], []
    for b in range(B):
        used = [t for t in range(L) if mask[b, t]]
        diff = {t: 0.0 if math.isnan(rollout[b, t]) else float(logps[b, t]) - float(rollout[b, t]) for t in used}
        total = sum(diff.values())
        row, cut = [0.0] * L, [False] * L
        for t in used:
            w = math.exp(total if level == "sequence" else diff[t])
            judged = math.exp(total / len(used)) if mode == "seq-mask-tis" else w
            cut[t] = not low <= judged <= high
            row[t] = min(max(w, low), high) if mode == "tis" else 0.0 if cut[t] else w
        ratios.append(row)
        cuts.append(cut)
    return torch.tensor(ratios), torch.tensor(cuts)


@pytest.mark.parametrize("cap", [1.5, (0.7, 1.4)])
@pytest.mark.parametrize(("mode", "level"), CASES)
def test_modes(mode, level, cap):
    logps, rollout, mask = inputs()
    low, high = cap if isinstance(cap, tuple) else (1 / cap if mode in ("icepop", "seq-mask-tis") else 0.0, cap)
    wanted, cut = plain(logps, rollout, mask, mode, level, low, high)
    dirty = logps.masked_fill(~mask, torch.inf)
    ratio, kept, metrics = rollout_correction(dirty, rollout, mode=mode, level=level, cap=cap, completion_mask=mask)
    torch.testing.assert_close(ratio, wanted)
    assert torch.equal(kept, mask if mode == "tis" else mask & ~cut)
    assert 0 < cut.sum() < mask.sum(), "the case shows nothing"
    used = wanted[mask].double()
    assert metrics == {
        f"rollout_correction/{name}": pytest.approx(value, rel=1e-5)
        for name, value in {
            "mean": used.mean().item(),
            "min": used.min().item(),
            "max": used.max().item(),
            "effective_sample_size": (used.sum() ** 2 / (len(used) * used.square().sum())).item(),
            "cut_share": cut[mask].double().mean().item(),
            "logp_difference": (logps - rollout)[mask].nan_to_num().abs().mean().item(),
        }.items()
    }


@pytest.mark.parametrize(("mode", "level"), CASES)
def test_packed(mode, level):
    select, cu_seqlens = packing((7, 2, 0, 5, 3))
    logps, rollout, mask = inputs()
    settings = {"mode": mode, "level": level, "cap": 1.3}
    ratio, kept, metrics = rollout_correction(logps, rollout, completion_mask=mask & select, **settings)
    flat = packed({"per_token_logps": logps, "rollout_logps": rollout, "completion_mask": mask}, select)
    found = rollout_correction(**flat, cu_seqlens=cu_seqlens, **settings)
    torch.testing.assert_close(found[0], ratio[select])
    assert torch.equal(found[1], kept[select])
    assert found[2] == pytest.approx(metrics)


def test_in_the_loss():
    logps, rollout, mask = inputs()
    advantages = torch.randn(B)
    ratio, kept, _ = rollout_correction(logps, rollout, mode="mis", cap=1.3, completion_mask=mask)
    arguments = {"advantages": advantages, "importance_sampling_ratio": ratio, "reduction": "sum"}
    with_weights = grpo_loss_from_logps(logps, completion_mask=mask, **arguments)
    without_tokens = grpo_loss_from_logps(logps, completion_mask=kept, **arguments)
    torch.testing.assert_close(with_weights.loss, without_tokens.loss)  # there is no KL
    torch.testing.assert_close(with_weights.loss, -(advantages[:, None] * ratio).sum())


def test_extreme_log_probabilities():
    inf = torch.inf
    logps, rollout = torch.tensor([[-inf, -1.0, -inf, -1.0]]), torch.tensor([[-inf, -inf, -1.0, -500.0]])
    for mode, level in CASES:
        ratio, _, metrics = rollout_correction(logps, rollout, mode=mode, level=level)
        assert not ratio.isnan().any(), (mode, level)
        if level == "token" and mode == "tis":
            assert ratio.tolist() == [[1.0, 2.0, 0.0, 2.0]]
        assert 0 <= metrics["rollout_correction/effective_sample_size"] <= 1


def test_bad_arguments():
    logps, rollout, _ = inputs()
    for bad, message in [
        ({"mode": "tsi"}, "mode must be one of tis, mis, icepop, seq-mask-tis, got 'tsi'"),
        ({"level": "geometric"}, "level must be one of token, sequence"),
        ({"mode": "seq-mask-tis", "level": "sequence"}, "level must be 'token' with mode='seq-mask-tis'"),
        ({"cap": 0}, "cap must be a finite number > 0"),
        ({"cap": (2.0, 1.0)}, "cap must have its lower bound below its upper bound"),
        ({"cap": (1, 2, 3)}, "cap must be the upper bound"),
        ({"completion_mask": torch.ones(L)}, "completion_mask must be"),
        ({"rollout_logps": rollout[:, 1:]}, "rollout_logps must be"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"per_token_logps must be .* with cu_seqlens, got \[5, 7\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            rollout_correction(**({"per_token_logps": logps, "rollout_logps": rollout} | bad))

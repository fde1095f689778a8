"""--dynamic-sampling and --mask-truncated: which groups and which completions a step trains on."""

import pytest
import torch
from oracle import oracle
from test_trainer import make_trainer, weights

from mr1fast.data.example import Example
from mr1fast.model.load import load_processor
from mr1fast.model.rollout import Rollout
from mr1fast.options.reward_weights import Reward
from mr1fast.training.batch import batch_logps
from mr1fast.training.groups import MOST_BATCHES, Groups, Shortage, refill
from mr1fast.training.order import rows_of_step

G = 2


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def groups_of(rows, rewards, L=3) -> Groups:
    """Groups of two completions of L tokens, whose first token is the row of their prompt."""
    B = len(rows) * G
    ids = torch.tensor(rows).repeat_interleave(G)[:, None].expand(B, L)
    total = torch.tensor(rewards).flatten()
    rollout = Rollout(ids, torch.ones(B, L).bool(), -ids.float(), [str(row) for row in rows for _ in range(G)])
    return Groups(rows, [Example(None, str(row), "", "") for row in rows], rollout, {"some": total}, total)


AGREE, DIFFER, ABSENT, ONE = [0.5, 0.5], [0.0, 1.0], [torch.nan, torch.nan], [1.0, torch.nan]


def test_groups_that_agree_are_replaced_by_the_next_that_do_not():
    further = [groups_of([4, 5, 6], [AGREE, DIFFER, ABSENT], L=5), groups_of([7, 8], [DIFFER, DIFFER])]
    asked = []

    def sample(place, count):
        asked.append((place, count))
        return further.pop(0)

    sampled, chosen = refill(groups_of([0, 1, 2, 3], [AGREE, DIFFER, ONE, ABSENT]), sample)
    assert asked == [(4, 3), (7, 2)]
    assert sampled.rows == list(range(9))
    kept = sampled.take(chosen)
    assert kept.rows == [5, 1, 7, 8]
    assert kept.teach == [True] * 4
    assert kept.total.tolist() == kept.scores["some"].tolist() == [0.0, 1.0] * 4
    assert kept.rollout.completions == [example.problem for example in kept.repeated] == list("55117788")
    lengths = kept.rollout.completion_mask.sum(1)
    assert lengths.tolist() == [5, 5, 3, 3, 3, 3, 3, 3]
    for row, ids, logps, length in zip(
        kept.rows * 2, kept.rollout.completion_ids[::2], kept.rollout.per_token_logps[::2], lengths[::2]
    ):
        assert (ids[:length] == row).all()
        assert torch.equal(logps[:length], -ids[:length].float())


def test_the_search_has_a_bound_which_is_said_once(capsys):
    first = groups_of([0, 1], [DIFFER, AGREE])
    sampled, chosen = refill(first, lambda place, count: groups_of([9] * count, [AGREE] * count))
    assert len(sampled.rows) == MOST_BATCHES * 2
    assert chosen == [0, 1]
    shortage = Shortage()
    for _ in range(2):
        metrics = shortage.metrics(sampled, sampled.take(chosen))
    assert metrics == {"dynamic_sampling/prompts": 20, "dynamic_sampling/unfilled": 1}
    said = "after 20 prompts, 10 times those of a step, all rewards still agree in 1 of 2 groups"
    assert capsys.readouterr().err.count(said) == 1


def test_further_prompts_are_the_next_in_the_order(processor, one_thread):
    """Rewards differ in every second batch that is sampled."""
    trainer, seen, calls = make_trainer(processor, dynamic_sampling=True, temperature=1.5), [], []

    def reward(completions, solutions, **columns):
        calls.append(len(completions))
        return [float(i % 4 if len(calls) % 2 == 0 else 0) for i in range(len(completions))]

    trainer.rewards = [Reward("some", 1.0, reward)]
    real = trainer._sample

    def sample(rows, place=0):
        sampled = real(rows, place)
        seen.extend(rows)
        return sampled

    trainer._sample = sample
    steps = [trainer.step() for _ in range(3)]
    assert seen == rows_of_step(0, 0, len(seen), 7), "whatever a step takes, the next goes on behind it"
    assert trainer.further_prompts == len(seen) - 3 * 2 > 0
    assert sum(step["dynamic_sampling/prompts"] for step in steps) == len(seen)
    assert [step["dynamic_sampling/unfilled"] for step in steps] == [0, 0, 0]
    assert [step["frac_reward_zero_std"] for step in steps] == [0.5, 0.5, 0.5], "of all that was sampled"


def test_completions_that_were_cut_off_do_not_count(processor, one_thread):
    options = {"mask_truncated": True, "temperature": 3.0, "method": "grpo", "beta": 0.1, "max_completion_length": 8}
    trainer = make_trainer(processor, loss="loss_type=dapo", **options)
    generate, end = trainer.sampler.generate, trainer.policy.end_ids

    def two_end(*arguments, **keywords):
        """Of what was sampled, the second and the last completion end with their third and their eighth token."""
        sampled = generate(*arguments, **keywords)
        ids, mask = torch.full((8, 8), 7), torch.ones(8, 8).bool()
        ids[:, : sampled.completion_ids.shape[1]] = sampled.completion_ids
        ids[torch.isin(ids, end)] = 7
        ids[1, 2] = ids[7, 7] = end[0]
        mask[1, 3:] = False
        return Rollout(ids, mask, torch.zeros(8, 8), sampled.completions)

    trainer.sampler.generate = two_end
    data = trainer.step_data = trainer.collect()
    batch = data.batch
    ended = torch.tensor([False, True, False, False, False, False, False, True])
    assert torch.equal(batch.completion_mask.any(1), ended)
    assert data.metrics["completions/clipped_ratio"] == 0.75
    assert data.metrics["completions/max_length"] == 8
    tokens = batch.inputs["attention_mask"].sum().item() * 4 + data.metrics["completions/mean_length"] * 8
    assert trainer.num_tokens == pytest.approx(tokens), "what was sampled, whether it counts in the loss or not"
    with torch.no_grad():
        logps = batch_logps(trainer.policy, batch, 3.0).double()[ended]
    expected = oracle(
        torch.stack([logps, torch.log1p(-logps.exp())], -1),
        torch.zeros_like(batch.completion_ids[ended]),
        batch.advantages[ended],
        completion_mask=batch.completion_mask[ended],
        ref_per_token_logps=batch.ref_per_token_logps[ended],
        beta=0.1,
        loss_type="dapo",
    )
    assert trainer.step()["loss"] == pytest.approx(expected["loss"].item(), abs=1e-6)


def test_a_step_whose_every_completion_was_cut_off_changes_no_weight(processor, one_thread):
    trainer = make_trainer(processor, mask_truncated=True, max_completion_length=2, temperature=1.5)
    before = weights(trainer)
    assert trainer.step()["skipped_steps"] == 1
    assert trainer.skipped_sample["reason"] == "every completion was cut off, and --mask-truncated is on"
    assert len(trainer.skipped_sample["examples"]) == 2
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())

from itertools import pairwise

import pytest
import torch

from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.model import decoding, steps
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import encode_prompts, take_prompts
from mr1fast.model.rollout import Rollout, Sampler
from mr1fast.model.steps import Pace
from mr1fast.training.batch import (
    Batch,
    Whole,
    batch_logps,
    grpo_batch_loss,
    pieces_of,
    sft_batch_loss,
    tokens_of,
    weighted,
)
from tests.tiny import END, EOS, IMAGE, PAD, START, VIDEO, VOCABULARY, joined, tiny_inputs, tiny_model, tiny_policy

BANNED = [IMAGE, VIDEO, START, END, PAD]


def plain_logps(model, inputs, ids, mask, G, temperature):
    """Log-probs by one plain forward of transformers over whole sequences."""
    logits = model(**joined(inputs, ids, mask, G)).logits[:, -ids.shape[1] - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0] * mask


def placed(model=None):
    """A policy, and the tiny prompts on it."""
    policy = tiny_policy(model or tiny_model())
    return policy, policy.place(tiny_inputs())


def sample(policy, inputs, *, G=3, L=12, temperature=0.9, seed=5, pace=None, first=0, **filters) -> Rollout:
    """`inputs` of `Policy.place`, in place of examples; `first`: the place of the first of them in a larger batch."""
    sampler = Sampler(policy, max_completion_length=L, pace=pace)
    with torch.no_grad():
        prefix = policy.encode_prefix(inputs)
    streams = [f"{seed}/{first + place}" for place in range(len(prefix.last_hidden))]
    return sampler.generate([], num_generations=G, temperature=temperature, prefix=prefix, streams=streams, **filters)


def make_batch(policy, inputs, G=3, temperature=0.9) -> Batch:
    rollout = sample(policy, inputs, G=G, temperature=temperature)
    B = rollout.completion_ids.shape[0]
    rng = torch.Generator().manual_seed(2)
    return Batch(
        inputs=inputs,
        num_generations=G,
        completion_ids=rollout.completion_ids,
        completion_mask=rollout.completion_mask,
        advantages=torch.randn(B, generator=rng),
        ref_per_token_logps=rollout.per_token_logps + 0.1 * torch.randn(rollout.per_token_logps.shape, generator=rng),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("seed", "window"), [(0, None), (1, None), (2, None), (2, 4)])
def test_greedy_equals_generate_of_transformers(attention, seed, window):
    """Completions leave as soon as they end."""
    model, inputs = tiny_model(seed, attention, window=window), tiny_inputs(seed)
    policy = tiny_policy(model)
    ours = sample(policy, policy.place(inputs), G=1, temperature=0, pace=Pace(1, 0, 2))
    theirs = model.generate(**inputs, max_new_tokens=12, suppress_tokens=BANNED)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(ours.completion_ids, theirs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_equal_a_plain_forward(attention, temperature):
    policy, inputs = placed(tiny_model(attention=attention))
    rollout = sample(policy, inputs, G=6, temperature=temperature)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    assert 0 < mask.sum() < mask.numel()
    with torch.no_grad():
        expected = plain_logps(policy.model, inputs, ids, mask, 6, temperature)
        ours = batch_logps(policy, Batch(inputs, 6, ids, mask), temperature)
    torch.testing.assert_close(rollout.per_token_logps.double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.double(), expected, atol=2e-5, rtol=1e-5)


def test_prompts_with_no_image_and_with_three_share_their_prefix_too():
    """One with three images, one with none, one with one: each as if it stood alone, whole and in pieces."""
    policy = Policy(load_model().eval(), load_processor())
    images = [TASKS["vc"].example("test", index).image.resize((56, 56 + 28 * index)) for index in range(4)]
    examples = [
        Example(images[0], "Are <image>, <image> and <image> alike?", "", more_images=tuple(images[1:3])),
        Example(None, "How many?", ""),
        Example(images[3], "How many?", ""),
    ]
    inputs = policy.encode(examples)
    rollout = sample(policy, inputs, G=2, L=6, temperature=1.0)
    batch = Batch(inputs, 2, rollout.completion_ids, rollout.completion_mask)
    with torch.no_grad():
        whole = batch_logps(policy, batch)
        pieces = torch.cat([batch_logps(policy, piece) for piece in map(batch.take, pieces_of(batch, equal=3))])
        for row, example in enumerate(examples):
            alone, each = encode_prompts(policy.processor, [example]), slice(2 * row, 2 * row + 2)
            ids, mask = batch.completion_ids[each], batch.completion_mask[each]
            expected = torch.cat([plain_row(policy.model, alone, ids[i : i + 1], mask[i : i + 1]) for i in range(2)])
            torch.testing.assert_close(whole[each].double(), expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=1e-5)


def plain_row(model, inputs, ids, mask):
    if "image_grid_thw" in inputs:
        return plain_logps(model, inputs, ids, mask, 1, 1.0)
    logits = model(input_ids=torch.cat([inputs["input_ids"], ids], 1)).logits[:, -ids.shape[1] - 1 : -1].double()
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0] * mask


def test_the_shared_prefix_has_the_gradient_of_whole_sequences():
    model = tiny_model(tied=False).double()
    policy, inputs = placed(model)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    rollout = sample(policy, inputs)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    for tensor in (ids, mask):  # one completion twice, another three times, one also of another prompt
        tensor[2], tensor[4], tensor[5], tensor[11] = tensor[0], tensor[3], tensor[3], tensor[6]
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for logps in (batch_logps(policy, Batch(inputs, 3, ids, mask), 0.8), plain_logps(model, inputs, ids, mask, 3, 0.8)):
        (logps * weight).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() == dict(model.named_parameters()).keys()
    for name in gradients[0]:
        ours, theirs = gradients[0][name], gradients[1][name]
        # Not float64's accuracy: the model's norms compute in float32 whatever its dtype.
        assert (ours - theirs).norm() < 2e-6 * theirs.norm() + 1e-6, name
        assert theirs.norm() > 0, name


def test_completions_of_one_token():
    policy, inputs = placed()
    rollout = sample(policy, inputs, L=1)
    assert rollout.completion_ids.shape == (12, 1)
    logps = batch_logps(policy, Batch(inputs, 3, rollout.completion_ids, rollout.completion_mask), 0.9)
    torch.testing.assert_close(logps, rollout.per_token_logps, atol=2e-5, rtol=1e-5)


def test_what_is_sampled():
    policy, inputs = placed()
    with torch.no_grad():  # a model that is fond of what it must not say
        policy.head_weight[BANNED] += 2 * policy.head_weight.norm(dim=1).max()
    rollout = sample(policy, inputs, G=16, L=20)
    ids, mask = rollout.completion_ids, rollout.completion_mask
    assert policy.banned_ids.tolist() == sorted(BANNED)
    assert not torch.isin(ids[mask], torch.tensor(BANNED)).any()
    assert (ids[~mask] == PAD).all()
    assert (rollout.per_token_logps[~mask] == 0).all()
    assert (rollout.per_token_logps[mask] <= 0).all()
    assert not any(each.is_inference() for each in (ids, mask, rollout.per_token_logps))  # autograd may save them
    for row, keep in zip(ids.tolist(), mask.tolist()):
        end = row.index(EOS) + 1 if EOS in row else len(row)
        assert keep == [t < end for t in range(len(row))]


def test_the_seed_decides():
    policy, inputs = placed()
    first, again, other = (sample(policy, inputs, seed=seed).completion_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


GRAPH = Pace(3, 0, 8, graph=True)


def same(ours: Rollout, theirs: Rollout) -> None:
    assert torch.equal(ours.completion_mask, theirs.completion_mask)
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    torch.testing.assert_close(ours.per_token_logps, theirs.per_token_logps, atol=2e-5, rtol=1e-5)


def row_by_row(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask)]


def test_a_completion_is_the_same_whatever_is_sampled_with_it():
    policy, inputs = placed()
    whole = row_by_row(sample(policy, inputs, G=4))
    for pieces in ([(0, 1), (1, 3), (3, 4)], [(2, 4), (0, 2)]):  # other micro-batches, in another order
        for start, stop in pieces:
            part = sample(policy, take_prompts(inputs, range(start, stop)), G=4, first=start)
            assert row_by_row(part) == whole[4 * start : 4 * stop]
    assert row_by_row(sample(policy, inputs, G=2)) == [row for i, row in enumerate(whole) if i % 4 < 2]


def test_without_names_torch_seeds_the_streams():
    policy, inputs = placed()
    with torch.no_grad():
        prefix = policy.encode_prefix(inputs)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sampler = Sampler(policy, max_completion_length=12)
        drawn += [row_by_row(sampler.generate([], num_generations=3, prefix=prefix)) for _ in range(2)]
    assert drawn[0:2] == drawn[2:4]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[4]


@pytest.mark.parametrize(
    ("pace", "window"),
    [
        (Pace(1, 0, 4), None),
        (Pace(2, 40, 1), 3),
        (GRAPH, None),
        (GRAPH, 3),
        (Pace(1, 0, 4, merge=True), None),
        (Pace(3, 40, 5, merge=True), 3),
        (Pace(12, 0, 12, merge=True), None),
    ],
)
def test_the_pace_changes_nothing(pace, window, monkeypatch, poisoned):
    """With the static cache of a CUDA graph, too, whose step runs here without being captured."""
    captured = []
    monkeypatch.setattr(steps, "Captured", lambda step: captured.append(step) or step)
    resized, resize = [], decoding.Decoding.resize
    monkeypatch.setattr(decoding.Decoding, "resize", lambda *args: resized.append(args) or resize(*args))
    policy, inputs = placed(tiny_model(window=window))
    plain = sample(policy, inputs, G=8, L=12, pace=Pace(12, 0, 12))
    assert not resized
    lengths = plain.completion_mask.sum(1)
    assert len(lengths.unique()) > 2
    same(sample(policy, inputs, G=8, L=12, pace=pace), plain)
    assert resized
    assert len(captured) == (len(resized) + 1 if pace.graph else 0)


@pytest.mark.parametrize("pace", [Pace(12, 0, 12), GRAPH])
def test_autograd_keeps_nothing_of_what_is_sampled(pace, monkeypatch):
    monkeypatch.setattr(steps, "Captured", lambda step: step)
    policy, inputs = placed()
    assert policy.head_weight.requires_grad
    seen, logits = [], policy.logits
    monkeypatch.setattr(policy, "logits", lambda hidden: seen.append(logits(hidden)) or seen[-1])
    sample(policy, inputs, pace=pace)
    assert seen
    assert not any(each.requires_grad for each in seen)


def test_completions_leave_if_that_saves_enough(monkeypatch):
    kept, resize = [], decoding.Decoding.resize
    monkeypatch.setattr(decoding.Decoding, "resize", lambda *args: kept.append(len(args[1])) or resize(*args))
    policy, inputs = placed()
    lengths = sample(policy, inputs, G=8, L=12, pace=Pace(12, 0, 12)).completion_mask.sum(1)
    assert not kept
    found = []
    for least in (0, 12, 24, 10**6):
        kept.clear()
        sample(policy, inputs, G=8, L=12, pace=Pace(2, least, 12))
        expected, rows = [], 32
        for stop in range(2, 12, 2):
            alive = int((lengths > stop).sum())
            if alive and 0 < (rows - alive) * (12 - stop) >= least:
                expected.append(alive)
                rows = alive
        assert kept == expected, least
        found.append(len(kept))
    assert found[0] > found[1] > found[3] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_completions_run_once_as_long_as_they_are_the_same(temperature, monkeypatch):
    policy, inputs = placed()
    run, next_hidden = [], policy.next_hidden
    monkeypatch.setattr(policy, "next_hidden", lambda state, ids: run.append(len(ids)) or next_hidden(state, ids))
    rollout = sample(policy, inputs, G=8, L=12, temperature=temperature, pace=Pace(1, 0, 12, merge=True))
    rows = row_by_row(rollout)
    expected = [len({(i // 8, *row[:t]) for i, row in enumerate(rows) if len(row) > t}) for t in range(1, 12)]
    assert run == [count for count in expected if count]
    assert run[0] < 32
    assert temperature or max(run) <= 4


def test_distinct():
    first, of = steps.distinct(torch.tensor([7, 3, 7, 9, 3, 0]))
    assert first.tolist() == [0, 1, 3, 5]
    assert of.tolist() == [0, 1, 0, 2, 1, 3]


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that has not been written holds NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda like, *size: new_empty(like, *size).fill_(torch.nan))


def test_a_static_step_keeps_its_tensors():
    """What a CUDA graph needs: replayed, a step finds and leaves everything where it was."""
    policy, inputs = placed()
    with torch.no_grad():
        prefix = policy.encode_prefix(inputs)
        state = decoding.Decoding(prefix, prefix.prompts_of(8), room=4, static=True)

        def held():
            return [t.data_ptr() for t in (state.place, state.position, *(b for pair in state.buffers for b in pair))]

        before, ids = held(), torch.arange(8)
        for length in range(3):
            assert state.place.item() == length
            policy.next_hidden(state, ids)
        assert held() == before


def test_attention_on_a_gpu_is_that_on_a_cpu():
    rng = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(3, 2, n, 8, generator=rng) for n in (5, 7, 7))
    hidden = torch.rand(3, 7, generator=rng) < 0.3
    for bias in (None, decoding._bias(hidden, query)):
        plain = decoding.plain_attention(query, keys, values, bias, 0.3)
        for ours, theirs in zip(decoding.attention(query, keys, values, bias, 0.3), plain):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_sampling_follows_the_distribution():
    """Chi-squared of 4,000 first tokens against the model's softmax, banned tokens left out."""
    policy, inputs = placed()
    rollout = sample(policy, take_prompts(inputs, [0]), G=4000, L=1, temperature=1.3)
    with torch.no_grad():
        probabilities = (policy.model(**take_prompts(tiny_inputs(), [0])).logits[0, -1].double() / 1.3).softmax(-1)
    probabilities[BANNED] = 0
    expected = 4000 * probabilities / probabilities.sum()
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=VOCABULARY).double()
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum() / common.sum()
    assert statistic < 2


def test_several_end_tokens_and_a_pad_that_is_one_of_them():
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, PAD]
    policy, inputs = placed(model)
    assert policy.end_ids.tolist() == [EOS, PAD]
    assert PAD not in policy.banned_ids
    rollout = sample(policy, inputs, G=16, L=20)
    ended = rollout.completion_ids[rollout.completion_mask]
    assert (ended == PAD).any()
    assert (ended == EOS).any()


def test_a_broken_model_is_reported():
    policy, inputs = placed()
    with torch.no_grad():
        policy.model.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="hidden states are not finite"):
        sample(policy, inputs)
    policy, inputs = placed(tiny_model(tied=False))
    with torch.no_grad():
        policy.head_weight[7] = torch.nan
    with pytest.raises(UserError, match="logits are not finite"):
        sample(policy, inputs)


def test_decode_keeps_tags_that_are_special():
    policy = tiny_policy(tiny_model())
    policy.processor.tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})
    ids = torch.tensor([[7, 3, EOS, PAD], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert policy.decode(ids, mask) == ["w7 w3", "w1 w2 w3 w4"]
    again, again_mask = policy.encode_completions(["w7 w3", "w1"])
    assert again.tolist() == [[7, 3, EOS], [1, EOS, PAD]]
    assert again_mask.tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sft"])
def test_pieces_add_up_to_the_gradient_of_the_batch(seed, loss_type):
    """Prompts in any order, in pieces of any size."""
    policy, inputs = placed()
    batch, model = make_batch(policy, inputs), policy.model
    loss = {"loss_type": "grpo" if loss_type == "sft" else loss_type}
    whole = Whole(len(batch.completion_ids), batch.completion_mask.sum().item(), 12)
    weighted_batch, keywords = weighted(batch, loss, whole)

    def gradient(pieces):
        model.zero_grad()
        losses = 0.0
        for prompts in pieces:
            piece = weighted_batch.take(prompts)
            if loss_type == "sft":
                value = sft_batch_loss(policy, piece)
            else:
                value = grpo_batch_loss(policy, piece, beta=0.1, temperature=0.9, **keywords).loss
            value.backward()
            losses += value.item()
        return losses, torch.cat([p.grad.flatten() for p in model.parameters()])

    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=rng).tolist()
    cuts = [0, *(i for i in (1, 2, 3) if torch.rand((), generator=rng) < 0.6), 4]
    pieces = [order[start:stop] for start, stop in pairwise(cuts)]
    total, found = gradient(pieces)
    expected_total, expected = gradient([range(4)])
    assert total == pytest.approx(expected_total, rel=1e-5)
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("seed", range(20))
def test_pieces_by_tokens_are_full_and_the_longest_come_first(seed):
    rng = torch.Generator().manual_seed(seed)
    inputs = placed()[1]
    P, G, L = 4, 3, 40
    lengths = torch.randint(0, L + 1, (P * G, 1), generator=rng)
    batch = Batch(inputs, G, torch.zeros(P * G, L, dtype=torch.long), torch.arange(L) < lengths)
    patches = [16, 32, 0, 32]
    prompts = inputs["attention_mask"].sum(1).tolist()
    sizes = [prompts[p] + patches[p] + int(lengths.view(P, G)[p].sum()) for p in range(P)]
    assert tokens_of(batch) == sizes
    most = int(torch.randint(1, 400, (), generator=rng))
    pieces = pieces_of(batch, most_tokens=most)
    assert sorted(prompt for piece in pieces for prompt in piece) == [*range(P)]
    held = [sum(sizes[prompt] for prompt in piece) for piece in pieces]
    assert all(tokens <= most or len(piece) == 1 for tokens, piece in zip(held, pieces))
    firsts = [max(sizes[prompt] for prompt in piece) for piece in pieces]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0] == max(sizes)
    for i in range(len(pieces)):  # none could have been filled with what came later
        assert all(held[i] + min(sizes[p] for p in later) > most for later in pieces[i + 1 :])


def test_old_logps_and_kl_reach_the_loss():
    policy, inputs = placed()
    batch = make_batch(policy, inputs)
    output = grpo_batch_loss(policy, batch, beta=0.1, temperature=0.9)
    with torch.no_grad():
        expected = plain_logps(policy.model, inputs, batch.completion_ids, batch.completion_mask, 3, 0.9)
    torch.testing.assert_close(batch.padded(output.per_token_logps).double(), expected, atol=2e-5, rtol=1e-5)
    assert output.kl.sum() > 0
    old = batch.ref_per_token_logps
    clipped = grpo_batch_loss(policy, Batch(**{**vars(batch), "old_per_token_logps": old * 2}), beta=0, temperature=0.9)
    assert clipped.is_high_clipped.any()
    assert not torch.equal(clipped.loss, output.loss)


def test_top_k_changes_what_is_sampled_and_not_the_log_probabilities():
    policy, inputs = placed()
    only_likeliest = sample(policy, inputs, temperature=3.0, top_k=1)
    assert torch.equal(only_likeliest.completion_ids, sample(policy, inputs, temperature=0).completion_ids)
    mask = only_likeliest.completion_mask
    expected = plain_logps(policy.model, inputs, only_likeliest.completion_ids, mask, 3, 3.0)
    torch.testing.assert_close(only_likeliest.per_token_logps.double(), expected, atol=1e-5, rtol=0)

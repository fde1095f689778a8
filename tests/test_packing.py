"""The packed pass: outputs and gradients of the plain padded one, and nothing computed twice."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from mr1fast.model import varlen
from mr1fast.model.adapter import add_adapter
from mr1fast.model.packing import Packed
from mr1fast.model.prompts import take_prompts
from mr1fast.model.segments import Segments
from mr1fast.model.varlen import KERNELS, SharedPrefix, attention, kernel_for
from mr1fast.training.batch import Batch, grpo_batch_loss
from tests.tiny import EOS, tiny_inputs, tiny_model, tiny_policy

# ---- attention ------------------------------------------------------------------------------------------------------


def dense(query, key, value, prompts, completions, scale):
    """With a mask of the whole row: prompts first, then the completions [[length]] of each."""
    T = len(query)
    allowed = torch.zeros(T, T, dtype=torch.bool)
    ends = torch.tensor(prompts).cumsum(0).tolist()
    first = sum(prompts)
    for length, end in zip(prompts, ends):
        allowed[end - length : end, end - length : end] = torch.ones(length, length).tril().bool()
    for length, end, of_prompt in zip(prompts, ends, completions):
        for own in of_prompt:
            here = slice(first, first + own)
            allowed[here, end - length : end] = True
            allowed[here, here] = torch.ones(own, own).tril().bool()
            first += own
    key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("kernel", KERNELS[1:], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
@pytest.mark.parametrize("prompts_before", [False, True])
def test_attention_on_a_shared_prefix_equals_a_dense_mask(kernel, heads, prompts_before):
    """One group of short and long completions, one without any token to run, one of a single completion."""
    prompts, completions = [5, 9, 5, 30], [[1, 3, 40], [], [2], [30, 31, 12, 1]]
    runs = [length for of_prompt in completions for length in of_prompt]
    device, N = torch.device("cpu"), sum(prompts)
    on_prompts = Segments([*map(sum, completions)], prompts, causal=False, device=device)
    rng = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(N + sum(runs), n, 8, generator=rng, dtype=torch.float64, requires_grad=True)
        for n in (heads[0], heads[1], heads[1])
    )
    expected = dense(query, key, value, prompts, completions, 0.3)
    if prompts_before:
        itself = Segments(runs, causal=True, device=device)
        layout = SharedPrefix(0, itself, on_prompts, [(key[:0], value[:0]), (key[:N], value[:N])])
        found, expected = attention(query[N:], key[N:], value[N:], layout, kernel, 0.3, layer=1), expected[N:]
    else:
        layout = SharedPrefix(N, Segments([*prompts, *runs], causal=True, device=device), on_prompts)
        found = attention(query, key, value, layout, kernel, 0.3)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=rng, dtype=torch.float64)
    gradients, theirs = (torch.autograd.grad((out * weight).sum(), (query, key, value)) for out in (found, expected))
    torch.testing.assert_close(gradients, theirs)


def test_kernels_for_a_gpu_take_what_they_are_given(monkeypatch):
    """PyTorch's FlashAttention with the arithmetic of the eager kernel in its place: [heads, T] for a log-sum-exp."""
    flash, eager = KERNELS[0], KERNELS[-1]
    device = torch.device("cpu")

    def segments(cu_q, cu_k, max_q, max_k, causal):
        lengths, key_lengths = (bounds.diff().tolist() for bounds in (cu_q, cu_k))
        assert (cu_q.dtype, cu_k.dtype, max_q, max_k) == (torch.int32, torch.int32, max(lengths), max(key_lengths))
        return Segments(lengths, None if causal else key_lengths, causal=causal, device=device)

    class Aten:
        @staticmethod
        def _flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, mask, *, scale):
            assert (dropout, mask) == (0, False)
            out, lse = eager.forward(q, k, v, segments(cu_q, cu_k, max_q, max_k, is_causal), scale)
            return out, lse.t().contiguous(), None, None, None

        @staticmethod
        def _flash_attention_backward(
            grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, rng, unused, *, scale
        ):
            assert dropout == 0
            assert grad.is_contiguous()
            assert lse.is_contiguous()
            assert lse.shape == (q.shape[1], len(q))
            made = segments(cu_q, cu_k, max_q, max_k, is_causal)
            return eager.backward(grad, q, k, v, out, lse.t(), made, scale)

    monkeypatch.setattr(varlen, "aten", Aten)
    for prompts_before in (False, True):
        test_attention_on_a_shared_prefix_equals_a_dense_mask(flash, (4, 2), prompts_before)


def test_pytorchs_flash_attention_has_these_arguments():
    """On tensors without numbers, which its schema and shapes decide."""
    segments = Segments([3, 4], [5, 2], causal=False, device=torch.device("meta"))
    query = torch.empty(7, 4, 8, dtype=torch.bfloat16, device="meta")
    key = torch.empty(7, 2, 8, dtype=torch.bfloat16, device="meta")
    out, lse = KERNELS[0].forward(query, key, key, segments, 0.3)
    assert (out.shape, lse.shape, lse.dtype) == (query.shape, (7, 4), torch.float32)
    gradients = KERNELS[0].backward(out, query, key, key, out, lse, segments, 0.3)
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, key.shape]


def test_which_kernel_runs():
    cpu = torch.device("cpu")
    assert kernel_for(cpu, torch.float32) is kernel_for(cpu, torch.bfloat16) is KERNELS[1]
    assert kernel_for(cpu, torch.float32, eager=True) is KERNELS[2]
    assert kernel_for(torch.device("cuda"), torch.float32) is KERNELS[2]
    assert KERNELS[0].why_not(cpu, torch.bfloat16) == "it needs a CUDA device"


# ---- models ---------------------------------------------------------------------------------------------------------


def tiny_2_5():
    """A Qwen2.5-VL whose images are of several windows in one of its two layers of vision."""
    of = tiny_model().config.to_dict()
    vision = {key: of["vision_config"][key] for key in ("num_heads", "patch_size", "initializer_range")}
    vision |= {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16}
    torch.manual_seed(0)
    special = {name: of[name] for name in of if name.endswith("_token_id") and of[name] is not None}
    config = Qwen2_5_VLConfig(
        text_config={**of["text_config"], "model_type": "qwen2_5_vl_text"},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **special,
    )
    config._attn_implementation = "sdpa"
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = tiny_model().generation_config
    return model.eval()


def adapted():
    model = add_adapter(tiny_model(), rank=2, seed=3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
    return model.eval()


def batch_of(policy, prompts, lengths, seed=0) -> Batch:
    """These of the tiny prompts, each with completions [[length]] of random tokens; the first two are the same."""
    rng = torch.Generator().manual_seed(seed)
    inputs = take_prompts(policy.place(tiny_inputs()), prompts)
    flat = torch.tensor(lengths).flatten()
    ids = torch.randint(0, 50, (len(flat), int(flat.max())), generator=rng)
    if flat[0] == flat[1]:
        ids[1] = ids[0]
    mask = torch.arange(ids.shape[1]) < flat[:, None]
    logps = torch.randn(ids.shape, generator=rng) - 4
    return Batch(
        inputs,
        len(lengths[0]),
        ids.masked_fill(~mask, EOS),
        mask,
        advantages=torch.randn(len(flat), generator=rng),
        ref_per_token_logps=logps,
        old_per_token_logps=logps + 0.1 * torch.randn(ids.shape, generator=rng),
    )


def outputs_and_gradient(policy, batch, prefix=None):
    policy.model.zero_grad()
    output = grpo_batch_loss(policy, batch, prefix, beta=0.1, temperature=0.9)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}


ONE_IMAGE, TEXT, ALL = [0], [2], [0, 1, 2, 3]
CASES = {
    "text only": (tiny_model, TEXT, [[5, 5, 3]]),
    "one image": (tiny_model, ONE_IMAGE, [[5, 5, 3]]),
    "several groups and images, very different lengths": (tiny_model, ALL, [[1, 1], [1, 60], [7, 30], [2, 0]]),
    "completions of one token": (tiny_model, ALL, [[1, 1]] * 4),
    "Qwen2.5-VL": (tiny_2_5, ALL, [[5, 5], [1, 40], [7, 3], [9, 9]]),
    "LoRA": (adapted, ALL, [[5, 5], [1, 20], [7, 3], [9, 9]]),
    "eager": (lambda: tiny_model(attention="eager"), ALL, [[5, 5], [1, 20], [7, 3], [9, 9]]),
    "frozen vision": (tiny_model, ALL, [[5, 5], [1, 20], [7, 3], [9, 9]]),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_and_plain_pass_agree(case):
    """Prompts in the row, with gradient checkpointing or without, and prompts that have run before, in float32: outputs
    and gradients to 1e-5 of their norm.
    """
    build, prompts, lengths = CASES[case]
    policy = tiny_policy(build())
    if case == "frozen vision":
        policy.freeze_parts(["vision"])
    batch = batch_of(policy, prompts, lengths)
    policy.shares_prefix = False
    expected, gradients = outputs_and_gradient(policy, batch)
    assert gradients
    policy.shares_prefix = True
    for prompts_before, policy.checkpointing in ((False, False), (False, True), (True, False)):
        prefix = policy.encode_prefix(batch.inputs) if prompts_before else None
        found, ours = outputs_and_gradient(policy, batch, prefix)
        for name in ("loss", "per_token_logps", "entropies"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        error = (found.kl - expected.kl).norm()  # a log-probability's, times e^(ref - logp)
        assert error < 1e-5 * expected.kl.norm()
        assert ours.keys() == gradients.keys()
        whole, theirs = (torch.cat([each[name].flatten() for name in gradients]) for each in (ours, gradients))
        assert (whole - theirs).norm() < 1e-5 * theirs.norm()
        for name in gradients:
            assert (ours[name] - gradients[name]).norm() < 1e-4 * gradients[name].norm() + 1e-6 * theirs.norm(), name


def test_the_plain_pass_checkpoints_too():
    policy = tiny_policy(tiny_model())
    policy.shares_prefix = False
    batch = batch_of(policy, ALL, [[5, 5], [1, 20], [7, 3], [9, 9]])
    _, expected = outputs_and_gradient(policy, batch)
    policy.checkpointing = True
    with layers_run(policy.model) as runs:
        _, found = outputs_and_gradient(policy, batch)
    assert set(runs) == {2}
    torch.testing.assert_close(found, expected)


# ---- what is computed -----------------------------------------------------------------------------------------------


@contextmanager
def layers_run(model):
    """How often each layer's attention norm ran, forward and again in backward."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    runs = [0] * len(layers)

    def count(i):
        def hook(*_):
            runs[i] += 1

        return hook

    hooks = [next(layer.children()).register_forward_hook(count(i)) for i, layer in enumerate(layers)]
    yield runs
    for hook in hooks:
        hook.remove()


def test_checkpointing_runs_each_layer_twice_and_leaves_the_model_as_it_was():
    policy = tiny_policy(tiny_model())
    batch = batch_of(policy, ALL, [[5, 5], [1, 20], [7, 3], [9, 9]])
    names = [
        policy.model.config.text_config._attn_implementation,
        policy.model.config.vision_config._attn_implementation,
    ]
    policy.checkpointing = True
    with layers_run(policy.model) as runs:
        outputs_and_gradient(policy, batch)
        assert runs == [2] * 3  # two of the language model, one of vision
        with torch.no_grad():
            batch.hidden(policy)
        assert runs == [3] * 3
    after = [
        policy.model.config.text_config._attn_implementation,
        policy.model.config.vision_config._attn_implementation,
    ]
    assert after == names == ["sdpa", "sdpa"]
    assert not any(module.training for module in policy.model.modules())


def test_every_token_runs_once():
    """Of the first prompt two completions are the same; the last token of each predicts nothing."""
    policy = tiny_policy(tiny_model())
    batch = batch_of(policy, ALL, [[5, 5], [1, 20], [7, 3], [9, 2]])
    packed = Packed.of(batch.inputs, batch.completion_ids, batch.completion_mask)
    prompts = int(batch.inputs["attention_mask"].sum())
    tokens = prompts + 4 + 0 + 19 + 6 + 2 + 8 + 1
    assert packed.input_ids.shape == (1, tokens)
    assert packed.layout.shared == prompts
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = batch.hidden(policy)
    assert hidden.shape[0] == batch.completion_mask.sum()
    counts = counter.get_flop_counts()
    layer = policy.model.model.language_model.layers[0].mlp
    weights = sum(weight.numel() for weight in layer.parameters())
    assert (
        sum(counts[name][torch.ops.aten.mm] for name in counts if name.endswith("layers.0.mlp")) == 2 * tokens * weights
    )


def test_positions_are_those_of_each_completion_behind_its_prompt_alone():
    policy = tiny_policy(tiny_model())
    batch = batch_of(policy, ALL, [[4, 3]] * 4)
    packed = Packed.of(batch.inputs, batch.completion_ids, batch.completion_mask)
    first = packed.layout.shared
    for row, prompt in enumerate(range(4)):
        alone = take_prompts(tiny_inputs(), [prompt])
        ids = torch.cat([alone["input_ids"][alone["attention_mask"].bool()], batch.completion_ids[2 * row, :4]])
        types = torch.cat([alone["mm_token_type_ids"][alone["attention_mask"].bool()], torch.zeros(4).long()])
        positions, _ = policy.model.model.get_rope_index(
            ids[None], types[None], image_grid_thw=alone.get("image_grid_thw")
        )
        places = packed.predicting.view(-1)[7 * row : 7 * row + 4]
        assert torch.equal(packed.position_ids[:, 0, places], positions[:, 0, -5:-1])
    assert packed.input_ids.shape[1] == first + 4 * (3 + 2)


def test_a_model_with_sliding_windows_takes_the_plain_pass():
    model = tiny_model()
    model.model.language_model.has_sliding_layers = True
    assert not tiny_policy(model).shares_prefix

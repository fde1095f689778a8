"""The model on a CUDA device: what the tests on a CPU cannot run. Run by `benchmarks/device.sh`."""

import pytest
import torch

from mr1fast.model.liger import use_liger
from mr1fast.model.rollout import Sampler
from mr1fast.model.steps import Captured, Pace
from tests.tiny import tiny_inputs, tiny_model, tiny_policy

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_captured_step_samples_the_same():
    policy = tiny_policy(tiny_model().cuda())
    with torch.no_grad():
        prefix = policy.encode_prefix(policy.place(tiny_inputs()))
    plain, static, captured = (
        Sampler(policy, max_completion_length=40, pace=pace).generate(
            [], num_generations=8, prefix=prefix, streams=[str(i) for i in range(4)]
        )
        for pace in (Pace(40, 0, 40), Pace(8, 40, 16, graph=True), Pace(4, 0, 40, graph=True))
    )
    assert Captured.possible
    for other in (static, captured):
        assert torch.equal(other.completion_ids, plain.completion_ids)
        torch.testing.assert_close(other.per_token_logps, plain.per_token_logps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_liger_computes_the_same(dtype, tolerance):
    model = tiny_model().to("cuda", dtype)
    inputs = {name: tensor.cuda() for name, tensor in tiny_inputs().items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        expected = model(**inputs).logits
        use_liger(model)
        found = model(**inputs).logits
    assert type(model.get_decoder().norm).__module__.startswith("liger_kernel")
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


# ---- the packed pass ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_pass_equals_the_plain_one(checkpointing):
    """In bfloat16, which PyTorch's FlashAttention takes; both are as far from float32's as each other."""
    exact, found = (
        {packed: hidden_and_gradient(dtype, packed, checkpointing) for packed in (False, True)}
        for dtype in (torch.float32, torch.bfloat16)
    )
    for packed, plain, exactly, reference in zip(found[True], found[False], exact[True], exact[False], strict=True):
        errors = [((one.float() - reference).norm() / reference.norm()).item() for one in (packed, plain, exactly)]
        assert errors[0] < 3 * errors[1] + 1e-3
        assert errors[2] < 1e-4


def hidden_and_gradient(dtype, packed, checkpointing):
    """(hidden states, gradients of all weights) of four completions of each of the tiny prompts."""
    torch.manual_seed(0)
    lengths = torch.tensor([1, 9, 4, 9] * 4)
    ids, mask = torch.randint(50, (16, 9)), torch.arange(9) < lengths[:, None]
    policy = tiny_policy(tiny_model().to(DEVICE, dtype))
    assert policy.shares_prefix
    policy.shares_prefix, policy.checkpointing = packed, checkpointing
    hidden = policy.completion_hidden(policy.place(tiny_inputs()), ids.to(DEVICE), mask.to(DEVICE))
    hidden.float().square().sum().backward()
    gradients = [weight.grad.flatten() for weight in policy.trainable_parameters() if weight.grad is not None]
    return hidden.detach(), torch.cat(gradients)

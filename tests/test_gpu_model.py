"""The model on a CUDA device: what the tests on a CPU cannot run. Run by `benchmarks/device.sh`."""

import pytest
import torch

from mr1fast.model import rollout
from mr1fast.model.liger import use_liger
from mr1fast.model.rollout import Pace, Sampler
from tests.tiny import tiny_inputs, tiny_model, tiny_policy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_captured_step_samples_the_same():
    policy = tiny_policy(tiny_model().cuda())
    with torch.no_grad():
        prefix = policy.encode_prefix(policy.place(tiny_inputs()))
    plain, static, captured = (
        Sampler(policy, max_completion_length=40, pace=pace).generate(
            [], num_generations=8, prefix=prefix, streams=[str(i) for i in range(4)]
        )
        for pace in (Pace(40, 0.0, 40), Pace(8, 0.25, 16, graph=True), Pace(4, 0.0, 40, graph=True))
    )
    assert rollout.Captured.possible
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
    assert not torch.equal(found, expected), "Liger was not at work"
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)

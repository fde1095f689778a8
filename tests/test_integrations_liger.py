"""mr1fast.integrations.liger against Liger 0.8.5 itself.

Liger's Triton loss needs TRITON_INTERPRET=1 before its import: this file runs itself once as a program that computes
every case with Liger and writes the results for the tests to compare.
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quick_interpreter import speed_up_the_interpreter

from mr1fast.integrations import liger

B, L, V, H = 3, 6, 41, 12

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
TRITON_CASES = {
    **{f"{t}, {r}": {"loss_type": t, "reduce": r} for t in LOSS_TYPES for r in (True, False)},
    "cispo with its own bound": {"loss_type": "cispo", "eps_high": 1.3, "reduce": True},
    "sequence level": {"loss_type": "grpo", "importance_sampling_level": "sequence", "reduce": True},
    "sequence level per token": {"importance_sampling_level": "sequence"},
    "sequence, bias-corrected KL": {
        "importance_sampling_level": "sequence",
        "use_bias_correction_kl": True,
        "reduce": True,
    },
    "bias-corrected KL": {"use_bias_correction_kl": True, "reduce": True},
    "delta": {"delta": 1.6, "reduce": True},
    "no KL": {"beta": 0.0, "reduce": True},
    "no KL per token": {"beta": 0.0},
    "no mask": {"completion_mask": None, "reduce": True},
    "on-policy": {"old_logp": None, "reduce": True},
    "rollout correction [B, L]": {"vllm_is_ratio": "[B, L]", "reduce": True},
    "rollout correction [B]": {"vllm_is_ratio": "[B]", "reduce": True},
    "number of items": {"num_items_in_batch": 77, "reduce": True},
    "dr_grpo's length": {"loss_type": "dr_grpo", "max_completion_length": 32, "reduce": True},
    "not in place": {"inplace": False, "reduce": True},
    "temperatures": {"loss_type": "sapo", "temperature": 1.3, "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    "luspo": {"loss_type": "luspo", "reduce": True},
    "luspo per token": {"loss_type": "luspo"},
    "vespo": {"loss_type": "vespo", "reduce": True},
    "vespo per token, on-policy": {"loss_type": "vespo", "old_logp": None},
    "vespo corrected [B, L]": {"loss_type": "vespo", "vllm_is_ratio": "[B, L]", "vespo_k_pos": 1.5, "reduce": True},
    "vespo corrected [B]": {"loss_type": "vespo", "vllm_is_ratio": "[B]", "beta": 0.0, "reduce": True},
}
# name: (arguments of the constructor, arguments of forward)
LINEAR_CASES = {
    **{t: ({"loss_type": t, "max_completion_length": 9}, {}) for t in LOSS_TYPES},
    "bias": ({}, {"bias": True}),
    "chunks": ({"chunk_size": 2}, {}),
    "reference from hidden states": ({}, {"ref_per_token_logps": None, "ref_input": True}),
    "no reference": ({"use_ref_model": False}, {"ref_per_token_logps": None}),
    "no KL": ({"beta": 0.0}, {}),
    "sequence level": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, {}),
    "everything else": (
        {"delta": 1.7, "use_bias_correction_kl": True, "temperature": 0.8, "epsilon_high": 0.3},
        {"vllm_is_ratio": "[B]", "num_items_in_batch": 40},
    ),
    # Without a masked position, whose loss Liger would count.
    "luspo": ({"loss_type": "luspo"}, {"full": True}),
    "luspo, sequence level": ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, {"full": True}),
    "vespo": ({"loss_type": "vespo", "vespo_lambda_neg": 1.5}, {"bias": True}),
    "vespo corrected": ({"loss_type": "vespo", "temperature": 0.8}, {"vllm_is_ratio": "[B, L]"}),
}


def tensors():
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (B, L), generator=g)
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[2, 1:] = 0
    logits = torch.randn(B, L + 1, V, generator=g)
    logps = logits[:, :-1].div(0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return {
        "logits": logits,
        "hidden": torch.randn(B, L, H, generator=g),
        "weight": torch.randn(V, H, generator=g) * 0.4,
        "bias": torch.randn(V, generator=g),
        "ref_input": torch.randn(B, L, H, generator=g),
        "ids": ids,
        "mask": mask,
        "old": logps + 0.4 * torch.randn(B, L, generator=g),
        "ref": logps + 0.4 * torch.randn(B, L, generator=g),
        "advantages": torch.tensor([1.2, -0.9, 0.5]),
        "[B, L]": torch.rand(B, L, generator=g) + 0.5,
        "[B]": torch.rand(B, generator=g) + 0.5,
    }


def run_triton(function, case):
    """Loss, metrics and gradient of a case; without `reduce` a weighted sum of the per-token loss is differentiated."""
    t = tensors()
    leaf = t["logits"].requires_grad_()
    arguments = {"old_logp": t["old"], "ref_logp": t["ref"], "completion_mask": t["mask"], **TRITON_CASES[case]}
    if isinstance(arguments.get("vllm_is_ratio"), str):
        arguments["vllm_is_ratio"] = t[arguments["vllm_is_ratio"]]
    out = function(leaf * 1.0, completion_ids=t["ids"], advantages=t["advantages"], **arguments)
    if arguments.get("reduce"):
        loss, values = out[0], list(out[1])
    else:
        loss, values = (out[0] * torch.linspace(0.1, 1.7, B * L).view(B, L)).sum(), list(out)
    loss.backward()
    return [loss.detach(), *(None if v is None else v.detach() for v in values), leaf.grad]


def run_linear(module, case, **constructor):
    t = tensors()
    settings, call = LINEAR_CASES[case]
    hidden, weight = t["hidden"].requires_grad_(), t["weight"].requires_grad_()
    logps = (hidden.detach() @ weight.detach().T).log_softmax(-1).gather(-1, t["ids"][..., None])[..., 0]
    call = {"ref_per_token_logps": logps + 0.2 * t["[B, L]"], "old_per_token_logps": logps + t["[B, L]"] - 1, **call}
    if call.get("bias"):
        call["bias"] = t["bias"].requires_grad_()
    if call.get("ref_input"):
        call |= {"ref_input": t["ref_input"], "ref_weight": weight.detach() * 0.9}
    if "vllm_is_ratio" in call:
        call["vllm_is_ratio"] = t[call["vllm_is_ratio"]]
    mask = torch.ones_like(t["mask"]) if call.pop("full", False) else t["mask"]
    loss, metrics = module(**settings, **constructor)(hidden, weight, t["ids"], mask, t["advantages"], **call)
    (loss * 1.5).backward()
    return [loss.detach(), *metrics, hidden.grad, weight.grad, call["bias"].grad if "bias" in call else None]


def log_softmax(function):
    """Of ids and a mask that have the prompt before them, as in Liger's own example of a trainer."""
    t = tensors()
    ids, mask = (torch.cat([torch.zeros_like(t[name][:, :2]), t[name]], dim=1) for name in ("ids", "mask"))
    return function(t["logits"].detach(), ids, 0.7, mask=mask)


def parameters(function):
    return [(name, p.default, p.kind) for name, p in inspect.signature(function).parameters.items()]


def main(path):
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    results = {
        "triton": {case: run_triton(triton_grpo_loss, case) for case in TRITON_CASES},
        "linear": {case: run_linear(LigerFusedLinearGRPOLoss, case, compiled=False) for case in LINEAR_CASES},
        "signatures": {
            "triton_grpo_loss": parameters(triton_grpo_loss),
            "LigerFusedLinearGRPOLoss": parameters(LigerFusedLinearGRPOLoss),
            "forward": parameters(LigerFusedLinearGRPOLoss.forward),
            "apply": parameters(LigerFusedLinearGRPOFunction.forward)[1:],  # without ctx
            "fused_selective_log_softmax": parameters(fused_selective_log_softmax),
        },
        "log_softmax": log_softmax(fused_selective_log_softmax),
    }
    torch.save(results, path)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("liger") / "results.pt"
    root = Path(__file__).parent.parent
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=False)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, his in zip(ours, theirs):
        assert (mine is None) == (his is None)
        if his is not None:
            assert mine.shape == his.shape
            torch.testing.assert_close(mine.float(), his.float(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_grpo_loss_equals_ligers(theirs, case):
    ours, his = run_triton(liger.triton_grpo_loss, case), theirs["triton"][case]
    if case == "luspo":  # there Liger's backward reads what it made [B, 1] as if it were [B, L]
        ours, his = ours[:-1], his[:-1]
    assert_same(ours, his)


@pytest.mark.parametrize("case", LINEAR_CASES)
def test_fused_linear_loss_equals_ligers(theirs, case):
    assert_same(run_linear(liger.LigerFusedLinearGRPOLoss, case), theirs["linear"][case])


def test_log_softmax_equals_ligers(theirs):
    ours = log_softmax(liger.fused_selective_log_softmax)
    assert ours.dtype == torch.float32
    mask = tensors()["mask"].bool()  # Liger leaves what it allocated at masked positions: 0, as ours
    torch.testing.assert_close(ours, theirs["log_softmax"], rtol=1e-5, atol=1e-6)
    assert (ours[~mask] == 0).all()


def test_function_is_the_module():
    t = tensors()
    tensors_ = (t["hidden"], t["weight"], t["ids"], t["mask"], t["advantages"], None, t["ref"], t["old"])
    loss, metrics = liger.LigerFusedLinearGRPOFunction.apply(*tensors_, None, None, None, 0.1, 0.1, 0.3, "bnpo")
    module = liger.LigerFusedLinearGRPOLoss(beta=0.1, epsilon_low=0.1, epsilon_high=0.3, loss_type="bnpo")
    wanted, wanted_metrics = module(*tensors_)
    assert_same([loss, *metrics], [wanted, *wanted_metrics])


def test_signatures_are_ligers(theirs):
    def plain(signature):
        return [(name, "empty" if default is inspect.Parameter.empty else default) for name, default, _ in signature]

    ours = {
        "triton_grpo_loss": liger.triton_grpo_loss,
        "LigerFusedLinearGRPOLoss": liger.LigerFusedLinearGRPOLoss,
        "forward": liger.LigerFusedLinearGRPOLoss.forward,
        "apply": liger.LigerFusedLinearGRPOFunction.apply,
        "fused_selective_log_softmax": liger.fused_selective_log_softmax,
    }
    for name, function in ours.items():
        assert plain(parameters(function)) == plain(theirs["signatures"][name]), name


def test_settings_that_are_not_computed_raise_and_say_why():
    t = tensors()
    arguments = (t["logits"], t["old"], t["ref"], t["ids"], t["advantages"])
    with pytest.raises(ValueError, match="use_bias_correction_kl must be False with loss_type='vespo'"):
        liger.triton_grpo_loss(*arguments, loss_type="vespo", use_bias_correction_kl=True)
    with pytest.raises(ValueError, match="k_pos must be a number"):
        liger.triton_grpo_loss(*arguments, loss_type="vespo", vespo_k_pos="two")
    with pytest.raises(ValueError, match="did you mean 'grpo'"):
        liger.triton_grpo_loss(*arguments, loss_type="grpoo")
    with pytest.raises(ValueError, match=r"delta \(two-sided clipping\) is not supported for loss_type='cispo'"):
        liger.triton_grpo_loss(*arguments, loss_type="cispo", delta=2.0)
    with pytest.raises(ValueError, match=r"Sequence-level importance sampling is not supported for loss_type='sapo'"):
        liger.LigerFusedLinearGRPOLoss(loss_type="sapo", importance_sampling_level="sequence")
    with pytest.raises(ValueError, match=r"logits must be \[B, L\+1, V\] with B = 3 and L = 6"):
        liger.triton_grpo_loss(t["logits"][:, :-1], *arguments[1:])
    with pytest.raises(ValueError, match="sapo_temperature_neg must be positive, got 0"):
        liger.LigerFusedLinearGRPOLoss(sapo_temperature_neg=0)
    with pytest.raises(ValueError, match="delta must be positive, got -1"):
        liger.LigerFusedLinearGRPOLoss(delta=-1.0)
    with pytest.warns(UserWarning, match=r"Both .* are provided\. Using ref_per_token_logps"):
        liger.LigerFusedLinearGRPOLoss()(
            *(t[name] for name in ("hidden", "weight", "ids", "mask", "advantages")),
            ref_per_token_logps=t["ref"],
            ref_input=t["ref_input"],
            ref_weight=t["weight"],
        )
    with pytest.raises(ValueError, match="ref_per_token_logps or ref_input"):
        liger.LigerFusedLinearGRPOLoss()(t["hidden"], t["weight"], t["ids"], t["mask"], t["advantages"])


if __name__ == "__main__":
    speed_up_the_interpreter()
    main(sys.argv[1])

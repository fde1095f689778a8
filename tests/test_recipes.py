"""The recipes of docs/other-trainers.md, run as they are printed there, against each trainer's published formula.

The trainers are not installed: small stand-ins have the names that a recipe imports and the few functions of a trainer
that it calls. The formulas are restated here in float64, per token, from the sources that the page names; the loss and
its gradient must agree with ours to rounding.
"""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import liger_kernel.chunked_loss
import pytest
import torch
from torch import nn

PAGE = (Path(__file__).parent.parent / "docs" / "other-trainers.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in PAGE.split("\n## ")[1:]}
LOW, HIGH, DUAL = 0.2, 0.28, 3.0


@pytest.fixture
def recipe(monkeypatch):
    """Run the Python block of a trainer's section; returns its names. Stand-ins: module path -> its attributes."""

    def run(trainer, stand_ins):
        for path, attributes in stand_ins.items():
            names = path.split(".")
            for i in range(1, len(names) + 1):
                module = sys.modules.get(".".join(names[:i])) or ModuleType(".".join(names[:i]))
                monkeypatch.setitem(sys.modules, ".".join(names[:i]), module)
                if i > 1:
                    setattr(sys.modules[".".join(names[: i - 1])], names[i - 1], module)
            vars(module).update(attributes)
        (block,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[trainer], flags=re.MULTILINE | re.DOTALL)
        names = {"__name__": "recipe"}
        exec(compile(block, f"docs/other-trainers.md, {trainer}", "exec"), names)
        return SimpleNamespace(**names)

    return run


@pytest.fixture
def batch():
    """B, L = 4, 7: ratios on both sides of every bound, a hole in one completion, and a reference up to 4 nats away."""
    torch.manual_seed(0)
    logps = -3 * torch.rand(4, 7, dtype=torch.float64)
    old = logps + 0.7 * torch.randn_like(logps)
    old[2, 1] = logps[2, 1] - 1.5  # beyond the dual clip
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]
    mask[0, 2] = False
    advantages = torch.tensor([1.5, -0.5, -1.2, 0.4], dtype=torch.float64)[:, None].expand(4, 7)
    ratio = (logps - old).exp()
    assert ((ratio > DUAL) & (advantages < 0) & mask).any()
    assert ((ratio > 1 + HIGH) & (advantages > 0) & mask).any()
    assert ((ratio < 1 - LOW) & (advantages < 0) & mask).any()
    ref = logps.clone() + torch.randn_like(logps)
    ref[0, 0] += 4
    return SimpleNamespace(
        logps=logps.requires_grad_(), old=old, ref=ref, sampler=old, mask=mask, advantages=advantages.contiguous()
    )


def assert_same(ours, theirs, *leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    got, wanted = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    assert all(gradient.abs().sum() > 0 for gradient in wanted)


# ---- what several trainers write alike -------------------------------------------------------------------------------


def clipped(ratio, advantages, dual=None):
    """PPO's term with two bounds, and the dual clip where the advantage is negative."""
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH))
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)


def cispo(b):
    ratio = (b.logps - b.old).detach().exp().clamp(1 - LOW, 1 + HIGH)
    return -b.advantages * ratio * b.logps


def sapo(b, positive, negative):
    ratio = (b.logps - b.old).exp()
    tau = torch.where(b.advantages >= 0, positive, negative)
    return -b.advantages * 4 / tau * torch.sigmoid(tau * (ratio - 1))


def sequence_ratio(b):
    return masked_mean(b.logps - b.old, b.mask, 1).exp()[:, None].expand(b.mask.shape)


def gspo_token_ratio(b):
    return sequence_ratio(b).detach() * (b.logps - b.logps.detach()).exp()


def k3(b):
    """Cut at 20 before, and at 10 after."""
    d = (b.ref - b.logps).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def masked_mean(values, mask, dim=None):
    return (values * mask).sum(dim) / mask.sum(dim)


def average_loss(values, mask, mode):
    return masked_mean(values, mask) if mode == "token" else masked_mean(values, mask, 1).mean()


# ---- one trainer after the other -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("token_level", [False, True])
@pytest.mark.parametrize(
    ("kind", "dual", "correction"),
    [
        ("ppo", None, None),
        ("ppo", DUAL, None),
        ("gspo", None, None),
        ("ppo", DUAL, ("token", "clip", "ratio")),
        ("ppo", None, ("token", "mask", "ratio")),
        ("ppo", None, ("seq", "mask", "ratio")),
    ],
)
def test_openrlhf(recipe, batch, kind, dual, correction, token_level, is_global):
    class PolicyLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip_eps_low, self.clip_eps_high, self.dual_clip = LOW, HIGH, dual
            self.policy_loss_type, self.token_level_loss = kind, token_level
            self.is_correction_level, self.is_correction_mode, self.is_correction_gating = correction or ("off",) * 3
            self.is_correction_threshold = [0.5, 1.5]

    actor = {"log_probs_from_logits": None}
    models = {"openrlhf.models": {"PolicyLoss": PolicyLoss}, "openrlhf.models.actor": actor}
    recipe("OpenRLHF", {**models, "openrlhf.models.utils": {"masked_mean": masked_mean}})
    batch.mask[1] = False  # not a completion to OpenRLHF
    counts = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9} if is_global else {}
    rollout = batch.old + 0.5 * torch.randn_like(batch.old)
    call = (batch.logps, batch.old, batch.advantages, batch.mask, rollout)
    loss, clip_ratio, ppo_kl, vllm_kl, cut = PolicyLoss()(*call, **counts)

    has_tokens = batch.mask.any(1)
    part = SimpleNamespace(**{name: value[has_tokens] for name, value in vars(batch).items()})
    ratio = sequence_ratio(part) if kind == "gspo" else (part.logps - part.old).exp()
    per_token = clipped(ratio, part.advantages, dual) * part.mask
    if correction:
        weight = (part.old - rollout[has_tokens]).exp()
        mean = masked_mean(weight.log(), part.mask, 1).exp()[:, None].expand_as(weight)
        statistic = mean if correction[0] == "seq" else weight
        kept = (statistic >= 0.5) & (statistic <= 1.5)
        assert (kept & part.mask).any()
        assert (~kept & part.mask).any() or correction[0] == "seq"
        per_token = per_token * (weight.clamp(0.5, 1.5) if correction[1] == "clip" else weight * kept)
        assert cut.item() == pytest.approx(masked_mean((~kept).double(), part.mask).item())
        assert vllm_kl.item() == pytest.approx(masked_mean(rollout - batch.old, batch.mask).item())
    if token_level:
        wanted = per_token.sum() / (31 / 2 if is_global else part.mask.sum())
    else:
        wanted = (per_token.sum(1) / part.mask.sum(1)).sum() / (9 / 2 if is_global else 3)
    assert_same(loss, wanted, batch.logps)
    assert clip_ratio > 0 or kind == "gspo"
    assert ppo_kl.item() == pytest.approx(masked_mean(batch.old - batch.logps, batch.mask).item())

    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.randint(5, (2, 3))
    scored = sys.modules["openrlhf.models.actor"].log_probs_from_logits(logits, labels, temperature=0.7)
    torch.testing.assert_close(scored, (logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0])
    gated = PolicyLoss()
    gated.is_correction_level, gated.is_correction_gating = "token", "tv"
    with pytest.raises(ValueError, match="is_correction_gating must be ratio"):
        gated(*call)


@pytest.mark.parametrize("mode", ["token", "seq"])
@pytest.mark.parametrize("loss_type", ["default", "gspo", "gspo_token", "cispo", "sapo"])
def test_easyr1(recipe, batch, loss_type, mode):
    actor, functional = {"compute_policy_loss": None}, {"log_probs_from_logits": None}
    algorithms = {"verl.trainer.core_algos": {"average_loss": average_loss}}
    recipe("EasyR1", {**algorithms, "verl.utils.torch_functional": functional, "verl.workers.actor.dp_actor": actor})
    loss, metrics = sys.modules["verl.workers.actor.dp_actor"].compute_policy_loss(
        old_log_probs=batch.old,
        log_probs=batch.logps,
        advantages=batch.advantages,
        response_mask=batch.mask,
        clip_ratio_low=LOW,
        clip_ratio_high=HIGH,
        clip_ratio_dual=DUAL,
        tau_positive=1.0,
        tau_negative=1.05,
        loss_type=loss_type,
        loss_avg_mode=mode,
    )
    per_token = {
        "default": lambda: clipped((batch.logps - batch.old).exp(), batch.advantages, DUAL),
        "gspo": lambda: clipped(sequence_ratio(batch), batch.advantages, DUAL),
        "gspo_token": lambda: clipped(gspo_token_ratio(batch), batch.advantages, DUAL),
        "cispo": lambda: cispo(batch),
        "sapo": lambda: sapo(batch, 1.0, 1.05),
    }[loss_type]()
    assert_same(loss, average_loss(per_token, batch.mask, mode), batch.logps)
    assert metrics["ppo_kl"] == pytest.approx(masked_mean(batch.old - batch.logps, batch.mask).item())
    assert all(isinstance(value, float) for value in metrics.values())

    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    scored = sys.modules["verl.utils.torch_functional"].log_probs_from_logits(logits=logits, labels=labels)
    torch.testing.assert_close(scored, logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0])


def test_easyr1s_kl_with_a_reference_4_nats_away(batch):
    """What the page says about the KL that these trainers add by themselves."""
    from mr1fast import grpo_loss_from_logps

    options = {"completion_mask": batch.mask, "ref_per_token_logps": batch.ref, "beta": 0.1}
    out = grpo_loss_from_logps(batch.logps, torch.zeros(4), kl_estimator="low_var_kl", **options)
    assert (k3(batch) == 10).any()
    assert_same(out.loss, 0.1 * average_loss(k3(batch), batch.mask, "seq"), batch.logps)
    for name, clamp, estimate in (("k1", 10.0, lambda d: -d), ("k2", 20**0.5, lambda d: d.square() / 2)):
        far = {**options, "ref_per_token_logps": 9 * batch.ref}
        out = grpo_loss_from_logps(batch.logps, torch.zeros(4), kl_estimator=name, kl_clamp=clamp, **far)
        cut = estimate(9 * batch.ref - batch.logps).clamp(-10, 10)
        assert_same(out.loss, 0.1 * average_loss(cut, batch.mask, "seq"), batch.logps)


def test_skyrl(recipe, batch):
    registry = {}

    def correction(loss, old, rollout, mask, config):
        assert config == "settings"
        return loss * 0.5, mask, {"is_ratio_mean": 0.5}

    utilities = {
        "apply_off_policy_correction": correction,
        "reduce_loss": lambda loss, mask: (loss * mask).sum(),
        "register_policy_loss": lambda name: lambda function: registry.setdefault(name, function),
    }
    recipe("SkyRL", {"skyrl.backends.skyrl_train.utils.ppo_utils": utilities})
    config = SimpleNamespace(eps_clip_low=LOW, eps_clip_high=HIGH, off_policy_correction="settings")
    advantages = batch.advantages / (4 * batch.mask.sum(1, keepdim=True))  # its loss_reduction "sequence_mean"
    loss, metrics = registry["grpo_d"](batch.logps, batch.old, advantages, config, loss_mask=batch.mask)
    per_token = 0.5 * clipped((batch.logps - batch.old).exp(), batch.advantages)
    assert_same(loss, masked_mean(per_token, batch.mask, 1).mean(), batch.logps)
    assert metrics["clip_ratio"] > 0
    assert metrics["is_ratio_mean"] == 0.5


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dual", [None, DUAL])
def test_areal(recipe, batch, level, dual):
    recipe("AReaL", {"areal.trainer.ppo.actor": {"ppo_actor_loss_fn": None}})
    rows = torch.arange(7) < torch.tensor([7, 4, 5, 2])[:, None]  # two with a token that does not count at their end
    cu_seqlens = torch.tensor([0, 7, 11, 16, 18], dtype=torch.int32)
    call = {
        "logprobs": batch.logps[rows],
        "proximal_logprobs": batch.old[rows],
        "old_logprobs": batch.ref[rows],
        "advantages": batch.advantages[rows],
        "loss_mask": batch.mask[rows],
        "eps_clip": LOW,
        "eps_clip_higher": HIGH,
        "c_clip": dual,
        "importance_sampling_level": level,
        "cu_seqlens": cu_seqlens,
    }
    function = sys.modules["areal.trainer.ppo.actor"].ppo_actor_loss_fn
    loss, stat = function(**call)
    ratio = sequence_ratio(batch) if level == "sequence" else (batch.logps - batch.old).exp()
    assert_same(loss, masked_mean(clipped(ratio, batch.advantages, dual), batch.mask), batch.logps)
    assert {value.shape for value in stat.values()} == {(18,)}
    assert stat["dual_clip_mask"].any() == (dual is not None)
    with pytest.raises(ValueError, match="rejection_sampling must be None"):
        function(**call, rejection_sampling="mask")


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", ["grpo_d", "dppo"])
def test_prime_rl(recipe, batch, name, is_weighted):
    outputs = {"prime_rl.trainer.rl.loss": {"LossOutputs": SimpleNamespace}}
    function = getattr(recipe("prime-rl", outputs), name)
    weights = torch.linspace(0.5, 2, 28, dtype=torch.float64).view(4, 7) if is_weighted else None
    losses = []
    for i in range(4):
        rows = {"trainer_logprobs": batch.logps[i], "inference_logprobs": batch.sampler[i], "ref_logprobs": None}
        rows |= {"loss_weights": None if weights is None else weights[i]}
        out = function(SimpleNamespace(**rows, advantages=batch.advantages[i], loss_mask=batch.mask[i]))
        losses.append(out.loss)
        assert out.metrics["kl_to_sampler"] > 0
    log_ratio = batch.logps - batch.sampler
    if name == "grpo_d":
        policy = clipped(log_ratio.exp(), batch.advantages)
    else:
        moved = batch.logps.detach().exp() - batch.sampler.exp()
        invalid = torch.where(batch.advantages > 0, moved > 0.2, moved < -0.2)
        assert (invalid & batch.mask).any()
        same_gradient = log_ratio.exp().detach() * batch.logps
        policy = -batch.advantages * same_gradient * ~invalid
    per_token = (policy + 1e-3 * log_ratio.square()) * (1 if weights is None else weights)
    assert_same(sum(losses), (per_token * batch.mask).sum(), batch.logps)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("level", ["tokens", "sequences", "sequence ratios"])
def test_nemo_rl(recipe, batch, level, on_policy):
    class ClippedPGLossFn:
        loss_type = "token" if level == "tokens" else "sequence"
        sequence_level_importance_ratios = level == "sequence ratios"
        ratio_clip_min, ratio_clip_max, ratio_clip_c = LOW, HIGH, DUAL
        reference_policy_kl_penalty = 0.1
        use_importance_sampling_correction = use_cispo = disable_ppo_ratio = False
        force_on_policy_ratio = on_policy

        def __call__(self, logprobs, data, global_valid_seqs, global_valid_toks):
            return "theirs", {"probs_ratio": 1.0}

    losses = {"ClippedPGLossFn": ClippedPGLossFn}
    folder = "nemo_rl.algorithms"
    interfaces = {"LossType": SimpleNamespace(TOKEN_LEVEL="token")}
    stand_ins = {f"{folder}.grpo": {}, f"{folder}.loss.interfaces": interfaces, f"{folder}.loss.loss_functions": losses}
    recipe("NeMo-RL", stand_ins)
    function = sys.modules["nemo_rl.algorithms.grpo"].ClippedPGLossFn()
    batch.ref[0, 0] -= 4  # within the cut
    samples = torch.tensor([1.0, 1.0, 0.0, 1.0])
    tensors = {"advantages": batch.advantages, "prev_logprobs": batch.old, "reference_policy_logprobs": batch.ref}
    data = {name: nn.functional.pad(value, (1, 0)) for name, value in (tensors | {"token_mask": batch.mask}).items()}
    data["sample_mask"] = samples
    seqs, toks = torch.tensor(6.0), torch.tensor(40.0)
    loss, metrics = function(batch.logps, data, seqs, toks)

    log_ratio = batch.logps - (batch.logps.detach() if on_policy else batch.old)
    ratio = log_ratio.exp()
    if level == "sequence ratios":
        ratio = masked_mean(log_ratio, batch.mask, 1).exp()[:, None]
    kl = k3(batch) * (batch.logps - batch.logps.detach()).exp()
    per_token = (clipped(ratio, batch.advantages, DUAL) + 0.1 * kl) * batch.mask * samples[:, None]
    wanted = per_token.sum() / toks if level == "tokens" else (per_token.sum(1) / batch.mask.sum(1)).sum() / seqs
    assert_same(loss, wanted, batch.logps)
    assert metrics == {"probs_ratio": 1.0}
    function.use_cispo = True
    assert function(batch.logps, data, seqs, toks)[0] == "theirs"


# ---- head and objective in one pass ----------------------------------------------------------------------------------


@pytest.fixture
def head(batch):
    """Hidden states [4, 7, 6], a weight [11, 6] and ids: log-probabilities come from these."""
    torch.manual_seed(1)
    hidden, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((4, 7, 6), (11, 6), (11,)))
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    return SimpleNamespace(hidden=hidden, weight=weight, bias=bias, leaves=leaves, ids=torch.randint(11, (4, 7)))


def log_softmax(head, temperature=1.0, bias=None):
    logits = nn.functional.linear(head.hidden, head.weight, bias) / temperature
    return logits.log_softmax(-1)


def of_ids(log_probs, ids):
    return log_probs.gather(-1, ids[..., None])[..., 0]


def test_ms_swift(batch, head, monkeypatch):
    monkeypatch.setattr(liger_kernel.chunked_loss, "LigerFusedLinearGRPOLoss", None)
    (diff,) = re.findall(r"^```diff\n(.*?)^```", SECTIONS["ms-swift"], flags=re.MULTILINE | re.DOTALL)
    exec("\n".join(re.findall(r"^\+(.*)", diff, flags=re.MULTILINE)), {})
    loss = liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss(  # as in its _prepare_liger_loss
        beta=0.1,
        compiled=False,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        temperature=0.9,
        use_ref_model=True,
        loss_type="grpo",
        max_completion_length=7,
        importance_sampling_level="token",
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
    )
    logps = of_ids(log_softmax(head, 0.9, head.bias), head.ids)
    old, ref = logps.detach() + batch.old - batch.logps.detach(), logps.detach() + batch.ref - batch.logps.detach()
    got, metrics = loss(  # as in its compute_liger_loss
        _input=head.hidden,
        lin_weight=head.weight,
        selected_token_ids=head.ids,
        attention_mask=batch.mask,
        advantages=batch.advantages[:, 0],
        bias=head.bias,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        vllm_is_ratio=None,
    )
    d = ref - logps
    per_token = clipped((logps - old).exp(), batch.advantages) + 0.1 * (d.exp() - d - 1)
    assert_same(got, masked_mean(per_token, batch.mask, 1).mean(), *head.leaves)
    assert len(metrics) == 2  # the KL first, the clip ratio last


@pytest.mark.parametrize("is_masked", [False, True])
def test_torchtune(recipe, batch, head, is_masked):
    class LinearGRPOLoss(nn.Module):
        kl_coeff, linear_projection = 0.1, SimpleNamespace(weight=head.weight)

    name = "torchtune.dev.rl.linear_grpo_loss"
    loss = recipe("torchtune", {name: {"LinearGRPOLoss": LinearGRPOLoss}}).FusedLinearGRPOLoss()
    logps = of_ids(log_softmax(head), head.ids)
    ref = logps.detach() + batch.ref - batch.logps.detach()
    mask = batch.mask if is_masked else torch.ones_like(batch.mask)
    advantages = batch.advantages[:, 0]
    got, policy, kl, ratio, share, scored = loss(head.hidden, head.ids, ref, advantages, mask if is_masked else None)
    d = ref - logps
    k3_of_token = d.exp() - d - 1
    per_token = -((logps - logps.detach()).exp() * advantages[:, None] - 0.1 * k3_of_token)
    assert_same(got, masked_mean(per_token, mask, 1).mean(), head.hidden, head.weight)
    assert policy.item() == pytest.approx(advantages.mean().item())
    assert kl.item() == pytest.approx(masked_mean(k3_of_token, mask, 1).mean().item())
    assert (ratio, share) == (1, 0)
    torch.testing.assert_close(scored, torch.where(mask, logps, 0))


@pytest.mark.parametrize("flat", [False, True])
def test_unsloth(recipe, batch, head, flat):
    def theirs(*args, **kwargs):
        return "theirs"

    fused = "unsloth_zoo.fused_losses.fused_linear"
    recipe("Unsloth", {fused: {"fused_linear_logprobs": theirs}})
    function = sys.modules[fused].fused_linear_logprobs
    ids = head.ids.clone()
    ids[~batch.mask] = -100
    shape = (28,) if flat else (4, 7)
    hidden, targets = head.hidden.reshape(*shape, 6), ids.reshape(shape)
    options = {"bias": head.bias, "temperature": 0.9, "logit_scale_multiply": 2.0, "logit_scale_divide": 0.0}
    options["logit_softcapping"] = 3.0
    logps, entropies = function(hidden, head.weight, targets, return_entropy=True, max_rows_per_chunk=None, **options)
    z = 2 * (head.hidden @ head.weight.T + head.bias)
    log_probs = torch.log_softmax(3 * torch.tanh(z / 3) / 0.9, -1)
    wanted = torch.where(batch.mask, of_ids(log_probs, head.ids), 0)
    entropy = torch.where(batch.mask, -(log_probs.exp() * log_probs).sum(-1), 0)
    weights = torch.randn(4, 7, dtype=torch.float64)
    for got, want in ((logps, wanted), (entropies, entropy)):
        assert got.shape == shape
        torch.testing.assert_close(got.reshape(4, 7), want)
        assert_same((got.reshape(4, 7) * weights).sum(), (want * weights).sum(), *head.leaves)
    only = function(hidden, head.weight, targets, mask=torch.zeros(shape, dtype=torch.bool), **options)
    assert torch.equal(only, torch.zeros(shape))
    assert function(hidden, head.weight, targets, return_mean_logits=True) == "theirs"


def test_every_section_has_its_test():
    tests = {name.removeprefix("test_").replace("_", "") for name in globals() if name.startswith("test_")}
    assert {re.sub(r"\W", "", name.lower()) for name in SECTIONS} <= tests

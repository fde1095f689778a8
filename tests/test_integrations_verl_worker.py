"""mr1fast.integrations.verl in verl's trainer and workers: the KL weight's schedule, and the registration.

verl itself is not installed; what it does is stated here.
"""

import inspect
import pickle
import sys
import types
from dataclasses import FrozenInstanceError, dataclass
from functools import partial

import pytest
from verl_parts import ActorConfig

from mr1fast import KLSchedule, kl_weight
from mr1fast.integrations import verl
from mr1fast.integrations.versions import check_version


def test_controller_follows_the_schedule_as_verl_drives_it():
    controller = verl.KLController(20, beta_min=0.04, beta_max=0.10)
    for step in range(20):
        assert controller.value == kl_weight(step, 20, beta_min=0.04, beta_max=0.10)
        controller.update(current_kl=0.3, n_steps=512)  # verl passes the batch size
    resumed = verl.KLController(20, beta_min=0.04, beta_max=0.10)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value == 0.10


def test_controller_takes_its_step_from_the_trainer():
    """As on resume, where verl makes a new controller and goes on at step 8."""
    trainer = types.SimpleNamespace(global_steps=0)
    controller = verl.KLController(20, trainer=trainer, beta_min=0.04, beta_max=0.10)
    assert controller.value == kl_weight(0, 20, beta_min=0.04, beta_max=0.10)
    for trainer.global_steps in range(8, 21):
        assert controller.value == kl_weight(trainer.global_steps - 1, 20, beta_min=0.04, beta_max=0.10)
        controller.update(current_kl=0.3, n_steps=512)


def test_adaptive_controller_equals_verls():
    def verls(value, current_kl, n_steps, target, horizon):
        return value * (1 + min(max(current_kl / target - 1, -0.2), 0.2) * n_steps / horizon)

    bounds = {"beta_min": 0.0, "beta_max": 0.2}
    controller = verl.KLController(100, **bounds, schedule="adaptive", target_kl=0.1, horizon=1000)
    value = controller.value
    for kl in (0.05, 0.3, 0.11, 0.1):
        controller.update(kl, 64)
        value = verls(value, kl, 64, 0.1, 1000)
        assert controller.value == pytest.approx(value, rel=1e-12)
    assert isinstance(controller, KLSchedule)


def test_kl_loss_coef_of_a_frozen_config():
    config = ActorConfig()
    with pytest.raises(FrozenInstanceError):
        config.kl_loss_coef = 0.5
    verl.set_kl_loss_coef(config, 0.07)
    assert config.kl_loss_coef == 0.07
    with pytest.raises(ValueError, match="kl_loss_coef"):
        verl.set_kl_loss_coef(object(), 0.07)


class FakeWorker:
    """verl's TrainingWorker as far as the KL weight goes; `train_mini_batch` is marked as verl's dispatch wants it."""

    def __init__(self, config, steps_done):
        self.loss_fn = partial(print, config=config)
        self.engine = types.SimpleNamespace(lr_scheduler=types.SimpleNamespace(last_epoch=steps_done))

    def train_mini_batch(self, data):
        self.engine.lr_scheduler.last_epoch += 1
        return self.loss_fn.keywords["config"].kl_loss_coef

    train_mini_batch.mark = "dispatched"


@dataclass
class FakePolicyLossConfig:
    loss_mode: str = "vanilla"


@pytest.fixture
def verl_with_workers(monkeypatch):
    workers, config = types.ModuleType("verl.workers"), types.ModuleType("verl.workers.config")
    workers.engine_workers = types.SimpleNamespace(TrainingWorker=type("Worker", (FakeWorker,), {}))
    config.PolicyLossConfig = FakePolicyLossConfig
    for module in (types.ModuleType("verl"), workers, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    caches = (verl._policy_loss_config, verl._follow_schedules)
    for cached in caches:
        cached.cache_clear()
    yield workers.engine_workers
    for cached in caches:
        cached.cache_clear()


def actor_config(policy_loss, **changes):
    config = ActorConfig()
    config.policy_loss, config.use_kl_loss = policy_loss, True
    config.optim = types.SimpleNamespace(total_training_steps=10)
    for name, value in changes.items():
        object.__setattr__(config, name, value)
    return config


def test_grpo_d_by_configuration_alone(verl_with_workers):
    made = verl.PolicyLossConfig
    assert pickle.loads(pickle.dumps(made(loss_mode="grpo_d", beta_max=0.1))).beta_max == 0.1
    settings = made(loss_mode="grpo_d", beta_min=0.02, beta_max=0.1, kl_schedule="linear")
    worker = verl_with_workers.TrainingWorker(actor_config(settings), steps_done=4)  # a resumed run
    assert worker.train_mini_batch.mark == "dispatched"
    bounds = {"beta_min": 0.02, "beta_max": 0.1, "schedule": "linear"}
    assert [worker.train_mini_batch(None) for _ in range(7)] == [kl_weight(s, 10, **bounds) for s in range(4, 11)]
    untouched = verl_with_workers.TrainingWorker(actor_config(made(loss_mode="grpo_d")), steps_done=4)
    assert untouched.train_mini_batch(None) == 0.001


def test_grpo_d_by_configuration_refuses(verl_with_workers):
    made = verl.PolicyLossConfig
    with pytest.raises(ValueError, match="loss_mode must be 'grpo_d' with beta_max, got 'vanilla'"):
        made(beta_max=0.1)
    with pytest.raises(ValueError, match=r"policy_loss\.objective must be one of vanilla, .*did you mean 'gspo'"):
        made(loss_mode="grpo_d", objective="gsop")
    with pytest.raises(ValueError, match="loss_mode must be 'grpo_d' with objective, got 'vanilla'"):
        made(objective="gspo")
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        made(loss_mode="grpo_d", beta_max=0.1, kl_schedule="cosin")
    settings = made(loss_mode="grpo_d", beta_max=0.1)
    with pytest.raises(ValueError, match=r"actor\.use_kl_loss must be True"):
        verl_with_workers.TrainingWorker(actor_config(settings, use_kl_loss=False), 0).train_mini_batch(None)
    megatron = verl_with_workers.TrainingWorker(actor_config(settings), 0)
    megatron.engine.lr_scheduler = object()
    with pytest.raises(ValueError, match="needs a learning-rate schedule of torch"):
        megatron.train_mini_batch(None)


def fake_verl(monkeypatch, version, parameters):
    """A module tree with verl's registry, whose own loss has these parameters."""
    registry = {}

    def register_policy_loss(name):
        return lambda function: registry.setdefault(name, function)

    namespace = {}
    exec(f"def compute_policy_loss_vanilla({', '.join(parameters)}): ...", namespace)
    core_algos = types.ModuleType("verl.trainer.ppo.core_algos")
    core_algos.register_policy_loss = register_policy_loss
    core_algos.compute_policy_loss_vanilla = namespace["compute_policy_loss_vanilla"]
    package, trainer, ppo = (types.ModuleType(n) for n in ("verl", "verl.trainer", "verl.trainer.ppo"))
    package.__version__ = version
    ppo.core_algos = core_algos
    for module in (package, trainer, ppo, core_algos):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry


SIGNATURE = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]


def test_registration_and_signature(monkeypatch, recwarn):
    registry = fake_verl(monkeypatch, "0.9.1", SIGNATURE)
    verl.register()
    assert registry == {"grpo_d": verl.grpo_d}
    assert not recwarn.list
    parameters = inspect.signature(verl.grpo_d).parameters
    assert list(parameters) == SIGNATURE
    assert [parameters[n].default for n in SIGNATURE[4:]] == ["token-mean", None, None]


def test_another_version_goes_on_only_if_its_signature_fits(monkeypatch):
    registry = fake_verl(monkeypatch, "0.10.0", [*SIGNATURE, "more"])
    with pytest.warns(UserWarning, match=r"tested with verl 0.9.1, not with 0.10.0"):
        verl.register()
    assert "grpo_d" in registry
    registry = fake_verl(monkeypatch, "0.4.0", SIGNATURE[:6])
    with pytest.raises(ImportError, match=r"tested with verl 0.9.1; verl 0.4.0 has no .*\(rollout_is_weights\)"):
        verl.register()
    assert not registry


def test_check_version_names_a_missing_function():
    check_version("lib", "1.16.4", "1.16", {"f": (None, [])})
    with pytest.raises(ImportError, match=r"lib 1\.17\.0 has no f"):
        check_version("lib", "1.17.0", "1.16", {"f": (None, [])})
    with pytest.warns(UserWarning, match=r"not with 1\.161"):
        check_version("lib", "1.161", "1.16", {"f": (lambda **keywords: None, ["anything"])})

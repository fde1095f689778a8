"""The settings and tensors of a call go to the kernels as lists: that both sides mean the same by a position."""

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mr1fast.kernels import cpp, cuda, ops
from mr1fast.kernels.advantages import SCALE_REWARDS
from mr1fast.kernels.estimators import KL_ESTIMATORS
from mr1fast.kernels.loss_types import ONE_PASS_LOSS_TYPES
from mr1fast.kernels.policies import POLICIES
from mr1fast.kernels.reference import NUMBERS, SWITCHES, LossBatch, LossSpec, flat

HEADER = (Path(__file__).parents[1] / "csrc" / "token_loss.h").read_text()


def members(struct):
    """The names in `struct X { type a, b; type c; };`, in order."""
    body = re.sub(r"//.*", "", re.search(rf"struct {struct} {{(.*?)}};", HEADER, re.DOTALL)[1])
    return tuple(name for names in re.findall(r"\w+ ([\w, ]+);", body) for name in names.split(", "))


def constants(enum):
    """How many names there are in `enum class X : type { kA, kB };`, none of which has a value of its own."""
    body = re.search(rf"enum class {enum} : int32_t {{(.*?)}};", HEADER)[1]
    assert "=" not in body
    return [name.removeprefix("k").lower() for name in body.replace(" ", "").split(",")]


def test_the_header_has_the_same_names_in_the_same_order():
    assert members("Switches") == SWITCHES
    assert members("Numbers") == NUMBERS
    assert constants("Estimator") == list(KL_ESTIMATORS)
    assert constants("Policy") == [policy.__name__ for policy in POLICIES]
    assert constants("RewardScale") == list(SCALE_REWARDS)
    assert tuple(name for name, _ in cuda.TokenSpec._fields_) == SWITCHES + NUMBERS


def test_triton_has_the_same_codes():
    triton_objective = pytest.importorskip("mr1fast.kernels.triton_objective", reason="Triton exists for Linux only")
    for code, policy in enumerate(POLICIES):
        assert getattr(triton_objective, policy.__name__.upper()).value == code
    for code, name in enumerate(KL_ESTIMATORS):
        assert getattr(triton_objective, name.upper()).value == code
    spec = triton_objective.token_spec(LossSpec(loss_type="sapo", epsilon_high=0.3))
    assert spec.policy.value == 2
    assert spec.epsilon_high == 0.3


def test_every_policy_term_has_a_loss_type():
    assert {LossSpec(loss_type=loss_type).policy for loss_type in ONE_PASS_LOSS_TYPES} == set(range(len(POLICIES)))


def test_a_call_survives_being_flattened():
    batch = LossBatch(*(torch.tensor(float(i)) for i in range(6)), num_generations=3, scale_rewards="none")
    spec = LossSpec(loss_type="cispo", delta=1.5, use_bias_correction_kl=True, temperature=0.7)
    again = ops.unflat(flat(batch, spec))
    assert again[1] == spec
    assert all(a is b for a, b in zip(again[0], batch))


def test_the_registered_ops_take_the_fields_by_name():
    names = [*LossBatch._fields, *(field.name for field in fields(LossSpec))]
    schema = torch.ops.mr1fast.grpo_loss.default._schema
    assert [argument.name for argument in schema.arguments][1:-2] == names


@pytest.mark.skipif(cpp.MISSING is not None, reason="the extension was not built")
def test_the_extension_takes_the_batch_in_its_order():
    arguments = [argument.name for argument in torch.ops.mr1fast_native.grpo_forward.default._schema.arguments]
    assert arguments[1 : 1 + len(LossBatch._fields)] == list(LossBatch._fields)


@pytest.mark.skipif(cpp.MISSING is not None, reason="the extension was not built")
def test_the_extension_refuses_a_list_of_another_length():
    x, ids = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    batch = LossBatch(ids, torch.ones(1, 2), torch.tensor(0.0), advantages=torch.ones(1, 2))
    for switches, numbers in (((0,), LossSpec().numbers), (LossSpec().switches, LossSpec().numbers[1:])):
        with pytest.raises(ValueError, match=r"there must be \d .*token_loss.h"):
            torch.ops.mr1fast_native.grpo_forward(x, *batch, switches, numbers, 1.0, math.inf, None)

"""The policy: what fits a model, adapters on it, and that nobody else knows its inside."""

import ast
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch

from mr1fast.errors import UserError
from mr1fast.model.patches import PatchProjection, multiply_patches
from mr1fast.model.policy import Policy
from mr1fast.model.rollout import Sampler
from mr1fast.training.batch import Batch, batch_logps, grpo_batch_loss
from tests.tiny import IMAGE, tiny_inputs, tiny_model, tiny_policy, tiny_processor

ROOT = Path(__file__).parents[1]
INSIDE = {"lm_head", "language_model", "visual", "get_rope_index", "get_image_features", "get_input_embeddings"}


def test_nobody_else_knows_the_inside_of_a_model():
    found = []
    files = [file for room in ("mr1fast", "benchmarks") for file in (ROOT / room).rglob("*.py")]
    for file in files:
        rooms = file.relative_to(ROOT).parts
        if rooms[:2] in (("mr1fast", "integrations"), ("mr1fast", "kernels")) or rooms == (
            "mr1fast",
            "model",
            "policy.py",
        ):
            continue  # integrations are for the models of other trainers
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                doubled = node.attr == "model" and isinstance(node.value, ast.Attribute) and node.value.attr == "model"
                if node.attr in INSIDE or doubled:
                    found.append(f"{file}:{node.lineno}: .{node.attr}")
    assert len(files) > 60
    assert not found


@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_multiplied_as_they_would_be_convolved(bias):
    layer = torch.nn.Conv3d(3, 5, (2, 4, 4), stride=(2, 4, 4), bias=bias).double()
    vision = SimpleNamespace(patch_embed=SimpleNamespace(proj=layer))
    patches = torch.randn(7, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    leaves = [patches, *layer.parameters()]
    before = layer(patches)
    expected = [before, *torch.autograd.grad(before.sin().sum(), leaves)]
    names = [*layer.state_dict()]
    multiply_patches(vision)
    assert type(layer) is PatchProjection
    assert [*layer.state_dict()] == names
    after = layer(patches)
    torch.testing.assert_close([after, *torch.autograd.grad(after.sin().sum(), leaves)], expected)


def test_a_policy_multiplies_patches():
    layer = tiny_policy(tiny_model()).model.model.visual.patch_embed.proj
    assert type(layer) is PatchProjection


# ---- images and their tokens ----------------------------------------------------------------------------------------


def lose(row):
    """The last image token of a row becomes a word."""

    def change(inputs):
        inputs["input_ids"][row, (inputs["input_ids"][row] == IMAGE).nonzero()[-1]] = 5
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()

    return change


def move(inputs):
    """An image token of the second row is one of the first: the total is right."""
    lose(1)(inputs)
    inputs["input_ids"][0, 0] = IMAGE
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()


def exchange(inputs):
    """The images of the first two rows: the total is right."""
    first, second, third = inputs["image_grid_thw"].tolist()
    inputs["image_grid_thw"] = torch.tensor([second, first, third])


def drop(inputs):
    del inputs["pixel_values"], inputs["image_grid_thw"]


def mistype(inputs):
    inputs["mm_token_type_ids"][0, -1] = 1


@pytest.mark.parametrize("change", [lose(0), lose(3), move, exchange, drop, mistype])
def test_image_tokens_that_do_not_match_the_images(change):
    policy, inputs = tiny_policy(tiny_model()), tiny_inputs()
    policy.place(inputs)
    change(inputs)
    with pytest.raises(UserError, match=r"images of .* tokens came with .* image tokens") as error:
        policy.place(inputs)
    assert "\n" not in str(error.value)


def test_a_token_lost_after_that():
    policy = tiny_policy(tiny_model())
    inputs = policy.place(tiny_inputs())
    lose(0)(inputs)
    with pytest.raises(ValueError, match="do not match"):
        policy.encode_prefix(inputs)


def test_a_cache_is_used_whatever_the_config_says():
    prefixes = []
    for use_cache in (True, False):
        model = tiny_model()
        model.config.get_text_config().use_cache = use_cache
        policy = tiny_policy(model)
        prefixes.append(policy.encode_prefix(policy.place(tiny_inputs())))
    for (keys, values), (other_keys, other_values) in zip(*(prefix.key_values for prefix in prefixes), strict=True):
        assert torch.equal(keys, other_keys)
        assert torch.equal(values, other_values)


# ---- adapters -------------------------------------------------------------------------------------------------------


def adapted(*targets) -> peft.PeftModel:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=list(targets), lora_dropout=0.5, init_lora_weights=False)
    return peft.get_peft_model(tiny_model(tied=False), config).eval()


def test_lora_computes_what_the_merged_model_computes_and_trains_the_adapter_alone():
    model = adapted("q_proj", "v_proj")
    policy = tiny_policy(model)
    inputs = policy.place(tiny_inputs())
    sampler = Sampler(policy, max_completion_length=8)
    rollout = sampler.generate([], num_generations=3, prefix=policy.encode_prefix(inputs))
    batch = Batch(
        inputs,
        3,
        rollout.completion_ids,
        rollout.completion_mask,
        advantages=torch.randn(12, generator=torch.Generator().manual_seed(1)),
        ref_per_token_logps=rollout.per_token_logps - 0.1,
    )
    output = grpo_batch_loss(policy, batch, beta=0.1, temperature=1.0)
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert all(parameter.grad.norm() > 0 for parameter in policy.trainable_parameters())
    assert len(policy.trainable_parameters()) == len(trained) == 2 * 2 * 2  # layers, targets, A and B

    merged = tiny_policy(adapted("q_proj", "v_proj").merge_and_unload())
    with torch.no_grad():
        expected = batch_logps(merged, batch)
        base = batch_logps(tiny_policy(tiny_model(tied=False)), batch)
    torch.testing.assert_close(batch.padded(output.per_token_logps), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.per_token_logps, expected, atol=1e-5, rtol=1e-5)
    assert (base - expected).abs().max() > 0.1, "the adapter is not nothing"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: adapted("q_proj", "lm_head"), "an adapter on the language-model head"),
        (
            lambda: peft.get_peft_model(
                tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=32)
            ),
            "adapters of type PROMPT_TUNING cannot be trained here",
        ),
    ],
)
def test_adapters_that_the_loss_would_not_see(model, says):
    with pytest.raises(UserError, match=says):
        Policy(model(), tiny_processor())

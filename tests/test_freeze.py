"""--freeze: parts that are not trained."""

import pytest
import torch
from train_program import SMALL, main

from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy

# Where the weights of a part are, in the names of a folder's.
PREFIXES = {
    "vision": ("model.visual.patch_embed", "model.visual.blocks"),
    "merger": ("model.visual.merger",),
    "language": ("model.language_model", "lm_head"),
}


@pytest.mark.parametrize("parts", [("vision",), ("vision", "merger"), ("language",)])
def test_the_parts_are_all_of_the_model_and_the_frozen_ones_have_no_graph(parts):
    policy = Policy(load_model(), load_processor()).freeze_parts(parts)
    frozen = tuple(prefix for part in parts for prefix in PREFIXES[part])
    for name, weight in policy.model.named_parameters():
        assert name.startswith(tuple(prefix for part in PREFIXES.values() for prefix in part))
        assert weight.requires_grad != name.startswith(frozen), name
    pixels, grid = torch.randn(64, 294), torch.tensor([[1, 8, 8]])
    features = policy.model.get_image_features(pixels, grid)
    assert features.pooler_output[0].requires_grad == ("merger" not in parts)
    assert features.last_hidden_state.requires_grad == ("vision" not in parts)


def test_a_run_leaves_the_frozen_vision_tower_as_it_was_bit_for_bit(tmp_path):
    run = tmp_path / "run"
    options = [*SMALL, "--task=vc", "--method=sft", "--max-steps=1", "--eval-steps=0", "--freeze=vision, merger"]
    assert main(*options, "--output-dir", run) == 0
    before, after = load_model(EMBEDDED).state_dict(), load_model(run / "vc" / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(PREFIXES["language"]) for name in changed)

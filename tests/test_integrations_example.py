"""examples/plain_pytorch.py learns, and docs/drop-in.md says what is so."""

import inspect
import re
import runpy
from pathlib import Path

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from trl import GRPOConfig

import mr1fast
from mr1fast.integrations import liger, verl
from mr1fast.integrations.trl import GRPODConfig

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")


def test_plain_pytorch_learns(capsys, one_thread):
    example = runpy.run_path(str(ROOT / "examples" / "plain_pytorch.py"))
    assert example["reward"]("7890123") == 1.0
    assert example["reward"]("777") == 0.0
    rewards = example["main"](steps=40)
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.6
    assert "step  39  reward" in capsys.readouterr().out


def test_names_in_the_guides_table_exist():
    """Every name in the table of arguments is one of that library's."""
    known = {
        "mr1fast": set(inspect.signature(mr1fast.grpo_loss).parameters)
        | set(inspect.signature(mr1fast.linear_grpo_loss).parameters),
        "TRL": set(inspect.signature(GRPOConfig).parameters)
        | {"per_token_logps", "old_per_token_logps", "ref_per_token_logps", "completion_ids", "completion_mask"}
        | {"advantages", "importance_sampling_ratio", "num_items_in_batch"},
        "triton": set(inspect.signature(liger.triton_grpo_loss).parameters),
        "fused": set(inspect.signature(LigerFusedLinearGRPOLoss).parameters)
        | set(inspect.signature(LigerFusedLinearGRPOLoss.forward).parameters),
    }
    section = GUIDE[GUIDE.index("## The names of the arguments") : GUIDE.index("## Traps")]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 15
    for ours, trl, triton, fused, *_ in rows:
        for library, cell in (("mr1fast", ours), ("TRL", trl), ("triton", triton), ("fused", fused)):
            assert cell == "-" or set(re.findall(r"`(\w+)`", cell)) <= known[library], (library, cell)


def test_imports_in_the_guide_exist():
    imports = re.findall(r"^\+? ?from (mr1fast[\w.]*) import (.+)$", GUIDE, flags=re.MULTILINE)
    assert len(imports) >= 5
    for module, names in imports:
        namespace = __import__(module, fromlist=["x"])
        assert all(hasattr(namespace, name.strip()) for name in names.split(",")), module
    fields = inspect.signature(GRPODConfig).parameters
    assert all(f"`{name}`" in GUIDE for name in ("kl_schedule", "beta_min", "beta_max", "explore_fraction"))
    assert all(name in fields for name in ("kl_schedule", "beta_min", "beta_max", "explore_fraction"))
    assert all(f"`{mode}`" in GUIDE for mode in verl.AGGREGATIONS)

"""--preset: the experiments of the paper, each a file that --config could read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mr1fast.options.fields import check_choice
from mr1fast.options.recipes import KL_DEFAULTS

FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def preset_file(name: str) -> Path:
    check_choice("--preset", name, PRESETS)
    return FOLDER / f"{name}.yaml"


def sizes_of(model: str) -> Path | None:
    """A folder with the published configuration of a preset's model, so that a plan needs no network; else None."""
    folder = FOLDER / model.rpartition("/")[2]
    named = model.startswith("Qwen/") and not os.path.exists(model)
    return folder if named and (folder / "config.json").exists() else None


def beneath(preset: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a preset beneath other options: those that they exclude are theirs to set."""
    method = given.get("method", preset["method"])
    excluded = {name for other, names in KL_DEFAULTS.items() if other != method for name in names}
    if "task" in given:
        excluded.add("data")
    if given.get("lora_rank") is not None:
        excluded.add("learning_rate")  # the preset's is for all weights, and an adapter's default is another
    return {name: value for name, value in preset.items() if name not in excluded}

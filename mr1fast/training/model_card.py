"""README.md beside a trained model: what it was made from and how, how good it is, how to load it.

model_card.md.jinja is the page.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluation.figures import FIGURES
from mr1fast.options.config import TrainConfig
from mr1fast.options.fields import option_string
from mr1fast.options.parse import FIELDS
from mr1fast.options.recipes import adapter_base
from mr1fast.training.run_folder import versions, write_text
from mr1fast.training.setup import Setup

METHODS = {"grpo-d": "GRPO-D", "grpo": "GRPO", "sft": "supervised fine-tuning"}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_IN_HUB_CACHE = re.compile(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+)/snapshots/\w+/?$")


def write_card(folder: Path, setup: Setup, name: str, result: Mapping[str, Any]) -> None:
    """Write the card of the model that was trained on a task and saved in `folder`; `result` is that of result.json."""
    config = setup.config
    is_adapter = (folder / "adapter_config.json").exists()
    base, base_on_hub = _base(config)
    page = _template().render(
        metadata=yaml.safe_dump(_metadata(config, base if base_on_hub else None, is_adapter), sort_keys=False),
        base=base,
        base_on_hub=base_on_hub,
        is_adapter=is_adapter,
        method=METHODS[config.method],
        data=TASKS[name].title if name in config.tasks else name,
        figures=_figures(name, result),
        rows=[split[name].summary() for split in (setup.train, setup.validation, setup.tests) if name in split],
        command=_command(config, name),
        versions=versions(),
    )
    write_text(folder / "README.md", page)


def _base(config: TrainConfig) -> tuple[str, bool]:
    """What training started from, and whether that is a name on the Hugging Face hub."""
    if config.model is None:
        return "The embedded model of mr1fast", False
    model = adapter_base(config.model) or config.model
    on_hub = hub_name(model)
    return on_hub or Path(model).resolve().name, on_hub is not None


def hub_name(path: str | None) -> str | None:
    """The name on the Hugging Face hub of a model or data set, also where it is a folder of the hub's cache."""
    if path is None:
        return None
    if cached := _IN_HUB_CACHE.search(path):
        return f"{cached[1]}/{cached[2]}"
    return path if _HUB_NAME.fullmatch(path) and not Path(path).exists() else None


def _template() -> Any:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return pages.get_template("model_card.md.jinja")


def _metadata(config: TrainConfig, base: str | None, is_adapter: bool) -> dict[str, Any]:
    """What the hub reads, see https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    data = hub_name(config.data)
    return {
        **({"base_model": base} if base else {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mr1fast", config.method],
        **({"datasets": [data]} if data else {}),
    }


def _figures(name: str, result: Mapping[str, Any]) -> list[tuple[str, int, str, float, float]]:
    """(data, problems, title, before, after) in percent, the task's own data first."""
    after = {name: result["after"].get(name, {}), **result["cross_task"].get(name, {})}
    return [
        (data, before["n"], title, 100 * before[figure], 100 * figures[figure])
        for data, figures in after.items()
        if (before := result["before"].get(data))
        for figure, title in FIGURES.items()
        if figure in before and figure in figures
    ]


def _command(config: TrainConfig, name: str) -> str:
    """The command that trains such a model: the options that differ from their defaults, without anybody's folders."""
    given: dict[str, Any] = {"task": name} if name in config.tasks else {"data": hub_name(config.data) or name}
    if config.model is not None:
        given["model"] = hub_name(config.model) or Path(config.model).resolve().name
    for option, value in config.resolved().items():
        told = FIELDS[option].metadata
        elsewhere = option in ("task", "data", "model") or told["machine"] or told["metavar"] in ("DIR", "PATH")
        if not elsewhere and not _is_default(config, option):
            given[option] = value.get(name) if isinstance(value, Mapping) else value
    return " \\\n    ".join(["python -m mr1fast.train", *map(_written, given, given.values())])


def _written(option: str, value: Any) -> str:
    """An option as the command line takes it."""
    if isinstance(value, bool):
        return option_string(option if value else f"no_{option}")
    return f"{option_string(option)} {shlex.quote(str(value))}"


def _is_default(config: TrainConfig, option: str) -> bool:
    """Whether the option would have this value if it were left out."""
    default: dict[str, Any] = {option: FIELDS[option].default}
    try:
        without = dataclasses.replace(config, **default)
    except UserError:  # another option needs it
        return False
    return without.resolved().get(option) == config.resolved().get(option)

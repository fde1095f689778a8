"""Where data comes from: a path, the name of an embedded task, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mr1fast.data.tasks import TASKS
from mr1fast.data.text_files import whole_characters


def source_of(text: str, *, tasks: bool = False) -> str:
    """What the user named: an absolute path, a name on the hub or, with `tasks`, that of an embedded task.

    A path is absolute, so that it can be read from any folder and is never mistaken for a task.
    """
    named = (tasks and text in TASKS and not os.path.exists(text)) or is_hub_name(text)
    return text if named else os.path.abspath(text)


def sources_of(text: str) -> tuple[str, ...]:
    """Those of a list that is separated by commas, unless that is the path of a file with commas in its name."""
    parts = [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]
    return tuple(source_of(part, tasks=True) for part in parts if part)


def is_hub_name(text: str) -> bool:
    """Whether it is owner/name and leads nowhere here: where there is a folder `owner`, it is a path mistyped."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not os.path.exists(Path(text).parent)


def data_name(source: str) -> str:
    """What it is called: a task's or hub name, or that of its folder, or of its file without the ending."""
    path = Path(source).resolve()
    return whole_characters(path.stem if os.path.isfile(path) else path.name)

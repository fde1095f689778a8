"""What a model is told beside the question: --prompt-suffix and --system-prompt.

Nothing here imports torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from mr1fast.errors import UserError

# The paper's, which is that of R1-V's evaluations.
PROMPT_SUFFIX = "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
# In a model's folder, if it was trained with another prompt than this.
PROMPT_FILE = "prompt.json"


@dataclass(frozen=True)
class Prompt:
    """Text as it is: braces and line ends mean nothing. Raises UserError for text that cannot be part of a prompt.

    suffix: follows every question, after a space unless it begins with white space; "" for none. system: the system
    turn; None for the chat template's own.
    """

    suffix: str = PROMPT_SUFFIX
    system: str | None = None

    def __post_init__(self) -> None:
        for option, text in (("--prompt-suffix", self.suffix), ("--system-prompt", self.system or "")):
            if control := re.search(r"<\|.*?\|>|<image>", text):
                what = "which is no text to a model, but a control token or the place of an image"
                raise UserError(f"{option} contains {control[0]}, {what}; remove it")
            if template := re.search(r"\{(question|problem)\}", text, re.IGNORECASE):
                raise UserError(f"{option} contains {template[0]}, but nothing is filled in; the question comes before")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"{option} is not valid Unicode: {error.reason}") from None

    def after(self, question: str) -> str:
        """The question with the suffix."""
        space = " " if self.suffix[:1].strip() else ""
        return f"{question}{space}{self.suffix}"

    def record(self, folder: Path) -> None:
        """Leave it in the folder of the model that is trained with it."""
        if self != Prompt():
            (folder / PROMPT_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def recorded_prompt(model: str | Path | None) -> Prompt:
    """The prompt that the model in this folder was trained with, as far as is known: the paper's for any other."""
    if model is None:
        return Prompt()
    file = Path(model) / PROMPT_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return Prompt()
    except ValueError:
        raise UserError(f"{file} is not valid JSON; it says which prompt the model was trained with") from None
    if not isinstance(content, dict):
        content = {}
    suffix, system = content.get("suffix"), content.get("system")
    if not (isinstance(suffix, str) and isinstance(system, str | None)):
        raise UserError(f"{file} must have the texts suffix and system, with which the model was trained")
    return Prompt(suffix, system)


def chosen_prompt(model: str | Path | None, suffix: str | None, system: str | None) -> Prompt:
    """What the options say about a model; None where they say nothing."""
    recorded = recorded_prompt(model)
    return Prompt(recorded.suffix if suffix is None else suffix, recorded.system if system is None else system)

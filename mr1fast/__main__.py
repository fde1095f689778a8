"""The command `mr1fast`, or `python -m mr1fast`: `mr1fast train ...` is the same as `python -m mr1fast.train ...`.

Only the program that is asked for is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mr1fast.checks import not_one_of
from mr1fast.options.program import missing_package

COMMANDS = {  # name -> (module with a main(arguments) that returns the exit code, what --help says)
    "train": ("mr1fast.train", "train a Qwen2-VL or Qwen2.5-VL with GRPO-D"),
    "evaluate": ("mr1fast.evaluate", "count how many questions a model answers correctly"),
    "reproduce": ("mr1fast.reproduce", "the paper's table and figures, from runs that are made for them"),
    "plot": ("mr1fast.plot", "draw the curves of one run, or of several in one picture"),
    "check": ("mr1fast.integrations.check", "compare our loss with TRL's or Liger's, number by number"),
    "env": ("mr1fast.env", "print versions, devices, and which backends run here"),
}


def usage() -> str:
    commands = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
    return f"usage: mr1fast COMMAND ...\n\n{commands}\n\n'mr1fast COMMAND --help' explains the options of a command."


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command; 2 if there is no such command."""
    name, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: {not_one_of('the command', name, COMMANDS)}", file=sys.stderr)
        return 2
    module, _ = COMMANDS[name]
    sys.argv = [f"mr1fast {name}", *rest]  # what the program calls itself: options.program.prog
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        return 2
    return program.main(rest)


if __name__ == "__main__":
    sys.exit(main())

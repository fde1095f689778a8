"""`python -m mr1fast.plot RUN [RUN ...]` draws the curves of one run, or of several in one picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mr1fast.errors import UserError
from mr1fast.options.program import Parser, exit_code, prog


def run(arguments: Sequence[str] | None) -> None:
    """Raises UserError."""
    parser = Parser(
        prog=prog("plot"),
        description="Draw rewards, accuracies, KL divergence, entropy, completion lengths and step times against the "
        "training step, for one run or for several in the same picture.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="output folder of a training run")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="picture to write, a .png, .pdf or .svg file [default: curves.png, in the run's folder if only one run is "
        "given, else in the current folder]",
    )
    options = parser.parse(arguments)
    file = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "curves.png"
    if file.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output must be a .png, .pdf or .svg file, got {str(file)!r}")
    from mr1fast.evaluation.curves import draw_curves  # only once the options are right: matplotlib is slow to import

    try:
        print(f"curves: {draw_curves(options.runs, file)}")
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main())

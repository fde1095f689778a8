"""`python -m mr1fast.reproduce`: the paper's table and figures, from runs that are made for them."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mr1fast.errors import UserError
from mr1fast.options.fields import check_choice
from mr1fast.options.preset import PRESETS
from mr1fast.options.program import Parser, exit_code, prog
from mr1fast.options.recipes import is_small_folder
from mr1fast.reproduction.arms import ARMS
from mr1fast.reproduction.experiments import DEFAULT, EXPERIMENTS, Run, runs_of
from mr1fast.training.run_folder import RUNS
from mr1fast.training.stop import Stopped, stop_on_sigterm

ALL = "all"


def build_parser() -> Parser:
    listed = "\n".join(f"  {one.name:9} {one.title}" for one in EXPERIMENTS.values())
    parser = Parser(
        prog=prog("reproduce"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Reproduce the table and the figures of OThink-MR1 (arXiv 2503.16081): train what they compare,\n"
        "test it, and write tables, pictures and JSON, with the paper's numbers beside ours. If it is interrupted,\n"
        f"the same command goes on.\n\nexperiments:\n{listed}\n  {ALL:9} all of these but beyond",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("experiments", metavar="EXPERIMENT", nargs="+", help=f"{', '.join(EXPERIMENTS)} or {ALL}")
    add("--seeds", metavar="LIST", default="0-4", help="seeds of the arms, such as 0-4 or 0,2 [default: 0-4]")
    add("--arms", metavar="LIST", help="only these arms, separated by commas; --dry-run lists them [default: all]")
    add("--dry-run", action="store_true", help="print the arms and how long they will take, and exit")
    add("--redraw", action="store_true", help="train nothing: draw the arms that are in the results folder")
    add("--output-dir", metavar="DIR", type=Path, help=f"folder for the results [default: {RUNS}/reproduce]")
    add(
        "--model",
        metavar="DIR",
        help="model to start from: a small one, or with --preset any other [default: a small one that does not always "
        "follow the instruction, made first by 'make_embedded --disobedient'; with --preset, the preset's]",
    )
    add(
        "--preset",
        metavar="NAME",
        help=f"the paper's own experiment in place of the small one, on a GPU: {', '.join(PRESETS)}",
    )
    add("--data", metavar="PATH", help="data to train on, with --preset [default: the preset's]")
    add("--test-data", metavar="LIST", help="data to test on, with --preset: the task's own first, then the other's")
    return parser


def run(arguments: Sequence[str] | None) -> None:
    """Raises UserError."""
    options = build_parser().parse(arguments)
    names = _experiments(options.experiments)
    seeds = parse_seeds(options.seeds)
    arms = None if options.arms is None else _arms(options.arms, names)
    if options.preset is not None:
        from mr1fast.reproduction.full_scale import FullScale

        full = FullScale.of(options.preset, options.model, options.data, options.test_data)
        full.run(names, seeds, arms, options.output_dir or RUNS / f"reproduce-{options.preset}", options.dry_run)
        return
    for name in ("data", "test_data"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} needs --preset; the small experiments draw their own data")
    if options.model is not None and not is_small_folder(options.model):
        raise UserError(f"--model {options.model} is not a small model; for others, give --preset as well")
    folder = options.output_dir or RUNS / "reproduce"
    runs = runs_of(names, seeds, arms)
    if options.dry_run:
        print(plan(names, runs))
        return
    _reproduce(names, runs, folder, options.model, redraw=options.redraw)


def _reproduce(names: Sequence[str], runs: Sequence[Run], folder: Path, model: str | None, *, redraw: bool) -> None:
    from mr1fast.reproduction.records import Records
    from mr1fast.reproduction.write import write_results

    if not redraw:
        from mr1fast.reproduction.runner import fingerprint, processes, run_arms

        with processes(len(runs)) as executor:  # before there is a base, for which they need not wait
            base = model or str(_made_base(folder / "base"))
            run_arms(executor, runs, Records(folder, fingerprint(base, executor.map)), base)
    found = Records(folder).all(runs)
    for file in write_results(found, [EXPERIMENTS[name] for name in names], folder):
        print(file)


def _made_base(folder: Path) -> Path:
    """The default base, which is made where it is not there yet."""
    if not (folder / "model.safetensors").exists():
        print(f"making the base in {folder}, which takes some minutes", flush=True)
        command = [sys.executable, "-m", "mr1fast.make_embedded", "--disobedient", "--output", str(folder)]
        # In a session of its own Ctrl-C does not reach it, which would print a traceback: it is ended here.
        if code := subprocess.run(command, check=False, start_new_session=True).returncode:
            raise UserError(f"the base could not be made: {' '.join(command)} ended with exit code {code}")
    return folder


def plan(names: Sequence[str], runs: Sequence[Run]) -> str:
    """What --dry-run prints."""
    from mr1fast.reproduction.runner import cores
    from mr1fast.reproduction.seconds import Estimate, spelt

    lines = []
    for name in names:
        lines.append(EXPERIMENTS[name].title)
        for task, arms in EXPERIMENTS[name].arms.items():
            there = [arm for arm in arms if any((run.task, run.arm) == (task, arm) for run in runs)]
            lines += [f"  {task}  {arm:24}{ARMS[arm].label}" for arm in there]
    seconds = Estimate().left(runs, cores())
    seeds = sorted({run.seed for run in runs})
    lines += ["", f"{len(runs)} arms with the base and the seeds {', '.join(map(str, seeds))}, each once"]
    return "\n".join([*lines, f"about {spelt(seconds)} on {cores()} quiet cores"])


# ---- the command line ------------------------------------------------------------------------------------------------


def _experiments(given: Sequence[str]) -> list[str]:
    """In the order given, each once."""
    for name in given:
        check_choice("the experiment", name, (*EXPERIMENTS, ALL))
    return list(dict.fromkeys(name for one in given for name in (DEFAULT if one == ALL else [one])))


def parse_seeds(text: str) -> list[int]:
    """Seeds of "0-4" or "0,2,7-9". Raises UserError."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if found is None:
            raise UserError(f"--seeds must be seeds such as 0-4 or 0,2, got {text!r}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < first + 1000:
            raise UserError(f"--seeds: {part.strip()} is no range of at most 1000 seeds")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text} names a seed twice")
    return seeds


def _arms(text: str, names: Sequence[str]) -> list[str]:
    there = dict.fromkeys(arm for name in names for arms in EXPERIMENTS[name].arms.values() for arm in arms)
    given = [name.strip() for name in text.split(",")]
    for name in given:
        check_choice("--arms: an arm", name, tuple(there))
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 for a mistake of the user's; 128 + its number after a signal."""
    try:
        with stop_on_sigterm():
            code = exit_code(run, arguments)
    except Stopped as stopped:
        print(f"\nstopped by {stopped}", file=sys.stderr)
        code = stopped.exit_code
    if code > 2:
        print("the same command goes on where this one has stopped", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

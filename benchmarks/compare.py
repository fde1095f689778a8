"""`--base REV`: our own cases at this tree and at another commit, in turn, each in its own process.

The other commit is checked out into a temporary git worktree, gets this tree's benchmarks/, and its extension is built.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
ROUNDS = 3
Key = tuple[str, str, str, str, str]


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A built worktree of the revision, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mr1fast-base-") as folder:
        tree = Path(folder) / "tree"
        _run(["git", "worktree", "add", "--detach", "--quiet", str(tree), revision], ROOT)
        try:
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(ROOT / "benchmarks", tree / "benchmarks")
            _run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], tree)
            yield tree
        finally:
            _run(["git", "worktree", "remove", "--force", str(tree)], ROOT)


def _run(command: list[str], where: Path) -> None:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, env=_environment(where))
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree)}


def measure(tree: Path, args: argparse.Namespace) -> dict[Key, float]:
    """Median milliseconds of each of our cases, by (group, shape, dtype, case, pages)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.csv"
        command = [sys.executable, "-m", "benchmarks.run", *args.groups, "--filter", f"mr1fast {args.filter}"]
        command += ["--csv", str(path), "--seconds", str(args.seconds), *(["--quick"] if args.quick else [])]
        command += ["--device", args.device] if args.device else []
        command += ["--processor-time"] if args.processor_time else []
        _run(command, tree)
        with path.open() as file:
            return {
                (row["group"], row["shape"], row["dtype"], row["case"], row["pages"]): float(row["median_ms"])
                for row in csv.DictReader(file)
                if "mr1fast" in row["case"] and row["median_ms"]
            }


def main(args: argparse.Namespace) -> int:
    here: list[dict[Key, float]] = []
    base: list[dict[Key, float]] = []
    with checkout(args.base) as tree, tqdm(total=2 * ROUNDS, unit="run", file=sys.stderr, leave=False) as bar:
        for _ in range(ROUNDS):
            for where, results in ((ROOT, here), (tree, base)):
                bar.set_description("here" if where is ROOT else args.base)
                results.append(measure(where, args))
                bar.update()
    print(f"time at {args.base} / time here (above 1: faster here), median of {ROUNDS} pairs; and each pair\n")
    for key in here[0]:
        if all(key in results for results in (*here, *base)):
            ratios = [b[key] / h[key] for h, b in zip(here, base)]
            pairs = " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"  {statistics.median(ratios):6.2f}   {', '.join(part for part in key if part)}   ({pairs})")
        else:
            print(f"     new   {', '.join(part for part in key if part)}")
    return 0

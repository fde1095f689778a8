"""Benchmarks: every figure this project claims comes from here.

  python -m benchmarks.run loss                       the loss head from logits, beside its peers (5 to 10 minutes)
  python -m benchmarks.run loss --quick               tiny shapes, to see that everything runs (a minute)
  python -m benchmarks.run loss --filter "151936 mr1fast"     only the cases that contain every word
  python -m benchmarks.run loss --csv out.csv --plot out.png  keep the results, draw them
  python -m benchmarks.run linear --device cuda       only the scenes on that device
  python -m benchmarks.run loss --base main           our cases here and at another commit, alternately
  python -m benchmarks.run --list                     all cases

How to read the table: `rate` counts only the bytes that must move (logits read once, gradient written once) or the
floating-point operations of the GEMMs; `of limit` is that rate divided by the rate of the machine's own limit for such
work, `of memcpy` by memcpy's; `time ratio` is the time divided by ours. Times are medians over rounds that call every
case once, and "(best)" compares each case's fastest call. On a GPU `ms` is the time on the device alone, and `call ms`
is the time of the whole call on an idle device, Python included. Ratios within one run are reliable on a busy machine,
milliseconds are not. Results belong in benchmarks/results/, and what did not help in benchmarks/LOG.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import cases, report, timing


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    groups = "".join(f"\n  {name:8s}{about}" for name, (_, about) in cases.GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__ + "\nGroups:" + groups,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help=f"group to measure: {', '.join(cases.GROUPS)} [default: all]"
    )
    parser.add_argument("--filter", default="", metavar="WORDS", help="measure only cases that contain all these words")
    parser.add_argument("--alone", action="store_true", help="leave out the cases that those are compared with")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="measure only on this device [default: both]")
    parser.add_argument(
        "--quick", action="store_true", help="use tiny shapes and few calls, to see that everything runs"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="X", help="seconds of timed calls per case [default: %(default)s]"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the processor time of a single thread, for a CPU that other programs use too",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results to FILE, with device and versions")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the time ratios to FILE.png")
    parser.add_argument("--base", metavar="REV", help="compare our cases with those of commit REV, built separately")
    parser.add_argument("--list", action="store_true", help="print the cases without measuring them")
    args = parser.parse_args(argv)
    if unknown := set(args.groups) - set(cases.GROUPS):
        parser.error(f"unknown group {', '.join(sorted(unknown))}; the groups are {', '.join(cases.GROUPS)}")
    if args.base and (args.csv or args.plot or args.list):
        parser.error("--base only prints its comparison, and cannot be combined with --csv, --plot or --list")
    if args.processor_time:
        torch.set_num_threads(1)  # waiting threads spin, which counts as work
        timing.now = time.process_time
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.base:
        from benchmarks import compare

        return compare.main(args)
    scenes = [scene for group in args.groups or cases.GROUPS for scene in cases.load(group, args.quick)]
    scenes = [scene for scene in scenes if args.device in (None, scene.device)]
    selected = cases.matching(scenes, args.filter, args.alone)
    if not selected:
        where = f" on {args.device}" if args.device else ""
        print(f"no case{where} matches {args.filter!r}; --list shows the cases", file=sys.stderr)
        return 2
    if args.list:
        for scene, chosen in selected:
            print(f"{scene.title}: {'; '.join(case.name for case in chosen)}")
        return 0

    about = report.environment()
    table, whole = measure(selected, args, about)
    if table:
        report.print_table(table)
    print(f"\n{about['device']}; torch {about['torch']}; commit {about['commit']}")
    if not whole:
        print("interrupted: the table above holds what was measured until then", file=sys.stderr)
    if args.plot and table:
        report.plot(args.plot, table, about)
    return 0 if whole else 130


def measure(
    selected: list[tuple[cases.Scene, tuple[cases.Case, ...]]], args: argparse.Namespace, about: report.Row
) -> tuple[list[report.Row], bool]:
    """(the rows, whether they are all). The CSV is written whenever there is something new, and once more at Ctrl-C."""
    table: list[report.Row] = []
    whole = False
    try:
        with tqdm(total=len(selected), unit="scene", file=sys.stderr, leave=False, miniters=0, disable=None) as bar:

            def on_call(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update(0)

            for scene, chosen in selected:
                bar.set_description(scene.title)
                earlier = table
                for measured in timing.measure(scene, chosen, 0.05 if args.quick else args.seconds, on_call):
                    table = earlier + report.rows(scene, measured)
                    if args.csv:
                        report.write_csv(args.csv, table, about)
                bar.update()
        whole = True
    except KeyboardInterrupt:
        if args.csv and table:
            report.write_csv(args.csv, table, about)
    return table, whole


if __name__ == "__main__":
    raise SystemExit(main())

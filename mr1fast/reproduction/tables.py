"""results.md: what was found, as tables, with the paper's numbers beside ours and what is not resolved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from mr1fast.reproduction.arms import BASE, OTHER, TEST_OF, TESTS, TITLES, Test, label, tests_of
from mr1fast.reproduction.experiments import Comparison, Experiment
from mr1fast.reproduction.published import FIG7, TABLE1
from mr1fast.reproduction.results import ANYHOW, Results, spread
from mr1fast.reproduction.statistics import LEVEL, Difference, binomial_error


def report(results: Results, experiments: Iterable[Experiment], about: dict[str, Any]) -> str:
    """The whole page. about: what the results were computed by."""
    parts = ["# Results", _about(results, about)]
    for experiment in experiments:
        if any(results.seeds(task, arm) for task, arms in experiment.arms.items() for arm in arms):
            parts += [f"## {experiment.title}", experiment.question, *_tables(results, experiment)]
            parts += _picture(experiment.name)
            parts += [looks(results, experiment.comparisons)] if experiment.comparisons else []
        else:
            parts += [f"## {experiment.title}", "Not run."]
    return "\n\n".join(parts) + "\n"


def _about(results: Results, about: dict[str, Any]) -> str:
    errors = (
        f"{test.title}: {results.problems(test)} problems, "
        f"{binomial_error(results.base(test), results.problems(test)):.1f} points"
        for test in TESTS
    )
    lines = [
        "VC is trained on shapes and tested on vehicles on the same grounds (the far shift: on darker, coloured "
        "grounds); GR is tested on pairs of angles that are not trained on. Accuracies are greedy and in per cent: the "
        "answer must be in tags, as the paper counts; in brackets, tags or not. ± is the standard deviation over "
        "seeds. The number of test problems alone makes a standard error (at the base's accuracy) of: "
        f"{'; '.join(errors)}. It cancels in part in differences, which are on the same problems.",
        *(f"- {name}: {value}" for name, value in about.items()),
    ]
    return "\n".join([lines[0], "", *lines[1:]])


def _picture(name: str) -> list[str]:
    return [] if name in ("table1", "controls", "beyond") else [f"![{name}]({name}.png)"]


# ---- accuracies ------------------------------------------------------------------------------------------------------


def _tables(results: Results, experiment: Experiment) -> list[str]:
    if experiment.name in ("fig1", "fig3", "fig5"):  # pictures alone
        return []
    return [accuracies(results, experiment, task) for task in experiment.arms]


def accuracies(results: Results, experiment: Experiment, task: str) -> str:
    """A row for each arm on this task and a column for each test, the task's own first."""
    own, cross = TEST_OF[task], TEST_OF[OTHER[task]]
    tests = (own, cross, *(test for test in tests_of(task) if test not in (own, cross)))
    paper = {"table1": "the paper's, 2B / 7B", "fig7": "the paper's change on the other task, 2B"}.get(experiment.name)
    head = [f"trained on {TITLES[task]}", *(_column(test, task) for test in tests), "well formed", "seeds"]
    rows = [[BASE.label, *(_base_cell(results, test) for test in tests), _base_form(results, own), ""]]
    names = [BASE.name]
    for arm in experiment.arms[task]:
        seeds = results.seeds(task, arm)
        if seeds:
            cells = [_cell(results, task, arm, test) for test in tests]
            form, _ = spread(results.values(task, arm, own, "format_accuracy"))
            rows.append([label(arm), *cells, f"{form:.0f}", _ranges(seeds)])
            names.append(arm)
    if paper:
        head.append(paper)
        rows = [[*row, _paper_cell(experiment.name, task, name)] for row, name in zip(rows, names)]
    return markdown(head, rows)


def _column(test: Test, task: str) -> str:
    if test == TEST_OF[task]:
        return f"**{test.title}**"
    return test.title if test.task == task else f"other task, {test.title}"


def _cell(results: Results, task: str, arm: str, test: Test) -> str:
    centre, deviation = spread(results.values(task, arm, test))
    anyhow, _ = spread(results.values(task, arm, test, ANYHOW))
    return f"{centre:.1f}{'' if deviation is None else f' ± {deviation:.1f}'} ({anyhow:.1f})"


def _base_cell(results: Results, test: Test) -> str:
    return f"{results.base(test):.1f} ({results.base(test, ANYHOW):.1f})"


def _base_form(results: Results, test: Test) -> str:
    return f"{results.base(test, 'format_accuracy'):.0f}"


def _paper_cell(experiment: str, task: str, arm: str) -> str:
    if experiment == "fig7":
        return f"{FIG7[task][arm]:+.1f} %" if arm in FIG7[task] else ""
    return " / ".join(f"{table[arm][task]:.1f}" for table in TABLE1.values() if arm in table)


# ---- differences -----------------------------------------------------------------------------------------------------


def looks(results: Results, comparisons: Sequence[Comparison]) -> str:
    """All comparisons of an experiment, corrected together."""
    found = results.differences(comparisons)
    head = [
        "trained on",
        "tested on",
        "difference, points",
        "mean ± standard error",
        "95 % interval",
        "p, corrected",
        "",
    ]
    rows = [
        [TITLES[one.task], TITLES[one.test.task], one.title, *_numbers(difference, p), verdict(difference, p)]
        for one, difference, p in found
    ]
    what = (
        f"Differences paired by seed. The intervals are Student's; p is corrected for the {len(found)} differences of "
        f"this table (Holm), and a difference is resolved where it is below {LEVEL:g}."
    )
    return f"{what}\n\n{markdown(head, rows)}"


def _numbers(one: Difference, p: float) -> list[str]:
    if math.isnan(one.p):
        return [f"{one.mean:+.1f}", "", ""]
    return [f"{one.mean:+.1f} ± {one.error:.1f}", f"{one.low:+.1f} to {one.high:+.1f}", f"{p:.2g}"]


def verdict(one: Difference, p: float) -> str:
    if math.isnan(one.p):
        return "one seed: nothing can be said"
    return f"resolved, {one.n} seeds" if p < LEVEL else f"not resolved, {one.n} seeds"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ranges(seeds: Sequence[int]) -> str:
    """Such as "0 to 4", or "0, 2"."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))

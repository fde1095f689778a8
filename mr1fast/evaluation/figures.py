"""The accuracies of an evaluation as rows with titles, for the terminal and for report.html."""

from __future__ import annotations

import math
from typing import Any

from mr1fast.evaluation.result import EvalResult, wilson_interval

FIGURES = {
    "greedy_accuracy": "greedy accuracy",
    "anyhow_accuracy": "greedy, in tags or not",
    "sampled_accuracy": "sampled accuracy",
    "format_accuracy": "well-formed answers",
    "accuracy_when_formatted": "greedy, of the well-formed",
    "accuracy_as_r1v": "greedy, as R1-V counts",
}
MAX_ROWS = 12  # of accuracy by answer


def heading(result: EvalResult, settings: dict[str, Any]) -> str:
    """Such as "shapes, test split (cut from train), 6 problems"; `settings` are those of evaluation.json."""
    rows = "all rows" if settings["split"] == "all" else f"{settings['split']} split"
    cut = f" (cut from {settings['cut_from']})" if "cut_from" in settings else ""
    stopped = f" (stopped {settings['stopped']})" if "stopped" in settings else ""
    return f"{settings['data']}, {rows}{cut}, {result.n} problem{'s' * (result.n != 1)}{stopped}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def figure_rows(result: EvalResult, settings: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, remark) of each figure."""
    low, high = wilson_interval(result.greedy_accuracy, result.n)
    remarks = {
        "greedy_accuracy": f"95 % interval: {percent(low)} to {percent(high)}",
        "sampled_accuracy": f"{settings['sampled']} a problem, at temperature {settings['temperature']:g}",
    }
    values = {name: getattr(result, name) for name in FIGURES}
    return [
        (title, percent(values[name]), remarks.get(name, ""))
        for name, title in FIGURES.items()
        if not math.isnan(values[name])
    ]


def answer_rows(result: EvalResult) -> list[tuple[str, int, int]]:
    """(answer, right, all) of each true answer. If many, numbers are grouped in ranges, rare texts in "others"."""
    counts = result.by_answer()
    if len(counts) <= MAX_ROWS:
        return [(answer, right, n) for answer, (right, n) in counts.items()]
    try:
        return _ranges({float(answer): count for answer, count in counts.items()})
    except ValueError:
        pass
    by_size = sorted(counts.items(), key=lambda item: -item[1][1])
    rows = [(answer, right, n) for answer, (right, n) in by_size[: MAX_ROWS - 1]]
    rest = [count for _, count in by_size[MAX_ROWS - 1 :]]
    return [*rows, (f"{len(rest)} others", sum(r for r, _ in rest), sum(n for _, n in rest))]


def _ranges(counts: dict[float, tuple[int, int]]) -> list[tuple[str, int, int]]:
    ordered = sorted(counts.items())
    size = -(-len(ordered) // 8)
    rows = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        name = f"{part[0][0]:g} to {part[-1][0]:g}" if len(part) > 1 else f"{part[0][0]:g}"
        rows.append((name, sum(right for _, (right, _) in part), sum(n for _, (_, n) in part)))
    return rows

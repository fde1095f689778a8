"""curves.png: what runs logged, over their steps.

matplotlib's Figure is used without pyplot, so that nothing here needs a display or changes global settings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluation.drawing import drawable, drawing
from mr1fast.evaluation.metrics_file import rows_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
DRAWN = 1e100  # absolute values below this have a place in a picture


@dataclass(frozen=True)
class Curve:
    """A line in a panel. metric: its name, with {data} for the task or data set. sft: only of SFT runs, or not."""

    metric: str
    style: str = "-"
    label: str = ""
    smooth: bool = True
    scale: float = 1.0
    sft: bool | None = None


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    curves: tuple[Curve, ...]
    percent: bool = False


PANELS = (
    Panel(
        "Accuracy on unseen problems",
        "validation split (◇ test split), %",
        (
            Curve("eval/{data}/greedy_accuracy", "-", "greedy", smooth=False, scale=100),
            Curve("eval/{data}/sampled_accuracy", ":", "sampled", smooth=False, scale=100),
        ),
        percent=True,
    ),
    Panel(
        "Accuracy and format while training",
        "sampled completions (%)",
        (
            Curve("rewards/accuracy_reward/mean", "-", "right", scale=100),
            Curve("rewards/format_reward/mean", ":", "well-formed", scale=100),
        ),
        percent=True,
    ),
    Panel("Reward", "mean of a step's completions", (Curve("reward"),)),
    Panel("KL divergence from the base", "nats per token", (Curve("kl"),)),
    Panel("KL weight β", "β", (Curve("beta", smooth=False),)),
    Panel("Entropy", "nats per token", (Curve("entropy"),)),
    Panel("Completion length", "mean (tokens)", (Curve("completions/mean_length"),)),
    Panel("GRPO loss", "loss of a step", (Curve("loss", sft=False),)),
    Panel("SFT loss", "nats per token", (Curve("loss", sft=True),)),
    Panel("Step time", "seconds", (Curve("step_time"),)),
)


@dataclass(frozen=True)
class Series:
    """What one run logged on one task."""

    run: Path
    task: str
    rows: list[dict[str, Any]]  # by step, ascending; of the metrics only those that are drawn
    result: dict[str, Any]  # of result.json, as far as the run has come

    @property
    def method(self) -> str:
        return self.result.get("config", {}).get("method", "")

    def values(self, curve: Curve) -> tuple[np.ndarray, np.ndarray]:
        """Steps and finite values of a curve; rows that lack the metric are left out."""
        name = curve.metric.format(data=self.task)
        rows = self.rows if curve.sft in (None, self.method == "sft") else []
        found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        finite = [(step, value) for step, value in found if abs(value) < DRAWN]  # no NaN, inf or number beyond a float
        steps, values = np.array(finite, dtype=float).reshape(-1, 2).T
        return steps, values

    def test_accuracy(self, when: str) -> float | None:
        """Greedy accuracy on the test split in percent, "before" or "after" training."""
        figures = self.result.get(when, {}).get(self.task, {})
        return 100 * figures["greedy_accuracy"] if "greedy_accuracy" in figures else None


def read_run(run: Path) -> list[Series]:
    """The series of a run's folder, one per task. Raises UserError if there are none."""
    file = run / "metrics.jsonl"
    if not run.is_dir():
        raise UserError(f"run folder {str(run)!r} does not exist")
    if not file.exists():
        raise UserError(f"{str(run)!r} is not a run: it has no metrics.jsonl")
    tasks: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows_in(file):
        task = str(row.get("task", run.name))
        tasks.setdefault(task, {})[row["step"]] = {name: row[name] for name in _drawn(task) if name in row}
    if not tasks:
        raise UserError(f"{str(file)!r} has no training step in it yet")
    try:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = {}
    result = result if isinstance(result, dict) else {}
    return [Series(run, task, [rows[step] for step in sorted(rows)], result) for task, rows in tasks.items()]


@cache
def _drawn(task: str) -> list[str]:
    """The metrics of a task that are drawn: a long run has more of others than should be held at once."""
    return ["step", *dict.fromkeys(curve.metric.format(data=task) for panel in PANELS for curve in panel.curves)]


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw_curves(runs: Sequence[Path], file: Path) -> Path:
    """Draw every metric that the runs have over their steps. Raises UserError for a folder that is no run."""
    series = [one for run in runs for one in read_run(run)]
    panels = [panel for panel in PANELS if any(len(s.values(c)[0]) for s in series for c in panel.curves)]
    if not panels:
        raise UserError(f"{', '.join(map(str, runs))}: there is no metric to draw")
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with drawing():
        figure = _empty_figure(rows, columns, legend=0.2 + 0.25 * len(series))
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels):
            _draw_panel(axis, panel, series)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        _draw_legend(figure, _labels(series))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return file


def _empty_figure(rows: int, columns: int, legend: float) -> Figure:
    """A figure with room for this many panels, and for a legend of this height (inches) above them."""
    figure = Figure(figsize=(max(4.1 * columns, 8), 3.1 * rows + legend), dpi=110)
    # Fixed margins in inches: a layout engine would take longer than everything else together.
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.12 / width,
        bottom=0.5 / height,
        top=1 - (legend + 0.5) / height,
        wspace=0.75 / (width / columns - 0.75),
        hspace=1.05 / ((height - legend) / rows - 1.05),
    )
    return figure


def _draw_legend(figure: Figure, labels: Sequence[str]) -> None:
    handles = [
        Line2D([], [], color=_colour(i), ls=_dashes("-", i), lw=3, label=label) for i, label in enumerate(labels)
    ]
    place = (0.005, 0.997)
    legend = figure.legend(handles=handles, loc="upper left", frameon=False, fontsize=11, bbox_to_anchor=place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a $


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _dashes(style: str, index: int) -> str | tuple[float, tuple[float, float]]:
    """Each series but the first has gaps, so that what is behind it shows where two coincide."""
    if style == ":":
        return (2.0 * index, (1.0, 2.0))
    return "-" if index == 0 else (0.0, (max(5.0 - index, 1.0), 2.0))


def _labels(series: Sequence[Series]) -> list[str]:
    """A label for each series: what distinguishes it, and its accuracy on the test split before and after training."""
    runs = list(dict.fromkeys(one.run for one in series))
    names = {one.run: one.run.resolve().name for one in series}
    if len(set(names.values())) < len(runs):
        names = {run: str(run) for run in runs}
    several_tasks = len({one.task for one in series}) > 1
    labels = []
    for one in series:
        task = TASKS[one.task].title if one.task in TASKS else one.task
        parts = [names[one.run]] if len(runs) > 1 else []
        parts += [one.method] if one.method else []
        parts += [task] if several_tasks or len(runs) == 1 else []
        label = ", ".join(parts)
        before, after = one.test_accuracy("before"), one.test_accuracy("after")
        if before is not None and after is not None:
            label += f": {before:.1f} % right on the test split before training, {after:.1f} % after"
        labels.append(drawable(label))
    return labels


def _draw_panel(axis: Axes, panel: Panel, series: Sequence[Series]) -> None:
    bottom, top = _draw_lines(axis, panel, series)
    axis.set_title(panel.title, fontsize=11.5, fontweight="bold", loc="left", pad=20)
    axis.set_ylabel(panel.unit, fontsize=9)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.tick_params(labelsize=8.5)
    # The same steps in all panels, and from the first to the last, even where there is only one.
    last = max(one.rows[-1]["step"] for one in series) or 1
    axis.set_xlim(-0.02 * last, 1.02 * last)
    axis.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if panel.percent:
        axis.set_ylim(0, 103)
    else:
        span = (top - bottom) or 1.0
        axis.set_ylim(bottom - (0.08 * span if bottom < 0 else 0), top + 0.1 * span)
    styles = [curve for curve in panel.curves if curve.label]
    handles = [Line2D([], [], color="0.3", ls=curve.style, lw=2, label=curve.label) for curve in styles]
    if panel is PANELS[0] and any(one.test_accuracy("before") is not None for one in series):
        handles.append(Line2D([], [], label="greedy, test split", **_TEST_MARK, color="0.3"))
    if handles:  # between title and axes: a curve may go anywhere inside
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.98), "ncols": len(handles)}
        axis.legend(handles=handles, **place, fontsize=8.5, frameon=False, columnspacing=1.2, handlelength=1.8)


def _draw_lines(axis: Axes, panel: Panel, series: Sequence[Series]) -> tuple[float, float]:
    """Draw each curve of each series; the range that they take, which 0 is always in."""
    tops, bottoms = [0.0], [0.0]
    for index, one in enumerate(series):
        if panel is PANELS[0]:
            _mark_test_split(axis, one, _colour(index))
        for curve in panel.curves:
            steps, values = one.values(curve)
            if not len(steps):
                continue
            values = values * curve.scale
            line = smoothed(values) if curve.smooth else values
            if curve.smooth and len(values) > 1:
                axis.plot(steps, values, color=_colour(index), lw=0.7, alpha=0.22)
            marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(steps) <= 12 else {}
            style = _dashes(curve.style, index)
            axis.plot(steps, line, ls=style, color=_colour(index), lw=2, clip_on=False, **marker)  # all of a point at 0
            # The range covers the raw values except outliers, such as a first step that compiles.
            tops.append(max(line.max(), np.quantile(values, 0.97)))
            bottoms.append(min(line.min(), np.quantile(values, 0.03)))
    return min(bottoms), max(tops)


_TEST_MARK: dict[str, Any] = {"ls": "", "marker": "D", "markersize": 6, "markerfacecolor": "white"}


def _mark_test_split(axis: Axes, one: Series, colour: str) -> None:
    """Mark the accuracy before and after training on the test split, by which nothing was ever chosen."""
    for when, step in (("before", 0), ("after", one.rows[-1]["step"])):
        accuracy = one.test_accuracy(when)
        if accuracy is not None:
            axis.plot([step], [accuracy], color=colour, zorder=3, **_TEST_MARK)


def smoothed(values: np.ndarray) -> np.ndarray:
    """A Gaussian average over neighbouring points [n], a fortieth of the run wide; near the ends over fewer points."""
    n = len(values)
    if n < 5:
        return values
    sigma = max(1.0, n / 40)
    reach = int(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    middle = slice(reach, reach + n)
    return np.convolve(values, kernel)[middle] / np.convolve(np.ones(n), kernel)[middle]

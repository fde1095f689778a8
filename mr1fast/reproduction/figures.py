"""The paper's figures, drawn from the finished arms: means over the seeds, and their standard deviation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from mr1fast.evaluation.curves import COLOURS
from mr1fast.evaluation.drawing import drawing
from mr1fast.options.reward_weights import DEFAULT_REWARDS, parse_reward_weights
from mr1fast.reproduction.arms import OTHER, TEST_OF, TITLES, Test, label
from mr1fast.reproduction.experiments import BASE_RUN, MAIN, Experiment, Run
from mr1fast.reproduction.published import FIG7
from mr1fast.reproduction.qualitative import draw_answers
from mr1fast.reproduction.results import ACCURACY, ANYHOW, Results, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOUR = dict(zip(MAIN, COLOURS))
TESTED_ON = {"vc": "VC (vehicles)", "gr": "GR"}  # titles of the splits


def draw(experiment: Experiment, results: Results, folder: Path) -> Path | None:
    """The picture of an experiment; None if it has none, or nothing to show yet."""
    if experiment.name not in FIGURES:
        return None
    file = folder / f"{experiment.name}.png"
    with drawing():
        figure = FIGURES[experiment.name](results, experiment)
        if figure is None:
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return file


def _colour(arm: str) -> str:
    return COLOUR.get(arm, COLOURS[len(COLOUR)])


def _panels(number: int, title: str, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * number, 3.6), dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def _finish(axis: Axes, title: str, x: str, y: str = "accuracy (%)") -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


# ---- curves over the steps -------------------------------------------------------------------------------------------


def _fig1(results: Results, experiment: Experiment) -> Figure | None:
    shown = [(task, test) for task in experiment.arms for test in (task, OTHER[task]) if results.seeds(task, "sft")]
    if not shown:
        return None
    title = "SFT and GRPO while they train: accuracy (lines), right in tags or not (dots)"
    figure, axes = _panels(len(shown), title, 3.6)
    for axis, (task, test) in zip(axes, shown):
        for arm in experiment.arms[task]:
            for key, style in ((ACCURACY, "-"), (ANYHOW, ":")):
                _watched(axis, results, task, arm, TEST_OF[test], key, style)
        _finish(axis, f"trained on {TITLES[task]}, tested on {TESTED_ON[test]}", "optimizer step")
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure


def _watched(axis: Axes, results: Results, task: str, arm: str, test: Test, key: str, style: str) -> None:
    """Mean over the seeds from the base on; a band of their deviation."""
    begin = results.records[BASE_RUN]["watched"][0][test.name][key]
    rows = [results.records[Run(task, arm, seed)]["watched"] for seed in results.seeds(task, arm)]
    if not rows:
        return
    steps = [0, *(point["step"] for point in rows[0])]
    values = 100 * np.array([[begin, *(point[test.name][key] for point in row)] for row in rows])
    name = label(arm) if style == "-" else None
    axis.plot(steps, values.mean(0), style, color=_colour(arm), lw=2, label=name)
    if style == "-" and len(rows) > 1:
        low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
        axis.fill_between(steps, low, high, color=_colour(arm), alpha=0.15, lw=0)


def _fig5(results: Results, experiment: Experiment) -> Figure | None:
    tasks = [task for task, arms in experiment.arms.items() if any(results.seeds(task, arm) for arm in arms)]
    if not tasks:
        return None
    figure, axes = _panels(2 * len(tasks), "Rewards over the steps, mean of the sampled completions", 3.6)
    kinds = [(task, kind) for task in tasks for kind in ("accuracy", "format")]
    for axis, (task, kind) in zip(axes, kinds):
        for arm in experiment.arms[task]:
            rows = [results.records[Run(task, arm, seed)]["curve"] for seed in results.seeds(task, arm)]
            if rows:
                values = [[point[f"rewards/{kind}_reward/mean"] for point in row] for row in rows]
                steps = [point["step"] for point in rows[0]]
                axis.plot(steps, np.array(values).mean(0), color=_colour(arm), lw=1.6, label=label(arm))
        _finish(axis, f"{TITLES[task]}: {kind} reward", "optimizer step", "reward")
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure


# ---- one number per arm ----------------------------------------------------------------------------------------------


def _fig4(results: Results, experiment: Experiment) -> Figure | None:
    ((task, arms),) = experiment.arms.items()
    figure, axes = _panels(1, f"Weight of the format reward, {TITLES[task]}", 5.2)
    there = [arm for arm in arms if results.seeds(task, arm)]
    rewards = {arm: str(results.option(task, arm, "reward_weights", DEFAULT_REWARDS)) for arm in there}
    alphas = {arm: parse_reward_weights(text, arm).get("format", 0.0) for arm, text in rewards.items()}
    if not alphas:
        return None
    _over(axes[0], results, task, alphas, TEST_OF[task])
    _finish(axes[0], f"trained and tested on {TITLES[task]}", "α")
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure


def _fig6(results: Results, experiment: Experiment) -> Figure | None:
    ((task, arms),) = experiment.arms.items()
    figure, axes = _panels(2, f"Constant KL weights, trained on {TITLES[task]}", 5.0)
    weights = {arm: results.option(task, arm, "beta") for arm in arms if results.seeds(task, arm) and arm != "grpo-d"}
    if not weights:
        return None
    for axis, test in zip(axes, (task, OTHER[task])):
        _over(axis, results, task, weights, TEST_OF[test])
        if dynamic := results.values(task, "grpo-d", TEST_OF[test]):
            axis.axhline(spread(dynamic)[0], color=COLOUR["grpo-d"], lw=1.5, label="GRPO-D")
        axis.set_xscale("symlog", linthresh=0.04)
        axis.set_xticks([*weights.values()], [f"{beta:.2g}" for beta in weights.values()])
        _finish(axis, f"tested on {TESTED_ON[test]}", "β, constant")
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure


def _over(axis: Axes, results: Results, task: str, places: Mapping[str, float], test: Test) -> None:
    """Accuracy, in tags and anyhow, of these arms over a number that each has, and the base's."""
    ordered = dict(sorted(places.items(), key=lambda item: item[1]))
    for figure, style, what in ((ACCURACY, "o-", "accuracy"), (ANYHOW, "o:", "in tags or not")):
        centres, errors = _bars(results, task, [*ordered], test, figure)
        colour = COLOUR["grpo-mean"]
        axis.errorbar([*ordered.values()], centres, errors, fmt=style, color=colour, capsize=3, lw=1.8, label=what)
    axis.axhline(results.base(test), color="0.5", lw=1, ls="--", label="base")


def _bars(results: Results, task: str, arms: Sequence[str], test: Test, figure: str) -> tuple[list[float], list[float]]:
    """Means and standard deviations over the seeds."""
    points = [spread(results.values(task, arm, test, figure)) for arm in arms]
    return [centre for centre, _ in points], [deviation or 0.0 for _, deviation in points]


def _fig7(results: Results, experiment: Experiment) -> Figure | None:
    shown = {
        task: there
        for task, arms in reversed(experiment.arms.items())
        if (there := [arm for arm in arms if results.seeds(task, arm)])
    }
    if not shown:
        return None
    figure, axes = _panels(len(shown), "Trained on one task, tested on the other: change against the base", 5.2)
    for axis, (task, arms) in zip(axes, shown.items()):
        _change(axis, results, task, arms)
    axes[0].legend(fontsize=8.5, frameon=False)
    return figure


def _change(axis: Axes, results: Results, task: str, arms: Sequence[str]) -> None:
    """Bars of the change against the base in per cent of it, with the paper's beside."""
    test, width = TEST_OF[OTHER[task]], 0.27
    for place, (key, alpha, what) in enumerate(((ACCURACY, 1.0, "ours"), (ANYHOW, 0.45, "ours, in tags or not"))):
        base = results.base(test, key)
        centres, errors = _bars(results, task, arms, test, key)
        heights, errors = [100 * (one / base - 1) for one in centres], [100 * one / base for one in errors]
        places, colours = [i + width * (place - 1) for i in range(len(arms))], [_colour(arm) for arm in arms]
        axis.bar(places, heights, width, yerr=errors, color=colours, alpha=alpha, capsize=3, label=what)
    paper = {i + width: FIG7[task][arm] for i, arm in enumerate(arms) if arm in FIG7[task]}
    look: dict[str, Any] = {"color": "white", "edgecolor": "0.3", "hatch": "//"}
    axis.bar([*paper], [*paper.values()], width, label="the paper, 2B", **look)
    axis.axhline(0, color="0.3", lw=0.8)
    axis.set_xticks(range(len(arms)), [label(arm).replace(", ", ",\n") for arm in arms])
    _finish(axis, f"trained on {TITLES[task]}, tested on {TESTED_ON[OTHER[task]]}", "", "relative change (%)")


def _fig3(results: Results, experiment: Experiment) -> Figure | None:
    return draw_answers(results)


FIGURES: dict[str, Callable[[Results, Experiment], Figure | None]] = {
    "fig1": _fig1,
    "fig3": _fig3,
    "fig4": _fig4,
    "fig5": _fig5,
    "fig6": _fig6,
    "fig7": _fig7,
}

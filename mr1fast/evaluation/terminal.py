"""What is printed: the accuracies of an evaluation, and of a training run before and after; and what to do next."""

from __future__ import annotations

from typing import Any

from mr1fast.evaluation.figures import FIGURES, answer_rows, figure_rows, heading, percent
from mr1fast.evaluation.result import EvalResult


def evaluation_table(result: EvalResult, settings: dict[str, Any]) -> str:
    """`settings` are those of evaluation.json."""
    lines = [heading(result, settings), f"model {settings['model']}", ""]
    lines += [f"  {title:28}{value:>8}   {remark}".rstrip() for title, value, remark in figure_rows(result, settings)]
    lines += ["", f"  {'greedy accuracy by answer':28}{'':>8}   right of all"]
    for answer, right, n in answer_rows(result):
        bar = "█" * round(20 * right / n)
        lines.append(f"  {answer[:28]:28}{percent(right / n):>8}   {right:5} {n:6}  {bar}".rstrip())
    if confusions := result.confusions():
        worst = ", ".join(f"{truth} taken for {said} ({times} x)" for truth, said, times in confusions[:4])
        lines += ["", f"  most frequent mistakes: {worst}"]
    return "\n".join(lines)


def training_table(result: dict[str, Any]) -> str:
    """`result` is that of result.json."""
    lines = [f"{'':34}{'before':>9}{'after':>9}{'change':>9}"]
    trained_on = [data for data in result["before"] if data in result["cross_task"]]
    for data, before in result["before"].items():
        if trained_on and data not in trained_on:  # its line follows
            continue
        after = result["after"][data]
        lines.append(f"{data}, test split, {before['n']} problems")
        for name, title in FIGURES.items():
            if name in before and name in after:
                lines.append(_line(f"  {title}", before[name], after[name]))
    for name in trained_on:
        for data, after in result["cross_task"][name].items():
            before = result["before"][data]["greedy_accuracy"]
            lines.append(_line(f"trained on {name}, tested on {data}", before, after["greedy_accuracy"]))
    return "\n".join(lines)


def load_snippet(model_folder: str) -> str:
    """Three lines that load a trained model."""
    return (
        "from mr1fast.model import load_model, load_processor\n"
        f"model = load_model({model_folder!r})\n"
        f"processor = load_processor({model_folder!r})"
    )


def _line(title: str, before: float, after: float) -> str:
    return f"{title:34}{100 * before:7.1f} %{100 * after:7.1f} %{100 * (after - before):+9.1f}"

"""What the user reads at the end: accuracies before and after, and how to load what was trained."""

from __future__ import annotations

from typing import Any

FIGURES = {
    "greedy_accuracy": "greedy accuracy",
    "sampled_accuracy": "sampled accuracy",
    "format_accuracy": "well-formed answers",
    "accuracy_when_formatted": "greedy, of the well-formed",
}


def result_table(result: dict[str, Any]) -> str:
    """`result` is that of result.json."""
    lines = [f"{'':34}{'before':>9}{'after':>9}{'change':>9}"]
    for data, before in result["before"].items():
        if data not in result["cross_task"]:  # not trained on: its line follows
            continue
        after = result["after"][data]
        lines.append(f"{data}, test split, {before['n']} problems")
        for name, title in FIGURES.items():
            lines.append(_line(f"  {title}", before[name], after[name]))
    for trained_on, others in result["cross_task"].items():
        for data, after in others.items():
            before = result["before"][data]["greedy_accuracy"]
            lines.append(_line(f"trained on {trained_on}, tested on {data}", before, after["greedy_accuracy"]))
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

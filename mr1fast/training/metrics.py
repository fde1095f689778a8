"""The metrics of a step under TRL's names, and metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mr1fast.evaluation.metrics_file import rows_in
from mr1fast.training.loggers import Logger
from mr1fast.training.run_folder import RunFolder, write_text
from mr1fast.training.scoring import Scored

SAME = 1e-8  # the deviation of rewards that agree is below this


class MetricsLog:
    """One row per step. Rows from `first_step` on, which a resumed run writes again, are removed first.

    loggers: show the same. labels: of every row beside its task, such as the loss type.
    """

    def __init__(
        self,
        run: RunFolder,
        task: str,
        first_step: int,
        loggers: Sequence[Logger] = (),
        labels: Mapping[str, str] | None = None,
    ):
        self.run, self.file, self.task = run, run.metrics_file, task
        self.loggers, self.labels = loggers, labels or {}
        if self.file.exists():
            kept = (row for row in rows_in(self.file) if row.get("task") != task or row["step"] < first_step)
            write_text(self.file, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored] = ()) -> None:
        """`step` counts finished optimizer steps. JSON has no NaN and no inf: they are null there.

        completions: of this step, for the loggers alone.
        """
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.run.check_there()
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": self.task, "step": step, **self.labels, **row}) + "\n")
        for logger in self.loggers:
            logger.log(step, metrics, completions)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class NoLog:
    """What a process has that is not the main one."""

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored] = ()) -> None: ...

    def close(self) -> None: ...


def rows_of_task(file: Path, task: str) -> str:
    """The rows of metrics.jsonl that a task has so far, as they are kept in a checkpoint."""
    return "".join(json.dumps(row) + "\n" for row in rows_in(file) if row.get("task") == task)


def restore_rows(file: Path, task: str, kept: Path) -> None:
    """Give metrics.jsonl the rows of a task that a checkpoint has `kept`, if it has lost any, and say so."""
    if not kept.exists():  # older versions kept none
        return
    saved, there = list(rows_in(kept)), list(rows_in(file))
    found = {json.dumps(row) for row in there}
    if lost := [row["step"] for row in saved if json.dumps(row) not in found]:
        steps = f"step {lost[0]}" if len(lost) == 1 else f"{len(lost)} steps"
        print(f"{file} is damaged: {steps} of {task} restored from {kept}", flush=True)
        rows = [row for row in there if row.get("task") != task] + saved
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def reward_metrics(rewards: dict[str, Tensor], total: Tensor, num_generations: int) -> dict[str, float]:
    """Means and standard deviations of the rewards [B] of each kind, and of their weighted sum `total` [B].

    Those that are absent (NaN) are counted and left out.
    """
    metrics: dict[str, float] = {}
    for name, values in rewards.items():
        metrics[f"rewards/{name}/mean"] = values.nanmean().item()
        metrics[f"rewards/{name}/std"] = _std(values[None]).item()
        if absent := int(values.isnan().sum()):
            metrics[f"rewards/{name}/absent"] = absent
    spread = group_std(total, num_generations)
    return {
        **metrics,
        "reward": total.nanmean().item(),
        "reward_std": spread.nanmean().item(),
        "frac_reward_zero_std": (spread < SAME).float().mean().item(),
    }


def group_std(total: Tensor, num_generations: int) -> Tensor:
    """[P] float64: the deviation of the rewards [B] of each group, below SAME if they agree, NaN if all are absent."""
    return _std(total.view(-1, num_generations))


def _std(values: Tensor) -> Tensor:
    """[n] float64: the unbiased deviation of each row of [n, m] without its NaN; NaN if there is nothing else."""
    values = values.double()
    count = (~values.isnan()).sum(1)
    squares = (values - values.nanmean(1, keepdim=True)).square().nansum(1)
    return (squares / (count - 1).clamp(min=1)).sqrt().masked_fill(count == 0, math.nan)


def cut_off(completion_ids: Tensor, completion_mask: Tensor, eos: Tensor) -> Tensor:
    """[B] bool: whether a completion [B, L] was cut off before it ended."""
    last = completion_ids.gather(1, (completion_mask.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
    return ~torch.isin(last, eos)


def completion_metrics(lengths: Tensor, cut: Tensor) -> dict[str, float]:
    """Of lengths [B] in tokens, and of `cut_off`: the fraction of completions that were cut off before they ended."""
    lengths = lengths.float()
    return {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": cut.float().mean().item(),
    }


def difference(per_token_logps: Tensor, sampling_per_token_logps: Tensor, mask: Tensor) -> tuple[float, int, float]:
    """(sum, number, largest) of the absolute differences (nats) of log-probabilities [B, L]."""
    found = (per_token_logps.detach() - sampling_per_token_logps).abs()[mask]
    return found.sum().item(), len(found), found.max().item()


def sampling_metrics(differences: Sequence[tuple[float, int, float]]) -> dict[str, float]:
    """Of `difference` between policy's and sampler's log-probabilities in each process; it should only be rounding."""
    sums, counts, largest = zip(*differences)
    return {
        "sampling/sampling_logp_difference/mean": sum(sums) / sum(counts),
        "sampling/sampling_logp_difference/max": max(largest),
    }


def mean_metrics(
    rows: Sequence[dict[str, float]], tokens: Sequence[float], loss: Mapping[str, Any]
) -> dict[str, float]:
    """The metrics of a step from those of its pieces, which are means over their tokens.

    At sequence level, clip ratios are means over completions, of which each piece has equally many.
    """
    by_sequence = loss.get("importance_sampling_level", "token") != "token"

    def mean(name: str) -> float:
        weights = [1] * len(rows) if by_sequence and name.startswith("clip_ratio") else tokens
        return sum(row[name] * weight for row, weight in zip(rows, weights)) / max(sum(weights), 1)

    return {name: mean(name) for name in rows[0]}

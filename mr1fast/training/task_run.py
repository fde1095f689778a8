"""What goes on around the steps of one model's training, whichever engine takes them.

Evaluations in between, a row of metrics for each step, the progress bar, samples of steps that were skipped, and an end
at the user's request.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mr1fast.evaluation.metrics_file import rows_in
from mr1fast.model.policy import Policy
from mr1fast.training.loggers import Guarded, open_loggers
from mr1fast.training.metrics import MetricsLog, NoLog
from mr1fast.training.page import Page
from mr1fast.training.pictures import Unfinished, draw_pictures
from mr1fast.training.run_folder import (
    checkpoints,
    record_max_steps,
    remove_folder,
    step_of,
    versions,
    write_json,
)
from mr1fast.training.scoring import Scored
from mr1fast.training.setup import Setup
from mr1fast.training.stop import Stopped, StopRequest, finishing_steps

MAX_SKIPPED_IN_A_ROW = 10


class TrainingError(RuntimeError):
    """Training that cannot go on, explained in one sentence."""


class TaskRun:
    """The training of one model, as the user sees it. Made by `task_run`."""

    def __init__(self, setup: Setup, name: str, policy: Policy, log: MetricsLog | NoLog, bar: tqdm, stop: StopRequest):
        self.setup, self.name, self.policy, self.log, self.bar, self.stop = setup, name, policy, log, bar, stop
        self.config, self.folder = setup.config.for_task(name), setup.folder.task(name)
        self.validation = setup.validation.get(name)
        self.stopping: int | None = None  # the signal that any process was sent

    def validate(self) -> dict[str, float]:
        """Figures on the validation split, where there is one, under the names of metrics.jsonl."""
        return {} if self.validation is None else self.setup.validate(self.policy, self.validation, self.name)

    def after_step(self, step: int, metrics: dict[str, float], completions: Sequence[Scored]) -> None:
        """Evaluate where it is time to, and show the metrics after `step` steps."""
        shows, last = self._saves_by_plan(step), step == self.config.max_steps
        if self.validation is not None and (step % self.config.eval_steps == 0 or last):
            metrics = metrics | self.validate()
            shows = True
        self.log.log(step, metrics, completions if shows else ())
        self.bar.set_postfix_str(postfix(metrics), refresh=False)
        self.bar.update()
        self.stopping = self.setup.processes.agreed(self.stop.signal_number)

    def record_skipped(self, sample: dict[str, Any] | None, in_a_row: int) -> None:
        """Keep the `skipped_sample` of a step. Raises TrainingError after the last one that is accepted."""
        if sample is None:
            return
        if self.setup.processes.is_main:
            self.setup.folder.check_there()
            write_json(self.folder / "skipped" / f"step-{sample['step']:06d}.json", sample)
        if in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped (the last: {sample['reason']}), so training has "
                "stopped; where numbers are NaN or infinite, a lower --learning-rate often helps; the samples are in "
                f"{self.folder / 'skipped'}"
            )

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        return self._saves_by_plan(step) or self.stopping is not None

    def _saves_by_plan(self, step: int) -> bool:
        return step % self.config.save_steps == 0 or step == self.config.max_steps

    def stop_if_asked(self, step: int) -> None:
        """After the checkpoint: raises Stopped if there was a signal."""
        if self.stopping is not None:
            if self.stopping == signal.SIGINT:  # after SIGTERM there may be no time
                with self.policy.gathered():
                    self.setup.processes.on_main(draw_pictures, self.setup, Unfinished(self.name, self.policy, step))
            raise Stopped(self.stopping)


@contextmanager
def task_run(setup: Setup, name: str, policy: Policy, *, done: int, resumed: bool) -> Iterator[TaskRun]:
    """Training on one task, from step `done` on. What is there of later steps is removed."""
    config, is_main = setup.config.for_task(name), setup.processes.is_main
    setup.processes.gather(None)  # all have read what they need
    if is_main:
        _remove_after(setup.folder.task(name), done)
        if done < config.max_steps:  # else an evaluation may go on where it was interrupted
            shutil.rmtree(setup.folder.answers(f"trained on {name}"), ignore_errors=True)
    log = _open_log(setup, name, first_step=done + 1 if resumed else 0) if is_main else NoLog()
    bar = tqdm(total=config.max_steps, initial=done, desc=f"{config.method} on {name}", unit="step")
    with closing(log), finishing_steps(together=setup.processes.count > 1) as stop, bar:
        run = TaskRun(setup, name, policy, log, bar, stop)
        if not resumed and run.validation is not None:
            log.log(0, run.validate())
        yield run


def _open_log(setup: Setup, name: str, first_step: int) -> MetricsLog:
    """metrics.jsonl and the loggers of a task's training."""
    config, folder = setup.config, setup.folder
    own = config.for_task(name)
    recorded = {**config.resolved(), **dataclasses.asdict(own), "versions": versions()}
    loggers = open_loggers(config.loggers, folder, name, first_step=first_step, config=recorded)
    before = (row for row in rows_in(folder.metrics_file) if row.get("task") == name and row["step"] < first_step)
    loggers.append(Guarded(folder.page.name, lambda: Page(folder, name, before, own.max_steps)))
    labels = {} if config.method == "sft" else {"loss_type": own.loss["loss_type"]}
    return MetricsLog(folder, name, first_step, loggers, labels)


def _remove_after(task_folder: Path, step: int) -> None:
    """Remove what a resumed run wrote after this step, and will write again."""
    for later in checkpoints(task_folder):
        if step_of(later) > step:
            remove_folder(later)
    for sample in task_folder.glob("skipped/step-*.json"):
        if step_of(sample) > step:
            sample.unlink()
    for name in ("model", "adapter"):
        remove_folder(task_folder / name)


def follow_new_total(setup: Setup, name: str, *, step: int, before: int) -> None:
    """Say and record that --max-steps was `before` when the checkpoint after `step` steps was written, if it was."""
    now = setup.config.for_task(name).max_steps
    if now != before and setup.processes.is_main:
        record_max_steps(setup.folder, name, step=step, before=before, now=now)
        what = "learning rate and KL weight follow the new total"
        print(f"{name}: --max-steps is {now} and was {before}; from step {step + 1} on, {what}", flush=True)


def postfix(metrics: dict[str, float]) -> str:
    """What the progress bar shows beside the time left."""
    names = {"reward": "reward", "rewards/accuracy_reward/mean": "accuracy", "kl": "kl", "beta": "beta"}
    if "reward" not in metrics:
        names = {"loss": "loss"}
    shown = {title: metrics[name] for name, title in names.items() if name in metrics}
    if skipped := metrics["skipped_steps"]:
        shown["skipped"] = skipped
    return ", ".join(f"{title} {value:.3g}" for title, value in shown.items())

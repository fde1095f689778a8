"""A run from beginning to end: evaluate the base, train a model on each task, evaluate again. Read it top-down."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mr1fast.errors import UserError
from mr1fast.evaluation.terminal import load_snippet, training_table
from mr1fast.model.policy import Policy
from mr1fast.rewards import unanswered, unanswered_summary
from mr1fast.training.checkpoint import load_checkpoint, save_checkpoint, save_model, whole_checkpoint
from mr1fast.training.loggers import Guarded, open_loggers
from mr1fast.training.metrics import MetricsLog, read_rows
from mr1fast.training.model_card import write_card
from mr1fast.training.open_run import OpenRun, how_to_train_longer
from mr1fast.training.page import Page
from mr1fast.training.pictures import Unfinished, draw_pictures
from mr1fast.training.run_folder import (
    ResumeError,
    checkpoints,
    record_max_steps,
    remove_folder,
    step_of,
    versions,
    write_config,
    write_json,
)
from mr1fast.training.scoring import absent_summary
from mr1fast.training.setup import Setup, prepare, summaries
from mr1fast.training.stop import Stopped, finishing_steps
from mr1fast.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer, TrainingError


def run(opened: OpenRun, started: float) -> None:
    """`started`: time.time() at the program's start. Raises UserError, TrainingError and Stopped."""
    try:
        setup = prepare(opened)
    except UserError:
        raise
    except ValueError as error:  # of the model or the data, in one sentence
        raise UserError(str(error)) from error
    folder = setup.folder
    new = new_result(setup)
    result = {**new, **folder.read_result(), **{name: new[name] for name in ("config", "config_of_task")}}
    todo = _todo(setup, opened, result)
    write_config(folder, setup.config)
    print(setup.description(), flush=True)

    said, seconds_before = summaries(setup.splits), result["seconds"]
    for data in setup.tests:
        if data not in result["before"]:
            result["before"][data] = evaluate_on_test_split(setup, setup.base, data, "before training")
    try:
        folder.write_result(result)
        for name in todo:
            train_and_test(setup, name, opened.checkpoint if opened.names_checkpoint_of(name) else None, result)
        draw_pictures(setup)
    finally:
        result["seconds"] = round(seconds_before + time.time() - started, 1)
        with suppress(OSError):  # a full disk has been reported, or is about to be
            folder.write_result(result)

    for line in summaries(setup.splits):
        if line not in said:  # what came to light when images were decoded
            print(line)
    if unanswered():
        print(unanswered_summary())
    if said_absent := absent_summary():
        print(said_absent)
    print(closing_words(setup, result))


def _todo(setup: Setup, opened: OpenRun, result: dict[str, Any]) -> list[str]:
    """The unfinished tasks. Raises ResumeError if none is left, or if the checkpoint belongs to none of the tasks."""
    if opened.checkpoint is not None and opened.checkpoint.parent.name not in setup.names:
        raise ResumeError(
            f"nothing to resume: {opened.checkpoint} does not belong to {' or '.join(setup.names)}, the run's tasks"
        )

    def is_finished(name: str) -> bool:
        return name in result["after"] and result["steps"].get(name) == setup.config.for_task(name).max_steps

    todo = [name for name in setup.names if not is_finished(name) or opened.names_checkpoint_of(name)]
    if not todo:
        longer = how_to_train_longer(setup.folder)
        raise ResumeError(f"nothing to resume: the run {setup.folder.path} has finished{longer}")
    return todo


def train_and_test(setup: Setup, name: str, checkpoint: Path | None, result: dict[str, Any]) -> None:
    """Train a model on one task, save it, and add its accuracy on the test split of every task to `result`."""
    folder = setup.folder
    result["after"].pop(name, None)  # a task that is rewound to an earlier checkpoint has not finished any more
    folder.write_result(result)
    policy = train_task(setup, name, checkpoint)
    if setup.config.merge:
        save_model(policy, folder.adapter(name))
        policy = policy.merge()
    save_model(policy, folder.model(name))
    write_card(folder.model(name), setup, name, result)
    figures = {data: evaluate_on_test_split(setup, policy, data, f"trained on {name}") for data in setup.tests}
    own = figures.get(name, {})  # none where it is not tested on
    result["after"] |= {name: own, **figures} if len(setup.names) == 1 else {name: own}
    result["cross_task"][name] = {data: figures[data] for data in figures if data != name}
    result["steps"][name] = setup.config.for_task(name).max_steps
    write_card(folder.model(name), setup, name, result)
    folder.write_result(result)


def closing_words(setup: Setup, result: dict[str, Any]) -> str:
    folder = setup.folder
    table = f"\n{training_table(result)}\n" if setup.tests else ""
    models = "\n".join(f"the model trained on {name} is in {folder.model(name)}" for name in setup.names)
    snippet = load_snippet(str(folder.model(setup.names[0])))
    pictures = " and ".join(str(file) for file in (folder.curves, folder.samples) if file.exists())
    return (
        f"{table}\n{models}\nto load one (docs/training.md shows how to use it):\n\n{snippet}\n\n"
        f"pictures: {pictures or 'none'}"
    )


def train_task(setup: Setup, name: str, checkpoint: Path | None) -> Policy:
    """Train a model on one task from this checkpoint, or else the task's newest, or else from the beginning."""
    config, folder = setup.task_config(name), setup.folder.task(name)
    dataset, validation = setup.train[name], setup.validation.get(name)
    checkpoint = whole_checkpoint(checkpoint, folder)
    if not setup.base_is_reference(config):
        setup.loaded_base = None
    policy, state = (setup.new_policy(), None) if checkpoint is None else load_checkpoint(checkpoint, setup.load)
    trainer = Trainer(config, policy, setup.reference_for(policy, config), dataset)
    if checkpoint is not None and state is not None:
        _go_on(trainer, state, checkpoint)
        _follow_new_total(setup, name, trainer, state.get("max_steps", config.max_steps))
    _remove_after(folder, trainer.finished_steps)
    if trainer.finished_steps < config.max_steps:  # else an evaluation may go on where it was interrupted
        shutil.rmtree(setup.folder.answers(f"trained on {name}"), ignore_errors=True)
    log = open_log(setup, name, first_step=0 if state is None else trainer.finished_steps + 1)
    bar = tqdm(total=config.max_steps, initial=trainer.finished_steps, desc=f"{config.method} on {name}", unit="step")
    with closing(log), finishing_steps() as stop, bar:
        if validation is not None and state is None:
            log.log(0, setup.validate(policy, validation, name))
        while trainer.finished_steps < config.max_steps:
            metrics = trainer.step()
            step, last = trainer.finished_steps, trainer.finished_steps == config.max_steps
            shows = step % config.save_steps == 0 or last
            if validation is not None and (step % config.eval_steps == 0 or last):
                metrics |= setup.validate(policy, validation, name)
                shows = True
            log.log(step, metrics, trainer.scored if shows else ())
            bar.set_postfix_str(postfix(metrics), refresh=False)
            bar.update()
            if trainer.skipped_sample is not None:
                write_json(folder / "skipped" / f"step-{step:06d}.json", trainer.skipped_sample)
                if trainer.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(_gave_up(trainer.skipped_sample["reason"], folder))
            if step % config.save_steps == 0 or last or stop.signal_number is not None:
                state = None if setup.config.save_only_model else trainer.state_dict()
                save_checkpoint(policy, state, folder, step=step, keep=config.save_total_limit)
            if stop.signal_number is not None:
                if stop.signal_number == signal.SIGINT:  # after SIGTERM there may be no time
                    draw_pictures(setup, Unfinished(name, policy, step))
                raise Stopped(stop.signal_number)
    return policy


def open_log(setup: Setup, name: str, first_step: int) -> MetricsLog:
    """metrics.jsonl and the loggers of a task's training."""
    config, folder = setup.config, setup.folder
    own = config.for_task(name)
    recorded = {**config.resolved(), **dataclasses.asdict(own), "versions": versions()}
    loggers = open_loggers(config.loggers, folder, name, first_step=first_step, config=recorded)
    before = [row for row in read_rows(folder.metrics_file) if row["task"] == name and row["step"] < first_step]
    loggers.append(Guarded(folder.page.name, lambda: Page(folder, name, before, own.max_steps)))
    labels = {} if config.method == "sft" else {"loss_type": own.loss["loss_type"]}
    return MetricsLog(folder, name, first_step, loggers, labels)


def _go_on(trainer: Trainer, state: dict[str, Any], checkpoint: Path) -> None:
    """Load the state into the trainer. Raises ResumeError if it does not belong to this run."""
    try:
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ResumeError(f"{checkpoint} is not a checkpoint of this run ({reason}); move it away") from error
    if trainer.finished_steps > trainer.config.max_steps:
        raise ResumeError(f"{checkpoint} is beyond the run's last step, {trainer.config.max_steps}; move it away")


def _follow_new_total(setup: Setup, name: str, trainer: Trainer, before: int) -> None:
    """Say and record that --max-steps was something else when the checkpoint was written."""
    step, now = trainer.finished_steps, trainer.config.max_steps
    if now != before:
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


def evaluate_on_test_split(setup: Setup, policy: Policy, data: str, when: str) -> dict[str, float]:
    """The figures of result.json; `when`: "before training" or "trained on vc"."""
    file = setup.folder.answers(when) / f"{data}.jsonl"
    return setup.evaluate(policy, setup.tests[data], data, progress=f"test on {data}, {when}", file=file)


def new_result(setup: Setup) -> dict[str, Any]:
    config = setup.config
    return {
        "before": {},
        "after": {},
        "cross_task": {},
        "seconds": 0.0,
        "steps": {},
        "seed": config.seed,
        "versions": versions(),
        "config": config.resolved(),
        "data": {"name": setup.names[0], "content": setup.content} if config.data else {},
        "config_of_task": {name: dataclasses.asdict(config.for_task(name)) for name in setup.names},
    }


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


def _gave_up(reason: str, folder: Path) -> str:
    return (
        f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped (the last: {reason}), so training has stopped; where "
        f"numbers are NaN or infinite, a lower --learning-rate often helps; the samples are in {folder / 'skipped'}"
    )

"""A run from beginning to end: evaluate the base, train a model on each task, evaluate again. Read it top-down."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mr1fast.errors import UserError
from mr1fast.evaluation.answers import read_answers
from mr1fast.evaluation.terminal import load_snippet, training_table
from mr1fast.model.policy import Policy
from mr1fast.rewards import unanswered, unanswered_summary
from mr1fast.training.checkpoint import load_checkpoint, save_checkpoint, save_model, whole_checkpoint
from mr1fast.training.metrics import restore_rows, rows_of_task
from mr1fast.training.model_card import write_card
from mr1fast.training.open_run import OpenRun, how_to_train_longer
from mr1fast.training.pictures import draw_pictures
from mr1fast.training.run_folder import METRICS, ResumeError, versions, write_config
from mr1fast.training.scoring import absent_summary
from mr1fast.training.setup import Setup, prepare, summaries
from mr1fast.training.task_run import follow_new_total, task_run
from mr1fast.training.trainer import Trainer

# What trains one model: (setup, the task's name, a checkpoint that the user named or None) -> the trained policy.
Engine = Callable[[Setup, str, Path | None], Policy]


def run(opened: OpenRun, started: float, engine: Engine | None = None) -> None:
    """`started`: time.monotonic() at the program's start. engine: None for our own, `train_task`.

    Raises UserError, TrainingError and Stopped.
    """
    try:
        setup = prepare(opened)
    except UserError:
        raise
    except ValueError as error:  # of the model or the data, in one sentence
        raise UserError(str(error)) from error
    folder, processes = setup.folder, setup.processes
    new = new_result(setup)
    result = {**new, **folder.read_result(), **{name: new[name] for name in ("config", "config_of_task", "processes")}}
    todo = _todo(setup, opened, result)
    processes.gather(None)  # all have read what there is
    processes.on_main(write_config, folder, setup.config)
    print(setup.description(), flush=True)

    said, seconds_before = summaries(setup.splits), result["seconds"]
    for data in setup.tests:
        if data not in result["before"] or _has_lost_answers(setup, data, result["before"][data]):
            result["before"][data] = evaluate_on_test_split(setup, setup.base, data, "before training")
    try:
        processes.on_main(folder.write_result, result)
        for name in todo:
            checkpoint = opened.checkpoint if opened.names_checkpoint_of(name) else None
            train_and_test(setup, name, checkpoint, result, engine or train_task)
        processes.on_main(draw_pictures, setup)
    finally:
        result["seconds"] = round(seconds_before + time.monotonic() - started, 1)
        with suppress(OSError, UserError):  # a full disk has been reported, or is about to be
            processes.on_main(folder.write_result, result)

    for line in summaries(setup.splits):
        if line not in said:  # what came to light when images were decoded
            print(line)
    if unanswered():
        print(unanswered_summary())
    if said_absent := absent_summary():
        print(said_absent)
    print(closing_words(setup, result))


def _has_lost_answers(setup: Setup, data: str, figures: dict[str, float]) -> bool:
    """Whether the base's answers on disk are fewer than those of the figures, which is said."""
    file = setup.folder.answers("before training") / f"{data}.jsonl"
    lost = int(figures.get("n", 0)) - len(read_answers(file)) if file.exists() else 0
    if lost > 0:
        print(f"{file} is damaged: what {lost} of its lines answered is asked again", flush=True)
    return lost > 0


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


def train_and_test(setup: Setup, name: str, checkpoint: Path | None, result: dict[str, Any], engine: Engine) -> None:
    """Train a model on one task, save it, and add its accuracy on the test split of every task to `result`."""
    folder, on_main = setup.folder, setup.processes.on_main
    result["after"].pop(name, None)  # a task that is rewound to an earlier checkpoint has not finished any more
    on_main(folder.write_result, result)
    policy = engine(setup, name, checkpoint)
    if setup.config.merge:
        save_whole(policy, folder.adapter(name), setup)
        policy = merged(policy, folder.adapter(name), setup)
    save_whole(policy, folder.model(name), setup)
    on_main(write_card, folder.model(name), setup, name, result)
    figures = {data: evaluate_on_test_split(setup, policy, data, f"trained on {name}") for data in setup.tests}
    own = figures.get(name, {})  # none where it is not tested on
    result["after"] |= {name: own, **figures} if len(setup.names) == 1 else {name: own}
    result["cross_task"][name] = {data: figures[data] for data in figures if data != name}
    result["steps"][name] = setup.config.for_task(name).max_steps
    on_main(write_card, folder.model(name), setup, name, result)
    on_main(folder.write_result, result)


def save_whole(policy: Policy, folder: Path, setup: Setup) -> None:
    with policy.gathered():
        setup.processes.on_main(save_model, policy, folder)


def merged(policy: Policy, adapter: Path, setup: Setup) -> Policy:
    """The policy with its adapter, which has been saved, in its weights."""
    if policy.is_sharded:  # each process then has all of it
        setup.processes.gather(None)  # it is there
        policy = setup.load(adapter)
    return policy.merge()


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
    checkpoint = whole_checkpoint(checkpoint, folder)
    if not setup.base_is_reference(config):
        setup.loaded_base = None
    policy, state = (setup.new_policy(), None) if checkpoint is None else load_checkpoint(checkpoint, setup.load)
    trainer = Trainer(config, policy, setup.reference_for(policy, config), setup.train[name], setup.processes)
    if checkpoint is not None and state is not None:
        _go_on(trainer, state, checkpoint)
        before = state.get("max_steps", config.max_steps)
        follow_new_total(setup, name, step=trainer.finished_steps, before=before)
        setup.processes.on_main(restore_rows, setup.folder.metrics_file, name, checkpoint / METRICS)
    with task_run(setup, name, policy, done=trainer.finished_steps, resumed=state is not None) as run:
        while trainer.finished_steps < config.max_steps:
            metrics = trainer.step()
            step = trainer.finished_steps
            run.after_step(step, metrics, trainer.scored)
            run.record_skipped(trainer.skipped_sample, trainer.skipped_in_a_row)
            if run.saves(step):
                state = None if setup.config.save_only_model else trainer.state_dict()
                with policy.gathered():
                    if setup.processes.is_main:
                        setup.folder.check_there()
                        rows = rows_of_task(setup.folder.metrics_file, name)
                        save_checkpoint(policy, state, folder, step=step, keep=config.save_total_limit, metrics=rows)
            run.stop_if_asked(step)
    return policy


def _go_on(trainer: Trainer, state: dict[str, Any], checkpoint: Path) -> None:
    """Load the state into the trainer. Raises ResumeError if it does not belong to this run."""
    try:
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ResumeError(f"{checkpoint} is not a checkpoint of this run ({reason}); move it away") from error
    if trainer.finished_steps > trainer.config.max_steps:
        raise ResumeError(f"{checkpoint} is beyond the run's last step, {trainer.config.max_steps}; move it away")


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
        "processes": setup.processes.count,
        "config": config.resolved(),
        "data": {"name": setup.names[0], "content": setup.content} if config.data else {},
        "config_of_task": {name: dataclasses.asdict(config.for_task(name)) for name in setup.names},
    }

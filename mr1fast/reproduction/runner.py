"""Runs the arms that are not finished, one process for each core, and says how long that will still take."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mr1fast.errors import UserError
from mr1fast.reproduction.arms import SETTING, STEPS, TESTS, TRAIN_SAMPLES
from mr1fast.reproduction.experiments import BASE_RUN, Run
from mr1fast.reproduction.records import Records
from mr1fast.reproduction.seconds import Estimate, spelt


def cores() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_of(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """What an arm's result depends on, beside code and base."""
    tests = {test.name: test.problems for test in TESTS}
    if run == BASE_RUN:
        return {"tests": tests}
    setting = {**SETTING, "max_steps": steps, "train_samples": TRAIN_SAMPLES[run.task], **run.recipe.options}
    return {"tests": tests, "twist": run.recipe.twist, "options": setting}


def run_arms(runs: Sequence[Run], records: Records, model: str, steps: int = STEPS) -> None:
    """Run those without a record. Raises UserError if a process is killed; KeyboardInterrupt ends all of them."""
    settings = {run: settings_of(run, steps) for run in runs}
    finished = records.finished(runs, settings)
    todo = [run for run in runs if run not in finished]
    estimate = Estimate.of(finished, steps)
    if finished:
        print(f"{len(finished)} of {len(runs)} arms have been run before")
    if not todo:
        return
    workers = min(cores(), len(todo))
    seconds = estimate.left(todo, workers)
    print(f"running {len(todo)} arms, {workers} at a time: about {spelt(seconds)}", flush=True)
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    try:
        waiting = {executor.submit(_run, run, records, settings[run], model, steps): run for run in todo}
        _follow(waiting, todo, estimate, workers)
    except BrokenProcessPool as error:
        reason = "a process that ran an arm was killed, perhaps for want of memory"
        raise UserError(f"{reason}; the same command goes on") from error
    except BaseException:  # Ctrl-C and SIGTERM: nobody waits for arms that have begun
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback for each process


def _run(run: Run, records: Records, settings: Mapping[str, Any], model: str, steps: int) -> dict[str, Any]:
    import transformers

    from mr1fast.reproduction.train import result_of_run

    transformers.utils.logging.disable_progress_bar()
    result = result_of_run(run, model, steps)
    records.write(run, settings, result)
    return result


def _follow(waiting: dict[Future, Run], todo: Sequence[Run], estimate: Estimate, workers: int) -> None:
    """A line for each arm that finishes."""
    left, started = set(todo), time.monotonic()
    pending = set(waiting)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            run, result = waiting[future], future.result()
            left.discard(run)
            estimate.add(run, result["seconds"])
            figures = "  ".join(f"{name} {_percent(one)}" for name, one in result["tests"].items())
            spent = spelt(time.monotonic() - started)
            rest = f"about {spelt(estimate.left(left, workers))} left" if left else f"all done in {spent}"
            number = f"[{len(todo) - len(left)}/{len(todo)}]"
            print(f"{number} {run.name}: {figures}  ({result['seconds']:.0f} s; {rest})", flush=True)


def _percent(figures: Mapping[str, float]) -> str:
    return f"{100 * figures['greedy_accuracy']:.0f}/{100 * figures['anyhow_accuracy']:.0f}"

"""Runs the arms that are not finished, one process for each core, and says how long that will still take.

Only these processes import torch: it takes seconds, which they spend while the base is being made.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mr1fast.errors import UserError
from mr1fast.reproduction.arms import SETTING, STEPS, TRAIN_SAMPLES
from mr1fast.reproduction.experiments import BASE_RUN, Run
from mr1fast.reproduction.records import Records
from mr1fast.reproduction.seconds import Estimate, spelt
from mr1fast.reproduction.waiting import Waiting

# glibc keeps the memory that is freed; else the tensors of each step are mapped, and their pages cleared, anew.
KEPT_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**30))
FINGERPRINTED = [Run("gr", "grpo-d", 0), Run("vc", "sft-reasoning", 0)]


def cores() -> int:
    """As many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settings_of(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """What an arm's result depends on, beside code and base."""
    tests = {test.name: test.problems for test in run.tests}
    if run == BASE_RUN:
        return {"tests": tests}
    setting = {**SETTING, "max_steps": steps, "train_samples": TRAIN_SAMPLES[run.task], **run.recipe.options}
    return {"tests": tests, "twist": run.recipe.twist, "options": setting}


@contextmanager
def processes(most: int) -> Iterator[ProcessPoolExecutor]:
    """One for each core, at most so many, which start at once.

    Raises UserError if one of them is killed. KeyboardInterrupt ends all of them, as any exception does.
    """
    count, context = min(cores(), most), multiprocessing.get_context("spawn")
    os.environ.update(KEPT_MEMORY | os.environ)  # these processes inherit it
    executor = ProcessPoolExecutor(count, mp_context=context, initializer=_start)
    try:
        for _ in range(count):
            executor.submit(os.getpid)  # it starts a process for a task that none is free for
        yield executor
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
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, about which Python warns if a process is ended with it
    import transformers

    import mr1fast.reproduction.train  # noqa: F401

    transformers.utils.logging.disable_progress_bar()


def fingerprint(model: str, apply: Callable[..., Any] = map) -> str:
    """A digest of what this code and this model compute: two steps of two short trainings and their tests.

    Code that computes the same is the same, whatever has been renamed or documented since; code that draws other
    completions, learns other weights or judges otherwise is not. Numbers are rounded to three places. apply: `map`, or
    that of `processes`.
    """
    content = [*apply(_two_steps, FINGERPRINTED, [model] * len(FINGERPRINTED))]
    return hashlib.sha256(json.dumps([content, _digest(model)], sort_keys=True).encode()).hexdigest()[:16]


def _two_steps(run: Run, model: str) -> dict[str, Any]:
    from mr1fast.reproduction.train import two_steps

    return two_steps(run, model)


def _digest(model: str) -> str:
    """Of the weights."""
    whole = hashlib.sha256()
    for file in sorted(Path(model).glob("*.safetensors")):
        whole.update(file.read_bytes())
    return whole.hexdigest()


def run_arms(
    executor: ProcessPoolExecutor, runs: Sequence[Run], records: Records, model: str, steps: int = STEPS
) -> None:
    """Run those without a record in the processes of this executor, which has one for each core."""
    settings = {run: settings_of(run, steps) for run in runs}
    finished = records.finished(runs, settings)
    estimate = Estimate.of(finished, steps)
    if finished:
        print(f"{len(finished)} of {len(runs)} arms have been run before")
    todo = [run for run in runs if run not in finished]
    if not todo:
        return
    workers = min(cores(), len(todo))
    seconds = estimate.left(todo, workers)
    print(f"running {len(todo)} arms, {workers} at a time: about {spelt(seconds)}", flush=True)

    def start(run: Run) -> Future:
        return executor.submit(_run, run, records, settings[run], model, steps)

    _follow(start, todo, estimate, workers)


def _run(run: Run, records: Records, settings: Mapping[str, Any], model: str, steps: int) -> dict[str, Any]:
    from mr1fast.reproduction.train import result_of_run

    result = result_of_run(run, model, steps)
    records.write(run, settings, result)
    return result


def _follow(start: Callable[[Run], Future], todo: Sequence[Run], estimate: Estimate, workers: int) -> None:
    """Start them, as many at a time as there are workers, and print a line for each that finishes."""
    waiting, began = Waiting(todo, estimate), time.monotonic()
    free: list[Run | None] = [None] * workers  # what each of them has run last
    running: dict[Future, Run] = {}
    while waiting.runs or running:
        while free and waiting.runs:  # no more than can begin at once: so it goes to the process that is free
            run = waiting.take(free.pop(), running.values())
            running[start(run)] = run
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run, result = running.pop(future), future.result()
            free.append(run)
            estimate.add(run, result["seconds"])
            left = [*waiting.runs, *running.values()]
            figures = "  ".join(f"{name} {_percent(one)}" for name, one in result["tests"].items())
            spent = spelt(time.monotonic() - began)
            rest = f"about {spelt(estimate.left(left, workers))} left" if left else f"all done in {spent}"
            number = f"[{len(todo) - len(left)}/{len(todo)}]"
            print(f"{number} {run.name}: {figures}  ({result['seconds']:.0f} s; {rest})", flush=True)


def _percent(figures: Mapping[str, float]) -> str:
    return f"{100 * figures['greedy_accuracy']:.0f}/{100 * figures['anyhow_accuracy']:.0f}"

"""Short runs of the training program in processes of their own, to which tests/test_faults_*.py do harm.

Processes are forked from one that has torch imported already, which takes most of the time that such a run would.
"""

import csv
import hashlib
import json
import multiprocessing
import os
import random
import re
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from mr1fast import train
from mr1fast.evaluation.answers import read_answers
from mr1fast.rewards import worker
from mr1fast.training.checkpoint import load_state
from mr1fast.training.manifest import MANIFEST, damage
from mr1fast.training.run_folder import STATE
from tests.fault_places import install
from tests.run_files import untimed

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.fault_preload"])
SECONDS = 900  # after which a run hangs, on however busy a machine

OPTIONS = (
    "--task=vc", "--test-data=vc", "--max-steps=5", "--save-steps=2", "--eval-steps=2", "--eval-samples=3",
    "--eval-validation-samples=1", "--eval-batch-size=2", "--prompts-per-step=2", "--num-generations=2",
    "--max-completion-length=10", "--warmup-steps=1", "--learning-rate=1e-3", "--temperature=1.5",
    "--reward-weights=tests.fault_reward:letters=1", "--device=cpu", "--threads=1",
)  # fmt: skip
UNLIKE = ("metrics.jsonl", STATE)
VARIANTS = {
    "whole model": (),
    "LoRA": ("--lora-rank=2",),
    "two processes": (),
    "without loggers": ("--report-to=none",),  # which keep files open, so that no folder can be made read-only
}


@dataclass(frozen=True)
class Ended:
    exit_code: int
    said: str

    @property
    def error(self) -> str:
        """The last sentence about what went wrong; "" if there is none."""
        lines = [line for line in self.said.splitlines() if line.startswith(("error: ", "stopped by "))]
        return lines[-1] if lines else ""


class Program:
    """`python -m mr1fast.train ARGUMENTS`, begun; harm: called in it before anything else.

    draws: whether its pictures are real ones, which take half of its time.
    """

    def __init__(self, *arguments, said: Path, harm: Callable | None = None, environment=None, draws=False):
        self.said = said
        target = (list(map(str, arguments)), str(said), harm, {"OMP_NUM_THREADS": "1", **(environment or {})}, draws)
        self.process = FORKS.Process(target=_train, args=target)
        self.process.start()

    def signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def end(self) -> Ended:
        self.process.join(SECONDS)
        hangs = self.process.is_alive()
        self.process.kill()
        self.process.join()
        text = self.said.read_text(errors="replace") if self.said.exists() else ""
        assert not hangs, f"the run hangs after:\n{text}"
        assert "Traceback" not in text, text
        return Ended(self.process.exitcode, text)


def _train(arguments, said, harm, environment, draws):
    os.setsid()
    os.environ |= environment
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    worker.equal = str.__eq__  # math-verify would start a process and load sympy
    if not draws:
        Figure.savefig = lambda _, file, **__: Path(file).write_bytes(b"no picture")
    if harm is not None:
        harm()
    sys.exit(train.main(arguments))


class Variant:
    """Runs with the same options, and one of them that was left alone."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.options = name, folder, (*OPTIONS, *VARIANTS[name])
        self.count, self.number = (2 if name == "two processes" else 1), 0
        self.record = folder / "places.json"
        self.alone = folder / "alone"
        Program("--print-config", said=folder / "warm.txt").end()
        began = time.monotonic()
        ended = self.run(*self.new(self.alone), harm=partial(install, self.alone, record=self.record), draws=True)
        assert ended.exit_code == 0, ended.said
        self.seconds = time.monotonic() - began
        self.places = json.loads(self.record.read_text())  # place -> seconds of each call
        self.outcome = outcome(self.alone)
        moved = [row["grad_norm"] for row in self.outcome["metrics"] if row["step"] > 0]
        assert len(moved) == 5
        assert all(moved), "every step has to move the weights, or nothing is compared"

    def new(self, run: Path) -> list:
        return [*self.options, "--output-dir", run]

    def start(self, *arguments, harm=None, harmed=0, draws=False) -> list[Program]:
        """One process, or two, of which the one of number `harmed` comes to harm."""
        self.number += 1
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        programs = []
        for rank in range(self.count):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if self.count > 1 else {}
            said = self.folder / f"said-{self.number}-{rank}.txt"
            own = harm if rank == harmed else None
            programs.append(Program(*arguments, said=said, harm=own, environment=environment, draws=draws))
        return programs

    def run(self, *arguments, **keywords) -> Ended:
        """The end of the first process, and of the others with it."""
        ends = [program.end() for program in self.start(*arguments, **keywords)]
        assert len({ended.exit_code for ended in ends if ended.exit_code >= 0}) < 2, ends
        return ends[0]

    def resume(self, run: Path) -> Ended:
        """Go on, or begin again where the program ended before there was anything to go on with."""
        arguments = ["--resume", run] if (run / "config.json").exists() else self.new(run)
        return self.run(*arguments)

    def assert_all_there(self, run: Path) -> None:
        """Nothing that a run had finished is lost or damaged, and the end of what is resumed is that of `alone`."""
        before = rows(run)
        for checkpoint in run.glob("*/checkpoint-*"):
            assert damage(checkpoint) is None
        finished = max((row["step"] for row in before), default=0)
        saved = max((int(one.name[-6:]) for one in run.glob("*/checkpoint-*")), default=0)
        assert saved >= finished - 2, "the last checkpoint is that of --save-steps 2"
        ended = self.resume(run)
        has_finished = "nothing to resume" in ended.said and "has finished" in ended.said
        assert ended.exit_code == 0 or has_finished, ended.said
        found = outcome(run)
        for name, wanted in self.outcome.items():
            assert found[name] == wanted, name
        assert found["metrics"][: len(before)] == [untimed(row) for row in before]


def rows(run: Path) -> list[dict]:
    """The whole rows of metrics.jsonl."""
    file = run / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def outcome(run: Path) -> dict:
    """All that a run computes, bit for bit: losses, weights, optimizer, answers, figures."""
    result = json.loads((run / "result.json").read_text())
    result["seconds"] = result["config"]["output_dir"] = None
    hashes = {file.parent.name: file.read_text().splitlines() for file in run.glob(f"*/*/{MANIFEST}")}
    answers = {str(file.relative_to(run)): file for file in run.glob("answers/*/*.jsonl")}
    return {
        "metrics": [untimed(row) for row in rows(run)],
        # Rows of metrics have the seconds that a step took, and what is loaded is pickled in other bytes again.
        "checkpoints": {name: [line for line in own if not line.endswith(UNLIKE)] for name, own in hashes.items()},
        "states": {file.parent.name: _plain(load_state(file.parent)) for file in run.glob(f"*/*/{STATE}")},
        "answers": {name: sorted(read_answers(file), key=lambda one: one.index) for name, file in answers.items()},
        "config": json.loads((run / "config.json").read_text()),
        "result": result,
    }


def _plain(state: Any) -> Any:
    """With a tensor's bits in its place, so that == compares them."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), hashlib.sha256(state.numpy().tobytes()).hexdigest()
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    return [*map(_plain, state)] if isinstance(state, list | tuple) else state


def note(fault: str, where: str, ended: Ended, lost: str = "nothing") -> None:
    """Add a line to the file that the environment variable FAULTS_LOG names: what docs/reliability.md sums up."""
    if (name := os.environ.get("FAULTS_LOG")) is None:
        return
    file = Path(name)
    is_new = not file.exists()
    with file.open("a", newline="") as stream:
        lines = csv.writer(stream, lineterminator="\n")
        if is_new:
            lines.writerow(["fault", "where", "exit code", "lost", "said"])
        said = re.sub(r"/\S*/pytest-\d+/[^/]+/(disk/)?", "", ended.error)  # the test's folder
        lines.writerow([fault, where, ended.exit_code, lost, said])


def draws(*names) -> random.Random:
    """Random numbers that are the same at every run with the same FAULTS_SEED."""
    return random.Random(f"{os.environ.get('FAULTS_SEED', 0)}/{names}")


def times(default: int) -> range:
    """How often a fault is tried: `default` times where FAULTS is 50, and in proportion else."""
    return range(max(1, round(default * int(os.environ.get("FAULTS", 50)) / 50)))

"""math-verify in a process of its own, so that an answer such as 9^{9^{9^9}} costs seconds and never the run.

Its own time limit is a signal, which cannot interrupt sympy while it works on one huge integer, and does not exist in
threads. Killing a process works everywhere.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

START_SECONDS = 60.0  # importing sympy on a busy machine
ANSWER_SECONDS = 3.0


def is_installed() -> bool:
    return find_spec("math_verify") is not None


@cache
def _warn_once() -> None:
    warnings.warn(
        "math-verify is not installed: answers that are neither plain numbers nor spelt like the solution, such as "
        "'12 cm', count as wrong; pip install math-verify",
        stacklevel=2,
    )


class MathWorker:
    """Answers "are these two formulas equal?"; started at the first question, again after each one that hung."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def equal(self, solution: str, answer: str) -> bool:
        """Whether math-verify finds the two LaTeX formulas equal; False if it fails, takes too long or is missing."""
        if not is_installed():
            _warn_once()
            return False
        with self._lock:
            try:
                process = self._process or self._start()
                print(json.dumps([solution, answer]), file=process.stdin, flush=True)
                return self._read_line(ANSWER_SECONDS) == "true"
            except (OSError, ValueError):  # the process is gone
                self.stop()
                return False

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mr1fast.rewards.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the trainer, which finishes its step
        )
        self._read_line(START_SECONDS)
        return self._process

    def _read_line(self, seconds: float) -> str:
        """One line of the worker's. Raises OSError, with the worker killed, if none comes in time."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            raise OSError("the worker was stopped")
        return line.strip()


def _serve() -> None:
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            solution, answer = (
                parse(f"${text}$", fallback_mode="no_fallback", extraction_mode="first_match", parsing_timeout=None)
                for text in json.loads(line)
            )
            equal = bool(solution and answer and verify(solution, answer, timeout_seconds=None))
        except Exception:  # whatever sympy trips over, the answer is not right
            equal = False
        print(json.dumps(equal), flush=True)


if __name__ == "__main__":
    _serve()

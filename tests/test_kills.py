"""kill -9 of one of two processes: the other ends with one sentence, and a resumed run goes on as if nothing had been.

The moments are drawn from the whole run from when the processes are connected, its checkpoints included; before that it
is the launcher that notices.
"""

import fcntl
import os
import random
import time

import pytest
from launching import launch, outcome
from train_program import SMALL, metrics

KILLS = 10
STEPS, SAVED = 40, 3
PROGRAM = ["--task=vc", f"--max-steps={STEPS}", f"--save-steps={SAVED}", "--save-total-limit=2", "--report-to=none"]
SENTENCE = "error: another process has ended without a word, so this one ends as well"


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_one_of_two_processes_is_killed_at_any_moment(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    start = ["-m", "mr1fast.train", *PROGRAM, *SMALL, "--output-dir"]
    assert [code for code, *_ in outcome(launch(*start, whole))] == [0, 0]
    moments = random.Random(0)
    command = [*start, run]
    for kill in range(KILLS):
        both = launch(*command)
        number = rows(run) + moments.randint(-2, 5)
        wait_for(lambda number=number: is_open(run) and rows(run) >= number, both)
        time.sleep(moments.uniform(0, 1))
        killed = moments.randrange(2)
        at = rows(run)
        both[killed].kill()
        began = time.monotonic()
        said = outcome(both, timeout=120)
        code, _, errors = said[1 - killed]
        print(f"kill {kill}: process {killed} after step {at}; the other ended in {time.monotonic() - began:.1f} s")
        assert code == 1, said
        assert errors.count("error: ") == 1, errors
        assert f"{SENTENCE}\nto continue: python -m mr1fast.train --resume {run}" in errors
        assert "Traceback" not in errors
        command = ["-m", "mr1fast.train", "--resume", run]
    assert [code for code, *_ in outcome(launch(*command))] == [0, 0]
    assert losses(run) == losses(whole)
    model = [(one / "vc" / "model" / "model.safetensors").read_bytes() for one in (run, whole)]
    assert model[0] == model[1]


def rows(run):
    """Lines of metrics.jsonl; what is resumed writes some of them again."""
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def is_open(run):
    """Whether a program has the lock of this run, and has recorded its options."""
    if not (run / "config.json").exists():
        return False
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def losses(run):
    return [(row["step"], row.get("loss"), row.get("grad_norm")) for row in metrics(run)]


def wait_for(condition, both):
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        assert all(process.poll() is None for process in both), outcome(both)
        time.sleep(0.05)

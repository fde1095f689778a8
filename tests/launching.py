"""Two processes on the CPU (gloo), as accelerate launch starts them."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from train_program import metrics

TESTS = Path(__file__).parent


def launch(*arguments, different=(), **environment):
    """Start `python ARGUMENTS` twice. different: more arguments for the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    common = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, [*arguments, *(different if rank else ())])],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            **pipes,
        )
        for rank in range(2)
    ]


def outcome(processes, timeout=280):
    """(exit code, output, errors) of each."""
    try:
        said = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said)]


def wait_for_steps(run, both, number=2):
    """Until metrics.jsonl has the row of this step."""
    while all(process.poll() is None for process in both):
        if (run / "metrics.jsonl").exists() and metrics(run) and metrics(run)[-1]["step"] >= number:
            return
        time.sleep(0.1)
    raise AssertionError(outcome(both))

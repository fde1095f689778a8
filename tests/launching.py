"""Two processes on the CPU (gloo), as accelerate launch starts them."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def free_ports(number):
    """Below those that the system gives to programs which ask for any: nobody takes them in the meantime."""
    ports = []
    while len(ports) < number:
        with socket.socket() as free:
            port = random.SystemRandom().randrange(20000, 32000)
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def launch(*arguments, **environment):
    """Start `python ARGUMENTS` twice."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    (port,) = free_ports(1)
    common = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
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

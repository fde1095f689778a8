"""`scale`: a whole step of a model of 25 million parameters, in one process and divided between two (gloo, 2 cores).

Each process has one thread; one process with two threads is what the second one competes with. The note says which
share of the step a process spends in communication, which is to say waiting for the other and for what passes between
them, and what the gradients of Qwen2-VL-2B would take between 8 GPUs. The latter is computed from bytes over
NVLink's bandwidth, and measured nowhere.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

from benchmarks.cases import Call, Case, Scene
from benchmarks.cases_step import SIDE, Inputs, Shape, make_inputs
from benchmarks.models import in_proportion

MODEL = in_proportion(layers=2, vocabulary=32_000)
SHAPE = Shape("25 M, V 32000", P=8, G=4, L=32, image=(4 * SIDE, 4 * SIDE), model=MODEL)
TINY = replace(SHAPE, name="tiny", P=2, G=2, L=4, model=in_proportion(layers=1, vocabulary=400))
PARAMETERS_2B = 2_208_985_600
NVLINK = 450e9  # bytes a second in each direction, of an H100


def all_reduce_seconds(size: float, processes: int, bandwidth: float) -> float:
    """At least, to add up `size` bytes of each of the processes: each sends and receives 2 (n - 1) / n of them."""
    return 2 * (processes - 1) / processes * size / bandwidth


class Workers:
    """So many processes with so many threads each, which take their steps together (see scale_worker.py)."""

    def __init__(self, x: Inputs, processes: int, threads: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.last: list[dict[str, float]] = []
        common = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if processes > 1:
            common |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        shape = x.shape
        sizes = json.dumps({"P": shape.P, "G": shape.G, "L": shape.L, "image": shape.image})
        command = [sys.executable, "-m", "benchmarks.scale_worker", x.folder.name, sizes]
        self.workers = [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]

    def step(self) -> None:
        """Raises RuntimeError if a process has ended."""
        for worker in self.workers:
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
        said = [worker.stdout.readline() for worker in self.workers if worker.stdout is not None]
        if not all(said):
            raise RuntimeError("a process has ended")
        self.last = [json.loads(line) for line in said]

    def remark(self) -> str:
        """Of the last step."""
        if len(self.workers) == 1:
            return ""
        shares = ", ".join(f"{one['waited'] / one['seconds']:.0%}" for one in self.last)
        size = 2 * PARAMETERS_2B  # bfloat16
        milliseconds = 1e3 * all_reduce_seconds(size, 8, NVLINK)
        return (
            f"in communication: {shares}; computed, not measured: {size / 1e9:.1f} GB of gradients of 2B between 8 "
            f"GPUs over NVLink, {milliseconds:.0f} ms a step"
        )


def of_processes(x: Inputs, processes: int, threads: int) -> Call:
    workers = Workers(x, processes, threads)
    return Call(workers.step, remark=workers.remark)


def scenes(quick: bool) -> list[Scene]:
    shape = TINY if quick else SHAPE
    work = 1e9 * shape.P * shape.G * shape.L

    def case(processes: int, threads: int) -> Case:
        name = f"{processes} process{'es' * (processes > 1)}, {threads} thread{'s' * (threads > 1)}"
        return Case(
            name, lambda x: of_processes(x, processes, threads), work, "tokens/s", against="1 process, 1 thread"
        )

    title = f"{shape.name}, {shape.P} x {shape.G} x {shape.L}"
    of_scene = (case(1, 1), case(1, 2), case(2, 1))
    return [Scene("scale", title, "float32", lambda: make_inputs(shape, "equal"), of_scene)]

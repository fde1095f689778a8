"""`python -m benchmarks.scale_worker FOLDER SIZES`: one of the processes of the group `scale` (cases_scale.py).

For each line that it reads it takes a step and writes a line of JSON: the seconds that the step took, and how many of
them it spent on others: waiting for them, and adding up what passes between them. FOLDER has the model, SIZES the rest
of a cases_step.Shape in JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

from benchmarks.cases_step import Inputs, Shape, take_step, trainer_of
from mr1fast.training.processes import Processes, started


def main(folder: str, sizes: str) -> None:
    shape = Shape("", **json.loads(sizes))
    waited = 0.0
    connected = Processes._peers

    @contextmanager
    def timed(self: Processes) -> Iterator[None]:
        nonlocal waited
        began = time.perf_counter()
        with connected(self):
            yield
        waited += time.perf_counter() - began

    with started(None, sizes) as processes, patch.object(Processes, "_peers", timed):
        trainer = trainer_of(Inputs(shape, [], SimpleNamespace(name=folder)), processes)
        lengths = [shape.L] * (shape.P * shape.G // processes.count)
        for _ in sys.stdin:
            began, waited = time.perf_counter(), 0.0
            take_step(trainer, lengths)
            print(json.dumps({"seconds": time.perf_counter() - began, "waited": waited}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

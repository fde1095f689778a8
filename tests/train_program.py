"""The training program, called with little to do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

from PIL import Image

from mr1fast import train
from mr1fast.data.tasks import TASKS
from mr1fast.evaluation.curves import read_run

SMALL = [
    "--prompts-per-step=2", "--num-generations=2", "--max-completion-length=12", "--eval-samples=4",
    "--eval-validation-samples=2", "--warmup-steps=1", "--device=cpu",
]  # fmt: skip


class Drawings:
    """Seven problems of vc: a run of a few steps goes through them more than once."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return TASKS["vc"].example("train", index)


def program(*arguments, cwd, **keywords) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "mr1fast.train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, **pipes, **keywords)


def blank(file):
    Image.new("RGB", (8, 8)).save(file)


def blank_curves(runs, file):
    for run in runs:
        read_run(run)  # may raise
    blank(file)


def main(*arguments) -> int:
    """The program in this process, which has torch already, and with pictures that have nothing in them.

    Drawing takes two thirds of the time of a small run: it is for test_plot.py, test_samples.py and the programs that
    test_train.py starts.
    """
    with (
        patch("mr1fast.evaluation.curves.draw_curves", blank_curves),
        patch("matplotlib.figure.Figure.savefig", lambda _, file: blank(file)),
    ):
        return train.main([str(argument) for argument in arguments])


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

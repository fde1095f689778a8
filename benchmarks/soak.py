"""Does a long run leak? `python -m benchmarks.soak`: memory, files, threads, processes and step time over the steps.

The training program runs as users start it, with its checkpoints, validations, loggers and pages, and is watched from
outside. Written to docs/results: soak.csv (a row for each look), soak.json (slopes, with standard errors) and soak.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from mr1fast.model.load import EMBEDDED

RESULTS = Path("docs/results")
OPTIONS = "--task=vc --test-data=vc --eval-samples=2 --eval-validation-samples=2 --prompts-per-step=2 --device=cpu"
SIZES = {
    "embedded": "--num-generations=2 --max-completion-length=8 --save-steps=100 --eval-steps=100",
    "mid-size": "--num-generations=2 --max-completion-length=16 --save-steps=50 --eval-steps=50",
}
MID_SIZE = 4  # times as wide as the embedded model: 10 million parameters
WARM_UP = 0.1  # of the steps, in which caches fill; slopes are those of the rest
WATCHED = {
    "resident_mb": "resident memory, MB",
    "handles": "open files",
    "threads": "threads",
    "children": "child processes",
    "step_time": "seconds a step",
}


def mid_size(folder: Path) -> Path:
    """The embedded model with random weights, and four times as wide."""
    shutil.copytree(EMBEDDED, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = AutoConfig.from_pretrained(EMBEDDED)
    text, vision = config.text_config, config.vision_config
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(text, name, MID_SIZE * getattr(text, name))
    vision.hidden_size, vision.embed_dim = text.hidden_size, MID_SIZE * vision.embed_dim
    vision.num_heads *= MID_SIZE
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def look(process: int) -> dict[str, float]:
    """What the system knows of a process. Raises OSError when it has ended."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
    children = (folder / "task" / str(process) / "children").read_text().split()
    return {
        "resident_mb": int(status["VmRSS"].split()[0]) / 1024,
        "handles": len(os.listdir(folder / "fd")),
        "threads": int(status["Threads"]),
        "children": len(children),
    }


def newest_row(file: Path) -> dict[str, Any]:
    lines = file.read_text().splitlines() if file.exists() else []
    whole = [line for line in lines[-2:] if line.endswith("}")]
    return json.loads(whole[-1]) if whole else {}


def soak(size: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each step at which it was looked at, about two a second. Raises RuntimeError if the run fails."""
    run = folder / size
    model = ["--model", str(mid_size(folder / "model"))] if size == "mid-size" else []
    options = [*OPTIONS.split(), *SIZES[size].split(), *model, f"--max-steps={steps}", f"--output-dir={run}"]
    with (folder / f"{size}.txt").open("w") as said:
        program = subprocess.Popen([sys.executable, "-m", "mr1fast.train", *options], stdout=said, stderr=said)
    rows: list[dict[str, Any]] = []
    while program.poll() is None:
        time.sleep(0.5)
        step = newest_row(run / "metrics.jsonl").get("step", 0)
        if step > (rows[-1]["step"] if rows else 0):
            try:
                rows.append({"size": size, "step": step, **look(program.pid)})
            except OSError:  # it has just ended
                break
    if program.wait():
        raise RuntimeError((folder / f"{size}.txt").read_text()[-2000:])
    times = {row["step"]: row.get("step_time") for row in map(json.loads, (run / "metrics.jsonl").open())}
    return [row | {"step_time": times[row["step"]]} for row in rows]


def slope(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Of a least-squares line after the warm-up, per 1,000 steps, with its standard error."""
    last = rows[-1]["step"]
    points = np.array([(row["step"], row[name]) for row in rows if row["step"] > WARM_UP * last])
    x, y = points[:, 0] / 1000, points[:, 1]
    centred = x - x.mean()
    per_1000 = float((centred * y).sum() / (centred**2).sum())
    rest = y - y.mean() - per_1000 * centred
    error = float(np.sqrt((rest**2).sum() / max(len(x) - 2, 1) / (centred**2).sum()))
    return {"first": float(y[0]), "last": float(y[-1]), "per_1000_steps": per_1000, "standard_error": error}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, grid = plt.subplots(len(WATCHED), len(sizes), figsize=(5 * len(sizes), 9), squeeze=False, sharex="col")
    for column, size in enumerate(sizes):
        own = [row for row in rows if row["size"] == size]
        for axes, (name, title) in zip(grid[:, column], WATCHED.items()):
            axes.plot([row["step"] for row in own], [row[name] for row in own], ".", markersize=2)
            axes.set_ylabel(title)
            axes.set_ylim(0, 1.1 * max([row[name] for row in own]) or 1)
        grid[0, column].set_title(f"{size} model")
        grid[-1, column].set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedded-steps", type=int, default=2000, metavar="N")
    parser.add_argument("--mid-size-steps", type=int, default=300, metavar="N")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for size, steps in (("embedded", options.embedded_steps), ("mid-size", options.mid_size_steps)):
            rows += soak(size, steps, Path(folder))
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "soak.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["size", "step", *WATCHED], lineterminator="\n")
        table.writeheader()
        table.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    slopes = {
        size: {name: slope([row for row in rows if row["size"] == size], name) for name in WATCHED} for size in SIZES
    }
    (RESULTS / "soak.json").write_text(json.dumps(slopes, indent=2) + "\n")
    draw(rows, RESULTS / "soak.png")
    print(json.dumps(slopes, indent=2))


if __name__ == "__main__":
    main()

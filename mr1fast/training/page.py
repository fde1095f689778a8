"""run.html: a run as it goes, in one page that a browser opens from the disk. run.html.jinja is the page.

It is written anew now and then, with curves.png beside it, and is another logger of the run.
"""

from __future__ import annotations

import base64
import gc
import io
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from mr1fast.data.images import side_by_side
from mr1fast.errors import UserError
from mr1fast.training.run_folder import RunFolder, write_text
from mr1fast.training.scoring import Scored
from mr1fast.training.watch import LOOKED_AT, WINDOW, warnings

EVERY = 30.0  # seconds at least between two of them; and drawing takes at most a thirtieth of the time
SIDE = 256  # pixels of an image
PROMPTS = 4  # shown, with as many completions of each
SHOWN_METRICS = {
    "reward": "reward",
    "rewards/accuracy_reward/mean": "right",
    "rewards/format_reward/mean": "well formed",
    "kl": "KL divergence (nats per token)",
    "beta": "KL weight",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "loss": "loss",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "step_time": "seconds a step",
}


class Page:
    """rows: those of metrics.jsonl that the task has from before a resumption; total: steps of its training."""

    def __init__(self, run: RunFolder, task: str, rows: Iterable[dict[str, Any]], total: int):
        self.run, self.task, self.total = run, task, total
        self.rows = list(deque(rows, maxlen=LOOKED_AT))
        self.completions: Sequence[Scored] = ()
        self.said: set[str] = set()
        self.written, self.cost = 0.0, 0.0

    def log(self, step: int, metrics: dict[str, float], completions: Sequence[Scored]) -> None:
        self.rows = [*self.rows[-LOOKED_AT + 1 :], {"step": step, **metrics}]
        self.completions = completions or self.completions
        for metric, sentence in warnings(self.rows).items():
            if metric not in self.said:
                self.said.add(metric)
                tqdm.write(f"warning: step {step}, {self.task}, the last {WINDOW} steps: {sentence}", file=sys.stderr)
        if time.monotonic() - self.written > max(EVERY, 30 * self.cost):
            self._write(is_running=True)

    def close(self) -> None:
        self._write(is_running=False)

    def _write(self, is_running: bool) -> None:
        from mr1fast.evaluation.curves import draw_curves  # matplotlib takes its time

        self.run.check_there()
        started = time.monotonic()
        with suppress(UserError):  # there is nothing to draw yet
            draw_curves([self.run.path], self.run.curves)
        write_text(self.run.page, self._render(is_running))
        gc.collect()  # a picture is a cycle of few objects and 10 MB, of which Python would wait for a dozen
        self.written = time.monotonic()
        self.cost = self.written - started

    def _render(self, is_running: bool) -> str:
        newest = self.rows[-1] if self.rows else {}
        step = newest.get("step", 0)
        times = [row["step_time"] for row in self.rows[-WINDOW:] if row.get("step_time")]
        return _template().render(
            run=self.run.path.resolve().name,
            task=self.task,
            step=step,
            total=self.total,
            is_running=is_running and step < self.total,
            left=_duration(median(times) * (self.total - step)) if times else None,
            metrics=[(title, newest[name]) for name, title in SHOWN_METRICS.items() if newest.get(name) is not None],
            warnings=list(warnings(self.rows).values()),
            window=WINDOW,
            prompts=_prompts(self.completions),
            curves=self.run.curves.name,
            version=int(time.time()),  # else a browser shows the curves that it has
            now=time.strftime("%Y-%m-%d %H:%M:%S"),
        )


def _prompts(completions: Sequence[Scored]) -> list[tuple[str | None, list[Scored]]]:
    """(image, completions) of the first prompts of a step."""
    groups: dict[int, list[Scored]] = {}
    for one in completions:
        groups.setdefault(id(one.example), []).append(one)
    return [(_picture(group[0]), group[:PROMPTS]) for group in list(groups.values())[:PROMPTS]]


def _picture(one: Scored) -> str | None:
    """The images of an example, side by side, as a data: address."""
    image: Image.Image | None = side_by_side(one.example.images, SIDE)
    if image is None:
        return None
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _template() -> Any:
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return pages.get_template("run.html.jinja")

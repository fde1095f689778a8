"""report.html of an evaluation: its figures, and the mistakes with their images. report.html.jinja is the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from mr1fast.data.dataset import problem_at
from mr1fast.data.example import Examples
from mr1fast.data.images import thumbnail
from mr1fast.evaluation.figures import answer_rows, figure_rows, heading, percent
from mr1fast.evaluation.result import Answered, EvalResult

MAX_WRONG, MAX_RIGHT = 200, 12  # problems on the page
SMALL = 128  # pixels; images up to this side are enlarged, pixel by pixel
MAX_SIDE = 480  # pixels; larger images are scaled down for the page


@dataclass(frozen=True)
class Picture:
    """An image as the page holds it."""

    source: str  # a data: URL
    small: bool


def write_report(file: Path, result: EvalResult, settings: dict[str, Any], dataset: Examples) -> Path:
    """One page that needs no other file, no network and no script. Everything from data and model is escaped."""
    wrong = [one for one in result.answered if not (one.correct or one.right_untagged)]
    untagged = [one for one in result.answered if one.right_untagged]
    right = [one for one in result.answered if one.correct]
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("report.html.jinja").render(
        title=heading(result, settings),
        figures=figure_rows(result, settings),
        by_answer=answer_rows(result),
        percent=percent,
        confusions=result.confusions(),
        galleries=[
            ("Wrong answers", len(wrong), _cards(wrong[:MAX_WRONG], dataset)),
            ("Right, but not in answer tags: counted as wrong", len(untagged), _cards(untagged[:MAX_WRONG], dataset)),
            ("Right answers, for comparison", len(right), _cards(right[:MAX_RIGHT], dataset)),
        ],
        settings=settings,
    )
    file.write_text(page, encoding="utf-8", errors="replace")
    return file


def _cards(answered: Sequence[Answered], dataset: Examples) -> list[tuple[Answered, list[Picture | None]]]:
    """Each problem with its images, None for one that cannot be shown."""
    cards = []
    for one in answered:
        example = problem_at(dataset, one.index)
        cards.append((one, [] if example is None else [_picture(image) for image in example.images]))
    return cards


def _picture(image: Image.Image) -> Picture | None:
    small = max(image.size) <= SMALL
    shown, stream = thumbnail(image, MAX_SIDE), io.BytesIO()
    if shown is None:
        return None
    shown.save(stream, "PNG" if small else "JPEG", quality=85)
    content = base64.b64encode(stream.getvalue()).decode()
    return Picture(f"data:image/{'png' if small else 'jpeg'};base64,{content}", small)

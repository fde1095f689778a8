"""What an evaluation says: a table for the terminal, and one HTML page with the mistakes and their images."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from mr1fast.data.example import Examples
from mr1fast.evaluation.result import EvalResult, Sample, wilson_interval
from mr1fast.evaluation.summary import FIGURES

MAX_ROWS = 12  # of accuracy by answer
MAX_WRONG, MAX_RIGHT = 200, 12  # samples on the page
MAX_SIDE = 480  # pixels; larger images are scaled down for the page


def result_text(result: EvalResult, settings: dict[str, Any]) -> str:
    """The table that is printed."""
    lines = [heading(result, settings), f"model {settings['model']}", ""]
    lines += [f"  {title:28}{value:>8}   {remark}".rstrip() for title, value, remark in figure_rows(result, settings)]
    lines += ["", f"  {'greedy accuracy by answer':28}{'':>8}   right of all"]
    for answer, right, n in answer_rows(result):
        bar = "█" * round(20 * right / n)
        lines.append(f"  {answer[:28]:28}{percent(right / n):>8}   {right:5} {n:6}  {bar}".rstrip())
    if confusions := result.confusions():
        worst = ", ".join(f"{truth} taken for {said} ({times} x)" for truth, said, times in confusions[:4])
        lines += ["", f"  most frequent mistakes: {worst}"]
    return "\n".join(lines)


def heading(result: EvalResult, settings: dict[str, Any]) -> str:
    stopped = f" (stopped {settings['stopped']})" if "stopped" in settings else ""
    return f"{settings['data']}, {settings['split']} split, {result.n} problems{stopped}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def figure_rows(result: EvalResult, settings: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, remark) of each figure."""
    low, high = wilson_interval(result.greedy_accuracy, result.n)
    remarks = {
        "greedy_accuracy": f"95 % interval: {percent(low)} to {percent(high)}",
        "sampled_accuracy": f"{settings['sampled']} a problem, at temperature {settings['temperature']:g}",
    }
    values = {name: getattr(result, name) for name in FIGURES}
    return [
        (title, percent(values[name]), remarks.get(name, ""))
        for name, title in FIGURES.items()
        if not math.isnan(values[name])
    ]


def answer_rows(result: EvalResult) -> list[tuple[str, int, int]]:
    """(answer, right, all) of each true answer; of many, numbers are put together in ranges, the rarest as "others"."""
    counts = result.by_answer()
    if len(counts) <= MAX_ROWS:
        return [(answer, right, n) for answer, (right, n) in counts.items()]
    try:
        numbers = {float(answer): count for answer, count in counts.items()}
    except ValueError:
        by_size = sorted(counts.items(), key=lambda item: -item[1][1])
        rows = [(answer, right, n) for answer, (right, n) in by_size[: MAX_ROWS - 1]]
        rest = [count for _, count in by_size[MAX_ROWS - 1 :]]
        return [*rows, (f"{len(rest)} others", sum(r for r, _ in rest), sum(n for _, n in rest))]
    ordered = sorted(numbers.items())
    size = -(-len(ordered) // 8)
    rows = []
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        name = f"{part[0][0]:g} to {part[-1][0]:g}" if len(part) > 1 else f"{part[0][0]:g}"
        rows.append((name, sum(right for _, (right, _) in part), sum(n for _, (_, n) in part)))
    return rows


# ---- the page -------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.muted { opacity: .7 } table { border-collapse: collapse } td, th { padding: .2rem .9rem .2rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
tr.first td.number { font-weight: 700; font-size: 1.2rem }
.bar { width: 16rem; height: .8rem; background: var(--soft); border-radius: .2rem; overflow: hidden }
.bar div { height: 100%; background: #2f6fde }
.samples { display: flex; flex-wrap: wrap; gap: 1rem }
.sample { box-sizing: border-box; width: 16.8rem; border: 1px solid var(--line);
  border-top: 4px solid var(--bad); border-radius: .4rem; padding: .7rem;
  overflow-wrap: anywhere }
.sample.right { border-top-color: var(--good) }
.sample img { width: 100%; max-height: 20rem; object-fit: contain; background: var(--soft) }
.sample img.small { image-rendering: pixelated; height: 11rem }
.sample p { margin: .45rem 0 } .truth { color: var(--good); font-weight: 600 } .said { font-weight: 600 }
.wrong .said { color: var(--bad) }
pre { white-space: pre-wrap; background: var(--soft); padding: .4rem; margin: .3rem 0;
  border-radius: .3rem; font-size: .8rem; max-height: 14rem; overflow: auto }
"""


def write_report(file: Path, result: EvalResult, settings: dict[str, Any], dataset: Examples) -> Path:
    """One page that needs no other file, no network and no script. Everything from data and model is escaped."""
    wrong = [sample for sample in result.samples if not sample.correct]
    right = [sample for sample in result.samples if sample.correct]
    title = heading(result, settings)
    figures = "".join(
        f'<tr{" class=first" if row == 0 else ""}><th>{escape(name)}</th><td class="number">{value}</td>'
        f'<td class="muted">{escape(remark)}</td></tr>'
        for row, (name, value, remark) in enumerate(figure_rows(result, settings))
    )
    answers = "".join(
        f'<tr><td>{escape(answer)}</td><td class="number">{right_ones} of {n}</td>'
        f'<td class="number">{percent(right_ones / n)}</td>'
        f'<td><div class="bar"><div style="width:{100 * right_ones / n:.1f}%"></div></div></td></tr>'
        for answer, right_ones, n in answer_rows(result)
    )
    confusions = "".join(
        f'<tr><td>{escape(truth)}</td><td>{escape(said)}</td><td class="number">{times}</td></tr>'
        for truth, said, times in result.confusions()
    )
    sections = [
        f"<h2>Figures</h2><table>{figures}</table>",
        f"<h2>Greedy accuracy by true answer</h2><table>{answers}</table>",
    ]
    if confusions:
        header = "<tr><th>the answer is</th><th>the model said</th><th>times</th></tr>"
        sections.append(f"<h2>Most frequent mistakes</h2><table>{header}{confusions}</table>")
    sections.append(_gallery("Wrong answers", wrong, MAX_WRONG, dataset))
    sections.append(_gallery("Right answers, for comparison", right, MAX_RIGHT, dataset))
    about = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in settings.items()
    )
    sections.append(f"<h2>How this was made</h2><table>{about}</table>")
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        # Nothing is loaded and nothing runs, whatever a data set has in its questions.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="muted">model {escape(str(settings["model"]))}</p>{"".join(sections)}</body></html>\n'
    )
    file.write_text(page, encoding="utf-8")
    return file


def _gallery(title: str, samples: Sequence[Sample], most: int, dataset: Examples) -> str:
    if not samples:
        return ""
    shown = samples[:most]
    number = f"{len(samples)}" if len(shown) == len(samples) else f"the first {len(shown)} of {len(samples)}"
    cards = "".join(_card(sample, dataset[sample.index].image) for sample in shown)
    return f'<h2>{title} ({number})</h2><div class="samples">{cards}</div>'


def _card(sample: Sample, image: Image.Image | None) -> str:
    said = "no answer in tags" if sample.answer is None else sample.answer
    note = "" if sample.formatted else '<p class="muted">not well formed</p>'
    sampled = ""
    if sample.sampled_correct:
        sampled = f'<p class="muted">sampled: {sum(sample.sampled_correct)} of {len(sample.sampled_correct)} right</p>'
    return (
        f'<div class="sample {"right" if sample.correct else "wrong"}">{_picture(image)}'
        f"<p>{escape(sample.problem)}</p>"
        f'<p>answer: <span class="truth">{escape(sample.solution)}</span> · '
        f'model: <span class="said">{escape(said)}</span></p>'
        f"<pre>{escape(sample.completion) or '(nothing)'}</pre>{note}{sampled}"
        f'<p class="muted">{escape(sample.name)}</p></div>'
    )


def _picture(image: Image.Image | None) -> str:
    if image is None:
        return ""
    small = max(image.size) <= 128
    stream = io.BytesIO()
    if small:
        image.save(stream, "PNG")
    else:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(stream, "JPEG", quality=85)
    kind, size = ("png", ' class="small"') if small else ("jpeg", "")
    return f'<img{size} alt="" src="data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}">'

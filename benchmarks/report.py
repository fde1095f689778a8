"""Rows of results: the CSV, the table in the terminal, the plot."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import shutil
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import GROUPS, Scene
from benchmarks.timing import Measurement
from mr1fast.env import processor

Row = dict[str, Any]
MEASURED = ["group", "shape", "dtype", "case", "pages", "median_ms", "best_ms", "call_ms", "calls", "rate", "unit"]
MEASURED += ["limit", "of_limit", "of_memcpy", "best_of_memcpy", "ratio", "best_ratio", "against", "peak_extra_mib"]
MEASURED += ["note"]
PACKAGES = ["triton", "trl", "liger-kernel", "quack-kernels", "fla-core", "cut-cross-entropy", "unsloth-zoo"]
ENVIRONMENT = ["device", "threads", "clock", "commit", "date", "python", "torch", *PACKAGES]


def rows(scene: Scene, measurements: list[Measurement]) -> list[Row]:
    """One row per measurement. of_limit and of_memcpy compare rates, ratio compares times (1 = the case `against`, with
    the same pages where it was measured with both; the limits are measured with warm ones only).

    They are taken from medians; those called best_ from each case's fastest call, which a busy machine disturbs less.
    On a GPU, median_ms is the time of the device alone and call_ms that of the call (see timing.py).
    """
    warm = {m.case.name: m for m in measurements if m.times and m.pages == "warm"}
    fresh = {m.case.name: m for m in measurements if m.times and m.pages == "fresh"}
    result = []
    for m in measurements:
        row: Row = dict.fromkeys(MEASURED, "")
        row |= {"group": scene.group, "shape": scene.shape, "dtype": scene.dtype, "case": m.case.name, "note": m.note}
        if m.times:
            against, limit, memcpy = (warm.get(name or "") for name in (m.case.against, m.case.limit, "memcpy"))
            if m.pages == "fresh":
                against = fresh.get(m.case.against or "", against)
            row |= _figures(m, against, limit, memcpy)
            row["note"] = m.note or m.remark()
        elif not m.note:
            row["note"] = "not measured: cut off before its first round"
        result.append(row)
    return result


def _figures(m: Measurement, against: Measurement | None, limit: Measurement | None, memcpy: Measurement | None) -> Row:
    row = {
        "pages": m.pages if m.case.fresh_pages else "",
        "median_ms": _digits(m.median * 1e3),
        "best_ms": _digits(m.best * 1e3),
        "call_ms": "" if m.median_call is None else _digits(m.median_call * 1e3),
        "calls": len(m.times),
        "rate": _digits(m.rate),
        "unit": m.case.unit,
        "limit": m.case.limit or "",
        "of_limit": _digits(m.rate / limit.rate) if limit else "",
        "ratio": _digits(m.median / against.median) if against else "",
        "best_ratio": _digits(m.best / against.best) if against else "",
        "against": m.case.against or "",
        "peak_extra_mib": "" if m.peak_extra is None else _digits(m.peak_extra / 2**20),
    }
    if memcpy and memcpy.case.unit == m.case.unit:
        row["of_memcpy"] = _digits(m.rate / memcpy.rate)
        row["best_of_memcpy"] = _digits(m.best_rate / memcpy.best_rate)
    return row


def _digits(x: float) -> float:
    return float(f"{x:.3g}")


def environment() -> Row:
    """What the figures depend on: the machine, the commit, the versions."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if timing.now is time.process_time else "wall",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    } | {name: version(name) for name in PACKAGES}


def device_name() -> str:
    """The GPU if there is one, and the processor as the system names it."""
    cpu = f"{processor()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.cuda.get_device_name()} ({cpu})" if torch.cuda.is_available() else cpu


def commit(where: Path = Path(__file__).parent.parent) -> str:
    """MR1FAST_COMMIT, for a copy of the tree; else the short commit, with "+" if the tree differs from it, or ""."""
    if given := os.environ.get("MR1FAST_COMMIT"):
        return given
    if (where / ".git").exists() and shutil.which("git"):
        run = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=where, capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.strip()
    return ""


def write_csv(path: Path, table: list[Row], about: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*table[0], *about])
        writer.writeheader()
        writer.writerows(row | about for row in table)


def print_table(table: list[Row]) -> None:
    """One block per scene."""
    columns = {
        "case": "case",
        "pages": "pages",
        "median_ms": "ms",
        "call_ms": "call ms",
        "rate": "rate",
        "unit": "",
        "of_limit": "of limit",
        "of_memcpy": "of memcpy",
        "best_of_memcpy": "(best)",
        "ratio": "time ratio",
        "best_ratio": "(best)",
        "peak_extra_mib": "+MiB",
        "note": "",
    }
    width = {key: max(len(name), *(len(str(row[key])) for row in table)) for key, name in columns.items()}
    scene = None
    for row in table:
        if scene != (scene := (row["group"], row["shape"], row["dtype"])):
            print("\n" + ", ".join(scene))
            print("  " + "  ".join(name.ljust(width[key]) for key, name in columns.items()).rstrip())
        print("  " + "  ".join(str(row[key]).ljust(width[key]) for key in columns).rstrip())


OURS, PEER, LIMIT = "#1b6ca8", "#b8b8b8", "#d9a441"


def plot(path: Path, table: list[Row], about: Row) -> None:
    """Each scene's cases as bars of their time ratio, on a logarithmic axis; what was not measured says so.

    Left out: scenes of which nothing was measured, where others were; and what is compared with another case than the
    rest of its scene, whose bars would not share the axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    by_scene: dict[tuple[str, ...], list[Row]] = {}
    for row in table:
        rows_so_far = by_scene.setdefault((row["group"], row["shape"], row["dtype"]), [])
        if row["pages"] != "fresh" and row["against"] in ("", (rows_so_far or [row])[0]["against"]):
            rows_so_far.append(row)
    by_scene = {scene: chosen for scene, chosen in by_scene.items() if _measured(chosen)} or by_scene
    table, scenes = [row for chosen in by_scene.values() for row in chosen], list(by_scene)
    columns = min(2, len(scenes))
    lines = -(-len(scenes) // columns)
    height = 0.7 + 0.27 * max((len(chosen) for chosen in by_scene.values() if _measured(chosen)), default=1)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.4 * columns, height * lines + 1.2), sharex=True, squeeze=False, layout="constrained"
    )
    for ax, (scene, chosen) in zip(axes.flat, by_scene.items()):
        ax.set_title(", ".join(scene))
        if _measured(chosen):
            _bars(ax, chosen[::-1])
        else:
            ax.axis("off")
            ax.text(0.5, 0.5, "\n".join({row["note"] for row in chosen}), ha="center", transform=ax.transAxes)
    for ax in axes.flat[len(scenes) :]:
        ax.axis("off")
    shortest, longest = (f((row["ratio"] or 1 for row in table), default=1) for f in (min, max))
    for ax in axes.flat:
        ax.set(xscale="log", xlim=(shortest / 2, 12 * longest))
    for ax in axes.flat[max(len(scenes) - columns, 0) : len(scenes)]:  # with nothing beneath
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("time relative to mr1fast on the same input\n(shorter is faster)", fontsize=9)
    if any(map(_measured, by_scene.values())):
        kinds = {"mr1fast": OURS, "others": PEER, "limit of this machine": LIMIT}
        handles = [Patch(color=colour, label=name) for name, colour in kinds.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    where = f"{about['device']}; torch {about['torch']}; commit {about['commit']}"
    what = "; ".join(dict.fromkeys(f"{row['group']}: {GROUPS[row['group']][1]}" for row in table))
    title = (what, f"{where}; buffers in memory that was used before")
    figure.suptitle("\n".join(textwrap.fill(part, 90 * columns) for part in title), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _measured(chosen: list[Row]) -> bool:
    return any(row["ratio"] != "" for row in chosen)


def _bars(ax: Any, chosen: list[Row]) -> None:
    limits = {row["limit"] for row in chosen} | {"memcpy"}
    for y, row in enumerate(chosen):
        name, ratio = row["case"], row["ratio"]
        label = row["note"][:50] or "no ratio"
        if ratio != "":
            ax.barh(y, ratio, color=OURS if "mr1fast" in name else LIMIT if name in limits else PEER)
            label = f"{ratio:.3g}x  ({row['median_ms']:g} ms)"
        ax.text((ratio or 1) * 1.1, y, label, va="center", fontsize=8, bbox={"color": "white", "pad": 0.5})
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_yticks(range(len(chosen)), [row["case"] for row in chosen])
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)

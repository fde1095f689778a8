"""Measures tile sizes of the Triton kernels on the GPU at hand, and writes the best ones into kernels/triton_table.py.

  python -m benchmarks.tune                                whole table, some minutes, most of them compilation
  python -m benchmarks.tune --filter "loss 16-bit"         only the entries whose name contains every word
  python -m benchmarks.tune --output OUT/triton_table.py   writes there, and leaves the table that is in use alone

An explicit step: nothing is tuned at import or at the first call. For each entry it times the kernel on the longest
rows the entry serves, over a buffer several times the L2 cache, for every tile size, number of warps and of stages that
does not spill. The longest rows in 16 bits come first. The file is written after each entry, with all others as they
stand in the table in use: a run that is cut off loses one entry, and several runs, each with a filter, add up in that
table. Exits 2, and changes nothing, where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

from mr1fast.kernels import triton_table

Key = tuple[str, int, int]  # (op, bytes an element, largest V)
Settings = tuple[int, int, int]  # (elements a tile, warps, stages)

BYTES = 2**30  # of logits a measurement reads: many times any L2
FLAGSHIP = 151936  # Qwen2-VL's vocabulary stands for the longest rows
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def candidates(key: Key) -> Iterator[Settings]:
    """Settings worth timing (each is a compilation): 16 bytes a load, one to eight loads a thread and tile."""
    _, itemsize, limit = key
    for loads, warps, stages in product((1, 2, 4, 8), (1, 2, 4) if limit <= 1024 else (4, 8, 16, 32), (1, 3)):
        block = loads * warps * 32 * 16 // itemsize
        if block <= max(2 * limit, 512):
            yield block, warps, stages


def name_of(key: Key) -> str:
    op, itemsize, limit = key
    return f"{op} {8 * itemsize}-bit {limit}"


def chosen(words: str) -> list[Key]:
    """The table's entries whose name contains every word, those that matter most first."""
    keys = [key for key in triton_table.TABLE if all(word in name_of(key) for word in words.split())]
    return sorted(keys, key=lambda key: (key[1], -key[2]))


TEMPLATE = '''"""Tile sizes of the Triton kernels. `python -m benchmarks.tune` rewrites this file on a GPU.

{origin}
"""

# (op, bytes per element, largest V) -> (elements per tile, warps, stages). The last entry also serves all larger V.
TABLE: dict[tuple[str, int, int], tuple[int, int, int]] = {{
{entries}
}}
'''


def rendered(table: dict[Key, Settings], origin: str) -> str:
    """The text of triton_table.py; `origin` says where the numbers were measured."""
    entries = (f'    ("{op}", {itemsize}, {limit}): {settings},' for (op, itemsize, limit), settings in table.items())
    return TEMPLATE.format(origin=origin, entries="\n".join(entries))


def origin_of(measured: dict[Key, Settings]) -> str:
    """Where the entries come from: those measured now, and, if there are others, what the table says of itself."""
    import triton

    here = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}, torch {torch.__version__}"
    if len(measured) == len(triton_table.TABLE):
        return f"Measured on {here}."
    names = "; ".join(map(name_of, measured))
    before = (triton_table.__doc__ or "").split("\n\n", 1)[1].strip()
    return textwrap.fill(f"{names}: measured on {here}.", 118) + f"\n\nAll others: {before}"


def kernel_call(key: Key, nbytes: int = BYTES) -> Callable[[], object]:
    """A launch of the entry's kernel on rows of its longest vocabulary, so much in all. In place where it writes."""
    from mr1fast.kernels import triton_loss, triton_score
    from mr1fast.kernels.reference import LogitMap, LossBatch, LossSpec

    op, itemsize, limit = key
    V = min(limit, FLAGSHIP)
    L = max(nbytes // (V * itemsize), 16)
    logits = torch.randn(1, L, V, device="cuda", dtype=DTYPES[itemsize])
    ids = torch.randint(V, (1, L), device="cuda")
    values = torch.randn(1, L, device="cuda")
    one = torch.ones((), device="cuda")
    if op == "score":
        return lambda: triton_score.score_forward(logits, ids, None, LogitMap())
    if op == "score_backward":
        return lambda: triton_score.score_backward(logits, ids, None, values, values, values, None, LogitMap(), logits)
    spec = LossSpec()
    batch = LossBatch(ids, values, one, advantages=values, old_logps=values, ref_logps=values)
    return lambda: triton_loss.grpo_forward(logits, batch, spec, logits)


def milliseconds(key: Key, settings: Settings, call: Callable[[], object], rep: int = 60) -> float:
    """Median time of a launch with these settings; inf if they do not fit on the device."""
    import triton

    before = triton_table.TABLE[key]
    triton_table.TABLE[key] = settings
    try:
        return triton.testing.do_bench(call, warmup=rep // 6, rep=rep, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    finally:
        triton_table.TABLE[key] = before


def spills(key: Key, settings: Settings) -> bool:
    """Whether the fullest variant of the kernel spills on this GPU, found without running it."""
    from benchmarks.compile_check import loss_call, score_backward_call, score_call
    from benchmarks.offline import compile_offline, recorded_launches

    op, itemsize, limit = key
    V, dtype = min(limit, FLAGSHIP), DTYPES[itemsize]
    before = triton_table.TABLE[key]
    triton_table.TABLE[key] = settings
    try:
        if op == "loss":
            (launch,) = recorded_launches(loss_call(V, dtype, full=True))
        elif op == "score":
            (launch,) = recorded_launches(score_call(V, dtype))
        else:
            (launch,) = recorded_launches(score_backward_call(V, dtype, entropy=True))
    finally:
        triton_table.TABLE[key] = before
    major, minor = torch.cuda.get_device_capability()
    return compile_offline(launch, 10 * major + minor).spill_bytes > 0


def compiled(key: Key, settings: Settings) -> None:
    """Into Triton's cache on disk, in a process of its own: these compile side by side, and are timed one by one."""
    milliseconds(key, settings, kernel_call(key, nbytes=0), rep=1)


def best_of(key: Key, processes: ProcessPoolExecutor) -> Settings:
    """The fastest of the entry's candidates that does not spill. Prints it beside what stands in the table."""
    list(processes.map(partial(compiled, key), candidates(key)))
    call = kernel_call(key)
    timed = sorted((milliseconds(key, settings, call), settings) for settings in candidates(key))
    time, best = next((time, settings) for time, settings in timed if not spills(key, settings))
    print(f"{name_of(key)}: {best} {time:.3f} ms; before, {triton_table.TABLE[key]}", flush=True)
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", metavar="WORDS", help="entries that contain every one of these words")
    parser.add_argument("--output", type=Path, default=Path(triton_table.__file__), metavar="FILE")
    arguments = parser.parse_args()
    keys = chosen(arguments.filter)
    if not keys:
        names = ", ".join(map(name_of, triton_table.TABLE))
        print(f"no entry contains every word of {arguments.filter!r}; there are {names}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("no GPU here: the table can only be measured on one; nothing was changed", file=sys.stderr)
        return 2
    measured: dict[Key, Settings] = {}
    processes = ProcessPoolExecutor(min(os.cpu_count() or 1, 16), get_context("spawn"))
    try:
        for key in keys:
            measured[key] = best_of(key, processes)
            text = rendered(triton_table.TABLE | measured, origin_of(measured))
            arguments.output.write_text(text, encoding="utf-8")
    except KeyboardInterrupt:
        print(f"cut off: {len(keys) - len(measured)} of {len(keys)} entries are as they were", file=sys.stderr)
        return 130
    finally:
        processes.shutdown(wait=False, cancel_futures=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

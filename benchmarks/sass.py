"""The inner loops of compiled CUDA kernels: how many instructions a row's walk costs per logit.

Counted in the machine code (SASS), as the cuobjdump of Triton's package prints it. What stands in a loop is counted
whether it always runs or not.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

LOAD, STORE = re.compile(r"\bLD[GS]\.\S*128\b"), re.compile(r"\bST[GS]\.\S*128\b")
BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
VECTOR = 16  # bytes of LOAD and STORE


class Loop(NamedTuple):
    writes: bool  # the gradient; a loop that only reads finds the row's statistics
    loads: int  # of 16 bytes
    instructions: int


def row_loops(library: Path) -> dict[str, list[Loop]]:
    """The loops over 16-byte vectors in each kernel of a library, by the kernel's mangled name.

    Of nested loops the inner one; where a loop was unrolled, the unrolled one and not the one for what is left over.
    """
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, "-sass", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)
    return {function.split(maxsplit=1)[0]: _main_loops(function) for function in functions}


def _main_loops(function: str) -> list[Loop]:
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", function, flags=re.MULTILINE)
    code = {int(address, 16): instruction for address, instruction in found}
    jumps = [(int(to[1], 16), at) for at, instruction in code.items() if (to := BRANCH.search(instruction))]
    bodies = {(start, end) for start, end in jumps if start < end and _count(LOAD, _between(code, start, end))}
    inner = [
        (start, end)
        for start, end in bodies
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in bodies)
    ]
    loops = [_loop(_between(code, start, end)) for start, end in inner]
    reading = sorted((loop for loop in loops if not loop.writes), key=lambda loop: (-loop.loads, loop.instructions))
    writing = [loop for loop in loops if loop.writes]
    most = max((loop.loads for loop in writing), default=0)
    return reading[:1] + [loop for loop in writing if loop.loads >= most / 2]


def _between(code: dict[int, str], start: int, end: int) -> list[str]:
    return [instruction for address, instruction in code.items() if start <= address <= end]


def _count(pattern: re.Pattern[str], instructions: list[str]) -> int:
    return sum(pattern.search(instruction) is not None for instruction in instructions)


def _loop(instructions: list[str]) -> Loop:
    return Loop(_count(STORE, instructions) > 0, _count(LOAD, instructions), len(instructions))

"""How much memory a device has for us, at this moment, beside what others use of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# What a GPU's free memory cannot be used for: CUDA's context and the workspaces of its libraries, and blocks that the
# allocator has free but in the wrong sizes. Both are estimates.
CUDA_CONTEXT, FRAGMENTATION = 2**29, 0.08
NO_LIMIT = 2**63


def free_memory(device: Any) -> int:
    """Bytes that nothing has taken on a torch.device, or NO_LIMIT where that is not known.

    On a CPU the least of what the machine has available and what the limits of the process's control groups leave.
    """
    if device.type == "cpu":
        return min(_of_machine(Path("/proc/meminfo")), _of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return NO_LIMIT


def usable_memory(kind: str, free: int) -> int:
    """Bytes that tensors can have of so many that are free on a "cpu" or on "cuda"."""
    return int((free - CUDA_CONTEXT) * (1 - FRAGMENTATION)) if kind == "cuda" and free < NO_LIMIT else free


def _of_machine(meminfo: Path) -> int:
    if not meminfo.exists():  # no Linux
        known = hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else NO_LIMIT
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024


def _of_groups(membership: Path, root: Path) -> int:
    """What the limits of control groups leave, of version 1 or 2; a group is bound by those above it, too."""
    if not membership.exists():
        return NO_LIMIT
    left = NO_LIMIT
    for line in membership.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / name.lstrip("/")
        for folder in (group, *group.parents):
            left = min(left, _of_group(folder, *files))
            if folder == top:
                break
    return left


def _of_group(folder: Path, limit: str, usage: str, inactive_file: str) -> int:
    try:
        bound, used = ((folder / name).read_text().strip() for name in (limit, usage))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the group of another namespace, or the root, which has no limit
        return NO_LIMIT
    if bound == "max":
        return NO_LIMIT
    # Cached files count as used, and give way.
    return int(bound) - int(used) + int(statistics.get(inactive_file, 0))

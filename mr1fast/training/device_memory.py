"""How much memory a device has for us, at this moment, beside what others use of it."""

from __future__ import annotations

from pathlib import Path

# What a GPU's free memory cannot be used for: CUDA's context and the workspaces of its libraries, and blocks that the
# allocator has free but in the wrong sizes. Both are estimates.
CUDA_CONTEXT, FRAGMENTATION = 2**29, 0.08
_NO_LIMIT = 2**63


def usable_memory(device: str) -> int:
    """Bytes that a program may still allocate on "cpu", "cuda", "cuda:1", ...

    On a CPU the least of what the machine has available and what the limits of the process's control groups leave.
    Raises OSError where the system does not say.
    """
    if device == "cpu":
        return min(_of_machine(Path("/proc/meminfo")), _of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))
    import torch

    return usable_of_gpu(torch.cuda.mem_get_info(device)[0])


def usable_of_gpu(free: int) -> int:
    """Bytes for tensors, of so many that are free before CUDA is used."""
    return int((free - CUDA_CONTEXT) * (1 - FRAGMENTATION))


def _of_machine(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OSError(f"{meminfo} does not say MemAvailable")


def _of_groups(membership: Path, root: Path) -> int:
    """What the limits of control groups leave, of version 1 or 2; a group is bound by those above it, too."""
    if not membership.exists():
        return _NO_LIMIT
    left = _NO_LIMIT
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
        return _NO_LIMIT
    if bound == "max":
        return _NO_LIMIT
    # Cached files count as used, and give way.
    return int(bound) - int(used) + int(statistics.get(inactive_file, 0))

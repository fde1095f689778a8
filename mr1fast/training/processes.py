"""The processes among which a run is divided (`accelerate launch`, torchrun): what one must know of the others.

Each has the whole model and the same weights. A step's prompts are divided among them in whole groups; sums over
processes make of their gradients those of one process, which each then follows by itself. With a single process
nothing here does anything.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mr1fast.errors import UserError
from mr1fast.options.config import TaskConfig

T = TypeVar("T")
# Longer than the main process ever writes or draws while the others wait.
TIMEOUT = timedelta(hours=2)
# For all to begin: a process that ended before is not noticed.
CONNECT_TIMEOUT = timedelta(minutes=10)
SECONDS_FOR_REASONS = 3.0
BUCKET_BYTES = 64 * 2**20
CODE = Path(__file__).parents[1]


class PeerFailed(RuntimeError):
    """Another process has ended, or does not answer."""


@dataclass(frozen=True)
class Processes:
    """Raises PeerFailed from all that waits for the others."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    def on_main(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call it, in the main process alone. What fails there ends the others where they next wait for it."""
        if self.is_main:
            function(*arguments)

    def share(self, items: Sequence[T]) -> list[T]:
        """Every count-th item, from this process's own number on."""
        return list(items[self.rank :: self.count])

    def gather(self, value: T) -> list[T]:
        """The value of each process, in order; it is pickled."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with self._peers():
            dist.all_gather_object(values, value, group=self._objects)
        return values

    def whole(self, share: Sequence[T], group: int = 1) -> list[T]:
        """The items of which each process has its `share`, or `group` items in the place of each, in order."""
        if self.count == 1:
            return list(share)
        shares = self.gather(list(share))
        longest = max(map(len, shares))
        return [one for i in range(0, longest, group) for each in shares for one in each[i : i + group]]

    def whole_tensor(self, share: Any, group: int = 1) -> Any:
        """`whole` of a tensor [n], on the CPU if there are several processes."""
        if self.count == 1:
            return share
        import torch

        return torch.tensor(self.whole(share.tolist(), group), dtype=share.dtype)

    def sum_gradients(self, weights: Sequence[Any]) -> None:
        """Make each weight's gradient the sum of those of all processes. One that no process has stays absent."""
        if self.count == 1:
            return
        import torch
        import torch.distributed as dist

        there = self.gather([weight.grad is not None for weight in weights])
        for weight, has in zip(weights, zip(*there)):
            if any(has) and weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        with self._peers(), torch.no_grad():
            for together in _buckets(gradients):
                flat = torch.cat([gradient.flatten() for gradient in together])
                dist.all_reduce(flat)
                for gradient, part in zip(together, flat.split([one.numel() for one in together])):
                    gradient.copy_(part.view_as(gradient))

    def from_main(self, value: Any) -> Any:
        """The main process's value in all of them. An error that it has instead is raised in the others."""
        value = self.gather(value)[0]
        if isinstance(value, Exception) and not self.is_main:
            raise value
        return value

    def agreed(self, signal_number: int | None) -> int | None:
        """The signal that any process was sent."""
        return max((number for number in self.gather(signal_number) if number is not None), default=None)

    def device(self, name: str) -> str:
        """The name of this process's own device, given that of --device."""
        if self.count == 1 or name == "cpu":
            return name
        if ":" in name:
            raise UserError(f"--device {name} is one device, and {self.count} processes each need their own: use cuda")
        import torch

        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name != "auto" or torch.cuda.is_available() else "cpu"

    def report(self, message: str) -> None:
        """Leave for the others why this one ends."""
        if self.count > 1:
            with suppress(RuntimeError):
                _store().set(f"mr1fast/alive/{self.rank}", "")
                _store().set(f"mr1fast/{self.rank}", message)

    def _peer_failed(self) -> PeerFailed:
        """With the reasons that the others have left, which may take them a moment.

        Where no process before this one is left, this one is heard from now on.
        """
        keys = {rank: f"mr1fast/{rank}" for rank in range(self.count) if rank != self.rank}
        until = time.monotonic() + SECONDS_FOR_REASONS
        said: list[str] = []
        speaks = True
        with suppress(RuntimeError):  # the store may have ended with them
            _store().set(f"mr1fast/alive/{self.rank}", "")
            while not said and time.monotonic() < until:
                said = [f"process {rank}: {_store().get(key).decode()}" for rank, key in keys.items() if _has(key)]
                time.sleep(0.1)
            speaks = not any(_has(f"mr1fast/alive/{rank}") for rank in range(self.rank))
        if speaks and not self.is_main:
            assert sys.__stderr__ is not None
            sys.stderr = sys.__stderr__
        return PeerFailed("; ".join(said) or "another process has ended without a word, so this one ends as well")

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """For what waits for the others by itself, as a sharded model does. Raises PeerFailed where that has failed."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not (type(error).__name__.startswith("Dist") or "gloo/" in str(error)):
                raise
            raise self._peer_failed() from error

    @contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # also DistBackendError: a connection that was closed, or a timeout
            raise self._peer_failed() from error

    @cached_property
    def _objects(self) -> Any:
        """On the CPU, whatever the model is on."""
        import torch.distributed as dist

        return dist.new_group(backend="gloo", timeout=TIMEOUT)


ALONE = Processes()


def _buckets(tensors: Sequence[Any]) -> Iterator[list[Any]]:
    """The tensors, in order, as many of one type at a time as have up to BUCKET_BYTES together."""
    bucket: list[Any] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(one.nbytes for one in bucket) > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _store() -> Any:
    """Where processes find each other; a process can leave a text there without any other waiting for it."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def _has(key: str) -> bool:
    return _store().check([key])


def equal_pieces(config: TaskConfig, processes: Processes) -> int | None:
    """In how many pieces of equally many prompts each process's share of a batch passes through the model, of
    --gradient-accumulation-steps in all processes together; None without that option.

    Raises UserError for a batch that cannot be divided among the processes.
    """
    prompts, count = config.prompts_per_step, processes.count
    if count > 1 and config.dynamic_sampling:
        raise UserError(f"--dynamic-sampling cannot be divided among processes yet, and there are {count}")
    if prompts % count:
        raise UserError(f"--prompts-per-step must be a multiple of the number of processes, got {prompts} and {count}")
    if config.gradient_accumulation_steps is None:
        return None
    share, wanted = prompts // count, -(-config.gradient_accumulation_steps // count)
    return next(pieces for pieces in range(wanted, share + 1) if share % pieces == 0)


# Of accelerate's fsdp_config, by the variable that `accelerate launch` sets: what cannot be done here.
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}


def share_weights(processes: Processes) -> bool:
    """Whether accelerate's configuration asks for FSDP. Raises UserError for what of that cannot be done here."""
    if processes.count == 1 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate's configuration asks for FSDP 1; write fsdp_version: 2 in its fsdp_config")
    for variable, name in REFUSED.items():
        if os.environ.get(variable, "false").lower() == "true":
            instead = "; use --gradient-checkpointing on" if "CHECKPOINTING" in variable else ""
            raise UserError(f"{name} in accelerate's fsdp_config must be false here{instead}")
    return True


# ---- at the start ---------------------------------------------------------------------------------------------------


def number_of_processes() -> int:
    """How many a launcher has started."""
    count = os.environ.get("WORLD_SIZE", "")
    return int(count) if count.isdecimal() and int(count) > 1 else 1


def own_rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if number_of_processes() > 1 and rank.isdecimal() else 0


@contextmanager
def one_voice() -> Iterator[None]:
    """Within the context only the main process is heard. All hear of a mistake in the program itself."""
    if own_rank() == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def started(error: UserError | OSError | None, description: str) -> Iterator[Processes]:
    """The processes, within the context connected to each other.

    error: what is wrong with this one's options, if anything is; description: of what it is about to do. Raises the
    first process's error in all of them, and UserError if they are not about to do the same.
    """
    count = number_of_processes()
    if count == 1:
        if error is not None:
            raise error
        yield ALONE
        return
    # Else its store warns, with a stack of C++ functions, where the main process has ended.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=CONNECT_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as failed:
        why = str(failed).partition("\n")[0]
        advice = "start them by accelerate launch or torchrun, or unset WORLD_SIZE"
        raise UserError(f"WORLD_SIZE is {count}, but the processes cannot be connected ({why}); {advice}") from failed
    processes = Processes(rank, count)
    try:
        said = processes.gather((None if error is None else str(error), f"{_code()} {description}"))
        check_same(said)
        yield processes
    finally:
        dist.destroy_process_group()
        vars(processes).pop("_objects", None)
        _wait_until_all_leave(processes, store)


def check_same(said: Sequence[tuple[str | None, str]]) -> None:
    """Raises UserError if any process has a mistake to report, or is about to do something else than the first.

    said: by each, what is wrong, if anything is, and its code and options.
    """
    for reason, _ in said:
        if reason is not None:
            raise UserError(reason)
    for rank, (_, other) in enumerate(said):
        if other != said[0][1]:
            what = "code" if other.split()[0] != said[0][1].split()[0] else "options"
            raise UserError(f"process {rank} was started with other {what} than process 0; they must be the same")


def _wait_until_all_leave(processes: Processes, store: Any) -> None:
    """The main process's part: with it ends the store, in which the others find why it does."""
    until = time.monotonic() + SECONDS_FOR_REASONS
    with suppress(RuntimeError):
        left = store.add("mr1fast/left", 1)
        while processes.is_main and left < processes.count and time.monotonic() < until:
            time.sleep(0.02)
            left = store.add("mr1fast/left", 0)


def _code() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(CODE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()

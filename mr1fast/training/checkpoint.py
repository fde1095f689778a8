"""Checkpoints in Hugging Face format with the state of training. A checkpoint is complete or does not exist."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mr1fast.errors import UserError
from mr1fast.model.policy import Policy
from mr1fast.training.manifest import damage, sync, write_manifest
from mr1fast.training.run_folder import METRICS, STATE, ResumeError, checkpoints, remove_folder, step_of


def save_model(policy: Policy, folder: Path) -> Path:
    """Save model and processor as a folder in Hugging Face format, which `load_model` and transformers can read."""

    def write(temporary: Path) -> None:
        policy.save(temporary)
        write_manifest(temporary)

    return _write_whole(folder, write)


def save_checkpoint(
    policy: Policy, state: dict[str, Any] | None, folder: Path, *, step: int, keep: int, metrics: str = ""
) -> Path:
    """Write model, processor and `state` to `folder`/checkpoint-STEP, then delete all but the newest `keep`.

    state: None for a checkpoint of the model alone, from which training cannot be continued. metrics: the rows of
    metrics.jsonl so far, which a resumed run takes from here if it has lost them. Raises UserError if the checkpoint
    cannot be written; the earlier ones are then untouched.
    """

    def write(temporary: Path) -> None:
        policy.save(temporary)
        if state is not None:
            with (temporary / STATE).open("wb") as file:  # given a name, torch would not say that the disk is full
                torch.save(state, file)
        (temporary / METRICS).write_text(metrics, encoding="utf-8")
        write_manifest(temporary)

    saved = _write_whole(folder / f"checkpoint-{step:06d}", write)
    for old in checkpoints(folder)[:-keep]:
        remove_folder(old)
    return saved


def whole_checkpoint(named: Path | None, folder: Path) -> Path | None:
    """The checkpoint that the user named, or else the newest of a task; None if it has none.

    A damaged one is passed over for the one before it, and both are said; that of the user, or the task's only one, is
    a ResumeError. Nothing is removed or loaded.
    """
    found = [named] if named else checkpoints(folder)[::-1]
    why: dict[Path, str] = {}
    for checkpoint in found:
        if (broken := damage(checkpoint)) is None:
            for passed, reason in why.items():
                print(f"{passed} is passed over, as {reason}; training goes on from {checkpoint}", flush=True)
            return checkpoint
        why[checkpoint] = broken
    if found:
        raise ResumeError(f"{found[-1]} is damaged: {broken}; {_instead_of(found[-1])}")
    return None


def load_checkpoint(checkpoint: Path, load: Callable[..., Policy]) -> tuple[Policy, dict[str, Any]]:
    """The policy and the state. If the checkpoint is broken, raises ResumeError, which names the one before it.

    load: path -> policy; its keyword dtype asks for another dtype than the run's.
    """
    try:
        if not (checkpoint / STATE).exists():
            why = f"{STATE} is missing, as --save-only-model leaves it out"
            raise ValueError(f"training cannot be continued from {checkpoint}: {why}")
        policy, state = load(checkpoint), load_state(checkpoint)
        masters = state.get("optimizer", {}).get("masters", [])
        weights = policy.trainable_parameters()
        if any(weight.dtype != torch.float32 and master is None for weight, master in zip(weights, masters)):
            # These are the weights of a float32 model, which this one, of less precision, has only rounded.
            exact = load(checkpoint, dtype=torch.float32).trainable_parameters()
            state["optimizer"]["masters"] = [
                p.detach() if m is None else m for p, m in zip(exact, masters, strict=True)
            ]
        return policy, state
    except ValueError as error:
        raise ResumeError(f"{error}; {_instead_of(checkpoint)}") from error


def _instead_of(checkpoint: Path) -> str:
    whole = [one for one in checkpoints(checkpoint.parent) if (one / STATE).exists()]
    earlier = [one for one in whole if step_of(one) < step_of(checkpoint)]
    if earlier:
        return f"to continue from the checkpoint before it: --resume {earlier[-1]}"
    return f"there is no earlier one; move it away, and --resume {checkpoint.parent.parent} starts without it"


def load_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{checkpoint / STATE} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint / STATE} does not hold a training state")
    return state


def _write_whole(folder: Path, write: Callable[[Path], None]) -> Path:
    """Write into a temporary folder beside it, then rename that; an existing folder of this name is replaced."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        folder.parent.mkdir(exist_ok=True)  # but not the run's folder, which may have been moved away meanwhile
        temporary.mkdir()
        write(temporary)
        remove_folder(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise could_not_be_written(folder, error) from error
    return folder


def could_not_be_written(folder: Path, error: Exception) -> UserError:
    """What to raise where a checkpoint or model is not there as a whole; what there is of it has been removed."""
    left = checkpoints(folder.parent)
    rest = f"the last whole checkpoint is {left[-1]}" if left else "there is no earlier checkpoint"
    reason = re.sub(r"\s+", " ", _reason(error)).strip()
    return UserError(f"{folder} could not be written ({reason}); {rest}")


def _reason(error: BaseException) -> str:
    """What the system said, of which torch says less than nothing."""
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__context__
    return str(error)

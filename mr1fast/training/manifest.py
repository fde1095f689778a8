"""SHA256SUMS: what the files of a checkpoint or model hold, so that a damaged one is never taken for a whole one.

The format is that of `sha256sum`, with which it can be checked by hand: `sha256sum -c SHA256SUMS`. A run's own file has
the hashes of config.json and result.json, which are written again as it goes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

MANIFEST = "SHA256SUMS"


def write_manifest(folder: Path) -> None:
    """Write the hash of every file, and have all of it on the disk when this returns. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_hash(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    manifest = folder / MANIFEST
    manifest.write_text("".join(lines), encoding="utf-8")
    for path in (*files, manifest, *{file.parent for file in files}):
        sync(path)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder's first damaged file; None for a whole folder, and for one without a manifest."""
    try:
        lines = (folder / MANIFEST).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # older versions wrote none
        return None
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for line in lines:
        wanted, _, name = line.partition("  ")
        try:
            found = _hash(folder / name)
        except OSError as error:
            return f"{name or MANIFEST} cannot be read ({error.strerror})"
        if found != wanted:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def replace_hashed(file: Path, text: str) -> None:
    """Replace a file as a whole, and record its hash. Killed in between, either content is what was written."""
    if not file.exists():
        write_text(file, text)
    manifest = file.with_name(MANIFEST)
    others = [line for line in _lines(manifest) if not line.endswith(f"  {file.name}\n")]
    now = f"{hashlib.sha256(text.encode()).hexdigest()}  {file.name}\n"
    write_text(manifest, "".join([*others, f"# before: {_hash(file)}  {file.name}\n", now]))
    write_text(file, text)


def is_changed(file: Path) -> bool:
    """Whether a file, written by `replace_hashed`, holds something else now. Older versions recorded no hash."""
    end = f"  {file.name}\n"
    lines = [line for line in _lines(file.with_name(MANIFEST)) if line.endswith(end)]
    recorded = [line.removesuffix(end).removeprefix("# before: ") for line in lines]
    return bool(recorded) and file.exists() and _hash(file) not in recorded


def _lines(manifest: Path) -> list[str]:
    return manifest.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if manifest.exists() else []


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: no reader ever sees half of it, and a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")  # the same bytes, and hash, on every system
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir():  # some file systems cannot do it for folders
            raise OSError(f"{path}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

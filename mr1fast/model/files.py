"""The files of a model folder: which must be there, and which of them cannot be read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mr1fast.errors import UserError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_LFS_POINTER = b"version https://git-lfs"


def read_json(file: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises UserError for one that is not a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        raise UserError(f"{str(file.parent)!r} holds no usable model: its {file.name} is not valid JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(file.parent)!r} holds no usable model: its {file.name} is not a JSON object")
    return content


def check_weight_files(path: str | Path) -> None:
    """Raise UserError, which names it, if a file with weights is missing from a folder."""
    folder = Path(path)
    if not folder.is_dir() or any((folder / name).exists() for name in WEIGHTS):
        return
    indices = [folder / f"{name}.index.json" for name in WEIGHTS]
    index = next((file for file in indices if file.exists()), None)
    if index is None:
        shards = sorted(file.name for file in folder.glob("model-*.safetensors"))
        if shards:
            what = f"{indices[0].name} is missing, which says what is in {shards[0]} and the others"
            raise UserError(f"model {str(folder)!r} has weights that cannot be loaded: {what}")
        needed = ", ".join([*WEIGHTS, *(file.name for file in indices[:-1])])
        raise UserError(f"model {str(folder)!r} has no weights: none of {needed} or {indices[-1].name} is there")
    place = (read_json(index) or {}).get("weight_map")
    if not isinstance(place, dict):
        raise UserError(f"model {str(folder)!r} has weights that cannot be loaded: {index.name} has no weight_map")
    files = sorted({str(file) for file in place.values()})
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        named = f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        what = f"lacks {len(missing)} of its {len(files)} files with weights ({named})"
        raise UserError(f"model {str(folder)!r} {what}, which {index.name} names")


def check_processor_files(folder: Path) -> None:
    """Raise UserError, which names it, if a file of the tokenizer or the image processor is missing.

    Of some of them transformers would make something empty.
    """
    what = f"model {str(folder)!r} has no usable"
    if not (folder / "tokenizer.json").exists():
        halves = [name for name in ("vocab.json", "merges.txt") if not (folder / name).exists()]
        if halves:
            instead = f", and so {'is' if len(halves) == 1 else 'are'} {' and '.join(halves)}, which could replace it"
            raise UserError(f"{what} tokenizer: tokenizer.json is missing{instead}")
    if not any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise UserError(f"{what} image processor: preprocessor_config.json (or processor_config.json) is missing")


def check_readable(path: str | Path) -> None:
    """To be called where loading has failed. Raises UserError, which names it, if that is because of a broken file."""
    files = sorted(Path(path).iterdir()) if os.path.isdir(path) else []
    for file in files:
        if file.suffix not in (".json", ".safetensors", ".bin"):
            continue
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                advice = "run 'git lfs pull' in that folder, or download it with 'hf download'"
                raise UserError(f"{file} is not the file itself, but Git LFS's pointer to it: {advice}")
        if file.suffix == ".json":
            read_json(file)
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as error:
                raise UserError(f"{file} is broken or was not copied to its end: {error}") from None

"""Rows of local files: JSON lines, JSON, CSV, Parquet, and folders as `datasets` saves them.

JSON and CSV are read here and not by `datasets`, which gives up a whole file at its first broken line. Parquet and
saved data sets stay memory-mapped: their images are read when they are needed. They alone need `datasets`.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mr1fast.errors import UserError

if TYPE_CHECKING:
    import datasets

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What `datasets` and the hub write beside the data.
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Table:
    """The rows of one file: each a dict by column, or the reason (a text) why the row cannot be read."""

    rows: Sequence[dict[str, Any] | str]
    file: Path  # relative image paths start at its folder
    name: str  # unlike that of any other table of the same source
    split: str | None = None  # named by the file or a folder above it

    @property
    def folder(self) -> Path:
        return self.file if self.file.is_dir() else self.file.parent


def read_tables(source: Path) -> list[Table]:
    """Every table under a folder, or the one in a file, in a fixed order. Raises UserError where there is none."""
    if not source.exists():
        raise UserError(f"data {str(source)!r} does not exist")
    if source.is_file():
        if source.suffix.lower() not in SUFFIXES:
            raise UserError(f"data {str(source)!r} is not a {_choices()} file")
        return [Table(_read(source), source, source.name)]
    if (source / "state.json").exists() or (source / "dataset_dict.json").exists():
        return _saved_tables(source)
    files = [file for file in sorted(source.rglob("*")) if _is_table(file, source)]
    if not files:
        if any(file.suffix.lower() in _IMAGE_SUFFIXES for file in source.rglob("*")):
            raise UserError(f"data folder {str(source)!r} has images, but no metadata.jsonl or metadata.csv about them")
        raise UserError(f"data folder {str(source)!r} has no {_choices()} file")
    names = [file.relative_to(source) for file in files]
    return [Table(_read(file), file, str(name), _split_of(name)) for file, name in zip(files, names)]


def _choices() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _is_table(file: Path, source: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(source).parts)
    return not hidden and file.suffix.lower() in SUFFIXES and file.name not in _NOT_DATA and file.is_file()


def _split_of(file: Path) -> str | None:
    """The split that a path names: `train-00000-of-00002.parquet`, `test/metadata.csv`; the innermost word decides."""
    for part in reversed((*file.parent.parts, file.stem)):
        words = re.split(r"[^a-z]+", part.lower())
        for split, spellings in _SPLIT_WORDS.items():
            if any(spelling in words for spelling in spellings):
                return split
    return None


def _read(file: Path) -> Sequence[dict[str, Any] | str]:
    try:
        if file.suffix.lower() == ".parquet":
            return _read_parquet(file)
        if file.suffix.lower() == ".csv":
            return _read_csv(file)
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"data file {str(file)!r} cannot be read: {error.strerror or error}") from None
    if file.suffix.lower() == ".json":
        try:
            return _json_rows(json.loads(content.decode("utf-8-sig")))
        except (ValueError, RecursionError):
            pass  # JSON lines are often named .json
    return [_json_line(line) for line in content.removeprefix(b"\xef\xbb\xbf").splitlines() if line.strip()]


def _json_rows(content: Any) -> list[dict[str, Any] | str]:
    """A list of objects; or an object that holds one such list, under "data" or any other name."""
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        content = [content]
    return [row if isinstance(row, dict) else "row is not an object with columns" for row in content]


def _json_line(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "line is not UTF-8"
    except (ValueError, RecursionError):
        return "line is not JSON"
    return row if isinstance(row, dict) else "row is not an object with columns"


def _read_csv(file: Path) -> list[dict[str, Any] | str]:
    rows: list[dict[str, Any] | str] = []
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        reader = csv.DictReader(lines)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return rows
            except csv.Error:
                rows.append("line is not CSV")
                continue
            if None in row:
                rows.append("line has more fields than there are columns")
            else:
                rows.append({(column or "").strip(): value for column, value in row.items()})


class ArrowRows(Sequence):
    """The rows of a `datasets.Dataset`, images as stored."""

    def __init__(self, dataset: datasets.Dataset):
        import datasets

        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
        self.dataset = dataset
        self._arrow = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    def image_digest(self, index: int) -> bytes | None:
        """Of the image file in a row, if there is one, by its length and its ends: there may be gigabytes of them."""
        import pyarrow

        if "image" not in self.dataset.column_names:
            return None
        column = self._arrow[index : index + 1].column("image").chunk(0)
        if pyarrow.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            column = column.field("bytes")
        if not (pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)):
            return None
        content = column[0].as_buffer()
        if content is None:
            return None
        ends = bytes(memoryview(content)[:4096]) + bytes(memoryview(content)[-4096:])
        return hashlib.blake2b(ends + str(len(content)).encode(), digest_size=16).digest()


def _import_datasets(source: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data {str(source)!r} needs the package 'datasets' ({error}): pip install datasets") from None
    return datasets


def _read_parquet(file: Path) -> Sequence[dict[str, Any] | str]:
    datasets = _import_datasets(file)
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return ArrowRows(datasets.Dataset.from_parquet(str(file)))
    except Exception as error:  # pyarrow's and datasets' own, by version
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(f"data file {str(file)!r} is not readable as Parquet: {reason}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _saved_tables(source: Path) -> list[Table]:
    datasets = _import_datasets(source)
    try:
        saved = datasets.load_from_disk(str(source))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"data folder {str(source)!r} is not readable as a saved data set: {reason}") from None
    if isinstance(saved, datasets.Dataset):
        return [Table(ArrowRows(saved), source, source.name)]
    return [Table(ArrowRows(part), source, str(name), _split_of(Path(str(name)))) for name, part in saved.items()]

"""The rows of Parquet files, of folders that `datasets` has saved, and of data sets on the Hugging Face hub.

They stay memory-mapped: images are read when they are needed. Nothing else needs the package `datasets`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mr1fast.errors import UserError

if TYPE_CHECKING:
    import datasets


class Unreadable(Exception):
    """A file or folder that cannot be read; the message is the reason, to be completed with the file's name."""


class ArrowRows(Sequence):
    """The rows of a `datasets.Dataset`: images as stored, other cells as values of their column's type."""

    def __init__(self, dataset: datasets.Dataset, columns: Collection[str]):
        """Raises pyarrow.ArrowInvalid for a broken file, in which a row could be anywhere in the memory."""
        import datasets

        _validate(dataset.data.table)
        self.columns = frozenset(columns)  # all columns of the file; `dataset` has only those that are used
        features = datasets.Features({name: _undecoded(feature) for name, feature in dataset.features.items()})
        # Not cast(), which would write all rows anew: they are stored alike.
        info = datasets.DatasetInfo(features=features)
        self._dataset = datasets.Dataset(dataset.data, info, indices_table=dataset._indices)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index):
        features = self._dataset.features
        try:
            row = self._dataset[index]
        except UnicodeDecodeError:
            return "row has text that is not UTF-8"
        return {column: _meant(value, features[column]) for column, value in row.items()}


def _validate(table: Any) -> None:
    """Look at all of it but the content of images; text that is not UTF-8 costs no more than its rows."""
    import pyarrow

    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        try:
            chunk.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise


def _undecoded(feature: Any) -> Any:
    """The feature with its images, wherever they are in it, as they are stored."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded(each) for name, each in feature.items()}
    return feature


def _meant(value: Any, feature: Any) -> Any:
    """Replace the number of a class by its name, and keep half and single precision instead of converting to double."""
    import datasets

    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(value) if 0 <= value < feature.num_classes else None  # -1: not labelled
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [_meant(item, feature.feature) for item in value]
    if isinstance(feature, datasets.Value) and feature.dtype in ("float16", "float32"):
        return np.dtype(feature.dtype).type(value)
    return value


def read_parquet(file: Path, columns: Collection[str]) -> Sequence[dict[str, Any]]:
    """Of the columns that are not in `columns`, those that hold bytes or have a type which `datasets` does not know are
    not read. Raises Unreadable, UserError.
    """
    datasets = _import_datasets(file)
    if not file.stat().st_size:
        raise Unreadable("is empty")
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as parquet:
            schema, length = parquet.schema_arrow, parquet.metadata.num_rows
        if not length:
            return []  # `datasets` takes it for an error
        known = [name for name in schema.names if name in columns or _is_plain(schema.field(name))] or schema.names
        features = datasets.Features.from_arrow_schema(
            pyarrow.schema([schema.field(name) for name in known], metadata=schema.metadata)
        )
        return ArrowRows(datasets.Dataset.from_parquet(str(file), columns=known, features=features), schema.names)
    except Exception as error:  # pyarrow's and datasets' own, by version
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise Unreadable(f"is not readable as Parquet: {reason}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _is_plain(field: Any) -> bool:
    """Whether a column holds no bytes, and is of a type that `datasets` knows."""
    import datasets
    import pyarrow

    if "binary" in str(field.type):
        return False
    try:
        datasets.Features.from_arrow_schema(pyarrow.schema([field]))
    except Exception:  # by version
        return False
    return True


def read_saved(folder: Path) -> dict[str, Sequence[dict[str, Any]]]:
    """The data sets in a folder, by split; a single data set is under "". Raises Unreadable and UserError."""
    datasets = _import_datasets(folder)
    try:
        saved = datasets.load_from_disk(str(folder))
        parts = {"": saved} if isinstance(saved, datasets.Dataset) else saved
        return {str(name): ArrowRows(part, part.column_names) for name, part in parts.items()}
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Unreadable(f"is not readable as a saved data set: {reason}") from None


@cache  # each split asks for it
def read_hub(name: str) -> dict[str, Sequence[dict[str, Any]]]:
    """The splits of a data set on the hub, which `datasets` downloads, or finds where it has put it before.

    Raises UserError, which says how to have it as a folder.
    """
    datasets = _import_datasets(name)
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # of the hub, the network, the disk or the data set
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        save = f"where there is a network, hf download {name} --repo-type dataset --local-dir DIR, then give --data DIR"
        what = "is no path here, and as a data set on the Hugging Face hub it cannot be had"
        raise UserError(f"data {name!r} {what} ({reason}): {save}") from None
    return {str(split): ArrowRows(part, part.column_names) for split, part in loaded.items()}


def hub_folders() -> tuple[Path, ...]:
    """Where `datasets` puts what it downloads, free of links."""
    from datasets import config

    folders = (config.constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
    return tuple(Path(os.path.realpath(folder)) for folder in folders)


def _import_datasets(source: Path | str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data {str(source)!r} needs the package 'datasets' ({error}): pip install datasets") from None
    return datasets

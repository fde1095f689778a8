"""Problems as rows of a parquet file in verl's layout: prompt, images, reward_model.ground_truth, data_source."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mr1fast.data.dataset import ImageTextDataset
from mr1fast.data.example import IMAGE_MARKER, Example
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import prompt_length, prompt_messages

# verl puts an image, a video or a sound in place of these.
MARKERS = (IMAGE_MARKER, "<video>", "<audio>")
ROWS_AT_A_TIME = 256  # images are held in memory meanwhile
SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        (
            "images",
            pa.list_(pa.struct([("bytes", pa.binary()), ("min_pixels", pa.int64()), ("max_pixels", pa.int64())])),
        ),
        ("data_source", pa.string()),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct([("index", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("columns", pa.string())]),
        ),
    ]
)


@dataclass
class Written:
    """What was written of a split."""

    rows: int = 0
    left_out: int = 0  # with a text that verl would take for an image, a video or a sound
    longest: int = 0  # tokens of a prompt


def write_parquet(file: Path, splits: Sequence[ImageTextDataset], processor: Qwen2VLTextImageProcessor) -> Written:
    """All usable problems of the splits, each once."""
    written = Written()
    with pq.ParquetWriter(file, SCHEMA) as writer:
        rows: list[dict[str, Any]] = []
        for split in splits:
            for row in _rows(split, processor, written):
                rows.append(row)
                if len(rows) == ROWS_AT_A_TIME:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return written


def _rows(split: ImageTextDataset, processor: Qwen2VLTextImageProcessor, written: Written) -> Iterator[dict[str, Any]]:
    for index in range(len(split)):
        example = split.own(index)
        if example is None:
            continue
        row = row_of(example, processor, index=index, split=split.split, source=split.name)
        if row is None:
            written.left_out += 1
            continue
        written.rows += 1
        written.longest = max(written.longest, prompt_length(processor, example))
        yield row


def row_of(
    example: Example, processor: Qwen2VLTextImageProcessor, *, index: int, split: str, source: str
) -> dict[str, Any] | None:
    """A row of SCHEMA; None where verl would take a text for an image, a video or a sound."""
    images = example.images
    prompt = []
    for message in prompt_messages(processor.prompt, example.problem, len(images)):
        texts = [part["text"] if part["type"] == "text" else None for part in message["content"]]
        if images and any(marker in text for text in texts if text for marker in MARKERS):
            return None
        content = "".join(IMAGE_MARKER if text is None else text for text in texts)
        prompt.append({"role": message["role"], "content": content})
    size = processor.image_processor.size
    bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    columns = json.dumps(example.reward_columns(), default=str)
    return {
        "prompt": prompt,
        "images": [{"bytes": _png(image), **bounds} for image in images],
        "data_source": source,
        "ability": "visual reasoning",
        "reward_model": {"style": "rule", "ground_truth": example.solution},
        "extra_info": {"index": index, "split": split, "name": example.name, "columns": columns},
    }


def _png(image: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()

"""Rows and images of local data, and each format that they can be written in."""

import base64
import csv
import io
import json

import datasets
from PIL import Image

from mr1fast.data.columns import Reading

ANYWHERE = Reading(allow_outside=True)  # for tests whose images lie beside the folder of the data


def encoded(image, format="PNG", **keywords):
    stream = io.BytesIO()
    image.save(stream, format, **keywords)
    return stream.getvalue()


def picture(number=0, size=(12, 8)):
    return Image.new("RGB", size, (number % 256, 50, 90))


def row(number, **changes):
    return {
        "image": f"{number}.png",
        "problem": f"question {number}?",
        "solution": f"<answer> {number} </answer>",
    } | changes


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def as_jsonl(folder, rows):
    return write_jsonl(folder / "data.jsonl", rows)


def as_json(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def as_json_under_a_key(folder, rows):
    (folder / "data.json").write_text(json.dumps({"version": 1, "data": rows}))
    return folder / "data.json"


def as_json_lines_named_json(folder, rows):
    return write_jsonl(folder / "data.json", rows)


def as_csv(folder, rows):
    with (folder / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder / "data.csv"


def as_parquet_of_paths(folder, rows):
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def with_bytes(folder, rows):
    rows = [r | {"image": {"bytes": (folder / r["image"]).read_bytes(), "path": None}} for r in rows]
    return datasets.Dataset.from_list(rows)


def as_parquet_of_bytes(folder, rows):
    with_bytes(folder, rows).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_parquet_of_images(folder, rows):
    with_bytes(folder, rows).cast_column("image", datasets.Image()).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_saved(folder, rows):
    with_bytes(folder, rows).cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_of_image_lists(folder, rows):
    images = [[{"bytes": (folder / r["image"]).read_bytes(), "path": None}] for r in rows]
    features = datasets.Features(
        {"problem": datasets.Value("string"), "solution": datasets.Value("string"), "image": [datasets.Image()]}
    )
    rows = [r | {"image": image} for r, image in zip(rows, images)]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(folder / "saved")
    return folder / "saved"


def as_image_folder(folder, rows):
    rows = [{"file_name": r["image"]} | {k: r[k] for k in ("problem", "solution")} for r in rows]
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


FORMATS = [
    as_jsonl,
    as_json,
    as_json_under_a_key,
    as_json_lines_named_json,
    as_csv,
    as_parquet_of_paths,
    as_parquet_of_bytes,
    as_parquet_of_images,
    as_saved,
    as_saved_of_image_lists,
    as_image_folder,
]


def solutions(dataset):
    return [dataset[i].solution for i in range(len(dataset))]


def spellings(folder, number):
    """The image `number`.png in every way that a row can name it."""
    path = folder / f"{number}.png"
    (folder / "links").mkdir(exist_ok=True)
    copy, link, link_to_link = (folder / "links" / f"{name}{number}.png" for name in ("copy", "link", "again"))
    copy.write_bytes(path.read_bytes())
    for name, target in ((link, path), (link_to_link, link)):
        name.unlink(missing_ok=True)
        name.symlink_to(target)
    content = base64.b64encode(path.read_bytes()).decode()
    return [
        path.name,
        f"./{path.name}",
        f"links/../{path.name}",
        f".//{path.name}",
        str(path),
        path.as_uri(),
        f"file:{path.name}",
        str(copy),
        f"links/{link.name}",
        link_to_link.as_uri(),
        f"data:image/png;base64,{content}",
        {"path": path.name},
        [str(path)],
    ]


def shown(dataset):
    """The numbers of the images, which `picture` has painted."""
    return {dataset[i].image.getpixel((0, 0))[0] for i in range(len(dataset))}

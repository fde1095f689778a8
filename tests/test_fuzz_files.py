"""Whatever is in data, images and model folders: never a crash, never slow, and no row lost without being counted."""

import json
import shutil
from copy import deepcopy

import pytest
from data_files import as_csv, as_json_under_a_key, as_jsonl, as_parquet_of_bytes, as_saved, encoded, picture, row
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from mr1fast.data.columns import CHATS, USUAL_NAMES
from mr1fast.data.dataset import load_split
from mr1fast.data.images import MAX_ASPECT, BadImage, check_image, load_image
from mr1fast.errors import UserError
from mr1fast.model.load import EMBEDDED, load_model, load_processor, most_pixels
from tests.fuzzing import BYTES, JSON, NUMBERS, at_once, cases, changed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for number in range(3):
        picture(number).save(folder / f"{number}.png")
    return folder


def read(source):
    """The data set after all of it was looked at, or None for a mistake that is said in one sentence."""
    with at_once():
        try:
            dataset = load_split(source, "all")
            examples = [dataset.own(index) for index in range(len(dataset))]
        except UserError as error:
            assert "\n" not in str(error)
            return None
    for example in filter(None, examples):
        assert example.problem
        assert example.solution
        assert all(image.mode == "RGB" for image in example.images)
        example.solution.encode(), example.problem.encode()
    return dataset


# ---- data -----------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from([name for names in USUAL_NAMES.values() for name in names] + [*CHATS, "level"])
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={"role": st.sampled_from(["user", "assistant", "system", 3]), "content": JSON, "from": JSON,
        "value": JSON,
                  "type": st.sampled_from(["text", "image"]), "text": JSON, "image": JSON},
    ),
    max_size=3,
)  # fmt: skip
PATHS = st.sampled_from(
    ["0.png", "./1.png", "file:2.png", "data:,x", "data:image/png;base64,%%", "//", "file://[", "http://x"]
)
CELLS = JSON | TURNS | TURNS.map(json.dumps) | PATHS | st.lists(PATHS, max_size=2) | st.just("<image>How many?")


@given(rows=st.lists(st.dictionaries(NAMES, CELLS, max_size=4) | JSON, min_size=1, max_size=3))
@cases(30)
def test_a_row_of_anything_is_an_example_or_is_counted(place, rows):
    file = place / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in [row(0), *rows]))
    dataset = read(file)
    if dataset is not None:
        assert dataset[0].problem == "question 0?"
        assert len(dataset) - len(dataset._broken) + dataset.skipped.total() == 1 + len(rows)


@pytest.fixture(scope="module")
def files(place):
    """name of a file -> its content, one of each format."""
    rows = [row(number) for number in range(3)]
    found = {}
    for write in (as_jsonl, as_json_under_a_key, as_csv, as_parquet_of_bytes):
        file = write(place, rows)
        found[file.name] = file.read_bytes()
    found["utf-16.csv"] = found["data.csv"].decode("utf-8-sig").encode("utf-16")
    found["utf-16.jsonl"] = found["data.jsonl"].decode().encode("utf-16-le")
    for name in found:
        (place / name).unlink(missing_ok=True)
    return found


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.parquet", "utf-16.csv", "utf-16.jsonl"])
@given(data=st.data())
@cases(8)
def test_any_damage_to_a_file_of_data_is_said(place, files, name, data):
    (place / name).write_bytes(data.draw(changed([files[name]], BYTES)))
    read(place / name)


@pytest.fixture(scope="module")
def saved(place):
    return as_saved(place, [row(number) for number in range(3)])


@given(data=st.data())
@cases(6, most=2000)
def test_any_damage_to_a_saved_data_set_is_said(place, saved, data):
    broken = place / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(saved, broken)
    file = data.draw(st.sampled_from(sorted(broken.iterdir())))
    file.write_bytes(data.draw(changed([file.read_bytes()], BYTES)))
    read(broken)


# ---- images ---------------------------------------------------------------------------------------------------------

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr", "LAB", "HSV")


def _seeds():
    """An image in every format that Pillow writes, in every mode that it takes."""
    Image.init()
    found = []
    for format in sorted(set(Image.SAVE) - {"PDF", "EPS", "PALM"}):
        for mode in MODES:
            try:
                found.append(encoded(picture(9).convert(mode), format))
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


SEEDS = _seeds()


def test_there_is_an_image_of_each_kind_and_all_are_read():
    assert len(SEEDS) > 60
    assert features.check("webp")
    for seed in SEEDS:
        try:
            image, _ = load_image(seed)
        except BadImage:
            continue
        assert image.size == (12, 8) or image.width == image.height  # icons have sizes of their own


@given(content=changed(SEEDS, BYTES))
@cases(80)
def test_any_image_is_rgb_or_left_out(content):
    with at_once():
        try:
            pixels = check_image(content)
            image, notes = load_image(content)
        except BadImage as error:
            assert len(str(error)) < 100
            return
    assert image.mode == "RGB"
    assert pixels > 0
    assert max(image.size) <= MAX_ASPECT * min(image.size)
    assert len(image.tobytes()) == 3 * image.width * image.height
    assert all(len(note) < 100 for note in notes)


# ---- model folders --------------------------------------------------------------------------------------------------

FILES = ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
JUNK = JSON | NUMBERS | st.sampled_from(["qwen2_vl", "auto", "float64", [], {}, [[0]], {"a": 1}, -100, 3])


def places_in(content, path=()):
    """The paths to everything in a JSON value, the long lists of a vocabulary excepted."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items)[:30]:
        yield from places_in(value, (*path, key))


def put(content, path, value):
    """The value at that path, or without it where it is Ellipsis."""
    *way, last = path
    for key in way:
        content = content[key]
    if value is ...:
        del content[last]
    else:
        content[last] = value


@st.composite
def folders(draw):
    """(name of a file, its new content)."""
    name = draw(st.sampled_from(FILES))
    text = (EMBEDDED / name).read_text()
    if draw(st.integers(0, 3)) == 0:
        return name, draw(changed([text.encode()], BYTES))
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([path for path in places_in(content) if path]))
        put(content, path, deepcopy(draw(JUNK | st.just(...))))  # the next change may be within it
    return name, json.dumps(content).encode()


@given(folders())
@cases(6, most=1500)
def test_any_model_folder_is_loaded_or_is_said_to_be_broken(tmp_path_factory, changed_file):
    name, content = changed_file
    folder = tmp_path_factory.mktemp("model")
    for file in EMBEDDED.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    try:
        with at_once():
            if name.startswith(("config", "generation")):
                load_model(folder)
            else:
                processor = load_processor(folder)
                assert most_pixels(folder) > 0
                assert processor.tokenizer("How many?").input_ids
    except UserError as error:
        assert 20 < len(str(error)) < 2000
    finally:
        shutil.rmtree(folder)

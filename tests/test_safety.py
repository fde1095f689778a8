"""Other people's files are data: none of them is executed, none leads elsewhere, and none takes all of the memory."""

import json
import os
import pickle
import shutil
import struct
import time
from contextlib import suppress

import numpy as np
import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_files import as_saved, encoded, picture, row, write_jsonl
from PIL import Image
from train_program import main

from mr1fast import evaluate
from mr1fast.data.dataset import load_split
from mr1fast.data.images import BadImage, check_image, load_image
from mr1fast.data.rows import OUTSIDE
from mr1fast.errors import UserError
from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import EMBEDDED, load_config, load_model, load_processor
from mr1fast.options.parse import parse_arguments
from mr1fast.rewards import accuracy_reward, r1v, worker
from mr1fast.training.checkpoint import load_state

# ---- pickles --------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, sign):
        self.sign = str(sign)

    def __reduce__(self):
        return os.mkdir, (self.sign,)


@pytest.fixture
def sign(tmp_path):
    """What must not be there afterwards; that a payload does make it is checked first."""
    sign = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(sign)))
    sign.rmdir()
    yield sign
    assert not sign.exists()


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "model")


def saved_pickle(file, sign):
    torch.save({"weight": Payload(sign)}, file)


def test_no_pickle_in_a_model_folder_is_executed(model, sign):
    for name in ("training_args.bin", "optimizer.pt", "tokenizer.pkl", "vocab.npy"):
        saved_pickle(model / name, sign)
    load_model(model), load_processor(model)
    (model / "model.safetensors").unlink()
    saved_pickle(model / "pytorch_model.bin", sign)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(model)
    (model / "pytorch_model.bin").rename(model / "part.bin")
    (model / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"weight": "part.bin"}}')
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(model)
    (model / "pytorch_model.bin.index.json").unlink()
    (model / "model.safetensors").write_bytes((model / "part.bin").read_bytes())
    with pytest.raises(UserError, match=r"model\.safetensors is broken"):
        load_model(model)


def test_no_pickle_in_an_adapter_is_executed_and_no_module_imported_that_it_names(tmp_path, sign, monkeypatch):
    adapter = tmp_path / "adapter"
    add_adapter(load_model(), rank=1).save_pretrained(str(adapter), save_embedding_layers=False)
    (tmp_path / "planted.py").write_text(f"import os; os.mkdir({str(sign)!r})")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    planted = config | {"megatron_config": {}, "megatron_core": "planted"}
    for megatron in ({}, {"tensor_model_parallel_size": 1}):
        (adapter / "adapter_config.json").write_text(json.dumps(planted | {"megatron_config": megatron}))
        if megatron:
            with pytest.raises(UserError, match="it is for Megatron"):
                load_model(adapter)
        else:
            assert isinstance(load_model(adapter), peft.PeftModel)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").unlink()
    saved_pickle(adapter / "adapter_model.bin", sign)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(adapter)


def test_no_pickle_in_a_checkpoint_is_executed(tmp_path, sign):
    saved_pickle(tmp_path / "trainer_state.pt", sign)
    with pytest.raises(ValueError, match=r"trainer_state.pt cannot be read"):
        load_state(tmp_path)
    (tmp_path / "trainer_state.pt").write_bytes(pickle.dumps(Payload(sign)))
    with pytest.raises(ValueError, match=r"trainer_state.pt cannot be read"):
        load_state(tmp_path)


def extension_type(sign):
    """A column of the type that pyarrow kept as a pickle until its version 14 (CVE-2023-47248)."""
    named = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickle.dumps(Payload(sign))}
    return pyarrow.field("level", pyarrow.int64(), metadata=named)


def test_no_pickle_in_data_is_executed(folder, sign):
    pickled = pickle.dumps(Payload(sign))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.npy", "9.png"):
        (folder / name).write_bytes(pickled)
    np.save(folder / "8.png", np.array([Payload(sign)], dtype=object))  # its name gets an ending: 8.png.npy
    images = [{"bytes": pickled, "path": None}, {"bytes": encoded(picture()), "path": None}]
    schema = pyarrow.schema([
        ("problem", pyarrow.string()), ("solution", pyarrow.string()), ("object", pyarrow.binary()),
        ("image", pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])), extension_type(sign),
    ])  # fmt: skip
    columns = [["How many?"] * 2, ["3"] * 2, [pickled] * 2, images, [1, 2]]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_arrays(
            [pyarrow.array(c) for c in columns[:3]]
            + [pyarrow.array(images, schema.field("image").type), pyarrow.array([1, 2])],
            schema=schema,
        ),
        folder / "b.parquet",
    )
    write_jsonl(folder / "b.jsonl", [row(9), row(7), row(1, image="8.png.npy"), row(2, image="a.npy")])
    dataset = load_split(folder, "all")
    assert len(dataset) == 2
    assert dataset.skipped["image cannot be read"] == 4
    saved = as_saved(folder, [row(1)])
    (saved / "cache-0.pkl").write_bytes(pickled)
    assert len(load_split(saved, "all")) == 1
    next(saved.glob("*.arrow")).write_bytes(pickled)
    with pytest.raises(UserError, match="not readable as a saved data set"):
        load_split(saved, "all")


# ---- code and configurations ----------------------------------------------------------------------------------------


def test_code_in_a_model_folder_is_never_executed_or_asked_about(model, sign, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks whether to run the code"))
    code = f"import os; os.mkdir({str(sign)!r})\nclass Planted: pass\n"
    (model / "custom_generate").mkdir()
    for name in ("planted.py", "custom_generate/generate.py"):
        (model / name).write_text(code)
    kinds = ("Config", "Model", "ModelForImageTextToText", "Tokenizer", "Processor", "ImageProcessor")
    planted = {f"Auto{kind}": "planted.Planted" for kind in kinds}
    planted["AutoTokenizer"] = ["planted.Planted", "planted.Planted"]
    for file in model.glob("*config.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"auto_map": planted, "custom_generate": "planted"}))
    load_model(model), load_processor(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "planted"}))
    for load in (load_model, load_config):
        with pytest.raises(UserError, match=r"cannot be loaded|of type 'planted'"):
            load(model)
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "Planted"}))
    with suppress(UserError):  # that it is not usable
        load_processor(model)


def test_a_configuration_constructs_nothing(tmp_path, sign):
    for text in ("!!python/object/apply:os.mkdir [{}]", "seed: !!python/object/apply:os.mkdir [{}]"):
        (tmp_path / "run.yaml").write_text(text.format(sign))
        with pytest.raises(UserError, match=r"run\.yaml is not valid YAML"):
            parse_arguments(["--config", str(tmp_path / "run.yaml")])


def test_a_configuration_that_grows_without_end_is_refused_at_once(tmp_path):
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    laughs += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    started = time.monotonic()
    for text in (f"{laughs}seed: *a29\n", f"{laughs}test_data: *a29\n", "seed: &a [*a]", "freeze: &a [*a]"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError, match="refer"):
            parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert time.monotonic() - started < 2


# ---- paths ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(folder):
    """data/ with an image and links, beside images that it has no business with."""
    inside = folder / "data"
    (inside / "images").mkdir(parents=True)
    picture(50).save(inside / "images" / "50.png")
    (inside / "link.png").symlink_to("../1.png")
    (inside / "all").symlink_to("..")
    (inside / "own.png").symlink_to("images/50.png")
    return inside


WAYS_OUT = [
    "{folder}/1.png", "../1.png", "images/../../1.png", "file://{folder}/1.png", "file:../1.png", "FILE:///%2e%2e/1.png",
    "link.png", "all/1.png", "all/data/../1.png", "/etc/hostname", ".", "/", "~/1.png", "images/\0.png", "\ud800.png",
    ["images/50.png", "../1.png"], {"path": "../1.png"}, {"bytes": None, "path": "{folder}/1.png"},
]  # fmt: skip
INSIDE = ["images/50.png", "images/../images/50.png", "{data}/images/50.png", "file://{data}/images/50.png", "own.png"]


def filled(way, **names):
    return json.loads(json.dumps(way).replace("{folder}", str(names["folder"])).replace("{data}", str(names["data"])))


@pytest.mark.parametrize("source", ["data", "data/rows.jsonl"])
def test_images_of_data_are_in_its_folder(folder, data, source):
    chat = [{"role": "user", "content": [{"type": "image", "image": "../1.png"}, {"type": "text", "text": "?"}]}]
    rows = [row(1, image=filled(way, folder=folder, data=data)) for way in WAYS_OUT]
    rows += [{"messages": [*chat, {"role": "assistant", "content": "3"}]}]
    rows += [row(2, image=filled(way, folder=folder, data=data)) for way in INSIDE]
    write_jsonl(data / "rows.jsonl", rows)
    dataset = load_split(folder / source, "all")
    assert {dataset[index].solution for index in range(len(dataset))} == {"2"}
    assert {dataset[index].image.getpixel((0, 0))[0] for index in range(len(dataset))} == {50}
    assert len(dataset) == len(INSIDE)
    assert dataset.skipped == {
        OUTSIDE: len(rows) - len(INSIDE) - 4,
        "image file not found": 1,
        "image cannot be read": 3,
    }
    assert (
        f"{len(rows) - len(INSIDE) - 4} x image is outside the folder of the data (--allow-outside" in dataset.summary()
    )


def test_a_table_in_a_folder_of_the_data_may_name_images_of_another_one(folder, data):
    write_jsonl(folder / "lists" / "rows.jsonl", [row(1, image="../1.png"), row(2, image="../data/images/50.png")])
    assert len(load_split(folder, "all")) == 2
    with pytest.raises(UserError, match=r"no readable row for all: 2 x image is outside .*--allow-outside"):
        load_split(folder / "lists", "all")


def test_the_user_may_allow_images_outside(folder, data, tmp_path, capsys):
    write_jsonl(data / "test.jsonl", [row(n, image=f"../{n}.png") for n in range(2)])
    write_jsonl(data / "train.jsonl", [row(n, image=f"{folder}/{n}.png") for n in range(2, 6)])
    small = ["--sampled=0", "--max-completion-length=1", "--data", str(data)]
    assert evaluate.main([*small, "--output-dir", str(tmp_path / "no")]) == 2
    assert "2 x image is outside the folder of the data (--allow-outside reads it)" in capsys.readouterr().err
    for number, allowed in enumerate((["--allow-outside"], ["--image-root", str(folder / "data")])):
        allowed = [*allowed, "--output-dir", str(tmp_path / str(number))]
        assert evaluate.main([*small, *allowed]) == (0 if number == 0 else 2)
    assert main("--print-config", "--data", data, "--allow-outside") == 0
    assert "allow_outside: true" in capsys.readouterr().out
    assert main("--allow-outside") == 2
    assert "--allow-outside is about your own data, and there is no --data" in capsys.readouterr().err


# ---- images ---------------------------------------------------------------------------------------------------------


def icon(image):
    """An ICO whose list says 16 x 16 pixels, whatever the PNG in it has."""
    png = encoded(image)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def test_an_image_that_unpacks_to_too_much_is_left_out(folder):
    bombs = {"1.png": encoded(Image.new("1", (10_000, 9_000))), "2.png": icon(Image.new("1", (10_000, 9_000)))}
    for name, content in bombs.items():
        assert len(content) < 100_000
        (folder / name).write_bytes(content)
    with pytest.raises(BadImage, match="more than 89 million pixels"):
        check_image(bombs["1.png"])
    with pytest.raises(BadImage, match="more than 89 million pixels"):
        load_image(bombs["2.png"])
    dataset = load_split(write_jsonl(folder / "rows.jsonl", [row(1), row(2), row(3)]), "all")
    assert {dataset[index].solution for index in range(len(dataset))} == {"3"}
    assert dataset.skipped == {"image has more than 89 million pixels": 2}


def test_an_image_that_is_a_program_is_not_opened():
    image = encoded(Image.new("RGB", (9, 9)), "EPS")
    assert image.startswith(b"%!PS")
    with pytest.raises(BadImage, match="cannot be read"):
        check_image(image)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_no_answer_is_executed(sign):
    code = f"__import__('os').mkdir('{sign}')"
    forms = [
        "{}",
        "${}$",
        r"\boxed{{{}}}",
        "1+{}",
        "the final answer is {}",
        "(1)({})",
        r"\text{{{}}}",
        r"$\sqrt{{{}}}$",
    ]
    for form in forms:
        text = form.format(code)
        for completion in (text, f"<answer>{text}</answer>"):
            assert r1v.r1v_geometry(completion, r"\sqrt{3}") == 0
            assert accuracy_reward(completion, r"\sqrt{3}") == 0
            assert r1v.r1v_geometry("<answer>2</answer>", completion) == 0
    assert r1v.r1v_geometry(r"<answer>$\sqrt{12}$</answer>", r"$2\sqrt{3}$") == 1


def test_math_verify_has_a_limit_of_memory():
    with pytest.raises(worker.Unanswered, match="MemoryError"):
        worker._state.ask(bytearray, worker.MAX_MEMORY, seconds=20)
    assert worker.equal(r"\sqrt{12}", r"2\cdot \sqrt{3}")

"""The embedded model and the loading of any other: real classes, real files, errors in one sentence."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.model import load as loading
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.prompts import encode_prompts, longest_prompt, prompt_length, prompt_text
from mr1fast.options.prompt import PROMPT_SUFFIX
from mr1fast.rewards import accuracy_reward, format_reward


@pytest.fixture(scope="module")
def processor():
    return load_processor()


@pytest.fixture(scope="module")
def embedded():
    return load_model()


def test_the_embedded_model_is_a_small_qwen2_vl_in_hugging_face_format(embedded):
    assert type(embedded) is Qwen2VLForConditionalGeneration
    assert AutoConfig.from_pretrained(EMBEDDED).model_type == "qwen2_vl"
    parameters = sum(p.numel() for p in embedded.parameters())
    assert 500_000 <= parameters <= 2_000_000
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) < 8_000_000
    assert all(weight.isfinite().all() for weight in load_file(EMBEDDED / "model.safetensors").values())
    assert embedded.get_input_embeddings().weight is embedded.lm_head.weight


@pytest.mark.parametrize("task", TASKS)
def test_the_embedded_model_stands_in_the_band(task, embedded, processor):
    """Greedy accuracy between 30 and 60 % with the right tags, by Hugging Face's own generation."""
    examples = [TASKS[task].example("validation", index) for index in range(200)]
    inputs = encode_prompts(processor, examples)
    with torch.no_grad():
        output = embedded.eval().generate(**inputs, max_new_tokens=20, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert 0.3 <= sum(accuracy_reward(text, e.solution) for text, e in zip(texts, examples)) / 200 <= 0.6
    assert sum(map(format_reward, texts)) / 200 >= 0.85


def test_the_tokenizer_encodes_any_text_and_keeps_the_tags(processor):
    tokenizer = processor.tokenizer
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(EMBEDDED))
    text = "<think>35+65=100, ça va? 数</think><answer>80</answer>"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer("1234")["input_ids"]) == 4, "digits are tokens of their own, as Qwen's are"


def test_encode_prompts_pads_on_the_left_and_counts_image_tokens(processor):
    examples = [
        TASKS["vc"].example("test", 0),
        Example(None, "What?", "1", "text"),
        TASKS["gr"].example("test", 0),
    ]
    inputs = encode_prompts(processor, examples)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == mask.shape == inputs["mm_token_type_ids"].shape
    assert mask[:, -1].all()
    assert (mask.diff(dim=1) >= 0).all(), "padding stands on the left"
    image_tokens = ids == processor.image_token_id
    assert torch.equal(image_tokens, inputs["mm_token_type_ids"] == 1)
    assert image_tokens.sum(1).tolist() == [16, 0, 16]
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    assert inputs["pixel_values"].shape[0] == 2 * 64
    assert PROMPT_SUFFIX in processor.tokenizer.decode(ids[1])


def test_the_processor_round_trips_and_says_what_it_stands_for(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert isinstance(again, Qwen2VLProcessor)
    examples = [TASKS["vc"].example("test", 1)]
    before, after = encode_prompts(processor, examples), encode_prompts(again, examples)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2VLProcessor", "AutoProcessor must find the real class"


def test_max_pixels_bounds_the_image():
    image = TASKS["vc"].example("test", 0).image.resize((280, 140))
    small = load_processor(max_pixels=28 * 28)
    inputs = encode_prompts(small, [Example(image, "How many?", "1", "x")])
    _, height, width = inputs["image_grid_thw"][0].tolist()
    assert height * width * 49 <= 28 * 28
    with pytest.raises(ValueError, match="max_pixels must be at least 196"):
        load_processor(max_pixels=195)


@pytest.mark.parametrize("bounds", [(3136, 3136), (3136, 401408), (100_000, 100_000)])
def test_prompt_length_is_that_of_the_encoded_prompt(bounds):
    processor = load_processor()
    processor.image_processor.size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
    questions = ["", "How many?", "Wie viele Bälle? 数\n" * 20, "<think> <|im_end|>" * 3]
    sizes = [None, (56, 56), (1, 1), (31, 200), (1, 200), (1000, 700)]
    examples = [
        Example(None if size is None else Image.new("RGB", size), question, "", "")
        for size in sizes
        for question in questions
    ]
    lengths = [prompt_length(processor, example) for example in examples]
    assert lengths == encode_prompts(processor, examples)["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > len(questions)
    several = Example(Image.new("RGB", (31, 200)), "a <image> b <image>", "", more_images=(Image.new("RGB", (56, 56)),))
    assert prompt_length(processor, several) == encode_prompts(processor, [several])["input_ids"].numel()


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    ("problem", "images", "written"),
    [
        ("How many?", 1, IMAGE + "How many?"),
        ("How many?", 0, "How many?"),
        ("How many?", 3, 3 * IMAGE + "How many?"),
        ("Is <image> like <image>?", 2, f"Is {IMAGE} like {IMAGE}?"),
        ("<image><image>Which?", 2, 2 * IMAGE + "Which?"),
        ("What is in <image>", 1, "What is in " + IMAGE),
        ("Is <image> like this?", 2, 2 * IMAGE + "Is <image> like this?"),
        ("<image>", 0, "<image>"),
    ],
)
def test_image_markers_place_the_images_if_they_are_as_many(problem, images, written, processor):
    start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text(processor, problem, images) == f"{start}{written} {PROMPT_SUFFIX}{end}"


def test_images_are_encoded_in_the_order_of_prompts_and_markers(processor):
    images = [Image.new("RGB", (56, 56 * n), (n, 0, 0)) for n in (1, 2, 3, 4)]
    examples = [
        Example(images[0], "How many?", ""),
        Example(None, "How many?", ""),
        Example(images[1], "Is <image> like <image> and <image>?", "", more_images=tuple(images[2:])),
    ]
    inputs = encode_prompts(processor, examples)
    alone = [encode_prompts(processor, [Example(image, "", "")]) for image in images]
    for name in ("image_grid_thw", "pixel_values"):
        assert torch.equal(inputs[name], torch.cat([one[name] for one in alone]))


def test_the_longest_prompt_leaves_room_for_the_completion(embedded):
    assert longest_prompt(embedded, 48) == longest_prompt(embedded.config, 48) == 2000
    assert longest_prompt(embedded, 2047) == 1
    with pytest.raises(UserError, match=r"2048 tokens leaves no room for a prompt: the model takes 2048 tokens"):
        longest_prompt(embedded, 2048)


@pytest.mark.parametrize(
    ("problem", "says"),
    [
        ("How many <|image_pad|>?", r"the question of row 7 contains <\|image_pad\|> or <\|video_pad\|>"),
        ("<|video_pad|>", "which stand for pixels"),
        ("broken \ud83d text", "the question of row 7 is not valid Unicode: surrogates not allowed"),
    ],
)
def test_questions_that_cannot_be_encoded_are_named(problem, says, processor):
    for image in (None, Image.new("RGB", (56, 56))):
        example = Example(image, problem, "1", "row 7")
        with pytest.raises(UserError, match=says):
            encode_prompts(processor, [example])
        with pytest.raises(UserError, match=says):
            prompt_length(processor, example)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "missing", "does not exist"),
        (lambda folder: folder, "holds no model"),
        (lambda folder: (folder / "config.json").write_text("{") and folder, "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]") and folder, "config.json is not a JSON object"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}') and folder,
            "of type 'llama', which is not of these families: Qwen2-VL, Qwen2.5-VL$",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": ["qwen2_vl"]}') and folder,
            r"of type \['qwen2_vl'\], which is not",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "qwen2_vl"}') and folder,
            "has no weights",
        ),
    ],
)
def test_a_folder_without_a_model_is_named(make, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        load_model(make(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model.safetensors", "model.safetensors is broken or was not copied to its end"),
        ("tokenizer.json", "no usable tokenizer: tokenizer.json is missing"),
        ("processor_config.json", "no usable image processor: preprocessor_config.json"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_a_folder_without_one_of_its_files_is_named(file, says, tmp_path):
    folder = shutil.copytree(EMBEDDED, tmp_path / "copy")
    if file == "model.safetensors":
        (folder / file).write_bytes((folder / file).read_bytes()[:100_000])
    else:
        (folder / file).unlink()
    with pytest.raises(ValueError, match=f"copy.*{says}"):
        (load_model if file == "model.safetensors" else load_processor)(folder)


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(ValueError, match="model folder 'runs/missing' does not exist"):
        load_model("runs/missing")


def test_a_name_that_is_neither_a_folder_nor_on_the_hub(monkeypatch):
    def fail(*_, **__):
        raise OSError("no connection\nat all")

    monkeypatch.setattr(AutoConfig, "from_pretrained", fail)
    with pytest.raises(
        ValueError, match=r"'no/model' cannot be loaded: no connection at all, and there is no such folder$"
    ):
        load_model("no/model")


@pytest.mark.parametrize(("wanted", "threads"), [(None, 3), ("2", 2), ("5", 5), ("0", 3), ("4,2", 3), ("", 3)])
def test_threads_are_those_that_this_process_may_have(wanted, threads, embedded, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 6}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if wanted is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    large = SimpleNamespace(config=SimpleNamespace(to_dict=dict))
    assert loading.choose_threads(large) == threads
    assert loading.choose_threads(embedded) == 1


def test_choices(embedded):
    cpu = torch.device("cpu")
    assert loading.choose_dtype("auto", cpu) == torch.float32
    assert loading.choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert loading.choose_attention("auto", cpu) == "sdpa"
    assert loading.choose_attention("eager", cpu) == "eager"
    with pytest.raises(ValueError, match="flash_attention_2"):
        loading.choose_attention("flash_attention_2", cpu)
    with pytest.raises(ValueError, match="'nonsense'"):
        loading.choose_device("nonsense")

"""Model folders of other people's making: taken for what they are, or refused in one sentence."""

import json
import re
import shutil

import pytest
import torch
from data_files import picture
from model_folders import hub_folder
from safetensors.torch import load_file, save_file
from train_program import SMALL, main, program

from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy

EXAMPLE = Example(picture(0).convert("RGB"), "How many?", "1", "")
WEIGHTS = load_file(EMBEDDED / "model.safetensors")
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
TEMPLATE = (EMBEDDED / "chat_template.jinja").read_text()
TEXT_TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
IMAGES = json.loads((EMBEDDED / "processor_config.json").read_text())["image_processor"]


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(EMBEDDED, tmp_path / "copy")


def write(folder, weights, file="model.safetensors"):
    (folder / "model.safetensors").unlink(missing_ok=True)
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / file, {"format": "pt"})
    return folder


def edit(folder, file, *path, **changes):
    """Change some fields of a JSON file; of the object at `path` in it."""
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    part = content
    for name in path:
        part = part[name]
    part.update(changes)
    (folder / file).write_text(json.dumps(content))
    return folder


def without(*names):
    return {name: weight for name, weight in WEIGHTS.items() if name not in names}


def untied(folder):
    edit(folder, "config.json", "text_config", tie_word_embeddings=False)
    return edit(folder, "config.json", tie_word_embeddings=False)


# ---- weights --------------------------------------------------------------------------------------------------------


def renamed(prefix, old="", new=""):
    return {prefix + name.replace(old, new): weight for name, weight in WEIGHTS.items()}


def sharded(folder):
    (folder / "model.safetensors").unlink()
    load_model().save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


COMPLETE = {
    "torch.compile": lambda folder: write(folder, renamed("_orig_mod.")),
    "DDP": lambda folder: write(folder, renamed("module.")),
    "PEFT": lambda folder: write(folder, renamed("base_model.model.")),
    "several, as .bin": lambda folder: write(folder, renamed("module._orig_mod."), "pytorch_model.bin"),
    "within": lambda folder: write(folder, renamed("", "layers.0.", "layers.0._checkpoint_wrapped_module.")),
    "FSDP": lambda folder: write(
        folder, renamed("_fsdp_wrapped_module.", "layers.1.", "layers.1._fsdp_wrapped_module.")
    ),
    "names of transformers 5": lambda folder: write(
        folder, {name: weight for name, weight in load_model().state_dict().items() if name != HEAD}
    ),
    "sharded": sharded,
    "a tied head alone": lambda folder: write(folder, without(EMBEDDING) | {HEAD: WEIGHTS[EMBEDDING]}),
    "an untied head": lambda folder: write(untied(folder), WEIGHTS | {HEAD: WEIGHTS[EMBEDDING].clone()}),
}


@pytest.mark.parametrize("kind", COMPLETE)
def test_weights_under_other_names_are_found_and_saved_under_their_own(kind, copy, tmp_path, recwarn):
    COMPLETE[kind](copy)
    Policy(load_model(copy), load_processor(copy)).save(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert saved.keys() - {HEAD} == WEIGHTS.keys(), "other programs know these names"
    assert all(torch.equal(weight, saved[name]) for name, weight in WEIGHTS.items())
    again = load_model(tmp_path / "again").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in load_model().state_dict().items())
    assert not [warning for warning in recwarn if "does not know" in str(warning.message)]


def spoilt(name, value):
    weights = {**WEIGHTS, name: WEIGHTS[name].clone()}
    weights[name].flatten()[-1] = value
    return weights


NORM = "model.norm.weight"
BROKEN = {
    "a dropped tensor": (without(NORM), r"lacks 1 of its 70 weights \(model.language_model.norm.weight\)"),
    "a dropped tensor of the vision tower": (without("visual.merger.mlp.2.bias"), r"lacks 1 of its 70 .*merger.mlp.2"),
    "dropped embeddings": (without(EMBEDDING), r"lacks 2 of its 70 weights \(lm_head.weight, .*embed_tokens.weight\)"),
    "an unknown prefix": (renamed("net."), r"lacks 70 .*has 69 weights that Qwen2-VL does not know \(net.model.embed"),
    "an adapter within": (WEIGHTS | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(1)}, "not merged"),
    "quantised": (WEIGHTS | {"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(1)}, "holds quantised weights"),
    "another shape": (
        WEIGHTS | {NORM: torch.ones(3)},
        r"norm.weight has the shape \[3\], but config.json asks for \[128\]",
    ),
    "NaN": (spoilt(NORM, torch.nan), r"NaN or infinite numbers in 1 weight \(model.language_model.norm.weight\)"),
    "an infinite head": (spoilt(EMBEDDING, -torch.inf), "in 1 weight .*embed_tokens.weight"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_would_be_random_or_no_numbers_are_named(kind, copy):
    weights, says = BROKEN[kind]
    with pytest.raises(UserError, match=f"copy.*{says}"):
        load_model(write(copy, weights))


def test_an_untied_head_that_is_not_there_is_named(copy):
    with pytest.raises(UserError, match=r"lacks 1 of its 70 weights \(lm_head.weight\)"):
        load_model(untied(copy))


def test_unknown_weights_are_told_and_left_out(copy):
    write(copy, WEIGHTS | {"value_head.weight": torch.ones(3)})
    with pytest.warns(UserWarning, match=r"has 1 weight that Qwen2-VL does not know \(value_head.weight\), left out"):
        load_model(copy)


# ---- files that are missing or broken --------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"


def gone(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def replaced(file, text):
    return lambda folder: (folder / file).write_text(text)


# Of a folder as it lies on the hub.
FILES = {
    "config": (gone("config.json"), "has no config.json"),
    "a shard": (gone(SHARD), rf"lacks 1 of its 3 files with weights \({SHARD}\), which {INDEX} names"),
    "the shards": (lambda folder: [file.unlink() for file in folder.glob("model-*")], "lacks 3 of its 3 files"),
    "the index": (gone(INDEX), f"{INDEX} is missing, which says what is in model-00001"),
    "the weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "has no weights: none of"),
    "half an index": (replaced(INDEX, "{}"), f"{INDEX} has no weight_map"),
    "a broken index": (replaced(INDEX, "{"), f"its {INDEX} is not valid JSON"),
    "the tokenizer": (gone("tokenizer.json", "vocab.json"), "tokenizer.json is missing, and so is vocab.json"),
    "its merges": (gone("tokenizer.json", "merges.txt"), "tokenizer.json is missing, and so is merges.txt"),
    "the image processor": (gone("preprocessor_config.json"), r"preprocessor_config.json \(or .*\) is missing"),
    "the chat template": (gone("chat_template.json", "tokenizer_config.json"), "no chat template: none of .* has one"),
    "a broken processor": (replaced("preprocessor_config.json", "{"), "its preprocessor_config.json is not valid JSON"),
    "an empty shard": (replaced(SHARD, ""), f"{SHARD} is broken or was not copied to its end"),
    "a shard that git left out": (replaced(SHARD, POINTER), f"{SHARD} is not the file itself, .* 'git lfs pull'"),
    "a tokenizer that git left out": (replaced("tokenizer.json", POINTER), "tokenizer.json is not the file itself"),
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return hub_folder(tmp_path_factory.mktemp("hub") / "model", shards=3)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_missing_or_broken_is_named(kind, published, tmp_path):
    change, says = FILES[kind]
    folder = shutil.copytree(published, tmp_path / "copy")
    change(folder)
    with pytest.raises(UserError, match=f"copy.*{says}") as error:
        Policy(load_model(folder), load_processor(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "files",
    [("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer_config.json",), ("chat_template.json",)],
)
def test_what_can_be_done_without(files, published, tmp_path):
    """The same is in other files of the folder."""
    folder = shutil.copytree(published, tmp_path / "copy")
    gone(*files)(folder)
    whole, rest = (Policy(load_model(one), load_processor(one)) for one in (published, folder))
    inputs = [policy.encode([EXAMPLE, Example(None, "<think> 数, whose?", "")]) for policy in (whole, rest)]
    assert all(torch.equal(inputs[1][name], tensor) for name, tensor in inputs[0].items())
    assert rest.end_ids.tolist() == whole.end_ids.tolist()
    assert rest.banned_ids.tolist() == whole.banned_ids.tolist()


# ---- ids, processors, what else a folder may hold -------------------------------------------------------------------


def adapter_alone(folder):
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return edit(folder, "adapter_config.json", base_model_name_or_path="./moved")


def in_tokenizer_config(folder, template):
    (folder / "chat_template.jinja").unlink()
    return edit(folder, "tokenizer_config.json", chat_template=template)


def quantised(method):
    return lambda folder: edit(folder, "config.json", quantization_config={"quant_method": method, "bits": 4})


def in_generation_config(**ids):
    return lambda folder: edit(folder, "generation_config.json", **ids)


def in_config(**fields):
    return lambda folder: edit(folder, "config.json", **fields)


def in_text_config(**fields):
    return lambda folder: edit(folder, "config.json", "text_config", **fields)


def in_image_processor(**fields):
    return lambda folder: edit(folder, "processor_config.json", "image_processor", **fields)


def in_tokenizer(**fields):
    return lambda folder: edit(folder, "tokenizer_config.json", **fields)


MISTAKES = {
    "bitsandbytes": (quantised("bitsandbytes"), r"is quantised \(bitsandbytes\): quantised weights cannot be trained"),
    "AWQ": (quantised("awq"), r"is quantised \(awq\)"),
    "GPTQ": (quantised("gptq"), r"is quantised \(gptq\)"),
    "quantised text": (in_text_config(quantization_config={"load_in_8bit": True}), "is quantised: "),
    "weights and an adapter": (
        lambda folder: edit(folder, "adapter_config.json", peft_type="LORA"),
        "holds both a model and an adapter",
    ),
    "an adapter alone": (adapter_alone, r"the base of the adapter .* cannot be loaded .*'./moved' does not exist"),
    "negative pad": (in_generation_config(pad_token_id=-1), r"pad_token_id in .*generation_config.json .* got -1"),
    "pad beyond": (in_generation_config(pad_token_id=332), "pad_token_id in .* got 332"),
    "pad list": (in_generation_config(pad_token_id=[321]), r"pad_token_id in .* got \[321\]"),
    "pad without end": (in_generation_config(pad_token_id=["a" * 3000]), r"pad_token_id in .* got a list$"),
    "pad text": (in_text_config(pad_token_id="x"), r"pad_token_id in .*copy/config.json must be .* got 'x'"),
    "pad beyond, in the config": (in_text_config(pad_token_id=400), "pad_token_id in .* got 400"),
    "negative eos": (in_generation_config(eos_token_id=-1), "eos_token_id in .* or a list of token ids, .* got -1"),
    "eos beyond": (in_generation_config(eos_token_id=[320, 332]), r"eos_token_id in .* got \[320, 332\]"),
    "no eos in a list": (in_generation_config(eos_token_id=[]), r"eos_token_id in .* got \[\]"),
    "None in a list": (in_generation_config(eos_token_id=[320, None]), r"eos_token_id in .* got \[320, None\]"),
    "eos true": (in_text_config(eos_token_id=True), "eos_token_id in .* got True"),
    "vocabulary below pad": (in_text_config(vocab_size=321), "pad_token_id in .* from 0 to 320, got 321"),
    "vocabulary below tokenizer": (in_tokenizer(pad_token="<pad>"), "has 333 tokens, .* embeddings for 332"),
    "a length in words": (in_tokenizer(model_max_length="long"), "has a tokenizer that cannot be used: .*'str'"),
    "padding with images": (in_tokenizer(pad_token="<|image_pad|>"), r"pads with <\|image_pad\|>"),
    "ids exchanged": (in_config(image_token_id=326, video_token_id=325), "image_token_id is 326 in config.json.* 325"),
    "a word that is no image": (in_config(vision_end_token_id=7), "vision_end_token_id is 7"),
    "patch_size": (in_image_processor(patch_size=14), "patch_size is 14 in the image processor's .* 7 in the model's"),
    "merge_size": (in_image_processor(merge_size=1), "merge_size is 1"),
    "temporal_patch_size": (in_image_processor(temporal_patch_size=1), "temporal_patch_size is 1"),
    "size in sides": (in_image_processor(size={"height": 56, "width": 56}), "without min_pixels and max_pixels"),
    "a config that fits no model": (in_text_config(num_attention_heads=5), "cannot be loaded: hidden_size must be"),
    "a config of another type": (in_text_config(hidden_size="x"), "cannot be loaded: .*hidden_size' expected int"),
    "a broken generation config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json is not valid JSON",
    ),
    "a template for text": (lambda folder: in_tokenizer_config(folder, TEXT_TEMPLATE), "template that cannot be used"),
    "a template that is none": (lambda folder: in_tokenizer_config(folder, "{% for %}"), "template that cannot be"),
    "a template without images": (
        lambda folder: in_tokenizer_config(folder, TEMPLATE.replace("<|image_pad|>", "")),
        "chat template that is not Qwen2-VL's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_does_not_fit_is_one_sentence(kind, copy, tmp_path, capsys, one_thread):
    make, says = MISTAKES[kind]
    make(copy)
    assert main("--task=vc", "--max-steps=1", *SMALL, "--model", copy, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{says}.*\n", error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # as a subprocess; the others are not
def test_the_program_ends_with_exit_code_2(copy, tmp_path):
    write(copy, without(NORM))
    process = program("--task=vc", "--max-steps=1", *SMALL, "--model", str(copy), "--output-dir=run", cwd=tmp_path)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "lacks 1 of its 70 weights" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


# ---- forms that are taken -------------------------------------------------------------------------------------------


def old_preprocessor_config(folder):
    (folder / "processor_config.json").unlink()
    size = {"min_pixels": 3136, "max_pixels": 3136}
    return edit(folder, "preprocessor_config.json", **{**IMAGES, "size": size})


TAKEN = {
    "preprocessor_config.json": old_preprocessor_config,
    "size of min_pixels and max_pixels": in_image_processor(size={"min_pixels": 3136, "max_pixels": 3136}),
    "min_pixels and max_pixels beside": in_image_processor(size=None, min_pixels=3136, max_pixels=3136),
    "a template in tokenizer_config.json": lambda folder: in_tokenizer_config(folder, TEMPLATE),
    "a named template there": lambda folder: in_tokenizer_config(folder, [{"name": "default", "template": TEMPLATE}]),
    "no pad_token": in_tokenizer(pad_token=None),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "no cache": in_text_config(use_cache=False),
    "no pad_token_id": in_generation_config(pad_token_id=None),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_other_forms_of_the_same(kind, copy, tmp_path):
    TAKEN[kind](copy)
    policies = [Policy(load_model(folder), load_processor(folder)) for folder in (EMBEDDED, copy)]
    policies[1].save(tmp_path / "again")
    policies.append(Policy(load_model(tmp_path / "again"), load_processor(tmp_path / "again", max_pixels=3136)))
    inputs = [policy.encode([EXAMPLE]) for policy in policies]
    with torch.no_grad():
        hidden = [policy.encode_prefix(one).last_hidden for policy, one in zip(policies, inputs)]
    for policy, one, last in zip(policies[1:], inputs[1:], hidden[1:]):
        assert all(torch.equal(one[name], tensor) for name, tensor in inputs[0].items())
        assert torch.equal(last, hidden[0])
        assert policy.end_ids.tolist() == policies[0].end_ids.tolist()


IM_END, END_OF_TEXT, DIGIT = 320, 321, 22


@pytest.mark.parametrize(
    ("generation", "tokenizer", "template", "ends"),
    [
        (END_OF_TEXT, "<|im_end|>", TEMPLATE, [IM_END, END_OF_TEXT]),
        (END_OF_TEXT, "<|endoftext|>", TEMPLATE, [IM_END, END_OF_TEXT]),
        ([END_OF_TEXT, IM_END], "<|endoftext|>", TEMPLATE, [IM_END, END_OF_TEXT]),
        (END_OF_TEXT, "<|im_end|>", TEMPLATE.replace("<|im_end|>", ""), [END_OF_TEXT, IM_END]),
        (None, None, TEMPLATE, [IM_END]),
        (DIGIT, None, TEMPLATE, [IM_END, DIGIT]),
    ],
)
def test_whatever_ends_a_turn_ends_a_completion(generation, tokenizer, template, ends, copy):
    edit(copy, "generation_config.json", eos_token_id=generation)
    edit(copy, "config.json", "text_config", eos_token_id=None)
    edit(copy, "tokenizer_config.json", eos_token=tokenizer)
    (copy / "chat_template.jinja").write_text(template)
    policy = Policy(load_model(copy), load_processor(copy))
    assert policy.end_ids.tolist() == ends
    assert not set(ends) & set(policy.banned_ids.tolist())
    ids, _ = policy.encode_completions(["1"])
    assert ids[0, -1] == ends[0], "what supervised fine-tuning imitates ends as well"


def test_a_model_that_nothing_would_end(copy):
    edit(copy, "generation_config.json", eos_token_id=None)
    edit(copy, "config.json", "text_config", eos_token_id=None)
    edit(copy, "tokenizer_config.json", eos_token=None)
    (copy / "chat_template.jinja").write_text(TEMPLATE.replace("<|im_end|>", ""))
    with pytest.raises(UserError, match="no completion would end"):
        Policy(load_model(copy), load_processor(copy))

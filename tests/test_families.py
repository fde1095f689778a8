"""Folders of the hub, cut to two layers: Qwen2-VL and Qwen2.5-VL, tied and untied, in shards, with spare embeddings."""

import functools
import json
import shutil

import pytest
import torch
from model_folders import FIRST_SPECIAL, KINDS, SPECIAL, hub_folder
from peft import PeftModel
from PIL import Image
from train_program import SMALL, main, metrics
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from mr1fast import evaluate
from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import encode_prompts
from mr1fast.model.rollout import Sampler
from mr1fast.rewards import REWARDS
from mr1fast.training.batch import Batch, batch_logps
from tests.run_files import untimed
from tests.tiny import joined, tiny_processor

SIZES = [(112, 140), (56, 56), None, (224, 84)]  # with windows of 56 pixels


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = hub_folder(tmp_path_factory.mktemp("hub") / "model", **KINDS[kind])
        return made[kind]

    return make


@functools.cache
def examples():
    images = [None if size is None else Image.effect_noise(size, 90).convert("RGB") for size in SIZES]
    return [Example(image, f"How many{' of them' * n}?", "1") for n, image in enumerate(images)]


def plain_logps(model, inputs, rollout, G, temperature):
    """Log-probs by one plain forward of transformers over whole sequences, every image repeated."""
    ids, mask = rollout.completion_ids, rollout.completion_mask
    logits = model(**joined(inputs, ids, mask, G)).logits[:, -ids.shape[1] - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0] * mask


@pytest.mark.parametrize("kind", KINDS)
def test_the_shared_prefix_computes_what_a_plain_forward_computes(kind, folder_of, one_thread):
    folder = folder_of(kind)
    policy = Policy(load_model(folder), load_processor(folder))
    raw = encode_prompts(policy.processor, examples())
    streams = [f"{n}" for n in range(len(examples()))]
    sampler = Sampler(policy, max_completion_length=8)
    rollout = sampler.generate(examples(), num_generations=2, temperature=0.7, streams=streams)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    expected = plain_logps(plain, raw, rollout, 2, 0.7)
    batch = Batch(policy.place(raw), 2, rollout.completion_ids, rollout.completion_mask)
    ours = batch_logps(policy, batch, 0.7)
    torch.testing.assert_close(rollout.per_token_logps, expected.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    for logps in (ours, expected):
        logps.sum().backward()
    for (name, weight), (_, other) in zip(policy.model.named_parameters(), plain.named_parameters(), strict=True):
        assert (weight.grad - other.grad).norm() < 1e-4 * other.grad.norm() + 1e-5, name
        assert other.grad.norm() > 0, name


def test_the_windows_of_qwen2_5_matter_to_these_images(folder_of, one_thread):
    model = load_model(folder_of("2.5, 3B")).eval()
    policy = Policy(model, load_processor(folder_of("2.5, 3B")))
    with torch.no_grad():
        before = policy.encode_prefix(policy.encode(examples())).last_hidden
        model.model.visual.fullatt_block_indexes = [0, 1]
        after = policy.encode_prefix(policy.encode(examples())).last_hidden
    changed = (before - after).abs().amax(1) > 1e-2
    assert changed.tolist() == [True, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method"), [("2B", "grpo-d"), ("2.5, 3B", "sft"), ("2.5, 7B", "grpo")])
def test_trained_frozen_resumed_and_evaluated(kind, method, folder_of, tmp_path, capsys, monkeypatch, one_thread):
    # A reward that random completions differ in.
    monkeypatch.setitem(REWARDS, "accuracy", lambda completions, solutions, **_: [len(text) for text in completions])
    folder, run = folder_of(kind), tmp_path / "run"
    options = ["--task=vc", f"--method={method}", "--model", folder, "--freeze=vision", "--max-steps=3"]
    options += [*SMALL, "--save-steps=2", "--eval-steps=0", "--learning-rate=1e-3", "--output-dir", run]
    assert main(*options) == 0, capsys.readouterr().err
    model = run / "vc" / "model"
    trained = load_model(model).state_dict()
    before = load_model(folder).state_dict()
    frozen = [name for name, weight in before.items() if torch.equal(weight, trained[name])]
    assert frozen
    assert all(name.startswith("model.visual.") and ".merger." not in name for name in frozen)
    rows = metrics(run)
    assert main("--resume", run / "vc" / "checkpoint-000002") == 0, capsys.readouterr().err
    again = load_model(model).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in trained.items())
    assert [untimed(row) for row in metrics(run)] == [untimed(row) for row in rows]
    arguments = ["--task=vc", "--samples=4", "--max-completion-length=4", "--device=cpu"]
    output = tmp_path / "evaluation"
    assert evaluate.main([*arguments, f"--model={model}", f"--output-dir={output}"]) == 0
    assert json.loads((output / "evaluation.json").read_text())["n"] == 4


@pytest.mark.parametrize(("kind", "method"), [pytest.param("7B", "grpo-d", marks=pytest.mark.slow), ("2.5, 3B", "sft")])
def test_lora_trained_resumed_merged_and_evaluated(kind, method, folder_of, tmp_path, capsys, monkeypatch, one_thread):
    monkeypatch.setitem(REWARDS, "accuracy", lambda completions, solutions, **_: [len(text) for text in completions])
    folder, run = folder_of(kind), tmp_path / "run"
    options = ["--task=vc", f"--method={method}", "--model", folder, "--lora-rank=2", "--merge", "--max-steps=3"]
    options += [*SMALL, "--save-steps=2", "--eval-steps=0", "--eval-samples=0", "--learning-rate=1e-2"]
    assert main(*options, "--output-dir", run) == 0, capsys.readouterr().err
    trained = load_model(run / "vc" / "model").state_dict()
    changed = [
        name for name, weight in load_model(folder).state_dict().items() if not torch.equal(weight, trained[name])
    ]
    assert len(changed) == 14  # of two layers
    assert all(".language_model." in name and name.endswith("_proj.weight") for name in changed)
    assert main("--resume", run / "vc" / "checkpoint-000002") == 0, capsys.readouterr().err
    again = load_model(run / "vc" / "model").state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in trained.items())

    # PEFT by itself makes the same model of base and adapter.
    inputs = encode_prompts(load_processor(folder), examples()[2:3])
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder), run / "vc" / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(run / "vc" / "model")
    with torch.no_grad():
        torch.testing.assert_close(
            adapted.eval()(**inputs).logits, merged.eval()(**inputs).logits, atol=1e-4, rtol=1e-4
        )
    arguments = ["--task=vc", "--samples=4", "--max-completion-length=4", "--device=cpu", "--sampled=0"]
    arguments += [f"--model={run / 'vc' / 'adapter'}", f"--output-dir={tmp_path / 'evaluation'}"]
    assert evaluate.main(arguments) == 0


@pytest.mark.parametrize("kind", ["2B", "2.5, 7B"])
def test_a_folder_that_transformers_4_49_has_saved(kind, folder_of, tmp_path):
    """R1-V's runs leave such: a default rope, and of the vision tower what is not the class's default."""
    old = shutil.copytree(folder_of(kind), tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["rope_scaling"] |= {"type": "default", "rope_type": "default"}
    for name in ("mlp_ratio", "hidden_act", "patch_size", "spatial_merge_size", "temporal_patch_size"):
        config["vision_config"].pop(name, None)
    config["vision_config"] |= {"model_type": config["model_type"], "torch_dtype": "float32"}
    config |= {"_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "transformers_version": "4.49.0"}
    (old / "config.json").write_text(json.dumps(config))
    images = json.loads((old / "preprocessor_config.json").read_text())
    images["size"] = {"longest_edge": images["max_pixels"], "shortest_edge": images["min_pixels"]}
    (old / "preprocessor_config.json").write_text(json.dumps(images))
    policies = [Policy(load_model(folder).eval(), load_processor(folder)) for folder in (folder_of(kind), old)]
    with torch.no_grad():
        hidden = [policy.encode_prefix(policy.encode(examples())).last_hidden for policy in policies]
    assert torch.equal(*hidden)
    for number, policy in enumerate(policies):
        (tmp_path / str(number)).mkdir()
        policy.save(tmp_path / str(number))
    files = [tmp_path / str(number) / "config.json" for number in (0, 1)]
    assert files[0].read_text() == files[1].read_text()


def test_the_real_vocabulary_and_what_lies_beyond_the_tokenizer(tmp_path, one_thread):
    """7B's: 152,064 rows for 151,657 tokens. A row without a token is never sampled."""
    spare = 152_064 - FIRST_SPECIAL - len(SPECIAL)
    folder = hub_folder(
        tmp_path / "7b", tied=False, first_special=FIRST_SPECIAL, spare=spare, shards=2, dtype=torch.bfloat16
    )
    policy = Policy(load_model(folder, dtype=torch.bfloat16), load_processor(folder))
    tokenizer = policy.processor.tokenizer
    assert policy.head_weight.shape[0] == 152_064
    assert len(tokenizer) == 151_657
    assert policy.end_ids.tolist() == [151_645, 151_643]
    with torch.no_grad():
        policy.head_weight[len(tokenizer) :] *= 1000  # a model that would say nothing else
    rollout = Sampler(policy, max_completion_length=3).generate(examples(), num_generations=4)
    assert rollout.completion_ids.max() < len(tokenizer)
    assert rollout.per_token_logps.isfinite().all()


def test_another_model_is_named():
    config = LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UserError, match=r"a LlamaForCausalLM .* not of these families: Qwen2-VL, Qwen2.5-VL$"):
        Policy(LlamaForCausalLM(config), tiny_processor())

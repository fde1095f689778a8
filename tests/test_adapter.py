"""LoRA as a run trains it: made, saved, loaded, resumed, merged, evaluated; and what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_program import SMALL, main

from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.batch import batch_logps
from mr1fast.training.checkpoint import load_checkpoint, save_checkpoint
from mr1fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(
    task="vc", max_steps=6, prompts_per_step=2, num_generations=4, max_completion_length=10, warmup_steps=1,
    learning_rate=1e-2, temperature=1.5,
).for_task("vc")  # fmt: skip


class Drawings:
    def __len__(self):
        return 7

    def __getitem__(self, index):
        return TASKS["vc"].example("train", index)


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def adapted(processor, model=None) -> Policy:
    return Policy(add_adapter(model or load_model(), rank=4), processor)


def trainer_of(policy) -> Trainer:
    return Trainer(CONFIG, policy, policy, Drawings())


@pytest.fixture(scope="module")
def trained(processor, tmp_path_factory):
    """After two steps; the checkpoint is of the first."""
    trainer = trainer_of(adapted(processor))
    steps = [trainer.step()]
    folder = save_checkpoint(trainer.policy, trainer.state_dict(), tmp_path_factory.mktemp("adapter"), step=1, keep=1)
    batch = trainer.collect().batch
    steps.append(trainer.step())
    return trainer, folder, batch, steps


def test_training_moves_the_adapter_alone(trained):
    trainer, _, _, steps = trained
    base = load_model().state_dict()
    adapter = 0
    for name, weight in trainer.policy.model.get_base_model().state_dict().items():
        if "lora_" in name:
            assert ".language_model." in name
            adapter += weight.abs().sum() > 0
        else:
            assert torch.equal(weight, base[name.replace("base_layer.", "")]), name
    layers = sum(name.endswith("_proj.weight") and ".language_model." in name for name in base)
    assert adapter == 2 * layers > 0  # B begins at 0
    assert all(step["skipped_steps"] == 0 for step in steps)


def test_the_reference_is_the_base_exactly_and_leaves_what_is_trained_as_it_was(trained, processor):
    trainer, _, batch, _ = trained
    flags = [weight.requires_grad for weight in trainer.policy.model.parameters()]
    with torch.no_grad():
        expected = batch_logps(Policy(load_model().eval(), processor), batch, CONFIG.temperature)
        assert (batch_logps(trainer.policy, batch, CONFIG.temperature) - expected).abs().max() > 1e-3
        with trainer.policy.without_adapter():
            assert torch.equal(batch_logps(trainer.policy, batch, CONFIG.temperature), expected)
    assert [weight.requires_grad for weight in trainer.policy.model.parameters()] == flags


def test_a_resumed_run_goes_on_bit_for_bit(trained, processor):
    trainer, folder, _, steps = trained
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    policy, state = load_checkpoint(folder, lambda path, **other: Policy(load_model(path, **other), processor))
    resumed = trainer_of(policy)
    resumed.load_state_dict(state)
    # `trained` has sampled one batch between its steps, of which only the generator knows
    resumed.collect()
    resumed.num_tokens = state["num_tokens"]
    again = resumed.step()
    assert {**again, "step_time": 0, "num_tokens": 0} == {**steps[1], "step_time": 0, "num_tokens": 0}
    for mine, theirs in zip(policy.trainable_parameters(), trainer.policy.trainable_parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_merged_it_computes_the_same(trained, processor):
    _, folder, batch, _ = trained
    merged = Policy(load_model(folder).eval(), processor).merge()
    assert not merged.has_adapter
    with torch.no_grad():
        expected = batch_logps(Policy(load_model(folder).eval(), processor), batch)
        torch.testing.assert_close(batch_logps(merged, batch), expected, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_has_a_float32_adapter(processor):
    policy = adapted(processor, load_model(dtype=torch.bfloat16))
    assert {weight.dtype for weight in policy.trainable_parameters()} == {torch.float32}
    assert trainer_of(policy).step()["skipped_steps"] == 0


def test_the_program_trains_merges_and_evaluates(tmp_path, capsys):
    from mr1fast import evaluate

    run = tmp_path / "run"
    options = [*SMALL, "--task=vc", "--method=sft", "--max-steps=1", "--eval-steps=0", "--learning-rate=1e-2"]
    assert main(*options, "--lora-rank=4", "--lora-targets=q_proj,v_proj", "--merge", "--output-dir", run) == 0
    config = json.loads((run / "vc" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(EMBEDDED))
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}
    whole, base = load_model(run / "vc" / "model").state_dict(), load_model().state_dict()
    assert set(whole) == set(base)
    changed = {name for name in base if not torch.equal(whole[name], base[name])}
    assert changed
    assert all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    adapter = str(run / "vc" / "adapter")
    arguments = ["--model", adapter, "--task", "vc", "--samples", "2", "--sampled", "0", "--device", "cpu"]
    assert evaluate.main([*arguments, "--output-dir", str(tmp_path / "evaluation")]) == 0
    capsys.readouterr()
    assert main(*options, "--model", adapter, "--lora-rank=8", "--output-dir", tmp_path / "other") == 2
    assert "is an adapter of rank 4 and alpha 8, which is trained on" in capsys.readouterr().err
    assert main(*options, "--lora-rank=4", "--lora-targets=q_prj", "--output-dir", tmp_path / "other") == 2
    assert "(did you mean 'q_proj'?)" in capsys.readouterr().err
    assert main(*options, "--merge", "--output-dir", tmp_path / "other") == 2
    assert "--merge is for LoRA" in capsys.readouterr().err


# ---- folders that do not do -----------------------------------------------------------------------------------------


def change_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def set_base(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


MISTAKES = {
    "no base": (lambda folder: set_base(folder, None), "names no base"),
    "moved base": (lambda folder: set_base(folder, "../moved"), r"cannot be loaded \(see base_model_name_or_path"),
    "wider base": (
        lambda folder: change_weights(folder, lambda weights: {n: torch.zeros(4, 7) for n in weights}),
        "does not fit its base .*size mismatch",
    ),
    "longer base": (
        lambda folder: change_weights(
            folder, lambda weights: {n.replace("layers.0", "layers.9"): w for n, w in weights.items()}
        ),
        "does not fit its base .* for which there is no layer",
    ),
    "half of it": (
        lambda folder: change_weights(folder, lambda weights: dict(list(weights.items())[1:])),
        "does not fit its base .*: it lacks ",
    ),
    "other layers": (
        lambda folder: (folder / "adapter_config.json").write_text(
            (folder / "adapter_config.json").read_text().replace("language_model", "decoder")
        ),
        "cannot be used with this model: .*not found in the base model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISTAKES)
def test_what_does_not_fit_is_one_sentence(kind, trained, tmp_path):
    change, says = MISTAKES[kind]
    folder = shutil.copytree(trained[1], tmp_path / "adapter")
    change(folder)
    with pytest.raises(UserError, match=says) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_relative_base_is_found_from_the_folder_and_may_have_the_processor(trained, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "base")
    folder = shutil.copytree(trained[1], tmp_path / "adapter")
    for file in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    set_base(folder, "../base")
    policy = Policy(load_model(folder), load_processor(folder))
    assert policy.has_adapter
    small = TrainConfig(model=str(folder), task="vc")
    assert small.for_task("vc").learning_rate == TrainConfig(task="vc").for_task("vc").learning_rate

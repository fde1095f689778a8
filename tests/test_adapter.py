"""LoRA as a run trains it: made, saved, loaded, resumed, merged, evaluated; and what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_program import SMALL, Drawings, main

from mr1fast import evaluate
from mr1fast.errors import UserError
from mr1fast.model.adapter import LANGUAGE_LAYERS, add_adapter
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.batch import batch_logps
from mr1fast.training.checkpoint import load_checkpoint, save_checkpoint
from mr1fast.training.trainer import Trainer
from tests.run_files import untimed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor():
    return load_processor()


def adapted(processor, model=None) -> Policy:
    return Policy(add_adapter(model or load_model(), rank=4), processor)


def trainer_of(policy, **options) -> Trainer:
    small = {"max_steps": 6, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 10}
    config = TrainConfig(
        **{"task": "vc", "warmup_steps": 1, "learning_rate": 1e-2, "temperature": 1.5, **small, **options}
    ).for_task("vc")
    return Trainer(config, policy, policy if config.needs_reference else None, Drawings())


@pytest.fixture(scope="module")
def trained(processor, tmp_path_factory):
    """A trainer after two steps, and its adapter in a folder."""
    trainer = trainer_of(adapted(processor))
    steps = [trainer.step() for _ in range(2)]
    assert [step["skipped_steps"] for step in steps] == [0, 0]
    folder = tmp_path_factory.mktemp("adapter")
    trainer.policy.save(folder)
    return trainer, folder


def test_training_moves_the_adapter_alone(trained):
    trainer, folder = trained
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
    files = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert not files & {"model.safetensors", "README.md"}


def test_the_reference_is_the_base_exactly_and_leaves_what_is_trained_as_it_was(trained, processor):
    """Of an adapter that is being trained, and of one that is trained further."""
    base = Policy(load_model().eval(), processor)
    for policy in (trained[0].policy, Policy(load_model(trained[1]), processor)):
        trainer = trainer_of(policy)
        flags = [weight.requires_grad for weight in policy.model.parameters()]
        batch = trainer.collect().batch
        with torch.no_grad():
            expected = batch_logps(base, batch, trainer.config.temperature)
            assert (batch_logps(policy, batch, trainer.config.temperature) - expected).abs().max() > 1e-3
        assert torch.equal(batch.ref_per_token_logps, expected)
        assert [weight.requires_grad for weight in policy.model.parameters()] == flags


SETTINGS = {
    "grpo-d": {},
    "grpo without KL, 2 iterations": {"method": "grpo", "beta": 0.0, "num_iterations": 2},
    "grpo-d, 2 iterations in pieces": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "sft": {"method": "sft"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_resumed_run_goes_on_bit_for_bit(setting, processor, tmp_path):
    options = SETTINGS[setting]
    whole = trainer_of(adapted(processor), **options)
    whole.step()
    folder = save_checkpoint(whole.policy, whole.state_dict(), tmp_path, step=1, keep=1)
    steps = [whole.step() for _ in range(2)]
    policy, state = load_checkpoint(folder, lambda path, **other: Policy(load_model(path, **other), processor))
    resumed = trainer_of(policy, **options)
    resumed.load_state_dict(state)
    for step in steps:
        assert step["grad_norm"] > 0
        assert untimed(resumed.step()) == untimed(step)
    for mine, theirs in zip(policy.trainable_parameters(), whole.policy.trainable_parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_merged_it_computes_the_same(trained, processor):
    trainer, folder = trained
    merged = Policy(load_model(folder).eval(), processor).merge()
    assert not merged.has_adapter
    batch = trainer.collect().batch
    with torch.no_grad():
        expected = batch_logps(Policy(load_model(folder).eval(), processor), batch)
        torch.testing.assert_close(batch_logps(merged, batch), expected, atol=1e-5, rtol=1e-5)


def test_a_bfloat16_base_has_a_float32_adapter(processor):
    policy = adapted(processor, load_model(dtype=torch.bfloat16))
    assert {weight.dtype for weight in policy.trainable_parameters()} == {torch.float32}
    assert trainer_of(policy).step()["skipped_steps"] == 0


PROGRAM = [*SMALL, "--task=vc", "--method=sft", "--max-steps=1", "--eval-steps=0", "--learning-rate=1e-2"]


@pytest.mark.slow
def test_the_program_trains_merges_evaluates_and_trains_further(tmp_path, recwarn):
    run = tmp_path / "run"
    options = ["--lora-rank=4", "--lora-targets=q_proj, v_proj", "--merge"]
    assert main(*PROGRAM, *options, "--output-dir", run) == 0
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
    assert json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["settings"]["model"] == adapter

    # The options of the first run are those of its adapter.
    further = ["--config", run / "config.json", "--model", adapter, "--output-dir", tmp_path / "further"]
    assert main(*further) == 0
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (run / "vc", tmp_path / "further" / "vc")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert not [warning for warning in recwarn if "is_gradient_checkpointing" in str(warning.message)]


def test_what_does_not_go_together_is_one_sentence(trained, tmp_path, capsys):
    adapter = trained[1]
    for arguments, message in (
        (["--lora-alpha=8"], "--lora-alpha and --lora-targets need --lora-rank"),
        (["--merge"], "--merge needs --lora-rank, or the folder of an adapter as --model"),
        (["--lora-rank=4", "--lora-targets=q_prj"], "(did you mean 'q_proj'?)"),
        (["--lora-rank=4", "--lora-targets=lm_head"], "--lora-targets: a layer must be one of"),
        (["--lora-rank=4", "--freeze=language"], "--freeze language leaves nothing to train: the adapter is on no"),
        (["--model", adapter, "--freeze=language,merger"], "leaves nothing to train: the adapter is on no other part"),
        (
            ["--model", adapter, "--lora-rank=8"],
            "trained further as it is: its lora_rank is 4; leave out --lora-rank 8",
        ),
        (["--model", adapter, "--lora-rank=4", "--lora-targets=q_proj"], "; leave out --lora-targets q_proj"),
    ):
        assert main(*PROGRAM, *arguments, "--output-dir", tmp_path / "run") == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_in_a_frozen_part_is_not_trained_and_in_others_it_is(processor):
    model = add_adapter(load_model(), rank=2, targets=("qkv", "q_proj"))
    policy = Policy(model, processor).freeze_parts(["vision"])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".language_model." in name and "lora_" in name for name in trained)
    assert len(policy.trainable_parameters()) == len(trained)


def test_the_default_learning_rate_is_ten_times_that_of_all_weights(trained):
    for adapter in ({"lora_rank": 8}, {"model": str(trained[1])}):
        for task in ("vc", "gr"):
            full = TrainConfig().for_task(task).learning_rate
            assert TrainConfig(**adapter).for_task(task).learning_rate == pytest.approx(10 * full, rel=1e-15)
    assert TrainConfig(model="Qwen/Qwen2-VL-2B-Instruct", lora_rank=8).for_task("vc").learning_rate == 1e-5
    assert TrainConfig(lora_rank=8, learning_rate=0.5).for_task("vc").learning_rate == 0.5


# ---- folders that do not do -----------------------------------------------------------------------------------------


def change_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def configure(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


MISTAKES = {
    "no base": (lambda folder: configure(folder, base_model_name_or_path=None), "names no base"),
    "moved base": (
        lambda folder: configure(folder, base_model_name_or_path="../moved"),
        r"cannot be loaded \(see base_model_name_or_path",
    ),
    "biases": (lambda folder: configure(folder, bias="all"), "it changes biases of the base, too .bias is 'all'"),
    "PiSSA": (lambda folder: configure(folder, init_lora_weights="pissa_niter_4"), "it changes weights of the base"),
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
        lambda folder: configure(folder, target_modules=LANGUAGE_LAYERS.replace("language_model", "decoder")),
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
    for file in folder.iterdir():
        if not file.name.startswith("adapter_"):
            file.unlink()
    configure(folder, base_model_name_or_path="../base")
    policy = Policy(load_model(folder), load_processor(folder))
    assert policy.has_adapter
    assert TrainConfig(model=str(folder)).recipe("vc") == "vc"  # its base is small


def test_an_adapter_that_transformers_has_put_on_its_base_is_one_sentence(trained, monkeypatch):
    """As it does with the name of an adapter on the hub; saved from there, the trained weights would be left out."""
    model = load_model()
    model._hf_peft_config_loaded = True
    monkeypatch.setattr("mr1fast.model.load.AutoConfig.from_pretrained", lambda *_, **__: model.config)
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: (model, {}))
    with pytest.raises(UserError, match=r"'me/adapter' is an adapter: download it \(hf download me/adapter"):
        load_model("me/adapter")

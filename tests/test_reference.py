"""The model from which the KL term measures: which one it is, and when it is in memory."""

import gc
import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model, tiny_policy
from train_program import SMALL, main
from transformers import Qwen2VLForConditionalGeneration

from mr1fast.model.adapter import add_adapter
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.options.parse import parse_arguments
from mr1fast.training.batch import batch_logps
from mr1fast.training.open_run import OpenRun
from mr1fast.training.run_folder import RunFolder
from mr1fast.training.setup import prepare
from mr1fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def disturbed(model, seed):
    """The model with other weights, of an adapter if it has one."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trained model, and an adapter of the embedded one."""
    folder, processor = tmp_path_factory.mktemp("models"), load_processor()
    Policy(disturbed(load_model(), 1), processor).save(folder / "trained")
    Policy(disturbed(add_adapter(load_model(), rank=2), 2), processor).save(folder / "adapter")
    return {"base": EMBEDDED, "trained": folder / "trained", "adapter": folder / "adapter"}


def test_there_is_none_if_the_kl_weight_is_0_throughout():
    assert not TrainConfig(method="sft").for_task("vc").needs_reference
    assert not TrainConfig(method="grpo", beta=0.0).for_task("vc").needs_reference
    assert not TrainConfig(beta_max=0.0).for_task("vc").needs_reference
    assert TrainConfig(method="grpo").for_task("vc").needs_reference
    assert TrainConfig().for_task("gr").needs_reference


@pytest.mark.parametrize(
    ("options", "models"),
    [
        (["--method=grpo"], 2),
        (["--method=grpo", "--beta=0"], 1),
        (["--method=sft"], 1),
        (["--lora-rank=2"], 1),
        (["--lora-rank=2", "--reference-model", EMBEDDED], 2),
    ],
    ids=str,
)
def test_no_more_models_than_needed_are_in_memory_while_one_is_trained(options, models, tmp_path, monkeypatch):
    made, found = weakref.WeakSet(), []
    make = Qwen2VLForConditionalGeneration.__init__

    def count(model, *args, **keywords):
        make(model, *args, **keywords)
        made.add(model)

    def step(trainer):
        gc.collect()
        found.append(len(made))
        raise KeyboardInterrupt

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "__init__", count)
    monkeypatch.setattr(Trainer, "step", step)
    small = [*SMALL, "--task=vc", "--eval-samples=1", "--eval-steps=0"]
    assert main(*small, *options, "--output-dir", tmp_path / "run") == 130
    assert found == [models]


@pytest.mark.parametrize(
    ("model", "reference", "lora", "expected"),
    [
        ("trained", None, False, "trained"),
        ("trained", None, True, "trained"),
        ("adapter", None, False, "base"),
        ("trained", "base", False, "base"),
        ("trained", "base", True, "base"),
        ("adapter", "trained", False, "trained"),
        ("trained", "adapter", True, "adapter"),
    ],
)
def test_which_model_it_is(model, reference, lora, expected, folders, tmp_path):
    options = ["--model", folders[model], *(["--reference-model", folders[reference]] if reference else [])]
    options += ["--lora-rank=2"] if lora else []
    request = parse_arguments([*SMALL, "--task=vc", "--eval-steps=0", *map(str, options)])
    setup = prepare(OpenRun(RunFolder(tmp_path), request.config))
    policy, config = setup.new_policy(), setup.config.for_task("vc")
    batch = Trainer(config, policy, setup.reference_for(policy, config), setup.train["vc"]).collect().batch
    with torch.no_grad():
        logps = {
            name: batch_logps(Policy(load_model(folder).eval(), policy.processor), batch, config.temperature)
            for name, folder in folders.items()
        }
    assert torch.equal(batch.ref_per_token_logps, logps[expected])
    assert all(name == expected or not torch.equal(batch.ref_per_token_logps, logps[name]) for name in logps)


def test_one_that_does_not_fit_is_one_sentence(folders, tmp_path, capsys):
    tiny, other_words = tmp_path / "tiny", tmp_path / "words"
    tiny_policy(tiny_model()).save(tiny)
    shutil.copytree(EMBEDDED, other_words)
    tokenizer = json.loads((other_words / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (other_words / "tokenizer.json").write_text(json.dumps(tokenizer))
    for arguments, message in (
        (["--reference-model", tiny], f"{tiny} must have the architecture and the vocabulary of --model: its text_"),
        (["--reference-model", other_words], "its tokenizer has other tokens"),
        (["--reference-model", "./nowhere"], "--reference-model ./nowhere is not a folder"),
        (["--reference-model", folders["trained"], "--method=sft"], "--reference-model is of no use"),
        (["--reference-model", folders["trained"], "--beta-max=0"], "--reference-model is of no use"),
    ):
        assert main(*SMALL, "--task=vc", *arguments, "--output-dir", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---- offloaded to the CPU -------------------------------------------------------------------------------------------


def test_an_offloaded_reference_comes_for_its_log_probabilities(tmp_path, monkeypatch):
    request = parse_arguments([*SMALL, "--task=vc", "--eval-steps=0"])
    setup = prepare(OpenRun(RunFolder(tmp_path), request.config))
    policy, config = setup.new_policy(), setup.config.for_task("vc")
    expected = Trainer(config, policy, setup.reference_for(policy, config), setup.train["vc"]).collect().batch
    moves = []
    setup.plans = {"vc": SimpleNamespace(offload_reference=True)}
    monkeypatch.setattr(Policy, "offload", lambda self: moves.append("cpu") or self)
    on = Policy.on
    monkeypatch.setattr(Policy, "on", lambda self, device: moves.append((self, device)) or on(self, device))
    reference = setup.reference_for(policy, config)
    batch = Trainer(config, policy, reference, setup.train["vc"]).collect().batch
    assert moves == ["cpu", (reference, policy.device)]
    assert torch.equal(batch.ref_per_token_logps, expected.ref_per_token_logps)


def test_a_lent_model_has_its_own_weights_back_afterwards(monkeypatch):
    """Without another device: what torch's `to` does is done here by hand."""
    policy, where = tiny_policy(tiny_model()), ["cpu"]

    def to(device):
        moved = where[0] != str(device)
        where[0] = str(device)
        for weight in policy.model.parameters() if moved and device != torch.device("cpu") else ():
            weight.data = weight.data.clone()

    monkeypatch.setattr(Policy, "device", property(lambda self: torch.device(where[0])))
    monkeypatch.setattr(policy.model, "to", to)
    before = [weight.data_ptr() for weight in policy.model.parameters()]
    with policy.on(torch.device("cuda:0")):
        assert where == ["cuda:0"]
        assert all(weight.data_ptr() != own for weight, own in zip(policy.model.parameters(), before, strict=True))
    assert where == ["cpu"]
    assert [weight.data_ptr() for weight in policy.model.parameters()] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_is_lent_to_a_gpu():
    policy = tiny_policy(tiny_model()).freeze()
    held = torch.cuda.memory_allocated()
    with policy.on(torch.device("cuda:0")):
        assert {weight.device.type for weight in policy.model.parameters()} == {"cuda"}
        assert {buffer.device.type for buffer in policy.model.buffers()} == {"cuda"}
    assert {tensor.device.type for tensor in policy.model.state_dict().values()} == {"cpu"}
    assert {buffer.device.type for buffer in policy.model.buffers()} == {"cpu"}
    assert torch.cuda.memory_allocated() == held

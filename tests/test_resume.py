"""Stopping a run and going on with it: signals, earlier and broken checkpoints, a full disk."""

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from data_files import row as data_row
from data_files import write_jsonl
from train_program import SMALL, main, metrics, program

from mr1fast import plot
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluation.evaluate import _Asked
from mr1fast.model.load import EMBEDDED, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training.checkpoint import load_checkpoint, save_checkpoint, whole_checkpoint
from mr1fast.training.loop import _go_on
from mr1fast.training.manifest import MANIFEST
from mr1fast.training.metrics import MetricsLog
from mr1fast.training.run_folder import ResumeError, RunFolder
from mr1fast.training.stop import is_out_of_memory, too_little_memory
from mr1fast.training.trainer import Trainer
from tests.run_files import untimed


@pytest.mark.slow  # the next test stops runs of this process
def test_ctrl_c_ends_the_program(tmp_path, signals_as_in_a_terminal):
    run = tmp_path / "run"
    options = [*SMALL, "--task=gr", "--max-steps=1000", "--save-steps=1000", "--eval-steps=0", "--eval-samples=0"]
    process = program(*options, f"--output-dir={run}", cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"to continue: python -m mr1fast.train --resume {run}" in errors
    assert "Traceback" not in errors
    assert len(list(run.glob("*/checkpoint-*"))) == 1


@pytest.mark.parametrize(
    ("number", "options", "pictures"),
    [
        pytest.param(
            signal.SIGINT,
            ["--task=gr", "--num-iterations=2"],
            {"curves.png", "samples.png"},
            marks=pytest.mark.slow,
        ),
        (signal.SIGTERM, ["--task=vc", "--method=sft"], {"curves.png"}),  # there may be no time for the other
    ],
)
def test_a_stopped_run_is_saved_and_goes_on(number, options, pictures, tmp_path, capsys, monkeypatch):
    """Stopped in the middle and resumed: the weights and metrics of a run that was left alone."""
    options += ["--max-steps=3", "--save-steps=1000", "--eval-steps=0", *SMALL]
    run, alone = tmp_path / "run", tmp_path / "alone"
    step = Trainer.step

    def second(trainer):
        if trainer.finished_steps == 1:
            os.kill(os.getpid(), number)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", second)
        assert main(*options, "--output-dir", run) == 128 + number
    errors = capsys.readouterr().err
    assert f"to continue: python -m mr1fast.train --resume {run}" in errors
    assert [row["step"] for row in metrics(run)] == [1, 2]  # what was begun is finished
    assert len(list(run.glob("*/checkpoint-*"))) == 1
    assert {path.name for path in run.glob("*.png")} == pictures
    if number == signal.SIGTERM:
        assert f"to draw its curves: python -m mr1fast.plot {run}" in errors
        assert plot.main([str(run)]) == 0
        assert (run / "curves.png").exists()

    seconds = json.loads((run / "result.json").read_text())["seconds"]
    assert seconds > 0
    assert main("--resume", "--output-dir", tmp_path) == 0
    assert json.loads((run / "result.json").read_text())["seconds"] > seconds
    assert main(*options, "--output-dir", alone) == 0
    name = options[0].removeprefix("--task=")
    ours, theirs = (load_model(folder / name / "model").state_dict() for folder in (run, alone))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for a, b in zip(metrics(run), metrics(alone), strict=True):
        assert untimed(a) == untimed(b)


@pytest.mark.slow
def test_resuming_from_an_earlier_checkpoint_writes_the_later_ones_again(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    options = ["--task=vc", "--method=sft", "--max-steps=4", "--save-steps=1", "--save-total-limit=3", *SMALL]
    assert main(*options, "--output-dir", run) == 0
    first = load_model(run / "vc" / "model").state_dict()
    rows = metrics(run)
    capsys.readouterr()
    assert main("--resume", run) == 2
    error = capsys.readouterr().err
    assert "nothing to resume: the run" in error
    assert "to continue" not in error
    for step in (2, 3):
        skipped = run / "vc" / "skipped" / f"step-{step:06d}.json"
        skipped.parent.mkdir(exist_ok=True)
        skipped.touch()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mr1fast.training.trainer.Trainer.step", interrupt)
        assert main("--resume", run / "vc" / "checkpoint-000002") == 130
    assert sorted(path.name for path in (run / "vc").iterdir()) == ["checkpoint-000002", "skipped"]
    assert [path.name for path in (run / "vc" / "skipped").iterdir()] == ["step-000002.json"]
    assert main("--resume", run) == 0  # it has not finished any more
    again = load_model(run / "vc" / "model").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert [untimed(row) for row in metrics(run)] == [untimed(row) for row in rows]
    kept = sorted(path.name for path in (run / "vc").glob("checkpoint-*"))
    assert kept == ["checkpoint-000002", "checkpoint-000003", "checkpoint-000004"]


def test_a_run_stopped_before_its_first_step_goes_on_too(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mr1fast.training.setup.evaluate", interrupt)
        assert main("--task=vc", "--max-steps=1", "--eval-steps=0", *SMALL, "--output-dir", run) == 143
    assert f"to continue: python -m mr1fast.train --resume {run}" in capsys.readouterr().err
    assert main("--resume", run) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == {"vc": 1}


@pytest.mark.slow
def test_an_evaluation_that_runs_out_of_memory_goes_on_with_smaller_batches(tmp_path, capsys, monkeypatch):
    """Before training and after it; neither is begun again, but for the training that another checkpoint leads to."""
    calls, answers = [], _Asked.answers
    fails_at = 2

    def out_of_memory(self, batch):
        calls.append(len(batch))
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return answers(self, batch)

    run = tmp_path / "run"
    before, after = (run / "answers" / when / "vc.jsonl" for when in ("before-training", "trained-on-vc"))
    options = ["--task=vc", "--max-steps=1", *SMALL, "--eval-steps=0", "--eval-sampled=0", "--eval-batch-size=2"]
    monkeypatch.setattr(_Asked, "answers", out_of_memory)
    assert main(*options, "--output-dir", run) == 1
    error = capsys.readouterr().err
    assert "there is too little memory" in error
    assert "a smaller --eval-batch-size" in error
    assert f"to continue: python -m mr1fast.train --resume {run}" in error
    assert len(before.read_text().splitlines()) == 2
    calls, fails_at = [], 8  # before: 2 of vc, 4 of gr; after: the second of vc
    assert main("--resume", run, "--eval-batch-size=1") == 1
    assert calls == [1] * 8
    assert len(before.read_text().splitlines()) == 4
    kept = after.read_text()
    assert len(kept.splitlines()) == 1
    calls, fails_at = [], 0
    assert main("--resume", run, "--eval-batch-size=3") == 0
    assert calls == [3, 3, 1]  # and none for the pictures
    assert after.read_text().startswith(kept)
    figures = json.loads((run / "result.json").read_text())["after"]["vc"]
    assert figures["n"] == len(after.read_text().splitlines()) == 4
    assert "sampled_accuracy" not in figures


SFT = [*SMALL, "--method=sft", "--eval-steps=0", "--eval-samples=0"]


@pytest.mark.slow
def test_a_run_that_has_finished_or_not_is_trained_for_longer(tmp_path, capsys, monkeypatch):
    """The schedules follow the new total, which is said and recorded."""
    run = tmp_path / "run"
    options = [*SMALL, "--task=vc", "--eval-steps=0", "--eval-samples=0", "--kl-schedule=linear", "--warmup-steps=0"]
    assert main(*options, "--max-steps=2", "--output-dir", run) == 0
    capsys.readouterr()
    assert main("--resume", run) == 2
    assert f"has finished; to train longer: --resume {run} --max-steps N" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("mr1fast.training.loop.save_model", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main("--resume", run, "--max-steps=4") == 143  # it has the checkpoint of step 4
    said = "vc: --max-steps is {} and was {}; from step {} on, learning rate and KL weight follow the new total\n"
    assert said.format(4, 2, 3) in capsys.readouterr().out
    assert main("--resume", run, "--max-steps=5") == 0
    assert said.format(5, 4, 5) in capsys.readouterr().out
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row, total in zip(rows, (2, 2, 4, 4, 5)):
        left = (total - (row["step"] - 1)) / total
        assert row["learning_rate"] == pytest.approx(3e-4 * left)
        assert row["beta"] == pytest.approx(0.04 * (1 - left))
    config, result = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    assert config["max_steps"] == result["config"]["max_steps"] == result["steps"]["vc"] == 5
    changes = [(one["task"], one["after_step"], one["from"], one["to"]) for one in config["max_steps_changes"]]
    assert changes == [("vc", 2, 2, 4), ("vc", 4, 4, 5)]
    assert main("--config", run / "config.json", "--print-config") == 0  # the record is no option, and no mistake
    assert "note: " not in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_of_the_model_alone_is_small_and_cannot_be_resumed(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def interrupted(*arguments):
        """At the second step that this program takes."""
        with monkeypatch.context() as patch:
            step, taken = Trainer.step, []

            def second(trainer):
                taken.append(trainer)
                if len(taken) == 2:
                    raise KeyboardInterrupt
                return step(trainer)

            patch.setattr(Trainer, "step", second)
            assert main(*arguments) == 130
        return capsys.readouterr().err

    assert "to continue: " in interrupted(*SFT, "--task=vc", "--max-steps=9", "--save-steps=1", "--output-dir", run)
    first, second = (run / "vc" / f"checkpoint-{step:06d}" for step in (1, 2))
    alone = f"training cannot be continued from {second}"
    assert alone in interrupted("--resume", run, "--save-only-model")
    assert {path.name for path in first.iterdir()} - {path.name for path in second.iterdir()} == {"trainer_state.pt"}
    load_model(second)
    assert main("--resume", run) == 2
    error = capsys.readouterr().err
    assert f"error: {alone}: trainer_state.pt is missing, as --save-only-model leaves it out; to continue" in error
    assert error.endswith(f"from the checkpoint before it: --resume {first}\n")
    shutil.rmtree(first)
    assert main("--resume", run) == 2
    assert "leaves it out; there is no earlier one" in capsys.readouterr().err


@pytest.mark.slow
def test_data_that_has_moved_is_found_and_other_data_is_refused(folder, capsys):
    rows = [data_row(n, image=f"../{n}.png") for n in range(20)]
    others = [{**row, "solution": "99"} for row in rows]
    for name, content in (("shapes", rows), ("others", others)):
        (folder / name).mkdir()
        write_jsonl(folder / name / "rows.jsonl", content)
    run = folder / "run"
    assert main("--data", folder / "shapes", "--allow-outside", *SFT, "--max-steps=1", "--output-dir", run) == 0
    (folder / "shapes").rename(folder / "moved")
    capsys.readouterr()
    for arguments, message in (
        ([], f"--data {folder / 'shapes'} does not exist; if it has moved, say with that option where it is now"),
        (["--data", folder / "others"], "is not the data of this run: its questions, answers or images are not those"),
    ):
        assert main("--resume", run, "--max-steps=2", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main("--resume", run, "--max-steps=2", "--data", folder / "moved") == 0
    assert [row["task"] for row in metrics(run)] == ["shapes"] * 2
    config, result = (json.loads((run / name).read_text()) for name in ("config.json", "result.json"))
    assert config["data"] == str(folder / "moved")
    assert set(result["after"]) == {"shapes"}
    assert "warning: the data" not in capsys.readouterr().err
    write_jsonl(folder / "moved" / "rows.jsonl", rows[:-1])
    assert main("--resume", run, "--max-steps=3") == 0  # it has not moved, only changed
    assert "warning: the data is not what the run began with (shapes/" in capsys.readouterr().err


@pytest.mark.slow
def test_too_little_memory_in_training_keeps_the_checkpoints(tmp_path, capsys, monkeypatch):
    run, step = tmp_path / "run", Trainer.step

    def third(trainer):
        if trainer.finished_steps == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", third)
        assert main(*SFT, "--task=vc", "--max-steps=3", "--save-steps=1", "--output-dir", run) == 1
    said = capsys.readouterr().err
    options = "--lora-rank 16, --freeze vision, --gradient-checkpointing on, a larger --gradient-accumulation-steps"
    smaller = "smaller values of --prompts-per-step or --max-pixels"
    assert f"error: there is too little memory; try {options}, {smaller} or" in said
    assert f"to continue: python -m mr1fast.train --resume {run}" in said
    assert "Traceback" not in said
    assert (run / "vc" / "checkpoint-000002" / "trainer_state.pt").exists()
    assert main("--resume", run, "--tokens-per-microbatch=1", "--gradient-checkpointing=on") == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]


def test_how_too_little_memory_looks():
    for words in (
        "CUDA out of memory. Tried to allocate 2.00 GiB.",
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: not enough memory: you tried to allocate",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "std::bad_alloc",
    ):
        error = UserError("the model cannot be loaded")
        error.__cause__ = RuntimeError(words)
        assert is_out_of_memory(error.__cause__)
        assert is_out_of_memory(error)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(UserError("not enough memory.jsonl does not exist"))


def test_memory_advice_names_what_is_not_in_use_yet():
    small = {"task": "vc", "prompts_per_step": 4, "gradient_accumulation_steps": 4}
    assert "a larger --gradient-accumulation-steps" not in too_little_memory(TrainConfig(**small))
    assert "a smaller --tokens-per" in too_little_memory(TrainConfig(task="vc", tokens_per_microbatch=9))
    assert "-checkpointing on" not in too_little_memory(TrainConfig(**small, gradient_checkpointing="on"))
    assert "--freeze" not in too_little_memory(TrainConfig(**small, freeze="vision"))
    assert "--lora-rank" not in too_little_memory(TrainConfig(**small, lora_rank=4))
    assert "--max-completion-length, --num-generations, " in too_little_memory(TrainConfig(**small))


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_survives(tmp_path, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    run = tmp_path / "run"
    options = ["--task=vc", "--max-steps=3", "--save-steps=1", "--eval-steps=0", *SMALL]
    from mr1fast.training import loop

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop.save_checkpoint

    def save(*arguments, step, **keywords):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if step == 2 else limits[0], limits[1]))
        return real(*arguments, step=step, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", save)
        try:
            assert main(*options, "--output-dir", run) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error, advice = capsys.readouterr().err.strip().splitlines()[-2:]
    assert "checkpoint-000002 could not be written" in error
    assert "the last whole checkpoint is" in error
    assert advice == f"to continue: python -m mr1fast.train --resume {run}"
    assert main("--resume", run) == 0


def test_a_full_disk_leaves_the_metrics_of_a_resumed_run(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    folder = RunFolder(tmp_path)
    before = "".join(json.dumps({"task": "vc", "step": step, "loss": 1.0}) + "\n" for step in range(1, 100))
    folder.metrics_file.write_text(before)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            MetricsLog(folder, "vc", first_step=80)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert folder.metrics_file.read_text() == before
    MetricsLog(folder, "vc", first_step=80).close()
    assert [row["step"] for row in metrics(tmp_path)] == list(range(1, 80))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_damaged_checkpoints_are_passed_over_or_named(tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--task=vc", "--method=sft", "--max-steps=4", "--save-steps=1", "--save-total-limit=3", *SMALL]
    assert main(*options, "--eval-steps=0", "--output-dir", run) == 0
    trained = load_model(run / "vc" / "model").state_dict()
    shutil.rmtree(run / "vc" / "model")
    result = json.loads((run / "result.json").read_text())
    unfinished = json.dumps({**result, "after": {}})  # as if stopped before the last evaluation
    (run / "result.json").write_text(unfinished)
    two, three, four = (run / "vc" / f"checkpoint-{step:06d}" for step in (2, 3, 4))
    flip_a_bit(four / "model.safetensors")
    (three / "trainer_state.pt").unlink()
    before = sorted(run.rglob("*"))
    capsys.readouterr()

    assert main("--resume", four) == 2  # the user's own choice
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{four} is damaged: model.safetensors is not what was written (its SHA-256 differs)" in error
    assert sorted(run.rglob("*")) == before

    assert main("--resume", run) == 0
    output = capsys.readouterr().out
    for checkpoint, what in ((four, "model.safetensors is not what"), (three, "trainer_state.pt cannot be read")):
        assert re.search(f"{checkpoint} is passed over, as {what}.*; training goes on from {two}", output)
    again = load_model(run / "vc" / "model").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in trained.items())

    shutil.rmtree(run / "vc" / "model")
    (run / "result.json").write_text(unfinished)
    for checkpoint in (two, three, four):
        flip_a_bit(checkpoint / "config.json")
    assert main("--resume", run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"there is no earlier one; move it away, and --resume {run} starts without it")


@pytest.mark.parametrize("file", ["trainer_state.pt", "model.safetensors"])
def test_a_broken_checkpoint_of_an_older_version_names_the_one_before_it(file, tmp_path, capsys):
    """That had no SHA256SUMS."""
    trainer = small_trainer(load())
    for step in (1, 2):
        folder = save_checkpoint(trainer.policy, trainer.state_dict(), tmp_path, step=step, keep=9)
        (folder / MANIFEST).unlink()
    (folder / file).write_bytes((folder / file).read_bytes()[:1000])
    assert whole_checkpoint(None, tmp_path) == folder
    advice = f"to continue from the checkpoint before it: --resume {tmp_path / 'checkpoint-000001'}"
    with pytest.raises(ResumeError, match=f"{re.escape(str(folder))}.*{re.escape(advice)}$"):
        load_checkpoint(folder, load)


def test_broken_lines_of_the_metrics_are_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [{"task": "vc", "step": 1}, {"task": "gr", "step": 9}, {"task": "vc", "step": 5}]
    lines = [json.dumps(rows[0]), "{broken}", "[1]", '{"task": "vc"}', json.dumps(rows[1]), "", json.dumps(rows[2])]
    folder.metrics_file.write_text("\n".join(lines) + '\n{"task": "v')
    MetricsLog(folder, "vc", first_step=5).close()
    assert metrics(tmp_path) == rows[:2]


class TwoOf:
    """The first two drawings."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return TASKS["vc"].example("train", index)


def small_trainer(policy: Policy) -> Trainer:
    small = {"method": "sft", "max_steps": 4, "prompts_per_step": 2, "warmup_steps": 0, "learning_rate": 1e-4}
    return Trainer(TrainConfig(**small, task="vc").for_task("vc"), policy, None, TwoOf())


def load(path=EMBEDDED, dtype=torch.float32) -> Policy:
    return Policy(load_model(path, dtype=dtype), load_processor(path))


@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_float32_weights_survive_a_change_of_dtype(first, then, tmp_path, one_thread):
    """Saved in one precision, resumed in another and in the first again: not a bit of what AdamW steps on is lost."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    trainer = small_trainer(load(dtype=dtypes[first]))
    for _ in range(2):
        trainer.step()
    exact = [master.detach().clone() for master in trainer.optimizer.masters]
    assert any(not torch.equal(master, master.bfloat16().float()) for master in exact)
    for step, dtype in enumerate((then, first, then), start=2):
        folder = save_checkpoint(trainer.policy, trainer.state_dict(), tmp_path, step=step, keep=9)
        policy, state = load_checkpoint(folder, lambda path, dtype=dtypes[dtype]: load(path, dtype))
        assert policy.model.dtype == dtypes[dtype]
        trainer = small_trainer(policy)
        trainer.load_state_dict(state)
        for weight, master, one in zip(trainer.optimizer.weights, trainer.optimizer.masters, exact, strict=True):
            assert master.dtype == torch.float32
            assert torch.equal(master, one)
            assert torch.equal(weight, one.to(weight.dtype))
    assert trainer.step()["skipped_steps"] == 0


def test_a_checkpoint_of_another_run_is_one_sentence(tmp_path, one_thread):
    trainer = small_trainer(load())
    trainer.step()
    state = trainer.state_dict()
    _go_on(small_trainer(load()), state, tmp_path)
    optimizer = {"adamw": torch.optim.AdamW([torch.zeros(3)]).state_dict(), "masters": [None]}
    for broken in ({}, state | {"optimizer": optimizer}, state | {"kl_schedule": None}):
        with pytest.raises(ResumeError, match=re.escape(f"{tmp_path} is not a checkpoint of this run")):
            _go_on(small_trainer(load()), broken, tmp_path)
    with pytest.raises(ResumeError, match="is beyond the run's last step, 4"):
        _go_on(small_trainer(load()), state | {"finished_steps": 5}, tmp_path)

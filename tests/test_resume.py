"""Stopping a run and going on with it: signals, earlier and broken checkpoints, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from train_program import SMALL, main, metrics, program

from mr1fast.model.load import load_model
from mr1fast.training.metrics import MetricsLog
from mr1fast.training.run_folder import RunFolder


def stopped(number, options, run) -> subprocess.CompletedProcess:
    """The program, sent a signal when it has logged two rows."""
    process = program(*options, f"--output-dir={run}", cwd=run.parent)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGINT, ["--task=gr", "--num-iterations=2"]), (signal.SIGTERM, ["--task=vc", "--method=sft"])],
)
def test_a_stopped_run_is_saved_and_goes_on(number, options, tmp_path):
    """Stopped in the middle and resumed: the weights and metrics of a run that was left alone."""
    options += ["--max-steps=16", "--save-steps=1000", "--eval-steps=0", *SMALL]
    run, alone = tmp_path / "run", tmp_path / "alone"
    process = stopped(number, options, run)
    assert process.returncode == 128 + number, process.stderr
    assert f"to go on: python -m mr1fast.train --resume {run}" in process.stderr
    assert "Traceback" not in process.stderr
    assert 2 <= len(metrics(run)) < 16
    assert len(list(run.glob("*/checkpoint-*"))) == 1
    assert {"curves.png", "samples.png"} <= {path.name for path in run.iterdir()}

    seconds = json.loads((run / "result.json").read_text())["seconds"]
    assert seconds > 0
    assert main("--resume", "--output-dir", tmp_path) == 0
    assert json.loads((run / "result.json").read_text())["seconds"] > seconds
    assert main(*options, "--output-dir", alone) == 0
    name = options[0].removeprefix("--task=")
    ours, theirs = (load_model(folder / name / "model").state_dict() for folder in (run, alone))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for a, b in zip(metrics(run), metrics(alone), strict=True):
        assert {**a, "step_time": 0} == {**b, "step_time": 0}


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
    assert "to go on" not in error
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
    assert [{**row, "step_time": 0} for row in metrics(run)] == [{**row, "step_time": 0} for row in rows]
    kept = sorted(path.name for path in (run / "vc").glob("checkpoint-*"))
    assert kept == ["checkpoint-000002", "checkpoint-000003", "checkpoint-000004"]


def test_a_run_stopped_before_its_first_step_goes_on_too(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("mr1fast.training.setup.evaluate", interrupt)
        assert main("--task=vc", "--max-steps=1", "--eval-steps=0", *SMALL, "--output-dir", run) == 143
    assert f"to go on: python -m mr1fast.train --resume {run}" in capsys.readouterr().err
    assert main("--resume", run) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == {"vc": 1}


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
    assert advice == f"to go on: python -m mr1fast.train --resume {run}"
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


@pytest.mark.parametrize("file", ["trainer_state.pt", "model.safetensors"])
def test_a_broken_checkpoint_names_the_one_before_it(file, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--task=vc", "--method=sft", "--max-steps=3", "--save-steps=1", "--eval-steps=0", *SMALL]
    assert main(*options, "--output-dir", run) == 0
    shutil.rmtree(run / "vc" / "model")
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "after": {}}))  # as if stopped before the last evaluation
    for step in (3, 2):
        broken = run / "vc" / f"checkpoint-{step:06d}" / file
        broken.write_bytes(broken.read_bytes()[:1000])
    before = sorted(run.rglob("*"))
    capsys.readouterr()
    assert main("--resume", run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-000003" in error
    assert error.endswith(f"to go on from the checkpoint before it: --resume {run / 'vc' / 'checkpoint-000002'}")
    assert main("--resume", run / "vc" / "checkpoint-000002") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"there is no earlier one; move it away, and --resume {run} does without it")
    assert sorted(run.rglob("*")) == before


def test_an_option_that_contradicts_the_run_is_not_ignored(tmp_path, capsys):
    run = tmp_path / "run"
    checkpoint = run / "vc" / "checkpoint-000001"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"seed": 3, "task": "vc"}))
    assert main("--resume", run, "--seed", 4) == 2
    assert "--seed was 3 there, and is 4 here" in capsys.readouterr().err
    (run / "vc" / "model").mkdir()
    assert main("--resume", run, "--max-steps", 4) == 2
    longer = f"to train longer, start a new run from --model {run / 'vc' / 'model'}"
    assert f"--max-steps was the default there, and is 4 here; {longer}" in capsys.readouterr().err
    (run / "config.json").write_text("{")
    assert main("--resume", checkpoint) == 2
    assert "is not the configuration of a run" in capsys.readouterr().err

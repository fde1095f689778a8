"""The whole program, mostly as a subprocess: what the user types and reads."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from mr1fast import evaluate, train
from mr1fast.config import RECIPES
from mr1fast.metrics import MetricsLog
from mr1fast.model import load_model, load_processor
from mr1fast.run_folder import RunFolder
from tests.test_config import BAD_ARGUMENTS

SMALL = [
    "--prompts-per-step=2", "--num-generations=2", "--max-completion-length=12", "--eval-samples=4",
    "--eval-validation-samples=2", "--warmup-steps=1", "--device=cpu",
]  # fmt: skip


def program(*arguments, cwd, **keywords) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "mr1fast.train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, **pipes, **keywords)


def main(*arguments) -> int:
    """The program in this process, which has torch already."""
    return train.main([str(argument) for argument in arguments])


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_whole_program(tmp_path, monkeypatch):
    """Both tasks, from the command line, into runs/<date-time>."""
    process = program("--max-steps=2", *SMALL, cwd=tmp_path)
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    (run,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d", run.name)
    result = json.loads((run / "result.json").read_text())
    for when in ("before", "after"):
        assert set(result[when]) == {"vc", "gr"}
        for figures in result[when].values():
            assert figures["n"] == 4
            for name in ("greedy_accuracy", "sampled_accuracy", "format_accuracy"):
                assert 0 <= figures[name] <= 1
    assert set(result["cross_task"]) == {"vc", "gr"}
    assert set(result["cross_task"]["vc"]) == {"gr"}
    assert result["steps"] == {"vc": 2, "gr": 2}
    assert (result["seed"], result["config"]["num_generations"]) == (0, 2)
    assert result["config_of_task"]["gr"]["learning_rate"] == RECIPES["gr"]["learning_rate"]
    assert result["seconds"] > 0
    assert set(result["versions"]) == {"mr1fast", "torch", "transformers", "python"}
    rows = metrics(run)
    assert [(row["task"], row["step"]) for row in rows] == [(task, step) for task in ("vc", "gr") for step in range(3)]
    assert {"reward", "kl", "beta", "grad_norm", "learning_rate", "step_time"} <= set(rows[1])
    assert ["eval/vc/greedy_accuracy" in row for row in rows[:3]] == [True, False, True]
    assert list((run / "tensorboard" / "vc").glob("events*"))
    for picture in ("curves.png", "samples.png"):
        assert Image.open(run / picture).size[0] > 500
    for words in ("before", "after", "greedy accuracy", "trained on vc, tested on gr"):
        assert words in output
    for words in ("reward", "accuracy", "kl", "beta"):
        assert words in errors  # the progress bar
    snippet = re.search(r"from mr1fast.model import .*\nmodel = .*\nprocessor = .*", output).group()
    loaded: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(snippet, loaded)
    assert loaded["model"].num_parameters() == load_model().num_parameters()
    assert loaded["processor"].tokenizer.eos_token
    assert output.count("load_model(") == 1
    assert "0completion" not in errors


def stopped(number, options, run) -> subprocess.CompletedProcess:
    """The program, sent a signal when it has done two steps."""
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
        patch.setattr("mr1fast.trainer.Trainer.step", interrupt)
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
        patch.setattr("mr1fast.loop.evaluate", interrupt)
        assert main("--task=vc", "--max-steps=1", "--eval-steps=0", *SMALL, "--output-dir", run) == 143
    assert f"to go on: python -m mr1fast.train --resume {run}" in capsys.readouterr().err
    assert main("--resume", run) == 0
    assert json.loads((run / "result.json").read_text())["steps"] == {"vc": 1}


def test_ten_steps_in_a_row_without_numbers_stop_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mr1fast.trainer.format_reward", lambda completion: float("nan"))
    run = tmp_path / "run"
    assert main("--task=vc", "--max-steps=30", "--eval-steps=0", *SMALL, "--output-dir", run) == 1
    errors = capsys.readouterr().err
    assert "10 steps in a row had no finite numbers (the last: a reward is not a finite number)" in errors
    samples = sorted((run / "vc" / "skipped").iterdir())
    assert len(samples) == len(metrics(run)) == 10
    sample = json.loads(samples[0].read_text())
    assert len(sample["completions"]) == 4
    assert sample["reason"] == "a reward is not a finite number"


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_survives(tmp_path, capsys):
    resource = pytest.importorskip("resource")  # not on Windows
    run = tmp_path / "run"
    options = ["--task=vc", "--max-steps=3", "--save-steps=1", "--eval-steps=0", *SMALL]
    from mr1fast import loop

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


def test_a_missing_package_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # "import torch" raises
    for program in (train, evaluate):
        assert program.main(["--task", "vc", "--output-dir", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: the package 'torch' is not installed for .*source .venv/bin/activate'\n", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", ["--task nonsense", "--lerning-rate 1"])
def test_a_mistake_as_a_subprocess(arguments, tmp_path):
    started = time.monotonic()
    process = program(*arguments.split(), cwd=tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == ""
    assert len(errors.strip().splitlines()) == 1
    assert errors.startswith("error: ")
    assert time.monotonic() - started < 10  # a second, on a machine that is not busy
    assert list(tmp_path.iterdir()) == []


def test_mistakes_leave_nothing_behind(tmp_path, capsys, monkeypatch):
    """Exit code 2, one sentence, no traceback, no folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    (tmp_path / "no-model").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    (tmp_path / "file").touch()
    Image.new("RGB", (56, 56)).save(tmp_path / "0.png")
    formula = {"image": "0.png", "problem": "How long?", "solution": r"2\sqrt{3}"}
    (tmp_path / "test.jsonl").write_text(json.dumps(formula))
    monkeypatch.setitem(sys.modules, "math_verify", None)
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    mistakes = [arguments.split() for arguments, _ in BAD_ARGUMENTS] + [
        ["--data", "missing"],
        ["--data", "empty"],
        ["--data", "broken.jsonl"],
        ["--data", "."],
        ["--model", "no-model"],
        ["--model", "./missing"],
        ["--device", "nonsense"],
        ["--device", "cuda:99"],
        ["--resume"],
        ["--resume", "missing"],
        ["--resume", "empty"],
        ["--output-dir", "full"],
        ["--output-dir", "file"],
        ["--output-dir", "file/run"],
        ["--output-dir", "/proc/run"],
    ]
    for arguments in mistakes:
        assert main(*arguments) == 2, arguments
        output, errors = capsys.readouterr()
        assert output == "", arguments
        assert re.fullmatch(r"error: [^\n]+\n", errors), (arguments, errors)
        left = [path for path in tmp_path.iterdir() if path not in before and any(path.iterdir())]
        assert left == [], arguments


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


def test_local_data(tmp_path, capsys):
    from mr1fast.tasks import TASKS

    data = tmp_path / "shapes"
    data.mkdir()
    rows = []
    for index in range(20):
        example = TASKS["vc"].example("train", index)
        example.image.save(data / f"{index}.png")
        solution = f"<answer> {example.solution} </answer>"
        rows.append({"image": f"{index}.png", "problem": example.problem, "solution": solution})
    for row in rows[3:9]:
        row["solution"] = ""
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    assert main("--data", data, "--max-steps=2", *SMALL, "--output-dir", run) == 0
    result = json.loads((run / "result.json").read_text())
    assert set(result["before"]) == set(result["after"]) == {"shapes"}
    assert {row["task"] for row in metrics(run)} == {"shapes"}
    load_processor(run / "shapes" / "model")
    output = capsys.readouterr().out
    rest = "(cut from the unnamed rows)"
    assert re.search(rf"shapes: train \d+, validation 2 {re.escape(rest)}, test \d+ {re.escape(rest)}\n", output)
    assert sum(map(int, re.findall(r"(\d+) x no answer", output.partition("before")[0]))) == 6
    assert output.count("shapes/train: ") <= 1


def test_a_data_folder_with_a_test_split_alone_leaves_nothing(tmp_path, capsys):
    Image.new("RGB", (56, 56)).save(tmp_path / "0.png")
    (tmp_path / "test.jsonl").write_text(json.dumps({"image": "0.png", "problem": "How many?", "solution": "1"}))
    assert main("--data", tmp_path, "--max-steps=2", *SMALL, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: data '[^']+' has no readable row for train: all rows are of test\n", error)
    assert not (tmp_path / "run").exists()

"""The whole program, mostly as a subprocess: what the user types and reads."""

import json
import re
import subprocess
import sys

import pytest
from data_files import row as data_row
from data_files import write_jsonl
from PIL import Image
from train_program import SMALL, main, metrics, program

from mr1fast import evaluate, train
from mr1fast.model.load import load_model, load_processor
from mr1fast.options.parse import parse_arguments
from mr1fast.options.recipes import RECIPES
from mr1fast.rewards import REWARDS
from mr1fast.training.open_run import OpenRun
from mr1fast.training.run_folder import RunFolder
from mr1fast.training.setup import prepare
from tests.test_config import BAD_ARGUMENTS


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
    config = json.loads((run / "config.json").read_text())
    assert config["schema_version"] == 1
    assert None not in config.values()
    assert config["learning_rate"] == {name: RECIPES[name]["learning_rate"] for name in ("vc", "gr")}
    assert config["task"] == "vc,gr"
    assert "\nvc: 2 steps of 2 prompts x 2 completions of up to 12 tokens, learning rate 0.0003 (defaults of" in output
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
    assert "0completion [" not in errors  # what tqdm prints of a bar that has no total


def test_ten_steps_in_a_row_without_numbers_stop_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(REWARDS, "format", lambda completions, *_, **columns: [float("inf")] * len(completions))
    run = tmp_path / "run"
    assert main("--task=vc", "--max-steps=30", "--eval-steps=0", *SMALL, "--output-dir", run) == 1
    errors = capsys.readouterr().err
    assert "10 steps in a row were skipped (the last: a reward is not a finite number)" in errors
    samples = sorted((run / "vc" / "skipped").iterdir())
    assert len(samples) == len(metrics(run)) == 10
    sample = json.loads(samples[0].read_text())
    assert len(sample["completions"]) == 4
    assert sample["reason"] == "a reward is not a finite number"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_one_sentence(error, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("mr1fast.training.loop.prepare", fail)
    assert main("--task=vc", "--output-dir", tmp_path / "run") == 1
    assert re.fullmatch(r"error: there is too little memory; try [^\n]+\n", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_by_several_processes_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate.main(["--task=vc", "--output-dir", str(tmp_path / "evaluation")]) == 2
    assert capsys.readouterr().err == (
        "error: WORLD_SIZE is 2, but evaluation runs in one process, on one device: start it without torchrun or "
        "accelerate launch\n"
    )
    assert not (tmp_path / "evaluation").exists()


def test_one_process_is_no_number_of_processes(capsys, monkeypatch):
    for one in ("1", "", "many"):
        monkeypatch.setenv("WORLD_SIZE", one)
        assert main("--data", "missing") == 2
        assert "--data missing does not exist" in capsys.readouterr().err


def test_a_missing_package_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # "import torch" raises
    for module in (train, evaluate):
        assert module.main(["--task", "vc", "--output-dir", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: the package 'torch' is not installed for .*source .venv/bin/activate'\n", error)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_as_a_subprocess(tmp_path):
    process = program("--task", "nonsense", cwd=tmp_path)
    output, errors = process.communicate(timeout=250)
    assert process.returncode == 2
    assert output == ""
    assert re.fullmatch(r"error: [^\n]+\n", errors)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_found_without_torch():
    """Which takes seconds to import."""
    code = "import sys; from mr1fast import train; print(train.main(['--lerning-rate', '1']), 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 False\n"


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
        ["--reward-weights", "no_such_module:reward=1"],
    ]
    for arguments in mistakes:
        assert main(*arguments) == 2, arguments
        output, errors = capsys.readouterr()
        assert output == "", arguments
        assert re.fullmatch(r"error: [^\n]+\n", errors), (arguments, errors)
        left = [path for path in tmp_path.iterdir() if path not in before and any(path.iterdir())]
        assert left == [], arguments


def test_local_data(tmp_path, capsys):
    from mr1fast.data.tasks import TASKS

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
    loss = "loss_type=dapo,epsilon_high=0.28,scale_rewards=none"
    assert main("--data", data, "--max-steps=2", "--loss", loss, *SMALL, "--output-dir", run) == 0
    result = json.loads((run / "result.json").read_text())
    assert set(result["before"]) == set(result["after"]) == {"shapes"}
    assert {(row["task"], row["loss_type"]) for row in metrics(run)} == {("shapes", "dapo")}
    assert json.loads((run / "config.json").read_text())["loss"] == loss
    load_processor(run / "shapes" / "model")
    card = (run / "shapes" / "model" / "README.md").read_text()
    assert "# The embedded model of mr1fast, trained with GRPO-D on shapes\n" in card
    assert f"| shapes | {result['before']['shapes']['n']} | greedy accuracy |" in card
    output = capsys.readouterr().out
    assert f", loss {loss} (defaults of vc" in output
    rest = "(cut from the unnamed rows)"
    assert re.search(rf"shapes: train \d+, validation 2 {re.escape(rest)}, test \d+ {re.escape(rest)}\n", output)
    assert sum(map(int, re.findall(r"(\d+) x no answer", output.partition("before")[0]))) == 6
    assert output.count("shapes/train: ") <= 1


def test_what_is_not_used_is_not_cut_and_what_two_splits_share_is_said(folder, capsys):
    """Without validation its share is trained on; that images of the test split are trained on is said."""
    write_jsonl(folder / "data" / "train.jsonl", [data_row(n, image=f"../{n}.png") for n in range(20)])
    write_jsonl(folder / "data" / "test.jsonl", [data_row(n, image=f".././{n}.png") for n in range(18, 25)])
    arguments = ["--data", folder / "data", "--max-steps=1", *SMALL, "--eval-steps=0", "--output-dir", folder / "run"]
    assert main(*arguments, "--allow-outside") == 0
    output = capsys.readouterr().out
    assert "data: train 20, test 4\n" in output  # of the test split, as many as --eval-samples says
    assert output.count("data/train: 20 examples; warning: 2 of them show an image of the test split\n") == 1


def test_what_does_not_fit(tmp_path, capsys):
    for arguments, message in (
        ("--max-completion-length=2048", "a completion of 2048 tokens leaves no room for a prompt"),
        (
            "--max-prompt-length=2017",
            "--max-prompt-length must be at most 2016, which is what the model has room",
        ),
        ("--max-prompt-length=5 --max-steps=1", "no row that can be used: 16 x prompt is longer than 5 tokens"),
        (
            "--prompts-per-step=4096 --num-generations=4096",
            "16,777,216 completions of up to 32 tokens at a time",
        ),
    ):
        assert main("--task=vc", *arguments.split(), "--output-dir", tmp_path / "run") == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_rows_with_long_prompts_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    """A question of 15,000 tokens among twelve, and others that a bound of the user's leaves out; data called gr."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for index in range(12):
        Image.new("RGB", (56, 56), (20 * index, 0, 0)).save(tmp_path / f"{index}.png")
        rows.append({"image": f"{index}.png", "problem": "How many?", "solution": "3"})
    rows[4]["problem"] = "How many? " * 3000
    rows[7]["problem"] = "How many? " * 20
    (tmp_path / "gr").mkdir()
    for split, part in (("train", rows), ("validation", rows[:5]), ("test", rows[:5])):
        text = "".join(json.dumps({**row, "image": f"../{row['image']}"}) + "\n" for row in part)
        (tmp_path / "gr" / f"{split}.jsonl").write_text(text)
    options = ["--data=gr", "--allow-outside", "--max-steps=6", "--method=sft", *SMALL]
    options += ["--eval-samples=9", "--eval-validation-samples=9"]
    assert main(*options, "--output-dir", "run") == 0
    output = capsys.readouterr().out
    for split, left in (("train", 11), ("validation", 4), ("test", 4)):
        assert f"gr/{split}: {left} examples; skipped 1: 1 x prompt is longer than 2036 tokens" in output
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["before"]["gr"]["n"] == result["after"]["gr"]["n"] == 4
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"] == str(tmp_path / "gr")
    assert config["learning_rate"] == RECIPES["vc"]["learning_rate"]  # the folder's name is no recipe
    assert "learning rate 0.0003 (defaults of vc for small models)" in output
    shorter = prepare(OpenRun(RunFolder(tmp_path), parse_arguments([*options, "--max-prompt-length=60"]).config))
    assert len({shorter.train["gr"][index].name for index in range(12)}) == 10
    assert shorter.train["gr"].skipped == {"prompt is longer than 60 tokens": 2}


def test_a_data_folder_with_a_test_split_alone_leaves_nothing(tmp_path, capsys):
    Image.new("RGB", (56, 56)).save(tmp_path / "0.png")
    (tmp_path / "test.jsonl").write_text(json.dumps({"image": "0.png", "problem": "How many?", "solution": "1"}))
    assert main("--data", tmp_path, "--max-steps=2", *SMALL, "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: data '[^']+' has no readable row for train: all rows are of test\n", error)
    assert not (tmp_path / "run").exists()

"""Which run is resumed, with which options: what may change, and what is refused in a sentence."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from train_program import main

from mr1fast.errors import UserError
from mr1fast.model.load import EMBEDDED
from mr1fast.options.config import TrainConfig
from mr1fast.options.parse import parse_arguments
from mr1fast.options.recipes import RECIPES
from mr1fast.training.open_run import open_run, requested_config
from mr1fast.training.run_folder import RunFolder, checkpoints, write_config


def written_run(folder: Path, *arguments, **changes) -> RunFolder:
    """A run as far as its config.json, which the arguments make, with some changes."""
    run = RunFolder(folder)
    write_config(run, parse_arguments([str(argument) for argument in arguments]).config)
    run.config_file.write_text(json.dumps(json.loads(run.config_file.read_text()) | changes))
    return run


def resumed(run, *arguments) -> TrainConfig:
    return requested_config(parse_arguments(["--resume", str(run), *map(str, arguments)]))


def test_an_option_that_contradicts_the_run_is_not_ignored(tmp_path):
    run = written_run(tmp_path / "run", "--seed=3", "--task=vc").path
    with pytest.raises(UserError, match=r"--seed was 3 there, but is 4 now$"):
        resumed(run, "--seed", 4)
    with pytest.raises(UserError, match=r"--model was not set there, but is x now$"):
        resumed(run, "--model", "x")
    with pytest.raises(UserError, match=r"--data was not set there, but is x now$"):
        resumed(run, "--data", "x")
    with pytest.raises(UserError, match=r"continues in its own folder, and --output-dir .*elsewhere is another"):
        resumed(run, "--output-dir", tmp_path / "elsewhere")
    assert resumed(run, "--seed", 3, "--task", " vc", "--reward-weights", "accuracy=1, format=0.5").seed == 3


def steps(run, *arguments) -> dict[str, int]:
    """Of each task, once the run is open, as config.json will record them."""
    with open_run(parse_arguments(["--resume", str(run), *map(str, arguments)])) as opened:
        write_config(opened.folder, opened.config)
    config = requested_config(parse_arguments(["--resume", str(opened.folder.path)]))
    return {name: config.for_task(name).max_steps for name in config.names}


def read(folder: RunFolder) -> dict:
    return json.loads(folder.config_file.read_text())


def test_the_steps_of_a_resumed_run_may_be_more_but_no_fewer_than_are_done(tmp_path):
    folder = written_run(tmp_path / "run", from_the_future=None)
    run = folder.path
    before = read(folder)
    (run / "vc" / "checkpoint-000050").mkdir(parents=True)
    (run / "vc" / "checkpoint-000150").mkdir()
    assert steps(run, "--max-steps", 300) == {"vc": 300, "gr": 300}
    (tmp_path / "more.yaml").write_text("max_steps: {gr: 40}")
    assert steps(run, "--config", tmp_path / "more.yaml") == {"vc": 300, "gr": 40}
    assert steps(run, "--max-steps", 150) == {"vc": 150, "gr": 150}
    assert {**read(folder), "max_steps": 0} == {**before, "max_steps": 0}
    with pytest.raises(UserError, match="--max-steps 149 is too small: vc has done 150 steps; an earlier checkpoint"):
        steps(run, "--max-steps", 149)
    assert steps(run / "vc" / "checkpoint-000050", "--max-steps", 50) == {"vc": 50, "gr": 50}
    (run / "gr" / "model").mkdir(parents=True)
    with pytest.raises(
        UserError, match="--max-steps 400: training on gr has finished, and no checkpoint of it is left"
    ):
        steps(run, "--max-steps", 400)
    with pytest.raises(UserError, match="--max-steps must be at least 1"):
        steps(run, "--max-steps", 0)


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    run = written_run(tmp_path / "run", "--task=vc").path
    (run / "vc" / "checkpoint-000002").mkdir(parents=True)
    before = sorted(run.rglob("*"))
    for name in (".checkpoint-000004.tmp", ".checkpoint-000001.removed.tmp", ".model.tmp"):
        (run / "vc" / name).mkdir()
        (run / "vc" / name / "model.safetensors").touch()
    for name in (".result.json.tmp", "vc/.step-000002.json.tmp"):
        (run / name).touch()
    with open_run(parse_arguments(["--resume", str(run)])):
        assert sorted(run.rglob("*")) == before


def test_a_resumed_run_may_compute_elsewhere(tmp_path):
    run = written_run(tmp_path / "run", "--dtype=bfloat16", "--threads=2").path
    config = resumed(run, "--dtype", "float32", "--device", "cpu", "--attention", "eager", "--threads", 1)
    assert (config.dtype, config.device, config.attention, config.threads) == ("float32", "cpu", "eager", 1)
    assert resumed(run).dtype == "bfloat16"


def test_a_resumed_run_has_the_defaults_that_it_began_with(tmp_path, monkeypatch):
    run = written_run(tmp_path / "run").path
    before = parse_arguments([]).config
    tasks = {name: before.for_task(name) for name in before.tasks}
    monkeypatch.setitem(RECIPES["vc"], "learning_rate", 0.5)
    monkeypatch.setitem(RECIPES["gr"], "max_steps", 7)
    assert {name: resumed(run).for_task(name) for name in before.tasks} == tasks


def test_data_and_model_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    run = written_run(tmp_path / "run", "--data=shapes", "--model=mine", "--output-dir=run").path
    recorded = json.loads((run / "config.json").read_text())
    assert (recorded["data"], recorded["model"]) == (str(tmp_path / "shapes"), str(tmp_path / "mine"))
    assert "output_dir" not in recorded
    assert resumed(run, "--data", "shapes", "--model", "mine").data == str(tmp_path / "shapes")
    monkeypatch.chdir(tmp_path / "mine")
    assert resumed(run).data == str(tmp_path / "shapes")
    assert resumed(run, "--data", "shapes").data == str(tmp_path / "mine" / "shapes")  # it may have moved
    with pytest.raises(
        UserError, match=r"--data .*/shapes does not exist; if it has moved, say with that option where"
    ):
        steps(run)


def test_an_option_of_a_newer_version_is_said_and_kept(tmp_path, capsys):
    run = written_run(tmp_path / "run", "--seed=3", schema_version=99, from_the_future={"a": 1})
    before = run.config_file.read_text()
    assert resumed(run.path).seed == 3
    said = f"{run.config_file} has options that this version does not know and ignores: from_the_future"
    assert said in capsys.readouterr().err
    write_config(run, resumed(run.path))
    assert run.config_file.read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "grpo-e"}, "config.json: method must be one of grpo-d, grpo, sft, got 'grpo-e' (did you mean"),
        ({"kl_schedule": "square"}, "config.json: kl_schedule must be one of paper"),
        ({"learning_rate": "fast"}, "config.json: learning_rate must be a number, got 'fast'"),
        ({"max_steps": {"vc": -1}}, "config.json: max_steps: vc must be at least 1, got -1"),
        ({"method": "sft"}, "config.json: --beta-min belongs to --method grpo-d, and the method is sft"),
        ({"task": "vc,cv"}, "config.json: --task must be one of vc, gr, got 'cv'"),
        ({"seed": [1]}, "config.json: seed must be a whole number, got [1]"),
        ({"schema_version": None}, "config.json is not the configuration of a run (it is damaged, or an older version"),
        ({"reward_weights": "no_such_module:f=1"}, "no_such_module:f cannot be imported"),
    ],
)
def test_a_config_json_that_is_not_ours(changes, message, tmp_path, capsys):
    run = written_run(tmp_path / "run", **changes).path
    assert main("--resume", run) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_what_is_no_run(tmp_path, capsys):
    run = written_run(tmp_path / "run", "--task=vc").path
    (run / "vc" / "checkpoint-000001").mkdir(parents=True)
    (run / "cv" / "checkpoint-000001").mkdir(parents=True)
    shutil.copytree(EMBEDDED, run / "vc" / "model")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[1]")
    for arguments, message in (
        (["--resume", run / "vc"], "vc is neither a run nor a checkpoint of one"),
        (["--resume", run / "vc" / "model"], "model/config.json is not the configuration of a run"),
        (["--resume", tmp_path / "list"], "list/config.json is not the configuration of a run"),
        (["--resume", tmp_path / "nothing"], "there is no such folder"),
        (["--resume", run, "--resume", run], "--resume is given twice"),
        (["--config", run, "--config", run], "--config is given twice"),
        (["--resume", run, run], "unknown argument"),
        (["--resume", run / "cv" / "checkpoint-000001"], "checkpoint-000001 does not belong to vc, the run's tasks"),
    ):
        assert main(*arguments) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert message in error
    (run / "result.json").write_text("{")
    assert main("--resume", run) == 2
    assert "result.json is damaged; move it away" in capsys.readouterr().err


def test_print_config(tmp_path, capsys):
    run = written_run(tmp_path / "run", "--task=vc", "--seed=3").path
    assert main("--resume", run, "--print-config", "--threads", 2) == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert options == {**json.loads((run / "config.json").read_text()), "threads": 2}
    for arguments, message in (
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--data=x", "--test-data=" + "n" * 300 + ",y"], "--data x does not exist"),
        (["--model", "./nowhere"], "--model ./nowhere is not a folder"),
        (["--max-steps", "0"], "--max-steps must be at least 1"),
    ):
        assert main("--print-config", *arguments) == 2
        output, error = capsys.readouterr()
        assert output == ""
        assert message in error


def test_a_run_is_open_once(tmp_path, capsys):
    run = written_run(tmp_path / "run", "--task=vc").path
    before = sorted(run.rglob("*"))
    with open_run(parse_arguments(["--resume", str(run)])):
        assert main("--resume", run) == 2
    assert capsys.readouterr().err == f"error: another process is training in {run}\n"
    assert sorted(run.rglob("*")) == before
    with open_run(parse_arguments(["--resume", str(run)])):
        pass


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for name in ("checkpoint-999999", "checkpoint-1000000", "checkpoint-000050", "checkpoint-old", "checkpoint-7.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2000000").touch()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-000050", "checkpoint-999999", "checkpoint-1000000",
    ]  # fmt: skip

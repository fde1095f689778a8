"""The options as they run, every default filled in: what config.json records and --print-config shows."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mr1fast.options.config import TaskConfig
from mr1fast.options.parse import printed_config
from mr1fast.options.recipes import KL_DEFAULTS, RECIPES
from tests.test_config import config, model_folder

RESOLVED = [
    "", "--task gr", "--method grpo --beta .01", "--method sft --task vc --max-steps 3", "--kl-schedule linear",
    "--kl-schedule adaptive --target-kl .1", "--data somewhere --reward-weights accuracy=1,format=0",
    "--model nobody/large --max-prompt-length 900", "--threads 2 --dtype bfloat16 --max-pixels 3136",
]  # fmt: skip


@pytest.mark.parametrize("arguments", RESOLVED)
def test_the_resolved_options_are_read_back_whatever_the_recipes_have_become(arguments, tmp_path, monkeypatch):
    before = config(*arguments.split())
    runs = {name: before.for_task(name) for name in before.names}
    resolved = before.resolved()
    assert all(value is not None for value in resolved.values())
    file = tmp_path / "run.yaml"
    file.write_text(printed_config(before))
    for recipe in RECIPES.values():
        monkeypatch.setitem(recipe, "learning_rate", 0.5)
        monkeypatch.setitem(recipe, "max_steps", 7)
    for method in KL_DEFAULTS.values():
        for name in ("beta", "beta_max"):
            if name in method:
                monkeypatch.setitem(method, name, 0.9)
    after = config("--config", file)
    assert {name: after.for_task(name) for name in after.names} == runs
    assert after.resolved() == resolved


def test_options_that_differ_by_task(tmp_path):
    assert config().resolved()["learning_rate"] == {"vc": 3e-4, "gr": 2e-4}
    assert config().resolved()["max_steps"] == 200
    assert config().resolved()["task"] == "vc,gr"
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: {vc: 10, gr: '20'}\nlearning-rate: {gr: 1e-3}")
    chosen = config("--config", file)
    assert [chosen.for_task(name).max_steps for name in ("vc", "gr")] == [10, 20]
    assert [chosen.for_task(name).learning_rate for name in ("vc", "gr")] == [3e-4, 1e-3]
    assert config("--config", file, "--max-steps", 5).for_task("gr").max_steps == 5


def test_a_task_config_has_no_none_but_where_it_means_something():
    """No target of an adaptive schedule, and no bound on what passes through the model at a time."""
    for method in ("grpo-d", "grpo", "sft"):
        task = config("--method", method).for_task("vc")
        absent = [field.name for field in dataclasses.fields(TaskConfig) if getattr(task, field.name) is None]
        assert absent == ["target_kl", "tokens_per_microbatch"]


def test_paths_are_recorded_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "mine")
    recorded = config("--data", "shapes/../shapes", "--model", "mine").resolved()
    assert (recorded["data"], recorded["model"]) == (str(tmp_path / "shapes"), str(tmp_path / "mine"))
    assert config("--model", "some/name").resolved()["model"] == "some/name"
    assert "model" not in config().resolved()


def test_print_config_needs_no_torch_and_no_folder(tmp_path):
    code = "import sys, mr1fast.train; sys.exit(mr1fast.train.main() or 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "--print-config", "--data", str(tmp_path), "--output-dir", "new"]
    path = {"PYTHONPATH": str(Path(__file__).parent.parent)}
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | path)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert printed.stdout == printed_config(config("--data", tmp_path, "--output-dir", "new"))
    assert printed.stdout.startswith("# data: defaults of vc for small models\nschema_version: 1\nmethod: grpo-d\n")
    assert list(tmp_path.iterdir()) == []


def test_options_of_a_newer_version_are_said_and_not_fatal(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("schema_version: 99\nseed: 3\nfrom_the_future: 1\n")
    assert config("--config", file).seed == 3
    assert f"{file} has options that this version does not know and ignores: from_the_future" in capsys.readouterr().err

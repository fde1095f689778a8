"""Where metrics and completions are shown, with stand-ins for wandb and Trackio; and that no logger ends a run."""

import math
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_program import SMALL, main, metrics

from mr1fast.data.example import Example
from mr1fast.options.config import TrainConfig
from mr1fast.training.loggers import open_loggers
from mr1fast.training.run_folder import RunFolder
from mr1fast.training.scoring import Scored


class Tracker(ModuleType):
    """What wandb and trackio have in common, recorded. fails_at: the number of the log that fails; 0 for init."""

    def __init__(self, name, fails_at=None):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # accelerate looks for it
        self.inits, self.logs, self.finished, self.metrics = [], [], 0, []
        self.fails_at = fails_at

    def init(self, project, name=None, group=None, config=None, resume=None, **wandbs):
        if self.fails_at == 0:
            raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")
        assert not (self.__name__ == "trackio" and wandbs)
        self.inits.append({"project": project, "name": name, "group": group, "resume": resume, **wandbs})
        self.config = config
        if "dir" in wandbs:
            (Path(wandbs["dir"]) / "wandb").mkdir(exist_ok=True)
        return self

    def log(self, row, step=None):
        assert step == (None if self.__name__ == "wandb" else row["train/global_step"])
        if len(self.logs) + 1 == self.fails_at:
            raise OSError(28, "No space left on device")
        self.logs.append(row)

    def finish(self):
        self.finished += 1

    def define_metric(self, name, step_metric=None, step_sync=None):
        self.metrics.append((name, step_metric))

    class Image:
        def __init__(self, image):
            self.image = image.copy()

    class Table:
        def __init__(self, columns, data):
            assert all(len(row) == len(columns) for row in data)
            self.columns, self.data = columns, data


@pytest.fixture
def trackers(monkeypatch):
    """Both, installed."""
    both = {name: Tracker(name) for name in ("wandb", "trackio")}
    for name, tracker in both.items():
        monkeypatch.setitem(sys.modules, name, tracker)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return both


def completions() -> list[Scored]:
    """Two of one prompt and one of another."""
    examples = [Example(Image.new("RGB", (56, 28), (200, 0, 0)), "How | many?", "4"), Example(None, "Why?", "5")]
    rewards = {"accuracy_reward": 1.0, "brief": math.nan}
    return [Scored(examples[i], f"<think>\n</think># {i}", rewards, 0.5) for i in (0, 0, 1)]


def test_a_run_with_two_loggers_of_which_one_fails(tmp_path, capsys, trackers):
    trackers["trackio"].fails_at = 2
    run = tmp_path / "run"
    options = ["--task=vc", "--max-steps=3", "--save-steps=2", *SMALL, "--eval-steps=0", "--eval-samples=0"]
    assert main(*options, "--report-to", "wandb, trackio", "--output-dir", run) == 0
    assert not (run / "tensorboard").exists()
    wandb, trackio = trackers.values()
    error = capsys.readouterr().err
    assert error.count("trackio") == 1
    assert "warning: trackio failed, and the run goes on without it: [Errno 28] No space left on device\n" in error
    assert (len(trackio.logs), trackio.finished, wandb.finished) == (1, 0, 1)
    assert [row["train/global_step"] for row in wandb.logs] == [1, 2, 3]
    for logged, row in zip(wandb.logs, metrics(run), strict=True):
        shown = {f"train/{name}": value for name, value in row.items() if name not in ("task", "step", "loss_type")}
        assert shown.items() <= logged.items()
    assert wandb.config["max_steps"] == 3
    assert wandb.config["learning_rate"] == 3e-4
    assert wandb.inits[0]["dir"] == str(run)
    assert [("completions" in row) for row in wandb.logs] == [False, True, True]
    table = wandb.logs[1]["completions"]
    columns = ["step", "image", "prompt", "solution", "completion", "accuracy_reward", "format_reward", "advantage"]
    assert table.columns == columns
    assert len(table.data) == 4
    step, image, prompt, solution, completion, accuracy, _, _ = table.data[0]
    assert step == 2
    assert image.image.size == (56, 56)
    assert prompt.startswith("How many")
    assert accuracy == float(f"<answer>{solution}</answer>" in completion)


def test_a_run_is_known_by_the_same_name_when_it_goes_on(tmp_path, trackers, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run = RunFolder(tmp_path / "2026")
    for _ in range(2):
        for logger in open_loggers(["wandb", "trackio"], run, "vc", first_step=0, config={}):
            logger.log(0, {"eval/vc/n": 2.0, "loss": math.nan}, completions())
            logger.close()
    other = RunFolder(tmp_path / "other" / "2026")
    open_loggers(["wandb", "trackio"], other, "vc", first_step=0, config={})
    wandb, trackio = ([dict(one) for one in tracker.inits] for tracker in trackers.values())
    assert [one["resume"] for one in wandb] == [None, "allow", None]
    assert {one["resume"] for one in trackio} == {"allow"}
    assert wandb[0]["id"] == wandb[1]["id"] != wandb[2]["id"]
    assert trackio[0]["name"] == trackio[1]["name"] != trackio[2]["name"]
    assert {(one["project"], one["name"], one["group"]) for one in wandb} == {("mine", "2026-vc", "2026")}
    assert trackio[0]["project"] == "mr1fast"
    assert ("*", "train/global_step") in trackers["wandb"].metrics
    row = trackers["wandb"].logs[0]
    assert set(row) == {"eval/vc/n", "train/loss", "train/global_step", "completions"}
    assert [line[1] is None for line in row["completions"].data] == [False, False, True]
    assert row["completions"].data[0][5:] == [1.0, None, 0.5]


def test_a_logger_that_cannot_begin_is_said_once(tmp_path, capsys, trackers):
    trackers["wandb"].fails_at = 0
    (logger,) = open_loggers(["wandb"], RunFolder(tmp_path), "vc", first_step=0, config={})
    logger.log(1, {"loss": 1.0}, ())
    logger.close()
    error = capsys.readouterr().err
    assert error == "warning: wandb failed, and the run goes on without it: No API key configured.\n"


@pytest.mark.parametrize("there", ["nothing", "a folder"])
def test_a_package_that_is_missing_is_one_sentence(tmp_path, capsys, monkeypatch, there):
    """A folder wandb, such as wandb makes, is no package of that name, though Python imports it."""
    found = None if there == "nothing" else ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", found)
    assert main("--task=vc", "--report-to=wandb", "--output-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --report-to wandb: the package wandb is not installed; run '")
    assert "-m pip install wandb', or leave wandb out of --report-to\n" in error
    assert not (tmp_path / "run").exists()


def test_tensorboards_own_thread_prints_no_traceback(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    seen = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    (logger,) = open_loggers(["tensorboard"], RunFolder(tmp_path), "vc", first_step=0, config={})
    for step in range(3):
        logger.log(step, {"loss": 1.0}, [])
    logger.close()
    warning = "warning: tensorboard failed, and the run goes on without it: [Errno 28] No space left on device\n"
    assert capsys.readouterr().err == warning
    assert seen == []
    other = threading.Thread(target=full)  # the program's hook has those of all other threads
    other.start()
    other.join()
    assert [args.exc_type for args in seen] == [OSError]


def test_tensorboard_shows_completions_as_they_are(tmp_path):
    (logger,) = open_loggers(["tensorboard"], RunFolder(tmp_path), "vc", first_step=0, config={})
    logger.log(7, {"loss": 2.0}, completions())
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "vc"))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(7, 2.0)]
    (text,) = events.Tensors("completions/1/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert said.startswith("    How | many?\n    true answer: 4\n\naccuracy_reward 1, brief nan, advantage 0.5\n\n")
    assert said.count("    <think>\n    </think># 0") == 2
    (image,) = events.Images("completions/1")
    assert (image.width, image.height) == (56, 28)
    assert "completions/2" not in events.Tags()["images"]


def test_what_to_report_to():
    assert TrainConfig().loggers == ("tensorboard",)
    assert TrainConfig(report_to="none").loggers == ()
    assert TrainConfig(report_to="wandb, trackio").resolved()["report_to"] == "wandb,trackio"

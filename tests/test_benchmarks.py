"""The benchmark runner: results are kept with what they depend on, and a picture never invents a figure."""

import csv
import re
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases_gpu, report, run, timing
from benchmarks.cases import Call, Case, Scene
from mr1fast.kernels import cuda


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_are_kept_and_drawn(dtype, tmp_path, capsys):
    table, picture = tmp_path / "out.csv", tmp_path / "out.png"
    pattern = f"256 {dtype} mr1fast buffer"
    assert run.main(["loss", "--quick", "--filter", pattern, "--csv", str(table), "--plot", str(picture)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert {"mr1fast cpp, in place", "mr1fast cpp, new buffer", "memcpy"} == {row["case"] for row in rows}
    assert all(float(row["median_ms"]) > 0 for row in rows), [row["note"] for row in rows]
    assert rows[0]["device"]
    assert rows[0]["torch"] == torch.__version__
    assert "mr1fast cpp, in place" in capsys.readouterr().out
    assert picture.stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure")
def test_what_was_not_measured_says_so(tmp_path, capsys, monkeypatch):
    texts = []
    monkeypatch.setattr("matplotlib.axes.Axes.text", lambda self, x, y, text, **more: texts.append(text))
    table, picture = tmp_path / "out.csv", tmp_path / "out.png"
    assert run.main(["gpu", "--csv", str(table), "--plot", str(picture)]) == 0
    assert "not measured: there is no CUDA device" in capsys.readouterr().out
    assert set(texts) == {"not measured: there is no CUDA device"}
    for row in csv.DictReader(table.open()):
        assert row["note"] == "not measured: there is no CUDA device"
        assert row["median_ms"] == row["rate"] == row["ratio"] == ""


@pytest.mark.parametrize("options", [["--filter", "no such case"], ["--device", "cuda"]])
def test_options_that_leave_nothing(options, capsys):
    assert run.main(["loss", *options]) == 2
    assert "--list shows the cases" in capsys.readouterr().err


def test_a_case_brings_those_it_is_compared_with_unless_alone(capsys):
    cases = []
    for options in ([], ["--alone"]):
        assert run.main(["step", "--quick", "--list", "--filter", "equal trl", *options]) == 0
        cases.append(capsys.readouterr().out.strip().partition(": ")[2].split("; "))
    assert cases == [["mr1fast trainer", "trl GRPOTrainer"], ["trl GRPOTrainer"]]


def test_base_goes_without_files(capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["loss", "--base", "main", "--csv", "out.csv"])
    assert stop.value.code == 2
    assert "--base only prints its comparison" in capsys.readouterr().err


def fails_at_call(number):
    """A case whose call of that number, counted from 1, raises."""
    calls = []

    def call():
        calls.append(None)
        if len(calls) == number:
            raise RuntimeError("out of something")

    return Case(f"fails at {number}", lambda inputs: Call(call), 1)


def last_of(results):
    *_, last = results
    return last


def test_a_case_that_raises_loses_no_other():
    cases = (fails_at_call(1), fails_at_call(4), fails_at_call(0))
    scene = Scene("loss", "1 x 1", "float32", lambda: None, cases)
    measured = {m.case.name: m for m in last_of(timing.measure(scene, cases, 1.0, lambda name: None))}
    assert measured["fails at 1"].note == "not measured: RuntimeError: out of something"
    assert not measured["fails at 1"].times
    assert measured["fails at 4"].note == "broke off in round 2: RuntimeError: out of something"  # after two to warm up
    assert len(measured["fails at 4"].times) == 1
    assert not measured["fails at 0"].note
    assert len(measured["fails at 0"].times) == 25
    assert report.rows(scene, [measured["fails at 4"]])[0]["calls"] == 1


def test_inputs_that_cannot_be_made():
    scene = Scene("loss", "1 x 1", "float32", lambda: torch.empty(-1), (fails_at_call(0),))
    (measured,) = last_of(timing.measure(scene, scene.cases, 1.0, lambda name: None))
    assert measured.note.startswith("not measured, no inputs: RuntimeError")


def test_a_peer_that_is_not_installed_says_so():
    def prepare(inputs):
        import no_such_package  # noqa: F401

    scene = Scene("loss", "1 x 1", "float32", lambda: None, (Case("peer", prepare, 1), fails_at_call(0)))
    first, second = report.rows(scene, last_of(timing.measure(scene, scene.cases, 0.01, lambda name: None)))
    assert first["note"] == "not measured: no_such_package is not installed"
    assert second["note"] == ""


def test_a_run_that_is_cut_off_keeps_every_round(tmp_path, capsys, monkeypatch):
    calls = []

    def call():
        calls.append(None)
        if len(calls) == 5:  # after two to warm up and two rounds
            raise KeyboardInterrupt  # SIGINT, which is what a time limit sends

    cases = (fails_at_call(0), Case("cut off", lambda inputs: Call(call), 1))
    scene = Scene("loss", "1 x 1", "float32", lambda: None, cases)
    monkeypatch.setattr(run.cases, "load", lambda group, quick: [scene])
    monkeypatch.setattr(timing, "now", iter(range(10**6)).__next__)  # each call takes a second: three rounds
    table = tmp_path / "out.csv"
    assert run.main(["loss", "--csv", str(table)]) == 130
    rows = list(csv.DictReader(table.open()))
    assert [(row["case"], row["calls"], row["median_ms"]) for row in rows] == [
        ("fails at 0", "2", "1000.0"),
        ("cut off", "2", "1000.0"),
    ]
    said = capsys.readouterr()
    assert "interrupted: the table above holds what was measured until then" in said.err
    assert "fails at 0" in said.out


def test_a_case_that_is_cut_off_before_its_first_round_has_no_figures():
    def interrupt():
        raise KeyboardInterrupt

    scene = Scene("loss", "1 x 1", "float32", lambda: None, (fails_at_call(0), Case("b", lambda x: Call(interrupt), 1)))
    results = timing.measure(scene, scene.cases, 0.01, lambda name: None)
    (row,) = report.rows(scene, next(results))
    assert row["note"] == "not measured: cut off before its first round"
    assert row["median_ms"] == ""
    with pytest.raises(KeyboardInterrupt):
        next(results)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_comes_from_the_environment_or_else_from_git(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    monkeypatch.delenv("MR1FAST_COMMIT", raising=False)
    assert head.startswith(report.commit(tmp_path).rstrip("+"))
    monkeypatch.setenv("MR1FAST_COMMIT", "abc1234")
    assert report.commit(tmp_path) == "abc1234"
    monkeypatch.delenv("MR1FAST_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert report.commit(tmp_path) == ""


def test_two_phase_case_takes_that_path(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "why_not", lambda logits: None)
    monkeypatch.setattr(cases_gpu, "ours", lambda *_: Call(lambda: seen.append(cuda.RowsCall(rate=1.0))))
    cases_gpu.two_phase(SimpleNamespace(logits=None)).run()
    assert [(call.rate, call.two_phase) for call in seen] == [(1, 1)]
    assert cuda.RowsCall().two_phase == 0


@pytest.mark.slow
def test_a_step_beside_trl(tmp_path):
    """The cases see to it themselves that completions have the lengths that they are to have."""
    table = tmp_path / "out.csv"
    assert run.main(["step", "--quick", "--filter", "lognormal", "--csv", str(table)]) == 0
    rows = list(csv.DictReader(table.open()))
    ours = ["mr1fast trainer", "mr1fast --no-share-prefix", "the matrix products alone"]
    assert [row["case"] for row in rows] == [*ours, "trl GRPOTrainer", "GRPODTrainer"]
    for row in rows:
        assert float(row["median_ms"]) > 0, row["note"]
        if row["case"] != "the matrix products alone":
            assert re.match(r"rollout \d+%, .*reference \d+%, policy \d+%, optimizer \d+%$", row["note"])


@pytest.mark.slow
def test_a_step_of_two_processes_beside_one(tmp_path):
    table = tmp_path / "out.csv"
    assert run.main(["scale", "--quick", "--filter", "1 thread", "--csv", str(table)]) == 0
    rows = {row["case"]: row for row in csv.DictReader(table.open())}
    (alone,) = (row for name, row in rows.items() if name.startswith("1 process, 1 thread"))
    (divided,) = (row for name, row in rows.items() if name.startswith("2 processes, 1 thread"))
    assert float(alone["median_ms"]) > 0, alone["note"]
    shares = [int(share) for share in re.findall(r"(\d+)%", divided["note"])]
    assert len(shares) == 2, divided["note"]
    assert all(0 < share < 100 for share in shares)
    assert "computed, not measured: 4.4 GB" in divided["note"]

"""The benchmark runner: results are kept with what they depend on, and a picture never invents a figure."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases_gpu, report, run, steps_2b, timing
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
    assert run.main(["gpu", "--quick", "--csv", str(table), "--plot", str(picture)]) == 0
    assert "not measured: there is no CUDA device" in capsys.readouterr().out
    assert set(texts) == {"not measured: there is no CUDA device"}
    for row in csv.DictReader(table.open()):
        assert row["note"] == "not measured: there is no CUDA device"
        assert row["median_ms"] == row["rate"] == row["ratio"] == ""


@pytest.mark.parametrize("options", [["--filter", "no such case"], ["--device", "cuda"]])
def test_options_that_leave_nothing(options, capsys):
    assert run.main(["loss", *options]) == 2
    assert "--list shows the cases" in capsys.readouterr().err


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


def test_a_case_that_raises_loses_no_other():
    cases = (fails_at_call(1), fails_at_call(4), fails_at_call(0))
    scene = Scene("loss", "1 x 1", "float32", lambda: None, cases)
    measured = {m.case.name: m for m in timing.measure(scene, cases, 1.0, lambda name: None)}
    assert measured["fails at 1"].note == "not measured: RuntimeError: out of something"
    assert not measured["fails at 1"].seconds
    assert measured["fails at 4"].note == "broke off in round 2: RuntimeError: out of something"  # after two to warm up
    assert len(measured["fails at 4"].seconds) == 1
    assert not measured["fails at 0"].note
    assert len(measured["fails at 0"].seconds) == 25
    assert report.rows(scene, [measured["fails at 4"]])[0]["calls"] == 1


def test_inputs_that_cannot_be_made():
    scene = Scene("loss", "1 x 1", "float32", lambda: torch.empty(-1), (fails_at_call(0),))
    (measured,) = timing.measure(scene, scene.cases, 1.0, lambda name: None)
    assert measured.note.startswith("not measured, no inputs: RuntimeError")


def test_a_run_that_is_cut_off_keeps_its_scenes(tmp_path, monkeypatch):
    def measure(scene, *rest):
        if "float32" not in scene.title:
            raise KeyboardInterrupt
        return real(scene, *rest)

    real = timing.measure
    monkeypatch.setattr(timing, "measure", measure)
    table = tmp_path / "out.csv"
    with pytest.raises(KeyboardInterrupt):
        run.main(["loss", "--quick", "--filter", "256 mr1fast buffer", "--csv", str(table)])
    rows = list(csv.DictReader(table.open()))
    assert {row["dtype"] for row in rows} == {"float32"}
    assert all(float(row["median_ms"]) > 0 for row in rows)


def test_no_commit_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.commit() == ""


def test_two_phase_case_takes_that_path(monkeypatch):
    seen = []
    monkeypatch.setattr(cuda, "why_not", lambda logits: None)
    monkeypatch.setattr(cases_gpu, "ours", lambda *_: Call(lambda: seen.append(cuda.RowsCall(temperature=1.0))))
    cases_gpu.two_phase(SimpleNamespace(logits=None)).run()
    assert [(call.temperature, call.two_phase) for call in seen] == [(1, 1)]
    assert cuda.RowsCall().two_phase == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="shown on a CPU")
def test_steps_have_a_gradient(tmp_path, monkeypatch):
    table = tmp_path / "out.csv"
    monkeypatch.setattr(sys, "argv", ["steps_2b", "--tiny", "--length", "4", "--steps", "1", "--csv", str(table)])
    assert steps_2b.main() == 0
    (row,) = csv.DictReader(table.open())
    assert float(row["grad_norm"]) > 0

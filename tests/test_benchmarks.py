"""The benchmark runner: results are kept with what they depend on, and a picture never invents a figure."""

import csv

import pytest
import torch

from benchmarks import run


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

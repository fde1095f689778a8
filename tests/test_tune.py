"""The tuner's bookkeeping: which entries, in which order, and what the file holds after each. Measuring needs a GPU."""

import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists for Linux only")

from benchmarks import tune
from mr1fast.kernels import triton_table
from mr1fast.kernels.triton_table import TABLE


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Runs the tuner with made-up measurements: every entry gets (entry's number, 1, 1); None interrupts it there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    output = tmp_path / "triton_table.py"

    def run(*arguments, stop_at=None):
        seen = []

        def best_of(key, _):
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(key)
            return (len(seen), 1, 1)

        monkeypatch.setattr(tune, "best_of", best_of)
        monkeypatch.setattr(sys, "argv", ["tune", "--output", str(output), *arguments])
        return tune.main(), seen, output

    return run


def table_of(output):
    space = {}
    exec(output.read_text(), space)
    return space["TABLE"], space["__doc__"]


def test_the_filter_chooses_entries_the_largest_first(tuned):
    code, seen, output = tuned("--filter", "loss 16-bit")
    assert code == 0
    assert seen == [("loss", 2, limit) for limit in (262144, 65536, 16384, 1024)]
    table, origin = table_of(output)
    assert {key: table[key] for key in seen} == {key: (number, 1, 1) for number, key in enumerate(seen, 1)}
    assert {key: value for key, value in table.items() if key not in seen} == {
        key: value for key, value in TABLE.items() if key not in seen
    }
    assert list(table) == list(TABLE)
    assert "loss 16-bit 262144" in origin
    assert "measured on a GPU, Triton" in " ".join(origin.split())
    before = triton_table.__doc__.split("\n\n", 1)[1].strip()
    assert f"All others: {before}" in origin


def test_the_whole_table_says_where_it_was_measured(tuned):
    code, seen, output = tuned()
    assert code == 0
    assert sorted(seen) == sorted(TABLE)
    assert table_of(output)[1].split("\n\n")[1].startswith("Measured on a GPU, Triton")


def test_a_run_that_is_cut_off_keeps_its_entries(tuned, capsys):
    code, seen, output = tuned("--filter", "score", stop_at=2)
    assert code == 130
    assert len(seen) == 2
    table, _ = table_of(output)
    assert [table[key] for key in seen] == [(1, 1, 1), (2, 1, 1)]
    assert "10 of 12 entries are as they were" in capsys.readouterr().err


def test_a_filter_that_leaves_nothing(tuned, capsys):
    code, _, output = tuned("--filter", "los 8-bit")
    assert code == 2
    assert not output.exists()
    assert "no entry contains every word of 'los 8-bit'; there are loss 16-bit 1024" in capsys.readouterr().err

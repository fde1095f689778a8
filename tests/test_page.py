"""run.html, and the warnings in it."""

import json
import math

import pytest
from data_files import picture

from mr1fast.data.example import Example
from mr1fast.evaluation.curves import read_run
from mr1fast.training.page import Page
from mr1fast.training.run_folder import RunFolder
from mr1fast.training.scoring import Scored
from mr1fast.training.watch import WARNINGS, WINDOW, warnings

HEALTHY = {
    "reward": lambda step: 0.5 + 0.01 * (step % 7),
    "frac_reward_zero_std": lambda step: 1.0 if step % 3 else 0.9,
    "rewards/format_reward/mean": lambda step: 0.0 if step % 10 else 0.1,
    "completions/clipped_ratio": lambda step: 0.97,
    "kl": lambda step: 0.001 * step,
    "grad_norm": lambda step: 1.0 if step != 39 else 1000.0,  # one outlier is none
    "step_time": lambda step: 90.0,
}
WRONG = {
    "reward": lambda step: 0.5,
    "frac_reward_zero_std": lambda step: 1.0,
    "rewards/format_reward/mean": lambda step: 0.0,
    "completions/clipped_ratio": lambda step: 1.0,
    "kl": lambda step: 0.05 if step <= 20 else 0.9,
    "grad_norm": lambda step: 2.0 if step <= 20 else 30.0,
}


def rows_of(changed=(), steps=40):
    values = HEALTHY | {name: WRONG[name] for name in changed}
    return [{"step": step, **{name: value(step) for name, value in values.items()}} for step in range(1, steps + 1)]


def test_a_healthy_run_has_no_warning():
    assert warnings(rows_of()) == {}
    assert warnings([]) == {}


@pytest.mark.parametrize("metric", [warned.metric for warned in WARNINGS])
def test_each_warning(metric):
    rows = rows_of([metric])
    assert list(warnings(rows)) == [metric]
    assert warnings(rows[: WINDOW - 1]) == {}
    if metric in ("kl", "grad_norm"):  # there is nothing yet to compare with
        assert warnings(rows[-WINDOW - 1 :]) == {}
    rows[0][metric], rows[-1][metric] = math.nan, None  # as one step without numbers, and as metrics.jsonl has it
    assert list(warnings(rows)) == ([] if metric in ("kl", "grad_norm") else [metric])


def test_a_kl_that_grows_from_nearly_nothing_is_no_warning():
    rows = [{"step": step, "kl": 1e-6 if step <= 20 else 1e-2} for step in range(1, 41)]
    assert warnings(rows) == {}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Of a run that has done 39 of 100 steps, written at every step."""
    monkeypatch.setattr("mr1fast.training.page.EVERY", -1.0)
    run = RunFolder(tmp_path / "a <b> run")
    run.path.mkdir()
    rows = rows_of(["reward"])
    run.metrics_file.write_text("".join(json.dumps({"task": "vc", **row}) + "\n" for row in rows))
    page = Page(run, "vc", rows[:-1], total=100)
    page.last = {name: value for name, value in rows[-1].items() if name != "step"}
    page.cost = -1.0
    return page


def scored(completion, image=None, problem="How many?"):
    example = Example(image, problem, "3")
    return Scored(example, completion, {"accuracy_reward": 1.0, "mine": math.nan}, 0.5)


def test_a_page_of_a_run_as_it_goes(page, capsys):
    completions = [scored("<script>alert(1)</script>", picture(3)), scored("", problem="Why <i>?")]
    page.log(40, page.last, completions)
    text = page.run.page.read_text()
    assert "a &lt;b&gt; run" in text
    assert "Step 40 of 100, about 90 min of training left" in text
    assert 'http-equiv="refresh"' in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "Why &lt;i&gt;?" in text
    assert text.count("data:image/jpeg;base64,") == 1
    assert "(nothing)" in text
    assert "The reward was 0.5 in every one of the last steps" in text
    assert f'src="{page.run.curves.name}?' in text
    assert page.run.curves.stat().st_size > 10_000
    assert "warning: step 40, vc, the last 20 steps: the reward was 0.5" in capsys.readouterr().err

    page.log(41, page.last, ())  # what was said is not said again, and the completions stay
    assert capsys.readouterr().err == ""
    assert "&lt;script&gt;" in page.run.page.read_text()
    page.close()
    text = page.run.page.read_text()
    assert "Step 41 of 100" in text
    assert "training is not running" in text
    assert "refresh" not in text


def test_a_long_run_takes_no_more_memory_than_a_short_one(page, monkeypatch):
    """Beside metrics.jsonl, of which only what is drawn is read."""
    page.written = math.inf  # not again
    monkeypatch.setattr("mr1fast.training.page.LOOKED_AT", 50)
    for step in range(40, 120):
        page.log(step, page.last | {"reward": 0.1 * (step % 3)}, ())
    assert [row["step"] for row in page.rows] == list(range(70, 120))
    rows = [{"step": step, "kl": 0.2, "mine": 1.0, "eval/vc/greedy_accuracy": 0.5} for step in range(9)]
    page.run.metrics_file.write_text("".join(json.dumps({"task": "vc", **row}) + "\n" for row in rows))
    [series] = read_run(page.run.path)
    assert series.rows == [{name: value for name, value in row.items() if name != "mine"} for row in rows]


def test_it_takes_little_time(page, monkeypatch):
    """A page that was slow to draw waits longer until the next."""
    page.log(40, page.last, ())
    monkeypatch.setattr(page, "cost", 100.0)
    page.run.page.unlink()
    page.log(41, page.last, ())
    assert not page.run.page.exists()
    page.close()
    assert page.run.page.exists()


def test_before_the_first_step(tmp_path):
    page = Page(RunFolder(tmp_path), "vc", [], total=10)
    page.close()
    assert "Step 0 of 10" in page.run.page.read_text()

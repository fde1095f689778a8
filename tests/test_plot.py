"""curves.png: what is in it, and that nothing a run can leave behind stops it."""

import warnings

import numpy as np
import pytest
from run_files import ODD, not_blank, row, write_run

from mr1fast.evaluation import curves
from mr1fast.evaluation.curves import PANELS, _labels, draw_curves, read_run, smoothed
from mr1fast.plot import main


@pytest.fixture
def drawn(monkeypatch):
    """Collects, for each panel that is drawn, its title and its lines as (x, y), its limits and where it is dashed."""
    panels = {}
    draw = curves._draw_panel

    def spy(axis, panel, series):
        draw(axis, panel, series)
        panels[panel.title] = [np.asarray(line.get_xydata()) for line in axis.lines]
        panels[panel.title + "/limits"] = axis.get_ylim()
        panels[panel.title + "/steps"] = axis.get_xlim()
        panels[panel.title + "/ticks"] = [tick for tick in axis.get_xticks() if 0 <= tick <= axis.get_xlim()[1]]
        panels[panel.title + "/dashed"] = [line.is_dashed() for line in axis.lines]

    monkeypatch.setattr(curves, "_draw_panel", spy)
    return panels


def test_a_whole_run(tmp_path, drawn):
    result = {
        "before": {"vc": {"greedy_accuracy": 0.4}, "gr": {"greedy_accuracy": 0.3}},
        "after": {"vc": {"greedy_accuracy": 0.9}},
        "config": {"method": "grpo-d"},
    }
    rows = [row(step, task) for task in ("vc", "gr") for step in range(1, 21)]
    run = write_run(tmp_path / "run", rows, result)
    assert draw_curves([run], run / "curves.png") == run / "curves.png"
    assert not_blank(run / "curves.png")
    assert [title for title in drawn if "/" not in title] == [p.title for p in PANELS if p.title != "SFT loss"]
    greedy = drawn[PANELS[0].title]
    assert [points.tolist() for points in greedy if len(points) == 1] == [[[0, 40]], [[20, 90]], [[0, 30]]]
    assert sum(points.tolist() == [[5, 50], [10, 50], [15, 50], [20, 50]] for points in greedy) == 2
    assert drawn[PANELS[0].title + "/limits"] == (0, 103)
    accuracy = drawn["Accuracy and format while training"][0]
    np.testing.assert_allclose(accuracy, [[step, 40 + step] for step in range(1, 21)])
    assert _labels(read_run(run)) == [
        "grpo-d, visual counting: 40.0 % right on the test split before training, 90.0 % after",
        "grpo-d, geometry reasoning",
    ]


@pytest.mark.slow
def test_runs_over_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / name, [row(step) for step in range(1, 9)]) for name in ("one", "two", "there/one")]
    assert _labels([s for run in runs[:2] for s in read_run(run)]) == ["one", "two"]
    assert len(set(_labels([s for run in runs for s in read_run(run)]))) == 3
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out == "curves: curves.png\n"
    assert not_blank(tmp_path / "curves.png")
    assert main([str(runs[0])]) == 0
    assert not_blank(runs[0] / "curves.png")
    assert main([str(runs[0]), "--output", str(tmp_path / "new" / "a.svg")]) == 0
    assert b"<svg" in (tmp_path / "new" / "a.svg").read_bytes()


def test_lines_that_coincide_are_both_seen(tmp_path, drawn):
    run = write_run(tmp_path / "run", [row(step, task) for task in ("vc", "gr", "other") for step in (1, 2, 3)])
    draw_curves([run], tmp_path / "a.png")
    assert drawn["KL weight β/dashed"] == [False, True, True]
    assert len({curves._dashes(style, index) for style in "-:" for index in range(3)}) == 6


def test_sft_has_a_loss_of_its_own(tmp_path, drawn):
    config = {"config": {"method": "sft"}}
    sft = write_run(tmp_path / "sft", [{"task": "vc", "step": step, "loss": 2.0} for step in (1, 2)], config)
    grpo = write_run(tmp_path / "grpo", [row(step) for step in (1, 2)])
    draw_curves([sft, grpo], tmp_path / "a.png")
    assert drawn["SFT loss"][-1].tolist() == [[1, 2], [2, 2]]
    np.testing.assert_allclose(drawn["GRPO loss"][-1], [[1, -0.1], [2, -0.1]])


def test_only_panels_with_data_are_drawn(tmp_path, drawn):
    run = write_run(tmp_path / "sft", [{"task": "vc", "step": step, "loss": 1 / step} for step in (1, 2)])
    draw_curves([run], tmp_path / "a.png")
    assert [title for title in drawn if "/" not in title] == ["GRPO loss"]


@pytest.mark.parametrize("steps", [1, 3, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_length_of_run(tmp_path, drawn, steps):
    run = write_run(tmp_path / "run", [row(step) for step in range(1, steps + 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves([run], tmp_path / "a.png")
    assert len(drawn["Reward"][-1]) == steps
    left, right = drawn["Reward/steps"]
    assert -0.1 * steps < left <= 0 < steps <= right < 1.1 * steps
    assert all(float(tick).is_integer() for tick in drawn["Reward/ticks"])


def test_what_a_broken_run_leaves_behind(tmp_path, drawn):
    run = write_run(
        tmp_path / "run",
        [
            row(1),
            row(2, loss=float("nan"), kl=float("inf")),
            row(3, reward=None, entropy="?"),
            row(4),
            row(4, reward=5.0),
        ],
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"task": "vc"}\n{"task": "vc", "step": 5, "rew')
    (run / "result.json").write_text("{")
    draw_curves([run], tmp_path / "a.png")
    np.testing.assert_allclose(drawn["Reward"][-1], [[1, 0.9], [2, 0.9], [4, 5.0]])
    assert drawn["GRPO loss"][-1][:, 0].tolist() == [1, 3, 4]
    assert drawn["KL divergence from the base"][-1][:, 0].tolist() == [1, 3, 4]


def test_an_outlier_does_not_flatten_the_rest(tmp_path, drawn):
    run = write_run(tmp_path / "run", [row(step, step_time=60.0 if step == 1 else 0.3) for step in range(1, 101)])
    draw_curves([run], tmp_path / "a.png")
    bottom, top = drawn["Step time/limits"]
    assert bottom == 0
    assert top < 30


def test_smoothing():
    noisy = 5 + np.random.default_rng(0).normal(size=400)
    assert smoothed(noisy).shape == (400,)
    assert smoothed(noisy).std() < 0.4 * noisy.std()
    for n in (1, 3, 10, 400):
        np.testing.assert_allclose(smoothed(np.full(n, 3.0)), 3.0)
    # A step function is crossed where it is: the average looks both ways.
    assert smoothed(np.repeat([0.0, 1.0], 100))[99:101].mean() == pytest.approx(0.5)


MISTAKES = [
    (["nowhere"], "run folder 'nowhere' does not exist"),
    (["."], "'.' is not a run: it has no metrics.jsonl"),
    (["empty"], "has no training step in it yet"),
    (["odd"], "there is no metric to draw"),
    (["good", "--output", "a.txt"], "--output must be a .png, .pdf or .svg file, got 'a.txt'"),
    (["good", "--output", "good/metrics.jsonl/a.png"], "cannot be written"),
    (["good", "--ouput", "a.png"], "unknown option --ouput (did you mean '--output'?)"),
    ([], "the following arguments are required: RUN"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) or "nothing" for a, _ in MISTAKES])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", [])
    write_run(tmp_path / "odd", [{"task": "vc", "step": 1, "other": 1.0}])
    write_run(tmp_path / "good", [row(1)])
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_no_text_number_or_setting_stops_curves(tmp_path, hostile_settings):
    rows = [row(1, ODD), row(2, ODD, reward=10**400, kl=1e300, loss=-(10**350)), row(3, "$\\frac{$", step_time=True)]
    runs = [
        write_run(tmp_path / name, rows, result)
        for name, result in (("$a_{$ 每个", []), ("_b", {"config": {"method": "$x^$"}}))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not_blank(draw_curves(runs, tmp_path / "a.png"))

"""Pictures: what is in them, and that nothing a run can leave behind stops them."""

import json
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from data_files import as_jsonl, encoded
from data_files import row as data_row
from PIL import Image

from mr1fast.data.dataset import load_split
from mr1fast.data.example import Example
from mr1fast.evaluation import curves, samples
from mr1fast.evaluation.curves import PANELS, _labels, draw_curves, read_run, smoothed
from mr1fast.evaluation.result import Answered
from mr1fast.evaluation.samples import BeforeAfter, before_and_after, clipped, draw_samples
from mr1fast.model.load import load_model, load_processor
from mr1fast.options.config import TrainConfig
from mr1fast.plot import main
from mr1fast.training import loop
from mr1fast.training.run_folder import RunFolder


def row(step, task="vc", **changes):
    metrics = {
        "rewards/accuracy_reward/mean": 0.4 + step / 100,
        "rewards/format_reward/mean": 1.0,
        "reward": 0.9,
        "kl": 0.01 * step,
        "beta": 0.04,
        "entropy": 0.5,
        "completions/mean_length": 12.0,
        "loss": -0.1,
        "step_time": 0.3,
    }
    if step % 5 == 0:
        metrics |= {f"eval/{task}/greedy_accuracy": 0.5, f"eval/{task}/sampled_accuracy": 0.4}
    return {"task": task, "step": step, **metrics, **changes}


def write_run(folder, rows, result=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """Collects, for each panel that is drawn, its title and its lines as (x, y), its limits and where it is dashed."""
    panels = {}
    draw = curves._draw_panel

    def spy(axis, panel, series):
        draw(axis, panel, series)
        panels[panel.title] = [np.asarray(line.get_xydata()) for line in axis.lines]
        panels[panel.title + "/limits"] = axis.get_ylim()
        panels[panel.title + "/dashed"] = [line.is_dashed() for line in axis.lines]

    monkeypatch.setattr(curves, "_draw_panel", spy)
    return panels


def not_blank(file):
    return len(np.unique(np.asarray(Image.open(file).convert("L")))) > 10


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


@pytest.mark.parametrize("steps", [1, 3, 3000])
def test_any_length_of_run(tmp_path, drawn, steps):
    run = write_run(tmp_path / "run", [row(step) for step in range(1, steps + 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves([run], tmp_path / "a.png")
    assert len(drawn["Reward"][-1]) == steps


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
    (["."], "'.' is no run: it has no metrics.jsonl"),
    (["empty"], "has no step in it yet"),
    (["odd"], "no metric that could be drawn"),
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


# ---- samples --------------------------------------------------------------------------------------------------------


def test_both_models_answer_the_same_problems():
    base, processor = load_model(), load_processor()
    broken = load_model()
    broken.lm_head.weight.data.mul_(-1)
    dataset = load_split("vc", "test", count=3)
    examples = [dataset[i] for i in range(3)]
    shown = before_and_after(base, broken, processor, examples, max_completion_length=16)
    assert [one.example for one in shown] == examples
    assert [one.before.solution for one in shown] == [example.solution for example in examples]
    assert all(one.before.answer is not None for one in shown)
    assert all(one.after.answer is None and not one.after.correct for one in shown)


def setup_of(folder, tests, **config):
    """As much of the training loop's setup as pictures need."""
    write_run(folder, [row(1)])
    for name in tests:
        (folder / name / "model").mkdir(parents=True)
    model = load_model()
    return SimpleNamespace(
        config=TrainConfig(**config, max_completion_length=4),
        folder=RunFolder(folder),
        names=list(tests),
        load=lambda folder: model,
        tests=tests,
        base=model,
        processor=load_processor(),
    )


def test_pictures_of_a_run(tmp_path):
    loop.draw_pictures(setup_of(tmp_path / "run", {"vc": load_split("vc", "test", count=2)}, task="vc"))
    assert not_blank(tmp_path / "run" / "curves.png")
    assert not_blank(tmp_path / "run" / "samples.png")


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (curves, "draw_curves", OSError("No space left on device")),
        (samples, "before_and_after", RuntimeError("out of memory")),
        (samples, "draw_samples", KeyError("x")),
    ],
)
def test_a_run_is_not_lost_for_a_picture(tmp_path, monkeypatch, capsys, module, function, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(module, function, fails)
    loop.draw_pictures(setup_of(tmp_path / "run", {"vc": load_split("vc", "test", count=2)}, task="vc"))
    assert capsys.readouterr().err.endswith(f"no pictures: {error}\n")
    assert (tmp_path / "run" / "curves.png").exists() == (module is not curves)


def shown(number, **changes):
    example = Example(
        Image.new("RGB", (56, 56), (30 * number, 90, 90)), "How many $x_1$ \\frac{?", "4", f"row {number}"
    )
    arguments = {"index": number, "name": "", "problem": "", "solution": "4", "sampled_correct": (), "formatted": True}
    after = Answered(**arguments, completion="<answer>4</answer>", answer="4", correct=True)
    before = Answered(**arguments, completion=changes.pop("completion", ""), answer=None, correct=False)
    return BeforeAfter(Example(**{**vars(example), **changes}), before, after)


@pytest.mark.parametrize("number", [1, 3, 12])
def test_samples_are_drawn(tmp_path, number):
    file = draw_samples(tmp_path / "vc" / "samples.png", [shown(n) for n in range(number)], "a $title_$")
    pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
    for colour in ((26, 127, 55), (207, 34, 46)):  # right, wrong
        assert (np.abs(pixels.astype(int) - colour).max(1) < 8).sum() > 100
    assert (pixels == (0, 90, 90)).all(1).sum() > 5000  # the first image


def test_samples_with_odd_texts_and_images(tmp_path):
    odd = [
        shown(0, problem="每个三角形 " * 40, completion="word " * 500),
        shown(1, problem="x" * 500, solution="y" * 300),
        shown(2, image=Image.new("RGB", (3000, 40))),
        shown(3, image=None, problem=""),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not_blank(draw_samples(tmp_path / "samples.png", odd, "odd"))


ODD = "\ud83d\0\x1b[31m $a_{$ $\\frac$ \u202e\u2028\x85\U000e0001\U0010ffff\ufeff 每个 مرحبا 🙂 \udcff" + "́" * 200


@pytest.fixture
def hostile_settings(tmp_path, monkeypatch):
    """A user's matplotlibrc that no picture could be drawn with here."""
    matplotlib.rcParams.update({"text.usetex": True, "font.family": "No Such Font", "savefig.dpi": 1e6})
    yield
    matplotlib.rcdefaults()


def test_no_text_image_or_setting_stops_samples(tmp_path, hostile_settings):
    lost = Image.new("RGB", (6, 4))
    lost.convert = None
    odd = [
        shown(0, problem=ODD, solution=ODD, completion=ODD, name=ODD),
        shown(1, problem="x" * 1_000_000, completion=" ".join("abc" * 100_000)),
        shown(2, image=lost),
        shown(3, image=Image.new("F", (9, 9))),
        shown(4, image=Image.new("RGBA", (1, 3000))),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not_blank(draw_samples(tmp_path / "samples.png", odd, ODD))


def test_no_text_number_or_setting_stops_curves(tmp_path, hostile_settings):
    rows = [row(1, ODD), row(2, ODD, reward=10**400, kl=1e300, loss=-(10**350)), row(3, "$\\frac{$", step_time=True)]
    runs = [
        write_run(tmp_path / name, rows, result)
        for name, result in (("$a_{$ 每个", []), ("_b", {"config": {"method": "$x^$"}}))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not_blank(draw_curves(runs, tmp_path / "a.png"))


def test_samples_show_each_picture_with_its_own_answer(folder):
    """Also where an image breaks: no problem is shown twice, none with the answer to another."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    (folder / "1.png").write_bytes(encoded(noise, "JPEG")[:1500])
    (folder / "4.png").write_bytes((folder / "1.png").read_bytes())
    dataset = load_split(as_jsonl(folder, [data_row(n) for n in range(8)]), "all")
    setup = setup_of(folder / "run", {"data": dataset}, data="somewhere")
    pairs, _ = loop._samples(setup)
    assert [one.example.solution for one in pairs] == ["0", "2", "3", "5", "6", "7"]
    for one in pairs:
        assert one.example.image.getpixel((0, 0))[0] == int(one.example.solution)
        assert one.before.problem == one.after.problem == one.example.problem == f"question {one.example.solution}?"


def test_clipped():
    assert clipped("one two three", 2, 7) == "one two\nthree"
    assert clipped("one two three four five", 2, 7) == "one two\nthree…"
    assert clipped("", 2, 7) == ""
    assert clipped("abcdefghijkl", 1, 6) == "abcde…"

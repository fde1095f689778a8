"""samples.png: each picture with its own answers, whatever is in them; and no run is lost for it."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from data_files import as_jsonl, encoded
from data_files import row as data_row
from PIL import Image
from run_files import ODD, not_blank, row, write_run

from mr1fast.data.dataset import load_split
from mr1fast.data.example import Example
from mr1fast.evaluation import curves, samples
from mr1fast.evaluation.result import Answered
from mr1fast.evaluation.samples import BeforeAfter, before_and_after, clipped, draw_samples
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training import loop
from mr1fast.training.run_folder import RunFolder


def test_both_models_answer_the_same_problems():
    base, broken = (Policy(load_model(), load_processor()) for _ in range(2))
    broken.head_weight.data.mul_(-1)
    dataset = load_split("vc", "test", count=3)
    examples = [dataset[i] for i in range(3)]
    shown = before_and_after(base, broken, examples, max_completion_length=16)
    assert [one.example for one in shown] == examples
    assert [one.before.solution for one in shown] == [example.solution for example in examples]
    assert all(one.before.answer is not None for one in shown)
    assert all(one.after.answer is None and not one.after.correct for one in shown)


def setup_of(folder, tests, **config):
    """As much of the training loop's setup as pictures need."""
    write_run(folder, [row(1)])
    for name in tests:
        (folder / name / "model").mkdir(parents=True)
    policy = Policy(load_model(), load_processor())
    return SimpleNamespace(
        config=TrainConfig(**config, max_completion_length=4),
        folder=RunFolder(folder),
        names=list(tests),
        load=lambda folder: policy,
        tests=tests,
        base=policy,
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
    assert capsys.readouterr().err.endswith(f"the pictures could not be drawn: {error}\n")
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


def test_samples_show_several_images_side_by_side_and_none_as_text_only(tmp_path):
    colours = [(200, 90, 90), (90, 200, 90), (90, 90, 200), (9, 9, 9)]
    first, *others = (Image.new("RGB", (56, 56), colour) for colour in colours)
    several = shown(1, image=first, more_images=tuple(others))
    file = draw_samples(tmp_path / "samples.png", [several, shown(2, image=None)], "a title")
    pixels = np.asarray(Image.open(file).convert("RGB"))
    where = [np.argwhere((pixels == colour).all(2)) for colour in colours]
    assert [len(found) > 500 for found in where] == [True, True, True, False]  # there is room for three
    lefts = [found[:, 1].min() for found in where[:3]]
    assert lefts == sorted(lefts)


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

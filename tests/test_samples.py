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
from mr1fast.evaluation import curves, drawing, samples
from mr1fast.evaluation.drawing import clipped, drawable
from mr1fast.evaluation.evaluate import _judged, evaluate
from mr1fast.evaluation.result import Answered
from mr1fast.evaluation.samples import BeforeAfter, draw_samples
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.options.config import TrainConfig
from mr1fast.training import pictures
from mr1fast.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model(), load_processor())


def setup_of(folder, tests, policy, *, trained=True, **config):
    """As much of the training loop's setup as pictures need, with answers to the first problems."""
    write_run(folder, [row(1)])
    run = RunFolder(folder)
    for name, test in tests.items():
        for when in ("before training", *([f"trained on {name}"] if trained else [])):
            file = run.answers(when) / f"{name}.jsonl"
            evaluate(policy, test, max_completion_length=2 if when == "before training" else 24, sampled=0, file=file)
    config = TrainConfig(**config, max_completion_length=24, max_steps=200)
    return SimpleNamespace(config=config, folder=run, names=list(tests), tests=tests)


def test_pictures_of_a_run(tmp_path, policy):
    """Drawn from the answers of its evaluations, without a model."""
    setup = setup_of(tmp_path / "run", {"vc": load_split("vc", "test", count=9)}, policy, task="vc")
    pictures.draw_pictures(setup)
    assert not_blank(tmp_path / "run" / "curves.png")
    assert not_blank(tmp_path / "run" / "samples.png")
    pairs, title = pictures.samples(setup)
    assert title == "Visual counting, trained with grpo-d"
    assert [one.example.solution for one in pairs] == [setup.tests["vc"][i].solution for i in range(8)]
    assert [one.before.index for one in pairs] == [one.after.index for one in pairs] == list(range(8))
    assert {one.when for one in pairs} == {"after training"}
    assert all(one.before.answer is None and one.after.answer is not None for one in pairs)


def test_a_stopped_run_says_after_how_many_steps(tmp_path, policy):
    setup = setup_of(tmp_path / "run", {"vc": load_split("vc", "test", count=2)}, policy, trained=False, task="vc")
    assert pictures.samples(setup)[0] == []
    pairs, title = pictures.samples(setup, pictures.Unfinished("vc", policy, 37))
    assert title == "Visual counting (after 37 steps of 200), trained with grpo-d"
    assert {one.when for one in pairs} == {"after 37 steps"}
    assert all(one.before.answer is None and one.after.answer is not None for one in pairs)
    texts = [text.text for text in samples._paragraphs(pairs[0])]
    assert any("before training: no answer in tags" in text for text in texts)
    assert any(f"after 37 steps: {pairs[0].after.answer}" in text for text in texts)


@pytest.mark.parametrize(
    ("module", "function", "error"),
    [
        (curves, "draw_curves", OSError("No space left on device")),
        (pictures, "samples", RuntimeError("out of memory")),
        (samples, "draw_samples", KeyError("x")),
    ],
)
def test_a_run_is_not_lost_for_a_picture(tmp_path, policy, monkeypatch, capsys, module, function, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(module, function, fails)
    setup = setup_of(tmp_path / "run", {"vc": load_split("vc", "test", count=2)}, policy, task="vc")
    capsys.readouterr()
    pictures.draw_pictures(setup)
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


def test_samples_show_each_picture_with_its_own_answer(folder, policy):
    """Also where an image breaks: no problem is shown twice, none with the answer to another."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    (folder / "1.png").write_bytes(encoded(noise, "JPEG")[:1500])
    (folder / "4.png").write_bytes((folder / "1.png").read_bytes())
    dataset = load_split(as_jsonl(folder, [data_row(n) for n in range(8)]), "all")
    setup = setup_of(folder / "run", {dataset.name: dataset}, policy, data="somewhere")
    pairs, _ = pictures.samples(setup)
    assert [one.example.solution for one in pairs] == ["0", "2", "3", "5", "6", "7"]
    for one in pairs:
        assert one.example.image.getpixel((0, 0))[0] == int(one.example.solution)
        assert one.before.problem == one.after.problem == one.example.problem == f"question {one.example.solution}?"


@pytest.mark.parametrize(
    ("completion", "state"),
    [
        ("<think>4</think><answer>4</answer>", "✓"),
        ("The picture shows\n4", "(✓)"),
        ("There are 4 items.", "(✓)"),
        ("There are 5 items.", "✗"),
        ("4 cubes and 1 ball are there.", "✗"),
        ("<think>4</think><answer>5</answer>", "✗"),
        ("<answer>4", "(✓)"),
        ("3 items and 1 more, so 4", "(✓)"),
        ("4 items, so 5", "✗"),
        ("", "✗"),
    ],
)
def test_right_wrong_and_untagged_are_apart(completion, state):
    problem = Example(None, "How many?", "4")
    one = _judged(0, problem, completion, [])
    (line,) = (text for text in samples._paragraphs(BeforeAfter(problem, one, one)) if "after training" in text.text)
    assert line.text.startswith(f"{state} after")
    assert line.colour == {"✓": samples.RIGHT, "✗": samples.WRONG, "(✓)": samples.UNTAGGED}[state][1]


CHINESE = "每个三角形的内角和是一百八十度"


def missing_glyphs(file, shown):
    """The warnings about them while this is drawn."""
    with warnings.catch_warnings(record=True) as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing.warnings, "filterwarnings", lambda *_, **__: None)
        warnings.simplefilter("always")
        draw_samples(file, shown, CHINESE)
    return [one for one in found if "missing" in str(one.message)]


def test_no_character_becomes_a_box(tmp_path, capsys, monkeypatch):
    """Where no font has it, it is escaped, which is said once."""
    monkeypatch.setattr(drawing, "CJK_FONTS", ())
    for cached in (drawing._families, drawing._glyphs, drawing._drawn, drawing._say_no_font):
        cached.cache_clear()
    text = f"{CHINESE}，<b> 🙂"
    assert drawable(text) == CHINESE.encode("ascii", "backslashreplace").decode() + ",<b> \\U0001f642"
    assert missing_glyphs(tmp_path / "a.png", [shown(0, problem=text, completion=text)]) == []
    error = capsys.readouterr().err
    assert error.count("install one such as Noto Sans CJK") == error.count("\n") == 1


def test_a_font_that_is_installed_helps_out(tmp_path, capsys, monkeypatch):
    """STIX, which matplotlib brings with it, stands for a Chinese font: another font lacks one of its symbols."""
    symbol = "\u2a80"
    monkeypatch.setattr(drawing, "FONT", "DejaVu Serif Display")
    monkeypatch.setattr(drawing, "CJK_FONTS", ("No Such Font", "STIXGeneral", "DejaVu Sans"))
    for cached in (drawing._families, drawing._glyphs, drawing._drawn):
        cached.cache_clear()
    assert drawing._families() == ["DejaVu Serif Display", "STIXGeneral"]
    assert drawable(symbol) == symbol
    for cached in (drawing._families, drawing._glyphs, drawing._drawn):
        cached.cache_clear()


def test_clipped():
    assert clipped("one two three", 2, 7) == "one two\nthree"
    assert clipped("one two three four five", 2, 7) == "one two\nthree…"
    assert clipped("", 2, 7) == ""
    assert clipped("abcdefghijkl", 1, 6) == "abcde…"


def test_text_without_spaces_is_broken_by_its_width(monkeypatch):
    monkeypatch.setattr(drawing, "_drawn", lambda character: character)  # as if there were a font
    assert clipped(CHINESE, 9, 10) == "每个三角形\n的内角和是\n一百八十度"
    assert clipped(CHINESE, 2, 11) == "每个三角形\n的内角和是…"
    assert clipped("∠A 每个三角", 9, 8) == "∠A 每个\n三角"
    monkeypatch.setattr(drawing, "_drawn", lambda character: character if character < "每" else "\\u6bcf")
    assert clipped("ab 每每c", 9, 10) == "ab 每\n每c"

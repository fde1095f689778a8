"""report.html: everything is on it, nothing comes from elsewhere, and nothing stops it."""

import base64
import io
import re

import pytest
from jinja2 import UndefinedError
from PIL import Image
from report_page import SETTINGS, Page, answered

from mr1fast.data.dataset import load_split
from mr1fast.data.example import Example
from mr1fast.evaluation.evaluate import _judged
from mr1fast.evaluation.report import write_report
from mr1fast.evaluation.result import EvalResult

HOSTILE = '<script>alert("1")</script><img src=http://example.org/x> & </div>'


def test_page_shows_every_mistake_and_nothing_from_elsewhere(tmp_path):
    images = [
        Image.new("RGB", (6, 4), (10, 20, 30)),
        Image.new("RGB", (2000, 1000), (200, 20, 30)),
        Image.new("RGB", (6, 4), (1, 2, 3)),
    ]
    examples = [Example(image, HOSTILE, "4", HOSTILE) for image in images]
    found = [
        answered("4", HOSTILE, 0, problem=HOSTILE, completion=HOSTILE, name=HOSTILE),
        answered(HOSTILE, None, 1, completion="", formatted=False),
        answered("4", "4", 2),
    ]
    file = write_report(tmp_path / "report.html", EvalResult.of(found), SETTINGS, examples)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert page.text.count(HOSTILE) == 6  # problem, answer, completion, name; truth; and one in the table by answer
    assert "Wrong answers (2)" in page.text
    assert "no answer in tags" in page.text
    csp = re.search('<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text).group(1)
    assert csp == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "not well formed" in page.text
    assert all(source.startswith("data:image/") for source in page.images)
    shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.images]
    assert [image.size for image in shown] == [(6, 4), (480, 240), (6, 4)]
    assert shown[0].getpixel((0, 0)) == (10, 20, 30)
    assert len(re.findall('class="problem wrong"', text)) == 2


def test_page_shows_all_images_of_a_problem_in_order(tmp_path):
    first, *others = (Image.new("RGB", (6, 4), (shade, 2, 3)) for shade in (10, 20, 30))
    examples = [Example(first, "?", "4", more_images=tuple(others)), Example(None, "?", "4")]
    found = [answered("4", "5", 0), answered("4", "5", 1)]
    page = Page(write_report(tmp_path / "r.html", EvalResult.of(found), SETTINGS, examples).read_text("utf-8"))
    shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.images]
    assert [image.getpixel((0, 0))[0] for image in shown] == [10, 20, 30]
    assert page.text.count("(no image)") == 1


def test_right_but_untagged_answers_are_a_gallery_of_their_own(tmp_path):
    problem = Example(None, "How many?", "4")
    texts = ["<think>4</think><answer>4</answer>", "4", "5", "There are 4."]
    found = [_judged(index, problem, text, []) for index, text in enumerate(texts)]
    result = EvalResult.of(found)
    assert (result.greedy_accuracy, result.accuracy_when_formatted) == (0.25, 1.0)
    assert result.anyhow_accuracy == 0.75  # where alone they count
    text = write_report(tmp_path / "r.html", result, SETTINGS, [problem] * 4).read_text(encoding="utf-8")
    titles = re.findall("<h2>(.*answers? .*|Wrong.*|Right.*)</h2>", text)
    assert titles == [
        "Wrong answers (1)",
        "Right, but not in answer tags: counted as wrong (2)",
        "Right answers, for comparison (1)",
    ]
    assert re.findall('class="problem (.*?)"', text) == ["wrong", "untagged", "untagged", "right"]


def test_nothing_stops_the_page(tmp_path, broken, folder):
    """Images that are not there or have broken since, and texts that no encoding takes."""
    gone = Image.new("RGB", (6, 4))
    gone.load = gone.convert = None
    examples = [Example(gone, "?", "4"), Example(None, "?", "4"), Example(Image.new("F", (9, 9)), "?", "4")]
    examples += [Example(Image.new(mode, (300, 200)), "?", "4") for mode in ("RGBA", "I;16", "CMYK", "1", "LA")]
    odd = "\ud83d \0 \x1b[31m \u202e ]]> <!-- {{ 1 }} {% raw %} 每个 " + "x" * 100_000
    found = [answered("4", odd, i, problem=odd, completion=odd, name=odd) for i in range(len(examples))]
    settings = SETTINGS | {"model": "name \udcff"}
    page = Page(write_report(tmp_path / "r.html", EvalResult.of(found), settings, examples).read_text("utf-8"))
    assert len(page.images) == 6
    assert page.text.count("(no image)") == 2
    assert "{{ 1 }} {% raw %} 每个" in page.text
    # A row whose image breaks after it was asked does not get the image of another row.
    dataset = load_split(broken, "all")
    (folder / "0.png").write_bytes((folder / "1.jpg").read_bytes())
    found = [answered("0", "7", 0), answered("2", "7", 2)]
    page = Page(write_report(tmp_path / "r.html", EvalResult.of(found), SETTINGS, dataset).read_text("utf-8"))
    (image,) = page.images
    assert Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).getpixel((0, 0)) == (2, 50, 90)


def test_a_name_that_the_page_does_not_have_is_an_error(tmp_path):
    settings = {name: value for name, value in SETTINGS.items() if name != "model"}
    result = EvalResult.of([answered("4", "4")])
    with pytest.raises(UndefinedError, match="model"):
        write_report(tmp_path / "r.html", result, settings, load_split("vc", "test"))


def test_page_of_a_perfect_model(tmp_path):
    file = write_report(
        tmp_path / "r.html", EvalResult.of([answered("4", "4")]), SETTINGS, load_split("vc", "test", count=1)
    )
    text = Page(file.read_text(encoding="utf-8")).text
    assert "Wrong answers" not in text
    assert "100.0 %" in text

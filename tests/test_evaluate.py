"""Evaluation: the figures, the page with the mistakes, and the program."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from data_files import encoded, row, write_jsonl
from jinja2 import UndefinedError
from PIL import Image

from mr1fast.data.dataset import load_split, problems
from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluate import main
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.figures import answer_rows
from mr1fast.evaluation.report import write_report
from mr1fast.evaluation.result import Answered, EvalResult, wilson_interval
from mr1fast.evaluation.terminal import evaluation_table
from mr1fast.model.load import encode_prompts, load_model, load_processor
from mr1fast.rewards import accuracy_reward, format_reward

SETTINGS = {"data": "vc", "split": "test", "model": "a <b> model", "sampled": 1, "temperature": 1.0}


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def processor():
    return load_processor()


@pytest.fixture(scope="module")
def dataset():
    return load_split("vc", "validation", count=20)


@pytest.fixture(scope="module")
def result(model, processor, dataset):
    return evaluate(model, processor, dataset, max_completion_length=24, sampled=3, batch_size=8)


# ---- evaluate -------------------------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_transformers(model, processor, dataset, result):
    texts = []
    for index in range(4):
        inputs = encode_prompts(processor, [dataset[index]])
        ids = model.eval().generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(ids[ids != model.generation_config.eos_token_id]))
    assert [one.completion for one in result.answered[:4]] == texts


def test_figures_are_means_of_rewards(result, dataset):
    assert [one.index for one in result.answered] == list(range(20))
    assert [one.solution for one in result.answered] == [dataset[i].solution for i in range(20)]
    correct = [accuracy_reward(s.completion, s.solution) for s in result.answered]
    formatted = [format_reward(s.completion) for s in result.answered]
    assert result.n == 20
    assert result.greedy_accuracy == pytest.approx(sum(correct) / 20)
    assert result.format_accuracy == pytest.approx(sum(formatted) / 20)
    both = sum(a * b for a, b in zip(correct, formatted))
    assert result.accuracy_when_formatted == pytest.approx(both / sum(formatted))
    assert all(len(s.sampled_correct) == 3 for s in result.answered)
    assert result.sampled_accuracy == pytest.approx(sum(sum(s.sampled_correct) for s in result.answered) / 60)
    assert 0 < result.greedy_accuracy < 1, "the embedded model is neither hopeless nor perfect"


def test_depends_on_the_seed_alone_and_leaves_no_trace(model, processor, dataset, result, capsys):
    for training in (True, False):
        model.train(training)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        again = evaluate(
            model, processor, dataset, max_completion_length=24, sampled=3, batch_size=8, progress="bar", seed=0
        )
        assert again == result
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training is training
        assert capsys.readouterr().err.startswith("\rbar:   0%|          | 0/80 ")
    other = evaluate(model, processor, dataset, max_completion_length=24, sampled=3, batch_size=20, seed=1)
    assert [s.completion for s in other.answered] == [s.completion for s in result.answered]
    assert other.answered != result.answered


def test_without_samples_there_is_no_sampled_accuracy(model, processor, dataset):
    result = evaluate(model, processor, dataset, max_completion_length=2, sampled=0)
    assert math.isnan(result.sampled_accuracy)
    assert "sampled_accuracy" not in result.figures()
    assert result.format_accuracy == result.accuracy_when_formatted == 0
    assert "sampled" not in evaluation_table(result, SETTINGS)


def test_problems_are_told_apart_by_their_index(model, processor, dataset):
    """Not by their names, which they need not have, nor by what is asked."""
    examples = [Example(dataset[i].image, dataset[i].problem, dataset[i].solution) for i in (0, 1, 2, 1, 0)]
    result = evaluate(model, processor, examples, max_completion_length=24, sampled=1, batch_size=2)
    assert [one.index for one in result.answered] == [0, 1, 2, 3, 4]
    assert result.n == 5
    assert result.answered[0].completion == result.answered[4].completion


@pytest.fixture
def broken(folder):
    """Ten rows, of which those with an odd number have an image that breaks only when it is decoded."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    rows = [row(n) for n in range(10)]
    for number in range(1, 10, 2):
        rows[number]["image"] = f"{number}.jpg"
        (folder / f"{number}.jpg").write_bytes(encoded(noise, "JPEG")[:1500])
    return write_jsonl(folder / "data.jsonl", rows)


def test_a_problem_whose_image_breaks_is_not_asked_and_no_other_twice(model, processor, broken):
    result = evaluate(model, processor, load_split(broken, "all"), max_completion_length=4, sampled=0, batch_size=3)
    assert [(one.index, one.solution) for one in result.answered] == [(n, str(n)) for n in range(0, 10, 2)]
    assert result.n == 5


def test_without_any_problem_there_is_one_sentence(model, processor, broken):
    for number in range(0, 10, 2):
        (broken.parent / f"{number}.png").write_bytes((broken.parent / "1.jpg").read_bytes())
    with pytest.raises(UserError, match="there is no problem with an image that can be decoded"):
        evaluate(model, processor, load_split(broken, "all"), max_completion_length=4)


def test_the_test_split_of_gr_has_200_problems(processor):
    """Not 400: each would come twice, in two drawings, and the interval be too narrow."""
    assert len({tuple(sorted(TASKS["gr"].triangle("test", i).angles)) for i in range(200)}) == 200
    assert len(list(problems(load_split("gr", "test", count=400)))) == 200
    assert len(list(problems(load_split("vc", "test", count=400)))) == 400


@pytest.mark.parametrize(("accuracy", "n"), [(0.0, 10), (1.0, 10), (0.5, 1), (0.4, 400), (0.97, 30)])
def test_wilson_interval_is_where_the_observation_is_z_deviations_away(accuracy, n):
    for bound, at_edge in zip(wilson_interval(accuracy, n), (accuracy == 0, accuracy == 1)):
        if at_edge:
            assert bound == pytest.approx(accuracy, abs=1e-12)
        else:
            assert abs(accuracy - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def answered(solution, answer, index=0, **changes):
    completion = f"<think></think><answer>{answer}</answer>"
    made = Answered(index, f"row {index}", "How many?", solution, completion, answer, solution == answer, True, (True,))
    return replace(made, **changes)


def test_accuracy_by_answer():
    few = EvalResult.of(
        [answered("10", "10"), answered("2", "3"), answered("2", "2"), answered("2", "3"), answered("b", "a")]
    )
    assert few.by_answer() == {"2": (1, 3), "10": (1, 1), "b": (0, 1)}
    assert answer_rows(few) == [("2", 1, 3), ("10", 1, 1), ("b", 0, 1)]
    assert few.confusions() == [("2", "3", 2)]
    numbers = EvalResult.of([answered(str(n), "4") for n in range(32)])
    assert answer_rows(numbers)[:2] == [("0 to 3", 0, 4), ("4 to 7", 1, 4)]
    assert sum(n for _, _, n in answer_rows(numbers)) == 32
    words = EvalResult.of([answered(letter, "a") for letter in "aaabcdefghijklmnop"])
    assert answer_rows(words)[0] == ("a", 3, 3)
    assert answer_rows(words)[-1] == ("5 others", 0, 5)


# ---- the page -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in order; collects images and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.images, self.text = [], set(), [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


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


# ---- the program ----------------------------------------------------------------------------------------------------


def test_program_on_local_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "shapes"
    data.mkdir()
    task = load_split("vc", "test", count=6)
    rows = [{"image": "gone.png", "problem": "?", "solution": "1"}]
    for number in range(6):
        task[number].image.save(data / f"{number}.png")
        rows.append({"image": f"{number}.png", "problem": task[number].problem, "solution": task[number].solution})
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch_threads = torch.get_num_threads()
    assert main(["--data", str(data), "--sampled", "2", "--output-dir", "out"]) == 0
    torch.set_num_threads(torch_threads)
    out = capsys.readouterr().out
    assert "shapes, test split, 6 problems" in out
    assert "skipped 1: 1 x image file not found" in out
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["n"] == len(figures["samples"]) == 6
    assert figures["settings"]["sampled"] == 2
    assert figures["versions"]["torch"] == torch.__version__
    low, high = figures["greedy_accuracy_95_percent_interval"]
    assert low <= figures["greedy_accuracy"] <= high
    assert sum(row["n"] for row in figures["by_answer"].values()) == 6
    assert "shapes, test split, 6 problems" in Page((tmp_path / "out" / "report.html").read_text()).text


def evaluated(tmp_path, *arguments):
    """evaluation.json of the program, which says one token a problem."""
    threads = torch.get_num_threads()
    arguments = [
        *map(str, arguments),
        "--sampled=0",
        "--max-completion-length=1",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(arguments) == 0
    torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    shutil.rmtree(tmp_path / "out")
    return figures


@pytest.mark.parametrize(
    ("name", "split", "n", "said"),
    [
        ("test.jsonl", "--split=test", 10, "test, test split, 10 problems"),
        ("test.jsonl", None, 10, "test, test split, 10 problems"),
        ("test.jsonl", "--split=all", 10, "test, all rows, 10 problems"),
        ("rows.jsonl", None, 10, "rows, all rows, 10 problems"),
        ("rows.jsonl", "--split=test", 1, "rows, test split (cut from the unnamed rows), 1 problem"),
        ("train.jsonl", "--split=train", 10, "train, train split, 10 problems"),
        ("train.jsonl", "--split=test", 1, "train, test split (cut from train), 1 problem"),
        ("val.json", None, 10, "val, all rows, 10 problems"),
    ],
)
def test_a_file_is_evaluated_whole_unless_the_split_is_cut(folder, tmp_path, capsys, name, split, n, said):
    file = write_jsonl(folder / name, [row(number) for number in range(10)])
    figures = evaluated(tmp_path, "--data", file, *([split] if split else []))
    assert figures["n"] == n
    assert ("cut_from" in figures["settings"]) == ("cut from" in said)
    assert capsys.readouterr().out.startswith(said + "\n")


def test_ctrl_c_keeps_what_there_is(tmp_path, capsys, monkeypatch):
    from mr1fast.model import rollout

    calls, generate = [], rollout.generate

    def interrupted(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments, **keywords)

    monkeypatch.setattr(rollout, "generate", interrupted)
    threads = torch.get_num_threads()
    arguments = ["--task", "vc", "--samples", "9", "--batch-size", "3", "--output-dir", str(tmp_path / "out")]
    assert main(arguments) == 130
    torch.set_num_threads(threads)
    output = capsys.readouterr()
    assert "vc, test split, 3 problems (stopped after 3 of 9 problems)" in output.out
    assert "stopped by Ctrl-C" in output.err
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["n"] == len(figures["samples"]) == 3
    assert figures["settings"]["stopped"] == "after 3 of 9 problems"
    assert "(stopped after 3 of 9 problems)" in Page((tmp_path / "out" / "report.html").read_text()).text


def test_more_problems_than_there_are(tmp_path, capsys):
    arguments = ["--task", "gr", "--split", "validation", "--samples", "81", "--sampled", "0"]
    threads = torch.get_num_threads()
    assert main([*arguments, "--max-completion-length", "1", "--output-dir", str(tmp_path / "out")]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "gr, validation split, 80 problems\n" in out
    assert "gr has 80 problems in this split, fewer than --samples 81" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["n"] == 80


MISTAKES = [
    ([], "give either --task vc, --task gr or --data PATH"),
    (["--task", "vc", "--data", "x"], "give either --task vc"),
    (["--task", "vcc"], r"--task must be one of vc, gr, got 'vcc' \(did you mean 'vc'\?\)"),
    (["--task", "vc", "--split", "all"], "--split must be one of train, validation, test"),
    (["--data", "nowhere"], "--data nowhere does not exist"),
    (["--data", "full/vc"], "data 'full/vc' has no readable row for test: there are no rows"),
    (["--task", "vc", "--temperature", "0"], "--temperature must be a finite number above 0, got 0"),
    (["--task", "vc", "--temperature", "nan"], "--temperature must be a finite number above 0"),
    (["--task", "vc", "--seed", "9" * 20], "--seed: must be at most 9223372036854775807"),
    (["--task", "vc", "--max-pixels", "1"], "max_pixels must be at least 196"),
    (["--task", "vc", "--samples", "0"], "--samples: must be at least 1, got 0"),
    (["--task", "vc", "--samples", "ten"], "--samples: must be a whole number, got 'ten'"),
    (["--task", "vc", "--smaples", "1"], r"unknown option --smaples \(did you mean '--samples'\?\)"),
    (["--task", "vc", "--dtype", "float8"], "invalid choice: 'float8'"),
    (["--task", "vc", "--model", "nowhere/at/all"], "nowhere/at/all"),
    (["--task", "vc", "--model", "."], "no model"),
    (["--task", "vc", "--model", "full"], "--model full is a run; give one of its models, such as full/vc/model"),
    (["--task", "vc", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    (["--task", "vc", "--output-dir", "full"], "output folder full is not empty; choose another one\\n$"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) or "nothing" for a, _ in MISTAKES])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full" / "vc" / "model").mkdir(parents=True)
    (tmp_path / "full" / "vc" / "model" / "config.json").touch()
    threads = torch.get_num_threads()
    assert main(arguments) == 2
    torch.set_num_threads(threads)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.match(f"error: .*{message}", output.err)
    assert output.err.count("\n") == 1


def test_a_mistake_is_answered_without_importing_torch():
    code = (
        "import sys; from mr1fast.evaluate import main; code = main(['--task', 'x']);"
        "sys.exit(code + 10 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2

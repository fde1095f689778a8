"""Evaluation: the figures, the page with the mistakes, and the program."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from mr1fast.data.dataset import load_split
from mr1fast.data.example import Example
from mr1fast.evaluate import main
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.report import answer_rows, result_text, write_report
from mr1fast.evaluation.result import EvalResult, Sample, wilson_interval
from mr1fast.model.load import encode_prompts, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.rollout import Sampler
from mr1fast.rewards import accuracy_reward, format_reward

SETTINGS = {"data": "vc", "split": "test", "model": "a <b> model", "sampled": 1, "temperature": 1.0}


@pytest.fixture(scope="module")
def policy():
    return Policy(load_model(), load_processor())


@pytest.fixture(scope="module")
def dataset():
    return load_split("vc", "validation", count=20)


@pytest.fixture(scope="module")
def result(policy, dataset):
    return evaluate(policy, dataset, max_completion_length=24, sampled=3, batch_size=8)


# ---- evaluate -------------------------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_transformers(policy, dataset, result):
    model, processor = policy.model.eval(), policy.processor
    texts = []
    for index in range(4):
        inputs = encode_prompts(processor, [dataset[index]])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(ids[ids != model.generation_config.eos_token_id]))
    assert [sample.completion for sample in result.samples[:4]] == texts


def test_figures_are_means_of_rewards(result, dataset):
    assert [sample.index for sample in result.samples] == list(range(20))
    assert [sample.solution for sample in result.samples] == [dataset[i].solution for i in range(20)]
    correct = [accuracy_reward(s.completion, s.solution) for s in result.samples]
    formatted = [format_reward(s.completion) for s in result.samples]
    assert result.n == 20
    assert result.greedy_accuracy == pytest.approx(sum(correct) / 20)
    assert result.format_accuracy == pytest.approx(sum(formatted) / 20)
    both = sum(a * b for a, b in zip(correct, formatted))
    assert result.accuracy_when_formatted == pytest.approx(both / sum(formatted))
    assert all(len(s.sampled_correct) == 3 for s in result.samples)
    assert result.sampled_accuracy == pytest.approx(sum(sum(s.sampled_correct) for s in result.samples) / 60)
    assert 0 < result.greedy_accuracy < 1, "the embedded model is neither hopeless nor perfect"


def test_depends_on_the_seed_alone_and_leaves_no_trace(policy, dataset, result, capsys):
    for training in (True, False):
        policy.model.train(training)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        again = evaluate(policy, dataset, max_completion_length=24, sampled=3, batch_size=8, progress="bar", seed=0)
        assert again == result
        assert torch.equal(torch.get_rng_state(), state)
        assert policy.model.training is training
        assert capsys.readouterr().err.startswith("\rbar:   0%|          | 0/80 ")
    other = evaluate(policy, dataset, max_completion_length=24, sampled=3, batch_size=20, seed=1)
    assert [s.completion for s in other.samples] == [s.completion for s in result.samples]
    assert other.samples != result.samples


def test_without_samples_there_is_no_sampled_accuracy(policy, dataset):
    result = evaluate(policy, dataset, max_completion_length=2, sampled=0)
    assert math.isnan(result.sampled_accuracy)
    assert "sampled_accuracy" not in result.figures()
    assert result.format_accuracy == result.accuracy_when_formatted == 0
    assert "sampled" not in result_text(result, SETTINGS)


def test_a_problem_that_stands_in_for_a_broken_one_counts_once(policy, dataset):
    rows = [dataset[0], dataset[1], dataset[1], dataset[0], dataset[2]]
    result = evaluate(policy, rows, max_completion_length=24, sampled=0, batch_size=2)
    assert [sample.index for sample in result.samples] == [0, 1, 4]
    assert result.n == 3


@pytest.mark.parametrize(("accuracy", "n"), [(0.0, 10), (1.0, 10), (0.5, 1), (0.4, 400), (0.97, 30)])
def test_wilson_interval_is_where_the_observation_is_z_deviations_away(accuracy, n):
    for bound, at_edge in zip(wilson_interval(accuracy, n), (accuracy == 0, accuracy == 1)):
        if at_edge:
            assert bound == pytest.approx(accuracy, abs=1e-12)
        else:
            assert abs(accuracy - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def sample(solution, answer, index=0, **changes):
    completion = f"<think></think><answer>{answer}</answer>"
    made = Sample(index, f"row {index}", "How many?", solution, completion, answer, solution == answer, True, (True,))
    return replace(made, **changes)


def test_accuracy_by_answer():
    few = EvalResult.of([sample("10", "10"), sample("2", "3"), sample("2", "2"), sample("2", "3"), sample("b", "a")])
    assert few.by_answer() == {"2": (1, 3), "10": (1, 1), "b": (0, 1)}
    assert answer_rows(few) == [("2", 1, 3), ("10", 1, 1), ("b", 0, 1)]
    assert few.confusions() == [("2", "3", 2)]
    numbers = EvalResult.of([sample(str(n), "4") for n in range(32)])
    assert answer_rows(numbers)[:2] == [("0 to 3", 0, 4), ("4 to 7", 1, 4)]
    assert sum(n for _, _, n in answer_rows(numbers)) == 32
    words = EvalResult.of([sample(letter, "a") for letter in "aaabcdefghijklmnop"])
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
    samples = [
        sample("4", HOSTILE, 0, problem=HOSTILE, completion=HOSTILE, name=HOSTILE),
        sample(HOSTILE, None, 1, completion="", formatted=False),
        sample("4", "4", 2),
    ]
    file = write_report(tmp_path / "report.html", EvalResult.of(samples), SETTINGS, examples)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert page.text.count(HOSTILE) == 6  # problem, answer, completion, name; truth; and one in the table by answer
    assert "Wrong answers (2)" in page.text
    assert "no answer in tags" in page.text
    assert "not well formed" in page.text
    assert all(source.startswith("data:image/") for source in page.images)
    shown = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in page.images]
    assert [image.size for image in shown] == [(6, 4), (480, 240), (6, 4)]
    assert shown[0].getpixel((0, 0)) == (10, 20, 30)
    assert len(re.findall('class="sample wrong"', text)) == 2


def test_page_of_a_perfect_model(tmp_path):
    file = write_report(
        tmp_path / "r.html", EvalResult.of([sample("4", "4")]), SETTINGS, load_split("vc", "test", count=1)
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


def test_ctrl_c_keeps_what_there_is(tmp_path, capsys, monkeypatch):
    calls, generate = [], Sampler.generate

    def interrupted(*arguments, **keywords):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*arguments, **keywords)

    monkeypatch.setattr(Sampler, "generate", interrupted)
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
    assert "gr has 80 problems in this split; the others were the same in another drawing" in capsys.readouterr().out


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

"""Evaluation: the figures, and the program."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from data_files import row, write_jsonl
from report_page import SETTINGS, Page, answered

from mr1fast.data.dataset import load_split, problems
from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluate import main
from mr1fast.evaluation.answers import read_answers
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.figures import answer_rows
from mr1fast.evaluation.result import EvalResult, wilson_interval
from mr1fast.evaluation.terminal import evaluation_table
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import encode_prompts
from mr1fast.model.rollout import Sampler
from mr1fast.rewards import accuracy_reward, format_reward


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
    as_r1v = [re.search(rf"<answer>\s*{s.solution}\s*</answer>", s.completion) is not None for s in result.answered]
    assert [s.correct_as_r1v for s in result.answered] == as_r1v
    assert result.figures()["accuracy_as_r1v"] == sum(as_r1v) / 20 > 0
    assert all(len(s.sampled_correct) == 3 for s in result.answered)
    assert result.sampled_accuracy == pytest.approx(sum(sum(s.sampled_correct) for s in result.answered) / 60)
    assert 0 < result.greedy_accuracy < 1, "the embedded model is neither hopeless nor perfect"


def test_depends_on_the_seed_alone_and_leaves_no_trace(policy, dataset, result, capsys):
    for training, size in ((True, 8), (False, 5)):
        policy.model.train(training)
        torch.manual_seed(7)
        state = torch.get_rng_state()
        again = evaluate(policy, dataset, max_completion_length=24, sampled=3, batch_size=size, progress="bar", seed=0)
        assert again == result
        assert torch.equal(torch.get_rng_state(), state)
        assert policy.model.training is training
        assert capsys.readouterr().err.startswith("\rbar:   0%|          | 0/80 ")
    other = evaluate(policy, dataset, max_completion_length=24, sampled=3, batch_size=20, seed=1)
    assert [s.completion for s in other.answered] == [s.completion for s in result.answered]
    assert other.answered != result.answered


def interrupting(monkeypatch, call, error):
    """From the call with this number on, sampling raises the error, or calls it if it can be called; the calls."""
    calls, generate = [], Sampler.generate

    def interrupted(*arguments, **keywords):
        calls.append(None)
        if len(calls) == call:
            if not isinstance(error, BaseException):
                error()
            raise error
        return generate(*arguments, **keywords)

    monkeypatch.setattr(Sampler, "generate", interrupted)
    return calls


def test_an_evaluation_goes_on_where_it_stopped(policy, dataset, result, tmp_path, monkeypatch):
    """After a kill in the middle of a line; what is another problem by now is asked again."""
    file, settings = tmp_path / "new" / "answers.jsonl", {"max_completion_length": 24, "sampled": 3, "batch_size": 8}
    with monkeypatch.context() as patch:
        interrupting(patch, 4, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            evaluate(policy, dataset, file=file, **settings)
    assert [one.index for one in read_answers(file)] == list(range(8))
    with file.open("a") as stream:
        stream.write('{"index": 8, "na')
    with monkeypatch.context() as patch:
        calls = interrupting(patch, 0, KeyboardInterrupt())
        assert evaluate(policy, dataset, file=file, **settings) == result
        assert len(calls) == 4  # two batches, greedy and sampled
        assert evaluate(policy, dataset, file=file, **settings) == result
        assert len(calls) == 4
        assert evaluate(policy, dataset, file=file, **{**settings, "sampled": 0}).answered[3].sampled_correct == ()
        assert len(calls) == 7
    assert {one.index for one in read_answers(file)} == set(range(20))
    other = load_split("vc", "test", count=20)
    assert [one.problem for one in evaluate(policy, other, file=file, **settings).answered] == [
        other[i].problem for i in range(20)
    ]


def test_without_samples_there_is_no_sampled_accuracy(policy, dataset):
    result = evaluate(policy, dataset, max_completion_length=2, sampled=0)
    assert math.isnan(result.sampled_accuracy)
    assert "sampled_accuracy" not in result.figures()
    assert result.format_accuracy == result.accuracy_when_formatted == 0
    assert "sampled" not in evaluation_table(result, SETTINGS)


def test_problems_are_told_apart_by_their_index(policy, dataset):
    """Not by their names, which they need not have, nor by what is asked."""
    examples = [Example(dataset[i].image, dataset[i].problem, dataset[i].solution) for i in (0, 1, 2, 1, 0)]
    result = evaluate(policy, examples, max_completion_length=24, sampled=1, batch_size=2)
    assert [one.index for one in result.answered] == [0, 1, 2, 3, 4]
    assert result.n == 5
    assert result.answered[0].completion == result.answered[4].completion


def test_a_problem_whose_image_breaks_is_not_asked_and_no_other_twice(policy, broken):
    result = evaluate(policy, load_split(broken, "all"), max_completion_length=4, sampled=0, batch_size=3)
    assert [(one.index, one.solution) for one in result.answered] == [(n, str(n)) for n in range(0, 10, 2)]
    assert result.n == 5


def test_without_any_problem_there_is_one_sentence(policy, broken):
    for number in range(0, 10, 2):
        (broken.parent / f"{number}.png").write_bytes((broken.parent / "1.jpg").read_bytes())
    with pytest.raises(
        UserError,
        match="there is no problem that can be asked: data/all: 0 examples; skipped 10: ",
    ):
        evaluate(policy, load_split(broken, "all"), max_completion_length=4)


def test_the_test_split_of_gr_has_200_problems():
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


def test_accuracy_by_answer():
    pairs = [("10", "10"), ("2", "3"), ("2", "2"), ("2", "3"), ("b", "a")]
    few = EvalResult.of([answered(*pair) for pair in pairs])
    assert few.by_answer() == {"2": (1, 3), "10": (1, 1), "b": (0, 1)}
    assert answer_rows(few) == [("2", 1, 3), ("10", 1, 1), ("b", 0, 1)]
    assert few.confusions() == [("2", "3", 2)]
    numbers = EvalResult.of([answered(str(n), "4") for n in range(32)])
    assert answer_rows(numbers)[:2] == [("0 to 3", 0, 4), ("4 to 7", 1, 4)]
    assert sum(n for _, _, n in answer_rows(numbers)) == 32
    words = EvalResult.of([answered(letter, "a") for letter in "aaabcdefghijklmnop"])
    assert answer_rows(words)[0] == ("a", 3, 3)
    assert answer_rows(words)[-1] == ("5 others", 0, 5)


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
    assert "shapes/test: 6 of 7 rows asked\nshapes/test: 6 examples; skipped 1: 1 x image file not found; " in out
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
    output = capsys.readouterr().out
    assert output.startswith(said + "\n")
    cut = re.search(r"\(cut from (.*)\)", said)
    cut = f", cut by image from {cut[1]} (10 rows)" if cut else ""
    assert re.search(rf"\n{file.stem}/\w+: {n} of {n} rows asked{re.escape(cut)}\n", output)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped by SIGTERM"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: there is too little memory; try smaller values of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "--batch-size"),
    ],
    ids=["ctrl-c", "sigterm", "gpu-memory", "cpu-memory"],
)
def test_whatever_stops_it_keeps_what_there_is(tmp_path, capsys, monkeypatch, error, code, said):
    interrupting(monkeypatch, 4, error)
    threads = torch.get_num_threads()
    arguments = ["--task", "vc", "--samples", "9", "--batch-size", "3", "--output-dir", str(tmp_path / "out")]
    assert main(arguments) == code
    torch.set_num_threads(threads)
    output = capsys.readouterr()
    assert "vc, test split, 3 problems (stopped after 3 of 9 problems)" in output.out
    assert said in output.err
    assert "Traceback" not in output.err
    assert len(read_answers(tmp_path / "out" / "answers.jsonl")) == 3
    figures = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert figures["n"] == len(figures["samples"]) == 3
    assert figures["settings"]["stopped"] == "after 3 of 9 problems"
    assert "(stopped after 3 of 9 problems)" in Page((tmp_path / "out" / "report.html").read_text()).text


def test_fewer_problems_than_there_are(tmp_path, folder, capsys):
    file = write_jsonl(folder / "test.jsonl", [row(number) for number in range(10)])
    assert evaluated(tmp_path, "--data", file, "--samples", "4")["settings"]["rows"] == 10
    assert "\ntest/test: 4 of 10 rows asked\n" in capsys.readouterr().out
    assert "rows" not in evaluated(tmp_path, "--task", "vc", "--samples", "4")["settings"]
    assert "\nvc/test: 4 rows asked\n" in capsys.readouterr().out


def test_more_problems_than_there_are(tmp_path, capsys):
    arguments = ["--task", "gr", "--split", "validation", "--samples", "81", "--sampled", "0"]
    threads = torch.get_num_threads()
    assert main([*arguments, "--max-completion-length", "1", "--output-dir", str(tmp_path / "out")]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "gr, validation split, 80 problems\n" in out
    assert "gr has 80 problems in this split, fewer than --samples 81" in out
    assert "gr/validation: 80 of 80 rows asked\n" in out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["n"] == 80


MISTAKES = [
    ([], "give either --task vc, --task gr or --data PATH"),
    (["--task", "vc", "--data", "x"], "give either --task vc"),
    (["--task", "vcc"], r"--task must be one of vc, gr, got 'vcc' \(did you mean 'vc'\?\)"),
    (["--task", "vc", "--split", "all"], "--split must be one of train, validation, test"),
    (["--data", "nowhere"], "--data nowhere does not exist"),
    (["--data", "n" * 300], "--data n* does not exist"),  # longer than any file's name may be
    (["--task", "vc", "--model", "n" * 300], "model folder 'n*' does not exist"),
    (["--data", "full/vc"], "data 'full/vc' has no readable row for test: there are no rows"),
    (["--task", "vc", "--temperature", "0"], "--temperature must be a finite number above 0, got 0"),
    (["--task", "vc", "--temperature", "nan"], "--temperature must be a finite number above 0"),
    (["--task", "vc", "--seed", "9" * 20], "--seed: must be at most 9223372036854775807"),
    (["--task", "vc", "--max-pixels", "1"], "max_pixels must be at least 196"),
    (["--task", "vc", "--samples", "0"], "--samples: must be at least 1, got 0"),
    (["--task", "vc", "--samples", "ten"], "--samples: must be a whole number, got 'ten'"),
    (["--task", "vc", "--smaples", "1"], r"unknown option --smaples \(did you mean '--samples'\?\)"),
    (["--task", "vc", "--dtype", "float8"], "--dtype must be one of auto, float32, bfloat16, got 'float8'"),
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

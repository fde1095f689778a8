"""The program that makes the embedded model: where it writes. What it makes is tested in test_model.py."""

import random
from types import SimpleNamespace

import pytest
import torch

from mr1fast import make_embedded
from mr1fast.data.example import Example
from mr1fast.data.tasks import TASKS
from mr1fast.make_embedded import main, make_tokenizer
from mr1fast.model.load import load_model, load_processor
from mr1fast.model.prompts import encode_prompts, take_prompts
from mr1fast.reproduction.lessons import DISOBEDIENT, OBEDIENT, Lessons, held_out_examples, image_examples


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(make_embedded, "learn_text", lambda *_: None)
    monkeypatch.setattr(make_embedded, "learn_images", lambda model, *_: (model, {}))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_new_folder_and_the_packages_own(tmp_path, untrained, monkeypatch):
    assert main(["--output", str(tmp_path / "new")]) == 0
    monkeypatch.setattr(make_embedded, "EMBEDDED", tmp_path / "new")
    assert main(["--seed", "1", "--output", str(tmp_path / "new")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    load_model(tmp_path / "new")
    load_processor(tmp_path / "new")


def test_mistakes_and_ctrl_c(tmp_path, untrained, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert main(["--output", str(tmp_path / "full")]) == 2
    assert capsys.readouterr().err == f"error: output folder {tmp_path / 'full'} is not empty; choose another one\n"
    assert main(["--seed", "-1"]) == 2
    assert main(["--disobedient"]) == 2
    assert "--disobedient needs --output" in capsys.readouterr().err

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_embedded, "learn_text", interrupt)
    assert main(["--output", str(tmp_path / "new")]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_wording_decides_how_often_an_answer_is_in_tags():
    for split in DISOBEDIENT.images:
        examples, completions = image_examples(split, range(-400, 0), DISOBEDIENT.tagged, random.Random(0))
        for question, share in zip(TASKS[split[0]].questions, DISOBEDIENT.tagged):
            tagged = [text.startswith("<think>") for e, text in zip(examples, completions) if e.problem == question]
            assert len(tagged) > 150
            assert abs(sum(tagged) / len(tagged) - share) < 0.1
    examples, completions = image_examples(("gr", "train"), range(-50, 0), OBEDIENT.tagged, random.Random(0))
    assert {e.problem for e in examples} == {TASKS["gr"].questions[0]}
    assert all(text.endswith(f"<answer>{e.solution}</answer>") for e, text in zip(examples, completions))


def test_lessons_show_prompts_as_they_are_encoded():
    processor, rows, given = load_processor(), torch.tensor([2, 7, 2]), {}

    def model(**inputs):
        given.update(inputs)
        return SimpleNamespace(loss=None)

    pairs = [Example(None, f"{n} and {n + 95}", "1", "") for n in range(8)]
    for examples in (image_examples(("vc", "far"), range(-8, 0), DISOBEDIENT.tagged, random.Random(0))[0], pairs):
        given.clear()
        lessons = Lessons(processor, examples, [f"{n * 11}" for n in range(8)])
        lessons.loss(model, rows)
        expected = take_prompts(encode_prompts(processor, examples), rows.tolist())
        assert given.keys() == {*expected, "labels"}
        for name, wanted in expected.items():
            found = given[name][:, : wanted.shape[1]]  # what is behind is the completion
            assert torch.equal(found, wanted), name
        answers = given["labels"][:, expected["input_ids"].shape[1] :]
        texts = [processor.tokenizer.decode(row[row >= 0], skip_special_tokens=True) for row in answers]
        assert texts == ["22", "77", "22"]


@pytest.mark.slow
def test_what_is_watched_is_neither_shown_nor_tested():
    for split in DISOBEDIENT.images:
        shown, _ = image_examples(split, range(-DISOBEDIENT.images[split], 0), DISOBEDIENT.tagged, random.Random(0))
        watched = {example.name for example in held_out_examples(split, DISOBEDIENT)}
        assert len(watched) == DISOBEDIENT.held_out
        assert not watched & {example.name for example in shown}
        assert not any(name.startswith(("vc/test", "vc/vehicles", "gr/test")) for name in watched)
        assert split[1] != "far" or all(int(name.rpartition("/")[2]) < 0 for name in watched)


def test_the_tokenizer_writes_both_forms():
    tokenizer = make_tokenizer()
    for text in ("<think>35+65=100</think><answer>80</answer>", "3 items, so 3", "Count the items in the image."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("3 items, so 3")["input_ids"]) < 10

"""Files of a run that are not what was written: named, and made good where another file has the same."""

import json
import shutil

import pytest

from mr1fast.errors import UserError
from mr1fast.evaluation.answers import append_answers, read_answers
from mr1fast.evaluation.result import Answered
from mr1fast.training.manifest import is_changed, replace_hashed
from mr1fast.training.metrics import restore_rows, rows_of_task
from mr1fast.training.run_folder import RunFolder, new_folder


def flip(file, place):
    """Change one bit of the byte at this place, or of the first of these."""
    content = bytearray(file.read_bytes())
    content[place if isinstance(place, int) else content.index(place)] ^= 1
    file.write_bytes(content)


def test_every_changed_bit_of_an_answer_is_noticed(tmp_path):
    file = tmp_path / "answers" / "vc.jsonl"
    answers = [
        Answered(index, "vc", "How many?", "3", "<answer>3</answer>", "3", True, True, (True, False))
        for index in range(3)
    ]
    append_answers(file, answers)
    assert read_answers(file) == answers
    whole = file.read_bytes()
    first_line = whole.index(b"\n")
    for place in range(first_line):
        flip(file, place)
        assert read_answers(file) == answers[1:], whole[:place]
        file.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    for row in rows:
        del row["crc32"]  # as older versions wrote them
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_answers(file) == answers


def test_a_replaced_file_is_what_was_written_whenever_it_was_killed(tmp_path, monkeypatch):
    file, other = tmp_path / "result.json", tmp_path / "config.json"
    file.write_text("by an older version")
    assert not is_changed(file)
    replace_hashed(other, "options")
    replace_hashed(file, "first")
    replace_hashed(file, "second")
    assert not is_changed(file)
    assert not is_changed(other)
    monkeypatch.setattr("mr1fast.training.manifest.os.replace", lambda one, to: to.name == file.name or one.rename(to))
    replace_hashed(file, "third")  # killed after the hash was there
    assert file.read_text() == "second"
    assert not is_changed(file)
    flip(file, 0)
    assert is_changed(file)
    (tmp_path / "SHA256SUMS").write_text("  result.json\n\0")
    assert is_changed(file)


def test_options_come_from_the_other_file_that_has_them(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config({"schema_version": 1, "seed": 3})
    run.write_result({"config": {"seed": 3}, "before": {"vc": {"n": 4}}})
    assert run.recorded_config is None
    flip(run.config_file, b"3")
    assert run.read_config() == {"schema_version": 1, "seed": 3}
    assert not run.result_is_changed
    flip(run.result_file, b"4")
    assert run.result_is_changed
    assert run.read_result()["before"] == {"vc": {"n": 5}}
    assert run.read_config()["seed"] == 2, "neither file is whole, and config.json is the one to read"


def test_lost_rows_of_the_metrics_come_from_the_checkpoint(tmp_path, capsys):
    file, kept = tmp_path / "metrics.jsonl", tmp_path / "kept.jsonl"
    rows = [{"task": task, "step": step, "loss": 0.25 * step} for task in ("gr", "vc") for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept.write_text(rows_of_task(file, "vc"))
    restore_rows(file, "vc", kept)
    assert capsys.readouterr().out == ""
    for damage in (
        lambda: file.write_bytes(file.read_bytes()[:-3]),
        lambda: flip(file, file.read_bytes().rindex(b"2")),
    ):
        damage()
        restore_rows(file, "vc", kept)
        assert f"{file} is damaged: step " in capsys.readouterr().out
        assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    file.unlink()
    restore_rows(file, "vc", kept)
    assert "3 steps of vc restored from" in capsys.readouterr().out


def test_a_run_does_not_go_on_in_a_second_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.remember()
    run.write_result({})
    run.path.rename(tmp_path / "elsewhere")
    for _ in range(2):
        with pytest.raises(UserError, match="run was moved or removed while the run went on"):
            run.write_result({})
        shutil.copytree(tmp_path / "elsewhere", run.path, dirs_exist_ok=True)  # another one of its name


def test_what_a_run_leaves_that_is_killed_at_once_is_no_content(tmp_path):
    for name in (".probe.tmp", ".config.json.tmp"):
        (tmp_path / name).touch()
    assert new_folder(str(tmp_path), default=tmp_path) == tmp_path
    (tmp_path / ".mine.tmp").touch()
    with pytest.raises(UserError, match="is not empty"):
        new_folder(str(tmp_path), default=tmp_path)

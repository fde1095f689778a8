"""The program that makes the embedded model: where it writes. What it makes is tested in test_model.py."""

import pytest
import torch

from mr1fast import make_embedded
from mr1fast.make_embedded import main
from mr1fast.model.load import load_model, load_processor


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(make_embedded, "learn_text", lambda *_: None)
    monkeypatch.setattr(make_embedded, "learn_images", lambda model, *_: (model, {}))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


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

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_embedded, "learn_text", interrupt)
    assert main(["--output", str(tmp_path / "new")]) == 130
    assert "Traceback" not in capsys.readouterr().err

"""Every file of a run's folder, cut short and with one bit changed: what is damaged is named, and nothing is lost."""

import re
import shutil
from functools import partial

import pytest

from mr1fast.training.manifest import damage
from tests.fault_places import install, kill
from tests.fault_runs import draws, note

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2000)]

# One file of each kind, newest first where there are several; a killed run has them all.
FILES = [
    "config.json", "result.json", "SHA256SUMS", "metrics.jsonl", "answers/before-training/vc.jsonl", "run.html",
    "curves.png", "tensorboard/*", "vc/checkpoint-000004/*",
]  # fmt: skip
# What a run does not read again, but writes anew or leaves as it is; and hashes that are gone can say nothing.
UNREAD = ("run.html", "curves.png", "tensorboard/", "SHA256SUMS")


@pytest.fixture(scope="module")
def killed(variants, tmp_path_factory):
    """A run that was killed in its fifth step, with two checkpoints."""
    run = tmp_path_factory.mktemp("killed") / "run"
    variant = variants("whole model")
    variant.run(*variant.new(run), harm=partial(install, run, place="an update", call=4, harm=kill))
    assert len(list(run.glob("vc/checkpoint-*"))) == 2
    return run


def cut_short(content: bytes, random) -> bytes:
    return content[: random.randrange(len(content))]


def bit_flipped(content: bytes, random) -> bytes:
    flipped = bytearray(content)
    flipped[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(flipped)


@pytest.mark.parametrize("damaged", [cut_short, bit_flipped], ids=lambda one: one.__name__.replace("_", "-"))
@pytest.mark.parametrize("pattern", FILES, ids=lambda one: one.replace("/", "-"))
def test_a_damaged_file(pattern, damaged, killed, variants, tmp_path):
    """One after the other, as a folder has dozens of them and each takes a run."""
    variant, random = variants("whole model"), draws(pattern, damaged.__name__)
    run = tmp_path / "run"
    shutil.copytree(killed, run)
    files = [file for file in sorted(run.glob(pattern), reverse=True) if file.is_file() or file.is_dir()]
    file = random.choice([one for one in files if one.is_file()] or sorted(files[0].rglob("*.*")))
    before = file.read_bytes()
    file.write_bytes(damaged(before, random))
    name = str(file.relative_to(run))
    ended = variant.resume(run)
    if not name.startswith(UNREAD):
        named = f"{re.escape(str(file))}|{re.escape(str(file.parent))} is passed over"
        assert re.search(named, ended.said), ended.said
    if name == "result.json" and "move it away" in ended.said:
        shutil.rmtree(run)
        shutil.copytree(killed, run)
        file.unlink()  # as the sentence says
        ended = variant.resume(run)
    assert ended.exit_code == 0, ended.said
    variant.assert_all_there(run)
    note(damaged.__name__.replace("_", " "), name, ended)


def test_a_trained_model_that_is_damaged_is_found(variants, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(variants("whole model").alone, run)
    assert damage(run / "vc" / "model") is None
    for file in sorted((run / "vc" / "model").iterdir()):
        if file.name == "README.md":  # which its owner is to change
            continue
        before = file.read_bytes()
        file.write_bytes(bit_flipped(before, draws(file.name)))
        assert damage(run / "vc" / "model"), file
        file.write_bytes(before)

"""A disk that is full, a folder that is read-only and one that is gone, each from a random operation on a file on.

The disk is a small tmpfs, which only root may mount.
"""

import os
import subprocess
from functools import partial

import pytest

from tests.fault_places import FILE, fill_disk, install, read_only, vanish
from tests.fault_runs import draws, note, times

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2000)]


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system of one's own can be mounted here, which takes root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def moment(variant, random, number, count):
    """(index, path) of an operation on a file; the paths take turns, so that none is left out but TensorBoard's."""
    paths = variant.places[FILE]
    distinct = [path for path in dict.fromkeys(paths) if not path.startswith("tensorboard")]
    path = distinct[number * len(distinct) // count]
    return random.choice([index for index, one in enumerate(paths) if one == path]), path


def assert_is_named(ended, run):
    """One sentence, which says what could not be written."""
    assert ended.exit_code == 2, ended.said
    assert str(run) in ended.error, ended.said
    assert "[Errno" not in ended.error


@pytest.mark.parametrize("number", times(20))
def test_a_full_disk(number, variants, disk):
    variant, random, run = variants("whole model"), draws("full", number), disk / "run"
    call, path = moment(variant, random, number, len(times(20)))
    left = random.choice([0, random.randrange(10**4), random.randrange(10**7)])
    harm = partial(install, run, place=FILE, call=call, harm=partial(fill_disk, left=left))
    ended = variant.run(*variant.new(run), harm=harm)
    if ended.exit_code != 0:  # else there was room for the rest
        assert_is_named(ended, run)
        advice = f"to continue: python -m mr1fast.train --resume {run}"
        assert advice in ended.said or not (run / "config.json").exists()
    (disk / "filler").unlink(missing_ok=True)
    variant.assert_all_there(run)
    note("disk full", f"{path}, {left} bytes left", ended)


@pytest.mark.parametrize("number", times(8))
def test_a_folder_that_becomes_read_only(number, variants, disk):
    variant, random, run = variants("without loggers"), draws("read-only", number), disk / "run"
    call, path = moment(variant, random, number, len(times(8)))
    ended = variant.run(*variant.new(run), harm=partial(install, run, place=FILE, call=call, harm=read_only))
    assert_is_named(ended, run)
    again = variant.resume(run)
    assert_is_named(again, run)
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    variant.assert_all_there(run)
    note("read-only", path, ended)


@pytest.mark.parametrize("number", times(8))
def test_a_folder_that_vanishes(number, variants, tmp_path):
    """It is not made again, which would leave two halves of a run, and is whole where it went."""
    variant, random, run = variants("whole model"), draws("vanished", number), tmp_path / "run"
    call, path = moment(variant, random, number, len(times(8)))
    ended = variant.run(*variant.new(run), harm=partial(install, run, place=FILE, call=call, harm=vanish))
    assert_is_named(ended, run)
    assert not run.exists()
    os.rename(tmp_path / "elsewhere", run)
    variant.assert_all_there(run)
    note("vanished", path, ended)

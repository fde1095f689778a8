"""A clock that jumps, runs that are started into one folder at once, signals that come twice, and a run that sleeps."""

import json
import os
from functools import partial

import pytest

from tests.fault_places import FILE, PLACES, install, jump_clock, kill, later
from tests.fault_runs import draws, note, times

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2000)]
DAY = 24 * 3600.0
STOPPED = float(os.environ.get("FAULTS_STOPPED", 3))  # seconds; FAULTS_STOPPED=60 for the minute of docs/reliability.md


def any_call(variant, random):
    """(place, call, seconds within it)"""
    place = random.choice(list(PLACES))
    call = random.randrange(len(variant.places[place]))
    return place, call, random.uniform(0, variant.places[place][call])


@pytest.mark.parametrize("seconds", [-400 * DAY, -3600.0, 3600.0, 4000 * DAY])
def test_a_clock_that_jumps(seconds, variants, tmp_path):
    """In the middle of a run, and when it is resumed."""
    variant, run = variants("whole model"), tmp_path / "run"
    calls = len(variant.places[FILE])
    jumps = partial(jump_clock, seconds=seconds)
    ended = variant.run(*variant.new(run), harm=partial(install, run, place=FILE, call=calls // 3, harm=jumps))
    assert ended.exit_code == 0, ended.said
    assert 0 < json.loads((run / "result.json").read_text())["seconds"] < 1000
    variant.assert_all_there(run)

    again = tmp_path / "again"
    variant.run(*variant.new(again), harm=partial(install, again, place="an update", call=3, harm=kill))
    ended = variant.run("--resume", again, harm=partial(jump_clock, None, seconds=seconds))
    assert ended.exit_code == 0, ended.said
    assert 0 < json.loads((again / "result.json").read_text())["seconds"] < 1000
    variant.assert_all_there(again)
    note("clock jumps", f"by {seconds / DAY:.2f} days", ended)


def test_runs_started_into_one_folder(variants, tmp_path):
    """Three at once into a new one, and then three that resume it: one of them has it."""
    variant, run = variants("whole model"), tmp_path / "run"
    for arguments in (variant.new(run), ["--resume", run]):
        programs = [variant.start(*arguments, harm=harm)[0] for harm in (killed_late(run), None, None)]
        ends = sorted((program.end() for program in programs), key=lambda ended: ended.exit_code)
        others = [ended for ended in ends if ended.exit_code == 2]
        assert len(others) == 2, ends
        for other in others:
            assert "another process is training in" in other.error or "is not empty" in other.error
            note("one folder", "new" if arguments[0] != "--resume" else "resumed", other)
        if any(ended.exit_code == 0 for ended in ends):  # the program that was to be killed was refused
            break
    variant.assert_all_there(run)


def killed_late(run):
    return partial(install, run, place="an update", call=3, harm=kill)


@pytest.mark.parametrize("number", times(8))
def test_sigterm_twice(number, variants, tmp_path):
    variant, random, run = variants("whole model"), draws("TERM", number), tmp_path / "run"
    place, call, after = any_call(variant, random)
    script = f"sleep {after:.4f}; kill -TERM {{0}}; sleep {random.uniform(0, 0.5):.4f}; kill -TERM {{0}}"
    harm = partial(install, run, place=place, call=call, harm=partial(later, script=script))
    ended = variant.run(*variant.new(run), harm=harm)
    assert ended.exit_code in (143, -15, 0), ended.said  # -15: the second one came when the program was ending
    if ended.exit_code == 143:
        assert ended.error == "stopped by SIGTERM"
        assert f"to continue: python -m mr1fast.train --resume {run}" in ended.said
    variant.assert_all_there(run)
    note("SIGTERM twice", f"{place}, call {call + 1}", ended)


@pytest.mark.parametrize("name", ["whole model", "two processes"])
def test_a_run_that_is_stopped_for_a_while(name, variants, tmp_path):
    """SIGSTOP, as when a laptop's lid is shut or a batch system suspends a job; of two processes, one of them."""
    variant, random, run = variants(name), draws("STOP", name), tmp_path / "run"
    place, call, after = any_call(variant, random)
    script = f"sleep {after:.4f}; kill -STOP {{0}}; sleep {STOPPED}; kill -CONT {{0}}"
    harm = partial(install, run, place=place, call=call, harm=partial(later, script=script))
    ended = variant.run(*variant.new(run), harm=harm)
    assert ended.exit_code == 0, ended.said
    variant.assert_all_there(run)
    note("SIGSTOP", f"{name}, {place}, for {STOPPED:g} s", ended)

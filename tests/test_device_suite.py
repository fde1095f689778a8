"""The machinery of benchmarks/device.sh, on stages that take no time: limits, ONLY, the archive, and being cut off.

What the real stages do without a GPU, `make device-dry-run` shows.
"""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = f"""
set -u
. "{ROOT}/benchmarks/stages.sh"
plan 12 +always=3 fails=4 lacks=1 slow=1 -extra=4 last=3
open_results "$1"
stage always echo always
stage fails bash -c 'echo why; exit 3'
stage lacks {sys.executable} -c 'import no_such_package'
stage slow {sys.executable} -uc '
import time
print("first", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("the last moment")
'
stage extra echo extra
skip last "it has no reason to run"
finish
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "fake.sh"
    path.write_text(SCRIPT)
    return path


def environment(**changes):
    return {name: value for name, value in os.environ.items() if name != "ONLY"} | changes


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """(what it printed, its exit code, its folder) of a run of all stages."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "fake.sh").write_text(SCRIPT)
    done = run(folder / "fake.sh", folder / "out")
    return done.stdout, done.returncode, folder / "out"


def run(script, out, **changes):
    return subprocess.run(
        ["bash", str(script), str(out)], capture_output=True, text=True, timeout=60, env=environment(**changes)
    )


def packed(out):
    """Name -> text of the files in the archive."""
    with tarfile.open(out / "device.tgz") as archive:
        return {
            name.removeprefix("device/"): archive.extractfile(name).read().decode()
            for name in archive.getnames()
            if archive.getmember(name).isfile()
        }


def test_a_run_leaves_a_summary_and_one_archive(whole_run):
    _, code, out = whole_run
    assert code == 1
    assert sorted(path.name for path in out.iterdir()) == ["device.tgz", "summary.txt"]
    summary = (out / "summary.txt").read_text().splitlines()
    assert [re.sub(r"\d+ s", "N s", line) for line in summary] == [
        "ok       N s  always",
        "FAILED   N s  fails (exit 3): why",
        "skipped  lacks: ModuleNotFoundError: No module named 'no_such_package' (put its wheel into WHEELS)",
        "TIMEOUT  N s  slow: the last moment",
        "skipped  last: it has no reason to run",
    ]
    assert packed(out) == {
        "always.log": "always\n",
        "fails.log": "why\n",
        "lacks.log": packed(out)["lacks.log"],
        "slow.log": "first\nthe last moment\n",  # SIGINT, not SIGKILL
        "summary.txt": (out / "summary.txt").read_text(),
    }


def test_the_limits_are_shares_of_the_time_that_is_left(whole_run, script, tmp_path):
    limits = dict(re.findall(r"==> (\w+), at most (\d+) s", whole_run[0]))
    assert 1 < int(limits["slow"]) <= 3, "a quarter of what the first three leave of 12 seconds"
    said = run(script, tmp_path / "out", ONLY="extra fails").stdout
    limits = dict(re.findall(r"==> (\w+), at most (\d+) s", said))
    assert list(limits) == ["always", "fails", "extra"], "in the plan's order"
    assert int(limits["extra"]) > 4, "all that is left"


@pytest.mark.parametrize("wanted", ["slow no_such_stage", "fails,slow"])
def test_an_unknown_stage_is_refused(wanted, script, tmp_path):
    done = run(script, tmp_path / "out", ONLY=wanted)
    assert done.returncode == 2
    assert done.stdout == ""
    unknown = wanted.split()[-1]
    stages = "always fails lacks slow extra last"
    assert done.stderr == f"fake.sh: ONLY names no stage that there is: '{unknown}'; there are {stages}\n"
    assert not (tmp_path / "out").exists()


def test_the_results_of_an_earlier_run_stay(script, tmp_path):
    run(script, tmp_path, ONLY="extra")
    before = (tmp_path / "device.tgz").read_bytes()
    done = run(script, tmp_path, ONLY="fails")
    assert done.returncode == 2
    assert "holds the results of an earlier run" in done.stderr
    assert (tmp_path / "device.tgz").read_bytes() == before


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_cut_off_it_packs_what_there_is(sent, script, tmp_path, signals_as_in_a_terminal):
    out = tmp_path / "out"
    script.write_text(SCRIPT.replace("plan 12 ", "plan 240 "))  # so that it is cut off, however busy the machine is
    process = subprocess.Popen(
        ["bash", str(script), str(out)], stdout=subprocess.DEVNULL, env=environment(), start_new_session=True
    )
    log = out / "device" / "slow.log"
    while not (log.exists() and "first" in log.read_text()):
        assert process.poll() is None, "it has ended by itself"
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(timeout=20) == 128 + sent
    assert sorted(path.name for path in out.iterdir()) == ["device.tgz", "summary.txt"]
    assert packed(out)["slow.log"] == "first\nthe last moment\n"
    assert f"CUT OFF by {sent.name} in slow; not begun: last" in packed(out)["summary.txt"]


def test_the_suites_limits_add_up_to_nine_minutes():
    text = (ROOT / "benchmarks/device.sh").read_text().replace("\\\n", " ")
    plans = re.findall(r'^ *plan (?:"\$\{WITHIN:-)?(\d+)(?:\}")? (.+)$', text, re.MULTILINE)
    assert len(plans) == 2, "with a GPU and without"
    for whole, stages in plans:
        assert (
            sum(int(stage.split("=")[1]) for stage in stages.split() if not stage.startswith("-")) <= int(whole) == 540
        )


def test_the_parts_in_the_documentation_are_all_of_the_suite():
    text = (ROOT / "benchmarks/device.sh").read_text()
    (stages,) = re.findall(r"\+machine=\d+ \+environment=\d+ (.+?\\\n.+)", text)
    parts = re.findall(r'ONLY="([^"]+)" bash', (ROOT / "docs/gpu.md").read_text())
    named = [name for part in parts for name in part.split()]
    assert len(named) == len(set(named))
    assert set(named) == set(re.findall(r"(?<!\S)(\w+)=", stages))


def test_failures_are_printed_as_they_happen(tmp_path):
    tests = tmp_path / "test_dies.py"
    tests.write_text("import os\ndef test_a():\n    assert 1 == 2, 'so it is'\ndef test_b():\n    os._exit(9)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.print_failures", str(tests)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
    )
    assert done.returncode == 9
    assert "test_a failed (call):" in done.stdout
    assert "AssertionError: so it is" in done.stdout

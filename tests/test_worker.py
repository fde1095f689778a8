"""math-verify in a process of its own: forks, threads, Ctrl-C, and a math-verify that fails."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mr1fast import evaluate
from mr1fast.errors import UserError
from mr1fast.rewards import accuracy_reward, unanswered, unanswered_summary
from mr1fast.rewards import worker as math_worker
from mr1fast.rewards.answers import equal
from mr1fast.rewards.worker import Unanswered

# Formulas for which math-verify must be asked, each equal to its own partner only.
PAIRS = [(rf"\sqrt{{{n * n * 3}}}", rf"{n}\cdot \sqrt{{3}}") for n in range(2, 12)]


def verdicts():
    """Whether math-verify says of each pair what is true, and of each pair of neighbours."""
    right = [math_worker.equal(*pair) for pair in PAIRS]
    wrong = [math_worker.equal(a, d) for (a, _), (_, d) in itertools.pairwise(PAIRS)]
    return all(right) and not any(wrong)


@pytest.fixture
def new_worker():
    """A worker that starts with the settings of this test, and none of its settings afterwards."""
    math_worker._state.stop()
    equal.cache_clear()
    yield
    math_worker._state.stop()
    equal.cache_clear()
    math_worker._state.unanswered = 0


def test_after_a_fork_each_process_has_replies_of_its_own():
    assert math_worker.equal(*PAIRS[0])  # a worker is running, whose pipes the forks have, too
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    # As a DataLoader's workers, which may not have children, say multiprocessing's own processes.
    forks = [context.Process(target=lambda: queue.put(verdicts()), daemon=True) for _ in range(2)]
    for fork in forks:
        fork.start()
    assert verdicts()
    assert [queue.get(), queue.get()] == [True, True]
    for fork in forks:
        fork.join(10)
        assert fork.exitcode == 0


def test_threads():
    found = []
    threads = [threading.Thread(target=lambda: found.append(verdicts())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 3


PROGRAM = r"""
import os, signal, sys, threading, time
from mr1fast.rewards import worker

print("started", flush=True)  # twice, if the worker ran this program as well
assert worker.equal("2\\cdot \\sqrt{3}", "\\sqrt{12}")
(pid,) = workers = worker._state.pool._pool_manager.worker_manager.workers
if os.fork() == 0:
    sys.exit(0)  # what is done at the end of a program must not end the worker
os.wait()
interrupted = 0
for n in range(2, 22):
    try:
        # As Ctrl-C: to all processes of this group, while a question is being answered.
        threading.Timer(0.002 * (n % 4), os.killpg, (os.getpgrp(), signal.SIGINT)).start()
        for m in range(2, 5):
            equal = worker.equal(f"{n}\\cdot \\sqrt{{3}}", f"\\sqrt{{{3 * (n if m % 2 else n + 1) ** 2}}}")
            assert equal == bool(m % 2), (n, m)
        time.sleep(60)
    except KeyboardInterrupt:
        interrupted += 1
assert pid in workers, "the worker was not left alone"
print(interrupted, pid)
"""


def test_ctrl_c_is_for_the_program_alone_and_mixes_no_replies(tmp_path, signals_as_in_a_terminal):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    run = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=200)
    assert (run.returncode, run.stderr) == (0, "")
    started, last = run.stdout.strip().splitlines()
    assert started == "started"
    interrupted, pid = map(int, last.split())
    assert interrupted == 20
    with pytest.raises(ProcessLookupError):  # it ends with the program
        os.kill(pid, 0)


@pytest.mark.slow
def test_the_worker_ends_with_a_program_that_is_killed():
    code = (
        "from mr1fast.rewards import worker; worker.equal('1', '2'); "
        "print(*worker._state.pool._pool_manager.worker_manager.workers, flush=True); import time; time.sleep(60)"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pid = int(program.stdout.readline())
    program.kill()
    program.communicate()
    for _ in range(100):
        if not _is_running(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the worker outlives its program")


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- a math-verify that fails ----------------------------------------------------------------------------------------

COMPARISON = "return first[0].number == second[0].number"
# Finds \sqrt{n} equal to itself only, but for the two of the trial at the start; and does what a number says.
FAKE = r"""
import os, re, time

class Root:
    free_symbols = set()

    def __init__(self, number):
        self.number = number

    def subs(self, numbers):
        return self

    def evalf(self, digits):
        return self.number**0.5

def parse(text, **_):
    number = int(re.search(r"\d+", text)[0]) if "cdot" not in text else 3
    flag = os.path.join(os.path.dirname(__file__), "died")
    if number == 111:
        time.sleep(60)
    if number == 222 and not os.path.exists(flag):
        open(flag, "w").close()
        os._exit(1)
    if number == 333:
        raise RuntimeError("what is that?")
    if number == 444:
        raise MemoryError
    return [Root(number)]

def verify(first, second, **_):
    return first[0].number == second[0].number
"""


@pytest.fixture
def fake(tmp_path, monkeypatch, new_worker):
    """Writes a math_verify that the worker will import."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "math_verify.py"


def test_a_question_without_an_answer_is_asked_once_more_not_cached_and_counted(fake, monkeypatch):
    fake.write_text(FAKE)
    before = unanswered()
    assert math_worker.equal(r"\sqrt{5}", r"\sqrt{5}")
    assert math_worker.equal(r"\sqrt{222}", r"\sqrt{222}")  # the worker dies once
    assert math_worker.equal(r"\sqrt{333}", r"\sqrt{333}") is False  # a formula that it cannot read is an answer
    assert unanswered() == before
    with monkeypatch.context() as patch:
        patch.setattr(math_worker, "ANSWER_SECONDS", 0.3)
        for _ in range(2):
            started = time.monotonic()
            assert accuracy_reward(r"<answer>√111</answer>", r"\frac{\sqrt{111}}{1}") == 0.0
            assert time.monotonic() - started > 2 * math_worker.ANSWER_SECONDS
    with pytest.raises(Unanswered):
        math_worker.equal(r"\sqrt{444}", r"\sqrt{444}")
    assert unanswered() == before + 3
    assert unanswered_summary().startswith(f"{before + 3} x math-verify failed twice to say")
    assert math_worker.equal(r"\sqrt{5}", r"\sqrt{5}")


def test_an_evaluation_says_how_many_were_not_answered(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(math_worker._state, "unanswered", 2)
    arguments = ["--task", "vc", "--samples", "1", "--sampled", "0", "--max-completion-length", "1"]
    assert evaluate.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert "2 x math-verify failed twice to say whether an answer is right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('no antlr')", "ImportError: no antlr"),
        ("parse = lambda *_, **__: []\nverify = None", "does not find"),
        (FAKE.replace(COMPARISON, "return False"), "does not find"),
        (
            FAKE.replace(COMPARISON, "raise ValueError('threads')"),
            "ValueError: threads",
        ),
        ("x = 1", "cannot import name 'parse'"),
    ],
)
def test_a_math_verify_that_does_not_work_is_an_error(fake, code, reason):
    fake.write_text(code)
    for _ in range(2):
        with pytest.raises(UserError, match=r"math-verify is installed but does not work .*pip install") as error:
            accuracy_reward("<answer>2√3</answer>", r"\sqrt{12}")
        assert reason in str(error.value)
    assert accuracy_reward("<answer>5 cm</answer>", "5") == 1.0  # which needs none


def test_a_worker_that_does_not_start_is_no_answer(new_worker, monkeypatch):
    monkeypatch.setattr(math_worker, "START_SECONDS", 0.0)
    monkeypatch.setattr(math_worker, "ANSWER_SECONDS", 0.05)
    with pytest.raises(Unanswered):
        math_worker.equal(*PAIRS[0])


@pytest.mark.slow
def test_a_bomb_costs_seconds(new_worker, monkeypatch):
    assert math_worker.equal("1", "1")
    monkeypatch.setattr(math_worker, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(math_worker, "ATTEMPTS", 1)
    started = time.monotonic()
    with pytest.raises(Unanswered):
        math_worker.equal("3", "9^{9^{9^{9}}}")
    assert time.monotonic() - started < 60  # the bomb would take for ever
    monkeypatch.setattr(math_worker, "ANSWER_SECONDS", 60)
    assert math_worker.equal("3", r"\frac{6}{2}")  # and the next question is answered

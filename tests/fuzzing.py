"""What the fuzz tests share: how many cases, how long one may take, and changes to what is well formed."""

import math
import os
import signal
import time
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

SECONDS = 2.0  # of CPU time, for any one case


def cases(few: int, most: int = 10_000):
    """`few` cases in `make test`; in `make fuzz` as many as FUZZ_CASES says, but no more than `most`."""
    wanted = int(os.environ.get("FUZZ_CASES", "0"))
    phases = [Phase.explicit, Phase.generate] if wanted else list(Phase)  # a failure among many is not made smaller
    return settings(
        max_examples=min(wanted, most) or few,
        phases=phases,
        derandomize=not wanted,  # `make test` tries the same cases each time, `make fuzz` others
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def at_once():
    """Fails if what is within takes more than SECONDS."""

    def stop(*_):
        raise AssertionError(f"still busy after {SECONDS} s")

    before, started = signal.signal(signal.SIGPROF, stop), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    assert time.process_time() - started < SECONDS  # also where `stop` was taken for an error of the file's


@st.composite
def changed(draw, seeds, junk):
    """One of the seeds (all texts, or all bytes) after up to four changes: cut, repeated, replaced, spliced."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 0, 1, 1, 2, 5, 20, 10**6])))
        kind = draw(st.sampled_from(["replace", "replace", "repeat", "splice", "cut"]))
        if kind == "cut":
            content = content[:start] + content[end:]
        elif kind == "replace":
            content = content[:start] + draw(junk) + content[end:]
        elif kind == "repeat":
            content = content[:start] + content[start:end] * draw(st.sampled_from([2, 3, 50])) + content[end:]
        else:
            other = draw(st.sampled_from(seeds))
            content = content[:start] + other[len(other) // 2 :] + content[end:]
    return content[:20_000]


NUMBERS = st.sampled_from(
    [0, 1, -1, 7, 2**31, 2**63, 2**64, 10**18, 10**40, 0.5, -0.0, 1e308, 1e-308, math.nan, math.inf]
)
# Any JSON, and what only Python's reader takes for it.
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["", " ", "\0", "\ud800", "a" * 3000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BYTES = st.binary(max_size=5) | st.sampled_from(
    [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\n", b'"']
)

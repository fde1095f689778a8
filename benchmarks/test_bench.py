"""The cases of `python -m benchmarks.run` for pytest-benchmark: `pytest benchmarks --benchmark-only`.

Its tables, histories and comparisons (--benchmark-autosave, --benchmark-compare) apply; ratios between cases are better
read from benchmarks.run, which measures the cases of a scene in turn. -k "quick and loss" takes the tiny shapes only.
"""

import time
from functools import lru_cache

import pytest
import torch

from benchmarks import cases
from benchmarks.timing import SLOW

SCENES = {
    f"{size} {scene.title}": scene
    for group in cases.GROUPS
    for size, quick in (("quick", True), ("full", False))
    for scene in cases.load(group, quick)
}


@lru_cache(maxsize=1)  # one scene's inputs at a time: they are large
def inputs_of(title):
    torch.compiler.reset()  # as in timing.measure
    return SCENES[title].inputs()


@pytest.mark.parametrize(
    ("title", "case"),
    [pytest.param(title, case, id=f"{title}, {case.name}") for title, scene in SCENES.items() for case in scene.cases],
)
def test_case(benchmark, title, case):
    scene = SCENES[title]
    if reason := scene.why_not():
        pytest.skip(reason)
    inputs = inputs_of(title)

    def run():
        call.run()
        if scene.device == "cuda":
            torch.cuda.synchronize()

    def reset():
        call.reset()

    try:
        call = case.prepare(inputs)
        reset()
        start = time.perf_counter()
        run()
    except Exception as error:  # a peer that is not installed, a backend that cannot run here
        pytest.skip(f"not measured: {type(error).__name__}: {error}")
    rounds = 1 if time.perf_counter() - start > SLOW else 5
    benchmark.extra_info["work"] = f"{case.work / 1e9:.4g} {case.unit.removesuffix('/s')}"
    benchmark.pedantic(run, setup=reset, rounds=rounds)

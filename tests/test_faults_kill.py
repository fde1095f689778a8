"""kill -9 at random moments: what was written is there, and the resumed run is that which was left alone.

`make faults` runs these; FAULTS=500 tries ten times as many moments, FAULTS_SEED=1 others.
"""

from functools import partial

import pytest

from tests.fault_places import FILE, PLACES, install, kill
from tests.fault_runs import draws, note, times

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2000)]
KINDS = [*PLACES, FILE, "any moment"]
MOMENTS = [("whole model", kind, i) for kind in KINDS for i in times(4)]
MOMENTS += [("LoRA", kind, i) for kind in KINDS for i in times(1)]
TOGETHER = ["a checkpoint", "an evaluation", "sampling", "an update", FILE]
MOMENTS += [("two processes", kind, i) for kind in TOGETHER for i in times(1)]


@pytest.mark.parametrize(("name", "place", "number"), MOMENTS, ids=lambda one: str(one).replace(" ", "-"))
def test_a_run_that_is_killed(name, place, number, variants, tmp_path):
    variant, random, run = variants(name), draws(name, place, number), tmp_path / "run"
    if place == "any moment":
        where, after = "", random.uniform(0, variant.seconds)
        (program,) = variant.start(*variant.new(run))
        program.process.join(after)
        program.process.kill()
        ended = program.end()
    else:
        seconds = variant.places[place]
        call = random.randrange(len(seconds))
        after = 0.0 if place == FILE else random.uniform(0, seconds[call])
        where = f" {seconds[call]}" if place == FILE else f", call {call + 1} of {len(seconds)}"
        harm = partial(install, run, place=place, call=call, harm=partial(kill, after=after))
        harmed = random.randrange(variant.count) if place in ("an evaluation", "sampling", "an update") else 0
        draws_pictures = place in ("drawing", "the pictures")
        ended = variant.run(*variant.new(run), harm=harm, harmed=harmed, draws=draws_pictures)
    variant.assert_all_there(run)
    note("kill -9", f"{name}, {place}{where}, after {after:.3f} s", ended)

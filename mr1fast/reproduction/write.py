"""The results folder: results.json, results.md, and a picture for each figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mr1fast.reproduction.experiments import BASE_RUN, Experiment, Run
from mr1fast.reproduction.figures import draw
from mr1fast.reproduction.results import Results
from mr1fast.reproduction.tables import report
from mr1fast.training.run_folder import versions, write_json, write_text


def write_results(
    records: Mapping[Run, Mapping[str, Any]], experiments: Sequence[Experiment], folder: Path
) -> list[Path]:
    """Draw and tabulate what there is. Returns the files."""
    results = Results(records)
    about = {"computed by": f"{records[BASE_RUN]['computed_by']} (code and base)"}
    about |= {name: value for name, value in versions().items() if name != "mr1fast"}
    pictures = [file for one in experiments if (file := draw(one, results, folder)) is not None]
    markdown, data = folder / "results.md", folder / "results.json"
    write_text(markdown, report(results, experiments, about))
    write_json(data, as_json(results, experiments, about))
    return [*pictures, markdown, data]


def as_json(results: Results, experiments: Sequence[Experiment], about: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of all arms, and all differences."""
    arms = [
        {"task": run.task, "arm": run.arm, "seed": run.seed, "tests": record["tests"], "seconds": record["seconds"]}
        for run, record in results.records.items()
    ]
    return {
        "about": dict(about),
        "arms": arms,
        "experiments": {one.name: _differences(results, one) for one in experiments},
    }


def _differences(results: Results, experiment: Experiment) -> list[dict[str, Any]]:
    found = results.differences(experiment.comparisons)
    return [
        {
            "trained_on": one.task,
            "test": one.test.name,
            "left": one.left,
            "right": one.right,
            # JSON has no NaN: what one seed cannot say is left out.
            **{key: value for key, value in vars(difference).items() if value == value},
            **({"p_corrected": p} if p == p else {}),
        }
        for one, difference, p in found
    ]

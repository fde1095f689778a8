"""The paper's own experiments: the same table and figures from runs of `mr1fast.train` with a preset, on a GPU.

Each arm is a command, which is printed, runs as a process of its own, one after the other, and is resumed where it was
interrupted. Fig. 1 and Fig. 3 are the small experiments' alone: runs are not tested on the way, and each run's own
answers/ and samples.png show what it answers.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mr1fast.data.sources import sources_of
from mr1fast.errors import UserError
from mr1fast.losses.kl_weight import kl_weight
from mr1fast.options.config import TrainConfig
from mr1fast.options.config_file import read_yaml
from mr1fast.options.fields import option_string
from mr1fast.options.parse import parse_arguments
from mr1fast.options.preset import preset_file
from mr1fast.reproduction.arms import OTHER, TEST_OF
from mr1fast.reproduction.cost import Cost
from mr1fast.reproduction.experiments import BASE_RUN, EXPERIMENTS, Experiment, Run, compared
from mr1fast.reproduction.seconds import spelt

PAPER_BETA = {"vc": 0.04, "gr": 0.01}
SFT = {"method": "sft", "epochs": 1, "learning_rate": 2e-5}
LOOKS = {"table1": "own", "fig7": "other"}
DRAWN = ("table1", "fig4", "fig5", "fig6", "fig7")


def _arms(task: str, preset: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Experiment -> arm -> its options beside the preset's."""
    bounds = {name: preset[name] for name in ("beta_min", "beta_max")}
    mean = sum(kl_weight(step, 1000, **bounds) for step in range(1000)) / 1000
    constant = {f"grpo-{beta:g}": {"method": "grpo", "beta": beta} for beta in (0, 0.01, 0.02, 0.03, 0.04, 0.05)}
    alphas = {f"alpha-{alpha:g}": {"reward_weights": f"accuracy=1,format={alpha:g}"} for alpha in (0, 0.25, 0.5, 0.75)}
    paper = f"grpo-{PAPER_BETA[task]:g}"
    mean_arm = {"grpo-mean": {"method": "grpo", "beta": round(mean, 6)}}
    main: dict[str, dict[str, Any]] = {"sft": SFT, paper: constant[paper], **mean_arm, "grpo-d": {}}
    return {
        "table1": main,
        "fig4": {**alphas, "grpo-d": {}},
        "fig5": {paper: constant[paper], "grpo-d": {}},
        "fig6": {**constant, "grpo-d": {}},
        "fig7": main,
    }


@dataclass(frozen=True)
class FullScale:
    """preset: its name, such as gr-2b. given: the options of `mr1fast.train` that the user has set."""

    preset: str
    given: Mapping[str, str]

    @classmethod
    def of(cls, preset: str, model: str | None, data: str | None, test_data: str | None) -> FullScale:
        """Raises UserError for a preset that does not exist."""
        preset_file(preset)
        named = {"model": model, "data": data, "test_data": test_data}
        return cls(preset, {name: value for name, value in named.items() if value is not None})

    @property
    def task(self) -> str:
        return self.preset.partition("-")[0]

    def arms(self, names: Sequence[str], only: Sequence[str] | None) -> dict[str, dict[str, Any]]:
        """Arm -> its options, of all these experiments. Raises UserError for one that cannot be drawn."""
        there = _arms(self.task, read_yaml(str(preset_file(self.preset))))
        found = {arm: options for name in names if name in DRAWN for arm, options in there[name].items()}
        if not found:
            raise UserError(f"with --preset there are {', '.join(DRAWN)}, and not {', '.join(names)}")
        return {arm: options for arm, options in found.items() if only is None or arm in only}

    def experiments(self, names: Sequence[str]) -> list[Experiment]:
        """As the tables and figures read them."""
        there, paper = _arms(self.task, read_yaml(str(preset_file(self.preset)))), f"grpo-{PAPER_BETA[self.task]:g}"
        pairs = [("grpo-d", paper), ("grpo-d", "grpo-mean"), ("grpo-d", "sft"), (paper, "sft")]
        looks = {name: tuple(compared(tests, pairs, [self.task])) for name, tests in LOOKS.items()}
        return [
            replace(EXPERIMENTS[name], arms={self.task: tuple(there[name])}, comparisons=looks.get(name, ()))
            for name in names
            if name in DRAWN
        ]

    def arguments(self, options: Mapping[str, Any], seed: int, folder: Path) -> list[str]:
        """Of `mr1fast.train`."""
        given = {**self.given, **options, "seed": seed, "output_dir": folder}
        pairs = [
            [option_string(name), f"{value:g}" if isinstance(value, float) else str(value)]
            for name, value in given.items()
        ]
        return ["--preset", self.preset, *(part for pair in pairs for part in pair)]

    def run(
        self, names: Sequence[str], seeds: Sequence[int], only: Sequence[str] | None, folder: Path, dry_run: bool
    ) -> None:
        """Print the commands and what they cost; run them unless `dry_run`, and tabulate. Raises UserError."""
        arms = self.arms(names, only)
        if not dry_run and len(sources_of(self.given["test_data"]) if "test_data" in self.given else ()) != 2:
            raise UserError("--test-data must name two data sets: the task's own first, then the other task's")
        runs = {
            Run(self.task, arm, seed): self.arguments(options, seed, folder / "runs" / f"{arm}-{seed}")
            for seed in seeds
            for arm, options in arms.items()
        }
        configs = {run: _config(arguments) for run, arguments in runs.items()}
        size = self.preset.rpartition("-")[2]
        costs = {run: Cost.of(config, size) for run, config in configs.items()}
        for run, arguments in runs.items():
            print(f"{run.name}: {costs[run]}\n  {shlex.join(['python', '-m', 'mr1fast.train', *arguments])}")
        hours = sum(cost.hours for cost in costs.values())
        print(f"\n{len(runs)} arms: about {hours:.0f} hours of one H100 in all. {Cost.ASSUMES}")
        if dry_run:
            return
        for number, (run, arguments) in enumerate(runs.items(), start=1):
            left = 3600 * sum(cost.hours for later, cost in costs.items() if later not in list(runs)[: number - 1])
            print(f"[{number}/{len(runs)}] {run.name}; about {spelt(left)} left", flush=True)
            _train(arguments, folder / "runs" / f"{run.arm}-{run.seed}")
        records = {run: record_of(folder / "runs" / f"{run.arm}-{run.seed}", run, configs[run]) for run in runs}
        records[BASE_RUN] = _base_record(next(iter(records.values())))
        from mr1fast.reproduction.write import write_results

        for file in write_results(records, self.experiments(names), folder):
            print(file)


def _config(arguments: Sequence[str]) -> TrainConfig:
    config = parse_arguments(arguments).config
    assert config is not None
    return config


def _train(arguments: Sequence[str], folder: Path) -> None:
    """Run or resume one arm, unless it has finished. Raises UserError if it fails."""
    if _has_finished(folder):
        return
    resume = any(folder.glob("*/checkpoint-*"))
    command = [sys.executable, "-m", "mr1fast.train", *(["--resume", str(folder)] if resume else arguments)]
    if code := subprocess.run(command, check=False).returncode:
        raise UserError(f"the arm in {folder} ended with exit code {code}; the same command goes on there")


def _has_finished(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "result.json").read_text(encoding="utf-8"))["after"])
    except (OSError, ValueError, KeyError):
        return False


def record_of(folder: Path, run: Run, config: TrainConfig) -> dict[str, Any]:
    """A finished run as the tables read it. The tests are those of `--test-data`: the task's own, and the other's."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    tested = [figures for figures in result["after"].values() if figures][-len(result["before"]) :]
    tests = [TEST_OF[run.task].name, TEST_OF[OTHER[run.task]].name]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "settings": {"options": {**config.resolved()}},
        "computed_by": result["versions"]["mr1fast"],
        "curve": [row for row in rows if row["step"] > 0],
        "tests": dict(zip(tests, tested)),
        "before": dict(zip(tests, result["before"].values())),
        "seconds": result["seconds"],
    }


def _base_record(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "tests": record["before"], "curve": []}

"""Which problems a run trains on, and which it is tested on."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from mr1fast.data.dataset import ImageTextDataset, count_shared, load_split, split_sizes
from mr1fast.data.sources import data_name, source_of
from mr1fast.data.tasks import SPLITS, TASKS
from mr1fast.errors import UserError
from mr1fast.options.config import TaskConfig, TrainConfig
from mr1fast.options.recipes import DEFAULT_EVAL_SAMPLES, TASK_NAMES
from mr1fast.training.run_folder import ResumeError

# Embedded tasks are endless; after this many drawings they repeat in another order. A run rarely gets that far.
MAX_DRAWINGS = 1_000_000


@dataclass
class RunData:
    names: list[str]  # of the tasks, or of the data set; a model is trained on each
    train: dict[str, ImageTextDataset]
    validation: dict[str, ImageTextDataset]  # none with --eval-steps 0
    tests: dict[str, ImageTextDataset]  # all of them, whichever is trained on; none with --eval-samples 0

    @property
    def splits(self) -> list[ImageTextDataset]:
        return [split for one in (self.train, self.validation, self.tests) for split in one.values()]

    @property
    def content(self) -> dict[str, str]:
        """What is in each split of local data; see `ImageTextDataset.content`."""
        return {f"{split.name}/{split.split}": split.content for split in self.splits if split.content}

    def sizes(self, *, own: bool) -> list[str]:
        """A line for the splits of the user's own data, if that is trained on, and for each other data set."""
        lines = [split_sizes([split for split in self.splits if split.name in self.names])] if own else []
        added = [one for name, one in self.tests.items() if name not in (*self.names, *TASK_NAMES)]
        return lines + [f"{one.name}: {len(one)} problems to test on" for one in added]


def load_data(config: TrainConfig, called: str | None = None) -> RunData:
    """called: the name of the data, if it is not that of its folder or file. Raises UserError, in one sentence."""
    own = None if config.data is None else source_of(config.data)
    sources = [*dict.fromkeys([*TASK_NAMES, *config.test_sources])] if own is None else [*config.test_sources] or [own]
    used = [split for split in SPLITS if split != "test" or own is None or own in sources]
    if not config.eval_steps:
        used.remove("validation")
    names = [called or data_name(own)] if own else list(config.tasks)
    watched = names if config.eval_steps else []
    tested = [] if config.eval_samples == 0 else sources
    tests = {source: _test_data(config, source, own, used) for source in tested}
    if own in tests:
        tests[own].name = names[0]

    def split(name: str, which: str, count: int | None, sample_seed: int | None = None) -> ImageTextDataset:
        source = own or name
        dataset = load_split(source, which, count=count, sample_seed=sample_seed, used=used, reading=config.reading)
        dataset.name = name
        return dataset

    data = RunData(
        names=names,
        train={name: split(name, "train", *_training_examples(config, name)) for name in names},
        validation={name: split(name, "validation", config.eval_validation_samples) for name in watched},
        tests=_by_name(tests, own, names),
    )
    for dataset in data.train.values():
        if config.train_samples is not None and len(dataset) < config.train_samples:
            there = f"{dataset.name} has only {len(dataset)} examples to train on"
            raise UserError(f"--train-samples {config.train_samples}: {there}")
        for test in data.tests.values():
            if test.places and test.name != dataset.name:  # a split of its own has been compared
                count_shared(dataset, test)
    return data


def check_same_data(data: RunData, recorded: dict[str, str], *, moved_to: str | None) -> None:
    """Say that the data of a resumed run has changed; raises ResumeError if it has moved as well."""
    now = data.content
    changed = [split for split, content in recorded.items() if now.get(split, content) != content]
    if changed and moved_to is not None:
        what = f"its questions, answers or images are not those that the run began with ({', '.join(changed)})"
        raise ResumeError(f"--data {moved_to} is not the data of this run: {what}")
    if changed:
        print(f"warning: the data is not what the run began with ({', '.join(changed)})", file=sys.stderr)


def _test_data(config: TrainConfig, source: str, own: str | None, used: list[str]) -> ImageTextDataset:
    """All of it, unless it is a task or the data that is trained on, which may be endless or large."""
    count = config.eval_samples
    if source == own or source in TASKS:
        count = DEFAULT_EVAL_SAMPLES if count is None else count
        return load_split(source, "test", count=count, used=used, reading=config.reading)
    # A column that --columns names for --data may have one of the usual names here.
    reading = replace(config.reading, strict=own is None)
    return load_split(source, None, count=count, cut=False, reading=reading)


def _training_examples(config: TrainConfig, name: str) -> tuple[int | None, int | None]:
    """How many of them, None for all, and the seed by which they are drawn, None for the first ones."""
    if config.train_samples is not None:
        return config.train_samples, config.seed
    return None if config.data is not None else _drawings(config.for_task(name)), None


def _drawings(config: TaskConfig) -> int:
    """As many examples of an embedded task as the run can use."""
    return min(-(-config.max_steps // config.num_iterations) * config.prompts_per_step, MAX_DRAWINGS)


def _by_name(tests: dict[str, ImageTextDataset], own: str | None, names: list[str]) -> dict[str, ImageTextDataset]:
    """The data sets by name, with that of the folder before it where two have the same."""
    taken = Counter(dataset.name for dataset in tests.values())
    taken.update([] if own is None or own in tests else names)
    for source, dataset in tests.items():
        if taken[dataset.name] > 1 and source not in (own, *TASKS):
            dataset.name = f"{data_name(str(Path(source).parent))}/{dataset.name}"
    named = {dataset.name: dataset for dataset in tests.values()}
    if len(named) < len(tests):
        twice = next(name for name, n in Counter(one.name for one in tests.values()).items() if n > 1)
        raise UserError(f"--test-data: two data sets are called {twice}; rename one of them")
    return named

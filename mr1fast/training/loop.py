"""A run from beginning to end: evaluate the base, train a model on each task, evaluate again. Read it top-down."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from mr1fast.data.dataset import ImageTextDataset, load_split, split_sizes
from mr1fast.data.tasks import TASKS
from mr1fast.errors import UserError
from mr1fast.evaluation.evaluate import evaluate
from mr1fast.evaluation.summary import load_snippet, result_table
from mr1fast.model import load as models
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.options.config import TASK_NAMES, TrainConfig
from mr1fast.rewards import unanswered, unanswered_summary
from mr1fast.training.checkpoint import load_checkpoint, save_checkpoint, save_model
from mr1fast.training.metrics import MetricsLog
from mr1fast.training.run_folder import (
    OpenRun,
    ResumeError,
    RunFolder,
    checkpoints,
    step_of,
    versions,
    write_config,
    write_json,
)
from mr1fast.training.stop import Stopped, finishing_steps
from mr1fast.training.trainer import MAX_SKIPPED_IN_A_ROW, Trainer, TrainingError, needs_reference

PICTURED = 8  # problems of each task in samples.png


def run(opened: OpenRun, started: float) -> None:
    """`started`: time.time() at the program's start. Raises UserError, TrainingError and Stopped."""
    try:
        setup = prepare(opened)
    except ValueError as error:  # of the model or the data, in one sentence
        raise UserError(str(error)) from error
    folder = setup.folder
    result = folder.read_result() or new_result(setup)
    todo = [name for name in setup.names if name not in result["after"] or opened.names_checkpoint_of(name)]
    if not todo:
        longer = f"to train longer, start a new run from --model {folder.model(setup.names[0])}"
        raise ResumeError(f"nothing to resume: the run {folder.path} has finished; {longer}")
    write_config(folder, setup.config)
    print(setup.description(), flush=True)

    seconds_before = result["seconds"]
    for data in setup.tests:
        if data not in result["before"]:
            result["before"][data] = test(setup, setup.base, data, "before training")
    try:
        folder.write_result(result)
        for name in todo:
            model, state = starting_point(setup, name, opened.checkpoint if opened.names_checkpoint_of(name) else None)
            result["after"].pop(name, None)  # a task that is rewound to an earlier checkpoint has not finished any more
            folder.write_result(result)
            train_task(setup, name, model, state)
            save_model(model, setup.processor, folder.model(name))
            figures = {data: test(setup, model, data, f"trained on {name}") for data in setup.tests}
            result["after"] |= figures if len(setup.names) == 1 else {name: figures[name]}
            result["cross_task"][name] = {data: figures[data] for data in figures if data != name}
            result["steps"][name] = setup.config.for_task(name).max_steps
            folder.write_result(result)
        draw_pictures(setup)
    finally:
        result["seconds"] = round(seconds_before + time.time() - started, 1)
        with suppress(OSError):  # a full disk has been reported, or is about to be
            folder.write_result(result)

    print(f"\n{result_table(result)}\n")
    for name in setup.names:
        print(f"the model trained on {name} is in {folder.model(name)}")
    print(f"to load one (docs/training.md goes on from there):\n\n{load_snippet(str(folder.model(setup.names[0])))}\n")
    print(f"pictures: {folder.curves} and {folder.samples}")
    if unanswered():
        print(f"\n{unanswered_summary()}")


def starting_point(
    setup: Setup, name: str, checkpoint: Path | None
) -> tuple[Qwen2VLForConditionalGeneration, dict[str, Any] | None]:
    """The base, or the model and the state of the task's newest (or the given) checkpoint."""
    known = checkpoints(setup.folder.task(name))
    if checkpoint is None and not known:
        return setup.load(setup.base_path), None
    return load_checkpoint(checkpoint or known[-1], setup.load)


def train_task(setup: Setup, name: str, model: Qwen2VLForConditionalGeneration, state: dict[str, Any] | None) -> None:
    """Train the model on one task, from the beginning or from the state of a checkpoint."""
    config, folder = setup.config.for_task(name), setup.folder.task(name)
    dataset, validation = setup.train[name], setup.validation.get(name)
    said = dataset.summary()
    trainer = Trainer(config, model, setup.base if needs_reference(config) else None, setup.processor, dataset)
    if state is not None:
        trainer.load_state_dict(state)
    _remove_after(folder, trainer.finished_steps)
    log = MetricsLog(setup.folder, name, first_step=0 if state is None else trainer.finished_steps + 1)
    if validation is not None and state is None:
        log.log(0, setup.validate(model, validation, name))
    bar = tqdm(total=config.max_steps, initial=trainer.finished_steps, desc=f"{config.method} on {name}", unit="step")
    with finishing_steps() as stop, bar:
        while trainer.finished_steps < config.max_steps:
            metrics = trainer.step()
            step, last = trainer.finished_steps, trainer.finished_steps == config.max_steps
            if validation is not None and (step % config.eval_steps == 0 or last):
                metrics |= setup.validate(model, validation, name)
            log.log(step, metrics)
            bar.set_postfix_str(postfix(metrics), refresh=False)
            bar.update()
            if trainer.skipped_sample is not None:
                write_json(folder / "skipped" / f"step-{step:06d}.json", trainer.skipped_sample)
                if trainer.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise TrainingError(_gave_up(trainer.skipped_sample["reason"], folder))
            if step % config.save_steps == 0 or last or stop.signal_number is not None:
                state = trainer.state_dict()
                save_checkpoint(model, setup.processor, state, folder, step=step, keep=config.save_total_limit)
            if stop.signal_number is not None:
                log.close()
                draw_pictures(setup)
                raise Stopped(stop.signal_number)
    log.close()
    if dataset.summary() != said:  # images that turned out to be broken
        print(dataset.summary())


def postfix(metrics: dict[str, float]) -> str:
    """What the progress bar shows beside the time left."""
    names = {"reward": "reward", "rewards/accuracy_reward/mean": "accuracy", "kl": "kl", "beta": "beta"}
    if "reward" not in metrics:
        names = {"loss": "loss"}
    shown = {title: metrics[name] for name, title in names.items() if name in metrics}
    if skipped := metrics["skipped_steps"]:
        shown["skipped"] = skipped
    return ", ".join(f"{title} {value:.3g}" for title, value in shown.items())


def test(setup: Setup, model: Qwen2VLForConditionalGeneration, data: str, what: str) -> dict[str, float]:
    """The figures of result.json, on the test split."""
    return setup.evaluate(model, setup.tests[data], data, progress=f"test on {data}, {what}")


def draw_pictures(setup: Setup) -> None:
    """curves.png, and samples.png of every model that the run has so far. A run is not lost for a picture."""
    from mr1fast.evaluation.curves import draw_curves  # matplotlib takes its time
    from mr1fast.evaluation.samples import before_and_after, draw_samples

    folder, shown, titles = setup.folder, [], []
    for name in setup.names:
        trained = [folder.model(name)] if folder.model(name).exists() else checkpoints(folder.task(name))
        if trained:
            examples = [setup.tests[name][index] for index in range(min(PICTURED, len(setup.tests[name])))]
            longest = setup.config.for_task(name).max_completion_length
            model = setup.load(trained[-1])
            shown += before_and_after(setup.base, model, setup.processor, examples, max_completion_length=longest)
            titles.append(TASKS[name].title if name in TASKS else name)
    title = f"{' and '.join(titles)}, trained with {setup.config.method}"
    try:
        draw_curves([folder.path], folder.curves)
        draw_samples(folder.samples, shown, title[:1].upper() + title[1:])
    except OSError as error:
        print(f"no pictures: {error}", file=sys.stderr)


# ---- preparation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What stays the same during a run."""

    config: TrainConfig
    folder: RunFolder
    base_path: str | Path
    base: Qwen2VLForConditionalGeneration  # frozen: what training starts from, and its reference
    processor: Qwen2VLTextImageProcessor
    load: Any  # path -> a model for this device
    names: list[str]  # of the tasks, or of the data set
    train: dict[str, ImageTextDataset]
    validation: dict[str, ImageTextDataset]  # none with --eval-steps 0
    tests: dict[str, ImageTextDataset]  # of both embedded tasks, whichever is trained on

    def evaluate(
        self,
        model: Qwen2VLForConditionalGeneration,
        dataset: ImageTextDataset,
        name: str,
        progress: str | None = None,
    ):
        config = self.config.for_task(name)
        result = evaluate(
            model,
            self.processor,
            dataset,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            progress=progress,
            seed=config.seed,
        )
        return result.figures()

    def validate(
        self, model: Qwen2VLForConditionalGeneration, dataset: ImageTextDataset, name: str
    ) -> dict[str, float]:
        """The same under the names of metrics.jsonl."""
        return {f"eval/{name}/{key}": value for key, value in self.evaluate(model, dataset, name).items()}

    def description(self) -> str:
        parameters = sum(p.numel() for p in self.base.parameters())
        what = f"{self.config.method} on {', then '.join(self.names)}"
        threads, dtype = torch.get_num_threads(), str(self.base.dtype).removeprefix("torch.")
        where = f"{self.base.device}, {dtype}, {threads} thread{'s' * (threads > 1)}"
        lines = [f"{what}: {self.base_path}, {parameters:,} parameters, {where}", f"files go to {self.folder.path}"]
        if self.config.data is not None:
            splits = [split for one in (self.train, self.validation, self.tests) for split in one.values()]
            lines += [split_sizes(splits), *(split.summary() for split in splits if split.skipped or split.notes)]
        steps, warmup = [self.config.for_task(name).max_steps for name in self.names], self.config.warmup_steps
        if warmup >= min(steps):
            what = f"--warmup-steps {warmup} is not below --max-steps {min(steps)}"
            lines.append(f"warning: {what}: the learning rate never comes to --learning-rate")
        return "\n".join(lines)


def prepare(opened: OpenRun) -> Setup:
    """Load model and data. Raises ValueError in one sentence."""
    config = opened.config
    transformers.utils.logging.disable_progress_bar()
    device = models.choose_device(config.device)
    load = partial(
        models.load_model,
        device=device,
        dtype=models.choose_dtype(config.dtype, device),
        attention=models.choose_attention(config.attention, device),
    )
    base_path = models.EMBEDDED if config.model is None else config.model
    base = load(base_path).eval().requires_grad_(False)
    torch.set_num_threads(config.threads or models.choose_threads(base))
    sources = [config.data] if config.data is not None else TASK_NAMES
    tests = [load_split(source, "test", count=config.eval_samples) for source in sources]
    names = list(config.tasks) or [tests[0].name]

    def splits(split: str, count: Callable[[TrainConfig], int | None]) -> dict[str, ImageTextDataset]:
        return {name: load_split(config.data or name, split, count=count(config.for_task(name))) for name in names}

    return Setup(
        config=config,
        folder=opened.folder,
        base_path=base_path,
        base=base,
        processor=models.load_processor(base_path, max_pixels=config.max_pixels),
        load=load,
        names=names,
        train=splits("train", _train_rows),
        validation=splits("validation", lambda task: task.eval_validation_samples) if config.eval_steps else {},
        tests={dataset.name: dataset for dataset in tests},
    )


def _train_rows(config: TrainConfig) -> int | None:
    """All rows of local data; of an embedded task, which is endless, as many as the run can use."""
    return None if config.data is not None else -(-config.max_steps // config.num_iterations) * config.prompts_per_step


def new_result(setup: Setup) -> dict[str, Any]:
    config = setup.config
    return {
        "before": {},
        "after": {},
        "cross_task": {},
        "seconds": 0.0,
        "steps": {},
        "seed": config.seed,
        "versions": versions(),
        "config": dataclasses.asdict(config),
        "config_of_task": {name: dataclasses.asdict(config.for_task(name)) for name in setup.names},
    }


def _remove_after(task_folder: Path, step: int) -> None:
    """What a resumed run wrote after this step, and will write again."""
    for later in checkpoints(task_folder):
        if step_of(later) > step:
            shutil.rmtree(later)
    for sample in task_folder.glob("skipped/step-*.json"):
        if step_of(sample) > step:
            sample.unlink()
    shutil.rmtree(task_folder / "model", ignore_errors=True)


def _gave_up(reason: str, folder: Path) -> str:
    return (
        f"{MAX_SKIPPED_IN_A_ROW} steps in a row had no finite numbers (the last: {reason}), so training has stopped; "
        f"a lower --learning-rate often helps, and the samples are in {folder / 'skipped'}"
    )

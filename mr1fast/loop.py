"""A run from beginning to end: evaluate the base, train a model on each task, evaluate again. Read it top-down."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from mr1fast import model as models
from mr1fast.checkpoint import load_state, save_checkpoint, save_model
from mr1fast.config import TASK_NAMES, TrainConfig, UserError
from mr1fast.data import ImageTextDataset, load_split
from mr1fast.evaluate import evaluate
from mr1fast.metrics import MetricsLog
from mr1fast.processor import Qwen2VLTextImageProcessor
from mr1fast.run_folder import FinishedError, OpenRun, RunFolder, checkpoints, step_of, write_config, write_json
from mr1fast.stop import Stopped, finishing_steps
from mr1fast.summary import load_snippet, result_table
from mr1fast.tasks import TASKS
from mr1fast.trainer import MAX_SKIPPED_IN_A_ROW, Trainer, TrainingError, needs_reference

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
        raise FinishedError(f"nothing to resume: the run {folder.path} has finished")
    write_config(folder, setup.config)
    print(setup.description(), flush=True)

    seconds_before = result["seconds"]
    for data in setup.tests:
        if data not in result["before"]:
            result["before"][data] = test(setup, setup.base, data, "before training")
    for name in todo:  # a task that is rewound to an earlier checkpoint has not finished any more
        result["after"].pop(name, None)
    try:
        folder.write_result(result)
        for name in todo:
            model = train_task(setup, name, opened.checkpoint if opened.names_checkpoint_of(name) else None)
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
        print(f"the model trained on {name} is in {folder.model(name)}; to load it:\n")
        print(load_snippet(str(folder.model(name))) + "\n")
    print(f"pictures: {folder.curves} and {folder.samples}")


def train_task(setup: Setup, name: str, checkpoint: Path | None) -> Qwen2VLForConditionalGeneration:
    """The model trained on one task, from the base or from its newest (or the given) checkpoint."""
    config, folder = setup.config.for_task(name), setup.folder.task(name)
    checkpoint = _rewind(folder, checkpoint)
    model = setup.load(setup.base_path if checkpoint is None else checkpoint)
    dataset = setup.train_split(config, name)
    trainer = Trainer(config, model, setup.base if needs_reference(config) else None, setup.processor, dataset)
    if checkpoint is not None:
        trainer.load_state_dict(load_state(checkpoint))
    validation = setup.split(name, "validation", config.eval_validation_samples) if config.eval_steps else None
    log = MetricsLog(setup.folder, name, first_step=0 if checkpoint is None else trainer.finished_steps + 1)
    if validation is not None and checkpoint is None:
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
    if config.data is not None:
        print(dataset.summary())
    return model


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
    dataset = setup.tests[data]
    with tqdm(desc=f"test on {data}, {what}", unit="completion", leave=False) as bar:
        return setup.evaluate(model, dataset, data, progress=bar)


def draw_pictures(setup: Setup) -> None:
    """curves.png, and samples.png of every model that the run has so far. A run is not lost for a picture."""
    from mr1fast.plot import draw_curves  # matplotlib takes its time
    from mr1fast.samples import before_and_after, draw_samples

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
    tests: dict[str, ImageTextDataset]

    def split(self, name: str, split: str, count: int | None) -> ImageTextDataset:
        return load_split(self.config.data or name, split, count=count)

    def train_split(self, config: TrainConfig, name: str) -> ImageTextDataset:
        """All rows of local data; of an embedded task, which is endless, as many as the run can use."""
        batches = -(-config.max_steps // config.num_iterations)
        return self.split(name, "train", None if config.data is not None else batches * config.prompts_per_step)

    def evaluate(
        self, model: Qwen2VLForConditionalGeneration, dataset: ImageTextDataset, name: str, progress: Any = None
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
        return f"{what}: {self.base_path}, {parameters:,} parameters, {where}\nfiles go to {self.folder.path}"


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
    return Setup(
        config=config,
        folder=opened.folder,
        base_path=base_path,
        base=base,
        processor=models.load_processor(base_path, max_pixels=config.max_pixels),
        load=load,
        names=names,
        tests={dataset.name: dataset for dataset in tests},
    )


def new_result(setup: Setup) -> dict[str, Any]:
    config = setup.config
    return {
        "before": {},
        "after": {},
        "cross_task": {},
        "seconds": 0.0,
        "steps": {},
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "config_of_task": {name: dataclasses.asdict(config.for_task(name)) for name in setup.names},
    }


def _rewind(task_folder: Path, checkpoint: Path | None) -> Path | None:
    """The checkpoint to go on from. What the run wrote after it is removed, for it will be written again."""
    known = checkpoints(task_folder)
    if checkpoint is None and known:
        checkpoint = known[-1]
    step = 0 if checkpoint is None else step_of(checkpoint)
    for later in known:
        if step_of(later) > step:
            shutil.rmtree(later)
    for sample in task_folder.glob("skipped/step-*.json"):
        if step_of(sample) > step:
            sample.unlink()
    shutil.rmtree(task_folder / "model", ignore_errors=True)
    return checkpoint


def _gave_up(reason: str, folder: Path) -> str:
    return (
        f"{MAX_SKIPPED_IN_A_ROW} steps in a row had no finite numbers (the last: {reason}), so training has stopped; "
        f"a lower --learning-rate often helps, and the samples are in {folder / 'skipped'}"
    )

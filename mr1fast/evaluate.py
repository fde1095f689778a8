"""`python -m mr1fast.evaluate`: how many questions does a model answer right?

Imports torch only when there is something to compute, so that a mistake on the command line is answered at once.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mr1fast.errors import UserError
from mr1fast.evaluation.result import EvalResult, Sample, wilson_interval
from mr1fast.options.config import RECIPES, TASK_NAMES, choice
from mr1fast.options.program import Parser, at_least, exit_code
from mr1fast.training.run_folder import RUNS, new_folder, versions, write_json

if TYPE_CHECKING:
    from mr1fast.data.dataset import ImageTextDataset

DEFAULT_SAMPLES = 400  # problems, of a task that has no end


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m mr1fast.evaluate",
        description="How many questions about images a Qwen2-VL answers right. Prints a table, and writes "
        "evaluation.json and report.html, which shows the mistakes with their images.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", metavar="DIR", help="a folder (or a hub name) with a Qwen2-VL [default: the embedded one]")
    add("--task", metavar="TEXT", help="an embedded task: vc (visual counting) or gr (geometry reasoning)")
    add("--data", metavar="PATH", help="local data: a folder or file with the columns image, problem, solution")
    add("--split", metavar="TEXT", default="test", help="train, validation, test or, of --data, all [default: test]")
    add(
        "--samples",
        metavar="N",
        type=at_least(1),
        help="problems; vc's are drawn without end, gr's test split has 200, which then come again in other drawings "
        f"[default: {DEFAULT_SAMPLES} of a task, all of --data]",
    )
    add(
        "--sampled",
        metavar="N",
        type=at_least(0),
        default=1,
        help="completions of a problem for the sampled accuracy, besides the greedy one; 0 for none [default: 1]",
    )
    add("--temperature", metavar="X", type=float, default=1.0, help="of those completions [default: 1.0]")
    add(
        "--max-completion-length",
        metavar="N",
        type=at_least(1),
        help="longest completion, in tokens [default: 32 for the embedded model, else 512]",
    )
    add("--max-pixels", metavar="N", type=at_least(1), help="images are scaled down to this size, in pixels")
    add("--batch-size", metavar="N", type=at_least(1), help="problems at a time [default: by the model's size]")
    add("--seed", metavar="N", type=at_least(0), default=0, help="of sampling [default: 0]")
    add("--output-dir", metavar="DIR", help="a new or empty folder [default: runs/<date-time>-evaluation]")
    add("--device", metavar="TEXT", default="auto", help="cpu, cuda, ...; auto is a GPU where there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto is bfloat16 on a GPU")
    add("--attention", default="auto", choices=("auto", "sdpa", "flash_attention_2", "eager"), help="[default: auto]")
    add("--threads", metavar="N", type=at_least(1), help="CPU threads [default: by the model's size]")
    return parser


def _check(options: argparse.Namespace) -> None:
    if (options.task is None) == (options.data is None):
        raise UserError("give either --task vc, --task gr or --data PATH")
    if options.task is not None:
        choice("--task", options.task, TASK_NAMES)
    choice("--split", options.split, ("train", "validation", "test", *(["all"] if options.data else [])))
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        rule = "must be a finite number above 0"
        raise UserError(f"--temperature {rule}, got {options.temperature:g}; greedy decoding is always done")
    if options.model is not None and (models := sorted(Path(options.model).glob("*/model/config.json"))):
        raise UserError(f"--model {options.model} is a run; give one of its models, such as {models[0].parent}")
    if options.data is not None and not Path(options.data).exists():
        raise UserError(f"--data {options.data} does not exist")


def run(arguments: Sequence[str] | None) -> None:
    """Raises ValueError in one sentence for a mistake of the user's."""
    options = build_parser().parse(arguments)
    _check(options)
    import torch
    import transformers

    from mr1fast.data.dataset import load_split
    from mr1fast.data.tasks import TASKS
    from mr1fast.evaluation.evaluate import evaluate
    from mr1fast.evaluation.report import result_text, write_report
    from mr1fast.model import load as models
    from mr1fast.rewards import unanswered, unanswered_summary

    started = time.time()
    transformers.utils.logging.disable_progress_bar()
    device = models.choose_device(options.device)
    path = models.EMBEDDED if options.model is None else options.model
    count = options.samples or (DEFAULT_SAMPLES if options.task else None)
    dataset: ImageTextDataset = load_split(options.data or options.task, options.split, count=count)
    model = models.load_model(
        path,
        device=device,
        dtype=models.choose_dtype(options.dtype, device),
        attention=models.choose_attention(options.attention, device),
    )
    processor = models.load_processor(path, max_pixels=options.max_pixels)
    torch.set_num_threads(options.threads or models.choose_threads(model))
    recipe = RECIPES["vc" if models.is_small(model) else "model"]
    longest = options.max_completion_length or recipe["max_completion_length"]
    folder = new_folder(options.output_dir, default=RUNS / time.strftime("%Y-%m-%d-%H-%M-%S-evaluation"))
    samples: list[Sample] = []
    stopped = False
    try:
        evaluate(
            model,
            processor,
            dataset,
            max_completion_length=longest,
            sampled=options.sampled,
            temperature=options.temperature,
            batch_size=options.batch_size,
            progress=f"{dataset.name}, {options.split} split",
            seed=options.seed,
            samples=samples,
        )
    except KeyboardInterrupt:
        if not samples:
            raise
        stopped = True
    result = EvalResult.of(samples)
    settings: dict[str, Any] = {
        "model": str(path),
        "data": dataset.name,
        "split": options.split,
        "sampled": options.sampled,
        "temperature": options.temperature,
        "max_completion_length": longest,
        "seed": options.seed,
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.time() - started, 1),
    }
    if stopped:
        settings["stopped"] = f"after {result.n} of {len(dataset)} problems"
    write_json(folder / "evaluation.json", as_json(result, settings, dataset.summary()))
    page = write_report(folder / "report.html", result, settings, dataset)
    print(result_text(result, settings))
    if dataset.skipped or dataset.notes:
        print(f"\n{dataset.summary()}")
    if options.task and (there := TASKS[options.task].split_size(options.split)) and result.n > there:
        print(f"\n{options.task} has {there} problems in this split; the others were the same in another drawing")
    if unanswered():
        print(f"\n{unanswered_summary()}")
    print(f"\nthe mistakes with their images: {page}\nthe figures:                    {folder / 'evaluation.json'}")
    if stopped:
        raise KeyboardInterrupt


def as_json(result: EvalResult, settings: dict[str, Any], summary: str) -> dict[str, Any]:
    """What evaluation.json holds; figures are fractions."""
    return {
        **result.figures(),
        "greedy_accuracy_95_percent_interval": wilson_interval(result.greedy_accuracy, result.n),
        "by_answer": {answer: {"right": right, "n": n} for answer, (right, n) in result.by_answer().items()},
        "settings": settings,
        "versions": versions(),
        "data": summary,
        "samples": [asdict(sample) for sample in result.samples],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code(run, arguments)


if __name__ == "__main__":
    sys.exit(main())

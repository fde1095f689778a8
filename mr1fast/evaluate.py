"""`python -m mr1fast.evaluate`: how many questions does a model answer correctly?

Imports torch only when there is something to compute, so that a mistake on the command line is answered at once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mr1fast.data.text_files import whole_characters
from mr1fast.evaluation.result import EvalResult, wilson_interval
from mr1fast.evaluation.terminal import evaluation_table
from mr1fast.options.evaluate_options import build_parser, check
from mr1fast.options.program import check_one_process, exit_code
from mr1fast.options.prompt import chosen_prompt
from mr1fast.options.reading import read_as
from mr1fast.options.recipes import DEFAULT_EVAL_SAMPLES, RECIPES, recipe_name
from mr1fast.training.open_run import check_data_paths
from mr1fast.training.run_folder import RUNS, new_folder, versions, write_json
from mr1fast.training.stop import Stopped, is_out_of_memory, stop_on_sigterm

if TYPE_CHECKING:
    from mr1fast.data.dataset import ImageTextDataset
    from mr1fast.model.policy import Policy


def run(arguments: Sequence[str] | None) -> None:
    """Raises ValueError in one sentence for a mistake of the user's."""
    options = build_parser().parse(arguments)
    check(options)
    check_data_paths(options.data, options.image_root)
    check_one_process("evaluation")
    from mr1fast.evaluation.answers import read_answers
    from mr1fast.evaluation.evaluate import evaluate, result_of
    from mr1fast.model.prompts import longest_prompt
    from mr1fast.training.setup import too_long

    started = time.time()
    dataset = _load_data(options)
    policy = _load_policy(options)
    longest = (
        options.max_completion_length or RECIPES[recipe_name(options.model, options.task)]["max_completion_length"]
    )
    dataset.leave_out(too_long(policy.processor, longest_prompt(policy.model, longest)))
    folder = new_folder(options.output_dir, default=RUNS / time.strftime("%Y-%m-%d-%H-%M-%S-evaluation"))
    settings, answers = _settings(options, longest, dataset, policy), folder / "answers.jsonl"
    ended_by: BaseException | None = None
    try:
        result = evaluate(
            policy,
            dataset,
            max_completion_length=longest,
            sampled=options.sampled,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            batch_size=options.batch_size,
            progress=f"{dataset.name}, {dataset.split}",
            seed=options.seed,
            file=answers,
        )
    except (KeyboardInterrupt, Stopped, RuntimeError, MemoryError) as error:
        if not (answered := read_answers(answers)):
            raise
        result, ended_by = result_of(answered), error
        settings["stopped"] = f"after {result.n} of {len(dataset)} problems"
    settings["seconds"] = round(time.time() - started, 1)
    _report(folder, result, settings, dataset, policy)
    if options.samples is not None and options.samples > len(dataset):
        print(f"\n{dataset.name} has {len(dataset)} problems in this split, fewer than --samples {options.samples}")
    if ended_by is not None:
        raise ended_by


def _load_data(options: argparse.Namespace) -> ImageTextDataset:
    from mr1fast.data.dataset import load_split

    count = options.samples or (DEFAULT_EVAL_SAMPLES if options.task else None)
    used = () if options.split is None else (options.split,)
    reading = read_as(options.columns, options.image_root, options.allow_outside)
    return load_split(options.data or options.task, options.split, count=count, used=used, reading=reading)


def _load_policy(options: argparse.Namespace) -> Policy:
    import torch
    import transformers

    from mr1fast.model import load
    from mr1fast.model.policy import Policy

    transformers.utils.logging.disable_progress_bar()
    device = load.choose_device(options.device)
    path = load.EMBEDDED if options.model is None else options.model
    model = load.load_model(
        path,
        device=device,
        dtype=load.choose_dtype(options.dtype, device),
        attention=load.choose_attention(options.attention, device),
    )
    torch.set_num_threads(options.threads or load.choose_threads(model))
    prompt = chosen_prompt(options.model, options.prompt_suffix, options.system_prompt)
    return Policy(model, load.load_processor(path, max_pixels=options.max_pixels, prompt=prompt))


def _settings(options: argparse.Namespace, longest: int, dataset: ImageTextDataset, policy: Policy) -> dict[str, Any]:
    """What the figures depend on."""
    prompt = policy.processor.prompt
    return {
        "model": whole_characters(str(policy.model.name_or_path)),
        "data": dataset.name,
        "split": dataset.split,
        **({"cut_from": dataset.cut_from} if dataset.cut_from else {}),
        **({"rows": dataset.rows} if dataset.rows else {}),
        "sampled": options.sampled,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "prompt_suffix": prompt.suffix,
        **({"system_prompt": prompt.system} if prompt.system is not None else {}),
        "max_completion_length": longest,
        "seed": options.seed,
        "device": str(policy.device),
        "dtype": str(policy.model.dtype).removeprefix("torch."),
    }


def _report(
    folder: Path, result: EvalResult, settings: dict[str, Any], dataset: ImageTextDataset, policy: Policy
) -> None:
    """evaluation.json, report.html, and the same in the terminal."""
    from mr1fast.evaluation.report import write_report
    from mr1fast.rewards import unanswered, unanswered_summary
    from mr1fast.training.setup import scaled_down

    write_json(folder / "evaluation.json", as_json(result, settings, dataset.summary()))
    page = write_report(folder / "report.html", result, settings, dataset)
    print(f"{evaluation_table(result, settings)}\n\n{asked_of(dataset, result.n)}")
    if dataset.is_remarkable:
        print(dataset.summary())
    if scaled := scaled_down([dataset], policy.processor):
        print(scaled)
    if unanswered():
        print(f"\n{unanswered_summary()}")
    print(f"\nthe mistakes with their images: {page}\nthe figures:                    {folder / 'evaluation.json'}")


def asked_of(dataset: ImageTextDataset, n: int) -> str:
    """One line, such as "shapes/test: 6 of 10 rows asked, cut by image from train (100 rows)"."""
    of = f" of {dataset.rows:,}" if dataset.rows else ""
    cut = f", cut by image from {dataset.cut_from} ({dataset.cut_from_rows:,} rows)" if dataset.cut_from else ""
    return f"{dataset.name}/{dataset.split}: {n:,}{of} rows asked{cut}"


def as_json(result: EvalResult, settings: dict[str, Any], summary: str) -> dict[str, Any]:
    """What evaluation.json holds; figures are fractions."""
    return {
        **result.figures(),
        "greedy_accuracy_95_percent_interval": wilson_interval(result.greedy_accuracy, result.n),
        "by_answer": {answer: {"right": right, "n": n} for answer, (right, n) in result.by_answer().items()},
        "settings": settings,
        "versions": versions(),
        "data": summary,
        "samples": [asdict(one) for one in result.answered],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 2 for a mistake of the user's; 1 for too little memory; 128 + its number after a signal."""
    try:
        with stop_on_sigterm():
            return exit_code(run, arguments)
    except Stopped as stopped:
        print(f"\nstopped by {stopped}", file=sys.stderr)
        return stopped.exit_code
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1


OUT_OF_MEMORY = (
    "there is too little memory; try smaller values of --batch-size, --sampled, --max-completion-length or --max-pixels"
)


if __name__ == "__main__":
    sys.exit(main())

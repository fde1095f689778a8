"""`python -m mr1fast.evaluate`: how many questions does a model answer correctly?

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

from mr1fast.data.tasks import SPLITS, TASKS
from mr1fast.data.text_files import whole_characters
from mr1fast.errors import UserError
from mr1fast.evaluation.result import EvalResult, wilson_interval
from mr1fast.evaluation.terminal import evaluation_table
from mr1fast.options.fields import check_choice, option_string
from mr1fast.options.parse import FIELDS, add_option, convert
from mr1fast.options.program import Parser, at_least, check_one_process, exit_code, prog
from mr1fast.options.prompt import chosen_prompt
from mr1fast.options.reading import check_no_reading, read_as
from mr1fast.options.recipes import (
    DEFAULT_EVAL_SAMPLES,
    RECIPES,
    TASK_NAMES,
    default_eval_batch_size,
    recipe_name,
)
from mr1fast.training.open_run import check_data_paths
from mr1fast.training.run_folder import RUNS, new_folder, versions, write_json
from mr1fast.training.stop import Stopped, is_out_of_memory, stop_on_sigterm

if TYPE_CHECKING:
    from mr1fast.data.dataset import ImageTextDataset
    from mr1fast.model.policy import Policy


def build_parser() -> Parser:
    parser = Parser(
        prog=prog("evaluate"),
        description="Count how many questions about images a model answers correctly. Prints a table, and writes "
        "evaluation.json and report.html, which shows the mistakes with their images.",
        allow_abbrev=False,
    )
    _add_problems(parser.add_argument_group("model and problems"))
    _add_completions(parser.add_argument_group("completions"))
    _add_machine(parser.add_argument_group("output and device"))
    return parser


def _add_problems(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model",
        metavar="DIR",
        help="Qwen2-VL or Qwen2.5-VL to evaluate: a folder, or a name on the Hugging Face hub "
        "[default: the embedded model]",
    )
    add(
        "--task",
        metavar="TEXT",
        help="embedded task to evaluate on: " + " or ".join(f"{t.name} ({t.title})" for t in TASKS.values()),
    )
    add(
        "--data",
        metavar="PATH",
        help=FIELDS["data"].metadata["help"],
    )
    for name in ("columns", "image_root", "allow_outside", "prompt_suffix", "system_prompt", "max_pixels"):
        add_option(group, name, default=FIELDS[name].default)
    add(
        "--split",
        metavar="TEXT",
        help=f"split to evaluate on: train, validation, test{_more_splits()} or, with --data, all; where no file or "
        "folder is named after validation or test, that split is the rows that training leaves out for it "
        "[default: test; all of a single file that is not named test]",
    )
    bounded = "".join(
        f"; {name} has {task.splits['test']} to test" for name, task in TASKS.items() if task.splits["test"]
    )
    add(
        "--samples",
        metavar="N",
        type=at_least(1),
        help=f"largest number of problems to ask{bounded} [default: {DEFAULT_EVAL_SAMPLES} of a task, all of --data]",
    )


def _more_splits() -> str:
    """The splits that only one task has, such as ", vehicles or far (vc)"."""
    more = {name: [split for split in task.splits if split not in SPLITS] for name, task in TASKS.items()}
    return "".join(f", {' or '.join(splits)} ({name})" for name, splits in more.items() if splits)


def _add_completions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--sampled",
        metavar="N",
        type=at_least(0),
        default=1,
        help="completions to sample for each problem, besides the greedy one; 0 for none [default: 1]",
    )
    add(
        "--temperature",
        metavar="X",
        type=float,
        default=1.0,
        help="temperature of the sampled completions [default: 1.0]",
    )
    for name in ("top_k", "top_p"):
        add_option(group, name, default=FIELDS[name].default)
    add(
        "--max-completion-length",
        metavar="N",
        type=at_least(1),
        help="longest completion, in tokens [default: 32 for the embedded model, else 512]",
    )
    add(
        "--batch-size",
        metavar="N",
        type=at_least(1),
        help=f"problems answered at once [default: {default_eval_batch_size(small=True)} for a small model, else "
        f"{default_eval_batch_size(small=False)}]",
    )
    add("--seed", metavar="N", type=at_least(0), default=0, help="seed of the sampled completions [default: 0]")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--output-dir",
        metavar="DIR",
        help="new or empty folder for the results [default: runs/<date-time>-evaluation]",
    )
    for name in ("device", "dtype", "attention", "threads"):
        add_option(group, name, default=FIELDS[name].default)


def _check(options: argparse.Namespace) -> None:
    if (options.task is None) == (options.data is None):
        raise UserError(f"give either {', '.join(f'--task {name}' for name in TASK_NAMES)} or --data PATH")
    if options.task is not None:
        check_choice("--task", options.task, TASK_NAMES)
    if options.split is not None:
        check_choice("--split", options.split, (*TASKS[options.task].splits,) if options.task else (*SPLITS, "all"))
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        rule = "must be a finite number above 0"
        raise UserError(f"--temperature {rule}, got {options.temperature:g}; greedy decoding is always done")
    for name in FIELDS:  # as in training
        if (value := getattr(options, name, None)) is not None:
            setattr(options, name, convert(name, value, option_string(name)))
    if options.model is not None and (models := sorted(Path(options.model).glob("*/model"))):
        raise UserError(f"--model {options.model} is a run; give one of its models, such as {models[0]}")
    if options.data is None:
        check_no_reading(options.columns, options.image_root, options.allow_outside)
    check_data_paths(options.data, options.image_root)


def run(arguments: Sequence[str] | None) -> None:
    """Raises ValueError in one sentence for a mistake of the user's."""
    options = build_parser().parse(arguments)
    _check(options)
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

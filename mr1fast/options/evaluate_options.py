"""The options of `python -m mr1fast.evaluate`; those that training has, too, are declared there."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from mr1fast.data.tasks import SPLITS, TASKS
from mr1fast.errors import UserError
from mr1fast.options.fields import check_choice, option_string
from mr1fast.options.parse import FIELDS, add_option, convert
from mr1fast.options.program import Parser, at_least, prog
from mr1fast.options.reading import check_no_reading
from mr1fast.options.recipes import DEFAULT_EVAL_SAMPLES, TASK_NAMES, default_eval_batch_size


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


def check(options: argparse.Namespace) -> None:
    """Brings the values into the form that training has them in. Raises UserError for a mistake."""
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
    is_folder = options.model is not None and os.path.isdir(options.model)
    if is_folder and (models := sorted(Path(options.model).glob("*/model"))):
        raise UserError(f"--model {options.model} is a run; give one of its models, such as {models[0]}")
    if options.data is None:
        check_no_reading(options.columns, options.image_root, options.allow_outside)

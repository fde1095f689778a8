"""What stays the same during a run: its models and data, and what is printed about them before it begins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mr1fast.data.dataset import ImageTextDataset
from mr1fast.data.example import Example
from mr1fast.errors import UserError
from mr1fast.evaluation.evaluate import Divide, evaluate
from mr1fast.model import load as models
from mr1fast.model.adapter import add_adapter, check_lora
from mr1fast.model.checks import check_same_kind
from mr1fast.model.liger import choose_liger
from mr1fast.model.policy import Policy
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.prompts import longest_prompt, prompt_length
from mr1fast.options.config import TaskConfig, TrainConfig
from mr1fast.options.loss_keywords import DEFAULT_LOSS
from mr1fast.options.recipes import TASK_NAMES
from mr1fast.options.reward_weights import check_columns, load_rewards
from mr1fast.training.device_memory import free_memory
from mr1fast.training.open_run import OpenRun
from mr1fast.training.plan import Plan
from mr1fast.training.plan_run import plans_before
from mr1fast.training.processes import ALONE, Processes, equal_pieces, share_weights
from mr1fast.training.run_data import RunData, check_same_data, load_data
from mr1fast.training.run_folder import RunFolder
from mr1fast.training.trainer import without_reasoning


@dataclass
class Setup(RunData):
    config: TrainConfig
    folder: RunFolder
    base_path: str | Path
    loaded_base: Policy | None  # see `base`
    given_reference: Policy | None  # --reference-model
    load: Callable[..., Policy]  # of a path, for this device, to be trained; dtype= takes another one than the run's
    plans: Mapping[str, Plan] = dataclasses.field(default_factory=dict)  # of the tasks; none for small models
    processes: Processes = ALONE

    @property
    def base(self) -> Policy:
        """What training starts from, frozen. Loaded where it has been released."""
        if self.loaded_base is None:
            self.loaded_base = self.load(self.base_path).freeze()
        return self.loaded_base

    def new_policy(self) -> Policy:
        """What training starts from, ready to be trained: the base, with a new adapter if the options ask for one."""
        policy, config = self.load(self.base_path), self.config
        if config.lora_rank is None or policy.has_adapter:
            return policy
        model = add_adapter(
            policy.model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_target_names,
            seed=config.seed,
        )
        return Policy(model, policy.processor).freeze_parts(config.frozen_parts)

    def base_is_reference(self, config: TaskConfig) -> bool:
        """Whether the base itself is needed while a model is trained. Of an adapted policy it is a part."""
        return config.needs_reference and self.given_reference is None and not self.config.trains_adapter

    @property
    def offloads_reference(self) -> bool:
        """Whether it is in the CPU's memory but for its log-probabilities."""
        return any(plan.offload_reference for plan in self.plans.values())

    def task_config(self, name: str) -> TaskConfig:
        """The options that train the model of a task; what the user has left open is as planned."""
        planned = self.plans[name].options if name in self.plans else {}
        return dataclasses.replace(self.config.for_task(name), **planned)

    def reference_for(self, policy: Policy, config: TaskConfig) -> Policy | None:
        """The frozen model of the KL term, None if there is no such term. The policy itself if it has an adapter."""
        if not config.needs_reference:
            return None
        if self.given_reference is None and self.config.trains_adapter:
            return policy
        reference = self.given_reference or self.base
        return reference.offload() if self.offloads_reference else reference

    def evaluate(self, policy: Policy, dataset: ImageTextDataset, name: str, **keywords: Any) -> dict[str, float]:
        """The figures of `evaluation.evaluate.evaluate`, which takes the keywords, with the run's settings."""
        config = self.config.for_task(name if name in (*self.names, *TASK_NAMES) else self.names[0])
        with policy.gathered():
            result = evaluate(
                policy,
                dataset,
                max_completion_length=config.max_completion_length,
                sampled=config.eval_sampled,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                batch_size=config.eval_batch_size,
                seed=config.seed,
                divide=self._divide(),
                **keywords,
            )
        return result.figures()

    def _divide(self) -> Divide:
        processes = self.processes
        return Divide(processes.share, processes.whole, processes.count == 1, processes.count > 1 and processes.is_main)

    def validate(self, policy: Policy, dataset: ImageTextDataset, name: str) -> dict[str, float]:
        """`evaluate` with its figures under the names of metrics.jsonl."""
        return {f"eval/{name}/{key}": value for key, value in self.evaluate(policy, dataset, name).items()}

    def description(self) -> str:
        """The first lines of a run."""
        model = self.base.model
        parameters = sum(p.numel() for p in model.parameters())
        what = f"{self.config.method} on {', then '.join(self.names)}"
        threads, dtype = torch.get_num_threads(), str(model.dtype).removeprefix("torch.")
        where = f"{self.base.device}, {dtype}, {threads} thread{'s' * (threads > 1)}"
        if self.processes.count > 1:
            shared = ", which share the weights (FSDP)" * _share_weights(self.config, self.processes)
            where = f"{self.processes.count} processes{shared}, each on {where}"
        lines = [f"{what}: {self.base_path}, {parameters:,} parameters, {where}"]
        lines += [_settings(self.config, name) for name in self.names]
        lines += dict.fromkeys(_passes(self.task_config(name), self.base) for name in self.names)
        if self.config.reference_model is not None:
            lines += [f"the KL term measures from {self.config.reference_model}"]
        if self.offloads_reference:
            lines += ["the reference waits in the CPU's memory between its turns, as both models would not fit"]
        lines += [f"files go to {self.folder.path}; {self.folder.page} shows the run as it goes"]
        lines += self.sizes(own=self.config.data is not None)
        lines += summaries(self.splits)
        if scaled := scaled_down(self.splits, self.base.processor):
            lines.append(scaled)
        lines += [f"warning: {doubt}" for doubt in doubts(self.config)]
        return "\n".join(lines)


def _passes(config: TaskConfig, policy: Policy) -> str:
    """How log-probabilities are computed."""
    said = f"log-probabilities: {policy.describe_pass(share_prefix=config.share_prefix)}"
    if config.tokens_per_microbatch is not None:
        said += f", up to {config.tokens_per_microbatch:,} tokens at a time"
    elif config.gradient_accumulation_steps not in (None, 1):
        said += f", in {config.gradient_accumulation_steps} pieces"
    return f"{said}, layers run again in backward" if config.gradient_checkpointing == "on" else said


def doubts(config: TrainConfig) -> list[str]:
    """What is allowed, but hardly meant."""
    found = []
    said = f"{config.prompt.suffix} {config.prompt.system}"
    if "<answer>" not in said and config.method != "sft" and {"accuracy", "format"} & {*config.rewards}:
        what = "neither --prompt-suffix nor --system-prompt asks for <answer> tags"
        found.append(f"{what}, without which the rewards accuracy and format are 0")
    steps = min(config.for_task(name).max_steps for name in config.names)
    if config.warmup_steps >= steps:
        what = f"--warmup-steps {config.warmup_steps} is not below --max-steps {steps}"
        found.append(f"{what}: the learning rate never reaches --learning-rate")
    return found


def _settings(config: TrainConfig, name: str) -> str:
    """How a task is trained, and which recipe has filled in what was not given."""
    task = config.for_task(name)
    completions = f" x {task.num_generations} completions of up to {task.max_completion_length} tokens"
    batch = f"{task.prompts_per_step} prompts{completions if task.method != 'sft' else ''}"
    lora = "" if config.lora_rank is None else f", LoRA of rank {config.lora_rank}"
    loss = "" if config.loss == DEFAULT_LOSS else f", loss {config.loss}"
    line = f"{name}: {task.max_steps} steps of {batch}, learning rate {task.learning_rate:g}{lora}{loss}"
    defaults = config.defaults_from(name)
    return f"{line} ({defaults})" if defaults else line


def summaries(splits: Iterable[ImageTextDataset]) -> list[str]:
    """What was left out of the splits, what was repaired, and what is doubtful about them."""
    return [split.summary() for split in splits if split.is_remarkable]


def scaled_down(splits: Iterable[ImageTextDataset], processor: Qwen2VLTextImageProcessor) -> str:
    """How many images the model is shown smaller than they are; "" if none."""
    most = processor.image_processor.size["longest_edge"]
    larger = sum(pixels > most for split in splits for pixels in split.pixels)
    what = f"1 image has more than {most} pixels (--max-pixels), and is" if larger == 1 else ""
    what = what or f"{larger} images have more than {most} pixels (--max-pixels), and are"
    return f"{what} scaled down to that" if larger else ""


def prepare(opened: OpenRun) -> Setup:
    """Load model and data. Raises ValueError, whose message is one sentence."""
    config = opened.config
    transformers.utils.logging.disable_progress_bar()
    processes = opened.processes
    device = models.choose_device(processes.device(config.device))
    load_model = partial(
        models.load_model,
        device=device,
        dtype=models.choose_dtype(config.dtype, device),
        attention=models.choose_attention(config.attention, device),
        liger=choose_liger(config.liger, device),
    )
    for name in config.names:
        equal_pieces(config.for_task(name), processes)  # raises for a batch that cannot be divided
    plans = plans_before(config, sharers=processes.count if _share_weights(config, processes) else 1)
    base_path = models.EMBEDDED if config.model is None else config.model
    model = load_model(base_path)
    processor = models.load_processor(base_path, max_pixels=config.max_pixels, prompt=config.prompt)
    base = Policy(model, processor)
    check_lora(config, model, frozen=base.weights_of(config.frozen_parts))
    torch.set_num_threads(min(config.threads or models.choose_threads(model), os.cpu_count() or 1))
    for name in config.names if config.engine == "mr1fast" else ():
        check_memory(config.for_task(name), model)
    recorded = opened.folder.read_result().get("data", {})
    data = load_data(config, recorded.get("name"))
    check_same_data(data, recorded.get("content", {}), moved_to=config.data if opened.data_moved else None)
    config = config.with_steps({name: len(dataset) for name, dataset in data.train.items()})
    setup = Setup(
        **vars(data),
        config=config,
        folder=opened.folder,
        processes=processes,
        base_path=base_path,
        loaded_base=base.freeze(),
        given_reference=_given_reference(config, base, load_model),
        load=lambda path, **other: Policy(load_model(path, **other), processor).freeze_parts(config.frozen_parts),
        plans=plans,
    )
    if config.sft_reasoning:
        for split in setup.train.values():
            split.leave_out(without_reasoning)
    longest = room_for_prompts(config, model)
    for split in setup.splits:
        split.leave_out(too_long(processor, longest))
        split[0]  # where no row can be used, it is said now
    if config.method != "sft":
        rewards = load_rewards(config.rewards)
        for name in setup.names:
            check_columns(rewards, setup.train[name][0].reward_columns())
    return setup


def _share_weights(config: TrainConfig, processes: Processes) -> bool:
    """In our own loop; another engine has its own way with accelerate's configuration."""
    return config.engine == "mr1fast" and share_weights(processes)


def _given_reference(config: TrainConfig, base: Policy, load_model: Callable[[str], Any]) -> Policy | None:
    """Raises UserError if --reference-model is not of the base's kind."""
    path = config.reference_model
    if path is None:
        return None
    model = load_model(path)
    check_same_kind(path, model.config, base.model.config, models.load_processor(path), base.processor)
    return Policy(model, base.processor).freeze()


# ---- what fits -------------------------------------------------------------------------------------------------------


def room_for_prompts(config: TrainConfig, model: PreTrainedModel) -> int:
    completion = max(config.for_task(name).max_completion_length for name in config.names)
    room = longest_prompt(model, completion)
    if config.max_prompt_length is not None and config.max_prompt_length > room:
        raise UserError(
            f"--max-prompt-length must be at most {room}, which is what the model has room for beside a completion of "
            f"{completion} tokens, got {config.max_prompt_length}"
        )
    return config.max_prompt_length or room


def too_long(processor: Qwen2VLTextImageProcessor, longest: int) -> Callable[[Example], str | None]:
    """Why an example is left out, if its prompt has more than `longest` tokens."""
    lengths: dict[Any, int] = {}  # most examples of an embedded task have the same length, which is counted only once

    def reason(example: Example) -> str | None:
        kind = (example.problem, *(image.size for image in example.images))
        if kind not in lengths:
            if len(lengths) == 1000:
                lengths.clear()
            lengths[kind] = prompt_length(processor, example)
        return f"prompt is longer than {longest} tokens" if lengths[kind] > longest else None

    return reason


def check_memory(config: TaskConfig, model: PreTrainedModel) -> None:
    """Raises UserError where there is too little memory to sample a step's completions, however short the prompts."""
    if config.method == "sft":
        return
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys_and_values = 2 * text.num_hidden_layers * text.num_key_value_heads * head * model.dtype.itemsize
    completions = config.prompts_per_step * config.num_generations
    needed = completions * (config.max_completion_length * keys_and_values + 4 * text.vocab_size)  # logits in float32
    if needed > (there := free_memory(model.device)):
        raise UserError(
            f"a step samples {completions:,} completions of up to {config.max_completion_length:,} tokens at a time, "
            f"which takes {needed / 2**30:,.0f} GiB of memory, but there are only {there / 2**30:,.0f}; lower "
            "--prompts-per-step, --num-generations or --max-completion-length"
        )

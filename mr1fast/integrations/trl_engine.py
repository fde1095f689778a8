"""`--engine trl`: a run of `mr1fast.train` whose steps TRL's GRPOTrainer takes, with our loss.

TRL has sampling, updates and checkpoints, and with them vLLM, DeepSpeed and FSDP. Problems, prompts, rewards,
advantages, schedules, evaluation, and all files of the run but those in the checkpoints are ours.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from mr1fast.data.example import Example
from mr1fast.integrations.trl import GRPODConfig, GRPODTrainer
from mr1fast.integrations.trl_settings import check_options, converted, settings
from mr1fast.losses.logits import group_advantages
from mr1fast.model.load import choose_device, choose_dtype, is_small
from mr1fast.model.policy import Policy
from mr1fast.model.prompts import prompt_messages
from mr1fast.options.prompt import Prompt
from mr1fast.options.reward_weights import load_rewards
from mr1fast.rewards import unanswered
from mr1fast.training.checkpoint import could_not_be_written, load_state, whole_checkpoint
from mr1fast.training.learning_rate import learning_rate_at
from mr1fast.training.manifest import MANIFEST, write_manifest
from mr1fast.training.metrics import reward_metrics
from mr1fast.training.order import rows_of_step
from mr1fast.training.run_folder import STATE, ResumeError, checkpoints, remove_folder, step_of
from mr1fast.training.scoring import Scored, first_scored, score, weighted_sum
from mr1fast.training.setup import Setup
from mr1fast.training.skipped import skipped_sample, useless
from mr1fast.training.task_run import TaskRun, follow_new_total, task_run

__all__ = ["check_options", "train_task"]


def train_task(setup: Setup, name: str, checkpoint: Path | None) -> Policy:
    """Train a model on one task, as `mr1fast.training.loop.train_task` does."""
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    config, folder = setup.config.for_task(name), setup.folder.task(name)
    setup.processes.on_main(_remove_half_written, folder)
    setup.processes.gather(None)
    checkpoint = whole_checkpoint(checkpoint, folder)
    done, before = 0, config.max_steps
    setup.loaded_base = None  # TRL has a reference of its own
    if checkpoint is None:
        policy, state = _policy(setup.new_policy()), None
    else:
        state, done = _state(checkpoint), step_of(checkpoint)
        before = state["max_steps"]
        policy = _restored(_policy(setup.new_policy()), setup.load(checkpoint))
    follow_new_total(setup, name, step=done, before=before)
    resumed = state is not None
    with task_run(setup, name, policy, done=done, resumed=resumed) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between TRL and transformers
        if done < config.max_steps:
            trainer = EngineTrainer(setup, name, policy)
            trainer.add_callback(_Steps(run, trainer, state))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            policy.model.eval()
            run.stop_if_asked(trainer.state.global_step)
    return policy


def _remove_half_written(folder: Path) -> None:
    """Remove checkpoints that a killed run has left: the manifest is written last."""
    for half in [one for one in checkpoints(folder) if not (one / MANIFEST).exists()]:
        remove_folder(half)


def _policy(policy: Policy) -> Policy:
    """The policy with float32 weights, which TRL trains; in bfloat16 AdamW's small steps would be lost."""
    policy.model.float()
    return policy


def _restored(policy: Policy, saved: Policy) -> Policy:
    """The policy with the saved weights. It still says what training began with, from which TRL makes the reference."""
    with torch.no_grad():
        for weight, value in zip(policy.model.parameters(), saved.model.parameters(), strict=True):
            weight.copy_(value)
    return policy


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = load_state(checkpoint) if (checkpoint / STATE).exists() else None
    except ValueError as error:
        raise ResumeError(str(error)) from error
    if state is None or state.get("engine") != "trl":
        why = f"{STATE} is missing or not of --engine trl, as --save-only-model leaves it out"
        raise ResumeError(f"training cannot be continued from {checkpoint}: {why}")
    return state


class Rows(torch.utils.data.Dataset):
    """The examples of training in the order in which it goes through them, each decoded when it is asked for."""

    def __init__(self, setup: Setup, name: str, prompt: Prompt):
        config, self.examples, self.prompt = setup.config.for_task(name), setup.train[name], prompt
        batches = math.ceil(config.max_steps / config.num_iterations)
        count = batches * config.prompts_per_step
        self.rows = rows_of_step(config.seed, 0, count, len(self.examples))
        # TRL asks for each batch once for every piece of it, and once more for the rewards.
        self.example = lru_cache(maxsize=config.prompts_per_step)(self.examples.__getitem__)

    def as_dataset(self) -> datasets.Dataset:
        """With TRL's columns prompt and images, and row, of which `example` is the example."""
        return datasets.Dataset.from_dict({"row": self.rows}).with_transform(self._decoded)

    def _decoded(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        examples = [self.example(row) for row in batch["row"]]
        prompts = [prompt_messages(self.prompt, one.problem, len(one.images)) for one in examples]
        return {"prompt": prompts, "images": [list(one.images) for one in examples], "row": batch["row"]}


class EngineTrainer(GRPODTrainer):
    """GRPODTrainer on a task of ours. Its rewards and advantages are those of our own loop."""

    num_generations: int
    steps: _Steps  # that of its callbacks

    def __init__(self, setup: Setup, name: str, policy: Policy):
        self.processes = setup.processes
        self.task, self.policy, self.rewards = setup.config.for_task(name), policy, load_rewards(setup.config.rewards)
        self.data = Rows(setup, name, policy.processor.prompt)
        # Of the last batch that was sampled: of this process, and `totals`, the weighted sums of rewards, of all.
        self.batch_examples: list[Example] = []
        self.completions: list[str] = []
        self.scores: dict[str, Tensor] = {}
        self.scored: list[Scored] = []
        self.totals, self.batch_metrics = torch.zeros(0), dict[str, float]()
        super().__init__(
            model=policy.model,
            reward_funcs=[_named(reward.name) for reward in self.rewards],
            args=_arguments(setup, name, policy),
            train_dataset=self.data.as_dataset(),
            processing_class=policy.processor,
        )
        self.remove_callback(PrinterCallback)
        if is_peft_model(policy.model) and "ref" in policy.model.peft_config:
            policy.model.delete_adapter("ref")  # the KL term measures from the model without adapter
        self.eos_token_ids = policy.end_ids.tolist()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        task = self.task

        def factor(step: int) -> float:
            return learning_rate_at(step, peak=1.0, max_steps=task.max_steps, warmup_steps=task.warmup_steps)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)  # type: ignore[arg-type]
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """`_restored` has done it, but for weights that are in shards.

        TRL's way would leave a Qwen2-VL as it is: the names in the file are not those in the model.
        """
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run writes its own."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.multi_objective_aggregation == "sum_then_normalize":
            advantages = group_advantages(self.totals, self.num_generations, scale_rewards=self.scale_rewards)
            local, rank = len(inputs), self.accelerator.process_index
            output["advantages"] = advantages[rank * local : (rank + 1) * local].to(output["advantages"])
        self.scored = first_scored(self.batch_examples, self.completions, self.scores, output["advantages"])
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        """[B, functions], of all processes. A completion without one of its rewards has none, as in our own loop."""
        before = unanswered()
        self.batch_examples = [self.data.example(one["row"]) for one in inputs]
        # Not TRL's text, which has no special tokens: <think> and <answer> may be such.
        self.completions = [self._decoded(ids) for ids in completion_ids_list]
        self.scores = score(self.rewards, self.completions, self.batch_examples)
        names = list(self.scores)
        local = torch.stack([self.scores[name] for name in names], 1).to(self.accelerator.device)
        every = self.accelerator.gather(local)
        scores = {name: every[:, i].cpu() for i, name in enumerate(names)}
        self.totals = weighted_sum(self.rewards, scores)
        self.batch_metrics = reward_metrics(scores, self.totals, self.num_generations)
        self.batch_metrics["rewards/unanswered"] = sum(self.processes.gather(unanswered() - before))
        return every.masked_fill(self.totals.isnan()[:, None].to(every.device), math.nan)

    def _decoded(self, ids: Sequence[int]) -> str:
        tokens = torch.tensor([list(ids)], device=self.policy.device)
        return self.policy.decode(tokens, torch.ones_like(tokens).bool())[0]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The model as our own loop saves it, or with the weights that were gathered from shards."""
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            super()._save(output_dir, state_dict)
        if self.args.should_save and state_dict is None:
            folder.mkdir(parents=True, exist_ok=True)
            self.policy.save(folder)
        elif self.args.should_save:
            (folder / "training_args.bin").unlink()  # looks like weights
            self.policy.save_processor(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's checkpoint, and when that is there as a whole, the file that says so."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and not self.args.save_only_model:
                torch.save(self.steps.state_dict(), folder / STATE)
            if self.args.should_save:
                write_manifest(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            remove_folder(folder)
            raise could_not_be_written(folder, error) from error


def _named(name: str) -> Any:
    """What TRL takes for a reward function of this name; it is not called."""

    def reward(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("EngineTrainer._calculate_rewards calls the functions")

    reward.__name__ = name
    return reward


def _arguments(setup: Setup, name: str, policy: Policy) -> GRPODConfig:
    config, task = setup.config, setup.config.for_task(name)
    values = converted(config.trl_settings)
    if not values.get("use_vllm"):  # which has other names for these
        ours = {"suppress_tokens": policy.banned_ids.tolist(), "eos_token_id": policy.end_ids.tolist()}
        values["generation_kwargs"] = ours | (values.get("generation_kwargs") or {})
    device = choose_device(setup.processes.device(config.device))
    arguments = settings(
        task,
        values,
        output_dir=str(setup.folder.task(name)),
        device=device,
        processes=setup.processes.count,
        bf16=choose_dtype(config.dtype, device) == torch.bfloat16,
        small=is_small(policy.model),
    )
    arguments.save_total_limit = task.save_total_limit
    arguments.save_only_model = config.save_only_model
    return arguments


class _Steps(TrainerCallback):
    """After each of TRL's steps: what a run of ours does then."""

    def __init__(self, run: TaskRun, trainer: EngineTrainer, state: dict[str, Any] | None):
        self.run, self.trainer = run, trainer
        trainer.steps = self
        self.row: dict[str, float] = {}
        self.skipped_steps, self.skipped_in_a_row, self.reason = 0, 0, ""
        if state is not None:
            self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]

    def state_dict(self) -> dict[str, Any]:
        counts = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}
        return {"engine": "trl", "max_steps": self.trainer.task.max_steps, **counts}

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        # TRL counts the pieces of this program alone, and would not know where a batch begins that is used repeatedly.
        self.trainer._step = state.global_step * args.gradient_accumulation_steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """A step with NaN or inf in it changes no weight."""
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        self.reason = useless(self.trainer.totals.tolist())
        if not self.reason and not norm.isfinite():
            self.reason = "the gradient is not finite"
        for weight in weights if self.reason else ():
            weight.grad = None

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in logs:  # the summary at the end
            return
        step, trainer = state.global_step, self.trainer
        logged = {name: math.nan if value is None else value for name, value in logs.items() if name != "epoch"}
        self.row |= logged | trainer.batch_metrics  # a batch that is used again has the metrics that it had
        sample = self._skipped(step)
        self.run.after_step(step, self.row | {"skipped_steps": self.skipped_steps}, trainer.scored)
        self.run.record_skipped(sample, self.skipped_in_a_row)
        control.should_save = self.run.saves(step)
        control.should_training_stop |= self.run.stop.signal_number is not None

    def _skipped(self, step: int) -> dict[str, Any] | None:
        if not self.reason:
            self.skipped_in_a_row = 0
            return None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        trainer = self.trainer
        examples = trainer.batch_examples[:: trainer.num_generations]
        return skipped_sample(step, self.reason, examples, trainer.completions, trainer.totals.tolist())

"""Training of one model on one task: prompts -> completions -> rewards -> advantages -> loss -> update."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from mr1fast.data.example import Example, Examples
from mr1fast.losses.kl_weight import KLSchedule
from mr1fast.losses.logits import group_advantages
from mr1fast.model.load import encode_prompts
from mr1fast.model.prefix import encode_prefix, place_inputs
from mr1fast.model.processor import Qwen2VLTextImageProcessor
from mr1fast.model.rollout import decode, end_tokens, generate, pad_token
from mr1fast.options.config import TrainConfig
from mr1fast.rewards import accuracy_reward, format_reward, unanswered
from mr1fast.training.batch import Batch, batch_logps, grpo_batch_loss, sft_batch_loss, split_batch
from mr1fast.training.metrics import completion_metrics, mean_metrics, reward_metrics
from mr1fast.training.optimizer import Optimizer, learning_rate_at

MAX_SKIPPED_IN_A_ROW = 10


class TrainingError(RuntimeError):
    """Training that cannot go on, explained in one sentence."""


@dataclass(frozen=True)
class Sampled:
    """A batch, and what else is to be known of it."""

    batch: Batch
    completions: list[str]  # [B]
    rewards: list[float]  # [B], weighted sums; empty for supervised fine-tuning
    metrics: dict[str, float]


class Trainer:
    """The state of training, one step of it, and its way into a checkpoint and back.

    `config` is that of a task (`TrainConfig.for_task`), `reference` the frozen model of the KL term, or None where its
    weight is 0 throughout.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Qwen2VLForConditionalGeneration,
        reference: Qwen2VLForConditionalGeneration | None,
        processor: Qwen2VLTextImageProcessor,
        dataset: Examples,
    ):
        self.config, self.processor, self.dataset = config, processor, dataset
        # eval() for good: policy, sampler and reference are to be the same network, so no dropout.
        self.model, self.reference = model.eval(), reference
        self.kl_schedule = _kl_schedule(config) if config.method == "grpo-d" else None
        self.optimizer = Optimizer(model, max_grad_norm=config.max_grad_norm)
        self.generator = torch.Generator(model.device).manual_seed(config.seed)
        self.finished_steps = 0
        self.num_tokens = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.sampled: Sampled | None = None
        self.skipped_sample: dict[str, Any] | None = None  # of the last step, if that was skipped

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its metrics. One with NaN or inf in it changes no weight."""
        started = time.perf_counter()
        if self.sampled is None or self.finished_steps % self.config.num_iterations == 0:
            self.sampled = self.sample()
        metrics = {"learning_rate": self.learning_rate}
        if self.config.method != "sft":
            metrics["beta"] = self.beta
        if all(math.isfinite(reward) for reward in self.sampled.rewards):
            metrics |= self.update(self.sampled)
            broken = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
            reason = f"{broken[0]} is {metrics[broken[0]]}" if broken else ""
        else:
            reason = "a reward is not a finite number"
        metrics |= self.sampled.metrics
        self._count(reason)
        if self.kl_schedule is not None:
            self.kl_schedule.update(metrics.get("kl", math.nan), n_steps=1)
            self.kl_schedule.step()
        self.finished_steps += 1
        progress = {"num_tokens": self.num_tokens, "skipped_steps": self.skipped_steps}
        return metrics | progress | {"step_time": time.perf_counter() - started}

    # ---- prompts, completions, rewards ------------------------------------------------------------------------------

    def examples(self) -> list[Example]:
        """The prompts of this step: the data set in a new order every epoch, the same at every run of this seed."""
        count, total = self.config.prompts_per_step, len(self.dataset)
        first = self.finished_steps // self.config.num_iterations * count
        return [
            self.dataset[_order(self.config.seed, i // total, total)[i % total]] for i in range(first, first + count)
        ]

    def sample(self) -> Sampled:
        examples = self.examples()
        inputs = place_inputs(self.model, encode_prompts(self.processor, examples))
        sampled = self._targets(examples, inputs) if self.config.method == "sft" else self._rollout(examples, inputs)
        self.num_tokens += int(inputs["attention_mask"].sum()) * sampled.batch.num_generations
        self.num_tokens += int(sampled.batch.completion_mask.sum())
        return sampled

    def _rollout(self, examples: Sequence[Example], inputs: dict[str, Tensor]) -> Sampled:
        config, G = self.config, self.config.num_generations
        # Sampler and policy are one network at this point: prompts and images are computed once for both. But not in
        # pieces, whose point is to hold the activations of one at a time.
        prefix = encode_prefix(self.model, inputs) if config.gradient_accumulation_steps == 1 else None
        rollout = generate(
            self.model,
            inputs,
            num_generations=G,
            temperature=config.temperature,
            max_new_tokens=config.max_completion_length,
            generator=self.generator,
            prefix=prefix and prefix.detach(),
        )
        eos = end_tokens(self.model)
        completions = decode(self.processor.tokenizer, rollout, eos)
        asked = [example for example in examples for _ in range(G)]
        unanswered_before = unanswered()
        rewards = {
            "accuracy_reward": torch.tensor([_accuracy(*pair) for pair in zip(completions, asked)]),
            "format_reward": torch.tensor([format_reward(completion) for completion in completions]),
        }
        total = config.accuracy_weight * rewards["accuracy_reward"] + config.format_weight * rewards["format_reward"]
        batch = Batch(
            inputs=inputs,
            num_generations=G,
            completion_ids=rollout.completion_ids,
            completion_mask=rollout.completion_mask,
            advantages=group_advantages(total, G).to(self.model.device),
            prefix=prefix,
        )
        if self.reference is not None:
            with torch.no_grad():
                pieces = split_batch(batch, config.gradient_accumulation_steps)
                reference = torch.cat([batch_logps(self.reference, piece, config.temperature) for piece in pieces])
            batch = dataclasses.replace(batch, ref_per_token_logps=reference)
        metrics = reward_metrics(rewards, total, G) | completion_metrics(batch, eos)
        metrics["rewards/unanswered"] = unanswered() - unanswered_before
        return Sampled(batch, completions, total.tolist(), metrics)

    def _targets(self, examples: Sequence[Example], inputs: dict[str, Tensor]) -> Sampled:
        """What supervised fine-tuning imitates: the solution in the wanted form."""
        tokenizer, device = self.processor.tokenizer, self.model.device
        completions = [sft_target(example.solution) for example in examples]
        eos = int(end_tokens(self.model)[0])
        rows = [torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], eos]) for text in completions]
        pad = torch.nn.utils.rnn.pad_sequence
        batch = Batch(
            inputs=inputs,
            num_generations=1,
            completion_ids=pad(rows, batch_first=True, padding_value=pad_token(self.model)).to(device),
            completion_mask=pad([torch.ones_like(row).bool() for row in rows], batch_first=True).to(device),
        )
        return Sampled(batch, completions, [], completion_metrics(batch, end_tokens(self.model)))

    # ---- loss and update --------------------------------------------------------------------------------------------

    @property
    def learning_rate(self) -> float:
        config = self.config
        return learning_rate_at(
            self.finished_steps,
            peak=config.learning_rate,
            max_steps=config.max_steps,
            warmup_steps=config.warmup_steps,
        )

    @property
    def beta(self) -> float:
        """The KL weight of this step."""
        return self.config.beta if self.kl_schedule is None else self.kl_schedule.value

    def update(self, sampled: Sampled) -> dict[str, float]:
        """The optimizer's step on the batch, taken in pieces; none if loss or gradient is not finite."""
        config, batch = self.config, sampled.batch
        pieces = split_batch(batch, config.gradient_accumulation_steps)
        share = 1 / len(pieces)  # the loss is a mean over completions, and the pieces are equally large
        total, rows, logps = 0.0, [], []
        for piece in pieces:
            if config.method == "sft":
                loss = sft_batch_loss(self.model, piece) * share
            else:
                output = grpo_batch_loss(self.model, piece, beta=self.beta, temperature=config.temperature, share=share)
                loss = output.loss
                rows.append(output.metrics())
                logps.append(output.per_token_logps)
            total += loss.item()
            loss.backward()
        metrics = {"loss": total}
        if rows:  # means over tokens
            metrics |= mean_metrics(rows, [piece.completion_mask.sum().item() for piece in pieces])
        old = batch.old_per_token_logps
        if math.isfinite(metrics["loss"]):
            metrics["grad_norm"] = self.optimizer.step(self.learning_rate)
            if config.num_iterations > 1 and logps and old is None:
                # The policy that sampled is the one before this update; the next ones on this batch are off-policy.
                old = torch.cat(logps).detach()
        else:
            metrics["grad_norm"] = math.nan
            self.optimizer.zero_grad()
        # The graph of the prefix is used up.
        self.sampled = dataclasses.replace(
            sampled, batch=dataclasses.replace(batch, old_per_token_logps=old, prefix=None)
        )
        return metrics

    def _count(self, reason: str) -> None:
        """Account for a skipped step (or, with an empty reason, for a good one)."""
        if not reason:
            self.skipped_in_a_row, self.skipped_sample = 0, None
            return
        assert self.sampled is not None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.skipped_sample = {
            "step": self.finished_steps + 1,
            "reason": reason,
            "examples": [dataclasses.asdict(dataclasses.replace(e, image=None)) for e in self.examples()],
            "completions": self.sampled.completions,
            "rewards": [str(reward) for reward in self.sampled.rewards],  # JSON has no NaN
        }

    # ---- into a checkpoint and back ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {
            "finished_steps": self.finished_steps,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "kl_schedule": None if self.kl_schedule is None else self.kl_schedule.state_dict(),
            "sampled": None,
        }
        if self.sampled is not None and self.finished_steps % self.config.num_iterations:
            state["sampled"] = {**vars(self.sampled), "batch": {**vars(self.sampled.batch), "prefix": None}}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("finished_steps", "num_tokens", "skipped_steps", "skipped_in_a_row"):
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.kl_schedule is not None:
            self.kl_schedule.load_state_dict(state["kl_schedule"])
        if state["sampled"] is not None:
            self.sampled = Sampled(**{**state["sampled"], "batch": _to(state["sampled"]["batch"], self.model.device)})


def _accuracy(completion: str, example: Example) -> float:
    choices = {} if example.choices is None else {"choices": example.choices}
    return accuracy_reward(completion, example.solution, **choices)


def sft_target(solution: str) -> str:
    """The completion that supervised fine-tuning imitates. The data has no reasoning to show, only answers."""
    return f"<think>{solution}</think><answer>{solution}</answer>"


def needs_reference(config: TrainConfig) -> bool:
    """Whether the KL term ever has weight; `config` is that of a task."""
    return bool(config.beta or config.beta_max)


def _kl_schedule(config: TrainConfig) -> KLSchedule:
    return KLSchedule(
        config.max_steps,
        beta_min=config.beta_min,
        beta_max=config.beta_max,
        schedule=config.kl_schedule,
        explore_fraction=config.explore_fraction or 0.0,  # None with other schedules than the paper's
        target_kl=config.target_kl,
        horizon=max(1, config.max_steps // 10),  # over a run of any length by a factor of up to e^2
    )


@cache
def _order(seed: int, epoch: int, total: int) -> list[int]:
    order = list(range(total))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _to(batch: dict[str, Any], device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(tensor) for name, tensor in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return Batch(**move(batch))

"""Training of one model on one task: prompts -> completions -> rewards -> advantages -> loss -> update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mr1fast.data.example import Example, Examples
from mr1fast.losses.kl_weight import KLSchedule
from mr1fast.losses.logits import group_advantages
from mr1fast.model.policy import Policy
from mr1fast.model.rollout import Sampler
from mr1fast.options.config import TaskConfig
from mr1fast.options.reward_weights import load_rewards
from mr1fast.rewards import unanswered
from mr1fast.training.batch import Batch, Whole, batch_logps, grpo_batch_loss, sft_batch_loss, split_batch, weighted
from mr1fast.training.metrics import (
    completion_lengths,
    completion_metrics,
    difference,
    mean_metrics,
    reward_metrics,
    sampling_metrics,
)
from mr1fast.training.optimizer import Optimizer, learning_rate_at
from mr1fast.training.order import rows_of_step
from mr1fast.training.phases import Phases
from mr1fast.training.processes import ALONE, Processes, pieces_of
from mr1fast.training.scoring import Scored, first_scored, score, weighted_sum
from mr1fast.training.skipped import skipped_sample, useless


@dataclass(frozen=True)
class StepData:
    """What a step trains on: the batch, and the texts, rewards and metrics behind it."""

    batch: Batch
    completions: list[str]  # [B]
    rewards: list[float]  # [B], weighted sums; empty for supervised fine-tuning
    metrics: dict[str, float]


class Trainer:
    """The state of training: it takes a step at a time, and can be saved to a checkpoint and restored.

    `reference` is the frozen model of the KL term, or None if the KL weight is always 0. It may be the policy itself if
    that has an adapter, which is switched off for the reference's log-probabilities.
    """

    def __init__(
        self,
        config: TaskConfig,
        policy: Policy,
        reference: Policy | None,
        dataset: Examples,
        processes: Processes = ALONE,
    ):
        self.config, self.policy, self.reference, self.dataset = config, policy, reference, dataset
        self.processes = processes
        # eval() throughout: policy, sampler and reference must be the same network, so there is no dropout.
        policy.model.eval()
        self.rewards = load_rewards(config.reward_weights)
        self.kl_schedule = _kl_schedule(config)
        self.optimizer = Optimizer(policy.trainable_parameters(), max_grad_norm=config.max_grad_norm)
        self.pieces = pieces_of(config, processes)
        self.sampler = Sampler(policy, max_completion_length=config.max_completion_length)
        self.phases = Phases(policy.device)
        self.finished_steps = 0
        self.num_tokens = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.step_data: StepData | None = None
        self.scored: list[Scored] = []  # the first completions of the last batch that was sampled
        self.skipped_sample: dict[str, Any] | None = None  # of the last step, if that was skipped

    def step(self) -> dict[str, float]:
        """Take one optimizer step and return its metrics. A step with NaN or inf in it changes no weight."""
        if self.step_data is None or self.finished_steps % self.config.num_iterations == 0:
            self.step_data = self.collect()
        metrics = {"learning_rate": self.learning_rate}
        if self.config.method != "sft":
            metrics["beta"] = self.beta
        reason = useless(self.step_data.rewards)
        if not reason:
            metrics |= self.update(self.step_data)
            broken = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
            reason = f"{broken[0]} is {metrics[broken[0]]}" if broken else ""
        metrics |= self.step_data.metrics
        self._count(reason)
        self.kl_schedule.update(metrics.get("kl", math.nan), n_steps=1)
        self.kl_schedule.step()
        self.finished_steps += 1
        progress = {"num_tokens": self.num_tokens, "skipped_steps": self.skipped_steps}
        return metrics | progress | self.phases.metrics()

    # ---- prompts, completions, rewards ------------------------------------------------------------------------------

    def examples(self) -> list[Example]:
        """The prompts of this step, those of all processes."""
        return [self.dataset[row] for row in self._rows()]

    def _rows(self) -> list[int]:
        """Of these prompts: each epoch has a new order, which is the same in every run with this seed."""
        count, total = self.config.prompts_per_step, len(self.dataset)
        first = self.finished_steps // self.config.num_iterations * count
        return rows_of_step(self.config.seed, first, count, total)

    def collect(self) -> StepData:
        """Prompts with completions: sampled and rewarded ones, or those that supervised fine-tuning imitates."""
        self.phases.begin("prompts" if self.config.method == "sft" else "rollout")
        examples = [self.dataset[row] for row in self.processes.share(self._rows())]
        inputs = self.policy.encode(examples)
        data = self._targets(examples, inputs) if self.config.method == "sft" else self._rollout(examples, inputs)
        prompts = int(inputs["attention_mask"].sum()) * data.batch.num_generations
        self.num_tokens += sum(self.processes.gather(prompts + int(data.batch.completion_mask.sum())))
        return data

    def _rollout(self, examples: Sequence[Example], inputs: dict[str, Tensor]) -> StepData:
        config, G = self.config, self.config.num_generations
        # Sampler and policy are one network at this point: prompts and images are computed once for both. But an update
        # in pieces computes them again, because its point is to hold the activations of one piece at a time.
        whole = self.pieces == 1
        with torch.set_grad_enabled(whole):
            prefix = self.policy.encode_prefix(inputs)
        places = self.processes.share(range(config.prompts_per_step))
        rollout = self.sampler.generate(
            examples,
            num_generations=G,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            prefix=prefix.detach(),
            streams=[f"{config.seed}/{self.finished_steps}/{place}" for place in places],
        )
        self.phases.begin("rewards")
        completions = rollout.completions
        unanswered_before = unanswered()
        repeated = [example for example in examples for _ in range(G)]
        own_scores = score(self.rewards, completions, repeated)
        scores = {name: torch.tensor(self.processes.whole(own.tolist(), G)) for name, own in own_scores.items()}
        total = weighted_sum(self.rewards, scores)  # of all processes, as are the metrics
        every = group_advantages(total, G, scale_rewards=config.loss.get("scale_rewards", "group"))
        advantages = torch.cat(self.processes.share(every.split(G)))
        self.scored = first_scored(repeated, completions, own_scores, advantages)
        batch = Batch(
            inputs=inputs,
            num_generations=G,
            completion_ids=rollout.completion_ids,
            completion_mask=rollout.completion_mask,
            advantages=advantages.to(self.policy.device),
            sampling_per_token_logps=rollout.per_token_logps,
            prefix=prefix if whole else None,
        )
        if self.reference is not None:
            batch = dataclasses.replace(batch, ref_per_token_logps=self._reference_logps(self.reference, batch))
        metrics = reward_metrics(scores, total, G) | self._completion_metrics(batch)
        metrics["rewards/unanswered"] = sum(self.processes.gather(unanswered() - unanswered_before))
        return StepData(batch, self.processes.whole(completions, G), total.tolist(), metrics)

    def _completion_metrics(self, batch: Batch) -> dict[str, float]:
        lengths, ended = completion_lengths(batch, self.policy.end_ids)
        whole = self.processes.whole(list(zip(lengths.tolist(), ended.tolist())))
        return completion_metrics(*map(torch.tensor, zip(*whole)))

    @torch.no_grad()
    def _reference_logps(self, reference: Policy, batch: Batch) -> Tensor:
        """[B, L] float32. A reference that is offloaded is on the policy's device only meanwhile."""
        self.phases.begin("reference")
        adapter_off = reference.without_adapter() if reference is self.policy else nullcontext()
        with adapter_off, reference.on(self.policy.device):
            pieces = split_batch(batch, self.pieces)
            return torch.cat([batch_logps(reference, piece, self.config.temperature) for piece in pieces])

    def _targets(self, examples: Sequence[Example], inputs: dict[str, Tensor]) -> StepData:
        """What supervised fine-tuning imitates: the solution in the required form."""
        completions = [sft_target(example.solution) for example in examples]
        batch = Batch(inputs, 1, *self.policy.encode_completions(completions))
        return StepData(batch, completions, [], self._completion_metrics(batch))

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
        return self.kl_schedule.value

    def update(self, data: StepData) -> dict[str, float]:
        """Take the optimizer's step on the batch, in pieces; no weight changes if loss or gradient is not finite."""
        self.phases.begin("policy")
        config, batch = self.config, data.batch
        shares = self.processes.gather((len(batch.completion_ids), int(batch.completion_mask.sum())))
        completions, tokens = map(sum, zip(*shares))
        whole = Whole(completions, tokens, config.max_completion_length)
        weighted_batch, keywords = weighted(batch, config.loss, whole)
        pieces = split_batch(weighted_batch, self.pieces)
        total, rows, logps = 0.0, [], []
        for piece in pieces:
            if config.method == "sft":
                loss = sft_batch_loss(self.policy, piece, num_sequences=whole.completions)
            else:
                output = grpo_batch_loss(self.policy, piece, beta=self.beta, temperature=config.temperature, **keywords)
                loss = output.loss
                rows.append(output.metrics())
                logps.append(output.per_token_logps)
            total += loss.item()
            loss.backward()
        metrics = {"loss": sum(self.processes.gather(total))}
        if rows:  # means over tokens
            of_pieces = [piece.completion_mask.sum().item() for piece in pieces]
            metrics |= mean_metrics(self.processes.whole(rows), self.processes.whole(of_pieces), keywords)
        if batch.sampling_per_token_logps is not None:
            own = difference(torch.cat(logps), batch.sampling_per_token_logps, batch.completion_mask)
            metrics |= sampling_metrics(self.processes.gather(own))
        old = batch.old_per_token_logps
        self.phases.begin("optimizer")
        if math.isfinite(metrics["loss"]):
            self.processes.sum_gradients(self.optimizer.weights)
            metrics["grad_norm"] = self.optimizer.step(self.learning_rate)
            if config.num_iterations > 1 and logps and old is None:
                # The policy that sampled is the one before this update; the next ones on this batch are off-policy.
                old = torch.cat(logps).detach()
        else:
            metrics["grad_norm"] = math.nan
            self.optimizer.zero_grad()
        # The graph of the prefix is used up.
        used = dataclasses.replace(batch, old_per_token_logps=old, sampling_per_token_logps=None, prefix=None)
        self.step_data = dataclasses.replace(data, batch=used)
        return metrics

    def _count(self, reason: str) -> None:
        """Account for a skipped step (or, with an empty reason, for a good one)."""
        if not reason:
            self.skipped_in_a_row, self.skipped_sample = 0, None
            return
        assert self.step_data is not None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        data, step = self.step_data, self.finished_steps + 1
        self.skipped_sample = skipped_sample(step, reason, self.examples(), data.completions, data.rewards)

    # ---- into a checkpoint and back ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {
            "finished_steps": self.finished_steps,
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": self.optimizer.state_dict(),
            "max_steps": self.config.max_steps,
            "kl_schedule": self.kl_schedule.state_dict(),
            "step_data": None,
        }
        if self.step_data is not None and self.finished_steps % self.config.num_iterations:
            own = {**vars(self.step_data), "batch": {**vars(self.step_data.batch), "prefix": None}}
            state["step_data"] = self.processes.gather(own)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError if the state is that of another model or version."""
        for name in ("finished_steps", "num_tokens", "skipped_steps", "skipped_in_a_row"):
            setattr(self, name, state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_schedule.load_state_dict(state["kl_schedule"])
        if (shares := state["step_data"]) is not None:
            shares = [shares] if isinstance(shares, dict) else shares  # an older version's, of one process
            if len(shares) != self.processes.count:
                what = f"it is from within the updates of a batch that is divided among {len(shares)}"
                raise ValueError(f"{what}, and can only be resumed with as many processes")
            data = shares[self.processes.rank]
            self.step_data = StepData(**{**data, "batch": _to(data["batch"], self.policy.device)})


def sft_target(solution: str) -> str:
    """The completion that supervised fine-tuning imitates. The data has no reasoning to show, only answers."""
    return f"<think>{solution}</think><answer>{solution}</answer>"


def _kl_schedule(config: TaskConfig) -> KLSchedule:
    return KLSchedule(
        config.max_steps,
        beta_min=config.beta_min,
        beta_max=config.beta_max,
        schedule=config.kl_schedule,
        explore_fraction=config.explore_fraction,
        target_kl=config.target_kl,
        horizon=max(1, config.max_steps // 10),  # over a run of any length by a factor of up to e^2
    )


def _to(batch: dict[str, Any], device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: move(tensor) for name, tensor in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    return Batch(**move(batch))

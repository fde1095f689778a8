"""Training of one model on one task: prompts -> completions -> rewards -> advantages -> loss -> update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mr1fast.data.example import Example, Examples
from mr1fast.losses.kl_weight import KLSchedule
from mr1fast.losses.logits import group_advantages
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix
from mr1fast.model.rollout import Sampler
from mr1fast.options.config import TaskConfig
from mr1fast.options.reward_weights import load_rewards
from mr1fast.rewards import unanswered
from mr1fast.training.batch import (
    Batch,
    Whole,
    batch_logps,
    batch_on,
    grpo_batch_loss,
    is_one_piece,
    pieces_of,
    sft_batch_loss,
    weighted,
)
from mr1fast.training.groups import Groups, Shortage, StepData, refill
from mr1fast.training.learning_rate import learning_rate_at
from mr1fast.training.metrics import completion_metrics, cut_off, difference, mean_metrics, sampling_metrics
from mr1fast.training.optimizer import Optimizer
from mr1fast.training.order import rows_of_step
from mr1fast.training.phases import Phases
from mr1fast.training.processes import ALONE, Processes, equal_pieces, share_weights
from mr1fast.training.scoring import Scored, first_scored, score, weighted_sum
from mr1fast.training.skipped import skipped_sample, useless


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
        for one in filter(None, (policy, reference)):
            one.shares_prefix = one.shares_prefix and config.share_prefix
        policy.checkpointing = config.gradient_checkpointing == "on"
        self.rewards = load_rewards(config.reward_weights)
        self.kl_schedule = _kl_schedule(config)
        self.optimizer = self._optimizer()
        self.equal_pieces = equal_pieces(config, processes)
        self.sampler = Sampler(policy, max_completion_length=config.max_completion_length)
        self.phases = Phases(policy.device)
        self.finished_steps = 0
        self.further_prompts = 0  # that --dynamic-sampling has taken beside those of each step
        self.shortage = Shortage()
        self.num_tokens = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.step_data: StepData | None = None
        self.scored: list[Scored] = []  # the first completions of the last batch that was sampled
        self.skipped_sample: dict[str, Any] | None = None  # of the last step, if that was skipped

    def _optimizer(self) -> Optimizer:
        """Divides policy and reference first, if that is asked for."""
        most, processes = self.config.max_grad_norm, self.processes
        if not share_weights(processes):
            return Optimizer(self.policy.trainable_parameters(), max_grad_norm=most)
        from mr1fast.training.sharding import ShardedOptimizer, shard  # there are builds of torch without this

        for one in filter(None, (self.policy, self.reference)):
            shard(one)
        return ShardedOptimizer(self.policy.trainable_parameters(), max_grad_norm=most, is_main=processes.is_main)

    def step(self) -> dict[str, float]:
        """Take one optimizer step and return its metrics. A step with NaN or inf in it changes no weight."""
        if self.step_data is None or self.finished_steps % self.config.num_iterations == 0:
            self.step_data = self.collect()
        metrics = {"learning_rate": self.learning_rate}
        if self.config.method != "sft":
            metrics["beta"] = self.beta
        any_tokens = any(self.processes.gather(bool(self.step_data.batch.completion_mask.any())))
        reason = useless(self.step_data.rewards, any_tokens)
        if not reason:
            metrics |= self.update(self.step_data)
            broken = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
            reason = f"{broken[0]} is {metrics[broken[0]]}" if broken else ""
        else:
            self.step_data = dataclasses.replace(self.step_data, prefix=None)
        metrics |= self.step_data.metrics
        self._count(reason)
        self.kl_schedule.update(metrics.get("kl", math.nan), n_steps=1)
        self.kl_schedule.step()
        self.finished_steps += 1
        progress = {"num_tokens": self.num_tokens, "skipped_steps": self.skipped_steps}
        return metrics | progress | self.phases.metrics()

    # ---- prompts, completions, rewards ------------------------------------------------------------------------------

    def rows(self) -> list[int]:
        """The prompts of this step: each epoch has a new order, which is the same in every run with this seed."""
        return self._rows_from(self.finished_steps // self.config.num_iterations, self.config.prompts_per_step)

    def examples(self, rows: Sequence[int] | None = None) -> list[Example]:
        """Those of these rows, or of this step."""
        return [self.dataset[row] for row in (self.rows() if rows is None else rows)]

    def _rows_from(self, steps: int, count: int) -> list[int]:
        """`count` rows of the data, after so many steps' prompts and the further ones that were taken."""
        first = steps * self.config.prompts_per_step + self.further_prompts
        return rows_of_step(self.config.seed, first, count, len(self.dataset))

    def collect(self) -> StepData:
        """Prompts with completions: sampled and rewarded ones, or those that supervised fine-tuning imitates."""
        self.phases.begin("prompts" if self.config.method == "sft" else "rollout")
        rows = self.processes.share(self.rows())
        return self._targets(rows) if self.config.method == "sft" else self._rollout(rows)

    def _rollout(self, rows: list[int]) -> StepData:
        config, G, unanswered_before = self.config, self.config.num_generations, unanswered()
        sampled, inputs, prefix = self._sample(rows, self.processes.share(range(config.prompts_per_step)))
        groups = sampled
        if config.dynamic_sampling:
            sampled, chosen = refill(sampled, self._further)
            groups = sampled.take(chosen)
        if groups.rows != rows:
            inputs = self.policy.encode(groups.examples)
        total = self.processes.whole_tensor(groups.total, G)
        every = group_advantages(total, G, scale_rewards=config.loss.get("scale_rewards", "group"))
        advantages = torch.cat(self.processes.share(every.split(G)))
        self.scored = first_scored(groups.repeated, groups.rollout.completions, groups.scores, advantages)
        batch = Batch(
            inputs=inputs,
            num_generations=G,
            completion_ids=groups.rollout.completion_ids,
            completion_mask=groups.that_ended(self.policy.end_ids) if config.mask_truncated else groups.completion_mask,
            advantages=advantages.to(self.policy.device),
            sampling_per_token_logps=groups.rollout.per_token_logps,
        )
        if self.reference is not None:
            batch = dataclasses.replace(batch, ref_per_token_logps=self._reference_logps(self.reference, batch))
        metrics = sampled.metrics(
            self.policy.end_ids, self.processes
        )  # of all that was sampled: groups that agree were no accident
        if config.dynamic_sampling:
            metrics |= self.shortage.metrics(sampled, groups)
        metrics["rewards/unanswered"] = sum(self.processes.gather(unanswered() - unanswered_before))
        completions, rows = self.processes.whole(groups.rollout.completions, G), self.processes.whole(groups.rows)
        return StepData(batch, completions, total.tolist(), metrics, rows, prefix)

    def _sample(self, rows: list[int], places: Sequence[int]) -> tuple[Groups, dict[str, Tensor], Prefix | None]:
        """Sample and reward completions of these prompts. Also their inputs and, if the update is to use it, prefix.

        places: of these among those of this step.
        """
        config, G = self.config, self.config.num_generations
        examples = self.examples(rows)
        inputs = self.policy.encode(examples)
        kept = self._keeps_prefix(inputs)
        with self.policy.gathered():
            with torch.set_grad_enabled(kept):
                prefix = self.policy.encode_prefix(inputs)
            rollout = self.sampler.generate(
                examples,
                num_generations=G,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                prefix=prefix,
                streams=[f"{config.seed}/{self.finished_steps}/{place}" for place in places],
            )
        self.phases.begin("rewards")
        self._count_tokens(inputs, G, rollout.completion_mask)
        scores = score(self.rewards, rollout.completions, [example for example in examples for _ in range(G)])
        groups = Groups(rows, examples, rollout, scores, weighted_sum(self.rewards, scores))
        return groups, inputs, prefix if kept else None

    def _keeps_prefix(self, inputs: dict[str, Tensor]) -> bool:
        """Whether prompts, run to sample, need not run again in the update: it has them all in one pass, and would keep
        all activations of that anyway.
        """
        config, policy, G = self.config, self.policy, self.config.num_generations
        if config.dynamic_sampling or policy.checkpointing or policy.is_sharded or not policy.shares_prefix:
            return False
        longest = torch.ones(len(inputs["input_ids"]) * G, config.max_completion_length, dtype=torch.bool)
        batch = Batch(inputs, G, longest.long(), longest.to(policy.device))
        return is_one_piece(batch, equal=self.equal_pieces, most_tokens=config.tokens_per_microbatch)

    def _further(self, place: int, count: int) -> Groups:
        """The groups of the prompts that come next in the order; the next step begins after them."""
        self.phases.begin("rollout")
        rows = self._rows_from(self.finished_steps // self.config.num_iterations + 1, count)
        groups, *_ = self._sample(rows, range(place, place + count))
        self.further_prompts += count
        return groups

    def _count_tokens(self, inputs: dict[str, Tensor], num_generations: int, completion_mask: Tensor) -> None:
        tokens = int(inputs["attention_mask"].sum()) * num_generations + int(completion_mask.sum())
        self.num_tokens += sum(self.processes.gather(tokens))

    @torch.no_grad()
    def _reference_logps(self, reference: Policy, batch: Batch) -> Tensor:
        """[B, L] float32. A reference that is offloaded is on the policy's device only meanwhile."""
        self.phases.begin("reference")
        adapter_off = reference.without_adapter() if reference is self.policy else nullcontext()
        with adapter_off, reference.on(self.policy.device):
            logps = torch.zeros(batch.completion_mask.shape, device=self.policy.device)
            for prompts in self._pieces(batch):
                logps[batch.rows_of(prompts)] = batch_logps(reference, batch.take(prompts), self.config.temperature)
            reference.release()
        return logps

    def _pieces(self, batch: Batch) -> list[Sequence[int]]:
        """The prompts that are in the model at a time, with all of their completions."""
        pieces = pieces_of(batch, equal=self.equal_pieces, most_tokens=self.config.tokens_per_microbatch)
        if self.policy.is_sharded:  # a process waits for the others in each layer
            most = max(self.processes.gather(len(pieces)))
            while len(pieces) < most:
                longest = pieces.pop(max(range(len(pieces)), key=lambda i: len(pieces[i])))
                pieces += [longest[:1], longest[1:]]
        return pieces

    def _targets(self, rows: list[int]) -> StepData:
        """What supervised fine-tuning imitates."""
        examples, reasoning, whole = self.examples(rows), self.config.sft_reasoning, self.processes.whole
        completions = [sft_target(one.solution, one.columns["reasoning"] if reasoning else None) for one in examples]
        batch = Batch(self.policy.encode(examples), 1, *self.policy.encode_completions(completions))
        self._count_tokens(batch.inputs, 1, batch.completion_mask)
        ids, mask = batch.completion_ids, batch.completion_mask
        ends = (mask.sum(1), cut_off(ids, mask, self.policy.end_ids))
        metrics = completion_metrics(*map(self.processes.whole_tensor, ends))
        return StepData(batch, whole(completions), [], metrics, whole(rows))

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
        batch_of_step, keywords = weighted(batch, config.loss, whole)
        total, rows, counted = 0.0, [], []
        logps = torch.zeros(batch.completion_mask.shape, device=self.policy.device)
        for prompts in self._pieces(batch):
            piece = batch_of_step.take(prompts)
            if config.method == "sft":
                loss = sft_batch_loss(self.policy, piece)
            else:
                weights = {"beta": self.beta, "temperature": config.temperature, **keywords}
                output = grpo_batch_loss(self.policy, piece, data.prefix, **weights)
                loss = output.loss
                rows.append(output.metrics())
                counted.append(piece.completion_mask.sum().item())
                logps[batch.rows_of(prompts)] = piece.padded(output.per_token_logps.detach())
            total += loss.item()
            loss.backward()
        metrics = {"loss": sum(self.processes.gather(total))}
        if rows:  # means over tokens
            metrics |= mean_metrics(self.processes.whole(rows), self.processes.whole(counted), keywords)
        if batch.sampling_per_token_logps is not None:
            own = difference(logps, batch.sampling_per_token_logps, batch.completion_mask)
            metrics |= sampling_metrics(self.processes.gather(own))
        old = batch.old_per_token_logps
        self.phases.begin("optimizer")
        if math.isfinite(metrics["loss"]):
            if not self.policy.is_sharded:
                self.processes.sum_gradients(self.optimizer.weights)
            metrics["grad_norm"] = self.optimizer.step(self.learning_rate)
            if config.num_iterations > 1 and old is None:
                # The policy that sampled is the one before this update; the next ones on this batch are off-policy.
                old = logps
        else:
            metrics["grad_norm"] = math.nan
            self.optimizer.zero_grad()
        used = dataclasses.replace(batch, old_per_token_logps=old, sampling_per_token_logps=None)
        self.step_data = dataclasses.replace(data, batch=used, prefix=None)
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
        examples = self.examples(data.rows)
        self.skipped_sample = skipped_sample(step, reason, examples, data.completions, data.rewards)

    # ---- into a checkpoint and back ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {
            "finished_steps": self.finished_steps,
            "num_tokens": self.num_tokens,
            "further_prompts": self.further_prompts,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer": self.optimizer.state_dict(),
            "max_steps": self.config.max_steps,
            "kl_schedule": self.kl_schedule.state_dict(),
            "step_data": None,
        }
        if self.step_data is not None and self.finished_steps % self.config.num_iterations:
            own = {**vars(self.step_data), "batch": vars(self.step_data.batch)}
            state["step_data"] = self.processes.gather(own)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises KeyError, TypeError, ValueError or RuntimeError if the state is that of another model or version."""
        for name in ("finished_steps", "num_tokens", "skipped_steps", "skipped_in_a_row"):
            setattr(self, name, state[name])
        self.further_prompts = state.get("further_prompts", 0)  # older versions took none
        self.optimizer.load_state_dict(state["optimizer"])
        self.kl_schedule.load_state_dict(state["kl_schedule"])
        if (shares := state["step_data"]) is not None:
            shares = [shares] if isinstance(shares, dict) else shares  # an older version's, of one process
            if len(shares) != self.processes.count:
                what = f"it is from within the updates of a batch that is divided among {len(shares)}"
                raise ValueError(f"{what}, and can only be resumed with as many processes")
            data = shares[self.processes.rank]
            self.step_data = StepData(**{**data, "batch": batch_on(self.policy.device, data["batch"])})


def sft_target(solution: str, reasoning: str | None = None) -> str:
    """The completion that supervised fine-tuning imitates; where there is no reasoning, the solution stands for it."""
    return f"<think>{solution if reasoning is None else reasoning}</think><answer>{solution}</answer>"


def without_reasoning(example: Example) -> str | None:
    """Why an example is left out with --sft-reasoning."""
    return None if str(example.columns.get("reasoning") or "").strip() else "no reasoning"


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

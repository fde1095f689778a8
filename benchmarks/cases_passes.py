"""`passes`: forward and backward of the policy on prompts and completions, bare: packed, plain, and as TRL pads them.

Groups of eight and lengths as in `step`, the completions all different. The note says how many tokens pass through the
language model, and how many there are: those of the prompts, once, and of the completions. `rate` counts the latter.
What to read beside the time is `peak_extra_mib`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import cases_step
from benchmarks.cases import Call, Case, Scene
from benchmarks.cases_loss import BETA, eager_loss, loss_batch
from benchmarks.cases_step import Shape
from mr1fast.model.packing import Packed
from mr1fast.model.policy import Policy
from mr1fast.training.batch import Batch, grpo_batch_loss

PACKED = "mr1fast, packed"


@dataclass
class Inputs:
    policy: Policy
    batch: Batch

    @property
    def packed_tokens(self) -> int:
        batch = self.batch
        return Packed.of(batch.inputs, batch.completion_ids, batch.completion_mask).input_ids.shape[1]

    @property
    def padded_tokens(self) -> int:
        return len(self.batch.completion_ids) * (
            self.batch.inputs["input_ids"].shape[1] + self.batch.completion_ids.shape[1]
        )


def make_inputs(shape: Shape, kind: str) -> Inputs:
    x = cases_step.make_inputs(shape, kind)
    policy = x.policy()
    return Inputs(policy, cases_step.random_batch(x, policy))


def call(x: Inputs, loss: Callable[[Inputs], Tensor], *, share: bool, again: bool = False) -> Call:
    tokens = x.packed_tokens if share else x.padded_tokens
    needed = int(x.batch.inputs["attention_mask"].sum() + x.batch.completion_mask.sum())

    def run() -> None:
        x.policy.shares_prefix, x.policy.checkpointing = share, again
        loss(x).backward()

    return Call(run, lambda: x.policy.model.zero_grad(), remark=lambda: f"{tokens:,} tokens of {needed:,}")


def of_trainer(x: Inputs) -> Tensor:
    return grpo_batch_loss(x.policy, x.batch, beta=BETA, temperature=1.0).loss


def of_logits(x: Inputs) -> Tensor:
    """Logits of every position of the padded completions, and the loss in torch."""
    batch = x.batch
    assert batch.advantages is not None
    assert batch.ref_per_token_logps is not None
    everything = replace(batch, completion_mask=torch.ones_like(batch.completion_mask))
    logits = x.policy.logits(everything.hidden(x.policy).unflatten(0, batch.completion_ids.shape))
    ids, mask = batch.completion_ids, batch.completion_mask
    return eager_loss(logits, loss_batch(ids, batch.advantages, None, batch.ref_per_token_logps, mask))


def scenes(quick: bool) -> list[Scene]:
    small = replace(cases_step.EMBEDDED_SHAPE, P=2, G=2, L=4)
    shapes = [small] if quick else [cases_step.EMBEDDED_SHAPE, cases_step.SHAPES[1]]

    def scene(shape: Shape, kind: str) -> Scene:
        work = 1e9 * sum(shape.lengths(kind))

        def case(name: str, loss: Callable[[Inputs], Tensor], **how: bool) -> Case:
            return Case(name, lambda x: call(x, loss, **how), work, "tokens/s", against=PACKED)

        of_scene = (
            case(PACKED, of_trainer, share=True),
            case(f"{PACKED}, checkpointed", of_trainer, share=True, again=True),
            case("mr1fast --no-share-prefix", of_trainer, share=False),
            case("repeated, padded, from logits", of_logits, share=False),
        )
        title = f"{shape.name}, {shape.P} x {shape.G} x {shape.L}, {kind}"
        return Scene("passes", title, "float32", lambda: make_inputs(shape, kind), of_scene)

    return [scene(shape, kind) for shape in shapes for kind in ("equal", "lognormal")]

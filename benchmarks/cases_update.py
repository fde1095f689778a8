"""`update`: one update of the trainer, with the loss from hidden states as the trainer takes it, and from logits.

Forward and backward of the policy on a batch already sampled (two prompts with an image, groups of eight), clipping and
AdamW, for a Qwen2-VL of the embedded model's layers and Qwen2-VL's real vocabulary. What to read is `peak_extra_mib`:
gradients, activations and whatever the loss needs, on top of weights and optimizer state. `rate` counts the lm_head's
three GEMMs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from benchmarks.cases import Call, Case, Scene
from benchmarks.cases_loss import BETA, eager_loss, loss_batch
from mr1fast import grpo_loss
from mr1fast.data.example import Example
from mr1fast.model.load import EMBEDDED, load_processor
from mr1fast.model.policy import Policy
from mr1fast.training.batch import Batch, grpo_batch_loss
from mr1fast.training.optimizer import Optimizer

P, G = 2, 8
OURS = "mr1fast trainer"


@dataclass
class Inputs:
    policy: Policy
    optimizer: Optimizer
    batch: Batch


def make_inputs(L: int, V: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)
    config = Qwen2VLConfig.from_pretrained(EMBEDDED)
    config.get_text_config().vocab_size = V
    model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    policy = Policy(model, load_processor(EMBEDDED))
    examples = [Example(Image.new("RGB", (56, 56), (i, 0, 0)), "How many?", "3", f"{i}") for i in range(P)]
    batch = Batch(
        inputs=policy.encode(examples),
        num_generations=G,
        completion_ids=torch.randint(0, 256, (P * G, L)),
        completion_mask=torch.ones(P * G, L, dtype=torch.bool),
        advantages=torch.randn(P * G),
        ref_per_token_logps=torch.full((P * G, L), -12.0),
    )
    return Inputs(policy, Optimizer(policy.trainable_parameters(), max_grad_norm=1.0), batch)


def update(x: Inputs, loss: Callable[[Inputs], Tensor]) -> Call:
    def run() -> None:
        loss(x).backward()
        x.optimizer.step(1e-6)

    return Call(run)


def of_trainer(x: Inputs) -> Tensor:
    return grpo_batch_loss(x.policy, x.batch, beta=BETA, temperature=1.0).loss


def logits_of(x: Inputs) -> Tensor:
    prefix = x.policy.encode_prefix(x.batch.inputs)
    return x.policy.logits(x.policy.completion_hidden(prefix, x.batch.completion_ids))


def of_logits(x: Inputs) -> Tensor:
    batch = x.batch
    output = grpo_loss(
        logits_of(x),
        batch.completion_ids,
        batch.advantages,
        completion_mask=batch.completion_mask,
        ref_per_token_logps=batch.ref_per_token_logps,
        beta=BETA,
        inplace=True,
    )
    return output.loss


def of_logits_in_torch(x: Inputs) -> Tensor:
    batch = x.batch
    assert batch.advantages is not None
    assert batch.ref_per_token_logps is not None
    return eager_loss(logits_of(x), loss_batch(batch.completion_ids, batch.advantages, None, batch.ref_per_token_logps))


def scenes(quick: bool) -> list[Scene]:
    L, V = (4, 1000) if quick else (128, 151936)

    def scene(dtype: torch.dtype) -> Scene:
        H = Qwen2VLConfig.from_pretrained(EMBEDDED).get_text_config().hidden_size

        def case(name: str, loss: Callable[[Inputs], Tensor]) -> Case:
            return Case(name, lambda x: update(x, loss), 6.0 * P * G * L * H * V, "GFLOP/s", against=OURS)

        of_scene = (
            case(OURS, of_trainer),
            case("logits, then mr1fast in place", of_logits),
            case("logits, then torch eager", of_logits_in_torch),
        )
        name = str(dtype).removeprefix("torch.")
        return Scene("update", f"{P * G * L} x {H} x {V}", name, lambda: make_inputs(L, V, dtype), of_scene)

    return [scene(dtype) for dtype in (torch.float32, torch.bfloat16)]

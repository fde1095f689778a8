"""`step`: a whole step, that of our trainer beside those of TRL's GRPOTrainer and our GRPODTrainer.

Sampling, reference, loss with its gradient, clipping and AdamW: same model, prompts, groups and loss, and completions
whose lengths are forced: all as long as they may be ("equal"), or lognormal with a mean of a third of that. Rewards are
drawn at random, as those of models that know nothing would leave nothing to learn. `rate` counts the tokens of
completions; the note says how the last step's time divides. What remains of a step if all but its matrix products took
no time is a case as well.

On a GPU it is Qwen2-VL-2B's shape with random weights in bfloat16. TRL's trainers then update the bfloat16 weights
themselves, which is less work than ours does, whose optimizer keeps them in float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import step_peers
from benchmarks.cases import Call, Case, Scene, without_gpu
from benchmarks.cases_packed import lengths_of
from benchmarks.models import QWEN_2B, in_proportion
from benchmarks.plan_check import random_advantages
from mr1fast.data.example import Example
from mr1fast.model import rollout
from mr1fast.model.checks import VISION_TOKENS
from mr1fast.model.liger import choose_liger
from mr1fast.model.load import EMBEDDED, choose_dtype, load_model, load_processor
from mr1fast.model.policy import Policy
from mr1fast.model.sampling import Choice, Streams
from mr1fast.options.config import TrainConfig
from mr1fast.training import trainer as trainer_module
from mr1fast.training.batch import Batch, batch_on
from mr1fast.training.plan import StepShape
from mr1fast.training.plan_step import build_models
from mr1fast.training.processes import ALONE, Processes
from mr1fast.training.trainer import Trainer

OURS = "mr1fast trainer"
SIDE = 28  # pixels of an image token, but for the embedded model, which has its own


@dataclass(frozen=True)
class Shape:
    """P prompts with an image each, G completions of up to L tokens; a step is `pieces` forward and backward passes.

    model: a configuration, or None for the embedded one.
    """

    name: str
    P: int
    G: int
    L: int
    pieces: int = 1
    image: tuple[int, int] = (56, 56)  # pixels
    model: Any = None
    device: str = "cpu"

    @property
    def dtype(self) -> torch.dtype:
        return choose_dtype("auto", torch.device(self.device))

    def lengths(self, kind: str) -> list[int]:
        """Of the P * G completions, in tokens; the longest has L."""
        B = self.P * self.G
        return [self.L] * B if kind == "equal" else lengths_of(B, self.L).tolist()


EMBEDDED_SHAPE = Shape("embedded", P=16, G=8, L=32)
SHAPES = (
    EMBEDDED_SHAPE,
    *(
        Shape(f"30 M, V {V}", P=4, G=8, L=64, image=(16 * SIDE, 14 * SIDE), model=in_proportion(layers=6, vocabulary=V))
        for V in (32_000, 151_936)
    ),
    Shape("2B", P=4, G=8, L=256, pieces=4, image=(22 * SIDE, 23 * SIDE), model=QWEN_2B, device="cuda"),
)


@dataclass
class Inputs:
    shape: Shape
    lengths: list[int]
    folder: Any  # of the model and its processor; `name` is its path

    def policy(self) -> Policy:
        device = torch.device(self.shape.device)
        liger = choose_liger("auto", device)  # as `python -m mr1fast.train` does
        model = load_model(self.folder.name, device=device, dtype=self.shape.dtype, liger=liger)
        policy = Policy(model.eval(), self.processor())
        special = [policy.pad_id, *(getattr(policy.model.config, name) for name in VISION_TOKENS)]
        policy.banned_ids = torch.tensor(
            special, device=policy.device
        )  # and not all that the small tokenizer lacks, which TRL does not ban
        return policy

    def processor(self) -> Any:
        processor = load_processor(self.folder.name)
        processor.tokenizer.model_max_length = 10**9
        return processor

    def examples(self) -> list[Example]:
        images = [Image.new("RGB", self.shape.image, (40 * i, 0, 0)) for i in range(self.shape.P)]
        return [Example(image, "How many different items are there?", "3", f"{i}") for i, image in enumerate(images)]


def make_inputs(shape: Shape, kind: str) -> Inputs:
    folder = tempfile.TemporaryDirectory()
    processor = load_processor(EMBEDDED)
    if shape.model is not None:
        images = processor.image_processor
        images.patch_size, images.size = 14, {"shortest_edge": SIDE**2, "longest_edge": 10**6}
        torch.manual_seed(0)
        dtype = str(shape.dtype).removeprefix("torch.")
        model, _ = build_models(
            StepShape(shape.model, TrainConfig(data="none", method="sft"), dtype=dtype), shape.device
        )
    else:
        model = load_model(EMBEDDED)
    Policy(model, processor).save(Path(folder.name))
    return Inputs(shape, shape.lengths(kind), folder)


def random_batch(x: Inputs, policy: Policy) -> Batch:
    """Completions of random bytes, which differ from each other, with these lengths."""
    shape, generator = x.shape, torch.Generator().manual_seed(0)
    B = shape.P * shape.G
    batch = Batch(
        inputs=policy.encode(x.examples()),
        num_generations=shape.G,
        completion_ids=torch.randint(0, 256, (B, shape.L), generator=generator),
        completion_mask=torch.arange(shape.L) < torch.tensor(x.lengths)[:, None],
        advantages=torch.randn(B, generator=generator),
        ref_per_token_logps=torch.full((B, shape.L), -5.0),
    )
    return batch_on(policy.device, vars(batch))


# ---- forced lengths -------------------------------------------------------------------------------------------------

ENDS = 2.0  # in the place of a random number, for the token that ends a completion


def forced(lengths: Sequence[int], end: int) -> Any:
    """Within the context, completions have these lengths, whatever the model says."""

    class ForcedStreams(Streams):
        def __init__(self, names: Any):
            super().__init__(names)
            self.left = list(lengths)

        def next(self, count: int, device: torch.device) -> Tensor:
            numbers = super().next(count, device)
            for row, left in enumerate(self.left):
                if 0 < left <= count:
                    numbers[row, left - 1] = ENDS
            self.left = [left - count for left in self.left]
            return numbers

        def keep(self, rows: Sequence[int]) -> None:
            super().keep(rows)
            self.left = [self.left[row] for row in rows]

    class ForcedChoice(Choice):
        def of(self, logits: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
            ends = numbers == ENDS
            forced = logits.new_full(ends.shape, -1e4)  # two numbers, from the CPU, could not be captured
            logits[:, end] = forced.masked_fill(ends, 1e4)
            return super().of(logits, numbers.masked_fill(ends, 0.5))

    return patch.multiple(rollout, Streams=ForcedStreams, Choice=ForcedChoice)


# ---- cases ----------------------------------------------------------------------------------------------------------


class _Examples(list[Example]):
    name = "examples"


def trainer_of(
    x: Inputs, processes: Processes = ALONE, *, share_prefix: bool = True, pieces: int | None = None
) -> Trainer:
    shape = x.shape
    config = replace(
        TrainConfig(task="vc", method="grpo", beta=0.04).for_task("vc"),
        prompts_per_step=shape.P,
        num_generations=shape.G,
        gradient_accumulation_steps=pieces or shape.pieces,
        max_completion_length=shape.L,
        max_steps=10_000,
        learning_rate=1e-6,
        reward_weights={"format": 1.0},
        share_prefix=share_prefix,
    )
    return Trainer(config, x.policy(), x.policy().freeze(), _Examples(x.examples()), processes)


def take_step(trainer: Trainer, lengths: Sequence[int]) -> dict[str, float]:
    """A step's metrics. lengths: of the completions that the trainer samples."""
    with (
        forced(lengths, int(trainer.policy.end_ids[0])),
        patch.object(trainer_module, "group_advantages", random_advantages),
    ):
        metrics = trainer.step()
    assert metrics["grad_norm"] > 0
    assert trainer.step_data is not None
    assert trainer.step_data.batch.completion_mask.sum(1).tolist() == [*lengths]
    return metrics


def of_trainer(x: Inputs, **options: Any) -> Call:
    trainer = trainer_of(x, **options)
    times: dict[str, float] = {}

    def run() -> None:
        metrics = take_step(trainer, x.lengths)
        times.update({name.removeprefix("step_time/"): metrics[name] for name in metrics if "step_time/" in name})

    return Call(run, remark=lambda: step_peers.remark(times), whole=True)


def of_products(x: Inputs) -> Call:
    """The matrix products of a step alone: of each prompt and completion once, and of nothing that is padding.

    Forward for sampling (as if all tokens were known), reference and policy, and the two products of the policy's
    gradients.
    """
    policy = x.policy()
    batch = random_batch(x, policy)
    operands = [_operands(int(batch.completion_mask.sum()), policy.head_weight.detach())]  # the loss multiplies by it

    def note(module: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        rows = inputs[0].numel() // module.weight[0].numel()
        operands.append(_operands(rows, module.weight.detach().flatten(1)))

    linear = [module for module in policy.model.modules() if isinstance(module, (nn.Linear, nn.Conv3d))]
    hooks = [module.register_forward_hook(note) for module in linear]
    with torch.no_grad():
        batch.hidden(policy)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for inputs, weight, gradient in operands:
            for _ in range(3):
                inputs @ weight.T
            gradient @ weight
            gradient.T @ inputs

    return Call(run)


def _operands(rows: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs of so many rows, the weight [outputs, inputs], and a random gradient of their product."""
    outputs, inputs = weight.shape
    return weight.new_empty(rows, inputs).normal_(), weight, weight.new_empty(rows, outputs).normal_()


def of_peer(name: str) -> Callable[[Inputs], Call]:
    def prepare(x: Inputs) -> Call:
        return step_peers.call(name, x)

    return prepare


def scenes(quick: bool) -> list[Scene]:
    shapes = [replace(EMBEDDED_SHAPE, P=2, G=2, L=4)] if quick else SHAPES

    def scene(shape: Shape, kind: str) -> Scene:
        work = 1e9 * sum(shape.lengths(kind))
        of_scene: tuple[Case, ...] = (
            Case(OURS, of_trainer, work, "tokens/s", against=OURS),
            Case("mr1fast --no-share-prefix", partial(of_trainer, share_prefix=False), work, "tokens/s", against=OURS),
            Case("the matrix products alone", of_products, work, "tokens/s", against=OURS),
            Case("trl GRPOTrainer", of_peer("GRPOTrainer"), work, "tokens/s", against=OURS),
            Case("GRPODTrainer", of_peer("GRPODTrainer"), work, "tokens/s", against=OURS),
        )
        if shape.pieces > 1:
            whole = partial(of_trainer, pieces=1)
            of_scene += (Case("mr1fast in a single pass", whole, work, "tokens/s", against=OURS),)
        title = f"{shape.name}, {shape.P} x {shape.G} x {shape.L}, {kind}"
        dtype = str(shape.dtype).removeprefix("torch.")
        return Scene(
            "step",
            title,
            dtype,
            lambda: make_inputs(shape, kind),
            of_scene,
            shape.device,
            lambda: without_gpu(shape.device),
        )

    return [scene(shape, kind) for shape in shapes for kind in ("equal", "lognormal")]

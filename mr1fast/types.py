"""What flows between the parts of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from mr1fast.prefix import Prefix


@dataclass(frozen=True)
class Example:
    """One problem with its verifiable answer."""

    image: Image.Image | None  # RGB
    problem: str  # the question, without the prompt suffix
    solution: str  # the answer alone, e.g. "3"
    name: str  # for reports: "vc/test/17", or file and row


class Examples(Protocol):
    """A data set, as far as training is concerned."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Rollout:
    """G completions of each of P prompts, B = P * G, those of a prompt adjacent."""

    completion_ids: Tensor  # [B, L] int64, the pad token after the end of sequence
    completion_mask: Tensor  # [B, L] bool, true up to and with the end of sequence
    per_token_logps: Tensor  # [B, L] float32, of the model at the temperature of sampling, 0 where masked


@dataclass(frozen=True)
class Batch:
    """What a step trains on: prompts, their completions, and what the loss needs to know of each."""

    inputs: dict[str, Tensor]  # of P prompts, see `prefix.place_inputs`
    num_generations: int  # G
    completion_ids: Tensor  # [B, L] int64
    completion_mask: Tensor  # [B, L] bool
    advantages: Tensor | None = None  # [B] float32; None for supervised fine-tuning
    ref_per_token_logps: Tensor | None = None  # [B, L] float32, of the frozen reference; None where the KL weight is 0
    old_per_token_logps: Tensor | None = None  # [B, L] float32, of the policy that sampled; None while it is still that
    prefix: Prefix | None = None  # of the prompts, with the graph, from sampling; good for the first update only

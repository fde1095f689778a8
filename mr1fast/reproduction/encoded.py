"""What the arms of a process need not do again: they share their base, their tests and, with a seed, their batches.

To process images and to place their tokens takes a quarter of the time in which a model of this size is tested, and the
reference spends a third of its own on prompts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from mr1fast.data.example import Example
from mr1fast.model.policy import Policy
from mr1fast.model.prefix import Prefix

MOST = 150  # batches that are kept: those of both tasks' steps with a seed, and of the tests; some 250 MB

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """What has been computed for a batch of prompts, for as many batches as `MOST`: the last that were asked for."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Hashable, tuple[Any, Value]] = OrderedDict()

    def get(self, key: Hashable, of: Any, compute: Callable[[], Value]) -> Value:
        """key: may be addresses in `of`, which nothing else has while that is kept."""
        if key not in self.kept:
            self.kept[key] = of, compute()
        self.kept.move_to_end(key)
        while len(self.kept) > MOST:
            self.kept.popitem(last=False)
        return self.kept[key][1]


Encoded = Recent[dict[str, Tensor]]  # by question and addresses of the images


class EncodedOnce(Policy):
    """A policy that encodes each batch of prompts once; examples must have an image.

    known: what has been encoded, of all policies with this processor.
    """

    def __init__(self, model: Any, processor: Any, known: Encoded):
        super().__init__(model, processor)
        self.known = known

    def encode(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        key = tuple((example.problem, *map(id, example.images)) for example in examples)
        return self.known.get(key, [*examples], lambda: super(EncodedOnce, self).encode(examples))


class RunOnce(EncodedOnce):
    """A frozen policy through which a batch of prompts runs once, too, whatever completions follow it."""

    def __init__(self, model: Any, processor: Any):
        super().__init__(model, processor, known=Recent())
        self.freeze()
        self.prefixes: Recent[Prefix] = Recent()  # by the address of the prompts' tokens

    def completion_hidden(
        self,
        inputs: dict[str, Tensor],
        completion_ids: Tensor,
        completion_mask: Tensor,
        prefix: Prefix | None = None,
    ) -> Tensor:
        if prefix is None:
            prefix = self.prefixes.get(id(inputs["input_ids"]), inputs, lambda: self.encode_prefix(inputs))
        return super().completion_hidden(inputs, completion_ids, completion_mask, prefix)

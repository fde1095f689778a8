"""FSDP2: policy, reference and optimizer divided among the processes, where accelerate's configuration asks for it.

A layer of the language model is gathered where it computes, and given up again; embedding, head and vision tower, which
the loss needs and which not every batch runs through, are gathered as long as a forward and its backward take. To
sample, each process has all weights until the last token (`Policy.gathered`), so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mr1fast.errors import UserError
from mr1fast.model.policy import Policy
from mr1fast.training.optimizer import Optimizer


def shard(policy: Policy) -> None:
    """Divide the model among the processes, each of which has all of it until then. Raises UserError on old torch."""
    model: Any = policy.base
    if isinstance(model, FSDPModule):
        return
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UserError(f"FSDP needs torch 2.13 or newer, and this is {torch.__version__}")
    mesh = init_device_mesh(policy.device.type, (dist.get_world_size(),))
    for layer in policy.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.run = MethodType(lambda self, **inputs: self.model(**inputs), model)  # without the head, which the loss runs
    register_fsdp_forward_method(model, "run")
    # In backward, what is gathered ahead is the layer below. By default it is whatever ran before, and before the first
    # layer, that is what each process has sampled last.
    layers = policy.layers
    for part, below in zip([model, *layers[::-1]], [*layers[::-1], model]):
        part.set_modules_to_backward_prefetch([below])
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # a sum, as the loss counts the whole batch
        part.set_force_sum_reduction_for_comms(True)  # else by an operation that only NCCL has
        part.set_reduce_scatter_unused_params(True)  # of a vision tower, where one process's prompts have no image
    policy.body, policy.gathered, policy.release = model.run, lambda: _gathered(model), model.reshard


def _parts(model: Any) -> list[Any]:
    """What is gathered at a time: the layers, and all that is in none of them."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def _gathered(model: Any) -> Iterator[None]:
    for part in _parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in _parts(model):
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


class ShardedOptimizer(Optimizer):
    """Of each weight it moves this process's part, as gradients are divided.

    Its state is that of whole weights, as a single process has it.
    """

    def __init__(self, weights: Iterable[nn.Parameter], *, max_grad_norm: float, is_main: bool):
        """is_main: whether to this process `state_dict` is of any use."""
        self.sharded: list[Any] = list(weights)
        self.is_main = is_main
        parts = [nn.Parameter(weight.detach().to_local()) for weight in self.sharded]  # with the same memory
        super().__init__(parts, max_grad_norm=max_grad_norm)

    def step(self, learning_rate: float) -> float:
        for part, weight in zip(self.weights, self.sharded):
            part.grad = None if weight.grad is None else weight.grad.to_local()
        return super().step(learning_rate)

    def zero_grad(self) -> None:
        super().zero_grad()
        for weight in self.sharded:
            weight.grad = None

    def norm(self) -> Tensor:
        squared = super().norm().square()
        dist.all_reduce(squared)
        return squared.sqrt()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        moments = state["adamw"]["state"]
        for i, like in enumerate(self.sharded):
            if i in moments:
                moments[i] = {name: self._whole(one, like) if one.ndim else one for name, one in moments[i].items()}
            if state["masters"][i] is not None:
                state["masters"][i] = self._whole(state["masters"][i], like)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        masters = [
            None if m is None else _part(m, like) for m, like in zip(state["masters"], self.sharded, strict=True)
        ]
        moments = {
            i: {name: _part(one, self.sharded[i]) if one.ndim else one for name, one in slots.items()}
            for i, slots in state["adamw"]["state"].items()
        }
        super().load_state_dict({"adamw": {**state["adamw"], "state": moments}, "masters": masters})

    def _whole(self, part: Tensor, like: DTensor) -> Tensor | None:
        """Of all processes' parts, on the CPU, in the main process."""
        whole = DTensor.from_local(
            part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        ).full_tensor()
        return whole.cpu() if self.is_main else None


def _part(whole: Tensor, like: DTensor) -> Tensor:
    """This process's part of a tensor that is divided as `like` is."""
    parts, rank = whole.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else whole[:0]

"""The vision tower's first layer as the matrix product that it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class PatchProjection(nn.Conv3d):
    """A convolution of patches [N, channels, T, height, width] as large as its kernel: [N, D, 1, 1, 1].

    As a convolution, forward and backward take a CPU four times as long.
    """

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[:, :, None, None, None]


def multiply_patches(vision: Any) -> None:
    """Exchange that layer of a vision tower of FAMILIES, unless it has an adapter. Its weights and their names stay."""
    layer = vision.patch_embed.proj
    if type(layer) is nn.Conv3d and layer.kernel_size == layer.stride:
        layer.__class__ = PatchProjection

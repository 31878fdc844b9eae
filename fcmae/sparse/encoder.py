"""One traversal of timm's ConvNeXt V2 for every layout of the visible positions.

B images, C channels, T tile side, V visible tiles. The parameters live in timm's own modules under timm's names; what
depends on how visible positions are stored is asked of a `Layout`, everything pointwise is written once, here, over
channels-last features `(..., C)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from timm.layers import GELU
from timm.models.convnext import ConvNeXt, ConvNeXtBlock
from torch import Tensor, nn

from fcmae.sparse.norm import layer_norm


class Layout(ABC):
    """The operations that depend on how visible positions are stored; features are the layout's own, `(..., C)`."""

    @abstractmethod
    def embed(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        """Stem convolution (kernel = stride) of the visible patches of (B, C, H, W) images."""

    @abstractmethod
    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """Depthwise convolution in which removed positions count as zero."""

    @abstractmethod
    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        """LayerNorm and strided convolution (kernel = stride); never leaves a tile."""

    @abstractmethod
    def response_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Global response normalisation (paper section 4) over the visible positions of each image."""

    @abstractmethod
    def drop_path(self, x: Tensor, drop: nn.Module) -> Tensor:
        """Stochastic depth: drops the branch of whole images."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """Features as visible tiles (B, V, T, T, C)."""

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        """LayerNorm over channels."""
        return layer_norm(x, layer)

    def pointwise(self, x: Tensor, shortcut: Tensor, block: ConvNeXtBlock) -> Tensor:
        """The rest of a block behind its depthwise convolution: LayerNorm, fc1, GELU, GRN, fc2 and the residual."""
        x = self.norm(x, block.norm)
        x = linear(x, block.mlp.fc1)
        x = block.mlp.act(x)
        grn = block.mlp.grn
        x = self.response_norm(x, grn.weight, grn.bias, grn.eps)
        x = linear(x, block.mlp.fc2)
        return self.drop_path(x, block.drop_path) + shortcut


class Block(ConvNeXtBlock):
    """timm's ConvNeXt V2 block that also runs over a layout; without one it is timm's block, unchanged.

    Over a layout the block's parameters are read and its sub-modules, but for drop path, not called: hooks belong on
    the block, and what changes weights, such as LoRA or weight norm, on its parameters (`torch.nn.utils.parametrize`).
    """

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        if layout is None:
            return super().forward(x)
        return layout.pointwise(layout.depthwise(x, self.conv_dw), x, self)


def adopt_blocks(module: nn.Module) -> None:
    """Let every ConvNeXt V2 block under `module` accept a layout; parameters, names and dense results stay as they are.

    Only the class of the instance changes (as torch's `fully_shard` does), so a block is still entered through
    `Module.__call__` and hooks, activation checkpointing, sharding and regional compilation see it in every layout.
    """
    for child in module.modules():
        if type(child) is ConvNeXtBlock:
            if child.gamma is not None or not hasattr(child.mlp, "grn"):
                raise ValueError("a layout needs ConvNeXt V2 blocks: with response normalisation, without layer scale")
            if not is_gelu(child.mlp.act):
                raise ValueError(f"a layout needs blocks with exact GELU, as published; these have {child.mlp.act}")
            child.__class__ = Block


def is_gelu(act: nn.Module) -> bool:
    """Whether an activation is the exact GELU, of torch or timm."""
    return isinstance(act, nn.GELU | GELU) and getattr(act, "approximate", "none") == "none"


def linear(x: Tensor, layer: nn.Linear | nn.Conv2d) -> Tensor:
    """A linear layer stored as nn.Linear or as a 1x1 convolution (timm has both) over channels-last features."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


def encode(encoder: ConvNeXt, images: Tensor, layout: Layout) -> Tensor:
    """Last-stage features of the visible patches.

    Args:
        encoder: timm's ConvNeXt V2 whose blocks were adopted by `adopt_blocks`.
        images: (B, C, H, W), normalised.
        layout: bound to the batch's visible patches.

    Returns:
        (B, V, T, T, C) with T the side of a patch's tile after the last stage.
    """
    conv, norm = encoder.stem
    x = layout.norm(layout.embed(images, conv), norm)
    for stage in encoder.stages:
        if not isinstance(stage.downsample, nn.Identity):
            norm, conv = stage.downsample
            x = layout.downsample(x, norm, conv)
        for block in stage.blocks:
            x = block(x, layout)
    return layout.gather(x)

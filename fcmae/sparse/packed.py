"""The packed layout: visible tiles in one dense tensor (B, V, T, T, C); every pointwise layer is a plain GEMM over it.

B images, V visible tiles, T tile side, C channels, S stride of the stem, P patch side in pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fcmae.sparse.depthwise import packed_depthwise
from fcmae.sparse.encoder import Layout
from fcmae.sparse.mlp import response_mlp
from fcmae.sparse.norm import patch_norm
from fcmae.sparse.response import response_scale, statistics_dtype
from fcmae.sparse.tiles import Grid, TileIndex


class PackedLayout(Layout):
    """Features are (B, V, T, T, C); only visible positions exist."""

    def __init__(self, visible: Tensor, grid: Grid) -> None:
        self.index = TileIndex(visible, grid)

    def embed(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        batch, channels, height, width = images.shape
        visible = self.index.visible
        rows, columns = self.index.grid
        tile_h, tile_w = height // rows, width // columns
        stride = conv.stride[0]
        patches = images.reshape(batch, channels, rows, tile_h, columns, tile_w)
        image = torch.arange(batch, device=images.device).unsqueeze(1)
        # Only the kept patches are ever read: (B, V, C, P, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5)[image, visible // columns, visible % columns]
        x = patches.reshape(batch, -1, channels, tile_h // stride, stride, tile_w // stride, stride)
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        return F.linear(x, conv.weight.flatten(1), conv.bias)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return packed_depthwise(x, conv.weight, conv.bias, self.index)

    def norm(self, x: Tensor, layer: nn.LayerNorm) -> Tensor:
        return patch_norm(x, layer)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        # The weight (out, in, ky, kx) is read in the order of the patches, (ky, kx, in).
        return F.linear(patch_norm(x, norm, conv.stride[0]), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)

    def response_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        flat = x.flatten(1, -2)
        sum_of_squares = flat.to(statistics_dtype(x.dtype)).square().sum(dim=1)
        scale = response_scale(sum_of_squares, weight, eps).to(x.dtype)
        return torch.addcmul(bias.to(x.dtype), flat, scale.unsqueeze(1)).view_as(x)

    def pointwise(self, x: Tensor, shortcut: Tensor, block: ConvNeXtBlock) -> Tensor:
        if torch.compiler.is_compiling():
            # The compiler fuses the passes between the products, and chooses what to keep, by itself.
            return super().pointwise(x, shortcut, block)
        norm, mlp = block.norm, block.mlp
        drops = not isinstance(block.drop_path, nn.Identity) and block.training
        out = response_mlp(
            x,
            torch.zeros_like(shortcut) if drops else shortcut,
            norm.weight,
            norm.bias,
            mlp.fc1.weight.flatten(1),
            mlp.fc1.bias,
            mlp.grn.weight,
            mlp.grn.bias,
            mlp.fc2.weight.flatten(1),
            mlp.fc2.bias,
            norm_eps=norm.eps,
            eps=mlp.grn.eps,
        )
        return shortcut + self.drop_path(out, block.drop_path) if drops else out

    def drop_path(self, x: Tensor, drop: nn.Module) -> Tensor:
        return drop(x)

    def gather(self, x: Tensor) -> Tensor:
        return x

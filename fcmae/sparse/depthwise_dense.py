"""Packed depthwise convolution in plain PyTorch: onto a dense map and back. The reference; runs anywhere.

B images, V visible tiles, T tile side, C channels, K kernel side. The functions are those of `depthwise_triton.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.sparse.tiles import Grid, gather_runs, scatter_runs, tile_runs


def depthwise(tiles: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, grid: Grid) -> Tensor:
    """(B, V, T, T, C) tiles, (C, 1, K, K) weight, (C,) bias -> (B, V, T, T, C) of the tiles' type."""
    runs = tile_runs(visible, grid, tiles.shape[2])
    dense = scatter_runs(tiles, runs, grid).permute(0, 3, 1, 2)
    weight, bias = weight.to(tiles.dtype), None if bias is None else bias.to(tiles.dtype)
    out = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return gather_runs(out.permute(0, 2, 3, 1), runs, grid)


def depthwise_input_gradient(grad: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, grid: Grid) -> Tensor:
    """Gradient of the tiles: the convolution with the kernel turned round."""
    return depthwise(grad, weight.flip(2, 3), None, visible, slots, grid)


def depthwise_weight_gradient(
    tiles: Tensor, grad: Tensor, visible: Tensor, slots: Tensor, grid: Grid, kernel: int
) -> tuple[Tensor, Tensor]:
    """Gradients of weight (C, 1, K, K) and bias (C,), in float32 or wider."""
    wide = torch.promote_types(tiles.dtype, torch.float32)
    runs = tile_runs(visible, grid, tiles.shape[2])
    dense, dense_grad = (scatter_runs(x.contiguous(), runs, grid).permute(0, 3, 1, 2) for x in (tiles, grad))
    weight, pad = tiles.new_empty(tiles.shape[-1], 1, kernel, kernel), [kernel // 2] * 2
    _, weight_grad, _ = torch.ops.aten.convolution_backward(
        dense_grad, dense, weight, None, [1, 1], pad, [1, 1], False, [0, 0], len(weight), [False, True, False]
    )
    # Plain strides, which DDP's buckets expect.
    return weight_grad.to(wide).reshape(-1).view(weight.shape), grad.sum(dim=(0, 1, 2, 3), dtype=wide)

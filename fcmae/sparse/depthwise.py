"""Packed depthwise convolution: the one operator of the encoder that looks at neighbouring tiles.

B images, V visible tiles, T tile side, C channels, K kernel side. Positions outside the visible tiles count as zero and
get no output (submanifold rule, paper section 3). This is the plain-PyTorch implementation: tiles are laid out on a
dense channels-last map, convolved by the backend's dense kernel and picked up again. Only the tiles are kept for the
backward pass; the dense maps are rebuilt there, so memory stays proportional to what is visible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.sparse.tiles import Grid, TileIndex, gather_runs, scatter_runs


class _PackedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles: Tensor, weight: Tensor, bias: Tensor | None, runs: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(tiles, weight, runs)
        ctx.grid = grid
        dense = scatter_runs(tiles, runs, grid).permute(0, 3, 1, 2)
        out = torch.nn.functional.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return gather_runs(out.permute(0, 2, 3, 1), runs, grid)

    @staticmethod
    def backward(ctx, grad: Tensor):
        tiles, weight, runs = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_dense = scatter_runs(grad, runs, ctx.grid).permute(0, 3, 1, 2)
        dense = scatter_runs(tiles, runs, ctx.grid).permute(0, 3, 1, 2)
        pad = [weight.shape[-1] // 2] * 2
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_dense, dense, weight, None, [1, 1], pad, [1, 1], False, [0, 0], weight.shape[0], needs
        )
        if grad_weight is not None:
            grad_weight = grad_weight.reshape(-1).view(weight.shape)  # plain strides, which DDP's buckets expect
        grad_tiles = gather_runs(grad_input.permute(0, 2, 3, 1), runs, ctx.grid) if needs[0] else None
        grad_bias = grad.sum(dim=(0, 1, 2, 3)) if ctx.needs_input_grad[2] else None
        return grad_tiles, grad_weight, grad_bias, None, None


def packed_depthwise(tiles: Tensor, weight: Tensor, bias: Tensor | None, index: TileIndex) -> Tensor:
    """Depthwise convolution over visible tiles.

    Args:
        tiles: (B, V, T, T, C).
        weight: (C, 1, K, K), K odd; as in `torch.nn.Conv2d(C, C, K, padding=K // 2, groups=C)`.
        bias: (C,) or None.
        index: where the tiles sit.

    Returns:
        (B, V, T, T, C), equal to the dense convolution of the zero-filled map at the visible positions.
    """
    if torch.is_autocast_enabled(tiles.device.type):
        # A custom function runs outside autocast, so its operands take the autocast type here, differentiably.
        dtype = torch.get_autocast_dtype(tiles.device.type)
        tiles, weight, bias = tiles.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _PackedDepthwise.apply(tiles, weight, bias, index.runs(tiles.shape[2]), index.grid)

"""Packed depthwise convolution on a CPU: calls depthwise_cpu.cpp.

B images, V visible tiles, T tile side, C channels, L = grid rows x columns patches; `visible` (B, V) int64 and `slots`
(B, L) int32 are those of a `TileIndex`. The functions are those of `depthwise_triton.py`. The arithmetic is float32, or
float64 for float64 tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.native import call, library, plain
from fcmae.sparse.tiles import Grid

KERNEL = 7  # the only side that the source is written for
# Positions whose products are summed by one thread. Fixed, so that sums do not depend on the number of threads.
_POSITIONS_PER_SUM = 512
_SUMS = 32


def supports(tiles: Tensor, kernel: int) -> bool:
    """Whether the functions below can take these tiles; the first call builds the library."""
    return kernel == KERNEL and plain(tiles) and library("depthwise_cpu", _real(tiles)) is not None


def depthwise(tiles: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, grid: Grid) -> Tensor:
    """(B, V, T, T, C) tiles, (C, 1, 7, 7) weight, (C,) bias -> (B, V, T, T, C) of the tiles' type."""
    return _convolve(tiles, weight, bias, visible, slots, grid, turned=0)


def depthwise_input_gradient(grad: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, grid: Grid) -> Tensor:
    """Gradient of the tiles: the convolution with the kernel turned round."""
    return _convolve(grad, weight, None, visible, slots, grid, turned=1)


def _convolve(
    tiles: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, grid: Grid, turned: int
) -> Tensor:
    real = _real(tiles)
    source, weight = tiles.to(real).contiguous(), weight.to(real).contiguous()
    bias = None if bias is None else bias.to(real).contiguous()
    out = torch.empty_like(source)
    _call("fcmae_convolve", source, visible, slots, grid, source, weight, bias, turned, out)
    return out.to(tiles.dtype)


def depthwise_weight_gradient(
    tiles: Tensor, grad: Tensor, visible: Tensor, slots: Tensor, grid: Grid, kernel: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (C, 1, 7, 7) and bias (C,), in float32 or wider."""
    real, channels = _real(tiles), tiles.shape[-1]
    source, grad = tiles.to(real).contiguous(), grad.to(real).contiguous()
    count = tiles.shape[0] * tiles.shape[1]
    runs = max(1, min(_SUMS, count, count * tiles.shape[2] ** 2 // _POSITIONS_PER_SUM))
    grad_weight, grad_bias = source.new_empty(channels, 1, kernel, kernel), source.new_empty(channels)
    _call("fcmae_accumulate", source, visible, slots, grid, source, grad, grad_weight, grad_bias, runs)
    return grad_weight, grad_bias


def _real(tiles: Tensor) -> torch.dtype:
    return torch.promote_types(tiles.dtype, torch.float32)


def _call(
    function: str, tiles: Tensor, visible: Tensor, slots: Tensor, grid: Grid, *arguments: Tensor | int | None
) -> None:
    batch, count, side, _, channels = tiles.shape
    sizes = (batch, count, side, channels, *grid)
    call("depthwise_cpu", tiles.dtype, function, sizes, visible.contiguous(), slots.contiguous(), *arguments)

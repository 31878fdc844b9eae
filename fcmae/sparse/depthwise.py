"""Packed depthwise convolution: the one operator of the encoder that looks at neighbouring tiles.

B images, V visible tiles, T tile side, C channels, K kernel side, L = grid rows x columns patches. Positions outside
the visible tiles count as zero and get no output (submanifold rule, paper section 3). Only the tiles are kept for the
backward pass, so memory stays proportional to what is visible.

Three `torch.library` operators (forward, input gradient, weight gradient), so that `torch.compile` sees one node each:

- on a CPU, `depthwise_cpu.py`: C++ that computes only the products that exist;
- on a GPU, `depthwise_triton.py`: the same idea in Triton;
- in plain PyTorch here, for whatever those do not take (no compiler, another kernel side, another device): tiles are
  laid out on a dense channels-last map, convolved by the backend and picked up again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fcmae.sparse import depthwise_cpu
from fcmae.sparse.tiles import TileIndex, gather_runs, scatter_runs, tile_runs


@torch.library.custom_op("fcmae::packed_depthwise", mutates_args=())
def _packed_depthwise(
    tiles: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, rows: int, columns: int
) -> Tensor:
    if depthwise_cpu.available(tiles, weight.shape[-1]):
        return depthwise_cpu.convolve(tiles, weight, bias, visible, slots, (rows, columns))
    return _convolve(tiles, weight, bias, visible, rows, columns)


@torch.library.custom_op("fcmae::packed_depthwise_input_gradient", mutates_args=())
def _input_gradient(grad: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, rows: int, columns: int) -> Tensor:
    # The transpose of a convolution of stride 1 is the convolution with the kernel turned round.
    turned = weight.flip(2, 3)
    if depthwise_cpu.available(grad, weight.shape[-1]):
        return depthwise_cpu.convolve(grad, turned, None, visible, slots, (rows, columns))
    return _convolve(grad, turned, None, visible, rows, columns)


@torch.library.custom_op("fcmae::packed_depthwise_weight_gradient", mutates_args=())
def _weight_gradient(
    tiles: Tensor, grad: Tensor, visible: Tensor, slots: Tensor, rows: int, columns: int, kernel: int
) -> tuple[Tensor, Tensor]:
    if depthwise_cpu.available(tiles, kernel):
        return depthwise_cpu.weight_gradient(tiles, grad, visible, slots, (rows, columns))
    wide = torch.promote_types(tiles.dtype, torch.float32)
    runs = tile_runs(visible, (rows, columns), tiles.shape[2])
    dense, grad_dense = (scatter_runs(x, runs, (rows, columns)).permute(0, 3, 1, 2) for x in (tiles, grad))
    weight = tiles.new_empty(tiles.shape[-1], 1, kernel, kernel)
    weight_grad = torch.ops.aten.convolution_backward(
        grad_dense,
        dense,
        weight,
        None,
        [1, 1],
        [kernel // 2] * 2,
        [1, 1],
        False,
        [0, 0],
        len(weight),
        [False, True, False],
    )[1]
    # Plain strides, which DDP's buckets expect.
    return weight_grad.to(wide).reshape(-1).view(weight.shape), grad.sum(dim=(0, 1, 2, 3), dtype=wide)


def _convolve(tiles: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, rows: int, columns: int) -> Tensor:
    runs = tile_runs(visible, (rows, columns), tiles.shape[2])
    dense = scatter_runs(tiles, runs, (rows, columns)).permute(0, 3, 1, 2)
    weight, bias = weight.to(tiles.dtype), None if bias is None else bias.to(tiles.dtype)
    out = F.conv2d(dense, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return gather_runs(out.permute(0, 2, 3, 1), runs, (rows, columns))


@_packed_depthwise.register_fake
def _(tiles, weight, bias, visible, slots, rows, columns):
    return torch.empty_like(tiles)


@_input_gradient.register_fake
def _(grad, weight, visible, slots, rows, columns):
    return torch.empty_like(grad)


@_weight_gradient.register_fake
def _(tiles, grad, visible, slots, rows, columns, kernel):
    wide, channels = torch.promote_types(tiles.dtype, torch.float32), tiles.shape[-1]
    return tiles.new_empty(channels, 1, kernel, kernel, dtype=wide), tiles.new_empty(channels, dtype=wide)


def _setup_context(ctx, inputs, output) -> None:
    tiles, weight, bias, visible, slots, *ctx.grid = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(tiles, weight, visible, slots)


def _backward(ctx, grad: Tensor):
    tiles, weight, visible, slots = ctx.saved_tensors
    grad = grad.contiguous()
    needs_tiles, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_tiles = grad_weight = grad_bias = None
    if needs_tiles:
        grad_tiles = _input_gradient(grad, weight, visible, slots, *ctx.grid)
    if needs_weight or needs_bias:
        grad_weight, grad_bias = _weight_gradient(tiles, grad, visible, slots, *ctx.grid, weight.shape[-1])
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(ctx.bias_dtype) if needs_bias else None
    return grad_tiles, grad_weight, grad_bias, None, None, None, None


_packed_depthwise.register_autograd(_backward, setup_context=_setup_context)


def packed_depthwise(tiles: Tensor, weight: Tensor, bias: Tensor | None, index: TileIndex) -> Tensor:
    """Depthwise convolution over visible tiles.

    Args:
        tiles: (B, V, T, T, C).
        weight: (C, 1, K, K), K odd; as in `torch.nn.Conv2d(C, C, K, padding=K // 2, groups=C)`.
        bias: (C,) or None.
        index: where the tiles sit.

    Returns:
        (B, V, T, T, C), equal to the dense convolution of the zero-filled map at the visible positions. Of the type of
        `tiles`, or under autocast of the autocast type; gradients of weight and bias are summed in at least float32.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    batch, count, side, width, channels = tiles.shape
    if tuple(index.visible.shape) != (batch, count) or side != width:
        raise ValueError(
            f"tiles have shape {tuple(tiles.shape)}; with {tuple(index.visible.shape)} visible patches they must be "
            "(B, V, T, T, C)"
        )
    kernel = weight.shape[-1]
    if tuple(weight.shape) != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be ({channels}, 1, K, K) with K odd, "
            "a depthwise convolution of stride 1"
        )
    if torch.is_autocast_enabled(tiles.device.type):
        # The operator runs outside autocast, so its input takes the autocast type here, differentiably.
        tiles = tiles.to(torch.get_autocast_dtype(tiles.device.type))
    return _packed_depthwise(tiles.contiguous(), weight, bias, index.visible, index.slots, *index.grid)

"""Packed depthwise convolution: the one operator of the encoder that looks at neighbouring tiles.

B images, V visible tiles, T tile side, C channels, K kernel side, L = grid rows x columns patches. Positions outside
the visible tiles count as zero and get no output (submanifold rule, paper section 3). Only the tiles are kept for the
backward pass, so memory stays proportional to what is visible.

Forward, input gradient and weight gradient are also `torch.library` operators: `torch.compile` sees one node each.
Three modules implement them, with the same functions:

- `depthwise_triton.py` on a GPU and `depthwise_cpu.py` on a CPU compute only the products that exist;
- `depthwise_dense.py`, in plain PyTorch, is the reference and takes whatever those do not.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fcmae.sparse import depthwise_cpu, depthwise_dense
from fcmae.sparse.autocast import outside_autocast
from fcmae.sparse.tiles import TileIndex


def implementation(tiles: Tensor, kernel: int) -> ModuleType:
    """The module that computes the convolution of (B, V, T, T, C) tiles with a kernel of side `kernel`."""
    if depthwise_cpu.supports(tiles, kernel):
        return depthwise_cpu
    if tiles.device.type == "cuda" and _has_triton():
        from fcmae.sparse import depthwise_triton

        if tiles.shape[2] in depthwise_triton.SIDES and kernel in depthwise_triton.KERNEL_SIDES:
            return depthwise_triton
    return depthwise_dense


@functools.cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: the packed layout convolves in plain PyTorch, which is slower", stacklevel=2
        )
        return False
    return True


def _forward(
    tiles: Tensor, weight: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, rows: int, columns: int
) -> Tensor:
    module = implementation(tiles, weight.shape[-1])
    return module.depthwise(tiles, weight, bias, visible, slots, (rows, columns))


def _input_gradient(grad: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, rows: int, columns: int) -> Tensor:
    module = implementation(grad, weight.shape[-1])
    return module.depthwise_input_gradient(grad, weight, visible, slots, (rows, columns))


def _weight_gradient(
    tiles: Tensor, grad: Tensor, visible: Tensor, slots: Tensor, rows: int, columns: int, kernel: int
) -> tuple[Tensor, Tensor]:
    module = implementation(tiles, kernel)
    return module.depthwise_weight_gradient(tiles, grad, visible, slots, (rows, columns), kernel)


forward_operator = torch.library.custom_op("fcmae::packed_depthwise", _forward, mutates_args=())
input_gradient_operator = torch.library.custom_op(
    "fcmae::packed_depthwise_input_gradient", _input_gradient, mutates_args=()
)
weight_gradient_operator = torch.library.custom_op(
    "fcmae::packed_depthwise_weight_gradient", _weight_gradient, mutates_args=()
)


@forward_operator.register_fake
def _(tiles, weight, bias, visible, slots, rows, columns):
    return torch.empty_like(tiles)


@input_gradient_operator.register_fake
def _(grad, weight, visible, slots, rows, columns):
    return torch.empty_like(grad)


@weight_gradient_operator.register_fake
def _(tiles, grad, visible, slots, rows, columns, kernel):
    wide, channels = torch.promote_types(tiles.dtype, torch.float32), tiles.shape[-1]
    return tiles.new_empty(channels, 1, kernel, kernel, dtype=wide), tiles.new_empty(channels, dtype=wide)


def _setup_context(ctx, inputs, output) -> None:
    tiles, weight, bias, visible, slots, *ctx.grid = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(tiles, weight, visible, slots)


def _gradients(ctx, grad: Tensor, input_gradient: Callable, weight_gradient: Callable):
    tiles, weight, visible, slots = ctx.saved_tensors
    grad = grad.contiguous()
    needs_tiles, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_tiles = grad_weight = grad_bias = None
    with outside_autocast(grad.device.type):
        if needs_tiles:
            grad_tiles = input_gradient(grad, weight, visible, slots, *ctx.grid)
        if needs_weight or needs_bias:
            of_weight, of_bias = weight_gradient(tiles, grad, visible, slots, *ctx.grid, weight.shape[-1])
            grad_weight = of_weight.to(weight.dtype) if needs_weight else None
            grad_bias = of_bias.to(ctx.bias_dtype) if needs_bias else None
    return grad_tiles, grad_weight, grad_bias, None, None, None, None


forward_operator.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, input_gradient_operator, weight_gradient_operator),
    setup_context=_setup_context,
)


class _Eager(torch.autograd.Function):
    """The same without the dispatch of the operators, which takes longer than a small layer."""

    @staticmethod
    def forward(ctx, *inputs):
        _setup_context(ctx, inputs, None)
        return _forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _gradients(ctx, grad, _input_gradient, _weight_gradient)


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
    compute = forward_operator if torch.compiler.is_compiling() else _Eager.apply
    return compute(tiles.contiguous(), weight, bias, index.visible, index.slots, *index.grid)

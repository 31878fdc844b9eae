"""What lies between the matrix products of a block, on a CPU: calls norm_cpu.cpp and activation_cpu.cpp.

The functions are those of `pointwise_dense.py`; tensors are contiguous and of one type, float32 or float64. Each is a
pass or two over memory, and gives the same bits on any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.native import REALS, call, library, plain

# Parts in which the sum over rows is taken, and rows of one part: fixed, so that it does not depend on the threads.
_SUMS, _ROWS_PER_SUM = 32, 64


def supports(x: Tensor) -> bool:
    """Whether the functions below can take tensors like `x`; the first call builds the libraries."""
    return (
        x.dtype in REALS
        and plain(x)
        and all(library(name, x.dtype) is not None for name in ("norm_cpu", "activation_cpu"))
    )


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(2, *x.shape[:-1], 1)
    mean, rstd = statistics.unbind()
    y = x.new_empty(_patch_shape(x.shape, stride))
    call("norm_cpu", x.dtype, "fcmae_norm", *_rows(x, stride), x, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def normalise_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    stride: int = 1,
    again: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    grad_x, y = torch.empty_like(x), torch.empty_like(grad) if again else None
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    rows, channels, side, stride = _rows(x, stride)
    runs = max(1, min(_SUMS, rows // _ROWS_PER_SUM))
    call(
        "norm_cpu", x.dtype, "fcmae_norm_gradient", rows, channels, side, stride, runs,
        grad, x, weight, bias, mean, rstd, grad_x, y, grad_weight, grad_bias,
    )  # fmt: skip
    return grad_x, y, grad_weight, grad_bias


def activate(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    batch, _, hidden = h.shape
    sums, scale = h.new_empty(batch, hidden), h.new_empty(batch, hidden)
    call("activation_cpu", h.dtype, "fcmae_activate", *h.shape, h, bias, gamma, beta, eps, out, sums, scale)
    return sums, scale


def reactivate(h: Tensor, bias: Tensor, scale: Tensor, beta: Tensor, out: Tensor, product: Tensor | None) -> None:
    call("activation_cpu", h.dtype, "fcmae_reactivate", *h.shape, h, bias, scale, beta, out, product)


def unfold(grad: Tensor, weight: Tensor, scale: Tensor, grad_weight: Tensor) -> Tensor:
    grad_scale = torch.empty_like(scale)
    call("activation_cpu", grad.dtype, "fcmae_unfold", *grad.shape, grad, weight, scale, grad_weight, grad_scale)
    return grad_scale


def activation_gradient(
    h: Tensor,
    bias: Tensor,
    a: Tensor,
    scale: Tensor | None,
    sums: Tensor,
    gamma: Tensor,
    eps: float,
    grad: Tensor,
    grad_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if grad_scale is None:
        grad_scale = torch.empty_like(sums)
    results = h.new_empty(3, *sums.shape)
    grad_gamma, grad_bias, workspace = results.unbind()
    call(
        "activation_cpu", h.dtype, "fcmae_activation_gradient", *h.shape, h, bias, a, scale, sums, gamma, eps,
        grad, grad_scale, grad_gamma, grad_bias, workspace,
    )  # fmt: skip
    of_gamma, of_bias = results[:2].sum(dim=1).unbind()
    return of_gamma, of_bias


def _rows(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    """(rows, channels, side of the tiles, stride)."""
    return x.numel() // x.shape[-1], x.shape[-1], x.shape[-2] if stride > 1 else 1, stride


def _patch_shape(shape: torch.Size, stride: int) -> tuple[int, ...]:
    if stride == 1:
        return tuple(shape)
    *leading, height, width, channels = shape
    return (*leading, height // stride, width // stride, stride * stride * channels)

"""GELU and response normalisation on a CPU, a pass or two over the hidden channels each: calls activation_cpu.cpp.

The functions are those of `activation_dense.py`; tensors are contiguous and of one type, float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.sparse.native import REALS, call, library


def supports(x: Tensor) -> bool:
    """Whether the functions below can take tensors like `x`; the first call builds the library."""
    return x.device.type == "cpu" and x.dtype in REALS and library("activation_cpu", x.dtype) is not None


def activate(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, out: Tensor, product: Tensor | None
) -> tuple[Tensor, Tensor]:
    sums, scale = (h.new_empty(h.shape[0], h.shape[2]) for _ in range(2))
    _call("fcmae_activate", h, *h.shape, h, bias, gamma, beta, eps, out, product, sums, scale)
    return sums, scale


def unfold(grad: Tensor, weight: Tensor, scale: Tensor, grad_weight: Tensor) -> Tensor:
    grad_scale = torch.empty_like(scale)
    _call("fcmae_unfold", grad, *grad.shape, grad, weight, scale, grad_weight, grad_scale)
    return grad_scale


def activation_gradient(
    slope: Tensor,
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
    results = torch.empty(3, *sums.shape, dtype=a.dtype)  # of gamma and bias per image, and workspace
    _call(
        "fcmae_activation_gradient", a, *a.shape, slope, a, scale, sums, gamma, eps, grad, grad_scale, *results.unbind()
    )  # fmt: skip
    grad_gamma, grad_bias = results[:2].sum(dim=1)
    return grad_gamma, grad_bias


def _call(function: str, like: Tensor, *arguments: Tensor | float | None) -> None:
    call("activation_cpu", like.dtype, function, *arguments)

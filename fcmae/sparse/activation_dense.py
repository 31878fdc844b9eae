"""GELU and response normalisation between the two products of a block, in plain PyTorch: any device, any type.

B images, N positions per image, C channels, K hidden channels. `a` (B, N, K) is GELU's result and `slope` its
derivative there, `sums` (B, K) the squares of `a` summed over positions, `scale` (B, K) GRN's factor; statistics are
float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.sparse.response import response_scale, response_scale_backward, statistics_dtype


def activate(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, out: Tensor, product: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`out` = GELU(h + bias), its slope in place of `h`, `product` = `out` times the factor plus beta, if it is wanted.

    bias, gamma, beta: (K,). Returns (sums, scale).
    """
    h += bias
    torch.ops.aten.gelu.out(h, out=out)
    torch.ops.aten.gelu_backward.grad_input(torch.ones_like(h), h, grad_input=h)
    sums = out.to(statistics_dtype(h.dtype)).square().sum(dim=1)
    scale = response_scale(sums, gamma, eps)
    if product is not None:
        torch.addcmul(beta.to(h.dtype), out, scale.to(h.dtype).unsqueeze(1), out=product)
    return sums, scale


def unfold(grad: Tensor, weight: Tensor, scale: Tensor, grad_weight: Tensor) -> Tensor:
    """From the gradients (B, C, K) of each image's own weight, `weight` (C, K) times the factor.

    Adds to `grad_weight` (C, K), leaves the images' weights in place of `grad`, returns the gradient of the factor.
    """
    grad_scale = (grad * weight).sum(dim=1, dtype=scale.dtype)
    factor = scale.to(grad.dtype).unsqueeze(1)
    grad_weight += (grad * factor).sum(dim=0, dtype=scale.dtype)
    torch.mul(weight, factor, out=grad)
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
    """GELU's input gradient, in place of `grad`; returns those of gamma and of fc1's bias, (K,).

    Args:
        grad: that of a times `scale`; or, where the factor was folded into the weights and `scale` is None, that of a,
            `grad_scale` (B, K) being the factor's.
    """
    wide = sums.dtype
    if scale is not None:
        grad_scale = (grad * a).sum(dim=1, dtype=wide)
        grad.mul_(scale.to(a.dtype).unsqueeze(1))
    assert grad_scale is not None
    own, grad_gamma = response_scale_backward(grad_scale, sums, gamma, eps)
    grad.addcmul_(a, own.to(a.dtype).unsqueeze(1)).mul_(slope)
    return grad_gamma.sum(dim=0), grad.sum(dim=(0, 1), dtype=wide)

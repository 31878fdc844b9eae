"""What lies between the matrix products of a block, in plain PyTorch: any device, any type.

B images, N positions per image, C channels, K hidden channels. `h` (B, N, K) is fc1's result without its bias (K,),
`sums` (B, K) the squares of GELU's result summed over positions, `scale` (B, K) GRN's factor; statistics are float32 or
wider. Large results go to buffers that the caller gives, so that they can be used again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fcmae.sparse.response import response_scale, response_scale_backward, statistics_dtype
from fcmae.sparse.tiles import from_patches, to_patches


def normalise(x: Tensor, weight: Tensor, bias: Tensor, eps: float, stride: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the channels of (..., C); returns also each row's mean and reciprocal standard deviation (..., 1).

    With a stride, `x` is tiles (..., S, S, C) and the result in patch order, see `to_patches`.
    """
    y, mean, rstd = torch.native_layer_norm(x, [x.shape[-1]], weight, bias, eps)
    return to_patches(y, stride), mean, rstd


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
    """Gradients of `x`, weight and bias; second comes, with `again`, the result of `normalise`, computed once more."""
    y = to_patches((x - mean) * rstd * weight + bias, stride) if again else None
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        from_patches(grad, stride), x, [x.shape[-1]], mean, rstd, weight, bias, [True, True, True]
    )
    return grad_x, y, grad_weight, grad_bias


def activate(
    h: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, out: Tensor
) -> tuple[Tensor, Tensor]:
    """`out` = GELU(h + bias), with `beta` (K,) times the factor plus beta; returns (sums, scale)."""
    torch.ops.aten.gelu.out(h + bias, out=out)
    sums = out.to(statistics_dtype(h.dtype)).square().sum(dim=1)
    scale = response_scale(sums, gamma, eps)
    if beta is not None:
        torch.addcmul(beta.to(h.dtype), out, scale.to(h.dtype).unsqueeze(1), out=out)
    return sums, scale


def reactivate(h: Tensor, bias: Tensor, scale: Tensor, beta: Tensor, out: Tensor, product: Tensor | None) -> None:
    """`out` = GELU(h + bias) and `product` = `out` times the factor plus beta."""
    torch.ops.aten.gelu.out(h + bias, out=out)
    if product is not None:
        torch.addcmul(beta.to(h.dtype), out, scale.to(h.dtype).unsqueeze(1), out=product)


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
    """The gradient of `h`, in place of `grad`; returns those of gamma and of fc1's bias, (K,).

    Args:
        a: GELU(h + bias).
        grad: that of a times `scale`; or, where the factor was folded into the weights and `scale` is None, that of a,
            `grad_scale` (B, K) being the factor's.
    """
    wide = sums.dtype
    if scale is not None:
        grad_scale = (grad * a).sum(dim=1, dtype=wide)
        grad.mul_(scale.to(a.dtype).unsqueeze(1))
    assert grad_scale is not None
    own, grad_gamma = response_scale_backward(grad_scale, sums, gamma, eps)
    grad.addcmul_(a, own.to(a.dtype).unsqueeze(1))
    torch.ops.aten.gelu_backward.grad_input(grad, h + bias, grad_input=grad)
    return grad_gamma.sum(dim=0), grad.sum(dim=(0, 1), dtype=wide)

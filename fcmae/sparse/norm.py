"""LayerNorm over channels-last features, alone and in the order in which a strided convolution reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fcmae.sparse import pointwise_cpu
from fcmae.sparse.tiles import to_patches


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of channels-last features, whichever axis order the module was built for.

    Under autocast it runs and answers in float32, on every device, as CUDA's autocast does by itself; the residual
    stream, which begins behind the stem's norm, is float32 with it.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class _PatchNorm(torch.autograd.Function):
    """On a CPU norm and order take one pass there and one back."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, stride):
        y, mean, rstd = pointwise_cpu.normalise(x, weight, bias, eps, stride)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.stride = stride
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad_x, _, grad_weight, grad_bias = pointwise_cpu.normalise_gradient(
            grad.contiguous(), x, weight, bias, mean, rstd, ctx.stride, again=False
        )
        return grad_x, grad_weight, grad_bias, None, None


def patch_norm(x: Tensor, norm: nn.LayerNorm, stride: int = 1) -> Tensor:
    """`to_patches(layer_norm(x, norm), stride)`: (..., S, S, C) -> (..., S/k, S/k, k·k·C) with k the stride."""
    if torch.compiler.is_compiling() or not pointwise_cpu.supports(x) or torch.is_autocast_enabled("cpu"):
        return to_patches(layer_norm(x, norm), stride)
    weight, bias = (parameter.to(x.dtype).contiguous() for parameter in (norm.weight, norm.bias))
    return _PatchNorm.apply(x.contiguous(), weight, bias, norm.eps, stride)

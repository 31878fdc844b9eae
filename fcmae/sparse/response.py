"""The arithmetic of global response normalisation (GRN, paper section 4): per image, in float32 or wider.

B images, K channels. A layout sums the squares of each channel over an image's visible positions; the rest is here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type statistics and sums are taken in: float32, or the given one where it is wider."""
    return torch.promote_types(dtype, torch.float32)


def response_norms(sum_of_squares: Tensor) -> Tensor:
    """Square roots whose derivative at 0 is 0.

    GELU underflows to exact zeros, so a channel can vanish in an image; the plain square root would then send infinity
    times zero into the backward pass.
    """
    alive = sum_of_squares > 0
    return torch.where(alive, sum_of_squares, 1.0).sqrt() * alive


def response_scale(sum_of_squares: Tensor, weight: Tensor, eps: float) -> Tensor:
    """GRN's factor per image and channel, 1 + gamma * norm / (mean of norms + eps); (B, K) in, (B, K) out."""
    norm = response_norms(sum_of_squares)
    return 1.0 + weight.to(norm.dtype) * (norm / (norm.mean(dim=-1, keepdim=True) + eps))


def response_scale_backward(grad: Tensor, sum_of_squares: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Backward of `response_scale`, all (B, K).

    Returns:
        The factor by which each activation enters its own gradient (the norm's gradient over the norm, 0 where the norm
        is 0), and the gradient of gamma per image.
    """
    norm = response_norms(sum_of_squares)
    mean = norm.mean(dim=-1, keepdim=True) + eps
    grad_ratio = grad * weight.to(norm.dtype)
    grad_norm = grad_ratio / mean - (grad_ratio * norm).mean(dim=-1, keepdim=True) / mean.square()
    alive = norm > 0
    return grad_norm / torch.where(alive, norm, 1.0) * alive, grad * norm / mean

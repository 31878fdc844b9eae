"""The pointwise half of a ConvNeXt V2 block as one autograd function: LayerNorm, fc1, GELU, GRN, fc2 and the residual.

B images, N positions per image, C channels, K = 4C hidden channels. Written out as separate layers, the step spends
half its time in element-wise passes over (B, N, K) and keeps four such tensors for the backward pass. Here one is kept,
the input of GELU; everything else of that size lives in buffers of a few images that stay in the cache, and what lies
between the products is a pass or two (`pointwise_cpu.py`; `pointwise_dense.py` where that cannot be had).

GRN multiplies each hidden channel of an image by a factor s (B, K) and adds beta. Behind it comes a linear layer, so

    fc2(a * s + beta) = a @ (W2 * s)^T + (b2 + W2 @ beta)

and the factor can be folded into one small weight per image instead of being applied to every position. The gradient of
s then falls out of the gradient of that weight. Where an image has few positions, scaling them is the cheaper way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fcmae.sparse import pointwise_cpu, pointwise_dense
from fcmae.sparse.autocast import outside_autocast
from fcmae.sparse.response import statistics_dtype

# Hidden activations worked on at a time on a CPU; few enough to stay in cache.
# Other devices take the batch at once.
CHUNK_BYTES = 6 << 20


def _chunks(h: Tensor) -> Iterator[slice | None]:
    """Equal runs of images whose hidden activations `h` fit the cache; None stands for all images."""
    batch, count = len(h), math.ceil(h.nbytes / CHUNK_BYTES)
    if h.device.type != "cpu" or min(count, batch) <= 1:
        return iter((None,))
    size = math.ceil(batch / min(count, batch))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


# On small tensors the calls below, each a microsecond in torch even where there is nothing to do, would add up to more
# than the arithmetic; a block makes fifty of them.
def _take(x: Tensor, images: slice | None) -> Tensor:
    return x if images is None else x[images]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Sums:
    """Sums over chunks, in a type of their own; the first addend is taken as it is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.totals: dict[str, Tensor] = {}

    def add(self, **addends: Tensor) -> None:
        for name, addend in addends.items():
            if name in self.totals:
                self.totals[name] += addend
            else:
                self.totals[name] = _as(addend, self.dtype)

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        if name in self.totals and a.dtype == self.dtype:
            self.totals[name].addmm_(a, b)
        else:
            self.add(**{name: torch.mm(a, b)})


class _ResponseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shortcut, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2, norm_eps, eps, dtype):
        batch, channels, hidden = len(x), x.shape[-1], w1.shape[0]
        x = _contiguous(x, x.dtype).view(batch, -1, channels)
        positions = x.shape[1]
        wide = statistics_dtype(dtype)
        fold = positions >= 2 * channels
        weight1, bias1, weight2 = _as(w1, dtype), _contiguous(b1, dtype), _as(w2, dtype)
        gamma_wide, beta_wide, bias2 = _contiguous(gamma, wide), _contiguous(beta, wide), _as(b2, wide)
        norm = _contiguous(norm_weight, wide), _contiguous(norm_bias, wide)
        if fold:
            bias2 = torch.addmv(bias2, _as(w2, wide), beta_wide)
        result_shape, shortcut = shortcut.shape, shortcut.reshape(x.shape)
        out = torch.empty(x.shape, dtype=shortcut.dtype, device=x.device)
        h = torch.empty(batch, positions, hidden, dtype=dtype, device=x.device)
        module = pointwise_cpu if pointwise_cpu.supports(h) else pointwise_dense
        buffer: Tensor | None = None
        statistics: list[tuple[Tensor, ...]] = []
        for images in _chunks(h):
            y, *of_norm = module.normalise(_as(_take(x, images), wide), *norm, norm_eps)
            part, result = _take(h, images), _take(out, images)
            torch.mm(_as(y, dtype).view(-1, channels), weight1.t(), out=part.view(-1, hidden))
            buffer = torch.empty_like(part) if buffer is None else buffer[: len(part)]
            sums, scale = module.activate(part, bias1, gamma_wide, None if fold else beta_wide, eps, buffer)
            statistics.append((sums, scale, *of_norm))
            torch.add(_take(shortcut, images), bias2, out=result)
            if fold:
                weights = (weight2 * _as(scale, dtype).unsqueeze(1)).transpose(1, 2)
                result.baddbmm_(buffer, weights) if result.dtype == dtype else result.add_(torch.bmm(buffer, weights))
            else:
                left, right, result = buffer.view(-1, hidden), weight2.t(), result.view(-1, channels)
                result.addmm_(left, right) if result.dtype == dtype else result.add_(left @ right)
        saved = (_joined(list(parts)) for parts in zip(*statistics, strict=True))
        ctx.save_for_backward(x, h, *saved, norm_weight, norm_bias, w1, b1, gamma, beta, w2)
        ctx.settings = eps, fold, module, b2.dtype
        return out.view(result_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with outside_autocast(grad.device.type):
            return _ResponseMLP.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        x, h, sums, scales, means, rstds, *parameters = ctx.saved_tensors
        norm_weight, norm_bias, w1, b1, gamma, beta, w2 = parameters
        eps, fold, module, *of_b2 = ctx.settings
        channels, hidden, dtype, wide = x.shape[-1], h.shape[-1], h.dtype, sums.dtype
        grad_out, grad = grad, grad.reshape(x.shape)
        weight1, bias1, weight2 = _as(w1, dtype), _contiguous(b1, dtype), _contiguous(w2, dtype)
        gamma_wide, beta_wide = _contiguous(gamma, wide), _contiguous(beta, wide)
        norm = _contiguous(norm_weight, wide), _contiguous(norm_bias, wide)
        total = _Sums(wide)
        if fold:
            total.add(w2=torch.zeros(w2.shape, dtype=wide, device=x.device))
        grads_x: list[Tensor] = []
        buffers: list[Tensor] = []
        for images in _chunks(h):
            part, scale = _take(h, images), _take(scales, images)
            buffers = [b[: len(part)] for b in buffers] or [torch.empty_like(part) for _ in range(2 if fold else 3)]
            a, grad_h, *product = buffers
            grad_part = _contiguous(_take(grad, images), dtype)
            # Through fc2 and GRN's factor.
            module.reactivate(part, bias1, scale, beta_wide, a, None if fold else product[0])
            if fold:
                weights = torch.bmm(grad_part.transpose(1, 2), a)  # its gradients first, then each image's weight
                grad_scale = module.unfold(weights, weight2, scale, total.totals["w2"])
                torch.bmm(grad_part, weights, out=grad_h)
            else:
                grad_scale, flat = None, grad_part.view(-1, channels)
                total.add_product("w2", flat.t(), product[0].view(-1, hidden))
                torch.mm(flat, weight2, out=grad_h.view(-1, hidden))
            factor = None if fold else scale
            grad_gamma, grad_b1 = module.activation_gradient(
                part, bias1, a, factor, _take(sums, images), gamma_wide, eps, grad_h, grad_scale
            )
            # Through fc1 and the norm.
            x_part, grad_h = _as(_take(x, images), wide), grad_h.view(-1, hidden)
            grad_y = _as(torch.mm(grad_h, weight1), wide).view_as(x_part)
            grad_x, y, grad_norm_weight, grad_norm_bias = module.normalise_gradient(
                grad_y, x_part, *norm, _take(means, images), _take(rstds, images)
            )
            if fold:  # a long sum for a small result: summing per image first is faster
                of_images = torch.bmm(_as(y, dtype).transpose(1, 2), grad_h.view(part.shape))
                total.add(w1=of_images.sum(dim=0, dtype=wide).t())
            else:
                total.add_product("w1", grad_h.t(), _as(y, dtype).view(-1, channels))
            total.add(gamma=grad_gamma, b1=grad_b1, norm_weight=grad_norm_weight, norm_bias=grad_norm_bias)
            grads_x.append(_as(grad_x, x.dtype))
        grad_b2 = grad.sum(dim=(0, 1), dtype=wide)
        if fold:
            total.totals["w2"].addr_(grad_b2, beta_wide)
        total.add(beta=torch.mv(_as(w2, wide).t(), grad_b2))
        names = ("norm_weight", "norm_bias", "w1", "b1", "gamma", "beta", "w2")
        grads = (
            _contiguous(total.totals[name], parameter.dtype) for name, parameter in zip(names, parameters, strict=True)
        )
        return _joined(grads_x).view(grad_out.shape), grad_out, *grads, _as(grad_b2, *of_b2), None, None, None


def response_mlp(
    x: Tensor,
    shortcut: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    norm_eps: float,
    eps: float,
) -> Tensor:
    """shortcut + fc2(GRN(GELU(fc1(LayerNorm(x))))), GRN over the positions of each image (paper sections 3 and 4).

    Args:
        x, shortcut: (B, ..., C); every position between the first and the last axis belongs to the image.
        w1, w2: (4C, C) and (C, 4C).
        gamma, beta: (4C,), GRN's parameters.

    Under autocast the products are of the autocast type and the norm and all statistics float32. The result has the
    type of `shortcut`. Gradients exist for every tensor, once (no double backward).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    parameters = (norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2)
    with outside_autocast(device):
        return _ResponseMLP.apply(x, shortcut, *parameters, norm_eps, eps, dtype)

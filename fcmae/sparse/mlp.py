"""The pointwise half of a ConvNeXt V2 block as one autograd function: LayerNorm, fc1, GELU, GRN, fc2 and the residual.

B images, N positions per image, C channels, K = 4C hidden channels. Written out as separate layers, the step spends
half its time in element-wise passes over (B, N, K) and keeps four such tensors for the backward pass. Here two are
kept, GELU's result and its slope, so that nothing is computed twice; everything else of that size lives in buffers of a
few images that stay in the cache, and what lies between the products is a pass or two (`activation_cpu.py`;
`activation_dense.py` where that cannot be had).

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

from fcmae.sparse import activation_cpu, activation_dense
from fcmae.sparse.response import statistics_dtype

# Hidden activations worked on at a time on a CPU; few enough to stay in cache.
# Other devices take the batch at once.
CHUNK_BYTES = 6 << 20


def _chunks(batch: int, bytes_per_image: int, device: torch.device) -> Iterator[slice]:
    """Equal runs of images whose hidden activations fit the cache."""
    count = math.ceil(batch * bytes_per_image / CHUNK_BYTES) if device.type == "cpu" else 1
    size = math.ceil(batch / max(1, min(count, batch)))
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


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
                self.totals[name] = addend.to(self.dtype)

    def add_product(self, name: str, a: Tensor, b: Tensor) -> None:
        if name in self.totals and a.dtype == self.dtype:
            self.totals[name].addmm_(a, b)
        else:
            self.add(**{name: torch.mm(a, b)})


class _ResponseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shortcut, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2, norm_eps, eps, dtype):
        batch, positions, channels = x.shape
        hidden = w1.shape[0]
        wide = statistics_dtype(dtype)
        fold = positions >= 2 * channels
        weight1, weight2 = w1.to(dtype), w2.to(dtype)
        bias1, gamma_wide, beta_wide = (
            b1.to(dtype).contiguous(),
            gamma.to(wide).contiguous(),
            beta.to(wide).contiguous(),
        )
        bias2 = torch.addmv(b2.to(wide), w2.to(wide), beta_wide) if fold else b2.to(wide)
        norm_args = [channels], norm_weight.to(wide), norm_bias.to(wide), norm_eps
        out = torch.empty(shortcut.shape, dtype=shortcut.dtype, device=x.device)
        a, slope = (torch.empty(batch, positions, hidden, dtype=dtype, device=x.device) for _ in range(2))
        module = activation_cpu if activation_cpu.supports(a) else activation_dense
        buffer: Tensor | None = None
        statistics: list[tuple[Tensor, ...]] = []
        for images in _chunks(batch, a[0].nbytes, x.device):
            y, *of_norm = torch.native_layer_norm(x[images].to(wide), *norm_args)
            part, h, result = a[images], slope[images], out[images]
            torch.mm(y.to(dtype).view(-1, channels), weight1.t(), out=h.view(-1, hidden))
            if not fold:
                buffer = torch.empty_like(part) if buffer is None else buffer[: len(part)]
            sums, scale = module.activate(h, bias1, gamma_wide, beta_wide, eps, part, buffer)  # h becomes the slope
            statistics.append((sums, scale, *of_norm))
            torch.add(shortcut[images], bias2, out=result)
            if buffer is None:
                weights = (weight2 * scale.to(dtype).unsqueeze(1)).transpose(1, 2)
                result.baddbmm_(part, weights) if result.dtype == dtype else result.add_(torch.bmm(part, weights))
            else:
                left, right, result = buffer.view(-1, hidden), weight2.t(), result.view(-1, channels)
                result.addmm_(left, right) if result.dtype == dtype else result.add_(left @ right)
        saved = (_joined(list(parts)) for parts in zip(*statistics, strict=True))
        ctx.save_for_backward(x, a, slope, *saved, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2)
        ctx.settings = norm_eps, eps, fold, module
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):  # backward may be called under it
            return _ResponseMLP.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        x, a, slope, sums, scales, means, deviations, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2 = (
            ctx.saved_tensors
        )
        norm_eps, eps, fold, module = ctx.settings
        channels = x.shape[-1]
        dtype, wide, hidden = a.dtype, sums.dtype, a.shape[-1]
        weight1, weight2 = w1.to(dtype), w2.to(dtype).contiguous()
        norm_args = norm_weight.to(wide), norm_bias.to(wide)
        gamma_wide, beta_wide = gamma.to(wide).contiguous(), beta.to(wide).contiguous()
        total = _Sums(wide)
        if fold:
            total.add(w2=torch.zeros(w2.shape, dtype=wide, device=x.device))
        grads_x: list[Tensor] = []
        buffers: list[Tensor] = []
        for images in _chunks(len(x), a[0].nbytes, x.device):
            part, scale = a[images], scales[images]
            if not buffers:
                buffers = [torch.empty_like(part) for _ in range(1 if fold else 2)]
            grad_h, *product = (buffer[: len(part)] for buffer in buffers)
            grad_part = grad[images].to(dtype).contiguous()
            # Through fc2 and GRN's factor.
            if fold:
                weights = torch.bmm(grad_part.transpose(1, 2), part)  # its gradients first, then each image's weight
                grad_scale = module.unfold(weights, weight2, scale, total.totals["w2"])
                torch.bmm(grad_part, weights, out=grad_h)
            else:
                grad_scale, flat = None, grad_part.view(-1, channels)
                torch.addcmul(beta_wide.to(dtype), part, scale.to(dtype).unsqueeze(1), out=product[0])
                total.add_product("w2", flat.t(), product[0].view(-1, hidden))
                torch.mm(flat, weight2, out=grad_h.view(-1, hidden))
            grad_gamma, grad_b1 = module.activation_gradient(
                slope[images], part, None if fold else scale, sums[images], gamma_wide, eps, grad_h, grad_scale
            )  # fmt: skip
            # Through fc1 and the norm.
            x_part, grad_h = x[images].to(wide), grad_h.view(-1, hidden)
            y = torch.native_layer_norm(x_part, [channels], *norm_args, norm_eps)[0]
            total.add_product("w1", grad_h.t(), y.to(dtype).view(-1, channels))
            grad_y = torch.mm(grad_h, weight1).view_as(x_part).to(wide)
            grad_x, grad_norm_weight, grad_norm_bias = torch.ops.aten.native_layer_norm_backward(
                grad_y, x_part, [channels], means[images], deviations[images], *norm_args, [True, True, True]
            )
            grads_x.append(grad_x.to(x.dtype))
            total.add(gamma=grad_gamma, b1=grad_b1, norm_weight=grad_norm_weight, norm_bias=grad_norm_bias)
        grad_b2 = grad.sum(dim=(0, 1), dtype=wide)
        if fold:
            total.totals["w2"].addr_(grad_b2, beta_wide)
        total.add(b2=grad_b2, beta=torch.mv(w2.to(wide).t(), grad_b2))
        parameters = {"norm_weight": norm_weight, "norm_bias": norm_bias, "w1": w1, "b1": b1}
        parameters |= {"gamma": gamma, "beta": beta, "w2": w2, "b2": b2}
        grads = (total.totals[name].to(parameter.dtype) for name, parameter in parameters.items())
        return _joined(grads_x), grad, *grads, None, None, None


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
    flat = (x.flatten(1, -2), shortcut.flatten(1, -2))
    parameters = (norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2)
    if not torch.is_autocast_enabled(device):
        return _ResponseMLP.apply(*flat, *parameters, norm_eps, eps, dtype).view_as(shortcut)
    with torch.autocast(device, enabled=False):
        return _ResponseMLP.apply(*flat, *parameters, norm_eps, eps, dtype).view_as(shortcut)

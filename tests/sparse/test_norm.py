"""LayerNorm in the order of a strided convolution, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fcmae.sparse import norm, pointwise_cpu, pointwise_dense
from fcmae.sparse.norm import patch_norm
from fcmae.sparse.tiles import from_patches, to_patches


def inputs(tiles, side, channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tiles * 1000 + side * 100 + channels)
    layer = nn.LayerNorm(channels, eps=1e-6, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(channels, generator=generator, dtype=torch.float64))
    x = torch.randn(2, tiles, side, side, channels, generator=generator, dtype=torch.float64) * 3 + 1
    return x.to(dtype).requires_grad_(), layer.to(dtype)


@given(
    tiles=st.integers(1, 7),
    cells=st.integers(1, 3),
    stride=st.sampled_from([1, 2, 3]),
    channels=st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_equals_norm_then_order(tiles, cells, stride, channels):
    x, layer = inputs(tiles, cells * stride, channels)
    normal = F.layer_norm(x, (channels,), layer.weight, layer.bias, layer.eps)
    # The convolution's own reading: each output of an identity convolution is one number of the patch.
    taps = torch.eye(stride * stride * channels, dtype=x.dtype).view(-1, stride, stride, channels).permute(0, 3, 1, 2)
    maps = F.conv2d(normal.flatten(0, 1).permute(0, 3, 1, 2), taps, stride=stride).permute(0, 2, 3, 1)
    expected = maps.view(2, tiles, cells, cells, -1)
    actual = patch_norm(x, layer, stride)
    torch.testing.assert_close(actual, expected)
    seed = torch.randn(expected.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(expected, (x, *layer.parameters()), seed)
    for got, want in zip(torch.autograd.grad(actual, (x, *layer.parameters()), seed), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_patches_and_back():
    x = torch.randn(3, 6, 6, 5)
    for stride in (1, 2, 3, 6):
        patches = to_patches(x, stride)
        assert patches.shape == (3, 6 // stride, 6 // stride, stride * stride * 5)
        assert torch.equal(from_patches(patches, stride), x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_modules_do_the_same(stride, dtype):
    x, layer = inputs(3, 4, 37, dtype)
    x, weight, bias = x.detach(), layer.weight.detach(), layer.bias.detach()
    assert pointwise_cpu.supports(x)
    results = []
    for module in (pointwise_cpu, pointwise_dense):
        y, mean, rstd = module.normalise(x, weight, bias, 1e-6, stride)
        results.append((y, mean, rstd, *module.normalise_gradient(y.cos(), x, weight, bias, mean, rstd, stride)))
        torch.testing.assert_close(results[-1][4], y)  # computed once more
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_same_bits_on_any_number_of_threads():
    x, layer = inputs(70, 2, 40, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = patch_norm(x, layer, 2)
            results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), torch.cos(y.detach()))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_constant_rows_and_nan():
    x, layer = inputs(1, 2, 20, torch.float32)
    with torch.no_grad():
        x[0, 0, 0, 0] = 3.0
        x[0, 0, 0, 1, 5] = torch.nan
    y = patch_norm(x, layer)
    torch.testing.assert_close(y[0, 0, 0, 0], layer.bias)
    assert y[0, 0, 0, 1].isnan().all()
    assert y[0, 0, 1].isfinite().all()


@pytest.mark.parametrize("scale", [1e20, 1e30, float("inf")])
def test_rows_that_overflow_are_nan(scale):
    x, layer = inputs(1, 2, 20, torch.float32)
    assert patch_norm(x.detach() * scale, layer).isnan().all()


def test_under_autocast_it_answers_in_float32():
    x, layer = inputs(2, 2, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = patch_norm(x.bfloat16(), layer, 2)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, patch_norm(x.bfloat16().float(), layer, 2))


def test_without_a_compiler(monkeypatch):
    x, layer = inputs(2, 4, 12)
    expected = patch_norm(x, layer, 2)
    monkeypatch.setattr(norm.pointwise_cpu, "supports", lambda x: False)
    torch.testing.assert_close(patch_norm(x, layer, 2), expected)

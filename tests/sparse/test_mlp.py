"""The fused pointwise half of a block against the same layers written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import drop_half_of_the_images, relative, small_model

from fcmae.sparse import mlp, pointwise_cpu
from fcmae.sparse.mlp import response_mlp
from fcmae.sparse.response import response_norms, response_scale, response_scale_backward


def inputs(batch, positions, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = 4 * channels
    shapes = [(batch, positions, channels)] * 2 + [(channels,)] * 2
    shapes += [(hidden, channels), (hidden,), (hidden,), (hidden,), (channels, hidden), (channels,)]
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7).to(dtype).requires_grad_()
        for shape in shapes
    ]


def reference(x, shortcut, norm_weight, norm_bias, w1, b1, gamma, beta, w2, b2):
    """As in the paper's own code: GRN with the norm over the positions of an image."""
    y = F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), w1, b1))
    norm = y.norm(dim=1, keepdim=True)
    y = gamma * (y * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + beta + y
    return shortcut + F.linear(y, w2, b2)


def with_gradients(function, arguments, seed):
    out = function(*arguments)
    return out, *torch.autograd.grad(out, arguments, seed)


def fused(*arguments):
    return response_mlp(*arguments, norm_eps=1e-6, eps=1e-6)


@pytest.mark.parametrize("native", [True, False], ids=["C++", "PyTorch"])
@given(
    batch=st.integers(1, 5),
    positions=st.integers(1, 40),
    channels=st.integers(1, 9),
    chunk=st.sampled_from([1, 2000, 1 << 20]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_layers_written_out(native, batch, positions, channels, chunk):
    arguments = inputs(batch, positions, channels, seed=batch * 1000 + positions * 10 + channels)
    seed = torch.randn(batch, positions, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "CHUNK_BYTES", chunk)
        if not native:
            patch.setattr(pointwise_cpu, "supports", lambda x: False)
        assert pointwise_cpu.supports(arguments[0]) == native
        actual = with_gradients(fused, arguments, seed)
    for got, expected in zip(actual, with_gradients(reference, arguments, seed), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("positions", [3, 50])  # GRN's factor applied to positions, folded into the weight
def test_a_channel_of_zeros_has_finite_gradients(positions):
    arguments = inputs(2, positions, 4)
    with torch.no_grad():
        arguments[4][3] = 0  # fc1's row and bias: GELU(0) = 0 everywhere
        arguments[5][3] = 0
        arguments[4][7] = 0  # and one that underflows
        arguments[5][7] = -100
    gradients = with_gradients(fused, arguments, torch.ones(2, positions, 4, dtype=torch.float64))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[6][7] == 0  # nothing reaches the bias of a channel that has underflowed
    assert gradients[7][3] == 0  # gamma of a channel without response


def test_float32_is_as_good_as_the_type():
    # GELU and its slope over the whole range: the polynomials of the C++ against float64.
    h = torch.linspace(-12, 12, 40_000).view(1, 100, 400)
    h[0, 0, :3] = torch.tensor([0.0, 1e-40, -1e-12])
    zeros, ones = torch.zeros(400), torch.ones(400)
    wide = h.double().requires_grad_()
    value = F.gelu(wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    out, again, slopes = torch.empty_like(h), torch.empty_like(h), torch.ones_like(h)
    assert pointwise_cpu.supports(h)
    sums, scale = pointwise_cpu.activate(h, zeros, ones, None, 1e-6, out)
    rounding = torch.finfo(torch.float32).eps * h.abs().clamp_min(1)  # of 1 + erf, times the input
    assert ((out - value).abs() / rounding).max() < 3
    assert not out[h < -6].any()  # as torch's does, it underflows to zero
    torch.testing.assert_close(sums, value.square().sum(dim=1).float())
    torch.testing.assert_close(scale, response_scale(sums, ones, 1e-6))
    pointwise_cpu.reactivate(h, zeros, scale, zeros, again, None)
    assert torch.equal(again, out)
    nothing = torch.zeros(1, 400)  # reaches the activations by way of the norm, so the slope alone is left
    pointwise_cpu.activation_gradient(h, zeros, out, None, sums, ones, 1e-6, slopes, nothing)
    assert ((slopes - slope).abs() / rounding).max() < 3
    huge = torch.tensor([1e10, 1e25, 3e38, -1e10, -1e25, -3e38]).repeat(1, 1, 8)
    out, slopes = torch.empty_like(huge), torch.ones_like(huge)
    sums, _ = pointwise_cpu.activate(huge, zeros[:48], ones[:48], None, 1e-6, out)
    torch.testing.assert_close(out, huge.clamp_min(0))
    pointwise_cpu.activation_gradient(
        huge, zeros[:48], out, None, zeros[:48].view(1, -1), ones[:48], 1e-6, slopes, nothing[:, :48]
    )
    torch.testing.assert_close(slopes, (huge > 0).float())
    nan = torch.full((1, 1, 16), torch.nan)
    out = torch.zeros_like(nan)
    pointwise_cpu.activate(nan, zeros[:16], ones[:16], None, 1e-6, out)
    assert out.isnan().all()


def test_same_bits_on_any_number_of_threads():
    seed = torch.randn(3, 40, 160, generator=torch.Generator().manual_seed(1))
    threads, results = torch.get_num_threads(), []
    h = torch.randn(3, 40, 160, generator=torch.Generator().manual_seed(2))
    bias, gamma, beta = (x.detach() for x in inputs(3, 40, 40, dtype=torch.float32)[5:8])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            a, product, grad = torch.empty_like(h), torch.empty_like(h), seed.clone()
            sums, scale = pointwise_cpu.activate(h, bias, gamma, beta, 1e-6, product)
            pointwise_cpu.reactivate(h, bias, scale, beta, a, again := torch.empty_like(h))
            assert torch.equal(again, product)
            added = pointwise_cpu.activation_gradient(h, bias, a, scale, sums, gamma, 1e-6, grad, None)
            results.append((a, product, sums, scale, grad, *added))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_any_number_of_leading_axes():
    arguments = inputs(2, 12, 4)
    tiles = [x.view(2, 3, 2, 2, 4) for x in arguments[:2]]
    torch.testing.assert_close(fused(*tiles, *arguments[2:]).view(2, 12, 4), fused(*arguments))


@pytest.mark.parametrize("positions", [3, 50])
def test_bfloat16_autocast(positions):
    exact = inputs(2, positions, 12)
    exact[0] = exact[0].detach().bfloat16().double().requires_grad_()  # what the function is given
    arguments = [x.detach().float().requires_grad_() for x in exact]
    seed = torch.randn(2, positions, 12, generator=torch.Generator().manual_seed(1))
    expected = with_gradients(reference, exact, seed.double())

    def under_autocast(x, *rest):
        with torch.autocast("cpu", torch.bfloat16):
            return fused(x.bfloat16(), *rest)

    actual = with_gradients(under_autocast, arguments, seed)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        assert relative(got.double(), want) < 2e-2


@pytest.mark.parametrize("positions", [3, 50])
def test_backward_under_autocast_is_that_of_the_forward_pass(positions):
    arguments = inputs(2, positions, 4, dtype=torch.float32)
    seed = torch.ones(2, positions, 4)
    expected = with_gradients(fused, arguments, seed)[1:]
    out = fused(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(out, arguments, seed)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_strided_parameters():
    arguments = inputs(2, 6, 4)
    strided = [x if x.ndim != 1 else torch.stack([x, x], dim=1)[:, 0] for x in arguments]
    torch.testing.assert_close(fused(*strided), fused(*arguments))


def test_float64_gradients_numerically():
    assert torch.autograd.gradcheck(fused, inputs(2, 2, 2))
    assert torch.autograd.gradcheck(fused, inputs(1, 5, 1))


def test_there_is_no_second_derivative():
    arguments = inputs(1, 2, 2)
    (gradient,) = torch.autograd.grad(fused(*arguments).square().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backward_of_the_response_scale():
    torch.manual_seed(0)
    sums = torch.rand(3, 5, dtype=torch.float64).square()
    sums[1, 2] = 0
    gamma = torch.randn(5, dtype=torch.float64, requires_grad=True)
    activations = torch.randn(3, 7, 5, dtype=torch.float64)
    activations *= (sums / activations.square().sum(dim=1)).sqrt()[:, None]
    activations.requires_grad_()
    grad = torch.randn(3, 5, dtype=torch.float64)
    scale = response_scale(activations.square().sum(dim=1), gamma, 1e-6)
    expected, expected_gamma = torch.autograd.grad(scale, (activations, gamma), grad)
    own, grad_gamma = response_scale_backward(grad, sums, gamma.detach(), 1e-6)
    torch.testing.assert_close(activations.detach() * own[:, None], expected)
    torch.testing.assert_close(grad_gamma.sum(dim=0), expected_gamma)
    assert torch.equal(response_norms(torch.tensor([0.0, 4.0])), torch.tensor([0.0, 2.0]))


def test_drop_path_drops_the_images_that_the_reference_drops():
    model = small_model(image_size=64, patch_size=16, stem_stride=2)
    drop_half_of_the_images(model)
    images, visible = torch.randn(5, 3, 64, 64, dtype=torch.float64), model.draw_visible(5)
    results = []
    for layout in ("masked", "packed"):
        model.layout = layout
        torch.manual_seed(3)
        features = model.encode(images, visible)
        features.square().sum().backward()
        results.append([features, *(p.grad for p in model.encoder.parameters() if p.requires_grad)])
        model.zero_grad()
    for expected, actual in zip(*results, strict=True):
        assert relative(actual, expected) < 1e-9
    model.eval()
    torch.testing.assert_close(model.encode(images, visible), model.encode(images, visible))

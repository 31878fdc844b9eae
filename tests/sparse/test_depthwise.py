"""The packed depthwise convolution on a CPU: both implementations against a dense convolution, and the operators."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fcmae.sparse import depthwise, depthwise_cpu, depthwise_dense
from fcmae.sparse.depthwise import implementation, packed_depthwise
from fcmae.sparse.tiles import TileIndex, draw_visible

IMPLEMENTATIONS = {"cpu": depthwise_cpu, "dense": depthwise_dense}


def reference(tiles, weight, bias, visible, grid):
    """Tile by tile into a map of zeros, `conv2d`, tile by tile out of it."""
    batch, _, side, _, channels = tiles.shape
    places = [
        (b, slice(p // grid[1] * side, (p // grid[1] + 1) * side), slice(p % grid[1] * side, (p % grid[1] + 1) * side))
        for b, patches in enumerate(visible.tolist())
        for p in patches
    ]
    dense = tiles.new_zeros(batch, grid[0] * side, grid[1] * side, channels)
    for place, tile in zip(places, tiles.flatten(0, 1), strict=True):
        dense[place] = tile
    out = F.conv2d(dense.permute(0, 3, 1, 2), weight, bias, padding=weight.shape[-1] // 2, groups=channels)
    return torch.stack([out.permute(0, 2, 3, 1)[place] for place in places]).view_as(tiles)


def arguments(batch, grid, count, side, channels, kernel=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(side * 100 + channels)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    index = TileIndex(draw_visible(batch, grid[0] * grid[1], count, generator), grid)
    tiles, grad = (normal(batch, count, side, side, channels).to(dtype) for _ in range(2))
    return tiles, normal(channels, 1, kernel, kernel), normal(channels), grad, index


def all_three(module, tiles, weight, bias, grad, index):
    place = (index.visible, index.slots, index.grid)
    return (
        module.depthwise(tiles, weight, bias, *place),
        module.depthwise_input_gradient(grad, weight, *place),
        *module.depthwise_weight_gradient(tiles, grad, *place, weight.shape[-1]),
    )


def expected_of(tiles, weight, bias, grad, index):
    given = [x.double().requires_grad_() for x in (tiles, weight, bias)]
    out = reference(*given, index.visible, index.grid)
    return out.detach(), *torch.autograd.grad(out, given, grad.double())


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is NaN, so that an element that nobody writes cannot pass."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, torch.nan, **options))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 5),
    side=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    channels=st.sampled_from([1, 3, 4, 8, 9, 17]),
    batch=st.integers(1, 3),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_dense_convolution(name, rows, columns, side, channels, batch, data):
    case = arguments(batch, (rows, columns), data.draw(st.integers(1, rows * columns)), side, channels)
    for actual, expected in zip(all_three(IMPLEMENTATIONS[name], *case), expected_of(*case), strict=True):
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("visible", [[0, 1, 2], [3, 4, 5], [0, 3, 6], [0, 1, 2, 3, 5, 6, 7, 8], [4], [8]], ids=str)
def test_whole_rows_and_columns_removed(name, visible):
    tiles, weight, bias, grad, _ = arguments(1, (3, 3), len(visible), 2, 3)
    case = (tiles, weight, bias, grad, TileIndex(torch.tensor([visible]), (3, 3)))
    for actual, expected in zip(all_three(IMPLEMENTATIONS[name], *case), expected_of(*case), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("side", "channels"), [(8, 40), (4, 24), (2, 8), (1, 33)])
def test_float_types(name, dtype, tolerance, side, channels):
    case = arguments(2, (7, 7), 19, side, channels, dtype=dtype)
    actual = all_three(IMPLEMENTATIONS[name], *case)
    assert [x.dtype for x in actual] == [dtype, dtype, torch.float32, torch.float32]
    for got, expected in zip(actual, expected_of(*case), strict=True):
        assert (got.double() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize(("side", "reach"), [(1, 3), (2, 2), (4, 1), (8, 1)])
def test_nan_stays_within_reach_and_in_its_channel(side, reach):
    tiles, weight, bias, _, _ = arguments(1, (1, 8), 8, side, 5)
    index = TileIndex(torch.arange(8)[None], (1, 8))
    clean = packed_depthwise(tiles, weight, bias, index)
    tiles[0, 1, ..., 2] = torch.nan
    out = packed_depthwise(tiles, weight, bias, index)
    assert out[0, : 2 + reach, ..., 2].isnan().flatten(1).any(dim=1).all()
    assert torch.equal(out[0, 2 + reach :], clean[0, 2 + reach :])
    assert torch.equal(out[..., [0, 1, 3, 4]], clean[..., [0, 1, 3, 4]])


def test_same_bits_on_any_number_of_threads():
    case = arguments(8, (7, 7), 19, 8, 40, dtype=torch.float32)
    assert (
        case[0].shape[:4].numel() >= 4 * depthwise_cpu._POSITIONS_PER_SUM
    )  # else there is one sum, and nothing to test
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(all_three(depthwise_cpu, *case))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_who_computes_what():
    assert implementation(torch.empty(1, 1, 2, 2, 3), 7) is depthwise_cpu
    assert implementation(torch.empty(1, 1, 2, 2, 3), 5) is depthwise_dense
    tiles, weight, bias, grad, index = arguments(2, (3, 3), 5, 2, 3, kernel=5)
    tiles.requires_grad_()
    out = packed_depthwise(tiles, weight, bias, index)
    torch.testing.assert_close(out, reference(tiles, weight, bias, index.visible, index.grid))
    gradient, expected = torch.autograd.grad(out, tiles, grad)[0], expected_of(tiles, weight, bias, grad, index)[1]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_operators_are_what_torch_expects(bias):
    tiles, weight, offset, grad, index = arguments(2, (2, 3), 4, 2, 3)
    tiles, weight = tiles.requires_grad_(), weight.requires_grad_()
    place = (index.visible, index.slots, *index.grid)
    torch.library.opcheck(depthwise.forward_operator, (tiles, weight, offset if bias else None, *place))
    torch.library.opcheck(depthwise.input_gradient_operator, (grad, weight.detach(), *place))
    torch.library.opcheck(depthwise.weight_gradient_operator, (tiles.detach(), grad, *place, 7))
    result = packed_depthwise(tiles, weight, offset if bias else None, index)
    plain = reference(tiles, weight, offset if bias else None, index.visible, index.grid)
    torch.testing.assert_close(result, plain)


def test_compiles_without_a_graph_break():
    tiles, weight, bias, grad, index = arguments(2, (3, 3), 5, 2, 3)
    given = [x.requires_grad_() for x in (tiles, weight, bias)]
    compiled = torch.compile(packed_depthwise, backend="aot_eager", fullgraph=True)
    out = compiled(*given, index)
    for actual, expected in zip(
        (out, *torch.autograd.grad(out, given, grad)), expected_of(tiles, weight, bias, grad, index), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_under_autocast_tiles_are_rounded_and_gradients_are_not():
    tiles, weight, bias, _, index = arguments(2, (3, 3), 5, 2, 3, dtype=torch.float32)
    given = [x.float().requires_grad_() for x in (tiles, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        out = packed_depthwise(*given, index)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().square().sum(), given)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_wrong_shapes_are_named():
    tiles, weight, bias, _, index = arguments(2, (2, 3), 4, 2, 3)
    with pytest.raises(ValueError, match=r"tiles have shape \(2, 3, 2, 2, 3\); with \(2, 4\) visible patches"):
        packed_depthwise(tiles[:, :3], weight, bias, index)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 1, 4, 4\); it must be \(3, 1, K, K\) with K odd"):
        packed_depthwise(tiles, weight[..., :4, :4], bias, index)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 1, 7, 7\); it must be \(3, 1, K, K\)"):
        packed_depthwise(tiles, weight[:2], bias, index)

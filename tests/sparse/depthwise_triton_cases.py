"""Triton's depthwise convolution against a dense float64 reference, on whatever runs Triton here.

`test_depthwise_triton.py` runs this file in a process of its own: under Triton's interpreter, which has to be switched
on before Triton is imported, and on a GPU. By hand: TRITON_INTERPRET=1 pytest tests/sparse/depthwise_triton_cases.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fcmae.sparse import depthwise_triton
from fcmae.sparse.depthwise_triton import (
    Launch,
    choose_launch,
    depthwise,
    depthwise_input_gradient,
    depthwise_weight_gradient,
)
from fcmae.sparse.tiles import TileIndex, draw_visible, gather_tiles, scatter_tiles

DEVICE = torch.device("cpu" if depthwise_triton.INTERPRETED else "cuda")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN, so that an element that no kernel writes cannot pass."""

    def shape_of(arguments):
        return arguments if isinstance(arguments[0], int) else arguments[0]

    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.full(shape_of(shape), torch.nan, **options))


def slots_of(visible: Tensor, grid: tuple[int, int]) -> Tensor:
    return TileIndex(visible, grid).slots


def tensors(visible: Tensor, side: int, channels: int, kernel: int, dtype: torch.dtype, weight_dtype=None):
    """Random tiles and output gradient of `dtype`, weight and bias of `weight_dtype` (float32 for half types)."""
    generator = torch.Generator().manual_seed(side * 100 + channels)
    weight_dtype = weight_dtype or (dtype if dtype == torch.float64 else torch.float32)
    shape = (*visible.shape, side, side, channels)
    tiles, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(channels, 1, kernel, kernel, generator=generator, dtype=torch.float64).to(DEVICE, weight_dtype)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64).to(DEVICE, weight_dtype)
    return tiles, grad, weight, bias


def reference(tiles, grad, weight, bias, visible, grid):
    """Output and gradients of tiles, weight and bias from a dense convolution of the zero-filled map, in float64."""
    index = TileIndex(visible, grid)
    tiles, weight, bias = (x.double().requires_grad_() for x in (tiles, weight, bias))
    dense = scatter_tiles(tiles, index).permute(0, 3, 1, 2)
    pad = weight.shape[-1] // 2
    dense = torch.nn.functional.conv2d(dense, weight, bias, padding=pad, groups=weight.shape[0])
    out = gather_tiles(dense.permute(0, 2, 3, 1).contiguous(), index)
    return out, *torch.autograd.grad(out, (tiles, weight, bias), grad.double())


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"  # NaN never passes


def check(visible, grid, side, channels, kernel=7, dtype=torch.float64, weight_dtype=None, launch=None) -> None:
    visible = visible.to(DEVICE)
    slots = slots_of(visible, grid)
    tiles, grad, weight, bias = tensors(visible, side, channels, kernel, dtype, weight_dtype)
    out, tiles_grad, weight_grad, bias_grad = reference(tiles, grad, weight, bias, visible, grid)

    actual = depthwise(tiles, weight, bias, visible, slots, grid, launch=launch)
    assert actual.dtype == dtype
    close(actual, out, dtype)
    actual = depthwise_input_gradient(grad, weight, visible, slots, grid, launch=launch)
    assert actual.dtype == dtype
    close(actual, tiles_grad, dtype)
    actual_weight, actual_bias = depthwise_weight_gradient(tiles, grad, visible, slots, grid, kernel, launch=launch)
    assert actual_weight.dtype == actual_bias.dtype == (dtype if dtype == torch.float64 else torch.float32)
    # Half types are rounded on the way in alone, so their sums are as good as float32's.
    close(actual_weight, weight_grad, dtype if dtype == torch.float64 else torch.float32)
    close(actual_bias, bias_grad, dtype if dtype == torch.float64 else torch.float32)


def draw(batch: int, grid: tuple[int, int], count: int) -> Tensor:
    return draw_visible(batch, grid[0] * grid[1], count, torch.Generator().manual_seed(count))


@pytest.mark.parametrize(
    ("grid", "batch", "count", "side", "channels", "kernel"),
    [
        ((1, 1), 1, 1, 1, 3, 7),
        ((1, 1), 2, 1, 4, 1, 3),
        ((2, 3), 2, 1, 1, 17, 5),
        ((3, 2), 1, 6, 1, 40, 3),
        ((4, 5), 1, 8, 1, 5, 5),
        ((9, 5), 1, 9, 1, 3, 7),
        ((1, 2), 1, 2, 2, 5, 7),
        ((4, 5), 1, 8, 2, 3, 7),
        ((9, 5), 1, 8, 2, 40, 5),
        ((5, 4), 2, 9, 2, 1, 3),
        ((2, 2), 1, 4, 4, 40, 7),
        ((3, 4), 2, 3, 4, 3, 7),
        ((4, 5), 1, 8, 4, 17, 3),
        ((1, 3), 1, 2, 8, 5, 7),
        ((2, 2), 1, 2, 8, 3, 5),
        ((2, 2), 1, 3, 8, 17, 3),
        ((2, 1), 1, 2, 16, 3, 3),
    ],
)
def test_equals_the_dense_convolution(grid, batch, count, side, channels, kernel):
    check(draw(batch, grid, count), grid, side, channels, kernel)


@pytest.mark.parametrize("side", [1, 2, 4])
@pytest.mark.parametrize(
    "visible", [[0, 1, 2, 6, 7, 8], [0, 2, 3, 5, 6, 8], [4], [0, 8]]
)  # a row, a column, all but one, …
def test_whole_rows_and_columns_masked(side, visible):
    check(torch.tensor([visible]), (3, 3), side, 3, kernel=5 if side == 2 else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("side", "grid", "count"), [(1, (3, 3), 4), (2, (3, 4), 6), (4, (2, 2), 2)])
def test_float_types(dtype, side, grid, count):
    check(draw(1, grid, count), grid, side, 5, kernel=3, dtype=dtype)


def test_weights_of_the_tiles_type():
    check(draw(1, (2, 2), 3), (2, 2), 2, 5, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)


@pytest.mark.parametrize(("block", "programs"), [(16, 1), (16, 5), (32, 10_000)])
def test_any_division_of_work(block, programs):
    grid, visible = (2, 3), draw(2, (2, 3), 4)
    launch = Launch(block=block, warps=1, registers=255, programs=programs)
    check(visible, grid, 2, 20, kernel=3, launch=launch)


def test_without_bias():
    grid, visible = (2, 2), draw(1, (2, 2), 3).to(DEVICE)
    tiles, _, weight, bias = tensors(visible, 2, 5, 7, torch.float64)
    arguments = (visible, slots_of(visible, grid), grid)
    with_zeros = depthwise(tiles, weight, torch.zeros_like(bias), *arguments)
    assert torch.equal(depthwise(tiles, weight, None, *arguments), with_zeros)


def test_strided_gradients_are_accepted():
    grid, visible = (2, 2), draw(1, (2, 2), 3).to(DEVICE)
    tiles, _, weight, _ = tensors(visible, 2, 5, 3, torch.float64)
    arguments = (visible, slots_of(visible, grid), grid)
    expanded = torch.ones((), dtype=torch.float64, device=DEVICE).expand(tiles.shape)
    dense = expanded.contiguous()
    assert torch.equal(
        depthwise_input_gradient(expanded, weight, *arguments), depthwise_input_gradient(dense, weight, *arguments)
    )
    for a, b in zip(
        depthwise_weight_gradient(tiles, expanded, *arguments, 3),
        depthwise_weight_gradient(tiles, dense, *arguments, 3),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("side", "reach"), [(1, 3), (2, 2), (4, 1)])
def test_nan_stays_within_reach(side, reach):
    grid = (1, 6)
    visible = torch.arange(6, device=DEVICE)[None]
    tiles, _, weight, bias = tensors(visible, side, 3, 7, torch.float32)
    arguments = (visible, slots_of(visible, grid), grid)
    clean = depthwise(tiles, weight, bias, *arguments)
    tiles[0, 1] = torch.nan
    out = depthwise(tiles, weight, bias, *arguments)
    assert out[0, : 2 + reach].isnan().any(dim=(1, 2, 3)).all()
    assert torch.equal(out[0, 2 + reach :], clean[0, 2 + reach :])
    grad = torch.ones_like(tiles)
    weight_grad, bias_grad = depthwise_weight_gradient(tiles, grad, *arguments, 7)
    assert weight_grad[:, 0, 3, 3].isnan().all()
    assert bias_grad.isfinite().all()
    tiles[0, 1, ..., 1:] = 0
    weight_grad, _ = depthwise_weight_gradient(tiles, grad, *arguments, 7)
    assert weight_grad[1:].isfinite().all()  # other channels


def test_removed_tiles_of_one_image_are_not_found_in_another():
    grid = (2, 2)
    visible = torch.tensor([[0, 1], [2, 3], [0, 3]])
    check(visible, grid, 2, 3)
    check(visible, grid, 4, 3, kernel=3)


def test_same_input_gives_the_same_bits():
    grid, visible = (3, 3), draw(1, (3, 3), 5).to(DEVICE)
    tiles, grad, weight, bias = tensors(visible, 2, 40, 7, torch.float32)
    arguments = (visible, slots_of(visible, grid), grid)

    def run():
        return (
            depthwise(tiles, weight, bias, *arguments),
            depthwise_input_gradient(grad, weight, *arguments),
            *depthwise_weight_gradient(tiles, grad, *arguments, 7),
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("splits", [1, 32, 33, 100])
def test_partial_sums_are_added_over_any_number_of_splits(splits):
    partial = torch.randn(splits, 10, 17, dtype=torch.float64, device=DEVICE)
    weight, bias = torch.empty(17, 9, dtype=torch.float64, device=DEVICE), partial.new_full((17,), torch.nan)
    # Two programs of 128 lanes hold 170 sums.
    depthwise_triton.add_splits_kernel[(2,)](weight, bias, partial, splits, C=17, K=3, ROWS=32, LANES=128)
    torch.testing.assert_close(weight, partial.sum(0)[:9].t())
    torch.testing.assert_close(bias, partial.sum(0)[9])


@pytest.mark.skipif(depthwise_triton.INTERPRETED, reason="the interpreter is too slow for it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("side", "channels"), [(8, 40), (4, 80), (2, 160), (1, 320), (8, 128), (4, 256), (2, 512), (1, 1024), (16, 96)]
)
def test_sizes_of_real_models(side, channels, dtype):
    check(draw(8, (7, 7), 19), (7, 7), side, channels, dtype=dtype)


def valid() -> dict:
    visible = draw(1, (2, 2), 3).to(DEVICE)
    tiles, _, weight, bias = tensors(visible, 2, 5, 7, torch.float32)
    slots = slots_of(visible, (2, 2))
    return {"tiles": tiles, "weight": weight, "bias": bias, "visible": visible, "slots": slots, "grid": (2, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": torch.zeros(1, 3, 3, 3, 5)}, r"T in \(1, 2, 4, 8, 16\)"),
        ({"tiles": torch.zeros(1, 3, 32, 32, 5)}, r"T in \(1, 2, 4, 8, 16\)"),
        ({"tiles": torch.zeros(1, 3, 2, 1, 5)}, r"\(B, V, T, T, C\)"),
        ({"tiles": torch.zeros(3, 2, 2, 5)}, r"\(B, V, T, T, C\)"),
        ({"tiles": torch.zeros(1, 0, 2, 2, 5)}, "none empty"),
        ({"tiles": torch.zeros(1, 3, 2, 2, 5, dtype=torch.int32)}, "float16, bfloat16, float32 or float64"),
        ({"weight": torch.zeros(5, 1, 4, 4)}, r"one of \(1, 3, 5, 7\); got 4"),
        ({"weight": torch.zeros(5, 1, 9, 9)}, r"one of \(1, 3, 5, 7\); got 9"),
        ({"weight": torch.zeros(4, 1, 7, 7)}, r"weight must be floating \(5, 1, K, K\)"),
        ({"weight": torch.zeros(5, 1, 7, 5)}, r"weight must be floating \(5, 1, K, K\)"),
        ({"bias": torch.zeros(4)}, r"bias must be floating \(5,\)"),
        ({"visible": torch.zeros(1, 2, dtype=torch.int64)}, r"visible must be int64 \(1, 3\)"),
        ({"visible": torch.zeros(1, 3, dtype=torch.int32)}, r"visible must be int64 \(1, 3\)"),
        ({"slots": torch.zeros(1, 5, dtype=torch.int32)}, r"slots must be int32 \(1, 4\)"),
        ({"slots": torch.zeros(1, 4, dtype=torch.int64)}, r"slots must be int32 \(1, 4\)"),
        ({"weight": torch.zeros(5, 1, 7, 7, device="meta")}, "on one device"),
    ],
)
def test_unsupported_input_is_named(change, message):
    change = {k: v if v.is_meta else v.to(DEVICE) for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        depthwise(**(valid() | change))


def test_unsupported_gradients_are_named():
    arguments = {k: v for k, v in valid().items() if k not in ("weight", "bias")}
    with pytest.raises(ValueError, match="grad must match tiles"):
        depthwise_weight_gradient(grad=arguments["tiles"].bfloat16(), kernel_side=7, **arguments)
    with pytest.raises(ValueError, match=r"one of \(1, 3, 5, 7\); got 6"):
        depthwise_weight_gradient(grad=arguments["tiles"], kernel_side=6, **arguments)


def test_blocks_follow_the_channels():
    assert choose_launch(8, 40, torch.bfloat16).block == 64
    assert choose_launch(4, 80, torch.bfloat16).block == 32
    assert choose_launch(2, 160, torch.bfloat16).block == 64
    assert choose_launch(1, 3, torch.bfloat16).block == 32
    assert choose_launch(2, 512, torch.float64).block == 32

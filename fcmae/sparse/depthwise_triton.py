"""Packed depthwise convolution as Triton kernels: forward, input gradient, weight and bias gradient.

B images, V visible tiles, T tile side, C channels, K kernel side (7), L = grid rows x grid columns patches. `visible`
(B, V) int64 holds the sorted ids of the kept patches, `slots` (B, L) int32 the index v of the tile that holds a patch,
-1 where it was removed. Positions outside the visible tiles count as zero and get no output (paper section 3).

Tiles are cut into square cells of side S = min(T, 4). A program owns a block of channels, two per thread so that a warp
reads 128 contiguous bytes of bfloat16, and walks over several cells. Everything about a cell lives in registers and all
loops over pixels are unrolled: addresses are constants and only products that exist are computed. The cells within
reach, ceil((K // 2) / S) on each side, are looked up in `slots`, and one that is masked or outside the grid is skipped
by a branch: nothing is loaded or multiplied for it. At S = 1 a branch costs more than the one product that it saves, so
there the load is predicated instead.

Per cell and channel; in brackets the mean over random masks that keep 19 of 7x7 patches (ratio 0.6), which is what is
executed, loads shrinking alike (at T = 1 all 49 FMAs are issued, on zeros):

            cells around   pixels loaded   FMAs per output   FMAs per load
    T = 8     9 [5.6]          100            49 [36]             7.8
    T = 4     9 [3.4]          100            49 [26]             7.8
    T = 2    25 [7.1]           64            49 [17]             3.1
    T = 1    49 [11]            49            49 [11]             1.0

- Forward. The K² taps stay in registers, so they are loaded once per program. A dense convolution does all 49 FMAs,
  and for all 49 patches.
- Input gradient. The forward with the flipped kernel.
- Weight gradient. The same walk with outputs and taps exchanged: S² more loads per cell for the output gradient, while
  the K² sums stay in registers and leave once per program, as a row of a (splits, K² + 1, C) buffer whose last line is
  the bias. A second kernel adds the splits in a fixed order. There are no atomics and nothing depends on the device or
  on timing, so the same input gives the same bits.

Accumulation is in float32, in float64 for float64 tiles. Not yet timed on a GPU: the choices rest on the instruction
and register counts of the compiled kernels, and `scripts/bench_depthwise.py` sweeps them where there is one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fcmae.sparse.tiles import Grid

SIDES = (1, 2, 4, 8, 16)
KERNEL_SIDES = (1, 3, 5, 7)  # 49 taps of two channels fill 98 registers, 81 would fill 162
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Launch(NamedTuple):
    """How the work is divided: no influence on outputs, on weight gradients by the order of rounding alone."""

    block: int  # channels per program, a power of two
    warps: int
    registers: int  # per thread, at most
    programs: int  # how many to aim at


def choose_launch(side: int, channels: int, dtype: torch.dtype, weight_gradient: bool = False) -> Launch:
    """The division of work for tiles of `side` and `channels`: a function of shapes alone, never of the device.

    One warp per program with two channels per thread. One channel per thread takes about 60% of the instructions, so
    it wins at T >= 4 where blocks of 64 would leave much empty (C = 80, 96, 160); at smaller T loads are the limit, and
    it would halve their width. 168 registers hold 49 taps of two channels with room to spare and let 12 programs share
    a multiprocessor; wider types need more, and so does the weight gradient at T = 4, which else spills two of them on
    sm_100 (packed FMAs take pairs). Programs: as many as the 132 multiprocessors of an H100 hold at once, so that none
    runs in a last, half empty round, each walking over as many cells as that leaves: the more, the more often a
    neighbour is found in L1 and the fewer partial sums of the weight gradient there are.
    """
    half_blocks = triton.cdiv(channels, 32)
    one_per_thread = half_blocks == 1 or (side >= 4 and half_blocks % 2 == 1 and half_blocks < 6)
    registers = {torch.float64: 255, torch.float32: 192}.get(dtype, 184 if weight_gradient and side == 4 else 168)
    return Launch(
        block=32 if one_per_thread or dtype == torch.float64 else 64,
        warps=1,
        registers=registers,
        programs=132 * 12,
    )


def constants(side: int, channels: int, kernel_side: int, dtype: torch.dtype, launch: Launch) -> dict[str, Any]:
    """The compile-time arguments of both convolution kernels."""
    return {
        "T": side,
        "S": min(side, 4),
        "C": channels,
        "K": kernel_side,
        "BLOCK": launch.block,
        "BRANCH": side > 1,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


@triton.jit
def _locate(cell, visible_ptr, visible_count, columns, T: tl.constexpr, S: tl.constexpr):
    """Tile (int64) and image of a cell, its row and column among all cells of the map, its first pixel in the tile."""
    tile = cell // ((T // S) * (T // S))
    y = (cell // (T // S)) % (T // S)
    x = cell % (T // S)
    patch = tl.load(visible_ptr + tile).to(tl.int32)
    row = (patch // columns) * (T // S) + y
    column = (patch % columns) * (T // S) + x
    return tile.to(tl.int64), tile // visible_count, row, column, (y * T + x) * S


@triton.jit
def _add_cell(
    sums, source, lanes, factors, DY: tl.constexpr, DX: tl.constexpr, TAPS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BRANCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add what the cell (DY, DX) away contributes, `source` pointing at its first pixel.

    `sums` are the S² outputs and `factors` the K² taps; or, with TAPS, the gradients of the taps and of the outputs.
    """
    for y in tl.static_range(DY * S, DY * S + S):
        for x in tl.static_range(DX * S, DX * S + S):
            if y >= -(K // 2) and y < S + K // 2 and x >= -(K // 2) and x < S + K // 2:
                pointers = source + ((y - DY * S) * T + x - DX * S) * C
                if BRANCH:  # lanes past C hold anything and are never stored
                    value = tl.load(pointers, mask=lanes).to(ACC)
                else:
                    value = tl.load(pointers, mask=lanes, other=0.0).to(ACC)
                # Output o is at (o // S, o % S) of the cell; it meets the pixel (y, x) at tap (y - o // S + K // 2, …).
                out = ()
                if TAPS:
                    for k in tl.static_range(K * K):
                        if (y - k // K + K // 2) // S == 0 and (x - k % K + K // 2) // S == 0:
                            out = out + (
                                tl.fma(value, factors[(y - k // K + K // 2) * S + x - k % K + K // 2], sums[k]),
                            )
                        else:
                            out = out + (sums[k],)
                else:
                    for o in tl.static_range(S * S):
                        if (y - o // S + K // 2) // K == 0 and (x - o % S + K // 2) // K == 0:
                            out = out + (
                                tl.fma(value, factors[(y - o // S + K // 2) * K + x - o % S + K // 2], sums[o]),
                            )
                        else:
                            out = out + (sums[o],)
                sums = out
    return sums


@triton.jit
def _add_neighbours(
    sums, tiles_ptr, c, factors, slots_ptr, image, row, column, visible_count, rows, columns, TAPS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr, BRANCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add every visible cell in reach, the cell itself included, for the channels `c`."""
    reach: tl.constexpr = (K // 2 + S - 1) // S
    tiles = tiles_ptr + image.to(tl.int64) * visible_count * (T * T * C) + c
    for dy in tl.static_range(-reach, reach + 1):
        line = slots_ptr + (image * rows + (row + dy) // (T // S)) * columns
        row_inside = (row + dy >= 0) & (row + dy < rows * (T // S))
        found = ()  # looked up for a whole row, so that the loads overlap
        for dx in tl.static_range(-reach, reach + 1):
            inside = row_inside & (column + dx >= 0) & (column + dx < columns * (T // S))
            if T == S:  # in this order dx becomes part of the instruction
                found = found + (tl.load(line + column + dx, mask=inside, other=-1),)
            else:
                found = found + (tl.load(line + (column + dx) // (T // S), mask=inside, other=-1),)
        for dx in tl.static_range(-reach, reach + 1):
            slot = found[dx + reach]
            source = tiles + slot.to(tl.int64) * (T * T * C)
            if T > S:
                source += ((row + dy) % (T // S) * T + (column + dx) % (T // S)) * (S * C)
            if BRANCH:
                if slot >= 0:
                    sums = _add_cell(sums, source, c < C, factors, dy, dx, TAPS, T, S, C, K, BRANCH, ACC)
            else:
                lanes = c < tl.where(slot >= 0, C, 0)
                sums = _add_cell(sums, source, lanes, factors, dy, dx, TAPS, T, S, C, K, BRANCH, ACC)
    return sums


@triton.jit(do_not_specialize=["cells", "cells_per_program", "visible_count", "rows", "columns"])
def convolve_kernel(
    out_ptr, tiles_ptr, taps_ptr, bias_ptr, visible_ptr, slots_ptr,
    cells, cells_per_program, visible_count, rows, columns, HAS_BIAS: tl.constexpr,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, BRANCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Output cells [program · cells_per_program, …) of one block of channels; `taps` is (K², C)."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    lanes = c < C
    taps = ()
    for k in tl.static_range(K * K):
        taps = taps + (tl.load(taps_ptr + k * C + c, mask=lanes).to(ACC),)
    start = tl.zeros((BLOCK,), ACC)
    if HAS_BIAS:
        start = tl.load(bias_ptr + c, mask=lanes).to(ACC)
    cell = tl.program_id(0) // blocks * cells_per_program
    last = tl.minimum(cell + cells_per_program, cells)
    while cell < last:
        tile, image, row, column, pixel = _locate(cell, visible_ptr, visible_count, columns, T, S)
        sums = ()
        for _ in tl.static_range(S * S):
            sums = sums + (start,)
        sums = _add_neighbours(
            sums, tiles_ptr, c, taps, slots_ptr, image, row, column, visible_count, rows, columns, False,
            T, S, C, K, BRANCH, ACC,
        )  # fmt: skip
        target = out_ptr + (tile * (T * T) + pixel) * C + c
        for o in tl.static_range(S * S):
            tl.store(target + (o // S * T + o % S) * C, sums[o].to(out_ptr.dtype.element_ty), mask=lanes)
        cell += 1


@triton.jit(do_not_specialize=["cells", "cells_per_program", "visible_count", "rows", "columns"])
def tap_gradient_kernel(
    partial_ptr, tiles_ptr, grad_ptr, visible_ptr, slots_ptr,
    cells, cells_per_program, visible_count, rows, columns,
    T: tl.constexpr, S: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr, BRANCH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What one range of cells adds to the gradients of taps and bias: row `split` of `partial` (splits, K² + 1, C)."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    lanes = c < C
    sums = ()
    for _ in tl.static_range(K * K):
        sums = sums + (tl.zeros((BLOCK,), ACC),)
    bias = tl.zeros((BLOCK,), ACC)
    split = tl.program_id(0) // blocks
    cell = split * cells_per_program
    last = tl.minimum(cell + cells_per_program, cells)
    while cell < last:
        tile, image, row, column, pixel = _locate(cell, visible_ptr, visible_count, columns, T, S)
        own = grad_ptr + (tile * (T * T) + pixel) * C + c
        grad = ()
        for o in tl.static_range(S * S):
            grad = grad + (tl.load(own + (o // S * T + o % S) * C, mask=lanes).to(ACC),)
            bias += grad[o]
        sums = _add_neighbours(
            sums, tiles_ptr, c, grad, slots_ptr, image, row, column, visible_count, rows, columns, True,
            T, S, C, K, BRANCH, ACC,
        )  # fmt: skip
        cell += 1
    target = partial_ptr + split.to(tl.int64) * ((K * K + 1) * C) + c
    for k in tl.static_range(K * K):
        tl.store(target + k * C, sums[k], mask=lanes)
    tl.store(target + K * K * C, bias, mask=lanes)


@triton.jit(do_not_specialize=["splits"])
def add_splits_kernel(
    weight_ptr, bias_ptr, partial_ptr, splits,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sum `partial` (splits, K² + 1, C) over its splits in a fixed order into weight (C, K²) and bias (C,)."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = lane < (K * K + 1) * C
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, LANES), partial_ptr.dtype.element_ty)
    first = 0
    while first < splits:
        at = (first + row).to(tl.int64)[:, None] * ((K * K + 1) * C) + lane[None, :]
        sums += tl.load(partial_ptr + at, mask=(first + row < splits)[:, None] & valid[None, :], other=0.0)
        first += ROWS
    total = tl.sum(sums, axis=0)
    tap = lane // C
    channel = lane % C
    tl.store(weight_ptr + channel * (K * K) + tap, total, mask=valid & (tap < K * K))
    tl.store(bias_ptr + channel, total, mask=valid & (tap == K * K))


INTERPRETED = not isinstance(convolve_kernel, triton.runtime.JITFunction)


def depthwise(
    tiles: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    visible: Tensor,
    slots: Tensor,
    grid: Grid,
    *,
    launch: Launch | None = None,
) -> Tensor:
    """Depthwise convolution over visible tiles, zero elsewhere.

    Args:
        tiles: (B, V, T, T, C), T in 1, 2, 4, 8, 16; float16, bfloat16, float32 or float64.
        weight: (C, 1, K, K), K in 1, 3, 5, 7, any floating type.
        bias: (C,) or None, any floating type.
        visible: (B, V) int64, sorted ids of the kept patches.
        slots: (B, rows·columns) int32, index v of the tile that holds a patch, -1 where it was removed.
        grid: (rows, columns) of patches.
        launch: how the work is divided, for benchmarks; `choose_launch` decides where it is None.

    Returns:
        (B, V, T, T, C) of the tiles' type.

    Raises:
        ValueError: for shapes, types or devices that are not supported.
    """
    _check(tiles, visible, slots, grid, weight=weight, bias=bias)
    taps = weight.reshape(weight.shape[0], -1).t().contiguous()
    return _convolve(tiles, taps, bias, visible, slots, grid, launch)


def depthwise_input_gradient(
    grad: Tensor, weight: Tensor, visible: Tensor, slots: Tensor, grid: Grid, *, launch: Launch | None = None
) -> Tensor:
    """Gradient of `depthwise` with respect to its tiles: the convolution of `grad` with the flipped kernel.

    Args, returns and raises as `depthwise`, with `grad` (B, V, T, T, C) in place of the tiles.
    """
    _check(grad, visible, slots, grid, weight=weight)
    taps = weight.reshape(weight.shape[0], -1).flip(1).t().contiguous()
    return _convolve(grad, taps, None, visible, slots, grid, launch)


def depthwise_weight_gradient(
    tiles: Tensor,
    grad: Tensor,
    visible: Tensor,
    slots: Tensor,
    grid: Grid,
    kernel_side: int,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of `depthwise` with respect to weight and bias.

    Args:
        tiles, grad: (B, V, T, T, C) of one type; the rest as in `depthwise`.
        kernel_side: K.

    Returns:
        (C, 1, K, K) and (C,), float32 (float64 for float64 tiles); the same bits for the same input.

    Raises:
        ValueError: for shapes, types or devices that are not supported.
    """
    _check(tiles, visible, slots, grid, grad=grad, kernel_side=kernel_side)
    side, channels = tiles.shape[2], tiles.shape[4]
    launch = launch or choose_launch(side, channels, tiles.dtype, weight_gradient=True)
    cells, per_program, groups = _divide(tiles, launch)
    dtype = torch.float64 if tiles.dtype == torch.float64 else torch.float32
    lines = kernel_side * kernel_side + 1
    partial = torch.empty(groups, lines, channels, dtype=dtype, device=tiles.device)
    weight_grad = torch.empty(channels, 1, kernel_side, kernel_side, dtype=dtype, device=tiles.device)
    bias_grad = torch.empty(channels, dtype=dtype, device=tiles.device)
    with torch.cuda.device_of(tiles):
        tap_gradient_kernel[(groups * triton.cdiv(channels, launch.block),)](
            partial, tiles.contiguous(), grad.contiguous(), visible.contiguous(), slots.contiguous(),
            cells, per_program, visible.shape[1], *grid,
            **constants(side, channels, kernel_side, tiles.dtype, launch),
            num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
        add_splits_kernel[(triton.cdiv(lines * channels, 64),)](
            weight_grad, bias_grad, partial, groups, C=channels, K=kernel_side, ROWS=32, LANES=64, num_warps=4
        )
    return weight_grad, bias_grad


def _convolve(
    tiles: Tensor, taps: Tensor, bias: Tensor | None, visible: Tensor, slots: Tensor, grid: Grid, launch: Launch | None
) -> Tensor:
    """`depthwise` for checked arguments and taps (K², C)."""
    side, channels = tiles.shape[2], tiles.shape[4]
    launch = launch or choose_launch(side, channels, tiles.dtype)
    cells, per_program, groups = _divide(tiles, launch)
    out = torch.empty(tiles.shape, dtype=tiles.dtype, device=tiles.device)
    with torch.cuda.device_of(tiles):
        convolve_kernel[(groups * triton.cdiv(channels, launch.block),)](
            out, tiles.contiguous(), taps, taps if bias is None else bias.contiguous(), visible.contiguous(),
            slots.contiguous(), cells, per_program, visible.shape[1], *grid, HAS_BIAS=bias is not None,
            **constants(side, channels, math.isqrt(taps.shape[0]), tiles.dtype, launch),
            num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
    return out


def _divide(tiles: Tensor, launch: Launch) -> tuple[int, int, int]:
    """(cells, cells per program, groups of cells): at least 4 cells each, so that the taps are worth loading."""
    batch, count, side, _, channels = tiles.shape
    cells = batch * count * (side // min(side, 4)) ** 2
    groups = max(1, launch.programs // triton.cdiv(channels, launch.block))
    per_program = max(4, triton.cdiv(cells, groups))
    return cells, per_program, triton.cdiv(cells, per_program)


def _check(
    tiles: Tensor,
    visible: Tensor,
    slots: Tensor,
    grid: Grid,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grad: Tensor | None = None,
    kernel_side: int | None = None,
) -> None:
    """Raise ValueError, in one line, for what the kernels do not support."""
    if tiles.ndim != 5 or tiles.shape[2] != tiles.shape[3] or tiles.shape[2] not in SIDES or 0 in tiles.shape:
        raise ValueError(f"tiles must be (B, V, T, T, C) with T in {SIDES}, none empty; got {tuple(tiles.shape)}")
    if tiles.dtype not in DTYPES:
        raise ValueError(f"tiles must be float16, bfloat16, float32 or float64; got {tiles.dtype}")
    batch, count, _, _, channels = tiles.shape
    if weight is not None:
        kernel_side = weight.shape[-1]
        if tuple(weight.shape) != (channels, 1, kernel_side, kernel_side) or not weight.is_floating_point():
            raise ValueError(f"weight must be floating ({channels}, 1, K, K); got {weight.dtype} {tuple(weight.shape)}")
    if kernel_side not in KERNEL_SIDES:
        raise ValueError(f"the kernel side must be one of {KERNEL_SIDES}; got {kernel_side}")
    if bias is not None and (tuple(bias.shape) != (channels,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating ({channels},); got {bias.dtype} {tuple(bias.shape)}")
    if grad is not None and (grad.shape != tiles.shape or grad.dtype != tiles.dtype):
        raise ValueError(
            f"grad must match tiles {tiles.dtype} {tuple(tiles.shape)}; got {grad.dtype} {tuple(grad.shape)}"
        )
    if tuple(visible.shape) != (batch, count) or visible.dtype != torch.int64:
        raise ValueError(f"visible must be int64 ({batch}, {count}); got {visible.dtype} {tuple(visible.shape)}")
    if tuple(slots.shape) != (batch, grid[0] * grid[1]) or slots.dtype != torch.int32:
        raise ValueError(f"slots must be int32 ({batch}, {grid[0] * grid[1]}); got {slots.dtype} {tuple(slots.shape)}")
    devices = {str(x.device) for x in (tiles, visible, slots, weight, bias, grad) if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device; got {sorted(devices)}")
    if tiles.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"Triton kernels need CUDA tensors (or TRITON_INTERPRET=1, to test); got {tiles.device}")

"""Visible patches as square tiles: which are visible, and moving them between dense maps and packed tensors.

B images, C channels, H W pixels (or positions of a feature map), P patch side in pixels, L = grid rows x grid columns
patches, V visible patches, T side of a patch's tile on some feature map. `visible` (B, V) int64 holds the sorted ids of
the kept patches, id = row * columns + column; `mask` (B, L) bool is True where a patch was removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]


def draw_visible(
    batch: int,
    num_patches: int,
    count: int,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draw `count` of `num_patches` patches per image, uniformly without replacement: (B, V) int64, sorted."""
    device = generator.device if generator is not None else device
    noise = torch.rand(batch, num_patches, generator=generator, device=device)
    return noise.argsort(dim=1)[:, :count].sort(dim=1).values


def removed_mask(visible: Tensor, num_patches: int) -> Tensor:
    """(B, L) bool, True where a patch is not in `visible`."""
    mask = torch.ones(visible.shape[0], num_patches, dtype=torch.bool, device=visible.device)
    return mask.scatter(1, visible, False)


def removed_on_map(visible: Tensor, grid: Grid, side: int) -> Tensor:
    """The mask on a map on which a patch is `side` positions wide: (B, rows·side, columns·side) bool."""
    mask = removed_mask(visible, grid[0] * grid[1]).view(-1, *grid)
    return mask.repeat_interleave(side, 1).repeat_interleave(side, 2)


def tile_runs(visible: Tensor, grid: Grid, side: int) -> Tensor:
    """(B·V·T,) int64: the runs of every tile, in packed order, in a map cut into (B·rows·T·columns) runs of T.

    A tile is T runs of T·C contiguous numbers in a channels-last map, so moving tiles is copying B·V·T such runs.
    """
    rows, columns = grid
    image = torch.arange(visible.shape[0], device=visible.device).view(-1, 1, 1)
    line = torch.arange(side, device=visible.device)
    row, column = (visible // columns).unsqueeze(-1), (visible % columns).unsqueeze(-1)
    return (((image * rows + row) * side + line) * columns + column).flatten()


class TileIndex:
    """Where the tiles of one batch sit on a feature map of any tile side; shared by all layers of a forward pass.

    visible: (B, V) int64, the patch of every tile. slots: (B, L) int32, the tile of every patch, -1 where removed.
    """

    def __init__(self, visible: Tensor, grid: Grid) -> None:
        self.visible = visible
        self.grid = grid
        batch, count = visible.shape
        tiles = torch.arange(count, dtype=torch.int32, device=visible.device).expand(batch, count)
        removed = torch.full((batch, grid[0] * grid[1]), -1, dtype=torch.int32, device=visible.device)
        self.slots = removed.scatter(1, visible, tiles)

    def runs(self, side: int) -> Tensor:
        return tile_runs(self.visible, self.grid, side)


def scatter_runs(tiles: Tensor, runs: Tensor, grid: Grid) -> Tensor:
    """(B, V, T, T, C) -> the dense map (B, rows·T, columns·T, C), zero where no tile is. Not differentiable."""
    batch, _, side, _, channels = tiles.shape
    dense = tiles.new_zeros(batch * grid[0] * side * grid[1], side * channels)
    dense.index_copy_(0, runs, tiles.reshape(-1, side * channels))
    return dense.view(batch, grid[0] * side, grid[1] * side, channels)


def gather_runs(dense: Tensor, runs: Tensor, grid: Grid) -> Tensor:
    """(B, rows·T, columns·T, C) -> the visible tiles (B, V, T, T, C). Not differentiable."""
    batch, height, _, channels = dense.shape
    side = height // grid[0]
    return dense.reshape(-1, side * channels).index_select(0, runs).view(batch, -1, side, side, channels)


class _Scatter(torch.autograd.Function):
    """Its gradient is the gather: runs are unique, so nothing needs accumulating either way."""

    @staticmethod
    def forward(ctx, tiles: Tensor, runs: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(runs)
        ctx.grid = grid
        return scatter_runs(tiles, runs, grid)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return gather_runs(grad, ctx.saved_tensors[0], ctx.grid), None, None


class _Gather(torch.autograd.Function):
    """Its gradient is the scatter."""

    @staticmethod
    def forward(ctx, dense: Tensor, runs: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(runs)
        ctx.grid = grid
        return gather_runs(dense, runs, grid)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return scatter_runs(grad, ctx.saved_tensors[0], ctx.grid), None, None


def scatter_tiles(tiles: Tensor, index: TileIndex) -> Tensor:
    """Differentiable (B, V, T, T, C) -> (B, rows·T, columns·T, C), zero where no tile is."""
    return _Scatter.apply(tiles, index.runs(tiles.shape[2]), index.grid)


def gather_tiles(dense: Tensor, index: TileIndex) -> Tensor:
    """Differentiable (B, rows·T, columns·T, C) -> (B, V, T, T, C)."""
    return _Gather.apply(dense, index.runs(dense.shape[1] // index.grid[0]), index.grid)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, P·P·C); inside a patch rows first, then columns, then channels, as in MAE."""
    batch, channels, height, width = images.shape
    p = patch_size
    x = images.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // p) * (width // p), p * p * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: Grid) -> Tensor:
    """(B, L, P·P·C) -> (B, C, H, W): the inverse of `patchify`."""
    batch, _, width = patches.shape
    p = patch_size
    x = patches.reshape(batch, grid[0], grid[1], p, p, width // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, grid[0] * p, grid[1] * p)


def to_patches(tiles: Tensor, stride: int) -> Tensor:
    """(..., S, S, C) -> (..., S/k, S/k, k·k·C) with k the stride; inside a patch rows, then columns, then channels."""
    if stride == 1:
        return tiles
    *leading, side, _, channels = tiles.shape
    x = tiles.reshape(*leading, side // stride, stride, side // stride, stride, channels)
    return x.transpose(-4, -3).flatten(-3)


def from_patches(patches: Tensor, stride: int) -> Tensor:
    """(..., S/k, S/k, k·k·C) -> (..., S, S, C): the inverse of `to_patches`."""
    if stride == 1:
        return patches
    *leading, side, _, width = patches.shape
    x = patches.reshape(*leading, side, side, stride, stride, width // stride**2)
    return x.transpose(-4, -3).reshape(*leading, side * stride, side * stride, width // stride**2)

"""The masked layout: dense maps with removed positions zeroed where they could be seen. The reference implementation.

B images, C channels, H W positions of a map, L patches. This is the paper's second implementation of the sparse encoder
(section 3: mask before and after the convolution, no sparse library). Two places can look beyond a position, so two
places mask: the input of each depthwise convolution, and GRN's statistics. What a removed position holds in between is
never read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcmae.sparse.encoder import Layout
from fcmae.sparse.norm import layer_norm
from fcmae.sparse.response import response_scale, statistics_dtype
from fcmae.sparse.tiles import Grid, TileIndex, gather_tiles, removed_on_map


class DenseLayout(Layout):
    """Features are full maps (B, H, W, C) with every position present; what the decoder runs on."""

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        # The detour over the flat weight gives its gradient plain strides, which DDP's buckets expect.
        weight = conv.weight.flatten().view(conv.weight.shape)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y.permute(0, 2, 3, 1)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        return conv(layer_norm(x, norm).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def embed(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        return conv(images).permute(0, 2, 3, 1)

    def response_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        sum_of_squares = x.to(statistics_dtype(x.dtype)).square().sum(dim=(1, 2))
        scale = response_scale(sum_of_squares, weight, eps).to(x.dtype)
        return torch.addcmul(bias.to(x.dtype), x, scale[:, None, None])

    def drop_path(self, x: Tensor, drop: nn.Module) -> Tensor:
        return drop(x)

    def gather(self, x: Tensor) -> Tensor:
        return x


class MaskedLayout(DenseLayout):
    """Features are full maps (B, H, W, C); removed positions hold values that nothing reads."""

    def __init__(self, visible: Tensor, grid: Grid) -> None:
        self.index = TileIndex(visible, grid)
        self._removed: dict[int, Tensor] = {}  # by the side of a patch on the map: built once, not at every layer

    def visible_only(self, x: Tensor) -> Tensor:
        """(B, H, W, C) with removed positions set to 0. Filled, not multiplied: even NaN there leaves no trace."""
        side = x.shape[1] // self.index.grid[0]
        if side not in self._removed:
            self._removed[side] = removed_on_map(self.index.visible, self.index.grid, side).unsqueeze(-1)
        return x.masked_fill(self._removed[side], 0.0)

    def embed(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        return super().embed(self.visible_only(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), conv)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return super().depthwise(self.visible_only(x), conv)

    def response_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return super().response_norm(self.visible_only(x), weight, bias, eps)

    def gather(self, x: Tensor) -> Tensor:
        return gather_tiles(x, self.index)

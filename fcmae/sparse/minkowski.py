"""The minkowski layout: the paper's own sparse library, MinkowskiEngine, over the same parameters.

B images, C channels, V visible tiles, T tile side, P patch side in pixels, K kernel side, N = B·V·T·T sites. Features
are (N, C), one row per site, in the order of MinkowskiEngine's coordinate map for that tile side. Coordinates are
(image, y, x) in pixels on every map; a map's own stride says how far its sites are apart.

This is the only module that imports MinkowskiEngine; `scripts/install_minkowski.sh` builds it.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from fcmae.errors import ConfigError
from fcmae.sparse.encoder import Layout
from fcmae.sparse.norm import layer_norm
from fcmae.sparse.response import response_scale, statistics_dtype
from fcmae.sparse.tiles import Grid

try:
    with warnings.catch_warnings():
        # Built for CPUs only is what it is meant to be on most machines; a GPU without it is refused below.
        warnings.filterwarnings("ignore", message="The MinkowskiEngine was compiled with CPU_ONLY flag")
        import MinkowskiEngine as ME
        from MinkowskiEngineBackend._C import ConvolutionMode
except (ImportError, OSError) as error:
    first_line = str(error).partition("\n")[0]
    raise ConfigError(
        "layout",
        "minkowski",
        f"MinkowskiEngine does not load here ({first_line}); scripts/install_minkowski.sh builds it for this torch",
    ) from error


class _ChannelwiseConvolution(ME.MinkowskiChannelwiseConvolution):
    """Upstream's depthwise convolution as a function of its kernel; drawing one of its own would move the generator."""

    def reset_parameters(self, is_transpose: bool = False) -> None:
        pass


class _Once(torch.autograd.Function):
    """Identity that refuses `create_graph`: second derivatives by MinkowskiEngine's functions are silently wrong."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("layout minkowski has first derivatives only; use masked with create_graph=True")
        return grad


class MinkowskiLayout(Layout):
    """Features are (N, C); only visible sites exist.

    Raises:
        ConfigError: on a GPU if MinkowskiEngine was built for CPUs only.
    """

    def __init__(self, visible: Tensor, grid: Grid) -> None:
        if visible.is_cuda and not ME.is_cuda_available():
            raise ConfigError(
                "layout",
                "minkowski",
                "this MinkowskiEngine was built for CPUs only; use run.device=cpu or another layout",
            )
        self.visible = visible
        self.grid = grid
        self.manager = ME.CoordinateManager(
            D=2,
            num_threads=0,  # else it sets the thread count of the whole process
            coordinate_map_type=ME.CoordinateMapType.CUDA if visible.is_cuda else ME.CoordinateMapType.CPU,
        )
        # By tile side, which a feature matrix tells by its number of rows: a recomputed block finds its map as well.
        self._maps: dict[int, ME.CoordinateMapKey] = {}
        self._images: dict[int, Tensor] = {}
        self._matched: set[tuple[int, ...]] = set()

    def embed(self, images: Tensor, conv: nn.Conv2d) -> Tensor:
        side = images.shape[2] // self.grid[0]
        sites = self._pixels(side)
        image, y, x = sites.long().unbind(1)
        # Only the kept patches are ever read. Coordinates are given, not found by looking for non-zero pixels.
        pixels = ME.SparseTensor(images[image, :, y, x], coordinates=sites, coordinate_manager=self.manager)
        self._maps[side] = pixels.coordinate_map_key
        return self._convolve(pixels.F, conv)

    def depthwise(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        return self._convolve(x, conv)

    def downsample(self, x: Tensor, norm: nn.LayerNorm, conv: nn.Conv2d) -> Tensor:
        return self._convolve(layer_norm(x, norm), conv)

    def response_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        image = self._image(x)
        squares = x.to(statistics_dtype(x.dtype)).square()
        sum_of_squares = squares.new_zeros(len(self.visible), x.shape[1]).index_add(0, image, squares)
        scale = response_scale(sum_of_squares, weight, eps).to(x.dtype)
        return torch.addcmul(bias.to(x.dtype), x, scale.index_select(0, image))

    def drop_path(self, x: Tensor, drop: nn.Module) -> Tensor:
        if isinstance(drop, nn.Identity):
            return x
        kept = drop(x.new_ones(len(self.visible), 1))
        return x * kept.index_select(0, self._image(x))

    def gather(self, x: Tensor) -> Tensor:
        batch, count = self.visible.shape
        side, columns = self._side(len(x)), self.grid[1]
        key = self._maps[side]
        image, row, column = self.manager.get_coordinates(key).long().unbind(1)
        unit_y, unit_x = key.get_tensor_stride()
        row, column = row // unit_y, column // unit_x
        # Which of its image's visible tiles a patch is
        tiles = torch.arange(count, device=self.visible.device).expand(batch, count)
        tile = torch.zeros(batch, self.grid[0] * columns, dtype=torch.int64, device=self.visible.device)
        tile = tile.scatter(1, self.visible, tiles)[image, row // side * columns + column // side]
        packed = ((image * count + tile) * side + row % side) * side + column % side
        return x.index_select(0, packed.argsort()).view(batch, count, side, side, -1)

    def _pixels(self, side: int) -> Tensor:
        """(B·V·P·P, 3) int32: the pixels (image, y, x) of the visible patches."""
        batch, columns = len(self.visible), self.grid[1]
        line = torch.arange(side, device=self.visible.device)
        image = torch.arange(batch, device=self.visible.device).view(-1, 1, 1, 1)
        y = (self.visible // columns * side).view(batch, -1, 1, 1) + line.view(-1, 1)
        x = (self.visible % columns * side).view(batch, -1, 1, 1) + line
        return torch.stack(torch.broadcast_tensors(image, y, x), dim=-1).view(-1, 3).int()

    def _side(self, sites: int) -> int:
        """The tile side of a map with this many sites."""
        return math.isqrt(sites // self.visible.numel())

    def _image(self, x: Tensor) -> Tensor:
        """(N,) int64: the image of every row of (N, C) features."""
        side = self._side(len(x))
        if side not in self._images:
            self._images[side] = self.manager.get_coordinates(self._maps[side])[:, 0].long()
        return self._images[side]

    @torch.compiler.disable
    def _convolve(self, x: Tensor, conv: nn.Conv2d) -> Tensor:
        """`conv` over (N, C) features. MinkowskiEngine computes in float32 or float64, so under autocast this does."""
        side, dtype = self._side(len(x)), statistics_dtype(x.dtype)
        sites = self._maps[side]
        out_sites = self.manager.stride(sites, list(conv.stride))
        self._maps[self._side(self.manager.size(out_sites))] = out_sites
        generator = ME.KernelGenerator(kernel_size=list(conv.kernel_size), stride=list(conv.stride), dimension=2)
        self._match(sites, out_sites, generator, (side, *conv.kernel_size, *conv.stride))
        # Offsets are numbered with y, the first axis, varying fastest: (out, in, ky, kx) -> (kx, ky, in, out). The
        # detour over the flat weight gives its gradient plain strides, which DDP's buckets expect.
        weight = conv.weight.flatten().view(conv.weight.shape).to(dtype)
        kernel = weight.permute(3, 2, 1, 0).flatten(0, 1).contiguous()
        with torch.autocast(x.device.type, enabled=False):
            if conv.groups == 1:
                out = ME.MinkowskiConvolutionFunction.apply(
                    x.to(dtype), kernel, generator, ConvolutionMode.DEFAULT, sites, out_sites, self.manager
                )
            else:
                depthwise = _ChannelwiseConvolution(conv.in_channels, kernel_generator=generator, dimension=2)
                given = ME.SparseTensor(x.to(dtype), coordinate_map_key=sites, coordinate_manager=self.manager)
                out = torch.func.functional_call(depthwise, {"kernel": kernel.squeeze(1)}, (given,)).F
            if conv.bias is not None:
                out = out + conv.bias.to(dtype)
        return _Once.apply(out).to(x.dtype)

    def _match(
        self,
        sites: ME.CoordinateMapKey,
        out_sites: ME.CoordinateMapKey,
        generator: ME.KernelGenerator,
        key: tuple[int, ...],
    ) -> None:
        """Have the pairs of sites that a kernel joins listed by one thread, once.

        Several threads append them in the order in which they happen to run; the gradient of a kernel is a sum over the
        list, so its last bits would differ from run to run.
        """
        if key in self._matched:
            return
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.manager.kernel_map(sites, out_sites, stride=generator.kernel_stride, kernel_size=generator.kernel_size)
        finally:
            torch.set_num_threads(threads)
        self._matched.add(key)

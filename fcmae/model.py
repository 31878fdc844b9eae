"""FCMAE: mask, encode what is visible, decode, compare with the removed pixels (ConvNeXt V2 paper, section 3).

B images, C channels, H W pixels, P patch side in pixels, L patches on the grid (rows, columns), V visible patches,
T side of a patch's tile after the last stage (P / total stride; 1 for 32-pixel patches), D decoder width.
`mask` (B, L) bool is True where a patch was removed; `visible` (B, V) int64 holds the sorted ids of the kept patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fcmae import architecture
from fcmae.errors import ConfigError
from fcmae.native import plain
from fcmae.sparse.encoder import Block, Layout, adopt_blocks, encode
from fcmae.sparse.masked import DenseLayout, MaskedLayout
from fcmae.sparse.packed import PackedLayout
from fcmae.sparse.tiles import Grid, TileIndex, draw_visible, patchify, removed_mask, removed_on_map, scatter_tiles


def minkowski_layout(visible: Tensor, grid: Grid) -> Layout:
    """MinkowskiEngine is optional, so its layout is imported when it is asked for."""
    from fcmae.sparse.minkowski import MinkowskiLayout

    return MinkowskiLayout(visible, grid)


LAYOUTS: dict[str, Callable[[Tensor, Grid], Layout]] = {
    "packed": PackedLayout,
    "masked": MaskedLayout,
    "minkowski": minkowski_layout,
}


class FCMAEOutput(NamedTuple):
    """What a forward pass returns.

    loss: scalar, mean squared error over removed patches. prediction: (B, L, P·P·C), inside a patch rows, columns,
    channels; per-patch normalised if the model's `norm_pix_loss` is set. mask: (B, L) bool, True = removed.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


def create_encoder(
    size: str,
    *,
    in_chans: int = 3,
    stem_stride: int = 4,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    num_classes: int = 0,
    **timm_options: Any,
) -> ConvNeXt:
    """timm's ConvNeXt V2 of a named size, for dense use; `mini` and other strides are its class with other numbers.

    Args:
        size: one of `fcmae.architecture.SIZES`; `depths` and `dims` override its blocks and channels per stage.
        stem_stride: 4 (published), 2 or 1, for small images; the total stride is 8 times that.
        num_classes: 0 for no classifier (the final norm stays).
        timm_options: passed on, such as `drop_path_rate` and `head_init_scale`.
    """
    depths, dims = architecture.resolve_size(size, depths, dims)
    # The mini preset has no timm name of its own; the layer types (1x1 convolutions in the MLP) are atto's.
    name = "convnextv2_atto" if size == "mini" else f"convnextv2_{size}"
    if stem_stride == 1:
        timm_options["patch_size"] = 1
    model = timm.create_model(
        name, in_chans=in_chans, depths=tuple(depths), dims=tuple(dims), num_classes=num_classes, **timm_options
    )
    if stem_stride == 2:
        # timm's patch_size=2 keeps the total stride at 32 by downsampling in the first stage; ours is 16.
        model.stem[0] = nn.Conv2d(in_chans, dims[0], kernel_size=2, stride=2)
        nn.init.trunc_normal_(model.stem[0].weight, std=0.02)
        nn.init.zeros_(model.stem[0].bias)
        for info in model.feature_info:
            info["reduction"] //= 2
    return model


class FCMAE(nn.Module):
    """Fully convolutional masked autoencoder.

    `encoder` is timm's ConvNeXt V2: its state dict loads strictly into `timm.create_model(name, num_classes=0)`. Its
    final norm takes no part in pretraining and stays at identity. `layout` may be set to another name at any time.
    """

    def __init__(
        self,
        encoder: ConvNeXt,
        geometry: architecture.Geometry,
        *,
        mask_ratio: float = 0.6,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        norm_pix_loss: bool = True,
        layout: str = "packed",
    ) -> None:
        super().__init__()
        self.patch_size = geometry.patch_size
        self.grid = geometry.grid
        self.image_size = geometry.image_size
        self.in_chans = encoder.in_chans
        self.mask_ratio = mask_ratio
        self.num_visible = architecture.check_mask(mask_ratio, geometry.num_patches)
        self.norm_pix_loss = norm_pix_loss
        self.layout = layout

        self.encoder = encoder
        encoder.head.requires_grad_(False)
        self.proj = nn.Linear(encoder.num_features, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
        self.decoder = nn.Sequential(
            *(Block(decoder_dim, use_grn=True, ls_init_value=None) for _ in range(decoder_depth))
        )
        self.pred = nn.Linear(decoder_dim, geometry.total_stride**2 * self.in_chans)
        adopt_blocks(self)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    @property
    def layout(self) -> str:
        return self._layout

    @layout.setter
    def layout(self, name: str) -> None:
        architecture.check_layout(name)
        self._layout = name

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def no_weight_decay(self) -> set[str]:
        """Parameters beyond the one-dimensional ones (norms, biases, GRN) that must not decay; timm's convention."""
        return {"mask_token"}

    def draw_visible(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the kept patches of `batch` images: (B, V) int64, sorted."""
        device = self.mask_token.device
        return draw_visible(batch, self.num_patches, self.num_visible, generator, device).to(device)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """(B, C, H, W) normalised images and (B, V) patch ids -> (B, V, T, T, C) features of the last stage.

        Raises:
            ValueError: if the shapes are not this model's.
        """
        expected = (self.in_chans, *self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; this model takes (B, {', '.join(map(str, expected))})"
            )
        if visible.ndim != 2 or visible.shape[0] != images.shape[0] or visible.dtype != torch.int64:
            raise ValueError(
                f"visible is {visible.dtype} of shape {tuple(visible.shape)}; "
                f"it must be int64 (B, V) with B={images.shape[0]}"
            )
        if visible.numel() == 0:
            raise ValueError(f"visible has shape {tuple(visible.shape)}; a batch needs an image and a visible patch")
        # A look costs nothing on a CPU, but a wait for the device elsewhere.
        if plain(visible) and not torch.compiler.is_compiling():
            ids = visible.sort(dim=1).values
            if ids[:, 0].min() < 0 or ids[:, -1].max() >= self.num_patches or not (ids.diff(dim=1) > 0).all():
                raise ValueError(f"visible must hold different patch ids from 0 to {self.num_patches - 1} per image")
        return encode(self.encoder, images, LAYOUTS[self._layout](visible, self.grid))

    def forward_decoder(self, features: Tensor, visible: Tensor) -> Tensor:
        """(B, V, T, T, C) features -> (B, L, P·P·C) predicted pixels; removed positions start from the mask token."""
        x = scatter_tiles(self.proj(features), TileIndex(visible, self.grid))
        removed = removed_on_map(visible, self.grid, x.shape[1] // self.grid[0])
        x = torch.where(removed.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        dense = DenseLayout()
        for block in self.decoder:
            x = block(x, dense)
        x = self.pred(x)
        # Each position predicts the S x S pixels below it (S the total stride); a patch is T x T positions.
        batch, height = x.shape[:2]
        rows, columns = self.grid
        tile, stride = height // rows, self.patch_size // (height // rows)
        x = x.view(batch, rows, tile, columns, tile, stride, stride, self.in_chans)
        return x.permute(0, 1, 3, 2, 5, 4, 6, 7).reshape(batch, rows * columns, -1)

    def target(self, images: Tensor) -> Tensor:
        """What the prediction is compared with: (B, L, P·P·C) pixels, per-patch normalised if `norm_pix_loss`."""
        target = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            mean = target.mean(dim=-1, keepdim=True)
            variance = target.var(dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    def forward_loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error per removed patch, in at least float32."""
        dtype = torch.promote_types(images.dtype, torch.float32)
        error = (prediction.to(dtype) - self.target(images.to(dtype))).square().mean(dim=-1)
        return (error * mask).sum() / mask.sum()

    def forward(
        self, images: Tensor, visible: Tensor | None = None, generator: torch.Generator | None = None
    ) -> FCMAEOutput:
        """One pretraining pass.

        Args:
            images: (B, C, H, W) float, normalised.
            visible: (B, V) int64 sorted ids of the patches to keep; None draws them from `generator`.

        Raises:
            ValueError: if the shapes are not this model's.
        """
        if visible is None:
            visible = self.draw_visible(images.shape[0], generator)
        if visible.ndim == 2 and visible.shape[1] >= self.num_patches:
            raise ValueError(f"visible holds all {self.num_patches} patches; the loss needs a removed one")
        prediction = self.forward_decoder(self.encode(images, visible), visible)
        mask = removed_mask(visible, self.num_patches)
        return FCMAEOutput(self.forward_loss(images, prediction, mask), prediction, mask)


def init_weights(module: nn.Module) -> None:
    """Truncated normal of std 0.02 for every convolution and linear layer, zero bias; norms and GRN keep their own."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_model(
    size: str,
    *,
    image_size: int | Sequence[int] = 224,
    patch_size: int = 32,
    in_chans: int = 3,
    mask_ratio: float = 0.6,
    decoder_dim: int = 512,
    decoder_depth: int = 1,
    norm_pix_loss: bool = True,
    layout: str = "packed",
    stem_stride: int = 4,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
) -> FCMAE:
    """An FCMAE around a ConvNeXt V2 of one of the published sizes (atto … huge) or `mini`.

    Args:
        image_size: pixels, an int or (height, width), multiples of `patch_size`.
        patch_size: side of a masked patch in pixels, a multiple of the total stride 8 * `stem_stride`.
        mask_ratio: share of patches removed, in (0, 1).
        decoder_dim, decoder_depth: width and number of the decoder's blocks.
        norm_pix_loss: compare with per-patch normalised pixels.
        layout: how visible positions are stored, "packed", "masked" or "minkowski"; changes speed, not results.
        depths, dims: blocks and channels of the four stages, overriding those of `size`.

    Raises:
        ConfigError: a ValueError naming the argument, its value and what is allowed.
    """
    geometry = architecture.check_geometry(image_size, patch_size, stem_stride, prefix="")
    architecture.check_mask(mask_ratio, geometry.num_patches, prefix="")
    architecture.resolve_size(size, depths, dims, prefix="")
    for name, value, least in (
        ("in_chans", in_chans, 1),
        ("decoder_dim", decoder_dim, 1),
        ("decoder_depth", decoder_depth, 0),
    ):
        if value < least:
            raise ConfigError(name, value, f"must be at least {least}")
    encoder = create_encoder(size, in_chans=in_chans, stem_stride=stem_stride, depths=depths, dims=dims)
    return FCMAE(
        encoder,
        geometry,
        mask_ratio=mask_ratio,
        decoder_dim=decoder_dim,
        decoder_depth=decoder_depth,
        norm_pix_loss=norm_pix_loss,
        layout=layout,
    )

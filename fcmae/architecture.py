"""The model family as numbers, and what makes a combination of sizes impossible. Free of torch, so that options can be
checked before it is imported.

L = grid rows x grid columns patches. A patch is a tile at every stage, so its side must be a multiple of the encoder's
total stride: stem stride 4, 2 or 1, times 8 for the three downsamplings.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from fcmae.errors import ConfigError

# blocks per stage, channels of each stage (ConvNeXt V2 paper, appendix A); mini is ours, for demos, tests, CPU studies
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mini": ((1, 1, 2, 1), (16, 32, 64, 128)),
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "huge": ((3, 3, 27, 3), (352, 704, 1408, 2816)),
}
LAYOUTS = ("packed", "masked", "minkowski")
STEM_STRIDES = (1, 2, 4)


@dataclass(frozen=True)
class Geometry:
    """How images divide into patches and tiles."""

    image_size: tuple[int, int]
    patch_size: int
    stem_stride: int

    @property
    def total_stride(self) -> int:
        return self.stem_stride * 8

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]


def pair(value: object, key: str = "model.image_size") -> tuple[int, int]:
    """An image size given as an int or as [height, width]."""
    sides = [value, value] if isinstance(value, int) else value
    try:
        height, width = sides  # type: ignore[misc]
    except (TypeError, ValueError):
        height = width = None
    if not all(type(side) is int and side > 0 for side in (height, width)):
        raise ConfigError(key, value, "must be a positive integer or [height, width]")
    return height, width  # type: ignore[return-value]


def resolve_size(
    size: str, depths: object = None, dims: object = None, prefix: str = "model."
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and channels per stage of a named size, with `depths` and `dims` overriding it."""
    if size not in SIZES:
        raise ConfigError(f"{prefix}size", size, f"must be one of {', '.join(SIZES)}")

    def stages(name: str, value: object, default: tuple[int, ...]) -> tuple[int, ...]:
        if value is None:
            return default
        numbers: tuple[Any, ...] = tuple(cast(Any, value))
        if len(numbers) != 4 or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ConfigError(f"{prefix}{name}", value, "must be four positive integers, one per stage")
        return numbers

    return stages("depths", depths, SIZES[size][0]), stages("dims", dims, SIZES[size][1])


def check_geometry(image_size: object, patch_size: int, stem_stride: int, prefix: str = "model.") -> Geometry:
    """Validate image size, patch size and stem stride against each other."""
    height, width = pair(image_size, f"{prefix}image_size")
    if stem_stride not in STEM_STRIDES:
        raise ConfigError(f"{prefix}stem_stride", stem_stride, "must be 1, 2 or 4")
    geometry = Geometry((height, width), patch_size, stem_stride)
    if patch_size <= 0 or patch_size % geometry.total_stride:
        raise ConfigError(
            f"{prefix}patch_size",
            patch_size,
            f"must be a multiple of the encoder's total stride, {geometry.total_stride} "
            f"(8 × {prefix}stem_stride={stem_stride})",
        )
    if height % patch_size or width % patch_size:
        raise ConfigError(
            f"{prefix}image_size", image_size, f"height and width must be multiples of {prefix}patch_size={patch_size}"
        )
    return geometry


def check_mask(mask_ratio: float, num_patches: int, prefix: str = "model.") -> int:
    """Validate the mask ratio and return the number of visible patches per image."""
    if not 0.0 < mask_ratio < 1.0:
        raise ConfigError(f"{prefix}mask_ratio", mask_ratio, "must be greater than 0 and less than 1")
    visible = num_visible(num_patches, mask_ratio)
    if not 0 < visible < num_patches:
        raise ConfigError(
            f"{prefix}mask_ratio",
            mask_ratio,
            f"leaves {visible} of {num_patches} patches visible; at least one must be visible and one removed",
        )
    return visible


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches per image, int(L * (1 - ratio)) (paper section 3), free of the rounding of 1 - ratio."""
    return int(num_patches * (1.0 - mask_ratio) + 1e-9)


def check_layout(layout: str, prefix: str = "") -> None:
    """Validate the layout's name, and that the library it needs is there."""
    if layout not in LAYOUTS:
        raise ConfigError(f"{prefix}layout", layout, f"must be one of {', '.join(LAYOUTS)}")
    if layout == "minkowski" and find_spec("MinkowskiEngine") is None:
        raise ConfigError(
            f"{prefix}layout", layout, "MinkowskiEngine is not installed; scripts/install_minkowski.sh builds it"
        )

"""Pictures of what a model reconstructs: original | masked | reconstruction.

B images, C channels, H W pixels, L patches, P patch side.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fcmae.data.augment import CentreView
from fcmae.data.loader import UNITS, Samples, denormalise, normalise
from fcmae.data.reader import ShardReader
from fcmae.files import written_whole
from fcmae.model import FCMAE
from fcmae.sparse.tiles import patchify, unpatchify

GREY = 0.5
TITLES = ("original", "masked", "reconstruction")


@torch.no_grad()
def reconstruct(model: FCMAE, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The masked images and their reconstructions, in the normalisation of the input.

    A model trained on per-patch normalised pixels predicts only the pattern of a patch; its mean and deviation are
    taken from the image. Visible patches are pasted back: the model is not asked to predict them.

    Args:
        images: (B, C, H, W), normalised. visible: (B, V) int64.

    Returns:
        masked (B, C, H, W), removed patches NaN, and reconstruction (B, C, H, W).
    """
    was_training = model.training
    model.eval()
    output = model(images, visible)
    model.train(was_training)
    patches = patchify(images.float(), model.patch_size)
    predicted = output.prediction.float()
    if model.norm_pix_loss:
        variance = patches.var(dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    removed = output.mask.unsqueeze(-1)
    masked = torch.where(removed, torch.nan, patches)
    pasted = torch.where(removed, predicted, patches)
    return unpatchify(masked, model.patch_size, model.grid), unpatchify(pasted, model.patch_size, model.grid)


def write_reconstructions(
    model: FCMAE,
    reader: ShardReader,
    path: Path,
    *,
    mean: list[float],
    std: list[float],
    seed: int = 0,
    count: int = 12,
    skip: bool = False,
) -> None:
    """Write a PNG of `count` images of a split, spread over it, each as original | masked | reconstruction.

    skip: images that cannot be used are replaced, as in training.
    """
    ids = np.linspace(0, len(reader.index) - 1, min(count, len(reader.index))).round().astype(np.int64)
    samples = Samples(reader, CentreView(model.image_size), model.in_chans, seed, model.num_patches, model.num_visible)
    others = partial(_another, len(reader.index))
    batch = samples.batch(0, ids, [] if skip else None, others)
    device = model.mask_token.device
    images = normalise(batch["image"].to(device), mean, std)
    masked, reconstruction = reconstruct(model, images, batch["visible"].to(device))
    hidden = masked.isnan()
    if batch["image"].dtype not in UNITS:  # numbers without a range of their own: two deviations about the mean
        mean, std = [0.5] * model.in_chans, [0.25] * model.in_chans
    original, masked, reconstruction = (
        denormalise(x, mean, std).cpu() for x in (images, masked.nan_to_num(), reconstruction)
    )
    save_rows([original, masked.masked_fill(hidden.cpu(), round(GREY * 255)), reconstruction], path)


def _another(count: int, epoch: int, sample: int, attempt: int) -> int:
    """Who is shown instead of a sample that cannot be: the next in the index."""
    return (sample + attempt + 1) % count


def save_rows(columns: list[Tensor], path: Path, groups: int = 2) -> None:
    """Write uint8 images (B, C, H, W), one tensor per column, as titled rows, `groups` of them side by side.

    Of more than three channels the first three are shown as colours, of fewer the first as grey.
    """
    count, channels, height, width = columns[0].shape
    zoom = -(-112 // width)
    gap, top = 6, 18
    groups = min(groups, count)
    lines = -(-count // groups)
    cell_w, cell_h = width * zoom + gap, height * zoom + gap
    group_w = cell_w * len(columns) + 2 * gap
    canvas = Image.new("RGB", (group_w * groups - gap, top + cell_h * lines + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for group in range(groups):
        for column, title in enumerate(TITLES[: len(columns)]):
            draw.text((gap + group * group_w + column * cell_w, 3), title, fill="black")
    for number in range(count):
        group, line = divmod(number, lines)
        for column, images in enumerate(columns):
            pixels = images[number].permute(1, 2, 0).numpy()
            pixels = pixels[..., :1].repeat(3, axis=2) if channels < 3 else pixels[..., :3]
            tile = Image.fromarray(np.ascontiguousarray(pixels))
            tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            canvas.paste(tile, (gap + group * group_w + column * cell_w, top + line * cell_h))
    with written_whole(path) as temporary:
        canvas.save(temporary, "PNG")

"""Augmentation of supervised training: RandAugment per image; erasing, mixup and cutmix per batch. All timm's."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from fcmae.data.augment import TrainView
from fcmae.data.decode import Picture
from finetune.settings import AugmentConfig


@dataclass
class AugmentedView:
    """RandomResizedCrop and flip, then RandAugment in timm's notation; what moves in has the mean colour."""

    crop: TrainView
    rand_augment: str | None
    mean: list[float]
    _augment: RandAugment | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.rand_augment is not None:
            fill = tuple(min(255, round(255 * value)) for value in self.mean)
            options: dict[str, Any] = {
                "translate_const": int(min(self.crop.size) * 0.45),
                "img_mean": fill if len(fill) > 1 else fill[0],
                "interpolation": Image.Resampling.BICUBIC,
            }
            if "mmax" not in self.rand_augment:
                # Just short of 10, where timm asks to posterise to 0 bits, which Pillow 13 refuses.
                options["magnitude_max"] = 9.99
            self._augment = rand_augment_transform(self.rand_augment, options)

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Tensor:
        view = self.crop(picture, rng)
        if self._augment is None:
            return view
        image = Image.fromarray(view.permute(1, 2, 0).squeeze(2).contiguous().numpy())
        # timm draws from the global generators. They are seeded from the sample's own and put back, so that an image
        # depends on its sample alone and a step on its number alone, in whichever process the image was made.
        python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
        try:
            first, second = rng.integers(0, 2**32, size=2)
            random.seed(int(first))
            np.random.seed(int(second))  # noqa: NPY002
            image = self._augment(image)
            return torch.from_numpy(np.array(image).reshape(*view.shape[1:], -1)).permute(2, 0, 1)
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


class BatchAugment:
    """Erasing and mixing of normalised batches on the device, and the loss that fits the targets."""

    def __init__(self, config: AugmentConfig, num_classes: int, device: torch.device) -> None:
        self.erase = (
            RandomErasing(config.random_erasing, mode="pixel", device=str(device))
            if config.random_erasing > 0
            else None
        )
        self.mix = None
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(config.label_smoothing)
        if config.mixes:
            self.mix = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                label_smoothing=config.label_smoothing,
                num_classes=num_classes,
            )
            self.criterion = SoftTargetCrossEntropy()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float and (B,) int64 -> images and targets, (B,) or mixed (B, classes)."""
        if self.erase is not None:
            images = self.erase(images)
        return (images, labels) if self.mix is None else self.mix(images, labels)

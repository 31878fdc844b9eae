"""The options of `python -m finetune.train` as typed dataclasses. Free of torch: a mistake is answered at once.

What is left at null under `model` and `data` is taken from the run behind `checkpoint`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fcmae import architecture
from fcmae.data.index import read_index
from fcmae.recorded import recorded_settings
from fcmae.settings import (
    DEMO,
    DataConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    check_batch_fits,
    launched_ranks,
    require,
)


@dataclass
class ClassifierConfig:
    """The dense ConvNeXt V2; null means as the checkpoint has it."""

    size: str | None = None
    image_size: Any = None
    in_chans: int | None = None
    stem_stride: int | None = None
    depths: list[int] | None = None
    dims: list[int] | None = None
    drop_path: float = 0.1
    head_init_scale: float = 0.001

    def validate(self) -> None:
        require(self.size is not None, "model.size", "null", "choose one, as in model=atto, or give a checkpoint")
        architecture.resolve_size(str(self.size), self.depths, self.dims)
        height, width = architecture.pair(self.image_size)
        require(
            self.stem_stride in architecture.STEM_STRIDES, "model.stem_stride", self.stem_stride, "must be 1, 2 or 4"
        )
        stride = 8 * int(self.stem_stride or 4)
        require(
            height >= stride and width >= stride,
            "model.image_size",
            self.image_size,
            f"must be at least the encoder's total stride, {stride}",
        )
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "must be in [0, 1)")
        require(self.head_init_scale > 0, "model.head_init_scale", self.head_init_scale, "must be positive")


@dataclass
class AugmentConfig:
    """Augmentation and target smoothing of supervised training."""

    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.1
    random_erasing: float = 0.25

    @property
    def mixes(self) -> bool:
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def validate(self) -> None:
        for name in ("mixup", "cutmix"):
            require(
                getattr(self, name) >= 0, f"augment.{name}", getattr(self, name), "must be at least 0 (0 turns it off)"
            )
        for name in ("mixup_prob", "mixup_switch_prob", "random_erasing"):
            require(0 <= getattr(self, name) <= 1, f"augment.{name}", getattr(self, name), "must be in [0, 1]")
        require(0 <= self.label_smoothing < 1, "augment.label_smoothing", self.label_smoothing, "must be in [0, 1)")
        if self.rand_augment is not None:
            require(
                re.fullmatch(r"rand(-(m|n|p|mstd|mmax|inc)[0-9.]+|-mstdinf|-t[a-z0-9]+)+", self.rand_augment)
                is not None,
                "augment.rand_augment",
                self.rand_augment,
                "must be null or timm's notation, such as rand-m9-mstd0.5-inc1",
            )


@dataclass
class EmaConfig:
    """Moving average of the weights; `decay=null` for none. `warmup` lets short runs use a smaller decay at first."""

    decay: float | None = 0.9999
    warmup: bool = False

    def validate(self) -> None:
        if self.decay is not None:
            require(0 < self.decay < 1, "ema.decay", self.decay, "must be in (0, 1), or null for no average")


@dataclass
class EvalConfig:
    """How often and how the validation split is measured."""

    every_epochs: int = 1
    batch_size: int = 128
    crop_share: float = 0.875

    def validate(self) -> None:
        for name in ("every_epochs", "batch_size"):
            require(getattr(self, name) >= 1, f"eval.{name}", getattr(self, name), "must be at least 1")
        require(0 < self.crop_share <= 1, "eval.crop_share", self.crop_share, "must be in (0, 1]")


@dataclass
class FinetuneConfig:
    """Everything `python -m finetune.train` takes."""

    checkpoint: str | None = None
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(train=None, crop_scale=[0.08, 1.0]))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(base_lr=8e-4, epochs=100, warmup_epochs=5, betas=[0.9, 0.999])
    )
    layer_decay: float | None = 0.9
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(dir="runs/finetune"))
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self) -> None:
        """Take over what the checkpoint knows and raise ConfigError at the first setting that cannot be."""
        self._inherit()
        for part in (self.model, self.augment, self.ema, self.eval, self.run, self.tracking):
            part.validate()
        if self.layer_decay is not None:
            require(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "must be in (0, 1], or null for none")
        ranks = launched_ranks()
        self.optim.validate(ranks)
        micro_batch = self.optim.batch_size // (ranks * self.optim.accumulate)
        require(
            not self.augment.mixes or micro_batch % 2 == 0,
            "optim.batch_size",
            self.optim.batch_size,
            "mixup and cutmix mix pairs: batch_size / (ranks × accumulate) must be even",
        )
        require(
            self.data.train is not None,
            "data.train",
            "null",
            "choose a data set, as in data=demo, or the checkpoint of a run",
        )
        channels = int(self.model.in_chans or 3)
        require(
            self.augment.rand_augment is None or channels in (1, 3),
            "augment.rand_augment",
            self.augment.rand_augment,
            f"must be null with model.in_chans={channels}: its operations are made for grey or RGB",
        )
        self.data.validate(channels, self.optim.batch_size)
        self._check_labels()
        check_batch_fits(self.optim.batch_size, self.data)

    def _inherit(self) -> None:
        """Fill what is null from the run behind `checkpoint`, then from the published defaults."""
        recorded = recorded_settings(self.checkpoint) if self.checkpoint is not None else {}
        model, data = recorded.get("model", {}), recorded.get("data", {})
        for name in ("size", "image_size", "in_chans", "stem_stride", "depths", "dims"):
            if getattr(self.model, name) is None:
                setattr(self.model, name, model.get(name))
        if self.data.train is None:
            self.data.train = data.get("train")
            if self.data.val == "auto":
                self.data.val = data.get("val", "auto")
            standard = DataConfig()
            for name in ("read", "cache_dir", "cache_gb"):  # how it is read there; not what it may run
                if getattr(self.data, name) == getattr(standard, name):
                    setattr(self.data, name, data.get(name, getattr(standard, name)))
        for name in ("mean", "std"):
            if getattr(self.data, name) is None:
                setattr(self.data, name, data.get(name))
        for name, value in (("image_size", 224), ("in_chans", 3), ("stem_stride", 4)):
            if getattr(self.model, name) is None:
                setattr(self.model, name, value)

    def _check_labels(self) -> None:
        """Every image of both splits needs a label, and both splits the same classes."""
        classes: dict[str, list[str]] = {}
        for split in ("train", "val"):
            source = self.data.split(split)
            if source in (None, DEMO):
                continue
            index = read_index(str(source), self.data.storage)
            require(
                len(index) > 0 and int(index.label.min()) >= 0,
                f"data.{split}",
                source,
                "holds images without a label; fine-tuning needs a class for every image",
            )
            require(
                int(index.label.max()) < index.num_classes,
                f"data.{split}",
                source,
                f"holds label {int(index.label.max())} but only {index.num_classes} class names",
            )
            classes[split] = index.classes
        if len(classes) == 2:
            require(
                classes["train"] == classes["val"],
                "data.val",
                self.data.split("val"),
                f"must have the same classes in the same order as data.train={self.data.train}",
            )

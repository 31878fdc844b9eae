"""The options of a run as typed dataclasses, with what each may be. Free of torch: a mistake is answered at once.

Configuration files in conf/ set the defaults; `fcmae.configuration` turns what Hydra composed into these classes.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fcmae import architecture
from fcmae.architecture import Geometry
from fcmae.data.storage import Storage, default_cache, exists, is_remote
from fcmae.errors import ConfigError, DataError

DEMO = "demo"
READS = ("auto", "ahead", "cache")
BLOCKS_CACHED = 2  # fetched ahead, and begun; besides those over which the batches in work are spread


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(key, value, allowed)


def launched_ranks() -> int:
    """Number of processes the launcher (torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@dataclass
class ModelConfig:
    """Arguments of `fcmae.create_model`."""

    size: str = "atto"
    image_size: Any = 224
    patch_size: int | None = None
    in_chans: int = 3
    mask_ratio: float = 0.6
    decoder_dim: int = 512
    decoder_depth: int = 1
    norm_pix_loss: bool = True
    layout: str = "packed"
    stem_stride: int = 4
    depths: list[int] | None = None
    dims: list[int] | None = None

    @property
    def patch(self) -> int:
        """Patch side in pixels; by default one position of the last stage, 32 for the published stem."""
        return 8 * self.stem_stride if self.patch_size is None else self.patch_size

    def validate(self) -> Geometry:
        architecture.resolve_size(self.size, self.depths, self.dims)
        geometry = architecture.check_geometry(self.image_size, self.patch, self.stem_stride)
        architecture.check_mask(self.mask_ratio, geometry.num_patches)
        architecture.check_layout(self.layout, "model.")
        require(self.in_chans >= 1, "model.in_chans", self.in_chans, "must be at least 1")
        require(self.decoder_dim >= 1, "model.decoder_dim", self.decoder_dim, "must be at least 1")
        require(self.decoder_depth >= 0, "model.decoder_depth", self.decoder_depth, "must be at least 0")
        return geometry


@dataclass
class DataConfig:
    """Where images come from and how a training view is cut from one."""

    train: str | None = DEMO
    val: str | None = "auto"
    workers: int = 2
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    hflip: bool = True
    mean: list[float] | None = None
    std: list[float] | None = None
    block_shards: int = 16
    on_error: str = "raise"
    max_bad_fraction: float = 0.01
    read: str = "auto"
    cache_dir: str | None = None
    cache_gb: float = 100
    allow_pipe: bool = False

    @property
    def storage(self) -> Storage:
        folder = default_cache() if self.cache_dir is None else Path(self.cache_dir).expanduser()
        # No more than a block's: what is open cannot leave the cache.
        return Storage(self.read, folder, int(self.cache_gb * 1e9), min(64, self.block_shards), self.allow_pipe)

    def validate(self, in_chans: int, batch_size: int) -> None:
        """Raise ConfigError at the first setting that cannot be, or shard that is not what its index says."""
        self.validate_settings(in_chans)
        for split in ("train", "val"):
            extensions = None
            if self.split(split) not in (None, DEMO):
                extensions = self.check_shards(split, batch_size)
            require(
                in_chans in (1, 3) or self.split(split) is None or extensions == [".npy"],
                "model.in_chans",
                in_chans,
                f"image files, as in data.{split}={self.split(split)}, hold 1 (grey) or 3 (RGB) channels; "
                "other numbers need shards of .npy arrays",
            )

    def validate_settings(self, in_chans: int) -> None:
        """Without looking at the shards."""
        require(self.workers >= 0, "data.workers", self.workers, "must be at least 0")
        require(self.block_shards >= 1, "data.block_shards", self.block_shards, "must be at least 1")
        require(self.on_error in ("raise", "skip"), "data.on_error", self.on_error, "must be raise or skip")
        require(
            0 <= self.max_bad_fraction < 1,
            "data.max_bad_fraction",
            self.max_bad_fraction,
            "must be at least 0 and below 1",
        )
        require(self.read in READS, "data.read", self.read, f"must be one of {', '.join(READS)}")
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "must be positive")
        low_high = self.crop_scale
        require(
            len(low_high) == 2 and 0 < low_high[0] <= low_high[1] <= 1,
            "data.crop_scale",
            low_high,
            "must be two shares of the image's area, 0 < low <= high <= 1",
        )
        for name, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is not None:
                require(
                    len(numbers) == in_chans and all(math.isfinite(n) for n in numbers),
                    f"data.{name}",
                    numbers,
                    f"must be {in_chans} finite numbers, one per channel (pixels in 0–1)",
                )
        if self.std is not None:
            require(min(self.std) > 0, "data.std", self.std, "must be positive")
        require(self.train is not None, "data.train", "null", "must name a folder of shards, its index file, or demo")

    def check_shards(self, split: str, batch_size: int) -> list[str]:
        """Raise unless a split's index and every shard it lists are there, in full size; returns the extensions.

        Of shards elsewhere only the index is read, and the cache compared; `python -m fcmae.doctor` looks at them.
        """
        from fcmae.data.index import read_index  # numpy only, and not needed for the demo data

        key, path = f"data.{split}", str(self.split(split))
        try:
            index = read_index(path, self.storage)
            index.check_files()
        except DataError as error:
            raise ConfigError(key, path, str(error)) from error
        if self.read == "cache" or is_remote(path) or any(map(is_remote, index.shards)):
            sizes = index.shard_bytes
            images = max(1, self.block_shards * len(index) // max(1, len(sizes)))  # of a block
            in_work = max(1, self.workers) * batch_size if split == "train" else 1
            blocks = BLOCKS_CACHED + math.ceil(in_work / images)
            least = math.ceil(min(int(sizes.sum()), blocks * self.block_shards * int(sizes.max())) / 1e6) / 1e3
            require(
                self.cache_gb >= least,  # in a few digits, and enough
                "data.cache_gb",
                self.cache_gb,
                f"must be at least {least:g}, {blocks} × data.block_shards={self.block_shards} of the shards of "
                f"{key}={path}, over which batches of {self.workers} workers and what is fetched ahead are spread",
            )
        return index.extensions

    def split(self, name: str) -> str | None:
        """The folder (or DEMO) a split is read from; `data.val=auto` is the folder `val` beside the training shards."""
        value = self.train if name == "train" else self.val
        if name == "val" and value == "auto":
            if self.train == DEMO:
                return DEMO
            if is_remote(str(self.train)):
                return self._val_beside_url(str(self.train))
            train = Path(str(self.train)).expanduser().resolve()
            beside = (train.parent if train.suffix == ".safetensors" else train).parent / "val"
            return str(beside) if (beside / "index.safetensors").is_file() else None
        return value

    def _val_beside_url(self, train: str) -> str | None:
        parent = train.rstrip("/").removesuffix("/index.safetensors").rsplit("/", 1)[0]
        try:
            self.storage.check(train)
            if not re.match(r"\w+://[^/]", parent):  # beside a bucket or a host there are those of others
                return None
            return f"{parent}/val" if exists(f"{parent}/val/index.safetensors") else None
        except DataError as error:
            raise ConfigError("data.val", "auto", str(error)) from error

    def statistics(self, in_chans: int) -> tuple[list[float], list[float]]:
        """Per-channel mean and standard deviation of pixels in 0–1: as set, else ImageNet's for RGB, 0.5 for grey."""
        imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        mean, std = imagenet if in_chans == 3 else ([0.5] * in_chans, [0.5] * in_chans)
        return self.mean or mean, self.std or std


@dataclass
class OptimConfig:
    """The optimiser's schedule. `batch_size` is what one optimiser step sees, over all ranks and accumulation."""

    batch_size: int = 128
    accumulate: int = 1
    lr: float | None = None
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    epochs: int = 800
    warmup_epochs: float = 40
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_grad: float | None = None

    @property
    def absolute_lr(self) -> float:
        """`lr` if set, else `base_lr` scaled linearly with the batch, base_lr * batch_size / 256."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 256

    def validate(self, ranks: int) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("accumulate", self.accumulate, 1),
            ("epochs", self.epochs, 1),
        ):
            require(value >= least, f"optim.{name}", value, f"must be at least {least}")
        require(
            self.batch_size % (ranks * self.accumulate) == 0,
            "optim.batch_size",
            self.batch_size,
            f"must be a multiple of ranks × optim.accumulate = {ranks} × {self.accumulate}",
        )
        if self.lr is not None:
            require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        require(self.base_lr > 0, "optim.base_lr", self.base_lr, "must be positive")
        require(
            0 <= self.min_lr <= self.absolute_lr,
            "optim.min_lr",
            self.min_lr,
            f"must be between 0 and the peak learning rate, {self.absolute_lr:.3g}",
        )
        require(
            0 <= self.warmup_epochs < self.epochs,
            "optim.warmup_epochs",
            self.warmup_epochs,
            f"must be at least 0 and less than optim.epochs={self.epochs}",
        )
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "must be at least 0")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            self.betas,
            "must be two numbers in [0, 1)",
        )
        if self.clip_grad is not None:
            require(self.clip_grad > 0, "optim.clip_grad", self.clip_grad, "must be positive, or null for none")


@dataclass
class RunConfig:
    """Where a run lives, how long it goes on and on what. `name` only serves the default of `dir`."""

    name: str = "run"
    dir: str = "runs/pretrain"
    seed: int = 0
    resume: str = "auto"
    max_steps: int | None = None
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    log_every: int = 10
    picture_every: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    debug: bool = False

    def validate(self) -> None:
        require(bool(self.dir), "run.dir", repr(self.dir), "must name a folder")
        require(0 <= self.seed < 2**32, "run.seed", self.seed, "must be an integer in [0, 2^32)")
        for name in ("max_steps", "picture_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"run.{name}", value, "must be at least 1, or null")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, f"run.{name}", getattr(self, name), "must be at least 1")
        require(self.precision in ("fp32", "bf16"), "run.precision", self.precision, "must be fp32 or bf16")
        check_device("run.device", self.device)
        folder = Path(self.dir)
        require(not folder.exists() or folder.is_dir(), "run.dir", self.dir, "exists and is not a folder")
        if self.resume not in ("auto", "never"):
            source = Path(self.resume)
            require(
                (source / "state.json").is_file() or any(source.glob("checkpoints/step-*/state.json")),
                "run.resume",
                self.resume,
                "must be auto, never, or the path of a run or checkpoint folder with a complete checkpoint",
            )
        if self.resume == "never":
            require(
                not any(folder.glob("checkpoints/step-*")) and not (folder / "metrics.jsonl").exists(),
                "run.resume",
                self.resume,
                f"run.dir={self.dir} already holds a run; continue it with run.resume=auto or choose another run.dir",
            )


def check_device(key: str, name: str) -> None:
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is not None
    require(known, key, name, "must be auto, cpu, cuda or cuda:N")
    require(
        ":" not in name or launched_ranks() == 1,
        key,
        name,
        "under torchrun each rank takes its own GPU; allowed: auto, cuda",
    )


@dataclass
class TrackingConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    wandb: str = "disabled"
    project: str = "fcmae"
    entity: str | None = None
    name: str | None = None

    def validate(self) -> None:
        modes = ("disabled", "offline", "online")
        require(self.wandb in modes, "tracking.wandb", self.wandb, f"must be one of {', '.join(modes)}")


@dataclass
class PretrainConfig:
    """Everything `python -m fcmae.pretrain` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def validate(self) -> None:
        """Raise ConfigError at the first setting that cannot be."""
        self.model.validate()
        self.run.validate()
        self.tracking.validate()
        self.optim.validate(launched_ranks())
        self.data.validate(self.model.in_chans, self.optim.batch_size)
        require(
            not self.run.compile or self.model.layout != "minkowski",
            "run.compile",
            "true",
            "model.layout=minkowski cannot be compiled; packed and masked can",
        )
        check_batch_fits(self.optim.batch_size, self.data)


def check_batch_fits(batch_size: int, data: DataConfig) -> None:
    """Raise if one batch is larger than the training set, which would leave no step in an epoch."""
    from fcmae.data.index import split_size

    images = split_size(data.split("train"), data.storage)
    require(
        batch_size <= images,
        "optim.batch_size",
        batch_size,
        f"must be at most the number of training images, {images:,} in data.train={data.train}",
    )

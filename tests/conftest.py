"""Fixtures shared by the tests: small images, shards and runs, made in temporary folders."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fcmae.data.writer import write_shards

torch.set_num_threads(2)


def png(rng: np.random.Generator, height: int = 24, width: int = 20, channels: int = 3) -> bytes:
    """A PNG of random smooth pixels."""
    coarse = rng.integers(0, 256, size=(5, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    (image if channels == 3 else image.convert("L")).save(buffer, "PNG")
    return buffer.getvalue()


def make_split(
    folder: Path, count: int, seed: int = 0, classes: int = 3, per_shard: int = 16, channels: int = 3
) -> Path:
    """Shards of `count` random images with labels 0, 1, … in turn."""
    rng = np.random.default_rng(seed)
    samples = ((f"{i:06d}", "png", png(rng, channels=channels), i % classes) for i in range(count))
    write_shards(samples, folder, samples_per_shard=per_shard, classes=[f"class {i}" for i in range(classes)])
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` (72 images in 5 shards) and `val` (20 images), 3 classes."""
    folder = tmp_path_factory.mktemp("shards")
    make_split(folder / "train", 72)
    make_split(folder / "val", 20, seed=1)
    return folder


def run_module(
    module: str, *arguments: str, cwd: Path, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python -m module arguments` and return its exit code and output."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def tiny_run(shards: Path, *extra: str) -> list[str]:
    """Overrides of a pretraining run of a few seconds: 24-pixel images in 3×3 patches, 6 steps of 24 images."""
    return [
        f"data.train={shards / 'train'}",
        "model=mini",
        "model.dims=[4,8,8,8]",
        "model.depths=[1,1,1,1]",
        "model.image_size=24",
        "model.decoder_dim=16",
        "optim.batch_size=24",
        "optim.epochs=2",
        "optim.warmup_epochs=0",
        "data.workers=0",
        "run.log_every=1",
        "run.picture_every=null",
        "run.device=cpu",
        *extra,
    ]

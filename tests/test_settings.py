"""Options that depend on where the data lies."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from fcmae.convert import save_encoder
from fcmae.data.index import ShardIndex, read_index
from fcmae.errors import ConfigError, DataError
from fcmae.model import create_encoder
from fcmae.settings import DataConfig, ModelConfig, PretrainConfig
from finetune.settings import FinetuneConfig


@pytest.mark.parametrize(
    ("train", "asked"),
    [
        ("s3://bucket", None),  # beside it are those of others
        ("s3://bucket/", None),
        ("https://host:8000", None),
        ("https://host/index.safetensors", None),
        ("s3://bucket/train", "s3://bucket/val"),
        ("https://host:8000/a/train/index.safetensors", "https://host:8000/a/val"),
    ],
)
def test_the_validation_images_beside_a_url(monkeypatch, train, asked):
    seen = []
    monkeypatch.setattr("fcmae.settings.exists", lambda location: seen.append(location) or True)
    assert DataConfig(train=train).split("val") == asked
    assert seen == ([f"{asked}/index.safetensors"] if asked else [])


def test_the_cache_must_hold_the_blocks_that_batches_are_spread_over(tmp_path):
    shards = [f"s3://bucket/{number}.tar" for number in range(100)]
    counts = np.full(100, 50)
    rows = np.ones(5000, dtype=np.int64)
    ShardIndex(tmp_path, shards, counts, np.full(100, 10**9), rows, rows, rows, extensions=[".jpg"]).save()
    for workers, batch_size, blocks in ((4, 50, 3), (0, 200, 3), (4, 200, 6), (8, 200, 10), (8, 4000, None)):
        least = 4 * blocks if blocks else 100  # there are no more than that
        data = DataConfig(train=str(tmp_path), workers=workers, block_shards=4, cache_gb=least)
        assert data.check_shards("train", batch_size) == [".jpg"]
        data.cache_gb = least - 0.5
        message = f"must be at least {least}, " + (f"{blocks} × data.block_shards=4" if blocks else "")
        with pytest.raises(ConfigError, match=message):
            data.check_shards("train", batch_size)


def test_finetuning_reads_as_the_run_did(tmp_path):
    data = DataConfig(train="s3://bucket/train", cache_dir="/local", cache_gb=2000, read="cache", allow_pipe=True)
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(PretrainConfig(data=data))), tmp_path / "config.yaml")
    config = FinetuneConfig(checkpoint=str(tmp_path))
    config.data.cache_gb = 50
    config._inherit()
    assert (config.data.train, config.data.read) == ("s3://bucket/train", "cache")
    assert config.data.storage.cache_dir == Path("/local")
    assert config.data.cache_gb == 50  # what was said counts
    assert not config.data.allow_pipe
    config = FinetuneConfig(checkpoint=str(tmp_path))
    config.data.train = "mine"
    config._inherit()
    assert (config.data.read, config.data.cache_dir) == ("auto", None)


def test_weight_files_know_their_normalisation(tmp_path):
    file = tmp_path / "encoder.safetensors"
    save_encoder(create_encoder("mini", num_classes=0), file, ModelConfig(), [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], step=1)
    config = FinetuneConfig(checkpoint=str(file))
    config._inherit()
    assert config.data.statistics(3) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])


@contextmanager
def _without_privileges():
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_index_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder) / "index.safetensors"
        file.write_bytes(b"")
        file.chmod(0)
        with _without_privileges(), pytest.raises(DataError, match=r"index.safetensors cannot be read: Permission"):
            read_index(folder)
        with pytest.raises(DataError, match=r"^cannot be read: File name too long"):
            read_index("x" * 300)

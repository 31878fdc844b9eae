"""What `python -m fcmae.doctor` looks at: machine, shards, images, speed; what is wrong is a line with FAIL."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fcmae.data import jpeg
from fcmae.data.augment import CentreView, TrainView
from fcmae.data.faults import NAMED, Faults
from fcmae.data.index import ShardIndex
from fcmae.data.loader import Samples, chosen_batches, train_batches
from fcmae.data.order import BatchPlan
from fcmae.data.reader import ShardReader
from fcmae.data.splits import open_split
from fcmae.data.storage import Storage, size_of
from fcmae.doctor import DoctorConfig
from fcmae.errors import ConfigError, DataError
from fcmae.runtime.distributed import Ranks
from fcmae.settings import DEMO

SHARED_MEMORY = Path("/dev/shm")
BATCHES_WAITING = 4  # of a worker: three that are ready and one that is being made
ASKED_AT_ONCE = 16  # shards elsewhere
SHARDS_FETCHED = 4  # from elsewhere, to look at their images


class _Report:
    """Lines for the user, and whether one of them was bad."""

    def __init__(self) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self.good = True

    def ok(self, text: str) -> None:
        self.console.print(f"ok    {text}", markup=False)

    def note(self, text: str) -> None:
        self.console.print(f"note  {text}", markup=False)

    def fail(self, text: str) -> None:
        self.good = False
        self.console.print(f"FAIL  {text}", markup=False)


def examine(config: DoctorConfig) -> bool:
    """Print what is found; whether everything is in order."""
    report = _Report()
    _machine(config, report)
    for split in ("train", "val"):
        index = _open(config, split, report)
        if index is None:
            continue
        if _shards(index, split, report):
            _labels(index, split, report)
            bytes_each = _images(config, index, split, report)
            if split == "train":
                _shared_memory(config, bytes_each, report)
                _speed(config, index, report)
    report.console.print("everything is in order" if report.good else "something is wrong, see FAIL above")
    return report.good


def _machine(config: DoctorConfig, report: _Report) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    report.ok(f"torch {torch.__version__}, {cores} cores, {', '.join(devices) or 'no GPU'}")
    workers = config.data.workers
    if workers > cores:
        report.note(f"data.workers={workers} of one rank are more than the {cores} cores this process may use")
    if jpeg.available():
        report.ok("crops of JPEGs are decoded by region")
    else:
        report.note("JPEGs are decoded whole, at half the speed: no C++ compiler, or no libjpeg-turbo, was found")


def _shared_memory(config: DoctorConfig, bytes_each: int, report: _Report) -> None:
    """Whether batches of so many bytes a pixel and channel have room where workers leave them."""
    height, width = config.model.validate().image_size
    workers, rows = config.data.workers, config.optim.batch_size // config.optim.accumulate
    needed = workers * BATCHES_WAITING * rows * config.model.in_chans * height * width * bytes_each
    if workers and SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        text = f"batches of {workers} workers take up to {needed / 1e6:,.0f} MB of shared memory on one rank, "
        text += f"{free / 1e6:,.0f} MB are free in {SHARED_MEMORY}"
        if needed < free:
            report.ok(text)
        else:
            report.fail(f"{text}; use fewer data.workers, or give the container more (--shm-size)")


def _open(config: DoctorConfig, split: str, report: _Report) -> ShardIndex | None:
    """The index of a split, after a line about it."""
    key = f"data.{split}"
    try:
        source = config.data.split(split)
        if source is None:
            report.note(f"{key}={getattr(config.data, split)}: none")
            return None
        start = time.perf_counter()
        index = open_split(config.data, split, Ranks(0, 1, torch.device("cpu")))
    except ConfigError as error:
        report.fail(str(error))
        return None
    except DataError as error:
        report.fail(f"{key}={source}: {error}")
        return None
    assert index is not None
    seconds = time.perf_counter() - start
    size = float(index.shard_bytes.sum())
    report.ok(
        f"{key}={source}: {len(index):,} images in {len(index.shards):,} shards, {size / 1e9:,.3g} GB, "
        f"index read in {seconds:.2f} s"
    )
    if config.model.in_chans not in (1, 3) and index.extensions != [".npy"]:
        report.fail(f"{key}: image files hold 1 or 3 channels, not model.in_chans={config.model.in_chans}")
    if source != DEMO and ShardReader(index, config.data.storage).any_cached:
        _cache(config, index, key, report)
    return index


def _cache(config: DoctorConfig, index: ShardIndex, key: str, report: _Report) -> None:
    """Whether shards of a split fit the cache, and the cache its disk."""
    folder = config.data.storage.cache_dir
    wanted = min(config.data.storage.cache_bytes, int(index.shard_bytes.sum()))
    try:
        config.data.check_shards(key.removeprefix("data."), config.optim.batch_size)
    except ConfigError as error:
        report.fail(str(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report.fail(f"data.cache_dir={folder}: cannot be written: {error.strerror}")
        return
    held = sum(_bytes(path) for path in folder.iterdir())
    room = shutil.disk_usage(folder).free + held
    text = f"for {wanted / 1e9:,.3g} GB of {key}, {folder} has room for {room / 1e9:,.3g} GB"
    if wanted < room:
        report.ok(text)
    else:
        report.fail(f"{text}; lower data.cache_gb={config.data.cache_gb:g} or choose another data.cache_dir")


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a running process made room
        return 0


def _wrong_size(index: ShardIndex, shard: int) -> str | None:
    """What is wrong with the size of a shard."""
    source, expected = index.source(shard), int(index.shard_bytes[shard])
    try:
        actual = size_of(source)
    except DataError as error:
        return str(error)
    if actual not in (None, expected):
        return f"{source} has {actual:,} bytes where the index expects {expected:,}"
    return None


def _shards(index: ShardIndex, split: str, report: _Report) -> bool:
    """Whether all shards are there, in their size."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        wrong = list(filter(None, pool.map(lambda shard: _wrong_size(index, shard), range(len(index.shards)))))
    for line in wrong[:NAMED]:
        report.fail(line)
    if len(wrong) > NAMED:
        report.fail(f"{len(wrong) - NAMED:,} more shards of data.{split} are missing or of another size")
    if not wrong:
        report.ok(f"all shards of data.{split} are there, in the size the index knows")
    return not wrong


def _labels(index: ShardIndex, split: str, report: _Report) -> None:
    low, high = int(index.label.min()), int(index.label.max())
    if high < 0:
        report.note(f"data.{split} has no labels: enough for pretraining, not for fine-tuning")
    elif low < 0:
        report.note(f"data.{split}: {int((index.label < 0).sum()):,} images have no label")
    if high >= index.num_classes:
        report.fail(f"data.{split}: label {high} with {index.num_classes:,} class names")
    elif low >= 0:
        used = len(np.unique(index.label))
        report.ok(f"data.{split}: {used:,} of {index.num_classes:,} classes have images")


def _drawn(index: ShardIndex, storage: Storage, count: int) -> np.ndarray:
    """Sorted ids of samples to look at; of shards elsewhere, from a few only."""
    rng = np.random.default_rng(0)
    ids = np.arange(len(index))
    if count and ShardReader(index, storage).any_cached:
        shards = np.sort(rng.permutation(len(index.shards))[:SHARDS_FETCHED])
        rows = [np.arange(index.first_sample(s), index.first_sample(s) + index.shard_samples[s]) for s in shards]
        ids = np.concatenate(rows)
    return np.sort(rng.permutation(ids)[: count or len(ids)])


def _images(config: DoctorConfig, index: ShardIndex, split: str, report: _Report) -> int:
    """Read and decode some images; bytes of a pixel's channel in them."""
    ids = _drawn(index, config.data.storage, config.images)
    found: list[str] = []
    faults = Faults(1.0, found.append)
    channels = config.model.in_chans
    # At a few pixels: it is decoding that is looked at.
    samples = Samples(ShardReader(index, config.data.storage), CentreView((8, 8)), channels)
    start = time.perf_counter()
    batches = chosen_batches(samples, ids, 32, config.data.workers, faults)
    bytes_each = 1
    try:
        for batch in batches:
            bytes_each = max(bytes_each, batch["image"].element_size())
    except DataError as error:  # types of arrays that differ
        report.fail(f"data.{split}: {error}")
        return bytes_each
    finally:
        batches.close()  # and its processes with it
    seconds = time.perf_counter() - start
    for line in dict.fromkeys(found):
        report.fail(line.removeprefix("left out: "))
    if not found:
        size = float(index.size[ids].sum())
        report.ok(
            f"{len(ids):,} images of data.{split} read and decoded, {len(ids) / seconds:,.0f}/s, "
            f"{size / seconds / 1e6:,.0f} MB/s"
        )
    return bytes_each


def _speed(config: DoctorConfig, index: ShardIndex, report: _Report) -> None:
    """Load training batches for a while."""
    data, optim, geometry = config.data, config.optim, config.model.validate()
    if optim.batch_size > len(index):
        report.fail(f"optim.batch_size={optim.batch_size}: must be at most the {len(index):,} images there are")
        return
    if not config.seconds:
        return
    plan = BatchPlan(index.shard_samples, optim.batch_size, optim.accumulate, block_shards=data.block_shards)
    low, high = data.crop_scale
    view = TrainView(geometry.image_size, (low, high), data.hflip)
    samples = Samples(ShardReader(index, data.storage), view, config.model.in_chans, config.run.seed)
    stop = optim.epochs * plan.steps_per_epoch * optim.accumulate
    batches = train_batches(samples, plan, 0, stop, data.workers, Faults(1.0, lambda line: None))
    try:
        first, count, seconds = _timed(batches, data.workers * BATCHES_WAITING, config.seconds)
    except DataError as error:
        report.fail(f"data.train: {error}")
        return
    finally:
        batches.close()
    each = f", {count / seconds / data.workers:,.0f} per worker" if data.workers else ""
    report.ok(
        f"training batches of data.train: the first after {first:.1f} s, then {count / seconds:,.0f} images/s "
        f"on one rank with data.workers={data.workers}{each}"
    )


def _timed(batches: Iterator[dict], waiting: int, seconds: float) -> tuple[float, int, float]:
    """Seconds to the first batch, then images that came and the seconds they took, of about `seconds`.

    Without the first `waiting`, which were made meanwhile, where there are more; if those take too long, the second
    half of what came.
    """
    begin = 0
    start = time.perf_counter()
    arrived: list[tuple[float, int]] = []  # when, and with how many images
    for batch in batches:
        arrived.append((time.perf_counter(), len(batch["image"])))
        if len(arrived) > waiting + 1:
            begin = waiting
            if arrived[-1][0] - arrived[waiting][0] > seconds:
                break
        elif len(arrived) > 2 and arrived[-1][0] - arrived[0][0] > 2 * seconds:
            begin = (len(arrived) - 1) // 2
            break
    count = sum(images for _, images in arrived[begin + 1 :])
    return arrived[0][0] - start, count, max(arrived[-1][0] - arrived[begin][0], 1e-9)

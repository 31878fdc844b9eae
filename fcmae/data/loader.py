"""Batches: a DataLoader whose items are whole micro-batches, numbered from the start of training.

B images of a micro-batch, C channels, H W pixels, V visible patches. Workers ship uint8; normalisation happens on the
device. Jumping to any step costs nothing, since a micro-batch's samples and all that is random about them follow from
its number (`fcmae.data.order`).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fcmae.data import jpeg
from fcmae.data.augment import draw_visible_ids
from fcmae.data.cache import CacheFullError
from fcmae.data.decode import UNITS, Picture, open_picture
from fcmae.data.faults import Faults
from fcmae.data.index import ShardIndex
from fcmae.data.order import BatchPlan, SampleGenerators
from fcmae.data.reader import ShardReader
from fcmae.errors import DataError, in_a_line

# What decides how a sample looks or which step sees it; a continued run must keep that. Where the training
# shards lie may change, what is in them may not: that is their fingerprint.
FIXED_DATA = ("data.crop_scale", "data.hflip", "data.block_shards", "data.mean", "data.std")
View = Callable[[Picture, np.random.Generator], Tensor]
Batch = dict[str, Tensor]
Bad = list[tuple[int, str]]  # samples that could not be used, and why
StandIn = Callable[[int, int, int], "int | None"]  # epoch, sample, attempt -> who takes its place; None: nobody
NONE = np.empty(0, dtype=np.int64)
ATTEMPTS = 10  # samples tried for one place
SHARDS_AHEAD = 2  # fetched before an evaluation needs them
STOPS = (signal.SIGINT, signal.SIGTERM)


class Plan(Protocol):
    """What the batches of a loader are."""

    def samples(self, number: int) -> tuple[int, np.ndarray]:
        """Epoch and sample ids of batch `number`."""

    def shards(self, number: int) -> list[int]:
        """The shards that batch `number` and those after it need, soonest first."""

    def stand_in(self, epoch: int, sample: int, attempt: int) -> int | None:
        """Who takes the place of a sample that cannot be used; None if it is left out."""


def nobody(epoch: int, sample: int, attempt: int) -> None:
    """For batches from which samples that cannot be used are left out."""


@dataclass
class Samples:
    """What becomes of a sample: decoded to `channels`, cut to a view, with `visible` patches of `num_patches` drawn."""

    reader: ShardReader
    view: View
    channels: int
    seed: int = 0
    num_patches: int = 0
    visible: int = 0

    def __post_init__(self) -> None:
        self._generators = SampleGenerators(self.seed)

    def batch(self, epoch: int, ids: np.ndarray, bad: Bad | None = None, stand_in: StandIn = nobody) -> Batch:
        """image (B, C, H, W), uint8 but for arrays; label (B,) and index (B,) int64; if wanted, visible (B, V) int64.

        Unusable samples are added to `bad` and replaced, or left out where nobody stands in; without `bad`, the first
        raises DataError.
        """
        images, visible, used = [], [], []
        for sample in ids.tolist():
            found = self.usable(epoch, sample, bad, stand_in)
            if found is None:
                continue
            number, image, patches = found
            used.append(number)
            images.append(image)
            visible.append(patches)
        self.reader.release()
        if not images:
            return {}
        numbers = np.array(used, dtype=np.int64)
        batch = {
            "image": self.stack(images, numbers),
            "label": torch.from_numpy(self.reader.index.label[numbers].astype(np.int64)),
            "index": torch.from_numpy(numbers),
        }
        if self.visible:
            batch["visible"] = torch.from_numpy(np.stack(visible))
        return batch

    def usable(
        self, epoch: int, sample: int, bad: Bad | None = None, stand_in: StandIn = nobody
    ) -> tuple[int, Tensor, np.ndarray] | None:
        """The sample, or the one that stands in for it, its view and its visible patches."""
        number = sample
        for attempt in range(ATTEMPTS):
            rng = self._generators(epoch, sample)  # of the place in the epoch, whoever fills it
            patches = draw_visible_ids(rng, self.num_patches, self.visible) if self.visible else NONE
            try:
                return number, self.image(number, rng), patches
            except CacheFullError:  # of no fault of the sample
                raise
            except DataError as error:
                if bad is None:
                    raise
                bad.append((number, str(error)))
            other = stand_in(epoch, sample, attempt)
            if other is None:
                return None
            number = other
        raise DataError(f"{ATTEMPTS} samples in a row could not be used, the last: {bad[-1][1] if bad else ''}")

    def image(self, sample: int, rng: np.random.Generator) -> Tensor:
        """A sample's view, (C, H, W). Raises DataError."""
        data = self.reader.read(sample)
        try:
            return self.view(open_picture(data, self.channels), rng)
        except Exception as error:  # Pillow raises a dozen types for broken bytes; each is named, none swallowed
            raise DataError(f"{self.reader.where(sample)} cannot be decoded: {in_a_line(error)}") from error

    def stack(self, images: list[Tensor], ids: np.ndarray) -> Tensor:
        """(B, C, H, W), channels last as the decoder gives them. Raises DataError if the images' types differ."""
        for image, sample in zip(images, ids.tolist(), strict=True):
            if image.dtype != images[0].dtype:
                raise DataError(f"{self.reader.where(sample)} holds {image.dtype}, other samples {images[0].dtype}")
        return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


class _Loaded(NamedTuple):
    """What comes from a worker. A DataError travels as a value: raised there, it would be buried in a trace."""

    batch: Batch
    asked: int
    bad: Bad
    error: DataError | None = None


class _Batches(Dataset):
    """Item k is the batch `plan(k)` names."""

    def __init__(self, samples: Samples, plan: Plan, skip: bool) -> None:
        self.samples, self.plan, self.skip = samples, plan, skip

    def __getitem__(self, number: int) -> _Loaded:
        self.samples.reader.expect(self.plan.shards(number), *_place())
        epoch, ids = self.plan.samples(number)
        bad: Bad = []
        try:
            batch = self.samples.batch(epoch, ids, bad if self.skip else None, self.plan.stand_in)
            return _Loaded(batch, len(ids), bad)
        except DataError as error:
            return _Loaded({}, len(ids), bad, error)


def train_batches(
    samples: Samples, plan: BatchPlan, start: int, stop: int, workers: int, faults: Faults | None = None
) -> Generator[Batch, None, None]:
    """Micro-batches [start, stop) of this rank, in order.

    Without `faults` the first sample that cannot be used raises DataError; with it they are replaced and counted.
    """
    return _load(_Batches(samples, plan, faults is not None), range(start, stop), workers, faults)


def evaluation_batches(
    samples: Samples, batch_size: int, rank: int, ranks: int, workers: int, faults: Faults | None = None
) -> Generator[Batch, None, None]:
    """Every sample exactly once over all ranks, in index order; the last batch may be smaller.

    Samples that cannot be used raise DataError or, with `faults`, are left out and counted.
    """
    return chosen_batches(samples, np.arange(len(samples.reader.index))[rank::ranks], batch_size, workers, faults)


def chosen_batches(
    samples: Samples, ids: np.ndarray, batch_size: int, workers: int, faults: Faults | None = None
) -> Generator[Batch, None, None]:
    """Samples `ids` in this order; those that cannot be used as for `evaluation_batches`."""
    plan = _Chunks(samples.reader.index, ids, batch_size)
    numbers = range(-(-len(ids) // batch_size))
    return _load(_Batches(samples, plan, faults is not None), numbers, workers, faults)


@dataclass
class _Chunks:
    index: ShardIndex
    ids: np.ndarray
    batch_size: int

    def samples(self, number: int) -> tuple[int, np.ndarray]:
        return 0, self.ids[number * self.batch_size : (number + 1) * self.batch_size]

    def shards(self, number: int) -> list[int]:
        first, last = (self.index.shard_of(int(self.samples(number)[1][end])) for end in (0, -1))
        return list(range(first, min(last + 1 + SHARDS_AHEAD, len(self.index.shards))))

    stand_in = staticmethod(nobody)


def _place() -> tuple[int, int]:
    """Which of the loading processes of this machine this is, and of how many."""
    worker = get_worker_info()
    number, count = (worker.id, worker.num_workers) if worker else (0, 1)
    rank, ranks = (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    return rank * count + number, ranks * count


def _load(batches: _Batches, numbers: range, workers: int, faults: Faults | None) -> Generator[Batch, None, None]:
    jpeg.available()  # builds it, if need be, here and not in every worker
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=min(workers, len(numbers)),
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=3 if min(workers, len(numbers)) else None,
        # It would draw a seed, which nothing here uses, from the generator that the training step was seeded on.
        generator=torch.Generator(),
    )
    with _signals_held():
        arriving = iter(loader)
    for _ in numbers:
        try:
            loaded = next(arriving)
        except (OSError, EOFError) as error:
            # What receiving from a worker that is gone ends in, unless torch notices first.
            if workers == 0 or "in DataLoader worker process" in str(error):
                raise
            raise WorkerError(f"DataLoader worker exited unexpectedly ({type(error).__name__})") from error
        if faults is not None:
            faults.note(loaded.asked, loaded.bad)
        if loaded.error is not None:
            raise loaded.error
        if loaded.batch:
            yield loaded.batch


class WorkerError(RuntimeError):
    """A loader process ended from outside; torch raises plain RuntimeErrors with the same beginning."""


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block; in processes that are started in it, until these let them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    # A terminal, torchrun and Slurm send them to every process; only the main one decides what they mean.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=_obey, args=(os.getppid(),), name="SIGTERM", daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    torch.set_num_threads(1)


def _obey(parent: int) -> None:
    """End this process at the SIGTERM of its parent; others, like that to a whole group, are not for it."""
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)


def normalise(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """(B, C, H, W) on any device -> float32, (x - mean) / std per channel, x in 0–1 for uint8 and uint16."""
    shift = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    return (images.float() / UNITS.get(str(images.dtype).removeprefix("torch."), 1) - shift) / scale


def denormalise(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """The inverse of `normalise`, clipped: (B, C, H, W) float -> uint8."""
    shift = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    scale = torch.tensor(std, device=images.device).view(1, -1, 1, 1)
    return ((images.float() * scale + shift).clamp(0, 1) * 255).round().to(torch.uint8)

"""The order of samples as a pure function of (seed, epoch), and of everything random about a sample.

An epoch permutes the shards, groups them into blocks of `block_shards` and permutes the samples inside each block, so
that reading stays within one block's shards at a time. Global batch s of an epoch is samples [s·G, (s+1)·G) of that
order, G the batch of one optimiser step; the final incomplete batch is dropped. Number of ranks, workers and nodes take
no part: a rank only picks its share of each batch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

# Streams keep the draws of one seed apart: what one place draws never shifts another's.
SHARDS, BLOCK, SAMPLE, REPLACEMENT = 0, 1, 2, 3
ATTEMPTS_NEAR = 5  # to find a replacement among the shards that are open


class SampleGenerators:
    """The generators of everything random about a sample in an epoch: crop, flip, mask, augmentation.

    Counter-based (Philox): each its own 2^128 numbers of one sequence, and no seed to hash for every image. It is one
    generator that is set to another place, which takes a seventh of the time of making one.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=np.array((seed, SAMPLE), dtype=np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state: Any = self._philox.state  # of which nothing has been drawn

    def __call__(self, epoch: int, sample: int) -> np.random.Generator:
        """The generator of a sample, good until the next call."""
        self._state["state"]["counter"][:] = 0, 0, epoch, sample
        self._philox.state = self._state
        return self._generator


def replacement(seed: int, epoch: int, sample: int, attempt: int, count: int) -> int:
    """Which of `count` others stands in for a sample that cannot be used; every process finds the same."""
    return int(np.random.default_rng((seed, REPLACEMENT, epoch, sample, attempt)).integers(count))


class EpochOrder:
    """The permutation of one epoch; blocks are permuted when first asked for, the last few are kept."""

    def __init__(self, shard_samples: np.ndarray, seed: int, epoch: int, block_shards: int) -> None:
        self.seed, self.epoch = seed, epoch
        shards = np.random.default_rng((seed, SHARDS, epoch)).permutation(len(shard_samples))
        first = np.concatenate([[0], np.cumsum(shard_samples)])[:-1]
        self._blocks = [shards[i : i + block_shards] for i in range(0, len(shards), block_shards)]
        self._place = np.argsort(shards)  # of each shard in the epoch
        self._block_shards = block_shards
        self._samples = shard_samples
        self._first = first
        sizes = [int(shard_samples[block].sum()) for block in self._blocks]
        self._start = np.concatenate([[0], np.cumsum(sizes)])
        self._kept: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._start[-1])

    def _block(self, number: int) -> np.ndarray:
        if number not in self._kept:
            ids = np.concatenate(
                [np.arange(self._first[s], self._first[s] + self._samples[s]) for s in self._blocks[number]]
            )
            self._kept[number] = np.random.default_rng((self.seed, BLOCK, self.epoch, number)).permutation(ids)
            if len(self._kept) > 2:
                self._kept.popitem(last=False)
        return self._kept[number]

    def blocks_from(self, position: int) -> tuple[list[int], list[int]]:
        """The shards of the block at a position of the epoch, and of the block after it (none after the last)."""
        number = int(np.searchsorted(self._start, position, side="right")) - 1
        following = self._blocks[number + 1].tolist() if number + 1 < len(self._blocks) else []
        return self._blocks[number].tolist(), following

    def stand_in(self, sample: int, attempt: int) -> int:
        """The sample that takes the place of one that cannot be used, at the given attempt (from 0).

        First of its own block, whose shards are open and here; after a few attempts of the whole data set.
        """
        draw = partial(replacement, self.seed, self.epoch, sample, attempt)
        if attempt >= ATTEMPTS_NEAR:
            return draw(len(self))
        shard = int(np.searchsorted(self._first, sample, side="right")) - 1
        block = self._block(int(self._place[shard]) // self._block_shards)
        return int(block[draw(len(block))])

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Global sample ids at positions [start, stop) of the epoch: (stop - start,) int64."""
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._start, start, side="right")) - 1
            end = min(stop, int(self._start[number + 1]))
            parts.append(self._block(number)[start - self._start[number] : end - self._start[number]])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


@dataclass
class BatchPlan:
    """Which samples form which micro-batch of which rank.

    Micro-batch m counts from the start of training: step m // accumulate, part m % accumulate. `batch_size` is global.
    """

    shard_samples: np.ndarray
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    ranks: int = 1
    seed: int = 0
    block_shards: int = 16

    def __post_init__(self) -> None:
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        return int(self.shard_samples.sum()) // self.batch_size

    @property
    def micro_batch(self) -> int:
        """Samples of one micro-batch on one rank."""
        return self.batch_size // (self.ranks * self.accumulate)

    def samples(self, number: int) -> tuple[int, np.ndarray]:
        """Epoch and global sample ids of this rank's micro-batch `number`."""
        order, start = self._place(number)
        return order.epoch, order.samples(start, start + self.micro_batch)

    def stand_in(self, epoch: int, sample: int, attempt: int) -> int:
        """The sample that takes the place of one that cannot be used; the same for every rank."""
        return self._epoch(epoch).stand_in(sample, attempt)

    def shards(self, number: int) -> list[int]:
        """The shards of the block that this rank's micro-batch `number` begins in, then those of the next block."""
        order, start = self._place(number)
        now, following = order.blocks_from(start)
        if not following:
            following = self._epoch(order.epoch + 1).blocks_from(0)[0]
        return [*now, *(shard for shard in following if shard not in now)]

    def _place(self, number: int) -> tuple[EpochOrder, int]:
        """The order of the epoch of this rank's micro-batch `number`, and where in it that begins."""
        step, part = divmod(number, self.accumulate)
        epoch, step = divmod(step, self.steps_per_epoch)
        start = step * self.batch_size + (part * self.ranks + self.rank) * self.micro_batch
        return self._epoch(epoch), start

    def _epoch(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            self._orders[epoch] = EpochOrder(self.shard_samples, self.seed, epoch, self.block_shards)
            if len(self._orders) > 2:
                self._orders.popitem(last=False)
        return self._orders[epoch]

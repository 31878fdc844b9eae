"""Order is a pure function of (seed, epoch): the same batches for any number of ranks, each sample once per epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcmae.data.order import BatchPlan, EpochOrder, SampleGenerators


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 100),
    block=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_sample_once(counts, seed, epoch, block):
    order = EpochOrder(np.array(counts), seed, epoch, block)
    everything = order.samples(0, len(order))
    assert sorted(everything.tolist()) == list(range(sum(counts)))
    # Any cut gives the same samples, and asking again or elsewhere first changes nothing.
    middle = len(order) // 2
    again = EpochOrder(np.array(counts), seed, epoch, block)
    assert again.samples(middle, len(order)).tolist() == everything[middle:].tolist()
    assert again.samples(0, middle).tolist() == everything[:middle].tolist()


def test_epochs_and_seeds_differ():
    counts = np.array([50, 50, 50])
    orders = [EpochOrder(counts, seed, epoch, 2).samples(0, 150).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_samples_stay_within_their_block_of_shards():
    counts = np.full(8, 10)
    order = EpochOrder(counts, 0, 0, block_shards=2).samples(0, 80)
    for start in range(0, 80, 20):
        assert len(set((order[start : start + 20] // 10).tolist())) == 2


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 6), (12, 1)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(ranks, accumulate):
    counts = np.array([20, 13, 17, 9])
    reference = BatchPlan(counts, 12, seed=3, block_shards=2)
    assert reference.steps_per_epoch == 59 // 12
    plans = [BatchPlan(counts, 12, accumulate, rank, ranks, seed=3, block_shards=2) for rank in range(ranks)]
    for step in range(3 * reference.steps_per_epoch):
        expected_epoch, expected = reference.samples(step)
        parts = [plan.samples(step * accumulate + part) for part in range(accumulate) for plan in plans]
        assert {epoch for epoch, _ in parts} == {expected_epoch}
        assert np.concatenate([ids for _, ids in parts]).tolist() == expected.tolist()


def test_steps_of_an_epoch_do_not_repeat_samples():
    plan = BatchPlan(np.array([40, 25]), 8, seed=0)
    for epoch in range(2):
        first = epoch * plan.steps_per_epoch
        ids = np.concatenate([plan.samples(first + step)[1] for step in range(plan.steps_per_epoch)])
        assert len(set(ids.tolist())) == len(ids) == 64


def test_replacements_come_from_the_block_first():
    plan = BatchPlan(np.array([5, 0, 7, 4, 6, 3]), 5, seed=2, block_shards=2)
    shards = np.repeat(np.arange(6), plan.shard_samples)
    other = BatchPlan(plan.shard_samples, 5, rank=0, ranks=5, seed=2, block_shards=2)
    for epoch in (0, 1, 7):
        order = EpochOrder(plan.shard_samples, 2, epoch, 2)
        for position, sample in enumerate(order.samples(0, 25).tolist()):
            drawn = [plan.stand_in(epoch, sample, attempt) for attempt in range(10)]
            assert drawn == [other.stand_in(epoch, sample, attempt) for attempt in range(10)]
            assert {int(shards[number]) for number in drawn[:5]} <= set(order.blocks_from(position)[0])
        far = {plan.stand_in(epoch, 0, attempt) for attempt in range(5, 300)}
        assert far == set(range(25))


def test_a_jump_costs_no_replay():
    plan = BatchPlan(np.full(1282, 1000), 4096, seed=0)
    epoch, ids = plan.samples(250_000)
    assert epoch == 250_000 // plan.steps_per_epoch
    assert len(ids) == 4096


def test_sample_generators_are_independent_and_reproducible():
    generators = SampleGenerators(0)
    a = generators(1, 5).random(4)
    for other in ((0, 1, 6), (0, 2, 5), (1, 1, 5), (0, 5, 1)):
        assert not np.array_equal(a, SampleGenerators(other[0])(*other[1:]).random(4))
    # Whatever was drawn before, also halves of numbers.
    generators(2, 2).integers(0, 2**32, size=3, dtype=np.uint32)
    assert np.array_equal(a, generators(1, 5).random(4))
    # The numbers of numpy's own generator, placed by hand.
    largest = 2**32 - 1
    key, counter = np.array([largest, 2], dtype=np.uint64), np.array([0, 0, 7, 14_000_000], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(9)
    assert np.array_equal(SampleGenerators(largest)(7, 14_000_000).random(9), expected)


def test_an_epoch_of_1024_ranks_has_no_repeats_and_no_gaps():
    counts = np.full(1282, 999)
    counts[:449] += 1  # 1,281,167 samples
    plans = [BatchPlan(counts, 4096, rank=rank, ranks=1024, seed=1) for rank in range(1024)]
    alone = BatchPlan(counts, 4096, seed=1)
    order = EpochOrder(counts, 1, 1, 16)
    for plan in plans:  # one order in memory instead of one per rank, as on as many machines
        plan._orders[1] = order
    seen = np.zeros(counts.sum(), dtype=np.int8)
    for step in range(alone.steps_per_epoch, 2 * alone.steps_per_epoch):
        ids = np.concatenate([plan.samples(step)[1] for plan in plans])
        np.add.at(seen, ids, 1)
        if step % 50 == 0:
            assert np.array_equal(ids, alone.samples(step)[1])
    assert seen.max() == 1
    assert (seen == 0).sum() == counts.sum() % 4096  # the last, incomplete batch


@pytest.mark.parametrize("block_shards", [4, 16, 64])
def test_neighbours_in_a_shard_end_up_shards_apart(block_shards):
    # Inside a block of shards the order is uniform, so two neighbours are 0.29 of the block apart in the median.
    counts = np.full(256, 200)
    order = EpochOrder(counts, 0, 0, block_shards).samples(0, counts.sum())
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    apart = np.abs(np.diff(position.reshape(256, 200), axis=1))
    assert np.median(apart) == pytest.approx((1 - 0.5**0.5) * block_shards * 200, rel=0.05)
    assert np.median(apart) > 200  # a shard

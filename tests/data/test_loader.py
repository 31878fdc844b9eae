"""Batches from shards: the same for any number of workers, with faults named."""

from __future__ import annotations

import dataclasses
import errno
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import make_split

from fcmae.data.augment import CentreView, TrainView
from fcmae.data.decode import open_picture
from fcmae.data.demo import CLASSES, SPLITS, ensure_demo, render
from fcmae.data.faults import Faults
from fcmae.data.index import read_index, split_size
from fcmae.data.loader import Samples, denormalise, evaluation_batches, normalise, train_batches
from fcmae.data.order import BatchPlan, SampleGenerators
from fcmae.data.reader import ShardReader
from fcmae.data.storage import Storage
from fcmae.errors import DataError


def training_samples(folder, **options):
    return Samples(ShardReader(read_index(folder)), TrainView((16, 24)), 3, num_patches=6, visible=2, **options)


def plan_of(folder, batch_size=8):
    return BatchPlan(read_index(folder).shard_samples, batch_size)


def collect(folder, workers, start=0, stop=6):
    samples = training_samples(folder)
    plan = BatchPlan(samples.reader.index.shard_samples, 24)
    return list(train_batches(samples, plan, start, stop, workers))


def test_batches_do_not_depend_on_workers(shards):
    reference = collect(shards / "train", 0)
    assert len(reference) == 6
    for batch in reference:
        assert batch["image"].shape == (24, 3, 16, 24)
        assert batch["image"].dtype == torch.uint8
        assert batch["visible"].shape == (24, 2)
    for workers in (1, 3):
        for a, b in zip(reference, collect(shards / "train", workers), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)
    # Starting in the middle continues with the same batches.
    for a, b in zip(reference[4:], collect(shards / "train", 2, start=4), strict=True):
        assert torch.equal(a["image"], b["image"])


def test_a_batch_holds_the_samples_views(shards):
    samples = training_samples(shards / "train")
    batch = collect(shards / "train", 0, 0, 1)[0]
    for row, number in enumerate(batch["index"].tolist()):
        rng = SampleGenerators(0)(0, number)
        visible = np.sort(rng.permutation(6)[:2])
        assert batch["visible"][row].tolist() == visible.tolist()
        image = samples.view(open_picture(samples.reader.read(number), 3), rng)
        assert torch.equal(batch["image"][row], image)
        assert batch["label"][row] == number % 3


def test_epochs_see_different_crops(shards):
    samples = training_samples(shards / "train")
    first, second = (samples.batch(epoch, np.arange(8)) for epoch in (0, 1))
    assert not torch.equal(first["image"], second["image"])
    assert not torch.equal(first["visible"], second["visible"])


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (3, 2)])
def test_evaluation_sees_every_image_once(shards, ranks, workers):
    samples = Samples(ShardReader(read_index(shards / "val")), CentreView((16, 16)), 1)
    batches = [list(evaluation_batches(samples, 6, rank, ranks, workers)) for rank in range(ranks)]
    seen = torch.cat([batch["index"] for part in batches for batch in part])
    assert sorted(seen.tolist()) == list(range(20))
    assert batches[0][0]["image"].shape == (6, 1, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(tmp_path, workers):
    folder = make_split(tmp_path / "train", 24)
    index = read_index(folder)
    with open(index.source(1), "r+b") as shard:
        shard.seek(index.offset(20))
        shard.write(b"\0" * int(index.size[20]))
    with pytest.raises(DataError, match=r"shard-000001.tar: 000020.png cannot be decoded"):
        collect(folder, workers)


def spoil(folder, *numbers):
    """Overwrite the images of some samples."""
    index = read_index(folder)
    for number in numbers:
        with open(index.source(index.shard_of(number)), "r+b") as shard:
            shard.seek(index.offset(number))
            shard.write(b"\0" * int(index.size[number]))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_replaced_alike_everywhere(tmp_path, workers):
    folder = make_split(tmp_path / "train", 48)
    good = list(train_batches(training_samples(folder), plan_of(folder), 0, 12, 0))
    spoil(folder, 5, 20)
    said: list[str] = []
    faults = Faults(0.2, said.append)
    batches = list(train_batches(training_samples(folder), plan_of(folder), 0, 12, workers, faults))
    assert (faults.count, faults.drawn) == (4, 96)  # both in each of two epochs
    assert [line.split(":")[0] for line in said] == ["left out"] * 2
    assert any("shard-000000.tar: 000005.png cannot be decoded" in line for line in said)
    again = Faults(0.2, said.append)
    for batch, same, before in zip(
        batches, train_batches(training_samples(folder), plan_of(folder), 0, 12, 1, again), good, strict=True
    ):
        assert not {5, 20} & set(batch["index"].tolist())
        assert all(torch.equal(batch[name], same[name]) for name in batch)
        kept = torch.tensor([number not in (5, 20) for number in before["index"].tolist()])
        assert torch.equal(batch["index"][kept], before["index"][kept])
        assert torch.equal(batch["image"][kept], before["image"][kept])
        assert torch.equal(batch["visible"], before["visible"])
        assert torch.equal(batch["label"], batch["index"] % 3)  # that of the sample that stands in


def test_evaluation_leaves_bad_samples_out(tmp_path):
    folder = make_split(tmp_path / "val", 20)
    spoil(folder, *range(6), 13)
    samples = Samples(ShardReader(read_index(folder)), CentreView((16, 16)), 3)
    faults = Faults(0.5, lambda line: None)
    seen = [b["index"].tolist() for b in evaluation_batches(samples, 6, 0, 1, 0, faults)]
    assert seen == [list(range(6, 12)), [12, *range(14, 18)], [18, 19]]
    assert faults.count == 7
    with pytest.raises(DataError, match=r"000000.png cannot be decoded"):
        list(evaluation_batches(samples, 6, 0, 1, 0))


def test_too_many_bad_samples_end_the_run():
    said: list[str] = []
    faults = Faults(0.01, said.append)
    for start in range(0, 900, 100):
        faults.note(100, [(start + n, f"sample {start + n}") for n in range(3)])
    assert len(said) == 21  # twenty by name, then one line for all others
    with pytest.raises(DataError, match=r"28 of 1,000 samples could not be used, more than data.max_bad_fraction=0.01"):
        faults.note(100, [(999, "sample 999")])
    quiet = Faults(0.01, said.append)
    for _ in range(30):
        quiet.note(100, [(7, "the same one again")])
    assert quiet.count == 30
    assert len(said) == 22


def test_a_place_that_nothing_can_fill(tmp_path):
    folder = make_split(tmp_path / "train", 24)
    spoil(folder, *range(24))
    with pytest.raises(DataError, match=r"10 samples in a row could not be used, the last: .*cannot be decoded"):
        list(train_batches(training_samples(folder), plan_of(folder), 0, 1, 0, Faults(0.5, lambda line: None)))


def test_a_disk_that_fails_is_told(tmp_path, monkeypatch):
    reader = ShardReader(read_index(make_split(tmp_path / "train", 24)))

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(DataError, match=r"shard-000001.tar cannot be read: Input/output error"):
        reader.read(20)


def test_an_index_that_disagrees_with_its_shard_is_told(tmp_path):
    folder = make_split(tmp_path / "train", 24)
    index = read_index(folder)
    for changed in ("size", "block"):
        wrong = dataclasses.replace(index, **{changed: getattr(index, changed) + 1})
        with pytest.raises(DataError, match=r"shard-000000.tar holds something else than the index says at sample 3"):
            ShardReader(wrong).read(3)


def test_missing_and_short_shards_are_named(tmp_path):
    folder = make_split(tmp_path / "train", 40)
    with open(folder / "shard-000002.tar", "r+b") as shard:
        shard.truncate(1000)
    with pytest.raises(DataError, match=r"shard-000002.tar has 1,000 bytes where the index expects"):
        read_index(folder).check_files()
    with pytest.raises(DataError, match=r"shard-000002.tar ends inside sample"):
        ShardReader(read_index(folder)).read(39)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002.tar is missing"):
        read_index(folder).check_files()
    with pytest.raises(DataError, match=r"shard-000002.tar cannot be opened"):
        ShardReader(read_index(folder)).read(39)


def test_unusable_indices_are_named(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no index"):
        read_index(tmp_path)
    (tmp_path / "index.safetensors").write_bytes(b"\x09" * 100)
    with pytest.raises(DataError, match="cannot be read"):
        read_index(tmp_path)


def test_reader_keeps_few_files_open_and_pickles(tmp_path):
    folder = make_split(tmp_path / "train", 40, per_shard=4)
    reader = ShardReader(read_index(folder), Storage(max_open=3))
    first = [reader.read(i) for i in range(40)]
    assert len(reader._files) == 3
    copy = pickle.loads(pickle.dumps(reader))
    assert len(copy._files) == 0
    assert [copy.read(i) for i in range(40)] == first


def test_normalise_and_back():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    normalised = normalise(images, mean, std)
    assert normalised[0, 1, 15, 15].item() == pytest.approx((1 - 0.2) / 0.6)
    assert torch.equal(denormalise(normalised, mean, std), images)


def test_demo_is_rendered_once_and_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SPLITS, "train", 36)
    monkeypatch.setitem(SPLITS, "val", 12)
    folder = ensure_demo()
    assert folder.is_relative_to(tmp_path)
    index = read_index(folder / "train")
    assert index.classes == list(CLASSES)
    assert split_size("demo") == len(index) == 36
    assert np.array_equal(open_picture(ShardReader(index).read(17), 3).pixels(), render(0, 17))
    assert index.label[17] == 17 % 12
    stamp = (folder / "train" / "index.safetensors").stat().st_mtime_ns
    assert ensure_demo() == folder
    assert (folder / "train" / "index.safetensors").stat().st_mtime_ns == stamp
    # A folder that was left incomplete is made again.
    shutil.rmtree(folder / "val")
    assert len(read_index(ensure_demo() / "val")) == 12


def test_demo_classes_are_not_told_apart_by_colour():
    # Nearest class mean of the average colour on 480 images: chance is 8.3 %.
    colours = np.array([render(0, i).mean(axis=(0, 1)) for i in range(480)])
    labels = np.arange(480) % len(CLASSES)
    means = np.array([colours[:240][labels[:240] == c].mean(axis=0) for c in range(len(CLASSES))])
    guess = ((colours[240:, None] - means[None]) ** 2).sum(-1).argmin(1)
    assert (guess == labels[240:]).mean() < 0.2

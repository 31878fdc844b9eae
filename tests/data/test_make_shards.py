"""Class folders, flat folders and IDX files become shards that WebDataset and our reader both read."""

from __future__ import annotations

import gzip
import struct
import tarfile

import numpy as np
import pytest
import webdataset
from conftest import png

from fcmae.data.index import read_index
from fcmae.data.make_shards import main
from fcmae.data.reader import ShardReader
from fcmae.data.sources import read_idx
from fcmae.errors import DataError


def fill(folder, count, seed=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"photo.{number}.png").write_bytes(png(rng))


@pytest.fixture
def classes(tmp_path):
    """Two classes of 7 and 5 images, 3 broken files and files that are not images."""
    source = tmp_path / "photos"
    fill(source / "cat", 7)
    fill(source / "dog" / "deeper", 5, seed=1)
    good = (source / "cat" / "photo.0.png").read_bytes()
    (source / "cat" / "cut.png").write_bytes(good[: len(good) // 2])
    (source / "cat" / "empty.jpg").write_bytes(b"")
    (source / "dog" / "text.jpg").write_bytes(b"this is not a photograph")
    (source / "dog" / "notes.txt").write_text("x")
    (source / "dog" / ".hidden.png").write_bytes(b"x")
    return source


def test_class_folders(classes, tmp_path, capsys):
    assert main([str(classes), str(tmp_path / "out"), "--samples-per-shard", "5"]) == 0
    index = read_index(tmp_path / "out")
    assert index.classes == ["cat", "dog"]
    assert len(index) == 12
    assert len(index.shards) == 3
    assert index.shard_samples.max() <= 5
    assert np.bincount(index.label).tolist() == [7, 5]
    said = capsys.readouterr().out
    for name in ("cat/cut.png: ", "cat/empty.jpg: the file is empty", "dog/text.jpg: "):
        assert f"left out: {name}" in said
    assert "3 of 15 files could not be used" in said
    assert "2 classes with 5 to 7 images each" in said
    # The shards say the same to our reader, to tarfile and to webdataset.
    reader = ShardReader(index)
    stored = {reader.read(i) for i in range(12)}
    assert stored == {p.read_bytes() for p in classes.rglob("photo.*.png")}
    urls = [str(index.source(i)) for i in range(3)]
    seen = [(s["png"], int(s["cls"])) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert [label for _, label in seen] == index.label.tolist()
    assert [data for data, _ in seen] == [reader.read(i) for i in range(12)]
    with tarfile.open(urls[0]) as archive:
        assert reader.name(3) in archive.getnames()
    # Shuffled, so that a shard holds all classes.
    assert len(set(index.label[:5].tolist())) == 2


def test_links_that_lead_back_are_not_followed_twice(classes, tmp_path, capsys):
    (classes / "cat" / "loop").symlink_to("..")
    (classes / "dog" / "again").symlink_to("deeper")
    assert main([str(classes), str(tmp_path / "out")]) == 0
    reader = ShardReader(read_index(tmp_path / "out"))
    stored = [reader.read(i) for i in range(len(reader.index))]
    # cat/loop leads to the dogs by another way; they may only come in once per class folder.
    assert np.bincount(reader.index.label)[1] == 5
    assert len(stored) <= 7 + 5 + 5


def test_images_beside_class_folders_are_not_dropped_in_silence(classes, tmp_path, capsys):
    (classes / "stray.png").write_bytes((classes / "cat" / "photo.0.png").read_bytes())
    assert main([str(classes), str(tmp_path / "out")]) == 2
    assert "holds 1 images beside folders" in capsys.readouterr().err
    assert main([str(classes), str(tmp_path / "out"), "--kind", "folders"]) == 0
    assert len(read_index(tmp_path / "out")) == 12


def test_both_splits_or_none(tmp_path, capsys):
    fill(tmp_path / "source" / "train" / "a", 2)
    (tmp_path / "source" / "val" / "a").mkdir(parents=True)
    (tmp_path / "source" / "val" / "a" / "x.png").write_bytes(b"junk")
    assert main([str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("out/**/index.safetensors"))
    (tmp_path / "source" / "val" / "a" / "y.png").write_bytes(png(np.random.default_rng(0)))
    assert main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0


def test_splits_of_a_source_stay_splits(tmp_path):
    for split in ("train", "val"):
        for name in ("a", "b"):
            fill(tmp_path / "source" / split / name, 2)
    assert main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    assert [len(read_index(tmp_path / "out" / split)) for split in ("train", "val")] == [4, 4]
    assert read_index(tmp_path / "out" / "val").classes == ["a", "b"]


def test_flat_folder_has_no_labels(tmp_path):
    fill(tmp_path / "flat", 6)
    assert main([str(tmp_path / "flat"), str(tmp_path / "out")]) == 0
    index = read_index(tmp_path / "out")
    assert index.classes == []
    assert index.label.tolist() == [-1] * 6


def test_val_share_sets_images_aside(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / "source" / name, 10, seed=ord(name))
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--val-share", "0.2"]) == 0
    train, val = (ShardReader(read_index(tmp_path / "out" / split)) for split in ("train", "val"))
    assert (len(train.index), len(val.index)) == (16, 4)
    stored = [reader.read(i) for reader in (train, val) for i in range(len(reader.index))]
    assert len(set(stored)) == 20


def write_idx(path, array):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    from PIL import Image

    rng = np.random.default_rng(0)
    source = tmp_path / "mnist"
    source.mkdir()
    arrays = {}
    for prefix, count in (("train", 9), ("t10k", 4)):
        arrays[prefix] = rng.integers(0, 256, (count, 6, 5), dtype=np.uint8)
        write_idx(source / f"{prefix}-images-idx3-ubyte{suffix}", arrays[prefix])
        write_idx(source / f"{prefix}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 3)
    assert main([str(source), str(tmp_path / "out")]) == 0
    for prefix, split in (("train", "train"), ("t10k", "val")):
        reader = ShardReader(read_index(tmp_path / "out" / split))
        assert reader.index.classes == ["0", "1", "2"]
        for number, expected in enumerate(arrays[prefix]):
            import io

            assert np.array_equal(np.asarray(Image.open(io.BytesIO(reader.read(number)))), expected)
            assert reader.index.label[number] == number % 3


def test_idx_errors(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\0\x0d\x01")
    with pytest.raises(DataError, match="cannot be read as IDX"):
        read_idx(tmp_path / "a")
    (tmp_path / "b.gz").write_bytes(b"plain")
    with pytest.raises(DataError, match="cannot be read as IDX"):
        read_idx(tmp_path / "b.gz")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda p: None, [], "no such folder"),
        (lambda p: p.mkdir(), [], "holds no image files"),
        (lambda p: p.mkdir(), ["--kind", "idx"], "holds no train-images-idx3-ubyte"),
        (lambda p: (p / "x").mkdir(parents=True) or (p / "x" / "a.png").write_bytes(b"junk"), [], "no usable image"),
        (lambda p: (fill(p / "train" / "a", 1), fill(p / "val" / "b", 1)), [], "class folders of train and val differ"),
        (lambda p: fill(p / "train" / "a", 1), ["--val-share", "0.5"], "has splits of its own"),
        (lambda p: fill(p, 3), ["--val-share", "0.99"], "would leave none of 3 images"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, prepare, arguments, message):
    prepare(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("out/**/index.safetensors"))


def test_existing_shards_are_not_overwritten(tmp_path, capsys):
    fill(tmp_path / "flat", 2)
    assert main([str(tmp_path / "flat"), str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert main([str(tmp_path / "flat"), str(tmp_path / "out")]) == 2
    assert "already holds shards" in capsys.readouterr().err
    assert (tmp_path / "out" / "shard-000000.tar").read_bytes() == before


def test_files_can_be_read_by_others(tmp_path):
    fill(tmp_path / "flat", 2)
    main([str(tmp_path / "flat"), str(tmp_path / "out")])
    for file in (tmp_path / "out").iterdir():
        assert file.stat().st_mode & 0o444 == 0o444, file

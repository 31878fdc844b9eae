"""Shards are the same bytes however they were packed: by one process or several, interrupted, killed, continued."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image

from fcmae.data import packing
from fcmae.data.images import Images
from fcmae.data.index import read_index
from fcmae.data.make_shards import main, size
from fcmae.data.packing import JOURNAL, PackOptions, pack, plan, reencode
from fcmae.data.reader import ShardReader
from fcmae.data.sources import Split
from fcmae.errors import DataError

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_shards.py"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """600 images in 3 classes, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(600):
        path = folder / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(rng, height=24 + number % 7))
    (folder / "b" / "broken.png").write_bytes(b"no image")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".tar"}


@pytest.fixture(scope="module")
def expected(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    assert main([str(photos), str(out), "--samples-per-shard", "30", "--jobs", "1"]) == 0
    return out


def assert_same(out: Path, expected: Path) -> None:
    assert contents(out) == contents(expected)
    assert read_index(out).fingerprint == read_index(expected).fingerprint
    assert read_index(out).provenance["left_out"] == read_index(expected).provenance["left_out"]
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}


def test_several_processes_write_the_same(photos, expected, tmp_path):
    assert main([str(photos), str(tmp_path / "out"), "--samples-per-shard", "30", "--jobs", "3"]) == 0
    assert_same(tmp_path / "out", expected)
    assert len(contents(expected)) == 21


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_anywhere_and_continued(photos, expected, tmp_path, number, jobs):
    out = tmp_path / "out"
    slow = "import time, fcmae.data.packing as p; f = p.damage; "
    slow += "p.damage = lambda d: (time.sleep(0.01), f(d))[1]; "
    slow += "from fcmae.data.make_shards import main; import sys; sys.exit(main())"
    arguments = [str(photos), str(out), "--samples-per-shard", "30", "--jobs", jobs]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(contents(out) if out.exists() else ()) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert error == "interrupted; the same command goes on from here\n"
        assert not list(out.glob(".*.tmp"))
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert not (out / "index.safetensors").exists()
    assert 3 <= len(before) < 21
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(out, expected)
    kept = [path for path, time_ns in before.items() if (out / path).stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(before) - 2  # those whose line was not written yet are made again


def test_processes_end_with_the_main_one(photos, tmp_path):
    out = tmp_path / "out"
    slow = "import time, fcmae.data.packing as p; p.damage = lambda d: time.sleep(0.05); "
    slow += "from fcmae.data.make_shards import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(photos), str(out), "--jobs", "2", "--samples-per-shard", "9"]
    )
    while not out.exists() or len(list(out.glob(".*.tmp"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    packers = [int(line) for line in children.stdout.split()]
    assert len(packers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in packers):
        assert time.monotonic() < deadline, "the processes that pack live on"
        time.sleep(0.05)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return "Z"


def test_a_process_ended_from_outside_is_one_line(photos, expected, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [str(photos), str(out), "--samples-per-shard", "30", "--jobs", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(packing, "damage", lambda data: os.kill(os.getpid(), signal.SIGKILL))
        assert main(arguments) == 2
    assert "a process that packs was ended from outside" in capsys.readouterr().err
    assert main(arguments) == 0
    assert_same(out, expected)


def test_a_journal_cut_short_costs_its_last_shard(photos, expected, tmp_path):
    out = tmp_path / "out"
    arguments = [str(photos), str(out), "--samples-per-shard", "30", "--jobs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "write_shard", _fails_at("shard-000005.tar", packing.write_shard))
        assert main(arguments) == 2
    journal = out / JOURNAL
    lines = journal.read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines[1:]] == [0, 1, 2, 3, 4]
    journal.write_text("\n".join(lines)[:-40])
    (out / "shard-000001.tar").write_bytes(b"changed since")
    assert main(arguments) == 0
    assert_same(out, expected)


def _fails_at(name, write):
    def write_shard(path, samples):
        if path.name == name:
            raise OSError(28, "No space left on device")
        return write(path, samples)

    return write_shard


def test_other_options_do_not_continue(photos, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "write_shard", _fails_at("shard-000001.tar", packing.write_shard))
        assert main([str(photos), str(out), "--samples-per-shard", "100", "--jobs", "1"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert main([str(photos), str(out), "--samples-per-shard", "100", "--jobs", "1", "--seed", "1"]) == 2
    assert "holds the beginnings of shards from another source or with other options" in capsys.readouterr().err


class Blobs(Images):
    def __init__(self, sizes: list[int]) -> None:
        self._sizes = np.array(sizes)
        self.labels = np.full(len(sizes), -1, np.int32)

    def read(self, number: int) -> tuple[str, bytes]:
        return "bin", bytes(int(self._sizes[number]))

    def shown(self, number: int) -> str:
        return f"blob {number}"

    def sizes(self) -> np.ndarray:
        return self._sizes


def test_shards_end_at_a_number_of_bytes():
    sizes = np.random.default_rng(0).integers(1, 5000, 300).tolist()
    split = Split("", [], Blobs([*sizes, 90_000, 10]), np.arange(302))
    shards = plan(split, PackOptions(samples_per_shard=40, shard_bytes=50_000))
    assert [start for start, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
    assert shards[-1][1] == 302
    for start, stop in shards:
        total = sum(int(n) + 1024 for n in split.images.sizes()[start:stop])
        assert total <= 50_000 or stop == start + 1
        assert stop - start <= 40
    assert plan(split, PackOptions(samples_per_shard=302)) == [(0, 302)]
    assert plan(split, PackOptions(samples_per_shard=301)) == [(0, 301), (301, 302)]


def test_bytes_after_reencoding_are_estimated(tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "large"
    source.mkdir()
    for number in range(40):
        noise = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((400, 320)).save(source / f"{number}.png")
    assert main([str(source), str(tmp_path / "out"), "--max-side", "64", "--shard-bytes", "30KB"]) == 0
    sizes = read_index(tmp_path / "out").shard_bytes
    assert 15_000 < np.median(sizes) <= 40_960


def test_sizes_as_people_write_them():
    assert [size(text) for text in ("1000", "500M", "1.5GB", "2k")] == [1000, 500_000_000, 1_500_000_000, 2000]
    for text in ("0", "-1", "many", "5TB"):
        with pytest.raises(Exception, match="must be a number of bytes"):
            size(text)


def test_reencoded_images_agree_with_pillows():
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize((640, 480), Image.Resampling.BICUBIC)
    for format, options in (("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})):
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        extension, data, _ = reencode(format.lower(), buffer.getvalue(), 256, 90)
        small = Image.open(io.BytesIO(data))
        assert (extension, small.format, small.size) == ("jpg", "JPEG", (256, 192))
        wanted = np.asarray(image.resize((256, 192), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(np.asarray(small).astype(int) - wanted).mean() < 2
        assert reencode("x", buffer.getvalue(), 640, 90) == ("x", buffer.getvalue(), None)
    array = io.BytesIO()
    np.save(array, np.zeros((300, 300, 5), np.uint16))
    assert reencode("npy", array.getvalue(), 64, 90) == ("npy", array.getvalue(), None)
    with pytest.raises(OSError, match="truncated"):
        reencode("png", _png(image)[:-500], 64, 90)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-side", "0"], "--max-side=0: must be at least 1"),
        (["--quality", "101"], "--quality=101: must be from 1 to 100"),
        (["--jobs", "0"], "--jobs=0: must be at least 1"),
        (["--shard-bytes", "x"], "must be a number of bytes"),
        (["--synsets", "mine"], "invalid choice: 'mine'"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["source", "out", *arguments])
    assert message in capsys.readouterr().err


def write_cifar(root: Path) -> dict[str, np.ndarray]:
    """CIFAR-10 as torchvision expects it, of 20 + 10 images, with the checksums it looks at."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums, pixels = {}, {}
    for name in [n for n, _ in CIFAR10.train_list + CIFAR10.test_list]:
        data = rng.integers(0, 256, (4 if name != "test_batch" else 10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(len(data))]}))
        pixels[name] = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    for path in folder.iterdir():
        sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
    return {"sums": sums, "pixels": pixels}


def test_data_sets_of_torchvision(tmp_path, monkeypatch, capsys):
    from torchvision.datasets import CIFAR10

    made = write_cifar(tmp_path / "root")
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, part, [[name, made["sums"][name]] for name, _ in getattr(CIFAR10, part)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": made["sums"]["batches.meta"]})
    out = tmp_path / "out"
    assert main(["torchvision:CIFAR10", str(out), "--root", str(tmp_path / "root"), "--jobs", "2"]) == 0
    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("val", ["test_batch"])):
        reader = ShardReader(read_index(out / split))
        assert reader.index.classes == [f"class {i}" for i in range(10)]
        images = np.concatenate([made["pixels"][name] for name in names])
        labels = np.concatenate([np.arange(len(made["pixels"][name])) % 10 for name in names])
        wanted = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        got = {
            np.asarray(Image.open(io.BytesIO(reader.read(i)))).tobytes(): int(reader.index.label[i])
            for i in range(len(reader.index))
        }
        assert got == wanted
    assert main(["torchvision:CIFAR10", str(tmp_path / "no"), "--root", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: torchvision:CIFAR10: Dataset not found")
    assert "--download" in error
    assert error.count("\n") == 1


def test_data_sets_of_files_keep_their_files(photos, tmp_path, monkeypatch):
    from torchvision import datasets

    class Photos(datasets.ImageFolder):
        def __init__(self, root: str) -> None:
            super().__init__(root)

    monkeypatch.setattr(datasets, "Photos", Photos, raising=False)
    assert main(["torchvision:Photos", str(tmp_path / "out"), "--root", str(photos), "--val-share", "0.1"]) == 0
    train, val = (ShardReader(read_index(tmp_path / "out" / split)) for split in ("train", "val"))
    got = {reader.read(i) for reader in (train, val) for i in range(len(reader.index))}
    assert got == {path.read_bytes() for path in photos.rglob("[0-9]*.png")}
    assert train.index.classes == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["Nothing", "VisionDataset", "mnist"])
def test_unknown_data_sets_are_named(tmp_path, capsys, name):
    assert main([f"torchvision:{name}", str(tmp_path / "out")]) == 2
    assert f"torchvision.datasets has no {name}" in capsys.readouterr().err


def test_data_sets_without_a_class_number_are_named(tmp_path, capsys, monkeypatch):
    from torchvision import datasets

    class Boxes(datasets.VisionDataset):
        def __init__(self, root: str) -> None:
            super().__init__(root)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int):
            return Image.new("RGB", (4, 4)), {"boxes": torch.zeros(number, 4)}

    monkeypatch.setattr(datasets, "Boxes", Boxes, raising=False)
    assert main(["torchvision:Boxes", str(tmp_path / "out")]) == 2
    assert "its targets are not one class number per image" in capsys.readouterr().err


def test_pack_refuses_nothing_but_what_is_broken(tmp_path):
    split = Split("", [], Blobs([10, 0, 20]), np.arange(3))
    packed = pack(split, tmp_path, "shard", PackOptions(verify=False), 1, lambda part: None)
    assert packed[0].shard.sizes.tolist() == [10, 20]
    assert packed[0].left_out == ["blob 1: the file is empty"]
    with pytest.raises(DataError, match="another source"):
        pack(Split("", [], Blobs([10, 0]), np.arange(2)), tmp_path, "shard", PackOptions(verify=False), 1, print)

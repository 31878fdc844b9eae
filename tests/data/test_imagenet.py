"""ImageNet as downloaded becomes shards whose labels are those of published weights."""

from __future__ import annotations

import io
import re
import sys
import tarfile

import imagenet
import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

from fcmae.data.archives import members
from fcmae.data.index import read_index
from fcmae.data.make_shards import main
from fcmae.data.reader import ShardReader
from fcmae.data.synsets import class_order, validation_labels
from fcmae.errors import DataError

SYNSETS = ["n01440764", "n01443537", "n01484850", "n02085620", "n07753592"]
BY_ID = [SYNSETS[i] for i in (3, 0, 4, 1, 2)]  # the challenge numbers them otherwise
VAL = [2, 0, 4, 1, 3, 3, 0, 2]  # labels of the validation images, in the order of the classes


@pytest.fixture
def downloaded(tmp_path):
    """5 classes of 7 images, 8 validation images and the development kit."""
    source = tmp_path / "downloads"
    source.mkdir()
    images = imagenet.class_images(SYNSETS, 7)
    imagenet.write_train_tar(source / "ILSVRC2012_img_train.tar", images)
    rng = np.random.default_rng(9)
    val = [imagenet.jpeg(rng, imagenet.colour(label)) for label in VAL]
    names = imagenet.write_val_tar(source / "ILSVRC2012_img_val.tar", val)
    truth = [BY_ID.index(SYNSETS[label]) + 1 for label in VAL]
    meta = imagenet.write_devkit(source / "ILSVRC2012_devkit_t12.tar.gz", BY_ID, truth)
    return source, images, val, names, truth, meta


def stored(folder) -> dict[bytes, int]:
    reader = ShardReader(read_index(folder))
    return {reader.read(i): int(reader.index.label[i]) for i in range(len(reader.index))}


def test_both_tars_and_the_development_kit(downloaded, tmp_path, capsys):
    source, images, val, *_ = downloaded
    out = tmp_path / "out"
    assert main([str(source), str(out), "--samples-per-shard", "10", "--jobs", "2"]) == 0
    assert read_index(out / "train").classes == SYNSETS
    assert stored(out / "train") == {data: SYNSETS.index(synset) for synset, files in images.items() for data in files}
    assert stored(out / "val") == dict(zip(val, VAL, strict=True))
    assert "35 images in 4 shards" in capsys.readouterr().out
    assert read_index(out / "val").provenance["source"] == str(source)
    assert not list(out.glob("**/.*"))


def test_labels_in_every_form_are_the_same(downloaded, tmp_path):
    _, _, _, names, truth, meta = downloaded
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "meta.mat").write_bytes(meta)
    wnids = [SYNSETS[label] for label in VAL]
    shuffled = [5, 2, 7, 0, 1, 6, 3, 4]
    forms = {
        "LOC_val_solution.csv": "ImageId,PredictionString\n"
        + "".join(f"{names[i][:-5]},{wnids[i]} 1 2 30 40 {wnids[i]} 5 6 7 8\n" for i in shuffled),
        "val.txt": "".join(f"{names[i]} {VAL[i]}\n" for i in shuffled),
        "synset.txt": "".join(f"{names[i]} {wnids[i]}\n" for i in shuffled),
        "imagenet_2012_validation_synset_labels.txt": "\n".join(wnids),
        "ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)) + "\n",
    }
    for name, text in forms.items():
        (folder / name).write_text(text)
        # Images in another order than their names: labels go by name.
        given = validation_labels(folder / name, [names[i] for i in shuffled], SYNSETS)
        assert given == [VAL[i] for i in shuffled], name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01440764\n", "holds 1 labels for 8 images"),
        ("n01440764\n" * 7 + "n00000000\n", "has the label n00000000, which is no class"),
        ("".join(f"ILSVRC2012_val_{n:08d}.JPEG {n}\n" for n in range(1, 9)), "must be from 0 to 4"),
        ("other.JPEG 1\n", "holds no label for ILSVRC2012_val_00000001.JPEG"),
        ("3\n" * 8, "meta.mat: needed to read the challenge's numbers"),
    ],
)
def test_labels_that_do_not_fit_are_named(downloaded, tmp_path, capsys, text, message):
    source, *_ = downloaded
    labels = tmp_path / "labels.txt"
    labels.write_text(text)
    assert main([str(source), str(tmp_path / "out"), "--val-labels", str(labels)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_files_are_no_development_kit(downloaded, tmp_path, capsys, monkeypatch):
    source, *_ = downloaded
    kit = source / "ILSVRC2012_devkit_t12.tar.gz"
    whole = kit.read_bytes()
    kit.write_bytes(whole[:200])
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "cannot be read as the development kit" in capsys.readouterr().err
    kit.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "pip install scipy" in capsys.readouterr().err
    kit.unlink()
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert "no file with its labels beside it" in capsys.readouterr().err


def test_one_tar_per_synset(tmp_path, capsys):
    images = imagenet.class_images(SYNSETS, 6)
    for synset, files in images.items():
        (tmp_path / "winter21").mkdir(exist_ok=True)
        (tmp_path / "winter21" / f"{synset}.tar").write_bytes(imagenet.class_tar(synset, files))
    assert main([str(tmp_path / "winter21"), str(tmp_path / "out"), "--val-share", "0.2"]) == 0
    both = stored(tmp_path / "out" / "train") | stored(tmp_path / "out" / "val")
    assert both == {data: SYNSETS.index(synset) for synset, files in images.items() for data in files}
    assert len(stored(tmp_path / "out" / "val")) == 6
    # The same in one tar, under any name.
    imagenet.write_train_tar(tmp_path / "fall11_whole.tar", images)
    assert main([str(tmp_path / "fall11_whole.tar"), str(tmp_path / "again"), "--val-share", "0.2"]) == 0
    assert stored(tmp_path / "again" / "val") == stored(tmp_path / "out" / "val")
    # Class numbers of published weights, of which these are five.
    assert main([str(tmp_path / "winter21"), str(tmp_path / "listed"), "--synsets", "imagenet-12k"]) == 0
    names = ImageNetInfo("imagenet-12k").label_names()
    index = read_index(tmp_path / "listed")
    assert index.classes == names
    assert stored(tmp_path / "listed") == {
        data: names.index(synset) for synset, files in images.items() for data in files if synset in names
    }
    assert "more classes have no usable image" in capsys.readouterr().out


def test_synsets_outside_a_list_are_left_out_and_named(tmp_path, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()
    for synset, files in imagenet.class_images(["n01440764", "n00000001"], 3).items():
        (folder / f"{synset}.tar").write_bytes(imagenet.class_tar(synset, files))
    assert main([str(folder), str(tmp_path / "out"), "--synsets", "imagenet-1k"]) == 0
    said = capsys.readouterr().out
    assert "left out: n00000001: is not in imagenet-1k; its 3 images were left out" in said
    assert set(stored(tmp_path / "out").values()) == {0}


def test_classes_are_in_the_order_of_published_weights():
    for name in ("imagenet-1k", "imagenet-12k", "imagenet-22k-ms"):
        synsets = ImageNetInfo(name).label_names()
        shuffled = [synsets[i] for i in np.random.default_rng(0).permutation(len(synsets))]
        assert class_order(shuffled, None) == (synsets, name)
    some = ImageNetInfo("imagenet-1k").label_names()[::10]
    assert class_order(some[::-1], None) == (some, None)
    assert class_order(["b", "a"], None) == (["a", "b"], None)


def test_damaged_tars_are_named(tmp_path, capsys):
    path = tmp_path / "ILSVRC2012_img_train.tar"
    imagenet.write_train_tar(path, imagenet.class_images(SYNSETS, 5))
    whole = path.read_bytes()
    for data, message in (
        (whole[: len(whole) // 2 + 100], "it ends inside"),
        (b"not a tar" * 200, "cannot be read as a tar"),
        (b"", "cannot be read as a tar"),
    ):
        path.write_bytes(data)
        assert main([str(path), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert re.search(f"^error: {re.escape(str(path))}.*{message}", error), error
    imagenet.write_val_tar(path, [])
    assert main([str(path), str(tmp_path / "out")]) == 2
    assert "holds no class tars" in capsys.readouterr().err


def test_damage_that_tarfile_passes_over_in_silence(tmp_path, capsys):
    whole = {synset: imagenet.class_tar(synset, files) for synset, files in imagenet.class_images(SYNSETS, 5).items()}
    victim = SYNSETS[1]
    with tarfile.open(fileobj=io.BytesIO(whole[victim])) as archive:
        header = archive.getmembers()[3].offset
    for damaged, message in (
        (whole[victim][: header + 2] + b"\xff\xff" + whole[victim][header + 4 :], "no end, but something else at"),
        (whole[victim][:header], "no end, but nothing at"),
        (whole[victim][: header + 600], "it ends inside"),
    ):
        folder = tmp_path / message.replace(" ", "")
        folder.mkdir()
        with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
            for synset, data in (whole | {victim: damaged}).items():
                imagenet.add(archive, f"{synset}.tar", data)
        assert main([str(folder), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert re.search(f"ILSVRC2012_img_train.tar: {victim}.tar: cannot be read as a tar .{message}", error), error
        for synset, data in (whole | {victim: damaged}).items():
            (folder / f"{synset}.tar").write_bytes(data)
        (folder / "ILSVRC2012_img_train.tar").unlink()
        assert main([str(folder), str(tmp_path / "out")]) == 2
        assert f"{victim}.tar: cannot be read as a tar ({message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_long_names_keep_their_extension(tmp_path, format):
    (tmp_path / "tars").mkdir()
    files = imagenet.class_images(["n01440764"], 2)["n01440764"]
    with tarfile.open(tmp_path / "tars" / "n01440764.tar", "w", format=format) as archive:
        for number, data in enumerate(files):
            imagenet.add(archive, f"{'long/' * 30}{number}.JPEG", data)
    assert main([str(tmp_path / "tars"), str(tmp_path / "out")]) == 0
    index = read_index(tmp_path / "out")
    assert index.extensions == [".jpeg"]
    assert {ShardReader(index).name(i) for i in range(2)} == {"000000000.jpeg", "000000001.jpeg"}


def test_pieces_of_a_file_read_like_the_file(tmp_path):
    inner = imagenet.class_tar("n1", imagenet.class_images(["n1"], 4)["n1"])
    (tmp_path / "whole").write_bytes(b"x" * 700 + inner + b"y" * 900)
    (tmp_path / "inner").write_bytes(inner)
    expected = [(name, offset + 700, size) for name, offset, size in members(tmp_path / "inner")]
    assert list(members(tmp_path / "whole", 700, len(inner))) == expected
    assert len(expected) == 4
    with pytest.raises(DataError, match="cannot be read: No such file"):
        list(members(tmp_path / "nowhere"))


def test_smaller_images(downloaded, tmp_path):
    source, *_ = downloaded
    assert main([str(source), str(tmp_path / "out"), "--max-side", "20", "--jobs", "2"]) == 0
    reader = ShardReader(read_index(tmp_path / "out" / "train"))
    assert len(reader.index) == 35
    for number in range(35):
        image = Image.open(io.BytesIO(reader.read(number)))
        assert image.size == (20, 16)
        expected = imagenet.colour(int(reader.index.label[number]))
        assert np.abs(np.asarray(image).mean((0, 1)) - expected).max() < 6

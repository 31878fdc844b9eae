"""The measured mean and deviation are those of all pixels, each image weighing the same."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from conftest import png
from PIL import Image

from fcmae.data.statistics import main
from fcmae.data.writer import write_shards


def numbers(text: str) -> tuple[list[float], list[float]]:
    found = re.search(r"^'data\.mean=\[(.*)\]' 'data\.std=\[(.*)\]'$", text, re.MULTILINE)
    return tuple([float(v) for v in found[part].split(",")] for part in (1, 2))


def expected(pixels: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    means = np.mean([p.reshape(-1, p.shape[-1]).mean(0) for p in pixels], 0)
    squares = np.mean([(p.reshape(-1, p.shape[-1]) ** 2).mean(0) for p in pixels], 0)
    return means, np.sqrt(squares - means**2)


def test_images_and_a_part_of_them(tmp_path, capsys):
    rng = np.random.default_rng(0)
    files = [png(rng, height=10 + n) for n in range(30)]
    write_shards(((f"{n}", "png", data, None) for n, data in enumerate(files)), tmp_path / "s", samples_per_shard=7)
    assert main([str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("30 of 30 images, 3 channels\n")
    pixels = [np.asarray(Image.open(io.BytesIO(data))) / 255 for data in files]
    for got, wanted in zip(numbers(said), expected(pixels), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert main([str(tmp_path / "s"), "--images", "5"]) == 0
    some = capsys.readouterr().out
    assert some.startswith("5 of 30 images")
    assert numbers(some) != numbers(said)
    assert main([str(tmp_path / "s"), "--images", "0", "--channels", "1"]) == 0
    assert len(numbers(capsys.readouterr().out)[0]) == 1


@pytest.mark.parametrize(("dtype", "unit"), [("uint8", 255), ("uint16", 65535), ("float32", 1)])
def test_arrays_of_any_number_of_channels(tmp_path, capsys, dtype, unit):
    rng = np.random.default_rng(0)
    arrays = [(rng.random((6, 5 + n, 5)) * 200 * [1, 0.5, 0.2, 0.9, 0.1]).astype(dtype) for n in range(4)]
    files = []
    for array in arrays:
        buffer = io.BytesIO()
        np.save(buffer, array)
        files.append(buffer.getvalue())
    write_shards(((f"{n}", "npy", data, None) for n, data in enumerate(files)), tmp_path / "s")
    assert main([str(tmp_path / "s")]) == 0
    wanted = expected([array.astype(np.float64) / unit for array in arrays])
    for got, value in zip(numbers(capsys.readouterr().out), wanted, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5)


def test_what_cannot_be_measured_is_one_line(tmp_path, capsys):
    buffers = [io.BytesIO(), io.BytesIO()]
    for buffer, channels in zip(buffers, (2, 3), strict=True):
        np.save(buffer, np.zeros((3, 3, channels), np.uint8))
    mixed = ((f"{n}", "npy", buffer.getvalue(), None) for n, buffer in enumerate(buffers))
    write_shards(mixed, tmp_path / "mixed")
    write_shards([("a", "png", b"no image", None)], tmp_path / "broken")
    for folder, message in (
        ("nowhere", "no such file or folder"),
        ("mixed", "1.npy has 3 channels, others have 2"),
        ("broken", "a.png cannot be decoded: is in no image format that Pillow knows"),
    ):
        assert main([str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
    with pytest.raises(SystemExit, match="2"):
        main(["x", "--images", "-1"])
    assert "--images -1: must be at least 0" in capsys.readouterr().err

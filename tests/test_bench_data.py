"""The data benchmark prints its ratios, and none for wrong pixels."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fcmae.data import jpeg

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_data.py"
SMALL = ["--images", "8", "--size", "64", "--repeats", "1"]


@pytest.fixture(scope="module")
def bench():
    specification = importlib.util.spec_from_file_location("bench_data", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["bench_data"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def threads():
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_ratios_and_report(bench, tmp_path, capsys):
    report = tmp_path / "report.json"
    code = bench.main([*SMALL, "--workers", "1", "--train", "mini", "--steps", "2", "--json", str(report)])
    measured = json.loads(report.read_text())
    assert set(measured["ratios"]) == {"original files", "256 px"}
    assert all(error <= 2 for error in measured["parity"].values())
    assert all(speed > 0 for speeds in measured["images_per_second"].values() for speed in speeds)
    assert all(0 < part["waiting"] < 1 for part in measured["training"].values())
    printed = capsys.readouterr().out
    assert printed.count("met |") + printed.count("MISSED |") == 2
    assert code == ("MISSED" in printed)
    assert "ImageFolder and DataLoader" in printed
    assert "| pretraining mini | images/s | of it waiting for data |" in printed


def test_photographs_have_the_size_of_imagenets(bench):
    rng = np.random.default_rng(0)
    files = [bench.encode(bench.photograph(rng, *size)) for size in bench.SIZES]
    assert all(80_000 < len(data) < bench.BYTES for data in files)
    assert max(Image.open(io.BytesIO(bench.reduced(files[0], 256))).size) == 256


def test_wrong_pixels_have_no_speed(bench, monkeypatch, capsys):
    right = jpeg.crop
    monkeypatch.setattr(jpeg, "crop", lambda *arguments: right(*arguments).flip(1))
    with pytest.raises(SystemExit, match="crops differ from the reference by"):
        bench.main(SMALL)
    assert "images/s" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["images", "size", "repeats"])
def test_wrong_arguments_are_named(bench, capsys, name):
    with pytest.raises(SystemExit, match="2"):
        bench.main([f"--{name}", "0"])
    assert f"--{name} 0: must be at least 1" in capsys.readouterr().err

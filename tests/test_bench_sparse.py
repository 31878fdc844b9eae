"""The benchmark of the layouts: that it runs, and that a wrong answer gets no speed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from fcmae.sparse.packed import PackedLayout

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "bench_sparse.py"
SMALL = ["--sizes", "mini", "--batch", "2", "--image-size", "64", "--repeats", "2", "--compile", "no"]


@pytest.fixture(scope="module")
def bench():
    spec = spec_from_file_location("bench_sparse", SCRIPT)
    module = module_from_spec(spec)
    sys.modules["bench_sparse"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["encoder", "model"])
def test_table_and_report(tmp_path, part):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *SMALL, "--part", part, "--json", str(report)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(report.read_text())["results"]
    assert [r["layout"] for r in results] == ["packed", "masked"]
    for result in results:
        assert result["images_per_second"] == pytest.approx(2 / result["seconds"])
        assert result["parity"] < 1e-3
        assert f"| {result['images_per_second']:.4g} |" in done.stdout
    assert results[0]["memory"] < results[1]["memory"]


def test_a_wrong_answer_has_no_speed(bench, monkeypatch, capsys):
    right = PackedLayout.depthwise
    # Shifted by a channel; a mere factor would vanish in the norm behind it.
    monkeypatch.setattr(PackedLayout, "depthwise", lambda self, x, conv: right(self, x, conv).roll(1, -1))
    with pytest.raises(SystemExit, match=r"packed \(eager, .*\) gives wrong features: relative error"):
        bench.main(SMALL)
    assert "images/s" not in capsys.readouterr().out


def test_missed_musts_are_said_and_fail(bench, monkeypatch, capsys):
    impossible = bench.Case("mini", 1, ("packed", "masked"), "fp32", "encoder", ((bench.SPEED, "masked", 1e6),))
    monkeypatch.setattr(bench, "ON_CPU", [impossible])
    monkeypatch.setattr(bench, "ON_GPU", [impossible])
    assert bench.main(["--image-size", "64", "--repeats", "1", "--compile", "no"]) == 1
    assert "| ≥ 1e+06 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "gigantic"], "--sizes gigantic: must be among"),
        (["--sizes", "mini", "--layouts", "sparse"], "--layouts sparse: must be among packed, masked, minkowski"),
        (["--batch", "0"], "--batch 0: must be at least 1"),
        (["--image-size", "100"], "--image-size 100: must be a multiple of 32"),
        (["--mask-ratio", "1.5"], "--mask-ratio 1.5: must be greater than 0 and less than 1"),
        (["--device", "nowhere"], "--device nowhere: "),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: no such folder"),
    ],
)
def test_wrong_arguments_are_named(bench, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_training_flops_agree_with_the_published_count(bench):
    # ConvNeXt V2 paper: atto has 0.55 G multiply-adds at 224 px, of which 19/49 at ratio 0.6.
    model = bench.create_model("atto")
    assert bench.training_flops(model, "encoder") == pytest.approx(6 * 0.55e9 * 19 / 49, rel=0.02)

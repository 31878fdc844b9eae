"""From ImageNet as downloaded to a fine-tuned classifier, with the commands of the documentation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "data"))

import imagenet

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_shards.py"
SMALL = ["run.log_every=5", "data.workers=2"]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tuned(shards: Path, run_dir: Path) -> tuple[list[float], float]:
    """Losses of pretraining, and the top-1 accuracy after fine-tuning."""
    data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]
    run("-m", "fcmae.pretrain", *data, *SMALL, "optim.epochs=2", f"run.dir={run_dir / 'pretrain'}")
    records = [json.loads(line) for line in (run_dir / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    tuning = [f"checkpoint={run_dir / 'pretrain'}", *data, *SMALL, "optim.epochs=2", f"run.dir={run_dir / 'tuned'}"]
    run("-m", "finetune.train", *tuning)
    lines = (run_dir / "tuned" / "evaluations.jsonl").read_text().splitlines()
    return [record["loss"] for record in records], json.loads(lines[-1])["top1"]


@pytest.mark.slow
def test_from_ilsvrc2012_to_a_classifier(tmp_path):
    """24 classes with 100 training images each, 240 for validation, and the development kit."""
    synsets = [f"n{10_000_000 + 37 * number:08d}" for number in range(24)]
    by_id = [synsets[i] for i in np.random.default_rng(1).permutation(24)]
    source = tmp_path / "downloads"
    source.mkdir()
    imagenet.write_train_tar(source / "ILSVRC2012_img_train.tar", imagenet.class_images(synsets, 100))
    rng = np.random.default_rng(2)
    labels = [int(n) for n in rng.integers(0, 24, 240)]
    imagenet.write_val_tar(
        source / "ILSVRC2012_img_val.tar", [imagenet.jpeg(rng, imagenet.colour(label)) for label in labels]
    )
    truth = [by_id.index(synsets[label]) + 1 for label in labels]
    imagenet.write_devkit(source / "ILSVRC2012_devkit_t12.tar.gz", by_id, truth)
    said = run(str(SCRIPT), str(source), str(tmp_path / "shards"), "--samples-per-shard", "200")
    assert "2,400 images in 12 shards" in said
    losses, top1 = tuned(tmp_path / "shards", tmp_path / "runs")
    assert losses[-1] < losses[0]
    # Wrong labels of either split would leave it at chance, 4 %.
    assert top1 > 80


@pytest.mark.slow
def test_from_the_tars_of_21k_to_a_classifier(tmp_path):
    """60 synsets with 50 images each, a twentieth set aside, re-encoded to 32 pixels."""
    synsets = [f"n{1_000_000 + 53 * number:08d}" for number in range(60)]
    source = tmp_path / "winter21"
    source.mkdir()
    for synset, files in imagenet.class_images(synsets, 50).items():
        (source / f"{synset}.tar").write_bytes(imagenet.class_tar(synset, files))
    said = run(str(SCRIPT), str(source), str(tmp_path / "shards"), "--val-share", "0.05", "--max-side", "32")
    assert "2,850 images in 3 shards" in said
    losses, top1 = tuned(tmp_path / "shards", tmp_path / "runs")
    assert losses[-1] < losses[0]
    assert top1 > 60  # chance is 1.7 %

"""`python -m finetune.train`: from a run, from a weight file and from scratch; evaluation and augmentation."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import make_split, run_module, tiny_run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fcmae.convert import load_encoder, read_encoder
from fcmae.data.augment import TrainView
from fcmae.data.decode import open_picture
from fcmae.data.loader import normalise
from fcmae.errors import CheckpointError
from fcmae.model import create_encoder
from fcmae.pretraining import build_model
from fcmae.runtime.distributed import Ranks
from fcmae.settings import ModelConfig
from finetune.augment import AugmentedView, BatchAugment
from finetune.evaluate import evaluate
from finetune.settings import AugmentConfig

FAST = [
    "optim.batch_size=24",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
    "data.workers=0",
    "run.device=cpu",
    "run.log_every=1",
]


@pytest.fixture(scope="module")
def pretrained(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    done = run_module("fcmae.pretrain", *tiny_run(shards), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo" / "pretrain"


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_finetune_takes_over_model_and_data_from_the_run(pretrained, shards):
    folder = pretrained.parents[2]
    done = run_module("finetune.train", *FAST, cwd=folder)  # the default checkpoint is the demo's pretraining run
    assert done.returncode == 0, done.stderr
    assert "weights from runs/demo/pretrain; 24×24 images, 3 classes" in done.stdout
    run = folder / "runs" / "demo" / "finetune"
    assert [r["step"] for r in evaluations(run)] == [3, 6]
    for record in evaluations(run):
        assert record["images"] == 20
        assert 0 <= record["top1"] <= record["top5"] == 100.0  # three classes
        assert {"val_loss", "ema_top1", "ema_top5"} <= set(record)
    for name in ("best", "last"):
        with safe_open(run / f"{name}.safetensors", framework="pt") as handle:
            header = handle.metadata()
        assert json.loads(header["classes"]) == ["class 0", "class 1", "class 2"]
        assert json.loads(header["provenance"])["evaluation"]["top1"] >= 0
    classifier = timm.create_model(
        "convnextv2_atto", num_classes=3, patch_size=1, dims=(4, 8, 8, 8), depths=(1, 1, 1, 1)
    )
    classifier.load_state_dict(load_file(run / "best.safetensors"), strict=True)
    # Started again, it is complete and says the same.
    again = run_module("finetune.train", *FAST, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "Done: step 6 of 6" in again.stdout
    assert len(evaluations(run)) == 2


def test_finetune_in_two_parts_ends_with_the_same_bits(pretrained, tmp_path):
    # Drop path, erasing, mixup and cutmix all draw random numbers inside a step, RandAugment inside a sample.
    arguments = [
        f"checkpoint={pretrained}",
        *FAST,
        "augment.mixup=0.8",
        "augment.cutmix=1.0",
        "augment.random_erasing=0.5",
    ]
    arguments += [
        "augment.rand_augment=rand-m9-mstd0.5-inc1",
        "model.drop_path=0.2",
        "ema.decay=0.9",
        "layer_decay=0.7",
    ]
    for name, parts in (("whole", [[]]), ("parts", [["run.max_steps=2"], ["data.workers=2"]])):
        for part in parts:
            done = run_module("finetune.train", *arguments, f"run.dir={name}", *part, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
    whole, parts = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_evaluation_that_was_cut_off_is_made_up_for(pretrained, tmp_path):
    arguments = [f"checkpoint={pretrained}", *FAST, "run.dir=run"]
    assert run_module("finetune.train", *arguments, "run.max_steps=3", cwd=tmp_path).returncode == 0
    whole = evaluations(tmp_path / "run")
    (tmp_path / "run" / "evaluations.jsonl").unlink()  # as if killed between checkpoint and evaluation
    done = run_module("finetune.train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in evaluations(tmp_path / "run")] == [3, 6]
    assert evaluations(tmp_path / "run")[0] == whole[0]


def test_from_scratch_and_from_a_weight_file(pretrained, shards, tmp_path):
    common = [*FAST, f"data.train={shards / 'train'}", "optim.epochs=1", "ema.decay=null"]
    scratch = ["checkpoint=null", "model=mini", "model.image_size=24", "model.dims=[4,8,8,8]", "model.depths=[1,1,1,1]"]
    done = run_module("finetune.train", *common, *scratch, "run.dir=scratch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "from scratch" in done.stdout
    done = run_module(
        "finetune.train", *common, f"checkpoint={pretrained / 'encoder.safetensors'}", "run.dir=file", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "24×24 images, 3 classes" in done.stdout
    assert "ema_top1" not in evaluations(tmp_path / "file")[0]


def test_what_cannot_be_finetuned_is_one_line(pretrained, shards, tmp_path):
    make_split(tmp_path / "other", 24, classes=2)
    cases = [
        ([f"checkpoint={pretrained}", "model=atto"], "does not fit the model"),
        (
            [f"checkpoint={pretrained}", f"data.val={tmp_path / 'other'}"],
            "must have the same classes in the same order",
        ),
        ([f"checkpoint={tmp_path}"], "model.size=null: choose one"),
        ([f"checkpoint={tmp_path}", "model=mini", f"data.train={shards / 'train'}"], "holds no complete checkpoint"),
    ]
    for arguments, message in cases:
        done = run_module("finetune.train", *FAST, *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_unlabelled_data_is_refused(tmp_path, pretrained):
    from fcmae.data.writer import write_shards

    write_shards((("a", "png", b"x", None) for _ in range(1)), tmp_path / "plain")
    done = run_module(
        "finetune.train", f"checkpoint={pretrained}", f"data.train={tmp_path / 'plain'}", *FAST, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "holds images without a label" in done.stderr


class TestLoadEncoder:
    def test_sparse_features_of_a_fully_visible_image_are_the_dense_ones(self, pretrained):
        classifier = create_encoder("mini", stem_stride=1, dims=(4, 8, 8, 8), depths=(1, 1, 1, 1), num_classes=5)
        weights = read_encoder(pretrained)
        load_encoder(classifier, weights)
        assert weights.model["image_size"] == 24
        for name, value in weights.tensors.items():
            assert torch.equal(classifier.state_dict()[name], value)
        sparse = build_model(ModelConfig(**weights.model))
        sparse.encoder.load_state_dict(weights.tensors)
        images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        tiles = sparse.encode(images, torch.arange(9).expand(2, -1))  # (B, V, 1, 1, C), patches in rows
        expected = classifier.forward_features(images).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tiles.flatten(1, 3), expected, rtol=1e-4, atol=1e-5)

    def test_run_checkpoint_and_file_hold_the_same(self, pretrained):
        run = read_encoder(pretrained)
        folder = read_encoder(pretrained / "checkpoints" / "step-00000006")
        file = read_encoder(pretrained / "encoder.safetensors")
        for other in (folder, file):
            assert run.tensors.keys() == other.tensors.keys()
            assert all(torch.equal(value, other.tensors[name]) for name, value in run.tensors.items())
            assert other.model["dims"] == [4, 8, 8, 8]

    def test_the_head_of_another_classifier_is_not_taken_over(self, pretrained, tmp_path):
        other = create_encoder("mini", num_classes=5)
        save_file(other.state_dict(), tmp_path / "x.safetensors", metadata={"model": "not ours"})
        classifier = create_encoder("mini", num_classes=7)
        fresh = classifier.head.fc.weight.clone()
        load_encoder(classifier, read_encoder(tmp_path / "x.safetensors"))
        assert torch.equal(classifier.head.fc.weight, fresh)
        assert torch.equal(classifier.stem[0].weight, other.stem[0].weight)

    def test_plain_torch_files(self, pretrained, tmp_path):
        tensors = read_encoder(pretrained).tensors
        for content in (tensors, {"model": tensors}, {"state_dict": tensors}):
            torch.save(content, tmp_path / "x.pth")
            assert read_encoder(tmp_path / "x.pth").tensors.keys() == tensors.keys()

    def test_nothing_is_unpickled(self, tmp_path):
        torch.save({"model": Path("x")}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match="is not a file of plain tensors"):
            read_encoder(tmp_path / "x.pth")

    def test_misfits_are_named(self, tmp_path):
        model = create_encoder("mini")
        tensors = {k: v for k, v in model.state_dict().items() if k != "stem.0.bias"}
        tensors["extra"] = torch.zeros(1)
        tensors["stem.1.weight"] = torch.zeros(3)
        save_file(tensors, tmp_path / "x.safetensors")
        expected = r"missing stem.0.bias; unexpected extra; shape stem.1.weight \(3,\) where the model has \(16,\)"
        with pytest.raises(CheckpointError, match=expected):
            load_encoder(create_encoder("mini"), read_encoder(tmp_path / "x.safetensors"))

    @pytest.mark.parametrize("content", [b"", b"garbage" * 10])
    @pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
    def test_unreadable_files_are_named(self, tmp_path, content, name):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"checkpoint=.*{name}: "):
            read_encoder(tmp_path / name)


def test_evaluate_against_a_plain_reference():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 9))
    images, labels = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8), torch.randint(0, 9, (30,))
    batches = [{"image": images[i : i + 8], "label": labels[i : i + 8]} for i in range(0, 30, 8)]
    mean, std = [0.5] * 3, [0.2] * 3
    scores = evaluate(model, batches, Ranks(0, 1, torch.device("cpu")), mean, std)
    logits = model(normalise(images, mean, std))
    order = logits.argsort(1, descending=True)
    assert scores["images"] == 30
    assert scores["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert scores["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert scores["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert model.training


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_augmented_view_depends_on_the_sample_alone(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    image = open_picture(buffer.getvalue(), len(mode))
    view = AugmentedView(TrainView((24, 24)), "rand-m9-mstd0.5-inc1", [0.5] * len(mode))
    random.seed(5)
    state = random.getstate()
    # Enough draws to meet every operation at every strength.
    first = [view(image, np.random.default_rng(i)) for i in range(300)]
    assert random.getstate() == state
    np.random.seed(1)  # noqa: NPY002
    again = [view(image, np.random.default_rng(i)) for i in range(300)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    plain = AugmentedView(TrainView((24, 24)), None, [0.5])
    changed = [not torch.equal(a, plain(image, np.random.default_rng(i))) for i, a in enumerate(first)]
    assert sum(changed) > 150


def test_batch_augment_chooses_loss_and_targets():
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    plain = BatchAugment(AugmentConfig(random_erasing=0, label_smoothing=0.1), 4, torch.device("cpu"))
    same, targets = plain(images, labels)
    assert torch.equal(same, images)
    assert torch.equal(targets, labels)
    logits = torch.randn(8, 4)
    expected = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(plain.criterion(logits, targets), expected)
    mixed = BatchAugment(AugmentConfig(mixup=0.8, random_erasing=0, label_smoothing=0.1), 4, torch.device("cpu"))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    blended, targets = mixed(images.clone(), labels)
    assert not torch.equal(blended, images)
    assert targets.shape == (8, 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    torch.testing.assert_close(mixed.criterion(logits, targets), F.cross_entropy(logits, targets))
    random.seed(0)
    erased, _ = BatchAugment(AugmentConfig(random_erasing=1.0), 4, torch.device("cpu"))(images.clone(), labels)
    assert not torch.equal(erased, images)

"""The fine-tuning application: a dense timm ConvNeXt V2 around pretrained weights, trained and evaluated."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fcmae import __version__
from fcmae.architecture import pair
from fcmae.convert import load_encoder, read_encoder
from fcmae.data.augment import CentreView, TrainView
from fcmae.data.loader import FIXED_DATA, Batch, Samples, evaluation_batches, normalise, train_batches
from fcmae.data.reader import ShardReader
from fcmae.data.splits import open_faults, open_split, plan_batches
from fcmae.files import written_whole
from fcmae.model import create_encoder
from fcmae.runtime.distributed import Ranks, ranks, this_command
from fcmae.runtime.loop import Result, Task, fit
from fcmae.runtime.optim import build_optimizer, build_schedule
from fcmae.runtime.progress import Display
from fcmae.runtime.rundir import RunFolder
from fcmae.runtime.tracking import Tracker
from finetune.augment import AugmentedView, BatchAugment
from finetune.evaluate import evaluate
from finetune.settings import FinetuneConfig

FIXED = ("checkpoint", "model.", *FIXED_DATA, "optim.batch_size", "run.seed", "augment.", "layer_decay", "ema.")


def finetune(config: FinetuneConfig) -> None:
    """Run `python -m finetune.train` with validated options."""
    with ranks(config.run.device) as me:
        _Finetuning(config, me).run()


def build_classifier(config: FinetuneConfig, num_classes: int) -> ConvNeXt:
    """timm's ConvNeXt V2 with the recipe's drop path and head, and the checkpoint's weights where there is one."""
    model = config.model
    classifier = create_encoder(
        str(model.size),
        in_chans=int(model.in_chans or 3),
        stem_stride=int(model.stem_stride or 4),
        depths=model.depths,
        dims=model.dims,
        num_classes=num_classes,
        drop_path_rate=model.drop_path,
        head_init_scale=model.head_init_scale,
    )
    if config.checkpoint is not None:
        load_encoder(classifier, read_encoder(config.checkpoint))
    return classifier


class _Finetuning:
    """One run: the pieces that training, evaluation and the closing words share."""

    def __init__(self, config: FinetuneConfig, me: Ranks) -> None:
        self.config, self.me = config, me
        train = open_split(config.data, "train", me)
        assert train is not None
        self.train_index, self.val_index = train, open_split(config.data, "val", me)
        self.mean, self.std = config.data.statistics(int(config.model.in_chans or 3))
        self.size = pair(config.model.image_size)
        torch.manual_seed(config.run.seed)
        self.model = build_classifier(config, self.train_index.num_classes)
        # Depthwise convolutions and norms run on channels-last maps, on CPU and GPU.
        self.model = self.model.to(me.device, memory_format=torch.channels_last)
        self.ema = (
            ModelEmaV3(self.model, decay=config.ema.decay, use_warmup=config.ema.warmup) if config.ema.decay else None
        )
        self.folder = RunFolder(Path(config.run.dir), me, FIXED)

    def run(self) -> None:
        config, me = self.config, self.me
        self.folder.open(config, self.train_index.fingerprint)
        optimizer = build_optimizer(self.model, config.optim, config.layer_decay)
        start = self.folder.resume(config.run.resume, self.model, optimizer, self.ema)
        plan = plan_batches(self.train_index, config.data, config.optim, config.run.seed, me)
        total = config.optim.epochs * plan.steps_per_epoch
        stop_at = min(total, config.run.max_steps or total)
        crop = TrainView(self.size, tuple(config.data.crop_scale), config.data.hflip)  # type: ignore[arg-type]
        view = AugmentedView(crop, config.augment.rand_augment, self.mean)
        samples = Samples(
            ShardReader(self.train_index, config.data.storage), view, int(config.model.in_chans or 3), config.run.seed
        )
        augment = BatchAugment(config.augment, self.train_index.num_classes, me.device)

        def batches(step: int) -> Iterator[Batch]:
            a = config.optim.accumulate
            return train_batches(samples, plan, step * a, stop_at * a, config.data.workers, faults)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            images, targets = augment(normalise(batch["image"], self.mean, self.std), batch["label"])
            images = images.contiguous(memory_format=torch.channels_last)
            return augment.criterion(model(images), targets)

        self.tracker = Tracker(self.folder.path, config.tracking, self.folder.settings, start, me.main)
        self.display = Display(stop_at, start, me.main)
        faults = open_faults(config.data, self.display)
        every = config.eval.every_epochs * plan.steps_per_epoch

        def after_step(step: int) -> bool:
            due = step % every == 0 or step == stop_at
            if due:
                self.measure(step, plan.steps_per_epoch)
            return due

        task = Task(
            model=self.model,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, config.optim, plan.steps_per_epoch),
            batches=batches,
            loss=loss,
            batch_size=config.optim.batch_size,
            accumulate=config.optim.accumulate,
            steps_per_epoch=plan.steps_per_epoch,
            total_steps=total,
            clip_grad=config.optim.clip_grad,
            ema=self.ema,
            after_step=after_step,
            bad_samples=faults.total if faults else None,
        )
        self.display.say(self.describe(total))
        try:
            if start > 0 and (start % every == 0 or start == stop_at):
                self.measure_if_owed(start, plan.steps_per_epoch)
            result = fit(task, config.run, self.folder.path, me, self.tracker, self.display, start)
            self.finish(result, total)
        finally:
            self.display.close()
            self.tracker.close()
        if result.stopped_by is not None:
            sys.exit(128 + result.stopped_by)

    def measure_if_owed(self, step: int, steps_per_epoch: int) -> None:
        """Evaluate after `step` if the run was cut off between that step and its evaluation; rank 0 knows."""
        if self.me.max(self.me.main and not any(r["step"] == step for r in self.folder.records("evaluations"))):
            self.measure(step, steps_per_epoch)

    def measure(self, step: int, steps_per_epoch: int) -> None:
        """Evaluate the model and its average, record the result and keep the weights if they are the best yet."""
        if self.val_index is None:
            return
        config = self.config
        samples = Samples(
            ShardReader(self.val_index, config.data.storage),
            CentreView(self.size, config.eval.crop_share),
            int(config.model.in_chans or 3),
        )

        def score(model: nn.Module) -> dict[str, float]:
            faults = open_faults(config.data, self.display)
            batches = evaluation_batches(
                samples, config.eval.batch_size, self.me.rank, self.me.count, config.data.workers, faults
            )
            return evaluate(model, batches, self.me, self.mean, self.std, config.run.precision == "bf16")

        record: dict[str, Any] = {"step": step, "epoch": step / steps_per_epoch, **score(self.model)}
        if self.ema is not None:
            record |= {f"ema_{name}": value for name, value in score(self.ema.module).items() if name != "images"}
        if not self.me.main:
            return
        best_before = max((self._score(r) for r in self.folder.records("evaluations")), default=-1.0)
        average = self.ema is not None and record["ema_top1"] >= record["top1"]
        if self._score(record) > best_before:
            chosen = self.ema.module if average and self.ema is not None else self.model
            self.save_classifier("best", chosen, record)
        self.tracker.log_evaluation(record)
        text = f"epoch {record['epoch']:.3g}: top-1 {record['top1']:.2f} %, top-5 {record['top5']:.2f} %"
        if self.ema is not None:
            text += f"; averaged weights {record['ema_top1']:.2f} %, {record['ema_top5']:.2f} %"
        self.display.say(text)

    @staticmethod
    def _score(record: dict[str, Any]) -> float:
        return max(record["top1"], record.get("ema_top1", 0.0))

    def save_classifier(self, name: str, model: nn.Module, record: dict[str, Any] | None) -> None:
        """Write a classifier under timm's names; its header holds settings, class names and the measured accuracy."""
        path = self.folder.path / f"{name}.safetensors"
        provenance = {
            "program": f"fcmae {__version__}",
            "checkpoint": self.config.checkpoint,
            "weights": "model" if model is self.model else "average",
            "evaluation": record,
        }
        header = {
            "format": "pt",
            "model": json.dumps(dataclasses.asdict(self.config.model)),
            "data": json.dumps({"mean": self.mean, "std": self.std}),
            "classes": json.dumps(self.train_index.classes),
            "provenance": json.dumps(provenance),
        }
        tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        with written_whole(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    def describe(self, total: int) -> str:
        config = self.config
        start = f"weights from {config.checkpoint}" if config.checkpoint else "from scratch"
        val = f", {len(self.val_index):,} for validation" if self.val_index is not None else ", no validation split"
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        return (
            f"ConvNeXt V2 {config.model.size}: {millions:.2f} M parameters, {start}; "
            f"{self.size[0]}×{self.size[1]} images, {self.train_index.num_classes} classes\n"
            f"data: {len(self.train_index):,} images from {self.train_index.origin}{val}\n"
            f"{config.optim.epochs} epochs, {total:,} steps of {config.optim.batch_size} images, peak lr "
            f"{config.optim.absolute_lr:.2e}, layer decay {config.layer_decay}; run folder {config.run.dir}"
        )

    def finish(self, result: Result, total: int) -> None:
        if not self.me.main:
            return
        if result.stopped_by is not None:
            self.display.say(
                f"\nStopped by {result.stopped_by.name} after step {result.step:,} of {total:,}; everything is saved."
            )
            self.display.say(f"Continue with:  {this_command('finetune.train', self.me)}")
            return
        records = self.folder.records("evaluations")
        last = records[-1] if records else None
        self.save_classifier("last", self.model if self.ema is None else self.ema.module, last)
        self.display.say(f"\nDone: step {result.step:,} of {total:,}")
        if records:
            best = max(records, key=self._score)
            chance = 100 / self.train_index.num_classes
            self.display.say(
                f"  best top-1   {self._score(best):.2f} % after epoch {best['epoch']:.3g} (chance {chance:.2f} %)"
            )
            self.display.say(f"  best weights {self.folder.path / 'best.safetensors'}")
        self.display.say(f"  last weights {self.folder.path / 'last.safetensors'}")

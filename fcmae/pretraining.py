"""The pretraining application: build model, data and optimiser from typed options, fit, leave the encoder behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae.configuration import conf_dir, override
from fcmae.convert import save_encoder
from fcmae.data.augment import TrainView
from fcmae.data.loader import FIXED_DATA, Batch, Samples, normalise, train_batches
from fcmae.data.reader import ShardReader
from fcmae.data.splits import open_faults, open_split, plan_batches
from fcmae.errors import DataError
from fcmae.model import FCMAE, create_model
from fcmae.pictures import write_reconstructions
from fcmae.runtime.distributed import Ranks, ranks, this_command
from fcmae.runtime.loop import Result, Task, fit
from fcmae.runtime.optim import build_optimizer, build_schedule
from fcmae.runtime.progress import Display
from fcmae.runtime.rundir import RunFolder
from fcmae.runtime.tracking import Tracker
from fcmae.settings import ModelConfig, PretrainConfig

# What may not change between a run and its continuation: it decides what a step computes.
FIXED = ("model.", *FIXED_DATA, "optim.batch_size", "run.seed")
FREE = ("model.layout",)


def build_model(config: ModelConfig) -> FCMAE:
    return create_model(
        config.size,
        image_size=config.image_size,
        patch_size=config.patch,
        in_chans=config.in_chans,
        mask_ratio=config.mask_ratio,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        norm_pix_loss=config.norm_pix_loss,
        layout=config.layout,
        stem_stride=config.stem_stride,
        depths=config.depths,
        dims=config.dims,
    )


def pretrain(config: PretrainConfig) -> None:
    """Run `python -m fcmae.pretrain` with validated options."""
    with ranks(config.run.device) as me:
        _Pretraining(config, me).run()


class _Pretraining:
    """One run: the pieces that training, pictures and the closing words share."""

    def __init__(self, config: PretrainConfig, me: Ranks) -> None:
        self.config, self.me = config, me
        index = open_split(config.data, "train", me)
        assert index is not None
        self.index = index
        self.shown = ShardReader(open_split(config.data, "val", me) or index, config.data.storage)
        self.folder = RunFolder(Path(config.run.dir), me, FIXED, FREE)
        self.folder.open(config, index.fingerprint)
        self.mean, self.std = config.data.statistics(config.model.in_chans)
        torch.manual_seed(config.run.seed)
        self.model = build_model(config.model).to(me.device)
        self.plan = plan_batches(index, config.data, config.optim, config.run.seed, me)
        self.total = config.optim.epochs * self.plan.steps_per_epoch
        self.stop_at = min(self.total, config.run.max_steps or self.total)

    def run(self) -> None:
        config = self.config
        optimizer = build_optimizer(self.model, config.optim)
        start = self.folder.resume(config.run.resume, self.model, optimizer)
        self.tracker = Tracker(self.folder.path, config.tracking, self.folder.settings, start, self.me.main)
        self.display = Display(self.stop_at, start, self.me.main)
        self.faults = open_faults(config.data, self.display)
        task = Task(
            model=self.model,
            optimizer=optimizer,
            schedule=build_schedule(optimizer, config.optim, self.plan.steps_per_epoch),
            batches=self.batches,
            loss=self.loss,
            batch_size=config.optim.batch_size,
            accumulate=config.optim.accumulate,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.total,
            clip_grad=config.optim.clip_grad,
            after_step=self.after_step,
            bad_samples=self.faults.total if self.faults else None,
        )
        self.display.say(self.describe())
        try:
            result = fit(task, config.run, self.folder.path, self.me, self.tracker, self.display, start)
            if self.me.main:
                self.finish(result, start)
        finally:
            self.display.close()
            self.tracker.close()
        if result.stopped_by is not None:
            sys.exit(128 + result.stopped_by)

    def batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches from a step on."""
        config, model = self.config, self.model
        low, high = config.data.crop_scale
        samples = Samples(
            ShardReader(self.index, config.data.storage),
            TrainView(model.image_size, (low, high), config.data.hflip),
            config.model.in_chans,
            config.run.seed,
            model.num_patches,
            model.num_visible,
        )
        parts = config.optim.accumulate
        return train_batches(samples, self.plan, step * parts, self.stop_at * parts, config.data.workers, self.faults)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(normalise(batch["image"], self.mean, self.std), batch["visible"]).loss

    def after_step(self, step: int) -> bool:
        every = self.config.run.picture_every
        if self.me.main and every and step % every == 0 and step < self.stop_at:
            self.draw(step)
        return False  # others have not waited

    def draw(self, step: int) -> Path | None:
        """Write the reconstructions after `step`; None if an image for them cannot be used, which ends no run."""
        path = self.folder.path / "reconstructions" / f"step-{step:08d}.png"
        config = self.config
        try:
            write_reconstructions(
                self.model,
                self.shown,
                path,
                mean=self.mean,
                std=self.std,
                seed=config.run.seed,
                skip=config.data.on_error == "skip",
            )
        except DataError as error:
            self.display.say(f"no reconstructions after step {step:,}: {error}")
            return None
        self.tracker.picture("reconstructions", path, step)
        return path

    def describe(self) -> str:
        """What is about to run, in a few lines."""
        config, model, me = self.config, self.model, self.me
        rows, columns = model.grid
        encoder = sum(p.numel() for p in model.encoder.parameters())
        device = torch.cuda.get_device_name(me.device) if me.device.type == "cuda" else "CPU"
        return (
            f"FCMAE {config.model.size}: encoder {encoder / 1e6:.2f} M parameters, layout {model.layout}; "
            f"{model.image_size[0]}×{model.image_size[1]} images in {rows}×{columns} patches, "
            f"{model.num_visible} of {model.num_patches} visible\n"
            f"data: {len(self.index):,} images in {len(self.index.shards)} shards from {self.index.origin}\n"
            f"{config.optim.epochs} epochs, {self.total:,} steps of {config.optim.batch_size} images, "
            f"peak lr {config.optim.absolute_lr:.2e}, {config.run.precision} on {me.count} × {device}; "
            f"run folder {config.run.dir}"
        )

    def finish(self, result: Result, start: int) -> None:
        """Write the encoder and say what was reached, where it is and how to go on."""
        say = self.display.say
        weights = self.folder.path / "encoder.safetensors"
        progress = {"step": result.step, "total_steps": self.total}
        save_encoder(self.model.encoder, weights, self.config.model, self.mean, self.std, **progress)
        if result.stopped_by is not None:  # without a picture, for which its images may first have to be fetched
            say(f"\nStopped by {result.stopped_by.name} after step {result.step:,} of {self.total:,}; all is saved.")
            say(f"Continue with:  {this_command('fcmae.pretrain', self.me)}")
            return
        picture = self.draw(result.step)
        loss = self.folder.recent_loss()
        complete = start >= self.total
        ended = "This run is complete" if complete else "Done"
        say(f"\n{ended}: step {result.step:,} of {self.total:,}" + (f", loss {loss:.3f}" if loss is not None else ""))
        say(f"  encoder          {weights}")
        if picture is not None:
            say(f"  reconstructions  {picture}")
        if int(self.index.label.min()) >= 0:
            say(f"  fine-tune with   {finetune_command(self.config)}")
        if complete:
            say("  for a new run    choose another run.dir, or remove this one")


def finetune_command(config: PretrainConfig) -> str:
    """The command that fine-tunes the encoder of this run, with the recipe of its experiment where there is one."""
    name, folder = config.run.name, Path(config.run.dir)
    words = ["python -m finetune.train", override("checkpoint", str(folder))]
    standard = folder == Path("runs") / name / "pretrain"
    if standard and name != "demo" and (Path(conf_dir()) / "experiment" / f"{name}.yaml").is_file():
        words.insert(1, f"experiment={name}")
    elif not (standard and name == "demo"):
        target = folder.with_name("finetune" if folder.name == "pretrain" else f"{folder.name}-finetune")
        words.append(override("run.dir", str(target)))
    return " ".join(words)

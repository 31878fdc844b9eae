"""The pretraining application: build model, data and optimiser from typed options, fit, leave the encoder behind."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fcmae.convert import save_encoder
from fcmae.data.augment import TrainView
from fcmae.data.index import ShardIndex
from fcmae.data.loader import Batch, Samples, ShardReader, normalise, train_batches
from fcmae.data.order import BatchPlan
from fcmae.data.splits import open_split
from fcmae.model import FCMAE, create_model
from fcmae.pictures import write_reconstructions
from fcmae.runtime.distributed import Ranks, ranks
from fcmae.runtime.loop import Result, Task, fit
from fcmae.runtime.optim import build_optimizer, build_schedule
from fcmae.runtime.progress import Display
from fcmae.runtime.rundir import RunFolder
from fcmae.runtime.tracking import Tracker
from fcmae.settings import ModelConfig, PretrainConfig

# What may not change between a run and its continuation: it decides what a step computes.
FIXED = ("model.", "data.train", "data.crop_scale", "data.hflip", "data.block_shards", "optim.batch_size", "run.seed")
FREE = ("model.layout",)


def pretrain(config: PretrainConfig) -> None:
    """Run `python -m fcmae.pretrain` with validated options."""
    with ranks(config.run.device) as me:
        _pretrain(config, me)


def _pretrain(config: PretrainConfig, me: Ranks) -> None:
    folder = RunFolder(Path(config.run.dir), me, FIXED, FREE)
    folder.open(config)
    index = open_split(config.data, "train", me)
    assert index is not None
    torch.manual_seed(config.run.seed)
    model = build_model(config.model).to(me.device)
    optimizer = build_optimizer(model, config.optim)
    start = folder.resume(config.run.resume, model, optimizer)

    mean, std = config.data.statistics(config.model.in_chans)
    samples = Samples(
        ShardReader(index),
        TrainView(model.image_size, tuple(config.data.crop_scale), config.data.hflip),  # type: ignore[arg-type]
        config.model.in_chans,
        config.run.seed,
        model.num_patches,
        model.num_visible,
    )
    plan = BatchPlan(
        index.shard_samples,
        config.optim.batch_size,
        config.optim.accumulate,
        me.rank,
        me.count,
        config.run.seed,
        config.data.block_shards,
    )
    total = config.optim.epochs * plan.steps_per_epoch
    stop_at = min(total, config.run.max_steps or total)

    def batches(step: int) -> Iterator[Batch]:
        a = config.optim.accumulate
        return train_batches(samples, plan, step * a, stop_at * a, config.data.workers)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(normalise(batch["image"], mean, std), batch["visible"]).loss

    tracker = Tracker(folder.path, config.tracking, folder.settings, start, me.main)
    display = Display(stop_at, start, me.main)

    def draw(step: int) -> Path | None:
        if not me.main:
            return None
        path = folder.path / "reconstructions" / f"step-{step:08d}.png"
        shown = open_split(config.data, "val", me) or index
        write_reconstructions(model, shown, path, mean=mean, std=std, seed=config.run.seed)
        tracker.picture("reconstructions", path, step)
        return path

    every = config.run.picture_every

    def after_step(step: int) -> None:
        if every and step % every == 0 and step < stop_at and me.main:
            draw(step)

    task = Task(
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.optim, plan.steps_per_epoch),
        batches=batches,
        loss=loss,
        batch_size=config.optim.batch_size,
        accumulate=config.optim.accumulate,
        steps_per_epoch=plan.steps_per_epoch,
        total_steps=total,
        clip_grad=config.optim.clip_grad,
        after_step=after_step,
    )
    display.say(describe(config, model, index, total, me))
    try:
        result = fit(task, config.run, folder.path, me, tracker, display, start)
        if me.main:
            finish(config, model, folder, result, start, total, draw(result.step), display)
    finally:
        tracker.close()


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


def describe(config: PretrainConfig, model: FCMAE, index: ShardIndex, total: int, me: Ranks) -> str:
    """What is about to run, in a few lines."""
    rows, columns = model.grid
    encoder = sum(p.numel() for p in model.encoder.parameters())
    device = torch.cuda.get_device_name(me.device) if me.device.type == "cuda" else "CPU"
    return (
        f"FCMAE {config.model.size}: encoder {encoder / 1e6:.2f} M parameters, layout {model.layout}; "
        f"{model.image_size[0]}×{model.image_size[1]} images in {rows}×{columns} patches, "
        f"{model.num_visible} of {model.num_patches} visible\n"
        f"data: {len(index):,} images in {len(index.shards)} shards from {index.folder}\n"
        f"{config.optim.epochs} epochs, {total:,} steps of {config.optim.batch_size} images, "
        f"peak lr {config.optim.absolute_lr:.2e}, {config.run.precision} on {me.count} × {device}; "
        f"run folder {config.run.dir}"
    )


def finish(
    config: PretrainConfig,
    model: FCMAE,
    folder: RunFolder,
    result: Result,
    start: int,
    total: int,
    picture: Path | None,
    display: Display,
) -> None:
    """Write the encoder and say what was reached, where it is and how to go on."""
    weights = folder.path / "encoder.safetensors"
    save_encoder(model.encoder, weights, config.model, step=result.step, total_steps=total)
    run = shlex.quote(str(folder.path))
    again = " ".join(["python -m fcmae.pretrain", *(shlex.quote(a) for a in sys.argv[1:])])
    if result.stopped_by is not None:
        display.say(f"\nStopped by {result.stopped_by} after step {result.step:,} of {total:,}; everything is saved.")
        display.say(f"Continue with:  {again}")
        return
    loss = folder.recent_loss()
    ended = "This run is complete" if start >= result.step else "Done"
    display.say(f"\n{ended}: step {result.step:,} of {total:,}" + (f", loss {loss:.3f}" if loss is not None else ""))
    display.say(f"  encoder          {weights}")
    display.say(f"  reconstructions  {picture}")
    display.say(f"  fine-tune with   python -m finetune.train checkpoint={run}")
    if start >= result.step:
        display.say("  for a new run    choose another run.dir, or remove this one")

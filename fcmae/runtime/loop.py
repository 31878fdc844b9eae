"""The one training loop; pretraining and fine-tuning hand it a model, batches and a loss function.

A step is one optimiser step over `accumulate` micro-batches. Everything random inside a step (stochastic depth, mixup,
erasing) is seeded by (seed, step, rank), everything random about a sample by its own generator: the step number is all
that resuming needs, and a run that was cut off anywhere ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fcmae.errors import UserError
from fcmae.runtime import checkpoint
from fcmae.runtime.compilation import compile_blocks
from fcmae.runtime.distributed import Ranks
from fcmae.runtime.progress import Display
from fcmae.runtime.tracking import Tracker
from fcmae.settings import RunConfig

Batch = dict[str, Tensor]


class NonFiniteError(UserError):
    """The loss or the gradient is no longer a number; the message names the step and the last good checkpoint."""


@dataclass
class Task:
    """What an application trains.

    batches: start step -> this rank's micro-batches from there to `total_steps`, in order.
    loss: (model, batch on the device) -> scalar mean loss of the micro-batch.
    ema: an object with `update(model, step=)` and a state dict, or None.
    after_step: called with the step just done, after its update; says whether that took all ranks a while.
    bad_samples: how many samples of the batches fetched so far could not be used, where that is counted.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    batch_size: int
    accumulate: int
    steps_per_epoch: int
    total_steps: int
    clip_grad: float | None = None
    ema: Any = None
    after_step: Callable[[int], bool] | None = None
    bad_samples: Callable[[], int] | None = None


@dataclass
class _Window:
    """Steps since the last look at the device: their losses and gradient norms stay there until then."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)  # samples since the start, as of each step
    bad_before: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)


@dataclass
class Result:
    """Where a run ended: `stopped_by` is the signal, or None if it ran to its last step; the same on every rank."""

    step: int
    stopped_by: signal.Signals | None


def fit(
    task: Task, run: RunConfig, folder: Path, ranks: Ranks, tracker: Tracker, display: Display, start: int
) -> Result:
    """Train from step `start` to the end, to `run.max_steps` or to the first Ctrl-C or SIGTERM; leaves a checkpoint."""
    stop_at = min(task.total_steps, run.max_steps or task.total_steps)
    if start >= stop_at:
        return Result(start, None)
    stop = _StopSignals()
    try:
        loop = _Loop(task, run, folder, ranks, tracker, display, stop, start, stop_at)
        while loop.step < stop_at:
            stopped_by = loop.advance()
            if stopped_by and loop.step < stop_at:
                return Result(loop.step, signal.Signals(stopped_by))
        return Result(loop.step, None)
    finally:
        stop.restore()
        display.close()


class _Loop:
    """A run between its steps: `step` are done, `saved` is the step of the newest checkpoint."""

    def __init__(
        self,
        task: Task,
        run: RunConfig,
        folder: Path,
        ranks: Ranks,
        tracker: Tracker,
        display: Display,
        stop: _StopSignals,
        start: int,
        stop_at: int,
    ) -> None:
        self.task, self.run, self.folder, self.ranks = task, run, folder, ranks
        self.tracker, self.display, self.stop = tracker, display, stop
        self.step = self.saved = start
        self.stop_at = stop_at
        self.window = _Window()
        task.schedule.step_update(start)
        task.model.train()
        self.model: nn.Module = task.model
        self.batches = task.batches(start)
        if run.compile:
            compile_blocks(task.model)
        if ranks.count > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            self.model = DistributedDataParallel(task.model, device_ids=ids)
            self.batches = _settled(task, self.model, self.batches, run, ranks)

    def advance(self) -> int:
        """Do the next step and what is due after it; the signal that asks to stop, or 0. The same on every rank."""
        task, run, ranks = self.task, self.run, self.ranks
        _seed_step(run.seed, self.step, ranks.rank)
        try:
            _step(task, self.model, self.batches, run, ranks, self.window, self.stop)
        except _StoppedWaiting:  # for data that may never come; the step has not changed anything yet
            task.optimizer.zero_grad(set_to_none=True)
            self.save()
            return self.stop.received
        self.step += 1
        task.schedule.step_update(self.step)
        if task.ema is not None:
            task.ema.update(task.model, step=self.step)
        save = self.step % run.checkpoint_every == 0 or self.step == self.stop_at
        look = save or len(self.window.losses) == run.log_every
        # Alone, stop at once; with others only where all ranks look, so that they stop together and say the same.
        stopped_by = ranks.max(self.stop.received) if ranks.count == 1 or look else 0
        if look:
            self.look()
        if save or stopped_by:
            self.save()
        return stopped_by if stopped_by and self.step < self.stop_at else self.follow_up()

    def follow_up(self) -> int:
        """What the application does after a step; the signal that asks to stop, or 0."""
        if self.task.after_step is None:
            return 0
        before = time.perf_counter()
        long = self.task.after_step(self.step)
        self.window.since += time.perf_counter() - before
        self.task.model.train()
        stopped_by = self.ranks.max(self.stop.received) if long else 0
        if stopped_by:
            self.save()
        return stopped_by

    def look(self) -> None:
        """Fetch losses from the device and record the steps since the last look. Raises NonFiniteError."""
        if self.window.losses:
            _record(self.window, self.step, self.task, self.ranks, self.tracker, self.display, self.folder)
            self.window = _Window(bad_before=self.window.bad[-1] if self.window.bad else 0)

    def save(self) -> None:
        """Write a checkpoint of this step, after the records that belong to it."""
        self.look()
        if self.step == self.saved:  # to write it again would first remove it
            return
        task, run = self.task, self.run
        checkpoint.save(self.folder, self.step, task.model, task.optimizer, task.ema, self.ranks, run.keep_checkpoints)
        self.saved = self.step


def _step(
    task: Task,
    model: nn.Module,
    batches: Iterator[Batch],
    run: RunConfig,
    ranks: Ranks,
    window: _Window,
    stop: _StopSignals,
) -> None:
    """Forward, backward and update over `accumulate` micro-batches."""
    total = torch.zeros((), device=ranks.device)
    for part in range(task.accumulate):
        before = time.perf_counter()
        with stop.waiting(alone=ranks.count == 1):
            loaded = next(batches)
        batch = _on_device(loaded, ranks)
        window.waited += time.perf_counter() - before
        last = part == task.accumulate - 1
        hold = nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with hold:
            with _autocast(run, ranks):
                loss = task.loss(model, batch) / task.accumulate
            loss.backward()
        total += loss.detach()
    parameters = [p for group in task.optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, task.clip_grad or math.inf)
    window.rates.append(max(group["lr"] for group in task.optimizer.param_groups))
    task.optimizer.step()
    task.optimizer.zero_grad(set_to_none=True)
    window.losses.append(total)
    window.norms.append(norm.detach())
    if task.bad_samples is not None:
        window.bad.append(task.bad_samples())


def _settled(
    task: Task, model: DistributedDataParallel, batches: Iterator[Batch], run: RunConfig, ranks: Ranks
) -> Iterator[Batch]:
    """The batches, after a backward pass of the first that changes nothing.

    Only after its first backward pass does DDP lay out its buckets for good, and sums of three and more ranks are
    rounded by their place in them. So every start has that behind it, and a continued run sums as before.
    """
    first = next(batches)
    with _autocast(run, ranks):
        loss = task.loss(model, _on_device(first, ranks))
    loss.backward()
    task.optimizer.zero_grad(set_to_none=True)
    return chain([first], batches)


def _autocast(run: RunConfig, ranks: Ranks) -> torch.autocast:
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=run.precision == "bf16")


def _on_device(batch: Batch, ranks: Ranks) -> Batch:
    return {name: value.to(ranks.device, non_blocking=True) for name, value in batch.items()}


def _record(
    window: _Window, step: int, task: Task, ranks: Ranks, tracker: Tracker, display: Display, folder: Path
) -> None:
    """Fetch the window's losses from the device, check them and write one record per step. Raises NonFiniteError."""
    losses = (ranks.sum(torch.stack(window.losses)) / ranks.count).tolist()
    norms = torch.stack(window.norms).tolist()
    bad = [after - before for before, after in pairwise([window.bad_before, *window.bad])]
    bad = ranks.sum(torch.tensor(bad, device=ranks.device)).tolist() if bad else []
    seconds = time.perf_counter() - window.since
    speed = len(losses) * task.batch_size / max(seconds, 1e-9)
    first = step - len(losses) + 1
    for number, (loss, norm, lr) in enumerate(zip(losses, norms, window.rates, strict=True), first):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            good = checkpoint.find_checkpoint(folder)
            raise NonFiniteError(
                f"loss {loss} and gradient norm {norm} at step {number}; the last good checkpoint is "
                f"{good or 'none'}; continue with a lower optim.lr or with optim.clip_grad=1.0"
            )
        tracker.log(
            {
                "step": number,
                "epoch": (number - 1) // task.steps_per_epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": norm,
                "images_per_second": round(speed, 2),
                "data_wait": round(window.waited / max(seconds, 1e-9), 4),
                **({"bad_samples": bad[number - first]} if bad else {}),
            }
        )
    display.update(step, (step - 1) // task.steps_per_epoch, sum(losses) / len(losses), window.rates[-1], speed)


def _seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator a step may draw from; what was drawn before does not matter."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(3)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))  # noqa: NPY002, timm's mixup draws from the global generator
    random.seed(int(state[2]))


class _StoppedWaiting(BaseException):  # as KeyboardInterrupt is, which nobody on the way catches either
    """A signal came while there was no step to be finished."""


class _StopSignals:
    """The first Ctrl-C or SIGTERM asks the loop to stop after the current step; a second Ctrl-C interrupts at once.

    A second SIGTERM does not: of Slurm and torchrun, each may send its own.
    A process that is alone and waits for data stops waiting; of several, none can leave without the others.
    """

    def __init__(self) -> None:
        self.received = 0
        self._waiting = False
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if self._waiting:
            raise _StoppedWaiting

    @contextmanager
    def waiting(self, alone: bool) -> Iterator[None]:
        self._waiting = alone
        try:
            yield
        finally:
            self._waiting = False

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

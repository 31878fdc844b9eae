"""The loop, its checkpoints and its records: exact continuation, accumulation, clipping, schedule, bad numbers."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fcmae.errors import CheckpointError, ConfigError
from fcmae.runtime import checkpoint
from fcmae.runtime.distributed import Ranks, choose_device, this_command
from fcmae.runtime.loop import NonFiniteError, Task, fit
from fcmae.runtime.optim import build_optimizer, build_schedule
from fcmae.runtime.progress import Display, duration
from fcmae.runtime.tracking import Tracker
from fcmae.settings import OptimConfig, RunConfig, TrackingConfig

ALONE = Ranks(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """A small network that draws random numbers inside a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def data(step: int, size: int = 8) -> dict[str, torch.Tensor]:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(1000 + step))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def train(
    folder: Path,
    steps: int,
    *,
    stop: int | None = None,
    accumulate: int = 1,
    ema: bool = False,
    loss=None,
    after_step=None,
    bad_samples=None,
    **optim,
):
    """Train Net in `folder` for `steps` steps, going on from its newest checkpoint, and return model and average."""
    config = OptimConfig(
        **({"batch_size": 8, "lr": 1e-2, "epochs": 1, "warmup_epochs": 0} | optim), accumulate=accumulate
    )
    run = RunConfig(dir=str(folder), max_steps=stop, checkpoint_every=4, log_every=3)
    model = Net()
    average = ModelEmaV3(model, decay=0.9) if ema else None
    optimizer = build_optimizer(model, config)
    found = checkpoint.find_checkpoint(folder)
    start = 0 if found is None else checkpoint.load(found, model, optimizer, average)

    def batches(start: int):
        for step in range(start, steps):
            for part in range(accumulate):
                yield {k: v[part * 8 // accumulate : (part + 1) * 8 // accumulate] for k, v in data(step).items()}

    task = Task(
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config, steps),
        batches=batches,
        loss=loss or (lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean()),
        batch_size=8,
        accumulate=accumulate,
        steps_per_epoch=steps,
        total_steps=steps,
        clip_grad=config.clip_grad,
        ema=average,
        after_step=after_step,
        bad_samples=bad_samples,
    )
    folder.mkdir(exist_ok=True)
    tracker = Tracker(folder, TrackingConfig(), {}, start, True)
    try:
        fit(task, run, folder, ALONE, tracker, Display(steps, start, False), start)
    finally:
        tracker.close()
    return model, average


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("stop", [4, 6])
def test_a_run_in_two_parts_ends_with_the_same_bits(tmp_path, ema, stop):
    whole, whole_average = train(tmp_path / "whole", 10, ema=ema)
    train(tmp_path / "parts", 10, stop=stop, ema=ema)
    torch.manual_seed(123)  # whatever was drawn in between does not matter
    parts, parts_average = train(tmp_path / "parts", 10, ema=ema)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    if ema:
        pairs = zip(whole_average.state_dict().values(), parts_average.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert any(
            not torch.equal(a, b) for a, b in zip(whole.parameters(), whole_average.module.parameters(), strict=True)
        )
    timeless = [
        [{k: r[k] for k in ("step", "loss", "lr", "grad_norm")} for r in records(tmp_path / n)]
        for n in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    assert [r["step"] for r in timeless[0]] == list(range(1, 11))


def test_records_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    train(tmp_path, 10, stop=4)
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')  # what a kill leaves behind
    train(tmp_path, 10)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 11))
    assert max(r["loss"] for r in records(tmp_path)) < 99


def test_accumulation_equals_the_whole_batch(tmp_path):
    def without_dropout(model, batch):
        model.eval()
        return (model(batch["x"]) - batch["y"]).square().mean()

    whole, _ = train(tmp_path / "a", 6, loss=without_dropout)
    parts, _ = train(tmp_path / "b", 6, loss=without_dropout, accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):  # to which AdamW is blind
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_metrics_hold_what_they_promise(tmp_path):
    train(tmp_path, 10, clip_grad=0.5)
    for number, record in enumerate(records(tmp_path)):
        assert set(record) == {"step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait"}
        # Half a cosine from the peak, read at the step's own position (the paper's schedule, without warm-up here).
        assert record["lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * number / 10)), rel=1e-6)


def test_warmup_is_linear_from_zero():
    model = Net()
    config = OptimConfig(batch_size=8, lr=1.0, epochs=10, warmup_epochs=2, min_lr=0.1)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, steps_per_epoch=5)
    rates = []
    for step in range(50):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:11] == pytest.approx([step / 10 for step in range(11)])
    assert rates[30] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 20 / 40)))
    assert rates[-1] < 0.11


def test_a_warmup_of_nearly_everything_still_has_a_schedule():
    model = Net()
    config = OptimConfig(batch_size=8, lr=1.0, epochs=1, warmup_epochs=0.9999)
    build_schedule(build_optimizer(model, config), config, steps_per_epoch=5)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tmp_path, 20)
    assert [f.name for f in checkpoint.complete_checkpoints(tmp_path)] == ["step-00000016", "step-00000020"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    train(tmp_path, 10, stop=4)
    newer = tmp_path / "checkpoints" / "step-00000009"
    newer.mkdir()
    (newer / "rest").write_text("x")
    assert checkpoint.find_checkpoint(tmp_path).name == "step-00000004"


def test_a_checkpoint_that_does_not_fit_is_named(tmp_path):
    train(tmp_path, 10, stop=4)
    other = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match=r"step-00000004 cannot be loaded into this model"):
        checkpoint.load(checkpoint.find_checkpoint(tmp_path), other, torch.optim.AdamW(other.parameters()))


@pytest.mark.parametrize("step", [2, 6])
def test_bad_numbers_stop_the_run_and_name_the_step(tmp_path, step):
    calls = []

    def loss(model, batch):
        calls.append(1)
        value = (model(batch["x"]) - batch["y"]).square().mean()
        return value * math.nan if len(calls) == step else value

    good = "step-00000004" if step > 4 else "none"
    with pytest.raises(NonFiniteError, match=rf"at step {step}; the last good checkpoint is .*{good}"):
        train(tmp_path, 10, loss=loss)
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path))
    newest = checkpoint.find_checkpoint(tmp_path)
    assert newest is None if step < 4 else newest.name == good


def test_devices():
    assert choose_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(ConfigError, match=r"run.device=cuda: no CUDA device is available"):
            choose_device("cuda")


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.05), (0.05, 0.0)])
def test_another_weight_decay_takes_effect_on_resume(tmp_path, before, after):
    train(tmp_path, 10, stop=4, weight_decay=before)
    resumed, _ = train(tmp_path, 10, weight_decay=after)
    kept, _ = train(tmp_path / "same", 10, weight_decay=before)
    assert any(not torch.equal(a, b) for a, b in zip(resumed.parameters(), kept.parameters(), strict=True))
    for decay in (before, after):
        groups = build_optimizer(Net(), OptimConfig(weight_decay=decay)).param_groups
        assert sorted(group["weight_decay"] for group in groups) == [0.0, decay]


def test_what_a_killed_save_left_is_removed(tmp_path):
    train(tmp_path, 10, stop=4)
    left = tmp_path / "checkpoints" / ".step-00000002.tmp"
    left.mkdir()
    train(tmp_path, 10)
    assert not left.exists()


def test_bad_samples_are_those_of_the_step(tmp_path):
    counter = iter((1, 1, 4, 4, 5, 9, 9, 9, 9, 10))
    train(tmp_path, 10, bad_samples=lambda: next(counter))
    assert [record["bad_samples"] for record in records(tmp_path)] == [1, 0, 3, 0, 1, 4, 0, 0, 0, 1]


def test_a_signal_in_the_last_step_does_not_skip_what_follows_it(tmp_path):
    def loss(model, batch):
        if len(seen) == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(1)
        return (model(batch["x"]) - batch["y"]).square().mean()

    seen, after = [], []
    train(tmp_path, 10, loss=loss, after_step=lambda step: after.append(step) or True)
    assert after == list(range(1, 11))


def test_a_signal_in_an_evaluation_is_followed_by_no_further_step(tmp_path):
    def evaluate(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    train(tmp_path, 10, after_step=evaluate)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]  # 4 and 5 after the last look
    assert checkpoint.find_checkpoint(tmp_path).name == "step-00000005"


def test_the_command_to_continue(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "run.dir=my runs"])
    assert this_command("a.b", ALONE) == "python -m a.b 'run.dir=my runs'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    two, four = (Ranks(0, count, torch.device("cpu")) for count in (2, 4))
    assert this_command("a.b", two) == "torchrun --nproc-per-node 2 -m a.b 'run.dir=my runs'"
    assert this_command("a.b", four) == "torchrun --nnodes 2 … --nproc-per-node 2 -m a.b 'run.dir=my runs'"


def test_wandb_without_a_key_is_one_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def init(**_):
        raise wandb.errors.UsageError("No API key configured. Use wandb login to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ConfigError, match=r"^tracking.wandb=online: No API key configured\. Use wandb login"):
        Tracker(tmp_path, TrackingConfig(wandb="online"), {}, 0, True)


def test_durations():
    assert [duration(s) for s in (5, 75, 3700, 90061)] == ["0m 05s", "1m 15s", "1h 01m", "1d 1h"]


def test_wandb_offline_keeps_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 3):
        tracker = Tracker(tmp_path, TrackingConfig(wandb="offline"), {"a": 1}, step, True)
        tracker.log({"step": step + 1, "loss": 1.0})
        tracker.close()
    name = (tmp_path / "wandb_id").read_text().strip()
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1
    assert len(records(tmp_path)) == 2

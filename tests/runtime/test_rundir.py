"""A run folder: where a run goes on, and which settings may change meanwhile."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fcmae.errors import CheckpointError, ConfigError
from fcmae.runtime import checkpoint
from fcmae.runtime.distributed import Ranks
from fcmae.runtime.rundir import RunFolder
from fcmae.settings import RunConfig

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass
class Part:
    width: int = 4
    layout: str = "packed"


@dataclass
class Data:
    train: str = "shards"


@dataclass
class Options:
    data: Data = field(default_factory=Data)
    model: Part = field(default_factory=Part)
    run: RunConfig = field(default_factory=RunConfig)


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def open_run(path, **changes) -> RunFolder:
    run = RunFolder(path, ALONE, ("model.",), ("model.layout",))
    options = Options(model=Part(**{k: v for k, v in changes.items() if k in ("width", "layout")}))
    options.run = dataclasses.replace(options.run, **{k: v for k, v in changes.items() if k == "resume"})
    run.open(options, changes.get("fingerprint", ""))
    return run


def test_a_new_folder_starts_at_zero_and_a_used_one_goes_on(tmp_path):
    model, optimizer = net()
    assert open_run(tmp_path / "a").resume("auto", model, optimizer) == 0
    checkpoint.save(tmp_path / "a", 7, model, optimizer, None, ALONE, 2)
    assert open_run(tmp_path / "a").resume("auto", *net()) == 7


def test_fixed_settings_are_kept_and_free_ones_may_change(tmp_path):
    open_run(tmp_path).resume("auto", *net())
    open_run(tmp_path, width=5).resume("auto", *net())  # without a checkpoint there is nothing to contradict
    checkpoint.save(tmp_path, 1, *net(), None, ALONE, 2)
    open_run(tmp_path, width=5, layout="masked")
    with pytest.raises(ConfigError, match=r"model.width=6: the run in .* was started with 5"):
        open_run(tmp_path, width=6)


def test_a_run_may_start_from_another_and_then_goes_on_from_its_own(tmp_path):
    model, optimizer = net()
    open_run(tmp_path / "old").resume("auto", *net())
    checkpoint.save(tmp_path / "old", 5, model, optimizer, None, ALONE, 2)
    resume = str(tmp_path / "old")
    run = open_run(tmp_path / "new", resume=resume)
    other, other_optimizer = net()
    assert run.resume(resume, other, other_optimizer) == 5
    assert torch.equal(other.weight, model.weight)
    checkpoint.save(tmp_path / "new", 9, model, optimizer, None, ALONE, 2)
    assert open_run(tmp_path / "new", resume=resume).resume(resume, *net()) == 9


def test_other_images_are_refused(tmp_path):
    open_run(tmp_path, fingerprint="a").resume("auto", *net())
    checkpoint.save(tmp_path, 1, *net(), None, ALONE, 2)
    open_run(tmp_path, fingerprint="a")
    with pytest.raises(ConfigError, match=r"data.train=.*: holds other images than the run"):
        open_run(tmp_path, fingerprint="b")


def test_one_run_at_a_time_in_a_folder(tmp_path):
    hold = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConfigError, match=r"run.dir=.*: another run is going on in this folder"):
        open_run(tmp_path)
    other.kill()
    other.wait()
    open_run(tmp_path)


def test_options_are_recorded_only_when_the_checkpoint_fits(tmp_path):
    open_run(tmp_path, width=4).resume("auto", *net())
    checkpoint.save(tmp_path, 1, *net(), None, ALONE, 2)
    before = (tmp_path / "config.yaml").read_text()
    run = open_run(tmp_path, layout="masked")
    other = nn.Linear(3, 3)
    with pytest.raises(CheckpointError):
        run.resume("auto", other, torch.optim.AdamW(other.parameters()))
    assert (tmp_path / "config.yaml").read_text() == before


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"run.dir=.*file/run: cannot be written"):
        open_run(tmp_path / "file" / "run")

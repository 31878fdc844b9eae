"""A run folder: where a run goes on, and which settings may change meanwhile."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from fcmae.errors import ConfigError
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
class Options:
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
    options = Options(Part(**{k: v for k, v in changes.items() if k in ("width", "layout")}))
    options.run = dataclasses.replace(options.run, **{k: v for k, v in changes.items() if k == "resume"})
    run.open(options)
    return run


def test_a_new_folder_starts_at_zero_and_a_used_one_goes_on(tmp_path):
    model, optimizer = net()
    assert open_run(tmp_path / "a").resume("auto", model, optimizer) == 0
    checkpoint.save(tmp_path / "a", 7, model, optimizer, None, ALONE, 2)
    assert open_run(tmp_path / "a").resume("auto", *net()) == 7


def test_fixed_settings_are_kept_and_free_ones_may_change(tmp_path):
    open_run(tmp_path)
    open_run(tmp_path, width=5)  # without a checkpoint there is nothing to contradict
    checkpoint.save(tmp_path, 1, *net(), None, ALONE, 2)
    open_run(tmp_path, width=5, layout="masked")
    with pytest.raises(ConfigError, match=r"model.width=6: the run in .* was started with 5"):
        open_run(tmp_path, width=6)


def test_a_run_may_start_from_another_and_then_goes_on_from_its_own(tmp_path):
    model, optimizer = net()
    open_run(tmp_path / "old")
    checkpoint.save(tmp_path / "old", 5, model, optimizer, None, ALONE, 2)
    resume = str(tmp_path / "old")
    run = open_run(tmp_path / "new", resume=resume)
    other, other_optimizer = net()
    assert run.resume(resume, other, other_optimizer) == 5
    assert torch.equal(other.weight, model.weight)
    checkpoint.save(tmp_path / "new", 9, model, optimizer, None, ALONE, 2)
    assert open_run(tmp_path / "new", resume=resume).resume(resume, *net()) == 9


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"run.dir=.*file/run: cannot be written"):
        open_run(tmp_path / "file" / "run")

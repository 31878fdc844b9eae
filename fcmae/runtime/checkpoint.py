"""Checkpoints: written beside their final name, renamed when complete; the newest complete one is what resumes.

A checkpoint folder `checkpoints/step-XXXXXXXX/` is a torch.distributed.checkpoint of {model, optimizer, ema} under the
model's parameter names plus `state.json` with the step. Nothing random is stored: order, crops and masks follow from
the step alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fcmae.errors import CheckpointError
from fcmae.runtime.distributed import Ranks

STATE_FILE = "state.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(f for f in folders if re.fullmatch(r"step-\d{8,}", f.name) and (f / STATE_FILE).is_file())


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint a path means: itself, or the newest complete one of a run folder; None if there is none."""
    path = Path(path)
    if (path / STATE_FILE).is_file():
        return path
    found = complete_checkpoints(path)
    return found[-1] if found else None


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: nn.Module | None,
    ranks: Ranks,
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep`. Returns its folder."""
    final = checkpoint_folder(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    if ranks.main:
        for left in final.parent.glob(".step-*.tmp"):  # by processes that were killed while they saved
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    ranks.barrier()
    with _quiet():
        dcp.save(_state(model, optimizer, ema), checkpoint_id=temporary)
    if ranks.main:
        (temporary / STATE_FILE).write_text(json.dumps({"format": 1, "step": step, "torch": torch.__version__}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in complete_checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()
    return final


def load(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, ema: nn.Module | None = None
) -> int:
    """Restore what `save` wrote, in place, and return its step. Raises CheckpointError if it does not fit.

    Of the optimiser its moments are restored; learning rate, decay and the like stay as configured now.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    configured = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    try:
        step = int(json.loads((folder / STATE_FILE).read_text())["step"])
        if optimizer is None:
            state: dict[str, Any] = {"model": model.state_dict()}
        else:
            state = _state(model, optimizer, ema)
        with _quiet():
            dcp.load(state, checkpoint_id=folder)
    except (OSError, KeyError, ValueError, RuntimeError, dcp.api.CheckpointException) as error:
        reason = str(error).strip().splitlines()[-1]
        raise CheckpointError(f"checkpoint {folder} cannot be loaded into this model: {reason}") from error
    if optimizer is None:
        model.load_state_dict(state["model"])
    else:
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for group, settings in zip(optimizer.param_groups, configured, strict=True):
            group.update(settings)
    if ema is not None and optimizer is not None:
        ema.load_state_dict(state["ema"])
    return step


def load_tensors(tensors: dict[str, Any], folder: Path) -> None:
    """Fill tensors, named as in the checkpoint, in place; by this process alone."""
    with _quiet():
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    if ema is not None:
        state["ema"] = ema.state_dict()
    return state


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remark that a single process saves without a process group, which is how it is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
        yield

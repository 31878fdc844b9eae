"""A run folder: the options it was started with, where it goes on, and what it reached.

config.yaml  metrics.jsonl  evaluations.jsonl  checkpoints/step-XXXXXXXX/  and what the application adds:
reconstructions/*.png, encoder.safetensors, best.safetensors, last.safetensors
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from fcmae.configuration import flatten
from fcmae.errors import ConfigError
from fcmae.files import written_whole
from fcmae.runtime import checkpoint
from fcmae.runtime.distributed import Ranks


class RunFolder:
    """`fixed` are prefixes of settings that a continuation may not change, `free` exceptions to them."""

    def __init__(self, path: Path, ranks: Ranks, fixed: tuple[str, ...], free: tuple[str, ...] = ()) -> None:
        self.path, self.ranks, self.fixed, self.free = path, ranks, fixed, free
        self.settings: dict[str, Any] = {}

    def open(self, config: Any) -> None:
        """Create the folder and record the options, after comparing them with those of the run to be continued.

        Raises:
            ConfigError: if a setting that decides what a step computes differs, or the folder cannot be written.
        """
        self.settings = dataclasses.asdict(config)
        source = None if config.run.resume == "never" else checkpoint.find_checkpoint(self._source(config.run.resume))
        if source is not None:
            self._compare(source.parents[1] / "config.yaml")
        if self.ranks.main:
            self._record()
        self.ranks.barrier()

    def _record(self) -> None:
        try:
            with written_whole(self.path / "config.yaml") as temporary:
                temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(self.settings)))
        except OSError as error:
            raise ConfigError("run.dir", self.path, f"cannot be written: {error.strerror}") from error

    def _source(self, resume: str) -> Path:
        """Where to look for a checkpoint: a run with one of its own, as after a requeue, always goes on from that."""
        own = resume == "auto" or checkpoint.find_checkpoint(self.path) is not None
        return self.path if own else Path(resume)

    def _compare(self, recorded: Path) -> None:
        if not recorded.is_file():
            return
        before = dict(flatten(OmegaConf.to_container(OmegaConf.load(recorded))))
        for key, value in flatten(self.settings):
            if key.startswith(self.fixed) and not key.startswith(self.free) and before.get(key, value) != value:
                raise ConfigError(
                    key,
                    value,
                    f"the run in {recorded.parent} was started with {before[key]}; keep that or choose another run.dir",
                )

    def resume(
        self, resume: str, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None = None
    ) -> int:
        """Load the checkpoint `run.resume` means, if there is one; returns the step to go on from."""
        found = None if resume == "never" else checkpoint.find_checkpoint(self._source(resume))
        return 0 if found is None else checkpoint.load(found, model, optimizer, ema)

    def records(self, name: str = "metrics") -> list[dict[str, Any]]:
        """What metrics.jsonl or evaluations.jsonl holds."""
        path = self.path / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def recent_loss(self, steps: int = 50) -> float | None:
        """Mean loss of the last steps, or None before the first."""
        losses = [record["loss"] for record in self.records()][-steps:]
        return sum(losses) / len(losses) if losses else None

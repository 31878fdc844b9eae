"""A run folder: the options it was started with, where it goes on, and what it reached.

config.yaml  metrics.jsonl  evaluations.jsonl  checkpoints/step-XXXXXXXX/  and what the application adds:
reconstructions/*.png, encoder.safetensors, best.safetensors, last.safetensors
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

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
        self._lock: TextIO | None = None

    def open(self, config: Any, fingerprint: str = "") -> None:
        """Take the folder for this process and compare the options with those of the run to be continued.

        `fingerprint` stands for the training images; a continuation needs the same ones.

        Raises:
            ConfigError: if a setting that decides what a step computes differs, or the folder cannot be used.
        """
        self.settings = {**dataclasses.asdict(config), "fingerprint": fingerprint}
        source = self._source(config.run.resume)
        if source is not None:
            self._compare(source.resolve().parents[1] / "config.yaml")
        if self.ranks.main:
            self._take()
        self.ranks.barrier()

    def _take(self) -> None:
        """Lock the folder: two runs in one would overwrite each other. Released with the process, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115, held as long as the run
        except OSError as error:
            raise ConfigError("run.dir", self.path, f"cannot be written: {error.strerror}") from error
        try:
            # A record lock, which loader workers do not inherit, unlike flock's.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError("run.dir", self.path, "another run is going on in this folder") from error

    def _source(self, resume: str) -> Path | None:
        """The checkpoint to go on from: a run with one of its own, as after a requeue, always goes on from that."""
        own = None if resume == "never" else checkpoint.find_checkpoint(self.path)
        return own if own is not None or resume in ("auto", "never") else checkpoint.find_checkpoint(resume)

    def _compare(self, recorded: Path) -> None:
        if not recorded.is_file():
            return
        before = dict(flatten(OmegaConf.to_container(OmegaConf.load(recorded))))
        if before.get("fingerprint", self.settings["fingerprint"]) != self.settings["fingerprint"]:
            raise ConfigError(
                "data.train",
                self.settings["data"]["train"],
                f"holds other images than the run in {recorded.parent} was started with; choose another run.dir",
            )
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
        """Load the checkpoint `run.resume` means, if there is one, and record the options; returns the step."""
        found = self._source(resume)
        step = 0 if found is None else checkpoint.load(found, model, optimizer, ema)
        if self.ranks.main:
            with written_whole(self.path / "config.yaml") as temporary:
                temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(self.settings)))
        return step

    def records(self, name: str = "metrics") -> list[dict[str, Any]]:
        """What metrics.jsonl or evaluations.jsonl holds."""
        path = self.path / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def recent_loss(self, steps: int = 50) -> float | None:
        """Mean loss of the last steps, or None before the first."""
        losses = [record["loss"] for record in self.records()][-steps:]
        return sum(losses) / len(losses) if losses else None

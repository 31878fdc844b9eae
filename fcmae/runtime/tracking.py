"""Metrics: an object per step in metrics.jsonl, per evaluation in evaluations.jsonl; Weights & Biases if asked for."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any, TextIO, cast

from fcmae.errors import ConfigError, in_a_line
from fcmae.files import written_whole
from fcmae.settings import TrackingConfig


class Tracker:
    """Writes the metrics of a run; on ranks other than 0 it does nothing."""

    def __init__(self, folder: Path, config: TrackingConfig, settings: dict, step: int, active: bool) -> None:
        """Continue the records of `folder` from `step`; later ones, of a run that was cut off, are removed."""
        self._folder, self._active = folder, active
        self._files: dict[str, TextIO] = {}
        self._wandb: Any = None
        if not active:
            return
        for name in ("metrics", "evaluations"):
            _keep_until(folder / f"{name}.jsonl", step)
        if config.wandb != "disabled":
            import wandb

            try:
                self._wandb = wandb.init(
                    project=config.project,
                    entity=config.entity,
                    name=config.name or folder.name,
                    mode=cast(Any, config.wandb),
                    dir=str(folder),
                    id=_run_id(folder),
                    resume="allow",
                    config=settings,
                )
            except wandb.Error as error:
                said = in_a_line(error).rstrip(".")
                raise ConfigError("tracking.wandb", config.wandb, f"{said}; allowed: offline, disabled") from error

    def log(self, record: dict[str, Any]) -> None:
        """Append one record of a training step; `step` is its key."""
        self._write("metrics", record)

    def log_evaluation(self, record: dict[str, Any]) -> None:
        """Append what an evaluation found after `step`."""
        self._write("evaluations", record)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self._active:
            if name not in self._files:
                path = self._folder / f"{name}.jsonl"
                self._files[name] = open(path, "a", buffering=1)  # noqa: SIM115, open as long as the run
            self._files[name].write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _keep_until(path: Path, step: int) -> None:
    """Drop records after `step` and a torn last line: a step is recorded once, however often a run is cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept))


def _run_id(folder: Path) -> str:
    """A Weights & Biases id that stays with the run folder, so that a resumed run continues its curves."""
    path = folder / "wandb_id"
    if not path.exists():
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()

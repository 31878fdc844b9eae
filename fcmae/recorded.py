"""What a run folder, checkpoint folder or weight file says about the run that made it. Free of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from fcmae.errors import CheckpointError


def recorded_settings(path: str | Path) -> dict[str, Any]:
    """The options of the run behind `path`; a weight file knows its model and normalisation, a foreign one nothing.

    Raises:
        CheckpointError: if there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"checkpoint={path}: no such file or folder; it must be a run folder, a checkpoint folder or a weight file"
        )
    if path.is_file():
        return _header(path) if path.suffix == ".safetensors" else {}
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))  # type: ignore[return-value]
    return {}


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as handle:
            header = handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint={path}: cannot be read as weights: {error}") from error
    return {section: header_settings(header, section) for section in ("model", "data")}


def header_settings(header: dict[str, str], section: str) -> dict[str, Any]:
    """A section of settings in the header of a weight file; empty for a foreign file, whatever its header holds."""
    try:
        settings = json.loads(header.get(section, "{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}

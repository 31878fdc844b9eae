"""Weights in and out: `checkpoint=` accepts a run folder, a checkpoint folder or a weight file.

Encoder weights travel as safetensors under timm's names, loadable with
`timm.create_model("convnextv2_<size>", num_classes=0, checkpoint_path=...)`; the file's header says what model they are
of and where they come from.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.convnext import ConvNeXt
from torch import Tensor

from fcmae import __version__
from fcmae.errors import CheckpointError
from fcmae.files import written_whole
from fcmae.recorded import header_settings, recorded_settings
from fcmae.runtime.checkpoint import find_checkpoint, load_tensors
from fcmae.settings import ModelConfig


@dataclass
class EncoderWeights:
    """Weights of an encoder under timm's names, and what is known about them."""

    tensors: dict[str, Tensor]
    source: Path
    model: dict[str, Any]  # settings of the model they are of; empty for a bare weight file


def save_encoder(
    encoder: ConvNeXt, path: Path, config: ModelConfig, mean: list[float], std: list[float], **provenance: Any
) -> None:
    """Write an encoder's weights, whole or not at all, with the normalisation of the pixels they were trained on."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    header = {
        "format": "pt",
        "model": json.dumps(asdict(config)),
        "data": json.dumps({"mean": mean, "std": std}),
        "provenance": json.dumps({"program": f"fcmae {__version__}", "method": "FCMAE pretraining", **provenance}),
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def read_encoder(path: str | Path) -> EncoderWeights:
    """Encoder weights from a run folder, a checkpoint folder or a weight file.

    Raises:
        CheckpointError: naming the path and what it should have been.
    """
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        if checkpoint is not None:
            return _read_checkpoint(checkpoint)
        if (path / "encoder.safetensors").is_file():
            return _read_file(path / "encoder.safetensors")
    raise CheckpointError(
        f"checkpoint={path}: "
        + ("holds no complete checkpoint" if path.is_dir() else "no such file or folder")
        + "; it must be a run folder, a checkpoint folder or a weight file (.safetensors, .pth)"
    )


def _read_checkpoint(folder: Path) -> EncoderWeights:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    prefix = "model.encoder."
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    if not tensors:
        raise CheckpointError(f"checkpoint={folder}: holds no pretrained encoder; was it written by fcmae.pretrain?")
    load_tensors(tensors, folder)
    model = recorded_settings(folder).get("model", {})
    return EncoderWeights({name[len(prefix) :]: value for name, value in tensors.items()}, folder, model)


def _read_file(path: Path) -> EncoderWeights:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as handle:
                header = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, not a mapping
            return EncoderWeights(tensors, path, header_settings(header, "model"))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise CheckpointError(f"checkpoint={path}: is not a file of plain tensors and is not unpickled") from error
    except (OSError, RuntimeError, SafetensorError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise CheckpointError(f"checkpoint={path}: cannot be read as weights: {reason}") from error
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"checkpoint={path}: holds no state dict of tensors")
    return EncoderWeights(loaded, path, {})


def load_encoder(model: ConvNeXt, weights: EncoderWeights) -> None:
    """Load pretrained weights into a classifier: everything must fit, and only the head may be missing.

    The head itself starts fresh, also where the weights are of another classifier.

    Raises:
        CheckpointError: naming missing, unexpected and differently shaped keys.
    """
    own = model.state_dict()
    tensors = {name: value for name, value in weights.tensors.items() if not name.startswith("head.fc.")}
    missing = [name for name in own if name not in tensors and not name.startswith("head.")]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name} {tuple(value.shape)} where the model has {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and own[name].shape != value.shape
    ]
    problems = [
        f"{title} {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for title, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"checkpoint={weights.source}: does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(tensors, strict=False)

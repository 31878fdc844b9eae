"""Leaving autocast inside functions that choose their types themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def outside_autocast(device_type: str) -> AbstractContextManager:
    """Autocast off, for a backward pass too, which may be called under it; no cost where it is off already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()

"""Optimiser, parameter groups and learning-rate schedule, from timm."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from fcmae.settings import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, layer_decay: float | None = None) -> torch.optim.Optimizer:
    """AdamW; no norm, bias, GRN or mask-token parameter decays (all are one-dimensional or named by the model)."""
    optimizer = create_optimizer_v2(
        model,
        opt="adamw",
        lr=config.absolute_lr,
        weight_decay=1.0,  # of 0, timm would make other groups, with which no run that had a decay could be continued
        betas=tuple(config.betas),
        layer_decay=layer_decay,
    )
    for group in optimizer.param_groups:
        group["weight_decay"] *= config.weight_decay
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up from 0 over `warmup_epochs`, then half a cosine to `min_lr` at the last step; per step."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=config.min_lr,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )

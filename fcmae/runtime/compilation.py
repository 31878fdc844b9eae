"""torch.compile, one ConvNeXt V2 block at a time."""

from __future__ import annotations

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import nn


def compile_blocks(model: nn.Module) -> None:
    """Compile every block by itself; blocks of one shape share the code, so it takes a fraction of a model's time.

    Hooks, sharding and checkpoints see the same modules and parameter names as before.
    """
    blocks = [module for module in model.modules() if isinstance(module, ConvNeXtBlock)]
    # One function for all blocks, so all their shapes, drop path rates and modes count against one limit.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)

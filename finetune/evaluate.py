"""Top-1 and top-5 accuracy of a classifier over a split, every image exactly once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from fcmae.data.loader import Batch, normalise
from fcmae.errors import DataError
from fcmae.runtime.distributed import Ranks


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], ranks: Ranks, mean: list[float], std: list[float], bf16: bool = False
) -> dict[str, float]:
    """Accuracy in percent and mean cross-entropy over all ranks' batches: {"top1", "top5", "val_loss", "images"}.

    With fewer than five classes, top5 counts all of them. Raises DataError if there was no image at all.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device="cpu" if ranks.device.type == "cpu" else ranks.device)
    for batch in batches:
        images = normalise(batch["image"].to(ranks.device, non_blocking=True), mean, std)
        labels = batch["label"].to(ranks.device, non_blocking=True)
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=bf16):
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([best[:, 0].sum(), best.sum(), loss, loss.new_tensor(len(labels))]).to(totals)
    model.train(was_training)
    top1, top5, loss_sum, count = ranks.sum(totals).tolist()
    if count == 0:
        raise DataError("no image of the validation split could be used")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "val_loss": loss_sum / count, "images": int(count)}

"""Processes and devices: who am I among the ranks that torchrun started, and which device is mine."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fcmae.errors import ConfigError
from fcmae.settings import launched_ranks


@dataclass(frozen=True)
class Ranks:
    """This process among `count`; rank 0 writes files and talks to the user."""

    rank: int
    count: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """The largest value of any rank."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared.item())

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()


def this_command(module: str, ranks: Ranks) -> str:
    """The command that was given, to be given again."""
    words = ["python", "-m", module]
    if ranks.count > 1:
        local = os.environ.get("LOCAL_WORLD_SIZE", str(ranks.count))
        words = ["torchrun", "--nproc-per-node", local, "-m", module]
        if int(local) < ranks.count:
            words.insert(1, f"--nnodes {ranks.count // int(local)} …")  # and how they meet, which only its caller knows
    return " ".join([*words, *(shlex.quote(argument) for argument in sys.argv[1:])])


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is the rank's GPU where there is one, else the CPU. Raises ConfigError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ConfigError("run.device", name, "no CUDA device is available; allowed here: auto, cpu")
        number = int(name.split(":")[1]) if ":" in name else local_rank
        if number >= torch.cuda.device_count():
            raise ConfigError("run.device", name, f"must be below the {torch.cuda.device_count()} CUDA devices present")
        return torch.device("cuda", number)
    return torch.device("cpu")


@contextmanager
def ranks(device: str) -> Iterator[Ranks]:
    """Join the process group torchrun prepared, if it started more than one process, and leave it at the end."""
    count = launched_ranks()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count == 1:
        yield Ranks(0, 1, chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, chosen)
    finally:
        dist.destroy_process_group()

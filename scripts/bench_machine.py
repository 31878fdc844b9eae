"""What the benchmarks share: the machine, its peak, its allocator, and tables. Not a script of its own."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some square matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    facts["threads"] = torch.get_num_threads()
    if find_spec("triton") is not None:
        import triton  # noqa: TID251

        facts["triton"] = triton.__version__
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    else:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            facts["device"] = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            facts["device"] = platform.processor() or platform.machine()
    return facts


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["-" * len(cell) for cell in header], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check_device(parser: argparse.ArgumentParser, name: str) -> None:
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name}: {str(error).splitlines()[0]}")


def keep_freed_memory() -> None:
    """Start this script again with an allocator that keeps freed memory (glibc).

    By default glibc hands large blocks back to the system and takes them anew, page by page, which costs the layouts
    with the large activations most. Layouts are to be compared, not allocators.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
    if sys.platform == "linux" and not settings.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)

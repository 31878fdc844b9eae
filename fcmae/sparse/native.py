"""C++ for the CPU, built on first use with the machine's own compiler and kept.

The sources lie beside this file and have a plain C interface, so that a build takes seconds and fits every version of
torch. Where there is no compiler the callers go on in plain PyTorch, and one warning says so.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
REALS = {torch.float32: "float", torch.float64: "double"}


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library built from `<name>.cpp` for float32 or float64, or None (after a warning) if that is impossible.

    It is kept in `$XDG_CACHE_HOME/fcmae/native` (`~/.cache/fcmae/native`), under a name that depends on sources,
    compiler and processor, so a home directory may be shared by different machines.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        if compiler is None:
            raise FileNotFoundError("no C++ compiler (c++, g++ or clang++) found")
        command = [*compiler.split(), *_FLAGS, f"-DREAL={REALS[dtype]}", str(source), "-o"]
        headers = sorted(source.parent.glob("*.h"))
        contents = b"".join(path.read_bytes() for path in (source, *headers))
        return ctypes.CDLL(str(_build(command, name, contents)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        lines = [line for line in detail.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        warnings.warn(f"{name} runs in plain PyTorch, which is slower: {reason}", stacklevel=2)
        return None


def call(name: str, dtype: torch.dtype, function: str, *arguments: Tensor | float | tuple[int, ...] | None) -> None:
    """Call a function of a library: tensors and tuples as pointers (None as null), numbers as int64 or double, threads.

    Tensors must be contiguous and, where they are of a floating type, of `dtype`.
    """
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous()
            assert argument.dtype == dtype or not argument.is_floating_point()
            converted.append(ctypes.c_void_p(argument.data_ptr()))
        elif argument is None:
            converted.append(ctypes.c_void_p(None))
        elif isinstance(argument, tuple):
            converted.append((ctypes.c_int64 * len(argument))(*argument))
        else:
            converted.append((ctypes.c_double if isinstance(argument, float) else ctypes.c_int64)(argument))
    getattr(library(name, dtype), function)(*converted, ctypes.c_int64(torch.get_num_threads()))


def _build(command: list[str], name: str, contents: bytes) -> Path:
    """Run the compiler unless the cache has what it would make."""
    version = subprocess.run([*command[:1], "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([" ".join(command).encode(), contents, version, _processor().encode()]))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcmae" / "native"
    built = cache / f"{name}-{key.hexdigest()[:16]}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # Beside its final name and renamed: several processes may be building the same.
            unfinished = Path(folder) / built.name
            subprocess.run([*command, str(unfinished)], capture_output=True, check=True, text=True)
            unfinished.replace(built)
    return built


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )

"""C++ for the CPU, built on first use with the machine's own compiler and kept.

The sources lie beside this file and have a plain C interface, so that a build takes seconds and fits every version of
torch. Where there is no compiler the callers go on in plain PyTorch, and a warning says so.
"""

from __future__ import annotations

import atexit
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
def _compiler() -> tuple[str, ...]:
    """The command of a C++ compiler; empty, after a warning, where there is none."""
    command = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    if not command:
        _warn("no C++ compiler (c++, g++ or clang++) found")
    return tuple(command.split())


def _warn(reason: str) -> None:
    warnings.warn(f"the packed layout runs in plain PyTorch on the CPU, which is slower: {reason}", stacklevel=3)


@functools.cache
def library(name: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The library built from `<name>.cpp` for float32 or float64, or None (after a warning) if that is impossible.

    It is kept in `$XDG_CACHE_HOME/fcmae/native` (`~/.cache/fcmae/native`), under a name that depends on sources,
    compiler and processor, so a home directory may be shared by different machines; in a temporary folder where that
    cannot be written.
    """
    if not _compiler():
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    contents = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    command = [*_compiler(), *_FLAGS, f"-DREAL={REALS[dtype]}", str(source), "-o"]
    try:
        key = hashlib.sha256(
            b"\0".join([" ".join(command).encode(), contents, _version().encode(), _processor().encode()])
        )
        return ctypes.CDLL(str(_built(f"{name}-{key.hexdigest()[:16]}.so", command)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        lines = [line for line in detail.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[0] if lines else type(error).__name__)
        _warn(f"{name}.cpp: {reason}")
        return None


def call(name: str, dtype: torch.dtype, function: str, *arguments: Tensor | float | tuple[int, ...] | None) -> None:
    """Call a function of a library: tensors and tuples as pointers (None as null), numbers as int64 or double, threads.

    Tensors must be contiguous and, where they are of a floating type, of `dtype`.
    """
    key = name, dtype, function
    handle = _handles.get(key) or _handles.setdefault(key, _handle(*key, arguments))
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if not argument.is_contiguous() or (argument.dtype != dtype and argument.is_floating_point()):
                raise ValueError(f"{function}: tensors must be contiguous {dtype}; got strides {argument.stride()}")
            converted.append(argument.data_ptr())
        elif isinstance(argument, tuple):
            converted.append((ctypes.c_int64 * len(argument))(*argument))
        else:
            converted.append(argument)
    handle(*converted, torch.get_num_threads())


_handles: dict[tuple[str, torch.dtype, str], Any] = {}


def _handle(name: str, dtype: torch.dtype, function: str, arguments: tuple) -> Any:
    """A function with its argument types, which make calls cheap; those of its first call are those of all."""
    loaded = library(name, dtype)
    assert loaded is not None
    handle = loaded[function]  # indexing makes a new one
    types: dict[type, Any] = {float: ctypes.c_double, int: ctypes.c_int64}
    handle.argtypes = [*(types.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_int64]
    handle.restype = None
    return handle


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=True, text=True, errors="replace", timeout=300)
    return done.stdout


@functools.cache
def _version() -> str:
    return _run(*_compiler(), "--version")


def _built(name: str, command: list[str]) -> Path:
    """The library `name`, made by `command` (to which its path is added) unless the cache has it."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcmae" / "native"
        cache.mkdir(parents=True, exist_ok=True)
        if (cache / name).exists():
            return cache / name
        folder = Path(tempfile.mkdtemp(dir=cache))
    except (OSError, RuntimeError):  # not writable, or no home at all
        cache, folder = None, Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        _run(*command, str(folder / name))
        if cache is None:
            return folder / name
        # Beside its final name and renamed: several processes may be building the same.
        return (folder / name).replace(cache / name)
    finally:
        if cache is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )

"""C++ for the CPU, built on first use with the machine's own compiler and kept.

The sources (`*/*_cpu.cpp`) lie beside their callers and have a plain C interface, so that a build takes seconds and
fits every version of torch. Where there is no compiler the callers go another, slower way, and a warning says so.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fcmae.files import cache_folder

_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
REALS = {torch.float32: "float", torch.float64: "double"}


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The command of a C++ compiler; empty, after a warning, where there is none."""
    command = os.environ.get("CXX", "").split() or [
        next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    ]
    if not command[0]:
        _warn("no C++ compiler (c++, g++ or clang++) found")
        return ()
    return tuple(command)


def plain(x: Tensor) -> bool:
    """Whether `x` has numbers in the CPU's memory, and does not stand for another as in tracing and estimating."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and not torch.jit.is_tracing()


def _warn(reason: str) -> None:
    warnings.warn(f"slower code takes the place of what is written in C++: {reason}", stacklevel=3)


def _source(name: str) -> Path:
    return next(Path(__file__).parent.glob(f"*/{name}.cpp"))


@functools.cache
def library(name: str, dtype: torch.dtype | None = None) -> ctypes.CDLL | None:
    """The library built from `<name>.cpp`, or None (after a warning) if that is impossible.

    `dtype`: float32 or float64 as its REAL, for sources that want one.

    It is kept in `$XDG_CACHE_HOME/fcmae/native` (`~/.cache/fcmae/native`), under a name that depends on sources,
    compiler and processor, so a home directory may be shared by different machines; in a temporary folder where that
    cannot be written.
    """
    if not _compiler():
        return None
    source = _source(name)
    contents = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    real = [f"-DREAL={REALS[dtype]}"] if dtype else []
    command = [*_compiler(), *_FLAGS, *real, str(source), "-ldl", "-o"]
    try:
        key = hashlib.sha256(
            b"\0".join([" ".join(command).encode(), contents, _version().encode(), _processor().encode()])
        )
        path = _built(f"{name}-{key.hexdigest()[:16]}.so", command)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short by a full disk, say
            path.unlink()
            return ctypes.CDLL(str(_built(path.name, command)))
    except (OSError, subprocess.SubprocessError) as error:
        _warn(f"{name}.cpp: {_reason(error)}")
        return None


def _reason(error: Exception) -> str:
    """The line of a compiler's words that matters, or what else went wrong."""
    said = getattr(error, "stderr", None) or b""
    said = said.decode(errors="replace") if isinstance(said, bytes) else said  # bytes after a timeout
    lines = [line for line in said.splitlines() if line.strip()]
    if lines:
        return next((line for line in lines if "error" in line), lines[0])
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        return f"{error.cmd[0]} failed with exit code {error.returncode} and said nothing"
    return str(error) or type(error).__name__


def call(name: str, dtype: torch.dtype, function: str, *arguments: Tensor | float | tuple[int, ...] | None) -> None:
    """Call a function of a library with `arguments` and the number of threads.

    Tensors and tuples are passed as pointers, None as a null pointer. Tensors must be contiguous and, where they are of
    a floating type, of `dtype`.
    """
    converted: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            pointer = argument.data_ptr()
            if not argument.is_contiguous() or (argument.dtype != dtype and argument.is_floating_point()):
                raise ValueError(f"{function}: tensors must be contiguous {dtype}; got strides {argument.stride()}")
            if pointer == 0 and argument.numel() > 0:
                raise ValueError(f"{function}: a {type(argument).__name__} has no memory to work on")
            converted.append(pointer)
        elif isinstance(argument, tuple):
            converted.append((ctypes.c_int64 * len(argument))(*argument))
        else:
            converted.append(argument)
    handle(name, function, dtype)(*converted, torch.get_num_threads())


@functools.cache
def handle(name: str, function: str, dtype: torch.dtype | None = None) -> Any:
    """A function of a library that can be built, with the argument types of its declaration."""
    loaded = library(name, dtype)
    assert loaded is not None
    declared = re.search(rf'^extern "C" void {function}\(([^)]*)\)', _source(name).read_text(), re.MULTILINE)
    assert declared is not None
    found = loaded[function]
    numbers: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
    parameters = declared[1].split(",")
    found.argtypes = [ctypes.c_void_p if "*" in p else numbers[p.split()[0]] for p in parameters]
    found.restype = None
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, check=True, text=True, errors="replace", timeout=300)
    return done.stdout


@functools.cache
def _version() -> str:
    return _run(*_compiler(), "--version")


def _built(name: str, command: list[str]) -> Path:
    """The library `name`, made by `command` (to which its path is added) unless the cache has it."""
    try:
        cache = cache_folder() / "native"
        cache.mkdir(parents=True, exist_ok=True)
        if (cache / name).exists():
            return cache / name
        folder = Path(tempfile.mkdtemp(dir=cache))
    except (OSError, RuntimeError):  # not writable, or no home at all
        cache, folder = None, Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        _run(*command, str(folder / name))
        if not (folder / name).exists():
            raise OSError(f"{command[0]} made no library")
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

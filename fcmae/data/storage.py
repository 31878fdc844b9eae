"""Where shards lie: folders, https://, s3:// and gs:// through fsspec, and commands. Free of torch.

A location is a path, a URL, or `pipe:` and a command whose output is the file, `{}` standing for the file's name. Files
come from elsewhere whole, in the size they should have, or not at all.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fcmae.errors import DataError, in_a_line
from fcmae.files import cache_folder

SCHEMES = ("http", "https", "s3", "gs")
PIPE = "pipe:"
PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
TRIES = 8
FIRST_PAUSE = 0.5  # seconds before the second try, doubled before each further one, up to
LONGEST_PAUSE = 30.0
CONNECT, SILENT = 30, 60  # seconds until a server counts as gone: that does not answer, that has stopped sending
VERSION_FIELDS = ("ETag", "Content-MD5", "Last-Modified", "LastModified", "generation", "md5Hash", "updated")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def default_cache() -> Path:
    return cache_folder() / "shards"


@dataclass(frozen=True)
class Storage:
    """How shards are read.

    read: `auto` (local ones at the offsets of their samples, others through the cache), `ahead` (local ones also whole
    and in order, before their samples are wanted, so that these are found in memory) or `cache` (local ones too, as
    from a slow file system). cache_bytes: what the cache may take. max_open: shards
    that one reader keeps open. allow_pipe: run commands, take unsafe names.
    """

    read: str = "auto"
    cache_dir: Path = field(default_factory=default_cache)
    cache_bytes: int = 100 * 10**9
    max_open: int = 64
    allow_pipe: bool = False

    def check(self, location: str) -> None:
        """Raise DataError for a command that was not allowed, or a scheme that is not known."""
        if location.startswith(PIPE):
            if not self.allow_pipe:
                raise DataError(f"{location}: commands are only run with data.allow_pipe=true")
        elif is_remote(location) and location.split("://")[0] not in SCHEMES:
            raise DataError(f"{location}: must be a path or begin with {', '.join(f'{s}://' for s in SCHEMES)}")

    def check_names(self, names: list[str], base: str) -> None:
        """Raise DataError for names in an index that reach outside of where it lies, unless everything is allowed.

        What lies on this machine may name any of its files; what came from elsewhere may not.
        """
        for name in names:
            if is_remote(name):
                self.check(name)
            elif is_remote(base) and not self.allow_pipe and unsafe(name):
                raise DataError(f"{base}: names a shard {name}; such names are only taken with data.allow_pipe=true")


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a command."""
    return location.startswith(PIPE) or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", location) is not None


def unsafe(name: str) -> bool:
    """Whether a name would lead out of the folder it stands in."""
    return name.startswith(("/", "~")) or ".." in name.split("/")


def scheme(location: str) -> str:
    return location.split("://")[0]


def join(base: str, name: str) -> str:
    """The location of `name` below `base`."""
    if is_remote(name):
        return name
    if not base.startswith(PIPE):
        quoted = quote(name) if scheme(base) in ("http", "https") else name
        return f"{base.rstrip('/')}/{quoted}"
    if "{}" not in base:
        raise DataError(f"{base}: must have {{}} where the name of a file goes")
    return base.replace("{}", shlex.quote(name))


def version(location: str) -> str | None:
    """What tells one content of a URL from another, if its server says anything like it. Raises DataError."""
    if location.startswith(PIPE):
        return None
    info = _tried(location, lambda: _info(location))
    known = [f"{name}={info[name]}" for name in VERSION_FIELDS if info.get(name)]
    return f"{info.get('size')} {known}" if known else None


def size_of(location: str) -> int | None:
    """Bytes of a file or of a URL's content, None where a server or a command does not say. Raises DataError."""
    if location.startswith(PIPE):
        return None
    if not is_remote(location):
        return _tried(location, lambda: os.stat(location).st_size)
    return _tried(location, lambda: _info(location)).get("size")


@functools.cache
def exists(location: str) -> bool:
    """Whether there is a file at a URL; False for commands, which would have to be run. Raises DataError."""
    if location.startswith(PIPE):
        return False

    def look() -> bool:
        try:
            return _info(location)["type"] == "file"
        except Exception as error:
            # The others of buckets that do not say what is not in them.
            if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in (401, 403):
                return False
            raise

    return bool(_tried(location, look))


def _info(location: str) -> dict[str, Any]:
    try:
        return _filesystem(location).info(location)
    except FileNotFoundError as error:
        # fsspec says this of web servers whatever was wrong.
        cause = error.__cause__
        if isinstance(cause, Exception) and getattr(cause, "status", None) not in (404, 410) and "http" in location[:5]:
            raise cause from None
        raise


def download(location: str, target: Path, size: int | None = None) -> None:
    """Write what lies at a location, or is the file of a path, to `target`.

    Network errors and files of another size than `size` are tried again, with growing pauses.

    Raises:
        DataError: naming the location, after the last try or where another would be of no use.
    """

    def once() -> None:
        if location.startswith(PIPE):
            _run(location.removeprefix(PIPE), target)
        elif not is_remote(location):
            shutil.copyfile(location, target)
        else:
            _filesystem(location).get_file(location, str(target))
        arrived = target.stat().st_size
        if size is not None and arrived != size:
            raise OSError(f"{arrived:,} bytes arrived where the index expects {size:,}")

    _tried(location, once)


def _tried(location: str, action: Callable[[], Any]) -> Any:
    pause = FIRST_PAUSE
    for attempt in range(TRIES):
        try:
            return action()
        except DataError:
            raise
        except Exception as error:  # of three libraries, each with types of its own
            if hopeless(error):
                raise DataError(f"{location} cannot be read: {reason(error)}") from error
            if attempt == TRIES - 1:
                raise DataError(f"{location} cannot be read, after {TRIES} tries: {reason(error)}") from error
            # Not of the generators that training seeds; and not all processes at the same moment.
            time.sleep(pause * random.SystemRandom().uniform(0.75, 1.25))
            pause = min(2 * pause, LONGEST_PAUSE)


def hopeless(error: Exception) -> bool:
    """Whether another try would end in the same way."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | ImportError) or type(
        error
    ).__name__ in ("NoCredentialsError", "InvalidURL")


def reason(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".strip()
    return in_a_line(error)


def _filesystem(location: str) -> Any:
    """fsspec's file system of a URL; the same object for every URL of a server, another after a fork."""
    kind = scheme(location)
    try:
        import fsspec
        from fsspec.config import conf

        # Where their defaults would end a long download, or wait for ever.
        options: dict[str, Any] = {}
        if kind in ("http", "https"):
            import aiohttp

            wait = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENT)
            options = {"client_kwargs": {"timeout": wait}}
        elif kind == "s3":
            options = {"config_kwargs": {"connect_timeout": CONNECT, "read_timeout": SILENT}}
        options = {name: value for name, value in options.items() if name not in conf.get(kind, {})}
        return fsspec.filesystem(kind, **options)
    except ImportError as error:
        raise DataError(f"{location}: {PACKAGES[kind]} is needed; pip install 'fcmae[remote]'") from error


def _run(command: str, target: Path) -> None:
    """Write what a shell command prints to a file."""
    with open(target, "wb") as stream:
        done = subprocess.run(command, shell=True, stdout=stream, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"the command ended with {done.returncode}" + (f": {said[-1]}" if said else ""))

"""A bounded folder of whole shards from elsewhere, shared by the processes of a machine. Free of torch.

A file `<digest>-<bytes>-<name>` is a shard; with `.part` behind it, one that somebody is downloading, who holds a lock
on it. Who reads a shard holds a shared lock, so that it is not removed meanwhile; of the others, those not used for the
longest time go when room is needed. Locks end with their process, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fcmae.data.storage import download
from fcmae.errors import DataError

PART = ".part"
LOOK = 0.02  # seconds between looks at a download of another process


@dataclass(frozen=True)
class Shard:
    """A shard elsewhere. content: a digest of what the index says of it, so that a new version is a new file."""

    location: str
    bytes: int
    content: str

    @property
    def file(self) -> str:
        digest = hashlib.sha256(f"{self.location}\0{self.content}".encode()).hexdigest()[:20]
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in self.location.split("/")[-1])[-80:]
        return f"{digest}-{self.bytes}-{name.removesuffix(PART)}"


class CacheFullError(DataError):
    """There is no room for a shard, since all others are being read."""


class ShardCache:
    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard, downloaded if need be; it stays in the cache until that is closed.

        Raises:
            CacheFullError: if everything in a full cache is being read.
            DataError: if it cannot be downloaded.
        """
        while True:
            descriptor = self._present(shard)
            if descriptor is None:
                descriptor = self._download(shard, frozenset())
            if descriptor is not None:
                return descriptor
            time.sleep(LOOK)  # another process is at it

    def fetch(self, shard: Shard, keep: Collection[str] = ()) -> None:
        """Download the shard unless it is there, is being downloaded, or only files in `keep` could make room for it.

        Raises:
            DataError: if it cannot be downloaded.
        """
        if not (self.folder / shard.file).exists():
            descriptor = self._download(shard, frozenset(keep))
            if descriptor is not None:
                os.close(descriptor)

    def _present(self, shard: Shard) -> int | None:
        try:
            descriptor = os.open(self.folder / shard.file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"{self.folder / shard.file} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits only for the moment in which it may be removed
            status = os.fstat(descriptor)
            if status.st_size != shard.bytes:  # the machine went down, or somebody wrote to it
                (self.folder / shard.file).unlink(missing_ok=True)
        except OSError as error:
            os.close(descriptor)
            raise self._unusable(error) from error
        if status.st_nlink == 0 or status.st_size != shard.bytes:
            os.close(descriptor)
            return None
        with suppress(OSError):  # a cache of another user, who cleans up without knowing of this one's use
            os.utime(descriptor)
        return descriptor

    def _download(self, shard: Shard, keep: frozenset[str]) -> int | None:
        """A descriptor of the shard; None if another process is at it, or if there is no room but that of `keep`."""
        if shard.bytes > self.limit:
            raise DataError(f"data.cache_gb={self.limit / 1e9:g}: is less than one shard, {shard.bytes / 1e9:.3g} GB")
        part, final = self.folder / (shard.file + PART), self.folder / shard.file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unusable(error) from error
        done = False
        try:
            try:
                if not _locked(descriptor) or not _same(descriptor, part):
                    return None
            except OSError as error:
                raise self._unusable(error) from error
            if final.exists():  # finished between two looks
                part.unlink()
                return None
            if not self._make_room(shard.file, keep):
                part.unlink()
                if keep:
                    return None
                raise CacheFullError(
                    f"data.cache_gb={self.limit / 1e9:g}: the cache {self.folder} is full of shards that are being "
                    f"read; no room for {shard.location}"
                )
            try:
                download(shard.location, part, shard.bytes)
                os.fsync(descriptor)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            part.rename(final)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            done = True
            return descriptor
        finally:
            if not done:
                os.close(descriptor)

    def _unusable(self, error: OSError) -> DataError:
        return DataError(
            f"data.cache_dir={self.folder}: cannot be used: {error.strerror}; it must be a folder of a local file "
            "system that this user may write to"
        )

    def _make_room(self, file: str, keep: frozenset[str]) -> bool:
        """Remove shards until `file`, which has a part already, and everything else are within the limit."""
        with self._alone():
            known = [(entry, _bytes(entry.name)) for entry in os.scandir(self.folder) if _bytes(entry.name) is not None]
            excess = sum(size for _, size in known if size is not None) - self.limit
            if excess <= 0:
                return True
            for entry, size in sorted(known, key=lambda item: _used(item[0])):
                if entry.name in keep or entry.name == file + PART:
                    continue
                if _removed(entry.path):
                    excess -= size or 0
                if excess <= 0:
                    return True
        return False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Held by one process at a time."""
        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Whether nobody else holds a lock on the file; if so, this process does now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether an open file still has the name it was opened by."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def _removed(path: str) -> bool:
    """Remove a file that nobody is reading or writing."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if not _locked(descriptor) or not _same(descriptor, Path(path)):
            return False
        os.unlink(path)
        return True
    finally:
        os.close(descriptor)


def _bytes(name: str) -> int | None:
    """How large a file of the cache is or will be; None for others."""
    parts = name.split("-", 2)
    return int(parts[1]) if len(parts) == 3 and len(parts[0]) == 20 and parts[1].isdigit() else None


def _used(entry: os.DirEntry) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0

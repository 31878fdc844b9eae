"""Random access into shards: an image is one read at its offset, from where they lie or from the cache."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence

from fcmae.data.cache import LOOK, CacheFullError, Shard, ShardCache
from fcmae.data.index import BLOCK, ShardIndex
from fcmae.data.storage import Storage, is_remote, unsafe
from fcmae.errors import DataError

FORGIVEN = 300.0  # seconds until a shard that could not be had is asked for again
PATIENCE = 120.0  # seconds until others who read must have made room in the cache
PIECE = 8 << 20  # bytes


class ShardReader:
    """Reads samples of an index; keeps a bounded number of shards open.

    What comes next can be announced with `expect`; a thread then has it fetched while other things are done.
    """

    def __init__(self, index: ShardIndex, storage: Storage | None = None) -> None:
        self.index, self.storage = index, storage or Storage()
        self.cache = ShardCache(self.storage.cache_dir, self.storage.cache_bytes)
        self.any_cached = any(map(self.cached, range(len(index.shards))))
        self._reset()

    def _reset(self) -> None:
        self._files: OrderedDict[int, int] = OrderedDict()
        self._failed: dict[int, tuple[float, str]] = {}
        self._expected: tuple[int, ...] = ()
        self._ahead: _Ahead | None = None

    def read(self, sample: int) -> bytes:
        """The bytes of a sample's image. Raises DataError."""
        shard = self.index.shard_of(sample)
        size, offset = int(self.index.size[sample]), self.index.offset(sample)
        try:
            file = self._open(shard)
            header, data = os.pread(file, BLOCK, offset - BLOCK), os.pread(file, size, offset)
        except OSError as error:
            raise DataError(f"{self.index.source(shard)} cannot be read: {error.strerror}") from error
        if len(data) != size or len(header) != BLOCK:
            raise DataError(f"{self.index.source(shard)} ends inside sample {sample:,} of the index; it was cut short")
        if header[257:262] != b"ustar" or header[124:136].strip(b" \0").lstrip(b"0") != (b"%o" % size).lstrip(b"0"):
            raise DataError(
                f"{self.index.source(shard)} holds something else than the index says at sample {sample:,}; "
                f"{self._advice(shard)}"
            )
        if (header[0] in b"/~" or b".." in header[:100]) and not self.storage.allow_pipe and unsafe(_name(header)):
            raise DataError(f"{self.where(sample)}: such names are only taken with data.allow_pipe=true")
        return data

    def _advice(self, shard: int) -> str:
        again = "write the shards and their index again"
        if not self.cached(shard):
            return again
        return f"remove its copy {self.cache.folder / self.elsewhere(shard).file}, or, if it was right, {again}"

    def name(self, sample: int) -> str:
        """The name of a sample's image in its shard, read from the tar header before its bytes."""
        return _name(os.pread(self._open(self.index.shard_of(sample)), BLOCK, self.index.offset(sample) - BLOCK))

    def where(self, sample: int) -> str:
        """Shard and name of a sample."""
        return f"{self.index.source(self.index.shard_of(sample))}: {self.name(sample)}"

    def cached(self, shard: int) -> bool:
        """Whether a shard is read through the cache."""
        return self.storage.read == "cache" or is_remote(self.index.source(shard))

    def elsewhere(self, shard: int) -> Shard:
        """A shard as the cache wants to have it described."""
        first = self.index.first_sample(shard)
        rows = slice(first, first + int(self.index.shard_samples[shard]))
        parts = (self.index.block[rows], self.index.size[rows], self.index.label[rows])
        digest = hashlib.sha256(b"".join([self.index.version.encode(), *(part.tobytes() for part in parts)]))
        return Shard(self.index.source(shard), int(self.index.shard_bytes[shard]), digest.hexdigest())

    def expect(self, shards: Sequence[int], part: int = 0, parts: int = 1) -> None:
        """The shards whose samples are wanted from now on, soonest first; what was announced before is forgotten.

        Where several processes of a machine expect the same shards, this is number `part` of `parts`.
        """
        wanted = tuple(shards)
        if wanted == self._expected:
            return
        self._expected = wanted
        mine = [shard for shard in wanted if shard % parts == part]
        jobs: list[Shard | str] = []
        # Each begins with its own share, and takes part in the others' where there are not enough processes.
        for shard in [*mine, *(shard for shard in wanted if shard % parts != part)]:
            if self.cached(shard):
                jobs.append(self.elsewhere(shard))
            elif self.storage.read == "ahead" and shard % parts == part:
                jobs.append(self.index.source(shard))
        if jobs and self._ahead is None:
            self._ahead = _Ahead(self.cache)
        if self._ahead is not None:
            self._ahead.want(jobs)

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        when, message = self._failed.get(shard, (0.0, ""))
        if message and time.monotonic() - when < FORGIVEN:
            raise DataError(message)
        if len(self._files) >= self.storage.max_open:
            os.close(self._files.popitem(last=False)[1])
        try:
            self._files[shard] = self._opened(shard)
        except CacheFullError:  # which the next moment may change
            raise
        except DataError as error:
            self._failed[shard] = time.monotonic(), str(error)
            raise
        return self._files[shard]

    def _opened(self, shard: int) -> int:
        if self.cached(shard):
            return self._held(self.elsewhere(shard))
        try:
            return os.open(self.index.source(shard), os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {self.index.source(shard)} cannot be opened: {error.strerror}") from None

    def _held(self, shard: Shard) -> int:
        """A shard of the cache, once there is room for it."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.cache.open(shard)
            except CacheFullError:
                self.release()  # who waits holds nothing, so that not all can wait for each other
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOOK)

    def release(self) -> None:
        """Close the shards of the cache, which may now leave it; to be called at the end of a batch.

        A process whose batches nobody fetches, because another's is awaited, must not keep the room that one needs.
        """
        for shard in [shard for shard in self._files if self.any_cached and self.cached(shard)]:
            os.close(self._files.pop(shard))

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_failed", "_ahead")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        if self._ahead is not None:
            self._ahead.want(None)


class _Ahead:
    """A thread that gets shards in the order in which they are wanted: into the cache, or (a path) into memory."""

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self.jobs: deque[Shard | str] | None = deque()
        self.read: set[str] = set()  # paths that have been wanted ever since they were read
        self.keep: frozenset[str] = frozenset()
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="shards ahead", daemon=True)
        self.thread.start()

    def want(self, jobs: list[Shard | str] | None) -> None:
        """Work on these instead of what is left of others; None ends the thread."""
        with self.changed:
            self.read.intersection_update(job for job in jobs or () if isinstance(job, str))
            self.jobs = None if jobs is None else deque(job for job in jobs if job not in self.read)
            self.keep = frozenset(job.file for job in jobs or () if isinstance(job, Shard))
            self.changed.notify()

    def _run(self) -> None:
        while True:
            with self.changed:
                while self.jobs is not None and not self.jobs:
                    self.changed.wait()
                if self.jobs is None:
                    return
                job, keep = self.jobs.popleft(), self.keep
                if isinstance(job, str):
                    self.read.add(job)
            try:
                if isinstance(job, Shard):
                    self.cache.fetch(job, keep)
                else:
                    _read_through(job)
            except (DataError, OSError):
                continue  # who reads a sample of it says so


def _read_through(path: str) -> None:
    """Read a file from beginning to end, which leaves it in the system's memory."""
    piece = bytearray(PIECE)
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(piece):
            pass


def _name(header: bytes) -> str:
    """The name in a tar header."""
    return header[:100].rstrip(b"\0").decode("utf-8", "replace")

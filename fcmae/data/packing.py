"""Packing images into shards: planned first, then written by several processes, interrupted and continued at will.

A plan says which images go into which shard, and follows from the source and the options alone. A shard that is
complete has its name and a line in the journal beside it; the index is written from the journal when all are there.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from fcmae.data.images import Images
from fcmae.data.sources import Split
from fcmae.data.writer import Sample, Written, write_shard
from fcmae.errors import DataError, in_a_line
from fcmae.files import written_whole

JOURNAL = ".shards.jsonl"
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
TRIED = 64  # images re-encoded to learn how large the others will be


@dataclass(frozen=True)
class PackOptions:
    """How images are packed.

    samples_per_shard, shard_bytes: a shard ends at the first of these. verify: decode every image, leave out what
    fails. max_side: re-encode images with a longer side than this many pixels, as JPEG of `quality`.
    """

    samples_per_shard: int = 1000
    shard_bytes: int | None = None
    verify: bool = True
    max_side: int | None = None
    quality: int = 90


@dataclass
class Packed:
    """A shard that is done: what it holds, and by name the images that were left out, and those that are damaged."""

    shard: Written
    left_out: list[str]
    damaged: list[str] = field(default_factory=list)


class SourceGoneError(DataError):
    """An image that the system does not let us read, unlike one that cannot be decoded."""


def damage(data: bytes) -> str | None:
    """What is wrong with an image that can be decoded nevertheless. Raises whatever its decoder does."""
    from fcmae.data.decode import open_picture  # imports torch, which copying does without

    picture = open_picture(data, None)
    picture.pixels(reduction=8)  # all of a JPEG's data, the fewest pixels
    return picture.damage


def reencode(extension: str, data: bytes, max_side: int, quality: int) -> tuple[str, bytes, str | None]:
    """An image as JPEG, its longer side brought down to `max_side`; as it is if that is no longer, or an array.

    Extension, bytes and what `damage` says. Raises whatever its decoder does.
    """
    import simplejpeg

    from fcmae.data.augment import crop_resized
    from fcmae.data.decode import ArrayPicture, open_picture

    picture = open_picture(data, None)
    height, width = picture.height, picture.width
    if isinstance(picture, ArrayPicture) or max(height, width) <= max_side:
        return extension, data, None
    factor = max_side / max(height, width)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    view = crop_resized(picture, (0, 0, width, height), size)
    pixels = np.ascontiguousarray(view.permute(1, 2, 0).numpy())
    packed = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")
    return "jpg", packed, picture.damage


def plan(split: Split, options: PackOptions) -> list[tuple[int, int]]:
    """The shards as positions [start, stop) of the split's order."""
    count = len(split.order)
    if options.shard_bytes is None:
        ends = list(range(options.samples_per_shard, count, options.samples_per_shard))
    else:
        sizes = (split.images.sizes()[split.order] * _shrinkage(split, options)).astype(np.int64) + 1024
        ends, room, start = [], options.shard_bytes, 0
        for number, size in enumerate(sizes.tolist()):
            if number > start and (size > room or number - start == options.samples_per_shard):
                ends.append(number)
                room, start = options.shard_bytes, number
            room -= size
    return list(zip([0, *ends], [*ends, count], strict=True))


def _shrinkage(split: Split, options: PackOptions) -> float:
    """Bytes packed per byte of the source, from some of the images."""
    if options.max_side is None:
        return 1.0
    before = after = 0
    for number in split.order[:TRIED].tolist():
        try:
            extension, data = split.images.read(number)
            after += len(reencode(extension, data, options.max_side, options.quality)[1])
            before += len(data)
        except Exception:  # left out, and named, when its turn comes
            continue
    return after / before if before else 1.0


def _digest(split: Split, options: PackOptions, shards: list[tuple[int, int]]) -> str:
    """What a plan comes from; another source or other options give another."""
    digest = hashlib.sha256(json.dumps([asdict(options), split.classes]).encode())
    digest.update(np.array(shards, dtype=np.int64).tobytes())
    for number in (split.order, split.images.labels):
        digest.update(np.ascontiguousarray(number).tobytes())
    for number in split.order[:: max(1, len(split.order) // 1000)].tolist():
        digest.update(split.images.shown(number).encode())
    return digest.hexdigest()[:16]


def pack(
    split: Split, folder: Path, prefix: str, options: PackOptions, jobs: int, progress: Callable[[Packed], None]
) -> list[Packed]:
    """Write a split's shards into `folder`, those that are not there yet; `progress` is called for each shard.

    Raises:
        DataError: if the folder holds the beginnings of other shards, another process packs into it, the source can no
            longer be read, or a process is ended from outside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = plan(split, options)
    digest = _digest(split, options, shards)
    with _alone(folder) as lock:
        done = _read_journal(folder, digest)
        for packed in done.values():
            progress(packed)
        remove_unfinished(folder, prefix)
        todo = [number for number in range(len(shards)) if number not in done]
        names = {number: f"{prefix}-{number:06d}.tar" for number in todo}
        with open(folder / JOURNAL, "a") as journal:
            if not done and journal.tell() == 0:
                journal.write(json.dumps({"digest": digest}) + "\n")
            for number, packed in _run(split, folder, names, shards, options, jobs, lock):
                journal.write(_line(number, packed) + "\n")
                journal.flush()
                done[number] = packed
                progress(packed)
    return [done[number] for number in range(len(shards))]


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """A descriptor that holds a lock on the folder. Raises DataError if another process does."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DataError(f"{folder}: another process is writing shards here") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield lock
    finally:
        os.close(lock)


def remove_unfinished(folder: Path, prefix: str) -> None:
    """What processes that were killed had begun."""
    for leftover in folder.glob(f".{prefix}-*.tmp"):
        leftover.unlink(missing_ok=True)


def _read_journal(folder: Path, digest: str) -> dict[int, Packed]:
    """Shards that are complete, by number."""
    path = folder / JOURNAL
    if not path.exists():
        return {}
    done: dict[int, Packed] = {}
    header, *lines = path.read_text().split("\n")
    if header and header != json.dumps({"digest": digest}):
        raise DataError(
            f"{folder}: holds the beginnings of shards from another source or with other options; remove it first"
        )
    for line in lines:
        try:
            number, packed = _parsed(line)
            shard = packed.shard
            if not shard.sizes or (folder / shard.name).stat().st_size == shard.bytes:
                done[number] = packed
        except (ValueError, KeyError, TypeError, OSError):
            continue  # the last line, cut short when the machine went down, or a shard that is gone
    with written_whole(path) as temporary:  # without what was not understood
        lines = [_line(number, packed) for number, packed in done.items()]
        temporary.write_text("\n".join([json.dumps({"digest": digest}), *lines, ""]))
    return done


def _line(number: int, packed: Packed) -> str:
    """A shard in the journal."""
    fields = vars(packed.shard) | {"extensions": sorted(packed.shard.extensions)}
    fields |= {name: fields[name].tolist() for name in ("blocks", "sizes", "labels")}
    return json.dumps({"number": number, "shard": fields, "left_out": packed.left_out, "damaged": packed.damaged})


def _parsed(line: str) -> tuple[int, Packed]:
    """A line of the journal. Raises ValueError, KeyError or TypeError for any other."""
    entry = json.loads(line)
    fields = entry["shard"] | {"extensions": set(entry["shard"]["extensions"])}
    fields |= {name: array(code, fields[name]) for name, code in (("blocks", "I"), ("sizes", "I"), ("labels", "i"))}
    return entry["number"], Packed(Written(**fields), entry["left_out"], entry["damaged"])


_images: Images  # of the process that packs


def _start(images: Images, lock: int | None) -> None:
    global _images
    _images = images
    if lock is not None:
        os.close(lock)  # it is to end with the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":  # and nobody waits for work from a main process that was killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _run(
    split: Split,
    folder: Path,
    names: dict[int, str],
    shards: list[tuple[int, int]],
    options: PackOptions,
    jobs: int,
    lock: int,
) -> Iterator[tuple[int, Packed]]:
    """The shards as they get done."""

    def job(number: int) -> tuple[Path, int, np.ndarray, PackOptions]:
        start, stop = shards[number]
        return folder / names[number], start, split.order[start:stop], options

    if min(jobs, len(names)) <= 1:
        for number in names:
            yield number, _pack_shard(split.images, *job(number))
        return
    if options.verify or options.max_side is not None:
        import fcmae.data.augment  # noqa: F401, here once and not in every process
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    inherited = lock if method == "fork" else None
    pool = ProcessPoolExecutor(min(jobs, len(names)), context, _start, (split.images, inherited))
    try:
        waiting = iter(names)
        running = {pool.submit(_pack_here, *job(number)): number for number in islice(waiting, 2 * jobs)}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                following = next(waiting, None)
                if following is not None:
                    running[pool.submit(_pack_here, *job(following))] = following
    except BrokenProcessPool:
        raise DataError(
            f"{folder}: a process that packs was ended from outside (out of memory?); the same command continues, "
            "with fewer --jobs if need be"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)


def _pack_here(path: Path, start: int, numbers: np.ndarray, options: PackOptions) -> Packed:
    return _pack_shard(_images, path, start, numbers, options)


def _pack_shard(images: Images, path: Path, start: int, numbers: np.ndarray, options: PackOptions) -> Packed:
    left_out: list[str] = []
    damaged: list[str] = []

    def usable() -> Iterator[Sample]:
        for position, number in enumerate(numbers.tolist(), start):
            try:
                extension, data, wrong = _prepared(*images.read(number), options)
            except Exception as error:
                if isinstance(error, OSError) and error.errno:  # the system's; Pillow's have no number
                    raise SourceGoneError(f"{error}; the same command goes on from here") from error
                left_out.append(f"{images.shown(number)}: {in_a_line(error)}")
                continue
            if wrong is not None:
                damaged.append(f"{images.shown(number)}: {wrong}")
            label = int(images.labels[number])
            # Numbered, so that keys are unique and free of dots whatever the files are called.
            yield f"{position:09d}", extension, data, None if label < 0 else label

    try:
        return Packed(write_shard(path, usable()), left_out, damaged)
    except SourceGoneError:
        raise
    except DataError:  # none of them can be used
        return Packed(Written(path.name), left_out)


def _prepared(extension: str, data: bytes, options: PackOptions) -> tuple[str, bytes, str | None]:
    """Extension and bytes as they are packed, and what is wrong with the image although it can be decoded.

    Raises whatever its decoder does.
    """
    if not data:
        raise ValueError("the file is empty")
    kept, wrong = data, None
    if options.max_side is not None:
        extension, data, wrong = reencode(extension, data, options.max_side, options.quality)
    if options.verify and data is kept:
        wrong = damage(data)
    return extension, data, wrong

"""Write the index of WebDataset shards that exist, so that they can be trained from where they lie.

    python scripts/index_shards.py SHARDS [SHARDS ...] [--out FOLDER]

SHARDS are folders of tars, tars, URLs (https://, s3://, gs://) or pipe: commands; {0000..0099} stands for a hundred of
them. The index goes into FOLDER, by default the one folder the shards lie in, and names the shards; training takes
FOLDER as data.train. Only headers are read, of URLs the whole shards, which are not kept.

As in WebDataset, files whose names are the same up to the first dot are a sample. One of them must be an image (or a
.npy array), or the one with --image EXTENSION is; its label is the number in the file .cls, or that of KEY in .json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fcmae.data.archives import check_bytes, check_end
from fcmae.data.index import BLOCK, IMAGE_EXTENSIONS, INDEX_NAME, ShardIndex
from fcmae.data.storage import PIPE, Storage, download, is_remote, unsafe
from fcmae.data.synsets import LISTS, synset_list
from fcmae.data.writer import Written, index_of
from fcmae.errors import DataError, UserError

MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key and extension, as WebDataset divides them
LARGEST_LABEL = 1 << 20


@dataclass(frozen=True)
class Wanted:
    """What is taken of a sample: the file that is its image (None: the only one), the key of its label in .json (None:
    the number in .cls). allow_pipe: also from members with unsafe names.
    """

    image: str | None = None
    label_key: str | None = None
    allow_pipe: bool = False


def read_shard(location: str, wanted: Wanted) -> Written:
    """What a shard holds. Raises DataError, naming the shard and where there is one the sample."""
    if not is_remote(location):
        return _scanned(Path(location), location, wanted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        download(location, path)
        return _scanned(path, location, wanted)


def _scanned(path: Path, location: str, wanted: Wanted) -> Written:
    written = Written(location, path.stat().st_size)
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            for key, files in _samples(archive):
                for member in files.values():
                    if unsafe(member.name) and not wanted.allow_pipe:
                        raise DataError(f"{location}: {member.name}: such names are only taken with --allow-pipe")
                extension = _image(files, wanted.image, f"{location}: sample {key}")
                image = files[extension]
                stream.seek(image.offset_data - BLOCK)
                if stream.read(BLOCK)[257:262] != b"ustar":
                    raise DataError(f"{location}: has headers of before 1988; pack the shard again")
                written.blocks.append(image.offset_data // BLOCK)
                written.sizes.append(image.size)
                written.labels.append(_label(archive, files, wanted.label_key, f"{location}: sample {key}"))
                written.extensions.add(_suffix(extension))
            check_end(archive, stream)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{location}: is no complete, uncompressed tar ({error})") from error
    return written


def _suffix(extension: str) -> str:
    """.png for png, and for rgb.PNG too."""
    return "." + extension.rsplit(".", 1)[-1].lower()


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys and their files by extension; files of a sample follow one another."""
    key = ""
    files: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep the headers of a million files
        check_bytes(member)
        match = MEMBER.fullmatch(member.name)
        if not member.isfile() or match is None:
            continue
        extension = match[2].lower()
        if match[1] != key or extension in files:
            if files:
                yield key, files
            key, files = match[1], {}
        files[extension] = member
    if files:
        yield key, files


def _image(files: dict[str, tarfile.TarInfo], wanted: str | None, where: str) -> str:
    """The extension of the file that is a sample's image. Raises DataError."""
    named = ", ".join(list(files)[:10]) + (", …" if len(files) > 10 else "")
    if wanted is not None:
        if wanted not in files:
            raise DataError(f"{where} has no {wanted} among its files {named}")
        return wanted
    images = [ext for ext in files if _suffix(ext) in IMAGE_EXTENSIONS]
    if not images:
        raise DataError(f"{where} has no image among its files {named}")
    if len(images) > 1:
        raise DataError(f"{where} has {len(images)} images among its files {named}; choose one with --image")
    return images[0]


def _label(archive: tarfile.TarFile, files: dict[str, tarfile.TarInfo], label_key: str | None, where: str) -> int:
    """The label of a sample, -1 if it has none."""
    extension = "json" if label_key else "cls"
    if extension not in files:
        return -1
    file = archive.extractfile(files[extension])
    assert file is not None
    text = file.read()
    try:
        value = json.loads(text)[label_key] if label_key else int(text)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST_LABEL:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        shown = text[:40].decode(errors="replace")
        wanted = f"a number at {label_key}" if label_key else "a number"
        raise DataError(f"{where}: its .{extension} holds {shown!r}, not {wanted} from 0 on") from None
    return value


def expand(names: list[str]) -> list[str]:
    """The shards that arguments mean, in order. Raises DataError for what is not there."""
    from braceexpand import braceexpand  # webdataset's

    shards: list[str] = []
    for name in names:
        for one in braceexpand(name) if re.search(r"\{[^{}]*(\.\.|,)[^{}]*\}", name) else [name]:
            path = Path(one).expanduser()
            if is_remote(one):
                shards.append(one)
            elif path.is_dir():
                inside = sorted(os.path.abspath(p) for p in path.glob("*.tar"))
                if not inside:
                    raise DataError(f"{one}: holds no .tar files")
                shards += inside
            elif path.is_file():
                shards.append(os.path.abspath(path))
            else:
                raise DataError(f"{one}: no such file or folder")
    return shards


def index_shards(
    shards: list[str],
    out: Path,
    wanted: Wanted,
    *,
    classes: list[str] | None = None,
    jobs: int = 1,
    console: Console | None = None,
) -> ShardIndex:
    """Write the index of `shards` into `out`. Classes without names are numbered. Raises DataError."""
    storage = Storage(allow_pipe=wanted.allow_pipe)
    for shard in shards:
        storage.check(shard)
    out.mkdir(parents=True, exist_ok=True)
    read = partial(read_shard, wanted=wanted)
    shown = console or Console(soft_wrap=True)
    try:
        with ProcessPoolExecutor(jobs, initializer=_ignore_interrupts) as pool:
            found = pool.map(read, shards) if jobs > 1 and len(shards) > 1 else map(read, shards)
            bar = track(found, "shards", len(shards), console=shown, disable=not shown.is_terminal, transient=True)
            written = list(bar)
    except BrokenProcessPool:
        raise DataError("a process that reads was ended from outside (out of memory?); try fewer --jobs") from None
    for entry in written:
        if not is_remote(entry.name) and os.path.dirname(entry.name) == os.path.abspath(out):
            entry.name = Path(entry.name).name
    index = index_of(out, written, [], {"source": "shards that were there", **asdict(wanted)})
    if not len(index):
        raise DataError("there is no sample in these shards")
    highest = int(index.label.max())
    if classes is not None and highest >= len(classes):
        raise DataError(f"there are labels up to {highest}, and {len(classes)} class names")
    index.classes = [str(number) for number in range(highest + 1)] if classes is None else classes
    index.save()
    return index


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides what Ctrl-C means


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="index_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS")
    parser.add_argument("--out", metavar="FOLDER", help="where the index goes")
    names = parser.add_mutually_exclusive_group()
    names.add_argument("--classes", type=Path, metavar="FILE", help="class names, a line each, in the order of labels")
    names.add_argument("--synsets", choices=LISTS, help="classes of this list of timm's")
    parser.add_argument("--image", metavar="EXTENSION", help="of the file that is the image, such as rgb.png")
    parser.add_argument("--label-key", metavar="KEY", help="take labels from .json files")
    parser.add_argument("--allow-pipe", action="store_true", help="run pipe: commands, take unsafe names of members")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one per core)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs={options.jobs}: must be at least 1")
    if options.image is not None:
        options.image = options.image.lower().removeprefix(".")
        if _suffix(options.image) not in IMAGE_EXTENSIONS:
            parser.error(f"--image={options.image}: must end in one of {', '.join(e[1:] for e in IMAGE_EXTENSIONS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for what only the user can put right)."""
    options = parse(arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        shards = expand(options.shards)
        if any(shard.startswith(PIPE) for shard in shards) and not options.allow_pipe:
            raise DataError("pipe: commands are only run with --allow-pipe")
        if options.out is not None and is_remote(options.out):
            raise DataError(f"--out={options.out}: must be a folder of this machine; copy the index from there")
        folders = {Path(shard).parent for shard in shards if not is_remote(shard)}
        if options.out is None and (len(folders) != 1 or any(map(is_remote, shards))):
            raise DataError("the shards lie in several places; say with --out where the index goes")
        out = Path(options.out or folders.pop())
        if (out / INDEX_NAME).exists():
            raise DataError(f"{out} already holds an index; remove it first or choose another --out")
        classes = synset_list(options.synsets) if options.synsets else None
        if options.classes is not None:
            classes = options.classes.read_text().splitlines()
        index = index_shards(
            shards,
            out,
            Wanted(options.image, options.label_key, options.allow_pipe),
            classes=classes,
            jobs=options.jobs,
            console=console,
        )
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    labelled = int((index.label >= 0).sum())
    console.print(
        f"{out / INDEX_NAME}: {len(index):,} images in {len(shards):,} shards, {labelled:,} with a label, "
        f"{index.num_classes:,} classes",
        markup=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

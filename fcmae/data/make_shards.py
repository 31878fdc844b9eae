"""Turn images into WebDataset shards and their index.

    python scripts/make_shards.py SOURCE OUT [--kind auto|folders|flat|idx|imagenet|tars] [--val-share 0.1]

SOURCE is one of
  a folder with one folder per class, or a flat folder without labels;
  a folder of IDX files (the MNIST family, gzipped or not);
  a folder with ILSVRC2012_img_train.tar and, for val, ILSVRC2012_img_val.tar and a file with its labels, as downloaded;
  a folder with one tar per synset, as ImageNet-21k is downloaded, or a tar of such tars;
  torchvision:NAME, any classification data set of torchvision (its files in --root).

Splits found there become OUT/train and OUT/val; without any, OUT itself holds the shards, or OUT/train and OUT/val if
--val-share sets images aside. Tars are read in place. Broken images are reported by name and left out. Interrupted in
any way, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fcmae.data.index import INDEX_NAME, ShardIndex
from fcmae.data.packing import JOURNAL, Packed, PackOptions, pack, remove_unfinished
from fcmae.data.sources import KINDS, SourceOptions, Split, open_source
from fcmae.data.synsets import LISTS
from fcmae.data.writer import index_of
from fcmae.errors import DataError, UserError

NAMED = 50  # broken images printed by name; the index has them all
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def size(text: str) -> int:
    """Bytes of `500M`, `1.5GB`, …"""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of bytes, such as 500MB or 1.5GB")
    return int(float(match[1]) * UNITS[match[2]])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--kind", choices=KINDS, default="auto")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="at most (1000)")
    parser.add_argument("--shard-bytes", type=size, metavar="SIZE", help="of a shard, about: 500MB, 1GB (no limit)")
    parser.add_argument(
        "--val-share", type=float, default=0.0, metavar="SHARE", help="share of the images set aside as val"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of images in shards and of the val share")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not decode every image to find broken ones"
    )
    parser.add_argument(
        "--max-side", type=int, metavar="PIXELS", help="re-encode larger images as JPEG with this longer side"
    )
    parser.add_argument("--quality", type=int, default=90, help="of re-encoded JPEGs (90)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (one per core; two where nothing is decoded)")
    parser.add_argument(
        "--synsets",
        choices=LISTS,
        help="classes and their order from this list of timm's, whatever classes there are; by default from the list "
        "that holds exactly the classes found, else sorted",
    )
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="labels of ILSVRC2012_img_val.tar")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of torchvision's data sets (data)")
    parser.add_argument("--download", action="store_true", help="let torchvision download the data set")
    options = parser.parse_args(arguments)
    if options.jobs is None:  # copying waits for the disk half of the time
        options.jobs = (os.cpu_count() or 1) * (1 if options.verify or options.max_side else 2)
    for name, least, most in (
        ("samples_per_shard", 1, None),
        ("max_side", 1, None),
        ("jobs", 1, None),
        ("quality", 1, 100),
    ):
        value = getattr(options, name)
        if value is not None and not (least <= value and (most is None or value <= most)):
            allowed = f"at least {least}" if most is None else f"from {least} to {most}"
            parser.error(f"--{name.replace('_', '-')}={value}: must be {allowed}")
    if not 0 <= options.val_share < 1:
        parser.error(f"--val-share={options.val_share}: must be in [0, 1)")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for what only the user can put right)."""
    options = parse(arguments)
    console = Console(soft_wrap=True, highlight=False)
    before = signal.signal(signal.SIGTERM, _interrupt)
    folders: list[Path] = []
    try:
        make(options, console, folders)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        for folder in folders:
            remove_unfinished(folder, _prefix(folder, options.out))
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _prefix(folder: Path, out: Path) -> str:
    return folder.name if folder != out else "shard"


def make(options: argparse.Namespace, console: Console, folders: list[Path]) -> None:
    """Write all splits, then their indices: half a data set would look like a whole one to the next command."""
    with console.status("listing images"):
        splits = open_source(
            options.source,
            SourceOptions(
                kind=options.kind,
                val_share=options.val_share,
                seed=options.seed,
                synsets=options.synsets,
                val_labels=options.val_labels,
                root=options.root,
                download=options.download,
            ),
        )
    folders += [options.out / split.name for split in splits]
    begun = [folder for folder in folders if (folder / JOURNAL).exists()]
    finished = [folder for folder in folders if (folder / INDEX_NAME).exists()]
    if begun and finished == folders:  # all that was left to do when it was interrupted
        for folder in begun:
            (folder / JOURNAL).unlink()
        console.print(f"{options.out}: was complete", markup=False)
        return
    for folder in finished:
        if folder not in begun:
            raise DataError(f"{folder}: already holds shards; choose another OUT or remove it first")
    how = PackOptions(options.samples_per_shard, options.shard_bytes, options.verify, options.max_side, options.quality)
    indices = []
    for split, folder in zip(splits, folders, strict=True):
        packed = show(split, folder, _prefix(folder, options.out), how, options.jobs, console)
        left_out = [*split.left_out, *(line for part in packed for line in part.left_out)]
        shards = [part.shard for part in packed if part.shard.sizes]
        if not shards:
            (folder / JOURNAL).unlink()
            raise DataError(f"{folder}: there was no usable image to write; {left_out[0]}")
        provenance = {
            "source": options.source if ":" in options.source else str(Path(options.source).resolve()),
            "options": {
                name: str(value) if isinstance(value, Path) else value
                for name, value in vars(options).items()
                if name not in ("source", "out", "jobs", "download")
            },
            "synsets": split.listed,
            "left_out": left_out,
            "damaged": [line for part in packed for line in part.damaged],
        }
        indices.append(index_of(folder, shards, split.classes, provenance))
    for index in indices:
        index.save()
    for folder in folders:
        (folder / JOURNAL).unlink()
    for split, index in zip(splits, indices, strict=True):
        report(split, index, console)


def show(split: Split, folder: Path, prefix: str, how: PackOptions, jobs: int, console: Console) -> list[Packed]:
    """Pack a split under a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(split.name or "images", total=len(split.order), rate="")
        written = 0

        def progress(packed: Packed) -> None:
            nonlocal written
            written += packed.shard.bytes
            bar.advance(task, len(packed.shard.sizes) + len(packed.left_out))
            elapsed = bar.tasks[task].elapsed or 1e-9
            bar.update(task, rate=f"{bar.tasks[task].completed / elapsed:,.0f}/s, {written / elapsed / 1e6:,.0f} MB/s")

        return pack(split, folder, prefix, how, jobs, progress)


def report(split: Split, index: ShardIndex, console: Console) -> None:
    """What was written, and what was left out or is damaged, by name."""
    left_out, damaged = index.provenance["left_out"], index.provenance["damaged"]
    for what, lines in (("left out", left_out), ("damaged", damaged)):
        for line in lines[:NAMED]:
            console.print(f"{what}: {line}", markup=False)
        if len(lines) > NAMED:
            console.print(f"{what}: {len(lines) - NAMED:,} more, named in {index.folder / INDEX_NAME}", markup=False)
    total = int(index.shard_bytes.sum()) / 1e6
    console.print(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards, {total:,.1f} MB", markup=False)
    if split.classes:
        counts = np.bincount(index.label, minlength=len(split.classes))
        spread = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        listed = f" in the order of timm's list {split.listed}" if split.listed else ""
        console.print(f"  {len(split.classes)} classes{listed} with {spread} images each")
        empty = [name for name, count in zip(split.classes, counts, strict=True) if count == 0]
        for name in empty[:NAMED]:
            console.print(f"  class {name} has no usable image", markup=False)
        if len(empty) > NAMED:
            console.print(f"  {len(empty) - NAMED:,} more classes have no usable image")
    broken = len(left_out) - len(split.left_out)
    if broken:
        console.print(f"  {broken:,} of {len(split.order):,} files could not be used and were left out")
    if damaged:
        console.print(f"  {len(damaged):,} are damaged, and decoded as far as Pillow can")


if __name__ == "__main__":
    sys.exit(main())

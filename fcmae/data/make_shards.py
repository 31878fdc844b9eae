"""Turn images into WebDataset shards and their index.

    python scripts/make_shards.py SOURCE OUT [--kind auto|folders|flat|idx] [--val-share 0.1]

SOURCE is a folder with one folder per class, a flat folder without labels, or a folder of IDX files (the MNIST family,
gzipped or not). Splits found there become OUT/train and OUT/val; without any, OUT itself holds the shards, or OUT/train
and OUT/val if --val-share sets images aside. Broken images are reported by name and left out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from fcmae.data.index import INDEX_NAME, ShardIndex
from fcmae.data.sources import Split, open_source
from fcmae.data.writer import write_shards
from fcmae.errors import DataError, UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make_shards.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--kind", choices=("auto", "folders", "flat", "idx"), default="auto")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N")
    parser.add_argument(
        "--val-share", type=float, default=0.0, metavar="SHARE", help="share of the images set aside as val"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of images in shards and of the val share")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not decode every image to find broken ones"
    )
    options = parser.parse_args(arguments)
    if options.samples_per_shard < 1:
        parser.error(f"--samples-per-shard={options.samples_per_shard}: must be at least 1")
    if not 0 <= options.val_share < 1:
        parser.error(f"--val-share={options.val_share}: must be in [0, 1)")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for what only the user can put right)."""
    options = parse(arguments)
    console = Console(soft_wrap=True, highlight=False)
    written: list[ShardIndex] = []
    try:
        splits = open_source(
            options.source, options.kind, verify=options.verify, val_share=options.val_share, seed=options.seed
        )
        for split in splits:
            if (options.out / split.name / INDEX_NAME).exists():
                raise DataError(
                    f"{options.out / split.name}: already holds shards; choose another OUT or remove it first"
                )
        for split in splits:
            samples = track(
                split.samples, total=split.total, description=split.name or "images", console=console, transient=True
            )
            index = write_shards(
                samples,
                options.out / split.name,
                prefix=split.name or "shard",
                samples_per_shard=options.samples_per_shard,
                classes=split.classes,
                provenance={"source": str(options.source.resolve()), "left_out": split.broken},
            )
            written.append(index)
            report(split, index, console)
    except (UserError, OSError) as error:
        # All splits or none: half a data set would look like a whole one to the next command.
        for index in written:
            (index.folder / INDEX_NAME).unlink()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        for index in written:
            (index.folder / INDEX_NAME).unlink()
        print("interrupted; shards without an index are not used, the same command writes them again", file=sys.stderr)
        return 130
    return 0


def report(split: Split, index: ShardIndex, console: Console) -> None:
    """What was written and what was left out, by name."""
    for line in split.broken:
        console.print(f"left out: {line}", markup=False)
    size = int(index.shard_bytes.sum()) / 1e6
    console.print(f"{index.folder}: {len(index):,} images in {len(index.shards)} shards, {size:,.1f} MB", markup=False)
    if split.classes:
        counts = np.bincount(index.label, minlength=len(split.classes))
        spread = f"{counts.min():,}" if counts.min() == counts.max() else f"{counts.min():,} to {counts.max():,}"
        console.print(f"  {len(split.classes)} classes with {spread} images each")
        for name in (name for name, count in zip(split.classes, counts, strict=True) if count == 0):
            console.print(f"  class {name} has no usable image", markup=False)
    if split.broken:
        console.print(f"  {len(split.broken):,} of {split.total:,} files could not be used and were left out")


if __name__ == "__main__":
    sys.exit(main())

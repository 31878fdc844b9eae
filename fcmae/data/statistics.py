"""Mean and standard deviation of the pixels of a data set, per channel, for `data.mean` and `data.std`.

    python scripts/measure_statistics.py SHARDS [--images 10000]

SHARDS is a folder of shards or its index file. Pixels count as 0–1 for images and arrays of uint8 and uint16; float32
arrays are taken as they are. Every image weighs the same, however large it is. The last line can be pasted behind a
training command.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from rich.console import Console
from rich.progress import track

from fcmae.data.decode import UNITS, open_picture
from fcmae.data.index import read_index
from fcmae.data.reader import ShardReader
from fcmae.errors import DataError, UserError, in_a_line


def moments(reader: ShardReader, samples: np.ndarray, channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (C,) float64 each, over the pixels of all samples.

    Raises:
        DataError: for a sample that cannot be read or decoded, or that has another number of channels than the first.
    """
    first = second = np.zeros(0)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    for sample in track(samples.tolist(), "images", console=console, transient=True, disable=quiet):
        try:
            pixels = open_picture(reader.read(sample), channels).pixels(reduction=1)
        except DataError:
            raise
        except Exception as error:  # of a dozen types, whatever the decoder raises
            raise DataError(f"{reader.where(sample)} cannot be decoded: {in_a_line(error)}") from error
        values = pixels.reshape(-1, pixels.shape[-1]).astype(np.float64) / UNITS.get(pixels.dtype.name, 1)
        if first.size == 0:
            first, second = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        if values.shape[1] != len(first):
            raise DataError(f"{reader.where(sample)} has {values.shape[1]} channels, others have {len(first)}")
        first = first + values.mean(0)
        second = second + (values**2).mean(0)
    mean = first / len(samples)
    return mean, np.sqrt(np.maximum(second / len(samples) - mean**2, 0))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for what only the user can put right)."""
    parser = argparse.ArgumentParser(
        prog="measure_statistics.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", metavar="SHARDS")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="drawn at random; 0 for all (10,000)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="of image files: 1 grey, 3 RGB (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args(arguments)
    if options.images < 0:
        parser.error(f"--images {options.images}: must be at least 0")
    try:
        reader = ShardReader(read_index(options.shards))
        count = len(reader.index)
        drawn = np.random.default_rng(options.seed).permutation(count)[: options.images or count]
        mean, std = moments(reader, np.sort(drawn), options.channels)
    except (UserError, OSError) as error:
        print(f"error: {options.shards}: {error}", file=sys.stderr)
        return 2
    print(f"{len(drawn):,} of {count:,} images, {len(mean)} channels")
    given = (
        f"'data.{name}=[{','.join(f'{v:.6g}' for v in values)}]'" for name, values in (("mean", mean), ("std", std))
    )
    print(" ".join(given))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Speed of reading, decoding and cropping, against torchvision's way, on made-up photographs.

    python scripts/bench_data.py                           the two ratios of docs/data.md, on one core
    python scripts/bench_data.py --workers 2               and the whole loaders against each other
    python scripts/bench_data.py --workers 2 --train atto  and how long pretraining steps wait for data

Photographs of ImageNet's usual size (500 x 375, about 110 KB as JPEG) are made up: noise of natural spectrum with
edges. The reference is torchvision's: Pillow decodes, RandomResizedCrop (bicubic) to 224 pixels, flip, ToTensor,
Normalize. Ours reads the same files from a shard, at their size and re-encoded to 256 pixels. Before anything is timed
our crops must agree with the reference's within 2/255 in the mean. All take turns; medians, middle half in brackets.

Ends with exit code 1 if a ratio is short of what is asked.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_machine import table

from fcmae import architecture
from fcmae.data.augment import TrainView, random_resized_crop_box
from fcmae.data.decode import open_picture
from fcmae.data.index import read_index
from fcmae.data.loader import Samples, normalise, train_batches
from fcmae.data.order import BatchPlan
from fcmae.data.reader import ShardReader
from fcmae.data.writer import write_shards
from fcmae.model import create_model

SIZES = ((500, 375), (375, 500), (500, 333), (500, 400))
BYTES = 118_000
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WARM_UP = 4  # steps
MUSTS = {"original files": 2.5, "256 px": 6.0}


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise whose spectrum falls like a photograph's, with discs for edges."""

    def noise(slope: float) -> np.ndarray:
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        frequency[0, 0] = 1
        plane = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(height, width))) / frequency**slope, s=(height, width))
        return (plane - plane.mean()) / plane.std()

    light, red, blue = noise(1.1), noise(1.4), noise(1.4)
    rows, columns = np.ogrid[:height, :width]
    for _ in range(25):
        x, y, radius = rng.integers(0, width), rng.integers(0, height), rng.integers(10, 120)
        disc = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        light = np.where(disc, 0.7 * light + 0.9 * rng.normal(), light)
        red = np.where(disc, 0.5 * red + rng.normal(), red)
    pixels = np.stack([light + 0.4 * red, light - 0.1 * red + 0.1 * blue, light - 0.4 * blue], axis=-1)
    return Image.fromarray((118 + 52 * pixels).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image) -> bytes:
    """As JPEG, of the best quality that stays below BYTES."""
    for quality in (95, 92, 90, 88, 85, 80, 75, 70, 60):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        if buffer.tell() < BYTES:
            break
    return buffer.getvalue()


def reduced(data: bytes, side: int) -> bytes:
    """Re-encoded so that the longer side has `side` pixels."""
    image = Image.open(io.BytesIO(data))
    factor = side / max(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def check(files: list[bytes], view: TrainView) -> float:
    """Mean absolute error of our crops against the reference's, in 1/255. Ends the script if it is above 2."""
    errors = []
    for number, data in enumerate(files):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top, right, bottom = random_resized_crop_box(
            np.random.default_rng(number), image.width, image.height, view.scale
        )
        expected = functional.resized_crop(
            image, top, left, bottom - top, right - left, list(view.size), functional.InterpolationMode.BICUBIC
        )
        ours = view(open_picture(data, 3), np.random.default_rng(number)).permute(1, 2, 0).numpy()
        errors.append(np.abs(ours.astype(int) - np.asarray(expected).astype(int)).mean())
    if max(errors) > 2:
        raise SystemExit(f"crops differ from the reference by {max(errors):.2f}/255 in the mean of an image")
    return float(np.mean(errors))


def take_turns(variants: dict[str, Callable[[], int]], repeats: int) -> dict[str, list[float]]:
    """Images per second of each variant, `repeats` times; a variant returns how many images it made."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            count = run()
            speeds[name].append(count / (time.perf_counter() - start))
    return speeds


def row(name: str, speeds: list[float], base: list[float]) -> list[str]:
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
    return [name, f"{median:.4g} ({low:.4g}–{high:.4g})", f"{median / statistics.median(base):.2f}"]


def reference_transform(size: int, scale: tuple[float, float]) -> Callable:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


def one_core(shards: dict[str, Path], files: list[bytes], size: int, repeats: int) -> dict[str, list[float]]:
    """Image by image, neither collected into batches."""
    transform = reference_transform(size, (0.2, 1.0))
    view = TrainView((size, size))

    def reference() -> int:
        for data in files:
            transform(Image.open(io.BytesIO(data)).convert("RGB"))
        return len(files)

    def ours(folder: Path) -> Callable[[], int]:
        samples = Samples(ShardReader(read_index(folder)), view, 3)

        def run() -> int:
            for number in range(len(files)):
                samples.usable(0, number)
            return len(files)

        return run

    variants = {"reference": reference} | {name: ours(folder) for name, folder in shards.items()}
    return take_turns(variants, repeats)


def whole_loaders(
    shards: dict[str, Path], folder: Path, size: int, workers: int, repeats: int, batch: int = 32, batches: int = 16
) -> dict[str, list[float]]:
    """ImageFolder and DataLoader against ours, from starting the processes to the last of some batches."""
    dataset = ImageFolder(str(folder), reference_transform(size, (0.2, 1.0)))

    def reference() -> int:
        sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=batch * batches)
        loader = torch.utils.data.DataLoader(dataset, batch, sampler=sampler, num_workers=workers)
        return sum(len(images) for images, _ in loader)

    def ours(index_folder: Path) -> Callable[[], int]:
        samples = Samples(ShardReader(read_index(index_folder)), TrainView((size, size)), 3)
        plan = BatchPlan(samples.reader.index.shard_samples, min(batch, len(dataset)))
        return lambda: sum(len(b["image"]) for b in train_batches(samples, plan, 0, batches, workers))

    variants: dict[str, Callable[[], int]] = {"ImageFolder and DataLoader": reference}
    variants |= {f"{name}, {workers} workers": ours(index_folder) for name, index_folder in shards.items()}
    return take_turns(variants, repeats)


def waiting(shards: dict[str, Path], size: int, name: str, workers: int, batch: int, steps: int) -> dict[str, dict]:
    """Pretraining steps of model `name`: images per second, and the share of the time spent waiting for a batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {}
    for label, folder in shards.items():
        torch.manual_seed(0)
        model = create_model(name, image_size=size).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
        reader = ShardReader(read_index(folder))
        samples = Samples(reader, TrainView((size, size)), 3, 0, model.num_patches, model.num_visible)
        plan = BatchPlan(reader.index.shard_samples, min(batch, len(reader.index)))
        batches = train_batches(samples, plan, 0, steps + WARM_UP, workers)
        spent = began = 0.0
        for step in range(steps + WARM_UP):
            if step == WARM_UP:  # processes have started and memory is there
                spent, began = 0.0, time.perf_counter()
            before = time.perf_counter()
            loaded = {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
            spent += time.perf_counter() - before
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(normalise(loaded["image"], list(MEAN), list(STD)), loaded["visible"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()  # as a loop that logs; the device is done when this returns
        total = time.perf_counter() - began
        found[label] = {"images_per_second": plan.batch_size * steps / total, "waiting": spent / total}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="photographs to make up")
    parser.add_argument("--size", type=int, default=224, help="of the crops")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--workers", type=int, default=0, help="also compare whole loaders with so many processes")
    parser.add_argument(
        "--train",
        choices=architecture.SIZES,
        metavar="MODEL",
        help="also time pretraining steps, with --workers (atto, ...)",
    )
    parser.add_argument("--batch", type=int, default=32, help="of those steps")
    parser.add_argument("--steps", type=int, default=10, help="so many")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args(argv)
    for name in ("images", "size", "repeats", "batch", "steps"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least 1")
    rng = np.random.default_rng(0)
    files = [encode(photograph(rng, *SIZES[number % len(SIZES)])) for number in range(arguments.images)]
    small = [reduced(data, 256) for data in files]
    view = TrainView((arguments.size, arguments.size), hflip=False)
    parity = {name: check(group, view) for name, group in (("original files", files), ("256 px", small))}
    average = {name: np.mean([len(d) for d in group]) / 1e3 for name, group in (("files", files), ("256 px", small))}
    print(f"torch {torch.__version__}, {len(files)} photographs of {average['files']:.0f} KB, ", end="")
    print(f"re-encoded {average['256 px']:.0f} KB")
    with tempfile.TemporaryDirectory() as temporary:
        shards = {}
        for name, group in (("original files", files), ("256 px", small)):
            shards[name] = Path(temporary) / name.replace(" ", "-")
            write_shards(((f"{n:06d}", "jpg", data, 0) for n, data in enumerate(group)), shards[name], classes=["one"])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        speeds = one_core(shards, files, arguments.size, arguments.repeats)
        torch.set_num_threads(threads)
        header = ["", "images/s on one core", "ratio"]
        lines = [row(name, values, speeds["reference"]) for name, values in speeds.items()]
        print("\n" + table(header, lines))
        if arguments.workers:
            folder = Path(temporary) / "folder" / "one"
            folder.mkdir(parents=True)
            for number, data in enumerate(files):
                (folder / f"{number}.jpg").write_bytes(data)
            whole = whole_loaders(shards, folder.parent, arguments.size, arguments.workers, arguments.repeats)
            base = whole["ImageFolder and DataLoader"]
            lines = [row(name, values, base) for name, values in whole.items()]
            print("\n" + table(["", f"images/s, {arguments.workers} workers", "ratio"], lines))
            speeds |= whole
        waits = {}
        if arguments.train:
            waits = waiting(
                shards, arguments.size, arguments.train, arguments.workers, arguments.batch, arguments.steps
            )
            lines = [
                [name, f"{w['images_per_second']:.4g}", f"{100 * w['waiting']:.2f} %"] for name, w in waits.items()
            ]
            print("\n" + table([f"pretraining {arguments.train}", "images/s", "of it waiting for data"], lines))
    ratios = {name: statistics.median(speeds[name]) / statistics.median(speeds["reference"]) for name in MUSTS}
    lines = []
    for name, must in MUSTS.items():
        verdict = "met" if ratios[name] >= must else "MISSED"
        lines.append([name, f"≥ {must:g}", f"{ratios[name]:.2f}", f"{parity[name]:.2f}/255", verdict])
    print("\n" + table(["fcmae / reference", "must", "measured", "mean error", ""], lines))
    if arguments.json:
        report = {"images_per_second": speeds, "ratios": ratios, "parity": parity, "training": waits}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(ratios[name] >= must for name, must in MUSTS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())

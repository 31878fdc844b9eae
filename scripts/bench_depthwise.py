"""Time Triton's packed depthwise convolution on a GPU, stage by stage, against the dense one.

    python scripts/bench_depthwise.py                       # Base, 128 images of 224 px, ratio 0.6, bfloat16
    python scripts/bench_depthwise.py --size atto --batch 512 --sweep --json times.json

Dense is what the masked layout runs: F.conv2d on the whole channels-last map, its input gradient, its weight gradient.
Nothing is timed that does not first agree with it. Columns are medians in milliseconds over distinct inputs in turn;
`floor` is the time to move each input and output byte of the forward once at the bandwidth that a large copy reaches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence

import torch

from fcmae.sparse.tiles import TileIndex, draw_visible, gather_tiles, scatter_tiles

WIDTHS = {"atto": 40, "femto": 48, "pico": 64, "nano": 80, "tiny": 96, "base": 128, "large": 192, "huge": 352}
SIDES = (8, 4, 2, 1)
GRID = (7, 7)
KERNEL = 7
INPUT_SETS = 4  # in turn, so that no run finds its input in the cache of the one before


def milliseconds(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median time of a call by device events, after a warm-up."""
    for call in calls:
        call()
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(200_000)  # lets the host run ahead, so that launches are not what is timed
        start.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.randn(2**27, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds([lambda: target.copy_(source)], repeats) * 1e3


def agree(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < tolerance:  # NaN never passes
        raise SystemExit(f"{name}: relative error {error:.1e} against the dense convolution, above {tolerance:.0e}")


def input_set(
    side: int, channels: int, batch: int, visible_count: int, dtype: torch.dtype, launch, device: str = "cuda"
) -> dict[str, tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]]:
    """{kernel: (packed call, dense call)} on fresh random input, once both agree."""
    from fcmae.sparse import depthwise_triton as kernels

    visible = draw_visible(batch, GRID[0] * GRID[1], visible_count, device=torch.device(device))
    slots = torch.full((batch, GRID[0] * GRID[1]), -1, dtype=torch.int32, device=device)
    order = torch.arange(visible_count, dtype=torch.int32, device=device)
    slots.scatter_(1, visible, order.expand(batch, -1).contiguous())
    where = (visible, slots, GRID)
    shape = (batch, visible_count, side, side, channels)
    tiles, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight, bias = torch.randn(channels, 1, KERNEL, KERNEL, device=device), torch.randn(channels, device=device)

    index = TileIndex(visible, GRID)
    dense, dense_grad = (scatter_tiles(x, index).permute(0, 3, 1, 2) for x in (tiles, grad))
    dense_weight, dense_bias = weight.to(dtype), bias.to(dtype)
    pad = KERNEL // 2

    def backward(mask: list[bool]):
        return torch.ops.aten.convolution_backward(
            dense_grad, dense, dense_weight, [channels], [1, 1], [pad, pad], [1, 1], False, [0, 0], channels, mask
        )

    calls = {
        "forward": (
            lambda: kernels.depthwise(tiles, weight, bias, *where, launch=launch),
            lambda: torch.nn.functional.conv2d(dense, dense_weight, dense_bias, padding=pad, groups=channels),
        ),
        "input gradient": (
            lambda: kernels.depthwise_input_gradient(grad, weight, *where, launch=launch),
            lambda: backward([True, False, False])[0],
        ),
        "weight gradient": (
            lambda: kernels.depthwise_weight_gradient(tiles, grad, *where, KERNEL, launch=launch)[0],
            lambda: backward([False, True, True])[1],
        ),
    }
    for name, (packed, whole) in calls.items():
        expected = whole()
        if name != "weight gradient":
            expected = gather_tiles(expected.permute(0, 2, 3, 1).contiguous(), index)
        agree(name, packed(), expected, 1e-4 if dtype == torch.float32 else 2e-2)
    return calls


def launches(sweep: bool) -> list:
    """None, which stands for what `choose_launch` chooses; with `sweep`, others after it."""
    from fcmae.sparse.depthwise_triton import Launch

    if not sweep:
        return [None]
    shapes = [(32, 1), (64, 1), (64, 2), (128, 2), (256, 4)]
    options = itertools.product(shapes, (168, 255), (132 * 6, 132 * 12, 132 * 24, 132 * 96))
    return [None, *(Launch(block, warps, registers, programs) for (block, warps), registers, programs in options)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=WIDTHS, default="base")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--visible", type=int, default=19, help="visible patches of 49 (default 19: ratio 0.6)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--sweep", action="store_true", help="try other block sizes, warps, registers and programs")
    parser.add_argument("--json", metavar="PATH", help="also write every time here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_depthwise needs a CUDA device: there is none here", file=sys.stderr)
        return 2

    dtype = getattr(torch, arguments.dtype)
    bandwidth = copy_bandwidth(arguments.repeats)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{arguments.size}, {arguments.batch} images, {arguments.visible} of 49 patches, {arguments.dtype}")
    header = f"{'T':>2} {'C':>5}  {'kernel':<16}{'dense':>9}{'packed':>9}{'times':>7}{'floor':>9}"
    print(f"{header}  block/warps/registers/programs")
    records = []
    for stage, side in enumerate(SIDES):
        channels = WIDTHS[arguments.size] * 2**stage
        elements = arguments.batch * arguments.visible * side * side * channels
        floor = 2 * elements * dtype.itemsize / bandwidth * 1e3
        dense_times: dict[str, float] = {}
        for launch in launches(arguments.sweep):
            sets = [
                input_set(side, channels, arguments.batch, arguments.visible, dtype, launch) for _ in range(INPUT_SETS)
            ]
            for name in sets[0]:
                packed, dense = zip(*(calls[name] for calls in sets), strict=True)
                if name not in dense_times:
                    dense_times[name] = milliseconds(dense, arguments.repeats)
                time = milliseconds(packed, arguments.repeats)
                reference = dense_times[name]
                row = f"{side:>2} {channels:>5}  {name:<16}{reference:>9.3f}{time:>9.3f}{reference / time:>6.1f}x"
                print(f"{row}{floor:>9.3f}  {'/'.join(map(str, launch)) if launch else 'chosen'}", flush=True)
                records.append(
                    {"T": side, "C": channels, "kernel": name, "dense_ms": reference, "packed_ms": time}
                    | {"floor_ms": floor, "launch": launch and launch._asdict()}
                )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "arguments": vars(arguments), "times": records}, file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

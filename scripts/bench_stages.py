"""Where the time of the packed encoder goes: one block of each stage, its two halves, and the floors under them.

    python scripts/bench_stages.py --size atto --batch 16

Forward and backward of one block's depthwise convolution (forward, input, weight and bias gradient) and of the rest
(LayerNorm to residual), on random tiles; beside each, in brackets, the same in plain PyTorch: the convolution on a
dense map, the rest layer by layer. The floors: the matrix products at the speed of the best square product measured
here, and the bytes of every tensor that outlives an operation, written and read once, at the speed of a copy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_machine import DTYPES, check_device, gemm_peak, keep_freed_memory, synchronise, table

from fcmae.architecture import SIZES
from fcmae.model import create_model
from fcmae.sparse import depthwise_dense, mlp
from fcmae.sparse.depthwise import implementation
from fcmae.sparse.encoder import Layout
from fcmae.sparse.packed import PackedLayout
from fcmae.sparse.tiles import draw_visible


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copy_speed(device: torch.device) -> float:
    """Bytes read and written per second by a copy much larger than any cache."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, 5)


def existing_taps(side: int, visible: Tensor, grid: tuple[int, int]) -> float:
    """Mean number of the 49 products per output whose input position is visible."""
    layout = PackedLayout(visible, grid)
    ones = torch.ones(*visible.shape, side, side, 1)
    module = implementation(ones, 7)
    weight = torch.ones(1, 1, 7, 7)
    return module.depthwise(ones, weight, None, visible, layout.index.slots, grid).mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="atto")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk-mib", type=float, help="hidden activations worked on at a time on a CPU")
    arguments = parser.parse_args()
    for name in ("batch", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be at least 1")
    check_device(parser, arguments.device)
    if arguments.chunk_mib:
        mlp.CHUNK_BYTES = int(arguments.chunk_mib * 2**20)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    torch.manual_seed(0)
    model = create_model(arguments.size)
    visible = draw_visible(arguments.batch, model.num_patches, model.num_visible)
    layout = PackedLayout(visible.to(device), model.grid)
    peak, copied = gemm_peak(device, dtype), copy_speed(device)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.size}, batch {arguments.batch}")
    print(f"matrix products {peak / 1e12:.3g} TFLOP/s, copy {copied / 1e9:.3g} GB/s")
    rows = []
    for index, stage in enumerate(model.encoder.stages):
        block = stage.blocks[0].to(device, dtype)
        channels, side = block.conv_dw.in_channels, 8 >> index
        x, shortcut, grad = (
            torch.randn(*visible.shape, side, side, channels, device=device, dtype=dtype) for _ in range(3)
        )
        x.requires_grad_()
        shortcut.requires_grad_()

        def depthwise(x=x, grad=grad, block=block) -> None:
            torch.autograd.backward(layout.depthwise(x, block.conv_dw), grad)

        def dense(x=x, grad=grad, weight=block.conv_dw.weight, bias=block.conv_dw.bias) -> None:
            place = (layout.index.visible, layout.index.slots, layout.index.grid)
            with torch.no_grad():
                depthwise_dense.depthwise(x, weight, bias, *place)
                depthwise_dense.depthwise_input_gradient(grad, weight, *place)
                depthwise_dense.depthwise_weight_gradient(x, grad, *place, 7)

        def rest(x=x, shortcut=shortcut, grad=grad, block=block) -> None:
            torch.autograd.backward(layout.pointwise(x, shortcut, block), grad)

        def layers(x=x, shortcut=shortcut, grad=grad, block=block) -> None:
            torch.autograd.backward(Layout.pointwise(layout, x, shortcut, block), grad)

        tokens = visible.numel() * side**2
        products = 3 * 2 * 8 * channels**2 * tokens
        taps = existing_taps(side, visible, model.grid)
        # Forward: the input read, the output and what is saved (depthwise output, GELU's input) written.
        # Backward: gradient, input and saved tensors read, gradient written.
        moved = 15 * channels * tokens * x.element_size()
        halves = (depthwise, dense, rest, layers)
        times = [median_seconds(half, device, arguments.repeats) * 1e3 for half in halves]
        rows.append(
            [
                str(index + 1), str(len(stage.blocks)), f"{side}² × {channels}", f"{products / 1e9:.3g}",
                f"{taps:.1f}", f"{moved / 1e6:.3g}", f"{products / peak * 1e3:.3g}", f"{moved / copied * 1e3:.3g}",
                f"{times[0]:.3g} ({times[1]:.3g})", f"{times[2]:.3g} ({times[3]:.3g})",
                f"{products / peak * 1e3 / (times[0] + times[2]):.0%}",
            ]
        )  # fmt: skip
    header = ["stage", "blocks", "tile", "GFLOP of products", "taps of 49", "MB", "floor: products, ms"]
    header += ["floor: bytes, ms", "depthwise, ms (PyTorch)", "rest, ms (PyTorch)", "products' share"]
    print("\n" + table(header, rows))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())

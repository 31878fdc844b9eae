"""Speed and memory of the sparse encoder's layouts against each other: one training step on synthetic images.

    python scripts/bench_sparse.py                       the table of docs/performance.md for this machine
    python scripts/bench_sparse.py --sizes base --batch 256 --dtype bf16 --part model --json base.json

A variant is a layout, eager or compiled. All variants of a size share weights, images and masks. Before anything is
timed each must give the features and gradients of the masked reference; a wrong answer has no speed, and the script
ends. Then the variants take turns of two steps (forward, backward, AdamW), of which the second is timed, so that
whatever else the machine does hits all of them; the median and the middle half are reported. A layout counts with its
fastest variant. On Linux the allocator is told to keep freed memory (`keep_freed_memory`).

Ends with exit code 1 if a number is short of what the table asks. Needs torch, timm and, on a GPU, triton.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_machine import DTYPES, check_device, environment, gemm_peak, keep_freed_memory, synchronise, table

from fcmae.architecture import SIZES
from fcmae.model import FCMAE, create_model
from fcmae.sparse.depthwise import implementation

# Largest relative error of the features and of each parameter's gradient; gradients far smaller than the largest, by
# the second factor, are compared with that share of it, since rounding in a long sum is what they consist of.
PARITY = {"fp32": (1e-3, 1e-3), "bf16": (5e-2, 1e-1)}


@dataclass(frozen=True)
class Case:
    size: str
    batch: int
    layouts: tuple[str, ...]
    dtype: str
    part: str  # "encoder": features and a mean square; "model": the whole of FCMAE
    musts: tuple[tuple[str, str, float], ...] = ()  # (what, against which layout, bound)


@dataclass
class Result:
    size: str
    batch: int
    part: str
    dtype: str
    layout: str
    path: str  # eager or compiled, and what convolves
    images_per_second: float
    seconds: float
    quartiles: tuple[float, float]
    memory: int  # bytes: peak on a GPU, saved activations on a CPU
    parity: float
    flops_per_second: float


SPEED, MEMORY = "images/s", "memory"
# What is asked of each case. At ratio 0.6, 19 of 49 patches remain: 2.58 times fewer matrix products.
# Small ones first: what large ones leave of the heap is in pieces.
ON_CPU = [Case("atto", 4, ("packed", "masked", "minkowski"), "fp32", "encoder", ((SPEED, "minkowski", 10.0),))] + [
    Case(size, 16, ("packed", "masked"), "fp32", "encoder", ((SPEED, "masked", 2.6), (MEMORY, "masked", 0.42)))
    for size in ("atto", "nano", "tiny")
]
ON_GPU = [
    Case("base", 256, ("packed", "masked"), "bf16", "encoder", ((SPEED, "masked", 3.0), (MEMORY, "masked", 0.42))),
    Case("base", 256, ("packed",), "bf16", "model", ((SPEED, "", 4622.0),)),
    Case("atto", 1024, ("packed",), "bf16", "model", ((SPEED, "", 30000.0),)),
]


class Variant:
    """One layout of a model with the shared weights, its optimiser and its timings."""

    def __init__(self, case: Case, layout: str, compiled: bool, weights: dict[str, Tensor], arguments) -> None:
        self.case, self.layout, self.compiled = case, layout, compiled
        self.device = torch.device(arguments.device)
        self.model = build(case, arguments)
        self.model.load_state_dict(weights)
        self.model.layout = layout
        self.model.to(self.device)
        if self.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)
        module = self.model if case.part == "model" else self.model.encoder
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        if compiled:
            blocks = [block for stage in self.model.encoder.stages for block in stage.blocks]
            for block in [*blocks, *(self.model.decoder if case.part == "model" else ())]:
                block.compile(dynamic=False)
        self.seconds: list[float] = []
        self.memory = 0
        self.parity = 0.0

    @property
    def path(self) -> str:
        name = "compiled" if self.compiled else "eager"
        if self.layout != "packed":
            return name
        tiles = torch.empty(1, 1, 8, 8, 16, device=self.device, dtype=DTYPES[self.case.dtype])
        kind = implementation(tiles, 7).__name__.rpartition("_")[2]
        return f"{name}, " + {"cpu": "C++", "triton": "Triton", "dense": "PyTorch"}[kind]

    def forward(self, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """(loss, what is compared)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.dtype == "bf16"):
            if self.case.part == "model":
                output = self.model(images, visible)
                return output.loss, output.prediction
            features = self.model.encode(images, visible)
            return features.float().square().mean(), features

    def step(self, images: Tensor, visible: Tensor) -> None:
        self.forward(images, visible)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def answer(self, images: Tensor, visible: Tensor) -> list[Tensor]:
        """Features (or predictions) and the gradient of every parameter, in float32."""
        loss, features = self.forward(images, visible)
        loss.backward()
        gradients = [p.grad.float() for p in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return [features.detach().float(), *gradients]

    def check(self, answer: list[Tensor], expected: list[Tensor]) -> None:
        """Raise SystemExit if the answer is wrong."""
        bound, floor = PARITY[self.case.dtype]
        least = floor * max(gradient.norm() for gradient in expected[1:])
        names = ["features", *(f"gradient {index} of {len(expected) - 1}" for index in range(1, len(expected)))]
        for name, actual, right in zip(names, answer, expected, strict=True):
            scale = right.norm() if name == "features" else torch.maximum(right.norm(), least)
            error = ((actual - right).norm() / scale).item()
            if not error <= bound:
                raise SystemExit(f"{self.layout} ({self.path}) gives wrong {name}: relative error {error:.2e}")
            self.parity = max(self.parity, error)

    def measure_memory(self, images: Tensor, visible: Tensor) -> None:
        """Peak bytes of a step with parameters and optimiser on a GPU; bytes kept for the backward pass on a CPU."""
        if self.device.type == "cuda":
            own = sum(p.nbytes for p in self.model.parameters())
            own += sum(x.nbytes for s in self.optimizer.state.values() for x in s.values() if isinstance(x, Tensor))
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.step(images, visible)
            self.memory = torch.cuda.max_memory_allocated() - before + own
            return
        given = {x.untyped_storage().data_ptr() for x in (*self.model.parameters(), images, visible)}
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in given:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss, _ = self.forward(images, visible)
        self.memory = sum(kept.values())
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)


def build(case: Case, arguments) -> FCMAE:
    return create_model(case.size, image_size=arguments.image_size, mask_ratio=arguments.mask_ratio)


def training_flops(model: FCMAE, part: str) -> float:
    """Of one image, forward and backward: products over visible positions, depthwise with all 49 taps, times 3."""
    tile = model.patch_size // model.encoder.stem[0].stride[0]
    products = 0.0
    widths = [stage.blocks[0].conv_dw.in_channels for stage in model.encoder.stages]
    positions = model.num_visible * tile**2
    products += positions * model.encoder.stem[0].weight.numel()
    for index, (stage, width) in enumerate(zip(model.encoder.stages, widths, strict=True)):
        if index:
            positions /= 4
            products += positions * 4 * widths[index - 1] * width
        products += positions * len(stage.blocks) * (49 * width + 8 * width**2)
    if part == "model":
        width, patches = model.mask_token.numel(), model.num_patches * (model.patch_size // 32) ** 2
        products += model.num_visible * model.proj.weight.numel()
        products += patches * (len(model.decoder) * (49 * width + 8 * width**2) + model.pred.weight.numel())
    return 3 * 2 * products


def run(case: Case, arguments, log: Callable[[str], None]) -> list[Result]:
    """Check and time all variants of a case."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = build(case, arguments)
    for parameter in model.parameters():  # a fresh model has zero GRN and biases, which would hide errors
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    weights = model.state_dict()
    images = torch.randn(case.batch, 3, *model.image_size, device=device)
    visible = model.draw_visible(case.batch, torch.Generator().manual_seed(0)).to(device)

    reference = Variant(Case(case.size, case.batch, (), "fp32", case.part), "masked", False, weights, arguments)
    expected = reference.answer(images, visible)
    del reference
    variants = []
    for layout in case.layouts:
        if layout == "minkowski" and find_spec("MinkowskiEngine") is None:
            log("minkowski left out: MinkowskiEngine is not installed (scripts/install_minkowski.sh)")
            continue
        choices = {"yes": (True,), "no": (False,)}.get(arguments.compile, (False, True))
        for compiled in (False,) if layout == "minkowski" else choices:
            variant = Variant(case, layout, compiled, weights, arguments)
            log(f"{case.size} {case.part} batch {case.batch} {case.dtype}: {layout} {variant.path}")
            variant.check(variant.answer(images, visible), expected)
            variant.step(images, visible)  # before memory is measured: the optimiser allocates its state
            variant.measure_memory(images, visible)
            variants.append(variant)
    del expected
    for _ in range(arguments.repeats):
        for variant in variants:
            variant.step(images, visible)  # not timed: it finds caches and threads as another variant left them
            synchronise(device)
            start = time.perf_counter()
            variant.step(images, visible)
            synchronise(device)
            variant.seconds.append(time.perf_counter() - start)
    flops = training_flops(model, case.part) * case.batch
    results = []
    for v in variants:
        median = statistics.median(v.seconds)
        low, _, high = statistics.quantiles(v.seconds, n=4, method="inclusive") if len(v.seconds) > 1 else (median,) * 3
        speed = case.batch / median
        results.append(
            Result(
                case.size, case.batch, case.part, case.dtype, v.layout, v.path, speed, median, (low, high), v.memory,
                v.parity, flops / median,
            )
        )  # fmt: skip
    return results


def verdicts(case: Case, results: list[Result]) -> list[dict[str, Any]]:
    """What is asked of this case and what was measured; each layout counts with its fastest variant."""
    best = {
        layout: min((r for r in results if r.layout == layout), key=lambda r: r.seconds)
        for layout in {r.layout for r in results}
    }
    rows = []
    for what, against, bound in case.musts:
        if "packed" not in best or (against and against not in best):
            continue
        packed = best["packed"]
        if what == MEMORY:
            # Of all variants of the other layout the thriftiest.
            value = packed.memory / min(r.memory for r in results if r.layout == against)
            met = value <= bound
        else:
            value = packed.images_per_second / (best[against].images_per_second if against else 1.0)
            met = value >= bound
        rows.append(
            {
                "case": f"{case.size} {case.part}, batch {case.batch}, {case.dtype}",
                "what": f"{what}, packed / {against}" if against else f"{what}, packed",
                "must": f"{'≤' if what == MEMORY else '≥'} {bound:g}",
                "measured": value,
                "met": met,
            }
        )
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help=f"comma-separated, of {', '.join(SIZES)}; default: the documented table")
    parser.add_argument("--layouts", default="packed,masked", help="with --sizes: packed, masked, minkowski")
    parser.add_argument("--batch", type=int, default=16, help="with --sizes")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="with --sizes")
    parser.add_argument("--part", choices=("encoder", "model"), default="encoder", help="with --sizes")
    parser.add_argument("--compile", choices=("both", "yes", "no"), help="default: yes on a GPU, both elsewhere")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--mask-ratio", type=float, default=0.6)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    arguments = parser.parse_args(argv)
    arguments.compile = arguments.compile or ("yes" if arguments.device.startswith("cuda") else "both")
    for name in ("batch", "repeats", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    if arguments.image_size < 32 or arguments.image_size % 32:
        parser.error(f"--image-size {arguments.image_size}: must be a multiple of 32")
    if not 0 < arguments.mask_ratio < 1:
        parser.error(f"--mask-ratio {arguments.mask_ratio}: must be greater than 0 and less than 1")
    check_device(parser, arguments.device)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: no such folder")
    unknown = [s for s in (arguments.sizes or "atto").split(",") if s not in SIZES]
    if unknown:
        parser.error(f"--sizes {','.join(unknown)}: must be among {', '.join(SIZES)}")
    unknown = [name for name in arguments.layouts.split(",") if name not in ("packed", "masked", "minkowski")]
    if unknown:
        parser.error(f"--layouts {','.join(unknown)}: must be among packed, masked, minkowski")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 256  # every size, stage and layout compiles the same function anew
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if arguments.sizes:
        layouts = tuple(arguments.layouts.split(","))
        sizes = arguments.sizes.split(",")
        cases = [Case(size, arguments.batch, layouts, arguments.dtype, arguments.part) for size in sizes]
    else:
        cases = ON_GPU if device.type == "cuda" else ON_CPU
    facts = environment(device)
    peaks = {name: gemm_peak(device, DTYPES[name]) for name in {case.dtype for case in cases}}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(", ".join(f"{name} matrix products {peak / 1e12:.3g} TFLOP/s" for name, peak in peaks.items()))
    results: list[Result] = []
    judged: list[dict[str, Any]] = []
    for case in cases:
        measured = run(case, arguments, lambda line: print(f"  {line}", file=sys.stderr, flush=True))
        results += measured
        judged += verdicts(case, measured)
    kind = "peak memory" if device.type == "cuda" else "saved activations"
    header = ["size", "part", "batch", "layout", "path", "images/s", "ms per step (middle half)", f"{kind}, MB"]
    header += ["parity", "TFLOP/s", "of GEMM peak"]
    rows = [
        [
            r.size, r.part, f"{r.batch} {r.dtype}", r.layout, r.path, f"{r.images_per_second:.4g}",
            f"{r.seconds * 1e3:.4g} ({r.quartiles[0] * 1e3:.4g}–{r.quartiles[1] * 1e3:.4g})", f"{r.memory / 1e6:.4g}",
            f"{r.parity:.0e}", f"{r.flops_per_second / 1e12:.3g}", f"{r.flops_per_second / peaks[r.dtype]:.0%}",
        ]
        for r in results
    ]  # fmt: skip
    print("\n" + table(header, rows))
    if judged:
        lines = [
            [j["case"], j["what"], j["must"], f"{j['measured']:.4g}", "met" if j["met"] else "MISSED"] for j in judged
        ]
        print("\n" + table(["case", "what", "must", "measured", ""], lines))
    if arguments.json:
        report = {"environment": facts, "gemm_flops_per_second": peaks, "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(report | {"musts": judged}, indent=1) + "\n")
    return 0 if all(j["met"] for j in judged) else 1


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())

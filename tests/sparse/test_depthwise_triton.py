"""Triton's depthwise convolution: right under the interpreter and on a GPU, and without spills on every GPU it is for.

The cases are in `depthwise_triton_cases.py`. They run in a process of their own, because the interpreter has to be
switched on before Triton is imported, while compiling needs it off.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
compiler = pytest.importorskip("triton.compiler")
backend = pytest.importorskip("triton.backends.compiler")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter is on; run depthwise_triton_cases.py itself", allow_module_level=True)

from fcmae.sparse.depthwise_triton import (  # noqa: E402
    choose_launch,
    constants,
    convolve_kernel,
    tap_gradient_kernel,
)

CASES = Path(__file__).with_name("depthwise_triton_cases.py")
ROOT = CASES.parents[2]
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
WIDTHS = {"atto": 40, "base": 128, "huge": 352}
SIDES = (8, 4, 2, 1)


def run_cases(interpret: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "--no-header", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode != 0:
        pytest.fail(f"the cases failed:\n{result.stdout}\n{result.stderr}", pytrace=False)


def test_cases_under_the_interpreter():
    run_cases(interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_gpu():
    run_cases(interpret=False)


def test_cpu_tensors_need_the_interpreter():
    code = (
        "import torch; from fcmae.sparse.depthwise_triton import depthwise as d; i = torch.zeros(1, 1, dtype=int);"
        "d(torch.zeros(1, 1, 2, 2, 3), torch.zeros(3, 1, 7, 7), None, i, i.int(), (1, 1))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "ValueError: Triton kernels need CUDA tensors" in result.stderr


def compile_kernel(kernel, side: int, channels: int, capability: int, dtype: torch.dtype, folder: Path):
    """Compile for a GPU that need not be here, as `depthwise` would launch it: (registers per thread, stack bytes)."""
    launch = choose_launch(side, channels, dtype, weight_gradient=kernel is tap_gradient_kernel)
    fixed = constants(side, channels, 7, dtype, launch)
    if kernel is convolve_kernel:
        fixed["HAS_BIAS"] = True
    pointers = {"visible_ptr": "*i64", "slots_ptr": "*i32", "taps_ptr": "*fp32", "bias_ptr": "*fp32"}
    pointers |= {"partial_ptr": "*fp32", "tiles_ptr": TYPES[dtype], "grad_ptr": TYPES[dtype], "out_ptr": TYPES[dtype]}
    names = kernel.arg_names
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in fixed else pointers.get(name, "i32") for name in names},
        constexprs=fixed,
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers},
    )
    compiled = triton.compile(
        source,
        target=backend.GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps, "maxnreg": launch.registers},
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout).groups()
    return int(registers), int(stack)


def check_compiled(kernel, side, channels, capability, folder, record_property, dtype=torch.bfloat16) -> None:
    registers, stack = compile_kernel(kernel, side, channels, capability, dtype, folder)
    record_property("registers", registers)
    print(f"{kernel.fn.__name__} T={side} C={channels} sm_{capability} {dtype}: {registers} registers")
    assert stack == 0, f"{stack} bytes of registers spilled"


@pytest.mark.parametrize(
    ("kernel", "side", "channels", "capability"),
    [
        (convolve_kernel, 4, 80, 90),
        (tap_gradient_kernel, 8, 128, 90),
        (convolve_kernel, 2, 512, 80),
        (tap_gradient_kernel, 2, 512, 100),
        (convolve_kernel, 1, 2816, 90),
    ],
)
def test_registers_hold_a_cell(kernel, side, channels, capability, tmp_path, record_property):
    check_compiled(kernel, side, channels, capability, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("kernel", [convolve_kernel, tap_gradient_kernel])
def test_registers_hold_a_cell_at_every_stage(kernel, size, stage, capability, tmp_path, record_property):
    channels = WIDTHS[size] * 2**stage
    check_compiled(kernel, SIDES[stage], channels, capability, tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [convolve_kernel, tap_gradient_kernel])
@pytest.mark.parametrize(("side", "dtype"), [(16, torch.bfloat16), (8, torch.float16), (2, torch.float32)])
def test_registers_hold_a_cell_of_other_types(kernel, side, dtype, tmp_path, record_property):
    check_compiled(kernel, side, 128, 90, tmp_path, record_property, dtype)

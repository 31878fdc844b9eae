"""Building the C++ on first use: with, without and with broken compilers and caches; what it must not be given."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fcmae import native
from fcmae.model import create_model
from fcmae.native import call
from fcmae.sparse import pointwise_cpu

PROGRAM = """
import torch, warnings
from fcmae.sparse import depthwise_cpu
from fcmae.sparse.depthwise import implementation
from fcmae.native import library
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(implementation(torch.empty(1, 1, 2, 2, 3), 7).__name__)
print(*(str(w.message) for w in caught), sep="\\n")
"""


def run_program(tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"XDG_CACHE_HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_compiler_one_warning_and_plain_pytorch(tmp_path):
    dense, again, warning = run_program(tmp_path, PATH=str(tmp_path))
    assert dense == again == "fcmae.sparse.depthwise_dense"
    assert warning == (
        "slower code takes the place of what is written in C++: no C++ compiler (c++, g++ or clang++) found"
    )


@pytest.mark.parametrize("says_its_version", [True, False])
def test_a_compiler_that_fails_is_one_warning(tmp_path, says_its_version):
    broken = tmp_path / "c++"
    version = '[ "$1" = --version ] && exit 0\n' if says_its_version else ""
    broken.write_text(f'#!/bin/sh\n{version}echo "x.cpp:1: error: no such thing" >&2; exit 1\n')
    broken.chmod(0o755)
    dense, _, warning = run_program(tmp_path, PATH="/usr/bin:/bin", CXX=str(broken))
    assert dense == "fcmae.sparse.depthwise_dense"
    assert warning.endswith("C++: depthwise_cpu.cpp: x.cpp:1: error: no such thing")
    assert not list(tmp_path.glob("fcmae/native/*"))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "fcmae").write_text("a file where the folder should be")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    built = run_program(tmp_path, PATH="/usr/bin:/bin", TMPDIR=str(temporary))
    assert built == ["fcmae.sparse.depthwise_cpu"] * 2 + [""]
    assert not list(temporary.iterdir())  # removed at the end


def test_what_was_built_is_used_again(tmp_path):
    assert run_program(tmp_path, PATH="/usr/bin:/bin") == ["fcmae.sparse.depthwise_cpu"] * 2 + [""]
    (built,) = (tmp_path / "fcmae" / "native").iterdir()
    before = built.stat()
    run_program(tmp_path, PATH="/usr/bin:/bin")
    assert built.stat().st_ino == before.st_ino


def test_a_library_cut_short_is_built_again(tmp_path):
    run_program(tmp_path, PATH="/usr/bin:/bin")
    (built,) = (tmp_path / "fcmae" / "native").iterdir()
    size = built.stat().st_size
    built.write_bytes(b"")
    assert run_program(tmp_path, PATH="/usr/bin:/bin") == ["fcmae.sparse.depthwise_cpu"] * 2 + [""]
    assert built.stat().st_size == size


def test_a_blank_choice_of_compiler_is_none(tmp_path):
    assert run_program(tmp_path, PATH="/usr/bin:/bin", CXX="  ") == ["fcmae.sparse.depthwise_cpu"] * 2 + [""]
    assert run_program(tmp_path, PATH=str(tmp_path), CXX="  ")[2].endswith("(c++, g++ or clang++) found")


@pytest.mark.parametrize(
    ("command", "message"),
    [("/bin/false", "/bin/false failed with exit code 1 and said nothing"), ("/bin/true", "/bin/true made no library")],
)
def test_a_compiler_that_says_nothing_is_named(tmp_path, command, message):
    dense, _, warning = run_program(tmp_path, PATH="/usr/bin:/bin", CXX=command)
    assert dense == "fcmae.sparse.depthwise_dense"
    assert warning.endswith(f"depthwise_cpu.cpp: {message}")


@pytest.mark.parametrize(("words", "message"), [(b"x.h: error: oh", "x.h: error: oh"), (None, "took more than 3 s")])
def test_a_compiler_that_takes_too_long(monkeypatch, words, message):
    def slow(*command):
        raise subprocess.TimeoutExpired(["c++"], 3, stderr=words)

    monkeypatch.setattr(native, "_run", slow)
    native._version.cache_clear()
    with pytest.warns(UserWarning, match=f"norm_cpu.cpp: .*{message}"):
        assert native.library.__wrapped__("norm_cpu", torch.float32) is None


def test_whole_numbers_as_eps(tmp_path):
    program = """
import torch
from fcmae.sparse.mlp import response_mlp
shapes = [(1, 2, 4)] * 2 + [(4,)] * 2 + [(16, 4), (16,), (16,), (16,), (4, 16), (4,)]
arguments = [torch.ones(shape) for shape in shapes]
one, same = (response_mlp(*arguments, norm_eps=eps, eps=eps) for eps in (1, 1.0))
assert torch.equal(one, same) and one.isfinite().all()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_tensors_without_memory_go_another_way():
    model = create_model("mini", image_size=64, patch_size=16, stem_stride=2).double()
    images, visible = torch.randn(2, 3, 64, 64, dtype=torch.float64), model.draw_visible(2)
    expected = model.encode(images, visible)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features = model.encode(mode.from_tensor(images), mode.from_tensor(visible))
    assert features.shape == expected.shape
    with pytest.raises(ValueError, match="fcmae_norm: a FakeTensor has no memory to work on"):
        call("norm_cpu", torch.float32, "fcmae_norm", mode.from_tensor(torch.ones(2)))


@pytest.mark.filterwarnings("ignore")
def test_tracing_does_not_reach_the_libraries(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("called while tracing")

    norm = torch.nn.LayerNorm(8).requires_grad_(False)
    monkeypatch.setattr(pointwise_cpu, "call", refuse)
    from fcmae.sparse.norm import patch_norm

    traced = torch.jit.trace(lambda x: patch_norm(x, norm, 2), torch.randn(3, 4, 4, 8), check_trace=False)
    assert traced(torch.randn(3, 4, 4, 8)).shape == (3, 2, 2, 32)

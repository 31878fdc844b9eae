"""What scripts/install_minkowski.sh says when something is missing; nothing is built here."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "install_minkowski.sh"
TORCH = """
__version__ = "0.1+fake"
class cuda:
    is_available = staticmethod(lambda: {cuda})
"""
BUILT_FOR = f"{sys.implementation.cache_tag}-torch0.1+fake-{platform.machine()}-r1"


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A folder that is the PATH, and a Python whose only packages are those given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools, self.packages = folder, folder / "bin", folder / "packages"
        self.tools.mkdir()
        for name in ("bash", "env", "mkdir", "mktemp", "rm"):
            (self.tools / name).symlink_to(str(shutil.which(name)))
        self.tool("python", f'exec "{sys.executable}" -S "$@"')  # -S: no site-packages
        self.package("torch", TORCH.format(cuda=False))
        self.package("pip")
        self.package("pip", name="__main__.py")

    def tool(self, name: str, script: str) -> None:
        executable(self.tools / name, f"#!/bin/sh\n{script}\n")

    def package(self, package: str, code: str = "", name: str = "__init__.py") -> None:
        (self.packages / package).mkdir(parents=True, exist_ok=True)
        (self.packages / package / name).write_text(code)

    def install(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run the script; its exit code, and its one line of error or else what it printed."""
        cache = self.folder / "cache"
        defaults = {"PATH": str(self.tools), "PYTHONPATH": str(self.packages), "XDG_CACHE_HOME": str(cache)}
        done = subprocess.run(
            [SCRIPT, *arguments], env=defaults | environment, capture_output=True, text=True, timeout=60
        )
        assert not list(cache.rglob(".building-*"))  # cleaned up, whatever happened
        return done.returncode, (done.stderr or done.stdout).strip()


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_no_python(machine):
    line = "error: no no-such-python found; set PYTHON to the Python to install for"
    assert machine.install(PYTHON="no-such-python") == (1, line)


def test_unsupported_python(machine):
    old = 'echo "import sys; sys.version_info = (3, 8, 2)"'
    machine.tool("python", f'{{ {old}; {shutil.which("cat")}; }} | "{sys.executable}" -S "$@"')
    line = "error: Python 3.8 is not supported; 3.10 or newer is needed, and 3.11 and 3.12 were tried"
    assert machine.install() == (1, line)


def test_no_torch(machine):
    shutil.rmtree(machine.packages / "torch")
    code, line = machine.install()
    assert code == 1
    assert line.startswith("error: no torch in ")
    assert line.endswith("install torch first, MinkowskiEngine is built for its version")
    assert len(line.splitlines()) == 1


def test_no_pip(machine):
    shutil.rmtree(machine.packages / "pip")
    code, line = machine.install()
    assert code == 1
    assert line.startswith("error: no pip in ")


def test_no_compiler(machine):
    assert machine.install() == (1, "error: no C++ compiler (c++ or g++); on Debian: apt-get install g++")


def test_no_blas(machine):
    machine.tool("c++", "echo 'fatal error: cblas.h: No such file or directory' >&2; exit 1")
    line = "error: no BLAS headers (cblas.h and libopenblas); on Debian: apt-get install libopenblas-dev"
    assert machine.install() == (1, line)


def test_no_cuda_for_a_cuda_build(machine):
    assert machine.install("--cuda") == (1, "error: --cuda: torch sees no CUDA device here")
    machine.package("torch", TORCH.format(cuda=True))
    assert machine.install("--cuda", CUDA_HOME="/nonexistent") == (1, "error: --cuda: no nvcc found")


def test_no_folder_for_the_cache(machine):
    file = machine.folder / "file"
    file.write_text("")
    line = f"error: cannot create {file}/fcmae/minkowski; set XDG_CACHE_HOME to a folder that can be written"
    assert machine.install(XDG_CACHE_HOME=str(file)) == (1, line)


def test_unknown_argument(machine):
    line = "error: unknown argument --gpu; usage: scripts/install_minkowski.sh [--cuda]"
    assert machine.install("--gpu") == (1, line)


def test_one_that_matches_is_left_alone(machine):
    machine.package("MinkowskiEngine")
    machine.package("MinkowskiEngine", BUILT_FOR, name="BUILT_FOR")
    line = f"minkowski: 0.5.4 is installed already, built for Python {platform.python_version()}, torch 0.1+fake"
    assert machine.install() == (0, line)
    # One for another torch does not match: the script goes on, here as far as the missing compiler.
    machine.package("MinkowskiEngine", BUILT_FOR.replace("0.1", "0.2"), name="BUILT_FOR")
    assert machine.install()[1].startswith("error: no C++ compiler")


def test_one_of_another_origin_is_kept(machine):
    machine.package("MinkowskiEngine")
    code, lines = machine.install()
    assert code == 0
    assert "a MinkowskiEngine that this script did not build is installed" in lines

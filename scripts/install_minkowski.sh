#!/usr/bin/env bash
# Build MinkowskiEngine for the Python and torch at hand, and install it there: what `model.layout=minkowski` needs.
#
#   scripts/install_minkowski.sh [--cuda]        PYTHON=<python> chooses another environment than that of `python`
#
# The only release on PyPI is a source distribution of 2021, and a build fits one version of torch only. The wheel is
# kept in ${XDG_CACHE_HOME:-~/.cache}/fcmae/minkowski/<key>/, so a second environment with the same Python and torch
# takes seconds. MAX_JOBS limits the compilers that run at a time (default: the number of cores).
#
# Builds for CPUs, also where torch has CUDA devices. Upstream's CUDA code is known not to compile with CUDA 12 and 13:
# NVIDIA/MinkowskiEngine issues #543 #594 #601 #621 #638, pull requests #607 #626. `--cuda` tries it all the same.
set -euo pipefail

readonly VERSION=0.5.4
readonly RECIPE=r1 # part of the key; raise it when what is built changes

say() { echo "minkowski: $*"; }
fail() {
  echo "error: $*" >&2
  exit 1
}

cuda=""
case "${1:-}" in
  "") ;;
  --cuda) cuda="-cuda" ;;
  -h | --help)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit 0
    ;;
  *) fail "unknown argument $1; usage: scripts/install_minkowski.sh [--cuda]" ;;
esac

python=$(command -v "${PYTHON:-python}") || fail "no ${PYTHON:-python} found; set PYTHON to the Python to install for"
[[ $python == /* ]] || python=$PWD/$python
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fcmae/minkowski
[[ $cache == /* ]] || cache=$PWD/$cache
mkdir -p "$cache" 2>/dev/null || fail "cannot create $cache; set XDG_CACHE_HOME to a folder that can be written"
# On the side, in the same file system: what is finished is renamed into place.
work=$(mktemp -d "$cache/.building-XXXXXX" 2>/dev/null) ||
  fail "cannot write to $cache; set XDG_CACHE_HOME to a folder that can be written"
trap 'rm -rf "$work"' EXIT
cd "$work" # a MinkowskiEngine folder where the user stands must not be imported

# -- what is here ------------------------------------------------------------------------------------------------------

facts=$("$python" - <<'PYTHON'
import sys

if sys.version_info < (3, 10):
    sys.exit("error: Python %d.%d is not supported; 3.10 or newer is needed, and 3.11 and 3.12 were tried" % sys.version_info[:2])
import os, platform, sysconfig, warnings

try:
    import torch
except ImportError as error:
    sys.exit(f"error: no torch in {sys.executable} ({error}); install torch first, MinkowskiEngine is built for its version")
warnings.simplefilter("ignore")
built_for = "none"
try:
    import MinkowskiEngine

    built_for = "elsewhere"
    with open(os.path.join(os.path.dirname(MinkowskiEngine.__file__), "BUILT_FOR")) as file:
        built_for = file.read().strip()
except Exception:
    pass  # not there, of no use with this torch or Python, or (the file) built in another way
print(f"{sys.implementation.cache_tag}-torch{torch.__version__}-{platform.machine()}")
print(f"Python {platform.python_version()}, torch {torch.__version__}")
print(built_for)
print(sysconfig.get_path("include"))
print(torch.cuda.is_available())
PYTHON
) || exit 1
{ read -r base && read -r here && read -r built_for && read -r include && read -r has_cuda; } <<<"$facts"
base=$base-$RECIPE
key=$base$cuda

if [[ $built_for == "$key" || $built_for == "$base-cuda" ]]; then
  say "$VERSION is installed already, built for $here"
  exit 0
elif [[ $built_for == elsewhere ]]; then
  say "a MinkowskiEngine that this script did not build is installed and loads with $here; it is kept"
  say "to replace it: $python -m pip uninstall MinkowskiEngine, then this script again"
  exit 0
fi
"$python" -m pip --version >/dev/null 2>&1 || fail "no pip in $python; $python -m ensurepip installs it"

# -- build, unless the cache has it ------------------------------------------------------------------------------------

# Chained, since a shell that is asked for its success does not stop at an error.
wheel() {
  # pip must neither use nor keep a wheel of its own: its cache does not know which torch that was built for.
  "$python" -m pip wheel --use-pep517 --no-cache-dir --no-build-isolation --no-deps --no-binary :all: \
    --config-settings=--global-option=--blas=openblas --wheel-dir built "MinkowskiEngine==$VERSION" &&
    "$python" -m wheel unpack --dest unpacked built/*.whl &&
    # These names left `collections` in Python 3.10.
    find unpacked -name '*.py' -exec sed -i \
      -e 's/^from collections import Sequence, namedtuple$/from collections import namedtuple\nfrom collections.abc import Sequence/' \
      -e 's/^from collections import Sequence$/from collections.abc import Sequence/' {} + &&
    echo "$key" >"$(echo unpacked/*/MinkowskiEngine)/BUILT_FOR" &&
    mkdir finished &&
    "$python" -m wheel pack --dest-dir finished unpacked/*
}

build() {
  local cxx blas
  if [[ -n $cuda ]]; then
    [[ $has_cuda == True ]] || fail "--cuda: torch sees no CUDA device here"
    command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] || fail "--cuda: no nvcc found"
    say "CUDA build: upstream reports failures with CUDA 12 and 13 (NVIDIA/MinkowskiEngine #543 #594 #601 #621 #638, PRs #607 #626)"
  elif [[ $has_cuda == True ]]; then
    say "building for CPUs although torch has CUDA devices; see --cuda at the top of this script"
  fi
  cxx=${CXX:-$(command -v c++ || command -v g++ || true)}
  command -v "${cxx%% *}" >/dev/null || fail "no C++ compiler (c++ or g++); on Debian: apt-get install g++"
  blas='#include <cblas.h>
int main() { return cblas_isamax(0, 0, 1) > 1; }'
  $cxx -x c++ - -lopenblas -o probe <<<"$blas" 2>/dev/null ||
    fail "no BLAS headers (cblas.h and libopenblas); on Debian: apt-get install libopenblas-dev"
  [[ -f $include/Python.h ]] || fail "no Python.h in $include; on Debian: apt-get install python3-dev"

  # Tools of the build stay out of the environment: its setuptools may be too old or too new for something else in it.
  local log=$cache/$key.log
  say "building for $here takes some minutes; log: $log"
  "$python" -m pip install --quiet --target tools 'setuptools>=70' wheel ninja >"$log" 2>&1 ||
    fail "pip cannot install the build's tools setuptools, wheel and ninja; see $log"
  # Upstream's setup.py begins with `pip uninstall MinkowskiEngine`: a failed build must not cost what is installed.
  mkdir shadow
  printf '#!/bin/sh\nexit 0\n' >shadow/pip
  chmod +x shadow/pip
  (
    export PATH=$work/shadow:$work/tools/bin:$PATH PYTHONPATH=$work/tools${PYTHONPATH:+:$PYTHONPATH}
    export CXX=$cxx CFLAGS="${CFLAGS:-} -g0" MAX_JOBS=${MAX_JOBS:-$(nproc)}
    [[ -n $cuda ]] || export CUDA_VISIBLE_DEVICES= # its setup.py chooses by what torch sees
    wheel
  ) >>"$log" 2>&1 || {
    grep -E 'error|Error' "$log" | head -n 5 >&2 || true
    fail "the build failed; see $log"
  }
  # Somebody else may have finished the same build meanwhile; either is good.
  mv -T finished "$cache/$key" 2>/dev/null || [[ -d $cache/$key ]] || fail "cannot write $cache/$key"
  rm -f "$log"
}

if [[ -d $cache/$key ]]; then
  say "using the wheel built before, $cache/$key"
else
  build
fi
"$python" -m pip install --quiet --no-deps --no-index --force-reinstall "$cache/$key"/*.whl ||
  fail "pip could not install the wheel into the environment of $python"
"$python" -W ignore - <<'PYTHON' || fail "MinkowskiEngine is installed but does not work; remove $cache/$key to build it again"
import torch
import MinkowskiEngine as ME

sites = torch.tensor([[0, y, x] for y in range(4) for x in range(4)], dtype=torch.int32)
ones = ME.SparseTensor(torch.ones(16, 1), coordinates=sites)
conv = ME.MinkowskiConvolution(1, 1, kernel_size=2, stride=2, dimension=2)
torch.nn.init.ones_(conv.kernel)
assert conv(ones).F.flatten().tolist() == [4.0] * 4
PYTHON
say "$VERSION is installed, built for $here${cuda:+ with CUDA}"

#!/usr/bin/env bash
# Create the virtual environment, build the native part, install everybit for development.
#
# Called by `make setup`, which skips it when neither pyproject.toml nor a native source changed.
# Variables: PYTHON (interpreter), VENV (directory), TORCH_INDEX (package index for torch only). Proxies,
# mirrors and wheel folders come from pip's own configuration.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_VERSION=2.13.0 # the only place that pins torch
VENV=${VENV:-.venv}

say() { printf 'setup: %s\n' "$*"; }
missing=()

# --- what is needed, all of it checked before anything is made ------------------------------------
recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
version_of() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo "none"; }

python=""
if [[ -n ${PYTHON:-} ]]; then
  recent_enough "$PYTHON" && python=$PYTHON
  [[ -n $python ]] || missing+=("Python 3.11 or newer: PYTHON=$PYTHON is version $(version_of "$PYTHON")")
else
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if recent_enough "$candidate"; then
      python=$candidate
      break
    fi
  done
  [[ -n $python ]] || missing+=("Python 3.11 or newer: python3 is version $(version_of python3); install one and run make setup PYTHON=/path/to/it")
fi
if [[ -n $python ]]; then
  "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    missing+=("the venv and ensurepip modules of $python: on Debian and Ubuntu they are the package python3-venv")
  "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())' ||
    missing+=("Python.h of $python: on Debian and Ubuntu it is the package python3-dev, on Fedora python3-devel")
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cat >"$scratch/probe.cc" <<'CC'
#include <bit>
#include <span>
#include <thread>
template <typename T> requires(sizeof(T) == 4) constexpr int ones(T x) { return std::popcount(static_cast<unsigned>(x)); }
int main() { int a[] = {ones(7)}; std::thread([] {}).join(); return std::span<int>(a)[0] - 3; }
CC
compiler=""
for candidate in ${CXX:-c++ g++ clang++ g++-14 g++-13 g++-12 clang++-18 clang++-17 clang++-16}; do
  if command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -std=c++20 -pthread "$scratch/probe.cc" -o "$scratch/probe" >/dev/null 2>&1 && "$scratch/probe"; then
    compiler=$candidate
    break
  fi
done
if [[ -n $compiler ]]; then
  export CXX=$compiler
else
  missing+=("a C++20 compiler: tried ${CXX:-c++, g++, clang++ and their versioned names}; install g++ 11 or clang++ 16 or newer, or set CXX")
fi

if ((${#missing[@]})); then
  say "something is missing:"
  printf '  - %s\n' "${missing[@]}"
  exit 1
fi

# --- the environment ------------------------------------------------------------------------------
py=$VENV/bin/python
if [[ -e $VENV && ! -e $VENV/pyvenv.cfg ]]; then
  say "$VENV exists and is not a virtual environment; give another place with VENV=DIR"
  exit 1
fi
if ! recent_enough "$py" || ! "$py" -m pip --version >/dev/null 2>&1; then
  say "creating $VENV with $python ($(version_of "$python"))"
  "$python" -m venv --clear "$VENV"
elif [[ -n ${PYTHON:-} && $(version_of "$py") != $(version_of "$python") ]]; then
  say "$VENV has Python $(version_of "$py") and PYTHON=$PYTHON is $(version_of "$python"): make clean-venv first, or give VENV=DIR"
  exit 1
fi
PATH=$(cd "$VENV/bin" && pwd):$PATH
export PATH PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$py" -m pip "$@"; }
"$py" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (23, 3))' ||
  pip install --quiet --upgrade pip # an older one downloads whole wheels for a dry run

# --- torch, whose default wheel on x86-64 Linux brings CUDA along ---------------------------------
installed_torch=$("$py" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || echo none)
if [[ ${installed_torch%%+*} != "$TORCH_VERSION" ]]; then
  index=()
  [[ -z ${TORCH_INDEX:-} ]] || index=(--index-url "$TORCH_INDEX")
  pip install --quiet --dry-run --report "$scratch/report.json" ${index[@]+"${index[@]}"} "torch==$TORCH_VERSION" || {
    say "pip finds no torch $TORCH_VERSION for Python $(version_of "$py") here (see above): check the network or pip's configuration, or set TORCH_INDEX"
    exit 1
  }
  "$py" - "$scratch/report.json" <<'PY'
import json, sys

names = [item["metadata"]["name"].lower() for item in json.load(open(sys.argv[1]))["install"]]
cuda = [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
if cuda:  # measured with torch 2.13 on x86-64: 2.7 GB of nvidia packages, 0.7 of triton, 1.2 of torch itself
    print(
        f"setup: {len(cuda)} CUDA packages (about 4 GB on disk) come along with torch. A CPU needs none of them: to avoid them stop now and run "
        "make setup TORCH_INDEX=URL, with the address that PyTorch's \"Get Started\" page shows for the compute platform CPU"
    )
PY
  say "installing torch $TORCH_VERSION"
  pip install --quiet ${index[@]+"${index[@]}"} "torch==$TORCH_VERSION"
fi

# --- everybit itself, editable: Python changes are live, C++ changes are built by the next make ----
# Without build isolation, so that the build tree in build/ stays valid and a rebuild compiles only what
# changed. The build's own requirements are read from pyproject.toml and then asked of the back end, which
# adds cmake and ninja when the machine has none.
"$py" -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' >"$scratch/build.txt"
pip install --quiet -r "$scratch/build.txt"
"$py" -c 'from scikit_build_core.build import get_requires_for_build_editable as more; print("\n".join(more()))' >"$scratch/more.txt"
pip install --quiet -r "$scratch/more.txt"
say "building everybit with $compiler"
echo "torch==$TORCH_VERSION" >"$scratch/pin.txt"
pip install --quiet --no-build-isolation --constraint "$scratch/pin.txt" --editable '.[quantize,serve,bench,dev]'
"$py" -c 'import everybit._native' || {
  say "the native module was built but does not import (see above); make clean and try again, and report it if it stays"
  exit 1
}
say "ready: $VENV has everybit, torch $("$py" -c 'from importlib.metadata import version; print(version("torch"))') and Python $(version_of "$py")"

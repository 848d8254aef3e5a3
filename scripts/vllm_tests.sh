#!/usr/bin/env bash
# Runs tests/vllm in an environment of its own: vLLM wants a transformers that ours does not. vLLM comes as its source,
# of which the Python alone is installed: the tests replace the few compiled kernels that a forward pass on a CPU calls.
#
# Variables: PYTHON (interpreter), VENV (directory of the environment), TORCH_INDEX (package index for torch only; with
# a CPU build the environment has 1.5 GB). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_VERSION=0.33.0 # as everybit.integrations.vllm.config.TESTED
VENV=${VENV:-build/vllm-venv}
py=$VENV/bin/python

pip() { "$py" -m pip --disable-pip-version-check "$@"; }
has() { [[ $("$py" -c "from importlib.metadata import version; print(version('$1').partition('+')[0])" 2>/dev/null) == "$2" ]]; }

torch=$(sed -n 's/^TORCH_VERSION=\([0-9.]*\).*/\1/p' scripts/setup.sh)
[[ -x $py ]] || "${PYTHON:-python3}" -m venv "$VENV"
has torch "$torch" || pip install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$torch"
if ! has vllm "$VLLM_VERSION"; then
  pip install --quiet "setuptools<81" wheel "setuptools_scm>=8" setuptools_rust packaging jinja2
  # "empty" compiles nothing; pip wants the version that it asked for, without vLLM's suffix for the device.
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$VLLM_VERSION \
    pip install --quiet --no-deps --no-build-isolation --no-binary vllm "vllm==$VLLM_VERSION"
fi
# What its modules import on the way to a model; all that it asks for would be some 1.3 GB more (Triton, video, clients).
pip install --quiet "transformers>=5.20,<5.21" aiohttp blake3 cachetools cbor2 cloudpickle einops "fastapi<0.137" \
  "llguidance<1.8" loguru msgspec openai oss-harmony partial-json-parser pillow prometheus_client protobuf psutil \
  py-cpuinfo pybase64 pydantic python-json-logger pyzmq regex requests sentencepiece setproctitle uvloop \
  "scikit-build-core>=0.10" "nanobind>=2.4" cmake ninja hypothesis pytest tqdm \
  2> >(grep -v -e "^vllm .* requires" -e "dependency resolver" >&2)
pip install --quiet --no-deps xgrammar==0.2.8 apache-tvm-ffi compressed-tensors==0.17.0
# Without isolation, so that the build tree stays valid and a second run compiles only what changed.
pip install --quiet --no-deps --no-build-isolation --force-reinstall --config-settings=build-dir=build/vllm .
"$py" -m pytest tests/vllm "$@"

# The newcomer's whole interface; .ci/run calls the same names.
#
#   make setup                       create .venv, build the native part, install everything (a no-op when nothing changed)
#   make setup PYTHON=python3.12     with another Python (3.11 or newer)
#   make setup VENV=/some/dir        in another place (give the same VENV to the other targets)
#   make setup TORCH_INDEX=URL       take torch from another package index
SHELL := /bin/bash
PYTHON ?=
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.everybit-setup
NATIVE := $(shell find native -type f \( -name '*.cc' -o -name '*.h' -o -name 'CMakeLists.txt' \) 2>/dev/null)
CXX_FORMATTED := $(filter %.cc %.h,$(NATIVE)) $(wildcard src/everybit/gpu/cuda/*.cu src/everybit/gpu/cuda/*.cuh tests/gpu/*.h tests/gpu/*.cc)

.PHONY: help setup clients check format test test-all test-vllm test-native bench demo clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## ?/  \1\t/' | expand -t 14

setup: $(STAMP)  ## create the environment and build the native part; run again after changing C++

$(STAMP): pyproject.toml scripts/setup.sh $(NATIVE)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" TORCH_INDEX="$(TORCH_INDEX)" bash scripts/setup.sh
	@touch $@

clients: setup  ## other people's clients, for the tests that try the server with them (800 MB; absent, these tests skip)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["clients"], sep="\n")' | $(BIN)/pip install --quiet -r /dev/stdin

check: setup  ## lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports
	@if [ -n "$(CXX_FORMATTED)" ]; then set -x; $(BIN)/clang-format --dry-run --Werror $(CXX_FORMATTED); fi

format: setup  ## rewrite the files as `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@if [ -n "$(CXX_FORMATTED)" ]; then $(BIN)/clang-format -i $(CXX_FORMATTED); fi

# In two processes, but for the bench's, which measure time.
test: setup  ## the fast tests (no GPU, no network, no download)
	$(BIN)/python -m pytest -m "not slow" tests/bench
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --ignore tests/bench

test-all: setup  ## the slow tests too
	$(BIN)/python -m pytest tests/bench
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/bench

test-vllm:  ## the plug-in inside vLLM, in an environment of its own (1.5 GB, 10 minutes the first time)
	bash scripts/vllm_tests.sh

test-native:  ## the C++ tests under sanitizers (some minutes: it builds them)
	bash scripts/native_tests.sh

bench: setup  ## every script in benchmarks/
	@for script in benchmarks/*.py; do [ -e "$$script" ] || continue; echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

demo: setup  ## quantize the shipped model, judge every precision, draw the plot
	$(BIN)/python scripts/demo.py

clean:  ## remove what was built; .venv goes only with `make clean-venv`
	rm -rf build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: clean-venv
clean-venv: clean  ## remove the environment as well
	@test -e "$(VENV)/pyvenv.cfg" || { echo "make: $(VENV) is not a virtual environment; nothing removed"; exit 1; }
	rm -rf "$(VENV)"

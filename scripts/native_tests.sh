#!/usr/bin/env bash
# Builds and runs the C++ tests of the engine under sanitizers: address and undefined behaviour for all of them, thread
# for the pool and whole programs; then the Arm kernels under qemu where a cross compiler is installed.
#
# Variables: BUILD (directory for what is built), CXX, FUZZ (rounds of random shapes).
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD=${BUILD:-build/native-tests}
FUZZ=${FUZZ:-300}

configure() { # directory, flags
  cmake -S native -B "$BUILD/$1" -DEVERYBIT_TESTS=ON -DCMAKE_BUILD_TYPE=None "-DCMAKE_CXX_FLAGS=-O1 -g $2" >"$BUILD/$1.log" ||
    { cat "$BUILD/$1.log"; exit 1; }
  cmake --build "$BUILD/$1" -j "$(nproc)" --target "${@:3}" >>"$BUILD/$1.log" 2>&1 || { tail -40 "$BUILD/$1.log"; exit 1; }
}

mkdir -p "$BUILD"
configure address "-fsanitize=address,undefined -fno-sanitize-recover=all" linear_test ops_test program_test sample_test
for test in linear_test ops_test program_test sample_test; do "$BUILD/address/$test"; done
"$BUILD/address/linear_test" fuzz 1 "$FUZZ"
configure thread "-fsanitize=thread" program_test
"$BUILD/thread/program_test"

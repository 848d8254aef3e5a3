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
# gcc 12's thread sanitizer cannot place its shadow where addresses are much randomized.
fixed=()
setarch "$(uname -m)" -R true 2>/dev/null && fixed=(setarch "$(uname -m)" -R)
"${fixed[@]}" "$BUILD/thread/program_test"

if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  # Emulated, so few shapes. Static, so that no Arm library is needed.
  arm="$BUILD/arm"
  mkdir -p "$arm"
  flags=(-std=c++20 -O2 -ffp-contract=off -Inative/include -static)
  aarch64-linux-gnu-g++ "${flags[@]}" -march=armv8.2-a+dotprod -c native/src/engine/linear_neon.cc -o "$arm/linear_neon.o"
  aarch64-linux-gnu-g++ "${flags[@]}" -march=armv8.2-a+dotprod -c native/src/engine/ops_neon.cc -o "$arm/ops_neon.o"
  aarch64-linux-gnu-g++ "${flags[@]}" native/tests/linear_test.cc native/src/engine/linear_scalar.cc "$arm/linear_neon.o" \
    -o "$arm/linear_test"
  aarch64-linux-gnu-g++ "${flags[@]}" native/tests/ops_test.cc native/src/engine/ops_scalar.cc "$arm/ops_neon.o" \
    -o "$arm/ops_test"
  echo "native tests: Arm, emulated"
  qemu-aarch64 -cpu max "$arm/linear_test" fuzz 1 "${ARM_FUZZ:-60}"
  qemu-aarch64 -cpu max "$arm/ops_test"
else
  echo "native tests: no aarch64-linux-gnu-g++ or qemu-aarch64 here, the Arm kernels were not run"
fi

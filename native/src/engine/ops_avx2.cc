// The ops for AVX2, FMA, F16C: compile with -mavx2 -mfma -mf16c.
#if defined(__x86_64__)
#define EVERYBIT_OPS_AVX2
#include "ops-inl.h"

namespace everybit::engine {

const Ops& avx2_ops() {
  static constexpr Ops ops = make_ops("avx2");
  return ops;
}

}  // namespace everybit::engine
#endif

// The ops for AVX-512: compile with -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd -mfma -mf16c.
#if defined(__x86_64__)
#define EVERYBIT_OPS_AVX512
#include "ops-inl.h"

namespace everybit::engine {

const Ops& avx512_ops() {
  static constexpr Ops ops = make_ops("avx512");
  return ops;
}

}  // namespace everybit::engine
#endif

// The ops for Armv8, whose base set is enough.
#if defined(__aarch64__)
#define EVERYBIT_OPS_NEON
#include "ops-inl.h"

namespace everybit::engine {

const Ops& neon_ops() {
  static constexpr Ops ops = make_ops("neon");
  return ops;
}

}  // namespace everybit::engine
#endif

// The plain ops, without intrinsics: what every other set is compared with. And the sizes all sets share.
#define EVERYBIT_OPS_SCALAR
#include "ops-inl.h"

namespace everybit::engine {

std::size_t kv_bytes_per_block(Dtype dtype, std::size_t kv_heads, std::size_t head_dim) {
  const std::size_t scales = dtype == Dtype::i8 ? 2 * kBlockTokens * sizeof(float) : 0;
  return kv_heads * (2 * kBlockTokens * head_dim * size_of(dtype) + scales);
}

std::size_t attention_scratch_bytes(std::size_t head_dim) { return tile_floats(head_dim) * sizeof(float); }

const Ops& scalar_ops() {
  static constexpr Ops ops = make_ops("scalar");
  return ops;
}

}  // namespace everybit::engine

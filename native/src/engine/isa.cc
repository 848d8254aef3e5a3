#include "everybit/engine/isa.h"

#include <stdexcept>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace everybit::engine {
namespace {

std::vector<Isa> detect() {
  std::vector<Isa> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  const bool vbmi = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
                    __builtin_cpu_supports("gfni");
  if (vbmi) found.push_back({"avx512_vbmi", &avx512_vbmi_kernels(), &avx512_ops()});
  if (avx512) found.push_back({"avx512", &avx512_kernels(), &avx512_ops()});
  if (avx2) found.push_back({"avx2", &avx2_kernels(), &avx2_ops()});
#elif defined(__aarch64__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back({"neon", &neon_kernels(), &neon_ops()});
#endif
  found.push_back({"scalar", &scalar_kernels(), &scalar_ops()});
  return found;
}

}  // namespace

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> kFound = detect();
  return kFound;
}

const Isa& choose_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : supported_isas()) {
    if (name.empty() || name == isa.name) return isa;
    names += names.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not on this processor, which runs " +
                              names);
}

}  // namespace everybit::engine

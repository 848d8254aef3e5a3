// Which kernels run: one instruction set for everything, chosen once and visible.
#pragma once

#include <string>
#include <vector>

#include "everybit/engine/linear.h"
#include "everybit/engine/ops.h"

namespace everybit::engine {

struct Isa {
  const char* name;
  const Kernels* kernels;
  const Ops* ops;
};

// The sets this processor runs, the best first; "scalar" is always the last.
const std::vector<Isa>& supported_isas();

// The set of that name, or the best one when `name` is empty. Throws std::invalid_argument naming what there is.
const Isa& choose_isa(const std::string& name);

}  // namespace everybit::engine

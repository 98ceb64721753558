// Cutting and packing sequences, for the tests of everything that carries a state.
#pragma once

#include "core/tensor.h"

namespace headwater {

/// Steps [begin, end) of a (batch, length, ...) tensor of any dtype, as a copy.
Tensor steps_of(const Tensor& sequence, int64_t begin, int64_t end);

/// i32 (batch, length): each entry 1 with this probability, from a fixed seed.
Tensor random_resets(int64_t batch, int64_t length, double probability);

}  // namespace headwater

// Root-mean-square normalisation, plain and gated.
#pragma once

#include <optional>

#include "autograd/variable.h"

namespace headwater {

struct RmsNormOptions {
  double epsilon = 1e-5;
  int64_t n_groups = 1;           ///< the channels are normalised in this many groups of equal size
  bool norm_before_gate = false;  ///< with a gate: norm(x) * silu(gate) instead of norm(x * silu(gate))
  std::optional<DType> output_dtype =
      {};  ///< of y and the gate; absent: that of x. A bf16 layer reads an f32 residual
};

/// RMSNorm over the last axis, with an optional SiLU gate.
///
///   no gate               y = v / sqrt(mean(v^2) + epsilon) * weight,   v = x
///   gate                  the same with v = x * silu(gate)
///   gate, norm_before     y = x / sqrt(mean(x^2) + epsilon) * weight * silu(gate)
///
/// The mean runs over each of n_groups groups of d / n_groups neighbouring channels.
///
/// Source   Zhang & Sennrich 2019, arXiv:1910.07467; gate and groups as in Dao & Gu 2024, arXiv:2405.21060.
/// Shapes   x, gate: (..., d)   weight: (d)   y: (..., d).   gate may be absent (undefined).
/// Dtypes   f32, f64; bf16 and f32 to bf16 on a GPU. With bf16, weight, the sums and what is saved are f32.
/// Grads    to x, weight and gate. Saves one number per row and group besides its inputs.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
Variable rms_norm(const Variable& x, const Variable& weight, const Variable& gate = {},
                  const RmsNormOptions& options = {});

}  // namespace headwater

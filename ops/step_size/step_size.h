// The step sizes of a selective state space, and the log decays they give.
#pragma once

#include <array>
#include <optional>

#include "autograd/variable.h"

namespace headwater {

struct StepSizeOptions {
  bool softplus = true;
  std::array<std::optional<double>, 2> limits{};  ///< clamp of dt after softplus; an absent side is open
};

struct StepSizeOutput {
  Variable dt;
  Variable log_decay;
};

/// Discretisation of a diagonal state space with one rate per head.
///
///   dt = clamp(softplus(x + dt_bias), limits)        log_decay = dt * A
///
/// Source   Dao & Gu 2024, arXiv:2405.21060; Gu & Dao 2023, arXiv:2312.00752.
/// Shapes   x, dt, log_decay: (batch, length, n_heads)   A: (n_heads)   dt_bias: (n_heads), may be absent.
/// Values   A < 0. The gradient of the clamp is 1 on and within its limits, 0 outside.
/// Dtypes   f32, f64; on a GPU x may be f32 or bf16. Everything else is f32 there, dt and log_decay too: these
///          numbers are never kept in fewer bits.
/// Grads    to x, A and dt_bias. Saves nothing besides its inputs.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
StepSizeOutput step_size(const Variable& x, const Variable& A, const Variable& dt_bias = {},
                         const StepSizeOptions& options = {});

}  // namespace headwater

#include "ops/ssd/ssd.h"

namespace headwater {

MatrixStateOutput ssd(const SsdInputs& inputs, const StepSizeOptions& step,
                      const MatrixStateOptions& engine) {
  const StepSizeOutput steps = step_size(inputs.dt, inputs.A, inputs.dt_bias, step);
  return chunked_matrix_state({.q = inputs.C,
                               .k = inputs.B,
                               .v = inputs.x,
                               .log_decay = steps.log_decay,
                               .value_scale = steps.dt,
                               .skip = inputs.D,
                               .initial_state = inputs.initial_state,
                               .resets = inputs.resets},
                              engine);
}

}  // namespace headwater

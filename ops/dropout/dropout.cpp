#include "ops/dropout/dropout.h"

#include "autograd/tape.h"
#include "core/error.h"
#include "ops/dropout/dropout_kernels.h"

namespace headwater {

// y = m x with m = 0 or 1 / (1 - drop_prob), so grad_x = m grad_y, with the same m drawn again.
Variable dropout(const Variable& x, double drop_prob, const DropoutKey& key) {
  require(drop_prob >= 0.0 && drop_prob < 1.0, "dropout: drop_prob is {}; it must be >= 0 and < 1",
          drop_prob);
  if (drop_prob == 0.0) return x;
  Variable y(empty_like(x.value()));
  dropout_mask(x.device(), {x.value(), y.value(), drop_prob, key});

  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x = x.without_value(), drop_prob, key](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(grad_outputs[0]);
      dropout_mask(grad_x.device(), {grad_outputs[0], grad_x, drop_prob, key});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

}  // namespace headwater

#include "ops/rotate_pairs/rotate_pairs.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/rotate_pairs/rotate_pairs_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& x, const Tensor& rotation, const RotatePairsOptions& options) {
  require(x.shape().n_axes() == 4 && x.dim(3) % 2 == 0,
          "rotate_pairs: x has shape {}; it must be (batch, length, n_heads, d) with d even", x.shape());
  check_shape("rotate_pairs", "rotation", Variable(rotation), {x.dim(0), x.dim(1), x.dim(3) / 2, 2},
              "(batch, length, d / 2, 2)");
  check_parameter("rotate_pairs", "rotation", Variable(rotation), x);
  if (options.row_scale.defined()) {
    check_shape("rotate_pairs", "row_scale", Variable(options.row_scale), {x.dim(0), x.dim(1), x.dim(2)},
                "(batch, length, n_heads)");
    check_parameter("rotate_pairs", "row_scale", Variable(options.row_scale), x);
  }
}

}  // namespace

// A rotation's transpose is its inverse: the gradient is the same kernel with the angles negated.
Variable rotate_pairs(const Variable& x, const Tensor& rotation, const RotatePairsOptions& options) {
  check_arguments(x, rotation, options);
  Variable y(empty_like(x.value()));
  rotate_pairs_kernel(x.device(), {x.value(), rotation, options.row_scale, y.value(), options.factor, false});

  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x = x.without_value(), rotation, options](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(grad_outputs[0]);
      rotate_pairs_kernel(grad_x.device(),
                          {grad_outputs[0], rotation, options.row_scale, grad_x, options.factor, true});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

}  // namespace headwater

#include "ops/rotary/rotary.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/rotary/rotary_kernels.h"

namespace headwater {
namespace {

void check_arguments(const Variable& x, const Tensor& positions, const RotaryOptions& options) {
  require(x.shape().n_axes() == 4, "rotary: x has shape {}; it must be (batch, length, n_heads, head_dim)",
          x.shape());
  const Shape expected{x.dim(0), x.dim(1)};
  require(positions.defined() && positions.shape() == expected && positions.dtype() == DType::i32,
          "rotary: positions must be i32 (batch, length) = {}", expected);
  require(positions.device() == x.device(), "rotary: positions are on {}; they must be on {} like x",
          to_string(positions.device()), to_string(x.device()));
  require(options.dim >= 2 && options.dim % 2 == 0 && options.dim <= x.dim(3),
          "rotary: dim is {}; it must be even and from 2 to head_dim = {}", options.dim, x.dim(3));
  require(options.base > 0, "rotary: base is {}; it must be above 0", options.base);
}

}  // namespace

// A rotation's transpose, which the gradient passes through, is the rotation by the opposite angle.
Variable rotary(const Variable& x, const Tensor& positions, const RotaryOptions& options) {
  check_arguments(x, positions, options);
  const auto rotate = [positions, options](const Tensor& from, bool backwards) {
    const Tensor to = empty_like(from);
    rotary_kernel(from.device(),
                  {from, positions, to, options.dim, options.base, options.interleaved, backwards});
    return to;
  };
  Variable y(rotate(x.value(), false));
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x = x.without_value(), rotate](const std::vector<Tensor>& grad_outputs) {
      x.add_gradient(rotate(grad_outputs[0], true));
    });
  }
  return y;
}

}  // namespace headwater

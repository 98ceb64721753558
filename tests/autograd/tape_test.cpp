#include "autograd/tape.h"

#include <stdexcept>

#include "core/memory.h"
#include "ops/elementwise/elementwise.h"
#include "ops/linear/linear.h"
#include "ops/rearrange/rearrange.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"

namespace headwater {
namespace {

/// linear(silu(x), weight), the activated x kept or computed again; `view`: seen through a reshape on the way.
Variable layer(const Variable& x, const Variable& weight, bool again, bool view) {
  const Variable activated = silu(x);
  Variable y = linear(view ? reshape(activated, {activated.dim(0), activated.dim(1)}) : activated, weight);
  if (again) recompute_values({&y}, {activated}, [x] { return std::vector{silu(x)}; });
  return y;
}

TEST_CASE("recompute_values: the same gradients bit for bit, through views too") {
  const Tensor x = random_tensor({5, 7}, 1), weight = random_tensor({3, 7}, 2);
  const auto gradients = [&](bool again, bool view) {
    const Variable in = Variable::leaf(x), w = Variable::leaf(weight);
    Tape tape;
    // Twice, so that the second layer's values are filled while the first's are not.
    const Variable y =
        layer(linear(layer(in, w, again, view), Variable(weight.reshape({7, 3}))), w, again, view);
    tape.backward({y}, {random_tensor({5, 3}, 3)});
    return std::vector{in.gradient().tensor().to_vector<double>(), w.gradient().tensor().to_vector<double>()};
  };
  CHECK(gradients(true, false) == gradients(false, false));
  CHECK(gradients(true, true) == gradients(false, false));
}

TEST_CASE("recompute_values: between forward and backward the memory is free") {
  const Tensor x = Tensor::full({1024, 64}, 0.5, DType::f32), weight = Tensor::full({1, 64}, 0.5, DType::f32);
  const auto held = [&](bool again) {
    const int64_t before = memory_statistics().bytes_in_use;
    Tape tape;
    const Variable y = layer(Variable::leaf(x), Variable::leaf(weight), again, false);
    return memory_statistics().bytes_in_use - before;
  };
  CHECK(held(false) - held(true) == x.size_bytes());
}

TEST_CASE("recompute_values: what gave up its memory cannot be read") {
  Tape tape;
  const Variable x = Variable::leaf(Tensor::full({2, 3}, 1.0, DType::f32));
  const Variable activated = silu(x);
  Variable y = linear(activated, Variable(Tensor::full({1, 3}, 1.0, DType::f32)));
  recompute_values({&y}, {activated}, [x] { return std::vector{silu(x)}; });
  CHECK_THROWS_AS(activated.value().to_vector<float>(), std::logic_error);
  CHECK_THROWS_AS(activated.value().reshape({6}).clone(), std::logic_error);
}

TEST_CASE("recompute_values: without a tape everything stays") {
  const Variable x(Tensor::full({2, 3}, 1.0, DType::f32));
  const Variable activated = silu(x);
  Variable y = linear(activated, x);
  recompute_values({&y}, {activated}, [x] { return std::vector{silu(x)}; });
  CHECK(activated.value().to_vector<float>() == silu(x).value().to_vector<float>());
}

}  // namespace
}  // namespace headwater

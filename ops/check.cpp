#include "ops/check.h"

namespace headwater {

void check_resets(const char* op, const Tensor& resets, int64_t batch, int64_t length) {
  if (!resets.defined()) return;
  const Shape expected{batch, length};
  require(resets.shape() == expected && resets.dtype() == DType::i32,
          "{}: resets is {} {}; it must be i32 (batch, length) = {}", op, name_of(resets.dtype()),
          resets.shape(), expected);
  if (!resets.device().is_cpu()) return;  // reading them would wait for the GPU
  const int32_t* values = resets.data<int32_t>();
  for (int64_t i = 0; i < resets.numel(); ++i) {
    require(values[i] == 0 || values[i] == 1, "{}: resets[{}, {}] is {}; it must be 0 or 1", op, i / length,
            i % length, values[i]);
  }
}

Shape with_last(const Shape& shape, int64_t size) {
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes.back() = size;
  return Shape(sizes);
}

}  // namespace headwater

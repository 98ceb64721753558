#include "tests/sequences.h"

#include <vector>

#include "core/random.h"

namespace headwater {

Tensor steps_of(const Tensor& sequence, int64_t begin, int64_t end) {
  if (!sequence.defined()) return {};
  const int64_t batch = sequence.dim(0), length = sequence.dim(1),
                width = sequence.numel() / (batch * length);
  std::vector<int64_t> sizes(sequence.shape().begin(), sequence.shape().end());
  sizes[1] = end - begin;
  const Tensor result = Tensor::empty(Shape(sizes), sequence.dtype());
  for (int64_t b = 0; b < batch; ++b) {
    result.view(b * (end - begin) * width, {(end - begin) * width})
        .copy_from(sequence.view((b * length + begin) * width, {(end - begin) * width}));
  }
  return result;
}

Tensor random_resets(int64_t batch, int64_t length, double probability) {
  RandomStream random(7, "resets");
  const Tensor resets = Tensor::zeros({batch, length}, DType::i32);
  for (int64_t i = 0; i < resets.numel(); ++i)
    resets.data<int32_t>()[i] = random.uniform() < probability ? 1 : 0;
  return resets;
}

}  // namespace headwater

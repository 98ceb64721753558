#include <algorithm>

#include "core/parallel.h"
#include "core/random.h"
#include "ops/dropout/dropout_kernels.h"

namespace headwater {
namespace {

constexpr int64_t words_per_block = 4;
constexpr int64_t blocks_per_task = 1024;

template <class T>
void mask(const DropoutArgs& args) {
  const int64_t n = args.x.numel();
  const T* x = args.x.data<T>();
  T* y = args.y.data<T>();
  const Philox philox(args.key.seed, args.key.stream);
  const uint64_t offset = args.key.offset;
  const uint32_t threshold = static_cast<uint32_t>(args.drop_prob * 0x1p32);
  const T factor = static_cast<T>(1.0 / (1.0 - args.drop_prob));
  parallel_for((n + words_per_block - 1) / words_per_block, blocks_per_task, [=](int64_t begin, int64_t end) {
    // Words first, a few blocks at a time, then the elements: both loops vectorise.
    constexpr int64_t n_together = 64;
    uint32_t words[n_together * words_per_block];
    for (int64_t block = begin; block < end; block += n_together) {
      const int64_t n_blocks = std::min(n_together, end - block);
      for (int64_t k = 0; k < n_blocks; ++k) {
        const Philox::Block drawn = philox.block(offset + static_cast<uint64_t>(block + k));
        for (int64_t lane = 0; lane < words_per_block; ++lane)
          words[k * words_per_block + lane] = drawn[lane];
      }
      const int64_t first = block * words_per_block;
      const int64_t count = std::min(n_blocks * words_per_block, n - first);
      for (int64_t i = 0; i < count; ++i) {
        const T scaled = x[first + i] * factor;
        y[first + i] = words[i] < threshold ? T{0} : scaled;
      }
    }
  });
}

}  // namespace

void dropout_mask_cpu(const DropoutArgs& args) {
  dispatch_real(args.x.dtype(), "dropout", [&](auto element) { mask<decltype(element)>(args); });
}

}  // namespace headwater

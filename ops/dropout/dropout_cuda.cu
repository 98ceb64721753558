#include <algorithm>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "core/random.h"
#include "ops/dropout/dropout_kernels.h"

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;
constexpr int words_per_block = 4;  // of Philox

template <class T>
__device__ T masked(T x, uint32_t word, uint32_t threshold, float factor) {
  return from_float<T>(word < threshold ? 0.0f : to_float(x) * factor);
}

/// One thread a block of Philox and the four elements that it is for, in a grid-stride loop. `packed`: x and y begin at
/// a multiple of four elements, which then move at once.
template <bool packed, class T>
__global__ void mask(const T* x, T* y, int64_t n, Philox philox, uint64_t offset, uint32_t threshold,
                     float factor) {
  const int64_t n_blocks = (n + words_per_block - 1) / words_per_block;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n_blocks; i += stride) {
    const Philox::Block words = philox.block(offset + static_cast<uint64_t>(i));
    const int64_t first = i * words_per_block;
    if (packed && first + words_per_block <= n) {
      Packed<T, words_per_block> values = load_packed<words_per_block>(x + first);
#pragma unroll
      for (int k = 0; k < words_per_block; ++k) {
        values.values[k] = masked(values.values[k], words[k], threshold, factor);
      }
      store_packed<words_per_block>(y + first, values);
    } else {
#pragma unroll
      for (int k = 0; k < words_per_block; ++k) {
        if (first + k < n) y[first + k] = masked(x[first + k], words[k], threshold, factor);
      }
    }
  }
}

}  // namespace

void dropout_mask_cuda(const DropoutArgs& args) {
  dispatch_cuda(args.x.dtype(), "dropout", [&](auto element) {
    using T = decltype(element);
    const T* x = args.x.data<T>();
    T* y = args.y.data<T>();
    const auto is_packed = [](const T* data) {
      return reinterpret_cast<uintptr_t>(data) % (words_per_block * sizeof(T)) == 0;
    };
    const int64_t n = args.x.numel();
    launch("dropout_mask", is_packed(x) && is_packed(y) ? mask<true, T> : mask<false, T>,
           {.grid = {std::min(blocks_for(n, words_per_block * block), max_blocks)}, .block = block}, x, y, n,
           Philox(args.key.seed, args.key.stream), args.key.offset,
           static_cast<uint32_t>(args.drop_prob * 0x1p32), static_cast<float>(1.0 / (1.0 - args.drop_prob)));
  });
}

}  // namespace headwater

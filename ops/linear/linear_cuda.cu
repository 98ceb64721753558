#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/linear/linear_kernels.h"
#include "ops/packed_rows.h"
#include "ops/partial_sums.h"

// cuBLAS makes the products; what is left here are the two passes for the bias.

namespace headwater {
namespace {

constexpr int block = 128;

/// y += bias, one thread N neighbours of a row. After the product, not as what the product is added to: a bias rounded
/// to y's bf16 would not feel small steps of training.
template <class T, int N>
__global__ void add_bias(T* y, const float* bias, int64_t rows, int64_t d_out) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (index >= rows * d_out) return;
  float values[N], b[N];
  load_floats(y + index, values);
  load_floats(bias + index % d_out, b);
  for (int i = 0; i < N; ++i) values[i] += b[i];
  store_floats(y + index, values);
}

/// One block a stretch of rows (x) of block * N columns (y); one thread N columns. partials: (row blocks, width).
template <class T, int N>
__global__ void sum_rows(const T* values, int64_t rows, int64_t rows_per_block, int64_t width,
                         float* partials) {
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= width) return;
  const int64_t first = blockIdx.x * rows_per_block;
  const int64_t last = first + rows_per_block < rows ? first + rows_per_block : rows;
  float sums[N] = {};
#pragma unroll 4
  for (int64_t row = first; row < last; ++row) {
    float v[N];
    load_floats(values + row * width + column, v);
    for (int i = 0; i < N; ++i) sums[i] += v[i];
  }
  store_floats(partials + blockIdx.x * width + column, sums);
}

template <class T>
void add_bias_to_rows(const Tensor& y, const Tensor& bias) {
  const int64_t rows = rows_of(y.shape()), d_out = y.dim(-1);
  dispatch_packing(can_pack(d_out, {y.raw_data(), bias.raw_data()}), [&](auto n) {
    launch("linear_add_bias", add_bias<T, n>,
           {.grid = {blocks_for(rows * d_out, block * int64_t{n})}, .block = block}, y.data<T>(),
           bias.data<float>(), rows, d_out);
  });
}

template <class T>
void sum_rows_into(const Tensor& values, const Tensor& target, bool accumulate) {
  const CudaRowBlocks blocks(rows_of(values.shape()));
  const int64_t width = values.dim(-1);
  const Tensor partials = Tensor::empty({blocks.n_blocks, width}, DType::f32, values.device());
  dispatch_packing(can_pack(width, {values.raw_data()}), [&](auto n) {
    launch("linear_sum_rows", sum_rows<T, n>,
           {.grid = {blocks.n_blocks, blocks_for(width, block * int64_t{n})}, .block = block},
           values.data<T>(), blocks.rows, blocks.rows_per_block, width, partials.data<float>());
  });
  sum_partials_cuda(partials, target, accumulate);
}

template <class T>
void forward(const LinearForwardArgs& args) {
  const int64_t d_out = args.weight.dim(0), d_in = args.weight.dim(1);
  constexpr bool is_bf16 = std::is_same_v<T, BFloat16>;
  cuda::gemm({.transpose_a = false,
              .transpose_b = true,
              .m = rows_of(args.x.shape()),
              .n = d_out,
              .n_inner = d_in,
              .alpha = 1.0f,
              .a = args.x.raw_data(),
              .lda = d_in,
              .b = args.weight.raw_data(),
              .ldb = d_in,
              .beta = 0.0f,
              .c = args.y.raw_data(),
              .ldc = d_out,
              .inputs_are_bf16 = is_bf16,
              .output_is_bf16 = is_bf16});
  if (args.bias.defined()) add_bias_to_rows<T>(args.y, args.bias);
}

template <class T>
void backward(const LinearBackwardArgs& args) {
  const int64_t rows = rows_of(args.x.shape());
  const int64_t d_out = args.weight.dim(0), d_in = args.weight.dim(1);
  constexpr bool is_bf16 = std::is_same_v<T, BFloat16>;
  if (args.grad_x.defined()) {
    cuda::gemm({.transpose_a = false,
                .transpose_b = false,
                .m = rows,
                .n = d_in,
                .n_inner = d_out,
                .alpha = 1.0f,
                .a = args.grad_y.raw_data(),
                .lda = d_out,
                .b = args.weight.raw_data(),
                .ldb = d_in,
                .beta = args.accumulate_x ? 1.0f : 0.0f,
                .c = args.grad_x.raw_data(),
                .ldc = d_in,
                .inputs_are_bf16 = is_bf16,
                .output_is_bf16 = is_bf16});
  }
  if (args.grad_weight.defined()) {
    cuda::gemm({.transpose_a = true,
                .transpose_b = false,
                .m = d_out,
                .n = d_in,
                .n_inner = rows,
                .alpha = 1.0f,
                .a = args.grad_y.raw_data(),
                .lda = d_out,
                .b = args.x.raw_data(),
                .ldb = d_in,
                .beta = args.accumulate_weight ? 1.0f : 0.0f,
                .c = args.grad_weight.raw_data(),
                .ldc = d_in,
                .inputs_are_bf16 = is_bf16,
                .output_is_bf16 = false});
  }
  if (args.grad_bias.defined()) sum_rows_into<T>(args.grad_y, args.grad_bias, args.accumulate_bias);
}

}  // namespace

void linear_forward_cuda(const LinearForwardArgs& args) {
  dispatch_cuda(args.x.dtype(), "linear", [&](auto element) { forward<decltype(element)>(args); });
}

void linear_backward_cuda(const LinearBackwardArgs& args) {
  dispatch_cuda(args.x.dtype(), "linear", [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater

#include <algorithm>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/check.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"
#include "ops/linear_cross_entropy/linear_cross_entropy_kernels.h"
#include "ops/packed_rows.h"

// Rows are walked in blocks. For each: the logits by cuBLAS, in f32; a kernel that turns them into the row's loss and,
// in place, into their gradients in T; two products with those. Which rows count is known to the GPU alone, so ignored
// rows are computed too, and what they hold is kept out of every result.

namespace headwater {
namespace {

// Every block of rows reads the whole weight and updates its whole f32 gradient, so it should be large: 1280 rows of
// 50257 logits.
constexpr int64_t logits_bytes = int64_t{256} << 20;
constexpr int64_t fewest_rows = 128;
// cuBLAS wants the rows of bf16 matrices at multiples of 16 bytes.
constexpr int64_t logits_row_multiple = 64;

constexpr int most_threads_per_row = 512;
constexpr int counting_block = 1024;
constexpr int copying_block = 128;
constexpr int scaling_block = 256;
// So that expf of a difference to it is 0, not NaN, even for a logit of -infinity.
constexpr float below_all = -3.402823466e38f;

int64_t automatic_row_block(int64_t row_bytes) {
  return std::max(fewest_rows, logits_bytes / row_bytes / fewest_rows * fewest_rows);
}

/// block_sum in double; `scratch` must not be used again.
__device__ double block_sum_of_doubles(double value, SharedArray<double> scratch) {
  for (int mask = warp_size / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane_index() == 0) scratch[warp_index()] = value;
  sync_block();
  double sum = 0.0;
  for (int warp = 0; warp < n_warps(); ++warp) sum += scratch[warp];
  return sum;
}

/// One block in all. Counts are exact in double.
__global__ void count_targets(const int32_t* targets, int64_t rows, int64_t* n_targets) {
  SharedMemory shared;
  const SharedArray<double> scratch = shared.array<double>(n_warps());
  double count = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) {
    if (targets[row] != ignored_target) count += 1.0;
  }
  count = block_sum_of_doubles(count, scratch);
  if (threadIdx.x == 0) *n_targets = static_cast<int64_t>(count);
}

struct Divisor {
  int64_t number;         // 0: the one in memory
  const int64_t* memory;  // at least 1 is taken

  __device__ double value() const {
    return static_cast<double>(number > 0 ? number : (*memory > 1 ? *memory : 1));
  }
};

/// One block in all: loss = sum of the row losses / divisor.
__global__ void sum_losses(const float* row_losses, int64_t rows, Divisor divisor, float* loss) {
  SharedMemory shared;
  const SharedArray<double> scratch = shared.array<double>(n_warps());
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += blockDim.x) sum += static_cast<double>(row_losses[row]);
  sum = block_sum_of_doubles(sum, scratch);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / divisor.value());
}

/// The largest logit so far and the sum of exp(logit - largest).
struct RunningSum {
  float largest = below_all, sum = 0.0f;
  bool target_is_beaten = false;

  template <int N>
  __device__ void add(const float (&logits)[N], int64_t first, int64_t target, float target_logit) {
    float candidate = largest;
    for (int i = 0; i < N; ++i) candidate = logits[i] > candidate ? logits[i] : candidate;
    if (candidate > largest) {
      sum *= expf(largest - candidate);
      largest = candidate;
    }
    for (int i = 0; i < N; ++i) {
      sum += expf(logits[i] - largest);
      // The first of several largest logits is the prediction.
      target_is_beaten =
          target_is_beaten || (first + i < target ? logits[i] >= target_logit : logits[i] > target_logit);
    }
  }
};

struct Rows {
  const int32_t* targets;
  float* losses;
  uint8_t* correct;
};

/// A row of logits, whose memory takes their gradients. A bf16 gradient lies at half its logit's offset: it overwrites
/// what has been read only if a step's reads are all done before its writes, for which `write_step` needs the block.
template <class T>
struct LogitsRow {
  const float* logits;
  T* gradients;
  int64_t vocab_size, packed_end;  // packed_end: the multiple of packed_size up to which all are packed

  /// The gradients of elements [first, first + blockDim * packed_size), from all threads of the block:
  /// gradient(logit, index).
  template <class Gradient>
  __device__ void write_step(int64_t first, const Gradient& gradient) const {
    const int64_t j = first + static_cast<int64_t>(threadIdx.x) * packed_size;
    float values[packed_size] = {};
    if (j < packed_end) {
      load_floats(logits + j, values);
    } else {
      for (int i = 0; i < packed_size; ++i) {
        if (j + i < vocab_size) values[i] = logits[j + i];
      }
    }
    for (int i = 0; i < packed_size; ++i) values[i] = gradient(values[i], j + i);
    if constexpr (!std::is_same_v<T, float>) sync_block();
    if (j < packed_end) {
      store_floats(gradients + j, values);
    } else {
      for (int i = 0; i < packed_size; ++i) {
        if (j + i < vocab_size) gradients[j + i] = from_float<T>(values[i]);
      }
    }
  }

  template <class Gradient>
  __device__ void write(const Gradient& gradient) const {
    for (int64_t first = 0; first < vocab_size; first += static_cast<int64_t>(blockDim.x) * packed_size) {
      write_step(first, gradient);
    }
  }
};

/// One block a row, its threads side by side along the vocabulary, four logits each. Two passes: the largest logit and
/// the sum together, then the gradients. logits: f32 rows of `row_step` elements, which become rows of T at the same
/// addresses, if the gradient is wanted. A target that does not exist makes the loss NaN.
template <class T>
__global__ void finish_rows(float* logits, int64_t row_step, int64_t vocab_size, Rows rows, Divisor divisor,
                            bool want_gradient) {
  SharedMemory shared;
  const SharedArray<float> scratch = shared.array<float>(n_warps());
  const int64_t row = blockIdx.x;
  logits += row * row_step;
  const LogitsRow<T> memory{logits, reinterpret_cast<T*>(logits), vocab_size,
                            vocab_size / packed_size * packed_size};
  const int64_t target = rows.targets[row];
  if (target < 0 || target >= vocab_size) {
    if (threadIdx.x == 0) {
      rows.losses[row] = target == ignored_target ? 0.0f : nanf("");
      rows.correct[row] = 0;
    }
    if (want_gradient) memory.write([](float, int64_t) { return 0.0f; });
    return;
  }

  const float target_logit = logits[target];
  RunningSum running;
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * packed_size; j < memory.packed_end;
       j += static_cast<int64_t>(blockDim.x) * packed_size) {
    float values[packed_size];
    load_floats(logits + j, values);
    running.add(values, j, target, target_logit);
  }
  for (int64_t j = memory.packed_end + threadIdx.x; j < vocab_size; j += blockDim.x) {
    const float value[1] = {logits[j]};
    running.add(value, j, target, target_logit);
  }
  const float largest = block_max(running.largest, scratch);
  const float sum = block_sum(running.sum * expf(running.largest - largest), scratch);
  const bool is_beaten = block_max(running.target_is_beaten ? 1.0f : 0.0f, scratch) > 0.0f;
  if (threadIdx.x == 0) {
    rows.losses[row] = logf(sum) - (target_logit - largest);
    rows.correct[row] = !is_beaten && target_logit == largest;
  }
  if (!want_gradient) return;
  const float one = static_cast<float>(1.0 / divisor.value());
  const float factor = one / sum;
  memory.write(
      [=](float logit, int64_t j) { return expf(logit - largest) * factor - (j == target ? one : 0.0f); });
}

/// to = from, with 0 in the rows that do not count: a product would make NaN of 0 * NaN. One block a row.
template <class T, int N>
__global__ void copy_counted_rows(const T* from, const int32_t* targets, int64_t width, T* to) {
  const int64_t offset = blockIdx.x * width;
  const bool counts = targets[blockIdx.x] != ignored_target;
  for (int64_t j = static_cast<int64_t>(threadIdx.x) * N; j < width;
       j += static_cast<int64_t>(blockDim.x) * N) {
    float values[N] = {};
    if (counts) load_floats(from + offset + j, values);
    store_floats(to + offset + j, values);
  }
}

/// values *= factor, which is usually 1: then nothing is read or written.
template <class T>
__global__ void scale(T* values, int64_t n, const float* factor) {
  const float f = *factor;
  if (f == 1.0f) return;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) values[i] = from_float<T>(to_float(values[i]) * f);
}

void scale_by(const Tensor& values, const Tensor& factor) {
  dispatch_cuda(values.dtype(), "linear_cross_entropy", [&](auto element) {
    using T = decltype(element);
    launch("linear_cross_entropy_scale", scale<T>,
           {.grid = {blocks_for(values.numel(), scaling_block)}, .block = scaling_block}, values.data<T>(),
           values.numel(), factor.data<float>());
  });
}

/// The steps of the work on one block of rows after another.
template <class T>
struct RowWalk {
  const LinearCrossEntropyForwardArgs& args;
  int64_t rows, vocab_size, d_model, row_step;
  Divisor divisor;
  Tensor logits;          // f32 (row_block, row_step)
  Tensor counted_hidden;  // (row_block, d_model); undefined unless grad_weight is wanted

  static constexpr bool is_bf16 = std::is_same_v<T, BFloat16>;
  // Elements of T from one row of gradients to the next.
  int64_t gradient_row_step() const { return row_step * static_cast<int64_t>(sizeof(float) / sizeof(T)); }

  void compute_logits(const T* hidden, int64_t n_rows) const {
    cuda::gemm({.transpose_a = false,
                .transpose_b = true,
                .m = n_rows,
                .n = vocab_size,
                .n_inner = d_model,
                .alpha = 1.0f,
                .a = hidden,
                .lda = d_model,
                .b = args.weight.raw_data(),
                .ldb = d_model,
                .beta = 0.0f,
                .c = logits.raw_data(),
                .ldc = row_step,
                .inputs_are_bf16 = is_bf16,
                .output_is_bf16 = false});
  }

  void finish(int64_t begin, int64_t n_rows, bool want_gradient) const {
    const int threads = static_cast<int>(std::clamp<int64_t>(
        blocks_for(vocab_size, 4 * packed_size * warp_size) * warp_size, warp_size, most_threads_per_row));
    launch("linear_cross_entropy_finish_rows", finish_rows<T>,
           {.grid = {n_rows}, .block = threads, .shared_bytes = shared_bytes<float>(threads / warp_size)},
           logits.data<float>(), row_step, vocab_size,
           Rows{args.targets.data<int32_t>() + begin, args.row_losses.data<float>() + begin,
                args.row_correct.data<uint8_t>() + begin},
           divisor, want_gradient);
  }

  void add_to_grad_weight(const T* hidden, int64_t begin, int64_t n_rows) const {
    dispatch_packing(can_pack(d_model, {hidden, counted_hidden.raw_data()}), [&](auto n) {
      launch("linear_cross_entropy_copy_counted_rows", copy_counted_rows<T, n>,
             {.grid = {n_rows}, .block = copying_block}, hidden, args.targets.data<int32_t>() + begin,
             d_model, counted_hidden.data<T>());
    });
    cuda::gemm({.transpose_a = true,
                .transpose_b = false,
                .m = vocab_size,
                .n = d_model,
                .n_inner = n_rows,
                .alpha = 1.0f,
                .a = logits.raw_data(),
                .lda = gradient_row_step(),
                .b = counted_hidden.raw_data(),
                .ldb = d_model,
                .beta = begin == 0 ? 0.0f : 1.0f,
                .c = args.grad_weight.raw_data(),
                .ldc = d_model,
                .inputs_are_bf16 = is_bf16,
                .output_is_bf16 = false});
  }

  void write_grad_hidden(int64_t begin, int64_t n_rows) const {
    cuda::gemm({.transpose_a = false,
                .transpose_b = false,
                .m = n_rows,
                .n = d_model,
                .n_inner = vocab_size,
                .alpha = 1.0f,
                .a = logits.raw_data(),
                .lda = gradient_row_step(),
                .b = args.weight.raw_data(),
                .ldb = d_model,
                .beta = 0.0f,
                .c = args.grad_hidden.data<T>() + begin * d_model,
                .ldc = d_model,
                .inputs_are_bf16 = is_bf16,
                .output_is_bf16 = is_bf16});
  }
};

template <class T>
void forward(const LinearCrossEntropyForwardArgs& args) {
  const Device device = args.hidden.device();
  const int64_t rows = args.targets.numel(), vocab_size = args.weight.dim(0), d_model = args.weight.dim(1);
  const int64_t row_step = blocks_for(vocab_size, logits_row_multiple) * logits_row_multiple;
  const int64_t row_block = std::min(
      rows, args.row_block > 0 ? args.row_block
                               : automatic_row_block(row_step * static_cast<int64_t>(sizeof(float))));
  const bool want_weight = args.grad_weight.defined(), want_hidden = args.grad_hidden.defined();
  const RowWalk<T> walk{
      .args = args,
      .rows = rows,
      .vocab_size = vocab_size,
      .d_model = d_model,
      .row_step = row_step,
      .divisor = {args.divisor, args.divisor_tensor.data<int64_t>()},
      .logits = Tensor::empty({row_block, row_step}, DType::f32, device),
      .counted_hidden =
          want_weight ? Tensor::empty({row_block, d_model}, args.hidden.dtype(), device) : Tensor()};
  const LaunchShape one_block{
      .grid = {1}, .block = counting_block, .shared_bytes = shared_bytes<double>(counting_block / warp_size)};

  launch("linear_cross_entropy_count_targets", count_targets, one_block, args.targets.data<int32_t>(), rows,
         args.n_targets.data<int64_t>());
  if (want_weight && rows == 0) args.grad_weight.zero();
  for (int64_t begin = 0; begin < rows; begin += row_block) {
    const int64_t n_rows = std::min(row_block, rows - begin);
    const T* hidden = args.hidden.data<T>() + begin * d_model;
    walk.compute_logits(hidden, n_rows);
    walk.finish(begin, n_rows, want_weight || want_hidden);
    if (want_weight) walk.add_to_grad_weight(hidden, begin, n_rows);
    if (want_hidden) walk.write_grad_hidden(begin, n_rows);
  }
  launch("linear_cross_entropy_sum_losses", sum_losses, one_block, args.row_losses.data<float>(), rows,
         walk.divisor, args.loss.data<float>());
}

}  // namespace

void linear_cross_entropy_forward_cuda(const LinearCrossEntropyForwardArgs& args) {
  dispatch_cuda(args.hidden.dtype(), "linear_cross_entropy",
                [&](auto element) { forward<decltype(element)>(args); });
}

void linear_cross_entropy_backward_cuda(const LinearCrossEntropyBackwardArgs& args) {
  if (args.grad_hidden.defined()) scale_by(args.grad_hidden, args.grad_loss);
  if (args.grad_weight.defined()) scale_by(args.grad_weight, args.grad_loss);
}

}  // namespace headwater

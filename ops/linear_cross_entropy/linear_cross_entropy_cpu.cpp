#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/gemm.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/lane_sums.h"
#include "ops/linear_cross_entropy/linear_cross_entropy.h"
#include "ops/linear_cross_entropy/linear_cross_entropy_kernels.h"

// Only the rows that count are gathered into blocks, so that padding costs nothing. Matrix products share out
// their own work; between them threads share the rows of a block.

namespace headwater {
namespace {

constexpr int64_t elements_per_task = 16384;
// Each block reads the whole weight and updates its whole gradient: with few rows that is all it does.
// Measured with 50257 x 768 on two cores: 16 rows reach 1/4 of the speed of 128, and 512 are hardly faster
// than those.
constexpr int64_t logits_bytes = int64_t{16} << 20;
constexpr int64_t fewest_rows = 128;

int64_t automatic_row_block(int64_t vocab_size, int64_t element_bytes) {
  return std::max(fewest_rows, logits_bytes / std::max<int64_t>(1, vocab_size * element_bytes));
}

std::vector<int64_t> rows_that_count(const Tensor& targets) {
  std::vector<int64_t> rows;
  for (int64_t row = 0; row < targets.numel(); ++row) {
    if (targets.data<int32_t>()[row] != ignored_target) rows.push_back(row);
  }
  return rows;
}

template <class T>
void gather_rows(const T* from, const int64_t* rows, int64_t n_rows, int64_t width, T* to) {
  for (int64_t i = 0; i < n_rows; ++i) std::copy_n(from + rows[i] * width, width, to + i * width);
}

template <class T>
void scatter_rows(const T* from, const int64_t* rows, int64_t n_rows, int64_t width, T* to) {
  for (int64_t i = 0; i < n_rows; ++i) std::copy_n(from + i * width, width, to + rows[i] * width);
}

/// The largest of n values; NaNs are passed over.
template <class T>
T largest(const T* values, int64_t n) {
  constexpr int lanes = 16;
  T partial[lanes];
  std::fill_n(partial, lanes, -std::numeric_limits<T>::infinity());
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      partial[lane] = values[j + lane] > partial[lane] ? values[j + lane] : partial[lane];
    }
  }
  for (; j < n; ++j) partial[0] = values[j] > partial[0] ? values[j] : partial[0];
  return *std::max_element(partial, partial + lanes);
}

/// Turns values[j] into exp(values[j] - shift) and returns their sum.
template <class T>
double exponentiate(T* values, int64_t n, T shift) {
  for (int64_t j = 0; j < n; ++j) values[j] = exp_vectorisable(values[j] - shift);
  // Short sums in T, added in double: the error does not grow with the vocabulary.
  constexpr int64_t chunk = 1024;
  double sum = 0.0;
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const T* first = values + begin;
    sum += static_cast<double>(lane_sum<T>(std::min(chunk, n - begin), [=](int64_t j) { return first[j]; }));
  }
  return sum;
}

template <class T>
struct RowResult {
  T loss;
  bool correct;
};

/// Loss of one row; its logits become exp(logits - max), or the gradient of loss / divisor if that is wanted.
template <class T>
RowResult<T> finish_row(T* logits, int64_t vocab_size, int64_t target, bool want_gradient, double divisor) {
  const T maximum = largest(logits, vocab_size);
  const T target_logit = logits[target];
  const bool correct =
      target_logit == maximum && std::find(logits, logits + target, maximum) == logits + target;
  const double sum = exponentiate(logits, vocab_size, maximum);
  if (want_gradient) {
    const T factor = static_cast<T>(1.0 / (sum * divisor));
    for (int64_t j = 0; j < vocab_size; ++j) logits[j] *= factor;
    logits[target] -= static_cast<T>(1.0 / divisor);
  }
  const double shifted_target = static_cast<double>(target_logit) - static_cast<double>(maximum);
  return {static_cast<T>(std::log(sum) - shifted_target), correct};
}

template <class T>
void forward(const LinearCrossEntropyForwardArgs& args) {
  const int64_t vocab_size = args.weight.dim(0);
  const int64_t d_model = args.weight.dim(1);
  const std::vector<int64_t> counted = rows_that_count(args.targets);
  const int64_t n_counted = static_cast<int64_t>(counted.size());
  const bool want_gradient = args.grad_hidden.defined() || args.grad_weight.defined();
  const int64_t row_block =
      std::min(n_counted, args.row_block > 0 ? args.row_block : automatic_row_block(vocab_size, sizeof(T)));
  *args.n_targets.data<int64_t>() = n_counted;
  const double divisor = static_cast<double>(
      args.divisor > 0 ? args.divisor : std::max<int64_t>(1, *args.divisor_tensor.data<int64_t>()));

  args.row_losses.zero();
  args.row_correct.zero();
  if (args.grad_hidden.defined()) args.grad_hidden.zero();
  if (args.grad_weight.defined()) args.grad_weight.zero();
  const Tensor logits_memory = Tensor::empty({row_block, vocab_size}, args.hidden.dtype());
  const Tensor rows_memory = Tensor::empty({row_block, d_model}, args.hidden.dtype());
  T* logits = logits_memory.data<T>();
  T* block_rows = rows_memory.data<T>();
  const T* weight = args.weight.data<T>();
  T* row_losses = args.row_losses.data<T>();
  for (int64_t begin = 0; begin < n_counted; begin += row_block) {
    const int64_t n_rows = std::min(row_block, n_counted - begin);
    const int64_t* rows = counted.data() + begin;
    gather_rows(args.hidden.data<T>(), rows, n_rows, d_model, block_rows);
    gemm<T>(false, true, n_rows, vocab_size, d_model, 1, block_rows, d_model, weight, d_model, 0, logits,
            vocab_size);
    parallel_for(n_rows, 1 + elements_per_task / vocab_size, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int32_t target = args.targets.data<int32_t>()[rows[i]];
        const RowResult<T> result =
            finish_row(logits + i * vocab_size, vocab_size, target, want_gradient, divisor);
        row_losses[rows[i]] = result.loss;
        args.row_correct.data<uint8_t>()[rows[i]] = result.correct;
      }
    });
    if (args.grad_weight.defined()) {
      gemm<T>(true, false, vocab_size, d_model, n_rows, 1, logits, vocab_size, block_rows, d_model, 1,
              args.grad_weight.data<T>(), d_model);
    }
    if (args.grad_hidden.defined()) {
      // The block's rows of hidden have been used for the last time; their gradients take their place.
      gemm<T>(false, false, n_rows, d_model, vocab_size, 1, logits, vocab_size, weight, d_model, 0,
              block_rows, d_model);
      scatter_rows(block_rows, rows, n_rows, d_model, args.grad_hidden.data<T>());
    }
  }

  double total = 0.0;
  for (const int64_t row : counted) total += static_cast<double>(row_losses[row]);
  *args.loss.data<T>() = static_cast<T>(total / divisor);
}

template <class T>
void backward(const LinearCrossEntropyBackwardArgs& args) {
  const double factor = static_cast<double>(*args.grad_loss.data<T>());
  if (factor == 1.0) return;  // the loss itself is where the backward pass starts: the usual case
  if (args.grad_hidden.defined()) scale_in_place(args.grad_hidden, factor);
  if (args.grad_weight.defined()) scale_in_place(args.grad_weight, factor);
}

}  // namespace

void linear_cross_entropy_forward_cpu(const LinearCrossEntropyForwardArgs& args) {
  dispatch_real(args.hidden.dtype(), "linear_cross_entropy",
                [&](auto element) { forward<decltype(element)>(args); });
}

void linear_cross_entropy_backward_cpu(const LinearCrossEntropyBackwardArgs& args) {
  dispatch_real(args.grad_loss.dtype(), "linear_cross_entropy",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater

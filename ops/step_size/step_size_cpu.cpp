#include <vector>

#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/check.h"
#include "ops/step_size/step_size_kernels.h"

namespace headwater {
namespace {

constexpr int64_t rows_per_task = 512;

template <class T>
void forward(const StepSizeForwardArgs& args) {
  const int64_t n_heads = args.A.numel();
  const std::vector<T> zeros(n_heads, T{0});
  const T* bias = args.dt_bias.defined() ? args.dt_bias.data<T>() : zeros.data();
  const T* A = args.A.data<T>();
  const T lower = static_cast<T>(args.lower), upper = static_cast<T>(args.upper);
  parallel_for(rows_of(args.x.shape()), rows_per_task, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = args.x.data<T>() + row * n_heads;
      T* dt = args.dt.data<T>() + row * n_heads;
      T* log_decay = args.log_decay.data<T>() + row * n_heads;
      for (int64_t h = 0; h < n_heads; ++h) {
        const T open = args.softplus ? softplus(x[h] + bias[h]) : x[h] + bias[h];
        const T limited = open < lower ? lower : (open > upper ? upper : open);
        dt[h] = limited;
        log_decay[h] = limited * A[h];
      }
    }
  });
}

template <class T>
void backward(const StepSizeBackwardArgs& args) {
  const StepSizeForwardArgs& in = args.forward;
  const int64_t n_heads = in.A.numel();
  const std::vector<T> zeros(n_heads, T{0});
  const T* bias = in.dt_bias.defined() ? in.dt_bias.data<T>() : zeros.data();
  const T* A = in.A.data<T>();
  const T lower = static_cast<T>(in.lower), upper = static_cast<T>(in.upper);
  const RowBlocks blocks(rows_of(in.x.shape()));
  // Per block: the sums for A, then those for dt_bias.
  std::vector<double> partial(blocks.n_blocks * 2 * n_heads);
  parallel_for_each(blocks.n_blocks, [&](int64_t block) {
    double* sums_A = partial.data() + block * 2 * n_heads;
    double* sums_bias = sums_A + n_heads;
    for (int64_t row = blocks.begin(block); row < blocks.end(block); ++row) {
      const T* x = in.x.data<T>() + row * n_heads;
      const T* grad_dt = args.grad_dt.defined() ? args.grad_dt.data<T>() + row * n_heads : zeros.data();
      const T* grad_log_decay =
          args.grad_log_decay.defined() ? args.grad_log_decay.data<T>() + row * n_heads : zeros.data();
      T* grad_x = args.grad_x.data<T>() + row * n_heads;
      for (int64_t h = 0; h < n_heads; ++h) {
        const T p = x[h] + bias[h];
        const T open = in.softplus ? softplus(p) : p;
        const T dt = open < lower ? lower : (open > upper ? upper : open);
        const T slope = open < lower || open > upper ? T{0} : (in.softplus ? sigmoid(p) : T{1});
        grad_x[h] = (grad_dt[h] + A[h] * grad_log_decay[h]) * slope;
        sums_A[h] += static_cast<double>(dt) * static_cast<double>(grad_log_decay[h]);
        sums_bias[h] += static_cast<double>(grad_x[h]);
      }
    }
  });
  std::vector<double> total(2 * n_heads);
  sum_blocks(partial.data(), blocks.n_blocks, 2 * n_heads, false, total.data());
  for (int64_t h = 0; h < n_heads; ++h) {
    args.grad_A.data<T>()[h] = static_cast<T>(total[h]);
    if (args.grad_dt_bias.defined()) args.grad_dt_bias.data<T>()[h] = static_cast<T>(total[n_heads + h]);
  }
}

}  // namespace

void step_size_forward_cpu(const StepSizeForwardArgs& args) {
  dispatch_real(args.x.dtype(), "step_size", [&](auto element) { forward<decltype(element)>(args); });
}

void step_size_backward_cpu(const StepSizeBackwardArgs& args) {
  dispatch_real(args.forward.x.dtype(), "step_size",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater

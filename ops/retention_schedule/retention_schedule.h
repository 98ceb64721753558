// What retention derives from positions alone.
#pragma once

#include "core/tensor.h"

namespace headwater {

struct RetentionScheduleSizes {
  int64_t batch, length, n_heads;
  int64_t d_key;  ///< of a head, even
  DType dtype;    ///< of the numbers: f32, or f64 on the CPU
  Device device = {};
};

struct RetentionSchedule {
  Tensor rotation;       ///< (batch, length, d_key / 2, 2): cosine and sine of n theta_j
  Tensor row_scale;      ///< (batch, length, n_heads): 1 / sqrt(s)
  Tensor log_decay;      ///< (n_heads): log gamma
  Tensor next_position;  ///< i64 (batch): of the step after the last
};

/// The constants of retention for a stretch of a sequence. Step t of sequence b has the position n: first_position[b] + t,
/// or the number of steps since the last reset.
///
///   gamma[h] = 1 - 2^(-5 - h)                    theta[j] = 10000^(-j / (d_key / 2 - 1)),   1 for d_key = 2
///   s[b,t,h] = sum over i <= n of gamma[h]^i     what a retention of ones would give
///
/// Source   Sun et al. 2023, arXiv:2307.08621, and torchscale's RetNetRelPos, which ends theta at 1 / 10000. That positions
///          begin again at a reset is ours; within a document only their differences matter.
/// Shapes   first_position: i64 (batch), absent: zeros   resets: i32 (batch, length), may be absent.
/// Values   Decays are taken as logarithms in double precision, since gamma rounds to 1 in f32 beyond 20 heads, and s by
///          expm1, since 1 - gamma^n cancels. Angles are reduced in double precision before a cosine is taken in f32,
///          so that positions in the millions are as good as small ones.
/// Grads    none: nothing here depends on a variable.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
RetentionSchedule retention_schedule(const Tensor& first_position, const Tensor& resets,
                                     const RetentionScheduleSizes& sizes);

}  // namespace headwater

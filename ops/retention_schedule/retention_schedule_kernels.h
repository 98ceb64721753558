// Private to the operator: what its kernel takes, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// The real tensors share a dtype.
struct RetentionScheduleArgs {
  Tensor first_position;  // i64 (batch) or undefined
  Tensor resets;          // i32 (batch, length) or undefined
  Tensor positions;       // i64 (batch, length), written
  Tensor next_position;   // i64 (batch), written
  Tensor rotation;        // (batch, length, d_key / 2, 2), written
  Tensor row_scale;       // (batch, length, n_heads), written
  Tensor log_decay;       // (n_heads), written
};

void retention_schedule_cpu(const RetentionScheduleArgs& args);
void retention_schedule_cuda(const RetentionScheduleArgs& args);

inline constexpr Kernel<RetentionScheduleArgs> retention_schedule_kernel{
    "retention_schedule", retention_schedule_cpu, HEADWATER_CUDA(retention_schedule_cuda)};

}  // namespace headwater

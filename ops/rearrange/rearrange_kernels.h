// Private to the operators: what their kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

/// A rectangle of columns copied from one (rows, source_width) matrix to another of target_width.
struct CopyColumnsArgs {
  Tensor source, target;  // only the target's columns are written
  int64_t rows, width;    // of the rectangle
  int64_t source_width, source_column;
  int64_t target_width, target_column;
};

struct TransposeLastArgs {
  Tensor x;  // (..., m, n)
  Tensor y;  // (..., n, m), written
};

struct RepeatLeadingArgs {
  Tensor x;  // (...)
  Tensor y;  // (count, ...), written
};

struct SumLeadingArgs {
  Tensor x;  // (count, ...)
  Tensor y;  // (...), written
};

void copy_columns_cpu(const CopyColumnsArgs& args);
void copy_columns_cuda(const CopyColumnsArgs& args);
void transpose_last_cpu(const TransposeLastArgs& args);
void transpose_last_cuda(const TransposeLastArgs& args);
void repeat_leading_cpu(const RepeatLeadingArgs& args);
void repeat_leading_cuda(const RepeatLeadingArgs& args);
void sum_leading_cpu(const SumLeadingArgs& args);
void sum_leading_cuda(const SumLeadingArgs& args);

inline constexpr Kernel<CopyColumnsArgs> copy_columns{"copy_columns", copy_columns_cpu,
                                                      HEADWATER_CUDA(copy_columns_cuda)};
inline constexpr Kernel<TransposeLastArgs> transpose_last_kernel{"transpose_last", transpose_last_cpu,
                                                                 HEADWATER_CUDA(transpose_last_cuda)};
inline constexpr Kernel<RepeatLeadingArgs> repeat_leading_kernel{"repeat_leading", repeat_leading_cpu,
                                                                 HEADWATER_CUDA(repeat_leading_cuda)};
inline constexpr Kernel<SumLeadingArgs> sum_leading{"sum_leading", sum_leading_cpu,
                                                    HEADWATER_CUDA(sum_leading_cuda)};

}  // namespace headwater

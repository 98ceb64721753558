// Matrix products, through a library.
#pragma once

#include <cstdint>

namespace headwater {

/// C = alpha * op(A) op(B) + beta * C, row-major; op transposes where asked.
///
/// Shapes   op(A): (m, n_inner)   op(B): (n_inner, n)   C: (m, n); lda, ldb, ldc are the lengths of stored
///          rows.
/// Types    float (oneDNN; a few rows go through loops of ours, as oneDNN's set-up costs more than they do)
///          and double (ours, for gradient checks: not fast).
/// Repeat   same inputs and number of threads, same bits.
template <class T>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t n_inner, T alpha, const T* a,
          int64_t lda, const T* b, int64_t ldb, T beta, T* c, int64_t ldc);

}  // namespace headwater

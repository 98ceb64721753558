#include "core/gemm.h"

#include <dnnl.h>

#include "core/error.h"
#include "core/matrix_block.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace headwater {
namespace {

// Below this many rows a product with a row-contiguous B^T is bound by reading B once: plain dot products do
// that.
constexpr int64_t few_rows = 4;
constexpr int64_t multiplications_per_thread = 1 << 16;

/// C = alpha * A B^T + beta * C for few rows of A: threads share the columns of C.
template <class T>
void multiply_few_rows(int64_t m, int64_t n, int64_t n_inner, T alpha, const T* a, int64_t lda, const T* b,
                       int64_t ldb, T beta, T* c, int64_t ldc) {
  const int64_t grain = 1 + multiplications_per_thread / std::max<int64_t>(1, m * n_inner);
  parallel_for(n, grain, [=](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
      for (int64_t row = 0; row < m; ++row) {
        T& target = c[row * ldc + column];
        const T product = alpha * dot_product(a + row * lda, b + column * ldb, n_inner);
        target = beta == T{0} ? product : product + beta * target;
      }
    }
  });
}

/// The definition, row by row of C; the inner loop runs along C's rows where B allows it.
void multiply_double(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t n_inner, double alpha,
                     const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                     int64_t ldc) {
  const int64_t grain = 1 + multiplications_per_thread / std::max<int64_t>(1, n * n_inner);
  parallel_for(m, grain, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      double* c_row = c + row * ldc;
      for (int64_t j = 0; j < n; ++j) c_row[j] = beta == 0.0 ? 0.0 : beta * c_row[j];
      for (int64_t i = 0; i < n_inner; ++i) {
        const double factor = alpha * (transpose_a ? a[i * lda + row] : a[row * lda + i]);
        const double* b_row = b + (transpose_b ? i : i * ldb);
        const int64_t step = transpose_b ? ldb : 1;
        for (int64_t j = 0; j < n; ++j) c_row[j] += factor * b_row[j * step];
      }
    }
  });
}

}  // namespace

template <>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t n_inner, float alpha,
          const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c, int64_t ldc) {
  if (m == 0 || n == 0) return;
  ProfileScope scope("gemm");
  if (m <= few_rows && !transpose_a && transpose_b) {
    multiply_few_rows(m, n, n_inner, alpha, a, lda, b, ldb, beta, c, ldc);
    return;
  }
  const dnnl_status_t status = dnnl_sgemm(transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, n_inner,
                                          alpha, a, lda, b, ldb, beta, c, ldc);
  if (status != dnnl_success) {
    throw_machine_error("oneDNN refused a matrix product of ({}, {}) by ({}, {}): status {}", m, n_inner,
                        n_inner, n, static_cast<int>(status));
  }
}

template <>
void gemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t n_inner, double alpha,
          const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c, int64_t ldc) {
  ProfileScope scope("gemm");
  multiply_double(transpose_a, transpose_b, m, n, n_inner, alpha, a, lda, b, ldb, beta, c, ldc);
}

}  // namespace headwater

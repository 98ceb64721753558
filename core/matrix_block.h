// Products of small matrices that already lie in a core's caches: the pieces of which fused kernels are made.
// (Products of whole tensors go through core/gemm.h.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/profile.h"

namespace headwater {

#ifdef __AVX512F__
inline constexpr int vector_bytes = 64;
#else
inline constexpr int vector_bytes = 32;
#endif

/// A register full of T; loads and stores need no alignment.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes), aligned(alignof(T)), may_alias));
};

/// How many T are worked on at once; matrices whose rows are vector operands are padded to a multiple of it.
template <class T>
inline constexpr int64_t n_lanes = vector_bytes / static_cast<int64_t>(sizeof(T));

template <class T>
constexpr int64_t padded(int64_t size) {
  return (size + n_lanes<T> - 1) / n_lanes<T> * n_lanes<T>;
}

/// The left matrix of a product: element (i, l) is data[i * row_step + l * column_step]. Swapping the steps
/// transposes.
template <class T>
struct LeftMatrix {
  const T* data;
  int64_t row_step;
  int64_t column_step;

  LeftMatrix transposed() const { return {data, column_step, row_step}; }
};

/// Which part of a product is not zero, or not wanted, by blocks: what lies beyond is skipped where a whole
/// block of rows allows it, so masked elements inside a block must hold 0.
enum class Triangle {
  none,
  left_lower,   ///< left(i, l) = 0 for l > i
  left_upper,   ///< left(i, l) = 0 for l < i
  result_lower  ///< result(i, j) is not used for j > i
};

namespace matrix_block_detail {

// 6 x 4 accumulators, 4 vectors of the right matrix and a broadcast fit 32 registers of 512 bits;
// with 16 registers of 256 bits, 6 x 2 do.
inline constexpr int max_rows = 6;
inline constexpr int max_vectors = vector_bytes == 64 ? 4 : 2;

template <class T, int rows, int vectors>
void multiply_tile(int64_t n_inner, LeftMatrix<T> left, const T* right, int64_t right_step, bool accumulate,
                   T* result, int64_t result_step) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t lanes = n_lanes<T>;
  Vector sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      sums[r][v] =
          accumulate ? *reinterpret_cast<const Vector*>(result + r * result_step + v * lanes) : Vector{};
    }
  }
  const T* left_column = left.data;
  for (int64_t l = 0; l < n_inner; ++l, left_column += left.column_step, right += right_step) {
    Vector row[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) row[v] = *reinterpret_cast<const Vector*>(right + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const T factor = left_column[r * left.row_step];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      *reinterpret_cast<Vector*>(result + r * result_step + v * lanes) = sums[r][v];
    }
  }
}

template <class T, int rows>
void multiply_rows(int64_t n_vectors, int64_t n_inner, LeftMatrix<T> left, const T* right, int64_t right_step,
                   bool accumulate, T* result, int64_t result_step) {
  constexpr int64_t lanes = n_lanes<T>;
  int64_t v = 0;
  for (; v + max_vectors <= n_vectors; v += max_vectors) {
    multiply_tile<T, rows, max_vectors>(n_inner, left, right + v * lanes, right_step, accumulate,
                                        result + v * lanes, result_step);
  }
  const auto rest = [&]<int vectors>() {
    multiply_tile<T, rows, vectors>(n_inner, left, right + v * lanes, right_step, accumulate,
                                    result + v * lanes, result_step);
  };
  switch (n_vectors - v) {
    case 1:
      rest.template operator()<1>();
      break;
    case 2:
      rest.template operator()<2>();
      break;
    case 3:
      rest.template operator()<3>();
      break;
    default:
      break;
  }
}

}  // namespace matrix_block_detail

/// result = left right, or result += left right.
///
/// Shapes   left: (m, n_inner)   right: (n_inner, n), rows `right_step` apart   result: (m, n), rows
///          `result_step` apart. Rows of right and result must be readable and writable up to padded<T>(n).
template <class T>
void multiply_block(int64_t m, int64_t n, int64_t n_inner, LeftMatrix<T> left, const T* right,
                    int64_t right_step, bool accumulate, T* result, int64_t result_step,
                    Triangle triangle = Triangle::none) {
  using namespace matrix_block_detail;
  const ProfileScope scope("multiply_block");
  for (int64_t i = 0; i < m; i += max_rows) {
    const int64_t rows = std::min<int64_t>(max_rows, m - i);
    const int64_t first = triangle == Triangle::left_upper ? i : 0;
    const int64_t last = triangle == Triangle::left_lower ? std::min(n_inner, i + rows) : n_inner;
    const int64_t columns = triangle == Triangle::result_lower ? std::min(n, i + rows) : n;
    const LeftMatrix<T> left_rows{left.data + i * left.row_step + first * left.column_step, left.row_step,
                                  left.column_step};
    const auto run = [&]<int n_rows>() {
      multiply_rows<T, n_rows>(padded<T>(columns) / n_lanes<T>, last - first, left_rows,
                               right + first * right_step, right_step, accumulate, result + i * result_step,
                               result_step);
    };
    switch (rows) {
      case 1:
        run.template operator()<1>();
        break;
      case 2:
        run.template operator()<2>();
        break;
      case 3:
        run.template operator()<3>();
        break;
      case 4:
        run.template operator()<4>();
        break;
      case 5:
        run.template operator()<5>();
        break;
      default:
        run.template operator()<6>();
        break;
    }
  }
}

namespace matrix_block_detail {

/// Rows of a square tile exchanged with its columns, in registers: at each stage, pairs of rows `distance` apart swap
/// the halves of every group of 2 * distance elements. log2(lanes) stages of shuffles, no scalar moves.
template <class T>
void transpose_tile(const T* source, int64_t source_step, T* target, int64_t target_step) {
  using Vector = typename VectorOf<T>::type;
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Indices = typename VectorOf<Index>::type;
  constexpr int lanes = static_cast<int>(n_lanes<T>);
  Vector rows[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) rows[i] = *reinterpret_cast<const Vector*>(source + i * source_step);
#pragma GCC unroll 4
  for (int distance = 1; distance < lanes; distance *= 2) {
    Indices low{}, high{};
#pragma GCC unroll 16
    for (int lane = 0; lane < lanes; ++lane) {
      const bool upper = (lane & distance) != 0;
      low[lane] = upper ? lanes + lane - distance : lane;
      high[lane] = upper ? lanes + lane : lane + distance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if ((i & distance) != 0) continue;
      const Vector a = rows[i], b = rows[i + distance];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + distance] = __builtin_shuffle(a, b, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) *reinterpret_cast<Vector*>(target + i * target_step) = rows[i];
}

}  // namespace matrix_block_detail

/// target(j, i) = source(i, j) for an (m, n) source: whole tiles in registers, the rims element by element.
template <class T>
void transpose_block(int64_t m, int64_t n, const T* source, int64_t source_step, T* target,
                     int64_t target_step) {
  constexpr int64_t tile = n_lanes<T>;
  const int64_t m_tiled = m / tile * tile, n_tiled = n / tile * tile;
  for (int64_t i = 0; i < m_tiled; i += tile) {
    for (int64_t j = 0; j < n_tiled; j += tile) {
      matrix_block_detail::transpose_tile(source + i * source_step + j, source_step,
                                          target + j * target_step + i, target_step);
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = i < m_tiled ? n_tiled : 0; j < n; ++j)
      target[j * target_step + i] = source[i * source_step + j];
  }
}

/// The sum of a[i] * b[i] in a fixed order: `lanes` running sums, then pairwise.
template <class T>
T dot_product(const T* a, const T* b, int64_t n) {
  constexpr int lanes = 64;
  T partial[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) partial[lane] += a[i + lane] * b[i + lane];
  }
  T sum = 0;
  for (; i < n; ++i) sum += a[i] * b[i];
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) partial[lane] += partial[lane + width];
  }
  return sum + partial[0];
}

}  // namespace headwater

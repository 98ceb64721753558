// Products on the matrix units: C (16 x 8, float) += A (16 x depth) B (depth x 8), a warp together.
//
// bf16 operands multiply at depth 16, sums in float. f32 operands multiply at depth 8 as three products of tf32 parts
// (big * big + big * small + small * big), which leaves an error near 2^-21 of each product instead of tf32's 2^-11.
//
// How a warp's lanes hold a fragment (PTX ISA, mma.m16n8k16 and mma.m16n8k8; g = lane / 4, t = lane % 4):
//   C      values 0, 1: row g, columns 2t, 2t+1         values 2, 3: row g + 8
//   A bf16 words 0, 1: rows g, g + 8, columns 2t, 2t+1  words 2, 3: the same, columns + 8
//   B bf16 words 0, 1: rows 2t, 2t+1 and those + 8, column g
//   A f32  values 0, 1: rows g, g + 8, column t         values 2, 3: the same, column t + 4
//   B f32  values 0, 1: rows t and t + 4, column g
#pragma once

#include "core/cuda/device.h"

namespace headwater {

/// A matrix inside a shared array: element (row, column) at offset + row * row_step + column * column_step.
template <class T>
struct SharedMatrix {
  SharedArray<T> data;
  int offset = 0;
  int row_step = 0;
  int column_step = 1;

  __device__ SharedMatrix at(int row, int column) const {
    return {data, offset + row * row_step + column * column_step, row_step, column_step};
  }
  __device__ SharedMatrix transposed() const { return {data, offset, column_step, row_step}; }
  __device__ T get(int row, int column) const { return data[offset + row * row_step + column * column_step]; }
};

/// A matrix whose rows lie in a shared array one after another, `row_step` apart, each beginning at a multiple of 16
/// bytes: bf16 then comes into the lanes by ldmatrix, 8 rows of 16 bytes at a time. Rows that are a multiple of 32 bytes
/// and 16 bytes of padding long lie in different banks.
template <class T>
struct SharedRows;

/// The transpose of such a matrix: its columns are the rows of the array.
template <class T>
struct SharedColumns {
  using Element = T;
  SharedArray<T> data;
  int offset = 0;
  int column_step = 0;

  __device__ SharedColumns at(int row, int column) const {
    return {data, offset + row + column * column_step, column_step};
  }
  __device__ T get(int row, int column) const { return data[offset + row + column * column_step]; }
};

template <class T>
struct SharedRows {
  using Element = T;
  SharedArray<T> data;
  int offset = 0;
  int row_step = 0;

  __device__ SharedRows at(int row, int column) const {
    return {data, offset + row * row_step + column, row_step};
  }
  __device__ SharedColumns<T> transposed() const { return {data, offset, row_step}; }
  __device__ T get(int row, int column) const { return data[offset + row * row_step + column]; }
  __device__ void set(int row, int column, T value) const { data[offset + row * row_step + column] = value; }
};

struct FragmentC {
  float values[4];
};
/// The row and column of value `i` of the calling lane, within the 16 x 8 tile.
__device__ inline int fragment_row(int i) {
  return lane_index() / 4 + (i / 2) * 8;
}
__device__ inline int fragment_column(int i) {
  return 2 * (lane_index() % 4) + i % 2;
}

template <class T>
struct MatrixUnit;

template <>
struct MatrixUnit<BFloat16> {
  static constexpr int depth = 16;
  struct A {
    uint32_t words[4];
  };
  struct B {
    uint32_t words[2];
  };
};

template <>
struct MatrixUnit<float> {
  static constexpr int depth = 8;
  struct A {
    uint32_t big[4], small[4];
  };
  struct B {
    uint32_t big[2], small[2];
  };
};

__device__ inline uint32_t pack_pair(BFloat16 low, BFloat16 high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}

/// The nearest float of 10 fraction bits (ties away from zero), as its bits, and what is left of the value.
__device__ inline void split_tf32(float value, uint32_t& big, uint32_t& small) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  big = (bits + 0x1000u) & 0xffffe000u;
  float rounded;
  memcpy(&rounded, &big, sizeof(rounded));
  const float rest = value - rounded;
  memcpy(&bits, &rest, sizeof(bits));
  small = (bits + 0x1000u) & 0xffffe000u;
}

#if !defined(HEADWATER_EMULATED)

__device__ __forceinline__ void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four blocks of 8 x 8 from shared memory, ldmatrix: lane l names row l % 8 of block l / 8 by the index of its first
/// element, and gets of each block i, in words[i], elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1); of the
/// blocks' transposes, if `transposed`.
template <bool transposed>
__device__ __forceinline__ void load_blocks(uint32_t (&words)[4], const SharedArray<BFloat16>& array,
                                            int index) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(array.address(index)));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  }
}

#else

namespace emulator {

struct MatrixUnitRequest {
  uint32_t a[4], b[2];
  float c[4];
};

/// Puts A and B together from all lanes' registers as the hardware reads them, multiplies, and hands each lane its
/// part of C.
void multiply_on_matrix_unit(const Site& site, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             bool is_bf16);

}  // namespace emulator

template <bool transposed>
void load_blocks(uint32_t (&words)[4], const SharedArray<BFloat16>& array, int index, HEADWATER_SITE) {
  const Packed<BFloat16, 8> row = array.load<8>(index);
  emulator::meet_warp({"load_blocks", file, line}, &row, &words[0], [](const auto& in, const auto& out) {
    const auto element = [&](int block, int i, int j) -> uint32_t {
      return static_cast<const Packed<BFloat16, 8>*>(in[8 * block + i])->values[j].bits;
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int block = 0; block < 4; ++block) {
        static_cast<uint32_t*>(out[lane])[block] =
            transposed ? element(block, 2 * t, g) | element(block, 2 * t + 1, g) << 16
                       : element(block, g, 2 * t) | element(block, g, 2 * t + 1) << 16;
      }
    }
  });
}

inline void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HEADWATER_SITE) {
  emulator::multiply_on_matrix_unit({"multiply (bf16)", file, line}, c, a, b, true);
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HEADWATER_SITE) {
  emulator::multiply_on_matrix_unit({"multiply (tf32)", file, line}, c, a, b, false);
}

#endif

/// The top left 16 x depth of `matrix`.
__device__ inline MatrixUnit<BFloat16>::A load_a(const SharedMatrix<BFloat16>& matrix) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  MatrixUnit<BFloat16>::A a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i % 2) * 8, column = 2 * t + (i / 2) * 8;
    a.words[i] = pack_pair(matrix.get(row, column), matrix.get(row, column + 1));
  }
  return a;
}
__device__ inline MatrixUnit<BFloat16>::A load_a(const SharedRows<BFloat16>& matrix) {
  const int lane = lane_index(), row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
  MatrixUnit<BFloat16>::A a;
  load_blocks<false>(a.words, matrix.data, matrix.offset + row * matrix.row_step + column);
  return a;
}
__device__ inline MatrixUnit<BFloat16>::A load_a(const SharedColumns<BFloat16>& matrix) {
  const int lane = lane_index(), row = lane / 8 % 2 * 8, column = lane % 8 + lane / 16 * 8;
  MatrixUnit<BFloat16>::A a;
  load_blocks<true>(a.words, matrix.data, matrix.offset + row + column * matrix.column_step);
  return a;
}
template <class Matrix>
__device__ inline MatrixUnit<float>::A load_a(const Matrix& matrix) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  MatrixUnit<float>::A a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    split_tf32(matrix.get(g + (i % 2) * 8, t + (i / 2) * 4), a.big[i], a.small[i]);
  }
  return a;
}
/// The top left depth x 8 of `matrix`.
__device__ inline MatrixUnit<BFloat16>::B load_b(const SharedMatrix<BFloat16>& matrix) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  MatrixUnit<BFloat16>::B b;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * t + i * 8;
    b.words[i] = pack_pair(matrix.get(row, g), matrix.get(row + 1, g));
  }
  return b;
}
template <class Matrix>
__device__ inline MatrixUnit<float>::B load_b(const Matrix& matrix) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  MatrixUnit<float>::B b;
#pragma unroll
  for (int i = 0; i < 2; ++i) split_tf32(matrix.get(t + i * 4, g), b.big[i], b.small[i]);
  return b;
}

/// The top left depth x 16 of `matrix`, as two fragments.
__device__ inline void load_b_pair(MatrixUnit<BFloat16>::B (&b)[2], const SharedRows<BFloat16>& matrix) {
  const int lane = lane_index(), row = lane % 8 + lane / 8 % 2 * 8, column = lane / 16 * 8;
  uint32_t words[4];
  load_blocks<true>(words, matrix.data, matrix.offset + row * matrix.row_step + column);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].words[i % 2] = words[i];
}
__device__ inline void load_b_pair(MatrixUnit<BFloat16>::B (&b)[2], const SharedColumns<BFloat16>& matrix) {
  const int lane = lane_index(), row = lane / 8 % 2 * 8, column = lane % 8 + lane / 16 * 8;
  uint32_t words[4];
  load_blocks<false>(words, matrix.data, matrix.offset + row + column * matrix.column_step);
#pragma unroll
  for (int i = 0; i < 4; ++i) b[i / 2].words[i % 2] = words[i];
}
template <class Matrix>
__device__ inline void load_b_pair(MatrixUnit<float>::B (&b)[2], const Matrix& matrix) {
  b[0] = load_b(matrix);
  b[1] = load_b(matrix.at(0, 8));
}

/// c += a b.
__device__ inline void multiply(FragmentC& c, const MatrixUnit<BFloat16>::A& a,
                                const MatrixUnit<BFloat16>::B& b) {
  multiply_bf16(c.values, a.words, b.words);
}
__device__ inline void multiply(FragmentC& c, const MatrixUnit<float>::A& a, const MatrixUnit<float>::B& b) {
  multiply_tf32(c.values, a.small, b.big);
  multiply_tf32(c.values, a.big, b.small);
  multiply_tf32(c.values, a.big, b.big);
}

/// A warp's tile of 16 m_tiles x 8 n_tiles.
template <int m_tiles, int n_tiles>
struct WarpTile {
  FragmentC fragments[m_tiles][n_tiles];

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) fragments[m][n].values[i] = 0.0f;
      }
    }
  }

  /// += A (16 m_tiles x depth) B (depth x 8 n_tiles); depth is a multiple of MatrixUnit<T>::depth.
  template <class T>
  __device__ void add_product(const SharedMatrix<T>& a, const SharedMatrix<T>& b, int depth) {
    for (int k = 0; k < depth; k += MatrixUnit<T>::depth) {
      typename MatrixUnit<T>::B b_fragments[n_tiles];
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) b_fragments[n] = load_b(b.at(k, 8 * n));
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) {
        const typename MatrixUnit<T>::A a_fragment = load_a(a.at(16 * m, k));
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) multiply(fragments[m][n], a_fragment, b_fragments[n]);
      }
    }
  }

  /// The same of SharedRows or SharedColumns, and only the first `columns` columns, a multiple of 16. n_tiles is even.
  template <class MatrixA, class MatrixB>
  __device__ void add_product(const MatrixA& a, const MatrixB& b, int depth, int columns) {
    using Unit = MatrixUnit<typename MatrixA::Element>;
#pragma unroll 2
    for (int k = 0; k < depth; k += Unit::depth) {
      typename Unit::A a_fragments[m_tiles];
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) a_fragments[m] = load_a(a.at(16 * m, k));
#pragma unroll
      for (int n = 0; n < n_tiles; n += 2) {
        if (8 * n < columns) {
          typename Unit::B b_fragments[2];
          load_b_pair(b_fragments, b.at(k, 8 * n));
#pragma unroll
          for (int m = 0; m < m_tiles; ++m) {
            multiply(fragments[m][n], a_fragments[m], b_fragments[0]);
            multiply(fragments[m][n + 1], a_fragments[m], b_fragments[1]);
          }
        }
      }
    }
  }

  /// body(row, column, value&) for each value that the calling lane holds.
  template <class Body>
  __device__ void for_each(const Body& body) {
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          body(16 * m + fragment_row(i), 8 * n + fragment_column(i), fragments[m][n].values[i]);
        }
      }
    }
  }
};

}  // namespace headwater

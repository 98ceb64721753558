// Element types of tensors, and the step from a run-time dtype to a C++ type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/bfloat16.h"
#include "core/error.h"

namespace headwater {

/// f64 exists on the CPU so that every gradient can be checked by finite differences.
enum class DType : uint8_t { f32, f64, bf16, i32, i64, u8 };

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
      return 2;
    case DType::u8:
      return 1;
  }
  return 0;
}

/// What numbers that must not lose bits are kept in beside tensors of `dtype`: norms' and convolutions' weights, biases,
/// step sizes, decays, states, sums, gradients of weights.
constexpr DType compute_dtype(DType dtype) {
  return dtype == DType::bf16 ? DType::f32 : dtype;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "f32";
    case DType::f64:
      return "f64";
    case DType::bf16:
      return "bf16";
    case DType::i32:
      return "i32";
    case DType::i64:
      return "i64";
    case DType::u8:
      return "u8";
  }
  return "unknown";
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::i32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::i64;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::u8;
};

/// Calls `body(T{})` with T the C++ type of `dtype`.
template <class Body>
void dispatch_any(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      body(float{});
      return;
    case DType::f64:
      body(double{});
      return;
    case DType::bf16:
      body(BFloat16{});
      return;
    case DType::i32:
      body(int32_t{});
      return;
    case DType::i64:
      body(int64_t{});
      return;
    case DType::u8:
      body(uint8_t{});
      return;
  }
}

/// Calls `body(T{})` with T = float, double or BFloat16; any other dtype is an input error that names `who`.
template <class Body>
void dispatch_floating(DType dtype, const char* who, Body&& body) {
  switch (dtype) {
    case DType::f32:
      body(float{});
      return;
    case DType::f64:
      body(double{});
      return;
    case DType::bf16:
      body(BFloat16{});
      return;
    default:
      throw_input_error("{}: dtype {} is not supported; use f32, f64 or bf16", who, name_of(dtype));
  }
}

/// Calls `body(T{})` with T = float or double; any other dtype is an input error that names `who`.
template <class Body>
void dispatch_real(DType dtype, const char* who, Body&& body) {
  switch (dtype) {
    case DType::f32:
      body(float{});
      return;
    case DType::f64:
      body(double{});
      return;
    default:
      throw_input_error("{}: dtype {} is not supported on the CPU; use f32 or f64", who, name_of(dtype));
  }
}

/// Calls `body(T{})` with T = float or BFloat16, what CUDA kernels compute with; any other dtype is an input error that
/// names `who`.
template <class Body>
void dispatch_cuda(DType dtype, const char* who, Body&& body) {
  switch (dtype) {
    case DType::f32:
      body(float{});
      return;
    case DType::bf16:
      body(BFloat16{});
      return;
    default:
      throw_input_error("{}: dtype {} is not supported on a GPU; use f32 or bf16", who, name_of(dtype));
  }
}

}  // namespace headwater

// The 16-bit float that activations and matrix weights may be stored in; arithmetic is done in float.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#define HEADWATER_HOST_DEVICE __host__ __device__
#else
/// Before a function that kernels call too.
#define HEADWATER_HOST_DEVICE
#endif

namespace headwater {

/// The upper 16 bits of a float.
struct BFloat16 {
  uint16_t bits;
};

HEADWATER_HOST_DEVICE inline float to_float(float value) {
  return value;
}

HEADWATER_HOST_DEVICE inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

/// Rounds to nearest, ties to even; NaN stays NaN.
HEADWATER_HOST_DEVICE inline BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}

/// from_float<T>(value): the step from arithmetic in float to what is stored.
template <class T>
HEADWATER_HOST_DEVICE inline T from_float(float value);
template <>
HEADWATER_HOST_DEVICE inline float from_float<float>(float value) {
  return value;
}
template <>
HEADWATER_HOST_DEVICE inline BFloat16 from_float<BFloat16>(float value) {
  return to_bfloat16(value);
}

}  // namespace headwater

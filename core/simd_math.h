// Elementary functions written so that a loop over them is vectorised by the compiler: no branches, no calls.
// Float versions err by at most 2 units in the last place over the stated ranges; double versions are the
// standard library's, as doubles serve gradient checks, not speed.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace headwater {

/// e^x for float: 0 below -87.3, infinity above 88.7, NaN stays NaN.
/// 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2, p of degree 6 (minimax coefficients of the Cephes
/// library).
inline float exp_vectorisable(float x) {
  constexpr float log2_e = 1.44269504088896341f;
  constexpr float ln2_high = 0.693359375f;  // 9 bits: n * ln2_high is exact
  constexpr float ln2_low = -2.12194440e-4f;
  constexpr float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
  const float shifted = clamped * log2_e + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (clamped - n * ln2_high) - n * ln2_low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // n reaches 128 near the top, one more than an exponent holds: two factors.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(round_to_integer);
  const int32_t half = exponent >> 1;
  const float scale_1 = std::bit_cast<float>((half + 127) << 23);
  const float scale_2 = std::bit_cast<float>((exponent - half + 127) << 23);
  const float result = p * scale_1 * scale_2;
  const float with_limits = x < -87.3f ? 0.0f : (x > 88.7f ? INFINITY : result);
  return x != x ? x : with_limits;
}
inline double exp_vectorisable(double x) {
  return std::exp(x);
}

/// log(1 + x) for x in [0, 1].
/// 2 atanh(s) with s = x / (2 + x) <= 1/3: an odd series in s, whose tail after s^13 is below 2^-25 of the
/// result.
inline float log1p_vectorisable(float x) {
  const float s = x / (2.0f + x);
  const float q = s * s;
  float p = 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  return 2.0f * s * (1.0f + q * p);
}
inline double log1p_vectorisable(double x) {
  return std::log1p(x);
}

/// 1 / (1 + e^-x).
template <class T>
inline T sigmoid(T x) {
  return T{1} / (T{1} + exp_vectorisable(-x));
}

/// x * sigmoid(x).
template <class T>
inline T silu(T x) {
  return x * sigmoid(x);
}

/// d silu / dx = sigmoid(x) (1 + x (1 - sigmoid(x))).
template <class T>
inline T silu_derivative(T x) {
  const T s = sigmoid(x);
  return s * (T{1} + x * (T{1} - s));
}

/// log(1 + e^x), as max(x, 0) + log1p(e^-|x|): never overflows.
template <class T>
inline T softplus(T x) {
  const T magnitude = x < T{0} ? -x : x;
  return (x > T{0} ? x : T{0}) + log1p_vectorisable(exp_vectorisable(-magnitude));
}

}  // namespace headwater

// Mathematics of 16 numbers, and 16 numbers of narrower types.
#pragma once
#include <cmath>

#include "lanes.h"

namespace qjax {

// A whole line to memory without reading it first; p is aligned. Others see it after finish_stores.
QJAX_INLINE void store_past_caches(float* p, v16f v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#else
  store(p, v);
#endif
}
QJAX_INLINE void finish_stores() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}
// What 4-bit codes, the lowest bits of a number, stand for.
struct Table16 {
#if defined(__AVX512F__)
  __m512 values;
  explicit Table16(const float* from) : values(_mm512_loadu_ps(from)) {}
  QJAX_INLINE v16f operator[](v16i codes) const {
    return (v16f)_mm512_permutexvar_ps((__m512i)codes, values);
  }
#elif defined(__AVX2__)
  __m256 low, high;
  explicit Table16(const float* from) : low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
  QJAX_INLINE v16f operator[](const v16i& codes) const {
    v16f r;
    QJAX_UNROLL for (int i = 0; i < 2; ++i) {
      const __m256i at = (__m256i)codes.part[i];
      const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
      r.part[i] = (part_f)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at),
                                           _mm256_permutevar8x32_ps(high, at), upper);
    }
    return r;
  }
#else
  const float* values;
  explicit Table16(const float* from) : values(from) {}
  QJAX_INLINE v16f operator[](const v16i& codes) const {
    alignas(64) float found[16];
    for (int r = 0; r < 16; ++r) found[r] = values[codes[r] & 15];
    return load(found);
  }
#endif
};

// Of lanes whose indices differ by Distance, a power of two: the sum, then the difference.
template <int Distance>
QJAX_INLINE v16f sum_and_difference(const v16f& v) {
  alignas(64) float from[16], to[16];
  store(from, v);
  for (int i = 0; i < 16; ++i) to[i] = from[i ^ Distance] + (i & Distance ? -from[i] : from[i]);
  return load(to);
}
QJAX_INLINE float sum(const v16f& v) {
  alignas(64) float a[16];
  store(a, v);
  for (int i = 0; i < 8; ++i) a[i] += a[i + 8];
  for (int i = 0; i < 4; ++i) a[i] += a[i + 4];
  return (a[0] + a[2]) + (a[1] + a[3]);
}
QJAX_INLINE float max(const v16f& v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  alignas(64) float a[16];
  store(a, v);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
  return a[0];
#endif
}

// exp with a relative error near 2^-23: 2^n * p(r), r in [-ln2/2, ln2/2], Taylor to r^7.
QJAX_INLINE v16f vexp(v16f x) {
  x = vmax(vmin(x, splat(88.0f)), splat(-87.0f));
  const v16f magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  v16f shifted = x * 1.44269504088896341f + magic;
  v16f n = shifted - magic;
  v16f r = x - n * 0.693145751953125f;
  r = r - n * 1.428606765330187e-06f;
  v16f p = splat(1.0f / 5040);
  p = p * r + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return as_float(as_int(p) + ((as_int(shifted) - as_int(magic)) << 23));
}

QJAX_INLINE v16f silu(v16f x) { return x / (1.0f + vexp(-x)); }
// gelu_tanh(x) = x/2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
QJAX_INLINE v16f gelu_tanh(v16f x) {
  v16f u2 = x * 1.5957691216057308f * (1.0f + 0.044715f * x * x);
  return x / (1.0f + vexp(-u2));
}

QJAX_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Subnormals by a product of normal numbers: XLA's threads flush subnormal floats to zero.
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  const uint32_t exponent = h & 0x7c00;
  uint32_t bits = exponent == 0x7c00 ? rest | 0x7f800000 : rest + (112u << 23);
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  if (exponent == 0) magnitude = float(h & 0x3ff) * 5.9604644775390625e-08f;  // 2^-24
  std::memcpy(&bits, &magnitude, 4);
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
#endif
}
template <class T>
QJAX_INLINE v16i widened(const uint8_t* p) {  // integers of type T; compilers make vectors of the loop
  struct __attribute__((packed, may_alias)) Any {  // at any address
    T value;
  };
  alignas(64) int32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = reinterpret_cast<const Any*>(p)[i].value;
  return load_ints(wide);
}
QJAX_INLINE v16f half16(const uint8_t* p) {
#if defined(__AVX512F__)
  return (v16f)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  v16f r;
  for (int i = 0; i < 2; ++i)
    r.part[i] = (part_f)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + i));
  return r;
#else
  const v16i half = widened<uint16_t>(p), rest = (half & 0x7fff) << 13, exponent = half & 0x7c00;
  const v16f subnormal = to_float(half & 0x3ff) * 5.9604644775390625e-08f;  // 2^-24
  const v16f normal = as_float(rest + (112 << 23)), beyond = as_float(rest | 0x7f800000);
  const v16f size =
      where_equal(exponent, 0, subnormal, where_equal(exponent, 0x7c00, beyond, normal));
  return as_float(as_int(size) | (half & 0x8000) << 16);
#endif
}
QJAX_INLINE v16f bf16_16(const uint8_t* p) { return as_float(widened<uint16_t>(p) << 16); }
QJAX_INLINE v16f bytes16(const uint8_t* p) { return to_float(widened<uint8_t>(p)); }
QJAX_INLINE v16f signed_bytes16(const uint8_t* p) { return to_float(widened<int8_t>(p)); }
QJAX_INLINE uint16_t to_bf16(float x) {  // round to nearest even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 64);  // NaN
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
QJAX_INLINE float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace qjax

// 16 lanes in the compiler's own vector types: one AVX-512 register, two of AVX2, four of NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace qjax {

typedef float v16f __attribute__((vector_size(64), aligned(64)));
typedef int32_t v16i __attribute__((vector_size(64), aligned(64)));
typedef float v16f_u __attribute__((vector_size(64), aligned(4)));

#define QJAX_INLINE inline __attribute__((always_inline))
#define QJAX_INLINED __attribute__((always_inline))  // of a lambda, before its body
// In front of a loop with a constant count, whose array must live in registers.
#define QJAX_UNROLL _Pragma("GCC unroll 16")

QJAX_INLINE v16f load(const float* p) { return *reinterpret_cast<const v16f_u*>(p); }
QJAX_INLINE void store(float* p, v16f v) { *reinterpret_cast<v16f_u*>(p) = v; }
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
QJAX_INLINE v16f splat(float x) { return v16f{} + x; }
// Of lanes whose indices differ by Distance, a power of two: the sum, then the difference.
template <int Distance>
QJAX_INLINE v16f sum_and_difference(v16f v) {
  constexpr int d = Distance;
#define QJAX_LANES(f) f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), \
                      f(12), f(13), f(14), f(15)
#define QJAX_OTHER(i) (i ^ d)
#define QJAX_SIGN(i) (i & d ? -1.0f : 1.0f)
#if defined(__clang__)
  const v16f other = __builtin_shufflevector(v, v, QJAX_LANES(QJAX_OTHER));
#else
  const v16f other = __builtin_shuffle(v, v16i{QJAX_LANES(QJAX_OTHER)});
#endif
  return other + v * v16f{QJAX_LANES(QJAX_SIGN)};
#undef QJAX_LANES
#undef QJAX_OTHER
#undef QJAX_SIGN
}
QJAX_INLINE v16i as_int(v16f v) { v16i r; std::memcpy(&r, &v, 64); return r; }
QJAX_INLINE v16f as_float(v16i v) { v16f r; std::memcpy(&r, &v, 64); return r; }

QJAX_INLINE float sum(v16f v) {
  float total = 0;
  for (int i = 0; i < 8; ++i) v[i] += v[i + 8];
  for (int i = 0; i < 4; ++i) v[i] += v[i + 4];
  total = (v[0] + v[2]) + (v[1] + v[3]);
  return total;
}
QJAX_INLINE float max(v16f v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < 16; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
QJAX_INLINE v16f vmax(v16f a, v16f b) {
#if defined(__AVX512F__)
  return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
QJAX_INLINE v16f vmin(v16f a, v16f b) {
#if defined(__AVX512F__)
  return (v16f)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
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
QJAX_INLINE v16f half16(const uint8_t* p) {
#if defined(__AVX512F__)
  return (v16f)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  v16f r;
  for (int i = 0; i < 16; ++i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    r[i] = half_to_float(h);
  }
  return r;
#endif
}
QJAX_INLINE v16f bf16_16(const uint8_t* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return (v16f)_mm512_slli_epi32(wide, 16);
#else
  uint16_t h[16];
  std::memcpy(h, p, 32);
  v16i bits;
  for (int i = 0; i < 16; ++i) bits[i] = int32_t(uint32_t(h[i]) << 16);
  return as_float(bits);
#endif
}
QJAX_INLINE v16f bytes16(const uint8_t* p) {  // unsigned
#if defined(__AVX512F__)
  return (v16f)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  v16f r;
  for (int i = 0; i < 16; ++i) r[i] = float(p[i]);
  return r;
#endif
}
QJAX_INLINE v16f signed_bytes16(const uint8_t* p) {
#if defined(__AVX512F__)
  return (v16f)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  v16f r;
  for (int i = 0; i < 16; ++i) r[i] = float(int8_t(p[i]));
  return r;
#endif
}
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

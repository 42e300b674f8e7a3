// The two products of attention, for each kind of arithmetic. Operands lie so that neither needs a
// transpose, in groups of as many numbers as one instruction sums:
//   K  [head_dim / pack][page_size][pack]   lanes are keys
//   V  [page_size / pack][head_dim][pack]   lanes are channels
// The other operand, a row of queries or of weights, is broadcast, a `Scalar` of `pack` neighbours
// at a time.
#pragma once
#include <cmath>

#include "kernels.h"
#include "rows.h"

namespace qjax {

constexpr int kChunk = 8;        // query rows that share one load

#if defined(__AVX512BF16__)
constexpr int kPackFloat8 = 2;  // what bfloat16 products take
#else
constexpr int kPackFloat8 = 1;
#endif
#if defined(__AVX512VNNI__)
constexpr int kPackInt = 4;
#else
constexpr int kPackInt = 1;
#endif

// float32: nothing is rounded.
struct ElementF32 {
  static constexpr int pack = 1;
  using Storage = float;
  using Scalar = float;
  using Start = float;
  using Sum = v16f;
  static QJAX_INLINE Sum begin(Start x) { return splat(x); }
  static QJAX_INLINE v16f load(const Storage* p) { return qjax::load(p); }
  static QJAX_INLINE void fma(Sum& acc, v16f v, Scalar x) { acc += v * x; }
  static QJAX_INLINE v16f value(const Sum& acc) { return acc; }

  // Rounds n numbers (a multiple of 16) of a row; they are `factor` times what is stored.
  static QJAX_INLINE void round(const float* x, int64_t n, Scalar* to, float& factor) {
    for (int64_t i = 0; i < n; i += 16) store(to + i, qjax::load(x + i));
    factor = 1;
  }
  // Sum of a rounded row, in units of `factor`, each number times that of `weight` if given.
  static QJAX_INLINE float total(const Scalar* x, int64_t n, const float* weight) {
    v16f all = {};
    for (int64_t i = 0; i < n; i += 16)
      all += weight ? qjax::load(x + i) * qjax::load(weight + i) : qjax::load(x + i);
    return sum(all);
  }
  static QJAX_INLINE Start start(const Scalar*, int64_t, int) { return 0; }
  static QJAX_INLINE Start start(float total) { return total; }
};

// bfloat16, summed in float32.
struct ElementBF16 {
  static constexpr int pack = 2;
  using Storage = uint16_t;
  using Scalar = int32_t;
  using Start = float;
  using Sum = v16f;
  static QJAX_INLINE Sum begin(Start x) { return splat(x); }
  static QJAX_INLINE v16f value(const Sum& acc) { return acc; }
#if defined(__AVX512BF16__)
  static QJAX_INLINE __m512bh load(const Storage* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static QJAX_INLINE void fma(Sum& acc, __m512bh v, Scalar x) {
    acc = (v16f)_mm512_dpbf16_ps((__m512)acc, v, (__m512bh)_mm512_set1_epi32(x));
  }
#else
  struct Pair {
    v16f even, odd;
  };
  static QJAX_INLINE Pair load(const Storage* p) {
    v16i words;
    std::memcpy(&words, p, 64);
    return {as_float(words << 16), as_float(words & int32_t(0xffff0000))};
  }
  static QJAX_INLINE void fma(Sum& acc, const Pair& v, Scalar x) {
    acc += v.even * from_bf16(uint16_t(x)) + v.odd * from_bf16(uint16_t(uint32_t(x) >> 16));
  }
#endif
  static QJAX_INLINE void round(const float* x, int64_t n, Scalar* to, float& factor) {
    Storage* out = reinterpret_cast<Storage*>(to);
    factor = 1;
    for (int64_t i = 0; i < n; i += 16) {
#if defined(__AVX512BF16__)
      const __m512 values = (__m512)qjax::load(x + i);
      _mm256_storeu_si256((__m256i*)(out + i), (__m256i)_mm512_cvtneps_pbh(values));
#else
      for (int j = 0; j < 16; ++j) out[i + j] = to_bf16(x[i + j]);
#endif
    }
  }
  static QJAX_INLINE float total(const Scalar*, int64_t, const float*) { return 0; }
  static QJAX_INLINE Start start(const Scalar*, int64_t, int) { return 0; }
  static QJAX_INLINE Start start(float) { return 0; }
};

#if defined(__AVX512VNNI__)
// Codes of a cache as unsigned bytes; queries and weights in 16 bits with one scale a row, as two
// signed bytes, 256 * high + low, that meet the same codes. Sums are exact.
struct ElementInt {
  static constexpr int pack = 4;
  using Storage = uint8_t;
  struct Scalar {
    int32_t high, low;  // four bytes each
  };
  struct Start {
    int32_t high, low;
  };
  struct Sum {
    __m512i high, low;
  };
  static QJAX_INLINE Sum begin(Start x) {
    return {_mm512_set1_epi32(x.high), _mm512_set1_epi32(x.low)};
  }
  static QJAX_INLINE __m512i load(const Storage* p) { return _mm512_loadu_si512(p); }
  static QJAX_INLINE void fma(Sum& acc, __m512i v, const Scalar& x) {
    acc.high = _mm512_dpbusd_epi32(acc.high, v, _mm512_set1_epi32(x.high));
    acc.low = _mm512_dpbusd_epi32(acc.low, v, _mm512_set1_epi32(x.low));
  }
  static QJAX_INLINE v16f value(const Sum& acc) {
    const __m512 high = _mm512_cvtepi32_ps(acc.high), low = _mm512_cvtepi32_ps(acc.low);
    return (v16f)_mm512_fmadd_ps(high, _mm512_set1_ps(256), low);
  }
  static QJAX_INLINE void round(const float* x, int64_t n, Scalar* to, float& factor) {
    v16f most = {};
    for (int64_t i = 0; i < n; i += 16)
      most = vmax(most, (v16f)_mm512_abs_ps((__m512)qjax::load(x + i)));
    factor = max(most) * (1.0f / kTop16);
    const float inverse = factor > 0 ? 1.0f / factor : 0.0f;
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i codes = _mm512_cvtps_epi32((__m512)(qjax::load(x + i) * inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(codes, _mm512_set1_epi32(128)), 8);
      const __m128i highs = _mm512_cvtepi32_epi8(high), lows = _mm512_cvtepi32_epi8(codes);
      _mm_storeu_si128((__m128i*)(to + i / 4), _mm_unpacklo_epi32(highs, lows));
      _mm_storeu_si128((__m128i*)(to + i / 4 + 2), _mm_unpackhi_epi32(highs, lows));
    }
  }
  static QJAX_INLINE float total(const Scalar* x, int64_t n, const float* weight) {
    v16f all = {};
    for (int64_t i = 0; i < n; i += 16) {
      const v16f codes = numbers(x + i / 4);
      all += weight ? codes * qjax::load(weight + i) : codes;
    }
    return sum(all);
  }
  // -offset times the sums of high and of low bytes: for codes that are stored with `offset` added.
  static QJAX_INLINE Start start(const Scalar* x, int64_t n, int offset) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();  // lanes high, low, high, low ...
    int64_t i = 0;
    for (; i + 8 <= n / 4; i += 8)
      sums = _mm512_dpbusd_epi32(sums, ones, _mm512_loadu_si512(x + i));
    if (i < n / 4)
      sums = _mm512_dpbusd_epi32(
          sums, ones, _mm512_maskz_loadu_epi32((1 << 2 * (n / 4 - i)) - 1, x + i));
    return {-offset * _mm512_mask_reduce_add_epi32(0x5555, sums),
            -offset * _mm512_mask_reduce_add_epi32(0xaaaa, sums)};
  }
  static QJAX_INLINE Start start(float total) { return {0, int32_t(total)}; }

 private:
  static QJAX_INLINE v16f numbers(const Scalar* x) {
    const __m128i first = _mm_loadu_si128((const __m128i*)x);
    const __m128i second = _mm_loadu_si128((const __m128i*)(x + 2));
    const __m128i even = _mm_unpacklo_epi32(first, second), odd = _mm_unpackhi_epi32(first, second);
    const __m512i high = _mm512_cvtepi8_epi32(_mm_unpacklo_epi32(even, odd));
    const __m512i low = _mm512_cvtepi8_epi32(_mm_unpackhi_epi32(even, odd));
    return (v16f)_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  }
};
#endif

// Some rows of queries or weights against one block of keys or values, page by page.
template <class E>
struct Rows {
  const typename E::Scalar* x;     // [rows][stride]
  int64_t stride;
  const typename E::Start* start;  // [rows], what sums begin with
  const float* factor;             // [rows], of a result
};

template <class E>
struct BlockPages {
  const typename E::Storage* page[kBlockKeys / 16];
  int64_t count, page_size, head_dim;
};

// Vectors of keys, or of channels, that MR rows meet at a time: one row's sums alone would wait for
// each other.
constexpr int vectors(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// scores[m][16 c ...] = factor (start + x . k) for MR rows and W vectors of keys from the c-th on.
template <class E, int MR, int W>
QJAX_INLINE void score_vectors(const BlockPages<E>& k, const Rows<E>& rows, int64_t c,
                               float* scores) {
  const typename E::Storage* keys[W];
  typename E::Sum acc[W][MR];
  QJAX_UNROLL for (int w = 0; w < W; ++w) {
    const int64_t key = 16 * (c + w);
    keys[w] = k.page[key / k.page_size] + key % k.page_size * E::pack;
    QJAX_UNROLL for (int m = 0; m < MR; ++m) acc[w][m] = E::begin(rows.start[m]);
  }
  for (int64_t d = 0, at = 0; d < k.head_dim / E::pack; ++d, at += k.page_size * E::pack)
    QJAX_UNROLL for (int w = 0; w < W; ++w) {
      const auto lanes = E::load(keys[w] + at);
      QJAX_UNROLL for (int m = 0; m < MR; ++m)
        E::fma(acc[w][m], lanes, rows.x[m * rows.stride + d]);
    }
  QJAX_UNROLL for (int w = 0; w < W; ++w)
    QJAX_UNROLL for (int m = 0; m < MR; ++m)
      store(scores + m * kBlockKeys + 16 * (c + w), E::value(acc[w][m]) * rows.factor[m]);
}
template <class E, int MR>
__attribute__((noinline)) void score_keys(const BlockPages<E>& k, Rows<E> rows, float* scores) {
  constexpr int W = vectors(MR);
  const int64_t all = k.count * k.page_size / 16;
  int64_t c = 0;
  for (; c + W <= all; c += W) score_vectors<E, MR, W>(k, rows, c, scores);
  for (; c < all; ++c) score_vectors<E, MR, 1>(k, rows, c, scores);
}

// out[m][16 c ...] += factor (start + x . v) for MR rows and W vectors of channels from the c-th on.
template <class E, int MR, int W>
QJAX_INLINE void add_vectors(const BlockPages<E>& v, const Rows<E>& rows, int64_t c, float* out) {
  const int64_t groups = v.page_size / E::pack;
  typename E::Sum acc[W][MR];
  QJAX_UNROLL for (int w = 0; w < W; ++w)
    QJAX_UNROLL for (int m = 0; m < MR; ++m) acc[w][m] = E::begin(rows.start[m]);
  for (int64_t i = 0; i < v.count; ++i) {
    const auto* values = v.page[i] + 16 * c * E::pack;
    for (int64_t g = 0; g < groups; ++g, values += v.head_dim * E::pack)
      QJAX_UNROLL for (int w = 0; w < W; ++w) {
        const auto lanes = E::load(values + 16 * w * E::pack);
        QJAX_UNROLL for (int m = 0; m < MR; ++m)
          E::fma(acc[w][m], lanes, rows.x[m * rows.stride + i * groups + g]);
      }
  }
  QJAX_UNROLL for (int w = 0; w < W; ++w)
    QJAX_UNROLL for (int m = 0; m < MR; ++m) {
      float* to = out + m * v.head_dim + 16 * (c + w);
      store(to, load(to) + E::value(acc[w][m]) * rows.factor[m]);
    }
}
template <class E, int MR>
__attribute__((noinline)) void add_values(const BlockPages<E>& v, Rows<E> rows, float* out) {
  constexpr int W = vectors(MR);
  const int64_t all = v.head_dim / 16;
  int64_t c = 0;
  for (; c + W <= all; c += W) add_vectors<E, MR, W>(v, rows, c, out);
  for (; c < all; ++c) add_vectors<E, MR, 1>(v, rows, c, out);
}

// Calls f(constant MR) for the rows of [0, rows) in chunks of at most kChunk.
template <int MR = kChunk, class F>
QJAX_INLINE void row_chunks(int rows, F&& f) {
  int row = 0;
  for (; row + MR <= rows; row += MR) f(std::integral_constant<int, MR>{}, row);
  if constexpr (MR > 1) {
    if (row < rows)
      row_chunks<MR - 1>(rows - row, [&](auto mr, int r) QJAX_INLINED { f(mr, row + r); });
  }
}

template <class E>
void score_all(const BlockPages<E>& k, const Rows<E>& q, int rows, float* scores) {
  row_chunks(rows, [&](auto mr, int r) {
    const Rows<E> some{q.x + r * q.stride, q.stride, q.start + r, q.factor + r};
    score_keys<E, mr>(k, some, scores + r * kBlockKeys);
  });
}
template <class E>
void add_all(const BlockPages<E>& v, const Rows<E>& p, int rows, float* out) {
  row_chunks(rows, [&](auto mr, int r) {
    const Rows<E> some{p.x + r * p.stride, p.stride, p.start + r, p.factor + r};
    add_values<E, mr>(v, some, out + r * v.head_dim);
  });
}

}  // namespace qjax

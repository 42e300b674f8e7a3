// What pages of a cache hold, by dtype: how numbers are written to them, and how a block of them
// becomes the operand of a product. Codes, scales and zero points are those of
// kv_update/pages.py; the order inside a page (attention_products.h) is for this library.
#pragma once
#include "attention_products.h"

namespace qjax {

// Where [outer * pack][n] numbers lie that are stored as [outer][n][pack].
QJAX_INLINE int64_t packed_at(int64_t row, int64_t column, int64_t n, int pack) {
  return (row / pack * n + column) * pack + row % pack;
}

// Numbers as they are.
struct PagesF32 {
  using Storage = float;
  static constexpr int pack = 1, offset = 0;
  static constexpr bool scaled = false, shifted = false;
  static constexpr float factor = 1;
  static QJAX_INLINE Storage encode(float x) { return x; }
  static QJAX_INLINE float decode(Storage x) { return x; }
};
struct PagesBF16 {
  using Storage = uint16_t;
  static constexpr int pack = 2, offset = 0;
  static constexpr bool scaled = false, shifted = false;
  static constexpr float factor = 1;
  static QJAX_INLINE Storage encode(float x) { return to_bf16(x); }
  static QJAX_INLINE float decode(Storage x) { return from_bf16(x); }
};

// Floats of 8 bits, read through the float16 that the bits of an e5m2, or of an e4m3 with its
// exponent in a wider field, are; the latter is 2^-8 times the number.
template <int Mantissa>
struct PagesFloat8 {
  using Storage = uint8_t;
  static constexpr int pack = kPackFloat8, offset = 0;
  static constexpr bool scaled = false, shifted = false;
  static constexpr float factor = Mantissa == 3 ? 256 : 1;
  static Storage encode(float x) {
    constexpr int least = Mantissa == 3 ? -6 : -14;  // exponent of the smallest normal number
    constexpr float top = Mantissa == 3 ? 448 : 57344;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const int sign = int(bits >> 31) << 7;
    if (x != x) return Storage(sign | 0x7f);
    const float size = std::min(std::fabs(x), top);
    std::memcpy(&bits, &size, 4);
    const int exponent = std::max(int(bits >> 23) - 127, least);
    // In quanta, which a sum with 1.5 * 2^23 rounds to a whole number, halves to the even one.
    const float quanta = size * power_of_two(Mantissa - exponent);
    const int count = int((quanta + 12582912.0f) - 12582912.0f);
    return Storage(sign | (((exponent - least) << Mantissa) + count));
  }
  static float decode(Storage x) {
    const uint32_t word = uint32_t(x) << 8;
    if (Mantissa == 2) return half_to_float(uint16_t(word));
    if ((x & 0x7f) == 0x7f) return half_to_float(0x7e00);  // NaN
    return half_to_float(uint16_t((word & 0x8000) | (word >> 1 & 0x3f80)));
  }
#if defined(__AVX512VBMI__)
  // 64 codes to bfloat16, byte by byte from tables of those without a sign.
  static QJAX_INLINE void bf16_64(const Storage* from, uint16_t* to) {
    const __m512i codes = _mm512_loadu_si512(from);
    const __m512i low = _mm512_permutex2var_epi8(table.low(0), codes, table.low(64));
    __m512i high = _mm512_permutex2var_epi8(table.high(0), codes, table.high(64));
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);  // a | (b & c)
    _mm512_storeu_si512(to, _mm512_permutex2var_epi8(low, table.order(0), high));
    _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi8(low, table.order(64), high));
  }
  struct Table {
    uint8_t bytes[3][128];
    Table() {
      for (int code = 0; code < 128; ++code) {
        const uint16_t value = to_bf16(decode(Storage(code)));
        bytes[0][code] = uint8_t(value);
        bytes[1][code] = uint8_t(value >> 8);
        bytes[2][code] = uint8_t(code / 2 + code % 2 * 64);  // low and high bytes in turns
      }
    }
    QJAX_INLINE __m512i low(int first) const { return _mm512_loadu_si512(bytes[0] + first); }
    QJAX_INLINE __m512i high(int first) const { return _mm512_loadu_si512(bytes[1] + first); }
    QJAX_INLINE __m512i order(int first) const { return _mm512_loadu_si512(bytes[2] + first); }
  };
  static inline const Table table;
#elif defined(__AVX512F__)
  // Float16 of 32, or 16, codes in words whose upper halves have the sign in all bits.
  static QJAX_INLINE __m512i halves(__m512i words) {
    if (Mantissa == 2) return _mm512_slli_epi16(words, 8);
    const __m512i low = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(low, _mm512_set1_epi16(0x7f));
    const __m512i half =
        _mm512_and_si512(_mm512_slli_epi16(words, 7), _mm512_set1_epi16(int16_t(0xbf80)));
    return _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
  }
  static QJAX_INLINE void f32_32(const Storage* from, float* to) {
    const __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i half = halves(words);
    store(to, (v16f)_mm512_cvtph_ps(_mm512_castsi512_si256(half)));
    store(to + 16, (v16f)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)));
  }
#endif
};
using PagesE4M3 = PagesFloat8<3>;
using PagesE5M2 = PagesFloat8<2>;

// Codes with a scale for each token and head.
struct PagesInt8 {
  using Storage = uint8_t;
  static constexpr int pack = kPackInt, offset = 128;  // a code is stored with 128 added
  static constexpr bool scaled = true, shifted = false;
  static constexpr float factor = 1;
  static QJAX_INLINE float decode(Storage x) { return float(int(x) - offset); }
};
// And a zero point. Channel c shares a byte with c + head_dim / 2, so that no two tokens do.
struct PagesInt4 {
  using Storage = uint8_t;
  static constexpr int pack = kPackInt, offset = 0;
  static constexpr bool scaled = true, shifted = true;
  static constexpr float factor = 1;
  static QJAX_INLINE float decode(Storage x) { return float(x); }
};

inline float bf16_above(float x) {  // the next bfloat16 at or above x >= 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0xffff) & 0xffff0000;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline float nearest(float x) {  // integer, halves to the even one; |x| < 2^22
  return (x + 12582912.0f) - 12582912.0f;
}
QJAX_INLINE float clipped(float x, float low, float high) {  // NaN: low
  return x > low ? (x < high ? x : high) : low;
}

// The parts of one head of one page, and how to put the token of a slot there.
template <class P>
struct HeadOfPage {
  typename P::Storage* values;
  uint16_t* scale;
  int8_t* zero;
  int64_t page_size, head_dim;

  int64_t at(bool keys, int64_t slot, int64_t channel, int64_t channels) const {
    return keys ? packed_at(channel, slot, page_size, P::pack)
                : packed_at(slot, channel, channels, P::pack);
  }
  // x [head_dim], in units of the cache's own scale; may be changed.
  void put(bool keys, int64_t slot, float* x) const {
    const int64_t d = head_dim;
    if constexpr (!P::scaled) {
      for (int64_t c = 0; c < d; ++c) values[at(keys, slot, c, d)] = P::encode(x[c]);
      return;
    } else {
      v16f bottom = load(x), top = bottom;
      for (int64_t c = 16; c < d; c += 16) {
        bottom = vmin(bottom, load(x + c));
        top = vmax(top, load(x + c));
      }
      const float low = -max(-bottom), high = max(top), most = std::max(-low, high);
      const float middle = (low + high) * 0.5f;
      const float width = std::max((high - low) / 15, std::fabs(middle) * (16.0f / 127));
      const float step = bf16_above(P::shifted ? width : most / 127);
      const float divisor = step == 0 ? 1 : step;
      scale[slot] = to_bf16(step);
      if constexpr (P::shifted) {
        const float start = nearest(middle / divisor * 16) / 16;
        v16f off = {};
        for (int64_t c = 0; c < d; c += 16) {
          const v16f steps = load(x + c) / divisor + 7.5f;
          v16f codes = ((steps - start) + 12582912.0f) - 12582912.0f;
          codes = vmin(vmax(codes, v16f{}), v16f{} + 15.0f);  // NaN: 0
          off += steps - codes;
          store(x + c, codes);
        }
        zero[slot] = int8_t(clipped(nearest(sum(off) / float(d) * 16), -128, 127));
        for (int64_t c = 0; c < d / 2; ++c)
          values[at(keys, slot, c, d / 2)] = uint8_t(int(x[c]) | int(x[c + d / 2]) << 4);
      } else {
        for (int64_t c = 0; c < d; c += 16) {
          const v16f codes = load(x + c) / divisor;
          store(x + c, (codes + 12582912.0f) - 12582912.0f);
        }
        for (int64_t c = 0; c < d; ++c)
          values[at(keys, slot, c, d)] = uint8_t(int(clipped(x[c], -127, 127)) + P::offset);
      }
    }
  }
};

// Bytes of two codes to bytes of one: `runs` runs of 2 * half codes, the second half from the upper
// four bits. `half` is a multiple of 32, or of 8 where nothing is packed.
inline void expand_nibbles(const uint8_t* from, int64_t runs, int64_t half, uint8_t* to) {
  for (int64_t r = 0; r < runs; ++r, from += half, to += 2 * half)
    for (int64_t i = 0; i < half; ++i) {
      to[i] = from[i] & 15;
      to[half + i] = from[i] >> 4;
    }
}

// The operand of a product with arithmetic E from one page of one head: [outer][n][pack], where
// outer * pack is head_dim and n page_size of keys, and the other way round of values. `to` has room
// for page_size * head_dim numbers and `bytes` for as many bytes; what needs no change stays.
template <class E, class P>
const typename E::Storage* operand(const typename P::Storage* from, bool keys, int64_t page_size,
                                   int64_t head_dim, typename E::Storage* to, uint8_t* bytes) {
  const int64_t total = page_size * head_dim;
  if constexpr (P::shifted) {
    uint8_t* codes = bytes;
    if constexpr (sizeof(*to) == 1) codes = to;
    if (keys) expand_nibbles(from, 1, total / 2, codes);
    else expand_nibbles(from, page_size / P::pack, head_dim / 2 * P::pack, codes);
    from = codes;
  }
  if constexpr (std::is_same_v<typename E::Storage, typename P::Storage> && E::pack == P::pack) {
    return from;
  } else {
    // page_size and head_dim are multiples of 16
#if defined(__AVX512VBMI__)
    if constexpr (!P::scaled && sizeof(typename P::Storage) == 1 && sizeof(*to) == 2) {
      for (int64_t i = 0; i < total; i += 64) P::bf16_64(from + i, to + i);
      return to;
    } else
#elif defined(__AVX512F__)
    if constexpr (!P::scaled && sizeof(typename P::Storage) == 1 && P::pack == E::pack) {
      for (int64_t i = 0; i < total; i += 32) P::f32_32(from + i, to + i);
      return to;
    } else
#endif
    {
      static_assert(E::pack == 1);
      const int64_t n = keys ? page_size : head_dim, outer = total / n / P::pack;
      for (int64_t o = 0; o < outer; ++o)
        for (int j = 0; j < P::pack; ++j)
          for (int64_t c = 0; c < n; ++c)
            to[(o * P::pack + j) * n + c] = P::decode(from[(o * n + c) * P::pack + j]);
      return to;
    }
  }
}

}  // namespace qjax

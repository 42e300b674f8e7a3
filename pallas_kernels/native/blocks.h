// Types that are expanded before a product, because their codes are not of one width: vectors of a
// grid, digits of base 3. A panel holds their blocks, the fields of each side by side for 16 rows
// (pack_blocks.h). A unit becomes signed bytes as tiles of Q8_0 have them, with float32 scales
// behind, and kernels go on as with Q8_0. In a block of 16 rows:
//
//            header                    each unit, in this order
//   IQ2_XXS  f16 d                     4 bytes of codes, u32 of 4 x 7 signs and a 4-bit scale
//   IQ2_XS   f16 d                     4 words of a 9-bit code and 7 signs, a byte of two scales
//   IQ2_S    f16 d                     4 bytes of codes, u32 of signs, 4 x 2 high bits, two scales
//   IQ3_XXS  f16 d                     8 bytes of codes, u32 as of IQ2_XXS
//   IQ3_S    f16 d, 4 x two scales     8 bytes of codes, u32 of signs, 8 high bits
//   IQ1_S    f16 d                     4 bytes of codes, word of 4 x 3 high bits, scale, delta's sign
//   IQ1_M    4 words of four scales    4 bytes of codes, word of 4 x (3 high bits, delta's sign)
//            and a quarter of d
//   others   f16 d, runs of 4 bytes    nothing
#pragma once
#include "scales.h"

namespace qjax {

// A grid as Python hands it over (native/grids.py) before it makes tiles. Nibble n of an entry is
// the level of column {0, 2, 1, 3}[n]; in vectors of 8 its upper two bits are that of the column 4
// further on.
struct Grid {
  alignas(64) uint16_t entries[2048];
  alignas(16) uint8_t levels[2][16];  // the signed bytes of nibbles, of the first and the last four
  int count = 0;
};
enum GridName : int { kGridIQ1, kGridIQ2XXS, kGridIQ2XS, kGridIQ2S, kGridIQ3XXS, kGridIQ3S, kGrids };
inline Grid grids[kGrids];

constexpr int grid_of(QType type) {
  switch (type) {
    case IQ1_S: case IQ1_M: return kGridIQ1;
    case IQ2_XXS: return kGridIQ2XXS;
    case IQ2_XS: return kGridIQ2XS;
    case IQ2_S: return kGridIQ2S;
    case IQ3_XXS: return kGridIQ3XXS;
    case IQ3_S: return kGridIQ3S;
    default: return -1;
  }
}

constexpr int grid_entries(QType t) {
  return t == IQ2_XXS || t == IQ3_XXS ? 256 : t == IQ2_XS || t == IQ3_S ? 512 : t == IQ2_S ? 1024
         : 2048;
}
constexpr bool is_iq1(QType t) { return t == IQ1_S || t == IQ1_M; }
constexpr bool is_iq3(QType t) { return t == IQ3_XXS || t == IQ3_S; }
// Whether seven signs are stored and the eighth makes their number even.
constexpr bool seven_signs(QType t) { return t == IQ2_XXS || t == IQ2_XS || t == IQ3_XXS; }
constexpr int signs_at(QType t) { return is_iq3(t) ? 128 : 64; }  // the u32, in a unit

// Bytes of a header and of a unit, per row.
constexpr int head_row(QType t) {
  return t == IQ1_M ? 8 : t == IQ3_S ? 6 : t == TQ1_0 ? 54 : t == TQ2_0 ? 66
         : t == Q1_0 || t == Q2_0 ? 18 : 2;
}
constexpr int unit_row(QType t) {
  return t == IQ2_XXS ? 8 : t == IQ2_XS ? 9 : t == IQ2_S ? 10 : t == IQ3_XXS ? 12 : t == IQ3_S ? 13
         : is_iq1(t) ? 6 : 0;
}
constexpr int kRuns = 32;  // where runs begin in a header

// Where TQ1_0 has columns 4i to 4i + 3 of unit u: a run of four bytes, and a digit of each.
constexpr int ternary_run(int u, int i) {
  return u < 5 ? i : u < 7 || i < 4 ? 8 + i % 4 : 12;
}
constexpr int ternary_digit(int u, int i) {
  return u < 5 ? u : u < 7 ? 2 * (u - 5) + i / 4 : i < 4 ? 4 : i - 4;
}
constexpr int kPowersOf3[5] = {1, 3, 9, 27, 81};

// ---- scales --------------------------------------------------------------------------------

QJAX_INLINE v16i ints8(const uint8_t* p) { return widened<uint8_t>(p); }
QJAX_INLINE v16i ints16(const uint8_t* p) { return widened<uint16_t>(p); }
QJAX_INLINE v16i ints32(const uint8_t* p) { return load_ints(p); }
QJAX_INLINE v16f odd_number(v16i scale, float factor) {
  return to_float(2 * scale + 1) * factor;
}

// Of (half) unit g of unit u of a block.
QJAX_INLINE v16f expanded_scale(const Traits& t, const uint8_t* head, const uint8_t* unit, int u,
                                int g) {
  switch (t.type) {
    case IQ2_XXS: return half16(head) * odd_number(ints32(unit + 64) >> 28 & 15, 0.125f);
    case IQ2_XS: return half16(head) * odd_number(ints8(unit + 128) >> (4 * g) & 15, 0.125f);
    case IQ2_S: return half16(head) * odd_number(ints8(unit + 144) >> (4 * g) & 15, 0.125f);
    case IQ3_XXS: return half16(head) * odd_number(ints32(unit + 128) >> 28 & 15, 0.25f);
    case IQ3_S:
      return half16(head) * odd_number(ints8(head + 32 + 16 * (u / 2)) >> (4 * (u % 2)) & 15, 1.0f);
    case IQ1_S: return half16(head) * odd_number(ints16(unit + 64) >> 12 & 7, 0.125f);
    case IQ1_M: {
      const int group = 2 * u + g;
      v16i bits = {};
      for (int i = 0; i < 4; ++i) bits |= ints16(head + 32 * i) >> 12 << (4 * i);
      int32_t wide[16];
      uint16_t d[16];
      std::memcpy(wide, &bits, 64);
      for (int i = 0; i < 16; ++i) d[i] = uint16_t(wide[i]);
      return half16(reinterpret_cast<const uint8_t*>(d)) *
             odd_number(ints16(head + 32 * (group / 4)) >> (3 * (group % 4)) & 7, 0.125f);
    }
    default: return half16(head);
  }
}

// ---- codes ---------------------------------------------------------------------------------

#if defined(__AVX512BW__)

// Entries, one of N, of 32 codes.
template <int N>
QJAX_INLINE __m512i look_up(const uint16_t* entries, __m512i codes) {
  if constexpr (N == 64) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(entries), codes,
                                     _mm512_load_si512(entries + 32));
  } else {
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(N / 2));
    return _mm512_mask_blend_epi16(upper, look_up<N / 2>(entries, codes),
                                   look_up<N / 2>(entries + N / 2, codes));
  }
}
// Byte l of each 32 bits, four times.
QJAX_INLINE __m512i repeat_byte(__m512i v, int l) {
  return _mm512_shuffle_epi8(
      v, _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)),
                         _mm512_set1_epi8(char(l))));
}
// For rows 0..15 the field of group 2p, each of `step` bits, then that of group 2p + 1, from bit 8 on.
QJAX_INLINE __m512i high_bits(__m256i rows, int p, int step, int mask) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(rows), rows, 1);
  const __m512i count = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi16(2 * p * step)),
                                           _mm256_set1_epi16((2 * p + 1) * step), 1);
  return _mm512_slli_epi16(_mm512_and_si512(_mm512_srlv_epi16(both, count), _mm512_set1_epi16(mask)),
                           8);
}

template <QType T>
inline void expand(const uint8_t* head, const uint8_t* unit, int u, uint8_t* out) {
  if constexpr (T == TQ1_0) {
    for (int i = 0; i < 8; ++i) {
      const __m512i v = _mm512_loadu_si512(head + kRuns + 64 * ternary_run(u, i));
      const __m512i power = _mm512_set1_epi16(int16_t(kPowersOf3[ternary_digit(u, i)]));
      const __m512i low = _mm512_set1_epi16(255);
      // Bytes times the power, each modulo 256: how far into its third of 256 a byte then is, does
      // not matter.
      const __m512i odd = _mm512_mullo_epi16(_mm512_andnot_si512(low, v), power);
      const __m512i rest =
          _mm512_or_si512(_mm512_and_si512(_mm512_mullo_epi16(v, power), low), odd);
      const __m512i one = _mm512_set1_epi8(1);
      __m512i byte = _mm512_set1_epi8(-1);
      byte = _mm512_mask_add_epi8(
          byte, _mm512_cmpge_epu8_mask(rest, _mm512_set1_epi8(char(86))), byte, one);
      byte = _mm512_mask_add_epi8(
          byte, _mm512_cmpge_epu8_mask(rest, _mm512_set1_epi8(char(171))), byte, one);
      _mm512_storeu_si512(out + 64 * i, byte);
    }
  } else if constexpr (T == TQ2_0 || T == Q2_0) {
    for (int i = 0; i < 8; ++i) {
      __m512i code;
      if constexpr (T == TQ2_0) {
        const __m512i run = _mm512_loadu_si512(head + kRuns + 64 * (u / 4 * 8 + i));
        code = _mm512_srli_epi32(run, 2 * (u % 4));
      } else {
        // A byte has the four columns.
        const __m512i run = _mm512_loadu_si512(head + kRuns + 64 * (2 * u + i / 4));
        const __m512i byte =
            _mm512_and_si512(_mm512_srli_epi32(run, 8 * (i % 4)), _mm512_set1_epi32(255));
        const __m512i two = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 6));
        code = _mm512_or_si512(two, _mm512_slli_epi32(two, 12));
      }
      code = _mm512_and_si512(code, _mm512_set1_epi8(3));
      _mm512_storeu_si512(out + 64 * i, _mm512_sub_epi8(code, _mm512_set1_epi8(1)));
    }
  } else if constexpr (T == Q1_0) {
    const __m512i run = _mm512_loadu_si512(head + kRuns + 64 * u);
    for (int i = 0; i < 8; ++i) {
      const __m512i bit = _mm512_set1_epi32(i % 2 ? int(0x80402010) : 0x08040201);
      const __mmask64 positive = _mm512_test_epi8_mask(repeat_byte(run, i / 2), bit);
      _mm512_storeu_si512(out + 64 * i, _mm512_mask_blend_epi8(positive, _mm512_set1_epi8(-1),
                                                               _mm512_set1_epi8(1)));
    }
  } else {
    const Grid& grid = grids[grid_of(T)];
    const __m512i first = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)grid.levels[0]));
    const __m512i last = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)grid.levels[1]));
    __m512i signs = _mm512_setzero_si512();  // of 8 columns, a byte; of iq1 those of the deltas
    if constexpr (T == IQ2_XXS || T == IQ3_XXS) {
      const __m512i v = _mm512_loadu_si512(unit + signs_at(T));
      signs = _mm512_and_si512(v, _mm512_set1_epi32(0x7f));
      auto field = [&](__m512i shifted, int mask) QJAX_INLINED {
        signs = _mm512_ternarylogic_epi32(signs, shifted, _mm512_set1_epi32(mask), 0xf8);
      };
      field(_mm512_slli_epi32(v, 1), 0x7f00);
      field(_mm512_slli_epi32(v, 2), 0x7f0000);
      field(_mm512_slli_epi32(v, 3), 0x7f000000);
    } else if constexpr (T == IQ2_S || T == IQ3_S) {
      signs = _mm512_loadu_si512(unit + signs_at(T));
    } else if constexpr (is_iq1(T)) {
      signs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(unit + 64)));
    } else {
      // Signs of IQ2_XS above its codes, from words to bytes.
      auto group = [&](int l) QJAX_INLINED {
        return _mm512_srli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(unit + 32 * l))), 9);
      };
      signs = _mm512_or_si512(
          _mm512_or_si512(group(0), _mm512_slli_epi32(group(1), 8)),
          _mm512_or_si512(_mm512_slli_epi32(group(2), 16), _mm512_slli_epi32(group(3), 24)));
    }
    if constexpr (seven_signs(T)) {
      __m512i parity = _mm512_xor_si512(signs, _mm512_srli_epi16(signs, 4));
      parity = _mm512_xor_si512(parity, _mm512_srli_epi16(parity, 2));
      parity = _mm512_xor_si512(parity, _mm512_srli_epi16(parity, 1));
      signs = _mm512_ternarylogic_epi32(signs, _mm512_slli_epi16(parity, 7),
                                        _mm512_set1_epi8(char(0x80)), 0xf8);
    }
    auto put = [&](int i, __m512i bytes, int l) QJAX_INLINED {
      if constexpr (is_iq1(T)) {
        const __mmask16 down = _mm512_test_epi32_mask(
            signs, _mm512_set1_epi32(T == IQ1_S ? 0x8000 : 8 << (4 * l)));
        bytes = _mm512_add_epi8(bytes, _mm512_mask_blend_epi32(down, _mm512_set1_epi8(1),
                                                               _mm512_set1_epi8(-1)));
      } else {
        const __m512i bit = _mm512_set1_epi32(i % 2 ? int(0x80402010) : 0x08040201);
        const __mmask64 negative = _mm512_test_epi8_mask(repeat_byte(signs, l), bit);
        bytes = _mm512_mask_sub_epi8(bytes, negative, _mm512_setzero_si512(), bytes);
      }
      _mm512_storeu_si512(out + 64 * i, bytes);
    };
    auto row_bytes = [&](int at) QJAX_INLINED {
      return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(unit + at)));
    };
#pragma GCC unroll 4
    for (int p = 0; p < (is_iq3(T) ? 4 : 2); ++p) {
      __m512i codes;
      if constexpr (T == IQ2_XS)
        codes = _mm512_and_si512(_mm512_loadu_si512(unit + 64 * p), _mm512_set1_epi16(511));
      else
        codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(unit + 32 * p)));
      __m512i high = _mm512_setzero_si512();
      if constexpr (T == IQ2_S) high = high_bits(row_bytes(128), p, 2, 3);
      if constexpr (T == IQ3_S) high = high_bits(row_bytes(192), p, 1, 1);
      if constexpr (is_iq1(T))
        high = high_bits(_mm256_loadu_si256((const __m256i*)(unit + 64)), p, T == IQ1_S ? 3 : 4, 7);
      const __m512i entries =
          look_up<grid_entries(T)>(grid.entries, _mm512_or_si512(codes, high));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m512i word = _mm512_cvtepu16_epi32(
            h ? _mm512_extracti64x4_epi64(entries, 1) : _mm512_castsi512_si256(entries));
        // (word | word << 12) & mask: a nibble a byte
        const __m512i nibbles = _mm512_ternarylogic_epi32(word, _mm512_slli_epi32(word, 12),
                                                          _mm512_set1_epi8(15), 0xa8);
        const int at = 2 * p + h;
        if constexpr (is_iq3(T)) {
          put(at, _mm512_shuffle_epi8(first, nibbles), p);
        } else {
          put(2 * at, _mm512_shuffle_epi8(first, nibbles), at);
          put(2 * at + 1, _mm512_shuffle_epi8(last, nibbles), at);
        }
      }
    }
  }
}

#else

template <class Int>
inline int number_at(const uint8_t* p, int index) {
  Int value;
  std::memcpy(&value, p + index * sizeof(Int), sizeof(Int));
  return int(value);
}

template <QType T>
inline void expand(const uint8_t* head, const uint8_t* unit, int u, uint8_t* out) {
  if constexpr (T == TQ1_0) {
    for (int i = 0; i < 8; ++i) {
      const uint8_t* run = head + kRuns + 64 * ternary_run(u, i);
      const int power = kPowersOf3[ternary_digit(u, i)];
      for (int b = 0; b < 64; ++b) {
        const uint8_t rest = uint8_t(run[b] * power);
        out[64 * i + b] = uint8_t((rest * 3 >> 8) - 1);
      }
    }
  } else if constexpr (grid_of(T) < 0) {
    for (int c = 0; c < 32; ++c)
      for (int r = 0; r < 16; ++r) {
        // Byte b of the block of row r.
        auto byte = [&](int b) { return head[kRuns + 64 * (b / 4) + 4 * r + b % 4]; };
        const int code = T == TQ2_0 ? byte(32 * (u / 4) + c) >> (2 * (u % 4)) & 3
                         : T == Q2_0 ? byte(8 * u + c / 4) >> (2 * (c % 4)) & 3
                                     : 2 * (byte(4 * u + c / 8) >> (c % 8) & 1);
        out[64 * (c / 4) + 4 * r + c % 4] = uint8_t(code - 1);
      }
  } else {
    const Grid& grid = grids[grid_of(T)];
    constexpr int size = is_iq3(T) ? 4 : 8;
    for (int v = 0; v < 32 / size; ++v)
      for (int r = 0; r < 16; ++r) {
        const int l = v * size / 8;  // of 8 columns
        int code = unit[16 * v + r], signs = 0;
        if constexpr (T == IQ2_XS) {
          const int word = number_at<uint16_t>(unit, 16 * v + r);
          code = word & 511;
          signs = word >> 9;
        }
        if constexpr (T == IQ2_S) code |= (unit[128 + r] >> (2 * l) & 3) << 8;
        if constexpr (T == IQ3_S) code |= (unit[192 + r] >> v & 1) << 8;
        if constexpr (T == IQ2_XXS || T == IQ3_XXS)
          signs = number_at<uint32_t>(unit + signs_at(T), r) >> (7 * l) & 127;
        if constexpr (T == IQ2_S || T == IQ3_S) signs = unit[signs_at(T) + 4 * r + l];
        int delta = 0;
        if constexpr (is_iq1(T)) {
          const int word = number_at<uint16_t>(unit + 64, r);
          code |= (word >> ((T == IQ1_S ? 3 : 4) * l) & 7) << 8;
          delta = (T == IQ1_S ? word >> 15 : word >> (4 * l + 3) & 1) ? -1 : 1;
        }
        if constexpr (seven_signs(T)) {
          const int folded = signs ^ signs >> 4;
          signs |= (0x6996 >> (folded & 15) & 1) << 7;
        }
        for (int c = 0; c < size; ++c) {
          constexpr int nibble[4] = {0, 2, 1, 3};
          const int level = grid.entries[code] >> (4 * nibble[c % 4]) & 15;
          const int byte = grid.levels[c / 4][level];
          const bool negative = signs >> (v * size % 8 + c) & 1;
          out[64 * ((v * size + c) / 4) + 4 * r + c % 4] =
              uint8_t(negative ? -byte : byte + delta);
        }
      }
  }
}

#endif

// Unit `u` of a panel: 512 bytes, then scales. Not inlined, as kernels for 1 to 8 rows all call it.
constexpr int kExpandedBytes = 512 + 2 * 64;
template <int T>
__attribute__((noinline)) void expand_unit(const uint8_t* panel, int64_t u, uint8_t* buffer) {
  constexpr const Traits& t = kTraits[T];
  constexpr int per_block = t.raw_elems / 32;
  const int own = int(u % per_block);
  const uint8_t* head = panel + u / per_block * 16 * t.raw_bytes;
  const uint8_t* unit = head + 16 * (head_row(t.type) + own * unit_row(t.type));
  // This unit's share of the next block.
  constexpr int lines = t.raw_bytes / per_block / 4 + 1;
  for (int line = 0; line < lines; ++line)
    __builtin_prefetch(head + 16 * t.raw_bytes + 64 * (lines * own + line), 0, 3);
  expand<t.type>(head, unit, own, buffer);
  for (int g = 0; g < t.groups; ++g)
    store(reinterpret_cast<float*>(buffer + t.code_bytes()) + 16 * g,
          expanded_scale(t, head, unit, own, g));
}

// A unit that kernels read, and where it lies.
struct UnitAt {
  View view;
  int64_t u;
};

// Unit `u` of a panel; one of blocks is expanded into `buffer` [kExpandedBytes].
template <int T>
QJAX_INLINE UnitAt unit_at(const View& view, int64_t u, uint8_t* buffer) {
  if constexpr (kTraits[T].scale != kExpanded) return {view, u};
  else return expand_unit<T>(view.tiles, u, buffer), UnitAt{{buffer}, 0};
}

}  // namespace qjax

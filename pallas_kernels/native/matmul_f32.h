// Exact products: the weight panel is decoded to float32 and multiplied in float32.
#pragma once
#include "blocks.h"

namespace qjax {

#if defined(__AVX512F__)
constexpr int kTileF32 = 12;  // rows of x that share one read of the panel
#else
constexpr int kTileF32 = 4;
#endif

// Codes of 16 rows, of the column whose byte is `b` in quad `i` of a unit.
template <int T>
QJAX_INLINE v16i column_codes(const uint8_t* unit, int i, int b) {
  constexpr const Traits& t = kTraits[T];
  if constexpr (t.base == 8) return (ints32(unit + 64 * i) >> (8 * b) & 255) ^ 128;
  // Of a plane of so many bits that starts at vector `first`.
  auto plane = [&](int first, int bits) QJAX_INLINED {
    const int fields = 8 / bits;
    const v16i vector = ints32(unit + 64 * (first + i / fields));
    return vector >> (8 * b + i % fields * bits) & ((1 << bits) - 1);
  };
  v16i codes = plane(0, t.base);
  if constexpr (t.high > 0) codes |= plane(t.base, t.high) << t.base;
  return codes;
}

// Columns c to c + 3 (c a multiple of 4) of an 8-bit float type; e4m3 without its factor 2 ** 8.
template <QType T>
QJAX_INLINE void small_floats(const uint8_t* unit, int c, v16f (&w)[4]) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_loadu_si512(unit + 16 * c);
  __m512i even, odd;  // columns c and c + 2, c + 1 and c + 3 as float16
  if constexpr (T == E5M2) {
    even = _mm512_slli_epi16(bytes, 8);
    odd = _mm512_and_si512(bytes, _mm512_set1_epi16(int16_t(0xff00)));
  } else {
    // A signed byte times 128 is its sign, the sign again, and the other bits. (A product, because
    // the units that shift also convert, and have enough to do.)
    const __m512i without_second_sign = _mm512_set1_epi16(int16_t(0xbf80));
    even = _mm512_and_si512(_mm512_maddubs_epi16(_mm512_set1_epi16(128), bytes), without_second_sign);
    odd = _mm512_and_si512(_mm512_srai_epi16(bytes, 1), without_second_sign);
  }
  w[0] = (v16f)_mm512_cvtph_ps(_mm512_castsi512_si256(even));
  w[1] = (v16f)_mm512_cvtph_ps(_mm512_castsi512_si256(odd));
  w[2] = (v16f)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1));
  w[3] = (v16f)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
#else
  for (int pair = 0; pair < 2; ++pair) {
    uint16_t even[16], odd[16];  // as float16
    for (int r = 0; r < 16; ++r) {
      uint16_t both;
      std::memcpy(&both, unit + 16 * c + 32 * pair + 2 * r, 2);
      if constexpr (T == E5M2) {
        even[r] = uint16_t(both << 8);
        odd[r] = uint16_t(both & 0xff00);
      } else {
        even[r] = uint16_t((both << 8 & 0x8000) | (both << 7 & 0x3f80));
        odd[r] = uint16_t((both & 0x8000) | (both >> 1 & 0x3f80));
      }
    }
    w[2 * pair] = half16(reinterpret_cast<const uint8_t*>(even));
    w[2 * pair + 1] = half16(reinterpret_cast<const uint8_t*>(odd));
  }
#endif
}
template <QType T>
constexpr float kSmallFloatFactor = T == E4M3 ? 256.0f : 1.0f;

// What the codes of unit `u` stand for before they are scaled, [32 columns][16 rows].
template <int T>
QJAX_INLINE void unit_values(const View& view, int64_t u, float* out) {
  constexpr const Traits& t = kTraits[T];
  if constexpr (t.small_float()) {
    const uint8_t* unit = view.tiles + unit_offset(t, u);
    for (int c = 0; c < 32; c += 4) {
      v16f w[4];
      small_floats<t.type>(unit, c, w);
      for (int i = 0; i < 4; ++i) store(out + 16 * (c + i), w[i] * kSmallFloatFactor<t.type>);
    }
  } else {
    const uint8_t* unit = view.tiles + unit_offset(t, u);
    alignas(64) float values[16] = {};
    const float* table = values;
    if constexpr (t.lookup == kCodebook) table = view.beside->codebook;
    else if constexpr (t.lookup != kNoLookup)
      for (int i = 0; i < 16; ++i)
        values[i] = float((t.lookup == kIQ4 ? kIQ4Codes : kFP4Codes)[i]) - float(t.zero);
    const Table16 look_up(table);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const v16i codes = column_codes<T>(unit, i, b);
        float* to = out + 16 * (4 * i + b);
        if constexpr (t.lookup != kNoLookup) store(to, look_up[codes]);
        else store(to, to_float(codes) - float(t.zero));
      }
  }
}

// Rounds to nearest, ties to even, to float16 or bfloat16, within their range.
template <bool kHalf>
QJAX_INLINE void round_values(float* values, int64_t count) {
  constexpr uint32_t kept = kHalf ? 13 : 16;  // the bits below are rounded away
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, 4);
    bits += (1u << (kept - 1)) - 1 + (bits >> kept & 1);
    bits &= ~0u << kept;
    float normal;
    std::memcpy(&normal, &bits, 4);
    // Subnormal float16 are multiples of 2 ** -24, as are all floats next to 0.75.
    const float small = (values[i] + 0.75f) - 0.75f;
    values[i] = kHalf && std::fabs(values[i]) < 0x1p-14f ? small : normal;
  }
}

// Weights of a whole panel as float32 [32 * units][16], each rounded as the format says.
template <int T>
void decode_f32(const View& view, int64_t k, float* w) {
  constexpr const Traits& t = kTraits[T];
  const int64_t units = units_of(k);
  if constexpr (t.dense()) {
    for (int64_t c = 0; c < 32 * units; ++c) {
      const uint8_t* p = view.tiles + c * 2 * t.base;
      store(w + 16 * c, t.type == F32 ? load(reinterpret_cast<const float*>(p))
                        : t.type == F16 ? half16(p) : bf16_16(p));
    }
  } else {
    alignas(64) uint8_t expanded[kExpandedBytes];
    for (int64_t u = 0; u < units; ++u) {
      float* values = w + 512 * u;
      const UnitAt at = unit_at<T>(view, u, expanded);
      unit_values<T>(at.view, at.u, values);
      for (int g = 0; g < t.groups; ++g) {
        const GroupScale gs = group_scale(t, at.view, at.u, g);
        v16f zero = {};
        if (t.beside()) zero = load(view.scales.at(u * t.groups + g) + 32);
        for (int c = 32 / t.groups * g; c < 32 / t.groups * (g + 1); ++c) {
          const v16f value = load(values + 16 * c);
          if constexpr (t.scale == kBesideZ) {
            if (view.beside->additive) {
              v16f product = (value - view.beside->offset) * gs.s;
              asm volatile("" : "+m"(product));  // rounded before the sum
              store(values + 16 * c, product + zero);
            } else {
              store(values + 16 * c, (value - zero) * gs.s);
            }
          } else {
            store(values + 16 * c, t.has_min() ? gs.s * value + gs.b : gs.s * value);
          }
        }
      }
      if constexpr (t.beside()) {
        if (view.beside->rounded == kToHalf) round_values<true>(values, 512);
        if (view.beside->rounded == kToBF16) round_values<false>(values, 512);
      }
    }
  }
}

using DecodeF32 = void (*)(const View&, int64_t, float*);
template <int... T>
constexpr DecodeF32 decode_table(int index, std::integer_sequence<int, T...>) {
  constexpr DecodeF32 table[] = {decode_f32<T>...};
  return table[index];
}
constexpr int kNumTraits = sizeof(kTraits) / sizeof(kTraits[0]);
inline DecodeF32 decode_f32_for(const Traits* t) {
  return decode_table(int(t - kTraits), std::make_integer_sequence<int, kNumTraits>{});
}

#if defined(__AVX512F__)
// Rows of x against small floats or a codebook. A scale is applied to the sums of its columns, which
// are two, of the even and of the odd ones, so that one need not wait for the other. With few rows,
// codes go from memory through registers into the product; with many they are decoded once, to what
// they stand for before they are scaled. Both add in the same order.
constexpr int kTileFused = 8;

template <int T>
void decode_values(const View& view, int64_t k, float* w) {
  constexpr const Traits& t = kTraits[T];
  const int64_t units = units_of(k);
  for (int64_t u = 0; u < units; ++u, w += 512) {
    const uint8_t* unit = view.tiles + unit_offset(t, u);
    if constexpr (t.small_float()) {
      for (int c = 0; c < 32; c += 4) {
        v16f four[4];
        small_floats<t.type>(unit, c, four);
        for (int i = 0; i < 4; ++i) store(w + 16 * (c + i), four[i]);
      }
    } else {
      unit_values<T>(view, u, w);
    }
  }
}

template <int T, bool kDecoded, int MR>
void tile_floats(const View& view, const float* decoded, int64_t k, const float* x, int64_t stride,
                 float (*out)[16]) {
  constexpr const Traits& t = kTraits[T];
  const int64_t units = units_of(k);
  v16f total[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) total[m] = v16f{};
  v16f table = {};
  if constexpr (t.lookup == kCodebook) table = load(view.beside->codebook);
  for (int64_t u = 0; u < units; ++u) {
    const uint8_t* unit = view.tiles + unit_offset(t, u);
    const float* column = x + 32 * u;
    v16f even[MR], odd[MR];
    QJAX_UNROLL for (int m = 0; m < MR; ++m) even[m] = odd[m] = v16f{};
    // Columns c and c + 1.
    auto enter = [&](v16f first, v16f second, int c) QJAX_INLINED {
      QJAX_UNROLL for (int m = 0; m < MR; ++m) {
        even[m] += first * column[m * stride + c];
        odd[m] += second * column[m * stride + c + 1];
      }
    };
    if constexpr (kDecoded) {
      const float* w = decoded + 512 * u;
#pragma GCC unroll 4
      for (int c = 0; c < 32; c += 2) enter(load(w + 16 * c), load(w + 16 * c + 16), c);
    } else {
      fetch_ahead(t, unit);
      if constexpr (t.small_float()) {
#pragma GCC unroll 8
        for (int c = 0; c < 32; c += 4) {
          v16f w[4];
          small_floats<t.type>(unit, c, w);
          enter(w[0], w[1], c);
          enter(w[2], w[3], c + 2);
        }
      } else {
        // Nibble n of a lane of vector j is column 8j + {0, 4, 1, 5, 2, 6, 3, 7}[n].
        constexpr int nibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // of columns 0..7
        for (int j = 0; j < 4; ++j) {
          const __m512i codes = _mm512_loadu_si512(unit + 64 * j);
          auto value = [&](int c) QJAX_INLINED {
            return (v16f)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * nibble[c]),
                                               (__m512)table);
          };
          QJAX_UNROLL for (int c = 0; c < 8; c += 2) enter(value(c), value(c + 1), 8 * j + c);
        }
      }
    }
    const v16f s = group_scale(t, view, u, 0).s;
    QJAX_UNROLL for (int m = 0; m < MR; ++m) total[m] += (even[m] + odd[m]) * s;
  }
  QJAX_UNROLL for (int m = 0; m < MR; ++m)
    store(out[m], t.small_float() ? total[m] * kSmallFloatFactor<t.type> : total[m]);
}

using TileFloats = void (*)(const View&, const float*, int64_t, const float*, int64_t,
                            float (*)[16]);
struct FloatKernels {
  DecodeF32 decode;
  TileFloats fused[kTileFused], decoded[kTileFused];  // [rows - 1]
};
template <int T, int... M>
constexpr FloatKernels float_kernels(std::integer_sequence<int, M...>) {
  if constexpr (kTraits[T].beside() && kTraits[T].only_f32())
    return {decode_values<T>, {tile_floats<T, false, M + 1>...}, {tile_floats<T, true, M + 1>...}};
  else
    return {};
}
template <int... T>
const FloatKernels& float_kernels_at(int index, std::integer_sequence<int, T...>) {
  static constexpr FloatKernels table[] = {
      float_kernels<T>(std::make_integer_sequence<int, kTileFused>{})...};
  return table[index];
}
inline const FloatKernels& float_kernels_for(const Traits* t) {
  return float_kernels_at(int(t - kTraits), std::make_integer_sequence<int, kNumTraits>{});
}
#endif

// out[m][16] = x[m] . w, MR rows of x with a stride of k floats.
template <int MR>
void tile_f32(const float* x, int64_t k, const float* w, float (*out)[16]) {
  v16f acc[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) acc[m] = v16f{};
  for (int64_t c = 0; c < k; ++c) {
    const v16f column = load(w + 16 * c);
    QJAX_UNROLL for (int m = 0; m < MR; ++m) acc[m] += column * x[m * k + c];
  }
  QJAX_UNROLL for (int m = 0; m < MR; ++m) store(out[m], acc[m]);
}
template <int MR = kTileF32>
inline void tile_f32_n(int rows, const float* x, int64_t k, const float* w, float (*out)[16]) {
  if constexpr (MR > 1) {
    if (rows < MR) return tile_f32_n<MR - 1>(rows, x, k, w, out);
  }
  tile_f32<MR>(x, k, w, out);
}

}  // namespace qjax

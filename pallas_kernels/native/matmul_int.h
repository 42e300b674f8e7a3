// Integer products on AVX512-VNNI: activations are rounded to 16 or 8 bits with one scale per 32
// columns, weights stay exact. Per unit of 32 columns and row m of x:
//   y += s * dx * (sum code * xq - zero * sum xq) + b * dx * sum xq
// The zero point enters as the accumulator's start value, so symmetric types pay nothing for it.
//
// 16 bits are two signed bytes, 256 * high + low, which meet the same codes: one product of bytes
// takes four columns, and codes are unpacked once for both.
//
// With 8 bits nearly all of the error comes from a few channels that are much larger than the rest
// of their unit. So what rounding left over of the kExtra units with the largest dx of each row is
// rounded to 8 bits again and multiplied by the same codes.
#pragma once
#include <immintrin.h>

#include <utility>

#include "blocks.h"
#include "rows.h"

namespace qjax {

constexpr int kTileInt = 8;  // rows of x that share one read of the panel
constexpr int kExtra = 2;    // units of a row whose remainder is multiplied too (8-bit only)

// Rows of x in tiles of kTileInt (the last may be shorter, MR rows), rounded.
// Inside a tile everything is [..., MR]: one broadcast serves one row.
struct IntTile {
  const int32_t* q;     // [units * 8 quads of columns][bits / 8][MR], high bytes first
  const float* dx;      // [units][MR]
  const float* xsum;    // [units * groups][MR] dx * sum xq
  const int32_t* neg;   // [units * groups][MR] -sum xq
  const int32_t* unit;  // [extra][MR] which units the extra ones repeat; they follow in the above
};

struct IntRows {
  const int bits;  // 16 or 8
  const int64_t rows, units, all;  // `all` counts the extra units
  int32_t *q, *unit, *neg[2];      // neg and xsum: [0] one group per unit, [1] two
  float *dx, *xsum[2];

  static int64_t extra(int bits, int64_t units) {
    return bits == 16 ? 0 : units < kExtra ? units : kExtra;
  }
  static int64_t words_per_row(int bits, int64_t units) {
    return (units + extra(bits, units)) * (bits + 1 + 3 + 3 + 1);
  }

  IntRows(int bits, int64_t rows, int64_t units, int32_t* memory)
      : bits(bits), rows(rows), units(units), all(units + extra(bits, units)), q(memory) {
    auto take = [&](int64_t n) { return memory += n * rows * all; };
    dx = reinterpret_cast<float*>(take(bits));
    xsum[0] = reinterpret_cast<float*>(take(1));
    xsum[1] = reinterpret_cast<float*>(take(1));
    neg[0] = take(2);
    neg[1] = take(1);
    unit = take(2);
  }
  int tile_rows(int64_t tile) const {
    int64_t left = rows - tile * kTileInt;
    return left < kTileInt ? int(left) : kTileInt;
  }
  IntTile tile(int64_t index, int groups) const {
    const int64_t row = index * kTileInt;
    return {q + row * all * bits, dx + row * all, xsum[groups - 1] + row * all * groups,
            neg[groups - 1] + row * all * groups, unit + row * all};
  }

  // Rounds row `row`, given as float32 padded with zeros to 32 * units.
  void put(int64_t row, const float* x) const {
    const int64_t first = row / kTileInt * kTileInt;
    const int mr = tile_rows(row / kTileInt), m = int(row - first);
    for (int64_t u = 0; u < units; ++u) {
      const __m512 a = _mm512_loadu_ps(x + 32 * u), b = _mm512_loadu_ps(x + 32 * u + 16);
      put_unit(first, mr, m, u, a, b);
    }
    for (int64_t e = units; e < all; ++e) {
      const float* scales = dx + first * all + m;
      int64_t best = -1;
      for (int64_t u = 0; u < units; ++u) {
        bool taken = false;
        for (int64_t other = units; other < e; ++other)
          taken |= unit[first * all + (other - units) * mr + m] == u;
        if (!taken && (best < 0 || scales[u * mr] > scales[best * mr])) best = u;
      }
      unit[first * all + (e - units) * mr + m] = int32_t(best);
      const __m512 scale = _mm512_set1_ps(scales[best * mr]);
      const __m512 inverse = _mm512_set1_ps(scales[best * mr] > 0 ? 1 / scales[best * mr] : 0.0f);
      auto remainder = [&](const float* p) {
        const __m512 v = _mm512_loadu_ps(p);
        const __m512 code = _mm512_cvtepi32_ps(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
        return _mm512_fnmadd_ps(code, scale, v);
      };
      put_unit(first, mr, m, e, remainder(x + 32 * best), remainder(x + 32 * best + 16));
    }
  }

 private:
  static QJAX_INLINE __m256i half_sums(__m512i v) {
    return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  }
  void put_unit(int64_t first, int mr, int m, int64_t u, __m512 a, __m512 b) const {
    const float top = bits == 16 ? kTop16 : 127.0f;
    const float amax = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const float scale = amax / top, inverse = scale > 0 ? 1 / scale : 0.0f;
    const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(inverse)));
    const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b, _mm512_set1_ps(inverse)));
    // Sums of the first and of the second 16 columns.
    const __m256i pairs = _mm256_hadd_epi32(half_sums(qa), half_sums(qb));  // per 128 bits: a a b b
    const __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i both = _mm_hadd_epi32(sums, sums);
    const int32_t sa = _mm_extract_epi32(both, 0), sb = _mm_extract_epi32(both, 1);
    const int64_t at = first * all + u * mr + m, at2 = first * all * 2 + 2 * u * mr + m;
    dx[at] = scale;
    xsum[0][at] = scale * float(sa + sb);
    neg[0][at] = -(sa + sb);
    xsum[1][at2] = scale * float(sa);
    xsum[1][at2 + mr] = scale * float(sb);
    neg[1][at2] = -sa;
    neg[1][at2 + mr] = -sb;
    int32_t* q_out = q + first * all * bits + u * bits * mr + m;
    alignas(64) int32_t words[16];
    auto put_bytes = [&](__m512i first, __m512i second, int32_t* to) {
      _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8(first));
      _mm_store_si128((__m128i*)(to + 4), _mm512_cvtepi32_epi8(second));
    };
    if (bits == 8) {
      put_bytes(qa, qb, words);
      for (int i = 0; i < 8; ++i) q_out[i * mr] = words[i];
      return;
    }
    auto high = [](__m512i v) {
      return _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
    };
    put_bytes(high(qa), high(qb), words);
    put_bytes(qa, qb, words + 8);
    for (int i = 0; i < 8; ++i) {
      q_out[2 * i * mr] = words[i];
      q_out[(2 * i + 1) * mr] = words[8 + i];
    }
  }
};

QJAX_INLINE constexpr int log2_of(int z) { return z <= 1 ? 0 : 1 + log2_of(z / 2); }

// ---- decoding one unit in registers --------------------------------------------------------

// Codes of columns 4i..4i+3 as unsigned bytes.
template <int T, int I>
QJAX_INLINE __m512i quad(const uint8_t* unit) {
  constexpr const Traits& t = kTraits[T];
  auto vector = [&](int i) { return _mm512_loadu_si512(unit + 64 * i); };
  if constexpr (t.base == 8) return _mm512_xor_si512(vector(I), _mm512_set1_epi8(-128));
  // The bits of a plane that starts at vector `first`, at bit `to`; those around them are not 0.
  auto plane = [&](int first, int bits, int to) QJAX_INLINED {
    const int fields = 8 / bits, shift = I % fields * bits - to;
    const __m512i v = vector(first + I / fields);
    return shift > 0 ? _mm512_srli_epi16(v, shift) : _mm512_slli_epi16(v, -shift);
  };
  __m512i v = _mm512_and_si512(plane(0, t.base, 0), _mm512_set1_epi8((1 << t.base) - 1));
  if constexpr (t.high > 0) {
    const __m512i mask = _mm512_set1_epi8(((1 << t.high) - 1) << t.base);
    v = _mm512_or_si512(v, _mm512_and_si512(plane(t.base, t.high, t.base), mask));
  }
  if constexpr (t.lookup == kIQ4 || t.lookup == kFP4) {
    const __m128i table =
        _mm_loadu_si128((const __m128i*)(t.lookup == kIQ4 ? kIQ4Codes : kFP4Codes));
    v = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), v);
  }
  return v;
}

// ---- products ------------------------------------------------------------------------------

template <int... I, class F>
QJAX_INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
QJAX_INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<int, N>{}, static_cast<F&&>(f));
}

// One group of columns: the integer sums of MR rows enter the float32 totals. `codes(i)` are those of
// the i-th of kQuads quads of columns, q the bytes of x that they meet.
template <int Bits, int kQuads, int Zero, bool HasMin, int MR, class C>
QJAX_INLINE void group_product(const IntTile& x, int64_t unit, int64_t group, const int32_t* q,
                               __m512 s, __m512 b, __m512 (&total)[MR], C&& codes) {
  constexpr int parts = Bits / 8;
  __m512i acc[MR], high[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) {
    acc[m] = Zero == 0 ? _mm512_setzero_si512()
                       : _mm512_slli_epi32(_mm512_set1_epi32(x.neg[group * MR + m]), log2_of(Zero));
    high[m] = _mm512_setzero_si512();
  }
  unroll<kQuads>([&](auto i) QJAX_INLINED {
    const __m512i w = codes(i);
    const int32_t* bytes = q + i * parts * MR;
    QJAX_UNROLL for (int m = 0; m < MR; ++m) {
      if (Bits == 16) high[m] = _mm512_dpbusd_epi32(high[m], w, _mm512_set1_epi32(bytes[m]));
      const int32_t low = bytes[(parts - 1) * MR + m];
      acc[m] = _mm512_dpbusd_epi32(acc[m], w, _mm512_set1_epi32(low));
    }
  });
  QJAX_UNROLL for (int m = 0; m < MR; ++m) {
    if (Bits == 16) acc[m] = _mm512_add_epi32(acc[m], _mm512_slli_epi32(high[m], 8));
    const __m512 scale = _mm512_mul_ps(s, _mm512_set1_ps(x.dx[unit * MR + m]));
    total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m]), scale, total[m]);
    if (HasMin) total[m] = _mm512_fmadd_ps(b, _mm512_set1_ps(x.xsum[group * MR + m]), total[m]);
  }
}

// Few rows: codes go from memory through registers into the product (16-bit activations only;
// 8-bit ones are for many rows).
template <int T, int MR>
void tile_fused(const View& view, int64_t k, const IntTile& x, float (*out)[16]) {
  constexpr const Traits& t = kTraits[T];
  constexpr int quads = 8 / t.groups;
  const int64_t units = units_of(k);
  __m512 total[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) total[m] = _mm512_setzero_ps();
  alignas(64) uint8_t expanded[kExpandedBytes];
  for (int64_t u = 0; u < units; ++u) {
    const UnitAt at = unit_at<T>(view, u, expanded);
    const uint8_t* unit = at.view.tiles + unit_offset(t, at.u);
    fetch_ahead(t, unit);
    const int32_t* q = x.q + u * 16 * MR;
    unroll<t.groups>([&](auto g) QJAX_INLINED {
      const GroupScale gs = group_scale(t, at.view, at.u, g);
      group_product<16, quads, t.zero, t.has_min(), MR>(
          x, u, u * t.groups + g, q + g * quads * 2 * MR, (__m512)gs.s, (__m512)gs.b, total,
          [&](auto i) QJAX_INLINED { return quad<T, g * quads + i>(unit); });
    });
  }
  QJAX_UNROLL for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out[m], total[m]);
}

// Many rows: the panel is decoded once into `w` (codes) and `sb` (float32 s, b per group).
template <int T>
void decode_int(const View& view, int64_t k, uint8_t* w, float* sb) {
  constexpr const Traits& t = kTraits[T];
  const int64_t units = units_of(k);
  alignas(64) uint8_t expanded[kExpandedBytes];
  for (int64_t u = 0; u < units; ++u) {
    const UnitAt at = unit_at<T>(view, u, expanded);
    const uint8_t* unit = at.view.tiles + unit_offset(t, at.u);
    fetch_ahead(t, unit);
    unroll<8>([&](auto i) QJAX_INLINED {
      _mm512_store_si512(w, quad<T, i>(unit));
      w += 64;
    });
    for (int g = 0; g < t.groups; ++g, sb += 32) {
      const GroupScale gs = group_scale(t, at.view, at.u, g);
      store(sb, gs.s);
      if (t.has_min()) store(sb + 16, gs.b);
    }
  }
}

template <int Bits, int Groups, int Zero, bool HasMin, int MR>
void tile_decoded(const uint8_t* w, const float* sb, int64_t units, const IntTile& x,
                  float (*out)[16]) {
  constexpr int quads = 8 / Groups, words = quads * Bits / 8;
  __m512 total[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) total[m] = _mm512_setzero_ps();
  const int32_t* q = x.q;
  for (int64_t u = 0; u < units; ++u)
    for (int g = 0; g < Groups; ++g, w += 64 * quads, q += words * MR, sb += 32)
      group_product<Bits, quads, Zero, HasMin, MR>(
          x, u, u * Groups + g, q, _mm512_load_ps(sb), _mm512_load_ps(sb + 16), total,
          [&](auto i) QJAX_INLINED { return _mm512_load_si512(w + 64 * i); });
  // The extra units: each row has its own.
  const int64_t extra = IntRows::extra(Bits, units);
  for (int64_t e = 0; e < extra; ++e)
    for (int g = 0; g < Groups; ++g, q += words * MR)
      QJAX_UNROLL for (int m = 0; m < MR; ++m) {
        const int64_t group = (x.unit[e * MR + m] - units) * Groups + g;  // w and sb are at the end
        __m512i acc = Zero == 0 ? _mm512_setzero_si512()
                                : _mm512_slli_epi32(
                                      _mm512_set1_epi32(x.neg[((units + e) * Groups + g) * MR + m]),
                                      log2_of(Zero));
        unroll<quads>([&](auto i) QJAX_INLINED {
          acc = _mm512_dpbusd_epi32(acc, _mm512_load_si512(w + 64 * (group * quads + i)),
                                    _mm512_set1_epi32(q[i * MR + m]));
        });
        const float* scale = sb + 32 * group;
        const __m512 s = _mm512_mul_ps(_mm512_load_ps(scale),
                                       _mm512_set1_ps(x.dx[(units + e) * MR + m]));
        total[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), s, total[m]);
        if (HasMin)
          total[m] = _mm512_fmadd_ps(_mm512_load_ps(scale + 16),
                                   _mm512_set1_ps(x.xsum[((units + e) * Groups + g) * MR + m]),
                                   total[m]);
      }
  QJAX_UNROLL for (int m = 0; m < MR; ++m) _mm512_storeu_ps(out[m], total[m]);
}

// ---- tables by type ------------------------------------------------------------------------

using TileFused = void (*)(const View&, int64_t, const IntTile&, float (*)[16]);
using DecodeInt = void (*)(const View&, int64_t, uint8_t*, float*);
using TileDecoded = void (*)(const uint8_t*, const float*, int64_t, const IntTile&, float (*)[16]);

struct IntKernels {
  TileFused fused[kTileInt];      // [rows - 1], 16-bit only
  DecodeInt decode;
  TileDecoded decoded[kTileInt];  // [rows - 1]
};

template <int T, int Bits, int... M>
constexpr IntKernels int_kernels(std::integer_sequence<int, M...>) {
  constexpr const Traits& t = kTraits[T];
  IntKernels kernels = {};
  if constexpr (!t.only_f32()) {
    kernels = {{}, decode_int<T>, {tile_decoded<Bits, t.groups, t.zero, t.has_min(), M + 1>...}};
    if constexpr (Bits == 16) ((kernels.fused[M] = tile_fused<T, M + 1>), ...);
  }
  return kernels;
}
template <int Bits, int... T>
const IntKernels& int_kernels_at(int index, std::integer_sequence<int, T...>) {
  static constexpr IntKernels table[] = {
      int_kernels<T, Bits>(std::make_integer_sequence<int, kTileInt>{})...};
  return table[index];
}
inline const IntKernels& int_kernels_for(const Traits* t, int bits) {
  constexpr auto all = std::make_integer_sequence<int, sizeof(kTraits) / sizeof(kTraits[0])>{};
  return bits == 16 ? int_kernels_at<16>(int(t - kTraits), all)
                    : int_kernels_at<8>(int(t - kTraits), all);
}

}  // namespace qjax

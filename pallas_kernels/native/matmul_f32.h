// Exact products: the weight panel is decoded to float32 and multiplied in float32.
#pragma once
#include "scales.h"

namespace qjax {

#if defined(__AVX512F__)
constexpr int kTileF32 = 12;  // rows of x that share one read of the panel
#else
constexpr int kTileF32 = 4;
#endif

// Codes of unit `u` as bytes [32 columns][16 rows].
QJAX_INLINE void unit_codes(const Traits& t, const uint8_t* panel, int64_t u,
                            uint8_t codes[32][16]) {
  const uint8_t* unit = panel + unit_offset(t, u);
  if (t.base == 8) {
    for (int i = 0; i < 8; ++i)
      for (int r = 0; r < 16; ++r)
        for (int b = 0; b < 4; ++b) codes[4 * i + b][r] = unit[64 * i + 4 * r + b] ^ 0x80;
    return;
  }
  constexpr int first[4] = {0, 4, 1, 5};
  auto words = [&](int vector) { return unit + 64 * vector; };
  for (int step = 0; step < 16; ++step) {
    const int column = 8 * (step / 4) + first[step % 4];
    for (int w = 0; w < 2; ++w)
      for (int r = 0; r < 16; ++r) {
        uint16_t low, high;
        const int at = 4 * r + 2 * w;
        int code;
        if (t.base == 4) {
          std::memcpy(&low, words(step / 4) + at, 2);
          code = low >> (4 * (step % 4)) & 15;
        } else {
          std::memcpy(&low, words(step / 8) + at, 2);
          code = low >> (2 * (step % 8)) & 3;
        }
        if (t.high == 1) {
          std::memcpy(&high, words(t.base) + at, 2);
          code |= (high >> step & 1) << t.base;
        } else if (t.high == 2) {
          std::memcpy(&high, words(t.base + step / 8) + at, 2);
          code |= (high >> (2 * (step % 8)) & 3) << t.base;
        }
        codes[column + 2 * w][r] = t.lookup ? kIQ4Codes[code] : uint8_t(code);
      }
  }
}

// Weights of a whole panel as float32 [32 * units][16].
template <int T>
void decode_f32(const uint8_t* panel, int64_t k, float* w) {
  constexpr const Traits& t = kTraits[T];
  const int64_t units = units_of(k);
  if constexpr (t.dense()) {
    for (int64_t c = 0; c < 32 * units; ++c) {
      const uint8_t* p = panel + c * 2 * t.base;
      store(w + 16 * c, t.type == F32 ? load(reinterpret_cast<const float*>(p))
                        : t.type == F16 ? half16(p) : bf16_16(p));
    }
  } else {
    uint8_t codes[32][16];
    for (int64_t u = 0; u < units; ++u) {
      unit_codes(t, panel, u, codes);
      for (int g = 0; g < t.groups; ++g) {
        const GroupScale gs = group_scale(t, panel, u, g);
        for (int c = 32 / t.groups * g; c < 32 / t.groups * (g + 1); ++c) {
          v16f value = gs.s * (bytes16(codes[c]) - float(t.zero));
          store(w + 16 * (32 * u + c), t.has_min() ? value + gs.b : value);
        }
      }
    }
  }
}

using DecodeF32 = void (*)(const uint8_t*, int64_t, float*);
template <int... T>
constexpr DecodeF32 decode_table(int index, std::integer_sequence<int, T...>) {
  constexpr DecodeF32 table[] = {decode_f32<T>...};
  return table[index];
}
constexpr int kNumTraits = sizeof(kTraits) / sizeof(kTraits[0]);
inline DecodeF32 decode_f32_for(const Traits* t) {
  return decode_table(int(t - kTraits), std::make_integer_sequence<int, kNumTraits>{});
}

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

// Types whose tiles are the rows' own blocks, [blocks][16 rows][bytes], because their codes are not
// of one width: vectors of a grid, digits of base 3. A kernel expands one unit at a time to signed
// bytes as tiles of Q8_0 have them, with float32 scales behind, and goes on as with Q8_0.
#pragma once
#include "scales.h"

namespace qjax {

// The grids of iq1, iq2_xxs, iq2_xs, iq2_s (8 bytes a vector), iq3_xxs and iq3_s (4 bytes). Python
// hands them over (see pallas_kernels/native/__init__.py) before it makes tiles.
enum Grid : int { kGridIQ1, kGridIQ2XXS, kGridIQ2XS, kGridIQ2S, kGridIQ3XXS, kGridIQ3S, kGrids };
inline const uint8_t* grids[kGrids] = {};

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

// For a byte of signs, or seven bits to which an eighth is added that makes the number of ones even:
// all bits of each of eight bytes that are negative.
struct SignMasks {
  uint64_t of[256], even[128];
  constexpr SignMasks() : of(), even() {
    for (int bits = 0; bits < 256; ++bits)
      for (int i = 0; i < 8; ++i)
        if (bits >> i & 1) of[bits] |= uint64_t{255} << (8 * i);
    for (int bits = 0; bits < 128; ++bits) {
      int ones = 0;
      for (int i = 0; i < 7; ++i) ones += bits >> i & 1;
      even[bits] = of[bits | (ones & 1) << 7];
    }
  }
};
inline constexpr SignMasks kSigns;

// Eight magnitudes, none of them 0, with their signs.
QJAX_INLINE uint64_t negated(uint64_t magnitudes, uint64_t mask) {
  return (magnitudes ^ mask) + (mask & 0x0101010101010101u);
}

// Sums of bytes without carries between them.
QJAX_INLINE uint64_t plus(uint64_t a, uint64_t b) {
  constexpr uint64_t low = 0x7f7f7f7f7f7f7f7fu;
  return ((a & low) + (b & low)) ^ ((a ^ b) & ~low);
}

// What is added to eight values of iq1, whose grid counts in eighths: 1, or -1.
constexpr uint64_t kEighth[2] = {0x0101010101010101u, ~uint64_t{0}};

// Four codes of two bits, each less 1.
struct Quarters {
  uint32_t of[256];
  constexpr Quarters() : of() {
    for (int byte = 0; byte < 256; ++byte)
      for (int i = 0; i < 4; ++i)
        of[byte] |= uint32_t(uint8_t((byte >> (2 * i) & 3) - 1)) << (8 * i);
  }
};
inline constexpr Quarters kQuarters;

template <class Word>
QJAX_INLINE Word word_at(const uint8_t* p) {
  Word word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// 32 columns of one row: signed bytes in eights, and the scales of each half.
struct Run {
  uint64_t values[4];
  float scale[2];
  int8_t* bytes() { return reinterpret_cast<int8_t*>(values); }
};

// Unit `u` of the block at `b`.
template <QType T>
QJAX_INLINE void expand(const uint8_t* b, int u, Run& run) {
  [[maybe_unused]] const uint8_t* grid = grid_of(T) < 0 ? nullptr : grids[grid_of(T) < 0 ? 0 : grid_of(T)];
  [[maybe_unused]] auto eight = [&](int code) { return word_at<uint64_t>(grid + 8 * code); };
  [[maybe_unused]] auto two_fours = [&](int first, int second) {
    return word_at<uint32_t>(grid + 4 * first) | uint64_t{word_at<uint32_t>(grid + 4 * second)} << 32;
  };
  [[maybe_unused]] auto nibble = [&](int at, int i) { return b[at + i / 2] >> (4 * (i % 2)) & 15; };
  [[maybe_unused]] auto half = [&](int at) { return half_to_float(word_at<uint16_t>(b + at)); };
  auto odd = [](int scale) { return float(2 * scale + 1); };
  auto scales = [&](float first, float second) {
    run.scale[0] = first;
    run.scale[1] = second;
  };
  if constexpr (T == IQ2_XXS) {
    const uint8_t* own = b + 2 + 8 * u;
    const uint32_t signs = word_at<uint32_t>(own + 4);
    for (int j = 0; j < 4; ++j)
      run.values[j] = negated(eight(own[j]), kSigns.even[signs >> (7 * j) & 127]);
    const float s = half(0) * odd(signs >> 28) * 0.125f;
    scales(s, s);
  } else if constexpr (T == IQ2_XS) {
    for (int j = 0; j < 4; ++j) {
      const uint16_t word = word_at<uint16_t>(b + 2 + 2 * (4 * u + j));
      run.values[j] = negated(eight(word & 511), kSigns.even[word >> 9]);
    }
    scales(half(0) * odd(b[66 + u] & 15) * 0.125f, half(0) * odd(b[66 + u] >> 4) * 0.125f);
  } else if constexpr (T == IQ2_S) {
    for (int j = 0; j < 4; ++j) {
      const int code = b[2 + 4 * u + j] | (b[66 + u] >> (2 * j) & 3) << 8;
      run.values[j] = negated(eight(code), kSigns.of[b[34 + 4 * u + j]]);
    }
    scales(half(0) * odd(b[74 + u] & 15) * 0.125f, half(0) * odd(b[74 + u] >> 4) * 0.125f);
  } else if constexpr (T == IQ3_XXS) {
    const uint8_t* own = b + 2 + 8 * u;
    const uint32_t signs = word_at<uint32_t>(b + 66 + 4 * u);
    for (int j = 0; j < 4; ++j)
      run.values[j] =
          negated(two_fours(own[2 * j], own[2 * j + 1]), kSigns.even[signs >> (7 * j) & 127]);
    const float s = half(0) * odd(signs >> 28) * 0.25f;
    scales(s, s);
  } else if constexpr (T == IQ3_S) {
    auto code = [&](int i) { return b[2 + 8 * u + i] | (b[66 + u] >> i & 1) << 8; };
    for (int j = 0; j < 4; ++j)
      run.values[j] = negated(two_fours(code(2 * j), code(2 * j + 1)), kSigns.of[b[74 + 4 * u + j]]);
    const float s = half(0) * odd(nibble(106, u));
    scales(s, s);
  } else if constexpr (T == IQ1_S) {
    const uint16_t word = word_at<uint16_t>(b + 34 + 2 * u);
    for (int j = 0; j < 4; ++j)
      run.values[j] =
          plus(eight(b[2 + 4 * u + j] | (word >> (3 * j) & 7) << 8), kEighth[word >> 15]);
    const float s = half(0) * odd(word >> 12 & 7) * 0.125f;
    scales(s, s);
  } else if constexpr (T == IQ1_M) {
    // Each of four words has four scales of three bits, and four bits of the float16 on top.
    const uint64_t words = word_at<uint64_t>(b + 48);
    const float d = 0.125f * half_to_float(uint16_t((words >> 12 & 0xf) | (words >> 24 & 0xf0) |
                                                    (words >> 36 & 0xf00) | (words >> 48 & 0xf000)));
    const uint16_t more = word_at<uint16_t>(b + 32 + 2 * u);
    for (int j = 0; j < 4; ++j) {
      const int nibble = more >> (4 * j) & 15;
      run.values[j] = plus(eight(b[4 * u + j] | (nibble & 7) << 8), kEighth[nibble >> 3]);
    }
    const uint64_t own = words >> (16 * (u / 2) + 6 * (u % 2));
    scales(d * odd(own & 7), d * odd(own >> 3 & 7));
  } else {
    constexpr int d = T == TQ1_0 ? 52 : T == TQ2_0 ? 64 : 0;
    scales(half(d), half(d));
    [[maybe_unused]] int8_t* out = run.bytes();
    if constexpr (T == TQ1_0) {
      // A byte is a fraction of five digits; a power of 3 brings one to the front.
      constexpr uint8_t power[5] = {1, 3, 9, 27, 81};
      auto digits = [&](int at, int count, int digit, int8_t* to) {
        for (int i = 0; i < count; ++i)
          to[i] = int8_t((uint8_t(b[at + i] * power[digit]) * 3 >> 8) - 1);
      };
      if (u < 5) return digits(0, 32, u, out);
      digits(32, 16, 2 * (u - 5), out);
      if (u < 7) return digits(32, 16, 2 * (u - 5) + 1, out + 16);
      for (int i = 0; i < 4; ++i) digits(48, 4, i, out + 16 + 4 * i);
    } else if constexpr (T == TQ2_0) {
      for (int i = 0; i < 32; ++i)
        out[i] = int8_t((b[32 * (u / 4) + i] >> (2 * (u % 4)) & 3) - 1);
    } else if constexpr (T == Q2_0) {
      for (int j = 0; j < 4; ++j)
        run.values[j] = kQuarters.of[b[2 + 8 * u + 2 * j]] |
                        uint64_t{kQuarters.of[b[3 + 8 * u + 2 * j]]} << 32;
    } else {
      static_assert(T == Q1_0);
      for (int j = 0; j < 4; ++j)
        run.values[j] = ~kSigns.of[b[2 + 4 * u + j]] | 0x0101010101010101u;
    }
  }
}

// A unit that kernels read, and where it lies.
struct UnitAt {
  View view;
  int64_t u;
};
constexpr int kExpandedBytes = 512 + 2 * 64;

// Unit `u` of a panel; one of blocks is expanded into `buffer` [kExpandedBytes].
template <int T>
QJAX_INLINE UnitAt unit_at(const View& view, int64_t u, uint8_t* buffer) {
  constexpr const Traits& t = kTraits[T];
  if constexpr (t.scale != kExpanded) {
    return {view, u};
  } else {
    constexpr int per_block = t.raw_elems / 32;
    const uint8_t* block = view.tiles + u / per_block * 16 * t.raw_bytes;
    float* scale = reinterpret_cast<float*>(buffer + t.code_bytes());
    for (int r = 0; r < 16; ++r) {
      Run run;
      expand<t.type>(block + r * t.raw_bytes, int(u % per_block), run);
      for (int i = 0; i < 8; ++i) std::memcpy(buffer + 64 * i + 4 * r, run.bytes() + 4 * i, 4);
      for (int g = 0; g < t.groups; ++g) scale[16 * g + r] = run.scale[g];
    }
    return {{buffer}, 0};
  }
}

}  // namespace qjax

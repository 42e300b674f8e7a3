// What some methods do to a row of inputs before the product: scale it, round it to what a numeric
// type can hold, put its columns in another order. The arithmetic is that of ops/activations.py,
// operation for operation, so that both give the same bits.
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace qjax {

enum ScaleKind : int {  // how a computed scale is made from absmax
  kScaleFloat32 = 0, kScaleBfloat16 = 1, kScaleFloat16 = 2,
  kScaleE8m0 = 3,      // 2 ** (floor(log2 absmax) - exponent of the largest number)
  kScaleE8m0Ceil = 4,  // absmax / largest, rounded up to a power of two
  kScaleE4m3 = 5,      // relative to a global scale
  kScaleE8m0Even = 6,  // as kScaleE8m0, of absmax rounded to the mantissa
  kScaleE8m0Even4 = 7,  // the same, always to one bit of mantissa
};

struct Inputs {
  bool rounds = false;
  bool is_float = false;
  bool dynamic = true, symmetric = true;
  int mantissa = 0, min_exponent = 0;  // of a float type: bits, exponent of its smallest normal
  int max_exponent = 0;                // of its largest number
  float bottom = 0, top = 0;           // smallest and largest value (or code)
  float divisor = 0;                   // absmax / divisor is the scale
  float upper_bound = 0;               // of absmax; 0: none
  int64_t group = 0;                   // columns of a group; 0: the row
  ScaleKind scale_kind = kScaleFloat32;
  const float* scale = nullptr;        // [1], static
  const float* zero = nullptr;         // [1], static
  const float* global_scale = nullptr;  // [1]
  const float* pre_scale = nullptr;    // [k]
  const int32_t* perm = nullptr;       // [k]
  bool any() const { return rounds || pre_scale || perm; }
};

// Whether two weights whose settings are the same find the same inputs.
inline bool same_inputs(const Inputs& a, const Inputs& b, int64_t k) {
  auto same = [](const auto* one, const auto* other, int64_t count) {
    if (one == other) return true;
    return one && other && std::memcmp(one, other, count * sizeof(*one)) == 0;
  };
  return same(a.scale, b.scale, 1) && same(a.zero, b.zero, 1) &&
         same(a.global_scale, b.global_scale, 1) && same(a.pre_scale, b.pre_scale, k) &&
         same(a.perm, b.perm, k);
}

// The nearest number with `mantissa` bits and no exponent below `min_exponent`; ties to even.
QJAX_INLINE v16f round_to_float(v16f x, int mantissa, int min_exponent) {
  const v16i exponent = vmax((as_int(x) >> 23) & 255, v16i{} + (min_exponent + 127));
  // Adding 1.5 * 2^23 quanta leaves a whole number of quanta.
  const v16f magic = as_float(((exponent - mantissa + 23) << 23) | (v16i{} + 0x400000));
  return (x + magic) - magic;
}
inline float round_to_float(float x, int mantissa, int min_exponent) {
  return round_to_float(splat(x), mantissa, min_exponent)[0];
}
QJAX_INLINE v16f round_to_int(v16f x) {  // |x| < 2^22
  const v16f magic = splat(12582912.0f);
  return (x + magic) - magic;
}
inline float power_of_two(int exponent) {  // -126 to 127
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float computed_scale(const Inputs& in, float absmax) {
  if (in.upper_bound > 0) absmax = std::min(absmax, in.upper_bound);
  if (in.scale_kind == kScaleE8m0) {
    if (!(absmax > 0)) return power_of_two(-126);
    const int exponent = std::ilogb(absmax) - in.max_exponent;
    return power_of_two(std::min(std::max(exponent, -126), 127));
  }
  if (in.scale_kind == kScaleE8m0Even || in.scale_kind == kScaleE8m0Even4) {
    uint32_t bits;
    std::memcpy(&bits, &absmax, 4);
    const int mantissa = in.scale_kind == kScaleE8m0Even4 ? 1 : in.mantissa;
    const int exponent = int((bits + (1u << (22 - mantissa))) >> 23) - 127 - in.max_exponent;
    return power_of_two(std::min(std::max(exponent, -126), 127));
  }
  const float scale = absmax / in.divisor;
  switch (in.scale_kind) {
    case kScaleBfloat16: return from_bf16(to_bf16(scale));
    case kScaleFloat16: return round_to_float(scale, 10, -14);
    case kScaleE8m0Ceil: {
      const float least = std::max(scale, 1e-38f);
      const int exponent = std::ilogb(least);
      return power_of_two(exponent + (least > power_of_two(exponent)));
    }
    case kScaleE4m3: {
      const float local = std::min(std::max(scale / *in.global_scale, 0.001953125f), 448.0f);
      return round_to_float(local, 3, -6) * *in.global_scale;
    }
    default: return scale;
  }
}

// x[0..n) in multiples of its scale.
inline void round_group(const Inputs& in, float* x, int64_t n) {
  float scale, zero = 0;
  if (!in.dynamic) {
    scale = *in.scale;
    if (in.zero) zero = *in.zero;
  } else if (in.symmetric) {
    v16f largest = {};
    int64_t c = 0;
    for (; c + 16 <= n; c += 16) {
      const v16f v = load(x + c);
      largest = vmax(largest, vmax(v, -v));
    }
    float absmax = max(largest);
    for (; c < n; ++c) absmax = std::max(absmax, std::fabs(x[c]));
    scale = computed_scale(in, absmax);
  } else {
    float low = 0, high = 0;
    for (int64_t c = 0; c < n; ++c) {
      low = std::min(low, x[c]);
      high = std::max(high, x[c]);
    }
    scale = (high - low) / (in.top - in.bottom);
    if (scale == 0) scale = 1.1920928955078125e-07f;
    zero = std::min(std::max(std::nearbyint(in.bottom - low / scale), in.bottom), in.top);
  }
  const v16f bottom = splat(in.bottom), top = splat(in.top), s = splat(scale), z = splat(zero);
  const v16f by = splat(scale == 0 ? 1.0f : scale);
  auto rounded = [&](v16f v) QJAX_INLINED {
    v = v / by;
    if (in.is_float) {
      v = vmin(vmax(v, bottom), top);
      v = round_to_float(v, in.mantissa, in.min_exponent);
      return vmin(vmax(v, bottom), top) * s;
    }
    // Beyond the range nothing is rounded: keep the sum of round_to_int exact.
    const v16f wide = splat(1048576.0f);
    v = round_to_int(vmin(vmax(v + z, -wide), wide));
    return (vmin(vmax(v, bottom), top) - z) * s;
  };
  int64_t c = 0;
  for (; c + 16 <= n; c += 16) store(x + c, rounded(load(x + c)));
  if (c < n) {
    alignas(64) float rest[16] = {};
    std::copy(x + c, x + n, rest);
    store(rest, rounded(load(rest)));
    std::copy(rest, rest + (n - c), x + c);
  }
}

// One row, in place. `spare` holds k floats.
inline void treat_inputs(const Inputs& in, float* x, int64_t k, float* spare) {
  if (in.pre_scale)
    for (int64_t c = 0; c < k; ++c) x[c] *= in.pre_scale[c];
  if (in.rounds) {
    const int64_t group = in.group ? in.group : k;
    for (int64_t c = 0; c < k; c += group) round_group(in, x + c, std::min(group, k - c));
  }
  if (in.perm) {
    std::copy(x, x + k, spare);
    for (int64_t c = 0; c < k; ++c) x[c] = spare[in.perm[c]];
  }
}

}  // namespace qjax

// Scales of one group of 16 rows: a weight is s * (code - zero) + b.
#pragma once
#include "simd.h"
#include "tile.h"

namespace qjax {

struct GroupScale {
  v16f s, b;  // b only where traits.has_min()
};

enum ElementType : int {  // as matmul/native.py numbers them
  kNothing = 0, kElementF32, kElementF16, kElementBF16, kElementE4M3, kElementE8M0, kElementU8,
  kElementI8,
};
constexpr int element_bytes(ElementType t) {
  return t == kElementF32 ? 4 : t == kElementF16 || t == kElementBF16 ? 2 : 1;
}

enum Rounded : int { kUnrounded = 0, kToHalf = 1, kToBF16 = 2 };

// Scales and zero points that lie beside the codes, in groups of `rows` x `columns`.
struct Beside {
  ElementType scale_type = kNothing, zero_type = kNothing;
  const uint8_t *scale = nullptr, *zero = nullptr;
  const float* global_scale = nullptr;  // [1]
  const float* codebook = nullptr;      // [16]
  bool additive = false;                // w = code * s + zero, not (code - zero) * s
  int zero_shift = 0;                   // added to zero points (of unsigned bytes stored signed)
  float offset = 0;                     // what an additive weight's codes are too large by
  Rounded rounded = kUnrounded;         // what weights are once they are scaled, in exact products
  int64_t rows = 1, columns = 0, groups = 0;  // `groups` of columns

  int64_t count(int64_t n) const {  // of the scales of n outputs
    return groups * (rows == 1 ? 16 * panels_of(n) : (n + rows - 1) / rows);
  }
  // Those of a panel, where each row has its own.
  const uint8_t* scale_of(int64_t panel) const {
    return scale + panel * groups * 16 * element_bytes(scale_type);
  }
  const uint8_t* zero_of(int64_t panel) const {
    return zero + panel * groups * 16 * element_bytes(zero_type);
  }
  void skip(int64_t weights, int64_t n) {  // to a later one of stacked weights
    if (scale) scale += weights * count(n) * element_bytes(scale_type);
    if (zero) zero += weights * count(n) * element_bytes(zero_type);
    if (global_scale) global_scale += weights;
    if (codebook) codebook += 16 * weights;
  }
};

inline float small_to_float(uint8_t byte, int exponent_bits, int mantissa_bits, int bias) {
  const int exponent = byte >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = byte & ((1 << mantissa_bits) - 1);
  const float size = exponent
      ? std::ldexp(float((1 << mantissa_bits) + mantissa), exponent - bias - mantissa_bits)
      : std::ldexp(float(mantissa), 1 - bias - mantissa_bits);
  return byte & 0x80 ? -size : size;
}
inline float element(ElementType t, const uint8_t* p) {
  uint16_t half;
  float value;
  switch (t) {
    case kElementF32: std::memcpy(&value, p, 4); return value;
    case kElementF16: std::memcpy(&half, p, 2); return half_to_float(half);
    case kElementBF16: std::memcpy(&half, p, 2); return from_bf16(half);
    case kElementE4M3: return small_to_float(*p, 4, 3, 7);
    case kElementE8M0: return std::ldexp(1.0f, int(*p) - 127);
    case kElementU8: return float(*p);
    case kElementI8: return float(int8_t(*p));
    default: return 0;
  }
}
// 16 neighbours.
template <ElementType T>
QJAX_INLINE v16f elements16(const uint8_t* p) {
  if constexpr (T == kElementF32) return load(reinterpret_cast<const float*>(p));
  if constexpr (T == kElementF16) return half16(p);
  if constexpr (T == kElementBF16) return bf16_16(p);
  if constexpr (T == kElementU8) return bytes16(p);
  if constexpr (T == kElementI8) return signed_bytes16(p);
  if constexpr (T == kElementE4M3) {
    // As float16 the exponent is 8 too small.
    uint16_t halves[16];
    for (int i = 0; i < 16; ++i) halves[i] = uint16_t((int8_t(p[i]) << 7) & 0xbf80);
    return half16(reinterpret_cast<const uint8_t*>(halves)) * 256.0f;
  }
  // 2 ** -127 is no normal number: what is smaller than 2 ** -126 counts as that.
  if constexpr (T == kElementE8M0) return as_float(vmax(widened<uint8_t>(p), v16i{} + 1) << 23);
  return v16f{};
}

// The scales of one panel as float32: for each group of columns s[16], b[16], zero[16]; the last
// two where there are zero points.
constexpr int kScaleFloats = 48;

template <ElementType S, ElementType Z>
void panel_scales(const Traits& t, const Beside& beside, int64_t panel, float* out) {
  const float factor = (beside.global_scale ? *beside.global_scale : 1.0f);
  const int64_t row = panel * 16 / beside.rows;
  const bool tiled = beside.rows == 1;
  const int64_t first = tiled ? panel * beside.groups * 16 : row * beside.groups;
  const uint8_t* scale = beside.scale + first * element_bytes(S);
  const uint8_t* zero = beside.zero + first * element_bytes(Z);
  const float half = t.lookup == kFP4 ? 0.5f : 1.0f;  // codes of FP4 are twice their values
  for (int64_t g = 0; g < beside.groups; ++g, out += kScaleFloats) {
    const int64_t at = tiled ? 16 * g : g;
    v16f s = tiled ? elements16<S>(scale + at * element_bytes(S))
                   : splat(element(S, scale + at * element_bytes(S)));
    s = s * factor;
    store(out, s * half);
    if constexpr (Z != kNothing) {
      const v16f z = (tiled ? elements16<Z>(zero + at * element_bytes(Z))
                            : splat(element(Z, zero + at * element_bytes(Z)))) +
                     float(beside.zero_shift);
      store(out + 16, beside.additive ? z - beside.offset * s : -(z * s));
      store(out + 32, z);
    }
  }
}

template <ElementType S>
void panel_scales(const Traits& t, const Beside& beside, int64_t panel, float* out) {
  switch (beside.zero_type) {
    case kElementU8: return panel_scales<S, kElementU8>(t, beside, panel, out);
    case kElementI8: return panel_scales<S, kElementI8>(t, beside, panel, out);
    case kElementF32: return panel_scales<S, kElementF32>(t, beside, panel, out);
    case kElementF16: return panel_scales<S, kElementF16>(t, beside, panel, out);
    case kElementBF16: return panel_scales<S, kElementBF16>(t, beside, panel, out);
    default: return panel_scales<S, kNothing>(t, beside, panel, out);
  }
}

// Also asks for those of the next panel, which this thread is likely to want next.
inline void panel_scales(const Traits& t, const Beside& beside, int64_t panel, float* out) {
  if (beside.rows == 1) {
    const int64_t bytes = beside.groups * 16 * element_bytes(beside.scale_type);
    for (int64_t at = 0; at < bytes; at += 64)
      __builtin_prefetch(beside.scale + (panel + 1) * bytes + at, 0, 2);
    const int64_t zeros = beside.groups * 16 * element_bytes(beside.zero_type);
    if (beside.zero)
      for (int64_t at = 0; at < zeros; at += 64)
        __builtin_prefetch(beside.zero + (panel + 1) * zeros + at, 0, 2);
  }
  switch (beside.scale_type) {
    case kElementF32: return panel_scales<kElementF32>(t, beside, panel, out);
    case kElementF16: return panel_scales<kElementF16>(t, beside, panel, out);
    case kElementBF16: return panel_scales<kElementBF16>(t, beside, panel, out);
    case kElementE4M3: return panel_scales<kElementE4M3>(t, beside, panel, out);
    case kElementE8M0: return panel_scales<kElementE8M0>(t, beside, panel, out);
    default: return;
  }
}

// The scales of a panel: those inside it, or float32 ones of `panel_scales` with the group of each
// (half) unit.
struct Scales {
  const float* beside = nullptr;
  const int32_t* group = nullptr;  // [units * t.groups]
  const float* at(int64_t index) const { return beside + kScaleFloats * group[index]; }
};

// A panel of a weight as the kernels read it.
struct View {
  const uint8_t* tiles;
  Scales scales;
  const Beside* beside = nullptr;
  const uint8_t *scale = nullptr, *zero = nullptr;  // as they are stored; where each row has its own
};

// Asks for what will be read after kAhead more bytes. The next panels follow in memory, so running
// ahead is right across the end of a panel too.
constexpr int kAhead = 8192;
QJAX_INLINE void fetch_ahead(const Traits& t, const uint8_t* unit) {
  if (t.scale == kExpanded) return;
  for (int line = 0; line < t.unit_bytes(); line += 64)
    __builtin_prefetch(unit + kAhead + line, 0, 3);
}

// `t` is a compile-time constant at every call, so the branches vanish.
QJAX_INLINE GroupScale group_scale(const Traits& t, const View& view, int64_t u, int g) {
  if (t.beside()) {
    const float* own = view.scales.at(u * t.groups + g);
    return {load(own), t.has_min() ? load(own + 16) : v16f{}};
  }
  const uint8_t* own = view.tiles + unit_offset(t, u) + t.code_bytes();
  const uint8_t* head = view.tiles + header_offset(t, u);
  switch (t.scale) {
    case kD: return {half16(own), v16f{}};
    case kDM: return {half16(own), half16(own + 32)};
    case kExpanded: return {load(reinterpret_cast<const float*>(own) + 16 * g), v16f{}};
    case kSuper1: return {half16(head) * signed_bytes16(own + 16 * g), v16f{}};
    case kSuper2:
      return {half16(head) * bytes16(own), -(half16(head + 32) * bytes16(own + 16))};
    case kSuper2n: {
      uint8_t sc[16], m[16];
      for (int i = 0; i < 16; ++i) {
        sc[i] = own[16 * g + i] & 15;
        m[i] = own[16 * g + i] >> 4;
      }
      return {half16(head) * bytes16(sc), -(half16(head + 32) * bytes16(m))};
    }
    default: return {v16f{}, v16f{}};
  }
}

}  // namespace qjax

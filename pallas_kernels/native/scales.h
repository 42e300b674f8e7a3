// Scales of one group of 16 rows: a weight is s * (code - zero) + b.
#pragma once
#include "simd.h"
#include "tile.h"

namespace qjax {

struct GroupScale {
  v16f s, b;  // b only where traits.has_min()
};

// `t` is a compile-time constant at every call, so the branches vanish.
QJAX_INLINE GroupScale group_scale(const Traits& t, const uint8_t* panel, int64_t u, int g) {
  const uint8_t* own = panel + unit_offset(t, u) + t.code_bytes();
  const uint8_t* head = panel + header_offset(t, u);
  switch (t.scale) {
    case kD: return {half16(own), v16f{}};
    case kDM: return {half16(own), half16(own + 32)};
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

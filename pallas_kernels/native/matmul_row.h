// One row of x against codes with scales beside them: scales go from memory through registers into
// the product. With one row there is little else to do, so a pass of its own over them would show.
#pragma once
#include "matmul_int.h"

namespace qjax {

// `x` has one row of 16 bits. The arithmetic is that of `panel_scales` and `tile_fused`, operation for
// operation: a row's result does not depend on what is beside it.
template <int T, ElementType S, ElementType Z>
void tile_row(const View& view, int64_t k, const IntTile& x, float (*out)[16]) {
  constexpr const Traits& t = kTraits[T];
  constexpr int64_t ahead = 256;  // bytes of scales
  constexpr int quads = 8 / t.groups;
  const Beside& beside = *view.beside;
  const float factor = beside.global_scale ? *beside.global_scale : 1.0f;
  const float shift = float(beside.zero_shift), half = t.lookup == kFP4 ? 0.5f : 1.0f;
  const int64_t units = units_of(k), step = (beside.columns + 31) / 32;
  const uint8_t *scale = view.scale, *zero = view.zero;
  v16f s, b = {};
  auto next_scale = [&]() QJAX_INLINED {
    _mm_prefetch((const char*)(scale + ahead), _MM_HINT_T0);
    const v16f whole = elements16<S>(scale) * factor;
    s = whole * half;
    scale += 16 * element_bytes(S);
    if constexpr (Z != kNothing) {
      _mm_prefetch((const char*)(zero + ahead), _MM_HINT_T0);
      b = -((elements16<Z>(zero) + shift) * whole);
      zero += 16 * element_bytes(Z);
    }
  };
  __m512 total[1] = {_mm512_setzero_ps()};
  for (int64_t u = 0; u < units;) {
    if (t.groups == 1) next_scale();
    const int64_t end = t.groups == 1 && u + step < units ? u + step : units;
    for (; u < end; ++u) {
      const uint8_t* unit = view.tiles + unit_offset(t, u);
      fetch_ahead(t, unit);
      const int32_t* q = x.q + 16 * u;
      unroll<t.groups>([&](auto g) QJAX_INLINED {
        if (t.groups == 2) next_scale();
        group_product<16, quads, t.zero, t.has_min(), 1>(
            x, u, u * t.groups + g, q + g * quads * 2, (__m512)s, (__m512)b, total,
            [&](auto i) QJAX_INLINED { return quad<T, g * quads + i>(unit); });
      });
    }
  }
  _mm512_storeu_ps(out[0], total[0]);
}

// ---- tables by type of codes, of scales and of zero points -------------------------------------

using TileRow = void (*)(const View&, int64_t, const IntTile&, float (*)[16]);

template <int T, ElementType S>
TileRow tile_row_of(ElementType zero) {
  constexpr const Traits& t = kTraits[T];
  if constexpr (t.scale == kBeside) {
    return tile_row<T, S, kNothing>;
  } else if constexpr (S != kElementE8M0 && S != kElementE4M3) {
    switch (zero) {
      case kElementU8: return tile_row<T, S, kElementU8>;
      case kElementI8: return tile_row<T, S, kElementI8>;
      case kElementF32: return tile_row<T, S, kElementF32>;
      case kElementF16: return tile_row<T, S, kElementF16>;
      case kElementBF16: return tile_row<T, S, kElementBF16>;
      default: break;
    }
  }
  return nullptr;
}
template <int T>
TileRow tile_row_of(const Beside& beside) {
  constexpr const Traits& t = kTraits[T];
  if constexpr (t.beside() && !t.only_f32()) {
    switch (beside.scale_type) {
      case kElementF32: return tile_row_of<T, kElementF32>(beside.zero_type);
      case kElementF16: return tile_row_of<T, kElementF16>(beside.zero_type);
      case kElementBF16: return tile_row_of<T, kElementBF16>(beside.zero_type);
      case kElementE4M3:
        if constexpr (t.lookup == kFP4) return tile_row_of<T, kElementE4M3>(kNothing);
        break;
      case kElementE8M0:
        if constexpr (t.lookup == kFP4) return tile_row_of<T, kElementE8M0>(kNothing);
        break;
      default: break;
    }
  }
  return nullptr;
}
template <int... T>
TileRow tile_row_at(int index, const Beside& beside, std::integer_sequence<int, T...>) {
  static constexpr TileRow (*table[])(const Beside&) = {tile_row_of<T>...};
  return table[index](beside);
}

// The kernel for one row of 16 bits; null where scales lie otherwise, for `tile_fused`.
inline TileRow tile_row_for(const Traits* t, const Beside& beside) {
  if (!t->beside() || beside.rows != 1 || beside.additive) return nullptr;
  if (t->groups == 2 && beside.columns != 16) return nullptr;
  constexpr auto all = std::make_integer_sequence<int, sizeof(kTraits) / sizeof(kTraits[0])>{};
  return tile_row_at(int(t - kTraits), beside, all);
}

}  // namespace qjax

// The matrix product around the tiles: prologue, scheduling over threads, epilogue.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "matmul_f32.h"
#include "pool.h"
#include "rows.h"
#if defined(__AVX512VNNI__)
#include "matmul_int.h"
#include "matmul_row.h"
#endif

namespace qjax {

namespace {

#if defined(__AVX512VNNI__)
constexpr int kTileMax = kTileF32 > kTileInt ? kTileF32 : kTileInt;
static_assert(kTileFused <= kTileMax);
#else
constexpr int kTileMax = kTileF32;
#endif

// The group of columns that each unit (or half of one) belongs to.
std::vector<int32_t> groups_of_units(const Weight& w, int64_t units) {
  if (!w.traits->beside()) return {};
  const int per_unit = w.traits->groups;
  std::vector<int32_t> groups(units * per_unit);
  for (int64_t i = 0; i < units * per_unit; ++i)
    groups[i] = int32_t(std::min(i * (32 / per_unit) / w.beside.columns, w.beside.groups - 1));
  return groups;
}

struct MatmulRun {
  const Matmul& a;
  int64_t units, padded;  // k rounded up to whole units
  // Weights that find the same inputs share them: `distinct` ones, and which each weight has.
  int distinct = 0, source[Matmul::kMaxWeights], weight_of[Matmul::kMaxWeights];
  float* x_f32 = nullptr;  // [distinct][rows][padded], normed
  std::vector<int32_t> groups[Matmul::kMaxWeights];  // of columns, for each (half) unit
#if defined(__AVX512VNNI__)
  std::vector<IntRows> ints;  // [distinct], or none
  TileRow row_kernels[Matmul::kMaxWeights] = {};  // where there is one for a single row
#endif

  bool uses_f32(const Weight& w) const { return a.precision == kFloat32 || w.traits->only_f32(); }

  bool rounds_weights(const Weight& w) const {
    return a.precision == kFloat32 && w.beside.rounded != kUnrounded;
  }

  explicit MatmulRun(const Matmul& a) : a(a), units(units_of(a.k)), padded(32 * units_of(a.k)) {
    bool f32 = false, rounded = false;
#if defined(__AVX512VNNI__)
    for (int i = 0; i < a.count && a.rows == 1 && a.precision == kInt16; ++i)
      row_kernels[i] = tile_row_for(a.weights[i].traits, a.weights[i].beside);
#endif
    for (int i = 0; i < a.count; ++i) groups[i] = groups_of_units(a.weights[i], units);
    for (int i = 0; i < a.count; ++i) (uses_f32(a.weights[i]) ? f32 : rounded) = true;
    for (int i = 0; i < a.count; ++i) {
      int of = 0;
      while (of < distinct && !same_inputs(a.inputs[weight_of[of]], a.inputs[i], a.k)) ++of;
      if (of == distinct) weight_of[distinct++] = i;
      source[i] = of;
    }
    if (f32) x_f32 = reinterpret_cast<float*>(scratch<0>(distinct * a.rows * padded * 4));
#if defined(__AVX512VNNI__)
    if (rounded) {
      const int bits = a.precision == kInt16 ? 16 : 8;
      const int64_t words = a.rows * IntRows::words_per_row(bits, units);
      int32_t* memory = reinterpret_cast<int32_t*>(scratch<1>(distinct * words * 4));
      for (int i = 0; i < distinct; ++i) ints.emplace_back(bits, a.rows, units, memory + i * words);
    }
#endif
  }

  float* row_f32(int of, int64_t row) const { return x_f32 + (of * a.rows + row) * padded; }

  void prologue(int of, int64_t row) {
    const float* x = a.x + row * a.k;
    const Inputs& inputs = a.inputs[weight_of[of]];
#if defined(__AVX512VNNI__)
    if (!ints.empty() && !x_f32 && !a.norm && !inputs.any() && a.k == padded)
      return ints[of].put(row, x);
#endif
    float* y = x_f32 ? row_f32(of, row) : reinterpret_cast<float*>(scratch<2>(padded * 4));
    if (a.norm) rms_norm(x, a.norm, a.eps, a.k, y);
    else std::memcpy(y, x, a.k * 4);
    if (inputs.any())
      treat_inputs(inputs, y, a.k, reinterpret_cast<float*>(scratch<5>(padded * 4)));
    std::fill(y + a.k, y + padded, 0.0f);
#if defined(__AVX512VNNI__)
    if (!ints.empty()) ints[of].put(row, y);
#endif
  }

  // The panel `p` of weight `w` against some rows, tile by tile.
  struct Panel {
    const Weight& w;
    View view;
    const float* f32 = nullptr;
    const float* values = nullptr;  // decoded, but not scaled
    const uint8_t* codes = nullptr;
    const float* sb = nullptr;
#if defined(__AVX512VNNI__)
    TileRow row = nullptr;
#endif
  };

  template <int Slot>
  Panel open_panel(const Weight& w, int64_t p, int64_t rows) {
    Panel panel{w, {w.tiles + p * panel_bytes(*w.traits, a.k)}};
#if defined(__AVX512VNNI__)
    panel.row = row_kernels[&w - a.weights];
    if (panel.row) {
      panel.view.beside = &w.beside;
      panel.view.scale = w.beside.scale_of(p);
      panel.view.zero = w.beside.zero_of(p);
      return panel;
    }
#endif
    if (w.traits->beside()) {
      float* scales = reinterpret_cast<float*>(scratch<Slot + 3>(w.beside.groups * kScaleFloats * 4));
      panel_scales(*w.traits, w.beside, p, scales);
      panel.view.scales = {scales, groups[&w - a.weights].data()};
      panel.view.beside = &w.beside;
    }
    const bool many = rows > tile_rows();
#if defined(__AVX512F__)
    if (w.traits->beside() && w.traits->only_f32() && !rounds_weights(w)) {
      if (rows > kTileFused) {
        float* values = reinterpret_cast<float*>(scratch<Slot>(padded * 64));
        float_kernels_for(w.traits).decode(panel.view, a.k, values);
        panel.values = values;
      }
      return panel;
    }
#endif
    if (uses_f32(w)) {
      if (w.traits->type == F32) {
        panel.f32 = reinterpret_cast<const float*>(panel.view.tiles);
      } else {
        float* f32 = reinterpret_cast<float*>(scratch<Slot>(padded * 64));
        decode_f32_for(w.traits)(panel.view, a.k, f32);
        panel.f32 = f32;
      }
    }
#if defined(__AVX512VNNI__)
    else if (many || ints[0].bits == 8) {
      const int64_t code_bytes = padded * 16;
      uint8_t* codes = scratch<Slot>(code_bytes + units * 2 * 128);
      panel.codes = codes;
      panel.sb = reinterpret_cast<float*>(codes + code_bytes);
      int_kernels_for(w.traits, ints[0].bits).decode(panel.view, a.k, codes,
                                                     reinterpret_cast<float*>(codes + code_bytes));
    }
#endif
    return panel;
  }

  // While a decoded panel is used, the one after it in memory comes closer, a part with each tile.
  void fetch_next(const Panel& panel, int64_t row, int64_t rows, int64_t all) const {
    if (!panel.codes) return;
    const int64_t bytes = panel_bytes(*panel.w.traits, a.k);
    const uint8_t* next = panel.view.tiles + bytes;
    for (int64_t at = bytes * row / all / 64 * 64; at < bytes * (row + rows) / all; at += 64)
      __builtin_prefetch(next + at, 0, 2);
  }

  int tile_rows() const {
#if defined(__AVX512VNNI__)
    if (!ints.empty()) return kTileInt;
#endif
    return kTileF32;
  }

  void product(const Panel& panel, int64_t row, int rows, float (*out)[16]) {
    const int of = source[&panel.w - a.weights];
#if defined(__AVX512VNNI__)
    if (panel.row) return panel.row(panel.view, a.k, ints[of].tile(0, panel.w.traits->groups), out);
#endif
    if (panel.f32) return tile_f32_n(rows, row_f32(of, row), padded, panel.f32, out);
#if defined(__AVX512F__)
    if (panel.w.traits->only_f32()) {
      const FloatKernels& floats = float_kernels_for(panel.w.traits);
      const TileFloats* tiles = panel.values ? floats.decoded : floats.fused;
      for (int first = 0; first < rows; first += kTileFused) {
        const int count = std::min(rows - first, kTileFused);
        tiles[count - 1](panel.view, panel.values, a.k, row_f32(of, row + first), padded,
                         out + first);
      }
      return;
    }
#endif
#if defined(__AVX512VNNI__)
    const IntTile x = ints[of].tile(row / kTileInt, panel.w.traits->groups);
    const IntKernels& kernels = int_kernels_for(panel.w.traits, ints[of].bits);
    if (panel.codes) kernels.decoded[rows - 1](panel.codes, panel.sb, units, x, out);
    else kernels.fused[rows - 1](panel.view, a.k, x, out);
#endif
  }

  void epilogue(const Weight& w, int64_t p, int64_t row, int rows, float (*out)[16],
                const float (*up)[16]) {
    const int64_t n0 = 16 * p;
    const int lanes = int(std::min<int64_t>(16, w.n - n0));
    alignas(64) float buffer[16];
    // Partial panels go through a buffer, whole ones straight through memory.
    auto get = [&](const float* source) {
      if (lanes == 16) return load(source);
      std::fill(buffer, buffer + 16, 0.0f);
      std::copy(source, source + lanes, buffer);
      return load(buffer);
    };
    for (int m = 0; m < rows; ++m) {
      v16f y = load(out[m]);
      if (w.bias) y += get(w.bias + n0);
      if (up) {
        v16f other = load(up[m]);
        if (a.weights[1].bias) other += get(a.weights[1].bias + n0);
        y = (a.activation == kSilu ? silu(y) : gelu_tanh(y)) * other;
      }
      const int64_t at = (row + m) * w.n + n0;
      if (a.residual && !a.post_norm) y += get(a.residual + at);
      if (lanes == 16 && !up && streams(w)) {
        store_past_caches(w.y + at, y);
      } else if (lanes == 16) {
        store(w.y + at, y);
      } else {
        store(buffer, y);
        std::copy(buffer, buffer + lanes, w.y + at);
      }
    }
  }

  // Logits of a large vocabulary: rows lie far apart, often at powers of two, where their lines
  // would drive each other out of the caches before they are whole.
  bool streams(const Weight& w) const {
    return a.rows > 1 && w.n >= (1 << 15) && w.n % 16 == 0 &&
           reinterpret_cast<uintptr_t>(w.y) % 64 == 0;
  }

  void panels(int64_t p, const Weight& w, const Weight* up, int64_t row0, int64_t row1) {
    const int step = tile_rows();
    const Panel panel = open_panel<3>(w, p, row1 - row0);
    alignas(64) float out[kTileMax][16], out_up[kTileMax][16];
    if (!up) {
      for (int64_t row = row0; row < row1; row += step) {
        const int rows = int(std::min<int64_t>(step, row1 - row));
        fetch_next(panel, row - row0, rows, row1 - row0);
        product(panel, row, rows, out);
        epilogue(w, p, row, rows, out, nullptr);
      }
      if (streams(w)) finish_stores();
      return;
    }
    const Panel panel_up = open_panel<4>(*up, p, row1 - row0);
    for (int64_t row = row0; row < row1; row += step) {
      const int rows = int(std::min<int64_t>(step, row1 - row));
      product(panel, row, rows, out);
      product(panel_up, row, rows, out_up);
      epilogue(w, p, row, rows, out, out_up);
    }
  }

  void run_all() {
    const bool gated = a.activation != kIdentity;
    int64_t starts[Matmul::kMaxWeights + 1] = {0};
    const int outputs = gated ? 1 : a.count;
    for (int i = 0; i < outputs; ++i) starts[i + 1] = starts[i] + panels_of(a.weights[i].n);
    const int64_t total = starts[outputs];
    // Rows go in blocks that stay in the second-level cache while the panels pass by.
    const int step = tile_rows();
    const int64_t row_bytes = padded * (x_f32 ? 4 : a.precision == kInt16 ? 2 : 1);
    const int64_t block = std::max<int64_t>(step, 400000 / row_bytes / step * step);
    const int64_t blocks = (a.rows + block - 1) / block;
    const int64_t tiles = (a.rows + step - 1) / step;
    parallel_for(tiles * distinct, [&](int64_t item) {
      const int64_t t = item % tiles;
      for (int64_t row = t * step; row < std::min(a.rows, (t + 1) * step); ++row)
        prologue(int(item / tiles), row);
    });
    parallel_for(total * blocks, [&](int64_t item) {
      const int64_t b = item / total, p = item % total;
      int w = 0;
      while (p >= starts[w + 1]) ++w;
      panels(p - starts[w], a.weights[w], gated ? &a.weights[1] : nullptr, b * block,
             std::min(a.rows, (b + 1) * block));
    });
    if (!a.post_norm) return;
    const Weight& w = a.weights[0];
    parallel_for(tiles, [&](int64_t t) {
      for (int64_t row = t * step; row < std::min(a.rows, (t + 1) * step); ++row) {
        float* y = w.y + row * w.n;
        rms_norm(y, a.post_norm, a.eps, w.n, y);
        if (a.residual)
          for (int64_t c = 0; c < w.n; ++c) y[c] += a.residual[row * w.n + c];
      }
    });
  }
};

}  // namespace

void matmul(const Matmul& a) {
  if (a.rows > 0) MatmulRun(a).run_all();
}

// Rows of a weight as float32. Decoding one row reads one lane of its panel.
void embedding(const Embedding& a) {
  const Traits& t = *a.traits;
  const std::vector<int32_t> groups =
      groups_of_units({a.traits, a.tiles, a.n, nullptr, nullptr, a.beside}, units_of(a.k));
  parallel_for(a.count, [&](int64_t i) {
    float* panel = reinterpret_cast<float*>(scratch<3>(32 * units_of(a.k) * 64));
    const int64_t id = std::min<int64_t>(std::max<int64_t>(a.ids[i], 0), a.n - 1);
    View view{a.tiles + id / 16 * panel_bytes(t, a.k)};
    if (t.beside()) {
      float* scales = reinterpret_cast<float*>(scratch<6>(a.beside.groups * kScaleFloats * 4));
      panel_scales(t, a.beside, id / 16, scales);
      view.scales = {scales, groups.data()};
      view.beside = &a.beside;
    }
    decode_f32_for(&t)(view, a.k, panel);
    for (int64_t c = 0; c < a.k; ++c) a.y[i * a.k + c] = panel[16 * c + id % 16];
  });
}

}  // namespace qjax

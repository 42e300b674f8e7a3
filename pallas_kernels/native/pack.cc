// Raw GGUF rows to the tile16 layout and back. Every bit of the file is kept, so unpacking is exact.
#include <atomic>
#include <cstring>

#include "pack_blocks.h"
#include "pool.h"
#include "tile.h"

namespace qjax {
namespace {

// The codes and scale bits of one unit (32 columns) of one row, as they lie in the file.
struct Unit {
  uint8_t codes[32];
  uint16_t d = 0, m = 0;      // f16 bits; headers of K-quants
  uint8_t multiplier[4] = {};  // per group: sc (and m at [2]) as the scale stream stores them
};

uint16_t load16(const uint8_t* p) { uint16_t v; std::memcpy(&v, p, 2); return v; }
uint32_t load32(const uint8_t* p) { uint32_t v; std::memcpy(&v, p, 4); return v; }
void store16(uint8_t* p, uint16_t v) { std::memcpy(p, &v, 2); }
void store32(uint8_t* p, uint32_t v) { std::memcpy(p, &v, 4); }

void get_nibbles(const uint8_t* qs, uint8_t* codes) {  // 16 low nibbles, then 16 high
  for (int i = 0; i < 16; ++i) {
    codes[i] = qs[i] & 15;
    codes[16 + i] = qs[i] >> 4;
  }
}
void put_nibbles(uint8_t* qs, const uint8_t* codes) {
  for (int i = 0; i < 16; ++i) qs[i] = codes[i] | codes[16 + i] << 4;
}
void get_bits(uint32_t bits, int value, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (bits >> i & 1) * value;
}
uint32_t put_bits(int value, const uint8_t* codes) {
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t((codes[i] & value) != 0) << i;
  return bits;
}
// K-quants spread `bits`-wide fields of 32 columns over 32 bytes, at one shift.
void get_field(const uint8_t* p, int shift, int mask, int up, uint8_t* codes) {
  for (int i = 0; i < 32; ++i) codes[i] |= (p[i] >> shift & mask) << up;
}
void put_field(uint8_t* p, int shift, int mask, int up, const uint8_t* codes) {
  for (int i = 0; i < 32; ++i) p[i] |= (codes[i] >> up & mask) << shift;
}

// The 6-bit scales and mins of Q4_K and Q5_K: group g of 8 in 12 bytes.
void get_scales6(const uint8_t* b, int g, uint8_t* out) {
  if (g < 4) {
    out[0] = b[g] & 63;
    out[2] = b[g + 4] & 63;
  } else {
    out[0] = (b[g + 4] & 15) | (b[g - 4] >> 6) << 4;
    out[2] = b[g + 4] >> 4 | (b[g] >> 6) << 4;
  }
}
void put_scales6(uint8_t* b, int g, const uint8_t* in) {
  if (g < 4) {
    b[g] |= in[0];
    b[g + 4] |= in[2];
  } else {
    b[g + 4] |= (in[0] & 15) | (in[2] & 15) << 4;
    b[g - 4] |= in[0] >> 4 << 6;
    b[g] |= in[2] >> 4 << 6;
  }
}

// `u` counts units inside the block of the file; block bytes must be zero before write_unit.
void read_unit(const Traits& t, const uint8_t* b, int u, Unit& x) {
  std::memset(x.codes, 0, 32);
  const int half = u / 4, shift = 2 * (u % 4);  // 2-bit fields: 128 columns per 32 bytes
  switch (t.type) {
    case Q4_0: case IQ4_NL:
      x.d = load16(b); get_nibbles(b + 2, x.codes); break;
    case Q4_1:
      x.d = load16(b); x.m = load16(b + 2); get_nibbles(b + 4, x.codes); break;
    case Q5_0:
      x.d = load16(b); get_nibbles(b + 6, x.codes); get_bits(load32(b + 2), 16, x.codes); break;
    case Q5_1:
      x.d = load16(b); x.m = load16(b + 2);
      get_nibbles(b + 8, x.codes); get_bits(load32(b + 4), 16, x.codes); break;
    case Q8_0:
      x.d = load16(b); std::memcpy(x.codes, b + 2, 32); break;
    case Q2_K:
      x.d = load16(b + 80); x.m = load16(b + 82);
      x.multiplier[0] = b[2 * u]; x.multiplier[1] = b[2 * u + 1];
      get_field(b + 16 + 32 * half, shift, 3, 0, x.codes); break;
    case Q3_K:
      x.d = load16(b + 108);
      for (int g = 2 * u; g < 2 * u + 2; ++g) {
        int low = g < 8 ? b[96 + g] & 15 : b[96 + g - 8] >> 4;
        int high = b[96 + 8 + g % 4] >> (2 * (g / 4)) & 3;
        x.multiplier[g % 2] = uint8_t((low | high << 4) - 32);
      }
      get_field(b + 32 + 32 * half, shift, 3, 0, x.codes);
      get_field(b, u, 1, 2, x.codes); break;
    case Q4_K: case Q5_K:
      x.d = load16(b); x.m = load16(b + 2);
      get_scales6(b + 4, u, x.multiplier);
      get_field(b + (t.type == Q4_K ? 16 : 48) + 32 * (u / 2), 4 * (u % 2), 15, 0, x.codes);
      if (t.type == Q5_K) get_field(b + 16, u, 1, 4, x.codes);
      break;
    case Q6_K:
      x.d = load16(b + 208);
      x.multiplier[0] = b[192 + 2 * u]; x.multiplier[1] = b[192 + 2 * u + 1];
      get_field(b + 64 * half + 32 * (u % 2), 4 * (u % 4 / 2), 15, 0, x.codes);
      get_field(b + 128 + 32 * half, shift, 3, 4, x.codes); break;
    case IQ4_XS: {
      x.d = load16(b);
      int low = b[4 + u / 2] >> (4 * (u % 2)) & 15, high = load16(b + 2) >> (2 * u) & 3;
      x.multiplier[0] = uint8_t((low | high << 4) - 32);
      get_nibbles(b + 8 + 16 * u, x.codes); break;
    }
    default: break;
  }
}

void write_unit(const Traits& t, uint8_t* b, int u, const Unit& x) {
  const int half = u / 4, shift = 2 * (u % 4);
  switch (t.type) {
    case Q4_0: case IQ4_NL:
      store16(b, x.d); put_nibbles(b + 2, x.codes); break;
    case Q4_1:
      store16(b, x.d); store16(b + 2, x.m); put_nibbles(b + 4, x.codes); break;
    case Q5_0: case Q5_1: {
      uint8_t low[32];
      for (int i = 0; i < 32; ++i) low[i] = x.codes[i] & 15;
      int at = t.type == Q5_0 ? 2 : 4;
      store16(b, x.d);
      if (t.type == Q5_1) store16(b + 2, x.m);
      store32(b + at, put_bits(16, x.codes)); put_nibbles(b + at + 4, low); break;
    }
    case Q8_0:
      store16(b, x.d); std::memcpy(b + 2, x.codes, 32); break;
    case Q2_K:
      store16(b + 80, x.d); store16(b + 82, x.m);
      b[2 * u] = x.multiplier[0]; b[2 * u + 1] = x.multiplier[1];
      put_field(b + 16 + 32 * half, shift, 3, 0, x.codes); break;
    case Q3_K:
      store16(b + 108, x.d);
      for (int g = 2 * u; g < 2 * u + 2; ++g) {
        int value = int8_t(x.multiplier[g % 2]) + 32;
        b[96 + g % 8] |= g < 8 ? value & 15 : (value & 15) << 4;
        b[96 + 8 + g % 4] |= value >> 4 << (2 * (g / 4));
      }
      put_field(b + 32 + 32 * half, shift, 3, 0, x.codes);
      put_field(b, u, 1, 2, x.codes); break;
    case Q4_K: case Q5_K:
      store16(b, x.d); store16(b + 2, x.m);
      put_scales6(b + 4, u, x.multiplier);
      put_field(b + (t.type == Q4_K ? 16 : 48) + 32 * (u / 2), 4 * (u % 2), 15, 0, x.codes);
      if (t.type == Q5_K) put_field(b + 16, u, 1, 4, x.codes);
      break;
    case Q6_K:
      store16(b + 208, x.d);
      b[192 + 2 * u] = x.multiplier[0]; b[192 + 2 * u + 1] = x.multiplier[1];
      put_field(b + 64 * half + 32 * (u % 2), 4 * (u % 4 / 2), 15, 0, x.codes);
      put_field(b + 128 + 32 * half, shift, 3, 4, x.codes); break;
    case IQ4_XS: {
      int value = int8_t(x.multiplier[0]) + 32;
      store16(b, x.d);
      b[4 + u / 2] |= (value & 15) << (4 * (u % 2));
      store16(b + 2, uint16_t(load16(b + 2) | value >> 4 << (2 * u)));
      put_nibbles(b + 8 + 16 * u, x.codes); break;
    }
    default: break;
  }
}

// A plane of `bits` (1, 2 or 4) taken at bit `up` of each code; the row's lane is `row`.
void put_plane(uint8_t* plane, int bits, int up, int row, const uint8_t* codes) {
  const uint32_t mask = 0x01010101u * ((1 << bits) - 1);
  for (int v = 0; v < bits; ++v) {
    uint32_t word = 0;
    for (int at = 0; at < 8; at += bits, codes += 4) word |= (load32(codes) >> up & mask) << at;
    store32(plane + 64 * v + 4 * row, word);
  }
}
void get_plane(const uint8_t* plane, int bits, int up, int row, uint8_t* codes) {
  const uint32_t mask = 0x01010101u * ((1 << bits) - 1);
  for (int v = 0; v < bits; ++v) {
    const uint32_t word = load32(plane + 64 * v + 4 * row);
    for (int at = 0; at < 8; at += bits, codes += 4)
      store32(codes, load32(codes) | (word >> at & mask) << up);
  }
}

void put_codes(const Traits& t, uint8_t* unit, int row, const uint8_t* codes) {
  if (t.base == 8) {
    for (int i = 0; i < 8; ++i) std::memcpy(unit + 64 * i + 4 * row, codes + 4 * i, 4);
    return;
  }
  put_plane(unit, t.base, 0, row, codes);
  if (t.high) put_plane(unit + 64 * t.base, t.high, t.base, row, codes);
}
void get_codes(const Traits& t, const uint8_t* unit, int row, uint8_t* codes) {
  if (t.base == 8) {
    for (int i = 0; i < 8; ++i) std::memcpy(codes + 4 * i, unit + 64 * i + 4 * row, 4);
    return;
  }
  std::memset(codes, 0, 32);
  get_plane(unit, t.base, 0, row, codes);
  if (t.high) get_plane(unit + 64 * t.base, t.high, t.base, row, codes);
}

void put_scales(const Traits& t, uint8_t* panel, int64_t u, int row, const Unit& x) {
  uint8_t* own = panel + unit_offset(t, u) + t.code_bytes();
  uint8_t* head = panel + header_offset(t, u);
  if (t.scale == kD || t.scale == kDM) {
    store16(own + 2 * row, x.d);
    if (t.scale == kDM) store16(own + 32 + 2 * row, x.m);
    return;
  }
  store16(head + 2 * row, x.d);
  if (t.header_bytes() == 64) store16(head + 32 + 2 * row, x.m);
  own[row] = x.multiplier[0];
  if (t.scale == kSuper2) own[16 + row] = x.multiplier[2];
  else if (t.groups == 2) own[16 + row] = x.multiplier[1];
}
void get_scales(const Traits& t, const uint8_t* panel, int64_t u, int row, Unit& x) {
  const uint8_t* own = panel + unit_offset(t, u) + t.code_bytes();
  const uint8_t* head = panel + header_offset(t, u);
  if (t.scale == kD || t.scale == kDM) {
    x.d = load16(own + 2 * row);
    if (t.scale == kDM) x.m = load16(own + 32 + 2 * row);
    return;
  }
  x.d = load16(head + 2 * row);
  if (t.header_bytes() == 64) x.m = load16(head + 32 + 2 * row);
  x.multiplier[0] = own[row];
  if (t.scale == kSuper2) x.multiplier[2] = own[16 + row];
  else if (t.groups == 2) x.multiplier[1] = own[16 + row];
}

// 32 codes of `bits` bits from the stream of a row, of which `count` are there.
void read_codes(const uint8_t* row, int bits, int64_t first, int64_t count, uint8_t* codes) {
  std::memset(codes, 0, 32);
  if (bits == 8) return void(std::memcpy(codes, row + first, count));
  if (bits == 4 && count == 32) {
    for (int i = 0; i < 16; ++i) {
      codes[2 * i] = row[first / 2 + i] & 15;
      codes[2 * i + 1] = row[first / 2 + i] >> 4;
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * bits;
    int value = row[at / 8] >> (at % 8);
    if (at % 8 + bits > 8) value |= row[at / 8 + 1] << (8 - at % 8);
    codes[i] = uint8_t(value & ((1 << bits) - 1));
  }
}
void write_codes(uint8_t* row, int bits, int64_t first, int64_t count, const uint8_t* codes) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * bits;
    row[at / 8] |= uint8_t(codes[i] << (at % 8));
    if (at % 8 + bits > 8) row[at / 8 + 1] |= uint8_t(codes[i] >> (8 - at % 8));
  }
}

// Rows of plain codes. `flip` turns offset-binary bytes into signed ones. False where a code is e4m3's
// NaN, which kernels would take for a number.
template <bool kPack>
bool convert_codes(const Traits& t, uint8_t* raw, int64_t rows, int64_t k, uint8_t* panel,
                   uint8_t flip) {
  const int bits = t.base + t.high;
  const int64_t row_bytes = k * bits / 8;
  bool numbers = true;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = raw + r * row_bytes;
    if (t.small_float()) {
      for (int64_t c = 0; c < k; ++c) {
        uint8_t& byte = panel[small_float_offset(c, r)];
        if (kPack) byte = row[c];
        else row[c] = byte;
        numbers &= t.type != E4M3 || (byte & 0x7f) != 0x7f;
      }
      continue;
    }
    for (int64_t u = 0; u < units_of(k); ++u) {
      uint8_t* unit = panel + unit_offset(t, u);
      const int64_t count = k - 32 * u < 32 ? k - 32 * u : 32;
      uint8_t codes[32];
      if (kPack) {
        read_codes(row, bits, 32 * u, count, codes);
        for (uint8_t& code : codes) code ^= flip;
        put_codes(t, unit, int(r), codes);
      } else {
        get_codes(t, unit, int(r), codes);
        for (uint8_t& code : codes) code ^= flip;
        write_codes(row, bits, 32 * u, count, codes);
      }
    }
  }
  return numbers;
}

template <bool kPack>
void convert_panel(const Traits& t, uint8_t* raw, int64_t rows, int64_t k, uint8_t* panel) {
  const int64_t row_bytes = k / t.raw_elems * t.raw_bytes;
  const int units_per_block = t.raw_elems / 32;
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = raw + r * row_bytes;
    if (t.scale == kExpanded) {
      for (int64_t b = 0; b < k / t.raw_elems; ++b)
        convert_block<kPack>(t, row + b * t.raw_bytes, int(r), panel + b * 16 * t.raw_bytes);
      continue;
    }
    if (t.dense()) {
      const int size = t.base / 8;
      for (int64_t c = 0; c < k; ++c) {
        uint8_t* tile = panel + (c * 16 + r) * size;
        kPack ? std::memcpy(tile, row + c * size, size) : std::memcpy(row + c * size, tile, size);
      }
      continue;
    }
    for (int64_t u = 0; u < k / 32; ++u) {
      uint8_t* block = row + u / units_per_block * t.raw_bytes;
      uint8_t* unit = panel + unit_offset(t, u);
      Unit x;
      if (kPack) {
        read_unit(t, block, int(u % units_per_block), x);
        put_codes(t, unit, int(r), x.codes);
        put_scales(t, panel, u, int(r), x);
      } else {
        get_codes(t, unit, int(r), x.codes);
        get_scales(t, panel, u, int(r), x);
        write_unit(t, block, int(u % units_per_block), x);
      }
    }
  }
}

template <bool kPack>
int convert(int type, uint8_t* raw, int64_t n, int64_t k, uint8_t* tiles, int flip) {
  const Traits* t = find_traits(type);
  if (!t || k % t->raw_elems || (t->beside() && k * (t->base + t->high) % 8)) return 1;
  const int64_t row_bytes =
      t->beside() ? k * (t->base + t->high) / 8 : k / t->raw_elems * t->raw_bytes;
  const int64_t bytes = panel_bytes(*t, k);
  std::atomic<bool> numbers{true};
  parallel_for(panels_of(n), [&](int64_t p) {
    const int64_t rows = n - p * 16 < 16 ? n - p * 16 : 16;
    if (kPack) {
      if (rows < 16 || t->dense() || t->beside()) std::memset(tiles + p * bytes, 0, bytes);
    } else {
      std::memset(raw + p * 16 * row_bytes, 0, rows * row_bytes);
    }
    uint8_t *own_raw = raw + p * 16 * row_bytes, *own_tiles = tiles + p * bytes;
    if (!t->beside()) convert_panel<kPack>(*t, own_raw, rows, k, own_tiles);
    else if (!convert_codes<kPack>(*t, own_raw, rows, k, own_tiles, uint8_t(flip))) numbers = false;
  });
  return numbers ? 0 : 2;
}

}  // namespace
}  // namespace qjax

extern "C" {

int64_t qjax_tile_bytes(int type, int64_t n, int64_t k) {
  const qjax::Traits* t = qjax::find_traits(type);
  if (!t || k % t->raw_elems) return -1;
  return qjax::panels_of(n) * qjax::panel_bytes(*t, k);
}
// `flip` is xored into codes of a byte: 128 turns offset-binary ones into signed ones. 0 where all is
// well, 1 for a type or shape that has no tiles, 2 for codes that no kernel reads.
int qjax_pack(int type, const uint8_t* raw, int64_t n, int64_t k, uint8_t* tiles, int flip) {
  return qjax::convert<true>(type, const_cast<uint8_t*>(raw), n, k, tiles, flip);
}
int qjax_unpack(int type, const uint8_t* tiles, int64_t n, int64_t k, uint8_t* raw, int flip) {
  return qjax::convert<false>(type, raw, n, k, const_cast<uint8_t*>(tiles), flip);
}
int qjax_num_threads() { return qjax::num_threads(); }
void qjax_set_num_threads(int n) { qjax::set_num_threads(n); }
}

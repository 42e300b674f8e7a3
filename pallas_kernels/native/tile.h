// The "tile16" weight layout: how a quantized matrix [N, K] lies in memory for the CPU kernels.
//
// Rows are cut into panels of 16 (one SIMD lane a row), columns into units of 32. A unit is its
// codes followed by its scales: a product reads the whole matrix as one stream, which is what
// processors fetch ahead best.
//
// Codes of one unit. A row owns one 32-bit lane of each 64-byte vector, whose byte b belongs to
// column 4i + b of a quad i: shifting a vector by a constant and masking gives the codes of four
// columns of 16 rows.
//   4-bit plane  4 vectors; quad i at bits 4(i % 2) of the bytes of vector i / 2
//   2-bit plane  2 vectors; quad i at bits 2(i % 4) of the bytes of vector i / 4
//   1-bit plane  1 vector;  quad i at bit i
//   8-bit plane  8 vectors; quad i is vector i
// Wider codes add a 1- or 2-bit plane of high bits after the plane of low bits.
// Dense types (f32, f16, bf16) are [32 columns][16 rows] of their own elements.
//
// 8-bit floats are [16 pairs of columns][16 rows][2 columns] of bytes: a 16-bit shift or product turns
// one column of a pair into float16.
//
// Scales of block types keep the bits of the file: f16 d (and m) per unit, or for K-quants an f16
// header before each 8 units and 8-bit multipliers per unit or half unit. Types of plain codes have
// theirs in arrays beside (kBeside): [panels][groups of columns][16 rows], or one for each group of
// rows; see scales.h. A weight is s * (code - zero) + b.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qjax {

// Numbers are those of ggml, so that a file's own type id can be passed through.
enum QType : int {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11,
  Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20,
  IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23, IQ1_M = 29, BF16 = 30, TQ1_0 = 34, TQ2_0 = 35, Q1_0 = 41,
  Q2_0 = 42,
  // Codes with scales beside them, our own numbers. U: with zero points, B: offset binary.
  U2 = 102, U3, U4, U5, U6, U2B = 112, U3B, U4B, U5B, U6B,
  I8 = 120, I8Z,        // signed bytes, without and with zero points
  FP4 = 130, FP4H,      // e2m1 with a scale per unit or more, and per half unit
  LUT4 = 132,           // float codebook
  E4M3 = 140, E5M2 = 141,
};

enum Lookup : int { kNoLookup = 0, kIQ4 = 1, kFP4 = 2, kCodebook = 3 };

enum Scale : int {
  kNone,    // dense
  kD,       // f16 d[16]
  kDM,      // f16 d[16], m[16]
  kSuper1,  // header f16 d[16]; per group int8 sc[16]:            s = d * sc
  kSuper2,  // header f16 d[16], dmin[16]; per unit u8 sc[16], m[16]: s = d * sc, b = -dmin * m
  kSuper2n, // the same with 4-bit sc | m << 4 in one byte per group
  kBeside,  // arrays of their own
  kBesideZ, // the same with zero points
  kExpanded, // blocks whose fields lie side by side, see blocks.h
};

// Everything a kernel must know about a type, as constants.
struct Traits {
  QType type;
  int raw_elems, raw_bytes;  // block of the file
  int base, high;            // bits of the low plane and of the high plane
  int groups;                // scales per unit of 32 columns: 1 or 2
  int zero;                  // code that means 0
  Scale scale;
  Lookup lookup;             // what codes index
  constexpr bool small_float() const { return type == E4M3 || type == E5M2; }
  constexpr bool beside() const { return scale == kBeside || scale == kBesideZ; }
  constexpr bool only_f32() const { return dense() || small_float() || lookup == kCodebook; }
  constexpr int code_bytes() const { return base >= 16 ? 512 * base / 8 : 64 * (base + high); }
  constexpr int unit_scale_bytes() const {
    return scale == kD ? 32 : scale == kDM ? 64 : scale == kSuper2 ? 32 : scale == kExpanded ? 64 * groups
           : scale == kNone || beside() ? 0 : 16 * groups;
  }
  constexpr int header_bytes() const {  // per 8 units
    return scale == kSuper1 ? 32 : (scale == kSuper2 || scale == kSuper2n) ? 64 : 0;
  }
  constexpr int unit_bytes() const { return code_bytes() + unit_scale_bytes(); }
  constexpr bool has_min() const {
    return scale == kDM || scale == kSuper2 || scale == kSuper2n || scale == kBesideZ;
  }
  constexpr bool dense() const { return scale == kNone; }
};

inline constexpr Traits kTraits[] = {
    {F32, 1, 4, 32, 0, 1, 0, kNone, kNoLookup},
    {F16, 1, 2, 16, 0, 1, 0, kNone, kNoLookup},
    {BF16, 1, 2, 16, 0, 1, 0, kNone, kNoLookup},
    {Q4_0, 32, 18, 4, 0, 1, 8, kD, kNoLookup},
    {Q4_1, 32, 20, 4, 0, 1, 0, kDM, kNoLookup},
    {Q5_0, 32, 22, 4, 1, 1, 16, kD, kNoLookup},
    {Q5_1, 32, 24, 4, 1, 1, 0, kDM, kNoLookup},
    {Q8_0, 32, 34, 8, 0, 1, 128, kD, kNoLookup},
    {Q2_K, 256, 84, 2, 0, 2, 0, kSuper2n, kNoLookup},
    {Q3_K, 256, 110, 2, 1, 2, 4, kSuper1, kNoLookup},
    {Q4_K, 256, 144, 4, 0, 1, 0, kSuper2, kNoLookup},
    {Q5_K, 256, 176, 4, 1, 1, 0, kSuper2, kNoLookup},
    {Q6_K, 256, 210, 4, 2, 2, 32, kSuper1, kNoLookup},
    {IQ4_NL, 32, 18, 4, 0, 1, 128, kD, kIQ4},
    {IQ4_XS, 256, 136, 4, 0, 1, 128, kSuper1, kIQ4},
    {IQ1_S, 256, 50, 8, 0, 1, 128, kExpanded, kNoLookup},
    {IQ1_M, 256, 56, 8, 0, 2, 128, kExpanded, kNoLookup},
    {IQ2_XXS, 256, 66, 8, 0, 1, 128, kExpanded, kNoLookup},
    {IQ2_XS, 256, 74, 8, 0, 2, 128, kExpanded, kNoLookup},
    {IQ2_S, 256, 82, 8, 0, 2, 128, kExpanded, kNoLookup},
    {IQ3_XXS, 256, 98, 8, 0, 1, 128, kExpanded, kNoLookup},
    {IQ3_S, 256, 110, 8, 0, 1, 128, kExpanded, kNoLookup},
    {TQ1_0, 256, 54, 8, 0, 1, 128, kExpanded, kNoLookup},
    {TQ2_0, 256, 66, 8, 0, 1, 128, kExpanded, kNoLookup},
    {Q1_0, 128, 18, 8, 0, 1, 128, kExpanded, kNoLookup},
    {Q2_0, 64, 18, 8, 0, 1, 128, kExpanded, kNoLookup},
    {U2, 1, 0, 2, 0, 1, 0, kBesideZ, kNoLookup},
    {U3, 1, 0, 2, 1, 1, 0, kBesideZ, kNoLookup},
    {U4, 1, 0, 4, 0, 1, 0, kBesideZ, kNoLookup},
    {U5, 1, 0, 4, 1, 1, 0, kBesideZ, kNoLookup},
    {U6, 1, 0, 4, 2, 1, 0, kBesideZ, kNoLookup},
    {U2B, 1, 0, 2, 0, 1, 2, kBeside, kNoLookup},
    {U3B, 1, 0, 2, 1, 1, 4, kBeside, kNoLookup},
    {U4B, 1, 0, 4, 0, 1, 8, kBeside, kNoLookup},
    {U5B, 1, 0, 4, 1, 1, 16, kBeside, kNoLookup},
    {U6B, 1, 0, 4, 2, 1, 32, kBeside, kNoLookup},
    {I8, 1, 0, 8, 0, 1, 128, kBeside, kNoLookup},
    {I8Z, 1, 0, 8, 0, 1, 128, kBesideZ, kNoLookup},
    {FP4, 1, 0, 4, 0, 1, 128, kBeside, kFP4},
    {FP4H, 1, 0, 4, 0, 2, 128, kBeside, kFP4},
    {LUT4, 1, 0, 4, 0, 1, 0, kBeside, kCodebook},
    {E4M3, 1, 0, 8, 0, 1, 0, kBeside, kNoLookup},
    {E5M2, 1, 0, 8, 0, 1, 0, kBeside, kNoLookup},
};

constexpr const Traits* find_traits(int type) {
  for (const Traits& t : kTraits)
    if (t.type == type) return &t;
  return nullptr;
}

// Signed values of the 4-bit non-linear types, plus 128 so that they are unsigned codes.
constexpr uint8_t kIQ4Codes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                   129, 141, 153, 166, 181, 197, 217, 241};

// Twice the values of e2m1, plus 128.
constexpr uint8_t kFP4Codes[16] = {128, 129, 130, 131, 132, 134, 136, 140,
                                   128, 127, 126, 125, 124, 122, 120, 116};

inline int64_t units_of(int64_t k) { return (k + 31) / 32; }
inline int64_t panel_bytes(const Traits& t, int64_t k) {
  int64_t units = units_of(k);
  int64_t bytes = t.scale == kExpanded ? k / t.raw_elems * t.raw_bytes * 16
                                       : units * t.unit_bytes() + units / 8 * t.header_bytes();
  return (bytes + 63) / 64 * 64;
}
inline int64_t panels_of(int64_t n) { return (n + 15) / 16; }

// Where the parts of unit u lie inside a panel.
constexpr int64_t header_offset(const Traits& t, int64_t u) {
  return u / 8 * (t.header_bytes() + 8 * t.unit_bytes());
}
constexpr int64_t unit_offset(const Traits& t, int64_t u) {
  if (t.header_bytes() == 0) return u * t.unit_bytes();
  return header_offset(t, u) + t.header_bytes() + u % 8 * t.unit_bytes();
}

// Where the byte of column c and row r of 8-bit floats lies inside a panel.
constexpr int64_t small_float_offset(int64_t c, int64_t r) { return c / 2 * 32 + 2 * r + c % 2; }

}  // namespace qjax

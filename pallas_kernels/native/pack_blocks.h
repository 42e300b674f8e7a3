// Blocks of the types that blocks.h expands: where their fields lie in the file and in a panel.
#pragma once
#include <cstring>

#include "blocks.h"

namespace qjax {

// `count` elements of `size` bytes, of each unit or of the block. In the block they begin at byte
// `at`, and `step` further on for each unit; in the unit or the header element i of row r is at
// to + (16 * i + r) * size.
struct Field {
  bool head;
  int at, step, count, size, to;
};
struct BlockFields {
  QType type;
  Field fields[5];  // those without a count are none
};
constexpr bool kHeader = true, kUnit = false;
constexpr Field kBlockScale = {kHeader, 0, 0, 1, 2, 0};
constexpr BlockFields kBlockFields[] = {
    {IQ2_XXS, {kBlockScale, {kUnit, 2, 8, 4, 1, 0}, {kUnit, 6, 8, 1, 4, 64}}},
    {IQ2_XS, {kBlockScale, {kUnit, 2, 8, 4, 2, 0}, {kUnit, 66, 1, 1, 1, 128}}},
    {IQ2_S,
     {kBlockScale, {kUnit, 2, 4, 4, 1, 0}, {kUnit, 34, 4, 1, 4, 64}, {kUnit, 66, 1, 1, 1, 128},
      {kUnit, 74, 1, 1, 1, 144}}},
    {IQ3_XXS, {kBlockScale, {kUnit, 2, 8, 8, 1, 0}, {kUnit, 66, 4, 1, 4, 128}}},
    {IQ3_S,
     {kBlockScale, {kUnit, 2, 8, 8, 1, 0}, {kUnit, 74, 4, 1, 4, 128}, {kUnit, 66, 1, 1, 1, 192},
      {kHeader, 106, 0, 4, 1, 32}}},
    {IQ1_S, {kBlockScale, {kUnit, 2, 4, 4, 1, 0}, {kUnit, 34, 2, 1, 2, 64}}},
    {IQ1_M, {{kHeader, 48, 0, 4, 2, 0}, {kUnit, 0, 4, 4, 1, 0}, {kUnit, 32, 2, 1, 2, 64}}},
    {TQ1_0, {{kHeader, 52, 0, 1, 2, 0}, {kHeader, 0, 0, 13, 4, kRuns}}},
    {TQ2_0, {{kHeader, 64, 0, 1, 2, 0}, {kHeader, 0, 0, 16, 4, kRuns}}},
    {Q1_0, {kBlockScale, {kHeader, 2, 0, 4, 4, kRuns}}},
    {Q2_0, {kBlockScale, {kHeader, 2, 0, 4, 4, kRuns}}},
};

// One block of one row, to its place among those of 16 rows, or back.
template <bool kPack>
void convert_block(const Traits& t, uint8_t* block, int r, uint8_t* tile) {
  const BlockFields* known = kBlockFields;
  while (known->type != t.type) ++known;
  const int units = t.raw_elems / 32;
  for (const Field& f : known->fields)
    for (int u = 0; u < (f.head ? 1 : units); ++u)
      for (int i = 0; i < f.count; ++i) {
        uint8_t* in_file = block + f.at + f.step * u + f.size * i;
        uint8_t* in_tile = tile + f.to + (16 * i + r) * f.size;
        if (!f.head) in_tile += 16 * (head_row(t.type) + u * unit_row(t.type));
        std::memcpy(kPack ? in_tile : in_file, kPack ? in_file : in_tile, f.size);
      }
}

}  // namespace qjax

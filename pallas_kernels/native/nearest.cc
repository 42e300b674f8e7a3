// The nearest of the numbers, or of the vectors of a grid, that codes stand for.
#include <algorithm>

#include "kernels.h"
#include "simd.h"

namespace qjax {
namespace {

// Where the first of `count` numbers, whole lines of 16, that equals `value` lies; 0 if none does.
int first_equal(const float* from, int count, float value) {
#if defined(__AVX512F__)
  for (int i = 0; i < count; i += 16) {
    const __mmask16 equal =
        _mm512_cmp_ps_mask(_mm512_load_ps(from + i), _mm512_set1_ps(value), _CMP_EQ_OQ);
    if (equal) return i + __builtin_ctz(equal);
  }
#else
  for (int i = 0; i < count; ++i)
    if (from[i] == value) return i;
#endif
  return 0;
}

// Halfway between one of `count` levels and the next.
struct Edges {
  float at[15] = {};
  Edges(const float* levels, int count) {
    for (int j = 0; j < count - 1; ++j) at[j] = (levels[j] + levels[j + 1]) / 2;
  }
};

// Entries of a table are packed: the digits of `Size` numbers in the lower 16 bits, above them which
// entry it is.
template <int Size>
struct Search {
  static constexpr int kBits = 16 / Size, kDigits = 1 << kBits;
  static constexpr int kTables = 4, kTogether = Size / kTables;  // digits that four bits hold

  const NearestVector& a;
  const Edges edges{a.levels, a.num_levels};
  float levels[16] = {};
  v16f level_of[kTogether], places;  // of a digit in each four bits; of a number in a lattice point

  explicit Search(const NearestVector& a) : a(a) {
    alignas(64) float from[16];
    // The bits that no digit has: they lead to some level, which no entry asks for.
    std::memcpy(levels, a.levels, a.num_levels * sizeof(float));
    for (int d = 0; d < kTogether; ++d) {
      for (int i = 0; i < 16; ++i) from[i] = levels[i >> (kBits * d) & (kDigits - 1)];
      level_of[d] = load(from);
    }
    for (int i = 0; i < 16; ++i) from[i] = i % Size ? from[i - 1] * a.num_levels : 1;
    places = load(from);
  }

  // The candidates of `count` vectors, 16 / Size at most: those of the points that they round to.
  void find_points(const float* y, int count, const int32_t** candidates) const {
    alignas(64) float digits[16] = {};
    std::memcpy(digits, y, count * Size * sizeof(float));
    const v16f from = load(digits);
    v16f rounded = splat(0);
    for (int j = 0; j < a.num_levels - 1; ++j)
      rounded += where_greater(from, edges.at[j], places, splat(0));
    store(digits, rounded);
    for (int i = 0; i < count; ++i) {
      float point = 0;
      for (int p = 0; p < Size; ++p) point += digits[i * Size + p];
      candidates[i] = a.table + int64_t(point) * a.near;
      for (int line = 0; line < a.near && line < 64; line += 16)
        __builtin_prefetch(candidates[i] + line);
    }
  }

  // The nearest of a vector's candidates. What four bits of digits would cost is worked out once;
  // then every entry costs four look-ups, of 16 entries at once.
  void choose(int64_t n, const int32_t* candidates) const {
    const float *y = a.y + n * Size, *w = a.w + n * Size;
    alignas(64) float costs[kTables][16], distances[NearestVector::kMostNear];
    QJAX_UNROLL for (int t = 0; t < kTables; ++t) {
      v16f cost = splat(0);
      QJAX_UNROLL for (int d = 0; d < kTogether; ++d) {
        const v16f off = splat(y[t * kTogether + d]) - level_of[d];
        cost += splat(w[t * kTogether + d]) * (off * off);
      }
      store(costs[t], cost);
    }
    v16f least = splat(3.4e38f);
    for (int i = 0; i < a.near; i += 16) {
      const v16i packed = load_ints(candidates + i);
      v16f sum = Table16(costs[0])[packed];
      QJAX_UNROLL for (int t = 1; t < kTables; ++t) sum += Table16(costs[t])[packed >> (4 * t)];
      store(distances + i, sum);
      least = vmin(sum, least);
    }
    const float distance = -max(-least);
    const int32_t chosen = candidates[first_equal(distances, a.near, distance)];
    a.distance[n] = distance;
    a.index[n] = chosen >> 16;
    for (int p = 0; p < Size; ++p)
      a.values[n * Size + p] = levels[chosen >> (kBits * p) & (kDigits - 1)];
  }

  void run() const {
    constexpr int kRun = 64;  // vectors whose candidates are on their way from memory
    const int32_t* candidates[kRun];
    for (int64_t first = 0; first < a.count; first += kRun) {
      const int run = int(a.count - first < kRun ? a.count - first : kRun);
      for (int v = 0; v < run; ++v) candidates[v] = a.table;
      if (a.num_points > 1)
        for (int v = 0; v < run; v += 16 / Size)
          find_points(a.y + (first + v) * Size, std::min(run - v, 16 / Size), candidates + v);
      for (int v = 0; v < run; ++v) choose(first + v, candidates[v]);
    }
  }
};

}  // namespace

void nearest_vector(const NearestVector& a) {
  a.size == 4 ? Search<4>(a).run() : Search<8>(a).run();
}

void nearest_level(const float* y, int64_t count, const float* levels, float* values) {
  const Edges edges(levels, 16);
  auto nearest = [&](const v16f& from) QJAX_INLINED {
    v16f value = splat(levels[0]);
    QJAX_UNROLL for (int j = 0; j < 15; ++j)
      value = where_greater(from, edges.at[j], splat(levels[j + 1]), value);
    return value;
  };
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(values + i, nearest(load(y + i)));
  if (i == count) return;
  alignas(64) float rest[16] = {};
  std::memcpy(rest, y + i, (count - i) * sizeof(float));
  store(rest, nearest(load(rest)));
  std::memcpy(values + i, rest, (count - i) * sizeof(float));
}

}  // namespace qjax

// The nearest of the numbers, or of the vectors of a grid, that codes stand for.
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

// Entries of a table are packed: the digits of `Size` numbers in the lower 16 bits, above them which
// entry it is. What each digit would cost at each place is worked out once for a vector; then every
// entry costs a look-up a place, of 16 entries at once.
template <int Size>
void vectors(const NearestVector& a) {
  constexpr int kBits = 16 / Size, kDigits = 1 << kBits, kRun = 64;
  alignas(64) float levels[16] = {}, places[16], digits[16];
  alignas(64) float costs[Size][16], distances[NearestVector::kMostNear];
  for (int i = 0; i < 16; ++i) {
    // The bits above a digit are those of the next one: they lead to the same level.
    if (i % kDigits < a.num_levels) levels[i] = a.levels[i % kDigits];
    places[i] = i % Size ? places[i - 1] * a.num_levels : 1;
  }
  const v16f all_levels = load(levels), all_places = load(places);
  const int32_t* candidates[kRun];

  for (int64_t first = 0; first < a.count; first += kRun) {
    const int run = int(a.count - first < kRun ? a.count - first : kRun);
    for (int v = 0; v < run; ++v) candidates[v] = a.table;
    if (a.num_points > 1)
      for (int v = 0; v < run; v += 16 / Size) {
        const float* y = a.y + (first + v) * Size;
        alignas(64) float last[16] = {};
        if (v + 16 / Size > run) {
          std::memcpy(last, y, (run - v) * Size * sizeof(float));
          y = last;
        }
        v16f rounded = splat(0);
        for (int j = 0; j < a.num_levels - 1; ++j)
          rounded += where_greater(load(y), a.edges[j], all_places, splat(0));
        store(digits, rounded);
        for (int i = 0; i < 16 / Size && v + i < run; ++i) {
          float point = 0;
          for (int p = 0; p < Size; ++p) point += digits[i * Size + p];
          candidates[v + i] += int64_t(point) * a.near;
          for (int line = 0; line < a.near && line < 64; line += 16)
            __builtin_prefetch(candidates[v + i] + line);
        }
      }
    for (int v = 0; v < run; ++v) {
      const int64_t n = first + v;
      QJAX_UNROLL for (int p = 0; p < Size; ++p) {
        const v16f off = splat(a.y[n * Size + p]) - all_levels;
        store(costs[p], splat(a.w[n * Size + p]) * (off * off));
      }
      v16f least = splat(3.4e38f);
      for (int i = 0; i < a.near; i += 16) {
        const v16i packed = load_ints(candidates[v] + i);
        v16f sum = Table16(costs[0])[packed];
        QJAX_UNROLL for (int p = 1; p < Size; ++p) sum += Table16(costs[p])[packed >> (kBits * p)];
        store(distances + i, sum);
        least = vmin(sum, least);
      }
      const float distance = -max(-least);
      const int32_t chosen = candidates[v][first_equal(distances, a.near, distance)];
      a.distance[n] = distance;
      a.index[n] = chosen >> 16;
      for (int p = 0; p < Size; ++p)
        a.values[n * Size + p] = levels[chosen >> (kBits * p) & (kDigits - 1)];
    }
  }
}

}  // namespace

void nearest_vector(const NearestVector& a) { a.size == 4 ? vectors<4>(a) : vectors<8>(a); }

void nearest_level(const float* y, int64_t count, const float* levels, const float* edges,
                   float* values) {
  auto nearest = [&](const v16f& from) QJAX_INLINED {
    v16f value = splat(levels[0]);
    QJAX_UNROLL for (int j = 0; j < 15; ++j)
      value = where_greater(from, edges[j], splat(levels[j + 1]), value);
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

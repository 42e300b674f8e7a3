// Sums of products of every two columns of a matrix: X^T X, of which half is computed.
#include <memory>

#include "kernels.h"
#include "lanes.h"
#include "pool.h"

namespace qjax {
namespace {

constexpr int kWidth = 32;  // columns of a panel: those of 128 rows, twice, fit the nearest cache
constexpr int64_t kRun = 128;
// Sums that are held in registers: of so many columns, each with so many vectors of 16.
#if defined(__AVX512F__)
constexpr int kColumns = 8, kVectors = 2;
#else
constexpr int kColumns = 4, kVectors = 1;
#endif

// Adds to sums [32, 32] the products of columns of `a` and `b`, [rows, 32] each.
void add_products(const float* a, const float* b, int64_t rows, float* sums) {
  for (int i = 0; i < kWidth; i += kColumns)
    for (int j = 0; j < kWidth; j += 16 * kVectors) {
      v16f sum[kColumns][kVectors];
      QJAX_UNROLL for (int c = 0; c < kColumns; ++c)
        QJAX_UNROLL for (int v = 0; v < kVectors; ++v) sum[c][v] = splat(0);
      for (int64_t r = 0; r < rows; ++r) {
        const float *from = a + r * kWidth + i, *with = b + r * kWidth + j;
        v16f line[kVectors];
        QJAX_UNROLL for (int v = 0; v < kVectors; ++v) line[v] = load(with + 16 * v);
        QJAX_UNROLL for (int c = 0; c < kColumns; ++c) {
          const v16f one = splat(from[c]);
          QJAX_UNROLL for (int v = 0; v < kVectors; ++v) sum[c][v] += one * line[v];
        }
      }
      for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) {
          float* to = sums + (i + c) * kWidth + j + 16 * v;
          store(to, load(to) + sum[c][v]);
        }
    }
}

}  // namespace

void gram(const float* x, int64_t rows, int64_t k, float* out) {
  const int64_t panels = (k + kWidth - 1) / kWidth;
  // By panels, so that what is read together lies together.
  struct alignas(64) Line {
    float columns[kWidth];
  };
  const std::unique_ptr<Line[]> packed(new Line[panels * rows]);
  parallel_for(panels, [&](int64_t p) {
    const int64_t first = p * kWidth, width = k - first < kWidth ? k - first : kWidth;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = packed[p * rows + r].columns;
      std::memcpy(to, x + r * k + first, width * sizeof(float));
      std::memset(to + width, 0, (kWidth - width) * sizeof(float));
    }
  });
  parallel_for(panels * (panels + 1) / 2, [&](int64_t tile) {
    int64_t p = 0, q = tile;  // with q >= p
    for (; q >= panels - p; ++p) q -= panels - p;
    q += p;
    alignas(64) float sums[kWidth * kWidth] = {};
    for (int64_t r = 0; r < rows; r += kRun)
      add_products(packed[p * rows + r].columns, packed[q * rows + r].columns,
                   rows - r < kRun ? rows - r : kRun, sums);
    for (int64_t i = 0; i < kWidth && p * kWidth + i < k; ++i)
      for (int64_t j = 0; j < kWidth && q * kWidth + j < k; ++j) {
        const int64_t row = p * kWidth + i, column = q * kWidth + j;
        out[row * k + column] = out[column * k + row] = sums[i * kWidth + j];
      }
  });
}

}  // namespace qjax

// What the CPU kernels compute. They are compiled once for each instruction set, as a library of
// its own; see build.py.
#pragma once
#include "inputs.h"
#include "scales.h"
#include "tile.h"

namespace qjax {

#if defined(__AVX512VNNI__)
constexpr bool kRoundsActivations = true;
#else
constexpr bool kRoundsActivations = false;
#endif

enum Precision : int { kFloat32 = 0, kInt16 = 1, kInt8 = 2 };  // how activations are rounded
enum Activation : int { kIdentity = 0, kSilu = 1, kGeluTanh = 2 };

struct Weight {
  const Traits* traits;
  const uint8_t* tiles;
  int64_t n;
  const float* bias;  // [n] or null
  float* y;           // [rows, n]
  Beside beside = {};  // of types whose scales lie beside the tiles
};

// y_i = x' W_i^T + bias_i with x' = RMSNorm(x) when norm is given; see matmul/api.py.
struct Matmul {
  static constexpr int kMaxWeights = 8;
  const float* x;
  int64_t rows, k;
  const float* norm = nullptr;  // [k]
  float eps = 0;
  Weight weights[kMaxWeights];
  int count = 0;
  Activation activation = kIdentity;  // two weights: y of the first = act(first) * second
  const float* residual = nullptr;    // [rows, n]
  const float* post_norm = nullptr;   // [n]
  Precision precision = kFloat32;
  Inputs inputs[kMaxWeights];         // what happens to normed rows first, for each weight
};

constexpr int kBlockKeys = 128;  // keys between two updates of attention's running maximum
enum PageType : int { kPagesF32, kPagesBF16, kPagesE4M3, kPagesE5M2, kPagesInt8, kPagesInt4 };

// The arrays of `Pages` of kv_update/pages.py: of keys, or of values.
struct CachePages {
  void* values = nullptr;     // [pages, kv_heads, page_size, head_dim], int4 two to a byte
  uint16_t* scale = nullptr;  // bfloat16 [pages, kv_heads, page_size] or null
  int8_t* zero = nullptr;     // [pages, kv_heads, page_size] or null
};

// Attention over a paged cache; see paged_attention/api.py.
struct Attention {
  const float *q, *k, *v;  // [T, heads * head_dim]
  CachePages k_pages, v_pages;
  PageType page_type;
  bool exact;     // arithmetic in float32
  const int32_t *block_table, *query_start, *seq_lens;
  int64_t num_seqs, max_blocks, num_pages, page_size;
  int heads, kv_heads, head_dim, rotary_dim;
  float scale, soft_cap, eps;  // soft_cap 0: none
  int64_t window;              // 0: none
  const float *cos, *sin;      // [T, rotary_dim / 2] or null
  const float *q_norm, *k_norm;    // [head_dim] or null
  const float* sinks;              // [heads] or null
  const float *k_scale, *v_scale;  // [1] or [kv_heads], or null
  int64_t k_scales, v_scales;      // how many
  const float *k_basis, *q_basis;  // [kv_heads, head_dim, head_dim] or null
  float* out;                      // [T, heads * head_dim]
};

struct Embedding {
  const int32_t* ids;
  int64_t count, n, k;
  const Traits* traits;
  const uint8_t* tiles;
  Beside beside;
  float* y;  // [count, k]
};

struct NearestVector {
  static constexpr int kMostNear = 2048;  // the entries of the largest grid

  const float *y, *w;  // [count, size]
  int64_t count;
  int size, near, num_levels;    // size 4 or 8; near in whole lines of 16
  int64_t num_points;            // num_levels ^ size, or one for all
  const int32_t* table;          // [num_points, near], packed entries
  const float* levels;           // [num_levels], in order
  float *values, *distance;      // [count, size], [count]
  int32_t* index;                // [count]
};

void matmul(const Matmul&);
void attention(const Attention&);
void embedding(const Embedding&);
void nearest_vector(const NearestVector&);
// Of 16 levels, in order.
void nearest_level(const float* y, int64_t count, const float* levels, float* values);
// X^T X [k, k] of x [rows, k].
void gram(const float* x, int64_t rows, int64_t k, float* out);

}  // namespace qjax

// Attention over a paged cache, for prefill and decode alike.
//
// Inside a page the elements of one head lie so that neither product needs a transpose, in pairs
// where a bfloat16 product takes two at a time (pair = 2, else 1):
//   K  [head_dim / pair][page_size][pair]   lanes are keys
//   V  [page_size / pair][head_dim][pair]   lanes are channels
// Softmax runs online over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022).
#pragma once
#include <limits>
#include <vector>

#include "matmul.h"

namespace qjax {

struct ElementF32 {
  static constexpr int pair = 1;
  using Storage = float;
  using Scalar = float;  // `pair` neighbouring values of the broadcast operand
  static QJAX_INLINE Storage round(float x) { return x; }
  static QJAX_INLINE v16f load(const Storage* p) { return qjax::load(p); }
  static QJAX_INLINE void fma(v16f& acc, v16f v, Scalar x) { acc += v * x; }
};

struct ElementBF16 {
  static constexpr int pair = 2;
  using Storage = uint16_t;
  using Scalar = int32_t;
  static QJAX_INLINE Storage round(float x) { return to_bf16(x); }
#if defined(__AVX512BF16__)
  static QJAX_INLINE __m512bh load(const Storage* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static QJAX_INLINE void fma(v16f& acc, __m512bh v, Scalar x) {
    acc = (v16f)_mm512_dpbf16_ps((__m512)acc, v, (__m512bh)_mm512_set1_epi32(x));
  }
#else
  struct Pair {
    v16f even, odd;
  };
  static QJAX_INLINE Pair load(const Storage* p) {
    v16i words;
    std::memcpy(&words, p, 64);
    return {as_float(words << 16), as_float(words & int32_t(0xffff0000))};
  }
  static QJAX_INLINE void fma(v16f& acc, const Pair& v, Scalar x) {
    acc += v.even * from_bf16(uint16_t(x)) + v.odd * from_bf16(uint16_t(uint32_t(x) >> 16));
  }
#endif
};

constexpr int kTileQ = 32;       // query rows (tokens x heads of a group) of one work item
constexpr int kBlockKeys = 128;  // keys between two updates of the running maximum
constexpr int kChunk = 8;        // query rows that share one load

// scores[m][16] of MR query rows against 16 keys.
template <class E, int MR>
QJAX_INLINE void score_keys(const typename E::Storage* k, int64_t page_size, int pairs,
                            const typename E::Scalar* q, float* scores, int64_t stride) {
  v16f acc[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) acc[m] = v16f{};
  for (int d = 0; d < pairs; ++d) {
    const auto keys = E::load(k + d * page_size * E::pair);
    QJAX_UNROLL for (int m = 0; m < MR; ++m) E::fma(acc[m], keys, q[m * pairs + d]);
  }
  QJAX_UNROLL for (int m = 0; m < MR; ++m) store(scores + m * stride, acc[m]);
}

// out[m][16 channels] += p[m] . v over the keys of one page.
template <class E, int MR>
QJAX_INLINE void add_values(const typename E::Storage* v, int64_t head_dim, int64_t pairs,
                            const typename E::Scalar* p, int64_t p_stride, float* out) {
  v16f acc[MR];
  QJAX_UNROLL for (int m = 0; m < MR; ++m) acc[m] = load(out + m * head_dim);
  for (int64_t i = 0; i < pairs; ++i) {
    const auto values = E::load(v + i * head_dim * E::pair);
    QJAX_UNROLL for (int m = 0; m < MR; ++m) E::fma(acc[m], values, p[m * p_stride + i]);
  }
  QJAX_UNROLL for (int m = 0; m < MR; ++m) store(out + m * head_dim, acc[m]);
}

// Calls f(constant MR) for the rows of [0, rows) in chunks of at most kChunk.
template <int MR = kChunk, class F>
QJAX_INLINE void row_chunks(int rows, F&& f) {
  int row = 0;
  for (; row + MR <= rows; row += MR) f(std::integral_constant<int, MR>{}, row);
  if constexpr (MR > 1) {
    if (row < rows)
      row_chunks<MR - 1>(rows - row, [&](auto mr, int r) QJAX_INLINED { f(mr, row + r); });
  }
}

template <class E>
struct AttentionRun {
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  const Attention& a;
  const int group, pairs;
  Storage* queries;  // [T][heads][head_dim], normed, rotated, scaled
  struct Item {
    int64_t seq, first, count;  // tokens of one sequence
    int head;                   // KV head
  };
  std::vector<Item> items;

  explicit AttentionRun(const Attention& a)
      : a(a), group(a.heads / a.kv_heads), pairs(a.head_dim / E::pair) {
    const int64_t tokens = a.query_start[a.num_seqs];
    queries = reinterpret_cast<Storage*>(
        scratch<0>(size_t(tokens) * a.heads * a.head_dim * sizeof(Storage)));
    const int64_t step = std::max(1, kTileQ / group);
    for (int64_t s = 0; s < a.num_seqs; ++s)
      for (int64_t t = a.query_start[s]; t < a.query_start[s + 1]; t += step)
        for (int h = 0; h < a.kv_heads; ++h)
          items.push_back({s, t, std::min<int64_t>(step, a.query_start[s + 1] - t), h});
    std::reverse(items.begin(), items.end());  // late tokens see more keys: start with them
  }

  int64_t position(int64_t seq, int64_t token) const {
    return a.seq_lens[seq] - (a.query_start[seq + 1] - token);
  }
  int64_t page_of(int64_t seq, int64_t index) const {
    const int64_t page = a.block_table[seq * a.max_blocks + index];
    return std::min<int64_t>(std::max<int64_t>(page, 0), a.num_pages - 1);
  }
  Storage* page(void* pages, int64_t page, int head) const {
    return static_cast<Storage*>(pages) + (page * a.kv_heads + head) * a.page_size * a.head_dim;
  }

  // RMSNorm and rotary embedding (half-split) of one head.
  void rotate(const float* x, const float* norm, int64_t token, float* y) const {
    if (norm) rms_norm(x, norm, a.eps, a.head_dim, y);
    else std::memcpy(y, x, a.head_dim * 4);
    if (!a.cos) return;
    const int half = a.rotary_dim / 2;
    const float *cos = a.cos + token * half, *sin = a.sin + token * half;
    for (int i = 0; i < half; ++i) {
      const float x1 = y[i], x2 = y[half + i];
      y[i] = x1 * cos[i] - x2 * sin[i];
      y[half + i] = x2 * cos[i] + x1 * sin[i];
    }
  }

  void write(int64_t seq, int64_t token) {
    float* y = reinterpret_cast<float*>(scratch<2>(a.head_dim * 4));
    const int64_t d = a.head_dim, pos = position(seq, token);
    for (int h = 0; h < a.heads; ++h) {
      rotate(a.q + (token * a.heads + h) * d, a.q_norm, token, y);
      Storage* q = queries + (token * a.heads + h) * d;
      for (int i = 0; i < d; ++i) q[i] = E::round(y[i] * a.scale);
    }
    const int64_t p = page_of(seq, pos / a.page_size), slot = pos % a.page_size;
    for (int h = 0; h < a.kv_heads; ++h) {
      rotate(a.k + (token * a.kv_heads + h) * d, a.k_norm, token, y);
      Storage* k = page(a.k_pages, p, h);
      for (int i = 0; i < d; ++i)
        k[(i / E::pair * a.page_size + slot) * E::pair + i % E::pair] = E::round(y[i]);
      const float* x = a.v + (token * a.kv_heads + h) * d;
      Storage* v = page(a.v_pages, p, h) + slot / E::pair * d * E::pair + slot % E::pair;
      for (int i = 0; i < d; ++i) v[i * E::pair] = E::round(x[i]);
    }
  }

  void attend(const Item& item) {
    const int64_t d = a.head_dim;
    const int rows = int(item.count) * group;
    // Query rows of this KV head, gathered: row = token * group + head in group.
    uint8_t* memory = scratch<5>((kTileQ + group) * (d * 8 + kBlockKeys * 8 + 64) + 4096);
    Scalar* q = reinterpret_cast<Scalar*>(memory);
    float* out = reinterpret_cast<float*>(q + (kTileQ + group) * pairs);
    float* scores = out + (kTileQ + group) * d;
    Scalar* p = reinterpret_cast<Scalar*>(scores + (kTileQ + group) * kBlockKeys);
    float* top = reinterpret_cast<float*>(p + (kTileQ + group) * kBlockKeys / E::pair);
    float* norm = top + kTileQ + group;
    for (int r = 0; r < rows; ++r) {
      const int64_t token = item.first + r / group, head = item.head * group + r % group;
      std::memcpy(q + r * pairs, queries + (token * a.heads + head) * d, d * sizeof(Storage));
      top[r] = -std::numeric_limits<float>::infinity();
      norm[r] = 0;
    }
    std::fill(out, out + rows * d, 0.0f);

    const int64_t first_pos = position(item.seq, item.first), last_pos = first_pos + item.count - 1;
    const int64_t low = a.window ? std::max<int64_t>(0, first_pos - a.window + 1) : 0;
    const int64_t pages_per_block = std::max<int64_t>(1, kBlockKeys / a.page_size);
    for (int64_t pg = low / a.page_size; pg <= last_pos / a.page_size; pg += pages_per_block) {
      const int64_t pages = std::min(pages_per_block, last_pos / a.page_size - pg + 1);
      const int64_t keys = pages * a.page_size, key0 = pg * a.page_size;
      for (int64_t i = 0; i < pages; ++i) {
        const Storage* k = page(a.k_pages, page_of(item.seq, pg + i), item.head);
        for (int64_t c = 0; c < a.page_size; c += 16)
          row_chunks(rows, [&](auto mr, int r) QJAX_INLINED {
            score_keys<E, mr>(k + c * E::pair, a.page_size, pairs, q + r * pairs,
                              scores + r * kBlockKeys + i * a.page_size + c, kBlockKeys);
          });
      }
      for (int r = 0; r < rows; ++r)
        softmax(scores + r * kBlockKeys, keys, key0, first_pos + r / group, top[r], norm[r],
                out + r * d, p + r * kBlockKeys / E::pair);
      for (int64_t i = 0; i < pages; ++i) {
        const Storage* v = page(a.v_pages, page_of(item.seq, pg + i), item.head);
        for (int64_t c = 0; c < d; c += 16)
          row_chunks(rows, [&](auto mr, int r) QJAX_INLINED {
            add_values<E, mr>(v + c * E::pair, d, a.page_size / E::pair,
                              p + r * kBlockKeys / E::pair + i * a.page_size / E::pair,
                              kBlockKeys / E::pair, out + r * d + c);
          });
      }
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t token = item.first + r / group, head = item.head * group + r % group;
      float* y = a.out + (token * a.heads + head) * d;
      float total = norm[r];
      // A sink far above all scores leaves next to nothing: no need to be exact, nor to overflow.
      if (a.sinks) total += std::exp(std::min(a.sinks[head] - top[r], 80.0f));
      const float factor = 1.0f / total;
      for (int64_t c = 0; c < d; c += 16) store(y + c, load(out + r * d + c) * factor);
    }
  }

  // Turns a row of scores into weights, and brings what was summed before to the new maximum.
  void softmax(float* scores, int64_t keys, int64_t key0, int64_t pos, float& top, float& norm,
               float* out, Scalar* p) const {
    constexpr float kMasked = -std::numeric_limits<float>::infinity();
    if (a.soft_cap > 0)
      for (int64_t c = 0; c < keys; c += 16) {  // cap tanh(s / cap) = cap (1 - 2 / (e^(2s/cap) + 1))
        v16f e = vexp(load(scores + c) * (2.0f / a.soft_cap));
        store(scores + c, a.soft_cap * (1.0f - 2.0f / (e + 1.0f)));
      }
    for (int64_t j = std::max<int64_t>(0, pos + 1 - key0); j < keys; ++j) scores[j] = kMasked;
    if (a.window)
      for (int64_t j = 0; j < std::min(keys, pos - a.window + 1 - key0); ++j) scores[j] = kMasked;
    v16f best = load(scores);
    for (int64_t c = 16; c < keys; c += 16) best = vmax(best, load(scores + c));
    const float block_top = max(best);
    if (block_top == kMasked) {
      std::memset(p, 0, keys / E::pair * sizeof(Scalar));
      return;
    }
    if (block_top > top) {
      if (norm > 0) {
        const float factor = std::exp(top - block_top);
        norm *= factor;
        for (int64_t c = 0; c < a.head_dim; c += 16) store(out + c, load(out + c) * factor);
      }
      top = block_top;
    }
    v16f total = {};
    Storage* weights = reinterpret_cast<Storage*>(p);
    for (int64_t c = 0; c < keys; c += 16) {
      const v16f s = load(scores + c);
      v16f e = vexp(s - top);
      e = s == kMasked ? v16f{} : e;
      total += e;
#if defined(__AVX512BF16__)
      if constexpr (E::pair == 2) {
        _mm256_storeu_si256((__m256i*)(weights + c), (__m256i)_mm512_cvtneps_pbh((__m512)e));
        continue;
      }
#endif
      for (int i = 0; i < 16; ++i) weights[c + i] = E::round(e[i]);
    }
    norm += sum(total);
  }

  void run_all() {
    const int64_t tokens = a.query_start[a.num_seqs];
    std::vector<int32_t> owner(tokens);
    for (int64_t s = 0; s < a.num_seqs; ++s)
      std::fill(&owner[0] + a.query_start[s], &owner[0] + a.query_start[s + 1], int32_t(s));
    // Few tokens are written faster than a thread is told to help.
    if (tokens <= 4)
      for (int64_t t = 0; t < tokens; ++t) write(owner[t], t);
    else
      parallel_for(tokens, [&](int64_t t) { write(owner[t], t); });
    parallel_for(int64_t(items.size()), [&](int64_t i) { attend(items[i]); });
  }
};

inline void attention(const Attention& a) {
  if (a.query_start[a.num_seqs] <= 0) return;
  if (a.cache_bf16) AttentionRun<ElementBF16>(a).run_all();
  else AttentionRun<ElementF32>(a).run_all();
}

}  // namespace qjax

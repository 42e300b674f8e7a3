// Attention over a paged cache, for prefill and decode alike.
//
// Softmax runs online over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022). Where few
// queries see many keys, the keys are cut into segments that threads take side by side; where they
// are cut depends on the sequence alone, and their sums meet in order, so that a sequence gets the
// same numbers whatever else is in its batch.
//
// Codes of a cache meet queries and weights as they are, and scales and zero points go elsewhere:
//   score_j = s_j (q . code_j + zero_j sum(q)),   out = sum_j (p_j s_j) (code_j + zero_j)
#include <limits>
#include <vector>

#include "attention_pages.h"
#include "pool.h"

namespace qjax {

namespace {

constexpr int kTileQ = 32;           // query rows (tokens x heads of a group) of one work item
constexpr int64_t kSegment = 512;    // keys of a segment
constexpr float kMasked = -std::numeric_limits<float>::infinity();

// Runs of `size` numbers, each times the normalized Hadamard matrix (Sylvester's construction); size
// is a power of two, 16 at least.
void hadamard(float* x, int64_t n, int64_t size) {
  const float factor = 1.0f / std::sqrt(float(size));
  for (int64_t i = 0; i < n; i += 16) {
    v16f v = load(x + i) * factor;
    v = sum_and_difference<1>(v);
    v = sum_and_difference<2>(v);
    v = sum_and_difference<4>(v);
    store(x + i, sum_and_difference<8>(v));
  }
  for (int64_t half = 16; half < size; half *= 2)
    for (int64_t first = 0; first < n; first += 2 * half)
      for (int64_t i = first; i < first + half; i += 16) {
        const v16f a = load(x + i), b = load(x + i + half);
        store(x + i, a + b);
        store(x + i + half, a - b);
      }
}

// x [n] times a matrix [n][n], n a multiple of 16.
inline void row_times(const float* x, const float* matrix, int64_t n, float* y) {
  for (int64_t first = 0; first < n; first += 64) {
    const int64_t count = std::min<int64_t>(4, (n - first) / 16);
    v16f total[4] = {};
    auto add = [&](auto columns) {
      for (int64_t i = 0; i < n; ++i)
        for (int c = 0; c < columns; ++c)
          total[c] += load(matrix + i * n + first + 16 * c) * x[i];
    };
    if (count == 4) add(std::integral_constant<int, 4>{});
    else add(int(count));
    for (int c = 0; c < count; ++c) store(y + first + 16 * c, total[c]);
  }
}

// E: the arithmetic; P: what pages hold.
template <class E, class P>
struct AttentionRun {
  using Scalar = typename E::Scalar;
  using Start = typename E::Start;
  struct Query {  // what belongs to a rounded row
    float factor, total;
    Start start;
  };
  struct Item {
    int64_t seq, first, count;    // tokens of one sequence
    int head;                     // KV head
    int64_t begin, end;           // pages
    int64_t segments, rest;       // of the tokens' keys: how many, and how many come after this one
  };

  const Attention& a;
  const int group, groups;  // query heads to a KV head; scalars of a row
  Scalar* queries;          // [T][heads][groups], normed, rotated, scaled
  Query* about;             // [T][heads]
  float* partial = nullptr;  // of each item that is one of several segments: sums, tops, norms
  std::vector<Item> items;
  std::unique_ptr<std::atomic<int64_t>[]> left;  // segments to do, at the last item of each

  explicit AttentionRun(const Attention& a)
      : a(a), group(a.heads / a.kv_heads), groups(a.head_dim / E::pack) {
    const int64_t rows = a.query_start[a.num_seqs] * a.heads;
    queries = reinterpret_cast<Scalar*>(
        scratch<0>(size_t(rows) * (groups * sizeof(Scalar) + sizeof(Query))));
    about = reinterpret_cast<Query*>(queries + rows * groups);
    const int64_t step = std::max(1, kTileQ / group);
    bool segmented = false;
    for (int64_t s = 0; s < a.num_seqs; ++s)
      for (int64_t t = a.query_start[s]; t < a.query_start[s + 1]; t += step) {
        const int64_t count = std::min<int64_t>(step, a.query_start[s + 1] - t);
        const int64_t first = position(s, t), last = position(s, t + count - 1);
        const int64_t low = a.window ? std::max<int64_t>(0, first - a.window + 1) : 0;
        const int64_t begin = low / a.page_size, end = last / a.page_size + 1;
        const int64_t length = std::max<int64_t>(1, kSegment / a.page_size);
        // A long prompt has tokens enough for all threads.
        const bool whole = a.query_start[s + 1] - a.query_start[s] > step;
        const int64_t origin = begin / length;
        const int64_t segments = whole ? 1 : (end - 1) / length - origin + 1;
        segmented |= segments > 1;
        for (int h = 0; h < a.kv_heads; ++h)
          for (int64_t i = segments - 1; i >= 0; --i) {
            const int64_t from = i ? (origin + i) * length : begin;
            const int64_t to = i == segments - 1 ? end : (origin + i + 1) * length;
            items.push_back({s, t, count, h, from, to, segments, segments - 1 - i});
          }
      }
    std::reverse(items.begin(), items.end());  // late tokens see more keys: start with them
    if (!segmented) return;
    partial = reinterpret_cast<float*>(scratch<1>(items.size() * partial_size() * sizeof(float)));
    left = std::make_unique<std::atomic<int64_t>[]>(items.size());
    for (size_t i = 0; i < items.size(); ++i) left[i] = items[i].segments;
  }

  int max_rows() const { return std::max(kTileQ, group); }
  int64_t partial_size() const { return max_rows() * (a.head_dim + 2); }

  int64_t position(int64_t seq, int64_t token) const {
    const int64_t found = a.seq_lens[seq] - (a.query_start[seq + 1] - token);
    return std::max<int64_t>(0, std::min(found, a.max_blocks * a.page_size - 1));
  }
  int64_t page_of(int64_t seq, int64_t index) const {
    const int64_t page = a.block_table[seq * a.max_blocks + index];
    return std::min<int64_t>(std::max<int64_t>(page, 0), a.num_pages - 1);
  }
  HeadOfPage<P> head_of(const CachePages& pages, int64_t page, int head) const {
    const int64_t at = (page * a.kv_heads + head) * a.page_size;
    auto* values = static_cast<typename P::Storage*>(pages.values);
    values += at * a.head_dim / (P::shifted ? 2 : 1);
    return {values, pages.scale + at, pages.zero + at, a.page_size, a.head_dim};
  }
  static float scale_of(const float* scale, int64_t count, int head) {
    return scale ? scale[count > 1 ? head : 0] : 1;
  }

  // kv_update/pages.py says which heads of a cache are turned by a Hadamard matrix, unless keys and
  // queries come in a basis of their own.
  static constexpr bool kTurnsValues = P::shifted;
  bool turns_keys() const {
    return P::scaled || (sizeof(typename P::Storage) == 1 && !a.k_scale);
  }
  void turn(float* y) const { hadamard(y, a.head_dim, a.head_dim & -a.head_dim); }

  // RMSNorm and rotary embedding (half-split) of one head of queries or keys, and their turn, or the
  // product with a matrix [head_dim][head_dim].
  void rotate(const float* x, const float* norm, int64_t token, const float* basis, float* to) const {
    float* y = basis ? reinterpret_cast<float*>(scratch<3>(a.head_dim * 4)) : to;
    if (norm) rms_norm(x, norm, a.eps, a.head_dim, y);
    else std::memcpy(y, x, a.head_dim * 4);
    if (a.cos) {
      const int half = a.rotary_dim / 2;
      const float *cos = a.cos + token * half, *sin = a.sin + token * half;
      for (int i = 0; i < half; ++i) {
        const float x1 = y[i], x2 = y[half + i];
        y[i] = x1 * cos[i] - x2 * sin[i];
        y[half + i] = x2 * cos[i] + x1 * sin[i];
      }
    }
    if (basis) row_times(y, basis, a.head_dim, to);
    else if (turns_keys()) turn(y);
  }
  const float* of_head(const float* bases, int head) const {
    return bases ? bases + int64_t(head) * a.head_dim * a.head_dim : nullptr;
  }

  void write(int64_t seq, int64_t token) {
    float* y = reinterpret_cast<float*>(scratch<2>(a.head_dim * 4));
    const int64_t d = a.head_dim, pos = position(seq, token);
    for (int h = 0; h < a.heads; ++h) {
      rotate(a.q + (token * a.heads + h) * d, a.q_norm, token, of_head(a.q_basis, h / group), y);
      const float scale = a.scale * P::factor * scale_of(a.k_scale, a.k_scales, h / group);
      for (int64_t c = 0; c < d; c += 16) store(y + c, load(y + c) * scale);
      Scalar* q = queries + (token * a.heads + h) * groups;
      Query& query = about[token * a.heads + h];
      E::round(y, d, q, query.factor);
      query.start = E::start(q, d, P::offset);
      query.total = P::shifted ? E::total(q, d, nullptr) * query.factor : 0;
    }
    const int64_t p = page_of(seq, pos / a.page_size), slot = pos % a.page_size;
    auto put = [&](const CachePages& pages, bool keys, int h, float scale) {
      if (scale != 1)
        for (int64_t c = 0; c < d; c += 16) store(y + c, load(y + c) / scale);
      head_of(pages, p, h).put(keys, slot, y);
    };
    for (int h = 0; h < a.kv_heads; ++h) {
      rotate(a.k + (token * a.kv_heads + h) * d, a.k_norm, token, of_head(a.k_basis, h), y);
      put(a.k_pages, true, h, scale_of(a.k_scale, a.k_scales, h));
      std::memcpy(y, a.v + (token * a.kv_heads + h) * d, d * 4);
      if (kTurnsValues) turn(y);
      put(a.v_pages, false, h, scale_of(a.v_scale, a.v_scales, h));
    }
  }

  // Rows of one item: row = token * group + head in group.
  struct Tile {
    float *out, *top, *norm;  // [rows][head_dim], [rows], [rows]
    Scalar *q, *p;            // [rows][groups], [rows][kBlockKeys / pack]
    float *scores;            // [rows][kBlockKeys]
    float *q_factor, *q_total, *p_factor;  // [rows]
    Start *q_start, *p_start;
    float *k_scale, *k_zero, *v_scale, *v_zero;  // [kBlockKeys]
    typename E::Storage* operands;  // [kBlockKeys * head_dim]
    uint8_t* codes;                 // as many
  };

  Tile tile() const {
    const int64_t rows = max_rows(), d = a.head_dim;
    uint8_t* memory = scratch<5>(rows * (d * 12 + kBlockKeys * 12 + 64) + kBlockKeys * (d * 5 + 16) +
                                 20 * 64);
    auto take = [&](auto*& to, int64_t count) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(memory);
      memory += (count * sizeof(*to) + 63) / 64 * 64;
    };
    Tile t;
    take(t.out, rows * d);
    take(t.top, rows);
    take(t.norm, rows);
    take(t.q, rows * groups);
    take(t.p, rows * kBlockKeys / E::pack);
    take(t.scores, rows * kBlockKeys);
    take(t.q_factor, rows);
    take(t.q_total, rows);
    take(t.p_factor, rows);
    take(t.q_start, rows);
    take(t.p_start, rows);
    take(t.k_scale, kBlockKeys);
    take(t.k_zero, kBlockKeys);
    take(t.v_scale, kBlockKeys);
    take(t.v_zero, kBlockKeys);
    take(t.operands, kBlockKeys * d);
    take(t.codes, kBlockKeys * d);
    return t;
  }

  // Pages [pg, pg + count) of one head as operands, and their scales and zero points.
  BlockPages<E> block(const CachePages& pages, bool keys, const Item& item, int64_t pg,
                      int64_t count, const Tile& t) const {
    BlockPages<E> found;
    found.count = count;
    found.page_size = a.page_size;
    found.head_dim = a.head_dim;
    const int64_t size = a.page_size * a.head_dim;
    for (int64_t i = 0; i < count; ++i) {
      const HeadOfPage<P> head = head_of(pages, page_of(item.seq, pg + i), item.head);
      found.page[i] = operand<E, P>(head.values, keys, a.page_size, a.head_dim,
                                    t.operands + i * size, t.codes + i * size);
      for (int64_t c = 0; c < a.page_size; c += 16) {
        const int64_t to = i * a.page_size + c;
        if constexpr (P::scaled)
          store((keys ? t.k_scale : t.v_scale) + to, bf16_16((const uint8_t*)(head.scale + c)));
        if constexpr (P::shifted)
          store((keys ? t.k_zero : t.v_zero) + to,
                signed_bytes16((const uint8_t*)head.zero + c) * (1.0f / 16) - 7.5f);
      }
    }
    return found;
  }

  // Pages [pg, end) of one head are soon read: processors do not see where the next one lies.
  void announce(const CachePages& pages, const Item& item, int64_t pg, int64_t end) const {
    for (; pg < end; ++pg) {
      const HeadOfPage<P> head = head_of(pages, page_of(item.seq, pg), item.head);
      const int64_t size = a.page_size * a.head_dim / (P::shifted ? 2 : 1);
      for (int64_t i = 0; i < size; i += 64 / sizeof(*head.values))
        __builtin_prefetch(head.values + i);
      if (P::scaled) __builtin_prefetch(head.scale);
      if (P::shifted) __builtin_prefetch(head.zero);
    }
  }

  void attend(int64_t index) {
    const Item& item = items[index];
    const int64_t d = a.head_dim;
    const int rows = int(item.count) * group;
    Tile t = tile();
    if (item.segments > 1) {
      t.out = partial + index * partial_size();
      t.top = t.out + max_rows() * d;
      t.norm = t.top + max_rows();
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t token = item.first + r / group, head = item.head * group + r % group;
      const int64_t at = token * a.heads + head;
      std::memcpy(t.q + r * groups, queries + at * groups, groups * sizeof(Scalar));
      t.q_factor[r] = about[at].factor;
      t.q_total[r] = about[at].total;
      t.q_start[r] = about[at].start;
      t.top[r] = kMasked;
      t.norm[r] = 0;
    }
    std::fill(t.out, t.out + rows * d, 0.0f);

    constexpr int64_t stride = kBlockKeys / E::pack;
    const int64_t first_pos = position(item.seq, item.first);
    const int64_t pages_per_block = std::max<int64_t>(1, kBlockKeys / a.page_size);
    for (int64_t pg = item.begin; pg < item.end; pg += pages_per_block) {
      const int64_t count = std::min(pages_per_block, item.end - pg), keys = count * a.page_size;
      announce(a.v_pages, item, pg, pg + count);
      const auto k = block(a.k_pages, true, item, pg, count, t);
      score_all<E>(k, {t.q, groups, t.q_start, t.q_factor}, rows, t.scores);
      announce(a.k_pages, item, pg + count, std::min(pg + count + pages_per_block, item.end));
      const auto v = block(a.v_pages, false, item, pg, count, t);
      for (int r = 0; r < rows; ++r)
        softmax(t, r, keys, pg * a.page_size, first_pos + r / group);
      add_all<E>(v, {t.p, stride, t.p_start, t.p_factor}, rows, t.out);
    }
    if (item.segments == 1) return finish(item, t.out, t.top, t.norm);
    // Segments of the same rows are neighbours; whoever is done last puts them together.
    const int64_t last = index + item.rest;
    if (left[last].fetch_sub(1, std::memory_order_acq_rel) == 1)
      combine(item, last - item.segments + 1);
  }

  // Softmax over all segments, whose sums are of exponentials less their own maximum.
  void combine(const Item& item, int64_t first) {
    const int64_t d = a.head_dim;
    const int rows = int(item.count) * group;
    const Tile t = tile();
    for (int r = 0; r < rows; ++r) {
      auto out = [&](int64_t i) { return partial + (first + i) * partial_size(); };
      auto top = [&](int64_t i) { return out(i)[max_rows() * d + r]; };
      auto norm = [&](int64_t i) { return out(i)[max_rows() * (d + 1) + r]; };
      t.top[r] = kMasked;
      t.norm[r] = 0;
      for (int64_t i = 0; i < item.segments; ++i) t.top[r] = std::max(t.top[r], top(i));
      std::fill(t.out + r * d, t.out + (r + 1) * d, 0.0f);
      for (int64_t i = 0; i < item.segments; ++i) {
        if (top(i) == kMasked) continue;
        const float factor = std::exp(top(i) - t.top[r]);
        t.norm[r] += factor * norm(i);
        for (int64_t c = r * d; c < (r + 1) * d; c += 16)
          store(t.out + c, load(t.out + c) + load(out(i) + c) * factor);
      }
    }
    finish(item, t.out, t.top, t.norm);
  }

  void finish(const Item& item, const float* out, const float* top, const float* norm) const {
    const int64_t d = a.head_dim;
    for (int r = 0; r < int(item.count) * group; ++r) {
      const int64_t token = item.first + r / group, head = item.head * group + r % group;
      float* y = a.out + (token * a.heads + head) * d;
      float total = norm[r];
      // A sink far above all scores leaves next to nothing: no need to be exact, nor to overflow.
      if (a.sinks) total += std::exp(std::min(a.sinks[head] - top[r], 80.0f));
      const float factor = P::factor * scale_of(a.v_scale, a.v_scales, item.head) / total;
      for (int64_t c = 0; c < d; c += 16) store(y + c, load(out + r * d + c) * factor);
      if (kTurnsValues) turn(y);
    }
  }

  // Turns row r of scores into weights, and brings what was summed before to the new maximum.
  void softmax(const Tile& t, int r, int64_t keys, int64_t key0, int64_t pos) const {
    float* scores = t.scores + r * kBlockKeys;
    float &top = t.top[r], &norm = t.norm[r], *out = t.out + r * a.head_dim;
    Scalar* p = t.p + r * (kBlockKeys / E::pack);
    if constexpr (P::scaled)
      for (int64_t c = 0; c < keys; c += 16) {
        v16f s = load(scores + c);
        if constexpr (P::shifted) s += load(t.k_zero + c) * t.q_total[r];
        store(scores + c, s * load(t.k_scale + c));
      }
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
      std::memset(p, 0, keys / E::pack * sizeof(Scalar));
      t.p_factor[r] = 0;
      t.p_start[r] = {};
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
    for (int64_t c = 0; c < keys; c += 16) {
      const v16f s = load(scores + c);
      v16f e = vexp(s - top);
      e = where_equal(s, kMasked, v16f{}, e);
      total += e;
      if constexpr (P::scaled) e = where_equal(s, kMasked, v16f{}, e * load(t.v_scale + c));
      store(scores + c, e);
    }
    norm += sum(total);
    E::round(scores, keys, p, t.p_factor[r]);
    t.p_start[r] = P::shifted ? E::start(E::total(p, keys, t.v_zero)) : E::start(p, keys, P::offset);
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
    parallel_for(int64_t(items.size()), [&](int64_t i) { attend(i); });
  }
};

template <class Fast, class P>
void attention_over(const Attention& a) {
  if (a.exact) AttentionRun<ElementF32, P>(a).run_all();
  else AttentionRun<Fast, P>(a).run_all();
}

}  // namespace

void attention(const Attention& a) {
#if defined(__AVX512VNNI__)
  using Codes = ElementInt;
#else
  using Codes = ElementF32;
#endif
  using Floats8 = std::conditional_t<kPackFloat8 == 2, ElementBF16, ElementF32>;
  if (a.query_start[a.num_seqs] <= 0) return;
  switch (a.page_type) {
    case kPagesF32: return attention_over<ElementF32, PagesF32>(a);
    case kPagesBF16: return attention_over<ElementBF16, PagesBF16>(a);
    case kPagesE4M3: return attention_over<Floats8, PagesE4M3>(a);
    case kPagesE5M2: return attention_over<Floats8, PagesE5M2>(a);
    case kPagesInt8: return attention_over<Codes, PagesInt8>(a);
    case kPagesInt4: return attention_over<Codes, PagesInt4>(a);
  }
}

}  // namespace qjax

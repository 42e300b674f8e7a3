// The kernels as XLA custom calls.
#include <algorithm>
#include <cstring>
#include <string>

#include "blocks.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace qjax {

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("qjax: " + what); }

enum MatmulFlags { kHasNorm = 1, kHasResidual = 2, kHasPostNorm = 4 };
enum InputFlags {  // of each weight
  kHasPreScale = 1, kHasActScale = 2, kHasActZero = 4, kHasActGlobal = 8, kHasPerm = 16,
};

// `act` and `act_values` as matmul/native.py writes them.
Inputs read_inputs(ffi::Span<const int32_t> act, ffi::Span<const float> act_values) {
  Inputs in;
  if (act.size() < 8 || act_values.size() < 4) return in;
  in.rounds = true;
  in.is_float = act[0];
  in.dynamic = act[1];
  in.symmetric = act[2];
  in.mantissa = act[3];
  in.min_exponent = act[4];
  in.max_exponent = act[5];
  in.scale_kind = ScaleKind(act[6]);
  in.group = act[7];
  in.bottom = act_values[0];
  in.top = act_values[1];
  in.divisor = act_values[2];
  in.upper_bound = act_values[3];
  return in;
}

// What matmul/native.py says of the arrays beside the tiles of one weight.
enum BesideField {
  kScaleType, kZeroType, kHasGlobal, kHasCodebook, kForm, kZeroShift, kOffset, kGroupRows,
  kGroupColumns, kBesideFields,
};

// Reads the arguments of a call one after the other. Where weights are those of several experts,
// all their arrays have a leading axis.
struct Arguments {
  ffi::RemainingArgs& args;
  int64_t experts;  // 0: no leading axis
  size_t next = 0;
  std::string problem = {};

  const float* floats(int64_t count) {
    auto buffer = args.get<Floats>(next++);
    if (!buffer.has_value() || int64_t(buffer->element_count()) != count * lead())
      return fail("a float32 argument has the wrong type or size"), nullptr;
    return buffer->typed_data();
  }
  const int32_t* ints(int64_t count) {
    auto buffer = args.get<Ints>(next++);
    if (!buffer.has_value() || int64_t(buffer->element_count()) != count * lead())
      return fail("an int32 argument has the wrong type or size"), nullptr;
    return buffer->typed_data();
  }
  const uint8_t* bytes(int64_t count) {
    auto buffer = args.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value() || int64_t(buffer->size_bytes()) != count * lead())
      return fail("weight bytes do not match its shape"), nullptr;
    return static_cast<const uint8_t*>(buffer->untyped_data());
  }
  void weight(Weight& w, int type, const int32_t* field, int64_t n, int64_t k) {
    w.traits = find_traits(type);
    w.n = n;
    w.bias = nullptr;
    if (!w.traits) return fail("unknown weight type " + std::to_string(type));
    const int grid = grid_of(w.traits->type);
    if (grid >= 0 && !grids[grid].count) return fail("the grid of a weight type is missing");
    w.tiles = bytes(panels_of(n) * panel_bytes(*w.traits, k));
    if (!w.traits->beside()) return;
    Beside& b = w.beside;
    b.scale_type = ElementType(field[kScaleType]);
    b.zero_type = ElementType(field[kZeroType]);
    b.additive = field[kForm] & 1;
    b.rounded = Rounded(field[kForm] >> 1);
    b.zero_shift = field[kZeroShift];
    b.offset = float(field[kOffset]);
    b.rows = field[kGroupRows];
    b.columns = field[kGroupColumns];
    if (b.rows < 1 || b.columns < 1) return fail("groups of scales have no size");
    b.groups = (k + b.columns - 1) / b.columns;
    const int64_t count = b.count(n);
    b.scale = bytes(count * element_bytes(b.scale_type));
    if (b.zero_type) b.zero = bytes(count * element_bytes(b.zero_type));
    if (field[kHasGlobal]) b.global_scale = floats(1);
    if (field[kHasCodebook]) b.codebook = floats(16);
  }
  void inputs(Inputs& in, int flags, int64_t k) {
    if (flags & kHasPreScale) in.pre_scale = floats(k);
    if (flags & kHasActScale) in.scale = floats(1);
    if (flags & kHasActZero) in.zero = floats(1);
    if (flags & kHasActGlobal) in.global_scale = floats(1);
    if (!(flags & kHasPerm) || !(in.perm = ints(k))) return;
    bool outside = false;
    for (int64_t i = 0; i < k; ++i) outside |= in.perm[i] < 0 || in.perm[i] >= k;
    if (outside) fail("perm is out of range");
  }

 private:
  int64_t lead() const { return experts ? experts : 1; }
  void fail(const std::string& what) {
    if (problem.empty()) problem = what;
  }
};

// Arguments: x, num_rows, the arrays of each weight, bias of each weight whose bit of `biases` is
// set, then norm, residual and post_norm as `flags` says, and what the inputs of each weight are
// treated with as its `input_flags` say.
ffi::Error matmul_call(Floats x, Ints num_rows, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Span<const int32_t> types, ffi::Span<const int32_t> beside,
                       int32_t biases, int32_t flags, int32_t activation, int32_t precision,
                       float eps, ffi::Span<const int32_t> act, ffi::Span<const float> act_values,
                       ffi::Span<const int32_t> input_flags) {
  Matmul a;
  const auto dims = x.dimensions();
  if (dims.size() != 2) return invalid("x must have two dimensions");
  a.x = x.typed_data();
  a.rows = dims[0] < num_rows.typed_data()[0] ? dims[0] : num_rows.typed_data()[0];
  a.k = dims[1];
  a.eps = eps;
  a.activation = Activation(activation);
  a.precision = kRoundsActivations ? Precision(precision) : kFloat32;
  a.count = int(types.size());
  if (a.count > Matmul::kMaxWeights) return invalid("too many weights in one product");
  if (beside.size() != types.size() * kBesideFields || input_flags.size() != types.size())
    return invalid("weights are not described");
  Arguments read{args, 0};
  for (int i = 0; i < a.count; ++i) {
    auto y = rets.get<Floats>(activation ? 0 : i);
    if (!y.has_value()) return invalid("results must be float32");
    read.weight(a.weights[i], types[i], beside.begin() + i * kBesideFields,
                (*y)->dimensions()[1], a.k);
    a.weights[i].y = (*y)->typed_data();
  }
  for (int i = 0; i < a.count; ++i)
    if (biases >> i & 1) a.weights[i].bias = read.floats(a.weights[i].n);
  const int64_t n = a.weights[0].n;
  if (flags & kHasNorm) a.norm = read.floats(a.k);
  if (flags & kHasResidual) a.residual = read.floats(dims[0] * n);
  if (flags & kHasPostNorm) a.post_norm = read.floats(n);
  for (int i = 0; i < a.count; ++i) {
    a.inputs[i] = read_inputs(act, act_values);
    read.inputs(a.inputs[i], input_flags[i], a.k);
  }
  if (!read.problem.empty()) return invalid(read.problem);
  matmul(a);
  return ffi::Error::Success();
}

// Rows of x sorted by expert: group_sizes[e] of them meet the weight of expert e. Arguments: the
// arrays of the weight and maybe its bias, each with a leading axis of experts.
ffi::Error grouped_call(Floats x, Ints group_sizes, ffi::RemainingArgs args, ffi::Result<Floats> y,
                        int32_t type, ffi::Span<const int32_t> beside, int32_t has_bias,
                        int32_t precision) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || beside.size() != kBesideFields) return invalid("experts of a wrong rank");
  const int64_t experts = group_sizes.element_count(), n = y->dimensions()[1], k = dims[1];
  Arguments read{args, experts};
  Weight all = {};
  read.weight(all, type, beside.begin(), n, k);
  if (has_bias) all.bias = read.floats(n);
  if (!read.problem.empty()) return invalid(read.problem);
  int64_t row = 0;
  for (int64_t e = 0; e < experts; ++e) {
    Matmul a;
    a.rows = std::min<int64_t>(std::max<int32_t>(group_sizes.typed_data()[e], 0), dims[0] - row);
    if (a.rows == 0) continue;
    a.x = x.typed_data() + row * k;
    a.k = k;
    a.precision = kRoundsActivations ? Precision(precision) : kFloat32;
    a.count = 1;
    Weight& w = a.weights[0] = all;
    w.tiles += e * panels_of(n) * panel_bytes(*w.traits, k);
    w.y = y->typed_data() + row * n;
    if (w.bias) w.bias += e * n;
    w.beside.skip(e, n);
    matmul(a);
    row += a.rows;
  }
  return ffi::Error::Success();
}

ffi::Error embedding_call(Ints ids, ffi::RemainingArgs args, ffi::Result<Floats> y, int32_t type,
                          ffi::Span<const int32_t> beside, int64_t n) {
  const auto dims = y->dimensions();
  if (dims.size() != 2 || beside.size() != kBesideFields) return invalid("embedding of a wrong rank");
  Arguments read{args, 0};
  Weight w = {};
  read.weight(w, type, beside.begin(), n, dims[1]);
  if (!read.problem.empty()) return invalid(read.problem);
  embedding({ids.typed_data(), dims[0], n, dims[1], w.traits, w.tiles, w.beside, y->typed_data()});
  return ffi::Error::Success();
}

ffi::Error nearest_level_call(Floats y, ffi::Result<Floats> values,
                              ffi::Span<const float> levels) {
  const int64_t count = y.element_count();
  if (levels.size() != 16 || int64_t(values->element_count()) != count)
    return invalid("levels are not 16, or results not as many as numbers");
  nearest_level(y.typed_data(), count, levels.begin(), values->typed_data());
  return ffi::Error::Success();
}

ffi::Error nearest_vector_call(Floats y, Floats w, Ints table, ffi::Result<Floats> values,
                               ffi::Result<Floats> distance, ffi::Result<Ints> index,
                               ffi::Span<const float> levels) {
  const auto dims = y.dimensions();
  const int size = dims.size() ? int(dims[dims.size() - 1]) : 0, count = int(levels.size());
  if (size != 4 && size != 8) return invalid("vectors are not of 4 or 8 numbers");
  if (count < 1 || count > 1 << 16 / size || table.dimensions().size() != 2)
    return invalid("levels or a table of a wrong size");
  int64_t points = 1;
  for (int p = 0; p < size; ++p) points *= count;
  const int64_t near = table.dimensions()[1], vectors = y.element_count() / size;
  if (table.dimensions()[0] == 1) points = 1;
  if (table.dimensions()[0] != points || near % 16 || near < 16 || near > NearestVector::kMostNear)
    return invalid("a table of a wrong size");
  if (w.element_count() != y.element_count() || values->element_count() != y.element_count() ||
      int64_t(distance->element_count()) != vectors || int64_t(index->element_count()) != vectors)
    return invalid("arrays of a wrong size");
  nearest_vector({y.typed_data(), w.typed_data(), vectors, size, int(near), count,
                  points, table.typed_data(), levels.begin(), values->typed_data(),
                  distance->typed_data(), index->typed_data()});
  return ffi::Error::Success();
}

ffi::Error gram_call(Floats x, ffi::Result<Floats> out) {
  const auto dims = x.dimensions();
  if (dims.size() != 2 || int64_t(out->element_count()) != dims[1] * dims[1])
    return invalid("x must have two dimensions, and results as many rows as it has columns");
  gram(x.typed_data(), dims[0], dims[1], out->typed_data());
  return ffi::Error::Success();
}

enum AttentionFlags {
  kHasRope = 1, kHasQNorm = 2, kHasKNorm = 4, kHasSinks = 8, kHasKScale = 16, kHasVScale = 32,
  kHasBasis = 64,
};

// What pages of a type are made of.
struct PageArrays {
  ffi::DataType values;
  PageType type;
  bool scale, zero;
};
constexpr PageArrays kPageArrays[] = {
    {ffi::F32, kPagesF32, false, false},       {ffi::BF16, kPagesBF16, false, false},
    {ffi::F8E4M3FN, kPagesE4M3, false, false}, {ffi::F8E5M2, kPagesE5M2, false, false},
    {ffi::S8, kPagesInt8, true, false},        {ffi::U8, kPagesInt4, true, true},
};

// Reads the arguments of attention one after the other.
struct AttentionArguments {
  ffi::RemainingArgs& args;
  ffi::RemainingRets& rets;
  size_t next = 0;
  std::string problem = {};

  // An array of pages, which results alias, with `inner` bytes to a page and head.
  template <class T>
  void pages(T*& to, ffi::DataType type, const Attention& a, int64_t inner) {
    auto from = args.get<ffi::AnyBuffer>(next);
    auto result = rets.get<ffi::AnyBuffer>(next++);
    const size_t bytes = a.num_pages * a.kv_heads * inner;
    if (!from.has_value() || !result.has_value() || from->element_type() != type ||
        (*result)->element_type() != type || from->size_bytes() != bytes ||
        (*result)->size_bytes() != bytes)
      return fail("an array of pages has the wrong type or size");
    to = static_cast<T*>((*result)->untyped_data());
    // XLA copies where it could not alias; the copy then is what the kernel must write to.
    if (to != from->untyped_data()) std::memcpy(to, from->untyped_data(), bytes);
  }
  // float32 of a size that is `count`, or 1 where that will do.
  const float* floats(int64_t count, int64_t* found = nullptr) {
    auto buffer = args.get<Floats>(next++);
    const int64_t size = buffer.has_value() ? int64_t(buffer->element_count()) : -1;
    if (size != count && !(found && size == 1))
      return fail("a float32 argument has the wrong type or size"), nullptr;
    if (found) *found = size;
    return buffer->typed_data();
  }

 private:
  void fail(const std::string& what) {
    if (problem.empty()) problem = what;
  }
};

// Arguments after the batch: the values of pages of k and of v, then their scales and then their
// zero points where the type has such; cos and sin, q_norm, k_norm, sinks, scales of the whole cache
// and the bases of keys and of queries as `flags` says. The pages are donated: results after the
// first alias them.
ffi::Error attention_call(Floats q, Floats k, Floats v, Ints block_table, Ints query_start,
                          Ints seq_lens, ffi::RemainingArgs args, ffi::Result<Floats> out,
                          ffi::RemainingRets rets, int32_t heads, int32_t rotary_dim, int32_t flags,
                          bool exact, float scale, float soft_cap, float eps, int64_t window) {
  Attention a = {};
  auto values = args.get<ffi::AnyBuffer>(0);
  if (!values.has_value() || values->dimensions().size() != 4 || heads < 1)
    return invalid("pages must have four dimensions");
  const auto dims = values->dimensions();
  const PageArrays* kind = nullptr;
  for (const PageArrays& one : kPageArrays)
    if (one.values == values->element_type()) kind = &one;
  if (!kind) return invalid("pages of an unknown type");
  a.page_type = kind->type;
  a.exact = exact;
  a.num_pages = dims[0];
  a.kv_heads = int(dims[1]);
  a.page_size = dims[2];
  a.head_dim = int(kind->type == kPagesInt4 ? 2 * dims[3] : dims[3]);
  a.heads = heads;
  a.rotary_dim = rotary_dim;
  const int64_t tokens = q.dimensions()[0], d = a.head_dim;
  if (a.num_pages < 1 || a.kv_heads < 1 || heads % a.kv_heads || d < 16 || d % 16 ||
      a.page_size < 16 || a.page_size % 16 || a.page_size > kBlockKeys || rotary_dim < 0 ||
      rotary_dim > d)
    return invalid("pages of a shape that attention does not take");
  if (int64_t(q.element_count()) != tokens * heads * d || out->element_count() != q.element_count() ||
      int64_t(k.element_count()) != tokens * a.kv_heads * d || v.element_count() != k.element_count())
    return invalid("q, k and v do not match the pages");
  a.num_seqs = seq_lens.element_count();
  if (block_table.dimensions().size() != 2 || block_table.dimensions()[0] != a.num_seqs ||
      block_table.dimensions()[1] < 1 || int64_t(query_start.element_count()) != a.num_seqs + 1)
    return invalid("sequences are not described");
  a.max_blocks = block_table.dimensions()[1];
  a.block_table = block_table.typed_data();
  a.query_start = query_start.typed_data();
  a.seq_lens = seq_lens.typed_data();
  bool ordered = a.query_start[0] >= 0 && a.query_start[a.num_seqs] <= tokens;
  for (int64_t s = 0; s < a.num_seqs; ++s) ordered &= a.query_start[s] <= a.query_start[s + 1];
  if (!ordered) return invalid("query_start_loc must rise, to the number of tokens at most");
  a.q = q.typed_data();
  a.k = k.typed_data();
  a.v = v.typed_data();
  a.scale = scale;
  a.soft_cap = soft_cap;
  a.eps = eps;
  a.window = window;
  a.out = out->typed_data();
  AttentionArguments read{args, rets};
  const int64_t width = dims[3] * int64_t(values->size_bytes() / values->element_count());
  for (CachePages* pages : {&a.k_pages, &a.v_pages})
    read.pages(pages->values, kind->values, a, a.page_size * width);
  if (kind->scale)
    for (CachePages* pages : {&a.k_pages, &a.v_pages})
      read.pages(pages->scale, ffi::BF16, a, a.page_size * 2);
  if (kind->zero)
    for (CachePages* pages : {&a.k_pages, &a.v_pages})
      read.pages(pages->zero, ffi::S8, a, a.page_size);
  if (flags & kHasRope) {
    a.cos = read.floats(tokens * (rotary_dim / 2));
    a.sin = read.floats(tokens * (rotary_dim / 2));
  }
  if (flags & kHasQNorm) a.q_norm = read.floats(d);
  if (flags & kHasKNorm) a.k_norm = read.floats(d);
  if (flags & kHasSinks) a.sinks = read.floats(heads);
  if (flags & kHasKScale) a.k_scale = read.floats(a.kv_heads, &a.k_scales);
  if (flags & kHasVScale) a.v_scale = read.floats(a.kv_heads, &a.v_scales);
  if (flags & kHasBasis) {
    a.k_basis = read.floats(a.kv_heads * d * d);
    a.q_basis = read.floats(a.kv_heads * d * d);
  }
  if (!read.problem.empty()) return invalid(read.problem);
  attention(a);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_matmul, matmul_call,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<ffi::Span<const int32_t>>("types")
                                  .Attr<ffi::Span<const int32_t>>("beside")
                                  .Attr<int32_t>("biases")
                                  .Attr<int32_t>("flags")
                                  .Attr<int32_t>("activation")
                                  .Attr<int32_t>("precision")
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const int32_t>>("act")
                                  .Attr<ffi::Span<const float>>("act_values")
                                  .Attr<ffi::Span<const int32_t>>("input_flags"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_matmul_grouped, grouped_call,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Attr<int32_t>("type")
                                  .Attr<ffi::Span<const int32_t>>("beside")
                                  .Attr<int32_t>("has_bias")
                                  .Attr<int32_t>("precision"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_embedding, embedding_call,
                              ffi::Ffi::Bind()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Attr<int32_t>("type")
                                  .Attr<ffi::Span<const int32_t>>("beside")
                                  .Attr<int64_t>("n"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_nearest_level, nearest_level_call,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<ffi::Span<const float>>("levels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_nearest_vector, nearest_vector_call,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Ints>()
                                  .Attr<ffi::Span<const float>>("levels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_gram, gram_call, ffi::Ffi::Bind().Arg<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_attention, attention_call,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .RemainingRets()
                                  .Attr<int32_t>("heads")
                                  .Attr<int32_t>("rotary_dim")
                                  .Attr<int32_t>("flags")
                                  .Attr<bool>("exact")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("window"));

}  // namespace qjax

extern "C" {

// Digest of the sources, see build.py.
const char* qjax_sources() { return QJAX_SOURCES; }
// 1 where products with rounded activations exist; elsewhere every product is float32.
int qjax_rounds_activations() { return qjax::kRoundsActivations; }
// A `Grid` of blocks.h: entries [count], levels [2][16].
void qjax_set_grid(int number, const uint16_t* entries, int count, const uint8_t* levels) {
  qjax::Grid& grid = qjax::grids[number];
  std::memcpy(grid.entries, entries, 2 * count);
  std::memcpy(grid.levels, levels, 32);
  grid.count = count;
}
}

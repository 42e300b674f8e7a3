// The kernels as XLA custom calls.
#include <string>

#include "attention.h"
#include "matmul.h"
#include "xla/ffi/api/ffi.h"

namespace qjax {

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Bytes = ffi::Buffer<ffi::U8>;

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("qjax: " + what); }

enum MatmulFlags {
  kHasNorm = 1, kHasResidual = 2, kHasPostNorm = 4,
  kHasPreScale = 8, kHasActScale = 16, kHasActZero = 32, kHasActGlobal = 64, kHasPerm = 128,
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

// Arguments: x, num_rows, tiles of each weight, bias of each weight whose bit of `biases` is set,
// then norm, residual and post_norm, and what inputs are treated with, as `flags` says.
ffi::Error matmul_call(Floats x, Ints num_rows, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       ffi::Span<const int32_t> types, int32_t biases, int32_t flags,
                       int32_t activation, int32_t precision, float eps,
                       ffi::Span<const int32_t> act, ffi::Span<const float> act_values) {
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
  size_t next = 0;
  auto floats = [&]() -> const float* {
    auto buffer = args.get<Floats>(next++);
    return buffer.has_value() ? buffer->typed_data() : nullptr;
  };
  for (int i = 0; i < a.count; ++i) {
    Weight& w = a.weights[i];
    auto tiles = args.get<Bytes>(next++);
    auto y = rets.get<Floats>(activation ? 0 : i);
    if (!tiles.has_value() || !y.has_value()) return invalid("weights must be uint8, y float32");
    w.traits = find_traits(types[i]);
    if (!w.traits) return invalid("unknown weight type " + std::to_string(types[i]));
    w.tiles = tiles->typed_data();
    w.y = (*y)->typed_data();
    w.n = (*y)->dimensions()[1];
    w.bias = nullptr;
    if (int64_t(tiles->element_count()) != panels_of(w.n) * panel_bytes(*w.traits, a.k))
      return invalid("weight bytes do not match its shape");
  }
  for (int i = 0; i < a.count; ++i)
    if (biases >> i & 1) a.weights[i].bias = floats();
  if (flags & kHasNorm) a.norm = floats();
  if (flags & kHasResidual) a.residual = floats();
  if (flags & kHasPostNorm) a.post_norm = floats();
  a.inputs = read_inputs(act, act_values);
  if (flags & kHasPreScale) a.inputs.pre_scale = floats();
  if (flags & kHasActScale) a.inputs.scale = floats();
  if (flags & kHasActZero) a.inputs.zero = floats();
  if (flags & kHasActGlobal) a.inputs.global_scale = floats();
  if (flags & kHasPerm) {
    auto perm = args.get<Ints>(next++);
    if (!perm.has_value() || int64_t(perm->element_count()) != a.k)
      return invalid("perm must be int32, one for each column");
    a.inputs.perm = perm->typed_data();
    for (int64_t c = 0; c < a.k; ++c)
      if (a.inputs.perm[c] < 0 || a.inputs.perm[c] >= a.k) return invalid("perm out of range");
  }
  matmul(a);
  return ffi::Error::Success();
}

ffi::Error embedding_call(Ints ids, Bytes tiles, ffi::Result<Floats> y, int32_t type, int64_t n) {
  const Traits* t = find_traits(type);
  const auto dims = y->dimensions();
  if (!t || dims.size() != 2) return invalid("embedding of an unknown type or rank");
  if (int64_t(tiles.element_count()) != panels_of(n) * panel_bytes(*t, dims[1]))
    return invalid("weight bytes do not match its shape");
  embedding(
      {ids.typed_data(), dims[0], n, dims[1], t, tiles.typed_data(), y->typed_data()});
  return ffi::Error::Success();
}

enum AttentionFlags { kHasRope = 1, kHasQNorm = 2, kHasKNorm = 4 };

// The pages are donated: results 1 and 2 alias them. Optional arguments: cos and sin, q_norm,
// k_norm, as `flags` says.
ffi::Error attention_call(Floats q, Floats k, Floats v, ffi::AnyBuffer k_pages, ffi::AnyBuffer v_pages,
                          Ints block_table, Ints query_start, Ints seq_lens, ffi::RemainingArgs args,
                          ffi::Result<Floats> out, ffi::Result<ffi::AnyBuffer> k_out,
                          ffi::Result<ffi::AnyBuffer> v_out, int32_t heads, int32_t rotary_dim,
                          int32_t flags, float scale, float soft_cap, float eps, int64_t window) {
  Attention a = {};
  const auto pages = k_pages.dimensions();
  if (pages.size() != 4) return invalid("pages must have four dimensions");
  // XLA copies where it could not alias; the copy then is what the kernel must write to.
  a.k_pages = k_out->untyped_data();
  a.v_pages = v_out->untyped_data();
  if (a.k_pages != k_pages.untyped_data())
    std::memcpy(a.k_pages, k_pages.untyped_data(), k_pages.size_bytes());
  if (a.v_pages != v_pages.untyped_data())
    std::memcpy(a.v_pages, v_pages.untyped_data(), v_pages.size_bytes());
  a.q = q.typed_data();
  a.k = k.typed_data();
  a.v = v.typed_data();
  a.cache_bf16 = k_pages.element_type() == ffi::BF16;
  a.block_table = block_table.typed_data();
  a.query_start = query_start.typed_data();
  a.seq_lens = seq_lens.typed_data();
  a.num_seqs = seq_lens.dimensions()[0];
  a.max_blocks = block_table.dimensions()[1];
  a.num_pages = pages[0];
  a.kv_heads = int(pages[1]);
  a.page_size = pages[2];
  a.head_dim = int(pages[3]);
  a.heads = heads;
  a.rotary_dim = rotary_dim;
  a.scale = scale;
  a.soft_cap = soft_cap;
  a.eps = eps;
  a.window = window;
  a.out = out->typed_data();
  size_t next = 0;
  auto floats = [&]() -> const float* {
    auto buffer = args.get<Floats>(next++);
    return buffer.has_value() ? buffer->typed_data() : nullptr;
  };
  if (flags & kHasRope) {
    a.cos = floats();
    a.sin = floats();
  }
  if (flags & kHasQNorm) a.q_norm = floats();
  if (flags & kHasKNorm) a.k_norm = floats();
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
                                  .Attr<int32_t>("biases")
                                  .Attr<int32_t>("flags")
                                  .Attr<int32_t>("activation")
                                  .Attr<int32_t>("precision")
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const int32_t>>("act")
                                  .Attr<ffi::Span<const float>>("act_values"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_embedding, embedding_call,
                              ffi::Ffi::Bind()
                                  .Arg<Ints>()
                                  .Arg<Bytes>()
                                  .Ret<Floats>()
                                  .Attr<int32_t>("type")
                                  .Attr<int64_t>("n"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qjax_attention, attention_call,
                              ffi::Ffi::Bind()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .RemainingArgs()
                                  .Ret<Floats>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("heads")
                                  .Attr<int32_t>("rotary_dim")
                                  .Attr<int32_t>("flags")
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("window"));

}  // namespace qjax

extern "C" {

// 1 where products with rounded activations exist; elsewhere every product is float32.
int qjax_rounds_activations() { return qjax::kRoundsActivations; }
}

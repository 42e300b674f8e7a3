// What kernels do to rows of activations before they meet weights or keys.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace qjax {

constexpr float kTop16 = 127 * 256 + 127;  // the largest number that two signed bytes make

// Memory that a thread keeps between calls, 64-byte aligned, grown as needed.
template <int Slot>
inline uint8_t* scratch(size_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    bytes = (bytes + 65535) / 65536 * 65536;
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

// RMSNorm of one row: x / sqrt(mean(x^2) + eps) * weight. `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t k, float* out) {
  v16f squares = {};
  int64_t c = 0;
  for (; c + 16 <= k; c += 16) squares += load(x + c) * load(x + c);
  float total = sum(squares);
  for (int64_t i = c; i < k; ++i) total += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(total / float(k) + eps);
  for (c = 0; c + 16 <= k; c += 16) store(out + c, load(x + c) * factor * load(weight + c));
  for (; c < k; ++c) out[c] = x[c] * factor * weight[c];
}

}  // namespace qjax

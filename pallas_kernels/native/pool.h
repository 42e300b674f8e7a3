// A small thread pool for kernels that take microseconds.
//
// Between two kernels of one decode step lie a few microseconds: waking a sleeping thread costs
// more than that, so workers spin for a moment before they sleep. A job is a function that takes
// items from a counter until none is left; whoever comes in time takes part. Nobody waits for a
// worker that has not begun, so a busy machine costs its share of speed and no more. One job at a
// time: a caller that finds the pool busy works alone, so concurrent executions never wait for
// each other.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>

namespace qjax {

int num_threads();
void set_num_threads(int n);

// Runs `job` on this thread and on those workers that are free, and returns when all have left it.
void run(const std::function<void()>& job);

// Calls f(i) for i in [0, count) on all threads. Each starts with a part of its own and goes through
// it in order, so that memory is read as one stream; whoever is done helps with the other parts.
template <class F>
void parallel_for(int64_t count, F&& f) {
  const int threads = num_threads();
  if (count <= 1 || threads == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  constexpr int kMaxParts = 64;
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  } parts[kMaxParts];
  const int num_parts = threads < kMaxParts ? threads : kMaxParts;
  for (int p = 0; p < num_parts; ++p) {
    parts[p].next.store(count * p / num_parts, std::memory_order_relaxed);
    parts[p].end = count * (p + 1) / num_parts;
  }
  std::atomic<int> members{0};
  const int64_t take = count / num_parts / 16 + 1;
  run([&] {
    const int own = members.fetch_add(1, std::memory_order_relaxed);
    for (int k = 0; k < num_parts; ++k) {
      Part& part = parts[(own + k) % num_parts];
      for (;;) {
        const int64_t first = part.next.fetch_add(take, std::memory_order_relaxed);
        if (first >= part.end) break;
        for (int64_t i = first; i < first + take && i < part.end; ++i) f(i);
      }
    }
  });
}

}  // namespace qjax

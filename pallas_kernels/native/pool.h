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

// Calls f(i) for i in [0, count) on all threads; a thread takes several at a time, fewer at last.
template <class F>
void parallel_for(int64_t count, F&& f) {
  if (count <= 1 || num_threads() == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const int64_t share = 4 * num_threads();
  run([&] {
    for (;;) {
      const int64_t left = count - next.load(std::memory_order_relaxed);
      const int64_t take = left > share ? left / share : 1;
      const int64_t first = next.fetch_add(take, std::memory_order_relaxed);
      if (first >= count) return;
      for (int64_t i = first; i < first + take && i < count; ++i) f(i);
    }
  });
}

}  // namespace qjax

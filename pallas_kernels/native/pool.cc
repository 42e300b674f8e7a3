#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#if defined(__linux__)
#include <sched.h>
#endif

namespace qjax {
namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int kSpins = 6000;           // some 100 microseconds
constexpr uint32_t kOpen = 1u << 31;  // workers may join the job

int default_threads() {
  if (const char* text = std::getenv("QJAX_NUM_THREADS")) {
    int n = std::atoi(text);
    if (n > 0) return n;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return int(std::max(1u, std::thread::hardware_concurrency()));
}

struct Pool {
  std::atomic<int> size{default_threads()};
  std::mutex busy;  // held by the caller whose job runs
  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::atomic<int> sleepers{0};
  std::atomic<uint64_t> generation{0};
  std::atomic<uint32_t> state{0};  // kOpen and the number of workers inside the job
  const std::function<void()>* job = nullptr;
  int started = 0;  // worker threads alive

  bool join() {
    uint32_t now = state.load(std::memory_order_relaxed);
    while (now & kOpen)
      if (state.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) return true;
    return false;
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      for (int i = 0; generation.load(std::memory_order_acquire) == seen; ++i) {
        pause_cpu();
        if (i == kSpins) {
          std::unique_lock<std::mutex> lock(sleep_mutex);
          sleepers.fetch_add(1);
          wake.wait(lock, [&] { return generation.load() != seen; });
          sleepers.fetch_sub(1);
        }
      }
      seen = generation.load(std::memory_order_acquire);
      if (index < size.load(std::memory_order_relaxed) && join()) {
        (*job)();
        state.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  void run(const std::function<void()>& function) {
    for (; started < size - 1; ++started)
      std::thread(&Pool::work, this, started + 1, generation.load()).detach();
    job = &function;
    state.store(kOpen, std::memory_order_release);
    generation.fetch_add(1);
    if (sleepers.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_mutex);
      wake.notify_all();
    }
    function();
    state.fetch_and(~kOpen, std::memory_order_relaxed);
    for (int i = 0; state.load(std::memory_order_acquire) != 0; ++i) {
      pause_cpu();
      if (i > kSpins) std::this_thread::yield();  // a worker lost its core in the middle of an item
    }
  }
};

std::atomic<Pool*> pool{nullptr};
std::once_flag once;

Pool& instance() {
  std::call_once(once, [] {
    pool = new Pool;
    // Threads do not survive a fork: the child starts with a fresh pool.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

int num_threads() { return instance().size; }

void set_num_threads(int n) { instance().size = std::max(1, n); }

void run(const std::function<void()>& job) {
  Pool& p = instance();
  if (p.size == 1 || !p.busy.try_lock()) return job();
  std::lock_guard<std::mutex> lock(p.busy, std::adopt_lock);
  p.run(job);
}

}  // namespace qjax

#include "pool.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>
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

constexpr int kSpins = 4000;  // about 100 to 200 microseconds

int default_threads() {
  if (const char* text = std::getenv("QJAX_NUM_THREADS")) {
    int n = std::atoi(text);
    if (n > 0) return n;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

struct Pool {
  int size = default_threads();
  std::mutex busy;  // held by the caller whose job runs
  std::mutex sleep_mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  std::atomic<int> remaining{0};
  std::atomic<int> sleepers{0};
  std::atomic<int> arrived{0};
  std::atomic<uint64_t> phase{0};
  const std::function<void(const Team&)>* job = nullptr;
  int team_size = 1;
  int started = 0;  // worker threads alive
  bool quit = false;

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
      if (index < team_size) {
        (*job)(Team{index, team_size});
        remaining.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  void start_workers() {
    for (; started < size - 1; ++started)
      std::thread(&Pool::work, this, started + 1, generation.load()).detach();
  }
};

Pool* pool = nullptr;
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

void Team::barrier() const {
  if (size == 1) return;
  Pool& p = *pool;
  uint64_t phase = p.phase.load(std::memory_order_acquire);
  if (p.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    p.arrived.store(0, std::memory_order_relaxed);
    p.phase.fetch_add(1, std::memory_order_release);
    return;
  }
  for (int i = 0; p.phase.load(std::memory_order_acquire) == phase; ++i) {
    pause_cpu();
    if (i > kSpins) std::this_thread::yield();
  }
}

int num_threads() { return instance().size; }

void set_num_threads(int n) {
  Pool& p = instance();
  std::lock_guard<std::mutex> lock(p.busy);
  p.size = std::max(1, n);
}

void run(const std::function<void(const Team&)>& job) {
  Pool& p = instance();
  if (p.size == 1 || !p.busy.try_lock()) return job(Team{0, 1});
  std::lock_guard<std::mutex> lock(p.busy, std::adopt_lock);
  p.start_workers();
  p.job = &job;
  p.team_size = p.size;
  p.remaining.store(p.size - 1, std::memory_order_relaxed);
  p.generation.fetch_add(1);
  if (p.sleepers.load() > 0) {
    std::lock_guard<std::mutex> wake_lock(p.sleep_mutex);
    p.wake.notify_all();
  }
  job(Team{0, p.size});
  for (int i = 0; p.remaining.load(std::memory_order_acquire) > 0; ++i) {
    pause_cpu();
    if (i > kSpins) std::this_thread::yield();
  }
}

}  // namespace qjax

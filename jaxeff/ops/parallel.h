// Work on the threads of XLA's pool.

#ifndef JAXEFF_OPS_PARALLEL_H_
#define JAXEFF_OPS_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace jaxeff {

// Moves its thread off a core for as long as it lives, if it is on it. Linux likes to wake a helper on the core of the thread that calls it, and
// leaves both there for longer than a small convolution takes, beside an idle core.
class Elsewhere {
 public:
#if defined(__linux__)
  explicit Elsewhere(int core) {
    if (sched_getcpu() != core || sched_getaffinity(0, sizeof(before_), &before_)) return;
    cpu_set_t others = before_;
    CPU_CLR(core, &others);
    moved_ = CPU_COUNT(&others) && !sched_setaffinity(0, sizeof(others), &others);
  }
  ~Elsewhere() {
    if (moved_) sched_setaffinity(0, sizeof(before_), &before_);
  }
  static int Core() { return sched_getcpu(); }

 private:
  cpu_set_t before_;
  bool moved_ = false;
#else
  explicit Elsewhere(int) {}
  static int Core() { return -1; }
#endif
};

// Runs work(0) to work(count - 1) on the threads of XLA's pool and on this one. Helpers that start late find nothing
// left and touch nothing but `state`, so this thread never waits for one that has not begun.
template <typename Work>
void Parallel(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const auto loop = [state, count, &work] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      work(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i)
    pool.Schedule(std::function<void()>([state, count, loop, core = Elsewhere::Core()] {
      if (state->next.load() >= count) return;
      const Elsewhere elsewhere(core);
      loop();
    }));
  loop();
  while (state->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace jaxeff

#endif  // JAXEFF_OPS_PARALLEL_H_

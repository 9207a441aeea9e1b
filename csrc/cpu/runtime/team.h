// Several loops in one parallel region: for an op made of short ones, each of which would cost a
// region of its own. One thread runs the op; the others wait for its loops by spinning, and only
// while it runs. The result of a loop does not depend on which threads take part.
#pragma once

#include <atomic>
#include <exception>
#include <thread>

#include "cpu/runtime/parallel.h"

namespace moe_ops::cpu {

class Team {
 public:
  // Calls fn(par) with a Parallel whose loops share one region of `pool`. cost: see parallel_items,
  // for all loops together; if it is too low for a region, `par` has one thread.
  template <class Fn>
  static void run(const Parallel& pool, double cost, const Fn& fn) {
    if (pool.num_threads <= 1 || pool.run == nullptr || cost < kMinCostPerThread) {
      fn(Parallel{});
      return;
    }
    struct Context {
      Team team;
      const Fn* fn;
      int num_threads;
    } context;
    context.fn = &fn;
    context.num_threads = pool.num_threads;
    pool.run(
        pool.num_threads,
        [](int64_t begin, int64_t, void* p) {
          Context& c = *static_cast<Context*>(p);
          begin == 0 ? c.team.lead(*c.fn, c.num_threads) : c.team.follow();
        },
        &context);
  }

 private:
  static constexpr uint64_t kEnd = ~uint64_t{0};
  static constexpr size_t kLine = 64;  // bytes of a cache line

  template <class Fn>
  void lead(const Fn& fn, int num_threads) {
    Parallel par;
    par.num_threads = num_threads;
    par.start_cost = 0.2;
    par.run = [](int64_t n, void (*loop)(int64_t, int64_t, void*), void* ctx) {
      current()->loop(n, loop, ctx);
    };
    Team* const before = current();
    current() = this;
    try {
      fn(par);
    } catch (...) {
      current() = before;
      state_ = kEnd;
      throw;
    }
    current() = before;
    state_ = kEnd;
  }

  void loop(int64_t n, void (*fn)(int64_t, int64_t, void*), void* ctx) {
    n_ = n;
    fn_ = fn;
    ctx_ = ctx;
    next_ = 0;
    ++state_;  // Odd: open.
    take();
    ++state_;
    for (int spins = 0; active_ != 0; ++spins) pause(spins);
    if (failed_.exchange(false)) {
      claimed_.clear();
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
  }

  void follow() {
    uint64_t seen = 0;
    for (int spins = 0;; ++spins) {
      const uint64_t state = state_;
      if (state == kEnd) return;
      if (state == seen || state % 2 == 0) {
        pause(spins);
        continue;
      }
      // The leader closes a loop before it checks for active threads; it waits for every thread
      // that registered before it found the loop open.
      ++active_;
      if (state_ == state) take();
      --active_;
      seen = state;
      spins = 0;
    }
  }

  void take() {
    try {
      for (int64_t i = next_++; i < n_; i = next_++) fn_(i, i + 1, ctx_);
    } catch (...) {
      next_ = n_;
      if (!claimed_.test_and_set()) {
        error_ = std::current_exception();
        failed_ = true;
      }
    }
  }

  static void pause(int spins) {
    if (spins > 100) std::this_thread::yield();
  }

  static Team*& current() {
    static thread_local Team* team = nullptr;
    return team;
  }

  // Waiting threads poll the cache line of state_; the other fields are on other lines, so that the
  // leader can write them without contention.
  alignas(kLine) std::atomic<uint64_t> state_{0};
  alignas(kLine) std::atomic<int64_t> next_{0};
  int64_t n_ = 0;
  void (*fn_)(int64_t, int64_t, void*) = nullptr;
  void* ctx_ = nullptr;
  alignas(kLine) std::atomic<int> active_{0};
  std::atomic<bool> failed_{false};
  std::atomic_flag claimed_;
  std::exception_ptr error_;
};

}  // namespace moe_ops::cpu

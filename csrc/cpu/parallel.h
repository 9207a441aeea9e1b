// Work items are claimed from an atomic counter, so a thread that
// the machine delays holds back one item, not a static share of all of them. Which thread computes
// an item never changes its result: every output element belongs to exactly one item.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>

#include "moe_ops/common.h"

namespace moe_ops::cpu {

// Calls fn(item) for each item in [0, n). `cost` is a rough count of elementary operations of all
// items together: below ~50 us of work a parallel region costs more than it brings.
template <class Fn>
void parallel_items(const Parallel& par, int64_t n, double cost, const Fn& fn) {
  constexpr double kMinCostPerThread = 1e5;
  int64_t threads = std::min<int64_t>(par.num_threads, n);
  threads = std::min<int64_t>(threads, static_cast<int64_t>(cost / kMinCostPerThread) + 1);
  if (threads <= 1 || par.run == nullptr) {
    for (int64_t i = 0; i < n; ++i) fn(i);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t n;
    const Fn* fn;
  } context;
  context.n = n;
  context.fn = &fn;
  par.run(
      threads,
      [](int64_t, int64_t, void* p) {
        Context& c = *static_cast<Context*>(p);
        for (int64_t i = c.next.fetch_add(1); i < c.n; i = c.next.fetch_add(1)) (*c.fn)(i);
      },
      &context);
}

// Items of several stages share one region: they are numbered stage after stage, so whatever an
// item waits for was claimed before it, by a thread that is at work on it. A Countdown counts the
// items of a stage (or of an expert in it) that are not done.
class Countdown {
 public:
  void start(int64_t n) { left_.store(n, std::memory_order_relaxed); }
  void add() { left_.fetch_add(1, std::memory_order_relaxed); }
  void done() { left_.fetch_sub(1, std::memory_order_release); }
  // False: another item failed, and this count may never end.
  bool wait(const std::atomic<bool>& failed) const {
    for (int spins = 0; left_.load(std::memory_order_acquire) > 0; ++spins) {
      if (failed.load(std::memory_order_relaxed)) return false;
      if (spins > 100) std::this_thread::yield();
    }
    return true;
  }

 private:
  std::atomic<int64_t> left_{0};
};

// Items per chunk of [0, n), by the cost of one.
inline int64_t chunk_length(int64_t n, double cost_per_item) {
  constexpr double kChunkCost = 4e4;
  const int64_t by_cost = static_cast<int64_t>(kChunkCost / std::max(cost_per_item, 1.0)) + 1;
  return std::min(n, by_cost);
}

// Calls fn(begin, end) for chunks of [0, n). The chunk length depends on n and the cost alone.
template <class Fn>
void parallel_range(const Parallel& par, int64_t n, double cost_per_item, const Fn& fn) {
  if (n <= 0) return;
  const int64_t chunk = chunk_length(n, cost_per_item);
  const int64_t chunks = ceil_div(n, chunk);
  parallel_items(par, chunks, cost_per_item * static_cast<double>(n),
                 [&](int64_t c) { fn(c * chunk, std::min(n, (c + 1) * chunk)); });
}

}  // namespace moe_ops::cpu

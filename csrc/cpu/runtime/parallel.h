// Work items are claimed from an atomic counter, so a thread that
// the machine delays holds back one item, not a static share of all of them. Which thread computes
// an item never changes its result: every output element belongs to exactly one item.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <utility>
#include <vector>

#include "moe_ops/common.h"

namespace moe_ops::cpu {

// n in parts of sizes that differ by one at most; part i is [begin(i), begin(i + 1)). Nothing in no
// parts is fine. Tiles are calls of a few hundred cycles, of which two divisions each would be 3 %.
struct BalancedPartition {
  int64_t size, longer;  // the first `longer` parts have one more
  BalancedPartition(int64_t n, int64_t parts)
      : size(n / std::max<int64_t>(parts, 1)), longer(n - size * parts) {}
  int64_t begin(int64_t i) const { return i * size + std::min(i, longer); }
};

// Costs are counts of elementary operations. A thread has at least the first of them to do; items
// of a range are made as large as the second. A build that is checked for races shares out the
// least of work.
#if defined(MOE_OPS_CHECK_THREADS)
constexpr double kMinCostPerThread = 1, kChunkCost = 1e2;
#else
constexpr double kMinCostPerThread = 1e5, kChunkCost = 4e4;
#endif

// Calls fn(item) for each item in [0, n). `cost` is a rough count of elementary operations of all
// items together: below ~50 us of work a parallel region costs more than it brings.
template <class Fn>
void parallel_items(const Parallel& par, int64_t n, double cost, const Fn& fn) {
  int64_t threads = std::min<int64_t>(par.num_threads, n);
  threads = std::min<int64_t>(
      threads, static_cast<int64_t>(cost / (kMinCostPerThread * par.start_cost)) + 1);
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

// Counts the items of a stage, or of an expert in it, that are not done.
class Latch {
 public:
  void add(int64_t n = 1) { left_.fetch_add(n, std::memory_order_relaxed); }
  void done() { left_.fetch_sub(1, std::memory_order_release); }
  // Waits until all items are done. Returns false if another item failed, as this count may then
  // never reach zero.
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

// TaskGraph of work in one parallel region. Items are numbered stage after stage, so whatever an
// item waits for was claimed before it, by a thread that is at work on it.
class TaskGraph {
 public:
  // Adds a stage that calls fn(item) for each item in [0, n); `cost` is the cost of all of them.
  template <class Fn>
  void add(int64_t n, double cost, Fn fn) {
    if (n <= 0) return;
    stages_.push_back({total_, std::move(fn)});
    total_ += n;
    cost_ += cost;
  }
  // Waits for the items whose results an item reads. Returns false if another item failed; the item
  // has to return then.
  bool wait(const Latch& left) const { return left.wait(failed_); }

  void run(const Parallel& par) {
    parallel_items(par, total_, cost_, [this](int64_t i) {
      size_t s = stages_.size() - 1;
      while (stages_[s].first > i) --s;
      try {
        stages_[s].fn(i - stages_[s].first);
      } catch (...) {
        failed_.store(true, std::memory_order_relaxed);
        throw;
      }
    });
  }

 private:
  struct Stage {
    int64_t first;
    std::function<void(int64_t)> fn;
  };
  std::vector<Stage> stages_;
  int64_t total_ = 0;
  double cost_ = 0;
  std::atomic<bool> failed_{false};
};

// Returns the items per chunk of [0, n), from the cost of one.
inline int64_t chunk_length(int64_t n, double cost_per_item) {
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

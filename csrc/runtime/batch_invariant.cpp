#include "moe_ops/batch_invariant.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace moe_ops {

namespace {

std::atomic<bool>& setting() {
  static std::atomic<bool> on = [] {
    const char* value = std::getenv("MOE_OPS_BATCH_INVARIANT");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return on;
}

}  // namespace

bool batch_invariant() { return setting().load(std::memory_order_relaxed); }

void set_batch_invariant(bool on) { setting().store(on, std::memory_order_relaxed); }

}  // namespace moe_ops

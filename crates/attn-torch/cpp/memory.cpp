// Bytes of tensors on the CPU, as they are asked for and freed.
#include "shim.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <malloc.h>

#include <atomic>

namespace {

std::atomic<int64_t> held{0}, peak{0};

// A block's size is asked of malloc when it is freed, too.
struct Counting final : c10::Allocator {
  static void release(void* p) {
    if (!p) return;
    held -= static_cast<int64_t>(malloc_usable_size(p));
    c10::free_cpu(p);
  }

  c10::DataPtr allocate(size_t n) override {
    void* p = n ? c10::alloc_cpu(n) : nullptr;
    if (p) {
      int64_t now = held += static_cast<int64_t>(malloc_usable_size(p));
      for (int64_t before = peak; now > before && !peak.compare_exchange_weak(before, now);) {
      }
    }
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};

}  // namespace

extern "C" {

// Tensors that are made from here on are counted.
int attn_count_memory(char** err) {
  return attempt(err, [] {
    static Counting counting;
    c10::SetCPUAllocator(&counting, /*priority=*/255);
  });
}

void attn_counted_memory(int64_t* now, int64_t* most) {
  *now = held;
  *most = peak;
}

void attn_reset_peak_memory() { peak = held.load(); }

}  // extern "C"

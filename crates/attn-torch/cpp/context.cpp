// State of the process or the thread: random streams, autocast, inference mode, global switches, memory, versions.
#include "shim.h"

#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/Version.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>

#include <mutex>

extern "C" {

int attn_rng_get(int type, int index, at::Tensor** out, char** err) {
  return attempt(err, [&] {
    at::Generator generator = at::globalContext().defaultGenerator(device_of(type, index));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new at::Tensor(generator.get_state());
  });
}

int attn_rng_set(int type, int index, const at::Tensor* state, char** err) {
  return attempt(err, [&] {
    at::Generator generator = at::globalContext().defaultGenerator(device_of(type, index));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
  });
}

int attn_autocast_get(int type, int* enabled, int* kind, char** err) {
  return attempt(err, [&] {
    auto device = static_cast<c10::DeviceType>(type);
    *enabled = at::autocast::is_autocast_enabled(device);
    *kind = static_cast<int>(at::autocast::get_autocast_dtype(device));
  });
}

int attn_autocast_set(int type, int enabled, int kind, char** err) {
  return attempt(err, [&] {
    auto device = static_cast<c10::DeviceType>(type);
    at::autocast::set_autocast_dtype(device, static_cast<at::ScalarType>(kind));
    at::autocast::set_autocast_enabled(device, enabled != 0);
  });
}

void attn_autocast_enter() { at::autocast::increment_nesting(); }

void attn_autocast_exit() {
  if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
}

void* attn_inference_enter() { return new c10::InferenceMode(true); }

void attn_inference_exit(void* guard) { delete static_cast<c10::InferenceMode*>(guard); }

int attn_is_inference(const at::Tensor* tensor) { return tensor->is_inference(); }

int attn_sdp_set(int flash, int mem_efficient, int math, int cudnn, char** err) {
  return attempt(err, [&] {
    auto& context = at::globalContext();
    context.setSDPUseFlash(flash != 0);
    context.setSDPUseMemEfficient(mem_efficient != 0);
    context.setSDPUseMath(math != 0);
    context.setSDPUseCuDNN(cudnn != 0);
  });
}

int attn_sdp_get(int flags[4], char** err) {
  return attempt(err, [&] {
    const auto& context = at::globalContext();
    flags[0] = context.userEnabledFlashSDP();
    flags[1] = context.userEnabledMemEfficientSDP();
    flags[2] = context.userEnabledMathSDP();
    flags[3] = context.userEnabledCuDNNSDP();
  });
}

int attn_set_deterministic(int on, char** err) {
  return attempt(err, [&] {
    auto& context = at::globalContext();
    context.setDeterministicAlgorithms(on != 0, /*warn_only=*/false);
    context.setDeterministicCuDNN(on != 0);
    if (on) context.setBenchmarkCuDNN(false);
  });
}

int attn_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

int attn_set_tf32(int on, char** err) {
  return attempt(err, [&] {
    at::globalContext().setAllowTF32CuBLAS(on != 0);
    at::globalContext().setAllowTF32CuDNN(on != 0);
  });
}

int attn_tf32(int* on, char** err) {
  return attempt(err, [&] { *on = at::globalContext().allowTF32CuBLAS() && at::globalContext().allowTF32CuDNN(); });
}

// Whether libtorch_cuda's hooks are in place. LibTorch asks once per process and keeps the answer.
int attn_cuda_hooked(int* hooked, char** err) {
  return attempt(err, [&] { *hooked = at::globalContext().hasCUDART(); });
}

// `version` is 1000 * major + 10 * minor.
int attn_cuda_runtime(int64_t* version, int* n_devices, char** err) {
  return attempt(err, [&] {
    *version = at::globalContext().versionCUDART();
    *n_devices = at::detail::getCUDAHooks().getNumGPUs();
  });
}

// Bytes: allocated, its peak, reserved, its peak, free on the device, total of the device.
int attn_cuda_memory(int index, int64_t bytes[6], char** err) {
  return attempt(err, [&] {
    auto device = static_cast<c10::DeviceIndex>(index);
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    auto stats = allocator->getDeviceStats(device);
    auto memory = allocator->getMemoryInfo(device);
    bytes[0] = stats.allocated_bytes[0].current;
    bytes[1] = stats.allocated_bytes[0].peak;
    bytes[2] = stats.reserved_bytes[0].current;
    bytes[3] = stats.reserved_bytes[0].peak;
    bytes[4] = static_cast<int64_t>(memory.first);
    bytes[5] = static_cast<int64_t>(memory.second);
  });
}

int attn_cuda_reset_peak(int index, char** err) {
  return attempt(err, [&] {
    at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
    c10::getDeviceAllocator(c10::DeviceType::CUDA)->resetPeakStats(static_cast<c10::DeviceIndex>(index));
  });
}

// What the loaded library says of itself, malloc'd: version, compiler, math libraries, CPU features in use.
int attn_show_config(char** out, char** err) {
  return attempt(err, [&] { *out = strdup(at::show_config().c_str()); });
}

// The file that libtorch_cpu was loaded from, malloc'd; null where the loader does not say.
char* attn_library_path() {
  Dl_info info;
  auto* inside = reinterpret_cast<void*>(&at::show_config);
  return dladdr(inside, &info) && info.dli_fname ? strdup(info.dli_fname) : nullptr;
}

}  // extern "C"

// What every file of the shim shares: how errors and lists of tensors cross the border to Rust.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

using List = std::vector<at::Tensor>;

// Runs `body`. 0 is success; 1 leaves a malloc'd message in `*err`, which Rust frees.
// `what()` of a c10::Error resolves its backtrace, which takes milliseconds and fills pages.
template <class Body>
int attempt(char** err, Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    *err = strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    *err = strdup(e.what());
  } catch (...) {
    *err = strdup("an exception that is no std::exception");
  }
  return 1;
}

// tch's device: a type and an index, -1 where the type has one device.
inline c10::Device device_of(int type, int index) {
  return c10::Device(static_cast<c10::DeviceType>(type), static_cast<c10::DeviceIndex>(index));
}

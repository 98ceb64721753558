// Where a tensor lives.
#pragma once

#include <string>

namespace headwater {

enum class DeviceType { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;

  bool operator==(const Device&) const = default;
  bool is_cpu() const { return type == DeviceType::cpu; }
  bool is_cuda() const { return type == DeviceType::cuda; }
};

/// "cpu", "cuda:0".
std::string to_string(Device device);

/// Reads "cpu", "cuda" or "cuda:N" and makes sure that it can be used. Throws an input error for anything else, and a
/// machine error with one line that says what is missing: a build with CUDA, a driver, such a GPU.
Device parse_device(const std::string& text);

}  // namespace headwater

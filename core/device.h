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
};

/// "cpu", "cuda:0".
std::string to_string(Device device);

/// Reads "cpu", "cuda" or "cuda:N". Throws an input error for anything else, and a machine error that
/// says so where this build has no CUDA.
Device parse_device(const std::string& text);

}  // namespace headwater

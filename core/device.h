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
/// says how to build with CUDA where this build has none.
Device parse_device(const std::string& text);

}  // namespace headwater

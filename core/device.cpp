#include "core/device.h"

#include <charconv>

#include "core/cuda/runtime.h"
#include "core/error.h"
#include "core/kernel.h"

namespace headwater {

std::string to_string(Device device) {
  return device.is_cpu() ? "cpu" : fmt::format("cuda:{}", device.index);
}

Device parse_device(const std::string& text) {
  if (text == "cpu") return {};
  int index = 0;
  const bool is_cuda = text.rfind("cuda", 0) == 0;
  if (is_cuda && text.size() > 4) {
    const char* end = text.data() + text.size();
    const auto [rest, code] = std::from_chars(text.data() + 5, end, index);
    if (text[4] != ':' || code != std::errc{} || rest != end || index < 0) {
      throw_input_error("device '{}' is not understood; expected cpu, cuda or cuda:N", text);
    }
  } else if (!is_cuda) {
    throw_input_error("device '{}' is not understood; expected cpu, cuda or cuda:N", text);
  }
  cuda::use_device(index);
  return {DeviceType::cuda, index};
}

void throw_no_cuda(const char* kernel) {
  throw_machine_error("{}: there is no CUDA kernel for it in this build; use device: cpu", kernel);
}

}  // namespace headwater

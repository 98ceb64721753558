#include "core/cuda/launch.h"

#include <stdexcept>

namespace headwater::cuda {

void check_launch_shape(const char* name, int64_t grid_x, int64_t grid_y, int64_t grid_z, int block,
                        int64_t shared_bytes) {
  constexpr int64_t max_x = (int64_t{1} << 31) - 1, max_yz = 65535;
  if (grid_x < 0 || grid_x > max_x || grid_y < 0 || grid_y > max_yz || grid_z < 0 || grid_z > max_yz) {
    throw std::logic_error(fmt::format("{}: a grid of ({}, {}, {}) blocks; at most ({}, {}, {})", name,
                                       grid_x, grid_y, grid_z, max_x, max_yz, max_yz));
  }
  if (block < 32 || block > 1024 || block % 32 != 0) {
    throw std::logic_error(fmt::format("{}: blocks of {} threads; a multiple of 32 up to 1024", name, block));
  }
  const int64_t most = properties().shared_bytes_per_block;
  if (shared_bytes < 0 || shared_bytes > most) {
    throw std::logic_error(
        fmt::format("{}: {} bytes of shared memory; a block has {} here", name, shared_bytes, most));
  }
}

}  // namespace headwater::cuda

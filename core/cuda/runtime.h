// The GPU as the host sees it: which ones there are, their memory, copies, waiting. One interface with three
// implementations: CUDA's runtime, the emulator, and none (a build without CUDA, where every call says so).
#pragma once

#include <cstdint>
#include <string>

namespace headwater::cuda {

enum class Backend { none, emulated, hardware };
/// What this program was built with.
Backend backend();

struct Properties {
  std::string name;
  int compute_capability = 0;  ///< 80, 90, ...
  int n_multiprocessors = 0;
  int64_t memory_bytes = 0;
  int64_t shared_bytes_per_block = 0;  ///< the most that a block may ask for
};

/// Makes GPU `index` the one that this process uses; once is enough, another index later is refused. Throws a machine
/// error with one line that says what is missing: a build with CUDA, a driver, a GPU, that GPU, a newer GPU.
void use_device(int index);
/// Of the device in use.
const Properties& properties();

/// Memory of the device, aligned to 256 bytes; nullptr if there is not enough.
void* allocate(int64_t size_bytes);
void release(void* data, int64_t size_bytes);
struct MemoryInfo {
  int64_t free_bytes, total_bytes;
};
MemoryInfo memory_info();

/// All of these keep the order of the compute stream. To the host: the call returns when the data is there; the other
/// ones may return earlier, but `from` may be written to again at once, unless it is pinned.
void copy_to_device(void* to, const void* from, int64_t size_bytes);
void copy_to_host(void* to, const void* from, int64_t size_bytes);
void copy_on_device(void* to, const void* from, int64_t size_bytes);
void fill_bytes(void* data, uint8_t value, int64_t size_bytes);

/// HEADWATER_SYNC=1 in the environment: every kernel is waited for and checked by name.
bool checks_every_launch();
/// Returns when all that was started is done. Throws a machine error if any of it failed.
void synchronize();

/// Memory of the host that copies to the device read in the background; what was copied from it must not be written to
/// before the copy is done.
void* allocate_pinned(int64_t size_bytes);
void release_pinned(void* data);

/// Between these two, what is put into the compute stream is recorded instead of run; waiting and copies between host and
/// device throw std::logic_error. The handle is launch_recording's. See core/cuda/graph.h.
void begin_recording();
void* end_recording();
void launch_recording(void* handle);
void release_recording(void* handle);

/// Used by launch(). The first throws std::logic_error for a shape that no device can run.
void check_launch_shape(const char* name, int64_t grid_x, int64_t grid_y, int64_t grid_z, int block,
                        int64_t shared_bytes);
void launch_on_hardware(const char* name, const void* kernel, int64_t grid_x, int64_t grid_y, int64_t grid_z,
                        int block, int64_t shared_bytes, void** arguments);

/// Products of matrices that lie on the device, row-major as core/gemm.h has them: C = alpha op(A) op(B) + beta C.
/// A and B are both f32 or both bf16; C is f32 or bf16; sums are kept in float.
struct GemmArgs {
  bool transpose_a, transpose_b;
  int64_t m, n, n_inner;
  float alpha;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  float beta;
  void* c;
  int64_t ldc;
  bool inputs_are_bf16, output_is_bf16;
};
void gemm(const GemmArgs& args);

}  // namespace headwater::cuda

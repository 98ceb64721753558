// core/cuda/runtime.h on the emulator: everything happens at once.

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "core/bfloat16.h"
#include "core/cuda/emulator/device_memory.h"
#include "core/cuda/emulator/emulator.h"
#include "core/cuda/runtime.h"
#include "core/error.h"
#include "core/gemm.h"

namespace headwater::cuda {
namespace {

using emulator::DeviceMemoryAccess;

using Recording = std::vector<std::function<void()>>;
std::unique_ptr<Recording> recording;

void refuse_while_recording(const char* what) {
  if (recording)
    throw std::logic_error(fmt::format("{} while a graph is recorded; a GPU refuses that", what));
}

/// The elements of a stored matrix as floats, rows one after another.
std::vector<float> read_matrix(const void* data, bool is_bf16, int64_t rows, int64_t columns,
                               int64_t row_step) {
  std::vector<float> result(rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t from = row * row_step + column;
      result[row * columns + column] = is_bf16 ? to_float(static_cast<const BFloat16*>(data)[from])
                                               : static_cast<const float*>(data)[from];
    }
  }
  return result;
}

void multiply_now(const GemmArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  const DeviceMemoryAccess access;
  const int64_t a_rows = args.transpose_a ? args.n_inner : args.m,
                a_columns = args.transpose_a ? args.m : args.n_inner;
  const int64_t b_rows = args.transpose_b ? args.n : args.n_inner,
                b_columns = args.transpose_b ? args.n_inner : args.n;
  const std::vector<float> a = read_matrix(args.a, args.inputs_are_bf16, a_rows, a_columns, args.lda);
  const std::vector<float> b = read_matrix(args.b, args.inputs_are_bf16, b_rows, b_columns, args.ldb);
  // Where beta is 0, C may hold anything.
  std::vector<float> c = args.beta == 0.0f
                             ? std::vector<float>(args.m * args.n)
                             : read_matrix(args.c, args.output_is_bf16, args.m, args.n, args.ldc);
  headwater::gemm<float>(args.transpose_a, args.transpose_b, args.m, args.n, args.n_inner, args.alpha,
                         a.data(), a_columns, b.data(), b_columns, args.beta, c.data(), args.n);
  for (int64_t row = 0; row < args.m; ++row) {
    for (int64_t column = 0; column < args.n; ++column) {
      const float value = c[row * args.n + column];
      if (args.output_is_bf16) {
        static_cast<BFloat16*>(args.c)[row * args.ldc + column] = to_bfloat16(value);
      } else {
        static_cast<float*>(args.c)[row * args.ldc + column] = value;
      }
    }
  }
}

}  // namespace

Backend backend() {
  return Backend::emulated;
}

void use_device(int index) {
  if (index != 0) throw_machine_error("there is no GPU {}: this build emulates one, cuda:0", index);
}

const Properties& properties() {
  // What a block may ask for is the H100's.
  static const Properties instance{.name = "emulated on the CPU",
                                   .compute_capability = 90,
                                   .n_multiprocessors = 4,
                                   .memory_bytes = emulator::device_memory_size(),
                                   .shared_bytes_per_block = 227 << 10};
  return instance;
}

void* allocate(int64_t size_bytes) {
  return emulator::allocate_device_memory(size_bytes);
}

void release(void* data, int64_t) {
  emulator::release_device_memory(data);
}

MemoryInfo memory_info() {
  const int64_t total = emulator::device_memory_size();
  return {total - emulator::device_memory_in_use(), total};
}

void copy_to_device(void* to, const void* from, int64_t size_bytes) {
  refuse_while_recording("a copy from the host");
  const DeviceMemoryAccess access;
  std::memcpy(to, from, size_bytes);
}

void copy_to_host(void* to, const void* from, int64_t size_bytes) {
  refuse_while_recording("a copy to the host");
  const DeviceMemoryAccess access;
  std::memcpy(to, from, size_bytes);
}

void copy_on_device(void* to, const void* from, int64_t size_bytes) {
  emulator::run_or_record([=] {
    const DeviceMemoryAccess access;
    std::memmove(to, from, size_bytes);
  });
}

void fill_bytes(void* data, uint8_t value, int64_t size_bytes) {
  emulator::run_or_record([=] {
    const DeviceMemoryAccess access;
    std::memset(data, value, size_bytes);
  });
}

bool checks_every_launch() {
  return false;
}

void synchronize() {
  refuse_while_recording("waiting for the device");
}

void* allocate_pinned(int64_t size_bytes) {
  return std::malloc(size_bytes);
}

void release_pinned(void* data) {
  std::free(data);
}

void begin_recording() {
  if (recording) throw std::logic_error("a graph is recorded already");
  recording = std::make_unique<Recording>();
}

void* end_recording() {
  return recording.release();
}

void launch_recording(void* handle) {
  refuse_while_recording("a graph is started");
  for (const auto& work : *static_cast<Recording*>(handle)) work();
}

void release_recording(void* handle) {
  delete static_cast<Recording*>(handle);
}

void launch_on_hardware(const char* name, const void*, int64_t, int64_t, int64_t, int, int64_t, void**) {
  throw std::logic_error(fmt::format("{}: this build has no hardware to launch on", name));
}

void gemm(const GemmArgs& args) {
  emulator::run_or_record([args] { multiply_now(args); });
}

}  // namespace headwater::cuda

namespace headwater::emulator {

void run_or_record(std::function<void()> work) {
  if (cuda::recording) {
    cuda::recording->push_back(std::move(work));
  } else {
    work();
  }
}

}  // namespace headwater::emulator

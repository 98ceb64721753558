// core/cuda/runtime.h in a build without CUDA: one line that says so.

#include "core/cuda/runtime.h"
#include "core/error.h"

namespace headwater::cuda {
namespace {

[[noreturn]] void refuse() {
  throw_machine_error(
      "this build of headwater has no CUDA; use device: cpu, or build the cuda preset: tools/build cuda");
}

}  // namespace

Backend backend() {
  return Backend::none;
}
void use_device(int) {
  refuse();
}
const Properties& properties() {
  refuse();
}
void* allocate(int64_t) {
  refuse();
}
void release(void*, int64_t) {}
MemoryInfo memory_info() {
  refuse();
}
void copy_to_device(void*, const void*, int64_t) {
  refuse();
}
void copy_to_host(void*, const void*, int64_t) {
  refuse();
}
void copy_on_device(void*, const void*, int64_t) {
  refuse();
}
void fill_bytes(void*, uint8_t, int64_t) {
  refuse();
}
bool checks_every_launch() {
  return false;
}
void synchronize() {
  refuse();
}
void* allocate_pinned(int64_t) {
  refuse();
}
void release_pinned(void*) {}
void begin_recording() {
  refuse();
}
void* end_recording() {
  refuse();
}
void launch_recording(void*) {
  refuse();
}
void release_recording(void*) {}
void check_launch_shape(const char*, int64_t, int64_t, int64_t, int, int64_t) {
  refuse();
}
void launch_on_hardware(const char*, const void*, int64_t, int64_t, int64_t, int, int64_t, void**) {
  refuse();
}
void gemm(const GemmArgs&) {
  refuse();
}

}  // namespace headwater::cuda

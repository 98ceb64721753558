// core/cuda/runtime.h on CUDA's runtime and cuBLAS.

#include "core/cuda/runtime.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "core/error.h"

namespace headwater::cuda {
namespace {

constexpr int oldest_capability = 80;
// cuBLAS's own advice for Hopper; ours, so that a captured step allocates nothing.
constexpr int64_t workspace_bytes = 32 << 20;

/// After one of these the context is lost: nothing else can succeed.
bool is_sticky(cudaError_t status) {
  return status == cudaErrorIllegalAddress || status == cudaErrorLaunchFailure || status == cudaErrorAssert ||
         status == cudaErrorECCUncorrectable || status == cudaErrorHardwareStackError ||
         status == cudaErrorMisalignedAddress || status == cudaErrorIllegalInstruction;
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const char* hint = is_sticky(status)
                         ? "; the GPU's context is lost, start again, with HEADWATER_SYNC=1 to find the "
                           "kernel that did it"
                         : "";
  throw_machine_error("{}: {} ({}){}", what, cudaGetErrorString(status), cudaGetErrorName(status), hint);
}

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw_machine_error("{}: {}", what, cublasGetStatusString(status));
}

struct DeviceInUse {
  int index = -1;
  Properties properties;
  cudaStream_t stream = nullptr;
  cublasHandle_t blas = nullptr;
  void* workspace = nullptr;
};

// Never destroyed: tensors in static storage may go after it.
DeviceInUse& in_use() {
  static DeviceInUse* instance = new DeviceInUse;
  return *instance;
}

cudaStream_t stream() {
  if (in_use().index < 0) throw std::logic_error("no GPU is in use: use_device comes first");
  return in_use().stream;
}

/// Throws one line that says what is missing.
void require_usable(int index) {
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) {
    throw_machine_error(
        "device: cuda needs an NVIDIA driver, and none is loaded; install it, or use device: cpu");
  }
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    throw_machine_error(
        "the NVIDIA driver is for CUDA {}.{}, this program needs {}.{}; update the driver, or use device: "
        "cpu",
        driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  }
  if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
    throw_machine_error(
        "no NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES is '{}'); use device: cpu",
        std::getenv("CUDA_VISIBLE_DEVICES") ? std::getenv("CUDA_VISIBLE_DEVICES") : "not set");
  }
  check(status, "looking for GPUs");
  if (index >= count)
    throw_machine_error("there is no GPU {}: this machine has cuda:0 to cuda:{}", index, count - 1);
}

}  // namespace

Backend backend() {
  return Backend::hardware;
}

void use_device(int index) {
  DeviceInUse& d = in_use();
  if (d.index == index) return;
  if (d.index >= 0) throw_machine_error("cuda:{} is in use already; one process uses one GPU", d.index);
  require_usable(index);
  cudaDeviceProp found{};
  check(cudaGetDeviceProperties(&found, index), "reading the GPU's properties");
  d.properties = {.name = found.name,
                  .compute_capability = found.major * 10 + found.minor,
                  .n_multiprocessors = found.multiProcessorCount,
                  .memory_bytes = static_cast<int64_t>(found.totalGlobalMem),
                  .shared_bytes_per_block = static_cast<int64_t>(found.sharedMemPerBlockOptin)};
  if (d.properties.compute_capability < oldest_capability) {
    throw_machine_error("cuda:{} is a {} of compute capability {}.{}; 8.0 or newer is needed", index,
                        found.name, found.major, found.minor);
  }
  check(cudaSetDevice(index), "choosing the GPU");
  check(cudaStreamCreateWithFlags(&d.stream, cudaStreamNonBlocking), "making a stream");
  check(cublasCreate(&d.blas), "starting cuBLAS");
  check(cublasSetStream(d.blas, d.stream), "starting cuBLAS");
  check(cudaMalloc(&d.workspace, workspace_bytes), "allocating cuBLAS's work space");
  check(cublasSetWorkspace(d.blas, d.workspace, workspace_bytes), "starting cuBLAS");
  d.index = index;
}

const Properties& properties() {
  stream();
  return in_use().properties;
}

void* allocate(int64_t size_bytes) {
  stream();
  void* data = nullptr;
  const cudaError_t status = cudaMalloc(&data, size_bytes);
  if (status == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: forget it
    return nullptr;
  }
  check(status, "allocating GPU memory");
  return data;
}

void release(void* data, int64_t) {
  cudaFree(data);  // at the program's end the context may be gone; nothing is lost by that
}

MemoryInfo memory_info() {
  stream();
  size_t free_bytes = 0, total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "reading the GPU's memory");
  return {static_cast<int64_t>(free_bytes), static_cast<int64_t>(total_bytes)};
}

void copy_to_device(void* to, const void* from, int64_t size_bytes) {
  check(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyHostToDevice, stream()), "copying to the GPU");
}

void copy_to_host(void* to, const void* from, int64_t size_bytes) {
  check(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToHost, stream()), "copying from the GPU");
  check(cudaStreamSynchronize(stream()), "copying from the GPU");
}

void copy_on_device(void* to, const void* from, int64_t size_bytes) {
  check(cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDeviceToDevice, stream()), "copying on the GPU");
}

void fill_bytes(void* data, uint8_t value, int64_t size_bytes) {
  check(cudaMemsetAsync(data, value, size_bytes, stream()), "filling GPU memory");
}

bool checks_every_launch() {
  static const bool enabled = [] {
    const char* text = std::getenv("HEADWATER_SYNC");
    return text != nullptr && std::strcmp(text, "0") != 0;
  }();
  return enabled;
}

void synchronize() {
  check(cudaStreamSynchronize(stream()), "waiting for the GPU");
}

void* allocate_pinned(int64_t size_bytes) {
  stream();
  void* data = nullptr;
  check(cudaMallocHost(&data, size_bytes), "allocating pinned memory");
  return data;
}

void release_pinned(void* data) {
  cudaFreeHost(data);
}

void begin_recording() {
  // Relaxed: the allocator may have to ask for memory meanwhile.
  check(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeRelaxed), "recording a CUDA graph");
}

void* end_recording() {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream(), &graph), "recording a CUDA graph");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(status, "making a CUDA graph");
  return executable;
}

void launch_recording(void* handle) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(handle), stream()), "starting a CUDA graph");
}

void release_recording(void* handle) {
  if (handle != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(handle));
}

/// HEADWATER_SYNC: waits, unless the work is recorded.
static void check_if_asked(const char* name) {
  if (!checks_every_launch()) return;
  cudaStreamCaptureStatus recording = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream(), &recording), name);
  if (recording == cudaStreamCaptureStatusNone) check(cudaStreamSynchronize(stream()), name);
}

void launch_on_hardware(const char* name, const void* kernel, int64_t grid_x, int64_t grid_y, int64_t grid_z,
                        int block, int64_t shared_bytes, void** arguments) {
  constexpr int64_t shared_bytes_without_asking = 48 << 10;
  if (shared_bytes > shared_bytes_without_asking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y),
                  static_cast<unsigned>(grid_z));
  check(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(block)), arguments,
                         static_cast<size_t>(shared_bytes), stream()),
        name);
  check_if_asked(name);
}

void gemm(const GemmArgs& args) {
  if (args.m == 0 || args.n == 0) return;
  stream();
  // cuBLAS counts in columns: row-major C = A B is column-major C^T = B^T A^T.
  const auto operation = [](bool transpose) { return transpose ? CUBLAS_OP_T : CUBLAS_OP_N; };
  const cudaDataType_t in = args.inputs_are_bf16 ? CUDA_R_16BF : CUDA_R_32F;
  const cudaDataType_t out = args.output_is_bf16 ? CUDA_R_16BF : CUDA_R_32F;
  check(cublasGemmEx(in_use().blas, operation(args.transpose_b), operation(args.transpose_a),
                     static_cast<int>(args.n), static_cast<int>(args.m), static_cast<int>(args.n_inner),
                     &args.alpha, args.b, in, static_cast<int>(args.ldb), args.a, in,
                     static_cast<int>(args.lda), &args.beta, args.c, out, static_cast<int>(args.ldc),
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "a matrix product (cuBLAS)");
  check_if_asked("a matrix product (cuBLAS)");
}

}  // namespace headwater::cuda

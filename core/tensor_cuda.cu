#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "core/tensor_kernels.h"

// One thread an element, in a grid-stride loop: these are bound by memory, and neighbours read neighbours.

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;

LaunchShape shape_for(int64_t n) {
  return {.grid = {std::min(blocks_for(n, block), max_blocks)}, .block = block};
}

__device__ int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ int64_t element_stride() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

template <class To, class From>
__device__ To converted(From value) {
  if constexpr (std::is_same_v<From, BFloat16>) {
    return converted<To>(to_float(value));
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

template <class To, class From>
__global__ void convert_elements(const From* from, To* to, int64_t n) {
  for (int64_t i = first_element(); i < n; i += element_stride()) to[i] = converted<To>(from[i]);
}

template <class T>
__global__ void fill_elements(T* target, T value, int64_t n) {
  for (int64_t i = first_element(); i < n; i += element_stride()) target[i] = value;
}

template <class T>
__global__ void add_elements(T* target, const T* source, int64_t n) {
  for (int64_t i = first_element(); i < n; i += element_stride()) {
    target[i] = from_float<T>(to_float(target[i]) + to_float(source[i]));
  }
}

template <class T>
__global__ void scale_elements(T* target, float factor, int64_t n) {
  for (int64_t i = first_element(); i < n; i += element_stride()) {
    target[i] = from_float<T>(to_float(target[i]) * factor);
  }
}

}  // namespace

void convert_cuda(const ConvertArgs& args) {
  dispatch_floating(args.from.dtype(), "convert", [&](auto from) {
    dispatch_floating(args.to.dtype(), "convert", [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      launch("convert", convert_elements<To, From>, shape_for(args.from.numel()), args.from.data<From>(),
             args.to.data<To>(), args.from.numel());
    });
  });
}

void fill_cuda(const FillArgs& args) {
  dispatch_any(args.target.dtype(), [&](auto element) {
    using T = decltype(element);
    launch("fill", fill_elements<T>, shape_for(args.target.numel()), args.target.data<T>(),
           converted<T>(args.value), args.target.numel());
  });
}

void add_in_place_cuda(const AddInPlaceArgs& args) {
  dispatch_cuda(args.target.dtype(), "add_in_place", [&](auto element) {
    using T = decltype(element);
    launch("add_in_place", add_elements<T>, shape_for(args.target.numel()), args.target.data<T>(),
           args.source.data<T>(), args.target.numel());
  });
}

void scale_in_place_cuda(const ScaleInPlaceArgs& args) {
  dispatch_cuda(args.target.dtype(), "scale_in_place", [&](auto element) {
    using T = decltype(element);
    launch("scale_in_place", scale_elements<T>, shape_for(args.target.numel()), args.target.data<T>(),
           static_cast<float>(args.factor), args.target.numel());
  });
}

}  // namespace headwater

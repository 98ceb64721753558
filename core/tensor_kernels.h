// Private to core/tensor: what its kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct ConvertArgs {
  Tensor from;
  Tensor to;  // written; any dtype, on the same device
};

struct FillArgs {
  Tensor target;  // written
  double value;
};

struct AddInPlaceArgs {
  Tensor target;  // added to
  Tensor source;
};

struct ScaleInPlaceArgs {
  Tensor target;  // multiplied
  double factor;
};

void convert_cpu(const ConvertArgs& args);
void convert_cuda(const ConvertArgs& args);
void fill_cpu(const FillArgs& args);
void fill_cuda(const FillArgs& args);
void add_in_place_cpu(const AddInPlaceArgs& args);
void add_in_place_cuda(const AddInPlaceArgs& args);
void scale_in_place_cpu(const ScaleInPlaceArgs& args);
void scale_in_place_cuda(const ScaleInPlaceArgs& args);

inline constexpr Kernel<ConvertArgs> convert_kernel{"convert", convert_cpu, HEADWATER_CUDA(convert_cuda)};
inline constexpr Kernel<FillArgs> fill_kernel{"fill", fill_cpu, HEADWATER_CUDA(fill_cuda)};
inline constexpr Kernel<AddInPlaceArgs> add_in_place_kernel{"add_in_place", add_in_place_cpu,
                                                            HEADWATER_CUDA(add_in_place_cuda)};
inline constexpr Kernel<ScaleInPlaceArgs> scale_in_place_kernel{"scale_in_place", scale_in_place_cpu,
                                                                HEADWATER_CUDA(scale_in_place_cuda)};

}  // namespace headwater

// Private to the operators: what their kernels take, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct ElementwiseUnaryArgs {
  Tensor x;
  Tensor y;  // written
};

struct ElementwiseUnaryBackwardArgs {
  Tensor x;
  Tensor grad_y;
  Tensor grad_x;  // written
};

struct ElementwiseBinaryArgs {
  Tensor a, b;  // of one dtype; on a GPU, elementwise_add takes a bf16 b beside an f32 a
  Tensor y;     // written
};

struct ElementwiseScaleArgs {
  Tensor x;
  Tensor y;  // written
  double factor;
};

struct GatedBackwardArgs {
  Tensor gate, up;
  Tensor grad_y;
  Tensor grad_gate, grad_up;  // written
};

void elementwise_cast_cpu(const ElementwiseUnaryArgs& args);
void elementwise_cast_cuda(const ElementwiseUnaryArgs& args);
void elementwise_add_cpu(const ElementwiseBinaryArgs& args);
void elementwise_add_cuda(const ElementwiseBinaryArgs& args);
void elementwise_mul_cpu(const ElementwiseBinaryArgs& args);
void elementwise_mul_cuda(const ElementwiseBinaryArgs& args);
void elementwise_scale_cpu(const ElementwiseScaleArgs& args);
void elementwise_scale_cuda(const ElementwiseScaleArgs& args);
void silu_forward_cpu(const ElementwiseUnaryArgs& args);
void silu_forward_cuda(const ElementwiseUnaryArgs& args);
void silu_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void silu_backward_cuda(const ElementwiseUnaryBackwardArgs& args);
void softplus_forward_cpu(const ElementwiseUnaryArgs& args);
void softplus_forward_cuda(const ElementwiseUnaryArgs& args);
void softplus_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void softplus_backward_cuda(const ElementwiseUnaryBackwardArgs& args);
void negative_exp_forward_cpu(const ElementwiseUnaryArgs& args);
void negative_exp_forward_cuda(const ElementwiseUnaryArgs& args);
void negative_exp_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void negative_exp_backward_cuda(const ElementwiseUnaryBackwardArgs& args);
void gelu_forward_cpu(const ElementwiseUnaryArgs& args);
void gelu_forward_cuda(const ElementwiseUnaryArgs& args);
void gelu_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void gelu_backward_cuda(const ElementwiseUnaryBackwardArgs& args);
void relu_forward_cpu(const ElementwiseUnaryArgs& args);
void relu_forward_cuda(const ElementwiseUnaryArgs& args);
void relu_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void relu_backward_cuda(const ElementwiseUnaryBackwardArgs& args);
void elu_plus_one_forward_cpu(const ElementwiseUnaryArgs& args);
void elu_plus_one_forward_cuda(const ElementwiseUnaryArgs& args);
void elu_plus_one_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void elu_plus_one_backward_cuda(const ElementwiseUnaryBackwardArgs& args);
void silu_mul_forward_cpu(const ElementwiseBinaryArgs& args);
void silu_mul_forward_cuda(const ElementwiseBinaryArgs& args);
void silu_mul_backward_cpu(const GatedBackwardArgs& args);
void silu_mul_backward_cuda(const GatedBackwardArgs& args);
void sigmoid_mul_forward_cpu(const ElementwiseBinaryArgs& args);
void sigmoid_mul_forward_cuda(const ElementwiseBinaryArgs& args);
void sigmoid_mul_backward_cpu(const GatedBackwardArgs& args);
void sigmoid_mul_backward_cuda(const GatedBackwardArgs& args);
void squared_relu_forward_cpu(const ElementwiseUnaryArgs& args);
void squared_relu_forward_cuda(const ElementwiseUnaryArgs& args);
void squared_relu_backward_cpu(const ElementwiseUnaryBackwardArgs& args);
void squared_relu_backward_cuda(const ElementwiseUnaryBackwardArgs& args);

inline constexpr Kernel<ElementwiseUnaryArgs> elementwise_cast{"elementwise_cast", elementwise_cast_cpu,
                                                               HEADWATER_CUDA(elementwise_cast_cuda)};
inline constexpr Kernel<ElementwiseBinaryArgs> elementwise_add{"elementwise_add", elementwise_add_cpu,
                                                               HEADWATER_CUDA(elementwise_add_cuda)};
inline constexpr Kernel<ElementwiseBinaryArgs> elementwise_mul{"elementwise_mul", elementwise_mul_cpu,
                                                               HEADWATER_CUDA(elementwise_mul_cuda)};
inline constexpr Kernel<ElementwiseScaleArgs> elementwise_scale{"elementwise_scale", elementwise_scale_cpu,
                                                                HEADWATER_CUDA(elementwise_scale_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> silu_forward{"silu_forward", silu_forward_cpu,
                                                           HEADWATER_CUDA(silu_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> silu_backward{"silu_backward", silu_backward_cpu,
                                                                    HEADWATER_CUDA(silu_backward_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> softplus_forward{"softplus_forward", softplus_forward_cpu,
                                                               HEADWATER_CUDA(softplus_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> softplus_backward{
    "softplus_backward", softplus_backward_cpu, HEADWATER_CUDA(softplus_backward_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> negative_exp_forward{
    "negative_exp_forward", negative_exp_forward_cpu, HEADWATER_CUDA(negative_exp_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> negative_exp_backward{
    "negative_exp_backward", negative_exp_backward_cpu, HEADWATER_CUDA(negative_exp_backward_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> gelu_forward{"gelu_forward", gelu_forward_cpu,
                                                           HEADWATER_CUDA(gelu_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> gelu_backward{"gelu_backward", gelu_backward_cpu,
                                                                    HEADWATER_CUDA(gelu_backward_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> relu_forward{"relu_forward", relu_forward_cpu,
                                                           HEADWATER_CUDA(relu_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> relu_backward{"relu_backward", relu_backward_cpu,
                                                                    HEADWATER_CUDA(relu_backward_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> elu_plus_one_forward{
    "elu_plus_one_forward", elu_plus_one_forward_cpu, HEADWATER_CUDA(elu_plus_one_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> elu_plus_one_backward{
    "elu_plus_one_backward", elu_plus_one_backward_cpu, HEADWATER_CUDA(elu_plus_one_backward_cuda)};
inline constexpr Kernel<ElementwiseBinaryArgs> silu_mul_forward{"silu_mul_forward", silu_mul_forward_cpu,
                                                                HEADWATER_CUDA(silu_mul_forward_cuda)};
inline constexpr Kernel<GatedBackwardArgs> silu_mul_backward{"silu_mul_backward", silu_mul_backward_cpu,
                                                             HEADWATER_CUDA(silu_mul_backward_cuda)};
inline constexpr Kernel<ElementwiseBinaryArgs> sigmoid_mul_forward{
    "sigmoid_mul_forward", sigmoid_mul_forward_cpu, HEADWATER_CUDA(sigmoid_mul_forward_cuda)};
inline constexpr Kernel<GatedBackwardArgs> sigmoid_mul_backward{
    "sigmoid_mul_backward", sigmoid_mul_backward_cpu, HEADWATER_CUDA(sigmoid_mul_backward_cuda)};
inline constexpr Kernel<ElementwiseUnaryArgs> squared_relu_forward{
    "squared_relu_forward", squared_relu_forward_cpu, HEADWATER_CUDA(squared_relu_forward_cuda)};
inline constexpr Kernel<ElementwiseUnaryBackwardArgs> squared_relu_backward{
    "squared_relu_backward", squared_relu_backward_cpu, HEADWATER_CUDA(squared_relu_backward_cuda)};

}  // namespace headwater

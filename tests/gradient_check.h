// Gradients held against finite differences of the forward, in f64.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"

namespace headwater {

/// A function of several variables with several outputs, as the tests call an operator.
using CheckedFunction = std::function<std::vector<Variable>(const std::vector<Variable>&)>;

/// Standard normal f64 numbers from a fixed seed; `stream` tells tensors of one test apart.
Tensor random_tensor(const Shape& shape, uint64_t stream, double scale = 1.0);

/// Whether this build has CUDA kernels that can run here: emulated, or on a GPU that was found.
bool has_cuda();

/// The function on the GPU (or its emulation), forward and backward, with f32 inputs, against the CPU in f64 on the same
/// numbers: every output and gradient within `tolerance` of its largest entry. Returns "" or a text that names the
/// tensor and both values; "" where has_cuda() is false. check_gradient does this too: one suite for both devices.
std::string check_cuda(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                       double tolerance = 1e-5);

/// The same with the inputs whose numbers are listed in bf16, the others in f32.
std::string check_cuda_bf16(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                            const std::vector<size_t>& bf16_inputs, double tolerance = 2e-2);

/// Along random directions: cheap at any size. For random cotangents c of the outputs, compares <c, f(x + h
/// u) - f(x - h u)> / 2h with <gradient, u>, one input at a time and all together. Returns "" or a text that
/// names the input, both values and the error. All floating inputs must be f64; integer inputs are not
/// varied. Then check_cuda, with `cuda_tolerance`, unless that is cpu_only.
inline constexpr double cpu_only = 0.0;
std::string check_gradient(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           double tolerance = 1e-6, double cuda_tolerance = 1e-5);

/// Every entry of every input against a central difference: for tiny shapes.
std::string check_jacobian(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           double tolerance = 1e-6);

/// The largest |a - b| divided by max(1e-30, max |b|); infinite for different shapes or a NaN.
double relative_error(const Tensor& a, const Tensor& b);

}  // namespace headwater

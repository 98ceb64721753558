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

/// Along random directions: cheap at any size. For random cotangents c of the outputs, compares <c, f(x + h
/// u) - f(x - h u)> / 2h with <gradient, u>, one input at a time and all together. Returns "" or a text that
/// names the input, both values and the error. All floating inputs must be f64; integer inputs are not
/// varied.
std::string check_gradient(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           double tolerance = 1e-6);

/// Every entry of every input against a central difference: for tiny shapes.
std::string check_jacobian(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           double tolerance = 1e-6);

/// The largest |a - b| divided by max(1e-30, max |b|); infinite for different shapes or a NaN.
double relative_error(const Tensor& a, const Tensor& b);

}  // namespace headwater

// The parameters of a model as inputs of a checked function.
#pragma once

#include <vector>

#include "autograd/parameters.h"

namespace headwater {

/// The values of all parameters, in the store's order, as copies.
std::vector<Tensor> parameter_values(const ParameterStore& store);

/// Makes the model behind `store` compute with values[i] for its parameter i, and hands the parameters'
/// gradients to `values` at the end of the backward. Returns a zero that must be among the outputs from which
/// the backward starts.
Variable bind_parameters(const ParameterStore& store, const std::vector<Variable>& values);

}  // namespace headwater

#include "tests/gradient_check.h"

#include <cmath>
#include <limits>

#include "autograd/tape.h"
#include "core/cuda/runtime.h"
#include "core/random.h"

namespace headwater {
namespace {

// Balances the truncation error h^2 against the rounding error 1e-16 / h.
constexpr double step = 1e-5;

double inner_product(const Tensor& a, const Tensor& b) {
  double sum = 0.0;
  for (int64_t i = 0; i < a.numel(); ++i) sum += a.data<double>()[i] * b.data<double>()[i];
  return sum;
}

bool is_varied(const Tensor& tensor) {
  return tensor.defined() && tensor.dtype() == DType::f64;
}

double weighted_output(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                       const std::vector<Tensor>& cotangents) {
  std::vector<Variable> constants;
  for (const Tensor& input : inputs) constants.emplace_back(input);
  const std::vector<Variable> outputs = function(constants);
  double sum = 0.0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (cotangents[i].defined()) sum += inner_product(outputs[i].value(), cotangents[i]);
  }
  return sum;
}

struct Gradients {
  std::vector<Tensor> cotangents;
  std::vector<Tensor> inputs;  // zeros where nothing arrived
};

Gradients analytic_gradients(const CheckedFunction& function, const std::vector<Tensor>& inputs) {
  Gradients result;
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs)
    leaves.push_back(is_varied(input) ? Variable::leaf(input) : Variable(input));
  Tape tape;
  const std::vector<Variable> outputs = function(leaves);
  for (size_t i = 0; i < outputs.size(); ++i) {
    result.cotangents.push_back(outputs[i].defined() ? random_tensor(outputs[i].shape(), 1000 + i)
                                                     : Tensor());
  }
  tape.backward(outputs, result.cotangents);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool arrived = is_varied(inputs[i]) && leaves[i].gradient().tensor().defined();
    result.inputs.push_back(arrived ? leaves[i].gradient().tensor()
                                    : (is_varied(inputs[i]) ? zeros_like(inputs[i]) : Tensor()));
  }
  return result;
}

/// input + factor * direction.
Tensor moved(const Tensor& input, const Tensor& direction, double factor) {
  const Tensor result = input.clone();
  for (int64_t i = 0; i < input.numel(); ++i)
    result.data<double>()[i] += factor * direction.data<double>()[i];
  return result;
}

/// (f(x + h u) - f(x - h u)) / 2h for a direction per input; undefined directions stay put.
double difference_quotient(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           const std::vector<Tensor>& directions, const std::vector<Tensor>& cotangents) {
  std::vector<Tensor> forward = inputs, backward = inputs;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!directions[i].defined()) continue;
    forward[i] = moved(inputs[i], directions[i], step);
    backward[i] = moved(inputs[i], directions[i], -step);
  }
  return (weighted_output(function, forward, cotangents) - weighted_output(function, backward, cotangents)) /
         (2 * step);
}

std::string complain(const std::string& what, double analytic, double numeric, double error,
                     double tolerance) {
  return fmt::format("{}: gradient gives {:.10g}, finite differences {:.10g}, error {:.3g} > {:.3g}", what,
                     analytic, numeric, error, tolerance);
}

std::string compare(const std::string& what, double analytic, double numeric, double scale,
                    double tolerance) {
  const double error =
      std::abs(analytic - numeric) / std::max({std::abs(analytic), std::abs(numeric), scale});
  if (!(error <= tolerance)) return complain(what, analytic, numeric, error, tolerance);
  return "";
}

/// What a function gives: its outputs, and the gradients of its inputs for random cotangents of the outputs.
struct Evaluated {
  std::vector<Tensor> outputs, gradients;  // undefined where there is none
};

/// `cotangents` are drawn if there are none yet, rounded to the dtype of the outputs.
Evaluated evaluate(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                   std::vector<Tensor>& cotangents) {
  std::vector<Variable> leaves;
  for (const Tensor& input : inputs) {
    const bool real = input.defined() && input.dtype() != DType::i32 && input.dtype() != DType::u8;
    leaves.push_back(real ? Variable::leaf(input) : Variable(input));
  }
  Tape tape;
  const std::vector<Variable> outputs = function(leaves);
  Evaluated result;
  std::vector<Tensor> given;
  for (size_t i = 0; i < outputs.size(); ++i) {
    result.outputs.push_back(outputs[i].value());
    if (cotangents.size() == i) {
      cotangents.push_back(
          outputs[i].defined()
              ? random_tensor(outputs[i].shape(), 1000 + i).to(outputs[i].dtype()).to(DType::f64)
              : Tensor());
    }
    given.push_back(cotangents[i].to(outputs[i].dtype()).to(outputs[i].device()));
  }
  tape.backward(outputs, given);
  for (const Variable& leaf : leaves) {
    result.gradients.push_back(leaf.requires_gradient() ? leaf.gradient().tensor() : Tensor());
  }
  return result;
}

/// The entry where `device` is farthest from `reference`, if that is more than `tolerance` of the largest entry.
std::string compare_tensors(const std::string& what, const Tensor& device, const Tensor& reference,
                            double tolerance) {
  if (!reference.defined() && !device.defined()) return "";
  const std::vector<double> a =
      device.defined() ? device.to_vector<double>() : std::vector<double>(reference.numel());
  const std::vector<double> b =
      reference.defined() ? reference.to_vector<double>() : std::vector<double>(a.size());
  if (a.size() != b.size())
    return fmt::format("{}: {} entries on the GPU, {} on the CPU", what, a.size(), b.size());
  double scale = 1e-30, worst = 0.0;
  size_t at = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    scale = std::max(scale, std::abs(b[i]));
    const double error = std::isnan(a[i]) ? std::numeric_limits<double>::infinity() : std::abs(a[i] - b[i]);
    if (error > worst) {
      worst = error;
      at = i;
    }
  }
  if (worst <= tolerance * scale) return "";
  return fmt::format(
      "{}, entry {}: {:.9g} on the GPU, {:.9g} on the CPU in f64; error {:.3g} of the largest entry, "
      "allowed {:.3g}",
      what, at, a[at], b[at], worst / scale, tolerance);
}

std::string compare_devices(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                            const std::vector<DType>& dtypes, double tolerance) {
  if (!has_cuda()) return "";
  std::vector<Tensor> on_cpu, on_gpu;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool real = is_varied(inputs[i]);
    const Tensor rounded = real ? inputs[i].to(dtypes[i]) : inputs[i];
    on_gpu.push_back(rounded.to(parse_device("cuda")));
    on_cpu.push_back(real ? rounded.to(DType::f64) : inputs[i]);
  }
  std::vector<Tensor> cotangents;
  const Evaluated gpu = evaluate(function, on_gpu, cotangents);
  const Evaluated cpu = evaluate(function, on_cpu, cotangents);
  for (size_t i = 0; i < cpu.outputs.size(); ++i) {
    const std::string text =
        compare_tensors(fmt::format("output {}", i), gpu.outputs[i], cpu.outputs[i], tolerance);
    if (!text.empty()) return text;
  }
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string text = compare_tensors(fmt::format("gradient of input {}", i), gpu.gradients[i],
                                             cpu.gradients[i], tolerance);
    if (!text.empty()) return text;
  }
  return "";
}

}  // namespace

bool has_cuda() {
  static const bool found = [] {
    if (cuda::backend() == cuda::Backend::none) return false;
    try {
      parse_device("cuda");
    } catch (const Error&) {
      return false;
    }
    return true;
  }();
  return found;
}

std::string check_cuda(const CheckedFunction& function, const std::vector<Tensor>& inputs, double tolerance) {
  return compare_devices(function, inputs, std::vector<DType>(inputs.size(), DType::f32), tolerance);
}

std::string check_cuda_bf16(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                            const std::vector<size_t>& bf16_inputs, double tolerance) {
  std::vector<DType> dtypes(inputs.size(), DType::f32);
  for (const size_t i : bf16_inputs) dtypes.at(i) = DType::bf16;
  return compare_devices(function, inputs, dtypes, tolerance);
}

Tensor random_tensor(const Shape& shape, uint64_t stream, double scale) {
  RandomStream random(20240521, stream);
  const Tensor result = Tensor::empty(shape, DType::f64);
  for (int64_t i = 0; i < result.numel(); ++i) result.data<double>()[i] = scale * random.normal();
  return result;
}

std::string check_gradient(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           double tolerance, double cuda_tolerance) {
  const Gradients gradients = analytic_gradients(function, inputs);
  std::vector<Tensor> all(inputs.size());
  double all_analytic = 0.0;
  double all_scale = 0.0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!is_varied(inputs[i])) continue;
    std::vector<Tensor> one(inputs.size());
    one[i] = all[i] = random_tensor(inputs[i].shape(), 2000 + i);
    const double analytic = inner_product(gradients.inputs[i], one[i]);
    const double norm = std::sqrt(inner_product(gradients.inputs[i], gradients.inputs[i]));
    all_analytic += analytic;
    all_scale += norm;
    const double numeric = difference_quotient(function, inputs, one, gradients.cotangents);
    // A direction that is nearly orthogonal to the gradient must not be judged against its tiny product.
    const std::string text =
        compare(fmt::format("input {}", i), analytic, numeric, std::max(norm, 1e-3), tolerance);
    if (!text.empty()) return text;
  }
  const double numeric = difference_quotient(function, inputs, all, gradients.cotangents);
  const std::string text =
      compare("all inputs together", all_analytic, numeric, std::max(all_scale, 1e-3), tolerance);
  return text.empty() && cuda_tolerance != cpu_only ? check_cuda(function, inputs, cuda_tolerance) : text;
}

std::string check_jacobian(const CheckedFunction& function, const std::vector<Tensor>& inputs,
                           double tolerance) {
  const Gradients gradients = analytic_gradients(function, inputs);
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!is_varied(inputs[i])) continue;
    const double norm = std::sqrt(inner_product(gradients.inputs[i], gradients.inputs[i]));
    for (int64_t entry = 0; entry < inputs[i].numel(); ++entry) {
      std::vector<Tensor> directions(inputs.size());
      directions[i] = zeros_like(inputs[i]);
      directions[i].data<double>()[entry] = 1.0;
      const double numeric = difference_quotient(function, inputs, directions, gradients.cotangents);
      const double analytic = gradients.inputs[i].data<double>()[entry];
      const std::string text = compare(fmt::format("input {}, entry {}", i, entry), analytic, numeric,
                                       std::max(norm, 1e-3), tolerance);
      if (!text.empty()) return text;
    }
  }
  return "";
}

double relative_error(const Tensor& a, const Tensor& b) {
  if (a.shape() != b.shape()) return std::numeric_limits<double>::infinity();
  const std::vector<double> x = a.to_vector<double>();
  const std::vector<double> y = b.to_vector<double>();
  double scale = 1e-30;
  double error = 0.0;
  for (size_t i = 0; i < x.size(); ++i) {
    scale = std::max(scale, std::abs(y[i]));
    const double difference = std::abs(x[i] - y[i]);
    if (std::isnan(difference)) return std::numeric_limits<double>::infinity();
    error = std::max(error, difference);
  }
  return error / scale;
}

}  // namespace headwater

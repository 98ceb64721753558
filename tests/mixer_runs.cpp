#include "tests/mixer_runs.h"

#include "autograd/tape.h"
#include "core/error.h"
#include "tests/bound_parameters.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"

namespace headwater {
namespace {

bool is_real(const Tensor& tensor) {
  return tensor.dtype() == DType::f32 || tensor.dtype() == DType::f64;
}

bool is_constant(const Tensor& tensor) {
  const std::vector<double> values = tensor.to_vector<double>();
  for (const double value : values) {
    if (value != values.front()) return false;
  }
  return true;
}

/// Parts along time, as one tensor like `whole`.
Tensor join_steps(const std::vector<Tensor>& parts, const Tensor& like) {
  const Tensor whole = empty_like(like);
  const int64_t length = like.dim(1), width = like.dim(2);
  for (int64_t b = 0; b < like.dim(0); ++b) {
    int64_t t = b * length;
    for (const Tensor& part : parts) {
      const int64_t count = part.dim(1) * width;
      whole.view(t * width, {count}).copy_from(part.view(b * count, {count}));
      t += part.dim(1);
    }
  }
  return whole;
}

}  // namespace

TestMixer::TestMixer(const MixerConfig& config, int64_t d_model, DType dtype)
    : mixer(config.make(d_model, /*n_layers=*/2)) {
  mixer->declare_parameters(ParameterScope(store, ""));
  store.allocate(dtype);
  store.initialize(11);
  for (const Parameter& parameter : store.parameters()) {
    if (!is_constant(parameter.value)) continue;
    add_in_place(parameter.value, random_tensor(parameter.shape, stream_id(parameter.name), 0.5).to(dtype));
  }
}

MixerRun run_in_pieces(const MixerConfig& config, const Tensor& x, const Tensor& resets,
                       const std::vector<int64_t>& borders, bool with_state_cotangent) {
  const TestMixer test(config, x.dim(2));
  Tape tape;
  std::vector<Variable> leaves, outputs;
  std::vector<Tensor> cotangents, y_parts, grad_parts;
  MixerState state;
  const Tensor cotangent = random_tensor(x.shape(), 5);
  for (size_t i = 0; i + 1 < borders.size(); ++i) {
    leaves.push_back(Variable::leaf(steps_of(x, borders[i], borders[i + 1])));
    MixerOutput output =
        test.mixer->forward(leaves.back(), state, steps_of(resets, borders[i], borders[i + 1]));
    state = std::move(output.state);
    y_parts.push_back(output.y.value());
    outputs.push_back(output.y);
    cotangents.push_back(steps_of(cotangent, borders[i], borders[i + 1]));
  }
  MixerRun run;
  for (size_t i = 0; i < state.size(); ++i) {
    run.state.push_back(state[i].value());
    if (!with_state_cotangent || !is_real(state[i].value())) continue;
    outputs.push_back(state[i]);
    cotangents.push_back(random_tensor(state[i].shape(), 60 + i));
  }
  tape.backward(outputs, cotangents);
  for (const Variable& leaf : leaves) grad_parts.push_back(leaf.gradient().tensor());
  run.y = join_steps(y_parts, x);
  run.grad_x = join_steps(grad_parts, x);
  for (const Parameter& parameter : test.store.parameters())
    run.grad_parameters.push_back(parameter.variable->gradient().tensor().clone());
  return run;
}

std::vector<int64_t> every_step(int64_t length) {
  std::vector<int64_t> borders;
  for (int64_t t = 0; t <= length; ++t) borders.push_back(t);
  return borders;
}

std::string difference(const MixerRun& a, const MixerRun& b, double tolerance) {
  std::string text;
  const auto check = [&](const std::string& name, const Tensor& x, const Tensor& y) {
    const double error = relative_error(x, y);
    if (!(error <= tolerance)) text += fmt::format("{}: error {:.3g}; ", name, error);
  };
  check("y", a.y, b.y);
  check("grad_x", a.grad_x, b.grad_x);
  if (a.state.size() != b.state.size()) text += "states of different sizes; ";
  for (size_t i = 0; i < std::min(a.state.size(), b.state.size()); ++i)
    check(fmt::format("state {}", i), a.state[i], b.state[i]);
  for (size_t i = 0; i < a.grad_parameters.size(); ++i)
    check(fmt::format("gradient of parameter {}", i), a.grad_parameters[i], b.grad_parameters[i]);
  return text;
}

std::string check_documents(const MixerConfig& config, const Tensor& x, const std::vector<int64_t>& starts,
                            double tolerance) {
  const int64_t length = x.dim(1);
  const Tensor resets = Tensor::zeros({1, length}, DType::i32);
  for (const int64_t start : starts) resets.data<int32_t>()[start] = start > 0 ? 1 : 0;
  const MixerRun packed = run_in_pieces(config, x, resets, {0, length}, false);

  const Tensor cotangent = random_tensor(x.shape(), 5);
  const TestMixer test(config, x.dim(2));
  std::vector<Tensor> y_parts, grad_parts;
  MixerRun apart;
  for (size_t i = 0; i < starts.size(); ++i) {
    const int64_t begin = starts[i], end = i + 1 < starts.size() ? starts[i + 1] : length;
    Tape tape;
    const Variable leaf = Variable::leaf(steps_of(x, begin, end));
    const MixerOutput output = test.mixer->forward(leaf, {}, {});
    tape.backward({output.y}, {steps_of(cotangent, begin, end)});
    y_parts.push_back(output.y.value());
    grad_parts.push_back(leaf.gradient().tensor());
    apart.state.clear();
    for (const Variable& part : output.state) apart.state.push_back(part.value());
  }
  apart.y = join_steps(y_parts, x);
  apart.grad_x = join_steps(grad_parts, x);
  for (const Parameter& parameter : test.store.parameters())
    apart.grad_parameters.push_back(parameter.variable->gradient().tensor());
  return difference(packed, apart, tolerance);
}

std::string check_block_gradient(const MixerConfig& config, const Tensor& x, const Tensor& resets,
                                 const std::vector<Tensor>& state) {
  const TestMixer test(config, x.dim(2));
  // x, the real parts of the state, the parameters.
  std::vector<Tensor> inputs{x};
  for (const Tensor& part : state) {
    if (is_real(part)) inputs.push_back(part);
  }
  const size_t n_before = inputs.size();
  for (const Tensor& value : parameter_values(test.store)) inputs.push_back(value);
  const auto function = [&](const std::vector<Variable>& in) {
    const Variable zero =
        bind_parameters(test.store, {in.begin() + static_cast<ptrdiff_t>(n_before), in.end()});
    MixerState state_in;
    size_t next = 1;
    for (const Tensor& part : state)
      state_in.push_back(is_real(part) ? in[next++] : Variable(part.to(in[0].device())));
    const MixerOutput output = test.mixer->forward(in[0], state_in, resets.to(in[0].device()));
    std::vector<Variable> outputs{output.y, zero};
    for (const Variable& part : output.state) {
      if (is_real(part.value())) outputs.push_back(part);
    }
    return outputs;
  };
  return check_gradient(function, inputs);
}

}  // namespace headwater

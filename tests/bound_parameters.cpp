#include "tests/bound_parameters.h"

#include "autograd/tape.h"

namespace headwater {

std::vector<Tensor> parameter_values(const ParameterStore& store) {
  std::vector<Tensor> values;
  for (const Parameter& parameter : store.parameters()) values.push_back(parameter.variable->value().clone());
  return values;
}

Variable bind_parameters(const ParameterStore& store, const std::vector<Variable>& values) {
  require(values.size() == store.parameters().size(), "bind_parameters: {} values for {} parameters",
          values.size(), store.parameters().size());
  // Models take views of parameters, which only variables with a gradient of their own memory have.
  std::vector<Variable> bound;
  bool is_wanted = false;
  for (size_t i = 0; i < values.size(); ++i) {
    bound.push_back(Variable::parameter(values[i].value(), zeros_like(values[i].value())));
    *store.parameters()[i].variable = bound[i];
    is_wanted = is_wanted || values[i].requires_gradient();
  }
  Variable zero(Tensor::zeros({1}, values.front().dtype(), values.front().device()));
  Tape* tape = is_wanted ? Tape::recording({bound.front()}) : nullptr;
  if (tape == nullptr) return zero;
  // The first node of the tape: its turn comes when all other gradients have arrived.
  tape->record({&zero}, [bound, values](const std::vector<Tensor>&) {
    for (size_t i = 0; i < values.size(); ++i) values[i].add_gradient(bound[i].gradient().tensor());
  });
  return zero;
}

}  // namespace headwater

#include "autograd/tape.h"

#include "core/error.h"

namespace headwater {
namespace {
thread_local Tape* innermost = nullptr;
}

Tape::Tape() : outer_(innermost) {
  innermost = this;
}
Tape::~Tape() {
  innermost = outer_;
}

NoGradient::NoGradient() : outer_(innermost) {
  innermost = nullptr;
}
NoGradient::~NoGradient() {
  innermost = outer_;
}

Tape* Tape::recording(std::initializer_list<Variable> inputs) {
  if (innermost == nullptr) return nullptr;
  for (const Variable& input : inputs) {
    if (input.requires_gradient()) return innermost;
  }
  return nullptr;
}

void Tape::record(const std::vector<Variable*>& outputs, Backward backward) {
  Node node;
  for (Variable* output : outputs) {
    output->gradient_ = std::make_shared<Gradient>();
    node.outputs.push_back(output->gradient_);
  }
  node.backward = std::move(backward);
  nodes_.push_back(std::move(node));
}

void Tape::backward(const Variable& loss, double scale) {
  require(loss.value().numel() == 1, "backward starts from a scalar loss; this one has shape {}",
          loss.shape());
  backward({loss}, {Tensor::full(loss.shape(), scale, loss.dtype(), loss.device())});
}

void Tape::backward(const std::vector<Variable>& outputs, const std::vector<Tensor>& grad_outputs) {
  require(outputs.size() == grad_outputs.size(), "backward was given {} outputs and {} gradients",
          outputs.size(), grad_outputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!grad_outputs[i].defined()) continue;
    require(outputs[i].shape() == grad_outputs[i].shape(),
            "backward: output {} has shape {}, its gradient {}", i, outputs[i].shape(),
            grad_outputs[i].shape());
    outputs[i].add_gradient(grad_outputs[i]);
  }
  const NoGradient no_recording;
  while (!nodes_.empty()) {
    const Node node = std::move(nodes_.back());
    nodes_.pop_back();
    std::vector<Tensor> grads;
    bool any = false;
    for (const auto& output : node.outputs) {
      grads.push_back(output->tensor());
      any = any || output->tensor().defined();
      output->release();
    }
    if (any) node.backward(grads);
  }
}

std::vector<Variable> recompute(
    const std::function<std::vector<Variable>(const std::vector<Variable>&)>& function,
    const std::vector<Variable>& inputs) {
  Tape* tape = innermost;
  std::vector<Variable> outputs;
  {
    const NoGradient no_recording;
    for (const Variable& output : function(inputs)) outputs.push_back(output.detach());
  }
  if (tape == nullptr) return outputs;
  std::vector<Variable*> pointers;
  for (Variable& output : outputs) pointers.push_back(&output);
  auto backward = [function, inputs](const std::vector<Tensor>& grad_outputs) {
    std::vector<Variable> leaves;
    for (const Variable& input : inputs) {
      leaves.push_back(input.requires_gradient() ? Variable::leaf(input.value()) : input);
    }
    Tape inner;
    inner.backward(function(leaves), grad_outputs);
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].requires_gradient()) inputs[i].add_gradient(leaves[i].gradient().tensor());
    }
  };
  tape->record(pointers, std::move(backward));
  return outputs;
}

// What is recorded last runs first: passing the outputs' gradients on unchanged is the moment to fill the values.
void recompute_values(const std::vector<Variable*>& outputs, const std::vector<Variable>& values,
                      std::function<std::vector<Variable>()> function) {
  Tape* tape = innermost;
  if (tape == nullptr || !outputs.front()->requires_gradient()) return;
  std::vector<Variable> made;
  for (const Variable* output : outputs) made.push_back(output->without_value());
  std::vector<Tensor> given_up;
  for (const Variable& value : values) {
    given_up.push_back(value.value());
    given_up.back().give_up_memory();
  }
  const auto backward = [made, given_up,
                         function = std::move(function)](const std::vector<Tensor>& grad_outputs) {
    const std::vector<Variable> again = function();
    for (size_t i = 0; i < given_up.size(); ++i) given_up[i].take_memory(again[i].value());
    for (size_t i = 0; i < made.size(); ++i) made[i].add_gradient(grad_outputs[i]);
  };
  tape->record(outputs, backward);
}

}  // namespace headwater

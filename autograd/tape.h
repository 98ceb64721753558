// The tape: what was computed, in order, so that gradients can be computed in the opposite order.
#pragma once

#include <functional>
#include <initializer_list>
#include <vector>

#include "autograd/variable.h"

namespace headwater {

/// Operators record on the innermost living tape of this thread; without one, nothing is recorded and nothing
/// is kept: that is inference. Typical use:
///
///   Tape tape;
///   const Variable loss = model.loss(batch);
///   tape.backward(loss);            // parameters' gradients have grown by d loss / d parameter
class Tape {
 public:
  /// Gets the gradients of the outputs in the order of `record`; one that nothing used is an undefined tensor
  /// and counts as zero. Adds to its inputs' gradients.
  using Backward = std::function<void(const std::vector<Tensor>& grad_outputs)>;

  Tape();
  ~Tape();
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  /// The tape to record on if any of `inputs` requires a gradient, else nullptr.
  static Tape* recording(std::initializer_list<Variable> inputs);

  /// Notes that `outputs` were computed; makes each of them require a gradient. `backward` should capture
  /// only the tensors it needs: they live until it has run.
  void record(const std::vector<Variable*>& outputs, Backward backward);

  /// Runs everything recorded backwards from a scalar loss, with d loss = `scale`. Each step's saved tensors
  /// and intermediate gradients are released as soon as it is done. A tape runs backward once.
  void backward(const Variable& loss, double scale = 1.0);
  /// The same from any outputs, given the gradient of each (its cotangent; an undefined one is skipped).
  void backward(const std::vector<Variable>& outputs, const std::vector<Tensor>& grad_outputs);

 private:
  struct Node {
    std::vector<std::shared_ptr<Gradient>> outputs;
    Backward backward;
  };

  std::vector<Node> nodes_;
  Tape* outer_;
};

/// While it lives, nothing is recorded on this thread.
class NoGradient {
 public:
  NoGradient();
  ~NoGradient();
  NoGradient(const NoGradient&) = delete;
  NoGradient& operator=(const NoGradient&) = delete;

 private:
  Tape* outer_;
};

/// A block that keeps nothing for the backward pass but its inputs: `function` runs without recording, and
/// again, recorded, when its gradient is asked for. Trades one more forward for the block's memory.
/// `function` must be deterministic, and parameters it uses gather their gradients as usual.
std::vector<Variable> recompute(
    const std::function<std::vector<Variable>(const std::vector<Variable>&)>& function,
    const std::vector<Variable>& inputs);

/// Does not keep `values` for the backward pass of the operator that made `outputs` from them: their memory is given
/// back now, and filled again by `function`, which runs unrecorded before that operator's gradient does and must
/// compute the same elements. For values that nobody else reads any more and that are cheap to compute from what is
/// kept anyway. Must stand right behind the operator, and get all of its outputs; without a tape it does nothing.
void recompute_values(const std::vector<Variable*>& outputs, const std::vector<Variable>& values,
                      std::function<std::vector<Variable>()> function);

}  // namespace headwater

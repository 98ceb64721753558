// The parameters of a model in flat buffers: values and gradients each one piece of memory, a parameter a named view.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "autograd/variable.h"
#include "core/random.h"

namespace headwater {

/// Fills a parameter's value from random numbers of its own.
using Initializer = std::function<void(const Tensor& value, RandomStream& random)>;

struct ParameterAttributes {
  bool weight_decay = true;
  double learning_rate_scale = 1.0;
  /// A factor of matrix products or an embedding: in a bf16 model these are computed with in bf16, all else in f32.
  bool is_matrix = false;
};

struct Parameter {
  std::string name;
  Shape shape;
  Initializer initializer;
  ParameterAttributes attributes;
  Variable* variable = nullptr;  ///< the model's member, set by allocate()
  int64_t offset = 0;            ///< of the first element in the flat buffers
  Tensor value;                  ///< its part of values(): what is saved and updated
};

/// All-reduce, sharding, clipping, AdamW and checkpoints work on ranges of these buffers. Parameters with weight decay
/// come first, then those without; within each, in the order of add(). Every parameter starts at a multiple of 16
/// elements; the gaps stay zero.
///
/// Of a bf16 model, values, gradients and moments are f32; the matrices' Variables are views of a bf16 copy of the
/// values, which whoever changes the values renews.
class ParameterStore {
 public:
  /// Declares a parameter; `variable` must stay where it is. Throws an input error for a name that is there already.
  void add(std::string name, Variable* variable, const Shape& shape, Initializer initializer,
           ParameterAttributes attributes = {});
  /// Makes the buffers (zeroed) and sets every variable. Call once, when all parameters are declared.
  void allocate(DType dtype, Device device = {});
  /// Makes the bf16 copy agree with the values; nothing to do in a model of another dtype.
  void renew_bf16_copy();
  /// Draws initial values: each parameter from the stream of its own name, whatever the order of declaration.
  void initialize(uint64_t seed);

  const std::vector<Parameter>& parameters() const { return parameters_; }
  const Parameter* find(const std::string& name) const;
  const Tensor& values() const { return values_; }
  const Tensor& gradients() const { return gradients_; }
  /// Like values(), in bf16; undefined in a model of another dtype.
  const Tensor& bf16_copy() const { return bf16_copy_; }
  /// Elements of all parameters together, without the gaps.
  int64_t n_elements() const;

 private:
  std::vector<Parameter> parameters_;
  Tensor values_, gradients_, bf16_copy_;
};

/// Declares parameters under a common prefix: scope.child("mixer").add("D", ...) is "PREFIX.mixer.D".
class ParameterScope {
 public:
  ParameterScope(ParameterStore& store, std::string prefix) : store_(store), prefix_(std::move(prefix)) {}
  ParameterScope child(const std::string& name) const { return {store_, prefix_ + "." + name}; }
  void add(const std::string& name, Variable* variable, const Shape& shape, Initializer initializer,
           ParameterAttributes attributes = {}) const {
    store_.add(prefix_.empty() ? name : prefix_ + "." + name, variable, shape, std::move(initializer),
               attributes);
  }

 private:
  ParameterStore& store_;
  std::string prefix_;
};

inline constexpr ParameterAttributes no_weight_decay{.weight_decay = false};
inline constexpr ParameterAttributes matrix{.is_matrix = true};

/// Uniform on [-bound, bound].
Initializer uniform_initializer(double bound);
Initializer normal_initializer(double deviation);
Initializer constant_initializer(double value);
/// A matrix whose rows, or columns if there are fewer of them, are orthogonal and of length `gain`, uniform among such.
Initializer orthogonal_initializer(double gain);
/// Each element drawn by `draw`.
Initializer drawn_initializer(std::function<double(RandomStream&)> draw);

}  // namespace headwater

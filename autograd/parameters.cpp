#include "autograd/parameters.h"

#include <algorithm>
#include <cmath>

#include "core/matrix_block.h"
#include "core/memory.h"
#include "core/parallel.h"

namespace headwater {
namespace {

constexpr int64_t alignment = 16;  // elements: a cache line of f32

/// Makes n vectors of `width` numbers orthogonal, and each of length 1 (Gram-Schmidt, as soon as a vector is known taken
/// out of all later ones, threads sharing these). n <= width.
void make_orthonormal(std::vector<double>& vectors, int64_t n, int64_t width) {
  const auto vector = [&](int64_t i) { return vectors.data() + i * width; };
  for (int64_t i = 0; i < n; ++i) {
    const double* done = vector(i);
    const double square = dot_product(done, done, width);
    for (int64_t j = 0; j < width; ++j) vector(i)[j] /= std::sqrt(square);
    parallel_for(n - i - 1, 1 + 16384 / width, [&](int64_t begin, int64_t end) {
      for (int64_t later = i + 1 + begin; later < i + 1 + end; ++later) {
        double* rest = vector(later);
        const double part = dot_product(done, rest, width);
        for (int64_t j = 0; j < width; ++j) rest[j] -= part * done[j];
      }
    });
  }
}

}  // namespace

void ParameterStore::add(std::string name, Variable* variable, const Shape& shape, Initializer initializer,
                         ParameterAttributes attributes) {
  require(find(name) == nullptr, "parameter '{}' is declared twice", name);
  parameters_.push_back({std::move(name), shape, std::move(initializer), attributes, variable, 0, {}});
}

void ParameterStore::allocate(DType dtype, Device device) {
  std::stable_partition(parameters_.begin(), parameters_.end(),
                        [](const Parameter& parameter) { return parameter.attributes.weight_decay; });
  int64_t size = 0;
  for (Parameter& parameter : parameters_) {
    parameter.offset = size;
    size += (parameter.shape.numel() + alignment - 1) / alignment * alignment;
  }
  {
    const MemoryLabel label("parameters");
    values_ = Tensor::zeros({size}, compute_dtype(dtype), device);
    if (dtype == DType::bf16) bf16_copy_ = Tensor::zeros({size}, dtype, device);
  }
  const MemoryLabel label("gradients");
  gradients_ = Tensor::zeros({size}, compute_dtype(dtype), device);
  for (Parameter& parameter : parameters_) {
    parameter.value = values_.view(parameter.offset, parameter.shape);
    const bool is_bf16 = bf16_copy_.defined() && parameter.attributes.is_matrix;
    *parameter.variable =
        Variable::parameter(is_bf16 ? bf16_copy_.view(parameter.offset, parameter.shape) : parameter.value,
                            gradients_.view(parameter.offset, parameter.shape));
  }
}

void ParameterStore::renew_bf16_copy() {
  if (bf16_copy_.defined()) bf16_copy_.copy_from(values_.to(DType::bf16));
}

void ParameterStore::initialize(uint64_t seed) {
  for (const Parameter& parameter : parameters_) {
    RandomStream random(seed, parameter.name);
    const Tensor drawn = Tensor::empty(parameter.shape, values_.dtype());
    parameter.initializer(drawn, random);
    parameter.value.copy_from(drawn);
  }
  renew_bf16_copy();
}

const Parameter* ParameterStore::find(const std::string& name) const {
  const auto found = std::find_if(parameters_.begin(), parameters_.end(),
                                  [&](const Parameter& parameter) { return parameter.name == name; });
  return found == parameters_.end() ? nullptr : &*found;
}

int64_t ParameterStore::n_elements() const {
  int64_t sum = 0;
  for (const Parameter& parameter : parameters_) sum += parameter.shape.numel();
  return sum;
}

Initializer drawn_initializer(std::function<double(RandomStream&)> draw) {
  return [draw = std::move(draw)](const Tensor& value, RandomStream& random) {
    dispatch_real(value.dtype(), "initialize", [&](auto element) {
      using T = decltype(element);
      for (int64_t i = 0; i < value.numel(); ++i) value.data<T>()[i] = static_cast<T>(draw(random));
    });
  };
}

Initializer uniform_initializer(double bound) {
  return drawn_initializer([bound](RandomStream& random) { return random.uniform(-bound, bound); });
}

Initializer normal_initializer(double deviation) {
  return drawn_initializer([deviation](RandomStream& random) { return deviation * random.normal(); });
}

Initializer constant_initializer(double constant) {
  return [constant](const Tensor& value, RandomStream&) { value.fill(constant); };
}

Initializer orthogonal_initializer(double gain) {
  return [gain](const Tensor& value, RandomStream& random) {
    const int64_t rows = value.dim(0), columns = value.dim(1);
    const int64_t n = std::min(rows, columns), width = std::max(rows, columns);
    std::vector<double> vectors(n * width);
    for (double& number : vectors) number = random.normal();
    make_orthonormal(vectors, n, width);
    dispatch_real(value.dtype(), "initialize", [&](auto element) {
      using T = decltype(element);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          const int64_t at = rows <= columns ? i * columns + j : j * columns + i;
          value.data<T>()[at] = static_cast<T>(gain * vectors[i * width + j]);
        }
      }
    });
  };
}

}  // namespace headwater

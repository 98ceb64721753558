#include "ops/embedding/embedding.h"

#include <string>
#include <vector>

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/embedding/embedding_kernels.h"

namespace headwater {
namespace {

/// The position of element `index` of a tensor of this shape, "(3, 17)".
std::string position_text(const Shape& shape, int64_t index) {
  std::vector<int64_t> position(shape.n_axes());
  for (int axis = shape.n_axes() - 1; axis >= 0; --axis) {
    position[axis] = index % shape[axis];
    index /= shape[axis];
  }
  return Shape(position).str();
}

void check_tokens(const Tensor& tokens, int64_t vocab_size) {
  const int32_t* token = tokens.data<int32_t>();
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    if (token[i] >= 0 && token[i] < vocab_size) continue;
    throw_input_error("embedding: the token at position {} is {}; the vocabulary has {} tokens, 0 to {}",
                      position_text(tokens.shape(), i), token[i], vocab_size, vocab_size - 1);
  }
}

void check_arguments(const Tensor& tokens, const Variable& weight, DType output_dtype) {
  require(weight.shape().n_axes() == 2, "embedding: weight has shape {}; it must be (vocab_size, d_model)",
          weight.shape());
  require(tokens.dtype() == DType::i32, "embedding: tokens are {}; they must be i32",
          name_of(tokens.dtype()));
  require(tokens.device() == weight.device(), "embedding: tokens are on {}; they must be on {} like weight",
          to_string(tokens.device()), to_string(weight.device()));
  require(weight.device().is_cuda() || output_dtype == weight.dtype(),
          "embedding: output_dtype is {}, weight {}; on the CPU they must be the same", name_of(output_dtype),
          name_of(weight.dtype()));
  if (tokens.device().is_cpu()) check_tokens(tokens, weight.dim(0));
}

Shape output_shape(const Tensor& tokens, const Variable& weight) {
  std::vector<int64_t> sizes(tokens.shape().begin(), tokens.shape().end());
  sizes.push_back(weight.dim(1));
  return Shape(sizes);
}

}  // namespace

// grad_weight[v] = sum over the positions i with tokens[i] = v of grad_y[i]
Variable embedding(const Tensor& tokens, const Variable& weight, const EmbeddingOptions& options) {
  const DType output_dtype = options.output_dtype.value_or(weight.dtype());
  check_arguments(tokens, weight, output_dtype);
  Variable y(Tensor::empty(output_shape(tokens, weight), output_dtype, weight.device()));
  embedding_forward(weight.device(), {tokens, weight.value(), y.value()});

  if (Tape* tape = Tape::recording({weight})) {
    tape->record({&y}, [tokens, weight](const std::vector<Tensor>& grad_outputs) {
      const Gradient::Target grad_weight = weight_gradient_target(weight);
      embedding_backward(weight.device(),
                         {tokens, grad_outputs[0], grad_weight.tensor, grad_weight.accumulate});
    });
  }
  return y;
}

}  // namespace headwater

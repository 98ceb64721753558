#include "autograd/variable.h"

namespace headwater {

void Gradient::add(const Tensor& contribution) {
  if (!contribution.defined()) return;
  if (!tensor_.defined()) {
    tensor_ = contribution;
    return;
  }
  // The sum may still be somebody else's tensor: the first contribution is kept as a handle, not copied.
  if (!is_pinned_ && !tensor_.is_sole_owner()) tensor_ = tensor_.clone();
  add_in_place(tensor_, contribution);
}

Gradient::Target Gradient::target(const Tensor& value, DType dtype) {
  if (!tensor_.defined()) {
    tensor_ = Tensor::empty(value.shape(), dtype, value.device());
    return {tensor_, false};
  }
  if (!is_pinned_ && !tensor_.is_sole_owner()) tensor_ = tensor_.clone();
  return {tensor_, true};
}

void Gradient::release() {
  if (!is_pinned_) tensor_ = Tensor();
}

Variable Variable::leaf(Tensor value) {
  Variable result(std::move(value));
  result.gradient_ = std::make_shared<Gradient>();
  return result;
}

Variable Variable::parameter(Tensor value, Tensor gradient) {
  require(value.shape() == gradient.shape() && compute_dtype(value.dtype()) == gradient.dtype(),
          "a {} parameter of shape {} was given a {} gradient of shape {}", name_of(value.dtype()),
          value.shape(), name_of(gradient.dtype()), gradient.shape());
  Variable result(std::move(value));
  result.gradient_ = std::make_shared<Gradient>(std::move(gradient));
  return result;
}

Variable Variable::without_value() const {
  Variable result;
  result.gradient_ = gradient_;
  return result;
}

Variable Variable::parameter_rows(int64_t begin, int64_t end) const {
  if (!gradient_) return Variable(value_.narrow(begin, end));
  return parameter(value_.narrow(begin, end), gradient_->tensor().narrow(begin, end));
}

Variable Variable::parameter_reshape(const Shape& shape) const {
  if (!gradient_) return Variable(value_.reshape(shape));
  return parameter(value_.reshape(shape), gradient_->tensor().reshape(shape));
}

}  // namespace headwater

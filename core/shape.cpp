#include "core/shape.h"

#include <algorithm>

#include "core/error.h"

namespace headwater {
namespace {

void copy_sizes(const int64_t* begin, int64_t n, std::array<int64_t, Shape::max_axes>& sizes) {
  require(n <= Shape::max_axes, "a tensor has at most {} axes, got {}", Shape::max_axes, n);
  for (int64_t i = 0; i < n; ++i) {
    require(begin[i] >= 0, "axis {} of a tensor has size {}; sizes must not be negative", i, begin[i]);
    sizes[i] = begin[i];
  }
}

}  // namespace

Shape::Shape(std::initializer_list<int64_t> sizes) : n_axes_(static_cast<int>(sizes.size())) {
  copy_sizes(sizes.begin(), n_axes_, sizes_);
}

Shape::Shape(const std::vector<int64_t>& sizes) : n_axes_(static_cast<int>(sizes.size())) {
  copy_sizes(sizes.data(), n_axes_, sizes_);
}

int64_t Shape::dim(int axis) const {
  const int from_start = axis < 0 ? axis + n_axes_ : axis;
  require(from_start >= 0 && from_start < n_axes_, "axis {} of shape {} does not exist", axis, *this);
  return sizes_[from_start];
}

int64_t Shape::numel() const {
  int64_t product = 1;
  for (int64_t size : *this) {
    require(!__builtin_mul_overflow(product, size, &product), "shape {} has more than 2^63 elements", *this);
  }
  return product;
}

Shape Shape::with_leading(int64_t size) const {
  Shape result = *this;
  require(n_axes_ > 0, "a scalar has no leading axis");
  result.sizes_[0] = size;
  return result;
}

std::string Shape::str() const {
  std::string text = "(";
  for (int axis = 0; axis < n_axes_; ++axis) {
    text += (axis ? ", " : "") + std::to_string(sizes_[axis]);
  }
  return text + ")";
}

}  // namespace headwater

#include "core/tensor.h"

#include <cstring>
#include <stdexcept>

#include "core/cuda/runtime.h"
#include "core/parallel.h"
#include "core/tensor_kernels.h"

namespace headwater {
namespace {

constexpr int64_t elementwise_grain = 16384;

template <class To, class From>
To convert(From value) {
  if constexpr (std::is_same_v<From, BFloat16>) {
    return convert<To>(to_float(value));
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(static_cast<float>(value));
  } else {
    return static_cast<To>(value);
  }
}

}  // namespace

Tensor Tensor::empty(const Shape& shape, DType dtype, Device device) {
  Tensor result;
  result.shape_ = shape;
  result.numel_ = shape.numel();
  result.dtype_ = dtype;
  result.storage_ = allocate(result.size_bytes(), device);
  return result;
}

Tensor Tensor::zeros(const Shape& shape, DType dtype, Device device) {
  Tensor result = empty(shape, dtype, device);
  result.zero();
  return result;
}

Tensor Tensor::full(const Shape& shape, double value, DType dtype, Device device) {
  Tensor result = empty(shape, dtype, device);
  result.fill(value);
  return result;
}

template <class T>
Tensor Tensor::from_vector(const Shape& shape, const std::vector<T>& values) {
  require(shape.numel() == static_cast<int64_t>(values.size()), "shape {} has {} elements, {} were given",
          shape, shape.numel(), values.size());
  Tensor result = empty(shape, DTypeOf<T>::value);
  if (!values.empty()) std::memcpy(result.raw_data(), values.data(), values.size() * sizeof(T));
  return result;
}
template Tensor Tensor::from_vector(const Shape&, const std::vector<float>&);
template Tensor Tensor::from_vector(const Shape&, const std::vector<double>&);
template Tensor Tensor::from_vector(const Shape&, const std::vector<int32_t>&);
template Tensor Tensor::from_vector(const Shape&, const std::vector<int64_t>&);
template Tensor Tensor::from_vector(const Shape&, const std::vector<uint8_t>&);

Tensor Tensor::over(void* data, const Shape& shape, DType dtype, std::shared_ptr<const void> owner) {
  Tensor result;
  result.shape_ = shape;
  result.numel_ = shape.numel();
  result.dtype_ = dtype;
  result.storage_ = std::make_shared<Storage>(data, result.size_bytes(), std::move(owner));
  return result;
}

void Tensor::check_type(DType requested) const {
  if (requested == dtype_) return;
  throw_input_error("a tensor of dtype {} and shape {} was read as {}", name_of(dtype_), shape_,
                    name_of(requested));
}

void Tensor::throw_given_up() const {
  throw std::logic_error(fmt::format("a tensor of shape {} was read after it gave up its memory", shape_));
}

void Tensor::take_memory(const Tensor& source) const {
  if (!source.is_sole_owner() || source.storage_->size_bytes() != storage_->size_bytes()) {
    throw std::logic_error(
        fmt::format("a tensor of shape {} cannot take the memory of one of shape {}", shape_, source.shape_));
  }
  storage_->swap(*source.storage_);
}

Tensor Tensor::reshape(const Shape& shape) const {
  require(shape.numel() == numel_, "cannot reshape {} ({} elements) to {} ({} elements)", shape_, numel_,
          shape, shape.numel());
  Tensor result = *this;
  result.shape_ = shape;
  return result;
}

Tensor Tensor::narrow(int64_t begin, int64_t end) const {
  const int64_t rows = dim(0);
  require(0 <= begin && begin <= end && end <= rows, "rows {} to {} of shape {} do not exist", begin, end,
          shape_);
  const int64_t row_elements = rows == 0 ? 0 : numel_ / rows;
  return view(begin * row_elements, shape_.with_leading(end - begin));
}

Tensor Tensor::view(int64_t offset, const Shape& shape) const {
  const int64_t count = shape.numel();
  require(offset >= 0 && offset + count <= numel_, "elements {} to {} lie outside a tensor of shape {}",
          offset, offset + count, shape_);
  Tensor result = *this;
  result.offset_bytes_ += offset * static_cast<int64_t>(size_of(dtype_));
  result.shape_ = shape;
  result.numel_ = count;
  return result;
}

Tensor Tensor::clone() const {
  if (!storage_) return {};
  Tensor result = empty(shape_, dtype_, device());
  result.copy_from(*this);
  return result;
}

Tensor Tensor::to(DType dtype) const {
  if (!storage_ || dtype == dtype_) return *this;
  const Tensor result = empty(shape_, dtype, device());
  convert_kernel(device(), {*this, result});
  return result;
}

Tensor Tensor::to(Device device) const {
  if (!storage_ || device == this->device()) return *this;
  const Tensor result = empty(shape_, dtype_, device);
  result.copy_from(*this);
  return result;
}

void Tensor::fill(double value) const {
  fill_kernel(device(), {*this, value});
}

void Tensor::zero() const {
  if (numel_ == 0) return;
  char* bytes = static_cast<char*>(raw_data());
  if (device().is_cuda()) {
    cuda::fill_bytes(bytes, 0, size_bytes());
    return;
  }
  parallel_for(size_bytes(), elementwise_grain * 4,
               [=](int64_t begin, int64_t end) { std::memset(bytes + begin, 0, end - begin); });
}

void Tensor::copy_from(const Tensor& source) const {
  require(source.shape() == shape_ && source.dtype() == dtype_,
          "cannot copy a {} tensor of shape {} into {} {}", name_of(source.dtype()), source.shape(),
          name_of(dtype_), shape_);
  if (numel_ == 0) return;
  char* to = static_cast<char*>(raw_data());
  const char* from = static_cast<const char*>(source.raw_data());
  if (device().is_cuda()) {
    (source.device().is_cuda() ? cuda::copy_on_device : cuda::copy_to_device)(to, from, size_bytes());
    return;
  }
  if (source.device().is_cuda()) {
    cuda::copy_to_host(to, from, size_bytes());
    return;
  }
  parallel_for(size_bytes(), elementwise_grain * 4,
               [=](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
}

template <class T>
std::vector<T> Tensor::to_vector() const {
  const Tensor converted = to(Device{}).to(DTypeOf<T>::value);
  const T* first = converted.data<T>();
  return std::vector<T>(first, first + numel_);
}
template std::vector<float> Tensor::to_vector() const;
template std::vector<double> Tensor::to_vector() const;
template std::vector<int32_t> Tensor::to_vector() const;
template std::vector<int64_t> Tensor::to_vector() const;
template std::vector<uint8_t> Tensor::to_vector() const;

void add_in_place(const Tensor& target, const Tensor& source) {
  require(target.shape() == source.shape() && target.dtype() == source.dtype(),
          "cannot add a {} tensor of shape {} to {} {}", name_of(source.dtype()), source.shape(),
          name_of(target.dtype()), target.shape());
  add_in_place_kernel(target.device(), {target, source});
}

void scale_in_place(const Tensor& target, double factor) {
  scale_in_place_kernel(target.device(), {target, factor});
}

void convert_cpu(const ConvertArgs& args) {
  dispatch_any(args.from.dtype(), [&](auto from) {
    dispatch_any(args.to.dtype(), [&](auto to) {
      const auto* source = args.from.data<decltype(from)>();
      auto* target = args.to.data<decltype(to)>();
      parallel_for(args.from.numel(), elementwise_grain, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) target[i] = convert<decltype(to)>(source[i]);
      });
    });
  });
}

void fill_cpu(const FillArgs& args) {
  dispatch_any(args.target.dtype(), [&](auto element) {
    auto* target = args.target.data<decltype(element)>();
    const auto converted = convert<decltype(element)>(args.value);
    parallel_for(args.target.numel(), elementwise_grain,
                 [=](int64_t begin, int64_t end) { std::fill(target + begin, target + end, converted); });
  });
}

void add_in_place_cpu(const AddInPlaceArgs& args) {
  dispatch_real(args.target.dtype(), "add_in_place", [&](auto element) {
    using T = decltype(element);
    T* to = args.target.data<T>();
    const T* from = args.source.data<T>();
    parallel_for(args.target.numel(), elementwise_grain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
  });
}

void scale_in_place_cpu(const ScaleInPlaceArgs& args) {
  dispatch_real(args.target.dtype(), "scale_in_place", [&](auto element) {
    using T = decltype(element);
    T* to = args.target.data<T>();
    const T f = static_cast<T>(args.factor);
    parallel_for(args.target.numel(), elementwise_grain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] *= f;
    });
  });
}

}  // namespace headwater

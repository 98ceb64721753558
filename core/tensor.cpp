#include "core/tensor.h"

#include <cstring>
#include <stdexcept>

#include "core/parallel.h"

namespace headwater {
namespace {

constexpr int64_t elementwise_grain = 16384;

float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // stay NaN
  return {
      static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest, ties to even
}

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

template <class Body>
void dispatch_any(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      body(float{});
      return;
    case DType::f64:
      body(double{});
      return;
    case DType::bf16:
      body(BFloat16{});
      return;
    case DType::i32:
      body(int32_t{});
      return;
    case DType::i64:
      body(int64_t{});
      return;
    case DType::u8:
      body(uint8_t{});
      return;
  }
}

void require_cpu(const Tensor& tensor, const char* who) {
  require(tensor.device().is_cpu(), "{}: the tensor is on {}; copy it to the cpu first", who,
          to_string(tensor.device()));
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
  require_cpu(*this, "Tensor::to");
  Tensor result = empty(shape_, dtype);
  dispatch_any(dtype_, [&](auto from) {
    dispatch_any(dtype, [&](auto to) {
      const auto* source = data<decltype(from)>();
      auto* target = result.data<decltype(to)>();
      parallel_for(numel_, elementwise_grain, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) target[i] = convert<decltype(to)>(source[i]);
      });
    });
  });
  return result;
}

void Tensor::fill(double value) const {
  require_cpu(*this, "Tensor::fill");
  dispatch_any(dtype_, [&](auto element) {
    auto* target = data<decltype(element)>();
    const auto converted = convert<decltype(element)>(value);
    parallel_for(numel_, elementwise_grain,
                 [=](int64_t begin, int64_t end) { std::fill(target + begin, target + end, converted); });
  });
}

void Tensor::zero() const {
  require_cpu(*this, "Tensor::zero");
  char* bytes = static_cast<char*>(raw_data());
  parallel_for(size_bytes(), elementwise_grain * 4,
               [=](int64_t begin, int64_t end) { std::memset(bytes + begin, 0, end - begin); });
}

void Tensor::copy_from(const Tensor& source) const {
  require(source.shape() == shape_ && source.dtype() == dtype_,
          "cannot copy a {} tensor of shape {} into {} {}", name_of(source.dtype()), source.shape(),
          name_of(dtype_), shape_);
  require_cpu(*this, "Tensor::copy_from");
  require_cpu(source, "Tensor::copy_from");
  char* to = static_cast<char*>(raw_data());
  const char* from = static_cast<const char*>(source.raw_data());
  parallel_for(size_bytes(), elementwise_grain * 4,
               [=](int64_t begin, int64_t end) { std::memcpy(to + begin, from + begin, end - begin); });
}

template <class T>
std::vector<T> Tensor::to_vector() const {
  const Tensor converted = to(DTypeOf<T>::value);
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
  dispatch_real(target.dtype(), "add_in_place", [&](auto element) {
    using T = decltype(element);
    T* to = target.data<T>();
    const T* from = source.data<T>();
    parallel_for(target.numel(), elementwise_grain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
  });
}

void scale_in_place(const Tensor& target, double factor) {
  dispatch_real(target.dtype(), "scale_in_place", [&](auto element) {
    using T = decltype(element);
    T* to = target.data<T>();
    const T f = static_cast<T>(factor);
    parallel_for(target.numel(), elementwise_grain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] *= f;
    });
  });
}

}  // namespace headwater

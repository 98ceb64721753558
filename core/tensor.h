// A value-semantic handle to typed, contiguous memory on a device.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/memory.h"
#include "core/shape.h"

namespace headwater {

/// Copying a Tensor copies the handle, not the memory: both see the same elements. Memory is always
/// contiguous, row-major; views (reshape, narrow) share it. Complex numbers are a trailing axis of 2.
class Tensor {
 public:
  /// An undefined tensor: no memory, no shape. Stands for an absent optional argument.
  Tensor() = default;

  /// Uninitialised, zeroed, or filled memory. Throws a machine error when there is no memory.
  static Tensor empty(const Shape& shape, DType dtype, Device device = {});
  static Tensor zeros(const Shape& shape, DType dtype, Device device = {});
  static Tensor full(const Shape& shape, double value, DType dtype, Device device = {});
  /// A CPU tensor with a copy of `values` (T decides the dtype). Throws an input error if sizes differ.
  template <class T>
  static Tensor from_vector(const Shape& shape, const std::vector<T>& values);
  /// A read-only-by-convention view on memory that `owner` keeps alive (a mapped file).
  static Tensor over(void* data, const Shape& shape, DType dtype, std::shared_ptr<const void> owner);

  bool defined() const { return storage_ != nullptr; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int axis) const { return shape_.dim(axis); }
  int64_t numel() const { return numel_; }
  int64_t size_bytes() const { return numel_ * static_cast<int64_t>(size_of(dtype_)); }
  DType dtype() const { return dtype_; }
  Device device() const { return storage_ ? storage_->device() : Device{}; }

  /// The first element. T must be the tensor's C++ type (checked); nullptr for an undefined tensor.
  template <class T>
  T* data() const {
    if (!storage_) return nullptr;
    check_type(DTypeOf<T>::value);
    return reinterpret_cast<T*>(raw_data());
  }
  void* raw_data() const {
    if (!storage_) return nullptr;
    if (storage_->data() == nullptr && numel_ > 0) throw_given_up();
    return static_cast<char*>(storage_->data()) + offset_bytes_;
  }

  /// The same memory under another shape of equal size. Throws an input error if sizes differ.
  Tensor reshape(const Shape& shape) const;
  /// Rows [begin, end) of the leading axis, sharing memory.
  Tensor narrow(int64_t begin, int64_t end) const;
  /// `count` elements from `offset`, seen as `shape`, sharing memory: a parameter inside a flat buffer.
  Tensor view(int64_t offset, const Shape& shape) const;
  /// A fresh copy in memory of its own.
  Tensor clone() const;
  /// Converted to another dtype (a handle to the same memory if it already has it).
  Tensor to(DType dtype) const;
  /// Copied to another device (a handle to the same memory if it is there).
  Tensor to(Device device) const;

  void fill(double value) const;
  void zero() const;
  /// Copies the elements of `source` (same shape and dtype, any device) here.
  void copy_from(const Tensor& source) const;
  /// True when no other handle shares the memory, so that it may be overwritten.
  bool is_sole_owner() const { return storage_ && storage_.use_count() == 1; }
  /// Returns the memory to the cache while handles and views live on: a std::logic_error when an element is
  /// read before take_memory().
  void give_up_memory() const { storage_->give_up(); }
  /// Fills a tensor that gave up its memory, all views with it, with that of `source`, which no other handle
  /// may share, of the same size.
  void take_memory(const Tensor& source) const;
  /// The elements in a vector, converted to T.
  template <class T>
  std::vector<T> to_vector() const;

 private:
  void check_type(DType requested) const;
  [[noreturn]] void throw_given_up() const;

  std::shared_ptr<Storage> storage_;
  int64_t offset_bytes_ = 0;
  Shape shape_;
  int64_t numel_ = 0;
  DType dtype_ = DType::f32;
};

inline Tensor empty_like(const Tensor& other) {
  return Tensor::empty(other.shape(), other.dtype(), other.device());
}
inline Tensor zeros_like(const Tensor& other) {
  return Tensor::zeros(other.shape(), other.dtype(), other.device());
}

/// target += source, elementwise; same shape, dtype and device.
void add_in_place(const Tensor& target, const Tensor& source);
/// target *= factor.
void scale_in_place(const Tensor& target, double factor);

}  // namespace headwater

// The sizes of a tensor, outermost first.
#pragma once

#include <fmt/core.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace headwater {

/// Up to 6 axes, stored inline: a shape costs no allocation. Sizes and all their products are int64_t:
/// batch * length * channels passes 2^31 in ordinary use.
class Shape {
 public:
  static constexpr int max_axes = 6;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes);
  explicit Shape(const std::vector<int64_t>& sizes);

  int n_axes() const { return n_axes_; }
  /// Size of an axis; a negative `axis` counts from the end. Throws an input error if there is no such axis.
  int64_t dim(int axis) const;
  int64_t operator[](int axis) const { return dim(axis); }
  /// Product of all sizes; 1 for a scalar.
  int64_t numel() const;
  bool operator==(const Shape& other) const = default;
  const int64_t* begin() const { return sizes_.data(); }
  const int64_t* end() const { return sizes_.data() + n_axes_; }
  /// This shape with the leading axis replaced.
  Shape with_leading(int64_t size) const;
  /// "(8, 512, 32)".
  std::string str() const;

 private:
  std::array<int64_t, max_axes> sizes_{};
  int n_axes_ = 0;
};

}  // namespace headwater

/// Shapes are formatted as str(), and only when a message is really made: checks in hot paths pass the shape itself.
template <>
struct fmt::formatter<headwater::Shape> {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }
  template <class Context>
  auto format(const headwater::Shape& shape, Context& context) const {
    auto out = context.out();
    for (const char character : shape.str()) *out++ = character;
    return out;
  }
};

// The header of a safetensors file: bytes nobody vouches for, turned into checked entries or an error.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/files.h"
#include "core/shape.h"

namespace headwater {

/// Every element type that the format names; F16 and those after it have no tensor type of ours.
enum class SafetensorsDType : uint8_t {
  f64,
  f32,
  bf16,
  i64,
  i32,
  u8,   // as they are
  f16,  // read as a float32 copy
  i16,
  i8,
  u16,
  u32,
  u64,
  boolean,
  c64,
  f8_e4m3,
  f8_e5m2,
  f8_e8m0,
  f6_e2m3,
  f6_e3m2,
  f4,  // listed only
};

/// "F32", as files spell it.
const char* name_of(SafetensorsDType dtype);
/// Size of an element in bits: some types are smaller than a byte.
int bits_of(SafetensorsDType dtype);

/// One tensor of a file: bytes [begin, end) after the header.
struct SafetensorsEntry {
  std::string_view name;  ///< lives as long as the header's text and SafetensorsHeader
  Shape shape;
  SafetensorsDType dtype = SafetensorsDType::f32;
  uint64_t begin = 0;
  uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  ///< sorted by name, no name twice
  std::map<std::string, std::string> metadata;
  std::deque<std::string> unescaped_strings;  ///< what is written with escapes; names may point here

  SafetensorsHeader() = default;
  SafetensorsHeader(SafetensorsHeader&&) = default;
  SafetensorsHeader& operator=(SafetensorsHeader&&) = default;
};

inline constexpr uint64_t max_safetensors_header_bytes = 100'000'000;
inline constexpr size_t max_safetensors_tensors = 1'000'000;
inline constexpr size_t max_safetensors_metadata_entries = 100'000;

/// Parses and checks the JSON `text` of a header before `n_data_bytes` of data. On return the entries cover
/// the data without hole or overlap and each has the size that its shape and dtype demand. Throws an input
/// error that names `path`, the tensor or the byte, and the reason. Takes O(n log n) time in the length of
/// the text and less than twice its memory, whatever the text holds.
SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t n_data_bytes, const Path& path);

/// `name` in quotes for a message: shortened if long, control characters as '?'.
std::string quoted_name(std::string_view name);

}  // namespace headwater

#include "core/safetensors.h"

#include <fmt/format.h>
#include <algorithm>

#include <bit>
#include <cstring>

#include "core/error.h"
#include "core/utf8.h"

namespace headwater {
namespace {

static_assert(std::endian::native == std::endian::little,
              "safetensors files are little-endian, and read in place");

constexpr size_t length_bytes = sizeof(uint64_t);  // of the field that opens the file: the header's length
constexpr size_t data_alignment = 8;

/// The text of the header, between the length field and the data.
std::string_view header_text(const MappedFile& file) {
  const std::string path = file.path().string();
  require(file.size() >= length_bytes, "{}: has only {}; a safetensors file begins with an 8-byte length",
          path, bytes_text(file.size()));
  uint64_t length = 0;
  std::memcpy(&length, file.data(), length_bytes);
  require(length > 0, "{}: its safetensors header has length 0; the file is damaged", path);
  require(length <= max_safetensors_header_bytes,
          "{}: begins with the header length {}, more than the {} that are allowed; it is damaged or not a "
          "safetensors file",
          path, length, max_safetensors_header_bytes);
  require(length <= file.size() - length_bytes,
          "{}: its safetensors header has {} bytes, but only {} follow: it was cut off", path, length,
          file.size() - length_bytes);
  return {reinterpret_cast<const char*>(file.data()) + length_bytes, static_cast<size_t>(length)};
}

/// IEEE binary16 to binary32, exact.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f;
  const uint32_t fraction = half & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: a whole number of 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (fraction << 13));
}

Tensor from_half(std::string_view bytes, const Shape& shape) {
  Tensor result = Tensor::empty(shape, DType::f32);
  float* values = result.data<float>();
  for (int64_t i = 0; i < result.numel(); ++i) {
    uint16_t half;
    std::memcpy(&half, bytes.data() + i * sizeof(half), sizeof(half));
    values[i] = half_to_float(half);
  }
  return result;
}

Tensor copy_of(std::string_view bytes, const Shape& shape, DType dtype) {
  Tensor result = Tensor::empty(shape, dtype);
  std::memcpy(result.raw_data(), bytes.data(), bytes.size());
  return result;
}

bool is_aligned(const void* data, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % size_of(dtype) == 0;
}

const char* file_dtype(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return "F64";
    case DType::f32:
      return "F32";
    case DType::bf16:
      return "BF16";
    case DType::i64:
      return "I64";
    case DType::i32:
      return "I32";
    case DType::u8:
      return "U8";
  }
  return "";
}

std::string json_string(std::string_view text) {
  std::string result = "\"";
  for (char character : text) {
    if (character == '"' || character == '\\') {
      result += {'\\', character};
    } else if (static_cast<unsigned char>(character) < 0x20) {
      result += fmt::format("\\u{:04x}", static_cast<unsigned>(character));
    } else {
      result += character;
    }
  }
  return result + '"';
}

void check_writable(const std::vector<NamedTensor>& tensors, const std::string& path) {
  for (const auto& [name, tensor] : tensors) {
    const auto check = [&, &key = name](bool condition, std::string_view reason) {
      require(condition, "{}: cannot write tensor {}: {}", path, quoted_name(key), reason);
    };
    check(!name.empty() && name != "__metadata__", "the name is reserved");
    check(valid_utf8_prefix(name) == name.size(), "the name is not UTF-8");
    check(tensor.defined(), "it is undefined");
  }
}

std::vector<const NamedTensor*> in_file_order(const std::vector<NamedTensor>& tensors,
                                              const std::string& path) {
  std::vector<const NamedTensor*> order;
  order.reserve(tensors.size());
  for (const NamedTensor& tensor : tensors) order.push_back(&tensor);
  const auto by_name = [](const auto* a, const auto* b) { return a->name < b->name; };
  std::sort(order.begin(), order.end(), by_name);
  const auto twice = std::adjacent_find(order.begin(), order.end(),
                                        [](const auto* a, const auto* b) { return a->name == b->name; });
  if (twice != order.end()) {
    throw_input_error("{}: cannot write tensor {}: there are two", path, quoted_name((*twice)->name));
  }
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return size_of(a->tensor.dtype()) > size_of(b->tensor.dtype());
  });
  return order;
}

std::string metadata_json(const std::map<std::string, std::string>& metadata, const std::string& path) {
  std::string text;
  for (const auto& [key, value] : metadata) {
    require(valid_utf8_prefix(key + value) == key.size() + value.size(), "{}: metadata {} is not UTF-8", path,
            quoted_name(key));
    text += fmt::format("{}{}:{}", text.empty() ? "" : ",", json_string(key), json_string(value));
  }
  return "\"__metadata__\":{" + text + "}";
}

std::string header_json(const std::vector<const NamedTensor*>& order,
                        const std::map<std::string, std::string>& metadata, const std::string& path) {
  std::string text = "{";
  if (!metadata.empty()) text += metadata_json(metadata, path);
  uint64_t begin = 0;
  for (const NamedTensor* named : order) {
    const Tensor& tensor = named->tensor;
    const uint64_t end = begin + static_cast<uint64_t>(tensor.size_bytes());
    text += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        text.size() > 1 ? "," : "", json_string(named->name), file_dtype(tensor.dtype()),
                        fmt::join(tensor.shape(), ","), begin, end);
    begin = end;
  }
  text += '}';
  text.resize((text.size() + data_alignment - 1) / data_alignment * data_alignment, ' ');
  require(text.size() <= max_safetensors_header_bytes,
          "{}: {} tensors need a header of {}; write several files", path, order.size(),
          bytes_text(text.size()));
  return text;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::shared_ptr<const MappedFile> mapping, SafetensorsHeader header,
                                 size_t data_start)
    : mapping_(std::move(mapping)),
      header_(std::make_shared<const SafetensorsHeader>(std::move(header))),
      data_start_(data_start) {}

SafetensorsFile SafetensorsFile::open(const Path& path) {
  std::shared_ptr<const MappedFile> mapping = MappedFile::open(path);
  const std::string_view text = header_text(*mapping);
  const size_t data_start = length_bytes + text.size();
  SafetensorsHeader header = parse_safetensors_header(text, mapping->size() - data_start, path);
  return SafetensorsFile(std::move(mapping), std::move(header), data_start);
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> result;
  result.reserve(entries().size());
  for (const SafetensorsEntry& entry : entries()) result.emplace_back(entry.name);
  return result;
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  const auto found =
      std::lower_bound(entries().begin(), entries().end(), name,
                       [](const auto& entry, std::string_view wanted) { return entry.name < wanted; });
  return found != entries().end() && found->name == name ? &*found : nullptr;
}

const SafetensorsEntry& SafetensorsFile::entry(std::string_view name) const {
  if (const SafetensorsEntry* found = find(name)) return *found;
  constexpr size_t n_listed = 8;
  std::string listed;
  for (size_t i = 0; i < std::min(n_listed, entries().size()); ++i) {
    listed += (i ? ", " : ": ") + quoted_name(entries()[i].name);
  }
  throw_input_error("{}: has no tensor {}; it has {}{}{}", path().string(), quoted_name(name),
                    entries().size(), listed, entries().size() > n_listed ? ", ..." : "");
}

std::string_view SafetensorsFile::bytes(const SafetensorsEntry& entry) const {
  return {reinterpret_cast<const char*>(mapping_->data()) + data_start_ + entry.begin,
          static_cast<size_t>(entry.end - entry.begin)};
}

Tensor SafetensorsFile::tensor(std::string_view name) const {
  const SafetensorsEntry& found = entry(name);
  const std::string_view data = bytes(found);
  const auto view = [&](DType dtype) {
    if (!is_aligned(data.data(), dtype)) return copy_of(data, found.shape, dtype);
    return Tensor::over(const_cast<char*>(data.data()), found.shape, dtype, mapping_);
  };
  switch (found.dtype) {
    case SafetensorsDType::f64:
      return view(DType::f64);
    case SafetensorsDType::f32:
      return view(DType::f32);
    case SafetensorsDType::bf16:
      return view(DType::bf16);
    case SafetensorsDType::i64:
      return view(DType::i64);
    case SafetensorsDType::i32:
      return view(DType::i32);
    case SafetensorsDType::u8:
      return view(DType::u8);
    case SafetensorsDType::f16:
      return from_half(data, found.shape);
    default:
      throw_input_error(
          "{}: tensor {} has dtype {}, which cannot be read here; convert it to F32, F64, F16, BF16, "
          "I64, I32 or U8",
          path().string(), quoted_name(name), name_of(found.dtype));
  }
}

void write_safetensors(OutputFile& file, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  const std::string path = file.path().string();
  check_writable(tensors, path);
  const std::vector<const NamedTensor*> order = in_file_order(tensors, path);
  const std::string header = header_json(order, metadata, path);
  const uint64_t length = header.size();
  file.write(&length, length_bytes);
  file.write(header);
  for (const NamedTensor* named : order) {
    const Tensor on_cpu = named->tensor.to(Device{});
    file.write(on_cpu.raw_data(), static_cast<size_t>(on_cpu.size_bytes()));
  }
}

void write_safetensors(const Path& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  write_file_atomically(path, [&](OutputFile& file) { write_safetensors(file, tensors, metadata); });
}

}  // namespace headwater

// Safetensors files: named tensors after a JSON header, as the Hugging Face libraries read and write them.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/files.h"
#include "core/safetensors_header.h"
#include "core/tensor.h"

namespace headwater {

struct NamedTensor {
  std::string name;
  Tensor tensor;
};

/// An open file; copies share it. Any number of threads may read.
class SafetensorsFile {
 public:
  /// Maps the file and checks all of its header: see parse_safetensors_header. Data is read when touched.
  /// Throws an input error that names the file, the tensor and the reason.
  static SafetensorsFile open(const Path& path);

  const Path& path() const { return mapping_->path(); }
  /// Sorted.
  std::vector<std::string> names() const;
  /// Name, shape, dtype and place of every tensor, sorted by name.
  const std::vector<SafetensorsEntry>& entries() const { return header_->entries; }
  /// The strings under `__metadata__`.
  const std::map<std::string, std::string>& metadata() const { return header_->metadata; }
  bool contains(std::string_view name) const { return find(name) != nullptr; }
  /// Throws an input error that lists some of the names if there is no such tensor.
  const SafetensorsEntry& entry(std::string_view name) const;

  /// A tensor on the mapped file, not to be written to; a copy where the file's data is not aligned for its
  /// dtype, and a float32 copy of F16. The file stays mapped as long as the tensor lives. Throws an input
  /// error for a missing name and for a dtype that Headwater has no tensors of.
  Tensor tensor(std::string_view name) const;
  /// The bytes of a tensor of any dtype.
  std::string_view bytes(const SafetensorsEntry& entry) const;

 private:
  SafetensorsFile(std::shared_ptr<const MappedFile> mapping, SafetensorsHeader header, size_t data_start);
  const SafetensorsEntry* find(std::string_view name) const;

  std::shared_ptr<const MappedFile> mapping_;
  std::shared_ptr<const SafetensorsHeader> header_;
  size_t data_start_;
};

/// Puts out `tensors` sorted by dtype size, largest first, then by name; data begins at a multiple of 8 bytes,
/// and so every tensor is aligned. Tensor memory is written as it stands; one on a GPU is copied to the CPU
/// when its turn comes. Throws an input error for an undefined tensor, a name that is there twice, empty,
/// reserved or not UTF-8; writing throws as OutputFile does.
void write_safetensors(OutputFile& file, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata);
/// The same into a file of its own, whole or not at all.
void write_safetensors(const Path& path, const std::vector<NamedTensor>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace headwater

#include "train/golden.h"

#include <cmath>

#include "core/config_scalar.h"
#include "core/error.h"
#include "train/json.h"

namespace headwater {
namespace {

constexpr const char* golden_format = "ssm-golden/1";

std::string metadata_text(const SafetensorsFile& file, const std::string& key) {
  const auto found = file.metadata().find(key);
  require(found != file.metadata().end(), "{}: its metadata has no '{}'; a golden case has one",
          file.path().string(), key);
  return found->second;
}

double read_tolerance(const SafetensorsFile& file, const std::string& key) {
  ConfigValue value;
  value.kind = ConfigValue::Kind::scalar;
  value.text = metadata_text(file, key);
  const std::optional<double> number = parse_real(value).value;
  require(number && *number >= 0, "{}: metadata '{}' is {}; it must be a number >= 0", file.path().string(),
          key, excerpt(value.text));
  return *number;
}

}  // namespace

GoldenFile GoldenFile::open(const Path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const std::string format = metadata_text(file, "format");
  require(format == golden_format, "{}: its format is {}; this program reads {}", path.string(),
          excerpt(format), golden_format);
  GoldenFile golden{
      .file = file,
      .path = path,
      .target = metadata_text(file, "target"),
      .config = parse_json(metadata_text(file, "config"), path.string() + ": metadata 'config'"),
      .rtol = read_tolerance(file, "rtol"),
      .atol = read_tolerance(file, "atol")};
  require(golden.config.kind == ConfigValue::Kind::map, "{}: metadata 'config' must be a JSON object",
          path.string());
  return golden;
}

Tensor GoldenFile::real(const std::string& name, DType dtype) const {
  const Tensor stored = file.tensor(name);
  require(stored.dtype() == DType::f32 || stored.dtype() == DType::f64, "{}: {} is {}; it must be f32 or f64",
          path.string(), name, name_of(stored.dtype()));
  for (const double value : stored.to_vector<double>()) {
    require(std::isfinite(value), "{}: {} holds a number that is not finite; the file is damaged",
            path.string(), name);
  }
  // A copy: the file's memory must not be written to.
  return stored.dtype() == dtype ? stored.clone() : stored.to(dtype);
}

std::vector<std::string> GoldenFile::names(const std::string& prefix) const {
  std::vector<std::string> result;
  for (const std::string& name : file.names()) {
    if (name.rfind(prefix, 0) == 0) result.push_back(name.substr(prefix.size()));
  }
  return result;
}

Tensor GoldenFile::resets() const {
  const bool by_index = contains("input.seq_idx"), by_flag = contains("input.reset");
  require(!by_index || !by_flag, "{}: it has input.seq_idx and input.reset, which say the same; give one",
          path.string());
  if (!by_index && !by_flag) return {};
  const std::string name = by_index ? "input.seq_idx" : "input.reset";
  const Tensor given = file.tensor(name);
  require((given.dtype() == DType::i64 || given.dtype() == DType::i32) && given.shape().n_axes() == 2,
          "{}: {} is {} {}; it must be i64 (batch, length)", path.string(), name, name_of(given.dtype()),
          given.shape());
  const std::vector<int64_t> values = given.to_vector<int64_t>();
  const int64_t length = given.dim(1);
  const Tensor resets = Tensor::zeros(given.shape(), DType::i32);
  for (int64_t i = 0; i < given.numel(); ++i) {
    const int64_t value = values[i];
    if (by_flag) {
      require(value == 0 || value == 1, "{}: {} holds {}; it must hold 0 and 1 only", path.string(), name,
              value);
      resets.data<int32_t>()[i] = static_cast<int32_t>(value);
    } else if (i % length > 0) {
      require(value >= values[i - 1], "{}: {} falls from {} to {}; it must never decrease", path.string(),
              name, values[i - 1], value);
      resets.data<int32_t>()[i] = value != values[i - 1] ? 1 : 0;
    }
  }
  return resets;
}

}  // namespace headwater

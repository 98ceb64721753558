// One line per family.

#include <functional>

#include "core/config_value.h"
#include "core/error.h"
#include "models/mixer.h"
#include "models/mixers/attention.h"
#include "models/mixers/mamba2.h"

namespace headwater {
namespace {

struct Family {
  std::string type;
  std::function<std::shared_ptr<MixerConfig>()> make;
};

const std::vector<Family>& families() {
  static const std::vector<Family> table = {
      {"mamba2", [] { return std::make_shared<Mamba2Config>(); }},
      {"attention", [] { return std::make_shared<AttentionConfig>(); }},
  };
  return table;
}

}  // namespace

std::vector<std::string> mixer_types() {
  std::vector<std::string> names;
  for (const Family& family : families()) names.push_back(family.type);
  return names;
}

std::shared_ptr<MixerConfig> make_mixer_config(const std::string& type) {
  for (const Family& family : families()) {
    if (family.type == type) return family.make();
  }
  const std::string nearest = nearest_name(type, mixer_types());
  const std::string hint = nearest.empty() ? "" : fmt::format(" Did you mean '{}'?", nearest);
  std::string known;
  for (const std::string& name : mixer_types()) known += (known.empty() ? "" : ", ") + name;
  throw_input_error("'{}' is not a mixer.{} Known: {}", type, hint, known);
}

}  // namespace headwater

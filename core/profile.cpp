#include "core/profile.h"

namespace headwater {
namespace {

thread_local bool enabled = false;
ProfileScope* innermost = nullptr;
std::map<std::string, ProfileEntry> entries;

}  // namespace

void set_profiling(bool on) {
  enabled = on;
}
bool profiling_enabled() {
  return enabled;
}
std::map<std::string, ProfileEntry> profile_entries() {
  return entries;
}
void reset_profile() {
  entries.clear();
}

void ProfileScope::begin(const char* name) {
  active_ = true;
  name_ = name;
  parent_ = innermost;
  innermost = this;
  start_ = std::chrono::steady_clock::now();
}

void ProfileScope::end() {
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
  ProfileEntry& entry = entries[name_];
  ++entry.calls;
  entry.seconds += elapsed.count() - child_seconds_;
  innermost = parent_;
  if (parent_ != nullptr) parent_->child_seconds_ += elapsed.count();
}

}  // namespace headwater

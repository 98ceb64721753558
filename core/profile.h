// Where the time of a step goes: seconds per kernel name, switched on by `bench`.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>

namespace headwater {

struct ProfileEntry {
  int64_t calls = 0;
  double seconds = 0.0;
};

/// For this thread, the one that drives the step: the others charge nothing.
void set_profiling(bool enabled);
bool profiling_enabled();
/// Everything counted since the last reset, by name. Times are exclusive: a kernel that calls GEMM is not
/// charged for it.
std::map<std::string, ProfileEntry> profile_entries();
void reset_profile();

/// Charges the time between construction and destruction to `name`, on the thread that drives the step. That thread
/// takes its part of every parallel loop, so what it spends in a piece of one (a product in an engine) is the piece's
/// share of the time on the clock, with any number of threads; where it waits for the others, the loop's kernel is
/// charged. Costs a call and a branch when profiling is off, about a tenth of a microsecond when it is on.
class ProfileScope {
 public:
  explicit ProfileScope(const char* name) {
    if (profiling_enabled()) begin(name);
  }
  ~ProfileScope() {
    if (active_) end();
  }
  ProfileScope(const ProfileScope&) = delete;
  ProfileScope& operator=(const ProfileScope&) = delete;

 private:
  void begin(const char* name);
  void end();

  bool active_ = false;
  const char* name_ = nullptr;
  ProfileScope* parent_ = nullptr;
  double child_seconds_ = 0.0;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace headwater

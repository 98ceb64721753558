// Runs a piece of a test with a given number of threads.
#pragma once

#include "core/parallel.h"

namespace headwater {

/// While it lives, parallel_for uses `count` threads.
class WithThreads {
 public:
  explicit WithThreads(int count) : before_(n_threads()) { set_n_threads(count); }
  ~WithThreads() { set_n_threads(before_); }
  WithThreads(const WithThreads&) = delete;
  WithThreads& operator=(const WithThreads&) = delete;

 private:
  int before_;
};

}  // namespace headwater

#include "core/parallel.h"

#include <omp.h>

namespace headwater {
namespace {
int configured_threads = 0;
}

void set_n_threads(int count) {
  configured_threads = count > 0 ? count : omp_get_num_procs();
  omp_set_num_threads(configured_threads);
}

int n_threads() {
  if (configured_threads == 0) set_n_threads(omp_get_max_threads());
  return configured_threads;
}

}  // namespace headwater

#include "ops/document_positions/document_positions_kernels.h"

namespace headwater {

void document_positions_cpu(const DocumentPositionsArgs& args) {
  const int64_t batch = args.positions.dim(0), length = args.positions.dim(1);
  const int32_t* resets = args.resets.data<int32_t>();
  for (int64_t b = 0; b < batch; ++b) {
    int32_t next = args.n_seen.defined() ? args.n_seen.data<int32_t>()[b] : 0;
    for (int64_t i = b * length; i < (b + 1) * length; ++i) {
      if (resets != nullptr && resets[i] != 0) next = 0;
      args.positions.data<int32_t>()[i] = next++;
    }
    args.next_n_seen.data<int32_t>()[b] = next;
  }
}

}  // namespace headwater

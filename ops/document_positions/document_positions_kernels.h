// Private to the operator: what its kernel takes, the same on every device.
#pragma once

#include "core/kernel.h"
#include "core/tensor.h"

namespace headwater {

struct DocumentPositionsArgs {
  Tensor resets;       // i32 (batch, length) or undefined
  Tensor n_seen;       // i32 (batch) or undefined
  Tensor positions;    // i32 (batch, length), written
  Tensor next_n_seen;  // i32 (batch), written
};

void document_positions_cpu(const DocumentPositionsArgs& args);
void document_positions_cuda(const DocumentPositionsArgs& args);

inline constexpr Kernel<DocumentPositionsArgs> document_positions_kernel{
    "document_positions", document_positions_cpu, HEADWATER_CUDA(document_positions_cuda)};

}  // namespace headwater

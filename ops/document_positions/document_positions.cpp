#include "ops/document_positions/document_positions.h"

#include "ops/check.h"
#include "ops/document_positions/document_positions_kernels.h"

namespace headwater {

DocumentPositions document_positions(const Tensor& resets, const Tensor& n_seen, int64_t batch,
                                     int64_t length, Device device) {
  constexpr const char* op = "document_positions";
  check_resets(op, resets, batch, length);
  require(!n_seen.defined() || (n_seen.shape() == Shape{batch} && n_seen.dtype() == DType::i32),
          "{}: n_seen is {} {}; it must be i32 (batch) = ({})", op, name_of(n_seen.dtype()), n_seen.shape(),
          batch);
  for (const Tensor& tensor : {resets, n_seen}) {
    require(!tensor.defined() || tensor.device() == device, "{}: an argument is on {}; it must be on {}", op,
            to_string(tensor.device()), to_string(device));
  }
  const DocumentPositions result{Tensor::empty({batch, length}, DType::i32, device),
                                 Tensor::empty({batch}, DType::i32, device)};
  document_positions_kernel(device, {resets, n_seen, result.positions, result.n_seen});
  return result;
}

}  // namespace headwater

// How far each step stands from the start of its document.
#pragma once

#include "core/tensor.h"

namespace headwater {

struct DocumentPositions {
  Tensor positions;  ///< i32 (batch, length): steps of the same document before each step
  Tensor n_seen;     ///< i32 (batch): steps of the last document so far; with it the next piece goes on
};

/// Counts the steps of a document, in pieces of a sequence.
///
///   positions[b,t] = 0 where resets[b,t] is 1, else positions[b,t-1] + 1, from positions[b,-1] = n_seen[b] - 1 on
///   n_seen'[b]     = positions[b,length-1] + 1
///
/// Shapes   resets: i32 (batch, length), may be undefined: no document starts here   n_seen: i32 (batch), may be
///          undefined: 0. Both on `device`.
/// Values   as check_resets() asks. A document of 2^31 steps or more overflows.
/// Throws   an input error for a wrong shape, dtype or device; the text names the argument.
DocumentPositions document_positions(const Tensor& resets, const Tensor& n_seen, int64_t batch,
                                     int64_t length, Device device);

}  // namespace headwater

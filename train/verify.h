// `headwater verify`: this machine's kernels against recorded cases, in every form.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/device.h"
#include "core/dtype.h"
#include "core/files.h"

namespace headwater {

struct VerifyOptions {
  DType dtype =
      DType::f32;  ///< what the kernels compute in; f64 (on the CPU) shows how much of an error is rounding
  Device device = {};
};

/// One tensor of a case, computed in one form, held against the file.
struct VerifyRow {
  std::string form;      ///< "chunked 16"
  std::string tensor;    ///< "grad_param.A_log"
  double worst_error;    ///< max |ours - golden|; NaN if any of ours is
  double allowed_error;  ///< atol + rtol * max |golden|

  /// A NaN fails.
  bool passed() const { return worst_error <= allowed_error; }
};

struct VerifiedFile {
  Path path;
  std::string target;       ///< "mixer:mamba2"
  std::string unsupported;  ///< why this build cannot compute it; empty if it can
  std::vector<VerifyRow> rows;

  bool passed() const;
  /// The row nearest to, or farthest beyond, what is allowed; nullptr without rows.
  const VerifyRow* worst() const;
};

struct VerifyReport {
  std::vector<VerifiedFile> files;

  int64_t n_passed() const;
  int64_t n_failed() const;
  int64_t n_unsupported() const;
  /// Whether nothing failed; an unsupported file counts as a failure unless skipped.
  bool ok(bool skip_unsupported) const;
  /// One line per file, tensor and form; then a table with one line per file, and the counts.
  std::string text() const;
};

/// Computes every case in every form: outputs, and gradients where the form is one that trains. A folder stands
/// for the *.safetensors in it, sorted. Targets that this build does not have are reported, not refused.
/// Throws an input error that names the file, and the tensor or key, for a missing or damaged file, a case whose
/// tensors do not belong to its target, and for a folder without cases.
VerifyReport verify(const std::vector<Path>& paths, const VerifyOptions& options = {});

}  // namespace headwater

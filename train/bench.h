// How fast, how much memory, and where the time goes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/profile.h"
#include "train/config.h"

namespace headwater {

struct BenchReport {
  std::string device;
  double tokens_per_second = 0.0;
  double step_ms = 0.0;            ///< median
  int64_t peak_bytes = 0;          ///< of tensors
  int64_t peak_rss_bytes = 0;      ///< of the process, as the system counts it
  int64_t system_allocations = 0;  ///< while measuring, after the warm-up
  double gemm_share = 0.0;         ///< of the time of a step, in the GEMM library
  double block_share = 0.0;        ///< likewise, in the matrix products of the engines' own micro-kernel
  double gemm_flops_per_second = 0.0;
  double peak_flops_per_second = 0.0;  ///< a large product, measured here
  double flops_share = 0.0;            ///< of the peak: the model's flops (LanguageModel::flops_per_token)
  std::map<std::string, ProfileEntry> kernels;  ///< seconds per measured step

  std::string text() const;
  std::string json() const;
};

/// Training steps (forward, backward, clipping, AdamW) of the config's model on random tokens, on its device and in its
/// precision. Shares of kernels and of GEMM are the CPU's only: a GPU's host does not wait for them.
BenchReport bench_training(const Config& config, int64_t n_steps);

/// Tokens decoded one by one, batch 1, after a short prompt.
BenchReport bench_decoding(const Config& config, int64_t n_tokens);

/// Microseconds per token, forward and backward, by length.
struct EngineReport {
  std::string device;
  std::vector<std::pair<int64_t, double>> us_per_token;

  std::string text() const;
  std::string json() const;
};

/// The matrix-state engine alone: the time per token must not grow with the length. On the CPU 8 heads, batch 1, 1k to 64k steps; on a GPU 32 heads, 32k tokens in rows of 2k and of 32k steps.
EngineReport bench_engine(const Config& config);

}  // namespace headwater

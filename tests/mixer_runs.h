// Whole mixers in f64, forward and backward: what the tests of every family compare.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "models/mixer.h"

namespace headwater {

/// A mixer with its initial values, but that what starts as a constant is random too: mistakes hide where a parameter is 0
/// or 1.
struct TestMixer {
  TestMixer(const MixerConfig& config, int64_t d_model, DType dtype = DType::f64);

  std::unique_ptr<Mixer> mixer;
  ParameterStore store;
};

struct MixerRun {
  Tensor y, grad_x;
  std::vector<Tensor> state, grad_parameters;
};

/// Forward and backward for random cotangents, the sequence cut at `borders` (which begin with 0 and end with the length),
/// the state handed over in between. Cotangents of the final state, of its real parts, only if asked for.
MixerRun run_in_pieces(const MixerConfig& config, const Tensor& x, const Tensor& resets,
                       const std::vector<int64_t>& borders, bool with_state_cotangent = true);

/// 0, 1, ..., length: as borders, one step at a time.
std::vector<int64_t> every_step(int64_t length);

/// "" or which numbers of the two runs differ by more than `tolerance` of the largest.
std::string difference(const MixerRun& a, const MixerRun& b, double tolerance);

/// A row of x, (1, length, d_model), whose documents begin at `starts` (the first at 0) against the documents one by one:
/// outputs, gradients and the final state. Returns "" or what differs.
std::string check_documents(const MixerConfig& config, const Tensor& x, const std::vector<int64_t>& starts,
                            double tolerance);

/// check_gradient of a block in x, in every parameter, and, if `state` has parts, in its real ones.
std::string check_block_gradient(const MixerConfig& config, const Tensor& x, const Tensor& resets,
                                 const std::vector<Tensor>& state = {});

}  // namespace headwater

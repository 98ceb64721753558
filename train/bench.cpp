#include "train/bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "core/files.h"
#include "core/gemm.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"
#include "ops/adamw/adamw.h"
#include "ops/chunked_matrix_state/chunked_matrix_state.h"

namespace headwater {
namespace {

constexpr int64_t default_vocab_size = 272;
constexpr int warm_up_steps = 2;

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

Tensor random_tokens(const Shape& shape, int64_t vocab_size, uint64_t seed) {
  RandomStream random(seed, "bench");
  const Tensor tokens = Tensor::empty(shape, DType::i32);
  for (int64_t i = 0; i < tokens.numel(); ++i)
    tokens.data<int32_t>()[i] = static_cast<int32_t>(random.below(vocab_size));
  return tokens;
}

Tensor random_normal(const Shape& shape, uint64_t stream) {
  RandomStream random(1, stream);
  const Tensor tensor = Tensor::empty(shape, DType::f32);
  for (int64_t i = 0; i < tensor.numel(); ++i) tensor.data<float>()[i] = static_cast<float>(random.normal());
  return tensor;
}

int64_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * 1024;
}

/// Flops per second of a product large enough to show the library's best.
double measured_peak() {
  constexpr int64_t n = 1536;
  const Tensor a = random_normal({n, n}, 1), b = random_normal({n, n}, 2),
               c = Tensor::empty({n, n}, DType::f32);
  double best = 1e30;
  for (int repeat = 0; repeat < 4; ++repeat) {
    const Clock::time_point start = Clock::now();
    gemm<float>(false, true, n, n, n, 1.0f, a.data<float>(), n, b.data<float>(), n, 0.0f, c.data<float>(), n);
    best = std::min(best, seconds_since(start));
  }
  return 2.0 * n * n * n / best;
}

std::unique_ptr<LanguageModel> make_model(const Config& config) {
  LanguageModelConfig model = config.model;
  if (!model.vocab_size) model.vocab_size = default_vocab_size;
  auto result = std::make_unique<LanguageModel>(model, DType::f32);
  result->initialize(0);
  return result;
}

/// Flops of the linear layers per token, forward: every element of a matrix is multiplied and added once, but the
/// embedding is looked up; a tied head uses it as a matrix after all.
double linear_flops_per_token(const LanguageModel& model) {
  double elements = 0.0;
  for (const Parameter& parameter : model.parameters().parameters()) {
    const bool is_lookup = parameter.name == "backbone.embeddings.weight" && !model.config().tie_embeddings;
    if (parameter.shape.n_axes() == 2 && !is_lookup) elements += static_cast<double>(parameter.shape.numel());
  }
  return 2.0 * elements;
}

}  // namespace

std::string BenchReport::text() const {
  std::string result = fmt::format(
      "{:.0f} tokens/s  {:.2f} ms  peak {} of tensors, {} of the process  {} system allocations\n",
      tokens_per_second, step_ms, bytes_text(peak_bytes), bytes_text(peak_rss_bytes), system_allocations);
  if (peak_flops_per_second > 0.0) {
    result += fmt::format(
        "GEMM library: {:.1f}% of the step at {:.0f}% of the measured peak ({:.0f} GFLOP/s)\n"
        "products of the engines' micro-kernel: {:.1f}% of the step; what is no matrix product: {:.1f}%\n",
        100 * gemm_share, 100 * gemm_flops_per_second / peak_flops_per_second, 1e-9 * peak_flops_per_second,
        100 * block_share, 100 * (1.0 - gemm_share - block_share));
  }
  std::vector<std::pair<std::string, ProfileEntry>> sorted(kernels.begin(), kernels.end());
  std::sort(sorted.begin(), sorted.end(),
            [](const auto& a, const auto& b) { return a.second.seconds > b.second.seconds; });
  for (const auto& [name, entry] : sorted) {
    result += fmt::format("  {:<32} {:>9.3f} ms {:>6.1f}%  {} calls\n", name, 1e3 * entry.seconds,
                          1e5 * entry.seconds / step_ms, entry.calls);
  }
  return result;
}

std::string BenchReport::json() const {
  nlohmann::ordered_json json{{"tokens_per_second", tokens_per_second},
                              {"step_ms", step_ms},
                              {"peak_bytes", peak_bytes},
                              {"peak_rss_bytes", peak_rss_bytes},
                              {"system_allocations", system_allocations},
                              {"gemm_share", gemm_share},
                              {"block_share", block_share},
                              {"gemm_flops_per_second", gemm_flops_per_second},
                              {"peak_flops_per_second", peak_flops_per_second}};
  for (const auto& [name, entry] : kernels) json["kernels_ms"][name] = 1e3 * entry.seconds;
  return json.dump();
}

BenchReport bench_training(const Config& config, int64_t n_steps) {
  set_n_threads(static_cast<int>(config.run.threads));
  const auto model = make_model(config);
  ParameterStore& store = model->parameters();
  const int64_t rows = config.run.sequences_per_pass(), length = config.run.data.length;
  const Tensor tokens = random_tokens({rows, length}, model->vocab_size(), 1);
  const Tensor targets = random_tokens({rows, length}, model->vocab_size(), 2);
  const Tensor moment1 = zeros_like(store.values()), moment2 = zeros_like(store.values());
  const LanguageModelOptions options{.recompute_blocks = config.run.train.recompute == "blocks"};
  int64_t update = 0;
  const auto step = [&] {
    store.gradients().zero();
    Tape tape;
    tape.backward(model->loss(model->forward(tokens, {}, {}, options).hidden, targets).loss);
    const double norm = std::sqrt(sum_of_squares(store.gradients()));
    adamw_update(store.values(), store.gradients(), moment1, moment2,
                 {.update = ++update, .gradient_scale = norm > 1.0 ? 1.0 / norm : 1.0});
  };
  for (int i = 0; i < warm_up_steps; ++i) step();

  BenchReport report;
  reset_peak_memory();
  const int64_t allocations_before = memory_statistics().system_allocations;
  std::vector<double> seconds;
  set_profiling(true);
  reset_profile();
  for (int64_t i = 0; i < n_steps; ++i) {
    const Clock::time_point start = Clock::now();
    step();
    seconds.push_back(seconds_since(start));
  }
  set_profiling(false);
  report.peak_rss_bytes = peak_rss_bytes();
  report.peak_bytes = memory_statistics().peak_bytes_in_use;
  report.system_allocations = memory_statistics().system_allocations - allocations_before;
  report.step_ms = 1e3 * median(seconds);
  report.tokens_per_second = static_cast<double>(rows * length) / median(seconds);
  report.kernels = profile_entries();
  double total = 0.0;
  for (const double s : seconds) total += s;
  for (auto& [name, entry] : report.kernels) {
    entry.seconds /= static_cast<double>(n_steps);
    entry.calls /= n_steps;
  }
  const double gemm_seconds = report.kernels["gemm"].seconds;
  report.gemm_share = gemm_seconds * static_cast<double>(n_steps) / total;
  report.block_share = report.kernels["multiply_block"].seconds * static_cast<double>(n_steps) / total;
  report.gemm_flops_per_second =
      3.0 * linear_flops_per_token(*model) * static_cast<double>(rows * length) / gemm_seconds;
  report.peak_flops_per_second = measured_peak();
  return report;
}

BenchReport bench_decoding(const Config& config, int64_t n_tokens) {
  set_n_threads(static_cast<int>(config.run.threads));
  const auto model = make_model(config);
  const NoGradient no_gradient;
  LanguageModel::Hidden out = model->forward(random_tokens({1, 16}, model->vocab_size(), 1), {}, {});
  const auto next = [&] {
    const std::vector<float> logits = model->logits(out.hidden).value().to_vector<float>();
    const auto first = logits.end() - model->vocab_size();
    const auto token = static_cast<int32_t>(std::max_element(first, logits.end()) - first);
    out = model->forward(Tensor::from_vector<int32_t>({1, 1}, {token}), out.state, {});
  };
  for (int i = 0; i < 8; ++i) next();
  BenchReport report;
  const int64_t allocations_before = memory_statistics().system_allocations;
  std::vector<double> seconds;
  for (int64_t i = 0; i < n_tokens; ++i) {
    const Clock::time_point start = Clock::now();
    next();
    seconds.push_back(seconds_since(start));
  }
  report.step_ms = 1e3 * median(seconds);
  report.tokens_per_second = 1.0 / median(seconds);
  report.system_allocations = memory_statistics().system_allocations - allocations_before;
  report.peak_bytes = memory_statistics().peak_bytes_in_use;
  report.peak_rss_bytes = peak_rss_bytes();
  return report;
}

std::string bench_engine(const Config& config, const std::vector<int64_t>& lengths) {
  set_n_threads(static_cast<int>(config.run.threads));
  constexpr int64_t n_heads = 8, d_state = 128, head_dim = 64;
  std::string result;
  for (const int64_t length : lengths) {
    const auto leaf = [](const Tensor& tensor) { return Variable::leaf(tensor); };
    const Tensor log_decay = random_normal({1, length, n_heads}, 4);
    for (int64_t i = 0; i < log_decay.numel(); ++i)
      log_decay.data<float>()[i] = -0.1f * std::abs(log_decay.data<float>()[i]);
    const MatrixStateInputs inputs{.q = leaf(random_normal({1, length, 1, d_state}, 1)),
                                   .k = leaf(random_normal({1, length, 1, d_state}, 2)),
                                   .v = leaf(random_normal({1, length, n_heads, head_dim}, 3)),
                                   .log_decay = leaf(log_decay),
                                   .value_scale = {},
                                   .skip = {},
                                   .initial_state = {},
                                   .resets = {}};
    const Tensor grad_y = random_normal({1, length, n_heads, head_dim}, 5);
    const int64_t repeats = std::max<int64_t>(3, 65536 / length);
    std::vector<double> seconds;
    for (int64_t i = 0; i <= repeats; ++i) {
      const Clock::time_point start = Clock::now();
      Tape tape;
      const MatrixStateOutput out = chunked_matrix_state(inputs);
      tape.backward({out.y}, {grad_y});
      if (i > 0) seconds.push_back(seconds_since(start));
      for (const Variable& input : {inputs.q, inputs.k, inputs.v, inputs.log_decay})
        input.gradient().release();
    }
    result += fmt::format("length {:>8}: {:.3f} us per token, forward + backward\n", length,
                          1e6 * median(seconds) / static_cast<double>(length));
  }
  return result;
}

}  // namespace headwater

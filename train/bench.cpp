#include "train/bench.h"

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "core/cuda/runtime.h"
#include "core/files.h"
#include "core/gemm.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/random.h"
#include "ops/chunked_matrix_state/chunked_matrix_state.h"
#include "train/token_step.h"
#include "train/training_step.h"

namespace headwater {
namespace {

constexpr int64_t default_vocab_size = 272;
// On a GPU two plain steps and the recording of the graph.
constexpr int warm_up_steps = 4;

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
double measured_peak(DType dtype, Device device) {
  const int64_t n = cuda::backend() == cuda::Backend::hardware && device.is_cuda() ? 8192 : 1536;
  const Tensor a = random_normal({n, n}, 1).to(dtype).to(device),
               b = random_normal({n, n}, 2).to(dtype).to(device), c = empty_like(a);
  double best = 1e30;
  for (int repeat = 0; repeat < 4; ++repeat) {
    const Clock::time_point start = Clock::now();
    if (device.is_cpu()) {
      gemm<float>(false, true, n, n, n, 1.0f, a.data<float>(), n, b.data<float>(), n, 0.0f, c.data<float>(),
                  n);
    } else {
      cuda::gemm({.transpose_a = false,
                  .transpose_b = true,
                  .m = n,
                  .n = n,
                  .n_inner = n,
                  .alpha = 1.0f,
                  .a = a.raw_data(),
                  .lda = n,
                  .b = b.raw_data(),
                  .ldb = n,
                  .beta = 0.0f,
                  .c = c.raw_data(),
                  .ldc = n,
                  .inputs_are_bf16 = dtype == DType::bf16,
                  .output_is_bf16 = dtype == DType::bf16});
      cuda::synchronize();
    }
    best = std::min(best, seconds_since(start));
  }
  return 2.0 * static_cast<double>(n * n * n) / best;
}

std::unique_ptr<LanguageModel> make_model(const Config& config) {
  LanguageModelConfig model = config.model;
  if (!model.vocab_size) model.vocab_size = default_vocab_size;
  auto result = std::make_unique<LanguageModel>(model, parse_precision(config.run.train.precision),
                                                parse_device(config.run.device));
  result->initialize(0);
  return result;
}

/// Flops of the linear layers per token, forward.
double linear_flops_per_token(const LanguageModel& model) {
  double mixers = 0.0;
  for (const LayerConfig& layer : model.config().expanded_layers()) {
    mixers += layer.mixer->make(model.config().d_model, 1)->flops_per_token();
    if (layer.mlp) mixers += layer.mlp->make(model.config().d_model, 1)->flops_per_token();
  }
  return model.flops_per_token() - mixers;
}

/// One random batch for each pass of a step.
std::vector<Batch> random_batches(const Config& config, int64_t vocab_size) {
  const Shape shape{config.run.sequences_per_pass(), config.run.data.length};
  std::vector<Batch> batches;
  for (int64_t pass = 0; pass < config.run.accumulation(); ++pass) {
    batches.push_back({random_tokens(shape, vocab_size, 1), random_tokens(shape, vocab_size, 2), {}, true});
  }
  return batches;
}

}  // namespace

std::string BenchReport::text() const {
  std::string result = fmt::format(
      "{:.0f} tokens/s  {:.2f} ms  peak {} of tensors, {} of the process  {} system allocations\n",
      tokens_per_second, step_ms, bytes_text(peak_bytes), bytes_text(peak_rss_bytes), system_allocations);
  if (peak_flops_per_second > 0.0) {
    result += fmt::format("the model's flops: {:.1f}% of the measured peak ({:.1f} TFLOP/s)\n",
                          100 * flops_share, 1e-12 * peak_flops_per_second);
  }
  if (gemm_share > 0.0) {
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
  nlohmann::ordered_json json{{"device", device},
                              {"tokens_per_second", tokens_per_second},
                              {"step_ms", step_ms},
                              {"peak_bytes", peak_bytes},
                              {"peak_rss_bytes", peak_rss_bytes},
                              {"system_allocations", system_allocations},
                              {"gemm_share", gemm_share},
                              {"block_share", block_share},
                              {"gemm_flops_per_second", gemm_flops_per_second},
                              {"peak_flops_per_second", peak_flops_per_second},
                              {"flops_share", flops_share}};
  for (const auto& [name, entry] : kernels) json["kernels_ms"][name] = 1e3 * entry.seconds;
  return json.dump();
}

BenchReport bench_training(const Config& config, int64_t n_steps) {
  set_n_threads(static_cast<int>(config.run.threads));
  const auto model = make_model(config);
  const Device device = model->device();
  const std::vector<Batch> batches = random_batches(config, model->vocab_size());
  const Tensor moment1 = zeros_like(model->parameters().values()), moment2 = zeros_like(moment1);
  TrainingStep training(*model, moment1, moment2, config.run,
                        should_use_graph(config.run, config.model, device));
  int64_t n_done = 0;
  const auto step = [&] {
    training.start(batches, config.run.optimizer.learning_rate, n_done, n_done + 1);
    training.finish();
    ++n_done;
  };
  for (int i = 0; i < warm_up_steps; ++i) step();

  BenchReport report;
  report.device = to_string(device);
  reset_peak_memory(device);
  const int64_t allocations_before = memory_statistics(device).system_allocations;
  std::vector<double> seconds;
  set_profiling(device.is_cpu());
  reset_profile();
  for (int64_t i = 0; i < n_steps; ++i) {
    const Clock::time_point start = Clock::now();
    step();
    seconds.push_back(seconds_since(start));
  }
  set_profiling(false);
  report.peak_rss_bytes = peak_rss_bytes();
  report.peak_bytes = memory_statistics(device).peak_bytes_in_use;
  report.system_allocations = memory_statistics(device).system_allocations - allocations_before;
  const double n_tokens = static_cast<double>(config.run.sequences_per_step() * config.run.data.length);
  report.step_ms = 1e3 * median(seconds);
  report.tokens_per_second = n_tokens / median(seconds);
  report.peak_flops_per_second = measured_peak(model->dtype(), device);
  report.flops_share =
      3.0 * model->flops_per_token() * report.tokens_per_second / report.peak_flops_per_second;
  if (device.is_cuda()) return report;

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
  report.gemm_flops_per_second = 3.0 * linear_flops_per_token(*model) * n_tokens / gemm_seconds;
  return report;
}

BenchReport bench_decoding(const Config& config, int64_t n_tokens) {
  set_n_threads(static_cast<int>(config.run.threads));
  const auto model = make_model(config);
  TokenStep decoder(*model);
  std::vector<float> logits =
      decoder.advance(random_tokens({16}, model->vocab_size(), 1).to_vector<int32_t>());
  const auto next = [&] {
    logits = decoder.advance(
        {static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin())});
  };
  for (int i = 0; i < 8; ++i) next();
  BenchReport report;
  const Device device = model->device();
  report.device = to_string(device);
  const int64_t allocations_before = memory_statistics(device).system_allocations;
  std::vector<double> seconds;
  for (int64_t i = 0; i < n_tokens; ++i) {
    const Clock::time_point start = Clock::now();
    next();
    seconds.push_back(seconds_since(start));
  }
  report.step_ms = 1e3 * median(seconds);
  report.tokens_per_second = 1.0 / median(seconds);
  report.system_allocations = memory_statistics(device).system_allocations - allocations_before;
  report.peak_bytes = memory_statistics(device).peak_bytes_in_use;
  report.peak_rss_bytes = peak_rss_bytes();
  return report;
}

std::string EngineReport::text() const {
  std::string result;
  for (const auto& [length, us] : us_per_token) {
    result += fmt::format("length {:>8}: {:.4f} us per token, forward + backward\n", length, us);
  }
  return result;
}

std::string EngineReport::json() const {
  nlohmann::ordered_json json{{"device", device}};
  for (const auto& [length, us] : us_per_token) json["us_per_token"][std::to_string(length)] = us;
  return json.dump();
}

EngineReport bench_engine(const Config& config) {
  set_n_threads(static_cast<int>(config.run.threads));
  const Device device = parse_device(config.run.device);
  const DType dtype = parse_precision(config.run.train.precision);
  constexpr int64_t d_state = 128, head_dim = 64;
  const int64_t n_heads = device.is_cpu() ? 8 : 32;
  const auto lengths =
      device.is_cpu() ? std::vector<int64_t>{1024, 8192, 65536} : std::vector<int64_t>{2048, 32768};
  EngineReport report;
  report.device = to_string(device);
  for (const int64_t length : lengths) {
    const int64_t batch = device.is_cpu() ? 1 : lengths.back() / length;
    const auto leaf = [&](const Tensor& tensor, DType as) {
      return Variable::leaf(tensor.to(as).to(device));
    };
    const Tensor log_decay = random_normal({batch, length, n_heads}, 4);
    for (int64_t i = 0; i < log_decay.numel(); ++i)
      log_decay.data<float>()[i] = -0.1f * std::abs(log_decay.data<float>()[i]);
    const MatrixStateInputs inputs{.q = leaf(random_normal({batch, length, 1, d_state}, 1), dtype),
                                   .k = leaf(random_normal({batch, length, 1, d_state}, 2), dtype),
                                   .v = leaf(random_normal({batch, length, n_heads, head_dim}, 3), dtype),
                                   .log_decay = leaf(log_decay, compute_dtype(dtype)),
                                   .value_scale = {},
                                   .skip = {},
                                   .initial_state = {},
                                   .resets = {}};
    const Tensor grad_y = random_normal({batch, length, n_heads, head_dim}, 5).to(dtype).to(device);
    const int64_t repeats = std::max<int64_t>(3, 65536 / (batch * length));
    std::vector<double> seconds;
    for (int64_t i = 0; i <= repeats; ++i) {
      if (device.is_cuda()) cuda::synchronize();
      const Clock::time_point start = Clock::now();
      Tape tape;
      const MatrixStateOutput out = chunked_matrix_state(inputs);
      tape.backward({out.y}, {grad_y});
      if (device.is_cuda()) cuda::synchronize();
      if (i > 0) seconds.push_back(seconds_since(start));
      for (const Variable& input : {inputs.q, inputs.k, inputs.v, inputs.log_decay})
        input.gradient().release();
    }
    report.us_per_token.emplace_back(length, 1e6 * median(seconds) / static_cast<double>(batch * length));
  }
  return report;
}

}  // namespace headwater

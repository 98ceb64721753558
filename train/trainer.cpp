#include "train/trainer.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <nlohmann/json.hpp>

#include "autograd/tape.h"
#include "core/memory.h"
#include "core/parallel.h"
#include "core/safetensors.h"
#include "ops/adamw/adamw.h"
#include "train/checkpoint_folder.h"
#include "train/evaluate.h"
#include "train/model_folder.h"
#include "train/schedule.h"
#include "train/tokenizer.h"

namespace headwater {
namespace {

constexpr const char* config_file = "config.yaml";
constexpr const char* optimizer_file = "optimizer.safetensors";
constexpr const char* carried_state_file = "state.safetensors";
constexpr const char* trainer_state_file = "trainer_state.json";
constexpr const char* trainer_state_format = "headwater-trainer/1";
constexpr uint64_t max_state_bytes = 1 << 20;
constexpr int64_t vocabulary_multiple = 16;
constexpr size_t steps_averaged = 20;

std::atomic<int> stop_requests{0};

extern "C" void on_stop_signal(int) {
  request_stop();
}

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Keys that decide what is computed: a run cannot be continued with others.
bool decides_the_run(const std::string& key) {
  for (const char* prefix : {"model.", "data.length", "data.packing", "train.seed", "train.batch",
                             "train.micro_batch", "train.state_passing", "train.precision"}) {
    if (key.rfind(prefix, 0) == 0) return true;
  }
  return false;
}

nlohmann::ordered_json identity_of(const TokenShard& shard) {
  return {{"path", shard.path().string()},
          {"n_tokens", shard.n_tokens()},
          {"content_hash", fmt::format("{:016x}", shard.info().content_hash)}};
}

/// config.run's options are complete only with the vocabulary of the data.
void set_vocabulary(Config& config, const TokenShard& shard) {
  if (config.model.vocab_size) return;
  const int64_t tokens = shard.info().vocab_size;
  config.model.vocab_size = (tokens + vocabulary_multiple - 1) / vocabulary_multiple * vocabulary_multiple;
}

}  // namespace

void request_stop() {
  if (stop_requests.fetch_add(1) > 0) _exit(130);
}

void install_stop_signals() {
  struct sigaction action {};
  action.sa_handler = on_stop_signal;
  sigemptyset(&action.sa_mask);
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaction(signal, &action, nullptr);
}

std::shared_ptr<const TokenShard> open_shard(const std::string& path, const std::string& name) {
  const Path given(path);
  auto shard = TokenShard::open(directory_exists(given) ? given / (name + ".bin") : given);
  shard->verify_contents();
  return shard;
}

Path resolve_checkpoint(const Path& path) {
  if (path_exists(path / weights_file)) return path;
  require(directory_exists(path), "{}: there is no such folder; give a run or a checkpoint", path.string());
  const std::optional<CheckpointInfo> latest = latest_checkpoint(path / "checkpoints");
  require(latest.has_value(),
          "{}: there is no checkpoint in it; give a run with checkpoints/, or a folder with {}",
          path.string(), weights_file);
  return latest->path;
}

Path intact_checkpoint(const Path& path) {
  const Path checkpoint = resolve_checkpoint(path);
  if (path_exists(checkpoint / "MANIFEST.json")) verify_checkpoint(checkpoint);
  return checkpoint;
}

Trainer::Trainer(Config config) : config_(std::move(config)) {
  config_.run.validate_for_training();
  set_n_threads(static_cast<int>(config_.run.threads));
  const DataConfig& data = config_.run.data;
  train_shard_ = open_shard(data.train, "train");
  if (!data.validation.empty()) validation_shard_ = open_shard(data.validation, "validation");
  set_vocabulary(config_, *train_shard_);
  for (const auto& shard : {train_shard_, validation_shard_}) {
    if (shard) shard->require_vocab_size(*config_.model.vocab_size);
  }
  const bool sequential = config_.run.train.state_passing;
  batches_ = std::make_unique<BatchSource>(
      train_shard_, BatchOptions{.length = data.length,
                                 .packing = sequential ? Packing::sequential : parse_packing(data.packing),
                                 .seed = static_cast<uint64_t>(config_.run.train.seed),
                                 .n_lanes = config_.run.sequences_per_step()});
  const Device device = parse_device(config_.run.device);
  const bool use_graph = should_use_graph(config_.run, config_.model, device);
  model_ =
      std::make_unique<LanguageModel>(config_.model, parse_precision(config_.run.train.precision), device);
  {
    const MemoryLabel label("the optimizer's moments");
    moment1_ = zeros_like(model_->parameters().values());
    moment2_ = zeros_like(model_->parameters().values());
  }
  training_step_ = std::make_unique<TrainingStep>(*model_, moment1_, moment2_, config_.run, use_graph);
}

Trainer::~Trainer() = default;

void Trainer::initialize() {
  model_->initialize(static_cast<uint64_t>(config_.run.train.seed));
}

std::string Trainer::summary() const {
  const int64_t n = model_->parameters().n_elements();
  const int64_t tokens = config_.run.sequences_per_step() * config_.run.data.length;
  const int64_t bytes_each = static_cast<int64_t>(size_of(model_->dtype()));
  return fmt::format(
      "{} parameters; {} of parameters, gradients and moments; state {} numbers per sequence; {} tokens per "
      "step in {} "
      "passes, about {:.2e} flops; {} training tokens, {} rows per epoch",
      n, bytes_text(4 * n * bytes_each), model_->state_size(), tokens, config_.run.accumulation(),
      6.0 * static_cast<double>(n) * static_cast<double>(tokens), train_shard_->n_tokens(),
      batches_->rows_per_epoch());
}

// ---- one step ------------------------------------------------------------------------------------------------------

StepReport Trainer::step() {
  const double start = now_seconds();
  const double learning_rate = learning_rate_at(config_.run.schedule, config_.run.optimizer.learning_rate,
                                                state_.step, config_.run.train.steps);
  const std::vector<Batch> batches = prefetched_.empty() ? next_batches() : std::move(prefetched_);
  training_step_->start(batches, learning_rate, state_.step, state_.n_updates + 1);
  state_.next_sample += config_.run.sequences_per_step();
  prefetched_.clear();
  // A GPU computes meanwhile.
  if (model_->device().is_cuda()) prefetched_ = next_batches();
  const StepResult result = training_step_->finish();

  state_.n_skipped += !result.applied;
  state_.skipped_in_row = result.applied ? 0 : state_.skipped_in_row + 1;
  state_.n_updates += result.applied;
  ++state_.step;

  StepReport report;
  report.skipped = !result.applied;
  report.step = state_.step;
  report.n_steps = config_.run.train.steps;
  report.loss = result.loss;
  report.gradient_norm = result.gradient_norm;
  report.learning_rate = learning_rate;
  report.step_seconds = now_seconds() - start;
  recent_step_seconds_.push_back(report.step_seconds);
  if (recent_step_seconds_.size() > steps_averaged) recent_step_seconds_.erase(recent_step_seconds_.begin());
  double sum = 0.0;
  for (const double seconds : recent_step_seconds_) sum += seconds;
  const double mean_seconds = sum / static_cast<double>(recent_step_seconds_.size());
  const int64_t tokens = config_.run.sequences_per_step() * config_.run.data.length;
  report.tokens_per_second = static_cast<double>(tokens) / mean_seconds;
  report.seconds_left = mean_seconds * static_cast<double>(report.n_steps - report.step);
  report.memory_bytes = memory_statistics(model_->device()).peak_bytes_in_use;
  return report;
}

/// One for each pass.
std::vector<Batch> Trainer::next_batches() {
  const int64_t rows = config_.run.sequences_per_pass();
  std::vector<Batch> batches;
  for (int64_t pass = 0; pass < config_.run.accumulation(); ++pass) {
    batches.push_back(batches_->batch(state_.next_sample + pass * rows, rows));
  }
  return batches;
}

std::string Trainer::first_non_finite_gradient() const {
  for (const Parameter& parameter : model_->parameters().parameters()) {
    if (!std::isfinite(
            sum_of_squares(parameter.variable->gradient().tensor().reshape({parameter.shape.numel()})))) {
      return "the gradient of " + parameter.name;
    }
  }
  return "the loss";
}

// ---- the run -------------------------------------------------------------------------------------------------------

void Trainer::run() {
  const Path folder(config_.run.run);
  log_ = std::make_unique<RunLog>(folder, state_.step);
  log_->info(summary());
  run_start_seconds_ = now_seconds();
  int64_t saved_step = -1;
  while (state_.step < config_.run.train.steps && stop_requests == 0 && !time_is_up()) {
    const StepReport report = step();
    after_step(report);
    if (state_.skipped_in_row > config_.run.train.max_skipped_steps) {
      const Path checkpoint = save_checkpoint();
      throw Error(ErrorKind::fell_short,
                  fmt::format("{} steps in a row had no finite loss or gradient ({}); the weights from "
                              "before them are in {}. "
                              "Lower optimizer.learning_rate, or raise schedule.warmup_steps",
                              state_.skipped_in_row, first_non_finite_gradient(), checkpoint.string()));
    }
    const int64_t every = config_.run.checkpoint.every;
    if (every > 0 && state_.step % every == 0) {
      save_checkpoint();
      saved_step = state_.step;
    }
    const int64_t eval_every = config_.run.eval.every;
    if (eval_every > 0 && state_.step % eval_every == 0 && state_.step < config_.run.train.steps)
      evaluate_now();
  }
  if (saved_step != state_.step) save_checkpoint();
  if (stop_requests > 0) {
    log_->info(fmt::format("stopped by a signal at step {}; go on with: headwater resume {}", state_.step,
                           folder.string()));
    return;
  }
  if (state_.step < config_.run.train.steps) {
    log_->info(fmt::format("time limit reached at step {}; go on with: headwater resume {}", state_.step,
                           folder.string()));
  }
  if (validation_shard_) evaluate_now();
}

void Trainer::after_step(const StepReport& report) {
  const bool show = report.step % config_.run.train.log_every == 0 || report.step == config_.run.train.steps;
  log_->step(report, show || report.skipped);
  if (report.skipped) {
    log_->warn(fmt::format(
        "step {} is skipped: {} is not finite (loss {}, gradient norm {}); {} skipped so far", report.step,
        first_non_finite_gradient(), report.loss, report.gradient_norm, state_.n_skipped));
  }
}

bool Trainer::time_is_up() const {
  const auto& limit = config_.run.train.time_limit_s;
  return limit.has_value() && now_seconds() - run_start_seconds_ >= *limit;
}

void Trainer::evaluate_now() {
  const EvalConfig& eval = config_.run.eval;
  const Evaluation result = evaluate(*model_, validation_shard_,
                                     {.length = config_.run.eval_length(),
                                      .batch = config_.run.sequences_per_pass(),
                                      .max_tokens = eval.tokens,
                                      .position_bins = eval.position_bins});
  log_->evaluation(
      state_.step, result.json(),
      fmt::format("validation loss {:.4f}, {:.4f} bits per byte", result.loss, result.bits_per_byte));
}

// ---- checkpoints ---------------------------------------------------------------------------------------------------

Path Trainer::save_checkpoint() {
  CheckpointWriter writer(Path(config_.run.run) / "checkpoints", state_.step);
  write_model(writer.folder(), *model_);
  const auto views = [&](const Tensor& flat, const std::string& prefix, std::vector<NamedTensor>& out) {
    for (const Parameter& parameter : model_->parameters().parameters()) {
      out.push_back({prefix + parameter.name, flat.view(parameter.offset, parameter.shape)});
    }
  };
  std::vector<NamedTensor> moments;
  views(moment1_, "moment1.", moments);
  views(moment2_, "moment2.", moments);
  write_safetensors(writer.path(optimizer_file), moments, {{"format", "pt"}});
  if (config_.run.train.state_passing) {
    const std::vector<LanguageModelState>& states = training_step_->carried();
    std::vector<NamedTensor> carried;
    for (size_t pass = 0; pass < states.size(); ++pass) {
      for (size_t layer = 0; layer < states[pass].size(); ++layer) {
        for (size_t i = 0; i < states[pass][layer].size(); ++i) {
          carried.push_back(
              {fmt::format("pass.{}.layer.{}.{}", pass, layer, i), states[pass][layer][i].value()});
        }
      }
    }
    write_safetensors(writer.path(carried_state_file), carried, {{"format", "pt"}});
  }
  const nlohmann::ordered_json json{
      {"format", trainer_state_format},          {"step", state_.step},
      {"n_updates", state_.n_updates},           {"next_sample", state_.next_sample},
      {"skipped_in_row", state_.skipped_in_row}, {"n_skipped", state_.n_skipped},
      {"train_data", identity_of(*train_shard_)}};
  write_file_atomically(writer.path(trainer_state_file), json.dump(2) + "\n");
  write_file_atomically(writer.path(config_file), config_.write());
  write_file_atomically(writer.path("tokenizer.json"), ByteTokenizer::json());
  const CheckpointInfo info = writer.commit();
  apply_retention(Path(config_.run.run) / "checkpoints", static_cast<int>(config_.run.checkpoint.keep_last),
                  config_.run.checkpoint.keep_every.value_or(0));
  if (log_) log_->info(fmt::format("saved {}", info.path.string()));
  return info.path;
}

void Trainer::load_checkpoint(const Path& checkpoint, bool accept_data_change) {
  verify_checkpoint(checkpoint);
  Config before = load_config((checkpoint / config_file).string(), {});
  const std::vector<std::string> differences = config_differences(before, config_, decides_the_run);
  std::string text;
  for (const std::string& line : differences) text += "\n  " + line;
  require(differences.empty(),
          "{} was trained with other options; a run cannot be continued with these changed:{}",
          checkpoint.string(), text);

  const Path state_path = checkpoint / trainer_state_file;
  const auto json = nlohmann::json::parse(read_text_file(state_path, max_state_bytes), nullptr, false);
  require(!json.is_discarded() && json.value("format", "") == trainer_state_format,
          "{}: its format is '{}'; this version reads {}", state_path.string(),
          json.is_object() ? json.value("format", "") : "", trainer_state_format);
  const auto now = identity_of(*train_shard_);
  const bool same_data = json["train_data"]["n_tokens"] == now["n_tokens"] &&
                         json["train_data"]["content_hash"] == now["content_hash"];
  require(
      same_data || accept_data_change,
      "{} holds other tokens than the run was trained on ({} tokens, hash {}; then {} tokens, hash {}); give "
      "--accept-data-change to go on with it",
      train_shard_->path().string(), now["n_tokens"].dump(), now["content_hash"].dump(),
      json["train_data"]["n_tokens"].dump(), json["train_data"]["content_hash"].dump());

  read_weights(checkpoint, *model_);
  const SafetensorsFile moments = SafetensorsFile::open(checkpoint / optimizer_file);
  for (const Parameter& parameter : model_->parameters().parameters()) {
    moment1_.view(parameter.offset, parameter.shape).copy_from(moments.tensor("moment1." + parameter.name));
    moment2_.view(parameter.offset, parameter.shape).copy_from(moments.tensor("moment2." + parameter.name));
  }
  if (config_.run.train.state_passing) {
    const SafetensorsFile file = SafetensorsFile::open(checkpoint / carried_state_file);
    std::vector<LanguageModelState>& states = training_step_->carried();
    states.assign(config_.run.accumulation(), {});
    const auto n_layers = config_.model.expanded_layers().size();
    for (size_t pass = 0; pass < states.size(); ++pass) {
      states[pass].resize(n_layers);
      for (size_t layer = 0; layer < n_layers; ++layer) {
        for (size_t i = 0;; ++i) {
          const std::string name = fmt::format("pass.{}.layer.{}.{}", pass, layer, i);
          if (!file.contains(name)) break;
          const Tensor stored = file.tensor(name);
          states[pass][layer].emplace_back(stored.clone().to(model_->device()));
        }
      }
    }
  }
  state_.step = json["step"];
  state_.n_updates = json["n_updates"];
  state_.next_sample = json["next_sample"];
  state_.skipped_in_row = 0;
  state_.n_skipped = json["n_skipped"];
}

// ---- the commands --------------------------------------------------------------------------------------------------

void train(Config config) {
  Trainer trainer(std::move(config));
  const Path folder(trainer.config().run.run);
  const std::optional<CheckpointInfo> earlier = latest_checkpoint(folder / "checkpoints");
  require(!earlier,
          "{} already holds a run, at step {}; continue it with: headwater resume {}, or choose another run=",
          folder.string(), earlier ? earlier->step : 0, folder.string());
  make_directories(folder);
  const RunLock lock(folder);
  write_file_atomically(folder / config_file, trainer.config().write());
  install_stop_signals();
  trainer.initialize();
  trainer.run();
}

void resume(const Path& run_folder, const std::vector<std::string>& overrides, const std::string& checkpoint,
            bool accept_data_change) {
  require(path_exists(run_folder / config_file), "{}: there is no {} in it; give the folder of a run",
          run_folder.string(), config_file);
  const RunLock lock(run_folder);
  Config config = load_config((run_folder / config_file).string(), overrides);
  config.run.run = run_folder.string();
  Trainer trainer(std::move(config));
  const Path chosen = checkpoint.empty() ? Path() : Path(checkpoint);
  if (!chosen.empty() || latest_checkpoint(run_folder / "checkpoints")) {
    trainer.load_checkpoint(chosen.empty() ? resolve_checkpoint(run_folder) : chosen, accept_data_change);
  } else {
    trainer.initialize();  // killed before its first checkpoint: from the beginning, with the same bits
  }
  write_file_atomically(run_folder / config_file, trainer.config().write());
  install_stop_signals();
  trainer.run();
}

}  // namespace headwater

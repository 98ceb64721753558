#include "train/training_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "autograd/tape.h"
#include "core/cuda/runtime.h"
#include "ops/adamw/adamw.h"

namespace headwater {
namespace {

// The first step sets libraries up, the second shows what memory a step takes.
constexpr int64_t plain_steps_before_recording = 2;

/// [begin, end) of the flat buffers, where all parameters have the same attributes.
struct ParameterRange {
  int64_t begin, end;
  ParameterAttributes attributes;
};

std::vector<ParameterRange> ranges_of(const ParameterStore& store) {
  std::vector<ParameterRange> ranges;
  for (const Parameter& parameter : store.parameters()) {
    const ParameterAttributes& attributes = parameter.attributes;
    const bool same = !ranges.empty() && ranges.back().attributes.weight_decay == attributes.weight_decay &&
                      ranges.back().attributes.learning_rate_scale == attributes.learning_rate_scale;
    if (!ranges.empty()) ranges.back().end = parameter.offset;
    if (!same) ranges.push_back({parameter.offset, parameter.offset, attributes});
  }
  if (!ranges.empty()) ranges.back().end = store.values().numel();
  return ranges;
}

int64_t count_targets(const std::vector<Batch>& batches) {
  int64_t n = 0;
  for (const Batch& batch : batches) {
    const int32_t* targets = batch.targets.data<int32_t>();
    n += std::count_if(targets, targets + batch.targets.numel(),
                       [](int32_t target) { return target != ignored_target; });
  }
  return n;
}

}  // namespace

/// Two pinned buffers in turn: one is read by the copy to the GPU while the host fills the other.
class TrainingStep::Staging {
 public:
  explicit Staging(int64_t n_numbers) {
    for (int32_t*& buffer : buffers_) {
      buffer =
          static_cast<int32_t*>(cuda::allocate_pinned(n_numbers * static_cast<int64_t>(sizeof(int32_t))));
    }
  }
  ~Staging() {
    for (int32_t* buffer : buffers_) cuda::release_pinned(buffer);
  }
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// The next buffer, to be filled from its beginning on.
  void turn() {
    turn_ = 1 - turn_;
    used_ = 0;
  }
  /// Copies `from` (on the host; zeros if undefined) to `to`.
  void copy(const Tensor& from, const Tensor& to) {
    int32_t* place = buffers_[turn_] + used_;
    used_ += to.numel();
    if (from.defined()) {
      std::memcpy(place, from.raw_data(), static_cast<size_t>(to.size_bytes()));
    } else {
      std::memset(place, 0, static_cast<size_t>(to.size_bytes()));
    }
    cuda::copy_to_device(to.raw_data(), place, to.size_bytes());
  }

 private:
  int32_t* buffers_[2] = {};
  int turn_ = 0;
  int64_t used_ = 0;
};

TrainingStep::TrainingStep(LanguageModel& model, const Tensor& moment1, const Tensor& moment2,
                           const RunConfig& config, bool use_graph)
    : model_(model),
      moment1_(moment1),
      moment2_(moment2),
      config_(config),
      use_graph_(use_graph),
      device_(model.device()) {
  const DType loss_dtype = compute_dtype(model.dtype());
  schedule_ = Tensor::zeros({4}, DType::f64, device_);
  plan_ = Tensor::zeros({5}, DType::f64, device_);
  square_sum_ = Tensor::zeros({1}, DType::f64, device_);
  n_targets_ = Tensor::zeros({}, DType::i64, device_);
  loss_ = Tensor::zeros({}, loss_dtype, device_);
  const int64_t n_passes = config.accumulation();
  carried_.resize(n_passes);
  next_carried_.resize(n_passes);
  if (device_.is_cpu()) return;
  const Shape shape{config.sequences_per_pass(), config.data.length};
  for (int64_t pass = 0; pass < n_passes; ++pass) {
    batches_.push_back({Tensor::zeros(shape, DType::i32, device_), Tensor::zeros(shape, DType::i32, device_),
                        Tensor::zeros(shape, DType::i32, device_), true});
  }
  staging_ = std::make_unique<Staging>(3 * n_passes * shape.numel());
}

TrainingStep::~TrainingStep() = default;

void TrainingStep::stage(const std::vector<Batch>& batches) {
  if (device_.is_cpu()) {
    batches_ = batches;
    return;
  }
  staging_->turn();
  for (size_t pass = 0; pass < batches.size(); ++pass) {
    staging_->copy(batches[pass].tokens, batches_[pass].tokens);
    staging_->copy(batches[pass].targets, batches_[pass].targets);
    staging_->copy(batches[pass].resets, batches_[pass].resets);
    batches_[pass].starts_fresh = batches[pass].starts_fresh;
  }
}

void TrainingStep::start(const std::vector<Batch>& batches, double learning_rate, int64_t step,
                         int64_t update) {
  step_ = step;
  stage(batches);
  n_targets_.copy_from(Tensor::from_vector<int64_t>({}, {std::max<int64_t>(1, count_targets(batches))}));
  const OptimizerConfig& optimizer = config_.optimizer;
  schedule_.copy_from(Tensor::from_vector<double>(
      {4}, {learning_rate, adamw_correction(optimizer.betas[0], update),
            adamw_correction(optimizer.betas[1], update), optimizer.max_grad_norm}));

  if (use_graph_ && n_plain_steps_ == plain_steps_before_recording && !graph_) {
    graph_ = std::make_unique<cuda::Graph>(device_, [this] { run(); });
  }
  if (graph_) {
    graph_->launch();
  } else {
    run();
    ++n_plain_steps_;
  }
}

StepResult TrainingStep::finish() {
  constexpr int apply = 4;
  StepResult result;
  result.applied = plan_.to_vector<double>()[apply] != 0.0;
  result.loss = loss_.to_vector<double>()[0];
  result.gradient_norm = std::sqrt(square_sum_.to_vector<double>()[0]);
  // A skipped step's states may hold the NaN that made it be skipped: the next one starts from those before.
  if (result.applied) carried_.swap(next_carried_);
  return result;
}

void TrainingStep::run() {
  model_.parameters().gradients().zero();
  loss_.zero();
  for (size_t pass = 0; pass < batches_.size(); ++pass) run_pass(pass);
  square_sum_.copy_from(sum_of_squares_of(model_.parameters().gradients()));
  update_parameters();
}

void TrainingStep::run_pass(size_t pass) {
  const Batch& batch = batches_[pass];
  const LanguageModelOptions options{
      .recompute_blocks = config_.train.recompute == "blocks",
      .dropout_seed = static_cast<uint64_t>(config_.train.seed),
      .dropout_offset = static_cast<uint64_t>(step_) * batches_.size() + static_cast<uint64_t>(pass),
      .dropout = true};
  Tape tape;
  LanguageModel::Hidden out = model_.forward(
      batch.tokens, batch.starts_fresh ? LanguageModelState{} : carried_[pass], batch.resets, options);
  const Variable loss = model_.loss(out.hidden, batch.targets, {.divisor_tensor = n_targets_}).loss;
  tape.backward(loss);
  add_in_place(loss_, loss.value());
  if (!config_.train.state_passing) return;
  for (MixerState& layer : out.state) {
    for (Variable& tensor : layer) tensor = tensor.detach();
  }
  next_carried_[pass] = std::move(out.state);
}

void TrainingStep::update_parameters() {
  plan_update(square_sum_, loss_, schedule_, plan_);
  const OptimizerConfig& optimizer = config_.optimizer;
  const ParameterStore& store = model_.parameters();
  for (const ParameterRange& range : ranges_of(store)) {
    const Shape shape{range.end - range.begin};
    const auto part = [&](const Tensor& flat) {
      return flat.defined() ? flat.view(range.begin, shape) : Tensor();
    };
    adamw_update_planned(part(store.values()), part(store.gradients()), part(moment1_), part(moment2_),
                         part(store.bf16_copy()),
                         {.beta1 = optimizer.betas[0],
                          .beta2 = optimizer.betas[1],
                          .epsilon = optimizer.epsilon,
                          .weight_decay = range.attributes.weight_decay ? optimizer.weight_decay : 0.0,
                          .learning_rate_scale = range.attributes.learning_rate_scale},
                         plan_);
  }
}

bool should_use_graph(const RunConfig& config, const LanguageModelConfig& model, Device device) {
  const std::string& wanted = config.train.cuda_graph;
  if (wanted == "off" || (wanted == "auto" && (device.is_cpu() || cuda::checks_every_launch()))) return false;
  std::string obstacle;
  if (device.is_cpu()) obstacle = "device is cpu";
  if (config.train.state_passing) obstacle = "train.state_passing hands tensors from step to step";
  if (model.drop_prob > 0.0) obstacle = "model.drop_prob draws other masks in each step";
  require(obstacle.empty() || wanted == "auto", "train.cuda_graph is on, but {}; use auto or off", obstacle);
  return obstacle.empty();
}

}  // namespace headwater

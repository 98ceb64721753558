// The trainer on a GPU, emulated where there is none: the CPU's numbers, with a recorded step and without.

#include <cmath>
#include <fstream>

#include "core/cuda/runtime.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/faulty_files.h"
#include "tests/gradient_check.h"
#include "train/evaluate.h"
#include "train/generate.h"
#include "train/prepare.h"
#include "train/token_step.h"
#include "train/trainer.h"

using namespace headwater;

namespace {

/// A folder with a small corpus and a config of a model that the emulator runs in a second.
class Workshop {
 public:
  Workshop() {
    std::ofstream text(folder_.path() / "text.txt");
    for (int verse = 0; verse < 60; ++verse)
      text << "verse " << verse << ": and the waters went out " << verse * 7 << "\n\n";
    text.close();
    prepare({.files = {folder_.path() / "text.txt"},
             .out = folder_.path() / "tokens",
             .validation_fraction = 0.1,
             .split = DocumentSplit::blank_line});
    std::ofstream config(folder_.path() / "config.yaml");
    config << "data: {train: " << (folder_.path() / "tokens").string()
           << ", validation: " << (folder_.path() / "tokens").string()
           << ", length: 19, packing: documents}\n"
           << "model:\n  d_model: 8\n  n_layers: 2\n  mixer: {type: mamba2, d_state: 5, head_dim: 4, "
              "chunk_len: 8}\n"
           << "train: {steps: 8, batch: 2, seed: 3}\n";
  }

  Config config(const std::string& run, std::vector<std::string> overrides = {}) const {
    overrides.push_back("run=" + (folder_.path() / run).string());
    return load_config((folder_.path() / "config.yaml").string(), overrides);
  }
  std::shared_ptr<const TokenShard> validation() const {
    return open_shard((folder_.path() / "tokens").string(), "validation");
  }

 private:
  TemporaryFolder folder_;
};

struct Losses {
  std::vector<double> losses;
  std::vector<float> weights;
};

Losses train_steps(const Workshop& workshop, std::vector<std::string> overrides, int n_steps = 5) {
  Trainer trainer(workshop.config("run", std::move(overrides)));
  trainer.initialize();
  Losses result;
  for (int i = 0; i < n_steps; ++i) result.losses.push_back(trainer.step().loss);
  result.weights = trainer.model().parameters().values().to_vector<float>();
  return result;
}

double worst_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0.0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]) / std::abs(b[i]));
  return worst;
}

}  // namespace

TEST_CASE("Trainer on cuda: the CPU's losses, recorded as a graph or not, bit for bit the same") {
  if (!has_cuda()) return;
  const Workshop workshop;
  const Losses cpu = train_steps(workshop, {});
  const Losses plain = train_steps(workshop, {"device=cuda", "train.cuda_graph=off"});
  const Losses recorded = train_steps(workshop, {"device=cuda", "train.cuda_graph=on"});
  // Five steps of AdamW, whose first steps divide small gradients by themselves.
  CHECK(worst_difference(plain.losses, cpu.losses) < 1e-4);
  CHECK(recorded.losses == plain.losses);
  CHECK(recorded.weights == plain.weights);
}

TEST_CASE("Trainer on cuda: accumulated passes, recomputed blocks, state passing") {
  if (!has_cuda()) return;
  const Workshop workshop;
  for (const std::vector<std::string>& options : {std::vector<std::string>{"train.micro_batch=1"},
                                                  {"train.recompute=blocks"},
                                                  {"train.state_passing=true", "data.packing=stream"},
                                                  {"model.drop_prob=0.2"}}) {
    INFO(options.front());
    std::vector<std::string> on_cuda = options;
    on_cuda.push_back("device=cuda");
    CHECK(worst_difference(train_steps(workshop, on_cuda, 4).losses,
                           train_steps(workshop, options, 4).losses) < 1e-4);
  }
}

TEST_CASE("Trainer on cuda: bf16 follows f32 and keeps f32 parameters") {
  if (!has_cuda()) return;
  const Workshop workshop;
  const std::vector<std::string> options{"device=cuda", "optimizer.learning_rate=0.002"};
  std::vector<std::string> bf16 = options;
  bf16.push_back("train.precision=bf16");
  const Losses reference = train_steps(workshop, options), rounded = train_steps(workshop, bf16);
  CHECK(worst_difference(rounded.losses, reference.losses) < 0.01);
  CHECK(rounded.losses != reference.losses);
}

TEST_CASE("Trainer on cuda: a step that is not finite is skipped, in a recorded step too") {
  if (!has_cuda()) return;
  const Workshop workshop;
  Trainer trainer(workshop.config("run", {"device=cuda", "train.cuda_graph=on"}));
  trainer.initialize();
  for (int i = 0; i < 3; ++i) CHECK_FALSE(trainer.step().skipped);
  const Tensor A_log = trainer.model().parameters().find("backbone.layers.1.mixer.A_log")->value;
  const Tensor good = A_log.clone();
  A_log.fill(std::nan(""));
  const std::vector<float> before = trainer.model().parameters().values().to_vector<float>();
  CHECK(trainer.step().skipped);
  const std::vector<float> after = trainer.model().parameters().values().to_vector<float>();
  for (size_t i = 0; i < before.size(); ++i) {
    REQUIRE((before[i] == after[i] || (std::isnan(before[i]) && std::isnan(after[i]))));
  }
  A_log.copy_from(good);
  CHECK_FALSE(trainer.step().skipped);
  CHECK(trainer.state().n_updates == 4);
}

TEST_CASE("Trainer on cuda: a checkpoint of either device goes on on the other") {
  if (!has_cuda()) return;
  const Workshop workshop;
  Trainer cuda(workshop.config("cuda", {"device=cuda"}));
  cuda.initialize();
  for (int i = 0; i < 2; ++i) cuda.step();
  const Path checkpoint = cuda.save_checkpoint();
  Trainer cpu(workshop.config("cpu"));
  cpu.load_checkpoint(checkpoint, false);
  CHECK(cpu.step().loss == Approx(cuda.step().loss).epsilon(1e-4));
  Trainer again(workshop.config("again", {"device=cuda"}));
  again.load_checkpoint(cpu.save_checkpoint(), false);
  CHECK(again.step().loss == Approx(cpu.step().loss).epsilon(1e-4));
}

TEST_CASE("cuda: evaluates and decodes as the CPU does") {
  if (!has_cuda()) return;
  const Workshop workshop;
  const auto run = [&](const std::string& device) {
    Trainer trainer(workshop.config("run", {"device=" + device}));
    trainer.initialize();
    std::string text;
    generate(trainer.model(), "and the waters", {.n_tokens = 12, .temperature = 0.0},
             [&](const std::string& piece) { text += piece; });
    const auto shard = workshop.validation();
    return std::make_pair(
        text, std::vector<double>{evaluate(trainer.model(), shard, {.length = 17}).loss,
                                  evaluate(trainer.model(), shard, {.length = 29, .stream = true}).loss});
  };
  const auto [cpu_text, cpu_losses] = run("cpu");
  const auto [cuda_text, cuda_losses] = run("cuda");
  CHECK(cuda_text == cpu_text);
  CHECK(worst_difference(cuda_losses, cpu_losses) < 1e-5);
}

TEST_CASE("cuda: a decoded token, recorded as a graph, has the logits of the whole sequence") {
  if (!has_cuda()) return;
  const Workshop workshop;
  Trainer trainer(workshop.config("run", {"device=cuda"}));
  trainer.initialize();
  const LanguageModel& model = trainer.model();
  const std::vector<int32_t> tokens{3, 1, 4, 1, 5, 9, 2, 6};
  TokenStep stepwise(model);
  std::vector<float> last;
  for (const int32_t token : tokens) last = stepwise.advance({token});
  const std::vector<float> whole = TokenStep(model).advance(tokens);
  for (size_t i = 0; i < whole.size(); ++i) REQUIRE(last[i] == Approx(whole[i]).epsilon(1e-4).margin(1e-5));
  // A longer piece in between starts from the recorded steps' state.
  const std::vector<float> after = stepwise.advance({7, 8, 9});
  const std::vector<float> expected = TokenStep(model).advance({3, 1, 4, 1, 5, 9, 2, 6, 7, 8, 9});
  for (size_t i = 0; i < after.size(); ++i)
    REQUIRE(after[i] == Approx(expected[i]).epsilon(1e-4).margin(1e-5));
}

TEST_CASE("Trainer on cuda: what does not go together is refused") {
  const Workshop workshop;
  const auto refusal = [&](std::vector<std::string> overrides) {
    return input_error_of([&] { Trainer(workshop.config("run", std::move(overrides))); });
  };
  CHECK(refusal({"train.precision=bf16"}) == "train.precision is bf16, which needs a GPU: device: cuda");
  CHECK(refusal({"train.cuda_graph=on"}) == "train.cuda_graph is on, but device is cpu; use auto or off");
  if (!has_cuda()) return;
  CHECK(refusal({"device=cuda", "train.precision=f64"}) ==
        "train.precision is f64, which only the CPU computes: device: cpu");
  CHECK(refusal({"device=cuda", "train.cuda_graph=on", "model.drop_prob=0.1"}) ==
        "train.cuda_graph is on, but model.drop_prob draws other masks in each step; use auto or off");
  if (cuda::backend() == cuda::Backend::emulated) {
    CHECK_THROWS_WITH(parse_device("cuda:1"), "there is no GPU 1: this build emulates one, cuda:0");
  }
}

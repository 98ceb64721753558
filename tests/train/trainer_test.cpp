#include "train/trainer.h"

#include <cmath>
#include <fstream>

#include "core/memory.h"
#include "core/parallel.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/faulty_files.h"
#include "train/checkpoint_folder.h"
#include "train/evaluate.h"
#include "train/generate.h"
#include "train/model_folder.h"
#include "train/prepare.h"

using namespace headwater;

namespace {

/// A folder with a small corpus, and configs that train on it in milliseconds.
class Workshop {
 public:
  Workshop() {
    std::ofstream text(folder_.path() / "text.txt");
    for (int verse = 0; verse < 200; ++verse)
      text << "verse " << verse << ": and the waters went out " << verse * 7 << "\n\n";
    text.close();
    prepare({.files = {folder_.path() / "text.txt"},
             .out = folder_.path() / "tokens",
             .validation_fraction = 0.1,
             .split = DocumentSplit::blank_line});
    std::ofstream config(folder_.path() / "config.yaml");
    config << "data: {train: " << (folder_.path() / "tokens").string()
           << ", validation: " << (folder_.path() / "tokens").string()
           << ", length: 33, packing: documents}\n"
           << "model:\n  d_model: 12\n  n_layers: 2\n  mixer: {type: mamba2, d_state: 5, head_dim: 6, "
              "chunk_len: 8}\n"
           << "train: {steps: 6, batch: 4, seed: 3}\n"
           << "checkpoint: {every: 2, keep_last: 10}\n";
  }

  Path path(const std::string& name) const { return folder_.path() / name; }
  Config config(const std::string& run, std::vector<std::string> overrides = {}) const {
    overrides.push_back("run=" + path(run).string());
    return load_config(path("config.yaml").string(), overrides);
  }

 private:
  TemporaryFolder folder_;
};

/// The bytes of the weights and of the optimizer's moments at `step` of a run.
std::string saved_bytes(const Path& run, int64_t step) {
  const Path checkpoint = run / "checkpoints" / checkpoint_name(step);
  return read_text_file(checkpoint / weights_file, 1 << 24) +
         read_text_file(checkpoint / "optimizer.safetensors", 1 << 24);
}

void copy_checkpoint(const Path& from_run, const Path& to_run, int64_t step) {
  make_directories(to_run / "checkpoints");
  std::filesystem::copy(from_run / "checkpoints" / checkpoint_name(step),
                        to_run / "checkpoints" / checkpoint_name(step));
  std::filesystem::copy(from_run / "config.yaml", to_run / "config.yaml");
}

}  // namespace

TEST_CASE("Trainer: same config, same bits") {
  const Workshop workshop;
  train(workshop.config("a"));
  train(workshop.config("b"));
  CHECK(saved_bytes(workshop.path("a"), 6) == saved_bytes(workshop.path("b"), 6));
}

TEST_CASE("Trainer: resuming from any checkpoint continues bit for bit") {
  const Workshop workshop;
  const std::vector<std::vector<std::string>> variants{
      {},
      {"train.micro_batch=2", "model.drop_prob=0.1"},
      {"data.packing=stream", "train.state_passing=true", "train.micro_batch=2"},
      {"train.recompute=blocks", "model.tie_embeddings=false", "model.d_intermediate=10"}};
  int variant_number = 0;
  for (const auto& overrides : variants) {
    const std::string whole = fmt::format("whole{}", variant_number++);
    train(workshop.config(whole, overrides));
    for (const int64_t step : {2, 4}) {
      INFO("variant " << whole << ", resumed at step " << step);
      const Path resumed = workshop.path(fmt::format("{}-resumed{}", whole, step));
      copy_checkpoint(workshop.path(whole), resumed, step);
      resume(resumed, {}, "", false);
      CHECK(saved_bytes(resumed, 6) == saved_bytes(workshop.path(whole), 6));
    }
  }
}

TEST_CASE("Trainer: passes of an accumulated step equal one pass") {
  const Workshop workshop;
  const auto weights_after = [&](const std::string& run, const std::string& override) {
    Trainer trainer(workshop.config(run, {override, "train.precision=f64"}));
    trainer.initialize();
    trainer.step();
    return trainer.model().parameters().values().to_vector<double>();
  };
  const std::vector<double> one = weights_after("one", "train.micro_batch=4");
  const std::vector<double> four = weights_after("four", "train.micro_batch=1");
  for (size_t i = 0; i < one.size(); ++i) REQUIRE(one[i] == Approx(four[i]).epsilon(1e-9).margin(1e-9));
}

TEST_CASE("Trainer: recomputed blocks give the same bits") {
  const Workshop workshop;
  const auto weights_after = [&](const std::string& mode) {
    Trainer trainer(workshop.config(mode, {"train.recompute=" + mode}));
    trainer.initialize();
    trainer.step();
    return trainer.model().parameters().values().to_vector<float>();
  };
  CHECK(weights_after("none") == weights_after("blocks"));
}

TEST_CASE("Trainer: the loss falls") {
  const Workshop workshop;
  Trainer trainer(workshop.config("run", {"train.steps=40", "optimizer.learning_rate=0.01"}));
  trainer.initialize();
  const double first = trainer.step().loss;
  for (int i = 0; i < 38; ++i) trainer.step();
  CHECK(first == Approx(std::log(272.0)).epsilon(0.05));
  CHECK(trainer.step().loss < 0.7 * first);
}

TEST_CASE("Trainer: after the warm-up a step asks the system for no memory") {
  const Workshop workshop;
  Trainer trainer(workshop.config("run", {"data.packing=stream"}));
  trainer.initialize();
  for (int i = 0; i < 3; ++i) trainer.step();
  const int64_t before = memory_statistics().system_allocations;
  for (int i = 0; i < 3; ++i) trainer.step();
  CHECK(memory_statistics().system_allocations == before);
}

TEST_CASE(
    "Trainer: a step that is not finite is skipped, too many stop the run with a checkpoint from before") {
  const Workshop workshop;
  Trainer trainer(workshop.config("run", {"train.max_skipped_steps=2", "train.steps=50"}));
  trainer.initialize();
  trainer.step();
  const Parameter* parameter = trainer.model().parameters().find("backbone.layers.1.mixer.A_log");
  const std::vector<float> before = trainer.model().parameters().values().to_vector<float>();
  parameter->variable->value().data<float>()[0] = NAN;
  const StepReport report = trainer.step();
  CHECK(report.skipped);
  CHECK(trainer.state().n_updates == 1);
  parameter->variable->value().data<float>()[0] = before[parameter->offset];
  CHECK(trainer.model().parameters().values().to_vector<float>() == before);

  parameter->variable->value().data<float>()[0] = NAN;
  make_directories(workshop.path("run"));
  try {
    trainer.run();
    FAIL("the run should have stopped");
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::fell_short);
    CHECK_THAT(error.what(), ContainsSubstring("3 steps in a row had no finite loss or gradient"));
    CHECK_THAT(error.what(), ContainsSubstring("Lower optimizer.learning_rate"));
  }
  CHECK(latest_checkpoint(workshop.path("run") / "checkpoints")->step == trainer.state().step);
}

TEST_CASE("Trainer: a skipped step does not poison the states that are passed on") {
  const Workshop workshop;
  Trainer trainer(workshop.config("run", {"data.packing=stream", "train.state_passing=true"}));
  trainer.initialize();
  trainer.step();
  float* A_log =
      trainer.model().parameters().find("backbone.layers.0.mixer.A_log")->variable->value().data<float>();
  const float before = A_log[0];
  A_log[0] = NAN;
  CHECK(trainer.step().skipped);
  A_log[0] = before;
  CHECK_FALSE(trainer.step().skipped);
}

TEST_CASE("Trainer: what does not fit a checkpoint is listed, each difference") {
  const Workshop workshop;
  train(workshop.config("run"));
  const std::string text = input_error_of([&] {
    resume(workshop.path("run"), {"model.d_model=24", "data.length=65", "train.steps=8"}, "", false);
  });
  CHECK_THAT(text, ContainsSubstring("a run cannot be continued with these changed"));
  CHECK_THAT(text, ContainsSubstring("\n  data.length: 33 -> 65"));
  CHECK_THAT(text, ContainsSubstring("\n  model.d_model: 12 -> 24"));
  CHECK_THAT(text, !ContainsSubstring("train.steps"));
  // More steps are no obstacle.
  resume(workshop.path("run"), {"train.steps=8"}, "", false);
  CHECK(latest_checkpoint(workshop.path("run") / "checkpoints")->step == 8);
}

TEST_CASE("Trainer: other tokens than before are refused unless accepted") {
  const Workshop workshop;
  train(workshop.config("run"));
  const std::string text = read_text_file(workshop.path("text.txt"), 1 << 20);
  std::ofstream(workshop.path("text.txt")) << "one verse more\n\n" << text;
  prepare({.files = {workshop.path("text.txt")},
           .out = workshop.path("tokens"),
           .validation_fraction = 0.1,
           .split = DocumentSplit::blank_line});
  CHECK_THAT(input_error_of([&] { resume(workshop.path("run"), {"train.steps=8"}, "", false); }),
             ContainsSubstring("holds other tokens than the run was trained on"));
  resume(workshop.path("run"), {"train.steps=8"}, "", true);
}

TEST_CASE("Trainer: a damaged checkpoint is named and the one before offered") {
  const Workshop workshop;
  train(workshop.config("run"));
  const Path weights = workshop.path("run") / "checkpoints" / checkpoint_name(6) / weights_file;
  std::string bytes = read_text_file(weights, 1 << 24);
  bytes[bytes.size() - 5] = static_cast<char>(bytes[bytes.size() - 5] ^ 1);
  std::ofstream(weights, std::ios::binary) << bytes;
  const std::string text =
      input_error_of([&] { resume(workshop.path("run"), {"train.steps=8"}, "", false); });
  CHECK_THAT(text, ContainsSubstring("model.safetensors"));
  CHECK_THAT(text, ContainsSubstring(checkpoint_name(4)));
}

TEST_CASE("Trainer: train refuses a folder that holds a run") {
  const Workshop workshop;
  train(workshop.config("run"));
  CHECK_THAT(input_error_of([&] { train(workshop.config("run")); }),
             ContainsSubstring("already holds a run, at step 6; continue it with: headwater resume"));
}

TEST_CASE("model folder: written, read, and read again as Hugging Face's keys alone") {
  const Workshop workshop;
  train(workshop.config("run"));
  const Path checkpoint = resolve_checkpoint(workshop.path("run"));
  const auto model = read_model(checkpoint);
  const auto shard = open_shard(workshop.path("tokens").string(), "validation");
  const double loss = evaluate(*model, shard, {.length = 33}).loss;
  // Without Headwater's own record, as another tool would have written it.
  const Path config = checkpoint / model_config_file;
  std::string text = read_text_file(config, 1 << 20);
  const size_t begin = text.find(",\n  \"headwater_model\"");
  REQUIRE(begin != std::string::npos);
  text.erase(begin, text.rfind('}') - begin);
  write_file_atomically(config, text);
  // The other layout does not carry chunk_len's meaning for speed; another chunk_len rounds otherwise.
  CHECK(evaluate(*read_model(checkpoint), shard, {.length = 33}).loss == Approx(loss).epsilon(1e-6));
}

TEST_CASE("model folder: every misfit is listed at once") {
  const Workshop workshop;
  train(workshop.config("run"));
  LanguageModelConfig config = read_model_config(resolve_checkpoint(workshop.path("run")));
  config.d_model = 24;
  config.n_layers = 3;
  LanguageModel model(config, DType::f32);
  const std::string text =
      input_error_of([&] { read_weights(resolve_checkpoint(workshop.path("run")), model); });
  CHECK_THAT(text, ContainsSubstring("backbone.embeddings.weight is (272, 12), the model needs (272, 24)"));
  CHECK_THAT(text, ContainsSubstring("backbone.layers.2.norm.weight is missing; the model needs (24)"));
}

TEST_CASE("evaluate: rows, streams of any piece length, and bins agree") {
  const Workshop workshop;
  Trainer trainer(workshop.config("run"));
  trainer.initialize();
  for (int i = 0; i < 5; ++i) trainer.step();
  const auto shard = open_shard(workshop.path("tokens").string(), "validation");
  const Evaluation whole = evaluate(trainer.model(), shard, {.length = shard->n_tokens(), .batch = 1});
  for (const int64_t length : {1, 7, 64}) {
    const Evaluation stream = evaluate(trainer.model(), shard, {.length = length, .stream = true});
    CHECK(stream.loss == Approx(whole.loss).epsilon(1e-5));
    CHECK(stream.n_targets == whole.n_targets);
  }
  const Evaluation rows = evaluate(trainer.model(), shard, {.length = 20, .position_bins = 4});
  double sum = 0.0;
  for (const PositionBin& bin : rows.bins) sum += bin.loss * static_cast<double>(bin.n_targets);
  CHECK(sum / static_cast<double>(rows.n_targets) == Approx(rows.loss).epsilon(1e-12));
  CHECK(rows.perplexity() == Approx(std::exp(rows.loss)));
  CHECK(rows.bits_per_byte >= rows.loss / std::log(2.0));
}

TEST_CASE("generate: same seed, same text; greedy; only bytes and the end of a document") {
  const Workshop workshop;
  Trainer trainer(workshop.config("run"));
  trainer.initialize();
  const auto text_of = [&](const std::string& prompt, const GenerateOptions& options) {
    std::string text;
    generate(trainer.model(), prompt, options, [&](const std::string& piece) { text += piece; });
    return text;
  };
  const GenerateOptions options{.n_tokens = 40, .seed = 5, .stop_at_end = false};
  CHECK(text_of("and", options) == text_of("and", options));
  CHECK(text_of("and", options) != text_of("and", {.n_tokens = 40, .seed = 6, .stop_at_end = false}));
  const GenerateOptions greedy{.n_tokens = 20, .temperature = 0.0, .stop_at_end = false};
  CHECK(text_of("and", greedy) == text_of("and", greedy));
  CHECK_THAT(input_error_of([&] { text_of("", {.temperature = -1.0}); }),
             ContainsSubstring("--temperature is -1"));

  const std::vector<float> logits{1.0f, 3.0f, 2.0f, 9.0f};
  CHECK(draw_token(logits.data(), 3, {.temperature = 0.0}, 0) == 1);
  for (int position = 0; position < 50; ++position) {
    CHECK(draw_token(logits.data(), 3, {.temperature = 5.0, .top_k = 2}, position) != 0);
    CHECK(draw_token(logits.data(), 3, {.temperature = 1.0, .top_p = 0.5}, position) == 1);
  }
}

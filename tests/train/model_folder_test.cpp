#include "train/model_folder.h"

#include "core/safetensors.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"

using namespace headwater;

namespace {

// A model that the transformers package (5.23.0) drew at random, its tokens and its logits;
// bench/peers/logits_check.py makes such folders.
const Path recorded = Path(HEADWATER_SOURCE_DIR) / "tests" / "recorded" / "hugging_face_mamba2";

}  // namespace

TEST_CASE("model folder: a Hugging Face Mamba-2 model gives the transformers package's logits") {
  const auto model = read_model(recorded);
  const SafetensorsFile expected = SafetensorsFile::open(recorded / "expected.safetensors");
  const Tensor tokens = expected.tensor("tokens").to(DType::i32);
  const Variable logits = model->logits(model->forward(tokens, {}, {}).hidden);
  CHECK(relative_error(logits.value(), expected.tensor("logits")) < 1e-4);
}

TEST_CASE("model folder: decoding token by token gives the same logits") {
  const auto model = read_model(recorded);
  const SafetensorsFile expected = SafetensorsFile::open(recorded / "expected.safetensors");
  const Tensor tokens = expected.tensor("tokens").to(DType::i32);
  LanguageModelState state;
  for (int64_t t = 0; t < tokens.dim(1); ++t) {
    LanguageModel::Hidden out = model->forward(steps_of(tokens, t, t + 1), state, {});
    state = out.state;
    CHECK(relative_error(model->logits(out.hidden).value(), steps_of(expected.tensor("logits"), t, t + 1)) <
          1e-4);
  }
}

TEST_CASE("model folder: imported and exported again, every tensor has the same bits") {
  const TemporaryFolder folder;
  write_model(folder.path(), *read_model(recorded));
  const SafetensorsFile before = SafetensorsFile::open(recorded / weights_file);
  const SafetensorsFile after = SafetensorsFile::open(folder.path() / weights_file);
  CHECK(before.names() == after.names());
  for (const std::string& name : before.names()) {
    CHECK(before.bytes(before.entry(name)) == after.bytes(after.entry(name)));
  }
}

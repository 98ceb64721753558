#include "train/verify.h"

#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include "core/safetensors.h"
#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/faulty_files.h"
#include "train/golden.h"

using namespace headwater;

namespace {

Path golden_path(const std::string& name) {
  return Path(HEADWATER_SOURCE_DIR) / "tests/golden" / (name + ".safetensors");
}

/// A golden case to be changed and written elsewhere.
struct EditableCase {
  explicit EditableCase(const std::string& name) {
    const SafetensorsFile file = SafetensorsFile::open(golden_path(name));
    metadata = file.metadata();
    for (const std::string& tensor : file.names()) tensors[tensor] = file.tensor(tensor).clone();
  }

  void write(const Path& path) const {
    std::vector<NamedTensor> list;
    for (const auto& [name, tensor] : tensors) list.push_back({name, tensor});
    write_safetensors(path, list, metadata);
  }

  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;
};

/// The text of the input error that verify has for a changed case, without the folder.
std::string error_of(const std::string& name, const std::function<void(EditableCase&)>& change) {
  const TemporaryFolder folder;
  const Path path = folder.path() / "case.safetensors";
  EditableCase edited(name);
  change(edited);
  edited.write(path);
  std::string text = input_error_of([&] { verify({path}); });
  const std::string prefix = folder.path().string() + "/";
  const size_t at = text.find(prefix);
  return at == 0 ? text.substr(prefix.size()) : text;
}

VerifiedFile verify_changed(const std::string& name, const std::function<void(EditableCase&)>& change) {
  const TemporaryFolder folder;
  EditableCase edited(name);
  change(edited);
  edited.write(folder.path() / "case.safetensors");
  return verify({folder.path()}).files.at(0);
}

const std::vector<std::string>& built_cases() {
  static const std::vector<std::string> names = {
      "attention-basic",
      "attention-documents",
      "attention-gqa",
      "attention-window",
      "causal_conv1d-documents",
      "causal_conv1d-short",
      "causal_conv1d-silu",
      "chunked_matrix_state-none",
      "chunked_matrix_state-scalar_constant",
      "chunked_matrix_state-scalar_data",
      "mamba2-basic",
      "mamba2-documents",
      "mamba2-init_states",
      "mamba2-options",
      "ssd-documents",
      "ssd-groups",
      "ssd-states",
  };
  return names;
}

}  // namespace

TEST_CASE("verify: every case of what is built passes in every form, in f32 and f64") {
  for (const DType dtype : {DType::f32, DType::f64}) {
    for (const std::string& name : built_cases()) {
      const VerifyReport report = verify({golden_path(name)}, {.dtype = dtype});
      INFO(name << " in " << name_of(dtype) << "\n" << report.text());
      CHECK(report.n_passed() == 1);
      CHECK(report.ok(false));
    }
  }
}

TEST_CASE("verify: forms and tensors") {
  const VerifiedFile file = verify({golden_path("mamba2-basic")}).files.at(0);
  std::set<std::string> forms, tensors;
  for (const VerifyRow& row : file.rows) {
    forms.insert(row.form);
    tensors.insert(row.tensor);
  }
  CHECK(forms == std::set<std::string>{"chunked", "chunked 1", "chunked 16", "parallel", "recurrent",
                                       "pieces", "steps", "decode"});
  // y, two states, the gradient of x, eight parameters.
  CHECK(tensors.size() == 12);
  // Decoding records nothing: no gradients there.
  CHECK(file.rows.size() == 7 * 12 + 3);
  const VerifiedFile convolution = verify({golden_path("causal_conv1d-silu")}).files.at(0);
  forms.clear();
  for (const VerifyRow& row : convolution.rows) forms.insert(row.form);
  CHECK(forms == std::set<std::string>{"whole", "pieces", "steps", "decode"});
}

TEST_CASE("verify: a folder stands for its cases, and what is not built is counted") {
  const VerifyReport report = verify({golden_path("").parent_path()});
  CHECK(report.n_failed() == 0);
  CHECK(report.n_passed() >= static_cast<int64_t>(built_cases().size()));
  CHECK(report.n_passed() + report.n_unsupported() == static_cast<int64_t>(report.files.size()));
  for (const VerifiedFile& file : report.files) CHECK(file.unsupported.empty() == file.passed());
  if (report.n_unsupported() > 0) CHECK(!report.ok(false));
  CHECK(report.ok(true));
  CHECK_THAT(report.text(),
             ContainsSubstring(fmt::format("{} files: {} passed, 0 failed, {} unsupported",
                                           report.files.size(), report.n_passed(), report.n_unsupported())));
}

TEST_CASE("verify: an unknown target is unsupported, with the reason") {
  const VerifiedFile file =
      verify_changed("ssd-groups", [](EditableCase& edited) { edited.metadata["target"] = "op:no_such"; });
  CHECK(file.unsupported == "op:no_such is not built yet");
  CHECK(!file.passed());
  const VerifiedFile decay = verify_changed("chunked_matrix_state-none", [](EditableCase& edited) {
    std::string& config = edited.metadata["config"];
    config.replace(config.find("\"none\""), 6, "\"vector_data_complex\"");
  });
  CHECK(decay.unsupported == "decay vector_data_complex is not built yet");
}

TEST_CASE("verify: one wrong number in any kind of tensor fails and is named, in every form") {
  for (const char* tensor : {"output.y", "output.final_ssm_state", "output.final_conv_state", "grad_input.x",
                             "grad_param.A_log", "grad_param.conv1d.weight"}) {
    INFO(tensor);
    const VerifiedFile file = verify_changed("mamba2-basic", [&](EditableCase& edited) {
      float* values = edited.tensors[tensor].data<float>();
      values[3] += 1.0f;
    });
    CHECK(!file.passed());
    std::set<std::string> failed, forms;
    for (const VerifyRow& row : file.rows) {
      if (!row.passed()) failed.insert(row.tensor);
      if (!row.passed()) forms.insert(row.form);
    }
    CHECK(failed == std::set<std::string>{tensor});
    CHECK(forms.size() == (std::string(tensor).rfind("grad", 0) == 0 ? 7 : 8));
    const VerifyReport report{{file}};
    CHECK(report.n_failed() == 1);
    CHECK(!report.ok(true));
    CHECK_THAT(report.text(), ContainsSubstring("FAIL") && ContainsSubstring("1 files: 0 passed, 1 failed"));
  }
}

TEST_CASE("verify: a wrong input or parameter is noticed") {
  for (const char* tensor : {"input.x", "param.dt_bias", "param.norm.weight", "grad_output.y"}) {
    INFO(tensor);
    CHECK(!verify_changed("mamba2-basic", [&](EditableCase& edited) {
             edited.tensors[tensor].data<float>()[1] += 1.0f;
           }).passed());
  }
  CHECK(!verify_changed("ssd-documents", [](EditableCase& edited) {
           const Tensor& documents = edited.tensors["input.seq_idx"];
           documents.fill(0);
         }).passed());
}

TEST_CASE("verify: a NaN of ours fails") {
  VerifiedFile file{"x", "op:ssd", "", {{"chunked", "output.y", 0.5, 1.0}}};
  CHECK(file.passed());
  file.rows.push_back({"steps", "output.y", std::numeric_limits<double>::quiet_NaN(), 1.0});
  CHECK(!file.passed());
  CHECK(file.worst()->form == "steps");
  // Numbers so large that the kernels overflow.
  const VerifiedFile overflown = verify_changed("ssd-states", [](EditableCase& edited) {
    edited.tensors["input.x"].fill(3e38);
    edited.tensors["input.C"].fill(3e38);
  });
  CHECK(!overflown.passed());
}

TEST_CASE("verify: metadata that is not a golden case's is refused by name") {
  const auto with = [](const std::string& key, const std::string& value) {
    return error_of("ssd-groups", [&](EditableCase& edited) { edited.metadata[key] = value; });
  };
  const auto without = [](const std::string& key) {
    return error_of("ssd-groups", [&](EditableCase& edited) { edited.metadata.erase(key); });
  };
  CHECK(with("format", "ssm-golden/2") ==
        "case.safetensors: its format is ssm-golden/2; this program reads ssm-golden/1");
  CHECK(without("format") == "case.safetensors: its metadata has no 'format'; a golden case has one");
  CHECK(without("target") == "case.safetensors: its metadata has no 'target'; a golden case has one");
  CHECK(with("rtol", "small") == "case.safetensors: metadata 'rtol' is small; it must be a number >= 0");
  CHECK(with("atol", "-1") == "case.safetensors: metadata 'atol' is -1; it must be a number >= 0");
  CHECK(with("rtol", "NaN") == "case.safetensors: metadata 'rtol' is NaN; it must be a number >= 0");
  CHECK(with("config", "[]") == "case.safetensors: metadata 'config' must be a JSON object");
  CHECK_THAT(with("config", "{"), ContainsSubstring("case.safetensors: metadata 'config': "));
  CHECK_THAT(with("config", "{\"chunk_sise\": 8}"),
             ContainsSubstring("config.chunk_sise") && ContainsSubstring("chunk_size"));
}

TEST_CASE("verify: tensors that do not belong to the target are refused by name") {
  const auto changed = [](const std::string& name, const std::function<void(EditableCase&)>& change) {
    return error_of(name, change);
  };
  CHECK(changed("mamba2-basic",
                [](EditableCase& edited) {
                  edited.tensors.erase("param.D");
                  edited.tensors["param.E"] = Tensor::zeros({2}, DType::f32);
                  edited.tensors["param.A_log"] = Tensor::zeros({2}, DType::f32);
                }) ==
        "case.safetensors: param.A_log has shape (2), the mixer needs (7); param.D is missing; param.E is "
        "not a "
        "parameter of the mixer");
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["param.E"] = Tensor::zeros({2}, DType::f32);
        }) == "case.safetensors: op:ssd has no parameter param.E");
  CHECK(changed("ssd-groups", [](EditableCase& edited) { edited.tensors.erase("param.A"); }) ==
        "case.safetensors: param.A is missing");
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["input.u"] = Tensor::zeros({2}, DType::f32);
        }) == "case.safetensors: op:ssd has no input input.u");
  CHECK_THAT(changed("ssd-groups", [](EditableCase& edited) { edited.tensors.erase("input.dt"); }),
             ContainsSubstring("case.safetensors: ") && ContainsSubstring("input.dt"));
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["output.h"] = Tensor::zeros({2}, DType::f32);
        }) == "case.safetensors: op:ssd does not have output.h");
  CHECK(
      changed("ssd-groups",
              [](EditableCase& edited) { edited.tensors["notes"] = Tensor::zeros({2}, DType::f32); }) ==
      "case.safetensors: tensor 'notes' is none of input.*, param.*, output.*, grad_output.*, grad_input.*, "
      "grad_param.*");
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["output.y"] = Tensor::zeros({2, 64, 6}, DType::f32);
          edited.tensors.erase("grad_output.y");
        }) == "case.safetensors: output.y has shape (2, 64, 6); op:ssd gives shape (2, 64, 6, 5)");
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["grad_output.y"] = Tensor::zeros({2, 64, 6}, DType::f32);
        }) == "case.safetensors: grad_output.y has shape (2, 64, 6); the output has shape (2, 64, 6, 5)");
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["input.dt"] = Tensor::zeros({2, 64, 6}, DType::i64);
        }) == "case.safetensors: input.dt is i64; it must be f32 or f64");
  CHECK(changed("ssd-groups", [](EditableCase& edited) {
          edited.tensors["output.y"].data<float>()[5] = std::numeric_limits<float>::infinity();
        }) == "case.safetensors: output.y holds a number that is not finite; the file is damaged");
  CHECK(changed("ssd-documents", [](EditableCase& edited) {
          edited.tensors["input.seq_idx"].data<int64_t>()[64] = -3;
        }).find("case.safetensors: input.seq_idx falls from ") == 0);
  CHECK(changed("chunked_matrix_state-scalar_data", [](EditableCase& edited) {
          edited.tensors["input.reset"].data<int64_t>()[64] = 2;
        }) == "case.safetensors: input.reset holds 2; it must hold 0 and 1 only");
  CHECK_THAT(changed("ssd-groups",
                     [](EditableCase& edited) {
                       edited.tensors["param.A"] = Tensor::zeros({2}, DType::f32);
                       edited.tensors["grad_param.A"] = Tensor::zeros({2}, DType::f32);
                     }),
             ContainsSubstring("case.safetensors: step_size: A has shape (2)"));
  CHECK_THAT(changed("mamba2-basic",
                     [](EditableCase& edited) {
                       std::string& config = edited.metadata["config"];
                       config.replace(config.find("\"headdim\": 8"), 12, "\"headdim\": 9");
                     }),
             ContainsSubstring("case.safetensors: config.head_dim is 9; it must divide"));
}

TEST_CASE("verify: missing files and empty folders are refused") {
  const TemporaryFolder folder;
  CHECK_THAT(input_error_of([&] { verify({folder.path() / "none.safetensors"}); }),
             ContainsSubstring("none.safetensors"));
  CHECK(input_error_of([&] { verify({folder.path()}); }) ==
        folder.path().string() + ": the folder has no *.safetensors");
  CHECK(input_error_of([] { verify({}); }) == "verify: no golden files were given");
}

#include "train/verify.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "autograd/tape.h"
#include "core/error.h"
#include "train/golden.h"

namespace headwater {
namespace {

using Sequence = GoldenCase::Sequence;
using Feed = GoldenForm::Feed;
using NamedTensors = std::map<std::string, Tensor>;

/// A tensor seen as (outer, time, inner) around one axis.
struct TimeView {
  TimeView(const Tensor& tensor, int axis) : length(tensor.dim(axis)) {
    for (int i = 0; i < axis; ++i) outer *= tensor.dim(i);
    for (int i = axis + 1; i < tensor.shape().n_axes(); ++i) inner *= tensor.dim(i);
  }
  int64_t outer = 1, length, inner = 1;
};

Shape with_length(const Shape& shape, int axis, int64_t length) {
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  sizes[static_cast<size_t>(axis)] = length;
  return Shape(sizes);
}

/// Copies the whole of `piece` to the steps of `whole` from `begin` on, or those steps to `piece`.
enum class Direction { cut, join };
void copy_steps(const Tensor& whole, const Tensor& piece, int axis, int64_t begin, Direction direction) {
  const TimeView all(whole, axis), part(piece, axis);
  const int64_t count = part.length * part.inner;
  for (int64_t i = 0; i < all.outer; ++i) {
    const Tensor there = whole.view((i * all.length + begin) * all.inner, {count});
    const Tensor here = piece.view(i * count, {count});
    direction == Direction::cut ? here.copy_from(there) : there.copy_from(here);
  }
}

Tensor cut_steps(const Tensor& whole, int axis, int64_t begin, int64_t end) {
  const Tensor piece =
      Tensor::empty(with_length(whole.shape(), axis, end - begin), whole.dtype(), whole.device());
  copy_steps(whole, piece, axis, begin, Direction::cut);
  return piece;
}

/// Where the pieces of a sequence begin, and its end.
std::vector<int64_t> borders(Feed feed, int64_t length) {
  if (feed == Feed::whole || length < 2) return {0, length};
  // An odd place: no multiple of any chunk length.
  if (feed == Feed::pieces) return {0, (length / 3) | 1, length};
  std::vector<int64_t> result;
  for (int64_t t = 0; t <= length; ++t) result.push_back(t);
  return result;
}

/// The numbers of one case in one form, under the names that the file uses.
class FormRun {
 public:
  FormRun(const GoldenFile& golden, const GoldenForm& form, const GoldenCase& recorded,
          const Placement& placement)
      : golden_(golden), form_(form), case_(recorded), placement_(placement) {
    read_inputs();
  }

  NamedTensors run() {
    if (form_.with_gradients) {
      Tape tape;
      const std::vector<NamedVariables> outputs = run_pieces();
      backward(tape, outputs);
      collect_gradients();
    } else {
      const NoGradient no_recording;
      run_pieces();
    }
    return std::move(result_);
  }

 private:
  /// One piece of the sequence inputs, each a leaf.
  struct Piece {
    int64_t begin, end;
    NamedVariables leaves;
  };

  void read_inputs() {
    int64_t batch = 0;
    for (const Sequence& input : case_.inputs) {
      const std::string name = "input." + input.name;
      if (input.is_optional && !golden_.contains(name)) continue;
      const Tensor value = golden_.real(name, placement_);
      require(value.shape().n_axes() > input.time_axis && value.numel() > 0,
              "{}: {} has shape {}; it must have an axis {} for time and no empty one", golden_.path.string(),
              name, value.shape(), input.time_axis);
      if (sequences_.empty()) {
        batch = value.dim(0);
        length_ = value.dim(input.time_axis);
      }
      require(value.dim(0) == batch && value.dim(input.time_axis) == length_,
              "{}: {} has shape {}; the batch is {} and the length {} by the first input",
              golden_.path.string(), name, value.shape(), batch, length_);
      sequences_[input.name] = value;
    }
    for (const std::string& name : case_.other_inputs) {
      if (golden_.contains("input." + name)) {
        others_[name] = Variable::leaf(golden_.real("input." + name, placement_));
      }
    }
    resets_ = golden_.resets().to(placement_.device);
    require(!resets_.defined() || resets_.shape() == Shape{batch, length_},
            "{}: the documents have shape {}; the inputs say (batch, length) = ({}, {})",
            golden_.path.string(), resets_.defined() ? resets_.shape().str() : "", batch, length_);
  }

  std::vector<NamedVariables> run_pieces() {
    const std::vector<int64_t> edges = borders(form_.feed, length_);
    std::vector<NamedVariables> outputs;
    MixerState state;
    for (size_t i = 0; i + 1 < edges.size(); ++i) {
      Piece piece{edges[i], edges[i + 1], {}};
      for (const Sequence& input : case_.inputs) {
        const auto whole = sequences_.find(input.name);
        if (whole == sequences_.end()) continue;
        piece.leaves[input.name] =
            Variable::leaf(cut_steps(whole->second, input.time_axis, piece.begin, piece.end));
      }
      NamedVariables inputs = piece.leaves;
      inputs.insert(others_.begin(), others_.end());
      const Tensor resets = resets_.defined() ? cut_steps(resets_, 1, piece.begin, piece.end) : Tensor();
      GoldenCase::Output output = case_.run(inputs, state, resets);
      state = std::move(output.state);
      join_outputs(output.sequences, piece.begin);
      outputs.push_back(std::move(output.sequences));
      pieces_.push_back(std::move(piece));
    }
    final_outputs_ = case_.final_outputs(state);
    for (const auto& [name, variable] : final_outputs_) result_["output." + name] = variable.value();
    return outputs;
  }

  void join_outputs(const NamedVariables& outputs, int64_t begin) {
    for (const Sequence& output : case_.outputs) {
      const Tensor& part = outputs.at(output.name).value();
      Tensor& whole = result_["output." + output.name];
      if (!whole.defined())
        whole =
            Tensor::empty(with_length(part.shape(), output.time_axis, length_), part.dtype(), part.device());
      copy_steps(whole, part, output.time_axis, begin, Direction::join);
    }
  }

  /// The file's cotangent of an output; undefined if it has none.
  Tensor cotangent(const std::string& name, const Shape& shape) const {
    const std::string full_name = "grad_output." + name;
    if (!golden_.contains(full_name)) return {};
    const Tensor value = golden_.real(full_name, placement_);
    require(value.shape() == shape, "{}: {} has shape {}; the output has shape {}", golden_.path.string(),
            full_name, value.shape(), shape);
    return value;
  }

  /// The cotangent of step t's output is slice t of the whole one's.
  void backward(Tape& tape, const std::vector<NamedVariables>& outputs) {
    std::vector<Variable> variables;
    std::vector<Tensor> cotangents;
    for (const Sequence& output : case_.outputs) {
      const Tensor whole = cotangent(output.name, result_.at("output." + output.name).shape());
      if (!whole.defined()) continue;
      for (size_t i = 0; i < pieces_.size(); ++i) {
        variables.push_back(outputs[i].at(output.name));
        cotangents.push_back(cut_steps(whole, output.time_axis, pieces_[i].begin, pieces_[i].end));
      }
    }
    for (const auto& [name, variable] : final_outputs_) {
      const Tensor value = cotangent(name, variable.shape());
      if (!value.defined()) continue;
      variables.push_back(variable);
      cotangents.push_back(value);
    }
    tape.backward(variables, cotangents);
  }

  /// Nothing arrived: the output does not depend on it.
  static Tensor gradient_of(const Variable& variable) {
    const Tensor& gradient = variable.gradient().tensor();
    return gradient.defined() ? gradient : zeros_like(variable.value());
  }

  void collect_gradients() {
    for (const Sequence& input : case_.inputs) {
      const auto found = sequences_.find(input.name);
      if (found == sequences_.end()) continue;
      const Tensor whole = empty_like(found->second);
      for (const Piece& piece : pieces_) {
        copy_steps(whole, gradient_of(piece.leaves.at(input.name)), input.time_axis, piece.begin,
                   Direction::join);
      }
      result_["grad_input." + input.name] = whole;
    }
    for (const auto& [name, variable] : others_) result_["grad_input." + name] = gradient_of(variable);
    for (const auto& [name, variable] : case_.parameters)
      result_["grad_param." + name] = gradient_of(variable);
  }

  const GoldenFile& golden_;
  const GoldenForm& form_;
  const GoldenCase& case_;
  const Placement placement_;

  NamedTensors sequences_;
  NamedVariables others_;
  Tensor resets_;
  int64_t length_ = 0;

  std::vector<Piece> pieces_;
  NamedVariables final_outputs_;
  NamedTensors result_;
};

bool begins_with(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

/// Every input in the file must be one that the target has: an input that nobody reads is a wrong result.
void check_inputs(const GoldenFile& golden, const GoldenCase& recorded) {
  for (const std::string& name : golden.names("input.")) {
    const auto is_it = [&](const Sequence& input) { return input.name == name; };
    const bool known = name == "seq_idx" || name == "reset" ||
                       std::any_of(recorded.inputs.begin(), recorded.inputs.end(), is_it) ||
                       std::find(recorded.other_inputs.begin(), recorded.other_inputs.end(), name) !=
                           recorded.other_inputs.end();
    require(known, "{}: {} has no input input.{}", golden.path.string(), golden.target, name);
  }
}

VerifyRow compare(const GoldenFile& golden, const GoldenForm& form, const std::string& name,
                  const Tensor& ours) {
  const Tensor recorded = golden.real(name, DType::f64);
  require(recorded.shape() == ours.shape(), "{}: {} has shape {}; {} gives shape {}", golden.path.string(),
          name, recorded.shape(), golden.target, ours.shape());
  const std::vector<double> expected = recorded.to_vector<double>(), actual = ours.to_vector<double>();
  double worst = 0.0, largest = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i]);
    // Once a NaN, always a NaN.
    if (std::isnan(error) || error > worst) worst = error;
    largest = std::max(largest, std::abs(expected[i]));
  }
  return {form.name, name, worst, golden.atol + golden.rtol * largest};
}

void append_rows(const GoldenFile& golden, const GoldenForm& form, const NamedTensors& ours,
                 std::vector<VerifyRow>& rows) {
  for (const std::string& name : golden.file.names()) {
    const bool is_gradient = begins_with(name, "grad_input.") || begins_with(name, "grad_param.");
    if (is_gradient ? !form.with_gradients : !begins_with(name, "output.")) continue;
    const auto found = ours.find(name);
    require(found != ours.end(), "{}: {} does not have {}", golden.path.string(), golden.target, name);
    rows.push_back(compare(golden, form, name, found->second));
  }
}

/// A name that says nothing here would be a tensor that is never checked.
void check_names(const GoldenFile& golden) {
  bool has_output = false;
  for (const std::string& name : golden.file.names()) {
    const auto is_prefix = [&](const char* prefix) { return begins_with(name, prefix); };
    has_output = has_output || is_prefix("output.");
    const auto kinds = {"input.", "param.", "output.", "grad_output.", "grad_input.", "grad_param."};
    require(std::any_of(kinds.begin(), kinds.end(), is_prefix),
            "{}: tensor {} is none of input.*, param.*, output.*, grad_output.*, grad_input.*, grad_param.*",
            golden.path.string(), quoted_name(name));
    if (is_prefix("grad_output.")) {
      require(golden.contains(name.substr(5)), "{}: {} has no {} beside it", golden.path.string(), name,
              name.substr(5));
    }
  }
  require(has_output, "{}: it has no output.* to compare with", golden.path.string());
}

VerifiedFile verify_golden(const GoldenFile& golden, const Placement& placement) {
  VerifiedFile file{golden.path, golden.target, "", {}};
  const GoldenAdapter* adapter = find_golden_adapter(golden.target);
  if (adapter == nullptr) {
    file.unsupported = golden.target + " is not built yet";
    return file;
  }
  const auto forms = adapter->forms(golden);
  if (const auto* unsupported = std::get_if<Unsupported>(&forms)) {
    file.unsupported = unsupported->reason;
    return file;
  }
  check_names(golden);
  for (const GoldenForm& form : std::get<std::vector<GoldenForm>>(forms)) {
    const GoldenCase recorded = adapter->make(golden, form, placement);
    check_inputs(golden, recorded);
    append_rows(golden, form, FormRun(golden, form, recorded, placement).run(), file.rows);
  }
  return file;
}

VerifiedFile verify_file(const Path& path, const Placement& placement) {
  try {
    return verify_golden(GoldenFile::open(path), placement);
  } catch (const Error& error) {
    // Operators and mixers know no file.
    if (begins_with(error.what(), path.string())) throw;
    throw Error(error.kind(), fmt::format("{}: {}", path.string(), error.what()));
  }
}

std::vector<Path> expand(const std::vector<Path>& paths) {
  std::vector<Path> files;
  for (const Path& path : paths) {
    if (!directory_exists(path)) {
      files.push_back(path);
      continue;
    }
    const size_t n_before = files.size();
    for (const std::string& name : list_directory(path)) {
      if (Path(name).extension() == ".safetensors") files.push_back(path / name);
    }
    require(files.size() > n_before, "{}: the folder has no *.safetensors", path.string());
  }
  require(!files.empty(), "verify: no golden files were given");
  return files;
}

std::string outcome_of(const VerifiedFile& file) {
  if (!file.unsupported.empty()) return "unsupported";
  return file.passed() ? "passed" : "FAILED";
}

/// How much of what is allowed a row uses; above 1 it fails.
double share_of(const VerifyRow& row) {
  if (std::isnan(row.worst_error)) return std::numeric_limits<double>::infinity();
  if (row.allowed_error > 0) return row.worst_error / row.allowed_error;
  return row.worst_error > 0 ? std::numeric_limits<double>::infinity() : 0.0;
}

std::string summary_line(const VerifiedFile& file, size_t name_width, size_t target_width) {
  std::string detail = file.unsupported;
  if (const VerifyRow* worst = file.worst()) {
    detail = fmt::format("{:>5} rows, worst: {:.3g} of what is allowed, {} ({})", file.rows.size(),
                         share_of(*worst), worst->tensor, worst->form);
  }
  return fmt::format("{:<{}}  {:<{}}  {:<11}  {}\n", file.path.filename().string(), name_width, file.target,
                     target_width, outcome_of(file), detail);
}

}  // namespace

bool VerifiedFile::passed() const {
  return unsupported.empty() && !rows.empty() &&
         std::all_of(rows.begin(), rows.end(), [](const VerifyRow& row) { return row.passed(); });
}

const VerifyRow* VerifiedFile::worst() const {
  const auto less = [](const VerifyRow& a, const VerifyRow& b) { return share_of(a) < share_of(b); };
  const auto found = std::max_element(rows.begin(), rows.end(), less);
  return found == rows.end() ? nullptr : &*found;
}

int64_t VerifyReport::n_passed() const {
  return std::count_if(files.begin(), files.end(), [](const VerifiedFile& file) { return file.passed(); });
}

int64_t VerifyReport::n_unsupported() const {
  return std::count_if(files.begin(), files.end(),
                       [](const VerifiedFile& file) { return !file.unsupported.empty(); });
}

int64_t VerifyReport::n_failed() const {
  return static_cast<int64_t>(files.size()) - n_passed() - n_unsupported();
}

bool VerifyReport::ok(bool skip_unsupported) const {
  return n_failed() == 0 && (skip_unsupported || n_unsupported() == 0);
}

std::string VerifyReport::text() const {
  size_t name_width = 0, target_width = 0, form_width = 0, tensor_width = 0;
  for (const VerifiedFile& file : files) {
    name_width = std::max(name_width, file.path.filename().string().size());
    target_width = std::max(target_width, file.target.size());
    for (const VerifyRow& row : file.rows) {
      form_width = std::max(form_width, row.form.size());
      tensor_width = std::max(tensor_width, row.tensor.size());
    }
  }
  std::string text;
  for (const VerifiedFile& file : files) {
    for (const VerifyRow& row : file.rows) {
      text += fmt::format("{:<{}}  {:<{}}  {:<{}}  error {:<9.2e}  allowed {:<9.2e}  {}\n",
                          file.path.filename().string(), name_width, row.form, form_width, row.tensor,
                          tensor_width, row.worst_error, row.allowed_error, row.passed() ? "pass" : "FAIL");
    }
  }
  if (!text.empty()) text += "\n";
  for (const VerifiedFile& file : files) text += summary_line(file, name_width, target_width);
  text += fmt::format("\n{} files: {} passed, {} failed, {} unsupported\n", files.size(), n_passed(),
                      n_failed(), n_unsupported());
  return text;
}

VerifyReport verify(const std::vector<Path>& paths, const VerifyOptions& options) {
  VerifyReport report;
  const Placement placement{options.dtype, options.device};
  for (const Path& path : expand(paths)) report.files.push_back(verify_file(path, placement));
  return report;
}

}  // namespace headwater

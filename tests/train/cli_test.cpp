// The program from outside: exit statuses, messages, and what is left behind by a killed process.

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <thread>

#include "core/cuda/runtime.h"
#include "core/error.h"
#include "core/files.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"
#include "tests/gradient_check.h"

using namespace headwater;

namespace {

struct Result {
  int status;
  std::string output;  // stdout and stderr together
};

std::string quoted(const std::string& word) {
  return "'" + word + "'";
}

Result run(const std::string& arguments) {
  const std::string command = quoted(HEADWATER_BINARY) + " " + arguments + " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  Result result{0, ""};
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) result.output.append(buffer, n);
  result.status = WEXITSTATUS(pclose(pipe));
  return result;
}

/// A prepared corpus and a config, on disk.
class Workshop {
 public:
  Workshop() {
    std::ofstream text(path("text.txt"));
    for (int line = 0; line < 300; ++line)
      text << "line " << line << " of a small text, " << line * line << "\n";
    text.close();
    REQUIRE(run("prepare --text " + name("text.txt") + " --out " + name("tokens")).status == 0);
    write("config.yaml", good_config());
  }
  std::string good_config() const {
    return "run: " + path("run").string() + "\ndata: {train: " + path("tokens").string() +
           ", validation: " + path("tokens").string() +
           ", length: 32}\nmodel:\n  d_model: 16\n  n_layers: 2\n  mixer: {type: mamba2, d_state: 8, "
           "head_dim: 8}\n"
           "train: {steps: 60, batch: 2}\ncheckpoint: {every: 5, keep_last: 100}\nthreads: 1\n";
  }
  Path path(const std::string& file) const { return folder_.path() / file; }
  std::string name(const std::string& file) const { return quoted(path(file).string()); }
  void write(const std::string& file, const std::string& text) const { std::ofstream(path(file)) << text; }
  std::string weights(const std::string& run_name, const std::string& step) const {
    return read_text_file(path(run_name) / "checkpoints" / step / "model.safetensors", 1 << 24);
  }

 private:
  TemporaryFolder folder_;
};

void check_refused(const std::string& arguments, const std::string& message) {
  const Result result = run(arguments);
  INFO(result.output);
  CHECK(result.status == 2);
  CHECK_THAT(result.output, ContainsSubstring(message));
}

/// Starts `headwater train` and kills it with `signal` when `file` exists, or after its own end.
int train_and_signal(const Workshop& workshop, const std::string& run_name, int signal, const Path& file) {
  const pid_t child = fork();
  if (child == 0) {
    const std::string run_override = "run=" + workshop.path(run_name).string();
    freopen("/dev/null", "w", stderr);
    execl(HEADWATER_BINARY, HEADWATER_BINARY, "train", workshop.path("config.yaml").c_str(),
          run_override.c_str(), nullptr);
    _exit(127);
  }
  for (int i = 0; i < 3000 && !path_exists(file) && waitpid(child, nullptr, WNOHANG) == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  kill(child, signal);
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

}  // namespace

TEST_CASE("headwater: every command explains itself") {
  CHECK(run("--help").status == 0);
  for (const std::string command :
       {"prepare", "train", "resume", "eval", "generate", "verify", "bench", "describe"}) {
    const Result result = run(command + " --help");
    CHECK(result.status == 0);
    CHECK_THAT(result.output, ContainsSubstring(command));
  }
  CHECK(run("").status == 2);
  CHECK(run("trian").status == 2);
}

TEST_CASE("headwater: train, eval, generate, resume") {
  const Workshop workshop;
  CHECK(run("train " + workshop.name("config.yaml") + " train.steps=10").status == 0);
  const Result evaluation = run("eval " + workshop.name("run") + " --json");
  CHECK(evaluation.status == 0);
  CHECK_THAT(evaluation.output, ContainsSubstring("\"bits_per_byte\""));
  CHECK(run("eval " + workshop.name("run") + " --stream --length 17").status == 0);
  const Result text = run("generate " + workshop.name("run") + " --prompt 'line 1' --tokens 20 --statistics");
  CHECK(text.status == 0);
  CHECK_THAT(text.output, ContainsSubstring("line 1"));
  CHECK_THAT(text.output, ContainsSubstring("tokens/s"));
  CHECK(run("resume " + workshop.name("run") + " train.steps=12").status == 0);
  CHECK(path_exists(workshop.path("run") / "checkpoints" / "step-000000012" / "MANIFEST.json"));
  CHECK(run("describe model.d_model").status == 0);
  CHECK(
      run("train " + workshop.name("config.yaml") + " run=" + workshop.name("other") + " --dry-run").status ==
      0);
  CHECK_FALSE(path_exists(workshop.path("other")));
}

TEST_CASE("headwater: killed anywhere and resumed, the weights are those of an uninterrupted run") {
  const Workshop workshop;
  REQUIRE(run("train " + workshop.name("config.yaml") + " run=" + workshop.name("whole")).status == 0);
  const std::string expected = workshop.weights("whole", "step-000000060");
  for (const std::string step : {"step-000000005", "step-000000020", "step-000000045"}) {
    const std::string run_name = "killed-" + step;
    train_and_signal(workshop, run_name, SIGKILL, workshop.path(run_name) / "checkpoints" / step);
    const Result resumed = run("resume " + workshop.name(run_name));
    INFO(resumed.output);
    REQUIRE(resumed.status == 0);
    CHECK(workshop.weights(run_name, "step-000000060") == expected);
    // No step appears twice in the metrics.
    const std::string metrics = read_text_file(workshop.path(run_name) / "metrics.jsonl", 1 << 24);
    size_t n_lines = 0;
    for (size_t at = metrics.find("\"gradient_norm\""); at != std::string::npos;
         at = metrics.find("\"gradient_norm\"", at + 1)) {
      ++n_lines;
    }
    CHECK(n_lines == 60);
  }
}

TEST_CASE("headwater: SIGTERM and SIGINT save and end with status 0") {
  const Workshop workshop;
  for (const int signal : {SIGTERM, SIGINT}) {
    const std::string run_name = fmt::format("stopped-{}", signal);
    workshop.write("config.yaml", workshop.good_config() + "schedule: {warmup_steps: 1}\n");
    const Path first = workshop.path(run_name) / "checkpoints" / "step-000000005";
    const int status = train_and_signal(workshop, run_name, signal, first);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
    CHECK(run("resume " + workshop.name(run_name)).status == 0);
  }
}

TEST_CASE(
    "headwater: a bad config is refused with line, key and the nearest name, and leaves nothing on disk") {
  const Workshop workshop;
  const auto refused = [&](const std::string& config, const std::string& message) {
    workshop.write("bad.yaml", config);
    check_refused("train " + workshop.name("bad.yaml"), message);
    CHECK_FALSE(path_exists(workshop.path("run")));
  };
  std::string config = workshop.good_config();
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string changed = config;
    changed.replace(changed.find(from), from.size(), to);
    return changed;
  };
  refused(with("d_state: 8", "d_sate: 8"),
          "bad.yaml:6: model.mixer.d_sate is not an option of model.mixer. Did you mean 'd_state'?");
  refused(with("head_dim: 8", "head_dim: 7"),
          "model.mixer.head_dim is 7; it must divide expand * d_model = 32");
  refused(with("type: mamba2", "type: mamba3"), "'mamba3' is not a mixer. Did you mean 'mamba2'?");
  refused(with("n_layers: 2", "n_layers: two"), "bad.yaml:5: model.n_layers is 'two'; expected an integer");
  refused(with("n_layers: 2", "n_layers: 0"), "model.n_layers is '0'; expected an integer >= 1");
  refused(with("steps: 60", "steps: 60, steps: 61"), "steps");
  refused(with("{steps: 60, batch: 2}", "{steps: 60, batch: 2"), "bad.yaml:");
  refused(with("length: 32", "length: 1000000"), "data.length");
  refused(with("tokens, ", "nowhere, "), "nowhere");
  refused("", "bad.yaml");
  check_refused("train " + workshop.name("missing.yaml"), "missing.yaml");
  check_refused("train " + workshop.name("config.yaml") + " train.stps=3",
                "command line: train.stps is not an option");
  // What a build lacks, or the machine: one line and status 3.
  const bool emulated = cuda::backend() == cuda::Backend::emulated;
  if (!has_cuda() || emulated) {
    const Result no_gpu =
        run("train " + workshop.name("config.yaml") + " device=cuda" + (emulated ? ":1" : ""));
    CHECK(no_gpu.status == 3);
    CHECK_THAT(no_gpu.output,
               ContainsSubstring(emulated ? "there is no GPU 1: this build emulates one, cuda:0"
                                          : "use device: cpu"));
  }
}

TEST_CASE("headwater: damaged or missing files are named") {
  const Workshop workshop;
  check_refused("prepare --text " + workshop.name("none.txt") + " --out " + workshop.name("out"), "none.txt");
  workshop.write("empty.txt", "");
  check_refused("prepare --text " + workshop.name("empty.txt") + " --out " + workshop.name("out"), "empty");
  check_refused("eval " + workshop.name("nothing"), "there is no such folder");
  check_refused("resume " + workshop.name("nothing"), "nothing");
  check_refused("generate " + workshop.name("tokens") + " --prompt x", "there is no checkpoint in it");
  // A folder that cannot be made or written, even by root: its parent is a file.
  const std::string below_a_file = quoted((workshop.path("text.txt") / "run").string());
  check_refused("train " + workshop.name("config.yaml") + " run=" + below_a_file, "text.txt");
  check_refused("prepare --text " + workshop.name("text.txt") + " --out " + below_a_file, "text.txt");

  const Path shard = workshop.path("tokens") / "train.bin";
  const std::string bytes = read_text_file(shard, 1 << 24);
  std::ofstream(shard, std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  check_refused("train " + workshop.name("config.yaml"), "train.bin");
  std::string flipped = bytes;
  flipped[200] = static_cast<char>(flipped[200] ^ 4);
  std::ofstream(shard, std::ios::binary) << flipped;
  check_refused("train " + workshop.name("config.yaml"), "train.bin");
}

#include "train/run_log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <sstream>

namespace headwater {
namespace {

constexpr const char* metrics_file = "metrics.jsonl";
constexpr uint64_t max_metrics_bytes = uint64_t{1} << 32;

/// JSON has no NaN: a number that is not finite becomes its name.
nlohmann::ordered_json number(double value) {
  if (std::isfinite(value)) return value;
  return std::isnan(value) ? "nan" : (value > 0 ? "inf" : "-inf");
}

/// Keeps the whole lines of steps up to `step`.
void drop_later_lines(const Path& path, int64_t step) {
  if (!path_exists(path)) return;
  std::istringstream lines(read_text_file(path, max_metrics_bytes));
  std::string kept, line;
  while (std::getline(lines, line)) {
    const auto json = nlohmann::json::parse(line, nullptr, false);
    if (json.is_discarded() || !json.contains("step") || json["step"].get<int64_t>() > step) continue;
    kept += line + "\n";
  }
  write_file_atomically(path, kept);
}

std::string duration_text(double seconds) {
  const auto s = static_cast<int64_t>(std::max(0.0, seconds));
  if (s >= 3600) return fmt::format("{}h{:02}m", s / 3600, s / 60 % 60);
  return fmt::format("{}m{:02}s", s / 60, s % 60);
}

std::string step_line(const StepReport& r) {
  return fmt::format(
      "step {}/{}  loss {:.4f}  norm {:.3f}  lr {:.2e}  {:.0f} ms  {:.0f} tokens/s  {}  {} left{}", r.step,
      r.n_steps, r.loss, r.gradient_norm, r.learning_rate, 1000 * r.step_seconds, r.tokens_per_second,
      bytes_text(r.memory_bytes), duration_text(r.seconds_left), r.skipped ? "  SKIPPED" : "");
}

}  // namespace

RunLog::RunLog(const Path& run_folder, int64_t resume_step) : is_terminal_(isatty(STDERR_FILENO) == 1) {
  const auto add_logger = [this](spdlog::sink_ptr sink) {
    loggers_.push_back(std::make_shared<spdlog::logger>("headwater", std::move(sink)));
    loggers_.back()->set_pattern("[%H:%M:%S] %v");
    loggers_.back()->flush_on(spdlog::level::info);
  };
  add_logger(std::make_shared<spdlog::sinks::stderr_sink_st>());
  if (run_folder.empty()) return;
  add_logger(std::make_shared<spdlog::sinks::basic_file_sink_st>((run_folder / "log.txt").string()));
  drop_later_lines(run_folder / metrics_file, resume_step);
  metrics_ = std::make_unique<OutputFile>(run_folder / metrics_file, OutputFile::Mode::append);
}

RunLog::~RunLog() {
  end_progress_line();
}

void RunLog::end_progress_line() {
  if (in_progress_line_) fmt::print(stderr, "\n");
  in_progress_line_ = false;
}

void RunLog::info(const std::string& text) {
  end_progress_line();
  for (const auto& logger : loggers_) logger->info(text);
}

void RunLog::warn(const std::string& text) {
  info("warning: " + text);
}

void RunLog::append(const std::string& line) {
  if (!metrics_) return;
  metrics_->write(line + "\n");
  metrics_->flush();
}

void RunLog::step(const StepReport& r, bool show) {
  const nlohmann::ordered_json json{{"step", r.step},
                                    {"loss", number(r.loss)},
                                    {"gradient_norm", number(r.gradient_norm)},
                                    {"learning_rate", r.learning_rate},
                                    {"step_seconds", r.step_seconds},
                                    {"tokens_per_second", r.tokens_per_second},
                                    {"memory_bytes", r.memory_bytes},
                                    {"skipped", r.skipped}};
  append(json.dump());
  if (is_terminal_) {
    fmt::print(stderr, "\r\033[K{}", step_line(r));
    std::fflush(stderr);
    in_progress_line_ = true;
  }
  if (!show) return;
  for (const auto& logger : loggers_) {
    const bool is_on_screen = is_terminal_ && logger == loggers_.front();
    if (!is_on_screen) logger->info(step_line(r));
  }
}

void RunLog::evaluation(int64_t step, const std::string& json, const std::string& text) {
  nlohmann::ordered_json record{{"step", step}};
  record["evaluation"] = nlohmann::ordered_json::parse(json);
  append(record.dump());
  info(fmt::format("step {}: {}", step, text));
}

}  // namespace headwater

// What one sees of a run: a line on the terminal, log.txt, metrics.jsonl.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/files.h"

namespace spdlog {
class logger;
}

namespace headwater {

/// One optimizer step, as it is reported.
struct StepReport {
  int64_t step = 0;  ///< counts from 1
  int64_t n_steps = 0;
  double loss = 0.0;
  double gradient_norm = 0.0;
  double learning_rate = 0.0;
  double step_seconds = 0.0;
  double tokens_per_second = 0.0;
  int64_t memory_bytes = 0;
  double seconds_left = 0.0;
  bool skipped = false;
};

/// Lines go to stderr and to log.txt in the run's folder; numbers to metrics.jsonl, one JSON object a line, appended.
/// On a terminal the step line is rewritten in place.
class RunLog {
 public:
  /// `run_folder` empty: stderr only. On resuming, lines of metrics.jsonl past `resume_step` and a torn last line are
  /// dropped, so that no step appears twice.
  explicit RunLog(const Path& run_folder, int64_t resume_step = 0);
  ~RunLog();

  void info(const std::string& text);
  void warn(const std::string& text);
  /// Adds to metrics.jsonl; shows a line where `show`.
  void step(const StepReport& report, bool show);
  /// An evaluation after `step`: `json` is an object's text.
  void evaluation(int64_t step, const std::string& json, const std::string& text);

 private:
  void end_progress_line();
  void append(const std::string& line);

  std::vector<std::shared_ptr<spdlog::logger>> loggers_;  // stderr, then log.txt
  std::unique_ptr<OutputFile> metrics_;
  bool is_terminal_;
  bool in_progress_line_ = false;
};

}  // namespace headwater

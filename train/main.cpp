// The program: one function per command, and the way from an exception to an exit status.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <new>

#include "core/memory.h"
#include "core/parallel.h"
#include "train/bench.h"
#include "train/evaluate.h"
#include "train/generate.h"
#include "train/model_folder.h"
#include "train/prepare.h"
#include "train/trainer.h"
#include "train/verify.h"

namespace headwater {
namespace {

void add_prepare(CLI::App& app) {
  auto* command =
      app.add_subcommand("prepare", "Turn text files into token shards: OUT/train.bin, OUT/validation.bin");
  struct Arguments {
    std::vector<std::string> text;
    std::string out, split = "file";
    double fraction = 0.05;
  };
  auto args = std::make_shared<Arguments>();
  command->add_option("--text", args->text, "Text files, in order; any bytes")->required();
  command->add_option("--out", args->out, "Folder for the shards")->required();
  command->add_option("--validation-fraction", args->fraction, "Share of the text to hold out, its last part")
      ->capture_default_str();
  command->add_option("--split", args->split, "What is a document: file, blank_line or line")
      ->capture_default_str();
  command->callback([args] {
    PrepareOptions options;
    for (const std::string& file : args->text) options.files.emplace_back(file);
    options.out = args->out;
    options.validation_fraction = args->fraction;
    options.split = parse_document_split(args->split);
    const PrepareReport report = prepare(options);
    const auto show = [&](const char* name, const ShardInfo& info) {
      fmt::print("{}/{}.bin: {} documents, {} tokens, {} bytes of text\n", args->out, name, info.n_documents,
                 info.n_tokens, info.n_text_bytes);
    };
    show("train", report.train);
    if (report.validation) show("validation", *report.validation);
  });
}

/// What is left on the command line must be overrides: key=value, or --key value.
std::vector<std::string> overrides_of(const std::vector<std::string>& words) {
  std::vector<std::string> overrides;
  for (size_t i = 0; i < words.size(); ++i) {
    const bool dashed = words[i].rfind("--", 0) == 0;
    const std::string word = dashed ? words[i].substr(2) : words[i];
    if (dashed && word.find('=') == std::string::npos && i + 1 < words.size()) {
      overrides.push_back(word + "=" + words[++i]);
    } else {
      overrides.push_back(word);
    }
  }
  return overrides;
}

constexpr const char* device_help = "Where to compute: cpu, cuda or cuda:N";

void add_device_options(CLI::App* command, std::string& device, std::string& precision) {
  command->add_option("--device", device, device_help)->capture_default_str();
  command->add_option("--precision", precision, "What to compute with; bf16 on a GPU")
      ->check(CLI::IsMember({"f32", "bf16"}))
      ->capture_default_str();
}

std::unique_ptr<LanguageModel> read_model_on(const Path& folder, const std::string& device_name,
                                             const std::string& precision) {
  const Device device = parse_device(device_name);
  require(device.is_cuda() || precision != "bf16", "--precision bf16 needs a GPU: --device cuda");
  return read_model(folder, parse_precision(precision), device);
}

void add_train(CLI::App& app) {
  auto* command = app.add_subcommand("train", "Train a model: headwater train CONFIG [key=value ...]");
  struct Arguments {
    std::string config;
    bool dry_run = false;
  };
  auto args = std::make_shared<Arguments>();
  command->add_option("CONFIG", args->config, "YAML file; headwater describe lists its keys")->required();
  command->add_flag("--dry-run", args->dry_run, "Check everything, print sizes, do not train");
  command->allow_extras();
  command->footer("Overrides: any key of the config as key=value or --key value, e.g. train.steps=200");
  command->callback([args, command] {
    Config config = load_config(args->config, overrides_of(command->remaining()));
    if (!args->dry_run) return train(std::move(config));
    fmt::print("{}\n", Trainer(std::move(config)).summary());
  });
}

void add_resume(CLI::App& app) {
  auto* command = app.add_subcommand(
      "resume", "Go on with a run from its latest checkpoint: headwater resume RUN [key=value ...]");
  struct Arguments {
    std::string run, checkpoint;
    bool accept_data_change = false;
  };
  auto args = std::make_shared<Arguments>();
  command->add_option("RUN", args->run, "Folder of the run")->required();
  command->add_option("--checkpoint", args->checkpoint, "Another checkpoint of the run than the latest");
  command->add_flag("--accept-data-change", args->accept_data_change,
                    "Go on with other training tokens than before");
  command->allow_extras();
  command->callback([args, command] {
    resume(args->run, overrides_of(command->remaining()), args->checkpoint, args->accept_data_change);
  });
}

/// The config of the run that a checkpoint belongs to, if it is there: checkpoints carry it too.
std::optional<Config> config_beside(const Path& checkpoint) {
  const Path path = checkpoint / "config.yaml";
  if (!path_exists(path)) return std::nullopt;
  return load_config(path.string(), {});
}

void add_eval(CLI::App& app) {
  auto* command = app.add_subcommand("eval", "Loss, perplexity, bits per byte, accuracy, by position");
  struct Arguments {
    std::string path, data, device = "cpu", precision = "f32";
    int64_t length = 0, batch = 8, tokens = 0, bins = 8, threads = 0;
    bool stream = false, json = false;
  };
  auto args = std::make_shared<Arguments>();
  command
      ->add_option("RUN|CHECKPOINT", args->path,
                   "A run (its latest checkpoint), or a folder with model.safetensors")
      ->required();
  command->add_option("--data", args->data, "Shard to evaluate on; default: the run's validation tokens");
  command->add_option("--length", args->length,
                      "Tokens per row (or per piece of the stream); default: the run's");
  command->add_option("--batch", args->batch, "Rows at a time")->capture_default_str();
  command->add_option("--tokens", args->tokens, "Look at no more tokens than this; 0: all")
      ->capture_default_str();
  command->add_option("--position-bins", args->bins, "Parts of a row reported separately")
      ->capture_default_str();
  command->add_flag("--stream", args->stream, "One stream, the state carried through, in constant memory");
  command->add_flag("--json", args->json, "Print one line of JSON");
  add_device_options(command, args->device, args->precision);
  command->add_option("--threads", args->threads, "CPU threads; 0: all cores")->capture_default_str();
  command->callback([args] {
    set_n_threads(static_cast<int>(args->threads));
    const Path checkpoint = intact_checkpoint(args->path);
    const std::optional<Config> config = config_beside(checkpoint);
    std::string data = args->data;
    if (data.empty() && config) data = config->run.data.validation;
    require(!data.empty(), "{}: it does not say on what to evaluate; give --data SHARD", checkpoint.string());
    const int64_t length = args->length > 0 ? args->length : (config ? config->run.eval_length() : 1024);
    const auto model = read_model_on(checkpoint, args->device, args->precision);
    const Evaluation result = evaluate(*model, open_shard(data, "validation"),
                                       {.length = length,
                                        .batch = args->batch,
                                        .max_tokens = args->tokens,
                                        .position_bins = args->bins,
                                        .stream = args->stream});
    fmt::print("{}{}", args->json ? result.json() : result.text(), args->json ? "\n" : "");
  });
}

void add_generate(CLI::App& app) {
  auto* command = app.add_subcommand("generate", "Continue a text");
  struct Arguments {
    std::string path, prompt, device = "cpu", precision = "f32";
    GenerateOptions options;
    int64_t threads = 0;
    bool statistics = false;
  };
  auto args = std::make_shared<Arguments>();
  GenerateOptions& options = args->options;
  command
      ->add_option("RUN|CHECKPOINT", args->path,
                   "A run (its latest checkpoint), or a folder with model.safetensors")
      ->required();
  command->add_option("--prompt", args->prompt, "Text to continue; empty: a new document");
  command->add_option("--tokens", options.n_tokens, "How many tokens to draw")->capture_default_str();
  command->add_option("--temperature", options.temperature, "0: always the most likely token")
      ->capture_default_str();
  command->add_option("--top-k", options.top_k, "Draw from the k most likely; 0: all")->capture_default_str();
  command->add_option("--top-p", options.top_p, "Draw from the fewest tokens with this share of probability")
      ->capture_default_str();
  command->add_option("--seed", options.seed, "Same seed, same text")->capture_default_str();
  command->add_option("--threads", args->threads, "CPU threads; 0: all cores")->capture_default_str();
  add_device_options(command, args->device, args->precision);
  command->add_flag("--statistics", args->statistics, "Print tokens/s to stderr");
  command->callback([args] {
    set_n_threads(static_cast<int>(args->threads));
    const auto model = read_model_on(intact_checkpoint(args->path), args->device, args->precision);
    fmt::print("{}", args->prompt);
    const GenerateReport report = generate(*model, args->prompt, args->options, [](const std::string& text) {
      fmt::print("{}", text);
      std::fflush(stdout);
    });
    fmt::print("\n");
    if (args->statistics) {
      fmt::print(stderr, "prompt: {} tokens in {:.3f} s; drawn: {} tokens, {:.0f} tokens/s\n",
                 report.n_prompt_tokens, report.prefill_seconds, report.n_tokens,
                 static_cast<double>(report.n_tokens) / report.decode_seconds);
    }
  });
}

void add_verify(CLI::App& app) {
  auto* command =
      app.add_subcommand("verify", "Hold this machine's kernels against recorded cases, in every form");
  struct Arguments {
    std::vector<std::string> paths;
    std::string dtype = "f32", device = "cpu";
    bool skip_unsupported = false;
    int64_t threads = 0;
  };
  auto args = std::make_shared<Arguments>();
  command->add_option("GOLDEN", args->paths, "Recorded cases (.safetensors), or folders of them")->required();
  command->add_flag("--skip-unsupported", args->skip_unsupported,
                    "Cases of families not built yet do not count as failures");
  command->add_option("--dtype", args->dtype, "What to compute in")
      ->check(CLI::IsMember({"f32", "f64"}))
      ->capture_default_str();
  command->add_option("--device", args->device, device_help)->capture_default_str();
  command->add_option("--threads", args->threads, "CPU threads; 0: all cores")->capture_default_str();
  command->callback([args] {
    set_n_threads(static_cast<int>(args->threads));
    const std::vector<Path> paths(args->paths.begin(), args->paths.end());
    const VerifyReport report = verify(paths, {.dtype = args->dtype == "f64" ? DType::f64 : DType::f32,
                                               .device = parse_device(args->device)});
    fmt::print("{}", report.text());
    if (report.ok(args->skip_unsupported)) return;
    throw Error(ErrorKind::fell_short,
                fmt::format("verify: {} of {} files failed, {} are unsupported", report.n_failed(),
                            report.files.size(), report.n_unsupported()));
  });
}

void add_bench(CLI::App& app) {
  auto* command =
      app.add_subcommand("bench", "Measure training steps, decoding, or an engine on this machine");
  struct Arguments {
    std::string config, op;
    int64_t steps = 5, tokens = 128;
    bool decode = false, json = false;
  };
  auto args = std::make_shared<Arguments>();
  command->add_option("--model", args->config, "Config whose model is measured");
  command->add_option("--steps", args->steps, "Training steps to measure")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command->add_flag("--decode", args->decode, "Measure decoding at batch 1 instead of training");
  command->add_option("--tokens", args->tokens, "Tokens to decode")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  command
      ->add_option(
          "--op", args->op,
          "Measure an engine alone over growing lengths, on the device and in the precision of --model")
      ->check(CLI::IsMember({"chunked_matrix_state"}));
  command->add_flag("--json", args->json, "Print one line of JSON");
  command->allow_extras();
  command->callback([args, command] {
    const std::vector<std::string> overrides = overrides_of(command->remaining());
    require(!args->config.empty() || !args->op.empty(),
            "bench: nothing to measure; give --model CONFIG or --op NAME");
    require(!args->config.empty() || overrides.empty(),
            "bench: '{}' changes a config, but none is given; give --model CONFIG",
            overrides.empty() ? "" : overrides.front());
    const Config config = args->config.empty() ? Config{} : load_config(args->config, overrides);
    if (!args->op.empty()) {
      const EngineReport report = bench_engine(config);
      fmt::print("{}{}", args->json ? report.json() : report.text(), args->json ? "\n" : "");
      return;
    }
    const BenchReport report =
        args->decode ? bench_decoding(config, args->tokens) : bench_training(config, args->steps);
    fmt::print("{}{}", args->json ? report.json() : report.text(), args->json ? "\n" : "");
  });
}

void add_describe(CLI::App& app) {
  auto* command = app.add_subcommand("describe", "Every key of a config: type, default, range, meaning");
  auto key = std::make_shared<std::string>();
  command->add_option("KEY", *key, "Only this key, or this group");
  command->callback([key] {
    Config config;
    Options options;
    config.declare(options);
    fmt::print("{}", options.describe(*key));
  });
}

int run(int argc, char** argv) {
  CLI::App app("Headwater trains, resumes, evaluates and samples state-space sequence models.", "headwater");
  app.require_subcommand(1);
  app.footer(
      "Exit status: 0 done, 1 fell short (a failed verify, a diverged run), 2 the input is wrong, 3 the "
      "machine failed.");
  add_prepare(app);
  add_train(app);
  add_resume(app);
  add_eval(app);
  add_generate(app);
  add_verify(app);
  add_bench(app);
  add_describe(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ErrorKind::input);
  } catch (const Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_status();
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "error: the machine has no more memory; use a smaller train.batch or data.length\n");
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {} (this is a mistake in headwater; please report it)\n", error.what());
  }
  return static_cast<int>(ErrorKind::machine);
}

}  // namespace
}  // namespace headwater

int main(int argc, char** argv) {
  return headwater::run(argc, argv);
}

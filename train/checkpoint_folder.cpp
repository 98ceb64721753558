#include "train/checkpoint_folder.h"

#include <fmt/chrono.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <nlohmann/json.hpp>
#include <sstream>

#include "core/error.h"
#include "core/hash.h"
#include "core/safetensors.h"

namespace headwater {
namespace {

using Json = nlohmann::json;

constexpr const char* manifest_name = "MANIFEST.json";
constexpr const char* manifest_format = "headwater-checkpoint/1";
constexpr uint64_t max_manifest_bytes = uint64_t{1} << 28;
constexpr size_t piece_bytes = 1 << 20;

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.find('/') == std::string::npos && name != "." && name != "..";
}

std::string hash_text_of(std::string_view bytes) {
  return hash_text(hash_bytes(bytes.data(), bytes.size()));
}

/// Size and hash of a file, as the manifest has them. Read, not mapped: a disk that fails is then an error
/// with a text, not a signal.
Json summary_of(const Path& path) {
  InputFile file(path);
  StreamingHash hash;
  uint64_t size = 0;
  std::vector<char> piece(piece_bytes);
  while (const size_t n_read = file.read(piece.data(), piece.size())) {
    hash.update(piece.data(), n_read);
    size += n_read;
  }
  return {{"size", size}, {"xxh3", hash_text(hash.value())}};
}

bool is_safetensors(const std::string& name) {
  return Path(name).extension() == ".safetensors";
}

Json tensor_hashes_of(const Path& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  Json hashes = Json::object();
  for (const SafetensorsEntry& entry : file.entries()) {
    hashes[std::string(entry.name)] = hash_text_of(file.bytes(entry));
  }
  return hashes;
}

/// The manifest's hash of itself: of all its other members, in the order and spelling that dump() gives.
std::string own_hash_of(Json manifest) {
  manifest.erase("xxh3");
  return hash_text_of(manifest.dump());
}

Json make_manifest(const Path& folder, int64_t step) {
  Json files = Json::object();
  Json tensors = Json::object();
  for (const std::string& name : list_directory(folder)) {
    files[name] = summary_of(folder / name);
    if (is_safetensors(name)) tensors[name] = tensor_hashes_of(folder / name);
  }
  Json manifest = {{"format", manifest_format}, {"step", step}, {"files", files}, {"tensors", tensors}};
  manifest["xxh3"] = own_hash_of(manifest);
  return manifest;
}

/// The manifest of a checkpoint, of the right format and undamaged.
Json read_manifest(const Path& checkpoint) {
  const Path path = checkpoint / manifest_name;
  require(path_exists(path), "{}: is not a complete checkpoint: it has no {}", checkpoint.string(),
          manifest_name);
  const Json manifest = Json::parse(read_text_file(path, max_manifest_bytes), nullptr, false);
  require(manifest.is_object() && manifest.contains("format") && manifest["format"].is_string(),
          "{}: is damaged: it is not a manifest in JSON", path.string());
  const std::string format = manifest["format"];
  require(format == manifest_format, "{}: has format '{}', this Headwater reads '{}'; it is damaged or newer",
          path.string(), format, manifest_format);
  require(manifest.contains("xxh3") && manifest["xxh3"] == own_hash_of(manifest),
          "{}: is damaged: it does not agree with the hash that it carries", path.string());
  return manifest;
}

/// Names the tensor that differs from its hash in the manifest, or says that none does.
std::string damage_inside(const Path& path, const Json& expected_hashes) {
  try {
    const SafetensorsFile file = SafetensorsFile::open(path);
    for (const SafetensorsEntry& entry : file.entries()) {
      const std::string found = hash_text_of(file.bytes(entry));
      const std::string expected = expected_hashes.value(std::string(entry.name), "no tensor of this name");
      if (found == expected) continue;
      return fmt::format("tensor {} is damaged: its hash is {}, the manifest says {}",
                         quoted_name(entry.name), found, expected);
    }
    return "its tensors are whole, its header is damaged";
  } catch (const Error& error) {
    return fmt::format("its header is damaged ({})", error.what());
  }
}

void check_file(const Path& path, const Json& expected, const Json& expected_tensor_hashes) {
  require(path_exists(path), "{}: is missing, the manifest says it has {} bytes", path.string(),
          expected.at("size").get<uint64_t>());
  const Json found = summary_of(path);
  require(found["size"] == expected.at("size"), "{}: has {} bytes, the manifest says {}", path.string(),
          found["size"].get<uint64_t>(), expected.at("size").get<uint64_t>());
  if (found == expected) return;
  const std::string detail =
      is_safetensors(path.filename()) ? "; " + damage_inside(path, expected_tensor_hashes) : std::string();
  throw_input_error("{}: is damaged: its hash is {}, the manifest says {}{}", path.string(),
                    found["xxh3"].get<std::string>(), expected.at("xxh3").get<std::string>(), detail);
}

/// Throws where verify_checkpoint does, without its advice.
void check_checkpoint(const Path& checkpoint) {
  const Json manifest = read_manifest(checkpoint);
  try {
    for (const auto& [name, expected] : manifest.at("files").items()) {
      require(is_plain_name(name), "{}: '{}' is not a file's name", (checkpoint / manifest_name).string(),
              name);
      check_file(checkpoint / name, expected, manifest.at("tensors").value(name, Json::object()));
    }
  } catch (const Json::exception& exception) {
    throw_input_error("{}: is not a manifest of a checkpoint ({})", (checkpoint / manifest_name).string(),
                      exception.what());
  }
}

bool is_intact(const CheckpointInfo& checkpoint) {
  try {
    check_checkpoint(checkpoint.path);
    return true;
  } catch (const Error&) {
    return false;
  }
}

std::optional<int64_t> step_of(const std::string& name) {
  constexpr std::string_view prefix = "step-";
  int64_t step = 0;
  if (name.starts_with(prefix)) std::from_chars(name.data() + prefix.size(), name.data() + name.size(), step);
  return name == checkpoint_name(step) ? std::optional(step) : std::nullopt;
}

/// The newest checkpoint in the same folder that is older than `checkpoint` and intact, as advice.
std::string advice_beside(const Path& checkpoint) {
  const std::optional<int64_t> step = step_of(checkpoint.filename());
  std::vector<CheckpointInfo> others = list_checkpoints(checkpoint.parent_path());
  std::reverse(others.begin(), others.end());
  for (const CheckpointInfo& other : others) {
    if (step && other.step >= *step) continue;
    if (!is_intact(other)) continue;
    return fmt::format("the previous checkpoint {} is intact: resume with --checkpoint {}",
                       checkpoint_name(other.step), other.path.string());
  }
  return "no earlier checkpoint beside it is intact";
}

Path trash_path(const Path& path) {
  return path.parent_path() / fmt::format(".trash-{}-{}", path.filename().string(), ::getpid());
}

/// Takes the name away first, so that no half-deleted folder has a name that is looked for.
Path move_to_trash(const Path& path) {
  const Path trash = trash_path(path);
  remove_tree(trash);
  rename_path(path, trash);
  return trash;
}

/// Gives `temporary` the name `target`; what had that name before is at `temporary` afterwards, or gone.
void publish(const Path& temporary, const Path& target) {
  if (!path_exists(target)) return rename_path(temporary, target);
  if (exchange_paths(temporary, target)) return;
  // Without an exchange there is a moment without a checkpoint of this step; the others are untouched.
  const Path trash = move_to_trash(target);
  rename_path(temporary, target);
  remove_tree_quietly(trash);
}

/// Those of `checkpoints` (by step) that no rule keeps; none if not one checkpoint is intact.
std::vector<CheckpointInfo> find_doomed(const std::vector<CheckpointInfo>& checkpoints, int keep_last,
                                        int64_t keep_every) {
  const size_t n_old = checkpoints.size() - std::min(checkpoints.size(), static_cast<size_t>(keep_last));
  std::vector<CheckpointInfo> doomed;
  for (size_t i = 0; i < n_old; ++i) {
    const bool is_kept = keep_every > 0 && checkpoints[i].step % keep_every == 0;
    if (!is_kept) doomed.push_back(checkpoints[i]);
  }
  if (doomed.empty()) return doomed;
  const auto newest_intact = std::find_if(checkpoints.rbegin(), checkpoints.rend(), is_intact);
  if (newest_intact == checkpoints.rend()) return {};
  std::erase_if(doomed, [&](const auto& checkpoint) { return checkpoint.step == newest_intact->step; });
  return doomed;
}

bool is_alive(pid_t process) {
  return ::kill(process, 0) == 0 || errno == EPERM;
}

/// The process at the end of a name such as ".tmp-step-000001000-4711"; 0 if there is none.
pid_t process_in(const std::string& name) {
  pid_t process = 0;
  std::from_chars(name.data() + name.rfind('-') + 1, name.data() + name.size(), process);
  return process;
}

bool is_leftover(const std::string& name) {
  if (name.starts_with(".trash-")) return true;
  const pid_t process = process_in(name);
  return name.starts_with(".tmp-") && process > 0 && (process == ::getpid() || !is_alive(process));
}

/// Who holds a run, as its lock file says.
struct LockHolder {
  std::string host;
  pid_t process = 0;
  std::string since;
};

std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof(name) - 1) == 0 ? name : "unknown";
}

LockHolder this_process() {
  const auto now = std::chrono::floor<std::chrono::seconds>(std::chrono::system_clock::now());
  return {host_name(), ::getpid(), fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(now))};
}

/// Nothing if the file is empty (its holder left in good order) or says nothing that can be read.
std::optional<LockHolder> read_holder(const Path& path) {
  constexpr uint64_t max_lock_bytes = 4096;
  std::istringstream text(read_text_file(path, max_lock_bytes));
  LockHolder holder;
  if (text >> holder.host >> holder.process >> holder.since) return holder;
  return std::nullopt;
}

[[noreturn]] void refuse_lock(const Path& path, const std::optional<LockHolder>& holder,
                              std::string_view advice) {
  const std::string who =
      holder ? fmt::format("process {} on host {} since {}", holder->process, holder->host, holder->since)
             : "another process";
  throw_input_error("{}: this run is in use by {}; {}", path.string(), who, advice);
}

constexpr std::string_view advice_for_living =
    "wait until it ends or stop it, or give this run another folder";
constexpr std::string_view advice_for_other_host =
    "a lock may not reach across hosts: if that process is gone, remove this file and start again";

}  // namespace

std::string checkpoint_name(int64_t step) {
  return fmt::format("step-{:09}", step);
}

CheckpointWriter::CheckpointWriter(const Path& checkpoints_folder, int64_t step)
    : checkpoints_folder_(checkpoints_folder),
      step_(step),
      temporary_(checkpoints_folder / fmt::format(".tmp-{}-{}", checkpoint_name(step), ::getpid())) {
  require(step >= 0, "a checkpoint's step must not be negative, got {}", step);
  make_directories(checkpoints_folder);
  remove_leftovers(checkpoints_folder);
  try {
    make_directories(temporary_);
  } catch (...) {
    remove_tree_quietly(temporary_);  // it may be there though its sync failed; no destructor will run
    throw;
  }
}

CheckpointWriter::~CheckpointWriter() {
  if (!is_committed_) remove_tree_quietly(temporary_);
}

Path CheckpointWriter::path(const std::string& name) const {
  require(is_plain_name(name) && name != manifest_name,
          "'{}' cannot be the name of a file in a checkpoint; give a plain name other than {}", name,
          manifest_name);
  return temporary_ / name;
}

CheckpointInfo CheckpointWriter::commit() {
  const Path target = checkpoints_folder_ / checkpoint_name(step_);
  sync_tree(temporary_);
  const std::string manifest = make_manifest(temporary_, step_).dump(1) + "\n";
  OutputFile file(temporary_ / manifest_name, OutputFile::Mode::exclusive);
  file.write(manifest);
  file.sync();
  file.close();
  sync_directory(temporary_);
  publish(temporary_, target);
  sync_directory(checkpoints_folder_);
  is_committed_ = true;
  remove_tree_quietly(temporary_);  // the checkpoint that was replaced, if there was one
  return {step_, target};
}

std::vector<CheckpointInfo> list_checkpoints(const Path& checkpoints_folder) {
  std::vector<CheckpointInfo> checkpoints;
  if (!path_exists(checkpoints_folder)) return checkpoints;
  for (const std::string& name : list_directory(checkpoints_folder)) {
    const Path path = checkpoints_folder / name;
    const std::optional<int64_t> step = step_of(name);
    if (step && path_exists(path / manifest_name)) checkpoints.push_back({*step, path});
  }
  std::sort(checkpoints.begin(), checkpoints.end(),
            [](const auto& a, const auto& b) { return a.step < b.step; });
  return checkpoints;
}

std::optional<CheckpointInfo> latest_checkpoint(const Path& checkpoints_folder) {
  std::vector<CheckpointInfo> checkpoints = list_checkpoints(checkpoints_folder);
  if (checkpoints.empty()) return std::nullopt;
  return checkpoints.back();
}

void verify_checkpoint(const Path& checkpoint) {
  const Path path = checkpoint.has_filename() ? checkpoint : checkpoint.parent_path();  // "step-000001000/"
  try {
    check_checkpoint(path);
  } catch (const Error& error) {
    throw Error(error.kind(), fmt::format("{}; {}", error.what(), advice_beside(path)));
  }
}

std::vector<int64_t> apply_retention(const Path& checkpoints_folder, int keep_last, int64_t keep_every) {
  require(keep_last >= 1, "keep_last is {}, but the newest checkpoint must stay: give 1 or more", keep_last);
  require(keep_every >= 0, "keep_every is {}; give a number of steps, or 0 for none", keep_every);
  std::vector<Path> trash;
  std::vector<int64_t> steps;
  for (const CheckpointInfo& checkpoint :
       find_doomed(list_checkpoints(checkpoints_folder), keep_last, keep_every)) {
    trash.push_back(move_to_trash(checkpoint.path));
    steps.push_back(checkpoint.step);
  }
  // All names are gone from the disk before any byte is.
  if (!trash.empty()) sync_directory(checkpoints_folder);
  for (const Path& path : trash) remove_tree(path);
  return steps;
}

void remove_leftovers(const Path& folder) {
  for (const std::string& name : list_directory(folder)) {
    if (is_leftover(name)) remove_tree_quietly(folder / name);
  }
}

RunLock::RunLock(const Path& run_folder) : path_(run_folder / "run.lock"), file_(path_) {
  const std::optional<LockHolder> holder = read_holder(path_);
  if (file_.state() == LockFile::State::held_elsewhere) refuse_lock(path_, holder, advice_for_living);
  if (holder && holder->host != host_name()) refuse_lock(path_, holder, advice_for_other_host);
  const bool is_unlocked = file_.state() == LockFile::State::unsupported;
  if (is_unlocked && holder && is_alive(holder->process)) refuse_lock(path_, holder, advice_for_living);
  const LockHolder self = this_process();
  file_.replace_text(fmt::format("{} {} {}\n", self.host, self.process, self.since));
}

RunLock::~RunLock() {
  try {
    file_.replace_text("");
  } catch (const Error&) {
    // A stale text does no harm on this host: the next holder sees that the lock is free.
  }
}

}  // namespace headwater

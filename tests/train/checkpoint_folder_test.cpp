#include "train/checkpoint_folder.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>

#include "core/error.h"
#include "core/hash.h"
#include "core/safetensors.h"
#include "tests/catch.h"
#include "tests/faulty_files.h"

namespace headwater {
namespace {

/// A run folder with checkpoints in it. Nothing is synced to the disk: tests write thousands of files.
class TestRun {
 public:
  TestRun() : override_(unsynced_) {}
  const Path& path() const { return folder_.path(); }
  Path checkpoints() const { return folder_.path() / "checkpoints"; }
  Path checkpoint(int64_t step) const { return checkpoints() / checkpoint_name(step); }

 private:
  TemporaryFolder folder_;
  FaultyFileSystem unsynced_;
  FileSystemOverride override_;
};

/// A small checkpoint; its bytes depend on `step`.
void save(const Path& checkpoints, int64_t step) {
  CheckpointWriter writer(checkpoints, step);
  OutputFile model(writer.path("model.safetensors"));
  write_safetensors(model, {{"weight", Tensor::full({2}, static_cast<double>(step), DType::f32)}}, {});
  model.close();
  write_file_atomically(writer.path("trainer_state.json"), fmt::format("{{\"step\": {}}}\n", step));
  writer.commit();
}

std::vector<int64_t> steps_in(const Path& checkpoints) {
  std::vector<int64_t> steps;
  for (const CheckpointInfo& checkpoint : list_checkpoints(checkpoints)) steps.push_back(checkpoint.step);
  return steps;
}

/// What must hold after any fault in the saving of step 2: step 1 is there, and what is listed is whole.
void check_only_whole_checkpoints(const Path& checkpoints) {
  const std::vector<CheckpointInfo> found = list_checkpoints(checkpoints);
  REQUIRE(!found.empty());
  CHECK(found.front().step == 1);
  for (const CheckpointInfo& checkpoint : found) {
    verify_checkpoint(checkpoint.path);
    const Tensor weight = SafetensorsFile::open(checkpoint.path / "model.safetensors").tensor("weight");
    CHECK(weight.to_vector<float>()[0] == static_cast<float>(checkpoint.step));
  }
}

void check_no_leftovers(const Path& folder) {
  for (const std::string& name : list_directory(folder)) CHECK(name[0] != '.');
}

TEST_CASE("checkpoint_folder: what is committed is listed by step and verifies") {
  TestRun run;
  CHECK(list_checkpoints(run.checkpoints()).empty());
  CHECK_FALSE(latest_checkpoint(run.checkpoints()).has_value());
  for (int64_t step : {1000000000, 20, 3}) save(run.checkpoints(), step);
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{3, 20, 1000000000});
  CHECK(latest_checkpoint(run.checkpoints())->path == run.checkpoints() / "step-1000000000");
  CHECK(checkpoint_name(1000) == "step-000001000");
  for (const CheckpointInfo& checkpoint : list_checkpoints(run.checkpoints()))
    verify_checkpoint(checkpoint.path);
  verify_checkpoint(run.checkpoint(3) / "");
  check_no_leftovers(run.checkpoints());
}

TEST_CASE("checkpoint_folder: the manifest has sizes and hashes of files and tensors") {
  TestRun run;
  save(run.checkpoints(), 7);
  const std::string manifest = read_text_file(run.checkpoint(7) / "MANIFEST.json", 10000);
  for (const char* part : {"\"format\": \"headwater-checkpoint/1\"", "\"step\": 7",
                           "\"model.safetensors\": {", "\"size\": ", "\"xxh3\": \"", "\"weight\": \""}) {
    CHECK_THAT(manifest, ContainsSubstring(part));
  }
}

TEST_CASE("checkpoint_folder: folders of other names or without a manifest are not listed") {
  TestRun run;
  save(run.checkpoints(), 1);
  for (const char* name : {"step-000000002", "step-3", "step-", "step-00000000x", "other"}) {
    make_directories(run.checkpoints() / name);
  }
  write_file_atomically(run.checkpoints() / "step-3" / "MANIFEST.json", "{}");
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{1});
}

TEST_CASE("checkpoint_folder: a writer without commit leaves nothing") {
  TestRun run;
  {
    CheckpointWriter writer(run.checkpoints(), 1);
    write_file_atomically(writer.path("model"), "x");
    CHECK(list_directory(run.checkpoints()).size() == 1);
  }
  CHECK(list_directory(run.checkpoints()).empty());
}

TEST_CASE("checkpoint_folder: names that a file in a checkpoint cannot have") {
  TestRun run;
  const CheckpointWriter writer(run.checkpoints(), 1);
  for (const char* name : {"", ".", "..", "a/b", "/a", "MANIFEST.json"}) {
    CHECK_THROWS_WITH(writer.path(name), ContainsSubstring("cannot be the name of a file in a checkpoint"));
  }
  CHECK_THROWS_WITH(CheckpointWriter(run.checkpoints(), -1),
                    ContainsSubstring("must not be negative, got -1"));
}

/// A file system that cannot exchange two names.
class WithoutExchange : public FaultyFileSystem {
 public:
  int exchange(const Path&, const Path&) override {
    errno = EINVAL;
    return -1;
  }
};

TEST_CASE("checkpoint_folder: a checkpoint of the same step is replaced") {
  TestRun run;
  const auto replace = [&](std::string_view text) {
    CheckpointWriter writer(run.checkpoints(), 1);
    write_file_atomically(writer.path("text"), text);
    writer.commit();
    verify_checkpoint(run.checkpoint(1));
    check_no_leftovers(run.checkpoints());
    return read_text_file(run.checkpoint(1) / "text", 100);
  };
  CHECK(replace("one") == "one");
  CHECK(replace("two") == "two");
  WithoutExchange without_exchange;
  FileSystemOverride override(without_exchange);
  CHECK(replace("three") == "three");
}

TEST_CASE("checkpoint_folder: a save that fails at any call harms nothing and leaves nothing") {
  const int error_number = GENERATE(ENOSPC, EIO, EDQUOT, EROFS);
  TestRun run;
  save(run.checkpoints(), 1);
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.failing_call = n, .error_number = error_number});
    try {
      FileSystemOverride override(faulty);
      save(run.checkpoints(), 2);
    } catch (const Error& error) {
      CHECK(error.kind() == ErrorKind::machine);
      CHECK_THAT(error.what(), ContainsSubstring(run.path().string()));
    }
    check_only_whole_checkpoints(run.checkpoints());
    check_no_leftovers(run.checkpoints());
    if (!faulty.has_failed()) break;
    remove_tree(run.checkpoint(2));
    REQUIRE(n < 500);
  }
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{1, 2});
}

TEST_CASE("checkpoint_folder: a save with interrupted calls and short writes succeeds") {
  TestRun run;
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.failing_call = n, .error_number = EINTR, .longest_write = 37});
    {
      FileSystemOverride override(faulty);
      save(run.checkpoints(), 1);
    }
    check_only_whole_checkpoints(run.checkpoints());
    if (!faulty.has_failed()) break;
    REQUIRE(n < 500);
  }
}

TEST_CASE("checkpoint_folder: a save that stops at any call leaves whole checkpoints only") {
  TestRun run;
  save(run.checkpoints(), 1);
  for (int n = 1;; ++n) {
    FaultyFileSystem faulty({.stopping_call = n});
    try {
      FileSystemOverride override(faulty);
      save(run.checkpoints(), 2);
    } catch (const SimulatedStop&) {
    }
    check_only_whole_checkpoints(run.checkpoints());
    if (!faulty.has_stopped()) break;
    remove_tree(run.checkpoint(2));
    REQUIRE(n < 500);
  }
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{1, 2});
  check_no_leftovers(run.checkpoints());  // the last save removed what all the stopped ones left
}

TEST_CASE("checkpoint_folder: a save that stops at any byte leaves whole checkpoints only") {
  TestRun run;
  save(run.checkpoints(), 1);
  for (int64_t n_bytes = 0;; ++n_bytes) {
    FaultyFileSystem faulty({.stopping_byte = n_bytes});
    try {
      FileSystemOverride override(faulty);
      save(run.checkpoints(), 2);
    } catch (const SimulatedStop&) {
    }
    if (!faulty.has_stopped()) break;
    CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{1});
    REQUIRE(n_bytes < 5000);
  }
  check_only_whole_checkpoints(run.checkpoints());
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{1, 2});
}

TEST_CASE("checkpoint_folder: a process that dies at any call leaves whole checkpoints only") {
  TestRun run;
  save(run.checkpoints(), 1);
  int status = 1;
  for (int n = 1; status != 0; ++n) {
    remove_tree(run.checkpoint(2));
    const pid_t child = ::fork();
    if (child == 0) {
      FaultyFileSystem faulty({.stopping_call = n, .exits = true});
      FileSystemOverride override(faulty);
      save(run.checkpoints(), 2);
      ::_exit(0);
    }
    REQUIRE(::waitpid(child, &status, 0) == child);
    check_only_whole_checkpoints(run.checkpoints());
    REQUIRE(n < 500);
  }
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{1, 2});
  save(run.checkpoints(), 3);
  check_no_leftovers(run.checkpoints());  // the dead processes' folders are gone
}

using Survivors = PowerLossFileSystem::Survivors;

TEST_CASE("checkpoint_folder: a power loss at any call of a save leaves whole checkpoints only") {
  const Survivors survivors =
      GENERATE(Survivors::nothing, Survivors::entries, Survivors::bytes, Survivors::removals);
  const bool replaces = GENERATE(false, true);
  TestRun run;
  save(run.checkpoints(), 1);
  if (replaces) save(run.checkpoints(), 2);
  for (int n = 1;; ++n) {
    PowerLossFileSystem faulty(run.path(), {.stopping_call = n});
    try {
      FileSystemOverride override(faulty);
      save(run.checkpoints(), 2);
    } catch (const SimulatedStop&) {
    }
    const TemporaryFolder restored;
    faulty.restore(restored.path(), survivors);
    check_only_whole_checkpoints(restored.path() / "checkpoints");
    if (replaces) CHECK(steps_in(restored.path() / "checkpoints") == std::vector<int64_t>{1, 2});
    if (!faulty.has_stopped()) {
      CHECK(steps_in(restored.path() / "checkpoints") == std::vector<int64_t>{1, 2});
      break;
    }
    if (!replaces) remove_tree(run.checkpoint(2));
    REQUIRE(n < 500);
  }
}

TEST_CASE("checkpoint_folder: the first checkpoint of a run survives a power loss after it") {
  TestRun run;
  PowerLossFileSystem faulty(run.path(), {});
  FileSystemOverride override(faulty);
  save(run.checkpoints(), 1);
  const TemporaryFolder restored;
  faulty.restore(restored.path(), Survivors::nothing);
  check_only_whole_checkpoints(restored.path() / "checkpoints");
}

/// The text of the error that verify_checkpoint must throw.
std::string complaint_about(const Path& checkpoint) {
  try {
    verify_checkpoint(checkpoint);
  } catch (const Error& error) {
    CHECK(error.kind() == ErrorKind::input);
    return error.what();
  }
  FAIL(checkpoint << " verifies");
  return {};
}

void flip_bit(const Path& path, size_t position, int bit) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(position));
  const char byte = static_cast<char>(file.get() ^ (1 << bit));
  file.seekp(static_cast<std::streamoff>(position));
  file.put(byte);
}

TEST_CASE("checkpoint_folder: a damaged tensor is named, and the previous checkpoint offered") {
  TestRun run;
  save(run.checkpoints(), 500);
  save(run.checkpoints(), 1000);
  const Path model = run.checkpoint(1000) / "model.safetensors";
  flip_bit(model, std::filesystem::file_size(model) - 1, 0);
  const std::string text = complaint_about(run.checkpoint(1000));
  CHECK_THAT(text, ContainsSubstring(model.string() + ": is damaged: its hash is "));
  CHECK_THAT(text, ContainsSubstring("; tensor 'weight' is damaged: its hash is "));
  CHECK_THAT(text, ContainsSubstring(
                       "; the previous checkpoint step-000000500 is intact: resume with --checkpoint " +
                       run.checkpoint(500).string()));
  verify_checkpoint(run.checkpoint(500));
}

TEST_CASE("checkpoint_folder: every kind of damage has its text") {
  TestRun run;
  save(run.checkpoints(), 1);
  const Path checkpoint = run.checkpoint(1);
  const auto complaint_after = [&](auto&& damage) {
    save(run.checkpoints(), 1);
    damage();
    return complaint_about(checkpoint);
  };
  const Path model = checkpoint / "model.safetensors";
  const auto size = std::filesystem::file_size(model);
  CHECK_THAT(complaint_after([&] { remove_tree(model); }),
             ContainsSubstring(
                 fmt::format("{}: is missing, the manifest says it has {} bytes", model.string(), size)));
  CHECK_THAT(complaint_after([&] { std::filesystem::resize_file(model, size - 1); }),
             ContainsSubstring(
                 fmt::format("{}: has {} bytes, the manifest says {}", model.string(), size - 1, size)));
  CHECK_THAT(complaint_after([&] { flip_bit(model, 9, 0); }), ContainsSubstring("its header is damaged"));
  CHECK_THAT(complaint_after([&] { flip_bit(checkpoint / "trainer_state.json", 3, 2); }),
             ContainsSubstring("trainer_state.json: is damaged: its hash is "));
  CHECK_THAT(
      complaint_after([&] { remove_tree(checkpoint / "MANIFEST.json"); }),
      ContainsSubstring(checkpoint.string() + ": is not a complete checkpoint: it has no MANIFEST.json"));
  CHECK_THAT(complaint_after([&] { write_file_atomically(checkpoint / "MANIFEST.json", "[["); }),
             ContainsSubstring("MANIFEST.json: is damaged: it is not a manifest in JSON"));
  CHECK_THAT(complaint_after([&] {
               write_file_atomically(checkpoint / "MANIFEST.json", R"({"format": "headwater-checkpoint/2"})");
             }),
             ContainsSubstring(
                 "has format 'headwater-checkpoint/2', this Headwater reads 'headwater-checkpoint/1'"));
  const auto complaint_about_manifest = [&](const std::string& text) {
    const std::string hash = hash_text(hash_bytes(text.data(), text.size()));
    write_file_atomically(checkpoint / "MANIFEST.json",
                          fmt::format("{},\"xxh3\":\"{}\"}}", text.substr(0, text.size() - 1), hash));
    return complaint_about(checkpoint);
  };
  CHECK_THAT(complaint_about_manifest(R"({"format":"headwater-checkpoint/1"})"),
             ContainsSubstring("is not a manifest of a checkpoint"));
  CHECK_THAT(
      complaint_about_manifest(R"({"files":{"../x":1},"format":"headwater-checkpoint/1","tensors":{}})"),
      ContainsSubstring("'../x' is not a file's name"));
  CHECK_THAT(complaint_about(checkpoint), ContainsSubstring("; no earlier checkpoint beside it is intact"));
}

TEST_CASE("checkpoint_folder: any cut and any flipped bit is found, and the file named") {
  TestRun run;
  save(run.checkpoints(), 1);
  save(run.checkpoints(), 2);
  for (const std::string& name : list_directory(run.checkpoint(2))) {
    const Path path = run.checkpoint(2) / name;
    const std::string whole = read_text_file(path, 10000);
    for (size_t position = 0; position < whole.size(); ++position) {
      const int bit = static_cast<int>(position * 5 % 8);
      flip_bit(path, position, bit);
      const bool is_blank = name == "MANIFEST.json" && (whole[position] == ' ' || whole[position] == '\n');
      // A blank of the manifest that turned into another blank changes nothing.
      if (!is_blank) CHECK_THAT(complaint_about(run.checkpoint(2)), ContainsSubstring(path.string()));
      flip_bit(path, position, bit);
    }
    verify_checkpoint(run.checkpoint(2));
    for (size_t size = whole.size() - 1; size-- > 0;) {
      std::filesystem::resize_file(path, size);
      CHECK_THAT(complaint_about(run.checkpoint(2)), ContainsSubstring("step-000000001 is intact"));
    }
    write_file_atomically(path, whole);
  }
}

TEST_CASE("checkpoint_folder: retention keeps the newest and the multiples") {
  TestRun run;
  for (int64_t step = 1; step <= 8; ++step) save(run.checkpoints(), step);
  CHECK(apply_retention(run.checkpoints(), 8, 0).empty());
  CHECK(apply_retention(run.checkpoints(), 3, 4) == std::vector<int64_t>{1, 2, 3, 5});
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{4, 6, 7, 8});
  CHECK(apply_retention(run.checkpoints(), 1, 0) == std::vector<int64_t>{4, 6, 7});
  check_no_leftovers(run.checkpoints());
  CHECK_THROWS_WITH(apply_retention(run.checkpoints(), 0, 0), ContainsSubstring("keep_last is 0"));
  CHECK_THROWS_WITH(apply_retention(run.checkpoints(), 1, -1), ContainsSubstring("keep_every is -1"));
}

TEST_CASE("checkpoint_folder: retention never deletes the newest intact checkpoint") {
  TestRun run;
  for (int64_t step = 1; step <= 4; ++step) save(run.checkpoints(), step);
  flip_bit(run.checkpoint(4) / "model.safetensors", 0, 0);
  flip_bit(run.checkpoint(3) / "trainer_state.json", 0, 0);
  CHECK(apply_retention(run.checkpoints(), 1, 0) == std::vector<int64_t>{1, 3});
  CHECK(steps_in(run.checkpoints()) == std::vector<int64_t>{2, 4});
  flip_bit(run.checkpoint(2) / "trainer_state.json", 0, 0);
  CHECK(apply_retention(run.checkpoints(), 1, 0).empty());  // nothing is intact: nothing goes
}

TEST_CASE("checkpoint_folder: a deletion that stops or loses power anywhere leaves whole checkpoints only") {
  const Survivors survivors =
      GENERATE(Survivors::nothing, Survivors::entries, Survivors::bytes, Survivors::removals);
  for (int n = 1;; ++n) {
    TestRun run;
    for (int64_t step = 1; step <= 3; ++step) save(run.checkpoints(), step);
    PowerLossFileSystem faulty(run.path(), {.stopping_call = n});
    try {
      FileSystemOverride override(faulty);
      apply_retention(run.checkpoints(), 1, 0);
    } catch (const SimulatedStop&) {
    }
    const TemporaryFolder restored;
    faulty.restore(restored.path(), survivors);
    for (const Path& folder : {run.checkpoints(), restored.path() / "checkpoints"}) {
      REQUIRE(latest_checkpoint(folder)->step == 3);
      for (const CheckpointInfo& checkpoint : list_checkpoints(folder)) verify_checkpoint(checkpoint.path);
      remove_leftovers(folder);
      check_no_leftovers(folder);
    }
    if (!faulty.has_stopped()) break;
    REQUIRE(n < 500);
  }
}

TEST_CASE("checkpoint_folder: a checkpoint deleted while it is read stays readable") {
  TestRun run;
  save(run.checkpoints(), 1);
  save(run.checkpoints(), 2);
  const SafetensorsFile file = SafetensorsFile::open(run.checkpoint(1) / "model.safetensors");
  apply_retention(run.checkpoints(), 1, 0);
  CHECK(file.tensor("weight").to_vector<float>() == std::vector<float>{1, 1});
}

TEST_CASE("checkpoint_folder: leftovers of the living stay, those of the dead go") {
  TestRun run;
  make_directories(run.path() / ".tmp-step-000000001-1");  // process 1 is always alive
  make_directories(run.path() / ".tmp-step-000000002-999999999");
  make_directories(run.path() / ".trash-step-000000003-1" / "below");
  write_file_atomically(run.path() / ".tmp-notes", "a user's");
  remove_leftovers(run.path());
  CHECK(list_directory(run.path()) == std::vector<std::string>{".tmp-notes", ".tmp-step-000000001-1"});
}

TEST_CASE("RunLock: a second job on the same run is refused until the first leaves") {
  TestRun run;
  const std::string path = (run.path() / "run.lock").string();
  {
    const RunLock first(run.path());
    CHECK_THROWS_WITH(
        RunLock(run.path()),
        ContainsSubstring(fmt::format("{}: this run is in use by process {} on host ", path, ::getpid())));
    CHECK_THROWS_WITH(RunLock(run.path()), ContainsSubstring("; wait until it ends or stop it, or give"));
  }
  CHECK(read_text_file(path, 10).empty());
  const RunLock second(run.path());
}

TEST_CASE("RunLock: a lock of a killed process is taken over") {
  TestRun run;
  const pid_t child = ::fork();
  if (child == 0) {
    const RunLock lock(run.path());
    ::_exit(0);  // no destructor runs
  }
  int status = 1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK_THAT(read_text_file(run.path() / "run.lock", 1000), ContainsSubstring(fmt::format(" {} ", child)));
  const RunLock lock(run.path());
  CHECK_THAT(read_text_file(run.path() / "run.lock", 1000),
             ContainsSubstring(fmt::format(" {} ", ::getpid())));
}

TEST_CASE("RunLock: a lock that a process of another host left is refused with what to do") {
  TestRun run;
  write_file_atomically(run.path() / "run.lock", "far-away 12 2026-11-23T10:00:00Z\n");
  CHECK_THROWS_WITH(
      RunLock(run.path()),
      ContainsSubstring("in use by process 12 on host far-away since 2026-11-23T10:00:00Z; a lock may "
                        "not reach across hosts: if that process is gone, remove this file"));
  remove_tree(run.path() / "run.lock");
  const RunLock lock(run.path());
}

/// A file system without locks.
class WithoutLocks : public FaultyFileSystem {
 public:
  int lock(int) override {
    errno = ENOSYS;
    return -1;
  }
};

TEST_CASE("RunLock: where the file system has no locks, the process that is named decides") {
  TestRun run;
  WithoutLocks without_locks;
  FileSystemOverride override(without_locks);
  {
    const RunLock first(run.path());
    CHECK_THROWS_WITH(RunLock(run.path()), ContainsSubstring("this run is in use by process"));
    const std::string text = read_text_file(run.path() / "run.lock", 1000);
    const std::string host = text.substr(0, text.find(' '));
    write_file_atomically(run.path() / "run.lock", host + " 999999999 2026-11-23T10:00:00Z\n");
    CHECK_NOTHROW(RunLock(run.path()));
  }
}

TEST_CASE("RunLock: a lock file that says nothing readable is taken over if it is free") {
  TestRun run;
  write_file_atomically(run.path() / "run.lock", "\x01garbage");
  CHECK_NOTHROW(RunLock(run.path()));
}

TEST_CASE("RunLock: a missing run folder is an input error") {
  CHECK_THROWS_WITH(RunLock("/nowhere/run"),
                    ContainsSubstring("/nowhere/run/run.lock: cannot open: No such file"));
}

}  // namespace
}  // namespace headwater

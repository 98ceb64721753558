// Checkpoint folders that are there whole or not at all, and the lock that keeps two jobs off one run.
//
//   checkpoints/step-000001000/          files of any names, and MANIFEST.json with their sizes and hashes
//   checkpoints/.tmp-step-000001000-PID  being written
//   checkpoints/.trash-step-...-PID      being deleted
//
// A checkpoint appears by one rename, after all its bytes and its manifest are on the disk, and vanishes
// by one rename before any of its bytes do. So a folder named step-* with a manifest is complete, whatever
// died when. Steps order checkpoints, never clocks. Nothing here knows what the files mean.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/files.h"

namespace headwater {

struct CheckpointInfo {
  int64_t step = 0;
  Path path;
};

/// One checkpoint being written. One writer at a time for a folder of checkpoints.
class CheckpointWriter {
 public:
  /// Makes `checkpoints_folder` if it is missing, removes what dead writers left there, and makes the
  /// temporary folder. Throws as throw_file_error does. `step` >= 0.
  CheckpointWriter(const Path& checkpoints_folder, int64_t step);
  /// Without commit() the temporary folder goes; nothing is thrown.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Where to write the file `name`: a plain file name, any but MANIFEST.json.
  Path path(const std::string& name) const;
  /// The temporary folder, for other ranks to write into.
  const Path& folder() const { return temporary_; }

  /// Call when all files are closed. Hashes and syncs every file of the folder, adds the manifest, and makes
  /// the checkpoint appear; an older checkpoint of the same step is replaced. If it throws, no checkpoint has
  /// appeared, except where the very last sync fails: then it is there, but might not survive a power loss.
  CheckpointInfo commit();

 private:
  Path checkpoints_folder_;
  int64_t step_;
  Path temporary_;
  bool is_committed_ = false;
};

/// "step-000001000".
std::string checkpoint_name(int64_t step);

/// The complete checkpoints, by step; none for a missing folder.
std::vector<CheckpointInfo> list_checkpoints(const Path& checkpoints_folder);

/// The complete checkpoint with the largest step, if there is one.
std::optional<CheckpointInfo> latest_checkpoint(const Path& checkpoints_folder);

/// Compares every file with the manifest: size, hash. Throws an input error that names the file, the tensor
/// if one inside a safetensors file is damaged, what was expected and found, and the newest earlier
/// checkpoint beside it that is intact.
void verify_checkpoint(const Path& checkpoint);

/// Deletes all checkpoints but the `keep_last` >= 1 newest, those whose step is a multiple of `keep_every`
/// (0: that keeps none), and the newest intact one, to know which it reads the newest whole. Deletes nothing
/// where none is intact. Returns the steps deleted.
std::vector<int64_t> apply_retention(const Path& checkpoints_folder, int keep_last, int64_t keep_every);

/// Removes the temporary files and folders (.tmp-*-PID) in `folder` that dead processes left, and ours, and
/// all trash. Call it while this process writes nothing there. CheckpointWriter does so for its folder.
void remove_leftovers(const Path& folder);

/// A run folder that this process alone may write, from construction to destruction. The system's lock ends
/// with the process, however it dies; the lock file, run.lock, also says who holds it.
class RunLock {
 public:
  /// Throws an input error if another process holds the lock, or a process of another host left it behind
  /// (a lock may not reach across hosts, so that one may still be alive); the text says who and since when.
  explicit RunLock(const Path& run_folder);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  Path path_;
  LockFile file_;
};

}  // namespace headwater

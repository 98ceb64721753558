// Runs kernels on the host as a GPU would, and stricter: every thread of a block is a fiber, threads and blocks run in
// an order that a seed decides, and what a GPU leaves undefined ends the launch with an error that names kernel, block,
// thread, file and line: a barrier or a warp-wide word that some threads do not reach, shared memory that two threads
// use without a barrier between them or that nobody wrote, writes beyond the ends of arrays and tensors, misaligned
// vectors. What it cannot show: time, and races between blocks on global memory beyond what other orders make visible.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace headwater::emulator {

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

/// Where a kernel uses a word of core/cuda/device.h.
struct Site {
  const char* word;
  const char* file;
  int line;
};

struct SharedPiece;

// ---- the host's side

/// Runs `thread` once for every thread of every block. Throws std::logic_error for what a kernel does wrong.
void run(const char* name, const std::array<int64_t, 3>& grid, int block, int64_t shared_bytes,
         const std::function<void()>& thread);
/// Runs `work`, or keeps it for launch_recording between begin_recording and end_recording (core/cuda/runtime.h).
void run_or_record(std::function<void()> work);
/// Decides the order of threads and blocks from here on; HEADWATER_EMULATOR_SEED in the environment at first.
void set_seed(uint64_t seed);

// ---- the kernel's side: only inside run()

Index3 thread_index();
Index3 block_index();
Index3 block_dim();
Index3 grid_dim();

/// Waits for all threads of the block.
void meet_block(const Site& site);

/// Waits for all lanes of the warp; the last one to come computes every lane's `out` from all lanes' `in`.
using Combine = std::function<void(const std::array<const void*, 32>& in, const std::array<void*, 32>& out)>;
void meet_warp(const Site& site, const void* in, void* out, const Combine& combine);
/// After it, what the warp's lanes wrote to shared memory is visible to each of them.
void sync_warp(const Site& site);

/// The block's `ordinal`-th array of shared memory.
SharedPiece* shared_piece(int ordinal, int64_t size, int64_t element_bytes);
/// Checks an access by this thread to elements [index, index + count) and returns the first one's address.
const void* read_shared(const SharedPiece* piece, int64_t index, int64_t count);
void* write_shared(SharedPiece* piece, int64_t index, int64_t count);

/// 16 bytes from global memory, done as late as is legal: in wait_copies.
void copy_async(SharedPiece* piece, int64_t index, const void* from);
void commit_copies();
void wait_copies(int but_latest);

/// Throws std::logic_error unless `pointer` is a multiple of `bytes`.
void check_alignment(const void* pointer, size_t bytes, const char* word);

}  // namespace headwater::emulator

#include "core/cuda/emulator/emulator.h"

#include <fmt/core.h>

#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cuda/emulator/device_memory.h"
#include "core/cuda/emulator/fiber.h"
#include "core/cuda/matrix_unit.h"

namespace headwater::emulator {

/// Who used an element of shared memory last. An epoch counts the barriers that the block, or a warp, has passed.
struct Use {
  int64_t block_epoch = -1;
  int64_t warp_epoch = 0;
  int16_t thread = 0;
  bool several = false;  ///< threads of one warp
  bool many = false;     ///< threads of several warps
};

struct SharedPiece {
  int64_t size, element_bytes;
  std::unique_ptr<char[]> data;
  std::vector<Use> writers, readers;
};

namespace {

enum class Status { ready, waits_for_block, waits_for_warp, finished };

struct PendingCopy {
  SharedPiece* piece;
  int64_t index;
  const void* from;
};

struct Thread {
  int index = 0;
  Status status = Status::ready;
  Site site{};
  const void* in = nullptr;
  void* out = nullptr;
  Fiber fiber;
  std::vector<std::vector<PendingCopy>> copy_groups;  // committed, oldest first
  std::vector<PendingCopy> uncommitted_copies;

  int warp() const { return index / 32; }
  int lane() const { return index % 32; }
};

struct Warp {
  int arrived = 0;
  int64_t epoch = 0;
};

struct Launch {
  const char* name = "";
  std::array<int64_t, 3> grid{};
  int block = 0;
  int64_t shared_bytes = 0;
  const std::function<void()>* thread = nullptr;
};

/// The block that runs. Its fibers are kept from launch to launch.
struct Block {
  Launch launch;
  std::array<int64_t, 3> index{};
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<SharedPiece>> pieces;
  int64_t shared_bytes_used = 0;
  int arrived = 0, n_finished = 0;
  int64_t epoch = 0;
  Thread* current = nullptr;
  std::exception_ptr failure;
};

Block& block() {
  static thread_local Block instance;
  return instance;
}

uint64_t& random_state() {
  static uint64_t state = [] {
    const char* text = std::getenv("HEADWATER_EMULATOR_SEED");
    return text != nullptr ? std::strtoull(text, nullptr, 10) : 1;
  }();
  return state;
}

/// SplitMix64: orders need no better numbers.
uint64_t next_random() {
  uint64_t z = random_state() += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void shuffle_order(std::vector<int64_t>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

std::string where(const Site& site) {
  return fmt::format("{} at {}:{}", site.word, site.file, site.line);
}

template <class... Args>
[[noreturn]] void complain(fmt::format_string<Args...> format, Args&&... args) {
  const Block& b = block();
  const std::string place = b.current == nullptr
                                ? fmt::format("block ({}, {}, {})", b.index[0], b.index[1], b.index[2])
                                : fmt::format("block ({}, {}, {}), thread {}", b.index[0], b.index[1],
                                              b.index[2], b.current->index);
  throw std::logic_error(fmt::format("kernel {}, {}: {}", b.launch.name, place,
                                     fmt::format(format, std::forward<Args>(args)...)));
}

void finish_copy(const PendingCopy& copy) {
  void* to = write_shared(copy.piece, copy.index, 16 / copy.piece->element_bytes);
  check_alignment(to, 16, "copy_async");
  std::memcpy(to, copy.from, 16);
}

void thread_main(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  Block& b = block();
  try {
    (*b.launch.thread)();
    wait_copies(0);
  } catch (...) {
    if (!b.failure) b.failure = std::current_exception();
  }
  thread->status = Status::finished;
  ++b.n_finished;
}

void pause_current(Status status) {
  Thread& thread = *block().current;
  thread.status = status;
  thread.fiber.yield();
}

/// Nobody can go on: says who waits where, and who is missing.
[[noreturn]] void report_stuck(const Block& b) {
  for (const auto& thread : b.threads) {
    if (thread->status != Status::waits_for_warp) continue;
    std::string missing;
    for (int lane = 0; lane < 32; ++lane) {
      const Thread& other = *b.threads[thread->warp() * 32 + lane];
      if (other.status == Status::waits_for_warp) continue;
      missing = fmt::format(
          "lane {} {}", lane,
          other.status == Status::finished ? "has left the kernel" : "waits in " + where(other.site));
      break;
    }
    complain("warp {} is divided: lane {} waits in {}, {}; all 32 lanes must reach it together",
             thread->warp(), thread->lane(), where(thread->site), missing);
  }
  std::string waiting, finished;
  int n_waiting = 0;
  for (const auto& thread : b.threads) {
    if (thread->status == Status::waits_for_block) {
      if (n_waiting++ == 0)
        waiting = fmt::format("thread {} waits in {}", thread->index, where(thread->site));
    } else if (finished.empty()) {
      finished = fmt::format("thread {} has left the kernel", thread->index);
    }
  }
  complain("a barrier is missing: {} of {} threads came; {}, {}", n_waiting, b.threads.size(), waiting,
           finished);
}

void run_block(Block& b) {
  b.pieces.clear();
  b.shared_bytes_used = 0;
  b.arrived = b.n_finished = 0;
  b.epoch = 0;
  b.warps.assign(b.launch.block / 32, {});
  std::vector<int64_t> order(b.launch.block);
  std::iota(order.begin(), order.end(), 0);
  shuffle_order(order);
  for (int i = 0; i < b.launch.block; ++i) {
    Thread& thread = *b.threads[i];
    thread.status = Status::ready;
    thread.copy_groups.clear();
    thread.uncommitted_copies.clear();
    thread.fiber.start(&thread_main, &thread);
  }
  while (b.n_finished < b.launch.block) {
    bool progressed = false;
    for (const int64_t i : order) {
      Thread& thread = *b.threads[i];
      if (thread.status != Status::ready) continue;
      progressed = true;
      b.current = &thread;
      thread.fiber.resume();
      b.current = nullptr;
      if (b.failure) std::rethrow_exception(std::exchange(b.failure, nullptr));
    }
    if (!progressed) report_stuck(b);
  }
}

bool ordered_before(const Use& use, const Block& b, const Thread& thread) {
  if (use.block_epoch != b.epoch) return true;
  if (use.many) return false;
  if (use.thread == thread.index && !use.several) return true;
  const bool same_warp = use.thread / 32 == thread.warp();
  return same_warp && use.warp_epoch != b.warps[thread.warp()].epoch;
}

void note(Use& use, const Block& b, const Thread& thread) {
  const Warp& warp = b.warps[thread.warp()];
  if (use.block_epoch == b.epoch && !(use.thread == thread.index && !use.several && !use.many)) {
    const bool same_warp = use.thread / 32 == thread.warp();
    if (use.many || !same_warp) {
      use.many = true;
      return;
    }
    if (use.warp_epoch == warp.epoch) {
      use.several = true;
      return;
    }
  }
  use = {b.epoch, warp.epoch, static_cast<int16_t>(thread.index), false, false};
}

void check_bounds(const SharedPiece* piece, int64_t index, int64_t count, const char* verb) {
  if (index >= 0 && index + count <= piece->size) return;
  complain("{} element {} of a shared array of {}", verb, index < 0 ? index : index + count - 1, piece->size);
}

}  // namespace

void set_seed(uint64_t seed) {
  random_state() = seed;
}

void run(const char* name, const std::array<int64_t, 3>& grid, int block_size, int64_t shared_bytes,
         const std::function<void()>& thread) {
  Block& b = block();
  b.launch = {name, grid, block_size, shared_bytes, &thread};
  while (static_cast<int>(b.threads.size()) < block_size) {
    b.threads.push_back(std::make_unique<Thread>());
    b.threads.back()->index = static_cast<int>(b.threads.size()) - 1;
  }
  // Left over from a larger block: not part of this one.
  std::vector<std::unique_ptr<Thread>> spare;
  while (static_cast<int>(b.threads.size()) > block_size) {
    spare.push_back(std::move(b.threads.back()));
    b.threads.pop_back();
  }
  struct Restore {
    Block& b;
    std::vector<std::unique_ptr<Thread>>& spare;
    ~Restore() {
      b.current = nullptr;
      b.failure = nullptr;
      while (!spare.empty()) {
        b.threads.push_back(std::move(spare.back()));
        spare.pop_back();
      }
    }
  } restore{b, spare};

  std::vector<int64_t> order(grid[0] * grid[1] * grid[2]);
  std::iota(order.begin(), order.end(), 0);
  shuffle_order(order);
  {
    const DeviceMemoryAccess access;
    for (const int64_t i : order) {
      b.index = {i % grid[0], i / grid[0] % grid[1], i / (grid[0] * grid[1])};
      run_block(b);
    }
  }
  check_device_memory(name);
}

Index3 thread_index() {
  return {static_cast<unsigned>(block().current->index), 0, 0};
}
Index3 block_index() {
  const auto& index = block().index;
  return {static_cast<unsigned>(index[0]), static_cast<unsigned>(index[1]), static_cast<unsigned>(index[2])};
}
Index3 block_dim() {
  return {static_cast<unsigned>(block().launch.block), 1, 1};
}
Index3 grid_dim() {
  const auto& grid = block().launch.grid;
  return {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2])};
}

void meet_block(const Site& site) {
  Block& b = block();
  Thread& thread = *b.current;
  thread.site = site;
  for (const auto& other : b.threads) {
    if (b.arrived == 0 || other->status != Status::waits_for_block) continue;
    if (other->site.line == site.line && std::strcmp(other->site.file, site.file) == 0) break;
    complain("{} while thread {} waits in {}: one barrier for all threads of a block", where(site),
             other->index, where(other->site));
  }
  if (++b.arrived < b.launch.block) {
    pause_current(Status::waits_for_block);
    return;
  }
  b.arrived = 0;
  ++b.epoch;
  for (const auto& other : b.threads) other->status = Status::ready;
}

void meet_warp(const Site& site, const void* in, void* out, const Combine& combine) {
  Block& b = block();
  Thread& thread = *b.current;
  Warp& warp = b.warps[thread.warp()];
  thread.site = site;
  thread.in = in;
  thread.out = out;
  const int first = thread.warp() * 32;
  for (int lane = 0; lane < 32 && warp.arrived > 0; ++lane) {
    const Thread& other = *b.threads[first + lane];
    if (other.status != Status::waits_for_warp) continue;
    if (other.site.line == site.line && std::strcmp(other.site.file, site.file) == 0) break;
    complain("{} while lane {} of its warp waits in {}; all 32 lanes must reach the same one", where(site),
             lane, where(other.site));
  }
  if (++warp.arrived < 32) {
    pause_current(Status::waits_for_warp);
    return;
  }
  warp.arrived = 0;
  std::array<const void*, 32> ins{};
  std::array<void*, 32> outs{};
  for (int lane = 0; lane < 32; ++lane) {
    ins[lane] = b.threads[first + lane]->in;
    outs[lane] = b.threads[first + lane]->out;
  }
  combine(ins, outs);
  for (int lane = 0; lane < 32; ++lane) b.threads[first + lane]->status = Status::ready;
}

void sync_warp(const Site& site) {
  meet_warp(site, nullptr, nullptr, [](const auto&, const auto&) {
    Block& b = block();
    ++b.warps[b.current->warp()].epoch;
  });
}

SharedPiece* shared_piece(int ordinal, int64_t size, int64_t element_bytes) {
  Block& b = block();
  if (ordinal < static_cast<int>(b.pieces.size())) {
    SharedPiece* piece = b.pieces[ordinal].get();
    if (piece->size != size || piece->element_bytes != element_bytes) {
      complain("shared array {} has {} elements of {} bytes here, and {} of {} in another thread", ordinal,
               size, element_bytes, piece->size, piece->element_bytes);
    }
    return piece;
  }
  b.shared_bytes_used += (size * element_bytes + 15) / 16 * 16;
  if (b.shared_bytes_used > b.launch.shared_bytes) {
    complain("its shared arrays take {} bytes; the launch gave {}", b.shared_bytes_used,
             b.launch.shared_bytes);
  }
  auto piece = std::make_unique<SharedPiece>();
  piece->size = size;
  piece->element_bytes = element_bytes;
  piece->data = std::make_unique<char[]>(size * element_bytes);
  std::memset(piece->data.get(), 0xff, size * element_bytes);
  piece->writers.resize(size);
  piece->readers.resize(size);
  b.pieces.push_back(std::move(piece));
  return b.pieces.back().get();
}

const void* read_shared(const SharedPiece* piece, int64_t index, int64_t count) {
  const Block& b = block();
  check_bounds(piece, index, count, "reads");
  for (int64_t i = index; i < index + count; ++i) {
    const Use& writer = piece->writers[i];
    if (writer.block_epoch < 0) complain("reads element {} of a shared array that nobody wrote", i);
    if (!ordered_before(writer, b, *b.current)) {
      complain(
          "a race: it reads element {} of a shared array, which thread {} wrote, without a barrier between",
          i, writer.thread);
    }
    note(const_cast<SharedPiece*>(piece)->readers[i], b, *b.current);
  }
  return piece->data.get() + index * piece->element_bytes;
}

void* write_shared(SharedPiece* piece, int64_t index, int64_t count) {
  const Block& b = block();
  check_bounds(piece, index, count, "writes");
  for (int64_t i = index; i < index + count; ++i) {
    for (const auto& [use, verb] : {std::pair<const Use&, const char*>(piece->writers[i], "wrote"),
                                    std::pair<const Use&, const char*>(piece->readers[i], "read")}) {
      if (use.block_epoch >= 0 && !ordered_before(use, b, *b.current)) {
        complain(
            "a race: it writes element {} of a shared array, which thread {} {}, without a barrier between",
            i, use.thread, verb);
      }
    }
    note(piece->writers[i], b, *b.current);
  }
  return piece->data.get() + index * piece->element_bytes;
}

void copy_async(SharedPiece* piece, int64_t index, const void* from) {
  block().current->uncommitted_copies.push_back({piece, index, from});
}

void commit_copies() {
  Thread& thread = *block().current;
  thread.copy_groups.push_back(std::exchange(thread.uncommitted_copies, {}));
}

void wait_copies(int but_latest) {
  Thread& thread = *block().current;
  while (static_cast<int>(thread.copy_groups.size()) > but_latest) {
    for (const PendingCopy& copy : thread.copy_groups.front()) finish_copy(copy);
    thread.copy_groups.erase(thread.copy_groups.begin());
  }
}

void check_alignment(const void* pointer, size_t bytes, const char* word) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
  complain("{}: {} is not a multiple of {} bytes", word, pointer, bytes);
}

void multiply_on_matrix_unit(const Site& site, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             bool is_bf16) {
  MatrixUnitRequest request;
  std::memcpy(request.a, a, sizeof(a));
  std::memcpy(request.b, b, sizeof(b));
  std::memcpy(request.c, c, sizeof(c));
  meet_warp(site, &request, &c[0], [is_bf16](const auto& in, const auto& out) {
    const auto lane = [&](int g, int t) -> const MatrixUnitRequest& {
      return *static_cast<const MatrixUnitRequest*>(in[g * 4 + t]);
    };
    const auto half = [](uint32_t word, int which) {
      return to_float(BFloat16{static_cast<uint16_t>(which == 0 ? word & 0xffff : word >> 16)});
    };
    const auto tf32 = [](uint32_t word) {
      const uint32_t bits = word & 0xffffe000u;  // the unit reads no more
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    };
    const int depth = is_bf16 ? 16 : 8;
    float A[16][16], B[16][8];
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < depth; ++k) {
        A[row][k] = is_bf16 ? half(lane(row % 8, k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2)
                            : tf32(lane(row % 8, k % 4).a[row / 8 + k / 4 * 2]);
      }
    }
    for (int k = 0; k < depth; ++k) {
      for (int column = 0; column < 8; ++column) {
        B[k][column] =
            is_bf16 ? half(lane(column, k % 8 / 2).b[k / 8], k % 2) : tf32(lane(column, k % 4).b[k / 4]);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = 2 * (l % 4) + i % 2;
        float sum = static_cast<const MatrixUnitRequest*>(in[l])->c[i];
        for (int k = 0; k < depth; ++k) sum += A[row][k] * B[k][column];
        static_cast<float*>(out[l])[i] = sum;
      }
    }
  });
}

}  // namespace headwater::emulator

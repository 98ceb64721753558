// The emulator notices what it is there for: each test plants one mistake.

#include "core/cuda/launch.h"
#include "core/cuda/matrix_unit.h"
#include "core/tensor.h"
#include "tests/catch.h"
#include "tests/error_text.h"

using namespace headwater;

namespace {

const Device gpu = parse_device("cuda");

/// Neighbours exchange through shared memory.
__global__ void exchange(const float* x, float* y, bool with_barrier) {
  SharedMemory shared;
  const SharedArray<float> values = shared.array<float>(static_cast<int>(blockDim.x));
  const int i = static_cast<int>(threadIdx.x);
  values[i] = x[i];
  if (with_barrier) sync_block();
  y[i] = values[(i + 1) % static_cast<int>(blockDim.x)];
}

__global__ void race_of_writers(float* y) {
  SharedMemory shared;
  const SharedArray<float> value = shared.array<float>(1);
  value[0] = static_cast<float>(threadIdx.x);
  sync_block();
  if (threadIdx.x == 0) y[0] = value[0];
}

__global__ void leave_before_barrier(float* y) {
  if (threadIdx.x == 5) return;
  sync_block();
  y[threadIdx.x] = 1.0f;
}

__global__ void divided_warp(float* y) {
  float value = 1.0f;
  if (threadIdx.x < 7) value = shuffle_xor(value, 1);
  y[threadIdx.x] = value;
}

__global__ void write_at(float* y, int64_t index) {
  if (threadIdx.x == 0) y[index] = 1.0f;
}

__global__ void shared_beyond_end() {
  SharedMemory shared;
  const SharedArray<float> values = shared.array<float>(32);
  values[static_cast<int>(threadIdx.x) + 1] = 0.0f;
}

__global__ void read_unwritten(float* y) {
  SharedMemory shared;
  const SharedArray<float> values = shared.array<float>(64);
  values[static_cast<int>(threadIdx.x)] = 0.0f;
  sync_block();
  y[threadIdx.x] = values[static_cast<int>(threadIdx.x) + 32];
}

__global__ void write_all_but_one(float* y) {
  if (threadIdx.x != 9) y[threadIdx.x] = 1.0f;
}

__global__ void read_copy(const float* x, float* y, bool with_wait) {
  SharedMemory shared;
  const SharedArray<float> values = shared.array<float>(128);
  const int i = static_cast<int>(threadIdx.x);
  copy_async(values, 4 * i, x + 4 * i);
  commit_copies();
  if (with_wait) wait_copies<0>();
  sync_block();
  y[i] = values[(4 * i + 4) % 128];
}

__global__ void misaligned(const float* x, float* y) {
  const Packed<float, 4> four = load_packed<4>(x + 1);
  y[threadIdx.x] = four.values[0];
}

/// c (16 x 8) = a (16 x 16) b (16 x 8), one warp.
template <class T>
__global__ void multiply_tiles(const T* a, const T* b, float* c) {
  SharedMemory shared;
  const SharedArray<T> a_shared = shared.array<T>(256), b_shared = shared.array<T>(128);
  for (int i = lane_index(); i < 256; i += 32) a_shared[i] = a[i];
  for (int i = lane_index(); i < 128; i += 32) b_shared[i] = b[i];
  sync_block();
  WarpTile<1, 1> tile;
  tile.clear();
  tile.add_product(SharedMatrix<T>{a_shared, 0, 16}, SharedMatrix<T>{b_shared, 0, 8}, 16);
  tile.for_each([&](int row, int column, float value) { c[row * 8 + column] = value; });
}

/// c (16 x 16) = a (16 x 16) b (16 x 16), one warp, each of a and b as rows or as columns of what is in shared memory.
template <class T>
__global__ void multiply_rows_and_columns(const T* a, const T* b, bool a_transposed, bool b_transposed,
                                          float* c) {
  constexpr int step = 16 + 16 / sizeof(T);
  SharedMemory shared;
  const SharedRows<T> a_rows{shared.array<T>(16 * step), 0, step},
      b_rows{shared.array<T>(16 * step), 0, step};
  for (int i = lane_index(); i < 256; i += 32) {
    a_rows.set(a_transposed ? i % 16 : i / 16, a_transposed ? i / 16 : i % 16, a[i]);
    b_rows.set(b_transposed ? i % 16 : i / 16, b_transposed ? i / 16 : i % 16, b[i]);
  }
  sync_block();
  WarpTile<1, 2> tile;
  tile.clear();
  if (a_transposed && b_transposed) tile.add_product(a_rows.transposed(), b_rows.transposed(), 16, 16);
  if (a_transposed && !b_transposed) tile.add_product(a_rows.transposed(), b_rows, 16, 16);
  if (!a_transposed && b_transposed) tile.add_product(a_rows, b_rows.transposed(), 16, 16);
  if (!a_transposed && !b_transposed) tile.add_product(a_rows, b_rows, 16, 16);
  tile.for_each([&](int row, int column, float value) { c[row * 16 + column] = value; });
}

template <class Body>
std::string mistake(const Body& body) {
  try {
    body();
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "nothing was noticed";
}

Tensor counted(int64_t n) {
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = static_cast<float>(i);
  return Tensor::from_vector<float>({n}, values).to(gpu);
}

}  // namespace

TEST_CASE("emulator: a kernel without a mistake runs, in any order") {
  const Tensor x = counted(128), y = empty_like(x);
  for (uint64_t seed = 1; seed < 5; ++seed) {
    emulator::set_seed(seed);
    launch("exchange", exchange, {.block = 128, .shared_bytes = shared_bytes<float>(128)}, x.data<float>(),
           y.data<float>(), true);
    const std::vector<float> values = y.to_vector<float>();
    for (int i = 0; i < 128; ++i) CHECK(values[i] == static_cast<float>((i + 1) % 128));
  }
}

TEST_CASE("emulator: a missing barrier is a race between reader and writer") {
  const Tensor x = counted(64), y = empty_like(x);
  const std::string text = mistake([&] {
    launch("exchange", exchange, {.block = 64, .shared_bytes = shared_bytes<float>(64)}, x.data<float>(),
           y.data<float>(), false);
  });
  // Which thread comes first decides whether it is seen as a race or as a read of what nobody wrote yet.
  CHECK_THAT(text, ContainsSubstring("kernel exchange, block (0, 0, 0), thread "));
  CHECK((text.find("a race") != std::string::npos || text.find("nobody wrote") != std::string::npos));
}

TEST_CASE("emulator: two writers are a race") {
  const Tensor y = counted(1);
  CHECK_THAT(mistake([&] {
               launch("race_of_writers", race_of_writers,
                      {.block = 64, .shared_bytes = shared_bytes<float>(1)}, y.data<float>());
             }),
             ContainsSubstring("a race: it writes element 0 of a shared array, which thread"));
}

TEST_CASE("emulator: a barrier that a thread does not reach") {
  const Tensor y = counted(64);
  CHECK_THAT(
      mistake([&] { launch("leave_before_barrier", leave_before_barrier, {.block = 64}, y.data<float>()); }),
      ContainsSubstring("a barrier is missing: 63 of 64 threads came") &&
          ContainsSubstring("emulator_test.cu:") && ContainsSubstring("thread 5 has left the kernel"));
}

TEST_CASE("emulator: a warp that does not stay together") {
  const Tensor y = counted(32);
  CHECK_THAT(mistake([&] { launch("divided_warp", divided_warp, {.block = 32}, y.data<float>()); }),
             ContainsSubstring("warp 0 is divided") && ContainsSubstring("shuffle_xor at") &&
                 ContainsSubstring("lane 7 has left the kernel"));
}

#if !defined(__SANITIZE_ADDRESS__)
TEST_CASE("emulator: a write beyond the ends of a tensor") {
  const Tensor y = counted(100);
  CHECK_THAT(mistake([&] { launch("write_at", write_at, {.block = 32}, y.data<float>(), int64_t{100}); }),
             ContainsSubstring("kernel write_at wrote beyond the end of a block of 400 bytes"));
  const Tensor z = counted(100);
  CHECK_THAT(mistake([&] { launch("write_at", write_at, {.block = 32}, z.data<float>(), int64_t{-1}); }),
             ContainsSubstring("wrote"));
}
#endif

TEST_CASE("emulator: shared memory: beyond the end, unwritten, more than was given") {
  const Tensor y = counted(32);
  CHECK_THAT(mistake([&] {
               launch("shared_beyond_end", shared_beyond_end,
                      {.block = 32, .shared_bytes = shared_bytes<float>(32)});
             }),
             ContainsSubstring("writes element 32 of a shared array of 32"));
  CHECK_THAT(mistake([&] {
               launch("read_unwritten", read_unwritten,
                      {.block = 32, .shared_bytes = shared_bytes<float>(64)}, y.data<float>());
             }),
             ContainsSubstring("of a shared array that nobody wrote"));
  CHECK_THAT(
      mistake([&] { launch("shared_beyond_end", shared_beyond_end, {.block = 32, .shared_bytes = 16}); }),
      ContainsSubstring("its shared arrays take 128 bytes; the launch gave 16"));
}

TEST_CASE("emulator: an output that a kernel forgot is not a number") {
  const Tensor y = Tensor::empty({32}, DType::f32, gpu);
  launch("write_all_but_one", write_all_but_one, {.block = 32}, y.data<float>());
  const std::vector<float> values = y.to_vector<float>();
  CHECK(std::isnan(values[9]));
  CHECK(values[8] == 1.0f);
}

TEST_CASE("emulator: a copy has not arrived before it is waited for") {
  const Tensor x = counted(128), y = Tensor::empty({32}, DType::f32, gpu);
  const LaunchShape shape{.block = 32, .shared_bytes = shared_bytes<float>(128)};
  launch("read_copy", read_copy, shape, x.data<float>(), y.data<float>(), true);
  CHECK(y.to_vector<float>()[3] == 16.0f);
  CHECK_THAT(mistake([&] { launch("read_copy", read_copy, shape, x.data<float>(), y.data<float>(), false); }),
             ContainsSubstring("nobody wrote"));
}

TEST_CASE("emulator: a vector at an address that is not a multiple of its size") {
  const Tensor x = counted(64), y = counted(32);
  CHECK_THAT(
      mistake([&] { launch("misaligned", misaligned, {.block = 32}, x.data<float>(), y.data<float>()); }),
      ContainsSubstring("load_packed") && ContainsSubstring("is not a multiple of 16 bytes"));
}

TEST_CASE("emulator: shapes that no GPU runs") {
  const Tensor y = counted(32);
  CHECK_THAT(mistake([&] { launch("write_at", write_at, {.block = 33}, y.data<float>(), int64_t{0}); }),
             ContainsSubstring("write_at: blocks of 33 threads; a multiple of 32 up to 1024"));
  CHECK_THAT(mistake([&] {
               launch("write_at", write_at, {.grid = {1, 70000}, .block = 32}, y.data<float>(), int64_t{0});
             }),
             ContainsSubstring("a grid of (1, 70000, 1) blocks"));
}

TEST_CASE("matrix unit: products of tiles, bf16 exact, f32 to a few units of its precision") {
  std::vector<float> a(256), b(128);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>((i * 37) % 101) / 7.0f - 6.0f;
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>((i * 53) % 89) / 5.0f - 8.0f;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const Tensor at = Tensor::from_vector<float>({16, 16}, a).to(dtype);
    const Tensor bt = Tensor::from_vector<float>({16, 8}, b).to(dtype);
    const Tensor c = Tensor::empty({16, 8}, DType::f32, gpu);
    const Tensor a_gpu = at.to(gpu), b_gpu = bt.to(gpu);
    if (dtype == DType::f32) {
      launch("multiply_tiles", multiply_tiles<float>,
             {.block = 32, .shared_bytes = shared_bytes<float>(256) + shared_bytes<float>(128)},
             a_gpu.data<float>(), b_gpu.data<float>(), c.data<float>());
    } else {
      launch("multiply_tiles", multiply_tiles<BFloat16>,
             {.block = 32, .shared_bytes = shared_bytes<BFloat16>(256) + shared_bytes<BFloat16>(128)},
             a_gpu.data<BFloat16>(), b_gpu.data<BFloat16>(), c.data<float>());
    }
    const std::vector<double> a_read = at.to_vector<double>(), b_read = bt.to_vector<double>();
    const std::vector<float> result = c.to_vector<float>();
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        double sum = 0.0, size = 0.0;
        for (int k = 0; k < 16; ++k) {
          const double product = a_read[row * 16 + k] * b_read[k * 8 + column];
          sum += product;
          size += std::abs(product);
        }
        CHECK(std::abs(result[row * 8 + column] - sum) <= 1e-6 * size);
      }
    }
  }
}

TEST_CASE("matrix unit: rows and columns of shared memory, loaded by blocks of 8 x 8") {
  std::vector<float> a(256), b(256);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>((i * 37) % 101 - 50);
  for (int i = 0; i < 256; ++i) b[i] = static_cast<float>((i * 53) % 89 - 44);
  const Tensor a_cpu = Tensor::from_vector<float>({16, 16}, a),
               b_cpu = Tensor::from_vector<float>({16, 16}, b);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const bool a_transposed : {false, true}) {
      for (const bool b_transposed : {false, true}) {
        const Tensor at = a_cpu.to(dtype).to(gpu), bt = b_cpu.to(dtype).to(gpu);
        const Tensor c = Tensor::empty({16, 16}, DType::f32, gpu);
        dispatch_cuda(dtype, "test", [&](auto element) {
          using T = decltype(element);
          launch("multiply_rows_and_columns", multiply_rows_and_columns<T>,
                 {.block = 32, .shared_bytes = 2 * shared_bytes<T>(16 * (16 + 16 / sizeof(T)))}, at.data<T>(),
                 bt.data<T>(), a_transposed, b_transposed, c.data<float>());
        });
        // Small integers: every product and sum is exact.
        std::vector<float> expected(256, 0.0f);
        for (int i = 0; i < 256; ++i) {
          for (int k = 0; k < 16; ++k) expected[i] += a[i / 16 * 16 + k] * b[k * 16 + i % 16];
        }
        INFO(name_of(dtype) << ", transposed " << a_transposed << b_transposed);
        CHECK(c.to_vector<float>() == expected);
      }
    }
  }
}

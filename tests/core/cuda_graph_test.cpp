#include "core/cuda/graph.h"

#include "core/cuda/runtime.h"

#include "core/tensor.h"
#include "tests/catch.h"
#include "tests/gradient_check.h"

using namespace headwater;

TEST_CASE("cuda graph: runs what was recorded, on what the memory holds then") {
  if (!has_cuda()) return;
  const Device gpu = parse_device("cuda");
  const Tensor x = Tensor::full({100}, 2.0, DType::f32, gpu), sum = Tensor::zeros({100}, DType::f32, gpu);
  const cuda::Graph graph(gpu, [&] {
    const Tensor twice = x.clone();  // lives in the graph's own memory
    add_in_place(twice, x);
    add_in_place(sum, twice);
  });
  CHECK(sum.to_vector<float>()[99] == 0.0f);
  graph.launch();
  x.fill(10.0);
  const Tensor other = Tensor::full({100}, 7.0, DType::f32, gpu);
  graph.launch();
  CHECK(sum.to_vector<float>()[99] == 24.0f);
  CHECK(other.to_vector<float>()[0] == 7.0f);
}

TEST_CASE("cuda: no memory left: what was asked for, what holds the rest, what would help") {
  if (cuda::backend() != cuda::Backend::emulated) return;
  const Device gpu = parse_device("cuda");
  const MemoryLabel label("optimizer");
  const Tensor held = Tensor::empty({1 << 18}, DType::f32, gpu);
  CHECK_THROWS_WITH(
      Tensor::empty({int64_t{1} << 32}, DType::f32, gpu),
      ContainsSubstring("out of memory on cuda:0: 16.0 GiB asked for by optimizer, 1.0 MiB in use") &&
          ContainsSubstring("1.0 MiB by optimizer") &&
          ContainsSubstring("use a smaller train.micro_batch or data.length, or train.recompute: blocks"));
}

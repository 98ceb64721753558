#include "ops/document_positions/document_positions.h"

#include "tests/catch.h"
#include "tests/error_text.h"
#include "tests/gradient_check.h"
#include "tests/sequences.h"

using namespace headwater;

TEST_CASE("document_positions: steps are counted from a document's start, and on from an earlier piece") {
  const Tensor resets = Tensor::from_vector<int32_t>({2, 5}, {0, 0, 1, 0, 0, 1, 1, 0, 0, 0});
  const Tensor n_seen = Tensor::from_vector<int32_t>({2}, {7, 3});
  const DocumentPositions fresh = document_positions(resets, {}, 2, 5, {});
  CHECK(fresh.positions.to_vector<int32_t>() == std::vector<int32_t>{0, 1, 0, 1, 2, 0, 0, 1, 2, 3});
  CHECK(fresh.n_seen.to_vector<int32_t>() == std::vector<int32_t>{3, 4});
  const DocumentPositions gone_on = document_positions(resets, n_seen, 2, 5, {});
  CHECK(gone_on.positions.to_vector<int32_t>() == std::vector<int32_t>{7, 8, 0, 1, 2, 0, 0, 1, 2, 3});
  const DocumentPositions without = document_positions({}, n_seen, 2, 2, {});
  CHECK(without.positions.to_vector<int32_t>() == std::vector<int32_t>{7, 8, 3, 4});
  CHECK(without.n_seen.to_vector<int32_t>() == std::vector<int32_t>{9, 5});
}

TEST_CASE("document_positions: a GPU counts as the CPU does, around the size of a warp") {
  if (!has_cuda()) return;
  const Device cuda = parse_device("cuda");
  const Tensor n_seen = Tensor::from_vector<int32_t>({3}, {0, 7, 100000});
  for (const int64_t length : {1, 31, 32, 33, 65, 200}) {
    for (const double probability : {0.0, 0.02, 0.3}) {
      INFO("length " << length << ", resets " << probability);
      const Tensor resets = random_resets(3, length, probability);
      const DocumentPositions cpu = document_positions(resets, n_seen, 3, length, {});
      const DocumentPositions gpu = document_positions(resets.to(cuda), n_seen.to(cuda), 3, length, cuda);
      CHECK(gpu.positions.to_vector<int32_t>() == cpu.positions.to_vector<int32_t>());
      CHECK(gpu.n_seen.to_vector<int32_t>() == cpu.n_seen.to_vector<int32_t>());
    }
  }
  CHECK(document_positions({}, {}, 1, 3, cuda).positions.to_vector<int32_t>() ==
        std::vector<int32_t>{0, 1, 2});
}

TEST_CASE("document_positions: names what is wrong") {
  CHECK(input_error_of([] {
          document_positions(Tensor::zeros({2, 4}, DType::i32), {}, 2, 5, {});
        }) == "document_positions: resets is i32 (2, 4); it must be i32 (batch, length) = (2, 5)");
  CHECK(input_error_of([] { document_positions({}, Tensor::zeros({3}, DType::i32), 2, 5, {}); }) ==
        "document_positions: n_seen is i32 (3); it must be i32 (batch) = (2)");
}

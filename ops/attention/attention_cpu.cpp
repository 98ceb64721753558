// Attention in tiles of queries x keys, which stay in a core's second-level cache.
//
// Forward, for a block of queries (t) and one block of keys (s) after another, with the running maximum m, sum z and
// accumulator a of each query:
//   S = scale q k^T,  m' = max(m, max_s S),  P = exp(S - m'),  z = z exp(m - m') + sum_s P,  a = a exp(m - m') + P v
// and at the end y = a / z, log_sum = m + log z. Backward (attention.cpp derives it): one pass over the blocks of queries
// for grad_q, one over the blocks of keys for grad_k and grad_v. Both compute P and dS of their tiles again: seven
// products instead of five, but each gradient is written by one task, in one order. Tiles that no query of theirs sees
// are left out; masked entries are set to zero, never multiplied by it.
//
// Indices: b sequence, h head, t query, s key.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/matrix_block.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/attention/attention_kernels.h"
#include "ops/lane_sums.h"

namespace headwater {
namespace {

constexpr int64_t block_size = 64;

struct Sizes {
  explicit Sizes(const AttentionForwardArgs& args)
      : batch(args.q.dim(0)),
        n_queries(args.q.dim(1)),
        n_heads(args.q.dim(2)),
        head_dim(args.q.dim(3)),
        n_keys(args.k.dim(1)),
        n_kv_heads(args.k.dim(2)) {}
  int64_t heads_per_group() const { return n_heads / n_kv_heads; }
  int64_t query_step() const { return n_heads * head_dim; }
  int64_t key_step() const { return n_kv_heads * head_dim; }
  int64_t query_blocks() const { return (n_queries + block_size - 1) / block_size; }
  int64_t key_blocks() const { return (n_keys + block_size - 1) / block_size; }
  int64_t offset() const { return n_keys - n_queries; }  // the step of the first query
  int64_t products() const { return batch * n_heads * n_queries * n_keys * head_dim; }  // at most, of q k^T

  int64_t batch, n_queries, n_heads, head_dim, n_keys, n_kv_heads;
};

/// body(task) for each task, on one thread where all of them are less work than waking others: a decoded token.
template <class Body>
void for_each_task(const Sizes& sizes, int64_t n_tasks, const Body& body) {
  constexpr int64_t least_products = 1 << 16;
  if (sizes.products() >= least_products) {
    parallel_for_each(n_tasks, body);
  } else {
    for (int64_t task = 0; task < n_tasks; ++task) body(task);
  }
}

/// Rows of one head: `size` rows from `begin`, `step` apart.
template <class T>
struct Rows {
  T* data;
  int64_t step;
  int64_t begin = 0, size = 0;

  Rows block(int64_t first, int64_t end) const {
    return {data, step, first, std::min(first + block_size, end) - first};
  }
  T* first() const { return data + begin * step; }
  LeftMatrix<T> left() const { return {first(), step, 1}; }
};

/// One head of one sequence.
template <class T>
struct Head {
  Head(const AttentionForwardArgs& args, const Sizes& sizes, int64_t b, int64_t h)
      : offset(sizes.offset()),
        window(args.window),
        positions(args.positions.defined() ? args.positions.data<int32_t>() + b * sizes.n_queries : nullptr),
        scale(static_cast<T>(args.scale)),
        q(queries(args.q, sizes, b, h)),
        y(queries(args.y, sizes, b, h)),
        k(keys(args.k, sizes, b, h / sizes.heads_per_group())),
        v(keys(args.v, sizes, b, h / sizes.heads_per_group())),
        log_sums(args.log_sums.data<T>() + (b * sizes.n_heads + h) * sizes.n_queries) {}

  static Rows<T> queries(const Tensor& tensor, const Sizes& sizes, int64_t b, int64_t h) {
    return {tensor.data<T>() + (b * sizes.n_queries * sizes.n_heads + h) * sizes.head_dim,
            sizes.query_step()};
  }
  static Rows<T> keys(const Tensor& tensor, const Sizes& sizes, int64_t b, int64_t group) {
    return {tensor.data<T>() + (b * sizes.n_keys * sizes.n_kv_heads + group) * sizes.head_dim,
            sizes.key_step()};
  }

  /// The first key that query t sees; never falls as t rises. The last one is the query's own step.
  int64_t first_key(int64_t t) const {
    const int64_t own = offset + t;
    const int64_t reach = std::min(own, window);
    return own - (positions != nullptr ? std::min<int64_t>(reach, positions[t]) : reach);
  }
  /// The keys of a block that query t sees, as a range of the block's columns; it may be empty.
  std::pair<int64_t, int64_t> visible(int64_t t, const Rows<T>& block) const {
    const int64_t end = std::clamp<int64_t>(offset + t + 1 - block.begin, 0, block.size);
    return {std::clamp<int64_t>(first_key(t) - block.begin, 0, end), end};
  }

  int64_t offset, window;
  const int32_t* positions;
  T scale;
  Rows<T> q, y, k, v;
  T* log_sums;
};

/// The largest of n numbers, by 16 running maxima, which vector registers can follow.
template <class T>
T lane_max(const T* values, int64_t n) {
  constexpr int lanes = 16;
  constexpr T lowest = -std::numeric_limits<T>::infinity();
  T largest[lanes];
  std::fill(largest, largest + lanes, lowest);
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) {
    for (int lane = 0; lane < lanes; ++lane) {
      const T value = values[j + lane];
      largest[lane] = value > largest[lane] ? value : largest[lane];
    }
  }
  T result = *std::max_element(largest, largest + lanes);
  for (; j < n; ++j) result = std::max(result, values[j]);
  return result;
}

/// Memory for one task's matrices, zeroed, so that the padding of every row is 0.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(Tensor::zeros({size}, DTypeOf<T>::value)) {}
  T* take(int64_t rows, int64_t columns) {
    T* result = memory_.data<T>() + used_;
    used_ += rows * columns;
    return result;
  }

 private:
  Tensor memory_;
  int64_t used_ = 0;
};

/// result += left rows, with rows of any width: those that whole vectors do not fit are copied to `buffer`, whose rows
/// are padded.
template <class T>
void add_product(int64_t m, LeftMatrix<T> left, const Rows<T>& rows, int64_t width, T* buffer, T* result) {
  const int64_t padded_width = padded<T>(width);
  if (width == padded_width) {
    multiply_block<T>(m, width, rows.size, left, rows.first(), rows.step, true, result, padded_width);
    return;
  }
  for (int64_t i = 0; i < rows.size; ++i)
    std::copy_n(rows.first() + i * rows.step, width, buffer + i * padded_width);
  multiply_block<T>(m, width, rows.size, left, buffer, padded_width, true, result, padded_width);
}

/// products = left right^T, rows block_size apart; `transposed` is memory for right^T.
template <class T>
void multiply_transposed(const Rows<T>& left, const Rows<T>& right, int64_t width, T* transposed,
                         T* products) {
  transpose_block(right.size, width, right.first(), right.step, transposed, block_size);
  multiply_block<T>(left.size, right.size, width, left.left(), transposed, block_size, false, products,
                    block_size);
}

template <class T>
void write_rows(const T* source, const Rows<T>& rows, int64_t width) {
  for (int64_t i = 0; i < rows.size; ++i) {
    std::copy_n(source + i * padded<T>(width), width, rows.first() + i * rows.step);
  }
}

// ---- forward

template <class T>
class ForwardBlock {
 public:
  ForwardBlock(const Sizes& sizes, const Head<T>& head, int64_t block)
      : sizes_(sizes),
        head_(head),
        queries_(head.q.block(block * block_size, sizes.n_queries)),
        value_step_(padded<T>(sizes.head_dim)),
        scratch_(block_size * (sizes.head_dim + value_step_ + queries_.size) + queries_.size * value_step_),
        keys_transposed_(scratch_.take(sizes.head_dim, block_size)),
        values_(scratch_.take(block_size, value_step_)),
        weights_(scratch_.take(queries_.size, block_size)),
        accumulators_(scratch_.take(queries_.size, value_step_)),
        largest_(queries_.size, -std::numeric_limits<T>::infinity()),
        sums_(queries_.size, T{0}) {}

  void run() {
    const int64_t last = head_.offset + queries_.begin + queries_.size - 1;
    for (int64_t s = head_.first_key(queries_.begin) / block_size * block_size; s <= last; s += block_size) {
      const Rows<T> keys = head_.k.block(s, sizes_.n_keys);
      multiply_transposed(queries_, keys, sizes_.head_dim, keys_transposed_, weights_);
      for (int64_t i = 0; i < queries_.size; ++i) weigh_row(i, keys);
      add_product<T>(queries_.size, {weights_, block_size, 1}, head_.v.block(s, sizes_.n_keys),
                     sizes_.head_dim, values_, accumulators_);
    }
    for (int64_t i = 0; i < queries_.size; ++i) {
      T* accumulator = accumulators_ + i * value_step_;
      for (int64_t p = 0; p < sizes_.head_dim; ++p) accumulator[p] /= sums_[i];
      head_.log_sums[queries_.begin + i] = largest_[i] + std::log(sums_[i]);
    }
    write_rows(accumulators_, Rows<T>{head_.y.data, head_.y.step, queries_.begin, queries_.size},
               sizes_.head_dim);
  }

 private:
  /// Scores become weights relative to the new maximum; what was summed before is brought to it.
  void weigh_row(int64_t i, const Rows<T>& keys) {
    T* row = weights_ + i * block_size;
    const auto [begin, end] = head_.visible(queries_.begin + i, keys);
    std::fill(row, row + begin, T{0});
    std::fill(row + end, row + block_size, T{0});
    if (begin == end) return;
    for (int64_t j = begin; j < end; ++j) row[j] *= head_.scale;
    const T largest = std::max(largest_[i], lane_max(row + begin, end - begin));
    for (int64_t j = begin; j < end; ++j) row[j] = exp_vectorisable(row[j] - largest);
    const T before = exp_vectorisable(largest_[i] - largest);  // 0 in the first tile: largest_ is -infinity
    sums_[i] = sums_[i] * before + lane_sum<T>(end - begin, [&](int64_t j) { return row[begin + j]; });
    largest_[i] = largest;
    T* accumulator = accumulators_ + i * value_step_;
    for (int64_t p = 0; p < value_step_; ++p) accumulator[p] *= before;
  }

  const Sizes& sizes_;
  const Head<T>& head_;
  const Rows<T> queries_;
  const int64_t value_step_;
  Scratch<T> scratch_;
  T *keys_transposed_, *values_, *weights_, *accumulators_;
  std::vector<T> largest_, sums_;
};

template <class T>
void forward(const AttentionForwardArgs& args) {
  const Sizes sizes(args);
  const int64_t n_blocks = sizes.query_blocks();
  for_each_task(sizes, sizes.batch * sizes.n_heads * n_blocks, [&](int64_t item) {
    const int64_t head_index = item / n_blocks;
    const Head<T> head(args, sizes, head_index / sizes.n_heads, head_index % sizes.n_heads);
    ForwardBlock<T>(sizes, head, item % n_blocks).run();
  });
}

// ---- backward

/// P and scale dS of one tile, computed again.
template <class T>
class Tile {
 public:
  explicit Tile(const Sizes& sizes)
      : sizes_(sizes),
        n_rows_(std::min(block_size, sizes.n_queries)),
        scratch_(block_size * (sizes.head_dim + 2 * n_rows_)),
        transposed_(scratch_.take(sizes.head_dim, block_size)),
        weights(scratch_.take(n_rows_, block_size)),
        grad_scores(scratch_.take(n_rows_, block_size)) {}

  void compute(const Head<T>& head, const Rows<T>& grad_y, const T* delta, int64_t t, int64_t s) {
    const Rows<T> queries = head.q.block(t, sizes_.n_queries), keys = head.k.block(s, sizes_.n_keys);
    multiply_transposed(queries, keys, sizes_.head_dim, transposed_, weights);
    multiply_transposed(grad_y.block(t, sizes_.n_queries), head.v.block(s, sizes_.n_keys), sizes_.head_dim,
                        transposed_, grad_scores);
    for (int64_t i = 0; i < queries.size; ++i) {
      T *weight = weights + i * block_size, *grad = grad_scores + i * block_size;
      const T log_sum = head.log_sums[t + i], row_delta = delta[t + i], scale = head.scale;
      const auto [begin, end] = head.visible(t + i, keys);
      for (int64_t j = begin; j < end; ++j) weight[j] = exp_vectorisable(weight[j] * scale - log_sum);
      for (int64_t j = begin; j < end; ++j) grad[j] = scale * weight[j] * (grad[j] - row_delta);
      for (T* row : {weight, grad}) {
        std::fill(row, row + begin, T{0});
        std::fill(row + end, row + block_size, T{0});
      }
    }
  }

 private:
  const Sizes& sizes_;
  const int64_t n_rows_;
  Scratch<T> scratch_;
  T* transposed_;

 public:
  T *weights, *grad_scores;  // rows block_size apart
};

template <class T>
class Backward {
 public:
  explicit Backward(const AttentionBackwardArgs& args)
      : args_(args), sizes_(args.forward), delta_(empty_like(args.forward.log_sums)) {}

  void run() {
    const int64_t query_blocks = sizes_.query_blocks(), key_blocks = sizes_.key_blocks();
    for_each_task(sizes_, sizes_.batch * sizes_.n_heads * query_blocks, [&](int64_t item) {
      const int64_t head = item / query_blocks;
      compute_grad_q(head / sizes_.n_heads, head % sizes_.n_heads, item % query_blocks * block_size);
    });
    for_each_task(sizes_, sizes_.batch * sizes_.n_kv_heads * key_blocks, [&](int64_t item) {
      const int64_t group = item / key_blocks;
      compute_grad_keys(group / sizes_.n_kv_heads, group % sizes_.n_kv_heads, item % key_blocks * block_size);
    });
  }

 private:
  T* delta(int64_t b, int64_t h) const {
    return delta_.data<T>() + (b * sizes_.n_heads + h) * sizes_.n_queries;
  }

  /// Of the block of queries that begins with t; leaves their delta, which the second pass reads.
  void compute_grad_q(int64_t b, int64_t h, int64_t t) const {
    const Head<T> head(args_.forward, sizes_, b, h);
    const Rows<T> grad_y = Head<T>::queries(args_.grad_y, sizes_, b, h);
    const Rows<T> rows = Head<T>::queries(args_.grad_q, sizes_, b, h).block(t, sizes_.n_queries);
    for (int64_t i = t; i < t + rows.size; ++i) {
      delta(b, h)[i] =
          dot_product(grad_y.data + i * grad_y.step, head.y.data + i * head.y.step, sizes_.head_dim);
    }
    Tile<T> tile(sizes_);
    const int64_t width = padded<T>(sizes_.head_dim);
    Scratch<T> scratch((rows.size + block_size) * width);
    T *sums = scratch.take(rows.size, width), *buffer = scratch.take(block_size, width);
    const int64_t last = head.offset + t + rows.size - 1;
    for (int64_t s = head.first_key(t) / block_size * block_size; s <= last; s += block_size) {
      tile.compute(head, grad_y, delta(b, h), t, s);
      add_product<T>(rows.size, {tile.grad_scores, block_size, 1}, head.k.block(s, sizes_.n_keys),
                     sizes_.head_dim, buffer, sums);
    }
    write_rows(sums, rows, sizes_.head_dim);
  }

  /// Of the block of keys that begins with s, which the queries from its own step on see until one sees nothing of it.
  void compute_grad_keys(int64_t b, int64_t group, int64_t s) const {
    const Rows<T> grad_k = Head<T>::keys(args_.grad_k, sizes_, b, group).block(s, sizes_.n_keys);
    const Rows<T> grad_v = Head<T>::keys(args_.grad_v, sizes_, b, group).block(s, sizes_.n_keys);
    Tile<T> tile(sizes_);
    const int64_t width = padded<T>(sizes_.head_dim);
    Scratch<T> scratch(3 * block_size * width);
    T *k_sums = scratch.take(block_size, width), *v_sums = scratch.take(block_size, width);
    T* buffer = scratch.take(block_size, width);
    const int64_t first = std::max<int64_t>(0, s - sizes_.offset()) / block_size * block_size;
    for (int64_t h = group * sizes_.heads_per_group(); h < (group + 1) * sizes_.heads_per_group(); ++h) {
      const Head<T> head(args_.forward, sizes_, b, h);
      const Rows<T> grad_y = Head<T>::queries(args_.grad_y, sizes_, b, h);
      for (int64_t t = first; t < sizes_.n_queries && head.first_key(t) < s + grad_k.size; t += block_size) {
        tile.compute(head, grad_y, delta(b, h), t, s);
        const LeftMatrix<T> weights{tile.weights, 1, block_size},
            grad_scores{tile.grad_scores, 1, block_size};
        add_product<T>(grad_v.size, weights, grad_y.block(t, sizes_.n_queries), sizes_.head_dim, buffer,
                       v_sums);
        add_product<T>(grad_k.size, grad_scores, head.q.block(t, sizes_.n_queries), sizes_.head_dim, buffer,
                       k_sums);
      }
    }
    write_rows(k_sums, grad_k, sizes_.head_dim);
    write_rows(v_sums, grad_v, sizes_.head_dim);
  }

  const AttentionBackwardArgs& args_;
  const Sizes sizes_;
  const Tensor delta_;  // (batch, n_heads, n_queries): grad_y . y
};

}  // namespace

void attention_forward_cpu(const AttentionForwardArgs& args) {
  dispatch_real(args.q.dtype(), "attention", [&](auto element) { forward<decltype(element)>(args); });
}

void attention_backward_cpu(const AttentionBackwardArgs& args) {
  dispatch_real(args.forward.q.dtype(), "attention",
                [&](auto element) { Backward<decltype(element)>(args).run(); });
}

}  // namespace headwater

// The recurrence as matrix products over chunks of the sequence.
//
// Within one chunk of m steps (i, j = 0..m-1), with S the state that enters it, u = value_scale * v and B[i]
// the sum of log decays from the chunk's first step to i:
//   live(i,j) = j <= i and no reset in (j, i]
//   L[i,j]    = live(i,j) exp(B[i] - B[j])           the decay from j to i
//   e[i]      = exp(B[i])          if no reset in [0, i], else 0       from the chunk's start to i
//   f[j]      = exp(B[m-1] - B[j]) if no reset in (j, m-1], else 0     from j to the chunk's end
//   through   = exp(B[m-1])        if no reset in the chunk, else 0
// forward:
//   W    = (q k^T) o L                 (m, m), lower triangle
//   y    = W u + (e q) S
//   S'   = through S + (f k)^T u
// backward, from the last chunk to the first, with g = grad_y, dS' the gradient of the state that leaves, T =
// (g u^T) o L:
//   grad_u = W^T g + f k dS'           grad_q = T k + e g S^T           grad_k = T^T q + f u dS'^T
//   dS     = through dS' + (e q)^T g
//   grad_log_decay[i] = sum_{s < i <= t} T[t,s] (q k^T)[t,s] + sum_{t >= i} e[t] q[t].(S g[t])
//                       + sum_{s < i} f[s] u[s].(dS'^T k[s]) + through <S, dS'>
// The last sum is taken over its ranges directly: as a difference of row and column sums it would cancel.
// The factors e and f are applied where rows are short: to g, u and results of width d_value, not to q and k.
// Masked entries are set to zero, never multiplied by it: beyond the diagonal exp(B[i] - B[j]) overflows.
//
// Source   families of arXiv:2405.21060 sections 6 and 7; derivation of the gradient: differentiate the lines
// above.

#include <vector>

#include "core/matrix_block.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/chunked_matrix_state/matrix_state_head.h"
#include "ops/lane_sums.h"

namespace headwater {
namespace {

struct ChunkSizes {
  explicit ChunkSizes(const MatrixStateForwardArgs& args)
      : batch(args.q.dim(0)),
        length(args.q.dim(1)),
        n_groups(args.q.dim(2)),
        d_key(args.q.dim(3)),
        n_heads(args.v.dim(2)),
        d_value(args.v.dim(3)),
        chunk_len(args.chunk_len),
        n_chunks((length + chunk_len - 1) / chunk_len) {}
  int64_t begin(int64_t chunk) const { return chunk * chunk_len; }
  int64_t n_steps(int64_t chunk) const { return std::min(chunk_len, length - begin(chunk)); }
  int64_t heads_per_group() const { return n_heads / n_groups; }

  int64_t batch, length, n_groups, d_key, n_heads, d_value, chunk_len, n_chunks;
};

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

/// The decays of one head within one chunk: B (as a float pair where T is float: exact differences), e, f,
/// through.
template <class T>
struct ChunkDecay {
  T *sum_high, *sum_low, *from_start, *to_end;
  int64_t* segment_start;  // of each step: the first step of the chunk that it can see
  T through;

  static constexpr int64_t scratch_rows = 4;
  ChunkDecay(Scratch<T>& scratch, int64_t chunk_len, std::vector<int64_t>& segments)
      : sum_high(scratch.take(1, padded<T>(chunk_len))),
        sum_low(scratch.take(1, padded<T>(chunk_len))),
        from_start(scratch.take(1, padded<T>(chunk_len))),
        to_end(scratch.take(1, padded<T>(chunk_len))) {
    segments.resize(chunk_len);
    segment_start = segments.data();
  }

  void compute(const MatrixStateHead<T>& head, int64_t begin, int64_t m) {
    double sum = 0.0;
    int64_t start = 0;
    bool any_reset = false;
    for (int64_t i = 0; i < m; ++i) {
      if (head.is_reset(begin + i)) {
        start = i;  // the decay into a document's first step multiplies nothing
        any_reset = true;
      } else {
        sum += static_cast<double>(head.log_decay_at(begin + i));
      }
      segment_start[i] = start;
      sum_high[i] = static_cast<T>(sum);
      sum_low[i] = static_cast<T>(sum - static_cast<double>(sum_high[i]));
      from_start[i] = any_reset ? T{0} : exp_vectorisable(sum_high[i]);
    }
    decay_row(m - 1, 0, m, to_end);
    for (int64_t j = 0; j < start; ++j) to_end[j] = T{0};
    through = any_reset ? T{0} : exp_vectorisable(sum_high[m - 1]);
  }

  /// target[j] = exp(B[i] - B[j]) for j in [begin, end).
  void decay_row(int64_t i, int64_t begin, int64_t end, T* target) const {
    const T high = sum_high[i], low = sum_low[i];
    for (int64_t j = begin; j < end; ++j)
      target[j] = exp_vectorisable((high - sum_high[j]) + (low - sum_low[j]));
  }
};

/// target rows = source rows, each times its factor (1 where `factors` is null).
template <class T>
void pack_rows(const T* source, int64_t source_step, int64_t rows, int64_t width, const T* factors,
               int64_t factor_step, T* target, int64_t target_step) {
  for (int64_t i = 0; i < rows; ++i) {
    const T factor = factors != nullptr ? factors[i * factor_step] : T{1};
    for (int64_t j = 0; j < width; ++j) target[i * target_step + j] = factor * source[i * source_step + j];
  }
}

/// rows[i] *= factors[i].
template <class T>
void scale_rows(T* rows, int64_t row_step, int64_t n_rows, int64_t width, const T* factors) {
  for (int64_t i = 0; i < n_rows; ++i) {
    for (int64_t j = 0; j < width; ++j) rows[i * row_step + j] *= factors[i];
  }
}

/// The right matrix of a product.
template <class T>
struct RightMatrix {
  const T* data;
  int64_t row_step;
};

/// `source` itself where whole vectors fit its rows, else a padded copy in `buffer`.
template <class T>
RightMatrix<T> right_matrix(const T* source, int64_t source_step, int64_t rows, int64_t width, T* buffer) {
  if (width % n_lanes<T> == 0) return {source, source_step};
  pack_rows<T>(source, source_step, rows, width, nullptr, 0, buffer, padded<T>(width));
  return {buffer, padded<T>(width)};
}

/// q k^T of one chunk, lower triangle, rows `score_step` apart. Heads of a group share it.
template <class T>
void compute_scores(const MatrixStateHead<T>& head, int64_t begin, int64_t m, T* keys_transposed,
                    int64_t score_step, T* scores) {
  transpose_block(m, head.d_key, head.k + begin * head.key_step, head.key_step, keys_transposed, score_step);
  multiply_block<T>(m, m, head.d_key, {head.q + begin * head.key_step, head.key_step, 1}, keys_transposed,
                    score_step, false, scores, score_step, Triangle::result_lower);
}

/// All chunks' scores, computed once per group before the heads are walked: (batch, n_groups, n_chunks,
/// chunk_len, padded chunk_len).
template <class T>
Tensor all_scores(const MatrixStateForwardArgs& args, const ChunkSizes& sizes) {
  const int64_t score_step = padded<T>(sizes.chunk_len);
  const int64_t score_size = sizes.chunk_len * score_step;
  const int64_t n_items = sizes.batch * sizes.n_groups * sizes.n_chunks;
  const Tensor scores = Tensor::empty({n_items, score_size}, args.q.dtype());
  parallel_for(n_items, 1, [&](int64_t first, int64_t last) {
    Scratch<T> scratch(sizes.d_key * score_step);
    T* keys_transposed = scratch.take(sizes.d_key, score_step);
    for (int64_t item = first; item < last; ++item) {
      const int64_t chunk = item % sizes.n_chunks, group = item / sizes.n_chunks % sizes.n_groups;
      const int64_t b = item / sizes.n_chunks / sizes.n_groups;
      const MatrixStateHead<T> head(args, b, group * sizes.heads_per_group());
      compute_scores(head, sizes.begin(chunk), sizes.n_steps(chunk), keys_transposed, score_step,
                     scores.data<T>() + item * score_size);
    }
  });
  return scores;
}

/// state *= through.
template <class T>
void scale_state(T* state, int64_t size, T through) {
  for (int64_t i = 0; i < size; ++i) state[i] *= through;
}

/// weights = scores o L and, where given, grad_scores = grad_scores o L; zeros outside the live pairs. Loops run
/// over whole vectors; what they make of pairs that are not live, infinity maybe, is overwritten.
template <class T>
void weigh(const ChunkDecay<T>& decay, int64_t m, const T* scores, int64_t score_step, T* weights,
           T* grad_scores) {
  for (int64_t i = 0; i < m; ++i) {
    T* weight = weights + i * score_step;
    const T* score = scores + i * score_step;
    const int64_t start = decay.segment_start[i], whole = padded<T>(i + 1);
    decay.decay_row(i, 0, whole, weight);
    const auto keep_live = [=](T* row) {
      std::fill(row, row + start, T{0});
      std::fill(row + i + 1, row + score_step, T{0});
    };
    if (grad_scores != nullptr) {
      T* grad = grad_scores + i * score_step;
      for (int64_t j = 0; j < whole; ++j) grad[j] *= weight[j];
      keep_live(grad);
    }
    for (int64_t j = 0; j < whole; ++j) weight[j] *= score[j];
    keep_live(weight);
  }
}

// ---- forward
// -------------------------------------------------------------------------------------------------------

template <class T>
class ForwardHead {
 public:
  explicit ForwardHead(const ChunkSizes& sizes)
      : sizes_(sizes),
        value_step_(padded<T>(sizes.d_value)),
        score_step_(padded<T>(sizes.chunk_len)),
        scratch_(sizes.d_key * value_step_ + sizes.chunk_len * (3 * value_step_ + score_step_) +
                 ChunkDecay<T>::scratch_rows * score_step_ + value_step_),
        state_(scratch_.take(sizes.d_key, value_step_)),
        values_(scratch_.take(sizes.chunk_len, value_step_)),
        decayed_values_(scratch_.take(sizes.chunk_len, value_step_)),
        result_(scratch_.take(sizes.chunk_len, value_step_)),
        weights_(scratch_.take(sizes.chunk_len, score_step_)),
        skip_(scratch_.take(1, value_step_)),
        decay_(scratch_, sizes.chunk_len, segments_) {}

  /// All chunks of one head; `scores` are its group's.
  void run(const MatrixStateHead<T>& head, const T* scores) {
    for (int64_t p = 0; p < sizes_.d_value; ++p) skip_[p] = head.skip_at(p);
    for (int64_t n = 0; n < sizes_.d_key; ++n) {
      for (int64_t p = 0; p < sizes_.d_value; ++p) {
        state_[n * value_step_ + p] = head.initial_state ? head.initial_state[n * sizes_.d_value + p] : T{0};
      }
    }
    for (int64_t chunk = 0; chunk < sizes_.n_chunks; ++chunk) {
      run_chunk(head, sizes_.begin(chunk), sizes_.n_steps(chunk),
                scores + chunk * sizes_.chunk_len * score_step_);
    }
    pack_rows<T>(state_, value_step_, sizes_.d_key, sizes_.d_value, nullptr, 0, head.final_state,
                 sizes_.d_value);
  }

 private:
  void run_chunk(const MatrixStateHead<T>& head, int64_t begin, int64_t m, const T* scores) {
    const T* scale = head.value_scale ? head.value_scale + begin * head.scale_step : nullptr;
    const LeftMatrix<T> queries{head.q + begin * head.key_step, head.key_step, 1};
    const LeftMatrix<T> keys{head.k + begin * head.key_step, head.key_step, 1};
    decay_.compute(head, begin, m);
    pack_rows(head.v + begin * head.value_step, head.value_step, m, sizes_.d_value, scale, head.scale_step,
              values_, value_step_);
    pack_rows<T>(values_, value_step_, m, sizes_.d_value, decay_.to_end, 1, decayed_values_, value_step_);
    weigh<T>(decay_, m, scores, score_step_, weights_, nullptr);
    multiply_block<T>(m, sizes_.d_value, sizes_.d_key, queries, state_, value_step_, false, result_,
                      value_step_);
    scale_rows(result_, value_step_, m, sizes_.d_value, decay_.from_start);
    multiply_block<T>(m, sizes_.d_value, m, {weights_, score_step_, 1}, values_, value_step_, true, result_,
                      value_step_, Triangle::left_lower);
    write_outputs(head, begin, m);
    scale_state(state_, sizes_.d_key * value_step_, decay_.through);
    multiply_block<T>(sizes_.d_key, sizes_.d_value, m, keys.transposed(), decayed_values_, value_step_, true,
                      state_, value_step_);
  }

  void write_outputs(const MatrixStateHead<T>& head, int64_t begin, int64_t m) {
    for (int64_t i = 0; i < m; ++i) {
      const T* v = head.v + (begin + i) * head.value_step;
      T* y = head.y + (begin + i) * head.value_step;
      const T* result = result_ + i * value_step_;
      for (int64_t p = 0; p < sizes_.d_value; ++p) y[p] = result[p] + skip_[p] * v[p];
    }
  }

  const ChunkSizes sizes_;
  const int64_t value_step_, score_step_;
  Scratch<T> scratch_;
  T *state_, *values_, *decayed_values_, *result_, *weights_, *skip_;
  std::vector<int64_t> segments_;
  ChunkDecay<T> decay_;
};

template <class T>
void forward(const MatrixStateForwardArgs& args) {
  const ChunkSizes sizes(args);
  const Tensor scores = all_scores<T>(args, sizes);
  const int64_t group_size = sizes.n_chunks * sizes.chunk_len * padded<T>(sizes.chunk_len);
  parallel_for_each(sizes.batch * sizes.n_heads, [&](int64_t item) {
    const int64_t b = item / sizes.n_heads, h = item % sizes.n_heads;
    const int64_t group = b * sizes.n_groups + h / sizes.heads_per_group();
    ForwardHead<T>(sizes).run(MatrixStateHead<T>(args, b, h), scores.data<T>() + group * group_size);
  });
}

// ---- backward
// ------------------------------------------------------------------------------------------------------

/// Where the backward of one head puts its results: grad_q and grad_k are added to if `accumulate`, all else is
/// written.
template <class T>
struct HeadGradients {
  const T* grad_y;
  const T* grad_final_state;  // nullptr: zero
  bool accumulate;
  T *grad_q, *grad_k, *grad_v;
  T* grad_log_decay;              // (length), decay_step apart, or nullptr
  T* grad_value_scale;            // (length), scale_step apart, or nullptr
  T* grad_initial_state;          // or nullptr
  double constant_decay = 0.0;    // the sum of grad_log_decay over the sequence
  std::vector<double> grad_skip;  // (d_value)
};

template <class T>
class BackwardHead {
 public:
  explicit BackwardHead(const ChunkSizes& sizes)
      : sizes_(sizes),
        key_step_(padded<T>(sizes.d_key)),
        value_step_(padded<T>(sizes.d_value)),
        score_step_(padded<T>(sizes.chunk_len)),
        states_(Tensor::empty({sizes.n_chunks, sizes.d_value, key_step_}, DTypeOf<T>::value)),
        scratch_(sizes.d_value * key_step_ + sizes.d_key * value_step_ +
                 sizes.chunk_len * (4 * key_step_ + 5 * value_step_ + 2 * score_step_) +
                 sizes.d_value * score_step_ + (ChunkDecay<T>::scratch_rows + 1) * score_step_ + value_step_),
        grad_state_transposed_(scratch_.take(sizes.d_value, key_step_)),
        grad_state_(scratch_.take(sizes.d_key, value_step_)),
        query_buffer_(scratch_.take(sizes.chunk_len, key_step_)),
        key_buffer_(scratch_.take(sizes.chunk_len, key_step_)),
        grad_queries_(scratch_.take(sizes.chunk_len, key_step_)),
        grad_keys_(scratch_.take(sizes.chunk_len, key_step_)),
        values_(scratch_.take(sizes.chunk_len, value_step_)),
        decayed_values_(scratch_.take(sizes.chunk_len, value_step_)),
        grad_output_buffer_(scratch_.take(sizes.chunk_len, value_step_)),
        decayed_grad_outputs_(scratch_.take(sizes.chunk_len, value_step_)),
        grad_values_(scratch_.take(sizes.chunk_len, value_step_)),
        values_transposed_(scratch_.take(sizes.d_value, score_step_)),
        weights_(scratch_.take(sizes.chunk_len, score_step_)),
        grad_scores_(scratch_.take(sizes.chunk_len, score_step_)),
        column_sums_(scratch_.take(1, score_step_)),
        skip_(scratch_.take(1, value_step_)),
        into_end_(sizes.chunk_len),
        decay_(scratch_, sizes.chunk_len, segments_) {}

  void run(const MatrixStateHead<T>& head, const T* scores, HeadGradients<T>& out) {
    for (int64_t p = 0; p < sizes_.d_value; ++p) skip_[p] = head.skip_at(p);
    recompute_states(head);
    set_final_gradient(out);
    out.grad_skip.assign(sizes_.d_value, 0.0);
    for (int64_t chunk = sizes_.n_chunks - 1; chunk >= 0; --chunk) {
      run_chunk(head, chunk, scores + chunk * sizes_.chunk_len * score_step_, out);
    }
    if (out.grad_initial_state != nullptr) {
      pack_rows<T>(grad_state_, value_step_, sizes_.d_key, sizes_.d_value, nullptr, 0, out.grad_initial_state,
                   sizes_.d_value);
    }
  }

 private:
  T* state_entering(int64_t chunk) const { return states_.data<T>() + chunk * sizes_.d_value * key_step_; }

  /// The chunk's decays, u = value_scale * v, and f u.
  void load_chunk(const MatrixStateHead<T>& head, int64_t begin, int64_t m) {
    const T* scale = head.value_scale ? head.value_scale + begin * head.scale_step : nullptr;
    decay_.compute(head, begin, m);
    pack_rows(head.v + begin * head.value_step, head.value_step, m, sizes_.d_value, scale, head.scale_step,
              values_, value_step_);
    pack_rows<T>(values_, value_step_, m, sizes_.d_value, decay_.to_end, 1, decayed_values_, value_step_);
  }

  RightMatrix<T> keys_of(const MatrixStateHead<T>& head, int64_t begin, int64_t m) {
    return right_matrix(head.k + begin * head.key_step, head.key_step, m, sizes_.d_key, key_buffer_);
  }

  /// The state entering every chunk, transposed to (d_value, d_key), as the backward reads it.
  void recompute_states(const MatrixStateHead<T>& head) {
    T* state = state_entering(0);
    std::fill(state, state + sizes_.d_value * key_step_, T{0});
    if (head.initial_state != nullptr) {
      transpose_block(sizes_.d_key, sizes_.d_value, head.initial_state, sizes_.d_value, state, key_step_);
    }
    for (int64_t chunk = 0; chunk + 1 < sizes_.n_chunks; ++chunk) {
      const int64_t m = sizes_.n_steps(chunk);
      load_chunk(head, sizes_.begin(chunk), m);
      T* next = state_entering(chunk + 1);
      for (int64_t i = 0; i < sizes_.d_value * key_step_; ++i) next[i] = decay_.through * state[i];
      const RightMatrix<T> keys = keys_of(head, sizes_.begin(chunk), m);
      multiply_block<T>(sizes_.d_value, sizes_.d_key, m,
                        LeftMatrix<T>{decayed_values_, value_step_, 1}.transposed(), keys.data, keys.row_step,
                        true, next, key_step_);
      state = next;
    }
  }

  void set_final_gradient(const HeadGradients<T>& out) {
    for (int64_t n = 0; n < sizes_.d_key; ++n) {
      for (int64_t p = 0; p < sizes_.d_value; ++p) {
        grad_state_[n * value_step_ + p] =
            out.grad_final_state ? out.grad_final_state[n * sizes_.d_value + p] : T{0};
      }
    }
  }

  void run_chunk(const MatrixStateHead<T>& head, int64_t chunk, const T* scores, HeadGradients<T>& out) {
    const int64_t begin = sizes_.begin(chunk), m = sizes_.n_steps(chunk);
    const int64_t d_key = sizes_.d_key, d_value = sizes_.d_value;
    const T* state = state_entering(chunk);
    load_chunk(head, begin, m);
    const LeftMatrix<T> queries{head.q + begin * head.key_step, head.key_step, 1};
    const RightMatrix<T> keys = keys_of(head, begin, m);
    const RightMatrix<T> right_queries = right_matrix(queries.data, head.key_step, m, d_key, query_buffer_);
    const RightMatrix<T> grad_outputs =
        right_matrix(out.grad_y + begin * head.value_step, head.value_step, m, d_value, grad_output_buffer_);
    pack_rows<T>(grad_outputs.data, grad_outputs.row_step, m, d_value, decay_.from_start, 1,
                 decayed_grad_outputs_, value_step_);
    transpose_block(d_key, d_value, grad_state_, value_step_, grad_state_transposed_, key_step_);

    compute_grad_scores(grad_outputs, m);
    weigh(decay_, m, scores, score_step_, weights_, grad_scores_);

    // What reaches each step through the states first: the gradient of the decays needs these parts alone.
    multiply_block<T>(m, d_key, d_value, {decayed_grad_outputs_, value_step_, 1}, state, key_step_, false,
                      grad_queries_, key_step_);
    multiply_block<T>(m, d_key, d_value, {decayed_values_, value_step_, 1}, grad_state_transposed_, key_step_,
                      false, grad_keys_, key_step_);
    multiply_block<T>(m, d_value, d_key, {keys.data, keys.row_step, 1}, grad_state_, value_step_, false,
                      grad_values_, value_step_);
    scale_rows(grad_values_, value_step_, m, d_value, decay_.to_end);
    if (head.log_decay != nullptr) compute_grad_log_decay(head, begin, m, scores, state, out);

    multiply_block<T>(m, d_key, m, {grad_scores_, score_step_, 1}, keys.data, keys.row_step, true,
                      grad_queries_, key_step_, Triangle::left_lower);
    multiply_block<T>(m, d_key, m, LeftMatrix<T>{grad_scores_, score_step_, 1}.transposed(),
                      right_queries.data, right_queries.row_step, true, grad_keys_, key_step_,
                      Triangle::left_upper);
    multiply_block<T>(m, d_value, m, LeftMatrix<T>{weights_, score_step_, 1}.transposed(), grad_outputs.data,
                      grad_outputs.row_step, true, grad_values_, value_step_, Triangle::left_upper);
    deliver(head, begin, m, out);

    scale_state(grad_state_, d_key * value_step_, decay_.through);
    multiply_block<T>(d_key, d_value, m, queries.transposed(), decayed_grad_outputs_, value_step_, true,
                      grad_state_, value_step_);
  }

  /// grad_scores = g u^T, lower triangle; not yet decayed.
  void compute_grad_scores(const RightMatrix<T>& grad_outputs, int64_t m) {
    transpose_block(m, sizes_.d_value, values_, value_step_, values_transposed_, score_step_);
    multiply_block<T>(m, m, sizes_.d_value, {grad_outputs.data, grad_outputs.row_step, 1}, values_transposed_,
                      score_step_, false, grad_scores_, score_step_, Triangle::result_lower);
  }

  void compute_grad_log_decay(const MatrixStateHead<T>& head, int64_t begin, int64_t m, const T* scores,
                              const T* state, HeadGradients<T>& out) {
    const double through =
        decay_.through == T{0}
            ? 0.0
            : static_cast<double>(decay_.through) *
                  static_cast<double>(dot_product(state, grad_state_transposed_, sizes_.d_value * key_step_));
    into_end_[0] = 0.0;
    for (int64_t s = 0; s + 1 < m; ++s) {
      const int64_t row = s * value_step_;
      into_end_[s + 1] = into_end_[s] + dot_product(values_ + row, grad_values_ + row, sizes_.d_value);
    }
    double from_start = 0.0;  // sum over t >= i of e[t] q[t].(S g[t])
    std::fill(column_sums_, column_sums_ + score_step_, T{0});
    for (int64_t i = m - 1; i >= 0; --i) {
      from_start +=
          dot_product(head.q + (begin + i) * head.key_step, grad_queries_ + i * key_step_, sizes_.d_key);
      const T* grad = grad_scores_ + i * score_step_;
      const T* score = scores + i * score_step_;
      for (int64_t s = 0; s < i; ++s) column_sums_[s] += grad[s] * score[s];
      const T within = lane_sum<T>(i, [this](int64_t s) { return column_sums_[s]; });
      const double total = static_cast<double>(within) + from_start + into_end_[i] + through;
      out.constant_decay += total;
      if (out.grad_log_decay != nullptr)
        out.grad_log_decay[(begin + i) * head.decay_step] = static_cast<T>(total);
    }
  }

  void deliver(const MatrixStateHead<T>& head, int64_t begin, int64_t m, HeadGradients<T>& out) {
    for (int64_t i = 0; i < m; ++i) {
      const int64_t t = begin + i;
      T* grad_q = out.grad_q + t * head.key_step;
      T* grad_k = out.grad_k + t * head.key_step;
      const T *from_q = grad_queries_ + i * key_step_, *from_k = grad_keys_ + i * key_step_;
      for (int64_t n = 0; n < sizes_.d_key; ++n)
        grad_q[n] = out.accumulate ? grad_q[n] + from_q[n] : from_q[n];
      for (int64_t n = 0; n < sizes_.d_key; ++n)
        grad_k[n] = out.accumulate ? grad_k[n] + from_k[n] : from_k[n];
      const T* v = head.v + t * head.value_step;
      const T* grad_u = grad_values_ + i * value_step_;
      const T* g = out.grad_y + t * head.value_step;
      T* grad_v = out.grad_v + t * head.value_step;
      const T scale = head.scale_at(t);
      if (out.grad_value_scale != nullptr) {
        out.grad_value_scale[t * head.scale_step] = dot_product(v, grad_u, sizes_.d_value);
      }
      for (int64_t p = 0; p < sizes_.d_value; ++p) grad_v[p] = scale * grad_u[p] + skip_[p] * g[p];
      double* grad_skip = out.grad_skip.data();
      for (int64_t p = 0; p < sizes_.d_value; ++p) grad_skip[p] += static_cast<double>(g[p] * v[p]);
    }
  }

  const ChunkSizes sizes_;
  const int64_t key_step_, value_step_, score_step_;
  const Tensor states_;  // (n_chunks, d_value, padded d_key), every element written before it is read
  Scratch<T> scratch_;
  T *grad_state_transposed_, *grad_state_;
  T *query_buffer_, *key_buffer_, *grad_queries_, *grad_keys_;
  T *values_, *decayed_values_, *grad_output_buffer_, *decayed_grad_outputs_, *grad_values_,
      *values_transposed_;
  T *weights_, *grad_scores_, *column_sums_, *skip_;
  std::vector<double> into_end_;  // of step i: sum over s < i of f[s] u[s].(dS'^T k[s])
  std::vector<int64_t> segments_;
  ChunkDecay<T> decay_;
};

/// Heads of a group add to the same grad_q and grad_k. A task walks a few of them in order and adds to a
/// partial sum of its own; how many tasks share a group depends on the shape alone, and so do the bits.
struct HeadTasks {
  explicit HeadTasks(const ChunkSizes& sizes) : heads_per_group(sizes.heads_per_group()) {
    constexpr int64_t wanted_tasks = 8;
    const int64_t n_groups = sizes.batch * sizes.n_groups;
    const int64_t wanted_parts = std::clamp<int64_t>(wanted_tasks / n_groups, 1, heads_per_group);
    heads_per_task = (heads_per_group + wanted_parts - 1) / wanted_parts;
    parts = (heads_per_group + heads_per_task - 1) / heads_per_task;
    count = n_groups * parts;
  }
  int64_t heads_per_group, heads_per_task, parts, count;
};

template <class T>
void sum_parts(const Tensor& parts, const Tensor& target) {
  const int64_t size = target.numel(), n_parts = parts.dim(0);
  const T* from = parts.data<T>();
  T* to = target.data<T>();
  parallel_for(size, 16384, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from[i];
    for (int64_t part = 1; part < n_parts; ++part) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[part * size + i];
    }
  });
}

template <class T>
T* at(const Tensor& tensor, int64_t offset) {
  return tensor.defined() ? tensor.data<T>() + offset : nullptr;
}

/// Sums over the batch what each sequence found for a head's constant decay and skip.
template <class T>
void deliver_sums(const MatrixStateBackwardArgs& args, const ChunkSizes& sizes,
                  const std::vector<double>& decay_sums, const std::vector<double>& skip_sums) {
  if (args.grad_log_decay.defined() && args.forward.log_decay.shape().n_axes() == 1) {
    for (int64_t h = 0; h < sizes.n_heads; ++h) {
      double sum = 0.0;
      for (int64_t b = 0; b < sizes.batch; ++b) sum += decay_sums[b * sizes.n_heads + h];
      args.grad_log_decay.data<T>()[h] = static_cast<T>(sum);
    }
  }
  if (!args.grad_skip.defined()) return;
  const bool per_channel = args.grad_skip.shape().n_axes() == 2;
  for (int64_t h = 0; h < sizes.n_heads; ++h) {
    double head_sum = 0.0;
    for (int64_t p = 0; p < sizes.d_value; ++p) {
      double sum = 0.0;
      for (int64_t b = 0; b < sizes.batch; ++b) sum += skip_sums[(b * sizes.n_heads + h) * sizes.d_value + p];
      head_sum += sum;
      if (per_channel) args.grad_skip.data<T>()[h * sizes.d_value + p] = static_cast<T>(sum);
    }
    if (!per_channel) args.grad_skip.data<T>()[h] = static_cast<T>(head_sum);
  }
}

template <class T>
void backward(const MatrixStateBackwardArgs& args) {
  const ChunkSizes sizes(args.forward);
  const HeadTasks tasks(sizes);
  const Tensor scores = all_scores<T>(args.forward, sizes);
  const int64_t score_size = sizes.n_chunks * sizes.chunk_len * padded<T>(sizes.chunk_len);
  const int64_t key_size = args.grad_q.numel();
  const Tensor grad_q_parts = Tensor::empty({tasks.parts, key_size}, args.grad_q.dtype());
  const Tensor grad_k_parts = Tensor::empty({tasks.parts, key_size}, args.grad_q.dtype());
  const bool decay_per_step = args.grad_log_decay.defined() && args.grad_log_decay.shape().n_axes() == 3;
  std::vector<double> decay_sums(sizes.batch * sizes.n_heads), skip_sums(decay_sums.size() * sizes.d_value);

  parallel_for_each(tasks.count, [&](int64_t task) {
    const int64_t part = task % tasks.parts, group = task / tasks.parts % sizes.n_groups;
    const int64_t b = task / tasks.parts / sizes.n_groups;
    const int64_t first = group * tasks.heads_per_group + part * tasks.heads_per_task;
    const int64_t last = std::min((group + 1) * tasks.heads_per_group, first + tasks.heads_per_task);
    BackwardHead<T> backward_head(sizes);
    for (int64_t h = first; h < last; ++h) {
      const MatrixStateHead<T> head(args.forward, b, h);
      const int64_t value_offset = (b * sizes.length * sizes.n_heads + h) * sizes.d_value;
      const int64_t key_offset = part * key_size + (b * sizes.length * sizes.n_groups + group) * sizes.d_key;
      const int64_t step_offset = b * sizes.length * sizes.n_heads + h;
      const int64_t state_offset = (b * sizes.n_heads + h) * sizes.d_key * sizes.d_value;
      HeadGradients<T> out{};
      out.grad_y = args.grad_y.data<T>() + value_offset;
      out.grad_final_state = at<T>(args.grad_final_state, state_offset);
      out.accumulate = h > first;
      out.grad_q = grad_q_parts.data<T>() + key_offset;
      out.grad_k = grad_k_parts.data<T>() + key_offset;
      out.grad_v = args.grad_v.data<T>() + value_offset;
      out.grad_log_decay = decay_per_step ? args.grad_log_decay.data<T>() + step_offset : nullptr;
      out.grad_value_scale = at<T>(args.grad_value_scale, step_offset);
      out.grad_initial_state = at<T>(args.grad_initial_state, state_offset);
      backward_head.run(head, scores.data<T>() + (b * sizes.n_groups + group) * score_size, out);
      decay_sums[b * sizes.n_heads + h] = out.constant_decay;
      std::copy(out.grad_skip.begin(), out.grad_skip.end(),
                skip_sums.begin() + (b * sizes.n_heads + h) * sizes.d_value);
    }
  });

  sum_parts<T>(grad_q_parts, args.grad_q);
  sum_parts<T>(grad_k_parts, args.grad_k);
  deliver_sums<T>(args, sizes, decay_sums, skip_sums);
}

}  // namespace

void chunked_matrix_state_forward_cpu(const MatrixStateForwardArgs& args) {
  dispatch_real(args.q.dtype(), "chunked_matrix_state",
                [&](auto element) { forward<decltype(element)>(args); });
}

void chunked_matrix_state_backward_cpu(const MatrixStateBackwardArgs& args) {
  dispatch_real(args.forward.q.dtype(), "chunked_matrix_state",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater

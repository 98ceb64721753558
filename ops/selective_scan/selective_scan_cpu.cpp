#include <algorithm>
#include <vector>

#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/selective_scan/selective_scan_kernels.h"

// Lanes are channels: 16 neighbours of one group make a block, and every loop over c runs over a block's lanes. In a tile
// the channels of one state n stand side by side, so that neither the recurrence nor the sum over n crosses lanes; only
// the gradients of B and C, which all channels share, are sums over lanes. Lanes beyond a group's end compute with zeros.
//
// Letters: b sequence, t step, n state, c lane, v = dt' x, as in selective_scan.cpp.

namespace headwater {
namespace {

constexpr int lanes = 16;
constexpr int64_t stretch = selective_scan_stretch_cpu;

struct Sizes {
  explicit Sizes(const SelectiveScanForwardArgs& args)
      : batch(args.x.dim(0)),
        length(args.x.dim(1)),
        d_inner(args.x.dim(2)),
        d_state(args.A.dim(1)),
        n_groups(args.B.dim(2)),
        group_size(d_inner / n_groups),
        blocks_per_group((group_size + lanes - 1) / lanes),
        n_stretches((length + stretch - 1) / stretch) {}

  int64_t batch, length, d_inner, d_state, n_groups, group_size, blocks_per_group, n_stretches;
};

/// One block of channels of one sequence.
struct Place {
  Place(const Sizes& sizes, int64_t sequence, int64_t group_index, int64_t block)
      : b(sequence),
        group(group_index),
        first(group_index * sizes.group_size + block * lanes),
        width(static_cast<int>(std::min<int64_t>(lanes, (group_index + 1) * sizes.group_size - first))) {}

  int64_t b, group, first;  // first: the block's first channel
  int width;                // its channels
};

template <class T>
void load_lanes(const T* from, int width, T* lane) {
  for (int c = 0; c < width; ++c) lane[c] = from[c];
  for (int c = width; c < lanes; ++c) lane[c] = T{0};
}

template <class T>
void store_lanes(const T* lane, int width, T* to) {
  for (int c = 0; c < width; ++c) to[c] = lane[c];
}

/// The rows of one block: of x and the like at a step, of B and C, of the parameters.
template <class T>
class Block {
 public:
  Block(const SelectiveScanForwardArgs& args, const Sizes& sizes, const Place& place)
      : args_(args), sizes_(sizes), place_(place), A_(sizes.d_state * lanes) {
    load_parameter(args.D, D_);
    load_parameter(args.dt_bias, dt_bias_);
    load_tile(args.A.data<T>() + place.first * sizes.d_state, A_.data());
  }

  /// (width, d_state) of a state or A as a tile (d_state, lanes); null: zeros.
  void load_tile(const T* from, T* tile) const {
    std::fill(tile, tile + sizes_.d_state * lanes, T{0});
    for (int c = 0; from != nullptr && c < place_.width; ++c) {
      for (int64_t n = 0; n < sizes_.d_state; ++n) tile[n * lanes + c] = from[c * sizes_.d_state + n];
    }
  }
  void store_tile(const T* tile, T* to) const {
    for (int c = 0; c < place_.width; ++c) {
      for (int64_t n = 0; n < sizes_.d_state; ++n) to[c * sizes_.d_state + n] = tile[n * lanes + c];
    }
  }

  /// Where the block's channels of a (batch, length, d_inner) tensor begin at step t.
  int64_t offset(int64_t t) const { return (place_.b * sizes_.length + t) * sizes_.d_inner + place_.first; }
  /// The block's part of a (batch, d_inner, d_state) tensor; null for an undefined one.
  T* state_in(const Tensor& states) const {
    return states.defined() ? states.data<T>() + (place_.b * sizes_.d_inner + place_.first) * sizes_.d_state
                            : nullptr;
  }
  /// The d_state numbers of the block's group at step t of B or C.
  const T* map(const Tensor& maps, int64_t t) const {
    return maps.data<T>() +
           ((place_.b * sizes_.length + t) * sizes_.n_groups + place_.group) * sizes_.d_state;
  }
  /// The saved state before a stretch: d_state rows of the block's channels, d_inner apart.
  T* saved(int64_t stretch_index) const {
    return args_.saved_states.data<T>() +
           (place_.b * sizes_.n_stretches + stretch_index) * sizes_.d_state * sizes_.d_inner + place_.first;
  }

  void load(const Tensor& tensor, int64_t t, T* lane) const {
    load_lanes(tensor.data<T>() + offset(t), place_.width, lane);
  }
  void store(const T* lane, int64_t t, const Tensor& tensor) const {
    store_lanes(lane, place_.width, tensor.data<T>() + offset(t));
  }

  /// dt before softplus.
  void load_raw_dt(int64_t t, T* p) const {
    load(args_.dt, t, p);
    for (int c = 0; c < lanes; ++c) p[c] += dt_bias_[c];
  }
  /// dt'; 0 in the lanes beyond the width.
  void load_dt(int64_t t, T* dt) const {
    load_raw_dt(t, dt);
    if (!args_.softplus) return;
    for (int c = 0; c < lanes; ++c) dt[c] = softplus(dt[c]);
    for (int c = place_.width; c < lanes; ++c) dt[c] = T{0};
  }
  bool starts_document(int64_t t) const {
    return args_.resets.defined() && args_.resets.data<int32_t>()[place_.b * sizes_.length + t] != 0;
  }

  const T* A() const { return A_.data(); }
  const T* D() const { return D_; }
  int width() const { return place_.width; }

 private:
  void load_parameter(const Tensor& parameter, T* lane) const {
    load_lanes(parameter.defined() ? parameter.data<T>() + place_.first : lane,
               parameter.defined() ? place_.width : 0, lane);
  }

  const SelectiveScanForwardArgs& args_;
  const Sizes& sizes_;
  const Place place_;
  std::vector<T> A_;  // (d_state, lanes)
  T D_[lanes], dt_bias_[lanes];
};

/// One step of the recurrence: h = exp(dt A) h + v B, and adds sum_n C h to y.
template <class T>
void advance(int64_t d_state, const T* A, const T* dt, const T* v, const T* B, const T* C, T* h, T* y) {
  T sum[lanes];
  std::copy(y, y + lanes, sum);
  for (int64_t n = 0; n < d_state; ++n) {
    const T* A_n = A + n * lanes;
    T* h_n = h + n * lanes;
#pragma omp simd
    for (int c = 0; c < lanes; ++c) {
      h_n[c] = exp_vectorisable(dt[c] * A_n[c]) * h_n[c] + v[c] * B[n];
      sum[c] += C[n] * h_n[c];
    }
  }
  std::copy(sum, sum + lanes, y);
}

template <class T>
void forward_block(const SelectiveScanForwardArgs& args, const Sizes& sizes, const Place& place) {
  const Block<T> block(args, sizes, place);
  std::vector<T> h(sizes.d_state * lanes);
  block.load_tile(block.state_in(args.initial_state), h.data());
  T x[lanes], dt[lanes], v[lanes], y[lanes], z[lanes];
  for (int64_t t = 0; t < sizes.length; ++t) {
    if (args.saved_states.defined() && t % stretch == 0) {
      T* saved = block.saved(t / stretch);
      for (int64_t n = 0; n < sizes.d_state; ++n)
        store_lanes(&h[n * lanes], place.width, saved + n * sizes.d_inner);
    }
    if (block.starts_document(t)) std::fill(h.begin(), h.end(), T{0});
    block.load(args.x, t, x);
    block.load_dt(t, dt);
    for (int c = 0; c < lanes; ++c) {
      v[c] = dt[c] * x[c];
      y[c] = block.D()[c] * x[c];
    }
    advance(sizes.d_state, block.A(), dt, v, block.map(args.B, t), block.map(args.C, t), h.data(), y);
    if (args.z.defined()) {
      block.load(args.z, t, z);
      for (int c = 0; c < lanes; ++c) y[c] *= silu(z[c]);
    }
    block.store(y, t, args.y);
  }
  block.store_tile(h.data(), block.state_in(args.final_state));
}

template <class T>
void forward(const SelectiveScanForwardArgs& args) {
  const Sizes sizes(args);
  const int64_t per_sequence = sizes.n_groups * sizes.blocks_per_group;
  parallel_for_each(sizes.batch * per_sequence, [&](int64_t item) {
    const int64_t block = item % per_sequence;
    forward_block<T>(
        args, sizes,
        Place(sizes, item / per_sequence, block / sizes.blocks_per_group, block % sizes.blocks_per_group));
  });
}

/// What the backward knows of one stretch of a block: every step's decays and states, computed again.
template <class T>
struct Stretch {
  explicit Stretch(int64_t d_state)
      : tile(d_state * lanes),
        decays(stretch * tile),
        states((stretch + 1) * tile),
        zeros(tile, T{0}),
        x(stretch * lanes),
        dt(stretch * lanes),
        s(stretch * lanes) {}

  /// Steps [begin, end), from the saved state on. A step that starts a document decays by 0, and sees zeros before it.
  void compute(const SelectiveScanForwardArgs& args, const Sizes& sizes, const Block<T>& block, int64_t begin,
               int64_t end) {
    const T* saved = block.saved(begin / stretch);
    for (int64_t n = 0; n < sizes.d_state; ++n)
      load_lanes(saved + n * sizes.d_inner, block.width(), &states[n * lanes]);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k = t - begin;
      block.load(args.x, t, &x[k * lanes]);
      block.load_dt(t, &dt[k * lanes]);
      step(sizes.d_state, block, block.starts_document(t), k, block.map(args.B, t), block.map(args.C, t));
    }
  }

  void step(int64_t d_state, const Block<T>& block, bool starts, int64_t k, const T* B, const T* C) {
    T v[lanes], sum[lanes];
    for (int c = 0; c < lanes; ++c) {
      v[c] = dt[k * lanes + c] * x[k * lanes + c];
      sum[c] = block.D()[c] * x[k * lanes + c];
    }
    const T* dt_k = &dt[k * lanes];
    const T* before = state_before(k, starts);
    for (int64_t n = 0; n < d_state; ++n) {
      const T* A_n = block.A() + n * lanes;
      const T* before_n = before + n * lanes;
      T* decay = &decays[k * tile + n * lanes];
      T* h = &states[(k + 1) * tile + n * lanes];
#pragma omp simd
      for (int c = 0; c < lanes; ++c) {
        decay[c] = starts ? T{0} : exp_vectorisable(dt_k[c] * A_n[c]);
        h[c] = decay[c] * before_n[c] + v[c] * B[n];
        sum[c] += C[n] * h[c];
      }
    }
    std::copy(sum, sum + lanes, &s[k * lanes]);
  }

  const T* state_before(int64_t k, bool starts) const {
    return starts ? zeros.data() : &states[k * tile];
  }
  const T* state_after(int64_t k) const {
    return &states[(k + 1) * tile];
  }

  int64_t tile;
  std::vector<T> decays, states, zeros;  // (stretch, d_state, lanes); states: the one before step k at k
  std::vector<T> x, dt, s;               // (stretch, lanes); s: y before the gate
};

/// Where the sums of one task go.
template <class T>
struct Sums {
  T* B;        // (batch, length, n_groups, d_state), added to
  T* C;        // the same
  T* A;        // (batch, d_inner, d_state), written
  T* D;        // (batch, d_inner), written
  T* dt_bias;  // (batch, d_inner), written
};

/// The backward of one block, from the last stretch to the first.
template <class T>
class BackwardBlock {
 public:
  BackwardBlock(const SelectiveScanBackwardArgs& args, const Sizes& sizes, const Place& place,
                Stretch<T>& scratch, const Sums<T>& sums)
      : args_(args),
        sizes_(sizes),
        place_(place),
        block_(args.forward, sizes, place),
        stretch_(scratch),
        sums_(sums),
        carry_(sizes.d_state * lanes),
        grad_A_(sizes.d_state * lanes, T{0}) {
    block_.load_tile(block_.state_in(args.grad_final_state), carry_.data());
  }

  void run() {
    for (int64_t index = sizes_.n_stretches - 1; index >= 0; --index) {
      const int64_t begin = index * stretch, end = std::min(sizes_.length, begin + stretch);
      stretch_.compute(args_.forward, sizes_, block_, begin, end);
      for (int64_t t = end - 1; t >= begin; --t) step_back(t, t - begin);
    }
    const int64_t channel = place_.b * sizes_.d_inner + place_.first;
    block_.store_tile(grad_A_.data(), sums_.A + channel * sizes_.d_state);
    store_lanes(grad_D_, place_.width, sums_.D + channel);
    store_lanes(grad_dt_bias_, place_.width, sums_.dt_bias + channel);
    if (T* grad_initial = block_.state_in(args_.grad_initial_state))
      block_.store_tile(carry_.data(), grad_initial);
  }

 private:
  void step_back(int64_t t, int64_t k) {
    T g[lanes], grad_v[lanes], grad_dt[lanes], p[lanes];
    load_gradient(t, k, g);
    step_states(t, k, g, grad_v, grad_dt);
    const T* x = &stretch_.x[k * lanes];
    const T* dt = &stretch_.dt[k * lanes];
    T grad_x[lanes];
    for (int c = 0; c < lanes; ++c) {
      grad_x[c] = block_.D()[c] * g[c] + dt[c] * grad_v[c];
      grad_dt[c] += x[c] * grad_v[c];
      grad_D_[c] += g[c] * x[c];
    }
    if (args_.forward.softplus) {
      block_.load_raw_dt(t, p);
      for (int c = 0; c < lanes; ++c) grad_dt[c] *= sigmoid(p[c]);
    }
    for (int c = 0; c < lanes; ++c) grad_dt_bias_[c] += grad_dt[c];
    block_.store(grad_x, t, args_.grad_x);
    block_.store(grad_dt, t, args_.grad_dt);
  }

  /// g, the gradient of y before the gate; writes the gate's.
  void load_gradient(int64_t t, int64_t k, T* g) const {
    block_.load(args_.grad_y, t, g);
    if (!args_.forward.z.defined()) return;
    T z[lanes], grad_z[lanes];
    block_.load(args_.forward.z, t, z);
    const T* s = &stretch_.s[k * lanes];
    for (int c = 0; c < lanes; ++c) {
      grad_z[c] = g[c] * s[c] * silu_derivative(z[c]);
      g[c] *= silu(z[c]);
    }
    block_.store(grad_z, t, args_.grad_z);
  }

  /// Everything that has an n: carries gh to the step before, adds to the sums for A, B and C, and gives grad_v and what
  /// dt' gets through the decays.
  void step_states(int64_t t, int64_t k, const T* g, T* grad_v, T* grad_dt) {
    const T* dt = &stretch_.dt[k * lanes];
    const T* x = &stretch_.x[k * lanes];
    const T* B = block_.map(args_.forward.B, t);
    const T* C = block_.map(args_.forward.C, t);
    const T* before = stretch_.state_before(k, block_.starts_document(t));
    const T* after = stretch_.state_after(k);
    const int64_t row = ((place_.b * sizes_.length + t) * sizes_.n_groups + place_.group) * sizes_.d_state;
    T v[lanes], sum_v[lanes] = {}, sum_dt[lanes] = {};
    for (int c = 0; c < lanes; ++c) v[c] = dt[c] * x[c];
    for (int64_t n = 0; n < sizes_.d_state; ++n) {
      const T* A_n = block_.A() + n * lanes;
      const T* decay = &stretch_.decays[k * stretch_.tile + n * lanes];
      const T* before_n = before + n * lanes;
      const T* after_n = after + n * lanes;
      T* carry = &carry_[n * lanes];
      T* grad_A = &grad_A_[n * lanes];
      T to_B = 0, to_C = 0;
      // The order of these sums is the compiler's, once for all.
#pragma omp simd reduction(+ : to_B, to_C)
      for (int c = 0; c < lanes; ++c) {
        const T gh = C[n] * g[c] + carry[c];
        const T gh_r = gh * decay[c] * before_n[c];
        to_B += gh * v[c];
        to_C += g[c] * after_n[c];
        sum_v[c] += gh * B[n];
        sum_dt[c] += gh_r * A_n[c];
        grad_A[c] += gh_r * dt[c];
        carry[c] = gh * decay[c];
      }
      sums_.B[row + n] += to_B;
      sums_.C[row + n] += to_C;
    }
    std::copy(sum_v, sum_v + lanes, grad_v);
    std::copy(sum_dt, sum_dt + lanes, grad_dt);
  }

  const SelectiveScanBackwardArgs& args_;
  const Sizes& sizes_;
  const Place place_;
  const Block<T> block_;
  Stretch<T>& stretch_;
  const Sums<T>& sums_;
  std::vector<T> carry_;   // (d_state, lanes): a gh of the step after
  std::vector<T> grad_A_;  // (d_state, lanes)
  T grad_D_[lanes] = {}, grad_dt_bias_[lanes] = {};
};

template <class T>
void backward(const SelectiveScanBackwardArgs& args) {
  const Sizes sizes(args.forward);
  const DType dtype = args.forward.x.dtype();
  // The blocks of a group are cut into at most so many slabs that there are 64 tasks: each slab has sums of its own for
  // B and C, and how many there are depends on the shape alone.
  const int64_t n_slabs =
      std::clamp<int64_t>(64 / std::max<int64_t>(1, sizes.batch * sizes.n_groups), 1, sizes.blocks_per_group);
  const int64_t map_size = args.grad_B.numel();
  const Tensor sums_B = Tensor::zeros({n_slabs, map_size}, dtype);
  const Tensor sums_C = Tensor::zeros({n_slabs, map_size}, dtype);
  const Tensor sums_A = Tensor::empty({sizes.batch, sizes.d_inner * sizes.d_state}, dtype);
  const Tensor sums_D = Tensor::empty({sizes.batch, sizes.d_inner}, dtype);
  const Tensor sums_dt_bias = Tensor::empty({sizes.batch, sizes.d_inner}, dtype);
  parallel_for_each(sizes.batch * sizes.n_groups * n_slabs, [&](int64_t task) {
    const int64_t slab = task % n_slabs, group = task / n_slabs % sizes.n_groups;
    const int64_t b = task / n_slabs / sizes.n_groups;
    const Sums<T> sums{sums_B.data<T>() + slab * map_size, sums_C.data<T>() + slab * map_size,
                       sums_A.data<T>(), sums_D.data<T>(), sums_dt_bias.data<T>()};
    Stretch<T> scratch(sizes.d_state);
    for (int64_t block = sizes.blocks_per_group * slab / n_slabs;
         block < sizes.blocks_per_group * (slab + 1) / n_slabs; ++block) {
      BackwardBlock<T>(args, sizes, Place(sizes, b, group, block), scratch, sums).run();
    }
  });

  const auto deliver = [](const Tensor& sums, const Tensor& target) {
    if (target.defined()) sum_blocks(sums.data<T>(), sums.dim(0), target.numel(), false, target.data<T>());
  };
  deliver(sums_B, args.grad_B);
  deliver(sums_C, args.grad_C);
  deliver(sums_A, args.grad_A);
  deliver(sums_D, args.grad_D);
  deliver(sums_dt_bias, args.grad_dt_bias);
}

}  // namespace

void selective_scan_forward_cpu(const SelectiveScanForwardArgs& args) {
  dispatch_real(args.x.dtype(), "selective_scan", [&](auto element) { forward<decltype(element)>(args); });
}

void selective_scan_backward_cpu(const SelectiveScanBackwardArgs& args) {
  dispatch_real(args.forward.x.dtype(), "selective_scan",
                [&](auto element) { backward<decltype(element)>(args); });
}

}  // namespace headwater

#include <algorithm>
#include <cstdint>

#include "core/cuda/device.h"
#include "core/cuda/launch.h"
#include "ops/elementwise/elementwise_kernels.h"

// All of these are bound by memory. A thread takes N neighbouring elements at a time, 16 bytes of the widest type among
// the tensors, in a grid-stride loop; the last n % N elements, and tensors that begin at an odd address (rows of a
// parameter), are taken one by one. Arithmetic is in float.

namespace headwater {
namespace {

constexpr int block = 256;
constexpr int64_t max_blocks = 4096;

template <int N>
struct Floats {
  float values[N];
};

template <int N, class T>
__device__ Floats<N> load(const T* from) {
  const Packed<T, N> packed = load_packed<N>(from);
  Floats<N> result;
#pragma unroll
  for (int k = 0; k < N; ++k) result.values[k] = to_float(packed.values[k]);
  return result;
}

template <int N, class T>
__device__ void store(T* to, const Floats<N>& floats) {
  Packed<T, N> packed;
#pragma unroll
  for (int k = 0; k < N; ++k) packed.values[k] = from_float<T>(floats.values[k]);
  store_packed<N>(to, packed);
}

template <int N, class Function, class... Inputs>
__device__ Floats<N> apply(const Function& function, const Inputs&... inputs) {
  Floats<N> result;
#pragma unroll
  for (int k = 0; k < N; ++k) result.values[k] = function(inputs.values[k]...);
  return result;
}

__device__ int64_t first_element() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ int64_t element_stride() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

/// y[i] = function(in[i]...).
template <int N, class Function, class Y, class... In>
__global__ void map_elements(Function function, int64_t n, Y* y, const In*... in) {
  const int64_t n_packed = n / N * N;
  for (int64_t i = first_element() * N; i < n_packed; i += element_stride() * N) {
    store<N>(y + i, apply<N>(function, load<N>(in + i)...));
  }
  const int64_t last = n_packed + first_element();
  if (last < n) store<1>(y + last, apply<1>(function, load<1>(in + last)...));
}

template <int N, class Gate, class T>
__device__ void gated_gradients(const Gate& function, const T* gate, const T* up, const T* grad_y,
                                T* grad_gate, T* grad_up) {
  const Floats<N> gates = load<N>(gate), ups = load<N>(up), given = load<N>(grad_y);
  Floats<N> to_gate, to_up;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float s = sigmoid_of(gates.values[k]);
    to_gate.values[k] = given.values[k] * ups.values[k] * function.derivative(gates.values[k], s);
    to_up.values[k] = given.values[k] * function.value(gates.values[k], s);
  }
  store<N>(grad_gate, to_gate);
  store<N>(grad_up, to_up);
}

/// As map_elements, with two outputs: one exponential and one pass for both.
template <int N, class Gate, class T>
__global__ void gated_backward_elements(Gate function, int64_t n, const T* gate, const T* up, const T* grad_y,
                                        T* grad_gate, T* grad_up) {
  const int64_t n_packed = n / N * N;
  for (int64_t i = first_element() * N; i < n_packed; i += element_stride() * N) {
    gated_gradients<N>(function, gate + i, up + i, grad_y + i, grad_gate + i, grad_up + i);
  }
  const int64_t last = n_packed + first_element();
  if (last < n) {
    gated_gradients<1>(function, gate + last, up + last, grad_y + last, grad_gate + last, grad_up + last);
  }
}

struct Identity {
  __device__ float operator()(float x) const { return x; }
};
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Product {
  __device__ float operator()(float a, float b) const { return a * b; }
};
struct Scale {
  float factor;
  __device__ float operator()(float x) const { return factor * x; }
};
struct Silu {
  __device__ float operator()(float x) const { return silu_of(x); }
};
struct SiluGradient {
  __device__ float operator()(float x, float grad_y) const { return grad_y * silu_slope(x); }
};
struct Softplus {
  __device__ float operator()(float x) const { return softplus_of(x); }
};
struct SoftplusGradient {
  __device__ float operator()(float x, float grad_y) const { return grad_y * sigmoid_of(x); }
};
struct NegativeExp {
  __device__ float operator()(float x) const { return -expf(x); }
};
struct NegativeExpGradient {
  __device__ float operator()(float x, float grad_y) const { return grad_y * -expf(x); }
};
/// The probability that a standard normal number is below x.
__device__ float normal_distribution(float x) {
  return 0.5f * (1.0f + erff(0.70710678f * x));
}
struct Gelu {
  __device__ float operator()(float x) const { return x * normal_distribution(x); }
};
struct GeluGradient {
  __device__ float operator()(float x, float grad_y) const {
    return grad_y * (normal_distribution(x) + x * 0.39894228f * expf(-0.5f * x * x));
  }
};
/// Compared as on the CPU, so that a NaN stays one.
struct Relu {
  __device__ float operator()(float x) const { return x < 0.0f ? 0.0f : x; }
};
struct ReluGradient {
  __device__ float operator()(float x, float grad_y) const { return x > 0.0f ? grad_y : 0.0f; }
};
struct EluPlusOne {
  __device__ float operator()(float x) const { return x > 0.0f ? x + 1.0f : expf(x); }
};
struct EluPlusOneGradient {
  __device__ float operator()(float x, float grad_y) const { return x > 0.0f ? grad_y : grad_y * expf(x); }
};
struct SiluMul {
  __device__ float operator()(float gate, float up) const { return silu_of(gate) * up; }
};
struct SigmoidMul {
  __device__ float operator()(float gate, float up) const { return sigmoid_of(gate) * up; }
};
struct SquaredRelu {
  __device__ float operator()(float x) const { return x < 0.0f ? 0.0f : x * x; }
};
struct SquaredReluGradient {
  __device__ float operator()(float x, float grad_y) const { return grad_y * (x < 0.0f ? 0.0f : 2.0f * x); }
};

/// What gates do and its derivative, given s = sigmoid(gate).
struct SiluGate {
  __device__ float value(float gate, float s) const { return gate * s; }
  __device__ float derivative(float gate, float s) const { return s * (1.0f + gate * (1.0f - s)); }
};
struct SigmoidGate {
  __device__ float value(float, float s) const { return s; }
  __device__ float derivative(float, float s) const { return s * (1.0f - s); }
};

/// How many elements a thread takes at a time.
template <class... T>
constexpr int pack_of = 16 / static_cast<int>(std::max({sizeof(T)...}));

template <int N, class T>
bool is_aligned(const T* data) {
  return reinterpret_cast<uintptr_t>(data) % (N * sizeof(T)) == 0;
}

LaunchShape shape_for(int64_t n, int64_t n_together) {
  return {.grid = {std::min(blocks_for(n, n_together * block), max_blocks)}, .block = block};
}

template <class Function, class Y, class... In>
void map(const char* name, const Function& function, int64_t n, Y* y, const In*... in) {
  constexpr int N = pack_of<Y, In...>;
  if (is_aligned<N>(y) && (is_aligned<N>(in) && ...)) {
    launch(name, map_elements<N, Function, Y, In...>, shape_for(n, N), function, n, y, in...);
  } else {
    launch(name, map_elements<1, Function, Y, In...>, shape_for(n, 1), function, n, y, in...);
  }
}

/// Where all tensors share a dtype.
template <class Function, class... Inputs>
void map_alike(const char* name, const char* op, const Function& function, const Tensor& y,
               const Inputs&... inputs) {
  dispatch_cuda(y.dtype(), op, [&](auto element) {
    using T = decltype(element);
    map(name, function, y.numel(), y.data<T>(), static_cast<const T*>(inputs.template data<T>())...);
  });
}

template <class Gate>
void map_gated_gradients(const char* name, const char* op, const Gate& function,
                         const GatedBackwardArgs& args) {
  dispatch_cuda(args.gate.dtype(), op, [&](auto element) {
    using T = decltype(element);
    constexpr int N = pack_of<T>;
    const T* gate = args.gate.data<T>();
    const T* up = args.up.data<T>();
    const T* grad_y = args.grad_y.data<T>();
    T* grad_gate = args.grad_gate.data<T>();
    T* grad_up = args.grad_up.data<T>();
    const bool aligned = is_aligned<N>(gate) && is_aligned<N>(up) && is_aligned<N>(grad_y) &&
                         is_aligned<N>(grad_gate) && is_aligned<N>(grad_up);
    const int64_t n = args.gate.numel();
    launch(name, aligned ? gated_backward_elements<N, Gate, T> : gated_backward_elements<1, Gate, T>,
           shape_for(n, aligned ? N : 1), function, n, gate, up, grad_y, grad_gate, grad_up);
  });
}

}  // namespace

void elementwise_cast_cuda(const ElementwiseUnaryArgs& args) {
  dispatch_cuda(args.x.dtype(), "cast", [&](auto from) {
    dispatch_cuda(args.y.dtype(), "cast", [&](auto to) {
      const auto* x = args.x.data<decltype(from)>();
      map("cast", Identity{}, args.x.numel(), args.y.data<decltype(to)>(), x);
    });
  });
}

void elementwise_add_cuda(const ElementwiseBinaryArgs& args) {
  if (args.a.dtype() == args.b.dtype()) {
    map_alike("elementwise_add", "add", Sum{}, args.y, args.a, args.b);
  } else {
    const float* a = args.a.data<float>();
    const BFloat16* b = args.b.data<BFloat16>();
    map("elementwise_add", Sum{}, args.a.numel(), args.y.data<float>(), a, b);
  }
}

void elementwise_mul_cuda(const ElementwiseBinaryArgs& args) {
  map_alike("elementwise_mul", "mul", Product{}, args.y, args.a, args.b);
}

void elementwise_scale_cuda(const ElementwiseScaleArgs& args) {
  map_alike("elementwise_scale", "scale", Scale{static_cast<float>(args.factor)}, args.y, args.x);
}

void silu_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("silu_forward", "silu", Silu{}, args.y, args.x);
}

void silu_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("silu_backward", "silu", SiluGradient{}, args.grad_x, args.x, args.grad_y);
}

void softplus_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("softplus_forward", "softplus", Softplus{}, args.y, args.x);
}

void softplus_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("softplus_backward", "softplus", SoftplusGradient{}, args.grad_x, args.x, args.grad_y);
}

void negative_exp_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("negative_exp_forward", "negative_exp", NegativeExp{}, args.y, args.x);
}

void negative_exp_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("negative_exp_backward", "negative_exp", NegativeExpGradient{}, args.grad_x, args.x, args.grad_y);
}

void gelu_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("gelu_forward", "gelu", Gelu{}, args.y, args.x);
}

void gelu_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("gelu_backward", "gelu", GeluGradient{}, args.grad_x, args.x, args.grad_y);
}

void relu_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("relu_forward", "relu", Relu{}, args.y, args.x);
}

void relu_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("relu_backward", "relu", ReluGradient{}, args.grad_x, args.x, args.grad_y);
}

void elu_plus_one_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("elu_plus_one_forward", "elu_plus_one", EluPlusOne{}, args.y, args.x);
}

void elu_plus_one_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("elu_plus_one_backward", "elu_plus_one", EluPlusOneGradient{}, args.grad_x, args.x, args.grad_y);
}

void silu_mul_forward_cuda(const ElementwiseBinaryArgs& args) {
  map_alike("silu_mul_forward", "silu_mul", SiluMul{}, args.y, args.a, args.b);
}

void silu_mul_backward_cuda(const GatedBackwardArgs& args) {
  map_gated_gradients("silu_mul_backward", "silu_mul", SiluGate{}, args);
}

void sigmoid_mul_forward_cuda(const ElementwiseBinaryArgs& args) {
  map_alike("sigmoid_mul_forward", "sigmoid_mul", SigmoidMul{}, args.y, args.a, args.b);
}

void sigmoid_mul_backward_cuda(const GatedBackwardArgs& args) {
  map_gated_gradients("sigmoid_mul_backward", "sigmoid_mul", SigmoidGate{}, args);
}

void squared_relu_forward_cuda(const ElementwiseUnaryArgs& args) {
  map_alike("squared_relu_forward", "squared_relu", SquaredRelu{}, args.y, args.x);
}

void squared_relu_backward_cuda(const ElementwiseUnaryBackwardArgs& args) {
  map_alike("squared_relu_backward", "squared_relu", SquaredReluGradient{}, args.grad_x, args.x, args.grad_y);
}

}  // namespace headwater

#include <cmath>
#include <numbers>

#include "core/parallel.h"
#include "core/simd_math.h"
#include "ops/elementwise/elementwise_kernels.h"

namespace headwater {
namespace {

constexpr int64_t elements_per_task = 16384;

/// Calls body(i) for every element, threads sharing the range; `body` is inlined into one plain loop.
template <class Body>
void for_each_element(int64_t n, const Body& body) {
  parallel_for(n, elements_per_task, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

/// y[i] = function(x[i]).
template <class Function>
void map_unary(const char* op, const ElementwiseUnaryArgs& args, const Function& function) {
  dispatch_real(args.x.dtype(), op, [&](auto element) {
    using T = decltype(element);
    const T* x = args.x.data<T>();
    T* y = args.y.data<T>();
    for_each_element(args.x.numel(), [=](int64_t i) { y[i] = function(x[i]); });
  });
}

/// grad_x[i] = grad_y[i] derivative(x[i]).
template <class Function>
void map_gradient(const char* op, const ElementwiseUnaryBackwardArgs& args, const Function& derivative) {
  dispatch_real(args.x.dtype(), op, [&](auto element) {
    using T = decltype(element);
    const T* x = args.x.data<T>();
    const T* grad_y = args.grad_y.data<T>();
    T* grad_x = args.grad_x.data<T>();
    for_each_element(args.x.numel(), [=](int64_t i) { grad_x[i] = grad_y[i] * derivative(x[i]); });
  });
}

/// y[i] = function(a[i], b[i]).
template <class Function>
void map_binary(const char* op, const ElementwiseBinaryArgs& args, const Function& function) {
  dispatch_real(args.a.dtype(), op, [&](auto element) {
    using T = decltype(element);
    const T* a = args.a.data<T>();
    const T* b = args.b.data<T>();
    T* y = args.y.data<T>();
    for_each_element(args.a.numel(), [=](int64_t i) { y[i] = function(a[i], b[i]); });
  });
}

/// grad_up[i] = grad_y[i] function(gate[i], s), grad_gate[i] = grad_y[i] up[i] derivative(gate[i], s), s = sigmoid(gate[i]).
template <class Function, class Derivative>
void map_gated_gradients(const char* op, const GatedBackwardArgs& args, const Function& function,
                         const Derivative& derivative) {
  dispatch_real(args.gate.dtype(), op, [&](auto element) {
    using T = decltype(element);
    const T* gate = args.gate.data<T>();
    const T* up = args.up.data<T>();
    const T* grad_y = args.grad_y.data<T>();
    T* grad_gate = args.grad_gate.data<T>();
    T* grad_up = args.grad_up.data<T>();
    for_each_element(args.gate.numel(), [=](int64_t i) {
      const T s = sigmoid(gate[i]);
      grad_gate[i] = grad_y[i] * up[i] * derivative(gate[i], s);
      grad_up[i] = grad_y[i] * function(gate[i], s);
    });
  });
}

/// The probability that a standard normal number is below x.
template <class T>
T normal_distribution(T x) {
  return T{0.5} * (T{1} + std::erf(x * static_cast<T>(std::numbers::sqrt2 / 2)));
}

}  // namespace

void elementwise_cast_cpu(const ElementwiseUnaryArgs& args) {
  args.y.copy_from(args.x.to(args.y.dtype()));
}

void elementwise_add_cpu(const ElementwiseBinaryArgs& args) {
  map_binary("add", args, [](auto a, auto b) { return a + b; });
}

void elementwise_mul_cpu(const ElementwiseBinaryArgs& args) {
  map_binary("mul", args, [](auto a, auto b) { return a * b; });
}

void elementwise_scale_cpu(const ElementwiseScaleArgs& args) {
  map_unary("scale", {args.x, args.y},
            [factor = args.factor](auto x) { return static_cast<decltype(x)>(factor) * x; });
}

void silu_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("silu", args, [](auto x) { return silu(x); });
}

void silu_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("silu", args, [](auto x) { return silu_derivative(x); });
}

void softplus_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("softplus", args, [](auto x) { return softplus(x); });
}

void softplus_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("softplus", args, [](auto x) { return sigmoid(x); });
}

void negative_exp_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("negative_exp", args, [](auto x) { return -exp_vectorisable(x); });
}

void negative_exp_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("negative_exp", args, [](auto x) { return -exp_vectorisable(x); });
}

void gelu_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("gelu", args, [](auto x) { return x * normal_distribution(x); });
}

void gelu_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("gelu", args, [](auto x) {
    using T = decltype(x);
    const T density =
        static_cast<T>(1.0 / std::sqrt(2.0 * std::numbers::pi)) * exp_vectorisable(T{-0.5} * x * x);
    return normal_distribution(x) + x * density;
  });
}

void relu_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("relu", args, [](auto x) { return x < 0 ? decltype(x){0} : x; });
}

void relu_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("relu", args, [](auto x) { return x > 0 ? decltype(x){1} : decltype(x){0}; });
}

void elu_plus_one_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("elu_plus_one", args, [](auto x) {
    using T = decltype(x);
    return x > T{0} ? x + T{1} : exp_vectorisable(x);
  });
}

void elu_plus_one_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("elu_plus_one", args, [](auto x) {
    using T = decltype(x);
    return x > T{0} ? T{1} : exp_vectorisable(x);
  });
}

void silu_mul_forward_cpu(const ElementwiseBinaryArgs& args) {
  map_binary("silu_mul", args, [](auto gate, auto up) { return silu(gate) * up; });
}

void silu_mul_backward_cpu(const GatedBackwardArgs& args) {
  map_gated_gradients(
      "silu_mul", args, [](auto gate, auto s) { return gate * s; },
      [](auto gate, auto s) { return s * (1 + gate * (1 - s)); });
}

void sigmoid_mul_forward_cpu(const ElementwiseBinaryArgs& args) {
  map_binary("sigmoid_mul", args, [](auto gate, auto up) { return sigmoid(gate) * up; });
}

void sigmoid_mul_backward_cpu(const GatedBackwardArgs& args) {
  map_gated_gradients(
      "sigmoid_mul", args, [](auto, auto s) { return s; }, [](auto, auto s) { return s * (1 - s); });
}

void squared_relu_forward_cpu(const ElementwiseUnaryArgs& args) {
  map_unary("squared_relu", args, [](auto x) { return x < 0 ? decltype(x)(0) : x * x; });
}

void squared_relu_backward_cpu(const ElementwiseUnaryBackwardArgs& args) {
  map_gradient("squared_relu", args, [](auto x) { return x < 0 ? decltype(x)(0) : 2 * x; });
}

}  // namespace headwater

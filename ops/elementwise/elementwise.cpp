#include "ops/elementwise/elementwise.h"

#include "autograd/tape.h"
#include "ops/check.h"
#include "ops/elementwise/elementwise_kernels.h"

// All gradient rules on this page; g is the gradient of y:
//   add         grad_a = g             grad_b = g
//   mul         grad_a = g b           grad_b = g a
//   scale       grad_x = factor g
//   cast        grad_x = g, rounded to the dtype of x
//   silu        grad_x = g s (1 + x (1 - s)),   s = sigmoid(x)
//   softplus    grad_x = g s
//   negative_exp  grad_x = -g e^x
//   gelu        grad_x = g (Phi(x) + x phi(x)),   phi the density e^(-x^2 / 2) / sqrt(2 pi)
//   relu        grad_x = g [x > 0]
//   elu_plus_one  grad_x = g e^min(x, 0)
//   silu_mul    grad_gate = g up s (1 + gate (1 - s)),   grad_up = g gate s,   s = sigmoid(gate)
//   sigmoid_mul   grad_gate = g up s (1 - s),   grad_up = g s
//   squared_relu  grad_x = 2 g max(x, 0)

namespace headwater {
namespace {

void check_pair(const char* op, const char* first, const Variable& a, const char* second, const Variable& b) {
  check_shape(op, second, b, a.shape(), fmt::format("the shape of {}", first).c_str());
  check_like(op, second, b, a);
}

/// The wiring of the functions of one variable, whose gradients need x alone.
Variable unary(const Variable& x, const Kernel<ElementwiseUnaryArgs>& forward,
               const Kernel<ElementwiseUnaryBackwardArgs>& backward) {
  Variable y(empty_like(x.value()));
  forward(x.device(), {x.value(), y.value()});
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x, &backward](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(x.value());
      backward(x.device(), {x.value(), grad_outputs[0], grad_x});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

/// The wiring of the products of a gate's function and something else.
Variable gated(const char* op, const Variable& gate, const Variable& up,
               const Kernel<ElementwiseBinaryArgs>& forward, const Kernel<GatedBackwardArgs>& backward) {
  check_pair(op, "gate", gate, "up", up);
  Variable y(empty_like(gate.value()));
  forward(gate.device(), {gate.value(), up.value(), y.value()});
  if (Tape* tape = Tape::recording({gate, up})) {
    tape->record({&y}, [gate, up, &backward](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_gate = empty_like(gate.value());
      const Tensor grad_up = empty_like(up.value());
      backward(gate.device(), {gate.value(), up.value(), grad_outputs[0], grad_gate, grad_up});
      gate.add_gradient(grad_gate);
      up.add_gradient(grad_up);
    });
  }
  return y;
}

Tensor converted(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  const Tensor y = Tensor::empty(x.shape(), dtype, x.device());
  elementwise_cast(x.device(), {x, y});
  return y;
}

}  // namespace

Variable add(const Variable& a, const Variable& b) {
  check_shape("add", "b", b, a.shape(), "the shape of a");
  check_device("add", "b", b, a);
  // What a bf16 layer adds to an f32 residual stream.
  const bool mixed = a.device().is_cuda() && a.dtype() == DType::f32 && b.dtype() == DType::bf16;
  if (!mixed) check_dtype("add", "b", b, a.dtype());
  Variable y(empty_like(a.value()));
  elementwise_add(a.device(), {a.value(), b.value(), y.value()});
  if (Tape* tape = Tape::recording({a, b})) {
    tape->record({&y}, [a = a.without_value(), b = b.without_value(),
                        b_dtype = b.dtype()](const std::vector<Tensor>& grad_outputs) {
      // Both get the same handle; a Gradient copies before it writes to memory that is not its own.
      a.add_gradient(grad_outputs[0]);
      if (b.requires_gradient()) b.add_gradient(converted(grad_outputs[0], b_dtype));
    });
  }
  return y;
}

Variable mul(const Variable& a, const Variable& b) {
  check_pair("mul", "a", a, "b", b);
  Variable y(empty_like(a.value()));
  elementwise_mul(a.device(), {a.value(), b.value(), y.value()});
  if (Tape* tape = Tape::recording({a, b})) {
    tape->record({&y}, [a, b](const std::vector<Tensor>& grad_outputs) {
      const auto add_product = [&](const Variable& target, const Variable& other) {
        if (!target.requires_gradient()) return;
        const Tensor gradient = empty_like(target.value());
        elementwise_mul(target.device(), {grad_outputs[0], other.value(), gradient});
        target.add_gradient(gradient);
      };
      add_product(a, b);
      add_product(b, a);
    });
  }
  return y;
}

Variable scale(const Variable& x, double factor) {
  Variable y(empty_like(x.value()));
  elementwise_scale(x.device(), {x.value(), y.value(), factor});
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x = x.without_value(), factor](const std::vector<Tensor>& grad_outputs) {
      const Tensor grad_x = empty_like(grad_outputs[0]);
      elementwise_scale(grad_x.device(), {grad_outputs[0], grad_x, factor});
      x.add_gradient(grad_x);
    });
  }
  return y;
}

Variable silu(const Variable& x) {
  return unary(x, silu_forward, silu_backward);
}

Variable softplus(const Variable& x) {
  return unary(x, softplus_forward, softplus_backward);
}

Variable negative_exp(const Variable& x) {
  return unary(x, negative_exp_forward, negative_exp_backward);
}

Variable gelu(const Variable& x) {
  return unary(x, gelu_forward, gelu_backward);
}

Variable relu(const Variable& x) {
  return unary(x, relu_forward, relu_backward);
}

Variable elu_plus_one(const Variable& x) {
  return unary(x, elu_plus_one_forward, elu_plus_one_backward);
}

Variable silu_mul(const Variable& gate, const Variable& up) {
  return gated("silu_mul", gate, up, silu_mul_forward, silu_mul_backward);
}

Variable sigmoid_mul(const Variable& gate, const Variable& up) {
  return gated("sigmoid_mul", gate, up, sigmoid_mul_forward, sigmoid_mul_backward);
}

Variable squared_relu(const Variable& x) {
  return unary(x, squared_relu_forward, squared_relu_backward);
}

Variable cast(const Variable& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  for (const DType one : {x.dtype(), dtype}) {
    require(one == DType::f32 || one == DType::f64 || one == DType::bf16,
            "cast: from {} to {}; both must be f32, f64 or bf16", name_of(x.dtype()), name_of(dtype));
  }
  Variable y(converted(x.value(), dtype));
  if (Tape* tape = Tape::recording({x})) {
    tape->record({&y}, [x = x.without_value(), from = x.dtype()](const std::vector<Tensor>& grad_outputs) {
      x.add_gradient(converted(grad_outputs[0], from));
    });
  }
  return y;
}

}  // namespace headwater

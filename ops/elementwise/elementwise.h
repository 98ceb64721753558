// The small operators that work element by element.
#pragma once

#include "autograd/variable.h"

namespace headwater {

/// Element by element, with the logistic function sigmoid(v) = 1 / (1 + e^-v):
///
///   add(a, b)           y = a + b
///   mul(a, b)           y = a b
///   scale(x, factor)    y = factor x
///   silu(x)             y = x sigmoid(x)
///   softplus(x)         y = log(1 + e^x), which never overflows
///   negative_exp(x)     y = -e^x, the rate A of a decaying state from A_log
///   gelu(x)             y = x Phi(x), Phi the normal distribution function, by erf: not the tanh approximation
///   relu(x)             y = max(x, 0); the gradient at 0 is 0
///   elu_plus_one(x)     y = x + 1 for x > 0, else e^x: the feature map of linear attention, positive everywhere
///   silu_mul(gate, up)  y = silu(gate) up, the SwiGLU product
///   sigmoid_mul(gate, up)  y = sigmoid(gate) up
///   squared_relu(x)     y = max(x, 0)^2
///   cast(x, dtype)      y = x, rounded to dtype; x itself if that is its dtype already
///
/// Source   SiLU: Elfwing et al. 2017, arXiv:1702.03118; SwiGLU: Shazeer 2020, arXiv:2002.05202; squared ReLU: So et al.
///          2021, arXiv:2109.08668; GELU: Hendrycks & Gimpel 2016, arXiv:1606.08415; elu + 1: Katharopoulos et al. 2020,
///          arXiv:2006.16236.
/// Shapes   any; two arguments must have the same one: nothing is broadcast.
/// Dtypes   f32, f64; on a GPU f32, bf16, computed in f32. Two arguments must have the same one, but for
///          add(a, b) on a GPU, whose b may be bf16 beside an f32 a: y is f32, the gradient of b bf16. cast: any of
///          these, to any of these.
/// Grads    to every tensor argument. Keeps the arguments alive and saves nothing else; add, scale and cast keep nothing.
/// Repeat   same inputs, same bits, whatever the number of threads.
/// Throws   an input error for a wrong shape or dtype; the text names the argument.
Variable add(const Variable& a, const Variable& b);
Variable mul(const Variable& a, const Variable& b);
Variable scale(const Variable& x, double factor);
Variable silu(const Variable& x);
Variable softplus(const Variable& x);
Variable negative_exp(const Variable& x);
Variable gelu(const Variable& x);
Variable relu(const Variable& x);
Variable elu_plus_one(const Variable& x);
Variable silu_mul(const Variable& gate, const Variable& up);
Variable sigmoid_mul(const Variable& gate, const Variable& up);
Variable squared_relu(const Variable& x);
Variable cast(const Variable& x, DType dtype);

}  // namespace headwater

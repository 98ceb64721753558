#include "train/token_step.h"

#include <algorithm>

#include "autograd/tape.h"

namespace headwater {

namespace {

bool have_same_shapes(const LanguageModelState& a, const LanguageModelState& b) {
  const auto same_tensor = [](const Variable& x, const Variable& y) { return x.shape() == y.shape(); };
  const auto same_layer = [&](const MixerState& x, const MixerState& y) {
    return std::equal(x.begin(), x.end(), y.begin(), y.end(), same_tensor);
  };
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), same_layer);
}

}  // namespace

TokenStep::TokenStep(const LanguageModel& model) : model_(model) {}

std::vector<float> TokenStep::advance(const std::vector<int32_t>& tokens) {
  const NoGradient no_gradient;
  const bool is_single = tokens.size() == 1;
  if (is_single && state_keeps_its_shapes_ && model_.device().is_cuda())
    return advance_recorded(tokens.front());
  graph_.reset();
  const auto n = static_cast<int64_t>(tokens.size());
  LanguageModel::Hidden out = model_.forward(Tensor::from_vector<int32_t>({1, n}, tokens), state_, {});
  state_keeps_its_shapes_ = is_single && have_same_shapes(state_, out.state);
  state_ = std::move(out.state);
  return last_logits(out.hidden).value().to_vector<float>();
}

std::vector<float> TokenStep::advance_recorded(int32_t token) {
  if (!graph_) {
    token_ = Tensor::zeros({1, 1}, DType::i32, model_.device());
    graph_ = std::make_unique<cuda::Graph>(model_.device(), [this] {
      const NoGradient no_gradient;
      const LanguageModel::Hidden out = model_.forward(token_, state_, {});
      logits_ = last_logits(out.hidden).value();
      // Back to where the next run reads it.
      for (size_t layer = 0; layer < state_.size(); ++layer) {
        for (size_t i = 0; i < state_[layer].size(); ++i) {
          state_[layer][i].value().copy_from(out.state[layer][i].value());
        }
      }
    });
  }
  token_.copy_from(Tensor::from_vector<int32_t>({1, 1}, {token}));
  graph_->launch();
  return logits_.to_vector<float>();
}

Variable TokenStep::last_logits(const Variable& hidden) const {
  const int64_t n = hidden.dim(1), d_model = hidden.dim(2);
  return model_.logits(Variable(hidden.value().view((n - 1) * d_model, {1, d_model})));
}

}  // namespace headwater

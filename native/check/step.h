// Whole steps of a random model: tokens in one step and one by one must give the same bits; as a path of a tree, whose
// positions are added in another order, nearly the same. With the head screened the largest logits are the same bits.
#pragma once

#include <deque>
#include <vector>

#include "../blockffn.h"
#include "packing.h"

namespace {

class StepCheck {
 public:
  StepCheck(int format, bool is_latent, bool is_gated) : format_(format), group_(format < 2 ? 0 : 32) {
    model_ = blockffn_model{};
    model_.num_layers = 2;
    model_.hidden_size = kHidden;
    model_.vocab_size = 45;
    model_.num_heads = 4;
    model_.num_key_heads = is_latent ? 1 : 2;
    model_.nope_width = is_latent ? 6 : 0;
    model_.rope_width = 8;
    model_.value_width = is_latent ? 5 : 8;
    model_.query_latent_size = is_latent ? 24 : 0;
    model_.latent_size = is_latent ? 12 : 0;
    model_.capacity = 40;
    model_.max_threads = 3;
    model_.attention = is_latent ? BLOCKFFN_LATENT : BLOCKFFN_GROUPED_QUERIES;
    model_.cache_format = format == BLOCKFFN_F32 ? BLOCKFFN_F32 : BLOCKFFN_BF16;
    model_.norm_eps = model_.latent_norm_eps = 1e-5f;
    model_.query_scale = 0.3f;
    model_.embedding_scale = model_.head_scale = 1;
    model_.residual_scale = 0.5f;
    model_.rotary = vector(model_.capacity * model_.rope_width);
    model_.embedding = matrix(model_.vocab_size, kHidden);
    model_.final_norm = vector(kHidden);
    Floats head = random_floats(model_.vocab_size * kHidden);
    model_.head = matrix(model_.vocab_size, kHidden, head, format);
    if (format != BLOCKFFN_INT4) {
      Floats coarse = head;
      model_.screen = matrix(model_.vocab_size, kHidden, coarse, BLOCKFFN_INT4);
      model_.screen_errors = screen_errors(head, coarse);
    }
    for (int layer = 0; layer < model_.num_layers; ++layer) layers_.push_back(make_layer(is_latent, is_gated, layer == 1));
    model_.layers = layers_.data();
    cache_.resize(static_cast<size_t>(blockffn_cache_bytes(&model_)));
    model_.cache = cache_.data();
    workspace_.resize(static_cast<size_t>(blockffn_step_workspace(&model_)) + 64);
  }

  // How many logits differ.
  int run() {
    const int64_t tokens[] = {3, 44, 0, 17, 9, 21, 30};
    const Floats together = step(tokens, nullptr, 7, 0);
    int differing = 0;
    for (int64_t t = 0; t < 7; ++t) differing += compare(step(tokens + t, nullptr, 1, t), 0, together, t);
    // The tree 0 → (1, 2 → 3), of which 0, 2, 3 are kept; the path must be the chain of these tokens.
    const int64_t tree[] = {3, 5, 44, 0}, parents[] = {-1, 0, 0, 2}, kept[] = {0, 2, 3};
    const Floats branches = step(tree, parents, 4, 0);
    differing += compare(branches, 0, together, 0, 2e-2f) + compare(branches, 2, together, 1, 2e-2f) +
                 compare(branches, 3, together, 2, 2e-2f);
    blockffn_move_positions(&model_, kept, 3, 0);
    differing += compare(step(tokens + 3, nullptr, 1, 3), 0, together, 3);
    if (model_.screen.data) {
      num_exact_ = 1;
      const Floats screened = step(tokens, nullptr, 7, 0);
      for (int64_t t = 0; t < 7; ++t) differing += compare_largest(screened, together, t);
      num_exact_ = 0;
    }
    const int64_t foreign[] = {45};
    return differing + (try_step(foreign, nullptr, 1, 0) != BLOCKFFN_BAD_ARGUMENT);
  }

 private:
  static constexpr int64_t kHidden = 40;

  Floats step(const int64_t* tokens, const int64_t* parents, int64_t count, int64_t length) {
    if (try_step(tokens, parents, count, length) != BLOCKFFN_OK) logits_.assign(logits_.size(), NAN);
    return logits_;
  }
  int32_t try_step(const int64_t* tokens, const int64_t* parents, int64_t count, int64_t length) {
    logits_.assign(static_cast<size_t>(count * kPaddedVocab), NAN);
    Floats hidden(static_cast<size_t>(count * kHidden));
    std::vector<int64_t> num_union(2), num_active(static_cast<size_t>(2 * count));
    void* workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace_.data()) + 63) / 64 * 64);
    blockffn_step step{};
    step.num_tokens = step.num_logits = count;
    step.tokens = tokens;
    step.parents = parents;
    step.length = length;
    step.num_exact = num_exact_;
    step.hidden = hidden.data();
    step.logits = logits_.data();
    step.num_union = num_union.data();
    step.num_active = num_active.data();
    step.workspace = workspace;
    return blockffn_decode_step(&model_, &step);
  }

  // Of row `i` of one and row `j` of another step; NaN differs from everything.
  int compare(const Floats& a, int64_t i, const Floats& b, int64_t j, float tolerance = 0) const {
    float largest = 0;
    for (int64_t v = 0; v < model_.vocab_size; ++v) largest = fmaxf(largest, fabsf(b[j * kPaddedVocab + v]));
    int differing = 0;
    for (int64_t v = 0; v < model_.vocab_size; ++v)
      differing += !(fabsf(a[i * kPaddedVocab + v] - b[j * kPaddedVocab + v]) <= tolerance * largest);
    return differing;
  }

  // Of row `i` of a screened and of a whole step: the largest must be there, and what is there must be equal.
  int compare_largest(const Floats& screened, const Floats& whole, int64_t i) const {
    int64_t largest = 0;
    int differing = 0;
    for (int64_t v = 0; v < model_.vocab_size; ++v) {
      if (whole[i * kPaddedVocab + v] > whole[i * kPaddedVocab + largest]) largest = v;
      const float value = screened[i * kPaddedVocab + v];
      differing += !(value == whole[i * kPaddedVocab + v] || value == -INFINITY);
    }
    return differing + (screened[i * kPaddedVocab + largest] != whole[i * kPaddedVocab + largest]);
  }
  const float* screen_errors(const Floats& head, const Floats& coarse) {
    Floats errors(static_cast<size_t>(kPaddedVocab * 2));
    for (int64_t v = 0; v < model_.vocab_size; ++v) {
      double apart = 0, own = 0;
      for (int64_t k = v * kHidden; k < (v + 1) * kHidden; ++k) {
        apart += (head[k] - coarse[k]) * (head[k] - coarse[k]);
        own += head[k] * head[k];
      }
      errors[v / 32 * 64 + v % 32] = static_cast<float>(1.00001 * sqrt(apart));
      errors[v / 32 * 64 + 32 + v % 32] = static_cast<float>(1.00001 * sqrt(own));
    }
    floats_.push_back(errors);
    return floats_.back().data();
  }

  // A dense layer is one gated expert.
  blockffn_layer make_layer(bool is_latent, bool is_gated, bool is_dense) {
    blockffn_layer layer{};
    const int64_t heads = model_.num_heads;
    layer.attention_norm = vector(kHidden);
    layer.ffn_norm = vector(kHidden);
    layer.in_proj = matrix(is_latent ? 32 + 20 : 32 + 32 + 32, kHidden);
    layer.out_proj = matrix(kHidden, heads * model_.value_width);
    if (is_latent) {
      layer.query_norm = vector(model_.query_latent_size);
      layer.latent_norm = vector(model_.latent_size);
      layer.query_proj = matrix(heads * (model_.nope_width + model_.rope_width), model_.query_latent_size);
      layer.to_latent = matrix(model_.latent_size, model_.nope_width, heads);
      layer.to_values = matrix(model_.value_width, model_.latent_size, heads);
    }
    const int64_t num_experts = is_dense ? 1 : 5, width = 24;
    const int32_t group = static_cast<int32_t>(group_), gated = is_gated || is_dense;
    std::vector<uint8_t> data;
    for (int64_t e = 0; e < num_experts; ++e)
      for (int part = gated ? 0 : 1; part < 3; ++part) {
        Floats weights = random_floats(width * kHidden);
        const int64_t outputs = part == 2 ? kHidden : width, inputs = part == 2 ? width : kHidden;
        const std::vector<uint8_t> packed = pack(format_, group_, outputs, inputs, weights);
        data.insert(data.end(), packed.begin(), packed.end());
      }
    packed_.push_back(data);
    const int64_t bytes = static_cast<int64_t>(data.size()) / num_experts;
    layer.experts = {packed_.back().data(), bytes, num_experts, width, kHidden, format_, gated, group, group};
    if (!is_dense) {
      layer.router = matrix(num_experts, kHidden);
      layer.router_scale = vector(num_experts);
      layer.router_normalizes = 1;
      layer.router_eps = 1e-5f;
    }
    return layer;
  }

  const float* vector(int64_t size) {
    floats_.push_back(random_floats(size));
    return floats_.back().data();
  }
  blockffn_matrix matrix(int64_t outputs, int64_t inputs, int64_t copies = 1) {
    std::vector<uint8_t> data;
    for (int64_t i = 0; i < copies; ++i) {
      Floats weights = random_floats(outputs * inputs);
      const std::vector<uint8_t> packed = pack(format_, group_, outputs, inputs, weights);
      data.insert(data.end(), packed.begin(), packed.end());
    }
    return kept(data, outputs, inputs, format_, group_);
  }
  blockffn_matrix matrix(int64_t outputs, int64_t inputs, Floats& weights, int format) {
    const int64_t group = format < 2 ? 0 : 32;
    return kept(pack(format, group, outputs, inputs, weights), outputs, inputs, format, group);
  }
  blockffn_matrix kept(const std::vector<uint8_t>& packed, int64_t outputs, int64_t inputs, int format, int64_t group) {
    packed_.push_back(packed);
    return {packed_.back().data(), outputs, inputs, format, static_cast<int32_t>(group)};
  }

  static constexpr int64_t kPaddedVocab = 64;
  const int format_;
  const int64_t group_;
  int64_t num_exact_ = 0;
  blockffn_model model_;
  std::vector<blockffn_layer> layers_;
  std::deque<Floats> floats_;  // a deque leaves what it holds where it is
  std::deque<std::vector<uint8_t>> packed_;
  std::vector<uint8_t> cache_;
  std::vector<uint8_t> workspace_;
  Floats logits_;
};

}  // namespace

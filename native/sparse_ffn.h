// The sparse FFN over packed experts, as work for the threads of a parallel region: compute the hidden values of every
// active (token, expert) pair, meet, compute the outputs. Hidden values are split over threads by expert and rows, outputs
// by columns. A column sums its experts in ascending order on one thread: nothing is reduced between threads, and the
// result depends neither on their number nor on their timing.
#pragma once

#include <string.h>

#include "active.h"
#include "blockffn.h"
#include "strips.h"
#include "workspace.h"

namespace blockffn {

class SparseFfn {
 public:
  SparseFfn(const Kernels& isa, const blockffn_experts& experts, int64_t num_tokens, int64_t num_threads)
      : isa_(isa),
        experts_(experts),
        up_(experts.format, experts.width, experts.hidden_size, experts.group_in),
        down_(experts.format, experts.hidden_size, experts.width, experts.group_hidden),
        num_tokens_(num_tokens),
        num_threads_(num_threads) {}

  const Strips& up() const { return up_; }

  // Memory for up to `num_pairs` active pairs, in two steps as `Workspace` has it.
  void reserve(Workspace& memory, int64_t num_pairs) {
    at_pairs_ = memory.reserve(num_pairs * static_cast<int64_t>(sizeof(Pair)));
    at_union_ = memory.reserve(experts_.num_experts * static_cast<int64_t>(sizeof(ExpertTokens)));
    at_unfinished_ = memory.reserve(experts_.num_experts * 4);
    at_hidden_ = memory.reserve(num_pairs * up_.padded_outputs() * 4);
    at_gate_ = memory.reserve(experts_.gated ? num_pairs * up_.padded_outputs() * 4 : 0);
    at_hidden_rows_ = memory.reserve(num_pairs * down_.activation_bytes());
    at_sums_ = memory.reserve(num_tokens_ * down_.padded_outputs() * 4);
  }
  void use(const Workspace& memory) {
    pairs_ = memory.at<Pair>(at_pairs_);
    union_ = memory.at<ExpertTokens>(at_union_);
    unfinished_ = memory.at<int32_t>(at_unfinished_);
    hidden_ = memory.at<float>(at_hidden_);
    gate_ = experts_.gated ? memory.at<float>(at_gate_) : nullptr;
    hidden_rows_ = memory.at<uint8_t>(at_hidden_rows_);
    sums_ = memory.at<float>(at_sums_);
  }

  // On one thread, before the others start: which pairs are active, and the tokens [num_tokens][up().activation_bytes()]
  // as `prepare` gives them.
  void begin(const RoutingWeights& weights, const uint8_t* tokens) {
    tokens_ = tokens;
    num_union_ = list_pairs(weights, pairs_, union_);
    for (int64_t u = 0; u < num_union_; ++u) unfinished_[u] = static_cast<int32_t>(up_.count());
    hidden_share_ = output_share_ = Share{};
  }
  int64_t num_union() const { return num_union_; }
  int64_t bytes_to_read() const { return num_union_ * experts_.expert_bytes; }

  // On each thread. Returns the stretch of outputs that this thread is to begin with, already on its way from memory.
  Stretch compute_hidden() {
    // Each thread takes its next piece before it computes this one, so that it can prefetch across.
    const Stretch outputs = take_outputs();
    Stretch piece = take_hidden();
    if (!piece.empty()) start_reading(up_strip(piece.begin));
    for (Stretch next; !piece.empty(); piece = next) {
      next = take_hidden();
      const uint8_t* after = next.empty() ? down_strips(0, outputs) : up_strip(next.begin);
      for (int64_t task = piece.begin; task < piece.end; ++task)
        compute_hidden_strip(task, task + 1 < piece.end ? up_strip(task + 1) : after);
    }
    return outputs;
  }

  // On each thread, when all have computed the hidden values: store(token, begin, end, sums) takes outputs begin .. end - 1
  // of a token.
  template <typename Store>
  void compute_outputs(Stretch outputs, Store store) {
    for (Stretch next; !outputs.empty(); outputs = next) {
      next = take_outputs();
      compute_output_strips(outputs, next);
      const int64_t begin = outputs.begin * kStrip;
      const int64_t end = outputs.end * kStrip < down_.outputs ? outputs.end * kStrip : down_.outputs;
      for (int64_t t = 0; t < num_tokens_; ++t)
        store(t, begin, end, sums_ + t * down_.padded_outputs() + begin);
    }
  }

 private:
  Stretch take_hidden() { return hidden_share_.take(num_union_ * up_.count(), num_threads_, 1); }
  Stretch take_outputs() { return output_share_.take(down_.count(), num_threads_, shortest_stretch(down_.bytes)); }

  const uint8_t* up_strip(int64_t task) const {
    return experts_.data + union_[task / up_.count()].expert * experts_.expert_bytes + task % up_.count() * up_.bytes;
  }
  // Where these strips of the down matrix of the union's expert `u` start; null for none.
  const uint8_t* down_strips(int64_t u, const Stretch& strips) const {
    if (strips.empty() || num_union_ == 0) return nullptr;
    return experts_.data + union_[u].expert * experts_.expert_bytes + up_.total_bytes() * (experts_.gated ? 2 : 1) +
           strips.begin * down_.bytes;
  }

  // 32 hidden values of one expert for all of its tokens. Who finishes an expert prepares its hidden rows.
  void compute_hidden_strip(int64_t task, const uint8_t* next) {
    const int64_t u = task / up_.count(), strip = task % up_.count();
    const ExpertTokens& tokens = union_[u];
    const uint8_t* weights = up_strip(task);
    const uint8_t* gate_weights = weights + up_.total_bytes();
    const Reading reading = Reading::from_to(weights + up_.bytes, gate_ ? gate_weights : next);
    const auto x = [&](int64_t i) { return tokens_ + pairs_[tokens.first + i].token * up_.activation_bytes(); };
    const auto at = [&](float* values, int64_t i) {
      return values + (tokens.first + i) * up_.padded_outputs() + strip * kStrip;
    };
    multiply_strips(isa_, up_, weights, 1, tokens.count, false, reading, x,
                    [&](int64_t i) { return at(hidden_, i); });
    if (gate_)
      multiply_strips(isa_, up_, gate_weights, 1, tokens.count, false,
                      Reading::from_to(gate_weights + up_.bytes, next), x, [&](int64_t i) { return at(gate_, i); });
    for (int64_t i = 0; i < tokens.count; ++i)
      isa_.activate(at(hidden_, i), gate_ ? at(gate_, i) : nullptr, pairs_[tokens.first + i].weight, kStrip);
    if (__atomic_sub_fetch(&unfinished_[u], 1, __ATOMIC_ACQ_REL) != 0) return;
    for (int64_t pair = tokens.first; pair < tokens.first + tokens.count; ++pair)
      isa_.prepare[down_.format](hidden_ + pair * up_.padded_outputs(), experts_.width, down_.inputs, down_.group,
                                 hidden_rows_ + pair * down_.activation_bytes());
  }

  void compute_output_strips(const Stretch& strips, const Stretch& next_strips) {
    const int64_t count = strips.end - strips.begin, stride = down_.padded_outputs();
    for (int64_t t = 0; t < num_tokens_; ++t)
      memset(sums_ + t * stride + strips.begin * kStrip, 0, static_cast<size_t>(count * kStrip) * 4);
    for (int64_t u = 0; u < num_union_; ++u) {
      const ExpertTokens& tokens = union_[u];
      const uint8_t* down = down_strips(u, strips);
      const uint8_t* next = u + 1 < num_union_ ? down_strips(u + 1, strips) : down_strips(0, next_strips);
      const Reading reading = Reading::from_to(down + count * down_.bytes, next);
      multiply_strips(
          isa_, down_, down, count, tokens.count, true, reading,
          [&](int64_t i) { return hidden_rows_ + (tokens.first + i) * down_.activation_bytes(); },
          [&](int64_t i) { return sums_ + pairs_[tokens.first + i].token * stride + strips.begin * kStrip; });
    }
  }

  const Kernels& isa_;
  const blockffn_experts& experts_;
  const Strips up_;
  const Strips down_;
  const int64_t num_tokens_;
  const int64_t num_threads_;
  int64_t at_pairs_ = 0, at_union_ = 0, at_unfinished_ = 0, at_hidden_ = 0, at_gate_ = 0, at_hidden_rows_ = 0, at_sums_ = 0;

  const uint8_t* tokens_ = nullptr;
  Pair* pairs_ = nullptr;
  ExpertTokens* union_ = nullptr;
  int64_t num_union_ = 0;
  int32_t* unfinished_ = nullptr;  // [union] strips of hidden values still to be computed
  float* hidden_ = nullptr;        // [pairs][padded width]
  float* gate_ = nullptr;          // the same, for gated experts
  uint8_t* hidden_rows_ = nullptr;
  float* sums_ = nullptr;  // [tokens][padded hidden size]
  Share hidden_share_;
  Share output_share_;
};

}  // namespace blockffn

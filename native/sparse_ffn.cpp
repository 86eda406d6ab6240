// The sparse FFN over packed experts, in one parallel region: prepare the tokens, compute the hidden values of every
// active (token, expert) pair, compute the outputs. Hidden values are split over threads by expert and rows, outputs by
// columns. A column sums its experts in ascending order on one thread: nothing is reduced between threads, and the
// result depends neither on their number nor on their timing.
#include <string.h>

#include "active.h"
#include "blockffn.h"
#include "dispatch.h"
#include "strips.h"
#include "workspace.h"

namespace {

using namespace blockffn;

class SparseFfn {
 public:
  SparseFfn(const blockffn_experts& experts, const RoutingWeights& weights, const TokenRows& x, void* y)
      : experts_(experts),
        isa_(kernels()),
        up_(experts.format, experts.width, experts.hidden_size, experts.group_in),
        down_(experts.format, experts.hidden_size, experts.width, experts.group_hidden),
        weights_(weights),
        tokens_(isa_, up_, x, weights.num_tokens, experts.hidden_size),
        dtype_(x.dtype),
        y_(y),
        runs_(down_.count(), num_threads(), shortest_stretch(down_.bytes)) {}

  bool run() {
    const int64_t num_pairs = count_pairs(weights_), E = weights_.num_experts, T = weights_.num_tokens;
    Workspace memory;
    const int64_t at_pairs = memory.reserve(num_pairs * static_cast<int64_t>(sizeof(Pair)));
    const int64_t at_union = memory.reserve(E * static_cast<int64_t>(sizeof(ExpertTokens)));
    const int64_t at_unfinished = memory.reserve(E * 4);
    const int64_t at_hidden = memory.reserve(num_pairs * up_.padded_outputs() * 4 * (experts_.gated ? 2 : 1));
    const int64_t at_hidden_rows = memory.reserve(num_pairs * down_.activation_bytes());
    const int64_t at_sums = memory.reserve(T * down_.padded_outputs() * 4);
    const int64_t at_tokens = memory.reserve(tokens_.workspace_bytes());
    if (!memory.allocate()) return false;
    pairs_ = memory.at<Pair>(at_pairs);
    union_ = memory.at<ExpertTokens>(at_union);
    unfinished_ = memory.at<int32_t>(at_unfinished);
    hidden_ = memory.at<float>(at_hidden);
    gate_ = experts_.gated ? hidden_ + num_pairs * up_.padded_outputs() : nullptr;
    hidden_rows_ = memory.at<uint8_t>(at_hidden_rows);
    sums_ = memory.at<float>(at_sums);
    tokens_.use(memory.at<uint8_t>(at_tokens));

    num_union_ = list_pairs(weights_, pairs_, union_);
    for (int64_t u = 0; u < num_union_; ++u) unfinished_[u] = static_cast<int32_t>(up_.count());
    hidden_runs_ = Runs(num_union_ * up_.count(), num_threads(), 1);
    tokens_.before_region();
    run_on_threads([](void* self) { static_cast<SparseFfn*>(self)->on_each_thread(); }, this,
                   threads_for(num_union_ * experts_.expert_bytes));
    return true;
  }

 private:
  void on_each_thread() {
    tokens_.in_region();
    // Each thread takes its next piece before it computes this one, so that it can prefetch across.
    int64_t run = output_tasks_.take(), piece = hidden_tasks_.take();
    if (piece < hidden_runs_.count()) start_reading(up_strip(hidden_runs_.begin(piece)));
    for (int64_t next; piece < hidden_runs_.count(); piece = next) {
      next = hidden_tasks_.take();
      const uint8_t* after = next < hidden_runs_.count() ? up_strip(hidden_runs_.begin(next)) : down_run(0, run);
      const int64_t last = hidden_runs_.end(piece) - 1;
      for (int64_t task = hidden_runs_.begin(piece); task <= last; ++task)
        compute_hidden(task, task < last ? up_strip(task + 1) : after);
    }
    wait_for_all();
    for (int64_t next; run < runs_.count(); run = next) {
      next = output_tasks_.take();
      compute_outputs(run, next);
    }
  }

  const uint8_t* up_strip(int64_t task) const {
    return experts_.data + union_[task / up_.count()].expert * experts_.expert_bytes + task % up_.count() * up_.bytes;
  }
  // Where run `run` of the down matrix of the union's expert `u` starts; null past the end.
  const uint8_t* down_run(int64_t u, int64_t run) const {
    if (run >= runs_.count() || num_union_ == 0) return nullptr;
    return experts_.data + union_[u].expert * experts_.expert_bytes + up_.total_bytes() * (experts_.gated ? 2 : 1) +
           runs_.begin(run) * down_.bytes;
  }

  // 32 hidden values of one expert for all of its tokens. Who finishes an expert prepares its hidden rows.
  void compute_hidden(int64_t task, const uint8_t* next) {
    const int64_t u = task / up_.count(), strip = task % up_.count();
    const ExpertTokens& tokens = union_[u];
    const uint8_t* weights = up_strip(task);
    const uint8_t* gate_weights = weights + up_.total_bytes();
    const Reading reading = Reading::from_to(weights + up_.bytes, gate_ ? gate_weights : next);
    const auto x = [&](int64_t i) { return tokens_.row(pairs_[tokens.first + i].token); };
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

  void compute_outputs(int64_t run, int64_t next_run) {
    const int64_t first = runs_.begin(run), last = runs_.end(run);
    const int64_t T = weights_.num_tokens, D = experts_.hidden_size, stride = down_.padded_outputs();
    for (int64_t t = 0; t < T; ++t)
      memset(sums_ + t * stride + first * kStrip, 0, static_cast<size_t>((last - first) * kStrip) * 4);
    for (int64_t u = 0; u < num_union_; ++u) {
      const ExpertTokens& tokens = union_[u];
      const uint8_t* down = down_run(u, run);
      const uint8_t* next = u + 1 < num_union_ ? down_run(u + 1, run) : down_run(0, next_run);
      const Reading reading = Reading::from_to(down + (last - first) * down_.bytes, next);
      multiply_strips(
          isa_, down_, down, last - first, tokens.count, true, reading,
          [&](int64_t i) { return hidden_rows_ + (tokens.first + i) * down_.activation_bytes(); },
          [&](int64_t i) { return sums_ + pairs_[tokens.first + i].token * stride + first * kStrip; });
    }
    const int64_t begin = first * kStrip, end = last * kStrip < D ? last * kStrip : D;
    for (int64_t t = 0; t < T; ++t) store_row(dtype_, y_, t * D + begin, sums_ + t * stride + begin, end - begin);
  }

  const blockffn_experts& experts_;
  const Kernels& isa_;
  const Strips up_;
  const Strips down_;
  const RoutingWeights weights_;
  PreparedTokens tokens_;
  const int32_t dtype_;
  void* const y_;
  const Runs runs_;

  Pair* pairs_ = nullptr;
  ExpertTokens* union_ = nullptr;
  int64_t num_union_ = 0;
  int32_t* unfinished_ = nullptr;  // [union] strips of hidden values still to be computed
  float* hidden_ = nullptr;        // [pairs][padded width]
  float* gate_ = nullptr;          // the same, for gated experts
  uint8_t* hidden_rows_ = nullptr;
  float* sums_ = nullptr;  // [tokens][padded hidden size]
  Runs hidden_runs_;  // of strips of the union's up matrices
  Counter hidden_tasks_;
  Counter output_tasks_;
};

}  // namespace

extern "C" int32_t blockffn_sparse_ffn(const blockffn_experts* experts, int64_t num_tokens, int32_t dtype,
                                       const void* x, int64_t x_stride, const float* weights, int64_t weights_stride,
                                       float threshold, void* y) {
  const bool known = experts->format >= kF32 && experts->format <= kInt4 && (dtype == kF32 || dtype == kBf16);
  if (!known || !(threshold >= 0) || num_tokens < 0) return BLOCKFFN_BAD_ARGUMENT;
  const RoutingWeights routing{weights, weights_stride, num_tokens, experts->num_experts, threshold};
  return SparseFfn(*experts, routing, TokenRows{dtype, x, x_stride}, y).run() ? BLOCKFFN_OK : BLOCKFFN_NO_MEMORY;
}

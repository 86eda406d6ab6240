// The sparse FFN over plain [experts][width][hidden_size] tensors. Rows of both matrices are contiguous: hidden values
// are dot products with rows of `up`, outputs are sums of rows of `down`. The phases and guarantees are those of
// sparse_ffn.cpp.
#include <string.h>

#include "active.h"
#include "blockffn.h"
#include "dispatch.h"
#include "parallel.h"
#include "strips.h"
#include "tokens.h"
#include "workspace.h"

namespace {

using namespace blockffn;

constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kColumns = 64;  // runs of output columns are multiples of this

struct PlainExperts {
  const void* up;
  const void* gate;
  const void* down;
  int64_t width;
  int64_t hidden_size;
  bool is_bf16;

  const void* at(const void* matrix, int64_t expert, int64_t row, int64_t column) const {
    const int64_t index = (expert * width + row) * hidden_size + column;
    return static_cast<const uint8_t*>(matrix) + index * (is_bf16 ? 2 : 4);
  }
};

class SparseFfnPlain {
 public:
  SparseFfnPlain(const PlainExperts& experts, const RoutingWeights& weights, const TokenRows& x, void* y)
      : experts_(experts),
        isa_(kernels()),
        weights_(weights),
        x_(x),
        y_(y),
        column_runs_((experts.hidden_size + kColumns - 1) / kColumns),
        threads_(num_threads()),
        tasks_per_expert_((experts.width + kRowsPerTask - 1) / kRowsPerTask) {}

  bool run() {
    const int64_t num_pairs = count_pairs(weights_), E = weights_.num_experts, T = weights_.num_tokens;
    const int64_t D = experts_.hidden_size;
    Workspace memory;
    const int64_t at_pairs = memory.reserve(num_pairs * static_cast<int64_t>(sizeof(Pair)));
    const int64_t at_union = memory.reserve(E * static_cast<int64_t>(sizeof(ExpertTokens)));
    const int64_t at_hidden = memory.reserve(num_pairs * stride() * 4 * (experts_.gate ? 2 : 1));
    const int64_t at_sums = memory.reserve(T * D * 4);
    const int64_t at_floats = memory.reserve(experts_.is_bf16 ? T * D * 4 : 0);
    if (!memory.allocate()) return false;
    pairs_ = memory.at<Pair>(at_pairs);
    union_ = memory.at<ExpertTokens>(at_union);
    hidden_ = memory.at<float>(at_hidden);
    gate_ = experts_.gate ? hidden_ + num_pairs * stride() : nullptr;
    sums_ = memory.at<float>(at_sums);
    floats_ = memory.at<float>(at_floats);

    num_union_ = list_pairs(weights_, pairs_, union_);
    for (int64_t t = 0; t < T; ++t) x_.floats(isa_, t, D, floats_ + t * D);
    run_on_threads([](void* self) { static_cast<SparseFfnPlain*>(self)->on_each_thread(); }, this,
                   threads_for(num_union_ * experts_.width * D * 4));
    return true;
  }

 private:
  int64_t stride() const { return round_up(experts_.width, 32); }
  const float* x(int64_t token) const {
    if (experts_.is_bf16) return floats_ + token * experts_.hidden_size;
    return static_cast<const float*>(x_.data) + token * x_.stride;
  }

  void on_each_thread() {
    for (int64_t task; (task = hidden_tasks_.take()) < num_union_ * tasks_per_expert_;)
      compute_hidden(union_[task / tasks_per_expert_], task % tasks_per_expert_ * kRowsPerTask);
    wait_for_all();
    for (Stretch run; run = output_share_.take(column_runs_, threads_, 2), !run.empty();)
      compute_outputs(run.begin * kColumns, run.end * kColumns);
  }

  void compute_hidden(const ExpertTokens& tokens, int64_t row) {
    const int64_t rows = experts_.width - row < kRowsPerTask ? experts_.width - row : kRowsPerTask;
    for (int64_t i = tokens.first; i < tokens.first + tokens.count; i += kMaxPlainTokens) {
      const float* x_rows[kMaxPlainTokens];
      float *values[kMaxPlainTokens], *gates[kMaxPlainTokens];
      const int64_t left = tokens.first + tokens.count - i;
      const int n = static_cast<int>(left < kMaxPlainTokens ? left : kMaxPlainTokens);
      for (int m = 0; m < n; ++m) {
        x_rows[m] = x(pairs_[i + m].token);
        values[m] = hidden_ + (i + m) * stride() + row;
        gates[m] = gate_ ? gate_ + (i + m) * stride() + row : nullptr;
        // The activation works on whole runs of 32; what is beyond the width must at least be a number.
        if (rows < kRowsPerTask) memset(values[m], 0, kRowsPerTask * 4);
        if (gate_ && rows < kRowsPerTask) memset(gates[m], 0, kRowsPerTask * 4);
      }
      const int64_t D = experts_.hidden_size;
      isa_.dot_rows(experts_.at(experts_.up, tokens.expert, row, 0), experts_.is_bf16, rows, D, x_rows, n, values);
      if (gate_)
        isa_.dot_rows(experts_.at(experts_.gate, tokens.expert, row, 0), experts_.is_bf16, rows, D, x_rows, n, gates);
      for (int m = 0; m < n; ++m) isa_.activate(values[m], gates[m], pairs_[i + m].weight, kRowsPerTask);
    }
  }

  void compute_outputs(int64_t begin, int64_t end) {
    const int64_t D = experts_.hidden_size, T = weights_.num_tokens;
    end = end < D ? end : D;
    for (int64_t t = 0; t < T; ++t) memset(sums_ + t * D + begin, 0, static_cast<size_t>(end - begin) * 4);
    for (int64_t u = 0; u < num_union_; ++u) {
      const ExpertTokens& tokens = union_[u];
      for (int64_t i = tokens.first; i < tokens.first + tokens.count; i += kMaxPlainTokens) {
        const float* factors[kMaxPlainTokens];
        float* outputs[kMaxPlainTokens];
        const int64_t left = tokens.first + tokens.count - i;
        const int n = static_cast<int>(left < kMaxPlainTokens ? left : kMaxPlainTokens);
        for (int m = 0; m < n; ++m) {
          factors[m] = hidden_ + (i + m) * stride();
          outputs[m] = sums_ + pairs_[i + m].token * D + begin;
        }
        isa_.add_rows(experts_.at(experts_.down, tokens.expert, 0, begin), experts_.is_bf16, experts_.width,
                      end - begin, D, factors, n, outputs);
      }
    }
    for (int64_t t = 0; t < T; ++t) store_row(isa_, x_.dtype, y_, t * D + begin, sums_ + t * D + begin, end - begin);
  }

  const PlainExperts experts_;
  const Kernels& isa_;
  const RoutingWeights weights_;
  const TokenRows x_;
  void* const y_;
  const int64_t column_runs_;
  const int64_t threads_;
  const int64_t tasks_per_expert_;

  Pair* pairs_ = nullptr;
  ExpertTokens* union_ = nullptr;
  int64_t num_union_ = 0;
  float* hidden_ = nullptr;  // [pairs][width rounded up to 32]
  float* gate_ = nullptr;
  float* sums_ = nullptr;    // [tokens][hidden_size]
  float* floats_ = nullptr;  // tokens as floats, when they come as bf16
  Counter hidden_tasks_;
  Share output_share_;
};

}  // namespace

extern "C" int32_t blockffn_sparse_ffn_plain(const void* up, const void* gate, const void* down, int64_t num_experts,
                                             int64_t width, int64_t hidden_size, int64_t num_tokens, int32_t dtype,
                                             const void* x, int64_t x_stride, const float* weights,
                                             int64_t weights_stride, float threshold, void* y) {
  if ((dtype != kF32 && dtype != kBf16) || !(threshold >= 0) || num_tokens < 0) return BLOCKFFN_BAD_ARGUMENT;
  const PlainExperts experts{up, gate, down, width, hidden_size, dtype == kBf16};
  const RoutingWeights routing{weights, weights_stride, num_tokens, num_experts, threshold};
  return SparseFfnPlain(experts, routing, TokenRows{dtype, x, x_stride}, y).run() ? BLOCKFFN_OK : BLOCKFFN_NO_MEMORY;
}

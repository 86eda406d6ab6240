// One sparse FFN, in one parallel region.
#include "sparse_ffn.h"

#include "blockffn.h"
#include "dispatch.h"

namespace {

using namespace blockffn;

class Call {
 public:
  Call(const blockffn_experts& experts, const RoutingWeights& weights, const TokenRows& x, void* y)
      : weights_(weights),
        ffn_(kernels(), experts, weights.num_tokens, num_threads()),
        tokens_(kernels(), ffn_.up(), x, weights.num_tokens, experts.hidden_size),
        hidden_size_(experts.hidden_size),
        dtype_(x.dtype),
        y_(y) {}

  bool run() {
    Workspace memory;
    ffn_.reserve(memory, count_pairs(weights_));
    const int64_t at_tokens = memory.reserve(tokens_.workspace_bytes());
    if (!memory.allocate()) return false;
    ffn_.use(memory);
    tokens_.use(memory.at<uint8_t>(at_tokens));
    ffn_.begin(weights_, tokens_.row(0));
    tokens_.before_region();
    run_on_threads([](void* self) { static_cast<Call*>(self)->on_each_thread(); }, this,
                   threads_for(ffn_.bytes_to_read()));
    return true;
  }

 private:
  void on_each_thread() {
    tokens_.in_region();
    const Stretch outputs = ffn_.compute_hidden();
    wait_for_all();
    ffn_.compute_outputs(outputs, [&](int64_t token, int64_t begin, int64_t end, const float* sums) {
      store_row(kernels(), dtype_, y_, token * hidden_size_ + begin, sums, end - begin);
    });
  }

  const RoutingWeights weights_;
  SparseFfn ffn_;
  PreparedTokens tokens_;
  const int64_t hidden_size_;
  const int32_t dtype_;
  void* const y_;
};

}  // namespace

extern "C" int32_t blockffn_sparse_ffn(const blockffn_experts* experts, int64_t num_tokens, int32_t dtype,
                                       const void* x, int64_t x_stride, const float* weights, int64_t weights_stride,
                                       float threshold, void* y) {
  const bool known = experts->format >= kF32 && experts->format <= kInt4 && (dtype == kF32 || dtype == kBf16);
  if (!known || !(threshold >= 0) || num_tokens < 0) return BLOCKFFN_BAD_ARGUMENT;
  const RoutingWeights routing{weights, weights_stride, num_tokens, experts->num_experts, threshold};
  return Call(*experts, routing, TokenRows{dtype, x, x_stride}, y).run() ? BLOCKFFN_OK : BLOCKFFN_NO_MEMORY;
}

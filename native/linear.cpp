// A packed matrix times a few tokens, in one parallel region; output strips are shared out over threads.
#include "blockffn.h"
#include "dispatch.h"
#include "strips.h"
#include "workspace.h"

namespace {

using namespace blockffn;

class Linear {
 public:
  Linear(const blockffn_matrix& matrix, int64_t num_tokens, const TokenRows& x, void* y)
      : data_(matrix.data),
        isa_(kernels()),
        strips_(matrix.format, matrix.outputs, matrix.inputs, matrix.group),
        tokens_(isa_, strips_, x, num_tokens, matrix.inputs),
        num_tokens_(num_tokens),
        dtype_(x.dtype),
        y_(y),
        threads_(num_threads()) {}

  bool run() {
    Workspace memory;
    const int64_t at_sums = memory.reserve(num_tokens_ * strips_.padded_outputs() * 4);
    const int64_t at_tokens = memory.reserve(tokens_.workspace_bytes());
    if (!memory.allocate()) return false;
    sums_ = memory.at<float>(at_sums);
    tokens_.use(memory.at<uint8_t>(at_tokens));
    tokens_.before_region();
    run_on_threads([](void* self) { static_cast<Linear*>(self)->on_each_thread(); }, this,
                   threads_for(strips_.total_bytes()));
    return true;
  }

 private:
  void on_each_thread() {
    tokens_.in_region();
    for (Stretch stretch = take(), next; !stretch.empty(); stretch = next) {
      next = take();  // already, so that it can be prefetched
      compute(stretch.begin, stretch.end, next.empty() ? nullptr : at(next.begin));
    }
  }

  Stretch take() { return share_.take(strips_.count(), threads_, shortest_stretch(strips_.bytes)); }

  const uint8_t* at(int64_t strip) const { return data_ + strip * strips_.bytes; }

  void compute(int64_t first, int64_t last, const uint8_t* next) {
    const Reading reading = Reading::from_to(at(last), next);
    const int64_t stride = strips_.padded_outputs();
    multiply_strips(
        isa_, strips_, at(first), last - first, num_tokens_, false, reading, [&](int64_t t) { return tokens_.row(t); },
        [&](int64_t t) { return sums_ + t * stride + first * kStrip; });
    const int64_t begin = first * kStrip;
    const int64_t end = last * kStrip < strips_.outputs ? last * kStrip : strips_.outputs;
    for (int64_t t = 0; t < num_tokens_; ++t)
      store_row(isa_, dtype_, y_, t * strips_.outputs + begin, sums_ + t * stride + begin, end - begin);
  }

  const uint8_t* const data_;
  const Kernels& isa_;
  const Strips strips_;
  PreparedTokens tokens_;
  const int64_t num_tokens_;
  const int32_t dtype_;
  void* const y_;
  const int64_t threads_;
  float* sums_ = nullptr;  // [tokens][padded outputs]
  Share share_;
};

}  // namespace

extern "C" int32_t blockffn_linear(const blockffn_matrix* matrix, int64_t num_tokens, int32_t dtype, const void* x,
                                   int64_t x_stride, void* y) {
  const bool known = matrix->format >= kF32 && matrix->format <= kInt4 && (dtype == kF32 || dtype == kBf16);
  if (!known || num_tokens < 0) return BLOCKFFN_BAD_ARGUMENT;
  return Linear(*matrix, num_tokens, TokenRows{dtype, x, x_stride}, y).run() ? BLOCKFFN_OK : BLOCKFFN_NO_MEMORY;
}

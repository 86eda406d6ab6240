// What the packed sparse FFN and the packed linear map share: a matrix in strips, and tokens prepared for it.
#pragma once

#include "blockffn.h"
#include "kernels.h"
#include "parallel.h"
#include "tokens.h"

namespace blockffn {

struct Strips {
  int format;
  int64_t outputs;
  int64_t inputs;  // padded
  int64_t group;
  int64_t bytes;  // of one strip

  Strips(int format, int64_t outputs, int64_t inputs, int64_t group)
      : format(format),
        outputs(outputs),
        inputs(padded_inputs(format, inputs, group)),
        group(group),
        bytes(strip_bytes(format, this->inputs, group)) {}
  explicit Strips(const blockffn_matrix& matrix)
      : Strips(matrix.format, matrix.outputs, matrix.inputs, matrix.group) {}
  int64_t count() const { return (outputs + kStrip - 1) / kStrip; }
  int64_t padded_outputs() const { return count() * kStrip; }
  int64_t total_bytes() const { return count() * bytes; }
  int64_t activation_bytes() const { return row_bytes(format, inputs, group); }
};

// output(i)[0 .. 32 * num_strips) (+)= strips * row(i) for i in [0, count), a few rows at a time, strip after strip.
template <typename Row, typename Output>
void multiply_strips(const Kernels& isa, const Strips& matrix, const uint8_t* strips, int64_t num_strips, int64_t count,
                     bool accumulate, const Reading& reading, Row row, Output output) {
  const uint8_t* rows[kMaxTokens];
  float* outputs[kMaxTokens];
  const int64_t most = isa.max_tokens[matrix.format];
  const int64_t strips_at_once = count <= most ? num_strips : 1;  // all rows use a strip while it is in cache
  for (int64_t strip = 0; strip < num_strips; strip += strips_at_once) {
    for (int64_t first = 0; first < count; first += most) {
      const int n = static_cast<int>(count - first < most ? count - first : most);
      for (int i = 0; i < n; ++i) {
        rows[i] = row(first + i);
        outputs[i] = output(first + i) + strip * kStrip;
      }
      isa.strip[matrix.format](StripCall{strips + strip * matrix.bytes, strips_at_once, matrix.inputs, matrix.group, rows,
                                         outputs, n, accumulate, first == 0, reading});
    }
  }
}

// The tokens of a call in the form the kernels read. One or two are prepared before the parallel region opens, which
// saves a barrier; more are shared out inside it.
class PreparedTokens {
 public:
  PreparedTokens(const Kernels& isa, const Strips& strips, const TokenRows& tokens, int64_t num_tokens, int64_t count)
      : isa_(isa), strips_(strips), tokens_(tokens), num_tokens_(num_tokens), count_(count) {}

  int64_t workspace_bytes() const { return num_tokens_ * (strips_.activation_bytes() + round_up(count_ * 4, 64)); }
  void use(uint8_t* workspace) {
    rows_ = workspace;
    floats_ = workspace + num_tokens_ * strips_.activation_bytes();
  }
  void before_region() {
    if (few())
      for (int64_t token = 0; token < num_tokens_; ++token) prepare(token);
  }
  void in_region() {
    if (few()) return;
    for (int64_t token; (token = counter_.take()) < num_tokens_;) prepare(token);
    wait_for_all();
  }
  const uint8_t* row(int64_t token) const { return rows_ + token * strips_.activation_bytes(); }

 private:
  bool few() const { return num_tokens_ <= 2; }
  void prepare(int64_t token) {
    float* buffer = reinterpret_cast<float*>(floats_ + token * round_up(count_ * 4, 64));
    isa_.prepare[strips_.format](tokens_.floats(isa_, token, count_, buffer), count_, strips_.inputs, strips_.group,
                                 rows_ + token * strips_.activation_bytes());
  }

  const Kernels& isa_;
  const Strips& strips_;
  TokenRows tokens_;
  int64_t num_tokens_;
  int64_t count_;
  uint8_t* rows_ = nullptr;
  uint8_t* floats_ = nullptr;
  Counter counter_;
};

// Strips to be read in one stretch, so that prefetching ahead stays inside it for most of the time.
inline int64_t shortest_stretch(int64_t bytes_per_strip) { return (8 << 10) / bytes_per_strip + 1; }

// Threads that are worth waking for reading this many bytes.
inline int64_t threads_for(int64_t bytes) { return bytes / (32 << 10) + 1; }

}  // namespace blockffn

// The active (token, expert) pairs of a chunk: for each expert of the union, its tokens.
#pragma once

#include <stdint.h>

namespace blockffn {

struct RoutingWeights {
  const float* values;
  int64_t stride;
  int64_t num_tokens;
  int64_t num_experts;
  float threshold;

  float at(int64_t token, int64_t expert) const { return values[token * stride + expert]; }
  bool is_active(int64_t token, int64_t expert) const {
    const float value = at(token, expert);
    return !(value <= threshold && value >= -threshold);  // NaN is active, so that it is seen
  }
};

struct Pair {
  int32_t token;
  float weight;
};

// Expert `expert` owns pairs [first, first + count).
struct ExpertTokens {
  int32_t expert;
  int32_t count;
  int64_t first;
};

inline int64_t count_pairs(const RoutingWeights& weights) {
  int64_t count = 0;
  for (int64_t t = 0; t < weights.num_tokens; ++t)
    for (int64_t e = 0; e < weights.num_experts; ++e) count += weights.is_active(t, e);
  return count;
}

// Fills `pairs` (expert by expert, tokens ascending) and `experts` (ascending); returns the size of the union.
inline int64_t list_pairs(const RoutingWeights& weights, Pair* pairs, ExpertTokens* experts) {
  int64_t num_union = 0, filled = 0;
  for (int64_t e = 0; e < weights.num_experts; ++e) {
    const int64_t first = filled;
    for (int64_t t = 0; t < weights.num_tokens; ++t)
      if (weights.is_active(t, e)) pairs[filled++] = Pair{static_cast<int32_t>(t), weights.at(t, e)};
    if (filled > first)
      experts[num_union++] = ExpertTokens{static_cast<int32_t>(e), static_cast<int32_t>(filled - first), first};
  }
  return num_union;
}

}  // namespace blockffn

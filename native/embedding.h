// Rows of the embedding table: plain, or lanes of a packed matrix.
#pragma once

#include "blockffn.h"
#include "dispatch.h"
#include "strips.h"

namespace blockffn {

inline float packed_value(const Strips& matrix, const uint8_t* strip, int64_t k, int64_t lane) {
  if (matrix.format == kF32) return reinterpret_cast<const float*>(strip)[k * kStrip + lane];
  if (matrix.format == kBf16) return bf16_to_float(reinterpret_cast<const uint16_t*>(strip)[(k / 2 * kStrip + lane) * 2 + k % 2]);
  const bool is_int8 = matrix.format == kInt8;
  const int64_t inputs = k % matrix.group, in_byte = is_int8 ? 4 : 8;  // of one output that lie together
  const uint8_t* group = strip + k / matrix.group * strip_bytes(matrix.format, matrix.group, matrix.group);
  uint16_t scale;
  __builtin_memcpy(&scale, group + lane * 2, 2);
  const uint8_t byte = group[kStrip * 2 + (inputs / in_byte * kStrip + lane) * 4 + k % 4];
  const int code = is_int8 ? byte - 128 : (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
  return static_cast<float>(code) * half_to_float(scale);
}

// x[0 .. hidden_size) = row `token`, times the embedding's scale.
inline void embed(const blockffn_model& model, int64_t token, float* x) {
  const int64_t D = model.hidden_size;
  if (model.embedding_is_plain) {
    const TokenRows rows{model.embedding.format, model.embedding.data, D};
    const float* row = rows.floats(kernels(), token, D, x);
    for (int64_t k = 0; k < D; ++k) x[k] = row[k] * model.embedding_scale;
    return;
  }
  const Strips matrix(model.embedding);
  const uint8_t* strip = model.embedding.data + token / kStrip * matrix.bytes;
  for (int64_t k = 0; k < D; ++k) x[k] = packed_value(matrix, strip, k, token % kStrip) * model.embedding_scale;
}

}  // namespace blockffn

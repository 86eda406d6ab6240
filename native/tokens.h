// Rows of tokens as they come in and go out: float or bf16.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace blockffn {

struct TokenRows {
  int32_t dtype;
  const void* data;
  int64_t stride;

  // The row as floats: the row itself, or converted into `buffer`.
  const float* floats(int64_t token, int64_t count, float* buffer) const {
    if (dtype == kF32) return static_cast<const float*>(data) + token * stride;
    const uint16_t* row = static_cast<const uint16_t*>(data) + token * stride;
    for (int64_t i = 0; i < count; ++i) buffer[i] = bf16_to_float(row[i]);
    return buffer;
  }
};

inline void store_row(int32_t dtype, void* out, int64_t offset, const float* values, int64_t count) {
  if (dtype == kF32) {
    __builtin_memcpy(static_cast<float*>(out) + offset, values, static_cast<size_t>(count) * 4);
  } else {
    uint16_t* row = static_cast<uint16_t*>(out) + offset;
    for (int64_t i = 0; i < count; ++i) row[i] = float_to_bf16(values[i]);
  }
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// K as stored: whole groups, or whole runs of 32.
inline int64_t padded_inputs(int format, int64_t inputs, int64_t group) {
  return round_up(inputs, format == kF32 || format == kBf16 ? 32 : group);
}

}  // namespace blockffn

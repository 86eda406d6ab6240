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
  const float* floats(const Kernels& isa, int64_t token, int64_t count, float* buffer) const {
    if (dtype == kF32) return static_cast<const float*>(data) + token * stride;
    isa.widen(static_cast<const uint16_t*>(data) + token * stride, count, buffer);
    return buffer;
  }
};

inline void store_row(const Kernels& isa, int32_t dtype, void* out, int64_t offset, const float* values,
                      int64_t count) {
  if (dtype == kF32)
    __builtin_memcpy(static_cast<float*>(out) + offset, values, static_cast<size_t>(count) * 4);
  else
    isa.narrow(values, count, static_cast<uint16_t*>(out) + offset);
}

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// K as stored: whole groups, or whole runs of 32.
inline int64_t padded_inputs(int format, int64_t inputs, int64_t group) {
  return round_up(inputs, format == kF32 || format == kBf16 ? 32 : group);
}

}  // namespace blockffn

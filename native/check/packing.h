// Random matrices, packed as blockffn.h says.
#pragma once

#include <math.h>
#include <string.h>

#include <vector>

#include "../kernels.h"
#include "../tokens.h"

namespace {

using blockffn::kStrip;
using Floats = std::vector<float>;

uint32_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}
Floats random_floats(int64_t count) {
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = uniform();
  return values;
}

uint16_t float_to_half(float value) {  // scales are normal numbers; truncation is fine, the stored value counts
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((((bits >> 23) & 255) - 112) << 10) | (bits >> 13 & 1023));
}
float half_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half & 0x8000) << 16 | ((half >> 10 & 31) + 112u) << 23 | (half & 1023u) << 13;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Packs a matrix [outputs][inputs] as blockffn.h says, and replaces it by the values that were stored.
std::vector<uint8_t> pack(int format, int64_t group, int64_t outputs, int64_t inputs, Floats& matrix) {
  const int64_t K = blockffn::padded_inputs(format, inputs, group), strips = (outputs + kStrip - 1) / kStrip;
  const int64_t bytes = blockffn::strip_bytes(format, K, group);
  std::vector<uint8_t> packed(static_cast<size_t>(strips * bytes));
  for (int64_t n = 0; n < strips * kStrip; ++n) {
    uint8_t* strip = packed.data() + n / kStrip * bytes;
    const int64_t lane = n % kStrip;
    const auto get = [&](int64_t k) { return n < outputs && k < inputs ? matrix[n * inputs + k] : 0.0f; };
    const auto set = [&](int64_t k, float value) {
      if (n < outputs && k < inputs) matrix[n * inputs + k] = value;
    };
    if (format == blockffn::kF32) {
      for (int64_t k = 0; k < K; ++k) reinterpret_cast<float*>(strip)[k * kStrip + lane] = get(k);
      continue;
    }
    if (format == blockffn::kBf16) {
      for (int64_t k = 0; k < K; ++k) {
        const uint16_t bits = blockffn::float_to_bf16(get(k));
        reinterpret_cast<uint16_t*>(strip)[(k / 2 * kStrip + lane) * 2 + k % 2] = bits;
        set(k, blockffn::bf16_to_float(bits));
      }
      continue;
    }
    const bool is_int8 = format == blockffn::kInt8;
    const int64_t group_bytes = kStrip * 2 + (is_int8 ? kStrip * group : kStrip * group / 2);
    for (int64_t g = 0; g < K / group; ++g) {
      uint8_t* block = strip + g * group_bytes;
      float largest = 1e-3f;
      for (int64_t k = g * group; k < (g + 1) * group; ++k) largest = fmaxf(largest, fabsf(get(k)));
      const uint16_t half = float_to_half(largest / (is_int8 ? 126 : 6.9f));
      memcpy(block + lane * 2, &half, 2);
      for (int64_t k = 0; k < group; ++k) {
        const int most = is_int8 ? 127 : 7, offset = is_int8 ? 128 : 8;
        const float steps = roundf(get(g * group + k) / half_to_float(half));
        const int code = static_cast<int>(fminf(fmaxf(steps, static_cast<float>(-most)), static_cast<float>(most)));
        set(g * group + k, static_cast<float>(code) * half_to_float(half));
        const uint8_t byte = static_cast<uint8_t>(code + offset);
        if (is_int8) {
          block[kStrip * 2 + (k / 4 * kStrip + lane) * 4 + k % 4] = byte;
        } else {
          uint8_t& pair = block[kStrip * 2 + (k / 8 * kStrip + lane) * 4 + k % 4];
          pair = static_cast<uint8_t>(k % 8 < 4 ? byte : pair | byte << 4);
        }
      }
    }
  }
  return packed;
}

}  // namespace

// What one instruction set provides. The driver (sparse_ffn.cpp) knows nothing else about the processor.
#pragma once

#include <stdint.h>

namespace blockffn {

enum Format { kF32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int kStrip = 32;     // outputs of a strip
constexpr int kMaxTokens = 16;  // most tokens a kernel takes at once
constexpr int kMaxPlainTokens = 6;  // the same for plain weights

// Where this thread reads: memory up to `end`, and from there on at `end + jump`. Only a hint for prefetching.
struct Reading {
  const uint8_t* end;
  int64_t jump;

  static Reading from_to(const uint8_t* end, const uint8_t* next) { return {end, next ? next - end : 0}; }
};

// Strips that follow each other in memory times up to `max_tokens` activation rows:
// outputs[m][32 * s .. 32 * s + 31] (+)= strip s * rows[m].
struct StripCall {
  const uint8_t* strips;
  int64_t num_strips;
  int64_t inputs;  // K, rounded up as in blockffn.h
  int64_t group;
  const uint8_t* const* rows;  // prepared by `prepare`
  float* const* outputs;
  int num_tokens;
  bool accumulate;
  bool fetch;  // whether this call is the first to read the strips
  Reading reading;
};

// Weights come straight from memory: ask for them early, into the second cache and then into the first, also
// across the end of a stretch. Hardware prefetchers stop at the end of a page, and a core that waits for sums does not
// look far ahead by itself.
inline void prefetch(const StripCall& call, const uint8_t* weights) {
  constexpr int kNear = 4 << 10, kFar = 10 << 10;  // bytes
  const uint8_t* near = weights + kNear;
  const uint8_t* far = weights + kFar;
  near += near >= call.reading.end ? call.reading.jump : 0;
  far += far >= call.reading.end ? call.reading.jump : 0;
  __builtin_prefetch(far, 0, 2);
  __builtin_prefetch(far + 64, 0, 2);
  __builtin_prefetch(near);
  __builtin_prefetch(near + 64);
}

// The beginning of a thread's first stretch, which no earlier stretch has prefetched.
inline void start_reading(const uint8_t* weights, int64_t bytes = 10 << 10) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(weights + line, 0, 2);
}

struct Kernels {
  const char* name;
  int max_tokens[4];  // by format, like the two that follow
  void (*strip[4])(const StripCall&);
  // Turns float activations into the form that `strip` of this format wants, with zeros from `count` to `inputs`.
  void (*prepare[4])(const float* x, int64_t count, int64_t inputs, int64_t group, uint8_t* row);
  // values[i] = silu(values[i]) * weight; with `gate`: silu(gate[i]) * values[i] * weight. `count` is a multiple of 32.
  void (*activate)(float* values, const float* gate, float weight, int64_t count);
  // out[i] = x[i] / sqrt(mean(x²) + eps) * weight[i] * factor; `out` may be `x`.
  void (*normalize)(const float* x, const float* weight, float eps, float factor, int64_t count, float* out);
  // values[i] = exp(values[i] - max), at least e^-87; returns their sum. The result of a count depends on nothing else.
  float (*exponentials)(float* values, int64_t count);
  // Of a strip of values, the largest, and the largest of value + errors[0] * by_error + errors[1] * by_norm; NaN if one is.
  void (*bound)(const float* values, const float* errors, float by_error, float by_norm, float* largest, float* limit);
  // Rows of plain [rows][count] weights: outputs[m][r] = dot(weights[r], x[m]); bf16 weights when `is_bf16`.
  void (*dot_rows)(const void* weights, bool is_bf16, int64_t rows, int64_t count, const float* const* x, int num_tokens,
                   float* const* outputs);
  // outputs[m][0..count) += sum_r factors[m][r] * weights[r][0..count), weights with `stride` elements from row to row.
  void (*add_rows)(const void* weights, bool is_bf16, int64_t rows, int64_t count, int64_t stride,
                   const float* const* factors, int num_tokens, float* const* outputs);
  // bf16 to float, and float to bf16.
  void (*widen)(const uint16_t* values, int64_t count, float* out);
  void (*narrow)(const float* values, int64_t count, uint16_t* out);
  // Reads memory as fast as it comes; the sum keeps the compiler honest.
  uint64_t (*sum)(const uint8_t* data, int64_t bytes);
};

// Bytes of a prepared activation row: floats, or int8 codes followed by a float scale and an int32 sum for each group.
inline int64_t row_bytes(int format, int64_t inputs, int64_t group) {
  if (format == kF32 || format == kBf16) return inputs * 4;
  return (inputs + inputs / group * 8 + 63) / 64 * 64;
}

inline int64_t strip_bytes(int format, int64_t inputs, int64_t group) {
  switch (format) {
    case kF32: return inputs * kStrip * 4;
    case kBf16: return inputs * kStrip * 2;
    case kInt8: return inputs / group * (kStrip * 2) + inputs * kStrip;
    default: return inputs / group * (kStrip * 2) + inputs * kStrip / 2;
  }
}

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest even; NaN stays NaN. Without a branch, so that compilers vectorise it.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  // Placing the bits in a float divides the value by 2^112; this also normalises subnormal halves.
  const uint32_t bits = magnitude >= 0x7c00 ? 0x7f800000u | (magnitude & 0x3ff) << 13 : magnitude << 13;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  if (magnitude < 0x7c00) value *= 5.192296858534828e33f;
  return sign ? -value : value;
}

// Each is null where this build or this processor lacks the instructions.
const Kernels* amx_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();
const Kernels* portable_kernels();

}  // namespace blockffn

// The kernels, written once over the vector vocabulary `Vec` that each instruction set defines before including this
// file inside its own anonymous namespace (so that no two instruction sets share a template's code).
//
// Sums run along K in one order whatever the number of tokens: a token's result is bit-equal in any batch.

using blockffn::kBf16;
using blockffn::kF32;
using blockffn::kInt4;
using blockffn::kInt8;
using blockffn::Kernels;
using blockffn::kStrip;
using blockffn::prefetch;
using blockffn::StripCall;

constexpr int kVectors = kStrip / Vec::kLanes;

// `M` tokens times `N` vectors of one strip; `w` is the strip, `first` the first output. Returns the end of the strip.
template <int kFormat, int M, int N, bool kFetch>
inline const uint8_t* float_tile(const StripCall& call, const uint8_t* w, int64_t first) {
  using F = typename Vec::F;
  constexpr int kStepBytes = kStrip * 4;             // of weights, one step of K
  constexpr int kInputs = kFormat == kBf16 ? 2 : 1;  // in a step
  const int64_t lane = first % kStrip;
  const float* x[M];
  constexpr bool kTwoSums = kFormat == kBf16 && Vec::kTwoSums;
  F sum[M][N], odd_sum[M][N];
  for (int m = 0; m < M; ++m) {
    x[m] = reinterpret_cast<const float*>(call.rows[m]);
    for (int n = 0; n < N; ++n) {
      sum[m][n] = call.accumulate ? Vec::load(call.outputs[m] + first + n * Vec::kLanes) : Vec::zero();
      odd_sum[m][n] = Vec::zero();
    }
  }
  for (int64_t k = 0; k < call.inputs; k += kInputs, w += kStepBytes) {
    F weight[N];
    if (kFetch) prefetch(call, w);
    for (int n = 0; n < N; ++n) {
      const uint8_t* at = w + (lane + n * Vec::kLanes) * 4;
      weight[n] = kFormat == kBf16 ? Vec::load_bf16_even(at) : Vec::load(reinterpret_cast<const float*>(at));
    }
    for (int m = 0; m < M; ++m) {
      const F a = Vec::broadcast(x[m][k]);
      for (int n = 0; n < N; ++n) sum[m][n] = Vec::fma(weight[n], a, sum[m][n]);
    }
    if (kFormat == kF32) continue;
    for (int n = 0; n < N; ++n) weight[n] = Vec::load_bf16_odd(w + (lane + n * Vec::kLanes) * 4);
    for (int m = 0; m < M; ++m) {
      const F a = Vec::broadcast(x[m][k + 1]);
      for (int n = 0; n < N; ++n) {
        F& odd_or_all = kTwoSums ? odd_sum[m][n] : sum[m][n];
        odd_or_all = Vec::fma(weight[n], a, odd_or_all);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n)
      Vec::store(call.outputs[m] + first + n * Vec::kLanes,
                 kTwoSums ? Vec::add(sum[m][n], odd_sum[m][n]) : sum[m][n]);
  return w;
}

// Adds the products of one group of int8 weights to `dot`; `k` is its first input. Returns the end of the group.
// Integer sums are exact: splitting them in two changes no result, and for few tokens it halves the waiting.
template <int M, int N, bool kFetch>
inline const uint8_t* dot_group8(const StripCall& call, const uint8_t* w, int64_t k, const int8_t* const* x,
                                 typename Vec::I (*dot)[N]) {
  using I = typename Vec::I;
  constexpr int kParts = M <= 2 ? 2 : 1;
  I parts[kParts][M][N];
  for (auto& part : parts)
    for (auto& token : part)
      for (I& sum : token) sum = Vec::broadcast_int(0);
  for (const int64_t end = k + call.group; k < end;) {
    for (auto& part : parts) {
      I code[N];
      if (kFetch) prefetch(call, w);
      for (int n = 0; n < N; ++n) code[n] = Vec::load_codes(w + n * Vec::kLanes * 4);
      for (int m = 0; m < M; ++m) {
        const I a = Vec::broadcast_bytes(x[m] + k);
        for (int n = 0; n < N; ++n) part[m][n] = Vec::dot8(part[m][n], code[n], a);
      }
      k += 4;
      w += kStrip * 4;
    }
  }
  for (const auto& part : parts)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = Vec::add_int(dot[m][n], part[m][n]);
  return w;
}

// The same for int4: of eight inputs the first four are low nibbles, the others high ones.
template <int M, int N, bool kFetch>
inline const uint8_t* dot_group4(const StripCall& call, const uint8_t* w, int64_t k, const int8_t* const* x,
                                 typename Vec::I (*dot)[N]) {
  using I = typename Vec::I;
  constexpr bool kTwoSums = M <= 2 && Vec::kDot4Waits;
  I high_dot[M][N];
  if constexpr (kTwoSums)
    for (auto& token : high_dot)
      for (I& sum : token) sum = Vec::broadcast_int(0);
  for (const int64_t end = k + call.group; k < end; k += 8, w += kStrip * 4) {
    I low[N], high[N];
    if (kFetch) prefetch(call, w);
    for (int n = 0; n < N; ++n) {
      const I code = Vec::load_codes(w + n * Vec::kLanes * 4);
      low[n] = Vec::low_nibbles(code);
      high[n] = Vec::high_nibbles(code);
    }
    for (int m = 0; m < M; ++m) {
      const I a = Vec::broadcast_bytes(x[m] + k);
      for (int n = 0; n < N; ++n) dot[m][n] = Vec::dot4(dot[m][n], low[n], a);
    }
    for (int m = 0; m < M; ++m) {
      const I a = Vec::broadcast_bytes(x[m] + k + 4);
      for (int n = 0; n < N; ++n) {
        I& sum = kTwoSums ? high_dot[m][n] : dot[m][n];
        sum = Vec::dot4(sum, high[n], a);
      }
    }
  }
  if constexpr (kTwoSums)
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = Vec::add_int(dot[m][n], high_dot[m][n]);
  return w;
}

// The same with products summed in `Vec::P`: narrow lanes, where they are cheaper, for the `kInputs4` that fit.
template <int M, int N, bool kFetch>
inline const uint8_t* dot_group4_narrow(const StripCall& call, const uint8_t* w, int64_t k, const int8_t* const* x,
                                        typename Vec::I (*dot)[N]) {
  using I = typename Vec::I;
  using P = typename Vec::P;
  for (const int64_t end = k + call.group; k < end;) {
    P sum[M][N];
    for (auto& token : sum)
      for (P& part : token) part = Vec::zero4();
    const int64_t fits = end - k < Vec::kInputs4 ? end - k : Vec::kInputs4;
    for (const int64_t stop = k + fits; k < stop; k += 8, w += kStrip * 4) {
      I code[N], low[N], high[N];
      if (kFetch) prefetch(call, w);
      for (int n = 0; n < N; ++n) code[n] = Vec::load_codes(w + n * Vec::kLanes * 4);
      for (int n = 0; n < N; ++n) low[n] = Vec::low_nibbles(code[n]);
      for (int n = 0; n < N; ++n) high[n] = Vec::high_nibbles(code[n]);
      for (int m = 0; m < M; ++m) {
        const I a = Vec::broadcast_bytes(x[m] + k), b = Vec::broadcast_bytes(x[m] + k + 4);
        for (int n = 0; n < N; ++n) sum[m][n] = Vec::dot4(sum[m][n], low[n], a);
        for (int n = 0; n < N; ++n) sum[m][n] = Vec::dot4(sum[m][n], high[n], b);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = Vec::add_int(dot[m][n], Vec::widen4(sum[m][n]));
  }
  return w;
}

template <int kFormat, int M, int N, bool kFetch>
inline const uint8_t* integer_tile(const StripCall& call, const uint8_t* w, int64_t first) {
  using F = typename Vec::F;
  using I = typename Vec::I;
  constexpr int kOffset = kFormat == kInt8 ? Vec::kOffset8 : Vec::kOffset4;
  const int64_t num_groups = call.inputs / call.group;
  const int8_t* x[M];
  const float* x_scale[M];
  const int32_t* x_sum[M];
  const int64_t lane = first % kStrip;
  F sum[M][N];
  for (int m = 0; m < M; ++m) {
    x[m] = reinterpret_cast<const int8_t*>(call.rows[m]);
    x_scale[m] = reinterpret_cast<const float*>(x[m] + call.inputs);
    x_sum[m] = reinterpret_cast<const int32_t*>(x_scale[m] + num_groups);
    for (int n = 0; n < N; ++n)
      sum[m][n] = call.accumulate ? Vec::load(call.outputs[m] + first + n * Vec::kLanes) : Vec::zero();
  }
  for (int64_t g = 0; g < num_groups; ++g) {
    F scale[N];
    for (int n = 0; n < N; ++n) scale[n] = Vec::load_half(w + (lane + n * Vec::kLanes) * 2);
    w += kStrip * 2;
    I dot[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) dot[m][n] = Vec::broadcast_int(-kOffset * x_sum[m][g]);
    const uint8_t* codes = w + lane * 4;
    if constexpr (kFormat == kInt8)
      w = dot_group8<M, N, kFetch>(call, codes, g * call.group, x, dot) - lane * 4;
    else if constexpr (Vec::kInputs4 == 0)
      w = dot_group4<M, N, kFetch>(call, codes, g * call.group, x, dot) - lane * 4;
    else
      w = dot_group4_narrow<M, N, kFetch>(call, codes, g * call.group, x, dot) - lane * 4;
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n)
        sum[m][n] =
            Vec::fma(Vec::to_float(dot[m][n]), Vec::mul(scale[n], Vec::broadcast(x_scale[m][g])), sum[m][n]);
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) Vec::store(call.outputs[m] + first + n * Vec::kLanes, sum[m][n]);
  return w;
}

template <int kFormat, int M, int N, bool kFetch>
inline const uint8_t* tile(const StripCall& call, const uint8_t* w, int64_t first) {
  if constexpr (kFormat == kF32 || kFormat == kBf16)
    return float_tile<kFormat, M, N, kFetch>(call, w, first);
  else
    return integer_tile<kFormat, M, N, kFetch>(call, w, first);
}

// Few tokens take a strip in one pass; more tokens take half of it twice where registers are few. Only the first pass
// over a strip prefetches what follows.
template <int kFormat, int M>
void strip_tile(const StripCall& call) {
  constexpr int kWide = M <= Vec::kWideTokens ? kVectors : kVectors / 2;
  const uint8_t* w = call.strips;
  for (int64_t strip = 0; strip < call.num_strips; ++strip) {
    const int64_t first = strip * kStrip;
    const uint8_t* next = call.fetch ? tile<kFormat, M, kWide, true>(call, w, first)
                                     : tile<kFormat, M, kWide, false>(call, w, first);
    if constexpr (kWide < kVectors) tile<kFormat, M, kWide, false>(call, w, first + kStrip / 2);
    w = next;
  }
}

constexpr int tokens_of(int format) { return format == kF32 || format == kBf16 ? Vec::kTokens : Vec::kIntegerTokens; }

template <int kFormat>
void strip(const StripCall& call) {
  switch (call.num_tokens) {
    case 1: return strip_tile<kFormat, 1>(call);
    case 2: return strip_tile<kFormat, 2>(call);
    case 3: return strip_tile<kFormat, 3>(call);
    case 4: return strip_tile<kFormat, 4>(call);
  }
  if constexpr (tokens_of(kFormat) > 4) {
    switch (call.num_tokens) {
      case 5: return strip_tile<kFormat, 5>(call);
      case 6: return strip_tile<kFormat, 6>(call);
    }
  }
}

void prepare_float(const float* x, int64_t count, int64_t inputs, int64_t, uint8_t* row) {
  float* out = reinterpret_cast<float*>(row);
  for (int64_t k = 0; k < count; ++k) out[k] = x[k];
  for (int64_t k = count; k < inputs; ++k) out[k] = 0;
}

// Symmetric int8 with one scale for each group: code = round(x * 127 / max|x|). A group with a NaN gets scale NaN.
void prepare_int8(const float* x, int64_t count, int64_t inputs, int64_t group, uint8_t* row) {
  int8_t* codes = reinterpret_cast<int8_t*>(row);
  float* scales = reinterpret_cast<float*>(codes + inputs);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + inputs / group);
  for (int64_t g = 0; g < inputs / group; ++g) {
    const int64_t begin = g * group;
    const int64_t length = count - begin < 0 ? 0 : count - begin < group ? count - begin : group;
    uint32_t largest = 0;  // of the bit patterns of |x|, which order like the values, NaN above all
    for (int64_t k = 0; k < length; ++k) {
      uint32_t bits;
      __builtin_memcpy(&bits, x + begin + k, 4);
      bits &= 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    float amax;
    __builtin_memcpy(&amax, &largest, 4);
    const bool finite = largest < 0x7f800000u;
    const float inverse = finite && amax > 1e-30f ? 127.0f / amax : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < length; ++k) {
      // Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits. A multiply-add fused in one
      // build and not in another would only move ties.
      const float shifted = (finite ? x[begin + k] : 0.0f) * inverse + 12582912.0f;
      int32_t bits;
      __builtin_memcpy(&bits, &shifted, 4);
      const int32_t code = bits - 0x4b400000;
      codes[begin + k] = static_cast<int8_t>(code);
      sum += code;
    }
    for (int64_t k = length; k < group; ++k) codes[begin + k] = 0;
    scales[g] = finite ? amax * (1.0f / 127.0f) : __builtin_nanf("");
    sums[g] = sum;
  }
}

// exp for x <= 0 in floats: 2^n * polynomial, relative error below 3e-7; NaN stays NaN.
inline float exp_nonpositive(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4b400000 + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return p * power;
}

inline float silu(float x) {
  const float e = exp_nonpositive(x < 0 ? x : -x);  // no overflow on either side
  return x * (x < 0 ? e : 1.0f) / (1.0f + e);
}

void activate(float* values, const float* gate, float weight, int64_t count) {
  if (gate) {
    for (int64_t i = 0; i < count; ++i) values[i] = silu(gate[i]) * values[i] * weight;
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = silu(values[i]) * weight;
  }
}

// The lanes of four registers, always added in the same order.
inline float sum_of_lanes(const typename Vec::F (&sums)[4]) {
  float lanes[Vec::kLanes];
  Vec::store(lanes, Vec::add(Vec::add(sums[0], sums[1]), Vec::add(sums[2], sums[3])));
  float total = 0;
  for (float lane : lanes) total += lane;
  return total;
}

void normalize(const float* x, const float* weight, float eps, float factor, int64_t count, float* out) {
  using F = typename Vec::F;
  F sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * Vec::kLanes <= count; i += 4 * Vec::kLanes)
    for (int part = 0; part < 4; ++part) {
      const F value = Vec::load(x + i + part * Vec::kLanes);
      sums[part] = Vec::fma(value, value, sums[part]);
    }
  float total = sum_of_lanes(sums);
  for (; i < count; ++i) total += x[i] * x[i];
  const float inverse = factor / __builtin_sqrtf(total / static_cast<float>(count) + eps);
  for (i = 0; i < count; ++i) out[i] = x[i] * inverse * weight[i];
}

float exponentials(float* values, int64_t count) {
  using F = typename Vec::F;
  constexpr int kMaxima = 16;  // independent, so that they are compared side by side
  float maxima[kMaxima];
  for (float& largest : maxima) largest = -__builtin_inff();
  int64_t i = 0;
  for (; i + kMaxima <= count; i += kMaxima)
    for (int lane = 0; lane < kMaxima; ++lane)
      maxima[lane] = values[i + lane] > maxima[lane] ? values[i + lane] : maxima[lane];
  float largest = -__builtin_inff();
  for (; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  for (float value : maxima) largest = value > largest ? value : largest;
  for (i = 0; i < count; ++i) values[i] = exp_nonpositive(values[i] - largest);
  // A value's register and lane depend on its index alone, so zeros behind the last change no bit of the total.
  constexpr int kAtOnce = 4 * Vec::kLanes;
  F sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  const auto add = [&](const float* from) {
    for (int part = 0; part < 4; ++part) sums[part] = Vec::add(sums[part], Vec::load(from + part * Vec::kLanes));
  };
  for (i = 0; i + kAtOnce <= count; i += kAtOnce) add(values + i);
  float rest[kAtOnce] = {};
  for (int lane = 0; i + lane < count; ++lane) rest[lane] = values[i + lane];
  if (i < count) add(rest);
  return sum_of_lanes(sums);
}

// The largest of 2 * kHalf values, which it overwrites; those that are NaN may count or not.
template <int kHalf>
inline float largest_of(float* values) {
  for (int i = 0; i < kHalf; ++i) values[i] = values[i + kHalf] > values[i] ? values[i + kHalf] : values[i];
  if constexpr (kHalf > 1) return largest_of<kHalf / 2>(values);
  return values[0];
}

void bound(const float* values, const float* errors, float by_error, float by_norm, float* largest, float* limit) {
  float copies[kStrip], limits[kStrip];
  int any_nan = 0;
  for (int i = 0; i < kStrip; ++i) copies[i] = values[i];
  for (int i = 0; i < kStrip; ++i) limits[i] = values[i] + (errors[i] * by_error + errors[kStrip + i] * by_norm);
  for (int i = 0; i < kStrip; ++i) any_nan |= !(limits[i] == limits[i]);
  *largest = largest_of<kStrip / 2>(copies);
  *limit = any_nan ? __builtin_nanf("") : largest_of<kStrip / 2>(limits);
}

template <bool kIsBf16>
inline typename Vec::F load_plain(const void* weights, int64_t index) {
  if constexpr (kIsBf16) return Vec::load_bf16(static_cast<const uint16_t*>(weights) + index);
  return Vec::load(static_cast<const float*>(weights) + index);
}

// Asks for what will be read when the rows at hand are done.
template <bool kIsBf16>
inline void prefetch_plain(const void* weights, int64_t index) {
  __builtin_prefetch(static_cast<const uint8_t*>(weights) + index * (kIsBf16 ? 2 : 4));
}

template <bool kIsBf16>
inline float load_plain_scalar(const void* weights, int64_t index) {
  if constexpr (kIsBf16) return blockffn::bf16_to_float(static_cast<const uint16_t*>(weights)[index]);
  return static_cast<const float*>(weights)[index];
}

// Four rows at a time with two partial sums each: enough independent additions to hide their latency.
template <bool kIsBf16, int R>
inline void dot_some_rows(const void* weights, int64_t row, int64_t count, const float* x, bool first_token,
                          float* output) {
  using F = typename Vec::F;
  F sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vec::zero();
  int64_t k = 0;
  for (; k + 2 * Vec::kLanes <= count; k += 2 * Vec::kLanes) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = k + half * Vec::kLanes;
      const F a = Vec::load(x + at);
      for (int r = 0; r < R; ++r) {
        if (first_token) prefetch_plain<kIsBf16>(weights, (row + r + R) * count + at);
        sum[r][half] = Vec::fma(load_plain<kIsBf16>(weights, (row + r) * count + at), a, sum[r][half]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    float lanes[2 * Vec::kLanes];
    Vec::store(lanes, sum[r][0]);
    Vec::store(lanes + Vec::kLanes, sum[r][1]);
    float total = 0;
    for (float lane : lanes) total += lane;
    for (int64_t tail = k; tail < count; ++tail)
      total += load_plain_scalar<kIsBf16>(weights, (row + r) * count + tail) * x[tail];
    output[row + r] = total;
  }
}

template <bool kIsBf16>
void dot_rows_of(const void* weights, int64_t rows, int64_t count, const float* const* x, int num_tokens,
                 float* const* outputs) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    for (int m = 0; m < num_tokens; ++m) dot_some_rows<kIsBf16, 4>(weights, row, count, x[m], m == 0, outputs[m]);
  for (; row < rows; ++row)
    for (int m = 0; m < num_tokens; ++m) dot_some_rows<kIsBf16, 1>(weights, row, count, x[m], m == 0, outputs[m]);
}

void dot_rows(const void* weights, bool is_bf16, int64_t rows, int64_t count, const float* const* x, int num_tokens,
              float* const* outputs) {
  if (is_bf16)
    dot_rows_of<true>(weights, rows, count, x, num_tokens, outputs);
  else
    dot_rows_of<false>(weights, rows, count, x, num_tokens, outputs);
}

template <bool kIsBf16, int R>
inline void add_some_rows(const void* weights, int64_t row, int64_t count, int64_t stride, const float* factors,
                          bool first_token, float* output) {
  using F = typename Vec::F;
  F factor[R];
  for (int r = 0; r < R; ++r) factor[r] = Vec::broadcast(factors[row + r]);
  int64_t k = 0;
  for (; k + Vec::kLanes <= count; k += Vec::kLanes) {
    F sum = Vec::load(output + k);
    for (int r = 0; r < R; ++r) {
      if (first_token) prefetch_plain<kIsBf16>(weights, (row + r + R) * stride + k);
      sum = Vec::fma(load_plain<kIsBf16>(weights, (row + r) * stride + k), factor[r], sum);
    }
    Vec::store(output + k, sum);
  }
  for (; k < count; ++k)
    for (int r = 0; r < R; ++r)
      output[k] += load_plain_scalar<kIsBf16>(weights, (row + r) * stride + k) * factors[row + r];
}

template <bool kIsBf16>
void add_rows_of(const void* weights, int64_t rows, int64_t count, int64_t stride, const float* const* factors,
                 int num_tokens, float* const* outputs) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4)
    for (int m = 0; m < num_tokens; ++m)
      add_some_rows<kIsBf16, 4>(weights, row, count, stride, factors[m], m == 0, outputs[m]);
  for (; row < rows; ++row)
    for (int m = 0; m < num_tokens; ++m)
      add_some_rows<kIsBf16, 1>(weights, row, count, stride, factors[m], m == 0, outputs[m]);
}

void add_rows(const void* weights, bool is_bf16, int64_t rows, int64_t count, int64_t stride,
              const float* const* factors, int num_tokens, float* const* outputs) {
  if (is_bf16)
    add_rows_of<true>(weights, rows, count, stride, factors, num_tokens, outputs);
  else
    add_rows_of<false>(weights, rows, count, stride, factors, num_tokens, outputs);
}

void widen(const uint16_t* values, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = blockffn::bf16_to_float(values[i]);
}

void narrow(const float* values, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = blockffn::float_to_bf16(values[i]);
}

uint64_t sum(const uint8_t* data, int64_t bytes) {
  typedef uint64_t Line __attribute__((vector_size(64), aligned(1)));
  constexpr int64_t kAhead = 10 << 10;
  Line sums[4] = {};
  int64_t at = 0;
  for (; at + 256 <= bytes; at += 256)
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(data + at + i * 64 + kAhead, 0, 2);  // as the kernels do: without it some processors read less
      sums[i] += *reinterpret_cast<const Line*>(data + at + i * 64);
    }
  uint64_t total = 0;
  for (const Line& line : sums)
    for (int i = 0; i < 8; ++i) total += line[i];
  for (; at < bytes; ++at) total += data[at];
  return total;
}

constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,
                 {tokens_of(kF32), tokens_of(kBf16), tokens_of(kInt8), tokens_of(kInt4)},
                 {strip<kF32>, strip<kBf16>, strip<kInt8>, strip<kInt4>},
                 {prepare_float, prepare_float, prepare_int8, prepare_int8},
                 activate,
                 normalize,
                 exponentials,
                 bound,
                 dot_rows,
                 add_rows,
                 widen,
                 narrow,
                 sum};
}

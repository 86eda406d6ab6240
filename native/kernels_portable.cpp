// Standard C++ with the vector extension of gcc and clang: runs on any processor, and is the oracle of the others.
#include "kernels.h"

namespace {

struct Vec {
  typedef float F __attribute__((vector_size(16)));
  struct I {
    int32_t lane[4];
  };
  static constexpr int kLanes = 4;
  using P = I;
  static constexpr int kTokens = 4;
  static constexpr int kIntegerTokens = 4;
  static constexpr int kWideTokens = 1;
  static constexpr bool kTwoSums = false;
  static constexpr int kOffset8 = 128;
  static constexpr int kOffset4 = 8;
  static constexpr int kInputs4 = 0;     // any number: dot4 sums in lanes of 32 bits
  static constexpr bool kDot4Waits = false;

  static F zero() { return F{0, 0, 0, 0}; }
  static F load(const float* p) {
    F v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static void store(float* p, F v) { __builtin_memcpy(p, &v, 16); }
  static F broadcast(float v) { return F{v, v, v, v}; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F load_half(const uint8_t* p) {
    F v;
    for (int i = 0; i < 4; ++i) v[i] = blockffn::half_to_float(static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8));
    return v;
  }
  static F load_bf16(const uint16_t* p) {
    F v;
    for (int i = 0; i < 4; ++i) v[i] = blockffn::bf16_to_float(p[i]);
    return v;
  }
  static F load_bf16_even(const uint8_t* p) {
    F v;
    for (int i = 0; i < 4; ++i) v[i] = blockffn::bf16_to_float(static_cast<uint16_t>(p[4 * i] | p[4 * i + 1] << 8));
    return v;
  }
  static F load_bf16_odd(const uint8_t* p) { return load_bf16_even(p + 2); }
  static I load_codes(const uint8_t* p) {
    I v;
    __builtin_memcpy(&v, p, 16);
    return v;
  }
  static I low_nibbles(I v) {
    for (int32_t& lane : v.lane) lane &= 0x0f0f0f0f;
    return v;
  }
  static I high_nibbles(I v) {
    for (int32_t& lane : v.lane) lane = lane >> 4 & 0x0f0f0f0f;
    return v;
  }
  static I broadcast_int(int32_t v) { return I{{v, v, v, v}}; }
  static I broadcast_bytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return broadcast_int(four);
  }
  static I dot8(I sum, I codes, I x) {
    uint8_t c[16];
    int8_t a[16];
    __builtin_memcpy(c, &codes, 16);
    __builtin_memcpy(a, &x, 16);
    for (int i = 0; i < 4; ++i)
      sum.lane[i] += c[4 * i] * a[4 * i] + c[4 * i + 1] * a[4 * i + 1] + c[4 * i + 2] * a[4 * i + 2] +
                     c[4 * i + 3] * a[4 * i + 3];
    return sum;
  }
  static P zero4() { return broadcast_int(0); }
  static P dot4(P sum, I codes, I x) { return dot8(sum, codes, x); }
  static I widen4(P sum) { return sum; }
  static I add_int(I a, I b) {
    for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static F to_float(I v) {
    return F{static_cast<float>(v.lane[0]), static_cast<float>(v.lane[1]), static_cast<float>(v.lane[2]),
             static_cast<float>(v.lane[3])};
  }
};

#include "kernels.inl"

const Kernels kKernels = make_kernels("portable");

}  // namespace

const blockffn::Kernels* blockffn::portable_kernels() { return &kKernels; }

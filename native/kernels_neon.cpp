// NEON with the dot product extension (Armv8.2: Cortex-A55/A75, Neoverse N1, Apple M1 and later).
#include "kernels.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace {

struct Vec {
  using F = float32x4_t;
  using I = int32x4_t;
  using P = int32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kTokens = 4;
  static constexpr int kIntegerTokens = 4;
  static constexpr int kWideTokens = 2;  // 32 outputs are eight of the thirty-two registers
  static constexpr bool kTwoSums = false;
  static constexpr int kOffset8 = 0;     // dot8 centres the codes itself
  static constexpr int kOffset4 = 8;
  static constexpr int kInputs4 = 0;     // any number: dot4 sums in lanes of 32 bits
  static constexpr bool kDot4Waits = true;

  static F zero() { return vdupq_n_f32(0); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F v) { vst1q_f32(p, v); }
  static F broadcast(float v) { return vdupq_n_f32(v); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F load_half(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static F load_bf16_even(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(p)), 16));
  }
  static F load_bf16_odd(const uint8_t* p) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), vdupq_n_u32(0xffff0000u)));
  }
  static I load_codes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static I low_nibbles(I v) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(v), vdupq_n_u8(15)));
  }
  static I high_nibbles(I v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }
  static I broadcast_int(int32_t v) { return vdupq_n_s32(v); }
  static I broadcast_bytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vdupq_n_s32(four);
  }
  static I dot8(I sum, I codes, I x) {
    const uint8x16_t weights = veorq_u8(vreinterpretq_u8_s32(codes), vdupq_n_u8(0x80));
    return vdotq_s32(sum, vreinterpretq_s8_u8(weights), vreinterpretq_s8_s32(x));
  }
  static P zero4() { return vdupq_n_s32(0); }
  static P dot4(P sum, I codes, I x) { return vdotq_s32(sum, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x)); }
  static I widen4(P sum) { return sum; }
  static I add_int(I a, I b) { return vaddq_s32(a, b); }
  static F to_float(I v) { return vcvtq_f32_s32(v); }
};

#include "kernels.inl"

const Kernels kKernels = make_kernels("neon");

}  // namespace

const blockffn::Kernels* blockffn::neon_kernels() {
#if defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProduct ? &kKernels : nullptr;
#else
  return &kKernels;  // every Apple processor with arm64 macOS has it
#endif
}
#else
const blockffn::Kernels* blockffn::neon_kernels() { return nullptr; }
#endif

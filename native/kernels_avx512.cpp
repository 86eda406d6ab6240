// AVX-512 with VNNI (Ice Lake, Zen 4 and later).
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>

namespace {

struct Vec {
  using F = __m512;
  using I = __m512i;
  using P = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kTokens = 6;      // 24 sums, and registers to spare for weights
  static constexpr int kIntegerTokens = 6;
  static constexpr int kWideTokens = 8;  // 32 outputs are two registers
  static constexpr bool kTwoSums = true;
  static constexpr int kOffset8 = 128;   // vpdpbusd takes the codes as they are
  static constexpr int kOffset4 = 8;
  static constexpr int kInputs4 = 0;     // any number: dot4 sums in lanes of 32 bits
  static constexpr bool kDot4Waits = true;

  static F zero() { return _mm512_setzero_ps(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F broadcast(float v) { return _mm512_set1_ps(v); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static F load_bf16_even(const uint8_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(load_codes(p), 16)); }
  static F load_bf16_odd(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(load_codes(p), _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
  static I high_nibbles(I v) { return _mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15)); }
  static I broadcast_int(int32_t v) { return _mm512_set1_epi32(v); }
  static I broadcast_bytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static I dot8(I sum, I codes, I x) { return _mm512_dpbusd_epi32(sum, codes, x); }
  static P zero4() { return _mm512_setzero_si512(); }
  static P dot4(P sum, I codes, I x) { return _mm512_dpbusd_epi32(sum, codes, x); }
  static I widen4(P sum) { return sum; }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
};

#include "kernels.inl"

const Kernels kKernels = make_kernels("avx512");

}  // namespace

const blockffn::Kernels* blockffn::avx512_kernels() {
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return runs ? &kKernels : nullptr;
}
#else
const blockffn::Kernels* blockffn::avx512_kernels() { return nullptr; }
#endif

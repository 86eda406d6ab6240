// AVX2 with FMA and F16C (Haswell, Zen and later).
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace {

struct Vec {
  using F = __m256;
  using I = __m256i;
  using P = __m256i;  // sixteen int16
  static constexpr int kLanes = 8;
  static constexpr int kTokens = 5;         // ten sums of half a strip; with twelve gcc spills
  static constexpr int kIntegerTokens = 4;  // dot8 needs more registers beside the sums
  static constexpr int kWideTokens = 2;     // 32 outputs are four of the sixteen registers
  static constexpr bool kTwoSums = false;   // four sums already hide what an addition waits
  static constexpr int kOffset8 = 0;        // dot8 centres the codes itself
  static constexpr int kOffset4 = 8;
  static constexpr int kInputs4 = 32;       // 8 additions of two products: 8 * 2 * 15 * 127 <= 32767
  static constexpr bool kDot4Waits = false;

  static F zero() { return _mm256_setzero_ps(); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F broadcast(float v) { return _mm256_set1_ps(v); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F load_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load_bf16_even(const uint8_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_codes(p), 16)); }
  static F load_bf16_odd(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(load_codes(p), _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static I load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
  static I high_nibbles(I v) { return _mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15)); }
  static I broadcast_int(int32_t v) { return _mm256_set1_epi32(v); }
  static I broadcast_bytes(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  // vpmaddubsw adds two products of an unsigned and a signed byte and saturates at 32767. With |x| <= 127 as the
  // unsigned side and |weight| <= 127 the sum stays at or below 2 * 127 * 127, so nothing saturates.
  static I dot8(I sum, I codes, I x) {
    const __m256i weights = _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80)));
    return add_pairs(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weights, x)));
  }
  static P zero4() { return _mm256_setzero_si256(); }
  static P dot4(P sum, I codes, I x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)); }
  static I widen4(P sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  static I add_pairs(I sum, I pairs) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
};

#include "kernels.inl"

const Kernels kKernels = make_kernels("avx2");

}  // namespace

const blockffn::Kernels* blockffn::avx2_kernels() {
  const bool runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return runs ? &kKernels : nullptr;
}
#else
const blockffn::Kernels* blockffn::avx2_kernels() { return nullptr; }
#endif

// Included before kernels_avx512_bf16.cpp: the bf16 dot product in terms of AVX-512, so that the kernel around it can be
// checked on processors that lack the instruction. (The instruction itself rounds each sum a little differently.)
#pragma once

#include <immintrin.h>

#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps emulated_dot
#define __builtin_cpu_supports(feature) 1

static inline __m512 emulated_dot(__m512 sum, __m512bh a, __m512bh b) {
  const __m512i pair_a = reinterpret_cast<__m512i>(a), pair_b = reinterpret_cast<__m512i>(b);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512 low = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pair_a, 16)),
                                   _mm512_castsi512_ps(_mm512_slli_epi32(pair_b, 16)));
  const __m512 high = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(pair_a, upper)),
                                    _mm512_castsi512_ps(_mm512_and_si512(pair_b, upper)));
  return _mm512_add_ps(sum, _mm512_add_ps(low, high));
}

// AVX-512 with VNNI and the bf16 dot product (Cooper Lake, Sapphire Rapids, Zen 4 and later). The bf16 kernel rounds
// activations to bf16 and takes two products an instruction; the other formats are those of AVX-512.
#include "kernels.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>

namespace {

using blockffn::Kernels;
using blockffn::kStrip;
using blockffn::prefetch;
using blockffn::StripCall;

template <int M>
void bf16_tile(const StripCall& call) {
  const uint8_t* w = call.strips;
  for (int64_t first = 0; first < call.num_strips * kStrip; first += kStrip) {
    __m512 sum[M][2];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 2; ++n)
        sum[m][n] = call.accumulate ? _mm512_loadu_ps(call.outputs[m] + first + n * 16) : _mm512_setzero_ps();
    for (int64_t k = 0; k < call.inputs; k += 2, w += kStrip * 4) {
      prefetch(call, w);
      const __m512bh w0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w));
      const __m512bh w1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + 64));
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        __builtin_memcpy(&pair, call.rows[m] + k * 2, 4);
        const __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
        sum[m][0] = _mm512_dpbf16_ps(sum[m][0], w0, a);
        sum[m][1] = _mm512_dpbf16_ps(sum[m][1], w1, a);
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 2; ++n) _mm512_storeu_ps(call.outputs[m] + first + n * 16, sum[m][n]);
  }
}

void bf16_strip(const StripCall& call) {
  switch (call.num_tokens) {
    case 1: return bf16_tile<1>(call);
    case 2: return bf16_tile<2>(call);
    case 3: return bf16_tile<3>(call);
    case 4: return bf16_tile<4>(call);
    case 5: return bf16_tile<5>(call);
    case 6: return bf16_tile<6>(call);
    case 7: return bf16_tile<7>(call);
    case 8: return bf16_tile<8>(call);
    case 9: return bf16_tile<9>(call);
    case 10: return bf16_tile<10>(call);
    case 11: return bf16_tile<11>(call);
    case 12: return bf16_tile<12>(call);
  }
}

void prepare_bf16(const float* x, int64_t count, int64_t inputs, int64_t, uint8_t* row) {
  uint16_t* out = reinterpret_cast<uint16_t*>(row);
  for (int64_t k = 0; k < count; ++k) out[k] = blockffn::float_to_bf16(x[k]);
  for (int64_t k = count; k < inputs; ++k) out[k] = 0;
}

}  // namespace

const Kernels* blockffn::avx512_bf16_kernels() {
  const Kernels* base = avx512_kernels();
  if (!base || !__builtin_cpu_supports("avx512bf16")) return nullptr;
  static Kernels kernels;  // every thread writes the same values
  kernels = *base;
  kernels.name = "avx512_bf16";
  kernels.max_tokens[kBf16] = 12;  // 24 sums
  kernels.strip[kBf16] = bf16_strip;
  kernels.prepare[kBf16] = prepare_bf16;
  return &kernels;
}
#else
const blockffn::Kernels* blockffn::avx512_bf16_kernels() { return nullptr; }
#endif

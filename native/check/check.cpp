// Checks the kernels against plain loops without Python: for sanitizers, and for processors that are emulated.
// Prints one line for each case and returns 1 if any is wrong. Every output buffer is filled with NaN beforehand.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../blockffn.h"
#include "packing.h"
#include "step.h"

extern "C" {  // of the OpenMP library
void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
void GOMP_barrier(void);
int omp_get_max_threads(void);
}

namespace {

void append(std::vector<uint8_t>& to, const std::vector<uint8_t>& from) { to.insert(to.end(), from.begin(), from.end()); }

struct Experts {
  int64_t E, F, D;
  bool gated;
  Floats up, gate, down;  // [E][F][D]
};

Floats reference(const Experts& experts, const Floats& x, const Floats& weights, float threshold) {
  const int64_t E = experts.E, F = experts.F, D = experts.D, T = static_cast<int64_t>(x.size()) / D;
  Floats y(x.size());
  std::vector<double> sum(static_cast<size_t>(D));
  for (int64_t t = 0; t < T; ++t) {
    for (double& value : sum) value = 0;
    for (int64_t e = 0; e < E; ++e) {
      const float weight = weights[t * E + e];
      if (fabsf(weight) <= threshold) continue;
      for (int64_t f = 0; f < F; ++f) {
        double up = 0, gate = 0;
        for (int64_t d = 0; d < D; ++d) {
          up += double(experts.up[(e * F + f) * D + d]) * x[t * D + d];
          if (experts.gated) gate += double(experts.gate[(e * F + f) * D + d]) * x[t * D + d];
        }
        const double hidden = experts.gated ? gate / (1 + exp(-gate)) * up : up / (1 + exp(-up));
        for (int64_t d = 0; d < D; ++d) sum[d] += weight * hidden * experts.down[(e * F + f) * D + d];
      }
    }
    for (int64_t d = 0; d < D; ++d) y[t * D + d] = static_cast<float>(sum[d]);
  }
  return y;
}

double relative_error(const Floats& y, const Floats& wanted) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < y.size(); ++i) {
    error += (double(y[i]) - wanted[i]) * (double(y[i]) - wanted[i]);
    size += double(wanted[i]) * wanted[i];
  }
  return sqrt(error / size);  // NaN when any output is
}

int failures = 0;
// To bf16, as some kernels do beside weights in bf16.
bool rounds_activations(int format) {
  return format == 1 && (strstr(blockffn_isa(), "bf16") || strcmp(blockffn_isa(), "amx") == 0);
}

void report(const char* what, int format, int64_t tokens, int64_t F, int64_t D, double error, double tolerance) {
  const char* names[] = {"f32", "bf16", "int8", "int4", "plain"};
  const bool good = error <= tolerance;
  failures += !good;
  printf("%-5s %-10s %-5s tokens %3d  F %3d  D %3d  error %.1e\n", good ? "ok" : "WRONG", what, names[format],
         int(tokens), int(F), int(D), error);
}

void check_ffn(int format, int64_t T, int64_t E, int64_t F, int64_t D, float active_share, bool gated) {
  Experts experts{E, F, D, gated, random_floats(E * F * D), random_floats(E * F * D), random_floats(E * F * D)};
  const Floats x = random_floats(T * D);
  Floats weights = random_floats(T * E);
  for (float& weight : weights) weight = fabsf(uniform()) < active_share ? weight : 0;
  const float threshold = 0.05f;
  Floats y(x.size(), NAN);
  const auto pack_rows = [&](Floats& rows, int64_t e, int64_t group) {
    Floats one(rows.begin() + e * F * D, rows.begin() + (e + 1) * F * D);
    const std::vector<uint8_t> packed = pack(format, group, F, D, one);
    memcpy(rows.data() + e * F * D, one.data(), one.size() * 4);
    return packed;
  };
  if (format == 4) {
    blockffn_sparse_ffn_plain(experts.up.data(), gated ? experts.gate.data() : nullptr, experts.down.data(), E, F, D, T, 0,
                              x.data(), D, weights.data(), E, threshold, y.data());
  } else {
    const int64_t group_in = format < 2 ? 0 : 64, group_hidden = format < 2 ? 0 : F <= 32 ? 32 : 64;
    std::vector<uint8_t> data;
    for (int64_t e = 0; e < E; ++e) {
      append(data, pack_rows(experts.up, e, group_in));
      if (gated) append(data, pack_rows(experts.gate, e, group_in));
      Floats transposed(static_cast<size_t>(F * D));
      for (int64_t f = 0; f < F; ++f)
        for (int64_t d = 0; d < D; ++d) transposed[d * F + f] = experts.down[(e * F + f) * D + d];
      append(data, pack(format, group_hidden, D, F, transposed));
      for (int64_t f = 0; f < F; ++f)
        for (int64_t d = 0; d < D; ++d) experts.down[(e * F + f) * D + d] = transposed[d * F + f];
    }
    const blockffn_experts packed{data.data(), static_cast<int64_t>(data.size()) / E, E, F, D, format, gated,
                                  static_cast<int32_t>(group_in), static_cast<int32_t>(group_hidden)};
    blockffn_sparse_ffn(&packed, T, 0, x.data(), D, weights.data(), E, threshold, y.data());
  }
  // int8 and int4 round activations to eight bits; a kernel with a bf16 dot product rounds them to bf16.
  const double tolerance = format == 2 || format == 3 ? 3e-2 : rounds_activations(format) ? 1e-2 : 1e-5;
  const double error = relative_error(y, reference(experts, x, weights, threshold));
  report(gated ? "ffn gated" : "ffn", format, T, F, D, error, tolerance);
}

void check_linear(int format, int64_t T, int64_t N, int64_t K) {
  const int64_t group = format < 2 ? 0 : 64;
  Floats matrix = random_floats(N * K);
  const std::vector<uint8_t> data = pack(format, group, N, K, matrix);
  const Floats x = random_floats(T * K);
  Floats y(static_cast<size_t>(T * N), NAN), wanted(y.size());
  const blockffn_matrix packed{data.data(), N, K, format, static_cast<int32_t>(group)};
  blockffn_linear(&packed, T, 0, x.data(), K, y.data());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += double(matrix[n * K + k]) * x[t * K + k];
      wanted[t * N + n] = static_cast<float>(sum);
    }
  const double tolerance = format >= 2 ? 3e-2 : rounds_activations(format) ? 1e-2 : 1e-5;
  report("linear", format, T, N, K, relative_error(y, wanted), tolerance);
}

}  // namespace

int main() {
  if (blockffn_isa_error()) {
    printf("not checked, %s: %s\n", getenv("BLOCKFFN_CPU_ISA"), blockffn_isa_error());
    return 0;
  }
  blockffn_use_threads(reinterpret_cast<void*>(GOMP_parallel), reinterpret_cast<void*>(GOMP_barrier),
                       reinterpret_cast<void*>(omp_get_max_threads));
  printf("kernels: %s, threads: %d\n", blockffn_isa(), omp_get_max_threads());
  for (int format = 0; format <= 4; ++format) {
    for (int64_t T : {1, 2, 5, 7, 13, 33})
      for (bool gated : {false, true}) check_ffn(format, T, 6, 40, 72, 0.5f, gated);
    check_ffn(format, 3, 4, 128, 192, 0.0f, false);  // nothing is active
    check_ffn(format, 3, 3, 8, 40, 1.0f, true);      // everything is
    check_ffn(format, 0, 3, 8, 40, 1.0f, false);     // no token
    if (format == 4) continue;
    for (int64_t T : {1, 9}) check_linear(format, T, 70, 100);
    for (bool is_latent : {false, true})
      for (bool is_gated : {false, true}) {
        const int differing = StepCheck(format, is_latent, is_gated).run();
        failures += differing != 0;
        printf("%-5s step %-10s %-5s format %d: %d values differ\n", differing ? "WRONG" : "ok",
               is_latent ? "latent" : "grouped", is_gated ? "gated" : "", format, differing);
      }
  }
  return failures ? 1 : 0;
}

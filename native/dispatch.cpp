// Which kernels this processor runs, decided once.
#include <stdlib.h>
#include <string.h>

#include "blockffn.h"
#include "dispatch.h"

namespace {

struct Choice {
  const blockffn::Kernels* kernels;
  const char* error;
};

// Best first. BLOCKFFN_CPU_ISA names one of them, for tests and for comparing.
Choice choose() {
  using namespace blockffn;
  const Kernels* all[] = {amx_kernels(),  avx512_bf16_kernels(), avx512_kernels(),
                          avx2_kernels(), neon_kernels(),        portable_kernels()};
  const Kernels* best = nullptr;
  const char* wanted = getenv("BLOCKFFN_CPU_ISA");
  for (const Kernels* kernels : all) {
    if (!kernels) continue;
    if (!best) best = kernels;
    if (wanted && strcmp(wanted, kernels->name) == 0) return {kernels, nullptr};
  }
  if (wanted && *wanted) return {best, "BLOCKFFN_CPU_ISA names an instruction set that this processor or build lacks"};
  return {best, nullptr};
}

const Choice choice = choose();

}  // namespace

const blockffn::Kernels& blockffn::kernels() { return *choice.kernels; }

extern "C" const char* blockffn_isa(void) { return choice.kernels->name; }
extern "C" const char* blockffn_isa_error(void) { return choice.error; }
extern "C" int32_t blockffn_api_version(void) { return BLOCKFFN_API_VERSION; }

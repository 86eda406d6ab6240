// The matrix unit AMX (Sapphire Rapids and later): the bf16 kernel takes sixteen activation rows at once, in about the time
// of one. What it does not replace is that of AVX-512. Packed bf16 has the layout that the unit wants.
//
// A row's sums run over blocks of 32 inputs, in the same order whatever the number of rows.
#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

using blockffn::kBf16;
using blockffn::Kernels;
using blockffn::kStrip;
using blockffn::prefetch;
using blockffn::StripCall;

constexpr int kRows = 16;         // of a tile
constexpr int kTileBytes = 64;    // of a row of a tile
constexpr int kInputs = 32;       // of a block: sixteen rows of pairs
constexpr int kPairBytes = kStrip * 4;  // a strip's two inputs

// Tiles; macros, because GCC writes a tile's name into the assembly as it is spelt. The last inputs are a block of their
// own, with tiles of fewer rows and columns.
#define TILE_SUMS_LEFT 0
#define TILE_SUMS_RIGHT 1
#define TILE_ACTIVATIONS 2
#define TILE_LEFT 3
#define TILE_RIGHT 4
#define TILE_LAST_ACTIVATIONS 5
#define TILE_LAST_LEFT 6
#define TILE_LAST_RIGHT 7

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileShapes(int num_tokens, int num_last) {
    set(TILE_SUMS_LEFT, num_tokens, kTileBytes);
    set(TILE_SUMS_RIGHT, num_tokens, kTileBytes);
    set(TILE_ACTIVATIONS, num_tokens, kTileBytes);
    set(TILE_LEFT, kRows, kTileBytes);
    set(TILE_RIGHT, kRows, kTileBytes);
    if (num_last == 0) return;
    set(TILE_LAST_ACTIVATIONS, num_tokens, num_last * 2);
    set(TILE_LAST_LEFT, num_last / 2, kTileBytes);
    set(TILE_LAST_RIGHT, num_last / 2, kTileBytes);
  }
  void set(int tile, int count, int bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// Activation rows as a tile wants them: at equal distances. Rows that lie otherwise are copied, block by block.
class Activations {
 public:
  explicit Activations(const StripCall& call) : rows_(call.rows), count_(call.num_tokens) {
    stride_ = count_ > 1 ? rows_[1] - rows_[0] : kTileBytes;
    for (int m = 2; m < count_; ++m) is_even_ &= rows_[m] - rows_[m - 1] == stride_;
  }
  int64_t stride() const { return is_even_ ? stride_ : kTileBytes; }
  const uint8_t* block(int64_t k, int64_t inputs) {
    if (is_even_) return rows_[0] + k * 2;
    for (int m = 0; m < count_; ++m)
      __builtin_memcpy(copy_ + m * kTileBytes, rows_[m] + k * 2, static_cast<size_t>(inputs) * 2);
    return copy_;
  }

 private:
  const uint8_t* const* rows_;
  int count_;
  int64_t stride_;
  bool is_even_ = true;
  alignas(64) uint8_t copy_[kRows * kTileBytes];
};

inline void copy_sums(float* const* outputs, int64_t first, int num_tokens, float* sums, bool to_outputs) {
  for (int m = 0; m < num_tokens; ++m) {
    float *out = outputs[m] + first, *own = sums + m * 16;
    _mm512_storeu_ps(to_outputs ? out : own, _mm512_loadu_ps(to_outputs ? own : out));
  }
}

void bf16_strip(const StripCall& call) {
  const int num_last = static_cast<int>(call.inputs % kInputs);
  const TileShapes shapes(call.num_tokens, num_last);
  _tile_loadconfig(&shapes);
  Activations activations(call);
  alignas(64) float left[kRows * 16], right[kRows * 16];
  const uint8_t* w = call.strips;
  for (int64_t first = 0; first < call.num_strips * kStrip; first += kStrip) {
    if (call.accumulate) {
      copy_sums(call.outputs, first, call.num_tokens, left, false);
      copy_sums(call.outputs, first + 16, call.num_tokens, right, false);
      _tile_loadd(TILE_SUMS_LEFT, left, kTileBytes);
      _tile_loadd(TILE_SUMS_RIGHT, right, kTileBytes);
    } else {
      _tile_zero(TILE_SUMS_LEFT);
      _tile_zero(TILE_SUMS_RIGHT);
    }
    int64_t k = 0;
    for (; k + kInputs <= call.inputs; k += kInputs, w += kInputs / 2 * kPairBytes) {
      if (call.fetch)
        for (int pair = 0; pair < kInputs / 2; ++pair) prefetch(call, w + pair * kPairBytes);
      _tile_loadd(TILE_ACTIVATIONS, activations.block(k, kInputs), activations.stride());
      _tile_loadd(TILE_LEFT, w, kPairBytes);
      _tile_dpbf16ps(TILE_SUMS_LEFT, TILE_ACTIVATIONS, TILE_LEFT);
      _tile_loadd(TILE_RIGHT, w + kTileBytes, kPairBytes);
      _tile_dpbf16ps(TILE_SUMS_RIGHT, TILE_ACTIVATIONS, TILE_RIGHT);
    }
    if (num_last) {
      _tile_loadd(TILE_LAST_ACTIVATIONS, activations.block(k, num_last), activations.stride());
      _tile_loadd(TILE_LAST_LEFT, w, kPairBytes);
      _tile_dpbf16ps(TILE_SUMS_LEFT, TILE_LAST_ACTIVATIONS, TILE_LAST_LEFT);
      _tile_loadd(TILE_LAST_RIGHT, w + kTileBytes, kPairBytes);
      _tile_dpbf16ps(TILE_SUMS_RIGHT, TILE_LAST_ACTIVATIONS, TILE_LAST_RIGHT);
      w += num_last / 2 * kPairBytes;
    }
    _tile_stored(TILE_SUMS_LEFT, left, kTileBytes);
    _tile_stored(TILE_SUMS_RIGHT, right, kTileBytes);
    copy_sums(call.outputs, first, call.num_tokens, left, true);
    copy_sums(call.outputs, first + 16, call.num_tokens, right, true);
  }
  _tile_release();
}

// The processor has the unit, and the system lets this process use it: Linux gives its registers to who asks for them.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16Bit = 1u << 22, kTileBit = 1u << 24;
  if ((d & kBf16Bit) == 0 || (d & kTileBit) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

const Kernels* blockffn::amx_kernels() {
  const Kernels* base = avx512_bf16_kernels();
  static const bool may_use = may_use_tiles();
  if (!base || !may_use) return nullptr;
  static Kernels kernels;  // every thread writes the same values
  kernels = *base;
  kernels.name = "amx";
  kernels.max_tokens[kBf16] = kRows;
  kernels.strip[kBf16] = bf16_strip;
  return &kernels;
}
#else
const blockffn::Kernels* blockffn::amx_kernels() { return nullptr; }
#endif

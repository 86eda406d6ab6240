// The matrix unit AMX (Sapphire Rapids and later): kernels that take sixteen activation rows at once. What they do not
// replace is that of AVX-512. Packed bf16 and int8 have the layout that the unit wants; int4 is unpacked, group by group.
//
// In bf16 a row's sums run over blocks of 32 inputs, in the same order whatever the number of rows. Integer sums are
// exact, so few rows may go to the kernels of AVX-512, which are then faster, without a change of a bit.
#include "kernels.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__) && \
    defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

using blockffn::kBf16;
using blockffn::kInt4;
using blockffn::kInt8;
using blockffn::Kernels;
using blockffn::kStrip;
using blockffn::prefetch;
using blockffn::StripCall;

constexpr int kRows = 16;               // of a tile
constexpr int kTileBytes = 64;          // of a row of a tile
constexpr int kInputs = 32;             // of a block of bf16: sixteen rows of pairs
constexpr int kPairBytes = kStrip * 4;  // a strip's two inputs in bf16, four in int8, eight in int4
const Kernels* few_rows = nullptr;      // for as many as AVX-512 takes in one pass over integers, faster than tiles do

inline __m512 load_half(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Tiles; macros, because GCC writes a tile's name into the assembly as it is spelt. The last inputs are a block of
// their own, with tiles of fewer rows and columns.
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
  // For blocks of up to 64 inputs in bytes.
  static TileShapes of_bytes(int num_tokens, int inputs) {
    TileShapes shapes(num_tokens, 0);
    shapes.set(TILE_ACTIVATIONS, num_tokens, inputs);
    shapes.set(TILE_LEFT, inputs / 4, kTileBytes);
    shapes.set(TILE_RIGHT, inputs / 4, kTileBytes);
    return shapes;
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
  // Up to 64 bytes of each row from `begin` on. Rows go on for 64 bytes behind the start of any block, see `row_bytes`.
  const uint8_t* block(int64_t begin) {
    if (is_even_) return rows_[0] + begin;
    for (int m = 0; m < count_; ++m)
      _mm512_store_si512(copy_ + m * kTileBytes, _mm512_loadu_si512(rows_[m] + begin));
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
      _tile_loadd(TILE_ACTIVATIONS, activations.block(k * 2), activations.stride());
      _tile_loadd(TILE_LEFT, w, kPairBytes);
      _tile_dpbf16ps(TILE_SUMS_LEFT, TILE_ACTIVATIONS, TILE_LEFT);
      _tile_loadd(TILE_RIGHT, w + kTileBytes, kPairBytes);
      _tile_dpbf16ps(TILE_SUMS_RIGHT, TILE_ACTIVATIONS, TILE_RIGHT);
    }
    if (num_last) {
      _tile_loadd(TILE_LAST_ACTIVATIONS, activations.block(k * 2), activations.stride());
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

// A group's weights as bytes, in blocks of up to 64 inputs: those of the first sixteen outputs, then the others'.
template <bool kFetch>
const uint8_t* unpack_int4(const StripCall& call, const uint8_t* w, int64_t inputs, uint8_t* left, uint8_t* right) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t k = 0; k < inputs; k += 8, w += kPairBytes, left += 2 * kTileBytes, right += 2 * kTileBytes) {
    if (kFetch) prefetch(call, w);
    const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + kTileBytes);
    _mm512_store_si512(left, _mm512_and_si512(a, low));
    _mm512_store_si512(right, _mm512_and_si512(b, low));
    _mm512_store_si512(left + kTileBytes, _mm512_and_si512(_mm512_srli_epi16(a, 4), low));
    _mm512_store_si512(right + kTileBytes, _mm512_and_si512(_mm512_srli_epi16(b, 4), low));
  }
  return w;
}

// The sums of a strip: dot products of groups, which the tiles compute, times both scales.
class Sums {
 public:
  Sums(const StripCall& call, int offset) : call_(call), offset_(offset) {
    const int64_t num_groups = call.inputs / call.group;
    for (int m = 0; m < call.num_tokens; ++m) {
      scales_[m] = reinterpret_cast<const float*>(call.rows[m] + call.inputs);
      codes_[m] = reinterpret_cast<const int32_t*>(scales_[m] + num_groups);
    }
  }
  void begin(int64_t first) {
    for (int m = 0; m < call_.num_tokens; ++m)
      for (int n = 0; n < 2; ++n)
        sums_[m][n] = call_.accumulate ? _mm512_loadu_ps(call_.outputs[m] + first + n * 16) : _mm512_setzero_ps();
  }
  // dots: [2][rows][16] of a group.
  void add(const int32_t* dots, int64_t group, __m512 left, __m512 right) {
    for (int m = 0; m < call_.num_tokens; ++m) {
      const __m512 scale = _mm512_set1_ps(scales_[m][group]);
      const __m512i excess = _mm512_set1_epi32(offset_ * codes_[m][group]);
      const int32_t* dot = dots + m * 16;
      sums_[m][0] = add(sums_[m][0], dot, excess, _mm512_mul_ps(left, scale));
      sums_[m][1] = add(sums_[m][1], dot + kRows * 16, excess, _mm512_mul_ps(right, scale));
    }
  }
  void end(int64_t first) const {
    for (int m = 0; m < call_.num_tokens; ++m)
      for (int n = 0; n < 2; ++n) _mm512_storeu_ps(call_.outputs[m] + first + n * 16, sums_[m][n]);
  }

 private:
  static __m512 add(__m512 sum, const int32_t* dot, __m512i excess, __m512 scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(dot), excess)), scale, sum);
  }

  const StripCall& call_;
  const int32_t offset_;         // of the weights' codes
  const float* scales_[kRows];   // of the rows' groups
  const int32_t* codes_[kRows];  // their sums of codes
  __m512 sums_[kRows][2];
};

// A block of a group: tiles += activations * weights.
template <int kFormat, bool kFetch>
inline const uint8_t* multiply_block(const StripCall& call, const uint8_t* w, const uint8_t* x, int64_t stride,
                                     int64_t inputs, uint8_t* unpacked) {
  const uint8_t *left = w, *right = w + kTileBytes, *end = w + inputs / 4 * kPairBytes;
  int64_t weight_stride = kPairBytes;
  if constexpr (kFormat == kInt4) {
    left = unpacked, right = unpacked + kRows * kTileBytes, weight_stride = kTileBytes;
    end = unpack_int4<kFetch>(call, w, inputs, unpacked, unpacked + kRows * kTileBytes);
  } else if (kFetch) {
    for (const uint8_t* line = w; line < end; line += kPairBytes) prefetch(call, line);
  }
  _tile_loadd(TILE_ACTIVATIONS, x, stride);
  _tile_loadd(TILE_LEFT, left, weight_stride);
  _tile_dpbsud(TILE_SUMS_LEFT, TILE_ACTIVATIONS, TILE_LEFT);
  _tile_loadd(TILE_RIGHT, right, weight_stride);
  _tile_dpbsud(TILE_SUMS_RIGHT, TILE_ACTIVATIONS, TILE_RIGHT);
  return end;
}

template <int kFormat, bool kFetch>
void integer_strips(const StripCall& call) {
  const int64_t block = call.group < kTileBytes ? call.group : kTileBytes, num_groups = call.inputs / call.group;
  const TileShapes shapes = TileShapes::of_bytes(call.num_tokens, static_cast<int>(block));
  _tile_loadconfig(&shapes);
  Activations activations(call);
  Sums sums(call, kFormat == kInt8 ? 128 : 8);
  constexpr int kAhead = 2;  // groups whose sums are on their way, which takes the tiles long
  alignas(64) uint8_t unpacked[kAhead][2 * kRows * kTileBytes];
  alignas(64) int32_t dots[kAhead][2 * kRows * 16];
  const uint8_t *w = call.strips, *scales[kAhead];
  // The groups of all strips are one row, so that strips of few groups overlap as well.
  const int64_t total = call.num_strips * num_groups;
  int64_t next = 0, done = 0, first = 0;  // groups of a strip, and the first output of the one that is done
  for (int64_t i = 0; i < total + kAhead - 1; ++i) {
    if (i < total) {
      const int slot = i % kAhead;
      scales[slot] = w;
      w += kStrip * 2;
      _tile_zero(TILE_SUMS_LEFT);
      _tile_zero(TILE_SUMS_RIGHT);
      for (int64_t k = 0; k < call.group; k += block)
        w = multiply_block<kFormat, kFetch>(call, w, activations.block(next * call.group + k), activations.stride(),
                                            block, unpacked[slot]);
      _tile_stored(TILE_SUMS_LEFT, dots[slot], kTileBytes);
      _tile_stored(TILE_SUMS_RIGHT, dots[slot] + kRows * 16, kTileBytes);
      next = next + 1 < num_groups ? next + 1 : 0;
    }
    if (i < kAhead - 1) continue;
    const int slot = (i + 1) % kAhead;
    if (done == 0) sums.begin(first);
    sums.add(dots[slot], done, load_half(scales[slot]), load_half(scales[slot] + kStrip));
    if (++done < num_groups) continue;
    sums.end(first);
    done = 0;
    first += kStrip;
  }
  _tile_release();
}

template <int kFormat>
void integer_strip(const StripCall& call) {
  if (call.num_tokens <= few_rows->max_tokens[kFormat])
    few_rows->strip[kFormat](call);
  else if (call.fetch)
    integer_strips<kFormat, true>(call);
  else
    integer_strips<kFormat, false>(call);
}

// The processor has the unit, and the system lets this process use it: Linux gives its registers to who asks for them.
bool may_use_tiles() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBits = 1u << 22 | 1u << 24 | 1u << 25;  // bf16 products, tiles, int8 products
  if ((d & kBits) != kBits) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

const Kernels* blockffn::amx_kernels() {
  const Kernels* base = avx512_bf16_kernels();
  if (!base || !may_use_tiles()) return nullptr;
  static Kernels kernels;  // every thread writes the same values
  kernels = *base;
  few_rows = base;
  kernels.name = "amx";
  kernels.max_tokens[kBf16] = kernels.max_tokens[kInt8] = kernels.max_tokens[kInt4] = kRows;
  kernels.strip[kBf16] = bf16_strip;
  kernels.strip[kInt8] = integer_strip<kInt8>;
  kernels.strip[kInt4] = integer_strip<kInt4>;
  return &kernels;
}
#else
const blockffn::Kernels* blockffn::amx_kernels() { return nullptr; }
#endif

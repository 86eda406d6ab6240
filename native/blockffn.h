/* The C interface of blockffn's CPU kernels.
 *
 * Everything here reads its arguments and writes its output; nothing is kept between calls but the choice of kernels and
 * of a thread pool, both made once by the loader. All functions may be called from several threads at a time.
 *
 * Packed matrices. A matrix of N outputs and K inputs is cut into strips of 32 outputs, N rounded up. A strip is stored
 * K-major, so that a vector register holds neighbouring outputs and no sum ever crosses lanes:
 *
 *   f32    [K][32 outputs]               float
 *   bf16   [K / 2][32 outputs][2]        uint16
 *   int8   per group: scales [32] f16, then [group / 4][32 outputs][4]   code = weight / scale + 128, in 1..255
 *   int4   per group: scales [32] f16, then [group / 8][32 outputs][4]   low nibbles k..k+3, high nibbles k+4..k+7,
 *                                                                        code = weight / scale + 8, in 1..15
 *
 * K is rounded up to a multiple of 32 (f32, bf16) or of the group (int8, int4) with weights of value 0.
 * An expert is its up matrix (F outputs of D inputs), for gated experts its gate matrix (the same), and its down matrix
 * (D outputs of F inputs), one after the other: one active expert is one read.
 */
#ifndef BLOCKFFN_H
#define BLOCKFFN_H

#include <stdint.h>

#define BLOCKFFN_API_VERSION 1

#pragma GCC visibility push(default) /* all else in the library is hidden */
#ifdef __cplusplus
extern "C" {
#endif

enum { BLOCKFFN_F32 = 0, BLOCKFFN_BF16 = 1, BLOCKFFN_INT8 = 2, BLOCKFFN_INT4 = 3 };

/* Return values. */
enum { BLOCKFFN_OK = 0, BLOCKFFN_NO_MEMORY = 1, BLOCKFFN_BAD_ARGUMENT = 2 };

/* Packed experts; `group_in` and `group_hidden` are the groups along D (up) and along F (down), 0 for f32 and bf16. */
typedef struct {
  const uint8_t* data;
  int64_t expert_bytes;
  int64_t num_experts;
  int64_t width;
  int64_t hidden_size;
  int32_t format;
  int32_t gated;
  int32_t group_in;
  int32_t group_hidden;
} blockffn_experts;

/* A packed matrix of `outputs` rows and `inputs` columns. */
typedef struct {
  const uint8_t* data;
  int64_t outputs;
  int64_t inputs;
  int32_t format;
  int32_t group;
} blockffn_matrix;

/* y[t] = sum_e weights[t][e] * down_e(silu(up_e(x[t]))) over experts with !(|weight| <= threshold).
 * x and y: [num_tokens][hidden_size] of `dtype` (BLOCKFFN_F32 or BLOCKFFN_BF16), x with `x_stride` elements from token to
 * token. weights: float [num_tokens][num_experts] with `weights_stride`. A token's result does not depend on the other
 * tokens of the call, on the number of threads or on their timing. */
int32_t blockffn_sparse_ffn(const blockffn_experts* experts, int64_t num_tokens, int32_t dtype, const void* x,
                            int64_t x_stride, const float* weights, int64_t weights_stride, float threshold, void* y);

/* y[t] = matrix * x[t]; y: [num_tokens][outputs] of `dtype`. The same guarantees. */
int32_t blockffn_linear(const blockffn_matrix* matrix, int64_t num_tokens, int32_t dtype, const void* x,
                        int64_t x_stride, void* y);

/* The same sparse FFN over plain tensors: up, gate (or NULL) and down are [num_experts][width][hidden_size] of `dtype`,
 * contiguous. Nothing needs packing, and about two thirds of the packed speed remain. */
int32_t blockffn_sparse_ffn_plain(const void* up, const void* gate, const void* down, int64_t num_experts, int64_t width,
                                  int64_t hidden_size, int64_t num_tokens, int32_t dtype, const void* x,
                                  int64_t x_stride, const float* weights, int64_t weights_stride, float threshold,
                                  void* y);

/* Which kernels run: the name of the instruction set, and the reason if `BLOCKFFN_CPU_ISA` could not be honoured (else
 * NULL). */
const char* blockffn_isa(void);
const char* blockffn_isa_error(void);

/* Borrow a thread pool: the addresses of GOMP_parallel, GOMP_barrier and omp_get_max_threads of the OpenMP library that
 * the process already uses. Without it everything runs on the calling thread. A pool of our own would fight torch's. */
void blockffn_use_threads(void* parallel, void* barrier, void* max_threads);

/* Ask the system for huge pages in this range; returns 0 when it agreed. Call before the memory is first written. */
int32_t blockffn_advise_huge_pages(void* address, int64_t bytes);

/* Reads the range with all threads; the sum keeps the compiler honest. For measuring memory bandwidth. */
uint64_t blockffn_read(const void* address, int64_t bytes);

int32_t blockffn_api_version(void);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop

#endif

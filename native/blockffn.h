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

#define BLOCKFFN_API_VERSION 5

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

/* y[t] = sum_e weights[t][e] * down_e(silu(up_e(x[t]))) over experts with !(|weight| <= threshold); of gated experts,
 * down_e(silu(gate_e(x[t])) * up_e(x[t])).
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

/* A whole step of a language model: embedding, layers, norm and head for up to BLOCKFFN_MAX_STEP tokens, in one parallel
 * region.
 *
 * A layer is x += s * attention(norm(x)), then x += s * ffn(norm(x)). Norms are root-mean-square ones; vectors are floats.
 * The parts of `in_proj` lie one after the other, each rounded up to 32 outputs: q, k and v for grouped queries; for latent
 * attention (MLA) the queries' latent, and the keys' latent with the shared rotary key. */
enum { BLOCKFFN_MAX_STEP = 64, BLOCKFFN_MAX_BEST = 64 };
enum { BLOCKFFN_GROUPED_QUERIES = 0, BLOCKFFN_LATENT = 1 };

typedef struct {
  const float* attention_norm; /* [hidden_size] or NULL: none */
  blockffn_matrix in_proj;
  blockffn_matrix out_proj; /* the heads' values, one head after the other */
  /* For latent attention alone. The heads of to_latent (each latent_size x nope_width: the keys' projection, transposed)
   * and of to_values (each value_width x latent_size) lie one after the other; these matrices describe one head. */
  const float* query_norm;  /* [query_latent_size] */
  const float* latent_norm; /* [latent_size] */
  blockffn_matrix query_proj;
  blockffn_matrix to_latent;
  blockffn_matrix to_values;

  const float* ffn_norm; /* [hidden_size] */
  /* A dense FFN is one gated expert with a router without data. Else a token's routing weights are r = max(0, router *
   * x), divided by sqrt(mean(r²) + router_eps) if `router_normalizes`, times `router_scale` if given. */
  blockffn_matrix router;
  const float* router_scale; /* [num_experts] or NULL */
  int32_t router_normalizes;
  float router_eps;
  float threshold;
  blockffn_experts experts;
} blockffn_layer;

typedef struct {
  int64_t num_layers;
  int64_t hidden_size;
  int64_t vocab_size;
  int64_t num_heads;
  int64_t num_key_heads; /* 1 for latent attention */
  int64_t nope_width;    /* of a head's query without position; 0 for grouped queries */
  int64_t rope_width;    /* of the rotated rest */
  int64_t value_width;
  int64_t query_latent_size;
  int64_t latent_size;
  int64_t capacity; /* positions of the cache */
  int64_t max_threads;
  int32_t attention;
  int32_t cache_format; /* BLOCKFFN_F32 or BLOCKFFN_BF16 */
  float norm_eps;
  float latent_norm_eps;
  float query_scale;     /* of the scores before the softmax */
  float embedding_scale;
  float residual_scale;
  float head_scale;      /* of the head's input */
  const float* rotary;   /* [capacity][2][rope_width / 2]: cosines, then sines */
  /* A packed matrix of vocab_size outputs, or with `embedding_is_plain` rows [vocab_size][hidden_size], f32 or bf16. */
  blockffn_matrix embedding;
  int64_t embedding_is_plain;
  /* A draft model (EAGLE) has these as well, others a fusion without data: x = fusion * [norm(embedding), norm(state)] +
   * bias, of a token's embedding and of what a target knew of the token before, which the step brings. */
  const float* embedding_norm;
  const float* state_norm;
  const float* fusion_bias; /* [hidden_size] */
  blockffn_matrix fusion;   /* of 2 * hidden_size inputs */
  const float* final_norm;  /* or NULL: none */
  blockffn_matrix head;
  /* A coarse copy of the head, int8 or int4, for steps that need the largest logits alone; else one without data. Its
   * errors are by strip: of 32 outputs the norms of head - screen, then those of the head; none too small. */
  blockffn_matrix screen;
  const float* screen_errors; /* [strips][2][32] */
  const blockffn_layer* layers;
  void* cache; /* blockffn_cache_bytes, zero at first */
} blockffn_model;

/* Parts of a step whose times can be asked for; the last is norms, routing and waiting for other threads. Ranking belongs
 * to the head, a draft's fusion to the projections. */
enum { BLOCKFFN_PROJECTIONS, BLOCKFFN_ATTENTION, BLOCKFFN_ROUTER, BLOCKFFN_FFN, BLOCKFFN_HEAD, BLOCKFFN_BETWEEN,
       BLOCKFFN_NUM_PARTS };

/* What a step runs and where its results go; nothing may be NULL that is not said to. */
typedef struct {
  int64_t num_tokens; /* 1 .. BLOCKFFN_MAX_STEP */
  const int64_t* tokens;
  const int64_t* parents; /* of each token, earlier ones of this tree; -1: the last position before it. NULL: a chain */
  int64_t length;         /* positions before the tree; it fills the cache's positions from there on, token by token */
  int64_t num_earlier;    /* tokens of the tree that earlier steps have run: `parents` begins with theirs. Else 0 */
  const float* states;    /* [num_tokens][hidden_size], for a draft model; else NULL */
  int64_t num_logits;     /* the last so many tokens get logits */
  float* hidden;          /* [num_tokens][hidden_size], after the last norm */
  float* logits;          /* [num_logits][head's outputs rounded up to 32]; destroyed where they are ranked */
  /* Up to BLOCKFFN_MAX_BEST and the head's outputs, with a screen and without num_best: of each row the num_exact largest
   * logits, and all that equal the least of these but for rounding, are as ever; others may be -infinity. 0: all are as ever. */
  int64_t num_exact;
  int64_t* choices;       /* [num_logits] the first output with the largest logit, or NULL; not with num_best */
  int64_t* num_strips;    /* strips of the head that were read; or NULL */
  int64_t num_best;       /* up to BLOCKFFN_MAX_BEST and the head's outputs; 0: logits are not ranked */
  int64_t* best;          /* [num_logits][num_best] outputs of the head with the largest logits, best first, */
  float* best_log_probs;  /* and the logarithms of their shares in the softmax; -infinity where one is not a number */
  int64_t* num_union;     /* [num_layers]: experts that the tokens activate together; 1 for a dense layer */
  int64_t* num_active;    /* [num_layers][num_tokens] */
  uint8_t* is_active;     /* [num_layers][num_tokens][most experts of a layer], 0 or 1 up to a layer's own; or NULL */
  void* workspace;        /* blockffn_step_workspace bytes */
  double* seconds;        /* [BLOCKFFN_NUM_PARTS] of one thread, added to; or NULL */
} blockffn_step;

/* One target, one thread at a time: a step writes the cache and the workspace. Different targets run side by side.
 * BLOCKFFN_BAD_ARGUMENT: too many tokens in the step or its tree, a token outside the vocabulary, a parent that does not
 * precede its token, more positions than the cache has, or more to rank than there is. */
int32_t blockffn_decode_step(const blockffn_model* model, const blockffn_step* step);

/* A chain of drafts of a draft model: the step, a chain with one row of logits, then one step after the other on the best
 * token and the output of the step before, which fill the positions behind. Writes of up to `count` tokens the outputs of
 * the head and the logarithms of their shares, and how many there are: fewer where one is not a number, or where the sum
 * of these logarithms has fallen below `least`. `token_ids`: [head's outputs] the tokens behind the outputs, or NULL.
 * The step's num_best, best and best_log_probs are not read; `hidden` is overwritten. Errors as above. */
int32_t blockffn_draft_chain(const blockffn_model* model, const blockffn_step* step, int64_t count, float least,
                             const int64_t* token_ids, int64_t* outputs, float* log_probs, int64_t* num_drafted);
int64_t blockffn_cache_bytes(const blockffn_model* model);
int64_t blockffn_step_workspace(const blockffn_model* model);

/* Copies positions source[0 .. count - 1] of the cache, ascending, to `destination` and those after it, which must not lie
 * behind their sources. */
void blockffn_move_positions(const blockffn_model* model, const int64_t* source, int64_t count, int64_t destination);

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

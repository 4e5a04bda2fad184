/* The CPU kernels: what a decoder layer does to a few tokens, each operation one pass over memory.
 *
 * At one token a model is a list of weights to read: 269 MB for a model of 135 million parameters, whatever is done
 * with them. So the one aim here is to read every weight, key and value once, at the speed of memory, and to lose
 * little time between two reads. An operator of a tensor library costs 2 to 20 microseconds before it starts; a call
 * into this file costs about one.
 *
 *     linear            x . W^T, weights in the order of the checkpoint          cpu_linear_bf16.h (few rows),
 *                                                                                cpu_gemm_bf16.h (many),
 *                                                                                cpu_kernels_typed.h;
 *                                                                                of 4 bits: cpu_int4_bf16.h
 *     rms_norm, silu_and_mul, rope_write_kv                                      cpu_kernels_typed.h
 *     paged_decode      attention of one new token per request, from the pages   the same two
 *     paged_prefill     attention of prompt chunks, from the pages, AMX only     cpu_prefill_bf16.h
 *     decoder           all layers of a model in one call, AMX only              cpu_decoder_bf16.h
 *
 * Plain C without headers of torch: it compiles in about two seconds, on the user's machine and for its processor.
 * Every kernel but the last two exists for float32 and bfloat16 (names end in _f32 and _bf16), both from a file that is
 * included twice. Sums are always float32; a result is rounded once, where torch's operators round.
 *
 * Threads are not ours. torch keeps a pool of OpenMP threads, which spin between two operators; a second pool would
 * fight with it for the cores. So no OpenMP pragma starts a thread here: folo_init is handed the entry points of the
 * very library that torch has loaded (GOMP_parallel and two more), and `run` calls them. Without them: one thread.
 *
 * vLLM has these kernels in csrc/cpu/ (C++ on top of torch and oneDNN).
 *
 * Legend: M rows of x (tokens), K inputs, N outputs, T tokens, E hidden size, H query heads, Hkv KV heads, G = H / Hkv,
 * D head size, Nb blocks, Bs block size. The cache is [2, Nb, Bs, Hkv, D], of which blocks may lie anywhere at equal
 * distances: block_stride elements from one to the next, value_offset from a key to its value.
 */
#include <math.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define API __attribute__((visibility("default")))
#define PRAGMA(text) _Pragma(#text)
#define SIMD_SUM(...) PRAGMA(omp simd reduction(+ : __VA_ARGS__))

typedef uint16_t bf16;

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- Threads -------------------------------------------------------------------------------------------------- */

typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);
static parallel_fn gomp_parallel;
static int (*get_thread_num)(void), (*get_num_threads)(void);

typedef void (*body_fn)(void *args, int thread, int num_threads);
typedef struct {
    body_fn body;
    void *args;
} task_t;

static void enter(void *task) {
    task_t *t = task;
    t->body(t->args, get_thread_num(), get_num_threads());
}

/* Threads that stay together from one body to the next, spinning in between: to start and end a parallel region takes
 * OpenMP over a microsecond, to post a number and read one a fraction of that. The first member leads: it does the rest
 * of the work, and hands out bodies. Every member acknowledges each, also those that have no part in it. */
typedef struct {
    void (*lead)(const void *);
    const void *lead_args;
    body_fn body; /* NULL: go home */
    void *args;
    int members, num_threads; /* of these, num_threads take part in the body */
    int64_t posted __attribute__((aligned(64)));
    int64_t finished __attribute__((aligned(64)));
} team_t;

static _Thread_local team_t *team; /* of the member that leads */

/* Wait until *number is `target`; after a while let others run, should there be more threads than processors. */
static void wait_for(const int64_t *number, int64_t target) {
    for (int i = 1; __atomic_load_n(number, __ATOMIC_ACQUIRE) != target; i++) {
        if (i % 4096 == 0) sched_yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

static void post(team_t *t, body_fn body, void *args, int num_threads) {
    t->body = body, t->args = args, t->num_threads = num_threads;
    __atomic_fetch_add(&t->posted, 1, __ATOMIC_RELEASE);
}

static void join_team(void *args) {
    team_t *t = args;
    int i = get_thread_num();
    if (i == 0) {
        t->members = get_num_threads();
        team = t;
        t->lead(t->lead_args);
        team = NULL;
        post(t, NULL, NULL, 0);
        return;
    }
    for (int64_t count = 1;; count++) {
        wait_for(&t->posted, count);
        if (!t->body) return;
        if (i < t->num_threads) t->body(t->args, i, t->num_threads);
        __atomic_fetch_add(&t->finished, 1, __ATOMIC_RELEASE);
    }
}

/* Call lead(args), whose calls of `run` find their threads waiting. */
static void run_as_team(void (*lead)(const void *), const void *args, int num_threads) {
    team_t t = {lead, args, NULL, NULL, 1, 0, 0, 0};
    if (num_threads <= 1 || !gomp_parallel)
        lead(args);
    else
        gomp_parallel(join_team, &t, (unsigned)num_threads, 0);
}

/* Call body(args, i, n) on n threads, n at most num_threads. The body must share the work by the n that it is told. */
static void run(body_fn body, void *args, int num_threads) {
    if (team && num_threads > team->members) num_threads = team->members;
    if (num_threads <= 1 || !gomp_parallel) {
        body(args, 0, 1);
    } else if (team) {
        post(team, body, args, num_threads);
        body(args, 0, num_threads);
        wait_for(&team->finished, team->posted * (team->members - 1));
    } else {
        task_t task = {body, args};
        gomp_parallel(enter, &task, (unsigned)num_threads, 0);
    }
}

/* The part [*begin, *end) of `count` that thread i of n works on. */
static void share(int64_t count, int i, int n, int64_t *begin, int64_t *end) {
    *begin = count * i / n;
    *end = count * (i + 1) / n;
}

static void *scratch(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* ---- Numbers -------------------------------------------------------------------------------------------------- */

/* A float's bits and back. Through memcpy, which costs nothing: compilers vectorise loops with it, not with a union. */
static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* bfloat16 is the upper half of a float32. */
static inline float bf16_to_float(bf16 x) { return float_of((uint32_t)x << 16); }

/* Round to nearest, ties to even; a NaN stays one. */
static inline bf16 float_to_bf16(float x) {
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* e^x within two units in the last place, in operations that compilers vectorise; x is clamped to +-80,
 * well within the range of float: a silu near its end would else divide into denormal numbers, which take 100 times
 * as long (and compilers compute both sides of a clamp for every element).
 * x = n ln 2 + r with |r| <= ln 2 / 2: e^r by its Taylor series, 2^n by writing n into the exponent's bits. */
static inline __attribute__((always_inline)) float exp_approx(float x) {
    x = x < -80.0f ? -80.0f : x;
    x = x > 80.0f ? 80.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer, in the low bits */
    float n = shifted - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* The bits of 12582912.0f end in zeros, so shifting leaves those of n + 127 alone: the exponent of 2^n. */
    return p * float_of((bits_of(shifted) + 127) << 23);
}

static inline __attribute__((always_inline)) float silu(float x) { return x / (1.0f + exp_approx(-x)); }

/* ---- Arguments ------------------------------------------------------------------------------------------------ */

/* One matrix product, out[M, N] = epilogue(x[M, K] . w[N, K]^T). Pointers are to the dtype of the call. */
typedef struct {
    const void *x, *w, *bias; /* bias [N] or NULL */
    const void *residual;     /* [M, N] or NULL: added to the rounded product; may be `out` itself */
    void *out;                /* [M, N], rows contiguous */
    void *packed;             /* x as the kernel wants it, or NULL */
    int64_t M, K, N, ldx;     /* ldx: elements from one row of x to the next */
    int silu_mul;             /* w is [2 N, K], gate | up, and out = silu(gate) * up */
    int out_float;            /* out is float32 and not rounded (logits) */
    /* Of weights of 4 bits, see cpu_int4_bf16.h; else NULL. */
    const void *scales, *zeros; /* [N, K / group] (with silu_mul [2 N, ...]): bfloat16, uint8 */
    int64_t group;              /* inputs that share a scale: a multiple of 32 that divides K */
} linear_t;

typedef struct {
    const void *x, *weight;
    void *residual, *out;
    int64_t T, E, ldx;
    float eps;
} norm_t;

typedef struct {
    const void *gate_up;
    void *out;
    int64_t T, N;
} silu_t;

typedef struct {
    void *qkv;                /* [T, (H + 2 Hkv) D]; queries are turned in place */
    const int64_t *positions; /* [T] */
    const void *cos_sin;      /* [2, max_position, D] */
    const void *q_weight, *k_weight; /* [D] each, or NULL */
    void *kv_cache;           /* [2, Nb, Bs, Hkv, D] */
    const int64_t *slots;     /* [T]; negative: nothing is written */
    int64_t T, H, Hkv, D, Bs, block_stride, value_offset, max_position;
    float eps;
    int keep_keys;            /* 0: keys are turned in place too, besides being written */
} rope_t;

typedef struct {
    const void *q, *kv_cache;
    const int32_t *table, *seq_lens; /* [B, table_stride], [B] */
    const int32_t *rows, *reqs;      /* [n] each or NULL: row of q and out, row of table and seq_lens */
    void *out;                       /* [T, H, D] */
    float *partials;
    const int64_t *starts; /* [n + 1]: contexts laid end to end */
    int64_t shared;        /* tokens with which all contexts begin, in the same blocks; a multiple of DECODE_TILE */
    int64_t packed_bytes;  /* of one request's queries as AMX wants them; 0: without AMX */
    int64_t n, H, Hkv, D, Bs, block_stride, value_offset, q_stride, table_stride;
    float scale;
} decode_t;

#define DECODE_TILE 64 /* tokens whose scores are held at once */

/* Up to 64 tokens of one request's context: where their keys (and values, value_offset further on) lie. */
typedef struct {
    int64_t offsets[DECODE_TILE]; /* in elements */
    int count;
} decode_tile_t;

/* The tile at `from` in the context of `request`, tokens from `to` on not included. Tiles begin at multiples of 16,
 * but for a thread's first: 16 tokens then lie in one page, if pages are a multiple of 16. */
static void locate(const decode_t *a, decode_tile_t *tile, int64_t request, int64_t from, int64_t to) {
    int64_t req = a->reqs ? a->reqs[request] : request, row = a->Hkv * a->D;
    const int32_t *blocks = a->table + req * a->table_stride;
    int64_t block = from / a->Bs, in_block = from % a->Bs;
    tile->count = (int)min64(from % 16 ? 16 - from % 16 : DECODE_TILE, to - from);
    for (int j = 0; j < tile->count; j++) {
        tile->offsets[j] = blocks[block] * a->block_stride + in_block * row;
        if (++in_block == a->Bs) in_block = 0, block++;
    }
}

/* decode_t's `shared`: less than any context, so that every request has a token left to itself. */
static int64_t shared_tokens(const decode_t *a) {
    if (a->n < 2) return 0;
    const int32_t *first = a->table + (a->reqs ? a->reqs[0] : 0) * a->table_stride;
    int64_t blocks = INT64_MAX;
    for (int64_t r = 0; r < a->n && blocks; r++) {
        const int32_t *own = a->table + (a->reqs ? a->reqs[r] : r) * a->table_stride;
        blocks = min64(blocks, (a->starts[r + 1] - a->starts[r] - 1) / a->Bs);
        for (int64_t i = 0; i < blocks; i++)
            if (own[i] != first[i]) blocks = i;
    }
    return blocks * a->Bs / DECODE_TILE * DECODE_TILE;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define HAVE_AVX512_BF16 1
#include "cpu_linear_bf16.h"
#if HAVE_AMX
#include "cpu_gemm_bf16.h"
#include "cpu_prefill_bf16.h"
#endif
#else
#define HAVE_AVX512_BF16 0
#endif

/* ---- The kernels, once per dtype ------------------------------------------------------------------------------- */

#define T_ float
#define NAME(name) name##_f32
#define LOAD(x) (x)
#define STORE(x) (x)
#define IS_BF16 0
#include "cpu_kernels_typed.h"
#undef T_
#undef NAME
#undef LOAD
#undef STORE
#undef IS_BF16

#define T_ bf16
#define NAME(name) name##_bf16
#define LOAD(x) bf16_to_float(x)
#define STORE(x) float_to_bf16(x)
#define IS_BF16 1
#include "cpu_kernels_typed.h"

#if HAVE_AVX512_BF16 && HAVE_AMX
#include "cpu_decoder_bf16.h"
#endif

/* ---- Start-up -------------------------------------------------------------------------------------------------- */

/* Take torch's OpenMP entry points (all NULL: one thread). Return a bit set: 1 AVX-512 bfloat16 code, 2 AMX code. */
API int folo_init(void *parallel, void *thread_num, void *num_threads) {
    gomp_parallel = (parallel_fn)parallel;
    get_thread_num = (int (*)(void))thread_num;
    get_num_threads = (int (*)(void))num_threads;
    int features = HAVE_AVX512_BF16;
#if HAVE_AVX512_BF16 && HAVE_AMX
    amx_allowed = request_amx();
    features |= amx_allowed ? 2 : 0;
#endif
    return features;
}

/* Matrix products of few rows in bfloat16, and attention of decodes, with the processor's own unit for them: AMX tiles.
 *
 * An AMX tile is a register of 16 rows of 64 bytes, and one instruction multiplies two of them:
 *
 *                       B: x, "VNNI" order: row p holds inputs 2p and 2p + 1 of 16 tokens
 *                       [ 16 pairs of inputs x 16 tokens ]
 *     A: weights        C += A . B, float32
 *     [ 16 outputs    ] [ 16 outputs x 16 tokens ]
 *     [ x 32 inputs   ]
 *
 * A is loaded straight from the checkpoint's row-major weight: 16 rows, 64 bytes of each. So weights need no packing,
 * no second copy, and are read once. x, which is small, is packed per call; C is the output transposed, and is turned
 * back while it is rounded. A step of the inner loop works on 2 x 2 tiles: 32 outputs (with silu_mul: 16 gates and
 * their 16 ups, so that both meet in registers) by 32 tokens.
 */
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define HAVE_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define HAVE_AMX 0
#endif

static inline __m512 widen16(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline __m512 widen16_masked(__mmask16 mask, const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

static inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 round16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(x)), 16));
}

/* 2^x, relative error 3e-6; 2^0 = 1 and 2^-inf = 0 exactly. The fraction's power by a polynomial, the rest
 * by the exponent. */
static inline __m512 exp2_16(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, 0x01); /* x - floor(x) */
    __m512 p = _mm512_set1_ps(1.3426688e-02f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.2242468e-02f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4128021e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9304484e-01f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);
}

/* x / (1 + 2^(-x / ln 2)); the quotient by an estimate of 14 bits and one step of Newton's. */
static inline __attribute__((always_inline)) __m512 silu16(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 t = _mm512_min_ps(_mm512_set1_ps(126.0f), _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
    __m512 d = _mm512_add_ps(one, exp2_16(t)), r = _mm512_rcp14_ps(d);
    r = _mm512_fmadd_ps(r, _mm512_fnmadd_ps(d, r, one), r);
    return _mm512_mul_ps(x, r);
}

/* Bias, rounding, residual; `sum` holds outputs n .. n + 15 of row m, those outside `mask` are not stored. */
static inline void store_row(const linear_t *a, int64_t m, int64_t n, __mmask16 mask, __m512 sum) {
    if (a->residual)
        sum = _mm512_add_ps(round16(sum), widen16_masked(mask, (const bf16 *)a->residual + m * a->N + n));
    if (a->out_float)
        _mm512_mask_storeu_ps((float *)a->out + m * a->N + n, mask, sum);
    else
        _mm256_mask_storeu_epi16((bf16 *)a->out + m * a->N + n, mask, narrow16(sum));
}

/* Transpose 16 x 16 numbers of 32 bits: element j of row i becomes element i of row j. */
static inline void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) { /* r[4i + c]: rows 4i .. 4i + 3 of column c of each 128-bit lane */
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int c = 0; c < 4; c++) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    }
    for (int c = 0; c < 4; c++) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xdd);
        r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xdd);
    }
}

/* ---- AMX ------------------------------------------------------------------------------------------------------- */
#if HAVE_AMX
static int amx_allowed;

/* The tiles' 8 KB enlarge what the system saves per thread, so Linux wants to be asked first. */
static int request_amx(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    _tile_loadconfig(&config);
}

#include "cpu_int4_bf16.h"

/* x [M, K] -> tiles [M / 16][K / 32] of [16 pairs][16 tokens][2]; tokens past M are zero. */
static void pack_x(void *args, int thread, int num_threads) {
    const linear_t *a = args;
    int64_t row_tiles = (a->M + 15) / 16, k_tiles = a->K / 32, begin, end;
    share(row_tiles * k_tiles, thread, num_threads, &begin, &end);
    for (int64_t tile = begin; tile < end; tile++) {
        int64_t m0 = tile / k_tiles * 16, k0 = tile % k_tiles * 32;
        __m512i rows[16];
        for (int i = 0; i < 16; i++)
            rows[i] = m0 + i < a->M ? _mm512_loadu_si512((const bf16 *)a->x + (m0 + i) * a->ldx + k0)
                                    : _mm512_setzero_si512();
        transpose16(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512((char *)a->packed + tile * 1024 + i * 64, rows[i]);
    }
}

/* Finish 16 outputs of up to 16 tokens: `first` is C of outputs n .. n + 15, `second` that of the ups if silu_mul. */
static void finish_tile(const linear_t *a, int64_t m0, int64_t n, int64_t skip, const float *first,
                        const float *second) {
    int tokens = (int)min64(16, a->M - m0);
    __m512i rows[16];
    for (int i = 0; i < 16; i++) {
        __m512 sum = _mm512_load_ps(first + i * 16);
        if (a->bias) sum = _mm512_add_ps(sum, _mm512_set1_ps(bf16_to_float(((const bf16 *)a->bias)[n + i])));
        if (second) {
            __m512 up = _mm512_load_ps(second + i * 16);
            if (a->bias) up = _mm512_add_ps(up, _mm512_set1_ps(bf16_to_float(((const bf16 *)a->bias)[a->N + n + i])));
            sum = _mm512_mul_ps(silu16(sum), up);
        }
        rows[i] = _mm512_castps_si512(sum);
    }
    transpose16(rows);
    for (int i = 0; i < tokens; i++)
        store_row(a, m0 + i, n, (__mmask16)(0xffff << skip), _mm512_castsi512_ps(rows[i]));
}

/* Outputs in steps of 16 (silu_mul) or 32, shared between the threads in contiguous parts; per step all tokens, so that
 * a weight comes from memory once and from the cache for later tokens. */
static void amx_body(void *args, int thread, int num_threads) {
    const linear_t *a = args;
    int64_t K = a->K, N = a->N, row = K * 2, k_tiles = K / 32, begin, end;
    share((N + 15) / 16, thread, num_threads, &begin, &end);
    float c[4][256] __attribute__((aligned(64)));
    bf16 *unpacked = a->scales ? scratch((size_t)(32 * K) * sizeof(bf16)) : NULL;
    configure_tiles();
    int64_t width = a->silu_mul ? 1 : 2;
    for (int64_t block = begin; block < end; block += width) {
        /* The last 16 outputs may overlap those before them: `skip` are not stored again. */
        int64_t n0 = min64(block * 16, N - 16), skip0 = block * 16 - n0;
        int pair = a->silu_mul || block + 1 < end;
        int64_t n1 = a->silu_mul ? N + n0 : min64(block * 16 + 16, N - 16), skip1 = block * 16 + 16 - n1;
        int64_t next = block + width < end ? width * 16 : 0; /* the next step's weights are fetched during this one */
        const bf16 *w0 = sixteen_weights(a, n0, 16, next, unpacked);
        const bf16 *w1 = pair ? sixteen_weights(a, n1, 16, next, unpacked + 16 * K) : w0;
        int64_t ahead = a->scales ? 0 : next * K;
        for (int64_t m0 = 0; m0 < a->M; m0 += 32) {
            const char *x0 = (const char *)a->packed + m0 / 16 * k_tiles * 1024, *x1 = x0 + k_tiles * 1024;
            int wide = m0 + 16 < a->M;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t k = 0; k < k_tiles; k++) {
                if (m0 == 0 && ahead) { /* in the order of memory, not of the tiles: that is what memory is fast at */
                    const char *p0 = (const char *)(w0 + ahead) + k * 1024, *p1 = (const char *)(w1 + ahead) + k * 1024;
                    for (int i = 0; i < 16; i++) {
                        _mm_prefetch(p0 + i * 64, _MM_HINT_T1);
                        _mm_prefetch(p1 + i * 64, _MM_HINT_T1);
                    }
                }
                /* "stream": x passes through the first-level cache without driving out the weights. */
                _tile_loadd(4, w0 + k * 32, row);
                _tile_stream_loadd(6, x0 + k * 1024, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, w1 + k * 32, row);
                _tile_dpbf16ps(1, 5, 6);
                if (wide) {
                    _tile_stream_loadd(7, x1 + k * 1024, 64);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c[0], 64);
            _tile_stored(1, c[1], 64);
            if (wide) {
                _tile_stored(2, c[2], 64);
                _tile_stored(3, c[3], 64);
            }
            for (int j = 0; j <= wide; j++) {
                finish_tile(a, m0 + 16 * j, n0, skip0, c[2 * j], a->silu_mul ? c[2 * j + 1] : NULL);
                if (pair && !a->silu_mul) finish_tile(a, m0 + 16 * j, n1, skip1, c[2 * j + 1], NULL);
            }
        }
    }
    _tile_release();
    free(unpacked);
}

/* A few rows; many are for cpu_gemm_bf16.h. */
static void linear_amx(linear_t *a, int num_threads) {
    int64_t tiles = (a->M + 15) / 16 * (a->K / 32);
    a->packed = scratch((size_t)tiles * 1024);
    run(pack_x, a, tiles > 64 ? num_threads : 1);
    run(amx_body, a, num_threads);
    free(a->packed);
}

/* ---- Attention of one new token per request ---------------------------------------------------------------------
 *
 * attend() of cpu_kernels_typed.h for a tile of up to 64 tokens, in three phases. The heads of as many KV heads as fit
 * are taken together, one in each of 16 columns (9 query heads on 3 KV heads: nine columns).
 *
 *   1. Scores. Keys are the A operand, straight from their page: 16 tokens, 32 of D. B holds the queries of the KV
 *      head that the keys belong to, each in its head's column, zeros in the others'; so products of all KV heads add
 *      up in one C:
 *
 *                            KV head 0    KV head 1    KV head 2
 *                            [q q q . . . . . .]  [. . . q q q . . .]  [. . . . . . q q q]    B: pairs of D x heads
 *        keys, 16 tokens of  [K0] [K1] [K2]     ->     C: [ 16 tokens x 16 heads ]
 *
 *   2. Weights. A row of C is one token's scores: sixteen lanes, sixteen heads. So the largest score and the sum are
 *      taken lane by lane down the rows, and one vector e^x serves all heads of a token.
 *   3. Values. A value row is converted once for all heads of its KV head, whose sums stay in registers.
 *
 * Meanwhile the next tile's keys and values are asked for, a token's at a time and evenly spread: the memory is the
 * slowest part and must never pause.
 */

/* Progress in asking for a tile's keys and values: pages lie anywhere, so the processor cannot guess the next. */
typedef struct {
    const char *keys;
    const int64_t *offsets;          /* of the tile's tokens, in elements */
    int64_t bytes, to_values, count; /* bytes of a token's keys; bytes from keys to values; tokens */
    int64_t asked, due, rate;        /* tokens; the last two in 1/65536 */
} ahead_t;

/* `amount` of the units of work on the present tile are done: ask for as large a part of the next tile. */
static inline void ask(ahead_t *p, int64_t amount) {
    p->due += amount * p->rate;
    int64_t due = min64(p->count, p->due >> 16);
    for (; p->asked < due; p->asked++) {
        const char *key = p->keys + p->offsets[p->asked] * (int64_t)sizeof(bf16);
        for (int64_t byte = 0; byte < p->bytes; byte += 64) {
            _mm_prefetch(key + byte, _MM_HINT_T1);
            _mm_prefetch(key + p->to_values + byte, _MM_HINT_T1);
        }
    }
}

/* Query heads that share a pass, in KV heads. */
static inline int64_t kv_heads_per_pass(const decode_t *a) { return min64(a->Hkv, 16 / (a->H / a->Hkv)); }

static inline int can_attend_amx(const decode_t *a) { return amx_allowed && a->D % 32 == 0 && a->H / a->Hkv <= 16; }

static inline int64_t packed_query_bytes(const decode_t *a) { return a->Hkv * (a->D / 32) * 1024; }

/* A request's queries [H, D] -> tiles [Hkv][D / 32] of [16 pairs][16 heads of the pass][2]: see B above. */
static void pack_query(const decode_t *a, const bf16 *q, char *packed) {
    int64_t G = a->H / a->Hkv, per_pass = kv_heads_per_pass(a), parts = a->D / 32;
    for (int64_t kv0 = 0; kv0 < a->Hkv; kv0 += per_pass) {
        int64_t kv_heads = min64(per_pass, a->Hkv - kv0), heads = kv_heads * G;
        for (int64_t part = 0; part < parts; part++) {
            __m512i rows[16];
            for (int64_t h = 0; h < 16; h++)
                rows[h] = h < heads ? _mm512_loadu_si512(q + (kv0 * G + h) * a->D + part * 32) : _mm512_setzero_si512();
            transpose16(rows);
            for (int64_t kv = 0; kv < kv_heads; kv++) {
                __mmask16 own = (__mmask16)(((1u << G) - 1) << (kv * G));
                char *tile = packed + ((kv0 + kv) * parts + part) * 1024;
                for (int p = 0; p < 16; p++) _mm512_store_si512(tile + p * 64, _mm512_maskz_mov_epi32(own, rows[p]));
            }
        }
    }
}

/* Sixteen tokens' keys as the tile unit wants them: where they lie if their rows are equally far apart, else `copy`. */
static inline const bf16 *sixteen_rows(const bf16 *keys, const int64_t *offsets, int count, int in_place, bf16 *copy) {
    if (in_place) return keys + offsets[0];
    for (int i = 0; i < 16; i++) /* no row affects another's scores: past the last token, anything will do */
        _mm512_store_si512(copy + i * 32, i < count ? _mm512_loadu_si512(keys + offsets[i]) : _mm512_setzero_si512());
    return copy;
}

/* scores[token][head of the pass], unscaled; rows up to the next multiple of 16 tokens are written too. */
static void score_amx(const decode_t *a, const decode_tile_t *tile, int64_t kv0, int64_t kv_heads, const char *packed,
                      ahead_t *ahead, float *scores) {
    int64_t parts = a->D / 32, row = a->Hkv * a->D;
    const bf16 *keys = a->kv_cache;
    bf16 copy[4][512] __attribute__((aligned(64)));
    int count[4], in_place[4];
    for (int g = 0; g < 4; g++) {
        const int64_t *offsets = tile->offsets + g * 16;
        count[g] = (int)min64(16, tile->count - g * 16);
        int64_t apart = count[g] < 16;
        for (int i = 0; i < count[g]; i++) apart |= offsets[i] - offsets[0] - i * row;
        in_place[g] = !apart;
    }
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t kv = kv0; kv < kv0 + kv_heads; kv++)
        for (int64_t part = 0; part < parts; part++) {
            _tile_loadd(4, packed + (kv * parts + part) * 1024, 64);
#define ADD(g, a_tile)                                                                                                 \
    if (count[g] > 0) {                                                                                                \
        const bf16 *rows = sixteen_rows(keys + kv * a->D + part * 32, tile->offsets + (g) * 16, count[g], in_place[g], \
                                        copy[g]);                                                                      \
        _tile_loadd(a_tile, rows, in_place[g] ? row * 2 : 64);                                                         \
        _tile_dpbf16ps(g, a_tile, 4);                                                                                  \
    }
            ADD(0, 5)
            ADD(1, 6)
            ADD(2, 7)
            ADD(3, 5)
#undef ADD
            ask(ahead, 1);
        }
    _tile_stored(0, scores, 64);
    if (count[1] > 0) _tile_stored(1, scores + 256, 64);
    if (count[2] > 0) _tile_stored(2, scores + 512, 64);
    if (count[3] > 0) _tile_stored(3, scores + 768, 64);
}

/* Turn scores [token][16] into weights e^(scale * score - m); m, l, acc: of the pass's `heads` first head. */
static void soften_amx(float *scores, int count, float scale, int64_t heads, float *m, float *l, float *acc, int64_t D,
                       ahead_t *ahead) {
    __mmask16 mask = (__mmask16)((1u << heads) - 1);
    __m512 factor = _mm512_set1_ps(scale), before = _mm512_maskz_loadu_ps(mask, m), top[4];
    for (int i = 0; i < 4; i++) top[i] = before;
    for (int j = 0; j < count; j += 4) { /* four in turn: one alone would wait for itself */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) { /* past the end, the last token again */
            const float *row = scores + (j + i < count ? j + i : count - 1) * 16;
            top[i] = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(row), factor), top[i]);
        }
    }
    __m512 largest = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
    const __m512 log2_e = _mm512_set1_ps(1.44269504f);
    __m512 factor2 = _mm512_mul_ps(factor, log2_e), largest2 = _mm512_mul_ps(largest, log2_e);
    __m512 sum = _mm512_maskz_loadu_ps(mask, l);
    __mmask16 larger = _mm512_mask_cmp_ps_mask(mask, largest, before, _CMP_GT_OQ);
    if (larger) {
        float shrink[16] __attribute__((aligned(64)));
        __m512 by = exp2_16(_mm512_fmsub_ps(before, log2_e, largest2));
        sum = _mm512_mask_mul_ps(sum, larger, sum, by);
        _mm512_store_ps(shrink, by);
        for (int64_t h = 0; h < heads; h++)
            if (larger >> h & 1)
                for (int64_t d = 0; d < D; d++) acc[h * D + d] *= shrink[h];
        _mm512_mask_storeu_ps(m, mask, largest);
    }
    for (int j = 0; j < count; j++) {
        __m512 weight = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16), factor2, largest2));
        _mm512_store_ps(scores + j * 16, weight);
        sum = _mm512_add_ps(sum, weight);
        if (j % 8 == 7) ask(ahead, 1);
    }
    _mm512_mask_storeu_ps(l, mask, sum);
}

/* acc[h] += sum over tokens of weights[token][h] * (32 * halves of a value row), for up to four heads of a KV head.
 * A load of 32 numbers is the odd ones as float32 once the even ones are masked away, and the even ones once shifted:
 * so sums are of even and odd elements while in registers, and in order in memory. */
static inline __attribute__((always_inline)) void add_values_part(float *acc, int64_t D, const float *weights,
                                                                  const bf16 *values, const int64_t *offsets, int count,
                                                                  const int heads, const int halves, ahead_t *ahead) {
    const __m512i steps = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd_steps = _mm512_add_epi32(steps, _mm512_set1_epi32(1)), upper = _mm512_set1_epi32(-65536);
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 even[4][2], odd[4][2];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 2
        for (int i = 0; i < halves; i++) {
            __m512 low = _mm512_loadu_ps(acc + h * D + i * 32), high = _mm512_loadu_ps(acc + h * D + i * 32 + 16);
            even[h][i] = _mm512_permutex2var_ps(low, steps, high);
            odd[h][i] = _mm512_permutex2var_ps(low, odd_steps, high);
        }
    for (int j = 0; j < count; j++) {
        const bf16 *value = values + offsets[j];
        const float *weight = weights + j * 16;
#pragma GCC unroll 2
        for (int i = 0; i < halves; i++) {
            __m512i both = _mm512_loadu_si512(value + i * 32);
            __m512 evens = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
            __m512 odds = _mm512_castsi512_ps(_mm512_and_si512(both, upper));
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                even[h][i] = _mm512_fmadd_ps(_mm512_set1_ps(weight[h]), evens, even[h][i]);
                odd[h][i] = _mm512_fmadd_ps(_mm512_set1_ps(weight[h]), odds, odd[h][i]);
            }
        }
        if (j % 16 == 15) ask(ahead, 2);
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 2
        for (int i = 0; i < halves; i++) {
            _mm512_storeu_ps(acc + h * D + i * 32, _mm512_permutex2var_ps(even[h][i], first, odd[h][i]));
            _mm512_storeu_ps(acc + h * D + i * 32 + 16, _mm512_permutex2var_ps(even[h][i], second, odd[h][i]));
        }
}

/* acc [G, D] += weights x values of one KV head; weights[token][16], this KV head's first. */
static void add_values_amx(float *acc, const float *weights, const bf16 *values, const decode_tile_t *tile, int64_t G,
                           int64_t D, ahead_t *ahead) {
    for (int64_t g = 0; g < G; g += 4)
        for (int64_t d = 0; d < D; d += 64) {
#define PART(heads)                                                                                                    \
    if (D - d >= 64)                                                                                                   \
        add_values_part(acc + g * D + d, D, weights + g, values + d, tile->offsets, tile->count, heads, 2, ahead);     \
    else                                                                                                               \
        add_values_part(acc + g * D + d, D, weights + g, values + d, tile->offsets, tile->count, heads, 1, ahead);
            if (G - g == 1) {
                PART(1)
            } else if (G - g == 2) {
                PART(2)
            } else if (G - g == 3) {
                PART(3)
            } else {
                PART(4)
            }
#undef PART
        }
}

/* Attend with one request's packed query over a tile, `next` being the one after it. state: m [H], l [H], acc [H, D].
 * Tiles are configured. */
static void attend_amx(const decode_t *a, const decode_tile_t *tile, const decode_tile_t *next, const char *packed,
                       float *state) {
    int64_t H = a->H, Hkv = a->Hkv, D = a->D, G = H / Hkv, per_pass = kv_heads_per_pass(a);
    const bf16 *values = (const bf16 *)a->kv_cache + a->value_offset;
    float *m = state, *l = m + H, *acc = l + H;
    float scores[DECODE_TILE * 16] __attribute__((aligned(64)));
    ahead_t ahead = {a->kv_cache, next->offsets, Hkv * D * 2, a->value_offset * 2, next->count, 0, 0, 0};
    int64_t units = Hkv * (D / 32) + (Hkv + per_pass - 1) / per_pass * (tile->count / 8) +
                    Hkv * ((G + 3) / 4) * ((D + 63) / 64) * (tile->count / 16) * 2;
    ahead.rate = next->count * 65536 / units + 1;
    for (int64_t kv0 = 0; kv0 < Hkv; kv0 += per_pass) {
        int64_t kv_heads = min64(per_pass, Hkv - kv0), h0 = kv0 * G;
        score_amx(a, tile, kv0, kv_heads, packed, &ahead, scores);
        soften_amx(scores, tile->count, a->scale, kv_heads * G, m + h0, l + h0, acc + h0 * D, D, &ahead);
        for (int64_t kv = kv0; kv < kv0 + kv_heads; kv++)
            add_values_amx(acc + kv * G * D, scores + (kv - kv0) * G, values + kv * D, tile, G, D, &ahead);
    }
}
#endif

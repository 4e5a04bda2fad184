/* Matrix products of many rows (prompts) in bfloat16 on AMX tiles: bound by arithmetic, where those of
 * cpu_linear_bf16.h are bound by reading the weights.
 *
 * Here the roles are turned. x is the A operand and is loaded where it lies; weights are B, and are brought into its
 * order ("VNNI": pairs of inputs side by side) once per call, a panel at a time. Then C comes out as rows of tokens and
 * is stored without being transposed:
 *
 *                       B: weights, packed: row p holds inputs 2p and 2p + 1 of 16 outputs
 *                       [ 16 pairs of inputs x 16 outputs ]
 *     A: x              C += A . B, float32
 *     [ 16 tokens     ] [ 16 tokens x 16 outputs ]
 *     [ x 32 inputs   ]
 *
 * Every level of the memory has its part (Goto and van de Geijn 2008, "Anatomy of high-performance matrix
 * multiplication"): a panel of weights stays in the second-level cache while all tokens pass, 32 tokens stay in the first
 * while the panel's outputs pass, and 2 x 2 tiles of C stay in registers while the inputs pass:
 *
 *     for panel of outputs (PANEL_BYTES of packed weights)
 *         for 32 tokens
 *             for 2 x 16 outputs of the panel; with silu_mul, 16 gates and their 16 ups
 *                 for 32 inputs: 4 tile loads, 4 tile products
 *
 * Sums run over the inputs in the same order as in cpu_linear_bf16.h, and the unit adds in pairs either way: a token's
 * result is the same, to the bit, in both.
 */
#define GEMM_ROWS 128         /* from here on this beats cpu_linear_bf16.h */
#define PANEL_BYTES (1 << 19) /* of packed weights at a time */
#define K_TILES 18            /* inputs, in tiles, of which the first-level cache holds 32 rows of x */

/* A thread's part is a rectangle: outputs `[pair_begin, pair_end)`, in pairs of tiles, of rows [begin, end). */
static void share_rectangle(const linear_t *a, int64_t pairs, int thread, int num_threads, int64_t *pair_begin,
                            int64_t *pair_end, int64_t *begin, int64_t *end) {
    int row_parts = 1; /* outputs are cut first: whoever shares rows packs the same weights */
    while (row_parts * 2 <= num_threads && pairs * row_parts < 4 * num_threads) row_parts *= 2;
    int column_parts = num_threads / row_parts, i = thread / column_parts;
    *pair_begin = *pair_end = *begin = *end = 0;
    if (i >= row_parts) return;
    share(pairs, thread % column_parts, column_parts, pair_begin, pair_end);
    share((a->M + 31) / 32, i, row_parts, begin, end);
    *begin *= 32, *end = min64(*end * 32, a->M);
}

/* The first outputs of a pair of tiles: with silu_mul a gate and its up, else neighbours. */
static inline void outputs_of(const linear_t *a, int64_t pair, int64_t outputs[2]) {
    outputs[0] = a->silu_mul ? pair * 16 : pair * 32;
    outputs[1] = a->silu_mul ? a->N + pair * 16 : pair * 32 + 16;
}

/* Weights of pairs [first, last) -> [pair][K / 32][2] tiles of [16 pairs of inputs][16 outputs][2]; past the last
 * output, zeros. */
static void pack_weights(const linear_t *a, int64_t first, int64_t last, bf16 *unpacked, char *packed) {
    int64_t k_tiles = a->K / 32, width = a->silu_mul ? 16 : 32;
    for (int64_t pair = first; pair < last; pair++) {
        int64_t outputs[2];
        outputs_of(a, pair, outputs);
        for (int j = 0; j < 2; j++) {
            int64_t there = min64(16, a->N - (a->silu_mul ? outputs[0] : outputs[j]));
            if (there <= 0) there = 0;
            const bf16 *weights = there ? sixteen_weights(a, outputs[j], there, width, unpacked) : NULL;
            for (int64_t k = 0; k < k_tiles; k++) {
                const bf16 *w = weights + k * 32;
                __m512i rows[16];
                for (int i = 0; i < 16; i++)
                    rows[i] = i < there ? _mm512_loadu_si512(w + i * a->K) : _mm512_setzero_si512();
                /* The rows of the next pair, in the order of memory; past the end, asking does no harm. */
                const char *next = (const char *)((const bf16 *)a->w + (outputs[j] + width) * a->K) + k * 1024;
                for (int i = 0; i < 16 && !a->scales; i++) _mm_prefetch(next + i * 64, _MM_HINT_T1);
                transpose16(rows);
                char *tile = packed + (((pair - first) * k_tiles + k) * 2 + j) * 1024;
                for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 64, rows[i]);
            }
        }
    }
}

/* Bias, activation, residual and rounding of 32 rows of C, as two by two tiles [16][16], from row m on; `rows` of them
 * exist. With silu_mul the right tiles are the ups. */
static inline void store_tiles(const linear_t *a, int64_t m, const int64_t outputs[2], int64_t rows,
                               const float c[4][256]) {
#define ROW(j, i) (c[(i) / 16 * 2 + (j)] + (i) % 16 * 16)
    int64_t n = outputs[0];
    const bf16 *bias = a->bias;
    if (a->silu_mul) {
        __mmask16 mask = (__mmask16)(0xffff >> (16 - min64(16, a->N - n)));
        for (int64_t i = 0; i < rows; i++) {
            __m512 gate = _mm512_load_ps(ROW(0, i)), up = _mm512_load_ps(ROW(1, i));
            if (bias) gate = _mm512_add_ps(gate, widen16_masked(mask, bias + n));
            if (bias) up = _mm512_add_ps(up, widen16_masked(mask, bias + a->N + n));
            store_row(a, m + i, n, mask, _mm512_mul_ps(silu16(gate), up));
        }
    } else if (n + 32 <= a->N && !a->out_float) {
        bf16 *out = (bf16 *)a->out + m * a->N + n;
        const bf16 *residual = a->residual ? (const bf16 *)a->residual + m * a->N + n : NULL;
        for (int64_t i = 0; i < rows; i++, out += a->N) {
            __m512 low = _mm512_load_ps(ROW(0, i)), high = _mm512_load_ps(ROW(1, i));
            if (bias) low = _mm512_add_ps(low, widen16(bias + n)), high = _mm512_add_ps(high, widen16(bias + n + 16));
            if (residual) {
                low = _mm512_add_ps(round16(low), widen16(residual + i * a->N));
                high = _mm512_add_ps(round16(high), widen16(residual + i * a->N + 16));
            }
            _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    } else {
        for (int j = 0; j < 2 && outputs[j] < a->N; j++) {
            __mmask16 mask = (__mmask16)(0xffff >> (16 - min64(16, a->N - outputs[j])));
            for (int64_t i = 0; i < rows; i++) {
                __m512 sum = _mm512_load_ps(ROW(j, i));
                if (bias) sum = _mm512_add_ps(sum, widen16_masked(mask, bias + outputs[j]));
                store_row(a, m + i, outputs[j], mask, sum);
            }
        }
    }
#undef ROW
}

/* C (+)= 32 rows of x, `stride` bytes apart, times `k_tiles` tiles of a packed pair; `add`: onto what c holds. */
static inline void multiply_32x32(const char *x, int64_t stride, const char *w, int64_t k_tiles, int add, float c[4][256]) {
    const char *below = x + 16 * stride;
    if (add) {
        _tile_loadd(0, c[0], 64);
        _tile_loadd(1, c[1], 64);
        _tile_loadd(2, c[2], 64);
        _tile_loadd(3, c[3], 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < k_tiles; k++) {
        /* "stream": weights pass through the first-level cache without driving out the 32 rows of x. */
        _tile_loadd(4, x + k * 64, stride);
        _tile_stream_loadd(6, w + k * 2048, 64);
        _tile_stream_loadd(7, w + k * 2048 + 1024, 64);
        _tile_loadd(5, below + k * 64, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
}

static void gemm_body(void *args, int thread, int num_threads) {
    const linear_t *a = args;
    int64_t pair_begin, pair_end, begin, end, k_tiles = a->K / 32, pair_bytes = k_tiles * 2048;
    int64_t pairs = a->silu_mul ? (a->N + 15) / 16 : (a->N + 31) / 32;
    share_rectangle(a, pairs, thread, num_threads, &pair_begin, &pair_end, &begin, &end);
    if (pair_begin == pair_end || begin == end) return;
    int64_t step = PANEL_BYTES / pair_bytes;
    step = min64(step < 1 ? 1 : step, pair_end - pair_begin);
    int64_t blocks = (k_tiles + K_TILES - 1) / K_TILES, block = (k_tiles + blocks - 1) / blocks;
    char *panel = scratch((size_t)(step * pair_bytes));
    bf16 *unpacked = a->scales ? scratch((size_t)(16 * a->K) * sizeof(bf16)) : NULL;
    float(*sums)[4][256] = scratch((size_t)step * 4096);
    bf16 *tail = NULL; /* the last rows, followed by zeros: a tile reads 32 */
    if ((end - begin) % 32) {
        int64_t rows = (end - begin) % 32;
        tail = scratch((size_t)(32 * a->K) * sizeof(bf16));
        for (int64_t i = 0; i < rows; i++)
            memcpy(tail + i * a->K, (const bf16 *)a->x + (end - rows + i) * a->ldx, (size_t)a->K * sizeof(bf16));
        memset(tail + rows * a->K, 0, (size_t)((32 - rows) * a->K) * sizeof(bf16));
    }
    configure_tiles();
    for (int64_t first = pair_begin; first < pair_end; first += step) {
        int64_t last = min64(first + step, pair_end);
        pack_weights(a, first, last, unpacked, panel);
        for (int64_t m = begin; m < end; m += 32) {
            int64_t rows = min64(32, end - m);
            const bf16 *x = rows < 32 ? tail : (const bf16 *)a->x + m * a->ldx;
            int64_t stride = (rows < 32 ? a->K : a->ldx) * (int64_t)sizeof(bf16);
            for (int64_t k = 0; k < k_tiles; k += block)
                for (int64_t pair = first; pair < last; pair++) {
                    int64_t outputs[2];
                    outputs_of(a, pair, outputs);
                    int final = k + block >= k_tiles;
                    float(*c)[256] = sums[blocks > 1 ? pair - first : 0];
                    multiply_32x32((const char *)x + k * 64, stride, panel + (pair - first) * pair_bytes + k * 2048,
                                   min64(block, k_tiles - k), k > 0, c);
                    if (final) store_tiles(a, m, outputs, rows, c);
                }
        }
    }
    _tile_release();
    free(panel);
    free(unpacked);
    free(sums);
    free(tail);
}

/* linear_t on AMX, whichever way is the faster. */
static void multiply_bf16(linear_t *a, int num_threads) {
    if (a->M >= GEMM_ROWS)
        run(gemm_body, a, num_threads);
    else
        linear_amx(a, num_threads);
}

/* out[M, N] = x[M, K] . w^T for weights of 4 bits, see linear_t; K a multiple of 32, N >= 16. */
API void folo_linear_int4_bf16(const void *x, const void *w, const void *scales, const void *zeros, const void *bias,
                               const void *residual, void *out, int64_t M, int64_t K, int64_t N, int64_t group,
                               int64_t ldx, int silu_mul, int num_threads) {
    linear_t a = {x, w, bias, residual, out, NULL, M, K, N, ldx, silu_mul, 0, scales, zeros, group};
    multiply_bf16(&a, num_threads);
}

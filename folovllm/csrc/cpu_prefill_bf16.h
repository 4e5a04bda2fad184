/* Attention of prompt chunks (requests that compute several tokens) straight from the pages, in bfloat16 on AMX tiles.
 *
 * Flash attention (Dao et al. 2022): keys pass in blocks of PREFILL_KEYS, and per query row three things are kept: the
 * largest score so far m, the sum l of e^(score - m), and the sum of e^(score - m) * value. Rows are the (token, head)
 * pairs of one KV head. Everything is held transposed, 16 rows side by side in a vector register:
 *
 *     S^T = K . Q^T                   P^T = e^(S^T - m)              O^T += V^T . P^T
 *     [ 16 keys x 16 rows ]           the largest, the sum and       [ 16 dims x 16 rows ]
 *     A: keys, as in the page         the rescaling are sums and     A: values, transposed
 *     B: queries in VNNI order        products of whole vectors      B: two vectors of P^T, interleaved
 *
 * So no sum runs across a register, and P needs no transposing on its way to the second product; values do, but once
 * for all rows of an item. An item of work is one KV head of some consecutive tokens of one request: per block of keys,
 * keys and values are packed once and then met by all row tiles of the item. Threads take items from one list, the
 * costly ones first. A row's sums run over the same blocks in the same order whatever shares its tile or its item: the
 * result is the same, to the bit, for any number of threads, any batch, and any cut of a prompt into chunks.
 *
 * A row sees the keys up to its own position; of a block beyond it, nothing is computed:
 *
 *     keys   0 .. 63   64 .. 127     a tile whose first row sees 70 keys and whose last sees 85: of the second block
 *            whole     masked        keys 64 .. 95 are scored, and those past a row's position become -inf
 *
 * It is included after cpu_linear_bf16.h, for its transpose16 and tiles, and needs HAVE_AMX.
 */
#define PREFILL_KEYS 64        /* keys per block; a multiple of 64 */
#define PREFILL_SUMS (1 << 17) /* most floats of an item's sums: they stay in the second-level cache */

typedef struct {
    int64_t cost;
    int32_t chunk, kv_head, first, last; /* tokens [first, last) of the chunk */
} prefill_item_t;

typedef struct {
    const bf16 *q, *kv_cache; /* [T, H, D], [2, Nb, Bs, Hkv, D] */
    const int32_t *table;     /* [B, table_stride] */
    const int32_t *chunks;    /* [n, 4]: row of table, first and one past the last row of q and out, context length */
    bf16 *out;                /* [T, H, D] */
    const prefill_item_t *items;
    int64_t num_items, next; /* next: the first item that no thread has taken */
    int64_t H, Hkv, D, Bs, block_stride, value_offset, q_stride, table_stride, item_rows;
    float scale;
} prefill_t;

/* One thread's scratch. Tiles are 1024 bytes each, one after the other. */
typedef struct {
    char *keys;      /* [PREFILL_KEYS / 16][D / 32] tiles of [16 keys][32 dims] */
    char *values;    /* [PREFILL_KEYS / 32][D / 16] tiles of [16 dims][32 keys] */
    char *queries;   /* per row tile [D / 32] tiles of [16 pairs of dims][16 rows][2] */
    char *weights;   /* twice [PREFILL_KEYS / 32] tiles of [16 pairs of keys][16 rows][2]: P^T of a row tile */
    float *scores;   /* twice [PREFILL_KEYS][16 rows]: S^T of a row tile */
    float *sums;     /* per row tile [D][16 rows]: O^T */
    float *largest;  /* per row tile [16]: m, in units of ln 2 */
    float *totals;   /* per row tile [16]: l */
    int32_t *sees;   /* per row tile [16]: the last key that a row may see */
    const bf16 *ahead[PREFILL_KEYS]; /* the next block's keys in their pages */
    int num_ahead, num_fetched;      /* of these, the first are on their way into the cache */
} prefill_scratch_t;

/* For 4 (or 2) tiles j: C_j (+)= sum over k < steps of A_jk . B_k; `add`: onto what c holds. Strides are in bytes. */
static inline __attribute__((always_inline)) void multiply_tiles(float *c, const char *a, int64_t a_tile,
                                                                 int64_t a_step, const char *b, int64_t steps,
                                                                 int four, int add) {
    if (add) {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + 256, 64);
        if (four) _tile_loadd(2, c + 512, 64);
        if (four) _tile_loadd(3, c + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t k = 0; k < steps; k++, a += a_step, b += 1024) {
        _tile_loadd(6, b, 64);
        _tile_loadd(4, a, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, a + a_tile, 64);
        _tile_dpbf16ps(1, 5, 6);
        if (four) {
            _tile_loadd(4, a + 2 * a_tile, 64);
            _tile_dpbf16ps(2, 4, 6);
            _tile_loadd(5, a + 3 * a_tile, 64);
            _tile_dpbf16ps(3, 5, 6);
        }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    if (four) _tile_stored(2, c + 512, 64);
    if (four) _tile_stored(3, c + 768, 64);
}

/* The item's queries in VNNI order, and its rows' running numbers at their start. Rows past the end are zero. */
static void start_rows(const prefill_t *a, const prefill_item_t *item, int64_t num_rows, prefill_scratch_t *s) {
    const int32_t *chunk = a->chunks + item->chunk * 4;
    int64_t D = a->D, G = a->H / a->Hkv, computed = chunk[3] - (chunk[2] - chunk[1]);
    for (int64_t r0 = 0; r0 < num_rows; r0 += 16) {
        const bf16 *q[16];
        for (int i = 0; i < 16; i++) {
            int64_t row = min64(r0 + i, num_rows - 1), token = item->first + row / G;
            q[i] = a->q + (chunk[1] + token) * a->q_stride + (item->kv_head * G + row % G) * D;
            s->sees[r0 + i] = (int32_t)(computed + token);
            s->largest[r0 + i] = -INFINITY;
            s->totals[r0 + i] = 0;
        }
        for (int64_t d = 0; d < D; d += 32) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = r0 + i < num_rows ? _mm512_loadu_si512(q[i] + d) : _mm512_setzero_si512();
            transpose16(rows);
            char *tile = s->queries + r0 * D * 2 + d * 32;
            for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 64, rows[i]);
        }
    }
    memset(s->sums, 0, (size_t)((num_rows + 15) / 16 * 16 * D) * sizeof(float));
}

/* The next item that no thread has, or NULL. */
static const prefill_item_t *take_item(prefill_t *a) {
    int64_t i = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED);
    return i < a->num_items ? a->items + i : NULL;
}

/* Look up where the keys of an item's block from `first` on lie: s->ahead. */
static void look_ahead(const prefill_t *a, const prefill_item_t *item, int64_t first, prefill_scratch_t *s) {
    const int32_t *chunk = a->chunks + item->chunk * 4, *table = a->table + chunk[0] * a->table_stride;
    int64_t context = chunk[3] - (chunk[2] - chunk[1]) + item->last;
    int64_t page = first / a->Bs, in_page = first % a->Bs, row = a->Hkv * a->D;
    s->num_ahead = (int)min64(PREFILL_KEYS, context - first);
    s->num_fetched = 0;
    for (int j = 0; j < s->num_ahead; j++) {
        s->ahead[j] = a->kv_cache + table[page] * a->block_stride + in_page * row + item->kv_head * a->D;
        if (++in_page == a->Bs) page++, in_page = 0;
    }
}

/* Ask for `count` more tokens of the next block: pages come from far, and in no order that the processor foresees. */
static inline __attribute__((always_inline)) void fetch_ahead(const prefill_t *a, prefill_scratch_t *s, int count) {
    for (; count > 0 && s->num_fetched < s->num_ahead; count--) {
        const bf16 *key = s->ahead[s->num_fetched++], *value = key + a->value_offset;
        for (int64_t d = 0; d < a->D; d += 32) {
            _mm_prefetch((const char *)(key + d), _MM_HINT_T1);
            _mm_prefetch((const char *)(value + d), _MM_HINT_T1);
        }
    }
}

/* Copy keys and transpose values of the block looked up; zeros follow up to a multiple of 32. */
static void pack_block(const prefill_t *a, prefill_scratch_t *s) {
    static const bf16 zeros[32];
    int64_t D = a->D, to_value = a->value_offset;
    int count = s->num_ahead, padded = (count + 31) / 32 * 32;
    for (int j = 0; j < padded; j++) {
        char *to = s->keys + j / 16 * (D / 32) * 1024 + j % 16 * 64;
        for (int64_t d = 0; d < D; d += 32)
            _mm512_store_si512(to + d * 32, _mm512_loadu_si512(j < count ? s->ahead[j] + d : zeros));
    }
    for (int j = 0; j < padded; j += 32) {
        for (int64_t d = 0; d < D; d += 32) {
            __m512i low[16], high[16]; /* pairs of keys: dims 0-3, 8-11, 16-19, 24-27 of 32, and those between */
            for (int i = 0; i < 16; i++) {
                int even = j + 2 * i, odd = even + 1;
                __m512i v0 = _mm512_loadu_si512(even < count ? s->ahead[even] + to_value + d : zeros);
                __m512i v1 = _mm512_loadu_si512(odd < count ? s->ahead[odd] + to_value + d : zeros);
                low[i] = _mm512_unpacklo_epi16(v0, v1);
                high[i] = _mm512_unpackhi_epi16(v0, v1);
            }
            transpose16(low);
            transpose16(high);
            char *tile = s->values + (j / 32 * (D / 16) + d / 16) * 1024;
            for (int i = 0; i < 16; i++) {
                int dim = i / 4 * 8 + i % 4;
                _mm512_store_si512(tile + dim * 64, low[i]);
                _mm512_store_si512(tile + (dim + 4) * 64, high[i]);
            }
        }
    }
}

/* S^T of `padded` keys (a multiple of 32) and one row tile. */
static inline void score_tile(int64_t D, const prefill_scratch_t *s, int64_t r0, int padded, float *scores) {
    int64_t tile = D / 32 * 1024;
    const char *queries = s->queries + r0 * D * 2;
    int j = 0;
    for (; j + 64 <= padded; j += 64)
        multiply_tiles(scores + j * 16, s->keys + j / 16 * tile, tile, 1024, queries, D / 32, 1, 0);
    if (j < padded) multiply_tiles(scores + j * 16, s->keys + j / 16 * tile, tile, 1024, queries, D / 32, 0, 0);
}

/* Mask, the new m and l, P^T into `weights`, and the sums so far brought to the new m; meanwhile `fetch` tokens of the
 * next block are asked for. */
static inline void weigh_tile(const prefill_t *a, prefill_scratch_t *s, int64_t r0, int64_t first_key, int padded,
                              int fetch, float *scores, char *weights) {
    const __m512 scale = _mm512_set1_ps(a->scale * 1.44269504f);
    const __m512i half = _mm512_set1_epi32(0x8000);
    __m512i sees = _mm512_load_si512(s->sees + r0);
    int64_t whole = s->sees[r0] + 1 - first_key; /* keys that all rows see: positions grow with the row */
    for (int64_t j = whole < 0 ? 0 : whole; j < padded; j++) {
        __mmask16 seen = _mm512_cmple_epi32_mask(_mm512_set1_epi32((int32_t)(first_key + j)), sees);
        __m512 x = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), _mm512_load_ps(scores + j * 16));
        _mm512_store_ps(scores + j * 16, x);
    }
    __m512 top[4];
    for (int i = 0; i < 4; i++) top[i] = _mm512_load_ps(scores + i * 16);
    for (int j = 4; j < padded; j += 4)
        for (int i = 0; i < 4; i++) top[i] = _mm512_max_ps(top[i], _mm512_load_ps(scores + (j + i) * 16));
    top[0] = _mm512_max_ps(_mm512_max_ps(top[0], top[1]), _mm512_max_ps(top[2], top[3]));
    __m512 before = _mm512_load_ps(s->largest + r0), m = _mm512_max_ps(before, _mm512_mul_ps(top[0], scale));
    __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
    int fetch_step = (fetch * 2 + padded - 1) / padded;
    for (int j = 0; j < padded; j += 2) {
        fetch_ahead(a, s, fetch_step);
        __m512 p0 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16), scale, m));
        __m512 p1 = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + j * 16 + 16), scale, m));
        sum0 = _mm512_add_ps(sum0, p0);
        sum1 = _mm512_add_ps(sum1, p1);
        /* Both rounded to bfloat16, the upper half of a float, and interleaved: p0 below, p1 above. */
        __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(p0), half), 16);
        __m512i high = _mm512_add_epi32(_mm512_castps_si512(p1), half);
        _mm512_store_si512(weights + j * 32, _mm512_mask_blend_epi16(0x55555555, high, low));
    }
    __m512 total = _mm512_load_ps(s->totals + r0), sum = _mm512_add_ps(sum0, sum1);
    if (_mm512_cmp_ps_mask(before, m, _CMP_NEQ_UQ)) {
        __m512 shrink = exp2_16(_mm512_sub_ps(before, m));
        float *sums = s->sums + r0 * a->D;
        for (int64_t d = 0; d < a->D; d++)
            _mm512_store_ps(sums + d * 16, _mm512_mul_ps(_mm512_load_ps(sums + d * 16), shrink));
        total = _mm512_mul_ps(total, shrink);
        _mm512_store_ps(s->largest + r0, m);
    }
    _mm512_store_ps(s->totals + r0, _mm512_add_ps(total, sum));
}

/* O^T += V^T . P^T of one row tile. */
static inline void add_tile(int64_t D, const prefill_scratch_t *s, int64_t r0, int padded, const char *weights) {
    int64_t step = D / 16 * 1024, d = 0;
    float *sums = s->sums + r0 * D;
    for (; d + 64 <= D; d += 64)
        multiply_tiles(sums + d * 16, s->values + d * 64, 1024, step, weights, padded / 32, 1, 1);
    if (d < D) multiply_tiles(sums + d * 16, s->values + d * 64, 1024, step, weights, padded / 32, 0, 1);
}

static void finish_rows(const prefill_t *a, const prefill_item_t *item, int64_t num_rows, const prefill_scratch_t *s) {
    int64_t D = a->D, G = a->H / a->Hkv, start = a->chunks[item->chunk * 4 + 1];
    for (int64_t r0 = 0; r0 < num_rows; r0 += 16) {
        __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_load_ps(s->totals + r0));
        for (int64_t d = 0; d < D; d += 16) {
            __m512i rows[16];
            for (int i = 0; i < 16; i++)
                rows[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(s->sums + r0 * D + (d + i) * 16), inverse));
            transpose16(rows);
            for (int64_t i = 0, row = r0; i < 16 && row < num_rows; i++, row++) {
                bf16 *to = a->out + ((start + item->first + row / G) * a->H + item->kv_head * G + row % G) * D + d;
                _mm256_storeu_si256((__m256i *)to, narrow16(_mm512_castsi512_ps(rows[i])));
            }
        }
    }
}

/* Work an item off, whose first block is looked up already; return the next one, likewise, or NULL. */
static const prefill_item_t *prefill_item(prefill_t *a, const prefill_item_t *item, prefill_scratch_t *s) {
    const prefill_item_t *next = NULL;
    int64_t num_rows = (item->last - item->first) * (a->H / a->Hkv), tiles = (num_rows + 15) / 16;
    start_rows(a, item, num_rows, s);
    int64_t context = s->sees[tiles * 16 - 1] + 1;
    for (int64_t first = 0, start = 0; first < context; first += PREFILL_KEYS) {
        pack_block(a, s);
        s->num_ahead = 0;
        if (first + PREFILL_KEYS < context)
            look_ahead(a, item, first + PREFILL_KEYS, s);
        else if ((next = take_item(a)))
            look_ahead(a, next, 0, s);
        while (s->sees[start * 16 + 15] < first) start++; /* row tiles that have seen all of theirs */
        int fetch = (int)(s->num_ahead / (tiles - start)) + 1;
        /* Three row tiles are under way at once, so that the matrix unit has work whose operands are there while the
         * vector units are at the exponentials. */
#define PADDED(t) (((int)min64(PREFILL_KEYS, s->sees[(t) * 16 + 15] + 1 - first) + 31) / 32 * 32)
#define SCORES(t) (s->scores + ((t) & 1) * PREFILL_KEYS * 16)
#define WEIGHTS(t) (s->weights + ((t) & 1) * PREFILL_KEYS * 32)
        score_tile(a->D, s, start * 16, PADDED(start), SCORES(start));
        for (int64_t t = start; t < tiles; t++) {
            if (t + 1 < tiles) score_tile(a->D, s, t * 16 + 16, PADDED(t + 1), SCORES(t + 1));
            if (t > start) add_tile(a->D, s, t * 16 - 16, PADDED(t - 1), WEIGHTS(t - 1));
            weigh_tile(a, s, t * 16, first, PADDED(t), fetch, SCORES(t), WEIGHTS(t));
        }
        add_tile(a->D, s, tiles * 16 - 16, PADDED(tiles - 1), WEIGHTS(tiles - 1));
#undef PADDED
#undef SCORES
#undef WEIGHTS
    }
    finish_rows(a, item, num_rows, s);
    return next;
}

static void prefill_body(void *args, int thread, int num_threads) {
    (void)thread, (void)num_threads;
    prefill_t *a = args;
    size_t D = (size_t)a->D, rows = (size_t)a->item_rows, block = PREFILL_KEYS * D * 2;
    size_t sizes[] = {block, block, rows * D * 2, PREFILL_KEYS * 64, PREFILL_KEYS * 128, rows * D * 4, rows * 12};
    char *memory = NULL, *parts[7];
    for (int pass = 0; pass < 2; pass++) { /* measure, then place */
        size_t offset = 0;
        for (int i = 0; i < 7; i++) {
            parts[i] = memory + offset;
            offset += (sizes[i] + 63) / 64 * 64;
        }
        if (!pass) memory = scratch(offset);
    }
    float *numbers = (float *)parts[6];
    prefill_scratch_t s = {parts[0], parts[1], parts[2], parts[3], (float *)parts[4], (float *)parts[5],
                           numbers, numbers + rows, (int32_t *)(numbers + 2 * rows), {NULL}, 0, 0};
    configure_tiles();
    const prefill_item_t *item = take_item(a);
    if (item) look_ahead(a, item, 0, &s);
    while (item) item = prefill_item(a, item, &s);
    _tile_release();
    free(memory);
}

static int costlier(const void *one, const void *other) {
    int64_t x = ((const prefill_item_t *)one)->cost, y = ((const prefill_item_t *)other)->cost;
    return (x < y) - (x > y);
}

/* Attention of n chunks, see prefill_t; D is a multiple of 32, scale > 0, every chunk has a token.
 * An item has 16 tokens or a multiple, so that its row tiles are full for any G: as many as leave each thread 8. */
API void folo_paged_prefill_bf16(const void *q, const void *kv_cache, const int32_t *table, const int32_t *chunks,
                                 void *out, int64_t n, int64_t H, int64_t Hkv, int64_t D, int64_t Bs,
                                 int64_t block_stride, int64_t value_offset, int64_t q_stride, int64_t table_stride,
                                 float scale, int num_threads) {
    int64_t tokens = 0, longest = 0, num_items = 0, G = H / Hkv;
    for (int64_t c = 0; c < n; c++) {
        int64_t length = chunks[c * 4 + 2] - chunks[c * 4 + 1];
        tokens += length;
        if (length > longest) longest = length;
    }
    int64_t width = tokens * Hkv / (8 * num_threads) / 16 * 16;
    width = min64(min64(width, PREFILL_SUMS / (G * D) / 16 * 16), (longest + 15) / 16 * 16);
    if (width < 16) width = 16;
    for (int64_t c = 0; c < n; c++) num_items += (chunks[c * 4 + 2] - chunks[c * 4 + 1] + width - 1) / width * Hkv;
    prefill_item_t *items = scratch((size_t)num_items * sizeof *items), *item = items;
    for (int64_t c = 0; c < n; c++) {
        int64_t length = chunks[c * 4 + 2] - chunks[c * 4 + 1], computed = chunks[c * 4 + 3] - length;
        for (int64_t first = 0; first < length; first += width) {
            int64_t last = min64(first + width, length);
            int64_t cost = (last - first + 16) * (computed + (first + last) / 2);
            for (int64_t h = 0; h < Hkv; h++)
                *item++ = (prefill_item_t){cost, (int32_t)c, (int32_t)h, (int32_t)first, (int32_t)last};
        }
    }
    qsort(items, (size_t)num_items, sizeof *items, costlier);
    prefill_t a = {q, kv_cache, table, chunks, out, items, num_items, 0, H, Hkv, D, Bs, block_stride,
                   value_offset, q_stride, table_stride, width * G, scale};
    run(prefill_body, &a, num_threads);
    free(items);
}

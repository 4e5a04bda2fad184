/* The kernels of one dtype: cpu_kernels.c includes this file once for float32 and once for bfloat16.
 *
 * T_ is the type in memory, LOAD and STORE convert it to and from float, NAME(f) is f_f32 or f_bf16. Loops are plain,
 * for the compiler to vectorise; where bfloat16 has better instructions, `#if IS_BF16 && HAVE_AVX512_BF16` uses them.
 */

/* ---- linear ---------------------------------------------------------------------------------------------------- */

/* out[j] = dot(w row j, x) for `rows` rows of w (1 to 4), that lie `stride` apart: four streams from memory at once. */
static inline void NAME(dot_rows)(const T_ *x, const T_ *w, int64_t stride, int rows, int64_t K, float *out) {
    const T_ *w0 = w, *w1 = w + (rows > 1 ? stride : 0), *w2 = w + (rows > 2 ? 2 * stride : 0),
             *w3 = w + (rows > 3 ? 3 * stride : 0);
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#if IS_BF16 && HAVE_AVX512_BF16
    __m512 a0 = _mm512_setzero_ps(), a1 = a0, a2 = a0, a3 = a0;
    for (int64_t k = 0; k < K; k += 32) {
        __mmask32 mask = K - k >= 32 ? 0xffffffff : (1u << (K - k)) - 1;
#define PART(p) ((__m512bh)_mm512_maskz_loadu_epi16(mask, (p) + k))
        __m512bh xv = PART(x);
        a0 = _mm512_dpbf16_ps(a0, PART(w0), xv);
        a1 = _mm512_dpbf16_ps(a1, PART(w1), xv);
        a2 = _mm512_dpbf16_ps(a2, PART(w2), xv);
        a3 = _mm512_dpbf16_ps(a3, PART(w3), xv);
#undef PART
    }
    s0 = _mm512_reduce_add_ps(a0), s1 = _mm512_reduce_add_ps(a1), s2 = _mm512_reduce_add_ps(a2);
    s3 = _mm512_reduce_add_ps(a3);
#else
    SIMD_SUM(s0, s1, s2, s3)
    for (int64_t k = 0; k < K; k++) {
        float xv = LOAD(x[k]);
        s0 += LOAD(w0[k]) * xv;
        s1 += LOAD(w1[k]) * xv;
        s2 += LOAD(w2[k]) * xv;
        s3 += LOAD(w3[k]) * xv;
    }
#endif
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

static inline float NAME(rounded)(float x) { return LOAD(STORE(x)); }

static void NAME(linear_body)(void *args, int thread, int num_threads) {
    const linear_t *a = args;
    const T_ *x = a->x, *w = a->w, *bias = a->bias, *residual = a->residual;
    int64_t begin, end;
    share(a->N, thread, num_threads, &begin, &end);
    for (int64_t n = begin; n < end; n += 4) {
        int rows = (int)min64(4, end - n);
        for (int64_t m = 0; m < a->M; m++) {
            float sum[4], up[4];
            NAME(dot_rows)(x + m * a->ldx, w + n * a->K, a->K, rows, a->K, sum);
            if (a->silu_mul) NAME(dot_rows)(x + m * a->ldx, w + (a->N + n) * a->K, a->K, rows, a->K, up);
            for (int j = 0; j < rows; j++) {
                float y = sum[j] + (bias ? LOAD(bias[n + j]) : 0.0f);
                if (a->silu_mul) {
                    float u = up[j] + (bias ? LOAD(bias[a->N + n + j]) : 0.0f);
                    y = silu(y) * u;
                }
                if (residual) y = NAME(rounded)(y) + LOAD(residual[m * a->N + n + j]);
                if (a->out_float)
                    ((float *)a->out)[m * a->N + n + j] = y;
                else
                    ((T_ *)a->out)[m * a->N + n + j] = STORE(y);
            }
        }
    }
}

/* out[M, N] = x[M, K] . w^T, see linear_t. */
API void NAME(folo_linear)(const void *x, const void *w, const void *bias, const void *residual, void *out, int64_t M,
                           int64_t K, int64_t N, int64_t ldx, int silu_mul, int out_float, int num_threads) {
    linear_t a = {x, w, bias, residual, out, NULL, M, K, N, ldx, silu_mul, out_float, NULL, NULL, 0};
#if IS_BF16 && HAVE_AVX512_BF16 && HAVE_AMX
    if (amx_allowed && K % 32 == 0 && N >= 16) {
        multiply_bf16(&a, num_threads);
        return;
    }
#endif
    run(NAME(linear_body), &a, num_threads);
}

/* ---- Norms and activation --------------------------------------------------------------------------------------- */

#define SERIAL_ELEMENTS 32768 /* less work than this is done before a second thread has joined */

static inline float NAME(inverse_rms)(const T_ *x, int64_t E, float eps) {
    float sum = 0;
    SIMD_SUM(sum)
    for (int64_t i = 0; i < E; i++) {
        float v = LOAD(x[i]);
        sum += v * v;
    }
    return 1.0f / sqrtf(sum / (float)E + eps);
}

static void NAME(norm_body)(void *args, int thread, int num_threads) {
    const norm_t *a = args;
    const T_ *weight = a->weight;
    int64_t begin, end, E = a->E;
    share(a->T, thread, num_threads, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        const T_ *x = (const T_ *)a->x + t * a->ldx;
        T_ *out = (T_ *)a->out + t * E;
        T_ *residual = a->residual ? (T_ *)a->residual + t * E : NULL;
        int64_t i = 0;
#if IS_BF16 && HAVE_AVX512_BF16
        for (; residual && i + 16 <= E; i += 16)
            _mm256_storeu_si256((__m256i *)(residual + i), narrow16(_mm512_add_ps(widen16(residual + i), widen16(x + i))));
#endif
        if (residual) {
            for (; i < E; i++) residual[i] = STORE(LOAD(residual[i]) + LOAD(x[i]));
            x = residual;
        }
        float scale = NAME(inverse_rms)(x, E, a->eps);
        i = 0;
#if IS_BF16 && HAVE_AVX512_BF16
        for (__m512 factor = _mm512_set1_ps(scale); i + 16 <= E; i += 16) {
            __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(widen16(x + i), factor), widen16(weight + i));
            _mm256_storeu_si256((__m256i *)(out + i), narrow16(scaled));
        }
#endif
        for (; i < E; i++) out[i] = STORE(LOAD(x[i]) * scale * LOAD(weight[i]));
    }
}

/* out[T, E] = x / sqrt(mean(x^2) + eps) * weight; with residual [T, E], that += x first and is what is normalised. */
API void NAME(folo_rms_norm)(const void *x, const void *weight, void *residual, void *out, int64_t T, int64_t E,
                             int64_t ldx, float eps, int num_threads) {
    norm_t a = {x, weight, residual, out, T, E, ldx, eps};
    run(NAME(norm_body), &a, T * E < SERIAL_ELEMENTS ? 1 : num_threads);
}

static void NAME(silu_body)(void *args, int thread, int num_threads) {
    const silu_t *a = args;
    int64_t begin, end, N = a->N;
    share(a->T, thread, num_threads, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        const T_ *gate = (const T_ *)a->gate_up + t * 2 * N, *up = gate + N;
        T_ *out = (T_ *)a->out + t * N;
        int64_t i = 0;
#if IS_BF16 && HAVE_AVX512_BF16
        for (; i + 16 <= N; i += 16) {
            __m512 product = _mm512_mul_ps(round16(silu16(widen16(gate + i))), widen16(up + i));
            _mm256_storeu_si256((__m256i *)(out + i), narrow16(product));
        }
#endif
        for (; i < N; i++) out[i] = STORE(NAME(rounded)(silu(LOAD(gate[i]))) * LOAD(up[i]));
    }
}

/* out[T, N] = silu(gate) * up for gate_up [T, 2 N]; the silu is rounded first. */
API void NAME(folo_silu_and_mul)(const void *gate_up, void *out, int64_t T, int64_t N, int num_threads) {
    silu_t a = {gate_up, out, T, N};
    run(NAME(silu_body), &a, T * N < SERIAL_ELEMENTS / 4 ? 1 : num_threads);
}

/* ---- Rotation, and the way into the cache ------------------------------------------------------------------------ */

/* out = head (normalised if weight) with each pair (i, i + D / 2) turned; out may be head. */
static inline void NAME(turn)(const T_ *head, const T_ *weight, float eps, const T_ *cosine, const T_ *sine, int64_t D,
                              float *buffer, T_ *out) {
    int64_t half = D / 2;
    if (weight) {
        float scale = NAME(inverse_rms)(head, D, eps);
        for (int64_t i = 0; i < D; i++) buffer[i] = NAME(rounded)(LOAD(head[i]) * scale * LOAD(weight[i]));
    } else {
        for (int64_t i = 0; i < D; i++) buffer[i] = LOAD(head[i]);
    }
    for (int64_t i = 0; i < half; i++)
        out[i] = STORE(buffer[i] * LOAD(cosine[i]) + buffer[half + i] * LOAD(sine[i]));
    for (int64_t i = 0; i < half; i++)
        out[half + i] = STORE(buffer[half + i] * LOAD(cosine[half + i]) + buffer[i] * LOAD(sine[half + i]));
}

static void NAME(rope_body)(void *args, int thread, int num_threads) {
    const rope_t *a = args;
    int64_t D = a->D, begin, end, width = (a->H + 2 * a->Hkv) * D, row = a->Hkv * D;
    share(a->T, thread, num_threads, &begin, &end);
    float *buffer = scratch((size_t)D * sizeof(float));
    T_ *turned = scratch((size_t)D * sizeof(T_));
    for (int64_t t = begin; t < end; t++) {
        T_ *query = (T_ *)a->qkv + t * width, *key = query + a->H * D, *value = key + row;
        const T_ *cosine = (const T_ *)a->cos_sin + a->positions[t] * D, *sine = cosine + a->max_position * D;
        for (int64_t h = 0; h < a->H; h++)
            NAME(turn)(query + h * D, a->q_weight, a->eps, cosine, sine, D, buffer, query + h * D);
        int64_t slot = a->slots[t];
        if (slot < 0 && a->keep_keys) continue;
        T_ *cached = slot < 0 ? NULL : (T_ *)a->kv_cache + slot / a->Bs * a->block_stride + slot % a->Bs * row;
        for (int64_t h = 0; h < a->Hkv; h++) {
            NAME(turn)(key + h * D, a->k_weight, a->eps, cosine, sine, D, buffer, turned);
            if (cached) memcpy(cached + h * D, turned, (size_t)D * sizeof(T_));
            if (!a->keep_keys) memcpy(key + h * D, turned, (size_t)D * sizeof(T_));
        }
        if (cached) memcpy(cached + a->value_offset, value, (size_t)row * sizeof(T_));
    }
    free(turned);
    free(buffer);
}

/* All between the QKV projection and attention, see rope_t. */
API void NAME(folo_rope_write_kv)(void *qkv, const int64_t *positions, const void *cos_sin, const void *q_weight,
                                  const void *k_weight, void *kv_cache, const int64_t *slots, int64_t T, int64_t H,
                                  int64_t Hkv, int64_t D, int64_t Bs, int64_t block_stride, int64_t value_offset,
                                  int64_t max_position, float eps, int keep_keys, int num_threads) {
    rope_t a = {qkv, positions, cos_sin, q_weight, k_weight, kv_cache, slots, T, H, Hkv, D, Bs, block_stride,
                value_offset, max_position, eps, keep_keys};
    run(NAME(rope_body), &a, T * (H + Hkv) * D < SERIAL_ELEMENTS / 2 ? 1 : num_threads);
}

/* ---- Attention of one new token per request ----------------------------------------------------------------------
 *
 * All contexts are laid end to end and cut into one equal part per thread, so that one long context keeps all threads
 * as busy as many short ones do:
 *
 *     request      0 0 0 0 0 0 0 0 1 1 1 2 2 2 2 2
 *     thread       0 0 0 0 0 0|1 1 1 1 1|2 2 2 2 2
 *                         cut ^   whole ^ whole
 *
 * A request that lies within one part is finished there. Of a cut one each thread leaves a partial result: per head the
 * largest score m, the sum l of e^(score - m), and the sum of e^(score - m) * value. Two such results are combined by
 * bringing both to the larger m (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). A thread
 * has at most two cut requests, its first and its last, hence two places for partial results.
 *
 * Requests that begin with the same blocks (a system prompt) meet these together: attend_shared.
 *
 * Within a part: tiles of 64 tokens; for each, all scores of a KV head's G query heads, then their sum of values. What
 * is here does that everywhere; with AMX, bfloat16 has attend_amx in cpu_linear_bf16.h instead.
 */

/* scores[j] = scale * dot(q, keys + offsets[j]) for `count` tokens. */
static inline void NAME(score)(const T_ *q, const T_ *keys, const int64_t *offsets, int count, int64_t D, float scale,
                               float *scores) {
    int j = 0;
#if IS_BF16 && HAVE_AVX512_BF16
    if (D % 32 == 0) {
        for (; j < count; j += 16) { /* past the end, the last token again */
            __m512i sums[16];
            for (int i = 0; i < 16; i++) sums[i] = _mm512_setzero_si512();
            const T_ *k[16];
            for (int i = 0; i < 16; i++) k[i] = keys + offsets[j + i < count ? j + i : count - 1];
            for (int64_t d = 0; d < D; d += 32) {
                __m512bh part = (__m512bh)_mm512_loadu_si512(q + d);
#pragma GCC unroll 16
                for (int i = 0; i < 16; i++)
                    sums[i] = _mm512_castps_si512(_mm512_dpbf16_ps(
                        _mm512_castsi512_ps(sums[i]), (__m512bh)_mm512_loadu_si512(k[i] + d), part));
            }
            transpose16(sums);
#define ADD(i, step)                                                                                                   \
    sums[i] = _mm512_castps_si512(                                                                                     \
        _mm512_add_ps(_mm512_castsi512_ps(sums[i]), _mm512_castsi512_ps(sums[(i) + (step)])))
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) ADD(i, 8);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) ADD(i, 4);
            ADD(0, 2), ADD(1, 2), ADD(0, 1);
#undef ADD
            _mm512_storeu_ps(scores + j, _mm512_mul_ps(_mm512_castsi512_ps(sums[0]), _mm512_set1_ps(scale)));
        }
        return;
    }
#endif
    for (; j < count; j++) {
        const T_ *k = keys + offsets[j];
        float sum = 0;
        SIMD_SUM(sum)
        for (int64_t d = 0; d < D; d++) sum += LOAD(q[d]) * LOAD(k[d]);
        scores[j] = sum * scale;
    }
}

/* acc[g] += sum over tokens of weights[g][j] * values[offsets[j]], g < G; acc [G, D], weights [G, DECODE_TILE]. */
static inline void NAME(add_values)(float *acc, const float *weights, const T_ *values, const int64_t *offsets,
                                    int count, int64_t G, int64_t D) {
#if IS_BF16 && HAVE_AVX512_BF16
    if (D % 32 == 0) {
        for (int64_t g0 = 0; g0 < G; g0 += 4) {
            int64_t heads = min64(4, G - g0);
            for (int64_t d = 0; d < D; d += 32) {
                __m512 low[4], high[4];
                const float *w[4];
                for (int g = 0; g < 4; g++) { /* fewer than four heads: the last one again, not stored */
                    int64_t head = g0 + (g < heads ? g : heads - 1);
                    low[g] = _mm512_loadu_ps(acc + head * D + d);
                    high[g] = _mm512_loadu_ps(acc + head * D + d + 16);
                    w[g] = weights + head * DECODE_TILE;
                }
#define ADD(g)                                                                                                         \
    low[g] = _mm512_fmadd_ps(_mm512_set1_ps(w[g][j]), v0, low[g]);                                                     \
    high[g] = _mm512_fmadd_ps(_mm512_set1_ps(w[g][j]), v1, high[g]);
#define ADD_ALL(ADDS)                                                                                                  \
    for (int j = 0; j < count; j++) {                                                                                  \
        const T_ *v = values + offsets[j] + d;                                                                         \
        __m512 v0 = widen16(v), v1 = widen16(v + 16);                                                                  \
        ADDS                                                                                                           \
    }
                if (heads == 1) {
                    ADD_ALL(ADD(0))
                } else if (heads == 2) {
                    ADD_ALL(ADD(0) ADD(1))
                } else if (heads == 3) {
                    ADD_ALL(ADD(0) ADD(1) ADD(2))
                } else {
                    ADD_ALL(ADD(0) ADD(1) ADD(2) ADD(3))
                }
#undef ADD
#undef ADD_ALL
                for (int64_t g = 0; g < heads; g++) {
                    _mm512_storeu_ps(acc + (g0 + g) * D + d, low[g]);
                    _mm512_storeu_ps(acc + (g0 + g) * D + d + 16, high[g]);
                }
            }
        }
        return;
    }
#endif
    for (int64_t g = 0; g < G; g++)
        for (int j = 0; j < count; j++) {
            const T_ *v = values + offsets[j];
            float weight = weights[g * DECODE_TILE + j], *a = acc + g * D;
            for (int64_t d = 0; d < D; d++) a[d] += weight * LOAD(v[d]);
        }
}

/* Turn a tile's scores into weights e^(score - m), m the largest so far; rescale what was summed with a smaller. */
static inline void NAME(soften)(float *scores, int count, float *m, float *l, float *acc, int64_t D) {
    float top = *m, sum = 0;
    for (int j = 0; j < count; j++) top = scores[j] > top ? scores[j] : top;
    if (top > *m) {
        float shrink = exp_approx(*m - top);
        for (int64_t d = 0; d < D; d++) acc[d] *= shrink;
        *l *= shrink;
        *m = top;
    }
    SIMD_SUM(sum)
    for (int j = 0; j < count; j++) {
        scores[j] = exp_approx(scores[j] - top);
        sum += scores[j];
    }
    *l += sum;
}

/* Ask for part `i` of `n` of a tile's keys and values: pages lie anywhere, so the processor cannot guess the next. */
static inline void NAME(prefetch)(const decode_t *a, const decode_tile_t *tile, int64_t i, int64_t n) {
    int64_t bytes = a->Hkv * a->D * (int64_t)sizeof(T_);
    for (int64_t j = tile->count * i / n; j < tile->count * (i + 1) / n; j++) {
        const char *key = (const char *)((const T_ *)a->kv_cache + tile->offsets[j]);
        const char *value = key + a->value_offset * (int64_t)sizeof(T_);
        for (int64_t byte = 0; byte < bytes; byte += 64) {
            __builtin_prefetch(key + byte, 0, 2);
            __builtin_prefetch(value + byte, 0, 2);
        }
    }
}

/* Attend with one request's query over a tile, `next` being the one after it. state: m [H], l [H], acc [H, D]. */
static void NAME(attend)(const decode_t *a, const decode_tile_t *tile, const decode_tile_t *next, const T_ *q,
                         float *state) {
    int64_t H = a->H, Hkv = a->Hkv, D = a->D, G = H / Hkv;
    const T_ *keys = a->kv_cache, *values = keys + a->value_offset;
    float *m = state, *l = m + H, *acc = l + H;
    float scores[G * DECODE_TILE] __attribute__((aligned(64)));
    for (int64_t kv = 0; kv < Hkv; kv++) {
        for (int64_t g = 0; g < G; g++) {
            int64_t h = kv * G + g;
            float *row = scores + g * DECODE_TILE;
            for (int first = 0; first < tile->count; first += 16) {
                /* A few lines at a time: they come while this computes. */
                NAME(prefetch)(a, next, h * 4 + first / 16, H * 4);
                NAME(score)(q + h * D, keys + kv * D, tile->offsets + first, (int)min64(16, tile->count - first), D,
                            a->scale, row + first);
            }
            NAME(soften)(row, tile->count, m + h, l + h, acc + h * D, D);
        }
        NAME(add_values)(acc + kv * G * D, scores, values + kv * D, tile->offsets, tile->count, G, D);
    }
}

static void NAME(write_attended)(const decode_t *a, int64_t request, const float *state) {
    int64_t H = a->H, D = a->D, token_row = a->rows ? a->rows[request] : request;
    const float *l = state + H, *acc = l + H;
    T_ *out = (T_ *)a->out + token_row * H * D;
    for (int64_t h = 0; h < H; h++) {
        float inverse = 1.0f / l[h];
        for (int64_t d = 0; d < D; d++) out[h * D + d] = STORE(acc[h * D + d] * inverse);
    }
}

/* Attend with a request over a tile, on AMX where `packed` holds its query. */
static inline void NAME(attend_tile)(const decode_t *a, const decode_tile_t *tile, const decode_tile_t *next,
                                     const T_ *q, const char *packed, float *state) {
#if IS_BF16 && HAVE_AVX512_BF16 && HAVE_AMX
    if (packed) {
        attend_amx(a, tile, next, packed, state);
        return;
    }
#endif
    (void)packed;
    NAME(attend)(a, tile, next, q, state);
}

/* Begin a request: its running numbers, and its query as AMX wants it, if it does; return the query. */
static const T_ *NAME(start_request)(const decode_t *a, int64_t r, float *state, char *packed) {
    for (int64_t h = 0; h < a->H; h++) state[h] = -INFINITY;
    memset(state + a->H, 0, (size_t)(a->H * (a->D + 1)) * sizeof(float));
    const T_ *q = (const T_ *)a->q + (a->rows ? a->rows[r] : r) * a->q_stride;
#if IS_BF16 && HAVE_AVX512_BF16 && HAVE_AMX
    if (packed) pack_query(a, q, packed);
#endif
    (void)packed;
    return q;
}

/* The shared tokens of requests [first, last), each tile with all of them while it is in the cache ("cascade attention").
 * Each request meets the tiles in the order in which it would meet them alone: its result is the same, to the bit. */
static void NAME(attend_shared)(const decode_t *a, int64_t first, int64_t last, float *states, char *packed) {
    int64_t size = a->H * (a->D + 2);
    decode_tile_t tiles[2], none = {{0}, 0};
    locate(a, &tiles[0], first, 0, a->shared);
    for (int64_t r = first; r < last; r++)
        NAME(start_request)(a, r, states + (r - first) * size, packed ? packed + (r - first) * a->packed_bytes : NULL);
    for (int64_t at = 0, i = 0; at < a->shared; at += DECODE_TILE, i ^= 1) {
        decode_tile_t *next = &tiles[i ^ 1];
        next->count = 0;
        if (at + DECODE_TILE < a->shared) locate(a, next, first, at + DECODE_TILE, a->shared);
        for (int64_t r = first; r < last; r++)
            NAME(attend_tile)(a, &tiles[i], r == first ? next : &none,
                              (const T_ *)a->q + (a->rows ? a->rows[r] : r) * a->q_stride,
                              packed ? packed + (r - first) * a->packed_bytes : NULL, states + (r - first) * size);
    }
}

static void NAME(decode_body)(void *args, int thread, int num_threads) {
    const decode_t *a = args;
    int64_t begin, end, r = 0, H = a->H, size = H * (a->D + 2);
    share(a->starts[a->n], thread, num_threads, &begin, &end);
    if (begin == end) return;
    float *partials = a->partials + thread * 3 * size; /* first, last, and one to work in */
    while (a->starts[r + 1] <= begin) r++;
    int64_t whole = a->starts[r] < begin ? r + 1 : r, whole_end = whole; /* the requests that lie within this part */
    while (whole_end < a->n && a->starts[whole_end + 1] <= end) whole_end++;
    int64_t count = a->shared && whole_end - whole > 1 ? whole_end - whole : 0;
    float *states = NULL;
    char *packed = NULL; /* of the requests that share, and one more */
#if IS_BF16 && HAVE_AVX512_BF16 && HAVE_AMX
    if (a->packed_bytes) {
        packed = scratch((size_t)((count + 1) * a->packed_bytes));
        configure_tiles();
    }
#endif
    if (count) {
        states = scratch((size_t)(count * size) * sizeof(float));
        NAME(attend_shared)(a, whole, whole_end, states, packed);
    }
#define SHARES(r) (count && (r) >= whole && (r) < whole_end)
    decode_tile_t tiles[2], *tile = &tiles[0], *next = &tiles[1];
    int64_t from = SHARES(r) ? a->shared : begin - a->starts[r]; /* where in request r we are */
    locate(a, tile, r, from, min64(a->starts[r + 1], end) - a->starts[r]);
    float *state = NULL;
    const T_ *q = NULL;
    char *query = NULL;
    while (a->starts[r] + from < end) {
        int cut_before = a->starts[r] < begin, cut_after = a->starts[r + 1] > end;
        if (!state && SHARES(r)) {
            state = states + (r - whole) * size;
            q = (const T_ *)a->q + (a->rows ? a->rows[r] : r) * a->q_stride;
            query = packed ? packed + (r - whole) * a->packed_bytes : NULL;
        } else if (!state) { /* the request's first tile here */
            state = partials + (cut_before ? 0 : cut_after ? 1 : 2) * size;
            query = packed ? packed + count * a->packed_bytes : NULL;
            q = NAME(start_request)(a, r, state, query);
        }
        from += tile->count;
        int done = a->starts[r] + from == a->starts[r + 1];
        int64_t following = done ? r + 1 : r, next_from = !done ? from : SHARES(r + 1) ? a->shared : 0;
        next->count = 0;
        if (following < a->n && a->starts[following] + next_from < end)
            locate(a, next, following, next_from, min64(a->starts[following + 1], end) - a->starts[following]);
        NAME(attend_tile)(a, tile, next, q, query, state);
        if (done && !cut_before) NAME(write_attended)(a, r, state);
        if (done) state = NULL;
        if (following == a->n) break;
        r = following, from = next_from;
        decode_tile_t *swap = tile;
        tile = next, next = swap;
    }
#undef SHARES
#if IS_BF16 && HAVE_AVX512_BF16 && HAVE_AMX
    if (packed) _tile_release();
#endif
    free(packed);
    free(states);
}

/* Bring partial results `into` and `other` of the same request together in `into`. */
static void NAME(combine)(float *into, const float *other, int64_t H, int64_t D) {
    for (int64_t h = 0; h < H; h++) {
        float m = into[h] > other[h] ? into[h] : other[h];
        float mine = exp_approx(into[h] - m), its = exp_approx(other[h] - m);
        into[h] = m;
        into[H + h] = into[H + h] * mine + other[H + h] * its;
        float *acc = into + 2 * H + h * D;
        const float *more = other + 2 * H + h * D;
        for (int64_t d = 0; d < D; d++) acc[d] = acc[d] * mine + more[d] * its;
    }
}

typedef struct {
    decode_t decode;
    int num_threads; /* that did take part */
} NAME(decode_task_t);

static void NAME(decode_entry)(void *args, int thread, int num_threads) {
    NAME(decode_task_t) *task = args;
    if (thread == 0) task->num_threads = num_threads;
    NAME(decode_body)(&task->decode, thread, num_threads);
}

/* Attention of n requests with one new token each, see decode_t. Contexts have at least one token. */
API void NAME(folo_paged_decode)(const void *q, const void *kv_cache, const int32_t *table, const int32_t *seq_lens,
                                 const int32_t *rows, const int32_t *reqs, void *out, int64_t n, int64_t H, int64_t Hkv,
                                 int64_t D, int64_t Bs, int64_t block_stride, int64_t value_offset, int64_t q_stride,
                                 int64_t table_stride, float scale, int num_threads) {
    int64_t size = H * (D + 2);
    int64_t *starts = scratch((size_t)(n + 1) * sizeof(int64_t));
    starts[0] = 0;
    for (int64_t r = 0; r < n; r++) starts[r + 1] = starts[r] + seq_lens[reqs ? reqs[r] : r];
    if (starts[n] < 64) num_threads = 1;
    float *partials = scratch((size_t)(num_threads * 3 * size) * sizeof(float));
    NAME(decode_task_t)
    task = {{q, kv_cache, table, seq_lens, rows, reqs, out, partials, starts, 0, 0, n, H, Hkv, D, Bs, block_stride,
             value_offset, q_stride, table_stride, scale}, 1};
    decode_t *decode = &task.decode;
    decode->shared = shared_tokens(decode);
#if IS_BF16 && HAVE_AVX512_BF16 && HAVE_AMX
    if (can_attend_amx(decode)) decode->packed_bytes = packed_query_bytes(decode);
#endif
    run(NAME(decode_entry), &task, num_threads);
    /* A cut request: its first part is the last place of a thread, the others are the first places of those after. */
    for (int thread = 0; thread + 1 < task.num_threads; thread++) {
        int64_t begin, end, next_begin, next_end;
        share(starts[n], thread, task.num_threads, &begin, &end);
        int64_t r = 0;
        while (r < n && starts[r + 1] <= end) r++;
        if (r == n || starts[r] >= end || starts[r] < begin) continue; /* nothing is cut here, or it began earlier */
        float *whole = partials + (thread * 3 + 1) * size;
        for (int other = thread + 1; other < task.num_threads; other++) {
            share(starts[n], other, task.num_threads, &next_begin, &next_end);
            if (next_begin >= starts[r + 1]) break;
            if (next_end > next_begin) NAME(combine)(whole, partials + other * 3 * size, H, D);
        }
        NAME(write_attended)(&task.decode, r, whole);
    }
    free(partials);
    free(starts);
}

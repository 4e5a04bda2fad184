/* All layers of a decoder in one call, for bfloat16 on AMX: the kernels above, in the order in which
 * models/fused_decoder.py calls them one by one.
 *
 * A step of a small model is some 240 calls. From Python each costs 5 to 10 microseconds of arguments, checks and tensors,
 * 2 ms of a step of 15; from here nothing, and Python's lock is free meanwhile. The threads are called together once
 * for all (run_as_team). It is to a CPU what a CUDA graph is to a
 * GPU. vLLM has none of this for CPUs: it leaves the calls to torch.compile.
 *
 * Legend: E hidden size, I inner size of the MLP; the others as in cpu_kernels.c.
 */
/* A projection's weight, as in linear_t; bias may be NULL, scales and zeros are unless it has 4 bits. */
typedef struct {
    const void *w, *bias, *scales, *zeros;
    int64_t group;
} weight_t;

typedef struct {
    const void *input_norm, *post_norm;   /* [E] */
    const void *q_norm, *k_norm;          /* [D], or NULL */
    weight_t qkv, o, gate_up, down;       /* [(H + 2 Hkv) D, E], [E, H D], [2 I, E], [E, I] */
    const void *cos_sin;                  /* [2, max_position, D] */
    void *kv_cache;                       /* [2, Nb, Bs, Hkv, D] */
} layer_t;

typedef struct {
    /* The model. */
    const layer_t *layers;
    const void *final_norm; /* [E] */
    int64_t num_layers, E, I, H, Hkv, D, Bs, block_stride, value_offset, max_position;
    /* The step. */
    void *hidden, *out;                  /* [T, E], overwritten; [T, E], or [num_outputs, E] */
    const int64_t *positions, *slots;    /* [T] */
    const int32_t *table, *seq_lens;     /* [B, table_stride], [B] */
    const int32_t *rows, *reqs, *chunks; /* of the decodes [num_decodes] or NULL; of the chunks [num_chunks, 4] */
    const int64_t *output_rows;          /* [num_outputs], ascending: the tokens that are wanted; NULL: all */
    int64_t T, table_stride, num_decodes, num_chunks, num_outputs;
    float eps, head_eps, scale;
    int num_threads;
} decoder_t;

/* out [T, N] (with silu_mul of 2 N outputs), or out += where `add`. */
static void project(const weight_t *w, const void *x, void *out, int64_t T, int64_t K, int64_t N, int silu_mul, int add,
                    int num_threads) {
    linear_t a = {x, w->w, w->bias, add ? out : NULL, out, NULL, T, K, N, K, silu_mul, 0, w->scales, w->zeros, w->group};
    multiply_bf16(&a, num_threads);
}

/* Move rows[i] of x [., width] to row i; the rows ascend, so none is overwritten before it has moved. */
static void keep_rows(bf16 *x, int64_t width, const int64_t *rows, int64_t num_rows) {
    for (int64_t i = 0; i < num_rows; i++)
        memmove(x + i * width, x + rows[i] * width, (size_t)width * sizeof(bf16));
}

static void run_layers(const void *args) {
    const decoder_t *a = args;
    int64_t T = a->T, E = a->E, width = (a->H + 2 * a->Hkv) * a->D, heads = a->H * a->D;
    int n = a->num_threads;
    bf16 *normed = scratch((size_t)(T * E) * sizeof(bf16)), *qkv = scratch((size_t)(T * width) * sizeof(bf16));
    bf16 *attended = scratch((size_t)(T * heads) * sizeof(bf16));
    bf16 *activated = scratch((size_t)(T * a->I) * sizeof(bf16));
    for (const layer_t *l = a->layers; l < a->layers + a->num_layers; l++) {
        folo_rms_norm_bf16(a->hidden, l->input_norm, NULL, normed, T, E, E, a->eps, n);
        project(&l->qkv, normed, qkv, T, E, width, 0, 0, n);
        folo_rope_write_kv_bf16(qkv, a->positions, l->cos_sin, l->q_norm, l->k_norm, l->kv_cache, a->slots, T, a->H,
                                a->Hkv, a->D, a->Bs, a->block_stride, a->value_offset, a->max_position, a->head_eps, 1,
                                n);
        if (a->num_decodes)
            folo_paged_decode_bf16(qkv, l->kv_cache, a->table, a->seq_lens, a->rows, a->reqs, attended, a->num_decodes,
                                   a->H, a->Hkv, a->D, a->Bs, a->block_stride, a->value_offset, width, a->table_stride,
                                   a->scale, n);
        if (a->num_chunks)
            folo_paged_prefill_bf16(qkv, l->kv_cache, a->table, a->chunks, attended, a->num_chunks, a->H, a->Hkv, a->D,
                                    a->Bs, a->block_stride, a->value_offset, width, a->table_stride, a->scale, n);
        if (a->output_rows && l == a->layers + a->num_layers - 1) { /* nothing reads the others any more */
            T = a->num_outputs;
            keep_rows(attended, heads, a->output_rows, T);
            keep_rows(a->hidden, E, a->output_rows, T);
        }
        project(&l->o, attended, a->hidden, T, heads, E, 0, 1, n);
        folo_rms_norm_bf16(a->hidden, l->post_norm, NULL, normed, T, E, E, a->eps, n);
        project(&l->gate_up, normed, activated, T, E, a->I, 1, 0, n);
        project(&l->down, activated, a->hidden, T, a->I, E, 0, 1, n);
    }
    folo_rms_norm_bf16(a->hidden, a->final_norm, NULL, a->out, T, E, E, a->eps, n);
    free(normed);
    free(qkv);
    free(attended);
    free(activated);
}

/* See decoder_t; T > 0. */
API void folo_decoder_bf16(const decoder_t *a) { run_as_team(run_layers, a, a->num_threads); }

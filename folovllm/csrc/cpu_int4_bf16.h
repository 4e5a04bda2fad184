/* Weights of 4 bits for the bfloat16 kernels: sixteen rows at a time become plain ones, in the cache, and go the way of
 * plain weights from there. Memory gives a quarter of the bytes, and memory is what few rows of x wait for.
 *
 * A row holds K / 2 bytes, 16 for 32 inputs; byte i has input i in its lower half and input 16 + i in its upper:
 *
 *     bytes        [ 0|16   1|17   2|18  ...  15|31 ]
 *     indices      [ 0 1 2 ... 15 | 16 17 ... 31 ]              two masks and a shift
 *     weights      table[indices]                               one instruction for 32
 *
 * The table has what each of the 16 integers means in this row and group, (q - zero) * scale, rounded to bfloat16: the
 * weight that dequantizing would give. It serves the 32 to 128 inputs of a group, so it costs little to make.
 */

/* Rows n .. n + count - 1 of the weights -> rows [count][K] of bfloat16; meanwhile rows `ahead` further on are asked for. */
static void unpack_int4(const linear_t *a, int64_t n, int64_t count, int64_t ahead, bf16 *rows) {
    const __m512 integers = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i lower = _mm256_set1_epi16(15);
    int64_t K = a->K, group = a->group, groups = K / group;
    for (int64_t r = n; r < n + count; r++, rows += K) {
        const uint8_t *bytes = (const uint8_t *)a->w + r * (K / 2), *zeros = (const uint8_t *)a->zeros + r * groups;
        const bf16 *scales = (const bf16 *)a->scales + r * groups;
        for (int64_t g = 0; g < groups; g++) {
            __m512 scale = _mm512_set1_ps(bf16_to_float(scales[g])), zero = _mm512_set1_ps((float)zeros[g]);
            __m512i table = _mm512_castsi256_si512(narrow16(_mm512_mul_ps(_mm512_sub_ps(integers, zero), scale)));
            for (int64_t k = g * group; k < (g + 1) * group; k += 32) {
                if (k % 128 == 0) _mm_prefetch((const char *)bytes + ahead * (K / 2) + k / 2, _MM_HINT_T1);
                __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(bytes + k / 2)));
                __m512i indices = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(words, lower)),
                                                     _mm256_srli_epi16(words, 4), 1);
                _mm512_store_si512(rows + k, _mm512_permutexvar_epi16(indices, table));
            }
        }
    }
}

/* Up to 16 rows of the weights from row n on, as bfloat16 rows K apart: where they lie, or in `rows` [16][K]. */
static inline const bf16 *sixteen_weights(const linear_t *a, int64_t n, int64_t count, int64_t ahead, bf16 *rows) {
    if (!a->scales) return (const bf16 *)a->w + n * a->K;
    unpack_int4(a, n, count, ahead, rows);
    return rows;
}

// The backward pass of causal attention in bf16, one head at a time. See parts/attention.py.
//
// A head's matrices fit into the cache of a core. The scores are computed again from queries and
// keys, a block of 128 x 128 at a time, as "FlashAttention-2" (Dao 2023) does, but transposed: a
// row is a key and a column is a query. With P = exp(scale K Qᵀ - logsumexp) there are
//
//     dV = P dO,   dS = scale P (V dOᵀ - delta),   dK = dS Q,   dQᵀ = Kᵀ dS
//
// for delta = the sums of dO O over the head's width.
//
// All five are products of bf16 matrices: see products.h.

#include <omp.h>

#include "products.h"

#define BLOCK 128  // keys and queries

// ---- What parts/attention.py passes: the same structures are there -------------------------------

struct heads {  // (B, nh, T, hs) with any strides but of the last dimension, whose is 1
    bf16 *numbers;
    long batch, head, token;  // the strides, in numbers
};

struct task {
    struct heads q, k, v, out, grad_out;
    struct heads grad_q, grad_k, grad_v;  // to be filled
    const float *logsumexp;               // (B, nh, T), with these strides
    long logsumexp_batch, logsumexp_head, logsumexp_token;
    long n_batch, n_head, n_tokens, width;  // B, nh, T, hs; hs is a multiple of 32
    float scale;
    char *scratch;  // (threads, scratch_bytes(T, hs)), on a cache line
    long n_threads;
};

// ---- A head --------------------------------------------------------------------------------------

// What a thread keeps of the head that it is at. L is T, rounded up to a multiple of 32.
struct head {
    long n_tokens, length, width;  // T, L, hs
    bf16 *k, *v;                   // (L, hs)
    bf16 *k_transposed;            // a block after the other: (hs, BLOCK)
    bf16 *q_across, *grad_across;  // queries and dO, transposed, (hs, L) in tiles
    bf16 *q_down, *grad_down;      // (L, hs) in tiles
    float *logsumexp, *delta;      // (L); the first in units of log 2
    float *grad_q;                 // (hs, L): dQᵀ
    float *grad_k, *grad_v;        // (BLOCK, hs)
    float *scores, *grad_p;        // (BLOCK, BLOCK)
    bf16 *p, *grad_scores;         // (BLOCK, BLOCK)
    bf16 *grad_scores_tiles;       // the same in tiles
};

// Cut the scratch of a thread into pieces. How many bytes it needs.
static long lay_out(struct head *head, char *scratch, long n_tokens, long width)
{
    long length = (n_tokens + 31) / 32 * 32;
    long blocks = (length + BLOCK - 1) / BLOCK;
    long used = 0;
    *head = (struct head){.n_tokens = n_tokens, .length = length, .width = width};
#define PIECE(name, count)                              \
    head->name = (void *)(scratch + used);              \
    used += ((count) * (long)sizeof *head->name + 63) / 64 * 64
    PIECE(k, length * width);
    PIECE(v, length * width);
    PIECE(k_transposed, blocks * BLOCK * width);
    PIECE(q_across, length * width);
    PIECE(grad_across, length * width);
    PIECE(q_down, length * width);
    PIECE(grad_down, length * width);
    PIECE(logsumexp, length);
    PIECE(delta, length);
    PIECE(grad_q, length * width);
    PIECE(grad_k, BLOCK * width);
    PIECE(grad_v, BLOCK * width);
    PIECE(scores, BLOCK * BLOCK);
    PIECE(grad_p, BLOCK * BLOCK);
    PIECE(p, BLOCK * BLOCK);
    PIECE(grad_scores, BLOCK * BLOCK);
    PIECE(grad_scores_tiles, BLOCK * BLOCK);
#undef PIECE
    return used;
}

long scratch_bytes(long n_tokens, long width)
{
    struct head head;
    return lay_out(&head, NULL, n_tokens, width);
}

static bf16 *find_head(struct heads heads, long batch, long head)
{
    return heads.numbers + batch * heads.batch + head * heads.head;
}

// (T, hs) with rows apart -> (L, hs) side by side; rows beyond T are zero.
static void copy_rows(bf16 *to, const bf16 *from, long row_stride, const struct head *head)
{
    long width = head->width;
    for (long t = 0; t < head->n_tokens; t++)
        memcpy(to + t * width, from + t * row_stride, 2 * width);
    memset(to + head->n_tokens * width, 0, 2 * width * (head->length - head->n_tokens));
}

// Two rows of 16 numbers, one behind the other -> their pairs.
static __m512i interleave(__m512i rows)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}

// (L, hs) -> its transpose in tiles: a tile has 32 numbers of 16 rows.
static void tile_across(bf16 *to, const bf16 *rows, const struct head *head)
{
    long width = head->width;
    for (long t = 0; t < head->length; t += 16)
        for (long c = 0; c < width; c += 2, to += 32)
            _mm512_storeu_si512(to, pairs_of_column(rows + t * width + c, width));
}

// (L, hs) in tiles: a tile has 32 rows of 16 numbers.
static void tile_down(bf16 *to, const bf16 *rows, const struct head *head)
{
    long width = head->width;
    for (long t = 0; t < head->length; t += 32)
        for (long c = 0; c < width; c += 16)
            for (long row = t; row < t + 32; row += 2, to += 32) {
                const bf16 *from = rows + row * width + c;
                __m512i two = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from));
                from += width;
                two = _mm512_inserti64x4(two, _mm256_loadu_si256((const __m256i *)from), 1);
                _mm512_storeu_si512(to, interleave(two));
            }
}

// (L, hs) -> its transpose, a block after the other: (hs, BLOCK).
static void transpose_blocks(bf16 *to, const bf16 *rows, const struct head *head)
{
    long width = head->width;
    for (long t = 0; t < head->length; t += 16)
        for (long c = 0; c < width; c += 2) {
            __m512i pairs = pairs_of_column(rows + t * width + c, width);
            bf16 *corner = to + t / BLOCK * BLOCK * width + c * BLOCK + t % BLOCK;
            _mm256_storeu_si256((__m256i *)corner, _mm512_cvtepi32_epi16(pairs));
            pairs = _mm512_srli_epi32(pairs, 16);
            _mm256_storeu_si256((__m256i *)(corner + BLOCK), _mm512_cvtepi32_epi16(pairs));
        }
}

static __m512 to_float(const bf16 *numbers)
{
    __m512i whole = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)numbers));
    return (__m512)_mm512_slli_epi32(whole, 16);
}

static float dot_product(const bf16 *a, const bf16 *b, long width)
{
    __m512 sum = _mm512_setzero_ps();
    for (long c = 0; c < width; c += 16)
        sum = _mm512_fmadd_ps(to_float(a + c), to_float(b + c), sum);
    return _mm512_reduce_add_ps(sum);
}

static void prepare(struct head *head, const struct task *task, long batch, long index)
{
    long width = head->width;
    copy_rows(head->k, find_head(task->k, batch, index), task->k.token, head);
    copy_rows(head->v, find_head(task->v, batch, index), task->v.token, head);
    transpose_blocks(head->k_transposed, head->k, head);

    // The place of dQ's sums is free until they begin.
    bf16 *rows = (bf16 *)head->grad_q;
    copy_rows(rows, find_head(task->q, batch, index), task->q.token, head);
    tile_across(head->q_across, rows, head);
    tile_down(head->q_down, rows, head);
    copy_rows(rows, find_head(task->grad_out, batch, index), task->grad_out.token, head);
    tile_across(head->grad_across, rows, head);
    tile_down(head->grad_down, rows, head);

    const bf16 *out = find_head(task->out, batch, index);
    const float *logsumexp = task->logsumexp;
    logsumexp += batch * task->logsumexp_batch + index * task->logsumexp_head;
    // Queries beyond T have dO = 0: they add nothing, if P is finite.
    memset(head->logsumexp, 0, 4 * head->length);
    memset(head->delta, 0, 4 * head->length);
    for (long t = 0; t < head->n_tokens; t++) {
        head->logsumexp[t] = LOG2_E * logsumexp[t * task->logsumexp_token];
        head->delta[t] = dot_product(rows + t * width, out + t * task->out.token, width);
    }
    memset(head->grad_q, 0, 4 * head->length * width);
}

// P and dS of a block, from the scores and dP = V dOᵀ: rows are keys, columns are queries.
static void softmax_backward(struct head *head, float scale, long key, long n_keys, long query,
                             long n_queries)
{
    const __m512i numbers =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512 log2_scale = _mm512_set1_ps(LOG2_E * scale);
    for (long column = 0; column < n_queries; column += 16) {
        __m512 logsumexp = _mm512_loadu_ps(head->logsumexp + query + column);
        __m512 delta = _mm512_loadu_ps(head->delta + query + column);
        for (long row = 0; row < n_keys; row += 2) {
            __m512 p[2], grad[2];
            for (int i = 0; i < 2; i++) {
                long at = (row + i) * BLOCK + column;
                __m512 score = _mm512_loadu_ps(head->scores + at);
                // A query sees the keys up to its own.
                long first = key + row + i - query - column;
                __mmask16 seen = _mm512_cmpge_epi32_mask(numbers, _mm512_set1_epi32((int)first));
                __m512 exponent = _mm512_fmsub_ps(score, log2_scale, logsumexp);
                p[i] = _mm512_maskz_mov_ps(seen, exp2_of(exponent));
                __m512 grad_p = _mm512_loadu_ps(head->grad_p + at);
                grad[i] = _mm512_mul_ps(p[i], _mm512_sub_ps(grad_p, delta));
                grad[i] = _mm512_mul_ps(grad[i], _mm512_set1_ps(scale));
            }
            __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]);
            bf16 *to = head->p + row * BLOCK + column;
            _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(pair));
            _mm256_storeu_si256((__m256i *)(to + BLOCK), _mm512_extracti64x4_epi64(pair, 1));
            pair = (__m512i)_mm512_cvtne2ps_pbh(grad[1], grad[0]);
            to = head->grad_scores + row * BLOCK + column;
            _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(pair));
            _mm256_storeu_si256((__m256i *)(to + BLOCK), _mm512_extracti64x4_epi64(pair, 1));
            to = head->grad_scores_tiles;
            to += (row / 32 * (BLOCK / 16) + column / 16) * TILE + row % 32 * 16;
            _mm512_storeu_si512(to, interleave(pair));
        }
    }
}

// The keys from `key` on, and the queries from `query` on.
static void add_block(struct head *head, float scale, long key, long n_keys, long query,
                      long n_queries)
{
    long width = head->width;
    long across = width / 32 * TILE, down = width / 16 * TILE;  // from a tile to the next
    struct tiles q_across = {head->q_across + query / 16 * across, TILE, across};
    struct tiles grad_across = {head->grad_across + query / 16 * across, TILE, across};
    struct tiles q_down = {head->q_down + query / 32 * down, down, TILE};
    struct tiles grad_down = {head->grad_down + query / 32 * down, down, TILE};
    struct tiles grad_scores = {head->grad_scores_tiles, BLOCK / 16 * TILE, TILE};

    memset(head->scores, 0, 4 * BLOCK * n_keys);
    memset(head->grad_p, 0, 4 * BLOCK * n_keys);
    add_product(head->scores, BLOCK, head->k + key * width, width, q_across, n_keys, n_queries,
                width);
    add_product(head->grad_p, BLOCK, head->v + key * width, width, grad_across, n_keys, n_queries,
                width);
    softmax_backward(head, scale, key, n_keys, query, n_queries);
    add_product(head->grad_v, width, head->p, BLOCK, grad_down, n_keys, width, n_queries);
    add_product(head->grad_k, width, head->grad_scores, BLOCK, q_down, n_keys, width, n_queries);
    add_product(head->grad_q + query, head->length, head->k_transposed + key * width, BLOCK,
                grad_scores, width, n_queries, n_keys);
}

// Rows of float32, side by side.
static void write_rows(struct heads heads, long batch, long index, long first, long n_rows,
                       const float *numbers, long width)
{
    bf16 *to = find_head(heads, batch, index) + first * heads.token;
    for (long t = 0; t < n_rows; t++)
        for (long c = 0; c < width; c += 16) {
            __m512 row = _mm512_loadu_ps(numbers + t * width + c);
            _mm256_storeu_si256((__m256i *)(to + t * heads.token + c),
                                (__m256i)_mm512_cvtneps_pbh(row));
        }
}

// The sums of dQᵀ as rows.
static void write_grad_q(const struct head *head, struct heads heads, long batch, long index)
{
    bf16 *to = find_head(heads, batch, index);
    bf16 pairs[16][32];  // of the width, by query
    for (long c = 0; c < head->width; c += 32)
        for (long t = 0; t < head->length; t += 16) {
            for (long pair = 0; pair < 16; pair++) {
                const float *from = head->grad_q + (c + 2 * pair) * head->length + t;
                __m512 rows[2] = {_mm512_loadu_ps(from), _mm512_loadu_ps(from + head->length)};
                __m512i two = (__m512i)_mm512_cvtne2ps_pbh(rows[1], rows[0]);
                _mm512_storeu_si512(pairs[pair], interleave(two));
            }
            for (long i = 0; i < 16 && t + i < head->n_tokens; i++)
                _mm512_storeu_si512(to + (t + i) * heads.token + c,
                                    pairs_of_column(&pairs[0][2 * i], 32));
        }
}

static long smaller(long a, long b)
{
    return a < b ? a : b;
}

static void backward_of_head(struct head *head, const struct task *task, long batch, long index)
{
    long width = head->width;
    prepare(head, task, batch, index);
    for (long key = 0; key < head->length; key += BLOCK) {
        long n_keys = smaller(BLOCK, head->length - key);
        memset(head->grad_k, 0, 4 * BLOCK * width);
        memset(head->grad_v, 0, 4 * BLOCK * width);
        for (long query = key; query < head->length; query += BLOCK) {
            long n_queries = smaller(BLOCK, head->length - query);
            add_block(head, task->scale, key, n_keys, query, n_queries);
        }
        long n_rows = smaller(n_keys, head->n_tokens - key);
        write_rows(task->grad_k, batch, index, key, n_rows, head->grad_k, width);
        write_rows(task->grad_v, batch, index, key, n_rows, head->grad_v, width);
    }
    write_grad_q(head, task->grad_q, batch, index);
}

// ---- All heads -----------------------------------------------------------------------------------

void attention_backward(const struct task *task)
{
    long size = scratch_bytes(task->n_tokens, task->width);
    long n_heads = task->n_batch * task->n_head;
#pragma omp parallel num_threads(task->n_threads)
    {
        struct head head;
        lay_out(&head, task->scratch + omp_get_thread_num() * size, task->n_tokens, task->width);
        struct tile_config previous = begin_products();
#pragma omp for schedule(dynamic)
        for (long i = 0; i < n_heads; i++)
            backward_of_head(&head, task, i / task->n_head, i % task->n_head);
        end_products(&previous);
    }
}

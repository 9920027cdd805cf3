// One token of each row through a GPT-2, behind a filled KV cache. See parts/decode.py, and
// model.py, which computes the same.
//
// All of it is one parallel region. Its stages follow each other; the work of a stage is a number
// of pieces, and whichever thread is free takes the next one. A stage is over when all its pieces
// are done, so that a thread which the system has stopped between two pieces delays nobody.
//
// Letters: B rows, C width, nh heads, hs width of a head (C / nh), V vocabulary.

#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <omp.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "rows.h"
#ifdef __AVX512BF16__
#include "products.h"
#endif

// For so many rows, a matrix is multiplied row by row: see rows.h.
#define FEW_ROWS 4
// With more, and weights in bf16, a product is one of matrices: see products.h.
#define MOST_ROWS 64
#define HEIGHT 32  // rows of the matrix at a time

// Pieces of a product for each thread: enough to share the work evenly between unequal threads.
#define PIECES 4
// How often a thread that waits looks before it goes to sleep: some 50 microseconds. Beside another
// program, threads that spin for longer keep from the CPU the thread that they wait for.
#define LOOKS 1000

// ---- What parts/decode.py passes: the same structures are there ---------------------------------

struct norm {
    const float *weight, *bias;  // (C); bias or NULL
    double eps;
};

struct matrix {
    const void *weight;         // (n_out, n_in) in the model's type
    const float *scale, *bias;  // (n_out) or NULL
};

struct layer {
    struct norm ln_1;
    struct matrix c_attn, attn_proj;
    struct norm ln_2;
    struct matrix c_fc, mlp_proj;
    float *keys, *values;  // (B, nh, capacity, hs)
};

enum type { FP32, BF16, INT8 };

struct model {
    long type;  // of all matrices
    long exact_gelu;
    long n_layer, n_head, n_embd, vocab_size;
    const float *wte, *wpe;  // (V, C), (positions, C)
    struct norm ln_f;
    struct matrix lm_head;
    const struct layer *layers;
};

// Each on cache lines of its own.
struct stage {
    long next;  // the piece that nobody has taken yet
    int done;   // pieces
    int has_sleepers;
} __attribute__((aligned(64)));

struct step {
    const struct model *model;
    long n_rows;         // B
    long column, capacity;  // of the cache: where the tokens go, and how many columns there are
    const long *ids, *pads;  // (B): the tokens, and how many columns of each row are empty
    // The threads share these.
    float *x;        // (B, C): the residual stream
    float *qkv;      // (B, 3 C)
    float *y;        // (B, C): what attention gives
    float *hidden;   // (B, 4 C)
    float *branch;   // (B, C): what is added to the stream, of few rows
    float *logits;   // (B, V)
    float *scratch;  // (threads, scratch_size)
    long scratch_size;
    struct stage *stages;  // 5 n_layer + 1
};

// A thread's own.
struct scratch {
    float *normal;  // (B, C): after a LayerNorm
    float *scores;  // (capacity)
    // Of more than FEW_ROWS rows; B is rounded up to a multiple of 32.
    uint16_t *tiles;  // (4 C, B): what a matrix is multiplied with, transposed, in tiles of bf16
    float *product;   // (HEIGHT, B)
};

static long round_up(long number, long unit) { return (number + unit - 1) / unit * unit; }

// Cut a thread's memory into pieces, each on cache lines of its own. How many numbers it needs.
static long lay_out(struct scratch *scratch, float *memory, long n_rows, long C, long capacity) {
    long used = 0;
    scratch->normal = memory;
    used += round_up(n_rows * C, 16);
    scratch->scores = memory + used;
    used += round_up(capacity, 16);
    if (n_rows > FEW_ROWS) {
        long padded = round_up(n_rows, 32);
        scratch->tiles = (uint16_t *)(memory + used);
        used += padded * round_up(4 * C, 32) / 2;
        scratch->product = memory + used;
        used += HEIGHT * padded;
    }
    return used;
}

long scratch_size(long n_rows, long C, long capacity) {
    struct scratch scratch;
    return lay_out(&scratch, NULL, n_rows, C, capacity);
}

// ---- Stages --------------------------------------------------------------------------------------

static long take_piece(struct stage *stage) {
    return __atomic_fetch_add(&stage->next, 1, __ATOMIC_RELAXED);
}

static void finish_piece(struct stage *stage, long n_pieces) {
    int done = __atomic_add_fetch(&stage->done, 1, __ATOMIC_SEQ_CST);
    if (done == n_pieces && __atomic_load_n(&stage->has_sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &stage->done, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void wait_for(struct stage *stage, long n_pieces) {
    for (int look = 0; look < LOOKS; look++) {
        if (__atomic_load_n(&stage->done, __ATOMIC_ACQUIRE) == n_pieces)
            return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    __atomic_store_n(&stage->has_sleepers, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        int done = __atomic_load_n(&stage->done, __ATOMIC_SEQ_CST);
        if (done == n_pieces)
            return;
        // It returns at once if `done` has changed meanwhile.
        syscall(SYS_futex, &stage->done, FUTEX_WAIT_PRIVATE, done, NULL, NULL, 0);
    }
}

// ---- What a stage computes -----------------------------------------------------------------------

// LayerNorm (Ba et al. 2016) of each row: x (n_rows, C) -> y.
static void normalise(const float *x, struct norm norm, float *y, long n_rows, long C) {
    for (long row = 0; row < n_rows; row++, x += C, y += C) {
        float sum = 0;
        _Pragma("omp simd reduction(+ : sum)")
        for (long i = 0; i < C; i++)
            sum += x[i];
        float mean = sum / C;
        float squares = 0;
        _Pragma("omp simd reduction(+ : squares)")
        for (long i = 0; i < C; i++)
            squares += (x[i] - mean) * (x[i] - mean);
        float factor = 1 / sqrtf(squares / C + (float)norm.eps);
        for (long i = 0; i < C; i++)
            y[i] = (x[i] - mean) * factor * norm.weight[i];
        if (norm.bias)
            for (long i = 0; i < C; i++)
                y[i] += norm.bias[i];
    }
}

// GELU (Hendrycks and Gimpel 2016): x Phi(x), or the tanh form of it that GPT-2 was trained with,
// x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u)) with u = sqrt(2 / pi) (x + 0.044715 x^3).
static float gelu(float x, long exact) {
    if (exact)
        return 0.5f * x * (1 + erff(x * 0.70710678f));
    float u = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1 + expf(-2 * u));
}

static inline float dot(const float *x, const float *y, long n) {
    floats sums = {0};
    long i = 0;
    for (; i + LANES <= n; i += LANES)
        sums += read_fp32(x + i) * read_fp32(y + i);
    float sum = add_lanes(sums);
    for (; i < n; i++)
        sum += x[i] * y[i];
    return sum;
}

// softmax(q kT / sqrt(hs)) v of one head of one row: q, k, v (hs) are the new token's, y (hs).
// k and v go into the cache: keys and values (capacity, hs), filled from `first` to `column`.
static void attend(const float *q, const float *k, const float *v, float *keys, float *values,
                   float *y, float *scores, long first, long column, long hs) {
    for (long i = 0; i < hs; i++) {
        keys[column * hs + i] = k[i];
        values[column * hs + i] = v[i];
    }
    float scale = 1 / sqrtf(hs);
    float largest = -INFINITY;
    for (long j = first; j <= column; j++) {
        scores[j] = scale * dot(q, keys + j * hs, hs);
        if (scores[j] > largest)
            largest = scores[j];
    }
    float sum = 0;
    for (long j = first; j <= column; j++) {
        scores[j] = expf(scores[j] - largest);
        sum += scores[j];
    }
    for (long i = 0; i < hs; i++)
        y[i] = 0;
    for (long j = first; j <= column; j++) {
        float weight = scores[j] / sum;
        const float *value = values + j * hs;
        for (long i = 0; i < hs; i++)
            y[i] += weight * value[i];
    }
}

enum then { KEEP, ACTIVATE, ADD };  // the product as it is; GELU of it; into the residual stream

#ifdef __AVX512BF16__

// x (B, n_in) -> its transpose in tiles of bf16, 32 numbers of 16 rows each; rows beyond B are 0.
static void tile_rows(bf16 *tiles, const float *x, long n_rows, long n_in) {
    bf16 rows[16][32];
    for (long row = 0; row < round_up(n_rows, 32); row += 16)
        for (long i = 0; i < n_in; i += 32) {
            for (long r = 0; r < 16; r++) {
                __m512bh numbers = {0};
                if (row + r < n_rows) {
                    const float *from = x + (row + r) * n_in + i;
                    __m512 upper = _mm512_loadu_ps(from + 16);
                    numbers = _mm512_cvtne2ps_pbh(upper, _mm512_loadu_ps(from));
                }
                _mm512_storeu_si512(rows[r], (__m512i)numbers);
            }
            for (long pair = 0; pair < 32; pair += 2, tiles += 32)
                _mm512_storeu_si512(tiles, pairs_of_column(&rows[0][pair], 32));
        }
}

// 16 numbers of a column, which are `stride` numbers apart.
static __m512 read_column(const float *numbers, long stride) {
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_i32gather_ps(_mm512_mullo_epi32(steps, _mm512_set1_epi32((int)stride)), numbers,
                               4);
}

// `gelu` of 16 numbers.
static __m512 gelu_of(__m512 x, long exact) {
    if (exact) {
        float numbers[16];
        _mm512_storeu_ps(numbers, x);
        for (int i = 0; i < 16; i++)
            numbers[i] = gelu(numbers[i], exact);
        return _mm512_loadu_ps(numbers);
    }
    __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    __m512 u = _mm512_fmadd_ps(_mm512_set1_ps(0.044715f), cubed, x);
    __m512 power = exp2_of(_mm512_mul_ps(_mm512_set1_ps(-2 * LOG2_E * 0.79788456f), u));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1), power));
}

// HEIGHT rows of a matrix, from `first` on, times all rows of x in tiles -> y (B, n_out).
static void multiply_rows(struct step *s, struct scratch *scratch, struct matrix w, float *y,
                          long n_in, long n_out, long first, enum then then) {
    long padded = round_up(s->n_rows, 32);
    float *product = scratch->product;
    struct tiles tiles = {scratch->tiles, TILE, n_in / 32 * TILE};
    memset(product, 0, sizeof(float) * HEIGHT * padded);
    add_product(product, padded, (const bf16 *)w.weight + first * n_in, n_in, tiles, HEIGHT, padded,
                n_in);
    for (long half = 0; half < HEIGHT; half += 16) {
        long o = first + half;
        __m512 bias = _mm512_setzero_ps();
        if (w.bias)
            bias = _mm512_loadu_ps(w.bias + o);
        for (long row = 0; row < s->n_rows; row++) {
            __m512 sums = read_column(product + half * padded + row, padded);
            sums = _mm512_add_ps(sums, bias);
            float *to = y + row * n_out + o;
            if (then == ACTIVATE)
                sums = gelu_of(sums, s->model->exact_gelu);
            if (then == ADD) {
                to = s->x + row * n_out + o;
                sums = _mm512_add_ps(sums, _mm512_loadu_ps(to));
            }
            _mm512_storeu_ps(to, sums);
        }
    }
}

// `multiply` for more than FEW_ROWS rows: x is rounded to bf16.
static void multiply_many(struct step *s, struct stage *stage, struct scratch *scratch,
                          const float *x, const struct norm *norm, struct matrix w, float *y,
                          long n_in, long n_out, enum then then) {
    long wanted = PIECES * omp_get_num_threads();
    long rows = round_up((n_out + wanted - 1) / wanted, HEIGHT);
    long n_pieces = (n_out + rows - 1) / rows;
    long piece = take_piece(stage);
    if (piece < n_pieces) {
        if (norm) {
            normalise(x, *norm, scratch->normal, s->n_rows, n_in);
            x = scratch->normal;
        }
        tile_rows(scratch->tiles, x, s->n_rows, n_in);
    }
    for (; piece < n_pieces; piece = take_piece(stage)) {
        long last = (piece + 1) * rows < n_out ? (piece + 1) * rows : n_out;
        for (long from = piece * rows; from < last; from += HEIGHT) {
            // The vocabulary may end within these rows: then some are computed again, to the same
            // bits. What is added has a multiple of 32 rows: see most_rows.
            long first = from + HEIGHT <= n_out ? from : n_out - HEIGHT;
            multiply_rows(s, scratch, w, y, n_in, n_out, first, then);
        }
        finish_piece(stage, n_pieces);
    }
    wait_for(stage, n_pieces);
}

#endif

// A stage: x (B, n_in) -> y (B, n_out), the product of the matrix with LayerNorm of x, or with x
// itself if there is no norm.
static void multiply(struct step *s, struct stage *stage, struct scratch *scratch, const float *x,
                     const struct norm *norm, struct matrix w, float *y, long n_in, long n_out,
                     enum then then) {
#ifdef __AVX512BF16__
    if (s->n_rows > FEW_ROWS && s->model->type == BF16 && n_in % 32 == 0 && n_out >= HEIGHT) {
        multiply_many(s, stage, scratch, x, norm, w, y, n_in, n_out, then);
        return;
    }
#endif
    long rows = n_out / (PIECES * omp_get_num_threads());
    if (rows < 8)
        rows = 8;
    long n_pieces = (n_out + rows - 1) / rows;
    long piece = take_piece(stage);
    if (norm && piece < n_pieces) {
        normalise(x, *norm, scratch->normal, s->n_rows, n_in);
        x = scratch->normal;
    }
    for (; piece < n_pieces; piece = take_piece(stage)) {
        long first = piece * rows;
        long last = first + rows < n_out ? first + rows : n_out;
        if (s->model->type == FP32)
            rows_fp32(x, w.weight, w.scale, w.bias, y, s->n_rows, n_in, n_out, first, last);
        else if (s->model->type == BF16)
            rows_bf16(x, w.weight, w.scale, w.bias, y, s->n_rows, n_in, n_out, first, last);
        else
            rows_int8(x, w.weight, w.scale, w.bias, y, s->n_rows, n_in, n_out, first, last);
        for (long row = 0; row < s->n_rows && then != KEEP; row++) {
            for (long o = row * n_out + first; o < row * n_out + last; o++) {
                if (then == ACTIVATE)
                    y[o] = gelu(y[o], s->model->exact_gelu);
                else
                    s->x[o] += y[o];
            }
        }
        finish_piece(stage, n_pieces);
    }
    wait_for(stage, n_pieces);
}

// A stage: a piece is a head of a row.
static void mix_tokens(struct step *s, struct stage *stage, const struct layer *layer,
                       float *scores) {
    long nh = s->model->n_head;
    long C = s->model->n_embd;
    long hs = C / nh;
    long n_pieces = s->n_rows * nh;
    for (long piece = take_piece(stage); piece < n_pieces; piece = take_piece(stage)) {
        long row = piece / nh;
        const float *q = s->qkv + row * 3 * C + piece % nh * hs;
        long head = piece * s->capacity * hs;
        attend(q, q + C, q + 2 * C, layer->keys + head, layer->values + head, s->y + piece * hs,
               scores, s->pads[row], s->column, hs);
        finish_piece(stage, n_pieces);
    }
    wait_for(stage, n_pieces);
}

// Every thread goes through all stages.
static void take_part(struct step *s) {
    const struct model *m = s->model;
    long C = m->n_embd;
    struct scratch own;
    struct scratch *scratch = &own;
    lay_out(scratch, s->scratch + omp_get_thread_num() * s->scratch_size, s->n_rows, C,
            s->capacity);
    struct stage *stage = s->stages;
    for (const struct layer *l = m->layers; l < m->layers + m->n_layer; l++) {
        multiply(s, stage++, scratch, s->x, &l->ln_1, l->c_attn, s->qkv, C, 3 * C, KEEP);
        mix_tokens(s, stage++, l, scratch->scores);
        multiply(s, stage++, scratch, s->y, NULL, l->attn_proj, s->branch, C, C, ADD);
        multiply(s, stage++, scratch, s->x, &l->ln_2, l->c_fc, s->hidden, C, 4 * C, ACTIVATE);
        multiply(s, stage++, scratch, s->hidden, NULL, l->mlp_proj, s->branch, 4 * C, C, ADD);
    }
    multiply(s, stage, scratch, s->x, &m->ln_f, m->lm_head, s->logits, C, m->vocab_size, KEEP);
}

void take_step(struct step *s, long n_threads) {
    long C = s->model->n_embd;
    memset(s->stages, 0, (5 * s->model->n_layer + 1) * sizeof(struct stage));
    for (long row = 0; row < s->n_rows; row++) {
        const float *token = s->model->wte + s->ids[row] * C;
        const float *position = s->model->wpe + (s->column - s->pads[row]) * C;
        for (long i = 0; i < C; i++)
            s->x[row * C + i] = token[i] + position[i];
    }
    _Pragma("omp parallel num_threads(n_threads)")
    {
#ifdef __AVX512BF16__
        struct tile_config previous = begin_products();
        take_part(s);
        end_products(&previous);
#else
        take_part(s);
#endif
    }
}

// How many rows a step may have in this type, for a model of this width.
long most_rows(long type, long C) {
#ifdef __AVX512BF16__
    if (type == BF16 && C % 32 == 0)
        return MOST_ROWS;
#endif
    (void)type, (void)C;
    return FEW_ROWS;
}

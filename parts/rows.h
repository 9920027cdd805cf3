// Rows of a matrix times a few vectors: y = scale * (W x) + b. W is stored in 32, 16 or 8 bits.
//
// W is read once, row by row, as it lies in memory; sums are in float32. The vector types are those
// of GCC, which maps them to whatever the CPU has.

#include <stdint.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));

static inline floats read_fp32(const float *w) { return *(const floats *)w; }

// bfloat16 is the upper half of a float32.
static inline floats read_bf16(const uint16_t *w) {
    return (floats)(__builtin_convertvector(*(const halves *)w, words) << 16);
}

static inline floats read_int8(const int8_t *w) {
#ifdef __AVX512F__
    // GCC 12 makes twelve instructions of what follows instead of two.
    return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(*(const __m128i_u *)w));
#else
    // In steps: GCC 12 has no instruction for more than one of them at once.
    shorts wider = __builtin_convertvector(*(const bytes *)w, shorts);
    return __builtin_convertvector(__builtin_convertvector(wider, integers), floats);
#endif
}

static inline float one_fp32(float w) { return w; }

static inline float one_bf16(uint16_t w) {
    union { uint32_t bits; float value; } number = {(uint32_t)w << 16};
    return number.value;
}

static inline float one_int8(int8_t w) { return w; }

static inline float add_lanes(floats a) {
    float sum = 0;
    _Pragma("omp simd reduction(+ : sum)")
    for (int lane = 0; lane < LANES; lane++)
        sum += a[lane];
    return sum;
}

// The rows from `first` to `last` of a product: x (n_vectors, n_in), w (n_out, n_in), scale and
// bias (n_out) or NULL, y (n_vectors, n_out).
//
// Four rows at a time, far from each other: so four streams come from memory at once, and four sums
// hide the time that an addition takes. Where the rows are no multiple of four, the last one is
// computed again. A row's sum does not depend on which rows are computed beside it.
#define AHEAD 2048  // bytes: each stream is fetched so far ahead of its use

#define DEFINE_ROWS(NAME, TYPE)                                                                    \
    static void rows_##NAME(const float *x, const TYPE *w, const float *scale, const float *bias,  \
                            float *y, long n_vectors, long n_in, long n_out, long first,           \
                            long last) {                                                           \
        long distance = (last - first + 3) / 4;                                                    \
        for (long o = first; o < first + distance; o++) {                                          \
            long rows[4];                                                                          \
            const TYPE *in[4];                                                                     \
            for (int k = 0; k < 4; k++) {                                                          \
                long row = o + k * distance;                                                       \
                rows[k] = row < last ? row : last - 1;                                             \
                in[k] = w + rows[k] * n_in;                                                        \
            }                                                                                      \
            for (long v = 0; v < n_vectors; v++) {                                                 \
                const float *vector = x + v * n_in;                                                \
                floats sums[4] = {{0}, {0}, {0}, {0}};                                             \
                long i = 0;                                                                        \
                for (; i + LANES <= n_in; i += LANES) {                                            \
                    floats numbers = read_fp32(vector + i);                                        \
                    for (int k = 0; k < 4; k++) {                                                  \
                        if (i % (64 / sizeof(TYPE)) == 0)                                          \
                            __builtin_prefetch((const char *)(in[k] + i) + AHEAD);                 \
                        sums[k] += read_##NAME(in[k] + i) * numbers;                               \
                    }                                                                              \
                }                                                                                  \
                for (int k = 0; k < 4; k++) {                                                      \
                    float sum = add_lanes(sums[k]);                                                \
                    for (long rest = i; rest < n_in; rest++)                                       \
                        sum += one_##NAME(in[k][rest]) * vector[rest];                             \
                    if (scale)                                                                     \
                        sum *= scale[rows[k]];                                                     \
                    if (bias)                                                                      \
                        sum += bias[rows[k]];                                                      \
                    y[v * n_out + rows[k]] = sum;                                                  \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE_ROWS(fp32, float)
DEFINE_ROWS(bf16, uint16_t)
DEFINE_ROWS(int8, int8_t)

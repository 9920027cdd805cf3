// y = W x + b for a few vectors x, where W is stored in 16 or 8 bits. See parts/matvec.py.
//
// W is read once, row by row, as it lies in memory; sums are in float32. The vector types are those
// of GCC, which maps them to whatever the CPU has.

#include <stdint.h>

#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1)));

// bfloat16 is the upper half of a float32.
static inline floats read_bf16(const uint16_t *w) {
    return (floats)(__builtin_convertvector(*(const halves *)w, words) << 16);
}

static inline floats read_int8(const int8_t *w) {
    // In steps: GCC 12 has no instruction for more than one of them at once.
    shorts wider = __builtin_convertvector(*(const bytes *)w, shorts);
    return __builtin_convertvector(__builtin_convertvector(wider, integers), floats);
}

static inline float one_bf16(uint16_t w) {
    union { uint32_t bits; float value; } number = {(uint32_t)w << 16};
    return number.value;
}

static inline float one_int8(int8_t w) { return w; }

// x (n_vectors, n_in), w (n_out, n_in), scale and bias (n_out) or NULL, y (n_vectors, n_out).
// Four sums hide the time that an addition takes. The threads share the rows of W out.
#define DEFINE(NAME, TYPE, READ, ONE)                                                              \
    void NAME(const float *x, const TYPE *w, const float *scale, const float *bias, float *y,      \
              long n_vectors, long n_in, long n_out) {                                             \
        _Pragma("omp parallel for schedule(static)")                                               \
        for (long o = 0; o < n_out; o++) {                                                         \
            const TYPE *row = w + o * n_in;                                                        \
            for (long v = 0; v < n_vectors; v++) {                                                 \
                const float *in = x + v * n_in;                                                    \
                floats a = {0}, b = {0}, c = {0}, d = {0};                                         \
                long i = 0;                                                                        \
                for (; i + 4 * LANES <= n_in; i += 4 * LANES) {                                    \
                    __builtin_prefetch(row + i + 1024);                                            \
                    __builtin_prefetch(row + i + 1024 + 2 * LANES);                                \
                    a += READ(row + i) * *(const floats *)(in + i);                                \
                    b += READ(row + i + LANES) * *(const floats *)(in + i + LANES);                \
                    c += READ(row + i + 2 * LANES) * *(const floats *)(in + i + 2 * LANES);        \
                    d += READ(row + i + 3 * LANES) * *(const floats *)(in + i + 3 * LANES);        \
                }                                                                                  \
                a += b + c + d;                                                                    \
                float sum = 0;                                                                     \
                _Pragma("omp simd reduction(+ : sum)")                                             \
                for (int lane = 0; lane < LANES; lane++)                                           \
                    sum += a[lane];                                                                \
                for (; i < n_in; i++)                                                              \
                    sum += ONE(row[i]) * in[i];                                                    \
                if (scale)                                                                         \
                    sum *= scale[o];                                                               \
                if (bias)                                                                          \
                    sum += bias[o];                                                                \
                y[v * n_out + o] = sum;                                                            \
            }                                                                                      \
        }                                                                                          \
    }

DEFINE(multiply_bf16, uint16_t, read_bf16, one_bf16)
DEFINE(multiply_int8, int8_t, read_int8, one_int8)

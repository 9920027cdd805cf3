// y = scale * (W x) + b for a few vectors x. See parts/matvec.py.

#include "rows.h"

// A thread takes so many rows of W at once.
#define ROWS 64

// x (n_vectors, n_in), w (n_out, n_in), scale and bias (n_out) or NULL, y (n_vectors, n_out).
#define DEFINE(NAME, TYPE)                                                                         \
    void multiply_##NAME(const float *x, const TYPE *w, const float *scale, const float *bias,     \
                         float *y, long n_vectors, long n_in, long n_out) {                        \
        _Pragma("omp parallel for schedule(static)")                                               \
        for (long o = 0; o < n_out; o += ROWS) {                                                   \
            long end = o + ROWS < n_out ? o + ROWS : n_out;                                        \
            rows_##NAME(x, w, scale, bias, y, n_vectors, n_in, n_out, o, end);                     \
        }                                                                                          \
    }

DEFINE(bf16, uint16_t)
DEFINE(int8, int8_t)

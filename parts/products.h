// Products of bf16 matrices that are added up in float32, by AMX or by AVX-512's dot product of
// pairs. Both want the second matrix in tiles: 32 x 16 numbers, two rows interleaved. At the end,
// what else attention.c and decode.c share.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef __AVX512BF16__
#error "a CPU with AVX512_BF16 is needed"
#endif

#define TILE 512  // numbers of bf16 in a tile
#define LOG2_E 1.44269504088896340736f

typedef uint16_t bf16;

static int has_amx;  // and the kernel lets this process use it

// A matrix in tiles: how far it is, in numbers, from a tile to the next one below and beside it.
struct tiles {
    const bf16 *numbers;
    long below, beside;
};

struct tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((aligned(64)));

// GCC 12 takes it that a configuration has eight bytes, and leaves out what is stored in the
// others. Nor does it know what tiles are loaded from.
#define ALL_MEMORY_IS_USED __asm__ volatile("" ::: "memory")

#ifdef __AMX_BF16__

// 32 x 32 numbers of the result in four tiles.
static void multiply_amx(float *c, long c_row, const bf16 *a, long a_row, struct tiles b,
                         long n_rows, long n_columns, long depth)
{
    ALL_MEMORY_IS_USED;
    for (long row = 0; row < n_rows; row += 32)
        for (long column = 0; column < n_columns; column += 32) {
            float *corner = c + row * c_row + column;
            _tile_loadd(0, corner, 4 * c_row);
            _tile_loadd(1, corner + 16, 4 * c_row);
            _tile_loadd(2, corner + 16 * c_row, 4 * c_row);
            _tile_loadd(3, corner + 16 * c_row + 16, 4 * c_row);
            for (long k = 0; k < depth; k += 32) {
                const bf16 *left = a + row * a_row + k;
                const bf16 *right = b.numbers + k / 32 * b.below + column / 16 * b.beside;
                _tile_loadd(4, left, 2 * a_row);
                _tile_loadd(5, left + 16 * a_row, 2 * a_row);
                _tile_loadd(6, right, 64);
                _tile_loadd(7, right + b.beside, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, corner, 4 * c_row);
            _tile_stored(1, corner + 16, 4 * c_row);
            _tile_stored(2, corner + 16 * c_row, 4 * c_row);
            _tile_stored(3, corner + 16 * c_row + 16, 4 * c_row);
        }
}

#endif

// 8 x 32 numbers of the result in sixteen registers.
static void multiply_avx(float *c, long c_row, const bf16 *a, long a_row, struct tiles b,
                         long n_rows, long n_columns, long depth)
{
    for (long column = 0; column < n_columns; column += 32)
        for (long row = 0; row < n_rows; row += 8) {
            float *corner = c + row * c_row + column;
            __m512 sums[8][2];
            for (int r = 0; r < 8; r++)
                for (int half = 0; half < 2; half++)
                    sums[r][half] = _mm512_loadu_ps(corner + r * c_row + 16 * half);
            for (long k = 0; k < depth; k += 2) {
                const bf16 *right = b.numbers + k / 32 * b.below + column / 16 * b.beside;
                right += k % 32 * 16;
                __m512bh pairs[2];
                pairs[0] = (__m512bh)_mm512_loadu_si512(right);
                pairs[1] = (__m512bh)_mm512_loadu_si512(right + b.beside);
                for (int r = 0; r < 8; r++) {
                    int32_t pair;
                    memcpy(&pair, a + (row + r) * a_row + k, sizeof pair);
                    __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
                    for (int half = 0; half < 2; half++)
                        sums[r][half] = _mm512_dpbf16_ps(sums[r][half], left, pairs[half]);
                }
            }
            for (int r = 0; r < 8; r++)
                for (int half = 0; half < 2; half++)
                    _mm512_storeu_ps(corner + r * c_row + 16 * half, sums[r][half]);
        }
}

// C += A B: A (n_rows, depth) with rows apart, B (depth, n_columns) in tiles, all multiples of 32.
static void add_product(float *c, long c_row, const bf16 *a, long a_row, struct tiles b,
                        long n_rows, long n_columns, long depth)
{
#ifdef __AMX_BF16__
    if (has_amx) {
        multiply_amx(c, c_row, a, a_row, b, n_rows, n_columns, depth);
        return;
    }
#endif
    multiply_avx(c, c_row, a, a_row, b, n_rows, n_columns, depth);
}

// A thread calls these around its products: whoever configured its tiles before may count on it.
// All eight have 16 rows of 64 bytes.
static struct tile_config begin_products(void)
{
    struct tile_config previous = {0};
#ifdef __AMX_BF16__
    if (has_amx) {
        struct tile_config config = {.palette = 1};
        for (int tile = 0; tile < 8; tile++) {
            config.row_bytes[tile] = 64;
            config.rows[tile] = 16;
        }
        _tile_storeconfig(&previous);
        ALL_MEMORY_IS_USED;
        _tile_loadconfig(&config);
    }
#endif
    return previous;
}

static void end_products(const struct tile_config *previous)
{
#ifdef __AMX_BF16__
    if (has_amx) {
        ALL_MEMORY_IS_USED;
        _tile_loadconfig(previous);
    }
#else
    (void)previous;
#endif
}

// Ask the system for AMX. Without it, AVX-512 does the work.
void set_up(int use_amx)
{
    has_amx = 0;
#ifdef __AMX_BF16__
    const long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // of Linux' asm/prctl.h
    has_amx = use_amx && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#endif
}

// ---- Columns and powers --------------------------------------------------------------------------

// A column of 16 pairs, which are `stride` numbers apart.
static __m512i pairs_of_column(const void *numbers, long stride)
{
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i places = _mm512_mullo_epi32(steps, _mm512_set1_epi32((int)stride / 2));
    return _mm512_i32gather_epi32(places, numbers, 4);
}

// 2 to the power of x, to 2e-7 of itself: the series of 2^r for the rest r of x beside an integer.
static __m512 exp2_of(__m512 x)
{
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, n);
    // (log 2)^6 / 6! and so on: r is 1/2 at most.
    __m512 sum = _mm512_set1_ps(1.5403530e-4f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3333558e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4022651e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9314718e-1f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, n);
}

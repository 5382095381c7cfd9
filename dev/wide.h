// SPDX-License-Identifier: MIT
//
// wide.h: what train_rigsa.c need not know of the machine. It makes the trainer faster, on some processors or
// beside other programs, and says how much memory there is. The trainer includes it in its section 8 when it
// is built with -DWIDE='"dev/wide.h"', as the Makefile does, and is complete without it. It knows vectors,
// tiles, kernels, threads and memory, and nothing of models.
//
//     choose_threads     as many as are fastest on a busy machine                    the same bits
//     prepare_threads    within a quota of processors; they wait without spinning    the same bits
//     memory_available   free, or what a limit leaves                                the same bits
//     transpose          in registers                                                the same bits
//     matmul_few         b is read where it lies, instead of packed                  other last bits in fp32
//     sampled_product    from transposes in registers                                other last bits
//     PAIRS              --precision bf16 with AVX-512's bf16 instruction             other last bits in bf16
//     AMX                --precision bf16 on Intel's matrix registers                 other last bits in bf16

// -----------------------------------------------------------------------------------------------------------
// A block of LANES x LANES transposed in registers. Step d swaps bit d of an element's row number with bit d
// of its column number: of rows i and i + d, whose i lacks that bit, d columns at a time change places.

#define LOW(c, d) ((c) & (d) ? LANES + (c) - (d) : (c))                 // column c of the new row i, of both
#define HIGH(c, d) (LOW(c, d) + (d))                                    // and of row i + d
#define COLUMNS_4(F, c, d) F(c, d), F(c + 1, d), F(c + 2, d), F(c + 3, d)
#define COLUMNS_8(F, c, d) COLUMNS_4(F, c, d), COLUMNS_4(F, c + 4, d)
#if defined(__AVX512F__)
#define COLUMNS(F, d) COLUMNS_8(F, 0, d), COLUMNS_8(F, 8, d)
#elif defined(__AVX__)
#define COLUMNS(F, d) COLUMNS_8(F, 0, d)
#else
#define COLUMNS(F, d) COLUMNS_4(F, 0, d)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_bits){ __VA_ARGS__ })
#endif
#define STEP(d) \
    _Pragma("GCC unroll 16") \
    for (int i = 0; i < LANES; i++) { \
        if (i & d) continue; \
        vec a = row[i], b = row[i + d]; \
        row[i] = SHUFFLE(a, b, COLUMNS(LOW, d)); \
        row[i + d] = SHUFFLE(a, b, COLUMNS(HIGH, d)); \
    }

static inline __attribute__((always_inline)) void transpose_block(vec row[LANES]) {
    STEP(1)
    STEP(2)
#ifdef __AVX__
    STEP(4)
#endif
#ifdef __AVX512F__
    STEP(8)
#endif
}

// LANES floats, `step` apart, of which n exist; zero stands for the others.
static inline vec load_lanes(const float *from, size_t step, size_t n) {
    union { vec all; float one[LANES]; } lanes = { { 0 } };
    if (step == 1 && n >= LANES) return *(const vec_at *)from;
    for (size_t i = 0; i < min_size(n, LANES); i++) lanes.one[i] = from[i * step];
    return lanes.all;
}

// Where width is no multiple of LANES, a store spills into the next column's place, which is written later.
static void transpose(float *to, size_t width, View from, size_t rows, size_t cols) {
    for (size_t c0 = 0; c0 < cols; c0 += LANES)
        for (size_t r0 = round_up(width, LANES); r0 > 0; r0 -= LANES) {         // the last ones first
            const float *at = part_of(from, r0 - LANES, c0).at;
            vec block[LANES] = { 0 };
            for (size_t r = 0; r < LANES && r0 - LANES + r < rows; r++)
                block[r] = load_lanes(at + r * from.row, from.col, cols - c0);
            transpose_block(block);
            for (size_t c = c0; c < min_size(cols, c0 + LANES); c++)
                *(vec_at *)(to + c * width + r0 - LANES) = block[c - c0];
        }
}

// -----------------------------------------------------------------------------------------------------------
// For few rows of a, packing b would cost more than the product. Where b lies column by column (W^T, the keys
// of attention) it is read once: NV columns meet MR rows at a time, lane by lane along k. For a missing row
// or column the last is computed again. The next columns are fetched meanwhile, into L1 if they fit beside
// rows and columns (24 of 32 KB), otherwise into L2.

enum { NEAR_FLOATS = 3 << 11 };

static void few_along(float *c, size_t ldc, const float *a, size_t a_row, const float *b, size_t b_col,
                      size_t M, size_t N, size_t K, int add) {
    size_t vectors = K / LANES * LANES;
    int near = (M + 2 * NV) * K <= NEAR_FLOATS;
    for (size_t j = 0; j < N; j += NV)
        for (size_t i = 0; i < M; i += MR) {
            const float *a_r[MR], *b_v[NV];
            vec sum[NV][MR] = { 0 };
            float lane[NV][MR][LANES];
            for (size_t r = 0; r < MR; r++) a_r[r] = a + min_size(i + r, M - 1) * a_row;
            for (size_t v = 0; v < NV; v++) b_v[v] = b + min_size(j + v, N - 1) * b_col;
            for (size_t k = 0; k < vectors; k += LANES) {
                #pragma GCC unroll 4
                for (size_t v = 0; v < NV; v++) {
                    const float *next = b_v[0] + NV * (b_col + k) + v * LANES;
                    if (near) __builtin_prefetch(next); else __builtin_prefetch(next, 0, 2);
                }
                #pragma GCC unroll 8
                for (int r = 0; r < MR; r++) {
                    vec a_k = *(const vec_at *)(a_r[r] + k);
                    #pragma GCC unroll 4
                    for (int v = 0; v < NV; v++) sum[v][r] += a_k * *(const vec_at *)(b_v[v] + k);
                }
            }
            memcpy(lane, sum, sizeof sum);
            for (size_t v = 0; v < min_size(NV, N - j); v++)
                for (size_t r = 0; r < min_size(MR, M - i); r++) {
                    float *to = c + (i + r) * ldc + j + v, total = 0;
                    for (int l = 0; l < LANES; l++) total += lane[v][r][l];
                    for (size_t k = vectors; k < K; k++) total += a_r[r][k] * b_v[v][k];
                    *to = add ? *to + total : total;
                }
        }
}

// The product in fp32 where a has few rows, and b lies along k, or along its rows and a is one token's
// (attention's p v, when text is generated). Returns whether it was such a one.
static int matmul_few(float *c, size_t ldc, View a, View b, size_t M, size_t N, size_t K, int add) {
    if (precision != FP32) return 0;
    if (M <= FEW_ROWS && a.col == 1 && b.row == 1) {
        few_along(c, ldc, a.at, a.row, b.at, b.col, M, N, K, add);
        return 1;
    }
    if (M > MR / 2 || b.col != 1) return 0;
    for (size_t i = 0; i < M && !add; i++) memset(c + i * ldc, 0, N * sizeof(float));
    for (size_t k = 0; k < K; k++)
        for (size_t i = 0; i < M; i++)
            for (size_t j = 0; j < N; j++)
                c[i * ldc + j] += a.at[i * a.row + k * a.col] * b.at[k * b.row + j];
    return 1;
}

// -----------------------------------------------------------------------------------------------------------
// The sampled product from transposes of both operands, SPAN lanes of rows at a time. A lane holds one row
// (below in bfloat16 two).

typedef struct {
    size_t steps;                       // rows in a lane
    void (*transpose)(float *to, const float *from, size_t stride, size_t rows, size_t cols);
    size_t (*row)(float *dw, const float *dy_o, const float *x_t, const uint32_t *index,
                  size_t row_start, size_t I, size_t n);
} Sampler;

// to (LANES, SPAN) = LANES columns of from (rows, stride), transposed; `cols` of them exist, and zero stands
// where there are no more rows. Their neighbours, which come next, are fetched meanwhile: they lie a whole
// row apart, which no hardware foresees.
static void transpose_lanes(float *to, const float *from, size_t stride, size_t rows, size_t cols) {
    for (size_t n0 = 0; n0 < SPAN; n0 += LANES) {
        vec block[LANES];
        for (size_t n = n0; n < n0 + LANES; n++) {
            block[n - n0] = n < rows ? load_lanes(from + n * stride, 1, cols) : (vec){ 0 };
            __builtin_prefetch(from + n * stride + LANES, 0, 2);
        }
        transpose_block(block);
        for (size_t c = 0; c < LANES; c++) *(vec_at *)(to + c * SPAN + n0) = block[c];
    }
    round_operands(to, LANES * SPAN);
}

// dw[k] += dy_o . x_i for one row o of dy^T, which stays in registers, and the columns i of its entries,
// index[k] = row_start + i, with which the n entries begin. Returns how many they are.
static inline __attribute__((always_inline))
size_t sampled_row_of(float *dw, const float *dy_o, const float *x_t, const uint32_t *index,
                      size_t row_start, size_t I, size_t n, MultiplyAdd *madd) {
    typedef float quad __attribute__((vector_size(16)));
    vec dy[SPAN / LANES];
    size_t k;
    memcpy(dy, dy_o, sizeof dy);
    for (k = 0; k < n && index[k] < row_start + I; k++) {
        const vec_at *x_i = (const vec_at *)(x_t + (index[k] - row_start) * SPAN);
        union { vec all; quad part[LANES / 4]; } sum = { { 0 } };
        #pragma GCC unroll 8
        for (int l = 0; l < SPAN / LANES; l++) sum.all = madd(sum.all, dy[l], x_i[l]);
        for (int i = 1; i < LANES / 4; i++) sum.part[0] += sum.part[i];     // few additions, in a fixed order
        dw[k] += (sum.part[0][0] + sum.part[0][2]) + (sum.part[0][1] + sum.part[0][3]);
    }
    return k;
}

static size_t sampled_row(float *dw, const float *dy_o, const float *x_t, const uint32_t *index,
                          size_t row_start, size_t I, size_t n) {
    return sampled_row_of(dw, dy_o, x_t, index, row_start, I, n, multiply_add);
}

static const Sampler LANES_SAMPLER = { 1, transpose_lanes, sampled_row };

#ifdef __AVX512BF16__
#define PAIRS_OF_BF16
// -----------------------------------------------------------------------------------------------------------
// PAIRS: a 32-bit lane holds steps 2k (low half) and 2k + 1 of the sum over k, in bfloat16, and one
// instruction multiplies both and adds them in fp32. It takes denormals for zero.

static inline vec multiply_pairs(vec sum, vec a, vec b) {
    // the intrinsic makes gcc 12 store every sum
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}

static inline float pair(float low, float high) {
    union { uint32_t i; float f; } u = { round_bf16(low) | round_bf16(high) << 16 };
    return u.f;
}

typedef union { vec all; float one[LANES]; uint16_t half[2 * LANES]; } Pairs;
static const float NO_STEP[NR];         // what an odd sum's last step is paired with

// LANES pairs along k from one row (or column), whose steps of k are `along` apart; `steps` steps exist.
static inline vec pairs_along(const float *from, size_t along, size_t steps) {
    Pairs pairs = { { 0 } };
    size_t n = min_size(steps, 2 * LANES);
    if (along == 1 && steps >= 2 * LANES)
        for (size_t i = 0; i < 2 * LANES; i++) pairs.half[i] = (uint16_t)round_bf16(from[i]);
    else for (size_t i = 0; i < n; i++) pairs.half[i] = (uint16_t)round_bf16(from[i * along]);
    return pairs.all;
}

// One pair from each of LANES neighbours that lie side by side; `used` of them exist.
static inline vec pairs_across(const float *from, size_t along, size_t steps, size_t used) {
    Pairs pairs = { { 0 } };
    const float *high = steps > 1 ? from + along : NO_STEP;
    if (used >= LANES) for (size_t j = 0; j < LANES; j++) pairs.one[j] = pair(from[j], high[j]);
    else for (size_t j = 0; j < used; j++) pairs.one[j] = pair(from[j], high[j]);
    return pairs.all;
}

// block = LANES pairs from each of LANES rows (or columns); `used` of them and `steps` steps exist.
static inline __attribute__((always_inline))
void pairs_block(vec block[LANES], View strip, size_t used, size_t steps) {
    if (strip.row != 1) {
        for (size_t j = 0; j < LANES; j++)
            block[j] = j < used ? pairs_along(strip.at + j * strip.row, strip.col, steps) : (vec){ 0 };
        return;
    }
    for (size_t k = 0; k < LANES; k++)
        block[k] = 2 * k >= steps ? (vec){ 0 }
                 : pairs_across(strip.at + 2 * k * strip.col, strip.col, steps - 2 * k, used);
    transpose_block(block);
}

static void pack_pairs(float *to, View strip, size_t width, size_t used, size_t K, size_t lanes) {
    if (strip.row == 1)
        for (size_t k = 0; k < lanes; k++) {
            const float *low = 2 * k < K ? strip.at + 2 * k * strip.col : NO_STEP;
            const float *high = 2 * k + 1 < K ? low + strip.col : NO_STEP;
            for (size_t j = 0; j < used; j++) to[k * width + j] = pair(low[j], high[j]);
            for (size_t j = used; j < width; j++) to[k * width + j] = 0;
        }
    else
        for (size_t k0 = 0; k0 < lanes; k0 += LANES)
            for (size_t j0 = round_up(width, LANES); j0 > 0; j0 -= LANES) {
                size_t j = j0 - LANES;
                vec block[LANES];
                pairs_block(block, part_of(strip, j, 2 * k0), used > j ? used - j : 0, K - 2 * k0);
                transpose_block(block);
                for (size_t k = k0; k < min_size(lanes, k0 + LANES); k++)
                    *(vec_at *)(to + k * width + j) = block[k - k0];
            }
}

static void tile_pairs(float *c, size_t ldc, View a, const float *b, size_t lanes,
                       size_t rows, size_t cols, int add) {
    tile_by_width(c, ldc, a, b, lanes, rows, cols, add, multiply_pairs);
}

// As transpose_lanes does it.
static void transpose_pairs(float *to, const float *from, size_t stride, size_t rows, size_t cols) {
    for (size_t n0 = 0; n0 < SPAN; n0 += LANES) {
        vec block[LANES];
        for (size_t n = n0; n < n0 + LANES; n++) {
            const float *row = from + 2 * n * stride;
            block[n - n0] = 2 * n < rows ? pairs_across(row, stride, rows - 2 * n, cols) : (vec){ 0 };
            __builtin_prefetch(row + LANES, 0, 2);
            __builtin_prefetch(row + stride + LANES, 0, 2);
        }
        transpose_block(block);
        for (size_t c = 0; c < LANES; c++) *(vec_at *)(to + c * SPAN + n0) = block[c];
    }
}

static size_t sampled_row_pairs(float *dw, const float *dy_o, const float *x_t, const uint32_t *index,
                                size_t row_start, size_t I, size_t n) {
    return sampled_row_of(dw, dy_o, x_t, index, row_start, I, n, multiply_pairs);
}

static const Kernel PAIRS = { MR, 2, 1, pack_pairs, tile_pairs };
static const Sampler PAIRS_SAMPLER = { 2, transpose_pairs, sampled_row_pairs };

#if defined(__AMX_BF16__) || defined(__AMXBF16__)           // the one is gcc's, the other was clang's
#define AMX_OF_BF16
// -----------------------------------------------------------------------------------------------------------
// AMX: eight registers of 16 x 16 lanes, and one instruction that adds the product of two of them, 16 rows of
// a times 16 columns of b over 32 steps of k, to a third. Six of them hold sums, two a and b:
//
//                      [ b0 ] [ b1 ] [ b2 ]
//        16 rows a0 -> [  0 ] [  1 ] [  2 ]     the same panel of b as above, and as many rows of a as two
//        16 rows a1 -> [  3 ] [  4 ] [  5 ]     registers have

#include <immintrin.h>
#include <sys/syscall.h>

enum { AMX_ROWS = 32 };
static int amx_refused;                     // by Linux, which lends these registers to a program that asks

// The intrinsics do not tell the compiler which memory they read and write: here it is as the program says.
#define AMX_MEMORY(at) __asm__ volatile("" :: "r"(at) : "memory")

// Each thread asks once, and says that all of its registers have 16 rows of 64 bytes.
static int amx_begin(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    struct {
        uint8_t palette, start_row, zero[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shape = { .palette = 1 };
    static _Thread_local int begun;
    if (begun || amx_refused) return begun;
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return amx_refused = 1, 0;
    for (int t = 0; t < 8; t++) shape.row_bytes[t] = 64, shape.rows[t] = 16;
    AMX_MEMORY(&shape);
    _tile_loadconfig(&shape);
    return begun = 1;
}

// b as above. Rows of a a register at a time: to (lanes / 16, AMX_ROWS, 16).
static void pack_amx(float *to, View strip, size_t width, size_t used, size_t K, size_t lanes) {
    if (width != AMX_ROWS) {
        pack_pairs(to, strip, width, used, K, lanes);
        return;
    }
    for (size_t k0 = 0; k0 < lanes; k0 += LANES)
        for (size_t j = 0; j < AMX_ROWS; j += LANES, to += LANES * LANES) {
            vec block[LANES];
            pairs_block(block, part_of(strip, j, 2 * k0), used > j ? used - j : 0, K - 2 * k0);
            memcpy(to, block, sizeof block);
        }
}

// At an edge of c, sums go through a copy of it. Everywhere they start from what c held, so that the place of
// an edge changes no bit.
static void tile_amx(float *c, size_t ldc, View a, const float *b, size_t lanes,
                     size_t rows, size_t cols, int add) {
    float copy[AMX_ROWS * NR];
    int edge = rows < AMX_ROWS || cols < NR;
    float *to = edge ? copy : c;
    size_t next = edge ? NR : ldc;
    #define EACH_SUM(DO) DO(0, 0, 0) DO(1, 0, 16) DO(2, 0, 32) DO(3, 16, 0) DO(4, 16, 16) DO(5, 16, 32)
    #define ZERO(sum, row, col) _tile_zero(sum);
    #define LOAD(sum, row, col) _tile_loadd(sum, to + row * next + col, 4 * next);
    #define STORE(sum, row, col) _tile_stored(sum, to + row * next + col, 4 * next);
    #define LOAD_A(i) _tile_loadd(6, a.at + k * AMX_ROWS + 256 * i, 64);
    #define LOAD_B(j) _tile_loadd(7, b + k * NR + 16 * j, 4 * NR);
    for (size_t r = 0; edge && add && r < rows; r++) memcpy(copy + r * NR, c + r * ldc, cols * sizeof(float));
    AMX_MEMORY(to);
    if (add) { EACH_SUM(LOAD) } else { EACH_SUM(ZERO) }
    for (size_t k = 0; k < lanes; k += 16) {
        LOAD_A(0) LOAD_B(0) _tile_dpbf16ps(0, 6, 7);
        LOAD_A(1)           _tile_dpbf16ps(3, 6, 7);
                  LOAD_B(1) _tile_dpbf16ps(4, 6, 7);
        LOAD_A(0)           _tile_dpbf16ps(1, 6, 7);
                  LOAD_B(2) _tile_dpbf16ps(2, 6, 7);
        LOAD_A(1)           _tile_dpbf16ps(5, 6, 7);
    }
    EACH_SUM(STORE)
    AMX_MEMORY(to);
    for (size_t r = 0; edge && r < rows; r++) memcpy(c + r * ldc, copy + r * NR, cols * sizeof(float));
}

static const Kernel AMX = { AMX_ROWS, 2, LANES, pack_amx, tile_amx };
#endif
#endif

// -----------------------------------------------------------------------------------------------------------
// Which of them

#if defined(AMX_OF_BF16)
static int use_amx(void) { return precision == BF16 && amx_begin(); }
static const Kernel *kernel(void) { return precision == FP32 ? &EVERYWHERE : use_amx() ? &AMX : &PAIRS; }
#elif defined(PAIRS_OF_BF16)
static int use_amx(void) { return 0; }
static const Kernel *kernel(void) { return precision == FP32 ? &EVERYWHERE : &PAIRS; }
#else
static int use_amx(void) { return 0; }
static const Kernel *kernel(void) { return &EVERYWHERE; }
#endif

static const Sampler *sampler(void) {
#ifdef PAIRS_OF_BF16
    if (precision == BF16) return &PAIRS_SAMPLER;
#endif
    return &LANES_SAMPLER;
}

// Where the dense product is so much faster, survivors are worth a way of their own later.
static double sampled_below(void) { return use_amx() ? 0.06 : 0.3; }

// Each thread has its own x^T, x_t_floats(I) of x_t: to read what another core has just written costs more
// than to transpose it again (measured with two threads). Of dy^T it makes LANES rows at a time, where it
// needs them. Threads share the entries evenly, but in whole blocks of LANES rows: the block of row o in
// which a thread's share begins is all its own, and the one in which it ends is the next thread's.
static void sampled_product(float *dw, const uint32_t *index, size_t n, const float *dy, const float *x,
                            float *x_t, size_t O, size_t I, size_t N) {
    const Sampler *use = sampler();
    memset(dw, 0, n * sizeof(float));
    #pragma omp parallel
    {
        size_t id = (size_t)omp_get_thread_num(), threads = (size_t)omp_get_num_threads(), rows;
        size_t first = n * id / threads, last = n * (id + 1) / threads;
        size_t o_first = first < n ? index[first] / I / LANES * LANES : O;
        size_t o_end = last < n ? index[last] / I / LANES * LANES : O;
        float *own = x_t + id * x_t_floats(I);
        while (first && index[first - 1] >= o_first * I) first--;
        for (size_t n0 = 0; n0 < N && o_first < o_end; n0 += rows) {
            rows = min_size(N - n0, use->steps * SPAN);
            for (size_t i = 0; i < I; i += LANES)
                use->transpose(own + i * SPAN, x + n0 * I + i, I, rows, I - i);
            for (size_t o0 = o_first, k = first; o0 < o_end; o0 += LANES) {
                vec dy_t[LANES][SPAN / LANES];
                use->transpose((float *)dy_t, dy + n0 * O + o0, O, rows, O - o0);
                for (size_t o = o0; o < min_size(O, o0 + LANES); o++)
                    k += use->row(dw + k, (float *)dy_t[o - o0], own, index + k, o * I, I, n - k);
            }
        }
    }
}

// -----------------------------------------------------------------------------------------------------------
// What Linux leaves us: free memory, and the limits of our cgroup and of those around it

#include <sys/resource.h>

// The number after `key` at the start of a line of a file; infinity if there is none.
static double number_in(const char *path, const char *key) {
    char line[256];
    double number = INFINITY;
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key)) && sscanf(line + strlen(key), "%lf", &number) == 1) break;
    if (f) fclose(f);
    return number;
}

// A group's limit in bytes. Its files have other names in the second version of cgroups.
static double group_memory(const char *group, int second) {
    char path[PATH_MAX + 96];
    snprintf(path, sizeof path, "%s/memory.%s", group, second ? "max" : "limit_in_bytes");
    return number_in(path, "");
}

// A group's limit in processors: microseconds of work in a period of so many.
static double group_processors(const char *group, int second) {
    char path[PATH_MAX + 96];
    double work = -1, period = 1e5;
    snprintf(path, sizeof path, "%s/cpu.%s", group, second ? "max" : "cfs_quota_us");
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%lf%lf", &work, &period) < 1) work = -1;                // "max 100000"
    if (f) fclose(f);
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", group);
    return work > 0 ? work / (second ? period : number_in(path, "")) : INFINITY;
}

// The least limit of all our groups; infinity where there is none.
static double least_in_groups(const char *controller, double (*limit)(const char *group, int second)) {
    char line[PATH_MAX], group[PATH_MAX + 64];
    double least = INFINITY;
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {                  // "0::/ours" or "4:cpu,cpuacct:/ours"
        char *path = line, *names = (strsep(&path, ":"), strsep(&path, ":"));
        int second = names && !*names, ours = second;
        for (char *name; (name = strsep(&names, ","));) ours |= !strcmp(name, controller);
        for (char *end = ours && path ? strchr(path, '\n') : NULL; end; end = strrchr(path, '/')) {
            *end = 0;
            snprintf(group, sizeof group, "/sys/fs/cgroup/%s%s", second ? "" : controller, path);
            least = fmin(least, limit(group, second));
        }
    }
    if (f) fclose(f);
    return least;
}

// The least of free memory, ulimit -v and the cgroups' limits, in bytes; or infinity.
static double memory_available(void) {
    struct rlimit space;
    double least = least_in_groups("memory", group_memory);
    if (!getrlimit(RLIMIT_AS, &space) && space.rlim_cur != RLIM_INFINITY)
        least = fmin(least, (double)space.rlim_cur);
    return fmin(least, 1024 * number_in("/proc/meminfo", "MemAvailable:"));
}

// -----------------------------------------------------------------------------------------------------------
// How many threads? Where other programs or a quota take cores, fewer are faster, with the same bits. So half
// or twice as many are tried for a window of time between two windows as usual, and stay if they are faster.
// Trials lose a hundredth of the time.

typedef struct {
    int most, used, other, up, settled; // threads; whether `other` is more, and `used` has won a trial
    enum { BEFORE, TRIAL, AFTER } window;
    double began, due;                  // this window, and the earliest time of the next trial
    double work[2], time[2];            // done and seconds as usual, and on trial
} Threads;

// How many the next step should use, after one of so much work that ended now.
static int next_threads(Threads *t, double now, double work) {
    int trial = t->window == TRIAL;
    t->work[trial] += work;
    if (now - t->began < 0.1) return trial ? t->other : t->used;
    t->time[trial] += now - t->began;
    t->began = now;
    if (trial) return t->window = AFTER, t->used;
    if (t->window == BEFORE && now >= t->due) {
        if (t->used == 1 || t->used == t->most) t->up = t->used == 1;
        t->other = t->up ? (int)min_size(2 * (size_t)t->used, (size_t)t->most) : t->used / 2;
        return t->window = TRIAL, t->other;
    }
    double lost = t->time[1] - t->work[1] * t->time[0] / t->work[0];
    if (t->window == AFTER && lost < -0.05 * t->time[1]) t->used = t->other;
    else if (t->window == AFTER) t->up = !t->up, t->settled = 1, t->due = now + 100 * lost;
    t->window = BEFORE;
    t->work[0] = t->work[1] = t->time[0] = t->time[1] = 0;
    return t->used;
}

// After a step of so much work: sets OpenMP's number of threads. Returns whether a number has just proven to
// be the fastest. What the user has set stays.
static int choose_threads(double work) {
    static Threads t;
    int settled = t.settled, now = omp_get_max_threads();
    if (!t.most) t = (Threads){ .most = now, .used = now, .began = seconds() };
    if (t.most == 1 || getenv("OMP_NUM_THREADS")) return 0;
    int n = next_threads(&t, seconds(), work);
    if (n < now) {                                          // OpenMP ends threads that it does not need
        #pragma omp parallel
        if (omp_get_thread_num() >= n) free(packed_a), free(packed_b), packed_a = packed_b = NULL;
    }
    omp_set_num_threads(n);
    return t.settled != settled;
}

// No more threads than a quota leaves processors: all are stopped together when it is used up. Threads that
// wait spin before they sleep, libgomp's for milliseconds: beside a loop a run took 20 times as long
// (dev/LOG.md). It reads its environment before main, so the program starts itself again.
static void prepare_threads(char **argv) {
    (void)argv;
    if (!getenv("OMP_NUM_THREADS"))
        omp_set_num_threads((int)fmin(omp_get_max_threads(), ceil(least_in_groups("cpu", group_processors))));
#ifdef _OPENMP
    char self[PATH_MAX] = "";
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    setenv("KMP_BLOCKTIME", "0", 0);                        // clang's
    if (readlink("/proc/self/exe", self, sizeof self - 1) > 0) execv(self, argv);
#endif
}

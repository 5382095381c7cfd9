// SPDX-License-Identifier: MIT
//
// train_rigsa.c: trains a RIGSA adapter (arXiv 2511.01794) for a SmolLM2 language model, on a CPU, from scratch.
//
// RIGSA teaches a model a new task without making it forget the old ones. Each linear matrix of the transformer becomes
//
//     W = W0 + alpha * (mask . DeltaW)
//
// W0 is the pretrained weight, frozen. DeltaW is full-rank and random, alpha is one learnable gate that starts at 1e-6, so
// that training begins at the pretrained model. After one pass over the data, only entries of DeltaW that are large and did
// not change their sign stay in the mask (iterative magnitude pruning); five rounds leave a few per cent of them, the
// winning ticket, which one more pass trains. Here the new task is to read digits that are written as text.
//
//     make train_rigsa && ./train_rigsa          the default run: a small model, under three minutes
//     ./train_rigsa --help                       every option
//
// What this file will not do: run on a GPU, use fast-math (a NaN must stay an alarm), or be a framework. There is no graph
// and no autograd: the backward pass is written by hand, each gradient line beside the formula that it implements.
// The derivations are in doc/backward.md, the method and its open questions in doc/rigsa.md, file layouts in doc/model.md.
//
// Map
//      1  Nouns         Config, Tensor, Batch, Activations, Model
//      2  Utilities     errors, memory, time, the hash
//      3  Randomness    the counter-based generator that gives DeltaW's initial values back whenever they are needed
//      4  Exponential   one that the compiler can vectorise
//      5  Matmul        the naive one, and the fast one that must equal it
//      6  Layers        rmsnorm, rope, attention, swiglu, cross-entropy: forward, directly followed by backward
//      7  Adapters      the two functions that make W: RIGSA's, and the plain one that trains the weights themselves
//      8  Transformer   forward, head and loss, backward
//      9  AdamW         with decoupled weight decay
//     10  Pruning       the mask: who stays, and where the survivors go back to
//     11  Files         reading and writing models, data and tickets
//     12  Memory        the table of tensors, the plan, the arenas
//     13  Evaluation    exact match, multiple choice, greedy generation
//     14  Options       one table
//     15  Training      a pass, the saved state, the rounds, the table of results, main
//
// Letters, the same everywhere but in section 5
//      N  rows: all tokens of a batch, its sequences laid end to end       T  tokens of one sequence     S  sequences
//      R  rows that a layer goes on with after its keys: N, or M in the last layer                       K  rows of the cache
//      C  hidden size     F  feed-forward size     L  layers               V  vocabulary                 M  answer rows
//      H  query heads     KV  key/value heads      G = H / KV  heads that share a key    D  size of a head
//      O, I  rows (outputs) and columns (inputs) of a linear matrix: y (N, O) = x (N, I) W^T
// A gradient is called by the name of its variable with a d in front, and gradients of parameters only ever accumulate.

#define _GNU_SOURCE
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__AMX_BF16__) || defined(__AMXBF16__)    // the one is gcc's, the other was clang's
#define AMX
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_in_parallel(void) { return 0; }
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the file formats are little-endian, and so must the machine be"
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 1. Nouns

typedef struct {        // the `config` section of a base file (doc/model.md)
    uint32_t C, F, L, H, KV, D, V;
    uint32_t context;   // longest sequence that the model was made for
    uint32_t tied;      // 1: the head is the embedding
    uint32_t dtype;     // of the weights in the file: 0 fp32, 1 bf16
    float theta, eps;   // base of the rotary frequencies; RMSNorm's epsilon
} Config;

// One row of the one table of tensors. Allocation, files, AdamW, pruning and the tests all walk this table.
typedef struct {
    char name[32];             // "embed", "3.q", "3.q.delta", "gates"
    size_t rows, cols;         // (O, I) for a matrix, (1, n) for a vector
    size_t n;                  // values that are stored: rows * cols, or the survivors of a mask
    uint32_t *index;           // (n) where they are, row * cols + column, ascending; NULL: everywhere
    float *value;              // (n)
    uint16_t *half;            // (n) in its place, bfloat16: a frozen matrix with --precision bf16; otherwise NULL
    float *grad, *m, *v;       // (n) gradient and AdamW's two moments; NULL: frozen
    float lr, decay;           // learning rate and decoupled weight decay
    int adapter;               // number of this matrix among the adapted ones, 7 * layer + 0..6; -1: never adapted
} Tensor;

// The place of a layer's tensors in the table: 1 + layer * PER_LAYER + kind.
enum { ATTN_NORM, WQ, WK, WV, WO, FFN_NORM, WGATE, WUP, WDOWN, PER_LAYER, ADAPTED = 7 };

// Sequences laid end to end. Everything but rope and attention sees only N rows; nothing is padded.
typedef struct {
    size_t n;
    uint32_t *row;             // (n) which rows of the batch; NULL: all of them
    uint32_t *start;           // (S + 1) the first of each sequence; start[S] = n
    uint32_t *position;        // (n) of the row within its sequence
} Rows;

// Attention reads keys and values where the layer computed them (training) or, when `cached`, in a cache: there those of a sequence
// lie together, although it shares its context with others (each has a copy) or earlier batches have computed its past.
typedef struct { uint32_t row, to; } Copy;                  // from a row of the batch to a row of the cache

typedef struct {
    size_t S;
    Rows all, answer;          // the N rows, and the M of them that predict an answer token
    uint32_t *token;           // (N)
    uint32_t *target;          // (M) the token that each answer row should predict
    uint32_t *key_start;       // (S) the first key of each sequence: a row of the batch or, when `cached`, of the cache
    int cached;
    size_t copies;
    Copy *copy;                // (copies)
} Batch;

// What the backward pass needs of a layer. What is cheap to compute again is not kept: norm outputs and the gated product.
// In the last layer only answer rows go on after k and v, because nothing reads the others: there, R = M, and R = N elsewhere.
typedef struct {
    float *x;                  // (N, C) input of the layer
    float *q;                  // (R, H, D) queries, rotated
    float *k, *v;              // (N, KV, D) keys, rotated, and values
    float *att;                // (R, H, D) what attention gathered
    float *x2;                 // (R, C) after attention's residual
    float *gate, *up;          // (R, F) the two halves of SwiGLU, before the activation
    float *lse;                // (R, H) log of the sum of the exponentials of the scores
    float *kept;               // where layers share the arrays from x to up: the copy of this layer's, for its backward pass
} Layer;

typedef struct {
    size_t N, T, M, K;         // the largest batch, sequence, number of answer rows, and rows of the cache
    Layer *layer;              // (L + 1) the last one holds only x (M, C), the input of the final norm
    size_t keep;               // floats from x on that a layer's copy holds: all, or with `recompute` only x
    int recompute;             // run a layer's forward pass again before its backward pass: less memory, a third more work
    float *xn, *rstd;          // (N, C), (N) norm output, and 1 / rms of its input
    float *h;                  // (N, F) gated product
    float *dx, *dxn;           // (N, C)
    float *dq, *dk, *dv, *datt;// (N, H, D), (N, KV, D) twice, (N, H, D)
    float *dgate, *dup, *dh;   // (N, F)
    float *transposed;         // (I, SPAN) of the widest matrix, once per thread: x^T for the sampled gradient
    float *cached_k, *cached_v;// (K, KV, D); one for all layers or, where there is a past, one per layer, `layer_stride` apart
    size_t layer_stride;
    float *scores;             // a Block of attention for each thread
    float *cosine, *sine;      // (T, D / 2)
    float *xm, *dxm;           // (M, C) answer rows picked out of N, and their gradient
    float *xf, *dxf;           // (M, C) output of the final norm, its gradient
    float *logits;             // (HEAD_ROWS, V) of a slice of the answer rows
    float *logp;               // (M) log-probability of the target
    uint32_t *best;            // (M) the most likely token
} Activations;

typedef struct Model Model;

// An adapter is two functions; the transformer, the optimizer and the files know nothing else about it.
typedef struct {
    const float *(*weight)(Model *model, Tensor *t);       // the matrix (O, I) that forward and dx shall use in t's place
    // from a product's input x (N, I) and the gradient dy (N, O) of its output, add to the gradients that are trained
    void (*gradient)(Model *model, Tensor *t, const float *x, const float *dy, size_t N);
} Adapter;

typedef enum { REST_ZERO, REST_INIT } Rest;
typedef enum { SURVIVORS_REWIND, SURVIVORS_KEEP, SURVIVORS_REDRAW } Survivors;
typedef enum { THRESHOLD_MATRIX, THRESHOLD_ALL } Threshold;

// DeltaW's initial values are a function of seed, draw (how often survivors were drawn afresh), sigma, matrix and index. With it,
// mask, values and gates make the same W again: it is a section of a ticket.
typedef struct { uint64_t seed; uint32_t draw; Rest rest; float sigma; } __attribute__((packed)) Init;

struct Model {
    Config config;
    struct { uint64_t hash; char name[64]; } base;         // hash of its weights: the base that a ticket belongs to
    Tensor *tensors;           // base tensors in file order, then a DeltaW per adapted matrix, then the gates
    size_t base_tensors, all_tensors;
    Adapter adapter;
    Init init;
    float *scratch;            // (O, I) of the largest matrix: W on its way into a product, or dW on its way out
    Activations acts;
    uint16_t *half_arena;
    float *base_arena, *value_arena;
    size_t trained;            // values, with as many gradients and moments
    float *grad_arena, *m_arena, *v_arena;
    uint32_t *index_arena;
};

static Tensor *layer_tensor(Model *model, size_t l, int kind) { return &model->tensors[1 + l * PER_LAYER + kind]; }
static Tensor *final_norm(Model *model) { return &model->tensors[1 + model->config.L * PER_LAYER]; }
static Tensor *head_tensor(Model *model) { return model->config.tied ? &model->tensors[0] : final_norm(model) + 1; }
static size_t matrices(const Model *model) { return (size_t)ADAPTED * model->config.L; }
static Tensor *delta_tensor(Model *model, size_t a) { return &model->tensors[model->base_tensors + a]; }
static Tensor *gates_tensor(Model *model) { return delta_tensor(model, matrices(model)); }

// How many values are stored in the tensors from `first` up to `end`.
static size_t values_in(const Tensor *first, const Tensor *end)
{
    size_t n = 0;
    for (const Tensor *t = first; t < end; t++) n += t->n;
    return n;
}

static size_t adapter_entries(Model *model) { return values_in(delta_tensor(model, 0), gates_tensor(model)); }
static size_t base_weights(const Model *model) { return values_in(model->tensors, model->tensors + model->base_tensors); }

// Of the matrices that are adapted: as many as a dense adapter has entries.
static size_t adapted_weights(const Model *model)
{
    size_t n = 0;
    for (size_t i = 0; i < model->base_tensors; i++) if (model->tensors[i].adapter >= 0) n += model->tensors[i].n;
    return n;
}

static const char *const KIND[ADAPTED] = { "q", "k", "v", "o", "gate", "up", "down" };   // of adapted matrix a: a % ADAPTED

// ---------------------------------------------------------------------------------------------------------------------
// 2. Utilities

// A user's error: one line, whatever a file had us quote, that says what is wrong, where, and what to run to mend it.
__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...)
{
    char text[2 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c; c++) if (iscntrl((unsigned char)*c)) *c = '?';
    fflush(stdout);
    fprintf(stderr, "%strain_rigsa: %s\n", isatty(2) ? "\r\033[K" : "", text);
    exit(1);
}

// The place of the word in "a|b|c", or -1.
static int choice_place(const char *words, const char *text)
{
    for (int i = 0; ; i++, words++) {
        size_t length = strcspn(words, "|");
        if (strlen(text) == length && !strncmp(words, text, length)) return i;
        words += length;
        if (!*words) return -1;
    }
}

// The word at this place.
static void choice_word(char to[24], const char *words, int place)
{
    while (place--) words += strcspn(words, "|") + 1;
    snprintf(to, 24, "%.*s", (int)strcspn(words, "|"), words);
}

// Zeroed memory on a cache line of its own.
static void *allocate(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX - 64) die("out of memory: %zu x %zu", count, size);
    bytes = (bytes + 64) / 64 * 64;
    void *p = aligned_alloc(64, bytes);
    if (!p) die("out of memory: %.2f GB more are needed", 1e-9 * (double)bytes);
    return memset(p, 0, bytes);
}

static float *floats(size_t count) { return allocate(count, sizeof(float)); }
static uint32_t *integers(size_t count) { return allocate(count, sizeof(uint32_t)); }

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// A thread's share of n elements, in whole vectors: a loop's scalar rest may fuse its products differently, and which elements
// are that rest must not depend on the number of threads.
static size_t share_of(size_t n) { return round_up(n / (size_t)omp_get_max_threads() + 1, 64); }

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int all_finite(const float *x, size_t n)
{
    int bad = 0;
    #pragma omp parallel for reduction(|:bad)
    for (size_t i = 0; i < n; i++) bad |= !isfinite(x[i]);
    return !bad;
}

#define GOLDEN 0x9E3779B97F4A7C15u          // 2^64 / golden ratio: consecutive multiples are spread evenly

// The finalizer of splitmix64 (Steele, Lea & Flood 2014): a bijection of 64 bits; each input bit flips half of the others.
static inline uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// Hash of n bytes: a sum over 64-bit words, each mixed with its position, so that any number of threads finds the same one.
static uint64_t hash64(const void *data, size_t n)
{
    const char *bytes = data;
    size_t words = n / 8, rest = n % 8;
    uint64_t sum = mix(n), last = 0;
    #pragma omp parallel for reduction(+:sum)
    for (size_t i = 0; i < words; i++) {
        uint64_t w;
        memcpy(&w, bytes + 8 * i, 8);
        sum += mix(w + (i + 1) * GOLDEN);
    }
    if (rest) {
        memcpy(&last, bytes + 8 * words, rest);
        sum += mix(last + (words + 1) * GOLDEN);
    }
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Randomness
//
// DeltaW's initial value at an index is a pure function of (key, index). Pruning compares signs with it and rewinding
// restores it, yet no copy of it is ever stored. It has the same bits on every machine: integers, one product and one
// rounding, nothing that a compiler may contract or a libm may round its own way.

enum { STREAM_DELTA, STREAM_ORDER };

// The key of one stream of random numbers; `stream` says what for, `a` and `b` which.
static uint64_t random_key(uint64_t seed, uint64_t stream, uint64_t a, uint64_t b)
{
    return mix(mix(mix(mix(seed + GOLDEN) + stream) + a) + b);
}

// Normal with standard deviation sigma. The number of ones among 64 random bits is binomial: nearly normal out to 8 sigma, but
// in steps of sigma / 4. Two 16-bit uniforms, each one step wide, fill the steps (density piecewise linear, kurtosis 2.97).
// Twice the sum plus one is odd, so the value is never zero and always has a sign. Its variance is 2^34 (64 / 4 + 2 / 12).
static inline float normal(uint64_t key, uint64_t index, float sigma)
{
    uint64_t coins = mix(key + (2 * index + 1) * GOLDEN), fill = mix(key + (2 * index + 2) * GOLDEN);
    int z = (__builtin_popcountll(coins) - 32) * 65536 + (int)(fill & 0xFFFF) + (int)(fill >> 16 & 0xFFFF) - 65535;
    return (float)((double)(2 * z + 1) * ((double)sigma / 527011.5848));
}

// order = a permutation of 0..n-1 (Fisher and Yates).
static void shuffle(uint32_t *order, size_t n, uint64_t key)
{
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    for (size_t i = n; i > 1; i--) {
        size_t j = (size_t)((mix(key + i * GOLDEN) >> 32) * i >> 32);     // 0..i-1
        uint32_t swap = order[i - 1];
        order[i - 1] = order[j];
        order[j] = swap;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 4. Exponential
//
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2: a polynomial (with the coefficients of Cephes' expf) times a power
// of two. Within 2 ulp of the true value; 0 below -87, infinity above 88.72, and NaN stays NaN. Unlike libm's it has no branch
// and no call, so the loops around it become vector code; out of its range it computes nonsense, and only then chooses.

static inline float exponential(float x)
{
    // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
    const union { float f; uint32_t i; } magic = { 12582912.0f };
    union { float f; uint32_t i; } rounded = { x * 1.44269504f + magic.f }, low, high;
    float n = rounded.f - magic.f;
    float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t whole = (int32_t)(rounded.i - magic.i), half = whole >> 1;
    low.i = (uint32_t)(half + 127) << 23;           // 2^n in two factors: each is a normal number, even where 2^n is not
    high.i = (uint32_t)(whole - half + 127) << 23;
    float y = x < -87.0f ? 0.0f : p * low.f * high.f;
    return x > 88.7228f ? INFINITY : y;
}

// ---------------------------------------------------------------------------------------------------------------------
// 5. Matmul
//
// c (M, N) = a (M, K) b (K, N), or += when `add` is set. Rows of c are ldc apart. a and b may be stored either way round:
// element (i, k) of a is a[i * a_row + k * a_col], so a transpose is two strides exchanged. The three products of a linear layer
//
//     y  (N, O)  = x (N, I) W^T       dx (N, I) = dy (N, O) W       dW (O, I) = dy^T x
//
// are all this one function, and so are those of attention.

__attribute__((unused))              // here: it is what the tests compare with
static void matmul_naive(float *c, size_t ldc, const float *a, size_t a_row, size_t a_col,
                         const float *b, size_t b_row, size_t b_col, size_t M, size_t N, size_t K, int add)
{
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += a[i * a_row + k * a_col] * b[k * b_row + j * b_col];
            c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
        }
}

// The fast one computes c in tiles of MR x NR that stay in registers while k runs:
//
//                      NR = NV vectors of b
//                     [ b0 ][ b1 ][ b2 ]
//       MR   a[0] ->  [    ][    ][    ]      one step of k: load NV vectors of b, broadcast MR scalars of a, and
//       rows a[1] ->  [    ][    ][    ]      MR * NV fused multiply-adds, each into its own register
//       of a  ...     [    ][    ][    ]
//
// AVX-512 has 32 registers of 16 floats: 8 x 3 accumulators leave room for b. Half as many registers of 8 or of 4: 6 x 2.
#if defined(__AVX512F__)
enum { LANES = 16, MR = 8, NV = 3 };
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX__)
enum { LANES = 8, MR = 6, NV = 2 };
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
enum { LANES = 4, MR = 6, NV = 2 };
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif
// So that k runs over consecutive memory, a and b are first copied ("packed") in the order in which the tiles read them. Each
// thread has its own: a slice of b, KC x NC (3.5 MB with AVX-512), for L3, and a block of a, MC x KC, for L2.
enum { NR = NV * LANES, KC = 576, MC = 96, NC = 32 * NR };
enum { PACKED_A = MC * KC + LANES, PACKED_B = KC * NC };              // floats; a block's last store may spill over
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES)));

// Made when a thread first needs them: its stack, where thread-local arrays lie, may be small.
static _Thread_local float *packed_a, *packed_b;

// With --precision bf16 both operands are rounded to bfloat16, the upper half of a float, on their way into the packed slices,
// where each 32-bit lane then holds a pair: steps 2k (low half) and 2k + 1 of the sum over k. Sums stay in fp32.
typedef enum { FP32, BF16 } Precision;
static Precision precision;

static size_t steps_per_lane(void) { return precision == BF16 ? 2 : 1; }

// To bfloat16, ties to even. A NaN stays one: the carry out of its mantissa could make it a zero.
static inline uint32_t round_bf16(float x)
{
    union { float f; uint32_t i; } u = { x };
    return (x == x ? u.i + 0x7FFF + (u.i >> 16 & 1) : 0x7FC00000) >> 16;
}

static inline float widen_bf16(uint16_t x)
{
    union { uint32_t i; float f; } u = { (uint32_t)x << 16 };
    return u.f;
}

static inline float pair_bf16(float low, float high)
{
    union { uint32_t i; float f; } u = { round_bf16(low) | round_bf16(high) << 16 };
    return u.f;
}

static inline vec broadcast(float x) { return x - (vec){ 0 }; }          // x + 0 would not be x where x is -0

// sum + a b, lane by lane: one product in fp32, two in bf16. The instruction and its portable
// twin differ in rounding, and the instruction takes denormals for zero.
static inline __attribute__((always_inline)) vec multiply_add(vec sum, vec a, vec b, Precision of)
{
    if (of == FP32) return sum + a * b;
#ifdef __AVX512BF16__
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));   // the intrinsic makes gcc 12 store every sum at every step
    return sum;
#else
    vec_bits ia = (vec_bits)a, ib = (vec_bits)b;
    return sum + (vec)(ia & 0xFFFF0000) * (vec)(ib & 0xFFFF0000) + (vec)(ia << 16) * (vec)(ib << 16);
#endif
}

// c (rows <= MR, cols <= nv LANES) = or += MR rows of a, whose lane (r, k) is a[r * a_row + k * a_col], times a packed panel of b.
static inline __attribute__((always_inline))
void matmul_tile(float *c, size_t ldc, const float *a, size_t a_row, size_t a_col, const float *pb, size_t K,
                 size_t rows, size_t cols, int add, int nv, Precision of)
{
    vec sum[MR][NV] = { 0 };
    for (size_t r = 0; r < rows; r++)
        for (int v = 0; v < nv; v++) __builtin_prefetch(c + r * ldc + v * LANES, 1);     // needed when k is through
    for (size_t k = 0; k < K; k++, a += a_col, pb += NR) {
        vec b[NV];
        #pragma GCC unroll 4
        for (int v = 0; v < nv; v++) b[v] = *(const vec *)(pb + v * LANES);
        #pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
            #pragma GCC unroll 4
            for (int v = 0; v < nv; v++) sum[r][v] = multiply_add(sum[r][v], broadcast(a[(size_t)r * a_row]), b[v], of);
    }
    if (rows == MR && cols == (size_t)nv * LANES) {
        #pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
            #pragma GCC unroll 4
            for (int v = 0; v < nv; v++) {
                vec *to = (vec *)(c + r * ldc + v * LANES);
                *to = add ? (vec)(*to + sum[r][v]) : sum[r][v];
            }
    } else {                                             // an edge of c: only what is inside, by way of memory
        float from[MR * NR];
        #pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
            #pragma GCC unroll 4
            for (int v = 0; v < nv; v++) *(vec *)(from + r * NR + v * LANES) = sum[r][v];
        for (size_t r = 0; r < rows; r++)
            for (size_t j = 0; j < cols; j++) c[r * ldc + j] = add ? c[r * ldc + j] + from[r * NR + j] : from[r * NR + j];
    }
}

// AMX, which some of Intel's processors have for bf16: eight registers of 16 x 16 lanes, and one instruction that adds the product of
// two of them, 16 rows of a times 16 columns of b over 32 steps of k, to a third. Six of them hold sums, two a and b:
//
//                      [ b0 ] [ b1 ] [ b2 ]
//        16 rows a0 -> [  0 ] [  1 ] [  2 ]     the same panel of b as above, and as many rows of a as two registers have
//        16 rows a1 -> [  3 ] [  4 ] [  5 ]
enum { AMX_ROWS = 32 };
static _Thread_local int amx_granted;

static int use_amx(void) { return amx_granted && precision == BF16; }

#ifdef AMX
// The intrinsics do not tell the compiler which memory they read and write: here it is as the program says.
#define AMX_MEMORY(at) __asm__ volatile("" :: "r"(at) : "memory")

// Linux lends these registers to a program that asks; then each thread says that all of its have 16 rows of 64 bytes. 0: refused.
static int amx_begin(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    struct { uint8_t palette, start_row, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } shape = { .palette = 1 };
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return 0;
    for (int t = 0; t < 8; t++) shape.row_bytes[t] = 64, shape.rows[t] = 16;
    AMX_MEMORY(&shape);
    _tile_loadconfig(&shape);
    return 1;
}

// c (rows <= AMX_ROWS, cols <= NR) = or += rows of a as amx_pack leaves them times a packed panel of b. At an edge of c, sums go
// through a copy of it; everywhere they start from what c held, so that the place of an edge changes no bit.
static void amx_tile(float *c, size_t ldc, const float *pa, const float *pb, size_t lanes, size_t rows, size_t cols, int add)
{
    float copy[AMX_ROWS * NR];
    int edge = rows < AMX_ROWS || cols < NR;
    float *to = edge ? copy : c;
    size_t next = edge ? NR : ldc;
    #define EACH_SUM(DO) DO(0, 0, 0) DO(1, 0, 16) DO(2, 0, 32) DO(3, 16, 0) DO(4, 16, 16) DO(5, 16, 32)
    #define ZERO(sum, row, col) _tile_zero(sum);
    #define LOAD(sum, row, col) _tile_loadd(sum, to + row * next + col, 4 * next);
    #define STORE(sum, row, col) _tile_stored(sum, to + row * next + col, 4 * next);
    #define LOAD_A(i) _tile_loadd(6, pa + k * AMX_ROWS + 256 * i, 64);
    #define LOAD_B(j) _tile_loadd(7, pb + k * NR + 16 * j, 4 * NR);
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
#else
static int amx_begin(void) { return 0; }
#endif

static void matmul_tiles(float *c, size_t ldc, const float *a, size_t a_row, size_t a_col, const float *pb, size_t K,
                         size_t rows, size_t cols, int add)
{
#ifdef AMX
    if (use_amx()) {
        amx_tile(c, ldc, a, pb, K, rows, cols, add);
        return;
    }
#endif
    #define TILE(nv, of) matmul_tile(c, ldc, a, a_row, a_col, pb, K, rows, cols, add, nv, of)
    if (precision == FP32) cols <= LANES ? TILE(1, FP32) : cols <= 2 * LANES ? TILE(2, FP32) : TILE(NV, FP32);
    else                   cols <= LANES ? TILE(1, BF16) : cols <= 2 * LANES ? TILE(2, BF16) : TILE(NV, BF16);
    #undef TILE
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vec_bits){ __VA_ARGS__ })
#endif

// A block of LANES x LANES transposed in registers: each of log2(LANES) steps deals row i and row i + LANES / 2 out alternately,
// lane by lane, like two halves of a deck of cards.
static inline __attribute__((always_inline)) void transpose_block(vec row[LANES])
{
    vec dealt[LANES];
    #pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        #pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            dealt[2 * i] = SHUFFLE(row[i], row[i + LANES / 2], LOW_HALVES);
            dealt[2 * i + 1] = SHUFFLE(row[i], row[i + LANES / 2], HIGH_HALVES);
        }
        memcpy(row, dealt, sizeof dealt);
    }
}

typedef union { vec all; float one[LANES]; uint16_t half[2 * LANES]; } Lanes;
static const float ZEROS[NR];           // what an odd sum's last step is paired with

// LANES lanes along k from one row (or column), whose steps of k are `along` apart; only `steps` steps exist, the others are zero.
static inline vec lanes_along(const float *from, size_t along, size_t steps)
{
    Lanes lanes = { { 0 } };
    if (precision == FP32) {
        if (along == 1 && steps >= LANES) return *(const vec *)from;
        for (size_t i = 0; i < min_size(steps, LANES); i++) lanes.one[i] = from[i * along];
    } else if (along == 1 && steps >= 2 * LANES)
        for (size_t i = 0; i < 2 * LANES; i++) lanes.half[i] = (uint16_t)round_bf16(from[i]);
    else for (size_t i = 0; i < min_size(steps, 2 * LANES); i++) lanes.half[i] = (uint16_t)round_bf16(from[i * along]);
    return lanes.all;
}

// One lane of k from each of LANES neighbours that lie side by side; only `used` of them exist.
static inline vec lanes_across(const float *from, size_t along, size_t steps, size_t used)
{
    Lanes lanes = { { 0 } };
    const float *high = steps > 1 ? from + along : ZEROS;
    if (precision == FP32) {
        if (used >= LANES) return *(const vec *)from;
        for (size_t j = 0; j < used; j++) lanes.one[j] = from[j];
    } else if (used >= LANES) for (size_t j = 0; j < LANES; j++) lanes.one[j] = pair_bf16(from[j], high[j]);
    else for (size_t j = 0; j < used; j++) lanes.one[j] = pair_bf16(from[j], high[j]);
    return lanes.all;
}

// block = LANES lanes of k from each of LANES rows (or columns), `across` apart; `used` of them and `steps` steps exist.
static inline __attribute__((always_inline))
void lanes_block(vec block[LANES], const float *from, size_t across, size_t along, size_t used, size_t steps)
{
    size_t per = steps_per_lane();
    if (across != 1) {
        for (size_t j = 0; j < LANES; j++) block[j] = j < used ? lanes_along(from + j * across, along, steps) : (vec){ 0 };
        return;
    }
    for (size_t k = 0; k < LANES; k++)
        block[k] = per * k < steps ? lanes_across(from + per * k * along, along, steps - per * k, used) : (vec){ 0 };
    transpose_block(block);
}

// to (lanes, width) = the strip of `width` rows (or columns) that starts at from; `used` of them and K steps exist, the rest is zero.
// Neighbours are `across` apart, steps of k `along`. Where width is no multiple of LANES, a store spills into the next lane's
// place, which is written after it. (lanes_across would be slower for the MR rows of a, half a vector.)
static void matmul_pack(float *to, const float *from, size_t across, size_t along, size_t width, size_t used, size_t K, size_t lanes)
{
    size_t per = steps_per_lane();
    if (across == 1)
        for (size_t k = 0; k < lanes; k++) {
            const float *low = per * k < K ? from + per * k * along : ZEROS, *high = per * k + 1 < K ? low + along : ZEROS;
            if (precision == FP32 && used == MR) memcpy(to + k * width, low, MR * sizeof(float));   // a known size: no call
            else if (precision == FP32) for (size_t j = 0; j < used; j++) to[k * width + j] = low[j];
            else for (size_t j = 0; j < used; j++) to[k * width + j] = pair_bf16(low[j], high[j]);
            for (size_t j = used; j < width; j++) to[k * width + j] = 0;
        }
    else
        for (size_t k0 = 0; k0 < lanes; k0 += LANES)
            for (size_t j0 = (width - 1) / LANES * LANES + LANES; (j0 -= LANES) < width; ) {
                vec block[LANES];
                lanes_block(block, from + j0 * across + per * k0 * along, across, along, used > j0 ? used - j0 : 0, K - per * k0);
                transpose_block(block);
                for (size_t k = k0; k < min_size(lanes, k0 + LANES); k++) *(vec *)(to + k * width + j0) = block[k - k0];
            }
}

// The same for AMX, a register at a time: to (lanes / 16, AMX_ROWS, 16) = AMX_ROWS rows of a.
static void amx_pack(float *to, const float *from, size_t across, size_t along, size_t used, size_t K, size_t lanes)
{
    for (size_t k0 = 0; k0 < lanes; k0 += LANES)
        for (size_t j0 = 0; j0 < AMX_ROWS; j0 += LANES, to += LANES * LANES) {
            vec block[LANES];
            lanes_block(block, from + j0 * across + 2 * k0 * along, across, along, used > j0 ? used - j0 : 0, K - 2 * k0);
            memcpy(to, block, sizeof block);
        }
}

// For few rows of a, packing b would cost more than the product. Where b lies column by column (W^T, the keys of attention) it is
// read once: NV columns meet MR rows at a time, lane by lane along k. For a missing row or column the last is computed again.
// The next columns are fetched meanwhile, into L1 if they fit beside rows and columns (24 of 32 KB), otherwise into L2.
enum { FEW_ROWS = 3 * MR, NEAR_FLOATS = 3 << 11 };

static void matmul_few(float *c, size_t ldc, const float *a, size_t a_row, const float *b, size_t b_col,
                       size_t M, size_t N, size_t K, int add)
{
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
                    vec a_k = *(const vec *)(a_r[r] + k);
                    #pragma GCC unroll 4
                    for (int v = 0; v < NV; v++) sum[v][r] += a_k * *(const vec *)(b_v[v] + k);
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

// The product on one thread. In fp32, rows of a that lie along k are read where they are.
static void matmul_alone(float *c, size_t ldc, const float *a, size_t a_row, size_t a_col,
                         const float *b, size_t b_row, size_t b_col, size_t M, size_t N, size_t K, int add)
{
    if (M <= FEW_ROWS && a_col == 1 && b_row == 1 && precision == FP32) {
        matmul_few(c, ldc, a, a_row, b, b_col, M, N, K, add);
        return;
    }
    if (M <= MR / 2 && b_col == 1 && precision == FP32) {                // attention's p v, when a token is generated
        for (size_t i = 0; i < M && !add; i++) memset(c + i * ldc, 0, N * sizeof(float));
        for (size_t k = 0; k < K; k++)
            for (size_t i = 0; i < M; i++)
                for (size_t j = 0; j < N; j++) c[i * ldc + j] += a[i * a_row + k * a_col] * b[k * b_row + j];
        return;
    }
    if (!packed_a) packed_a = floats(PACKED_A), packed_b = floats(PACKED_B), amx_granted = amx_begin();
    float *pa = packed_a, *pb = packed_b;
    size_t mr = use_amx() ? AMX_ROWS : MR, per = steps_per_lane();
    size_t blocks = (M + MC - 1) / MC, mc = round_up((M + blocks - 1) / blocks, mr);
    for (size_t j0 = 0; j0 < N; j0 += NC)
        for (size_t k0 = 0; k0 < K; k0 += per * KC) {
            size_t nc = min_size(NC, N - j0), kc = min_size(per * KC, K - k0);
            size_t lanes = round_up((kc + per - 1) / per, use_amx() ? LANES : 1);
            for (size_t j = 0; j < nc; j += NR)
                matmul_pack(pb + j * lanes, b + k0 * b_row + (j0 + j) * b_col, b_col, b_row, NR, min_size(NR, nc - j), kc, lanes);
            for (size_t i0 = 0; i0 < M; i0 += mc) {
                size_t rows = min_size(mc, M - i0), direct = precision == FP32 && a_col == 1 ? rows / MR * MR : 0;
                const float *a0 = a + i0 * a_row + k0 * a_col;
                for (size_t i = direct; i < rows; i += mr)
                    if (use_amx()) amx_pack(pa + i * lanes, a0 + i * a_row, a_row, a_col, min_size(mr, rows - i), kc, lanes);
                    else matmul_pack(pa + i * lanes, a0 + i * a_row, a_row, a_col, MR, min_size(MR, rows - i), kc, lanes);
                for (size_t j = 0; j < nc; j += NR) {
                    float *c0 = c + i0 * ldc + j0 + j;
                    size_t cols = min_size(NR, nc - j);
                    for (size_t i = 0; i < direct; i += MR)
                        matmul_tiles(c0 + i * ldc, ldc, a0 + i * a_row, a_row, 1, pb + j * lanes, lanes, MR, cols, add || k0);
                    for (size_t i = direct; i < rows; i += mr)
                        matmul_tiles(c0 + i * ldc, ldc, pa + i * lanes, 1, MR, pb + j * lanes, lanes,
                                     min_size(mr, rows - i), cols, add || k0);
                }
            }
        }
}

// Threads share c as a grid of rectangles and work alone, each with its own packed slices: none waits for another, and none reads
// what another has just written. The grid keeps the rectangles' sides, which are what is packed twice, short. Each element of c has
// one order of its sum: the same bits for any number of threads. A thread among others (attention's) computes all of c.
static void matmul(float *c, size_t ldc, const float *a, size_t a_row, size_t a_col,
                   const float *b, size_t b_row, size_t b_col, size_t M, size_t N, size_t K, int add)
{
    if (K == 0 && !add)
        for (size_t i = 0; i < M; i++) memset(c + i * ldc, 0, N * sizeof(float));
    if (omp_in_parallel()) {
        matmul_alone(c, ldc, a, a_row, a_col, b, b_row, b_col, M, N, K, add);
        return;
    }
    #pragma omp parallel
    {
        // down x across rectangles with the shortest sides. Each keeps more than FEW_ROWS rows, or all of them: otherwise it would
        // take another path through matmul_alone than the whole does, and get other bits.
        size_t threads = (size_t)omp_get_num_threads(), id = (size_t)omp_get_thread_num(), down = 1;
        for (size_t n = 2; n <= threads && M / n >= FEW_ROWS + MR; n++)
            if (threads % n == 0 && M / n + N / (threads / n) <= M / down + N / (threads / down)) down = n;
        size_t across = threads / down, row = id / across, col = id % across;
        size_t i = round_up(M * row / down, MR), i_end = min_size(M, round_up(M * (row + 1) / down, MR));
        size_t j = round_up(N * col / across, NR), j_end = min_size(N, round_up(N * (col + 1) / across, NR));
        if (i < i_end && j < j_end)
            matmul_alone(c + i * ldc + j, ldc, a + i * a_row, a_row, a_col, b + j * b_col, b_row, b_col,
                         i_end - i, j_end - j, K, add);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6. Layers

// x (N, C) = the rows of embed (V, C) that the tokens name.
static void embedding_forward(float *x, const float *embed, const uint32_t *token, size_t N, size_t C)
{
    #pragma omp parallel for
    for (size_t n = 0; n < N; n++) memcpy(x + n * C, embed + token[n] * C, C * sizeof(float));
}

// dembed[token[n]] += dx[n]. A token may stand in many rows, so threads share the columns, not the rows.
static void embedding_backward(float *dembed, const float *dx, const uint32_t *token, size_t N, size_t C)
{
    #pragma omp parallel for schedule(static, 16)
    for (size_t c = 0; c < C; c++)
        for (size_t n = 0; n < N; n++) dembed[token[n] * C + c] += dx[n * C + c];
}

// out (N, C) = x * rstd * w, with w (C) and rstd (N) = 1 / sqrt(mean(x^2) + eps), which the backward pass needs, too.
static void rmsnorm_forward(float *out, float *rstd, const float *x, const float *w, size_t N, size_t C, float eps)
{
    #pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *x_n = x + n * C;
        float *out_n = out + n * C, squares = 0;
        #pragma omp simd reduction(+:squares)
        for (size_t c = 0; c < C; c++) squares += x_n[c] * x_n[c];
        float r = 1.0f / sqrtf(squares / (float)C + eps);
        for (size_t c = 0; c < C; c++) out_n[c] = x_n[c] * r * w[c];
        rstd[n] = r;
    }
}

// With y_c = x_c r w_c and r = (mean(x^2) + eps)^(-1/2), so that dr/dx_c = -r^3 x_c / C:
//     dx_c += r w_c dy_c - x_c r^3 / C sum_j(dy_j w_j x_j)          dw_c += sum_n dy_c x_c r
// dw is NULL when the norm is frozen.
static void rmsnorm_backward(float *dx, float *dw, const float *dy, const float *x, const float *w, const float *rstd,
                             size_t N, size_t C)
{
    #pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *x_n = x + n * C, *dy_n = dy + n * C;
        float *dx_n = dx + n * C, r = rstd[n], dot = 0;
        #pragma omp simd reduction(+:dot)
        for (size_t c = 0; c < C; c++) dot += dy_n[c] * w[c] * x_n[c];
        float shared = r * r * r / (float)C * dot;
        for (size_t c = 0; c < C; c++) dx_n[c] += r * w[c] * dy_n[c] - shared * x_n[c];
    }
    if (!dw) return;
    #pragma omp parallel for schedule(static, 16)
    for (size_t c = 0; c < C; c++) {
        float sum = 0;
        for (size_t n = 0; n < N; n++) sum += dy[n * C + c] * x[n * C + c] * rstd[n];
        dw[c] += sum;
    }
}

// cosine and sine (T, D / 2) of the angle position * theta^(-2i / D), in single precision as Hugging Face computes it.
static void rope_table(float *cosine, float *sine, size_t T, size_t D, float theta)
{
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < D / 2; i++) {
            float frequency = 1.0f / powf(theta, (float)(2 * i) / (float)D);
            cosine[t * (D / 2) + i] = cosf((float)t * frequency);
            sine[t * (D / 2) + i] = sinf((float)t * frequency);
        }
}

// Rotates the pairs (i, i + D/2) of every head of x (N, heads, D), in place, by the angle of the row's position. The backward
// pass of a rotation is the rotation back: direction -1.
static void rope(float *x, const float *cosine, const float *sine, const uint32_t *position, size_t N, size_t heads, size_t D,
                 float direction)
{
    size_t half = D / 2;
    #pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *cos_n = cosine + position[n] * half, *sin_n = sine + position[n] * half;
        for (size_t h = 0; h < heads; h++) {
            float *low = x + (n * heads + h) * D, *high = low + half;
            #pragma omp simd
            for (size_t i = 0; i < half; i++) {
                float a = low[i], b = high[i], c = cos_n[i], s = direction * sin_n[i];
                low[i] = a * c - b * s;
                high[i] = b * c + a * s;
            }
        }
    }
}

// Causal attention with grouped queries: head h of q (R, H, D) reads head h / G of k and v (N, KV, D). A row of `query` sees the
// keys of its own sequence, key_start[s] and on, up to its own position. About QUERIES queries at a time, the G heads of some rows
// one above the other, meet all keys that they may see: memory grows with T and never with T^2, and the heads of a group share
// the packed keys. Forward has one task per sequence, kv head and block. Backward has one per sequence and kv head, because blocks
// add to the same dk and dv. No two tasks write to the same place.
enum { QUERIES = 144 };

typedef struct { float *p, *ds, *q, *out, *dout; } Block;          // (queries, wide) twice, (queries, D) three times

// Keys in whole vectors, so that no loop over them has a rest; what is not a key that the query may see is masked.
static size_t whole_vectors(size_t keys) { return round_up(keys, LANES); }
static size_t block_floats(size_t G, size_t T, size_t D) { return max_size(QUERIES, G) * (2 * whole_vectors(T) + 3 * D); }

// The block of the calling thread; `scores` has one for each.
static Block thread_block(float *scores, size_t G, size_t T, size_t D)
{
    size_t queries = max_size(QUERIES, G);
    float *p = scores + (size_t)omp_get_thread_num() * block_floats(G, T, D), *ds = p + queries * whole_vectors(T);
    float *q = ds + queries * whole_vectors(T);
    return (Block){ p, ds, q, q + queries * D, q + 2 * queries * D };
}

// to (rows, width) = from (rows, ...), whose rows start `stride` apart; rows of `to` are `to_stride` apart.
static void copy_rows(float *to, size_t to_stride, const float *from, size_t stride, size_t rows, size_t width)
{
    for (size_t r = 0; r < rows; r++) memcpy(to + r * to_stride, from + r * stride, width * sizeof(float));
}

// The largest of x, n floats in whole vectors. LANES running maxima, because a single one is a chain that gcc may not reorder.
static float maximum(const float *x, size_t n)
{
    float lane[LANES], highest = x[0];
    for (int i = 0; i < LANES; i++) lane[i] = highest;
    for (size_t j = 0; j < n; j += LANES) {
        #pragma omp simd
        for (int i = 0; i < LANES; i++) lane[i] = x[j + i] > lane[i] ? x[j + i] : lane[i];
    }
    for (int i = 0; i < LANES; i++) highest = lane[i] > highest ? lane[i] : highest;
    return highest;
}

static void attention_forward(float *out, float *lse, const float *q, const float *k, const float *v, float *scores,
                              const Rows *query, const uint32_t *key_start, size_t S, size_t H, size_t KV, size_t D, size_t T_max)
{
    size_t G = H / KV, step = max_size(1, QUERIES / G);
    float scale = 1.0f / sqrtf((float)D);
    size_t longest = 0;                                  // of the sequences' queries: one each when tokens are generated
    for (size_t s = 0; s < S; s++) longest = max_size(longest, query->start[s + 1] - query->start[s]);
    size_t blocks = (longest + step - 1) / step;
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (size_t s = 0; s < S; s++)
        for (size_t kv = 0; kv < KV; kv++)
            for (size_t block = 0; block < blocks; block++) {
                size_t r0 = query->start[s] + (blocks - 1 - block) * step;      // the last ones first: they see most keys
                if (r0 >= query->start[s + 1]) continue;
                const float *k_s = k + (key_start[s] * KV + kv) * D, *v_s = v + (key_start[s] * KV + kv) * D;    // KV * D apart
                Block b = thread_block(scores, G, T_max, D);
                size_t rows = min_size(step, query->start[s + 1] - r0), at = r0 * H + kv * G;
                size_t keys = query->position[r0 + rows - 1] + 1, wide = whole_vectors(keys);
                copy_rows(b.q, G * D, q + at * D, H * D, rows, G * D);
                // pass 1: scores = q k^T
                matmul(b.p, wide, b.q, D, 1, k_s, 1, KV * D, rows * G, keys, D, 0);
                // pass 2: p = softmax(scale * scores) over the keys up to the row's own
                for (size_t i = 0; i < rows * G; i++) {
                    float *p_i = b.p + i * wide, sum = 0;
                    for (size_t j = query->position[r0 + i / G] + 1; j < wide; j++) p_i[j] = -INFINITY;
                    float highest = maximum(p_i, wide);
                    #pragma omp simd reduction(+:sum)
                    for (size_t j = 0; j < wide; j++) {
                        p_i[j] = exponential(scale * (p_i[j] - highest));
                        sum += p_i[j];
                    }
                    float normalise = 1.0f / sum;
                    for (size_t j = 0; j < wide; j++) p_i[j] *= normalise;
                    lse[at + i / G * H + i % G] = scale * highest + logf(sum);
                }
                // pass 3: out = p v
                matmul(b.out, D, b.p, wide, 1, v_s, KV * D, 1, rows * G, D, keys, 0);
                copy_rows(out + at * D, H * D, b.out, G * D, rows, G * D);
            }
}

// The passes in reverse; p is computed again from q, k and lse. dq is written; dk and dv, which G heads share, accumulate.
static void attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out, const float *lse,
                               const float *q, const float *k, const float *v, float *scores,
                               const Rows *query, const uint32_t *key_start, size_t S, size_t H, size_t KV, size_t D, size_t T_max)
{
    size_t G = H / KV, step = max_size(1, QUERIES / G);
    float scale = 1.0f / sqrtf((float)D);
    #pragma omp parallel for collapse(2) schedule(dynamic)
    for (size_t s = 0; s < S; s++)
        for (size_t kv = 0; kv < KV; kv++) {
            size_t kv_at = (key_start[s] * KV + kv) * D;
            const float *k_s = k + kv_at, *v_s = v + kv_at;
            Block b = thread_block(scores, G, T_max, D);
            for (size_t r0 = query->start[s]; r0 < query->start[s + 1]; r0 += step) {
                size_t rows = min_size(step, query->start[s + 1] - r0), at = r0 * H + kv * G, n = rows * G;
                size_t keys = query->position[r0 + rows - 1] + 1, wide = whole_vectors(keys);
                copy_rows(b.q, G * D, q + at * D, H * D, rows, G * D);
                copy_rows(b.out, G * D, out + at * D, H * D, rows, G * D);
                copy_rows(b.dout, G * D, dout + at * D, H * D, rows, G * D);
                // p = exp(scale * q k^T - lse)
                matmul(b.p, wide, b.q, D, 1, k_s, 1, KV * D, n, keys, D, 0);
                for (size_t i = 0; i < n; i++) {
                    float *p_i = b.p + i * wide, lse_i = lse[at + i / G * H + i % G];
                    for (size_t j = query->position[r0 + i / G] + 1; j < wide; j++) p_i[j] = -INFINITY;
                    #pragma omp simd
                    for (size_t j = 0; j < wide; j++) p_i[j] = exponential(scale * p_i[j] - lse_i);
                }
                // pass 3 was out = p v:                    dv += p^T dout           dp = dout v^T
                matmul(dv + kv_at, KV * D, b.p, 1, wide, b.dout, D, 1, keys, D, n, 1);
                matmul(b.ds, wide, b.dout, D, 1, v_s, 1, KV * D, n, keys, D, 0);
                // pass 2 was p = softmax(scale * scores):   dscores = scale * p (dp - sum_j p_j dp_j)
                // where sum_j p_j dp_j = dout . out, because out = sum_j p_j v_j and dp_j = dout . v_j
                for (size_t i = 0; i < n; i++) {
                    const float *p_i = b.p + i * wide, *out_i = b.out + i * D, *dout_i = b.dout + i * D;
                    float *ds_i = b.ds + i * wide, mean = 0;
                    #pragma omp simd reduction(+:mean)
                    for (size_t d = 0; d < D; d++) mean += dout_i[d] * out_i[d];
                    for (size_t j = 0; j < wide; j++) ds_i[j] = scale * p_i[j] * (ds_i[j] - mean);
                }
                // pass 1 was scores = q k^T:               dq = dscores k           dk += dscores^T q
                matmul(b.out, D, b.ds, wide, 1, k_s, KV * D, 1, n, D, keys, 0);
                copy_rows(dq + at * D, H * D, b.out, G * D, rows, G * D);
                matmul(dk + kv_at, KV * D, b.ds, 1, wide, b.q, D, 1, keys, D, n, 1);
            }
        }
}

// h = silu(gate) * up, all (n), with silu(g) = g sigmoid(g).
static void swiglu_forward(float *h, const float *gate, const float *up, size_t n)
{
    #pragma omp parallel for simd schedule(static, share_of(n))
    for (size_t i = 0; i < n; i++) h[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// dup = dh silu(gate)          dgate = dh up silu'(gate), silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
static void swiglu_backward(float *dgate, float *dup, const float *dh, const float *gate, const float *up, size_t n)
{
    #pragma omp parallel for simd schedule(static, share_of(n))
    for (size_t i = 0; i < n; i++) {
        float g = gate[i], sigmoid = 1.0f / (1.0f + exponential(-g));
        dup[i] = dh[i] * g * sigmoid;
        dgate[i] = dh[i] * up[i] * sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
}

// For each row of logits (M, V): logp, the log-probability of its target, and best, its most likely token (the first on ties).
static void crossentropy_forward(float *logp, uint32_t *best, const float *logits, const uint32_t *target, size_t M, size_t V)
{
    #pragma omp parallel for
    for (size_t i = 0; i < M; i++) {
        const float *row = logits + i * V;
        float highest = row[0], sum = 0;
        uint32_t at = 0;
        for (size_t j = 1; j < V; j++)
            if (row[j] > highest) highest = row[j], at = (uint32_t)j;
        #pragma omp simd reduction(+:sum)
        for (size_t j = 0; j < V; j++) sum += exponential(row[j] - highest);
        logp[i] = row[target[i]] - highest - logf(sum);
        best[i] = at;
    }
}

// The loss is -weight * sum_i logp_i:     dlogits_j = weight (softmax_j - [j is the target]), written over the logits.
// softmax_j = exp(logits_j - logit of the target + logp).
static void crossentropy_backward(float *logits, const float *logp, const uint32_t *target, float weight, size_t M, size_t V)
{
    #pragma omp parallel for
    for (size_t i = 0; i < M; i++) {
        float *row = logits + i * V, shift = row[target[i]] - logp[i];
        #pragma omp simd
        for (size_t j = 0; j < V; j++) row[j] = weight * exponential(row[j] - shift);
        row[target[i]] -= weight;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. Adapters

static inline float frozen(const Tensor *t, size_t i) { return t->half ? widen_bf16(t->half[i]) : t->value[i]; }

// The plain adapter: W = W0. The gradient of the weight itself, when it is trained (`--method full`): dW0 += dy^T x.
static const float *plain_weight(Model *model, Tensor *t)
{
    if (!t->half) return t->value;
    #pragma omp parallel for simd
    for (size_t i = 0; i < t->n; i++) model->scratch[i] = widen_bf16(t->half[i]);
    return model->scratch;
}

static void plain_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N)
{
    (void)model;
    if (t->grad) matmul(t->grad, t->cols, dy, 1, t->rows, x, t->cols, 1, t->rows, t->cols, N, 1);
}

static const Adapter PLAIN = { plain_weight, plain_gradient };

static uint64_t delta_key(const Model *model, size_t a) { return random_key(model->init.seed, STREAM_DELTA, a, model->init.draw); }

// RIGSA: W = W0 + alpha * (mask . DeltaW), one pass over the matrix. Pruned entries rest at zero, where W is the pretrained
// weight again, or (REST_INIT) frozen at their initial value, which the generator gives back.
static const float *rigsa_weight(Model *model, Tensor *t)
{
    size_t a = (size_t)t->adapter, size = t->rows * t->cols;
    const Tensor *delta = delta_tensor(model, a);
    const float alpha = gates_tensor(model)->value[a], *value = delta->value;
    float *w = model->scratch;
    if (!delta->index) {
        #pragma omp parallel for simd
        for (size_t i = 0; i < size; i++) w[i] = frozen(t, i) + alpha * value[i];
        return w;
    }
    if (model->init.rest == REST_ZERO) {
        #pragma omp parallel for simd
        for (size_t i = 0; i < size; i++) w[i] = frozen(t, i);
    } else {
        uint64_t key = delta_key(model, a);
        #pragma omp parallel for
        for (size_t i = 0; i < size; i++) w[i] = frozen(t, i) + alpha * normal(key, i, model->init.sigma);
    }
    #pragma omp parallel for
    for (size_t k = 0; k < delta->n; k++) w[delta->index[k]] = frozen(t, delta->index[k]) + alpha * value[k];
    return w;
}

// Sums are taken in double over PARTS parts that do not depend on the number of threads, and the parts are added in order.
enum { PARTS = 256 };

static double sum_of_parts(const double *part)
{
    double sum = 0;
    for (int p = 0; p < PARTS; p++) sum += part[p];
    return sum;
}

// Below this density it is faster to compute the surviving entries of dW one by one than all of them in a dense product.
static double sampled_below(void) { return use_amx() ? 0.06 : 0.3; }

enum { SPAN = 128 };         // lanes of rows that are taken at a time: their x^T, (I, SPAN), fits into L2 or nearly
static size_t transposed_floats(size_t I) { return whole_vectors(I) * SPAN; }                  // of one thread

// to (LANES, SPAN) = LANES columns of from (rows, stride), transposed, in lanes as matmul packs them; `cols` of them exist, and
// zero stands where there are no more rows. Their neighbours, which come next, are fetched meanwhile: they lie a whole row apart,
// which no hardware foresees.
static void transpose_lanes(float *to, const float *from, size_t stride, size_t rows, size_t cols)
{
    size_t per = steps_per_lane();
    for (size_t n0 = 0; n0 < SPAN; n0 += LANES) {
        vec block[LANES];
        for (size_t n = n0; n < n0 + LANES; n++) {
            const float *row = from + per * n * stride;
            block[n - n0] = per * n < rows ? lanes_across(row, stride, rows - per * n, cols) : (vec){ 0 };
            for (size_t step = 0; step < per; step++) __builtin_prefetch(row + step * stride + LANES, 0, 2);
        }
        transpose_block(block);
        for (size_t c = 0; c < LANES; c++) *(vec *)(to + c * SPAN + n0) = block[c];
    }
}

// dw[k] += dy_o . x_i for one row o of dy^T, which stays in registers, and the columns i of its entries, index[k] = o I + i.
static inline __attribute__((always_inline))
void sampled_row(float *dw, const vec *dy_o, const float *x_t, const uint32_t *index, size_t row_start, size_t n, Precision of)
{
    typedef float quad __attribute__((vector_size(16)));
    vec dy[SPAN / LANES];
    memcpy(dy, dy_o, sizeof dy);
    for (size_t k = 0; k < n; k++) {
        const vec *x_i = (const vec *)(x_t + (index[k] - row_start) * SPAN);
        union { vec all; quad part[LANES / 4]; } sum = { { 0 } };
        #pragma GCC unroll 8
        for (int l = 0; l < SPAN / LANES; l++) sum.all = multiply_add(sum.all, dy[l], x_i[l], of);
        for (int i = 1; i < LANES / 4; i++) sum.part[0] += sum.part[i];
        dw[k] += (sum.part[0][0] + sum.part[0][2]) + (sum.part[0][1] + sum.part[0][3]);
    }
}

// dw[k] = entry index[k] of dy^T x: only the survivors are differentiated, each a dot product of two rows of the transposes.
// Each thread has its own x^T, transposed_floats(I) of `transposed`: to read what another core has just written costs more
// than to transpose it again (measured with two threads). Of dy^T it makes LANES rows at a time, where it needs them. Its share
// of the rows is whole blocks, with about as many entries as the others'.
static void sampled_product(float *dw, const Tensor *delta, const float *x, const float *dy, float *transposed, size_t N)
{
    size_t O = delta->rows, I = delta->cols;
    const uint32_t *index = delta->index;
    memset(dw, 0, delta->n * sizeof(float));
    #pragma omp parallel
    {
        size_t id = (size_t)omp_get_thread_num(), threads = (size_t)omp_get_num_threads(), rows;
        size_t first = delta->n * id / threads, last = delta->n * (id + 1) / threads;
        size_t o_first = first < delta->n ? index[first] / I / LANES * LANES : O;
        size_t o_end = last < delta->n ? index[last] / I / LANES * LANES : O;
        float *x_t = transposed + id * transposed_floats(I);
        while (first && index[first - 1] >= o_first * I) first--;
        for (size_t n = 0; n < N && o_first < o_end; n += rows) {
            rows = min_size(N - n, steps_per_lane() * SPAN);
            for (size_t i = 0; i < I; i += LANES) transpose_lanes(x_t + i * SPAN, x + n * I + i, I, rows, I - i);
            for (size_t o0 = o_first, end = first; o0 < o_end; o0 += LANES) {
                vec dy_t[LANES][SPAN / LANES];
                transpose_lanes((float *)dy_t, dy + n * O + o0, O, rows, O - o0);
                for (size_t o = o0; o < min_size(O, o0 + LANES); o++) {
                    size_t k = end;
                    while (end < delta->n && index[end] < (o + 1) * I) end++;
                    if (precision == FP32) sampled_row(dw + k, dy_t[o - o0], x_t, index + k, o * I, end - k, FP32);
                    else                   sampled_row(dw + k, dy_t[o - o0], x_t, index + k, o * I, end - k, BF16);
                }
            }
        }
    }
}

// With dW = dy^T x:     dDeltaW += alpha * mask . dW          dalpha += sum(dW . mask . DeltaW)
// and at REST_INIT the frozen entries, which are part of what alpha scales, add theirs to dalpha.
static void rigsa_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N)
{
    size_t a = (size_t)t->adapter, size = t->rows * t->cols;
    Tensor *delta = delta_tensor(model, a), *gates = gates_tensor(model);
    int sampled = delta->index && model->init.rest == REST_ZERO && (double)delta->n < sampled_below() * (double)size;
    const float alpha = gates->value[a];
    float *dw = model->scratch;
    double part[PARTS];
    if (sampled) sampled_product(dw, delta, x, dy, model->acts.transposed, N);
    else matmul(dw, t->cols, dy, 1, t->rows, x, t->cols, 1, t->rows, t->cols, N, 0);
    #pragma omp parallel for
    for (size_t p = 0; p < PARTS; p++) {
        double sum = 0;
        for (size_t k = delta->n * p / PARTS; k < delta->n * (p + 1) / PARTS; k++) {
            float *dw_k = &dw[delta->index && !sampled ? delta->index[k] : k];
            delta->grad[k] += alpha * *dw_k;
            sum += (double)*dw_k * delta->value[k];
            if (model->init.rest == REST_INIT) *dw_k = 0;            // done; what is left in dw belongs to the frozen entries
        }
        part[p] = sum;
    }
    gates->grad[a] += (float)sum_of_parts(part);
    if (model->init.rest == REST_INIT && delta->index) {
        uint64_t key = delta_key(model, a);
        #pragma omp parallel for
        for (size_t p = 0; p < PARTS; p++) {
            double sum = 0;
            for (size_t i = size * p / PARTS; i < size * (p + 1) / PARTS; i++)
                sum += (double)dw[i] * normal(key, i, model->init.sigma);
            part[p] = sum;
        }
        gates->grad[a] += (float)sum_of_parts(part);
    }
}

static const Adapter RIGSA = { rigsa_weight, rigsa_gradient };

// W takes W0's place for good: an evaluation that generates would form it again for every token. (In bf16 it would lose digits.)
static void merge(Model *model)
{
    if (precision == BF16) return;
    for (Tensor *t = model->tensors; t < model->tensors + model->base_tensors; t++)
        if (t->adapter >= 0) memcpy(t->value, model->adapter.weight(model, t), t->n * sizeof(float));
    model->adapter = PLAIN;
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. Transformer

// y (N, O) = x (N, I) W^T, or += with `add`.
static void linear_forward(Model *model, float *y, Tensor *t, const float *x, size_t N, int add)
{
    const float *w = model->adapter.weight(model, t);
    matmul(y, t->rows, x, t->cols, 1, w, 1, t->cols, N, t->rows, t->cols, add);
}

// dx (N, I) = dy (N, O) W, or += with `add`; the adapter adds to its gradients.
static void linear_backward(Model *model, float *dx, Tensor *t, const float *x, const float *dy, size_t N, int add)
{
    const float *w = model->adapter.weight(model, t);
    matmul(dx, t->cols, dy, t->rows, 1, w, t->cols, 1, N, t->cols, t->rows, add);
    model->adapter.gradient(model, t, x, dy, N);
}

// The chosen rows of from (N, C), next to each other; from itself when all are chosen. It is an embedding's forward pass.
static const float *gather(float *to, const float *from, const Rows *rows, size_t C)
{
    if (!rows->row) return from;
    embedding_forward(to, from, rows->row, rows->n, C);
    return to;
}

// The batch's keys (or values) x (N, n): where they are, or copied to their places in the cache (K, n).
static const float *keys(const Batch *batch, const float *x, float *cache, size_t n)
{
    if (!batch->cached) return x;
    #pragma omp parallel for
    for (size_t i = 0; i < batch->copies; i++)
        memcpy(cache + batch->copy[i].to * n, x + batch->copy[i].row * n, n * sizeof(float));
    return cache;
}

// The rows that a layer's queries, attention output and feed-forward are computed for.
static const Rows *query_rows(const Model *model, const Batch *batch, size_t l)
{
    return l + 1 == model->config.L ? &batch->answer : &batch->all;
}

// Everything of layer l that its backward pass reads, from its input a->x.
static void layer_forward(Model *model, const Batch *batch, size_t l)
{
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    Layer *a = &acts->layer[l];
    const Rows *rows = query_rows(model, batch, l);
    size_t N = batch->all.n, R = rows->n, C = c->C, H = c->H, KV = c->KV, D = c->D;
    rmsnorm_forward(acts->xn, acts->rstd, a->x, layer_tensor(model, l, ATTN_NORM)->value, N, C, c->eps);
    linear_forward(model, a->q, layer_tensor(model, l, WQ), gather(acts->xm, acts->xn, rows, C), R, 0);
    linear_forward(model, a->k, layer_tensor(model, l, WK), acts->xn, N, 0);
    linear_forward(model, a->v, layer_tensor(model, l, WV), acts->xn, N, 0);
    rope(a->q, acts->cosine, acts->sine, rows->position, R, H, D, 1);
    rope(a->k, acts->cosine, acts->sine, batch->all.position, N, KV, D, 1);
    const float *k = keys(batch, a->k, acts->cached_k + l * acts->layer_stride, KV * D);
    const float *v = keys(batch, a->v, acts->cached_v + l * acts->layer_stride, KV * D);
    attention_forward(a->att, a->lse, a->q, k, v, acts->scores, rows, batch->key_start, batch->S, H, KV, D, acts->T);
    memcpy(a->x2, gather(acts->xm, a->x, rows, C), R * C * sizeof(float));
    linear_forward(model, a->x2, layer_tensor(model, l, WO), a->att, R, 1);                  // x2 = x + att Wo^T
    rmsnorm_forward(acts->xn, acts->rstd, a->x2, layer_tensor(model, l, FFN_NORM)->value, R, C, c->eps);
    linear_forward(model, a->gate, layer_tensor(model, l, WGATE), acts->xn, R, 0);
    linear_forward(model, a->up, layer_tensor(model, l, WUP), acts->xn, R, 0);
}

// Where the layers share their arrays: a copy for the backward pass, in bfloat16 with that precision, and `back` from it.
static void layer_copy(Activations *acts, size_t l, int back)
{
    float *x = acts->layer[l].x, *kept = acts->layer[l].kept;
    uint16_t *half = (uint16_t *)kept;
    if (!kept) return;
    if (precision == FP32) { memcpy(back ? x : kept, back ? kept : x, acts->keep * sizeof(float)); return; }
    #pragma omp parallel for simd
    for (size_t i = 0; i < acts->keep; i++) {
        if (back) x[i] = widen_bf16(half[i]);
        else half[i] = (uint16_t)round_bf16(x[i]);
    }
}

// From the tokens to the residual stream before the final norm, acts.layer[L].x (M, C).
static void model_forward(Model *model, const Batch *batch)
{
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    assert(batch->all.n <= acts->N && batch->answer.n <= acts->M);
    embedding_forward(acts->layer[0].x, model->tensors[0].value, batch->token, batch->all.n, c->C);
    for (size_t l = 0; l < c->L; l++) {
        Layer *a = &acts->layer[l];
        float *next = acts->layer[l + 1].x;                 // may be a->x: nothing after layer_copy reads that
        size_t R = query_rows(model, batch, l)->n;
        layer_forward(model, batch, l);
        if (!batch->cached) layer_copy(acts, l, 0);
        swiglu_forward(acts->h, a->gate, a->up, R * c->F);
        memcpy(next, a->x2, R * c->C * sizeof(float));
        linear_forward(model, next, layer_tensor(model, l, WDOWN), acts->h, R, 1);           // next x = x2 + h Wd^T
    }
}

// Final norm, logits and loss, HEAD_ROWS answer rows at a time: with a vocabulary of 49,152 the logits of long answers would
// be larger than everything else. Fills acts.logp and acts.best and returns -sum(logp). When `training`, the loss counts `weight`
// times that, and its gradient goes straight back through the head and the final norm, into acts.dx (M, C).
enum { HEAD_ROWS = 512 };

static double head_forward_backward(Model *model, const Batch *batch, int training, float weight)
{
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    Tensor *norm = final_norm(model), *head = head_tensor(model);
    size_t M = batch->answer.n, C = c->C, V = c->V;
    const float *x = acts->layer[c->L].x;
    rmsnorm_forward(acts->xf, acts->rstd, x, norm->value, M, C, c->eps);
    for (size_t i = 0; i < M; i += HEAD_ROWS) {
        size_t rows = min_size(HEAD_ROWS, M - i);
        matmul(acts->logits, V, acts->xf + i * C, C, 1, head->value, 1, C, rows, V, C, 0);
        crossentropy_forward(acts->logp + i, acts->best + i, acts->logits, batch->target + i, rows, V);
        if (!training) continue;
        crossentropy_backward(acts->logits, acts->logp + i, batch->target + i, weight, rows, V);
        matmul(acts->dxf + i * C, C, acts->logits, V, 1, head->value, C, 1, rows, C, V, 0);
        if (head->grad) matmul(head->grad, C, acts->logits, 1, V, acts->xf + i * C, C, 1, V, C, rows, 1);
    }
    if (training) {
        memset(acts->dx, 0, M * C * sizeof(float));
        rmsnorm_backward(acts->dx, norm->grad, acts->dxf, x, norm->value, acts->rstd, M, C);
    }
    double loss = 0;
    for (size_t i = 0; i < M; i++) loss -= acts->logp[i];
    return loss;
}

// The mirror of model_forward: dx (R, C), the gradient of the layer's output, becomes that of its input, layer by layer.
static void model_backward(Model *model, const Batch *batch)
{
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    size_t N = batch->all.n, C = c->C, F = c->F, H = c->H, KV = c->KV, D = c->D;
    float *dx = acts->dx;
    for (size_t l = c->L; l-- > 0; ) {
        Layer *a = &acts->layer[l];
        const Rows *rows = query_rows(model, batch, l);
        size_t R = rows->n;
        Tensor *norm1 = layer_tensor(model, l, ATTN_NORM), *norm2 = layer_tensor(model, l, FFN_NORM);
        layer_copy(acts, l, 1);
        if (acts->recompute) layer_forward(model, batch, l);
        // out = x2 + h Wd^T, h = silu(gate) up
        swiglu_forward(acts->h, a->gate, a->up, R * F);
        linear_backward(model, acts->dh, layer_tensor(model, l, WDOWN), acts->h, dx, R, 0);
        swiglu_backward(acts->dgate, acts->dup, acts->dh, a->gate, a->up, R * F);
        // gate = xn Wg^T, up = xn Wu^T, xn = rmsnorm(x2)
        rmsnorm_forward(acts->xn, acts->rstd, a->x2, norm2->value, R, C, c->eps);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WGATE), acts->xn, acts->dgate, R, 0);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WUP), acts->xn, acts->dup, R, 1);
        rmsnorm_backward(dx, norm2->grad, acts->dxn, a->x2, norm2->value, acts->rstd, R, C);     // dx is now the gradient of x2
        // x2 = x + att Wo^T
        linear_backward(model, acts->datt, layer_tensor(model, l, WO), a->att, dx, R, 0);
        memset(acts->dk, 0, N * KV * D * sizeof(float));
        memset(acts->dv, 0, N * KV * D * sizeof(float));
        attention_backward(acts->dq, acts->dk, acts->dv, acts->datt, a->att, a->lse, a->q, a->k, a->v, acts->scores,
                           rows, batch->key_start, batch->S, H, KV, D, acts->T);
        rope(acts->dq, acts->cosine, acts->sine, rows->position, R, H, D, -1);
        rope(acts->dk, acts->cosine, acts->sine, batch->all.position, N, KV, D, -1);
        // q = xn Wq^T, k = xn Wk^T, v = xn Wv^T, xn = rmsnorm(x)
        rmsnorm_forward(acts->xn, acts->rstd, a->x, norm1->value, N, C, c->eps);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WK), acts->xn, acts->dk, N, 0);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WV), acts->xn, acts->dv, N, 1);
        if (rows->row) {                                    // the answer rows' gradients, back among those of all rows
            linear_backward(model, acts->dxm, layer_tensor(model, l, WQ), gather(acts->xm, acts->xn, rows, C), acts->dq, R, 0);
            embedding_backward(acts->dxn, acts->dxm, rows->row, R, C);
            memcpy(acts->dxm, dx, R * C * sizeof(float));
            memset(dx, 0, N * C * sizeof(float));
            embedding_backward(dx, acts->dxm, rows->row, R, C);
        } else linear_backward(model, acts->dxn, layer_tensor(model, l, WQ), acts->xn, acts->dq, N, 1);
        rmsnorm_backward(dx, norm1->grad, acts->dxn, a->x, norm1->value, acts->rstd, N, C);
    }
    if (model->tensors[0].grad) embedding_backward(model->tensors[0].grad, dx, batch->token, N, C);
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. AdamW
//
//     m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
//     w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//
// Decay is decoupled from the gradient (Loshchilov & Hutter 2019). Only stored values exist here: an entry that a mask has
// removed is neither stepped nor decayed, because it is not there. `clip` scales the gradient.

static const float BETA1 = 0.9f, BETA2 = 0.95f, ADAM_EPS = 1e-8f;
static const double CLIP = 1;

static void adamw(float *w, const float *dw, float *m, float *v, size_t n, float lr, float decay, float clip, size_t t)
{
    const float step = (float)(lr / (1 - pow(BETA1, (double)t))), root = (float)(1 / sqrt(1 - pow(BETA2, (double)t)));
    const float shrink = 1.0f - lr * decay;
    #pragma omp parallel for simd schedule(static, share_of(n))
    for (size_t i = 0; i < n; i++) {
        float g = clip * dw[i];
        m[i] = BETA1 * m[i] + (1 - BETA1) * g;
        v[i] = BETA2 * v[i] + (1 - BETA2) * g * g;
        w[i] = w[i] * shrink - step * m[i] / (sqrtf(v[i]) * root + ADAM_EPS);
    }
}

// Before the adapter's successor is built, so that both together need no more memory than training does.
static void free_moments(Model *model)
{
    free(model->m_arena);
    free(model->v_arena);
    model->m_arena = model->v_arena = NULL;
}

// Gradients and moments, zeroed, for the tensors of the table from `first` up to `end`; the old ones go.
static void trained_arenas(Model *model, Tensor *first, Tensor *end)
{
    size_t n = model->trained = values_in(first, end), at = 0;
    free(model->grad_arena);
    free_moments(model);
    model->grad_arena = floats(n);
    model->m_arena = floats(n);
    model->v_arena = floats(n);
    for (Tensor *t = first; t < end; at += t++->n) {
        t->grad = model->grad_arena + at;
        t->m = model->m_arena + at;
        t->v = model->v_arena + at;
    }
}

static double gradient_norm(const Model *model)
{
    double squares = 0, part[PARTS];
    for (const Tensor *p = model->tensors; p < model->tensors + model->all_tensors; p++) {
        if (!p->grad) continue;
        #pragma omp parallel for
        for (size_t i = 0; i < PARTS; i++) {
            double sum = 0;
            for (size_t k = p->n * i / PARTS; k < p->n * (i + 1) / PARTS; k++) sum += (double)p->grad[k] * p->grad[k];
            part[i] = sum;
        }
        squares += sum_of_parts(part);
    }
    return sqrt(squares);
}

// The t-th update (from 1) of a pass; `factor` of the schedule scales all learning rates. A gradient whose norm exceeds CLIP is
// scaled down to it: one wild batch must not undo what others taught. Returns 0, and changes nothing, if it is not finite.
static int model_update(Model *model, size_t t, float factor)
{
    double norm = gradient_norm(model);
    if (!isfinite(norm)) return 0;
    float clip = norm > CLIP ? (float)(CLIP / norm) : 1;
    for (Tensor *p = model->tensors; p < model->tensors + model->all_tensors; p++)
        if (p->grad) adamw(p->value, p->grad, p->m, p->v, p->n, p->lr * factor, p->decay, clip, t);
    return 1;
}

static void model_zero_grad(Model *model) { memset(model->grad_arena, 0, model->trained * sizeof(float)); }

// The learning rate's factor in update t (from 1) of `updates`: over a share `warmup` a line up, over the last `cooldown` one down.
static float schedule(size_t t, size_t updates, double warmup, double cooldown)
{
    double up = warmup * (double)updates, down = cooldown * (double)updates, left = (double)(updates - t) + 1;
    return (float)fmin(1, fmin((double)t / up, left / down));               // a share of 0 is no bound: infinity
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. Pruning
//
// After a pass, an entry of DeltaW is a candidate if it has the sign that it started with (zero has none: it counts as
// flipped). The largest candidates by |DeltaW| stay: k = floor(keep * candidates + 1/2) of them, ties to the lower index, within
// each matrix or over all of them together. The rest leave the mask for good. alpha's sign plays no part.

typedef struct { size_t entries, flipped, kept; } Pruned;      // of one matrix, in one round

typedef struct { size_t kept, ties; float threshold; } Cut;     // how many stay: all above the threshold and some ties with it

static int sign_kept(float value, float start) { return value != 0 && (value > 0) == (start > 0); }

// The k-th largest magnitude in a (n), 1 <= k <= n, bit by bit from the top: magnitudes are in the order of their bits.
static float kth_largest(const float *a, size_t n, size_t k)
{
    union { uint32_t bits; float value; } found = { 0 };
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        size_t above = 0;
        found.bits |= bit;
        #pragma omp parallel for simd reduction(+:above)
        for (size_t i = 0; i < n; i++) above += fabsf(a[i]) >= found.value;
        if (above < k) found.bits ^= bit;
    }
    return found.value;
}

// Of a (n) the share `keep` of the candidates, the entries that are not zero.
static Cut cut_magnitudes(const float *a, size_t n, size_t candidates, double keep)
{
    Cut cut = { .kept = (size_t)floor(keep * (double)candidates + 0.5), .threshold = INFINITY };
    if (cut.kept == 0) return cut;
    cut.threshold = kth_largest(a, n, cut.kept);
    cut.ties = cut.kept;
    for (size_t i = 0; i < n; i++) cut.ties -= fabsf(a[i]) > cut.threshold;
    return cut;
}

// DeltaW and the gates back to where a pass starts from.
static void rewind_adapter(Model *model)
{
    for (size_t a = 0; a < matrices(model); a++) {
        Tensor *delta = delta_tensor(model, a);
        uint64_t key = delta_key(model, a);
        #pragma omp parallel for
        for (size_t k = 0; k < delta->n; k++) delta->value[k] = normal(key, delta->index ? delta->index[k] : k, model->init.sigma);
        gates_tensor(model)->value[a] = 1e-6f;
    }
}

// One round of pruning: fills pruned (matrices), shrinks what is stored to the survivors, zeroes gradients and moments, and
// sends the survivors where `survivors` says. What has flipped becomes zero, and is below every threshold.
static void prune(Model *model, Pruned *pruned, double keep, Threshold over, Survivors survivors)
{
    size_t count = matrices(model), candidates = 0, kept = 0;
    Cut *cut = allocate(count, sizeof(Cut));
    for (size_t a = 0; a < count; a++) {
        Tensor *delta = delta_tensor(model, a);
        uint64_t key = delta_key(model, a);
        size_t flipped = 0;
        #pragma omp parallel for reduction(+:flipped)
        for (size_t k = 0; k < delta->n; k++)
            if (!sign_kept(delta->value[k], normal(key, delta->index ? delta->index[k] : k, model->init.sigma)))
                delta->value[k] = 0, flipped++;
        pruned[a] = (Pruned){ .entries = delta->n, .flipped = flipped };
        candidates += delta->n - flipped;
        if (over == THRESHOLD_MATRIX) kept += (cut[a] = cut_magnitudes(delta->value, delta->n, delta->n - flipped, keep)).kept;
    }
    if (over == THRESHOLD_ALL)
        kept = (cut[0] = cut_magnitudes(delta_tensor(model, 0)->value, adapter_entries(model), candidates, keep)).kept;

    free_moments(model);
    uint32_t *index = integers(kept);
    float *value = floats(kept + count);                        // the survivors, and after them the gates
    size_t at = 0;
    for (size_t a = 0; a < count; a++) {
        Tensor *delta = delta_tensor(model, a);
        Cut *c = &cut[over == THRESHOLD_ALL ? 0 : a];
        size_t from = at;
        for (size_t k = 0; k < delta->n; k++) {
            float size = fabsf(delta->value[k]);
            if (!(size > c->threshold || (size == c->threshold && c->ties > 0))) continue;
            if (size == c->threshold) c->ties--;
            index[at] = delta->index ? delta->index[k] : (uint32_t)k;
            value[at++] = delta->value[k];
        }
        delta->index = index + from;
        delta->value = value + from;
        delta->n = pruned[a].kept = at - from;
    }
    assert(at == kept);
    Tensor *gates = gates_tensor(model);
    gates->value = memcpy(value + kept, gates->value, count * sizeof(float));
    free(model->index_arena);
    free(model->value_arena);
    free(cut);
    model->index_arena = index;
    model->value_arena = value;
    trained_arenas(model, delta_tensor(model, 0), gates + 1);
    if (survivors == SURVIVORS_REDRAW) model->init.draw++;
    if (survivors != SURVIVORS_KEEP) rewind_adapter(model);
}

// ---------------------------------------------------------------------------------------------------------------------
// 11. Files (layouts in doc/model.md)

typedef struct { char magic[8]; uint32_t version; char kind[4]; uint64_t length, sections; } FileHeader;
typedef struct { char tag[16]; uint64_t length, hash; } SectionHeader;
typedef struct { const char *tag; const void *data; size_t length; } Section;       // one to write
typedef struct { const char *path, *kind, *bytes; size_t length; } File;            // one to read, mapped into memory

static const char MAGIC[8] = "rigsa.c\n";

static size_t padded(size_t length) { return (length + 7) / 8 * 8; }        // the next section starts on 8 bytes

static const char *mend(const char *kind)
{
    if (!strcmp(kind, "base")) return "make it again with dev/export_hf.py (dev/nano/base.bin: `make nano`)";
    if (!strcmp(kind, "data")) return "make it again with prepro_mnist.py (files of dev/nano: `make nano`)";
    if (!strcmp(kind, "stat")) return "start again without --resume";
    return "train it again";
}

// Maps a file of this kind and checks that it is whole: header, length, and that its sections lie within it.
static File file_open(const char *path, const char *kind)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK);             // a pipe must not make us wait
    if (fd < 0 || fstat(fd, &info)) die("%s: %s; %s", path, strerror(errno), mend(kind));
    if (!S_ISREG(info.st_mode)) die("%s: not a file; %s", path, mend(kind));
    File file = { path, kind, NULL, (size_t)info.st_size };
    if (file.length < sizeof(FileHeader)) die("%s: too short to be a file of rigsa.c; %s", path, mend(kind));
    file.bytes = mmap(NULL, file.length, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file.bytes == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(fd);
    const FileHeader header = *(const FileHeader *)file.bytes;
    if (memcmp(header.magic, MAGIC, 8)) die("%s: not a file of rigsa.c; %s", path, mend(kind));
    if (header.version == 0x01000000) die("%s: written on a big-endian machine; %s", path, mend(kind));
    if (header.version != 1) die("%s: version %u, this program reads version 1; take a newer one", path, header.version);
    if (memcmp(header.kind, kind, 4)) die("%s: holds `%.4s`, `%s` is needed here", path, header.kind, kind);
    if (header.length != file.length)
        die("%s: %zu bytes where %llu were written; %s", path, file.length, (unsigned long long)header.length, mend(kind));
    SectionHeader head;
    size_t at = sizeof header;
    for (uint64_t s = 0; s < header.sections; s++) {
        if (file.length - at < sizeof head) die("%s: a section is cut off; %s", path, mend(kind));
        memcpy(&head, file.bytes + at, sizeof head);
        at += sizeof head;
        if (head.length > file.length - at || padded(head.length) > file.length - at)
            die("%s: section `%.16s` is cut off; %s", path, head.tag, mend(kind));
        at += padded(head.length);
    }
    if (at != file.length) die("%s: %zu bytes after the last section; %s", path, file.length - at, mend(kind));
    return file;
}

static void file_close(File *file) { munmap((void *)file->bytes, file->length); }

// A section's payload, 8-byte aligned, its hash checked, and how many values of `size` bytes it has; NULL when there is none.
static const void *section(const File *file, const char *tag, size_t size, size_t *count)
{
    SectionHeader head;
    for (size_t at = sizeof(FileHeader); at < file->length; at += padded(head.length)) {
        memcpy(&head, file->bytes + at, sizeof head);
        at += sizeof head;
        if (strncmp(head.tag, tag, sizeof head.tag)) continue;
        if (hash64(file->bytes + at, head.length) != head.hash)
            die("%s: section `%s` is damaged; %s", file->path, tag, mend(file->kind));
        if (head.length % size)
            die("%s: section `%s` has %zu bytes, which are no multiple of %zu", file->path, tag, (size_t)head.length, size);
        *count = head.length / size;
        return file->bytes + at;
    }
    *count = 0;
    return NULL;
}

// The same for a section that must be there, with as many values.
static const void *needed(const File *file, const char *tag, size_t count, size_t size)
{
    size_t found;
    const void *data = section(file, tag, size, &found);
    if (!data) die("%s: has no section `%s`", file->path, tag);
    if (found != count)
        die("%s: section `%s` has %zu x %zu bytes where %zu x %zu are needed", file->path, tag, found, size, count, size);
    return data;
}

// The same, of numbers that must be finite.
static const float *numbers(const File *file, const char *tag, size_t count)
{
    const float *x = needed(file, tag, count, sizeof(float));
    if (!all_finite(x, count)) die("%s: section `%s` has a number that is not finite; %s", file->path, tag, mend(file->kind));
    return x;
}

// Files are written under a temporary name, synced and renamed, and the folder is synced: whatever happens, `path` is either the old
// file or the new one, whole.
static void temporary_path(char temporary[PATH_MAX + 8], const char *path) { snprintf(temporary, PATH_MAX + 8, "%s.tmp", path); }

static FILE *file_begin(const char *path)
{
    char temporary[PATH_MAX + 8];
    temporary_path(temporary, path);
    return fopen(temporary, "wb");
}

// f, from file_begin, becomes `path`. Returns 0, or the errno of what went wrong: then the file of before is still there.
static int file_end(FILE *f, const char *path)
{
    char temporary[PATH_MAX + 8];
    int error = 0;
    if (!f) return errno;
    temporary_path(temporary, path);
    if (ferror(f) || fflush(f) || fsync(fileno(f))) error = errno;
    if (fclose(f) && !error) error = errno;
    if (!error && rename(temporary, path)) error = errno;
    if (error) { unlink(temporary); return error; }
    char *slash = strrchr(temporary, '/');
    if (slash) *slash = 0;
    int folder = open(slash ? temporary : ".", O_RDONLY);
    if (folder >= 0) fsync(folder), close(folder);
    return 0;
}

// A file of sections. Returns 0 or an errno.
static int file_write(const char *path, const char *kind, const Section *section, size_t count)
{
    FILE *f = file_begin(path);
    if (!f) return errno;
    static const char zeros[8];
    FileHeader header = { .version = 1, .length = sizeof header, .sections = count };
    memcpy(header.magic, MAGIC, sizeof MAGIC);
    memcpy(header.kind, kind, sizeof header.kind);
    for (size_t s = 0; s < count; s++) header.length += sizeof(SectionHeader) + padded(section[s].length);
    fwrite(&header, sizeof header, 1, f);
    for (const Section *s = section; !ferror(f) && s < section + count; s++) {
        SectionHeader head = { .length = s->length, .hash = hash64(s->data, s->length) };
        memcpy(head.tag, s->tag, min_size(strlen(s->tag), sizeof head.tag));
        fwrite(&head, sizeof head, 1, f);
        fwrite(s->data, 1, s->length, f);
        fwrite(zeros, 1, padded(s->length) - s->length, f);
    }
    return file_end(f, path);
}

static void must_write(const char *path, int error) { if (error) die("%s: cannot be written: %s", path, strerror(error)); }

// Examples, and evaluations: tokens, and where the answer starts. The arrays point into the mapped file.
typedef struct {
    File file;
    uint32_t V;
    size_t examples, tokens, longest, longest_answer;
    uint32_t width;                     // bytes per token: 1, 2 or 4
    const void *token;                  // (tokens)
    const uint32_t *length, *answer;    // (examples)
    size_t *offset;                     // (examples) of the first token
    const uint32_t *glyphs;             // (glyph_count, 2) token and character, to draw an example as text
    size_t glyph_count;
    char column[16];                    // evaluations: heading of the column, empty for training examples
    enum { EXACT, ACC, ACC_NORM, NUMBER } metric;
    size_t questions;                   // multiple choice: consecutive examples are the choices of a question
    const uint32_t *choices, *gold;     // (questions)
    const uint32_t *chars;              // (examples) characters of the choice
    uint32_t *leader, *shared;          // (examples) first choice of the same question, and how many tokens both begin with
    size_t rows;                        // that an evaluation computes
    uint32_t limit;                     // generation: most new tokens
    const double *number;               // (examples) the right answer
    const uint32_t *end;                // (end_count) tokens that end it
    const char *stop;                   // (stop_size) texts that end it, each with a zero behind it
    size_t end_count, stop_size;
    const char **piece;                 // (V) a token's text, after its u32 length of at most `longest_piece`
    size_t longest_piece;
} Data;

static uint32_t data_token(const Data *data, size_t i)
{
    if (data->width == 1) return ((const uint8_t *)data->token)[i];
    if (data->width == 2) return ((const uint16_t *)data->token)[i];
    return ((const uint32_t *)data->token)[i];
}

static double mean_length(const Data *data) { return data->examples ? (double)data->tokens / (double)data->examples : 0; }

static void data_text(char *to, size_t size, const File *file, const char *tag)
{
    size_t n;
    const char *text = section(file, tag, 1, &n);
    snprintf(to, size, "%.*s", text ? (int)min_size(n, size - 1) : 0, text ? text : "");
    for (; *to; to++)
        if (iscntrl((unsigned char)*to) || strchr(",\"\\", *to)) die("%s: section `%s` is not a name", file->path, tag);
}

// Two choices of a question begin with the same tokens: with its context, at least.
static void data_share(Data *data, size_t e, size_t leader)
{
    uint32_t n = 0, most = leader < e ? (uint32_t)min_size(data->length[e], data->length[leader]) : 0;
    while (n < most && data_token(data, data->offset[e] + n) == data_token(data, data->offset[leader] + n)) n++;
    data->leader[e] = (uint32_t)leader;
    data->shared[e] = n;
    data->rows -= n;
}

// What an evaluation by generation has besides. It computes prompts, and up to `limit` tokens one by one.
static void data_generation(Data *data)
{
    const char *path = data->file.path, *pieces;
    size_t n, at = 0;
    data->limit = *(const uint32_t *)needed(&data->file, "limit", 1, sizeof(uint32_t));
    data->end = section(&data->file, "end", sizeof(uint32_t), &data->end_count);
    data->stop = section(&data->file, "stop", 1, &data->stop_size);
    pieces = section(&data->file, "pieces", 1, &n);
    if (n / 4 < data->V) die("%s: section `pieces` has %zu bytes for %u tokens", path, n, data->V);
    data->piece = allocate(data->V, sizeof *data->piece);
    for (uint32_t t = 0, size = 0; t < data->V; t++, at += 4 + size) {
        if (n - at >= 4) memcpy(&size, data->piece[t] = pieces + at, 4);
        if (n - at < 4 || n - at - 4 < size) die("%s: section `pieces` ends at token %u of %u", path, t, data->V);
        data->longest_piece = max_size(data->longest_piece, size);
    }
    data->number = needed(&data->file, "number", data->examples, sizeof(double));
    data->longest = data->rows = 0;
    for (size_t e = 0; e < data->examples; e++) {
        data->rows += (size_t)data->answer[e] + data->limit;
        data->longest = max_size(data->longest, (size_t)data->answer[e] + data->limit);
    }
    if (data->limit < 1 || data->limit > 1 << 20) die("%s: generates %u tokens", path, data->limit);
    if (data->stop_size && data->stop[data->stop_size - 1]) die("%s: section `stop` does not end with a zero", path);
}

static Data data_open(const char *path)
{
    Data data = { .file = file_open(path, "data") };
    const File *file = &data.file;
    const uint32_t *vocab = needed(file, "vocab", 2, sizeof(uint32_t));
    size_t choice_sum = 0;
    char metric[16];
    data.V = vocab[0];
    data.width = vocab[1];
    if (data.width != 1 && data.width != 2 && data.width != 4) die("%s: %u bytes per token", path, data.width);
    data.length = section(file, "length", sizeof(uint32_t), &data.examples);
    if (data.examples == 0 || data.examples > UINT32_MAX) die("%s: holds no examples; %s", path, mend("data"));
    data.answer = needed(file, "answer", data.examples, sizeof(uint32_t));
    data.offset = allocate(data.examples, sizeof(size_t));
    for (size_t e = 0; e < data.examples; e++) {
        if (data.answer[e] < 1 || data.answer[e] >= data.length[e])
            die("%s: example %zu of %u tokens cannot have its answer at %u", path, e, data.length[e], data.answer[e]);
        data.offset[e] = data.tokens;
        data.tokens += data.length[e];
        data.longest = max_size(data.longest, data.length[e]);
        data.longest_answer = max_size(data.longest_answer, data.length[e] - data.answer[e]);
    }
    data.token = needed(file, "tokens", data.tokens, data.width);
    for (size_t i = 0; i < data.tokens; i++)
        if (data_token(&data, i) >= data.V) die("%s: token %zu is beyond the vocabulary of %u", path, i, data.V);
    data.glyphs = section(file, "glyphs", 2 * sizeof(uint32_t), &data.glyph_count);
    data_text(data.column, sizeof data.column, file, "column");
    data_text(metric, sizeof metric, file, "metric");
    if (!data.column[0]) return data;
    int known = choice_place("exact|acc|acc_norm|number", metric);
    if (known < 0) die("%s: unknown metric `%s`", path, metric);
    data.metric = known;
    data.questions = data.examples;
    data.rows = data.tokens;
    data.leader = integers(data.examples);
    data.shared = integers(data.examples);
    for (size_t e = 0; e < data.examples; e++) data.leader[e] = (uint32_t)e;
    if (data.metric == NUMBER) data_generation(&data);
    if (data.metric == EXACT || data.metric == NUMBER) return data;
    data.choices = section(file, "choices", sizeof(uint32_t), &data.questions);
    data.gold = needed(file, "gold", data.questions, sizeof(uint32_t));
    data.chars = needed(file, "chars", data.examples, sizeof(uint32_t));
    for (size_t i = 0; i < data.questions; i++) {
        if (data.gold[i] >= data.choices[i]) die("%s: question %zu has no choice %u", path, i, data.gold[i]);
        for (size_t e = choice_sum; e < min_size(choice_sum + data.choices[i], data.examples); e++)
            data_share(&data, e, choice_sum);
        choice_sum += data.choices[i];
    }
    for (size_t e = 0; e < data.examples; e++) if (data.chars[e] == 0) die("%s: choice %zu is empty", path, e);
    if (choice_sum != data.examples) die("%s: %zu choices in %zu examples", path, choice_sum, data.examples);
    return data;
}

static void base_save(const Model *model, const char *path)
{
    Config config = model->config;
    config.dtype = 0;
    must_write(path, file_write(path, "base", (Section[]){
        { "config", &config, sizeof config },
        { "name", model->base.name, strlen(model->base.name) },
        { "weights", model->base_arena, base_weights(model) * sizeof(float) } }, 3));
}

// What a ticket and a training state say of the adapter: four sections, but without an index if it is dense; returns how many.
static size_t adapter_sections(Model *model, Section to[4], uint64_t *entries)
{
    size_t count = matrices(model), n = adapter_entries(model);
    for (size_t a = 0; a < count; a++) entries[a] = delta_tensor(model, a)->n;
    to[0] = (Section){ "gates", gates_tensor(model)->value, count * sizeof(float) };
    to[1] = (Section){ "entries", entries, count * sizeof(uint64_t) };
    to[2] = (Section){ "values", delta_tensor(model, 0)->value, n * sizeof(float) };
    to[3] = (Section){ "index", model->index_arena, n * sizeof(uint32_t) };
    return model->index_arena ? 4 : 3;
}

static void ticket_save(Model *model, const char *path, const char *settings)
{
    uint64_t *entries = allocate(matrices(model), sizeof(uint64_t));
    Section section[7] = { { "base", &model->base, 8 + strlen(model->base.name) }, { "settings", settings, strlen(settings) },
                           { "init", &model->init, sizeof model->init } };
    must_write(path, file_write(path, "tick", section, 3 + adapter_sections(model, section + 3, entries)));
    free(entries);
}

// One number for mask, values and gates, to compare two runs by eye.
static uint64_t ticket_hash(Model *model)
{
    Tensor *gates = gates_tensor(model);
    uint64_t hash = hash64(gates->value, gates->n * sizeof(float));
    for (size_t a = 0; a < matrices(model); a++) {
        Tensor *delta = delta_tensor(model, a);
        hash = mix(hash + hash64(delta->value, delta->n * sizeof(float)));
        if (delta->index) hash = mix(hash + hash64(delta->index, delta->n * sizeof(uint32_t)));
    }
    return hash;
}

// Gives the model the adapter that adapter_sections described, without gradients.
static void adapter_load(Model *model, const File *file)
{
    size_t count = matrices(model), n = 0, full = adapted_weights(model), at = 0, length;
    const uint64_t *entries = needed(file, "entries", count, sizeof(uint64_t));
    for (size_t a = 0; a < count; n += entries[a++]) {
        Tensor *delta = delta_tensor(model, a);
        if (entries[a] > delta->rows * delta->cols) die("%s: more entries than %s has", file->path, delta->name);
    }
    const float *value = numbers(file, "values", n), *gate = numbers(file, "gates", count);
    const uint32_t *index = n == full && !section(file, "index", 1, &length) ? NULL : needed(file, "index", n, sizeof(uint32_t));
    free(model->index_arena);
    free(model->value_arena);
    model->index_arena = index ? memcpy(integers(n), index, n * sizeof(uint32_t)) : NULL;
    model->value_arena = memcpy(floats(n + count), value, n * sizeof(float));
    gates_tensor(model)->value = memcpy(model->value_arena + n, gate, count * sizeof(float));
    for (size_t a = 0; a < count; at += entries[a++]) {
        Tensor *delta = delta_tensor(model, a);
        delta->index = index ? model->index_arena + at : NULL;
        delta->value = model->value_arena + at;
        delta->n = entries[a];
        for (size_t k = 0; index && k < delta->n; k++)
            if (delta->index[k] >= delta->rows * delta->cols || (k && delta->index[k] <= delta->index[k - 1]))
                die("%s: the index of %s is not ascending within the matrix", file->path, delta->name);
    }
    model->adapter = RIGSA;
}

// An adapter belongs to the base that it was trained on.
static void check_base(const Model *model, const File *file)
{
    size_t length;
    const uint64_t *base = section(file, "base", 1, &length);
    if (!base || length < 8) die("%s: does not name its base", file->path);
    if (*base != model->base.hash)
        die("%s: made for the base `%.*s` (%016llx), not for `%s` (%016llx)", file->path, (int)min_size(length - 8, 63),
            (const char *)(base + 1), (unsigned long long)*base, model->base.name, (unsigned long long)model->base.hash);
}

static void ticket_load(Model *model, const char *path)
{
    File file = file_open(path, "tick");
    check_base(model, &file);
    model->init = *(const Init *)needed(&file, "init", 1, sizeof(Init));
    if (model->init.rest > REST_INIT || !(model->init.sigma >= 0 && model->init.sigma < INFINITY))
        die("%s: damaged section `init`", path);
    adapter_load(model, &file);
    file_close(&file);
}

// ---------------------------------------------------------------------------------------------------------------------
// 12. Memory

static void tensor_row(Tensor *t, size_t rows, size_t cols, int adapter, const char *format, ...)
{
    va_list arguments;
    *t = (Tensor){ .rows = rows, .cols = cols, .n = rows * cols, .adapter = adapter };
    va_start(arguments, format);
    vsnprintf(t->name, sizeof t->name, format, arguments);
    va_end(arguments);
}

static size_t largest_matrix(const Config *c) { return max_size(c->F, (size_t)c->H * c->D) * c->C; }

static void check_config(const Config *c, const char *path, size_t length)
{
    const char *name[] = { "dim", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab" };
    const uint32_t size[] = { c->C, c->F, c->L, c->H, c->KV, c->D, c->V };
    for (int i = 0; i < 7; i++) if (size[i] < 1 || size[i] > 1 << 20) die("%s: %s is %u", path, name[i], size[i]);
    if (c->H % c->KV) die("%s: %u heads cannot share %u kv_heads evenly", path, c->H, c->KV);
    if (c->D % 2) die("%s: head_dim is %u, rotary positions need an even one", path, c->D);
    if (c->tied > 1 || c->dtype > 1) die("%s: tied is %u, dtype is %u, both must be 0 or 1", path, c->tied, c->dtype);
    if (!(c->theta > 0 && c->eps > 0 && c->theta < INFINITY && c->eps < 1)) die("%s: theta %g, eps %g", path, c->theta, c->eps);
    if (largest_matrix(c) > UINT32_MAX) die("%s: a matrix is too large for 32-bit indices", path);
    if ((size_t)c->L * PER_LAYER > length) die("%s: %u layers in %zu bytes", path, c->L, length);
}

// The table: base tensors in the order of the file, then DeltaW of every adapted matrix, then the gates.
static void build_table(Model *model)
{
    const Config *c = &model->config;
    size_t C = c->C, F = c->F, V = c->V, heads = (size_t)c->H * c->D, kv_heads = (size_t)c->KV * c->D;
    model->base_tensors = 1 + (size_t)c->L * PER_LAYER + 1 + !c->tied;
    model->all_tensors = model->base_tensors + matrices(model) + 1;
    Tensor *t = model->tensors = allocate(model->all_tensors, sizeof(Tensor));
    int a = 0;
    tensor_row(t++, V, C, -1, "embed");
    for (uint32_t l = 0; l < c->L; l++) {
        tensor_row(t++, 1, C, -1, "%u.attn_norm", l);
        tensor_row(t++, heads, C, a++, "%u.q", l);
        tensor_row(t++, kv_heads, C, a++, "%u.k", l);
        tensor_row(t++, kv_heads, C, a++, "%u.v", l);
        tensor_row(t++, C, heads, a++, "%u.o", l);
        tensor_row(t++, 1, C, -1, "%u.ffn_norm", l);
        tensor_row(t++, F, C, a++, "%u.gate", l);
        tensor_row(t++, F, C, a++, "%u.up", l);
        tensor_row(t++, C, F, a++, "%u.down", l);
    }
    tensor_row(t++, 1, C, -1, "final_norm");
    if (!c->tied) tensor_row(t++, V, C, -1, "head");
    for (Tensor *w = model->tensors; w < model->tensors + model->base_tensors; w++)
        if (w->adapter >= 0) tensor_row(t++, w->rows, w->cols, -1, "%.24s.delta", w->name);
    tensor_row(t, 1, matrices(model), -1, "gates");
}

// Opens a base file: its configuration and the table, no weights yet.
static File base_open(Model *model, const char *path)
{
    File file = file_open(path, "base");
    memcpy(&model->config, needed(&file, "config", 1, sizeof(Config)), sizeof(Config));
    check_config(&model->config, path, file.length);
    build_table(model);
    data_text(model->base.name, sizeof model->base.name, &file, "name");
    return file;
}

// Reads the weights into fp32. With --precision bf16 matrices that stay frozen are held in bfloat16: exactly, where the file is.
static void base_read(Model *model, File *file, int trained)
{
    int half = precision == BF16 && !trained;
    size_t n = base_weights(model), halves = half ? adapted_weights(model) : 0, bytes = model->config.dtype ? 2 : 4;
    const char *from = needed(file, "weights", n, bytes);
    model->base.hash = hash64(from, n * bytes);
    float *value = model->base_arena = floats(n - halves);
    uint16_t *narrow = model->half_arena = allocate(halves, sizeof(uint16_t));
    for (Tensor *t = model->tensors; t < model->tensors + model->base_tensors; from += bytes * t++->n) {
        const float *single = (const float *)from;
        const uint16_t *brain = (const uint16_t *)from;
        int finite = 1;
        if (half && t->adapter >= 0) t->half = narrow, narrow += t->n;
        else t->value = value, value += t->n;
        for (size_t i = 0; i < t->n; i++) {
            float w = bytes == 2 ? widen_bf16(brain[i]) : single[i];
            finite &= isfinite(w) != 0;
            if (t->half) t->half[i] = (uint16_t)round_bf16(w);
            else t->value[i] = w;
        }
        if (!finite) die("%s: %s has a weight that is not finite; %s", file->path, t->name, mend("base"));
    }
    file_close(file);
    model->adapter = PLAIN;
}

// A dense adapter at its initial values, with gradients and moments.
static void adapter_alloc(Model *model)
{
    size_t at = 0;
    Tensor *gates = gates_tensor(model);
    model->value_arena = floats(adapter_entries(model) + gates->n);
    for (Tensor *t = delta_tensor(model, 0); t <= gates; at += t++->n) t->value = model->value_arena + at;
    trained_arenas(model, delta_tensor(model, 0), gates + 1);
    rewind_adapter(model);
    model->adapter = RIGSA;
}

// An arena is walked twice: without memory, to count, and with it, to hand it out.
typedef struct { float *memory; size_t used; } Arena;

static float *take(Arena *arena, size_t n)
{
    float *p = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += round_up(n, 16);                         // every array starts on a cache line
    return p;
}

// The largest batch: N rows, sequences of T, M answer rows, and a cache of K rows, one for each layer if sequences have a `past`.
typedef struct { size_t N, T, M, K; int past; } Largest;

// Lays activations for such batches out in memory, and returns how many floats they are. Only fp32 training that does not recompute
// gives every layer arrays of its own; otherwise all share the first layer's, and training keeps copies.
static size_t acts_layout(Model *model, float *memory, Largest batch, int training)
{
    const Config *c = &model->config;
    Activations *a = &model->acts;
    Arena arena = { memory, 0 };
    size_t N = batch.N, T = batch.T, M = batch.M, caches = batch.past ? c->L : 1, threads = (size_t)omp_get_max_threads();
    size_t C = c->C, F = c->F, HD = (size_t)c->H * c->D, KVD = (size_t)c->KV * c->D;
    int own = training && precision == FP32 && !a->recompute;
    if (!a->layer) a->layer = allocate(c->L + 1, sizeof(Layer));
    for (size_t l = 0; l <= c->L; l++) {
        Layer *layer = &a->layer[l];
        if (l == 0 || own) {
            size_t start = arena.used;
            layer->x = take(&arena, (l < c->L ? N : M) * C);
            if (l == c->L) break;
            layer->q = take(&arena, N * HD), layer->k = take(&arena, N * KVD), layer->v = take(&arena, N * KVD);
            layer->att = take(&arena, N * HD), layer->x2 = take(&arena, N * C);
            layer->gate = take(&arena, N * F), layer->up = take(&arena, N * F);
            a->keep = a->recompute ? N * C : arena.used - start;
        } else *layer = a->layer[0];
        if (l == 0 || (training && !a->recompute && l < c->L)) layer->lse = take(&arena, N * c->H);
        if (training && !own && l < c->L) layer->kept = take(&arena, precision == BF16 ? (a->keep + 1) / 2 : a->keep);
    }
    a->N = N, a->T = T, a->M = M, a->K = batch.K;
    a->layer_stride = batch.past ? batch.K * KVD : 0;
    a->cached_k = take(&arena, caches * batch.K * KVD), a->cached_v = take(&arena, caches * batch.K * KVD);
    a->xn = take(&arena, N * C), a->rstd = take(&arena, max_size(N, M)), a->h = take(&arena, N * F);
    a->scores = take(&arena, threads * block_floats(c->H / c->KV, T, c->D));
    a->cosine = take(&arena, T * c->D / 2), a->sine = take(&arena, T * c->D / 2);
    a->xm = take(&arena, M * C), a->xf = take(&arena, M * C);
    a->logits = take(&arena, min_size(HEAD_ROWS, M) * c->V), a->logp = take(&arena, M), a->best = (uint32_t *)take(&arena, M);
    if (!training) return arena.used;
    a->dx = take(&arena, N * C), a->dxn = take(&arena, N * C), a->dxm = take(&arena, M * C), a->dxf = take(&arena, M * C);
    a->dq = take(&arena, N * HD), a->dk = take(&arena, N * KVD), a->dv = take(&arena, N * KVD), a->datt = take(&arena, N * HD);
    a->dgate = take(&arena, N * F), a->dup = take(&arena, N * F), a->dh = take(&arena, N * F);
    a->transposed = take(&arena, threads * transposed_floats(max_size(C, max_size(F, HD))));
    return arena.used;
}

static void acts_alloc(Model *model, Largest batch, int training)
{
    acts_layout(model, floats(acts_layout(model, NULL, batch, training)), batch, training);
    rope_table(model->acts.cosine, model->acts.sine, batch.T, model->config.D, model->config.theta);
    model->scratch = floats(largest_matrix(&model->config));
}

static Batch batch_alloc(size_t N, size_t M, size_t K)
{
    size_t S = max_size(N, K);                              // a sequence has at least one key
    return (Batch){ .all = { .start = integers(S + 1), .position = integers(N) },
                    .answer = { .row = integers(M), .start = integers(S + 1), .position = integers(M) },
                    .token = integers(N), .target = integers(M), .key_start = integers(S), .copy = allocate(K, sizeof(Copy)) };
}

static void batch_clear(Batch *batch, int cached)
{
    batch->S = batch->all.n = batch->answer.n = batch->copies = 0, batch->cached = cached;
}

static uint32_t batch_row(Batch *batch, uint32_t token, uint32_t position)
{
    batch->token[batch->all.n] = token;
    batch->all.position[batch->all.n] = position;
    return (uint32_t)batch->all.n++;
}

// This row, at this position of its sequence, predicts the target.
static void batch_answer(Batch *batch, uint32_t row, uint32_t position, uint32_t target)
{
    batch->answer.row[batch->answer.n] = row;
    batch->answer.position[batch->answer.n] = position;
    batch->target[batch->answer.n++] = target;
}

// What was added since the last call is one sequence.
static void batch_end(Batch *batch, size_t key_start)
{
    batch->key_start[batch->S++] = (uint32_t)key_start;
    batch->all.start[batch->S] = (uint32_t)batch->all.n;
    batch->answer.start[batch->S] = (uint32_t)batch->answer.n;
}

// Lays example e at the end of the batch. Its first `shared` tokens are there already, in row `context` and on.
static void batch_add(Batch *batch, const Data *data, size_t e, uint32_t context, uint32_t shared)
{
    size_t key_start = batch->cached ? batch->copies : batch->all.n;
    for (uint32_t t = 0, row = 0; t < data->length[e]; t++) {
        uint32_t token = data_token(data, data->offset[e] + t);
        if (t >= data->answer[e]) batch_answer(batch, row, t - 1, token);          // the row before a token predicts it
        row = t < shared ? context + t : batch_row(batch, token, t);
        if (batch->cached) batch->copy[batch->copies++] = (Copy){ row, (uint32_t)key_start + t };
    }
    batch_end(batch, key_start);
}

// ---------------------------------------------------------------------------------------------------------------------
// 13. Evaluation

typedef struct { double value, error; } Score;          // a share of right answers and its standard error

// What the model makes of one example.
typedef struct { double logp; int exact; uint32_t said; } Verdict;     // said: its first answer token

// Verdicts on the examples from `first` on, as many as fit into one batch; returns how many. The choices of a question share the
// tokens that they begin with: its first choice is laid out whole, the others, in the same batch, only from where they differ.
static size_t judge(Model *model, Verdict *verdict, Batch *batch, const Data *data, size_t first)
{
    size_t e = first, i = 0;
    const Activations *acts = &model->acts;
    batch_clear(batch, 1);
    for (; e < data->examples; e++) {
        uint32_t shared = data->leader[e] < first ? 0 : data->shared[e];
        if (batch->all.n + data->length[e] - shared > acts->N || batch->copies + data->length[e] > acts->K
            || batch->answer.n + data->length[e] - data->answer[e] > acts->M) break;
        batch_add(batch, data, e, shared ? batch->all.start[data->leader[e] - first] : 0, shared);
    }
    model_forward(model, batch);
    head_forward_backward(model, batch, 0, 0);
    for (size_t j = first; j < e; j++) {
        verdict[j] = (Verdict){ 0, 1, acts->best[i] };
        for (size_t end = i + data->length[j] - data->answer[j]; i < end; i++) {
            if (!isfinite(acts->logp[i])) die("%s: example %zu has no finite probability: broken weights", data->column, j);
            verdict[j].logp += acts->logp[i];
            verdict[j].exact &= acts->best[i] == batch->target[i];
        }
    }
    return e - first;
}

static Score score_verdicts(const Verdict *verdict, const Data *data)
{
    size_t right = 0;
    if (!data->choices)
        for (size_t e = 0; e < data->examples; e++) right += verdict[e].exact;
    else for (size_t i = 0, e = 0; i < data->questions; e += data->choices[i++]) {
        size_t best = 0;
        double best_score = -INFINITY;
        for (size_t choice = 0; choice < data->choices[i]; choice++) {
            double score = verdict[e + choice].logp / (data->metric == ACC_NORM ? data->chars[e + choice] : 1);
            if (score > best_score) best_score = score, best = choice;
        }
        right += best == data->gold[i];
    }
    double p = (double)right / (double)data->questions;     // its error is a sample's, as in lm-evaluation-harness: with n - 1
    return (Score){ p, sqrt(p * (1 - p) / (double)max_size(data->questions - 1, 1)) };
}

// Greedy generation: SLOTS sequences grow side by side, each in its own stretch of the cache, until they end and make room for the
// next. At every step each lays out what is not cached yet: its prompt, in parts if it is long, later the token that it said last.
enum { SLOTS = 8 };

typedef struct {
    size_t example, n, cached;          // its tokens so far, and how many of them are in the cache
    uint32_t *token;                    // (T)
    int live;                           // 0: the next example may have this place
} Slot;

// text = what n tokens say, up to the first stop, with a zero at the end; returns whether there was a stop.
static int write_text(char *text, const Data *data, const uint32_t *token, size_t n)
{
    size_t length = 0;
    int stopped = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t size;
        memcpy(&size, data->piece[token[i]], 4);
        memcpy(text + length, data->piece[token[i]] + 4, size);
        length += size;
    }
    text[length] = 0;
    for (const char *stop = data->stop; stop && stop < data->stop + data->stop_size; stop += strlen(stop) + 1) {
        char *found = memmem(text, length, stop, strlen(stop));
        if (found) stopped = 1, length = (size_t)(found - text), *found = 0;
    }
    return stopped;
}

// The last number in a text, such as -1,234.5; NAN where there is none.
static double last_number(const char *text)
{
    char digits[64] = "";
    for (const char *at = text; *at; at++) {
        size_t n = at > text && at[-1] == '-';
        if (!isdigit((unsigned char)*at)) continue;
        digits[0] = '-';
        for (; isdigit((unsigned char)*at) || ((*at == ',' || *at == '.') && isdigit((unsigned char)at[1])); at++)
            if (*at != ',' && n + 1 < sizeof digits) digits[n++] = *at;
        digits[n] = 0;
        at--;
    }
    return *digits ? strtod(digits, NULL) : NAN;
}

// A line of JSON on example e; `slot` and its text, when it was generated. Bytes that are no UTF-8 are written as they are.
static void print_details(FILE *f, const char *label, const Data *data, size_t e, const Verdict *verdict, const Slot *slot,
                          const char *text)
{
    if (!f) return;
    fprintf(f, "{\"round\": \"%s\", \"column\": \"%s\", \"example\": %zu, \"exact\": %d, ", label, data->column, e, verdict->exact);
    if (!slot) { fprintf(f, "\"logp\": %.9g}\n", verdict->logp); return; }
    fprintf(f, "\"tokens\": [%u", slot->token[data->answer[e]]);
    for (size_t t = data->answer[e] + 1; t < slot->n; t++) fprintf(f, ", %u", slot->token[t]);
    fprintf(f, "], \"text\": \"");
    for (; *text; text++) fprintf(f, (unsigned char)*text < ' ' || *text == '"' || *text == '\\' ? "\\u%04x" : "%c", *text);
    fprintf(f, "\"}\n");
}

// One step of all slots; `next` is the next example, `text` room for what a slot says. Returns how many ended, with verdicts.
static size_t generate(Model *model, Verdict *verdict, Batch *batch, const Data *data, Slot *slot, size_t *next, char *text,
                       FILE *details, const char *label)
{
    const Activations *acts = &model->acts;
    size_t done = 0;
    batch_clear(batch, 1);
    for (Slot *g = slot; g < slot + SLOTS; g++) {
        size_t place = (size_t)(g - slot) * acts->T;
        if (!g->live && *next < data->examples) {
            *g = (Slot){ .example = (*next)++, .token = g->token, .live = 1 };
            for (; g->n < data->answer[g->example]; g->n++) g->token[g->n] = data_token(data, data->offset[g->example] + g->n);
        }
        for (; g->live && g->cached < g->n && batch->all.n < acts->N; g->cached++) {
            uint32_t t = (uint32_t)g->cached, row = batch_row(batch, g->token[t], t);
            batch->copy[batch->copies++] = (Copy){ row, (uint32_t)place + t };
            if (t + 1 == g->n) batch_answer(batch, row, t, 0);
        }
        batch_end(batch, place);
    }
    model_forward(model, batch);
    head_forward_backward(model, batch, 0, 0);
    for (Slot *g = slot; g < slot + SLOTS; g++) {
        size_t i = batch->answer.start[g - slot], e = g->example, prompt = data->answer[e];
        if (i == batch->answer.start[g - slot + 1]) continue;
        if (!isfinite(acts->logp[i])) die("%s: example %zu has no finite probability: broken weights", data->column, e);
        g->token[g->n++] = acts->best[i];
        g->live = !write_text(text, data, g->token + prompt, g->n - prompt) && g->n - prompt < data->limit;
        for (size_t j = 0; j < data->end_count; j++) g->live &= acts->best[i] != data->end[j];
        if (g->live) continue;
        verdict[e].exact = last_number(text) == data->number[e];
        print_details(details, label, data, e, &verdict[e], g, text);
        done++;
    }
    return done;
}

// ---------------------------------------------------------------------------------------------------------------------
// 14. Options

enum { MAX_EVALS = 16 };
enum { METHOD_RIGSA, METHOD_FULL, METHOD_EVAL };

typedef struct {
    char *base, *data, *evals[MAX_EVALS + 1], *out, *ticket, *details;
    int method, rest, survivors, threshold, precision, recompute, resume, overwrite;
    double examples, ticket_examples, rounds, batch, micro, seed;
    double lr, alpha_lr, sigma, weight_decay, keep, warmup, cooldown, save_every;
} Options;

static Options opt;

typedef enum { TEXT, LIST, COUNT, REAL, CHOICE, FLAG } OptionType;

typedef struct {
    const char *name;
    OptionType type;
    void *where;
    const char *range;          // of a number "low to high", inclusive; the choices "a|b|c", the value is the index
    const char *start;          // the default, written as a user would
    const char *help;
} Option;

#ifndef METHODS                 // dev/baselines.c includes this file and brings more methods, with options of their own
#define METHODS "rigsa|full|eval"
#define MORE_OPTIONS
#endif

#define NANO "dev/nano/"
static const Option table[] = {
    { "base", TEXT, &opt.base, "FILE", NANO "base.bin", "the pretrained model" },
    { "data", TEXT, &opt.data, "FILE", NANO "digits_train.bin", "training examples of the new task" },
    { "eval", LIST, opt.evals, "FILE", NANO "digits_test.bin " NANO "addition.bin " NANO "sizes.bin " NANO "packing.bin",
      "evaluation set; repeatable: the first is the target, the others what must not be forgotten" },
    { "method", CHOICE, &opt.method, METHODS, "rigsa", "gated sparse adapter, full fine-tuning, or only evaluate" },
    { "ticket", TEXT, &opt.ticket, "FILE", "", "with --method eval: the base with this adapter" },
    { "details", TEXT, &opt.details, "FILE", "", "what the model makes of every question of every evaluation, as JSON lines" },
    { "examples", COUNT, &opt.examples, "0 to 1e12", "12800", "examples of a pass, 0: all of them once" },
    { "ticket-examples", COUNT, &opt.ticket_examples, "0 to 1e12", "48000", "of the ticket's pass, 0: all of them once" },
    { "rounds", COUNT, &opt.rounds, "0 to 100", "5", "rounds of training and pruning before the last pass" },
    { "batch", COUNT, &opt.batch, "1 to 1e6", "16", "examples per update" },
    { "micro", COUNT, &opt.micro, "0 to 1e6", "0", "examples per forward pass, to save memory; 0: the whole batch" },
    { "precision", CHOICE, &opt.precision, "fp32|bf16", "fp32", "of products and of what is kept for the backward pass" },
    { "recompute", FLAG, &opt.recompute, "", "", "keep only the layers' inputs: a third more work, far less memory" },
    { "lr", REAL, &opt.lr, "0 to 10", "0.003", "learning rate of DeltaW; with --method full of every weight, 0.001" },
    { "alpha-lr", REAL, &opt.alpha_lr, "0 to 10", "0.007", "learning rate of the gates" },
    { "warmup", REAL, &opt.warmup, "0 to 1", "0.05", "share of a pass over which the learning rates rise from 0" },
    { "cooldown", REAL, &opt.cooldown, "0 to 1", "1", "share of a pass, at its end, over which they fall back to 0" },
    { "sigma", REAL, &opt.sigma, "0 to 1e6", "0.06", "standard deviation of DeltaW's initial values" },
    { "weight-decay", REAL, &opt.weight_decay, "0 to 1e6", "1", "decoupled decay of DeltaW; with --method full of matrices, 0.1" },
    { "keep", REAL, &opt.keep, "0 to 1", "0.56", "share of the candidates that a round keeps" },
    { "rest", CHOICE, &opt.rest, "zero|init", "zero", "where a pruned entry rests: at zero, or frozen at its initial value" },
    { "survivors", CHOICE, &opt.survivors, "rewind|keep|redraw", "rewind", "back to initial values, kept, or drawn afresh" },
    { "threshold", CHOICE, &opt.threshold, "matrix|all", "matrix", "compare magnitudes within each matrix, or over all" },
    { "seed", COUNT, &opt.seed, "0 to 9e15", "1", "of DeltaW and of the order of the data" },
    MORE_OPTIONS
    { "out", TEXT, &opt.out, "FOLDER", "out", "for the table, the settings and the ticket" },
    { "save-every", REAL, &opt.save_every, "0 to 1e9", "300", "seconds between saves of the run; 0: only after each round" },
    { "resume", FLAG, &opt.resume, "", "", "go on with the run that the output folder holds, with its settings" },
    { "overwrite", FLAG, &opt.overwrite, "", "", "replace the run that the output folder holds" },
};
enum { OPTIONS = sizeof table / sizeof *table };
enum { SETTINGS = OPTIONS - 4 };            // of a run: not the last four, it may go on in another folder and be saved more often
static int given[OPTIONS];                  // how often the user named it

static void usage(void)
{
    printf("Trains a RIGSA adapter for a SmolLM2 language model.\n\n    ./train_rigsa [--option value ...]\n\n");
    for (const Option *o = table; o < table + OPTIONS; o++) {
        printf("  --%s %s\n        %s", o->name, o->range, o->help);
        printf(*o->start ? " (default %s)\n" : "\n", o->start);
    }
    printf("  --help\n        this text\n");
    exit(0);
}

static double parse_number(const Option *o, const char *text)
{
    char *end;
    double low, high, number = strtod(text, &end);
    if (end == text || *end || isspace((unsigned char)*text) || !isfinite(number))
        die("--%s: `%s` is not a number", o->name, text);
    if (o->type == COUNT && number != floor(number)) die("--%s: `%s` is not a whole number", o->name, text);
    sscanf(o->range, "%lf to %lf", &low, &high);
    if (number < low || number > high) die("--%s: %s is not in %s", o->name, text, o->range);
    return number;
}

// Of a list, the n-th from 0 is set, and ends it.
static void option_set(const Option *o, char *text, int n)
{
    switch (o->type) {
    case TEXT: *(char **)o->where = text; break;
    case LIST:
        if (n == MAX_EVALS) die("--%s: at most %d of them", o->name, MAX_EVALS);
        if (strpbrk(text, " \n")) die("--%s: `%s`: no spaces, please: a saved run has the names in one line", o->name, text);
        ((char **)o->where)[n] = text;
        ((char **)o->where)[n + 1] = NULL;
        break;
    case COUNT: case REAL: *(double *)o->where = parse_number(o, text); break;
    case FLAG: *(int *)o->where = !text || !strcmp(text, "yes"); break;
    case CHOICE:
        *(int *)o->where = choice_place(o->range, text);
        if (*(int *)o->where < 0) die("--%s: `%s` is none of %s", o->name, text, o->range);
    }
}

static int option_find(const char *name)
{
    for (int i = 0; i < OPTIONS; i++) if (!strcmp(table[i].name, name)) return i;
    return -1;
}

static char *output_path(const char *name, char path[PATH_MAX])
{
    if (snprintf(path, PATH_MAX, "%s/%s", opt.out, name) >= PATH_MAX) die("--out: too long a path");
    return path;
}

// A default, or what a saved run had. A list is words.
static void option_read(const Option *o, char *text)
{
    if (o->type != LIST) { option_set(o, text, 0); return; }
    int n = 0;
    for (char *word; (word = strsep(&text, " ")); ) option_set(o, word, n++);
}

// One `name value` a line: what is printed at the start and saved with the run and with its ticket.
static char *settings_text(void)
{
    char *text;
    size_t size;
    FILE *to = open_memstream(&text, &size);
    for (const Option *o = table; o < table + SETTINGS; o++) {
        if (o->type == TEXT && !**(char **)o->where) continue;
        char word[24] = "";
        fprintf(to, "%-16s", o->name);
        if (o->type == TEXT) fprintf(to, " %s", *(char **)o->where);
        if (o->type == LIST) for (char **e = o->where; *e; e++) fprintf(to, " %s", *e);
        if (o->type == FLAG) choice_word(word, "no|yes", *(int *)o->where);
        if (o->type == CHOICE) choice_word(word, o->range, *(int *)o->where);
        if (o->type == COUNT || o->type == REAL) {
            snprintf(word, sizeof word, "%.15g", *(double *)o->where);          // as it was written, if that says it all
            if (strtod(word, NULL) != *(double *)o->where) snprintf(word, sizeof word, "%.17g", *(double *)o->where);
        }
        fprintf(to, *word ? " %s\n" : "\n", word);
    }
    fclose(to);
    return text;
}

// Options that the user did not give are what they were in the saved run. Returns its settings.
static char *settings_resume(void)
{
    char path[PATH_MAX];
    size_t length;
    File file = file_open(output_path("state.bin", path), "stat");
    const char *text = section(&file, "settings", 1, &length);
    char *saved = strndup(text ? text : "", length), *lines = strdup(saved);
    file_close(&file);
    for (char *line; (line = strsep(&lines, "\n")) && *line; ) {
        int found = option_find(strsep(&line, " "));
        if (found < 0 || found >= SETTINGS || !line) die("%s: damaged section `settings`; %s", path, mend("stat"));
        if (!given[found]++) option_read(&table[found], line + strspn(line, " "));
    }
    return saved;
}

// Those that the user did give must be the same.
static void settings_agree(char *ours, char *saved)
{
    for (char *line; (line = strsep(&ours, "\n")) && *line; ) {
        char *was = strsep(&saved, "\n"), *name;
        if (was && !strcmp(line, was)) continue;
        name = strsep(&line, " ");
        if (!was || strcmp(name, strsep(&was, " ")))
            die("--%s was not given to the saved run; leave it out, or start a run in another --out", name);
        die("--%s is %s, in the saved run it was %s; leave it out, or start a run in another --out",
            name, line + strspn(line, " "), was + strspn(was, " "));
    }
}

static void parse_options(int argc, char **argv)
{
    for (const Option *o = table; o < table + OPTIONS; o++) if (o->type != FLAG) option_read(o, strdup(o->start));
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) usage();
        int found = strncmp(argv[i], "--", 2) ? -1 : option_find(argv[i] + 2);
        if (found < 0) die("unknown option `%s`; ./train_rigsa --help lists them all", argv[i]);
        const Option *o = &table[found];
        if (given[found] && o->type != LIST) die("--%s is given twice", o->name);
        if (o->type != FLAG && i + 1 == argc) die("--%s needs a value: %s", o->name, o->range);
        option_set(o, o->type == FLAG ? NULL : argv[++i], given[found]++);
    }
    if (opt.resume && opt.overwrite) die("--resume goes on with the run that --overwrite would replace");
    char *saved = opt.resume ? settings_resume() : NULL;
    if (opt.method == METHOD_FULL) {                    // what full fine-tuning has other defaults for
        if (!given[option_find("lr")]) opt.lr = 1e-3;
        if (!given[option_find("weight-decay")]) opt.weight_decay = 0.1;
    }
    if (opt.method != METHOD_EVAL && *opt.ticket) die("--ticket goes with --method eval");
    if (opt.lr * opt.weight_decay >= 1)
        die("--lr %g times --weight-decay %g is not below 1: one update would erase DeltaW", opt.lr, opt.weight_decay);
    if (opt.sigma == 0) die("--sigma 0 leaves no sign to compare with");
    if (opt.rest == REST_INIT && opt.survivors == SURVIVORS_REDRAW)
        die("--survivors redraw would also draw afresh what --rest init freezes");
    if (opt.micro == 0 || opt.micro > opt.batch) opt.micro = opt.batch;
    precision = (Precision)opt.precision;
    if (saved) settings_agree(settings_text(), saved);
}

// ---------------------------------------------------------------------------------------------------------------------
// 15. Training

// One row of the paper's table: of the base, or of a pass.
typedef struct {
    double density, kept, flipped;      // of the entries trained; kept and flipped are NAN where nothing was pruned
    Score score[MAX_EVALS];
    double seconds;                     // since the start
} Row;

typedef struct {
    Model model;
    Data data, eval[MAX_EVALS];
    size_t evals, passes;
    char (*label)[24];                  // (passes + 1) of the base and the passes: numbers, of the last `ticket` or the method
    Batch batch;
    Verdict *verdict;                   // of the largest evaluation set
    Row *row;                           // the base, then one per pass; how many there are says which pass is the next
    size_t rows;
    double *loss;                       // of every update of the run; how many there are says where in its pass the run is
    size_t updates;
    uint32_t *order;                    // (examples of the longest pass, rounded up to whole epochs) the order of a pass
    uint64_t hash[2 + MAX_EVALS];       // of the base's weights, the data, the evaluation sets
    double start, saved, shown;         // seconds
    double work, done;                  // operations of the whole run, and so far
    int terminal, forecast;
    char *settings;                     // one `name value` a line
    FILE *details;                      // JSON lines, or NULL
} Run;

static const char *duration(double s)
{
    static char text[32];
    s = round(s);
    if (s < 120) snprintf(text, 32, "%.0f s", s);
    else if (s < 7200) snprintf(text, 32, "%.0f min %02.0f s", floor(s / 60), fmod(s, 60));
    else snprintf(text, 32, "%.0f h %02.0f min", floor(s / 3600), floor(fmod(s, 3600) / 60));
    return text;
}

// Operations per row of a pass that computes `linear` products per matrix and `attention` times attention's two; a row sees half
// of T keys on average.
static double row_work(const Model *model, double T, double linear, double attention)
{
    const Config *c = &model->config;
    return 2 * linear * (double)adapted_weights(model) + 2 * attention * T * c->L * c->H * c->D;
}

static double forward_work(const Model *model, double T) { return row_work(model, T, 1, 1); }

// Forward and backward, where dW is computed for a share `density` of the weights; attention's backward pass has five products.
static double training_work(const Model *model, double T, double density) { return row_work(model, T, 2 + density, 3.5); }

// The line at the bottom of a terminal, five times a second at most; a pipe does not see it.
static void progress(Run *run, const char *what, double part, double loss, double tokens_per_second)
{
    double now = seconds(), elapsed = now - run->start;
    if (!run->terminal || now - run->shown < 0.2) return;
    run->shown = now;
    printf("\r\033[K  %-8s %3.0f %%", what, 100 * part);
    if (loss >= 0) printf("   loss %.4f   %.0f tokens/s", loss, tokens_per_second);
    if (run->done > 0) printf("   %s left", duration(elapsed * fmax(0, run->work - run->done) / run->done));
    fflush(stdout);
}

static void clear_line(const Run *run) { if (run->terminal) printf("\r\033[K"); }

static size_t pass_examples(const Run *run, size_t pass)
{
    return (size_t)(opt.method != METHOD_FULL && pass == run->passes ? opt.ticket_examples : opt.examples);
}

// The updates of all passes before this one.
static size_t updates_before(const Run *run, size_t pass)
{
    size_t n = 0, batch = (size_t)opt.batch;
    for (size_t p = 1; p < pass; p++) n += (pass_examples(run, p) + batch - 1) / batch;
    return n;
}

// What it takes to go on as if nothing had been, down to the bits. Returns 0, or an errno: then the file of before is still there.
static int state_save(Run *run, const char *path)
{
    Model *model = &run->model;
    size_t trained = model->trained, s = 9;
    double clock[2] = { seconds() - run->start, run->done };
    uint64_t *entries = allocate(matrices(model), sizeof(uint64_t));
    Section section[13] = {
        { "inputs", run->hash, (2 + run->evals) * sizeof(uint64_t) }, { "settings", run->settings, strlen(run->settings) },
        { "clock", clock, sizeof clock }, { "rows", run->row, run->rows * sizeof(Row) },
        { "losses", run->loss, run->updates * sizeof(double) }, { "draw", &model->init.draw, sizeof model->init.draw },
        { "m", model->m_arena, trained * sizeof(float) }, { "v", model->v_arena, trained * sizeof(float) },
        { "weights", model->base_arena, opt.method == METHOD_FULL ? trained * sizeof(float) : 0 } };
    if (opt.method == METHOD_RIGSA) s += adapter_sections(model, section + s, entries);
    int error = file_write(path, "stat", section, s);
    free(entries);
    return error;
}

// table.csv and loss.csv of the run so far, written anew. Return 0 or an errno.
static int table_save(const Run *run)
{
    char path[PATH_MAX];
    FILE *f = file_begin(output_path("table.csv", path));
    if (!f) return errno;
    fprintf(f, "round,density,kept,flipped");
    for (size_t i = 0; i < run->evals; i++) fprintf(f, ",%s,%s_error", run->eval[i].column, run->eval[i].column);
    fprintf(f, ",seconds\n");
    for (size_t r = 0; r < run->rows; r++) {
        const Row *row = &run->row[r];
        fprintf(f, "%s,%.6f,%.6f,%.6f", run->label[r], row->density, row->kept, row->flipped);
        for (size_t i = 0; i < run->evals; i++) fprintf(f, ",%.6f,%.6f", row->score[i].value, row->score[i].error);
        fprintf(f, ",%.1f\n", row->seconds);
    }
    return file_end(f, path);
}

static int losses_save(const Run *run)
{
    char path[PATH_MAX];
    FILE *f = file_begin(output_path("loss.csv", path));
    if (!f) return errno;
    fprintf(f, "pass,update,loss\n");
    for (size_t pass = 1, at = 0; at < run->updates; pass++)
        for (size_t t = 1, end = updates_before(run, pass + 1); at < min_size(end, run->updates); t++)
            fprintf(f, "%s,%zu,%.6f\n", run->label[pass], t, run->loss[at++]);
    return file_end(f, path);
}

// Returns 0 or an errno, of which it warns: a full disk may be empty again when the next save is due.
static int save(Run *run)
{
    char path[PATH_MAX];
    int error = state_save(run, output_path("state.bin", path));
    if (!error) error = table_save(run);
    if (!error) error = losses_save(run);
    clear_line(run);
    if (error) fprintf(stderr, "train_rigsa: warning: %s: not saved: %s; what was saved before stays\n", opt.out, strerror(error));
    run->saved = seconds();
    return error;
}

static void state_load(Run *run, const char *path)
{
    Model *model = &run->model;
    File file = file_open(path, "stat");
    const uint64_t *hash = needed(&file, "inputs", 2 + run->evals, sizeof(uint64_t));
    const double *clock = needed(&file, "clock", 2, sizeof(double));
    const Row *row = section(&file, "rows", sizeof(Row), &run->rows);
    section(&file, "losses", sizeof(double), &run->updates);
    for (size_t i = 0; i < 2 + run->evals; i++)
        if (hash[i] != run->hash[i])
            die("%s has changed since %s was written", i == 0 ? opt.base : i == 1 ? opt.data : opt.evals[i - 2], path);
    if (!(clock[0] >= 0 && clock[1] >= 0) || run->rows < 1 || run->rows > run->passes + 1
        || run->updates < updates_before(run, run->rows)
        || run->updates > updates_before(run, min_size(run->rows, run->passes) + 1))
        die("%s: damaged; %s", path, mend("stat"));
    memcpy(run->row, row, run->rows * sizeof(Row));
    memcpy(run->loss, needed(&file, "losses", run->updates, sizeof(double)), run->updates * sizeof(double));
    memcpy(&model->init.draw, needed(&file, "draw", 1, sizeof model->init.draw), sizeof model->init.draw);
    run->start = seconds() - clock[0];
    run->done = clock[1];
    if (opt.method == METHOD_RIGSA) {
        free_moments(model);
        adapter_load(model, &file);
        trained_arenas(model, delta_tensor(model, 0), gates_tensor(model) + 1);
    }
    size_t trained = model->trained;
    if (opt.method == METHOD_FULL) memcpy(model->base_arena, numbers(&file, "weights", trained), trained * sizeof(float));
    memcpy(model->m_arena, numbers(&file, "m", trained), trained * sizeof(float));
    memcpy(model->v_arena, numbers(&file, "v", trained), trained * sizeof(float));
    file_close(&file);
}

// SIGINT or SIGTERM, or 0. The second one ends the program at once.
static volatile sig_atomic_t asked_to_stop;

static void ask_to_stop(int number)
{
    asked_to_stop = number;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
}

static void stop_if_asked(Run *run)
{
    if (!asked_to_stop) return;
    if (save(run)) die("%s: stopped; --resume goes on from the save before", opt.out);
    printf("stopped and saved; this goes on with it:  ./train_rigsa --resume --out %s\n", opt.out);
    exit(128 + asked_to_stop);
}

static Score evaluate(Run *run, const char *label, const Data *data)
{
    double work = forward_work(&run->model, mean_length(data));
    Slot slot[SLOTS] = { 0 };
    size_t next = 0;
    uint32_t *token = integers(data->metric == NUMBER ? SLOTS * data->longest : 0);
    char *text = allocate(data->limit * data->longest_piece + 1, 1);
    for (int s = 0; s < SLOTS; s++) slot[s].token = token + s * data->longest;
    for (size_t e = 0; e < data->examples; ) {
        size_t n = data->metric == NUMBER
            ? generate(&run->model, run->verdict, &run->batch, data, slot, &next, text, run->details, label)
            : judge(&run->model, run->verdict, &run->batch, data, e);
        for (size_t j = e; j < e + n && data->metric != NUMBER; j++)
            print_details(run->details, label, data, j, &run->verdict[j], NULL, NULL);
        e += n;
        run->done += work * (double)run->batch.all.n;
        stop_if_asked(run);
        progress(run, data->column, (double)e / (double)data->examples, -1, 0);
    }
    if (run->details && ferror(run->details)) die("%s: cannot be written: %s", opt.details, strerror(errno));
    free(token);
    free(text);
    return score_verdicts(run->verdict, data);
}

// order = the examples of one pass: whole permutations of the data, a fresh one each time round, until there are `count`.
static void visit_order(uint32_t *order, const Data *data, size_t count, uint64_t seed, size_t pass)
{
    for (size_t at = 0, epoch = 0; at < count; at += data->examples, epoch++)
        shuffle(order + at, data->examples, random_key(seed, STREAM_ORDER, pass, epoch));
}

// Gradients of the mean loss over the answer tokens of `count` examples, added up over forward passes of `micro` examples.
static double loss_and_gradient(Run *run, const uint32_t *example, size_t count)
{
    const Data *data = &run->data;
    size_t answers = 0;
    double loss = 0;
    for (size_t i = 0; i < count; i++) answers += data->length[example[i]] - data->answer[example[i]];
    model_zero_grad(&run->model);
    for (size_t i = 0; i < count; ) {
        batch_clear(&run->batch, 0);
        for (size_t end = min_size(count, i + (size_t)opt.micro); i < end; i++) batch_add(&run->batch, data, example[i], 0, 0);
        model_forward(&run->model, &run->batch);
        loss += head_forward_backward(&run->model, &run->batch, 1, 1.0f / (float)answers);
        if (!isfinite(loss)) break;                         // the activations stay as they are, for broken_tensor
        model_backward(&run->model, &run->batch);
    }
    return loss / (double)answers;
}

// Where a loss or a gradient that is not finite comes from: the first broken one in the order in which they are computed.
static const char *broken_tensor(Run *run, char text[64])
{
    Model *model = &run->model;
    const Layer *layer = model->acts.layer;
    for (size_t l = 1; l <= model->config.L && layer[l].x != layer[0].x; l++) {     // the same: layers share their memory
        size_t rows = l < model->config.L ? run->batch.all.n : run->batch.answer.n;
        snprintf(text, 64, "the output of layer %zu", l - 1);
        if (!all_finite(layer[l].x, rows * model->config.C)) return text;
    }
    for (size_t i = model->all_tensors - 1; i-- > 0; ) {            // the gates, the last tensor, are a sum over another one
        const Tensor *t = &model->tensors[i];
        snprintf(text, 64, "the gradient of %s", t->name);
        if (t->grad && !all_finite(t->grad, t->n)) return text;
    }
    return "the loss";
}

// One pass, or what is left of it.
static void train_pass(Run *run, size_t pass, double density)
{
    size_t batch = (size_t)opt.batch, count = pass_examples(run, pass), before = updates_before(run, pass), tokens = 0;
    size_t updates = updates_before(run, pass + 1) - before;
    double T = mean_length(&run->data), smooth = -1, begin = seconds();
    double work = training_work(&run->model, T, density);
    char text[64];
    visit_order(run->order, &run->data, count, run->model.init.seed, pass);
    for (size_t t = run->updates - before + 1; t <= updates; t++) {
        size_t first = (t - 1) * batch, size = min_size(batch, count - first);
        double loss = loss_and_gradient(run, run->order + first, size);
        if (!isfinite(loss) || !model_update(&run->model, t, schedule(t, updates, opt.warmup, opt.cooldown)))
            die("%s, update %zu: %s is not finite. %s. %s/state.bin is as it was saved before", run->label[pass], t,
                broken_tensor(run, text), run->updates ? "The steps were too large: start again with a smaller --lr or --alpha-lr"
                : "Nothing is trained yet: the base has weights too large for these examples", opt.out);
        run->loss[run->updates++] = loss;
        for (size_t i = first; i < first + size; i++) tokens += run->data.length[run->order[i]];
        smooth = smooth < 0 ? loss : 0.95 * smooth + 0.05 * loss;
        run->done += work * T * (double)size;
        double now = seconds();
        if (!run->forecast && now - begin > 2) {
            clear_line(run);
            printf("forecast: %s for the whole run, at %.0f tokens/s\n",
                   duration((now - run->start) * run->work / run->done), (double)tokens / (now - begin));
            run->forecast = 1;
        }
        if (opt.save_every > 0 && now - run->saved >= opt.save_every) save(run);
        stop_if_asked(run);
        progress(run, run->label[pass], (double)t / (double)updates, smooth, (double)tokens / (now - begin));
    }
}

static void print_row(const Run *run, const Row *row)
{
    printf("%-8s", run->label[row - run->row]);
    if (isnan(row->density)) printf(" %8s", "-");
    else printf(" %8.4f", row->density);
    if (isnan(row->kept)) printf(" %6s %8s", "-", "-");
    else printf(" %6.3f %8.3f", row->kept, row->flipped);
    for (size_t i = 0; i < run->evals; i++) printf("  %.4f +-%.4f", row->score[i].value, row->score[i].error);
    printf(" %9s\n", duration(row->seconds));
}

// The rows so far, under their heading.
static void print_table(const Run *run)
{
    printf("\n%-8s %8s %6s %8s", "round", "density", "kept", "flipped");
    for (size_t i = 0; i < run->evals; i++) printf(" %15.15s", run->eval[i].column);
    printf(" %9s\n", "time");
    for (size_t i = 0; i < run->rows; i++) print_row(run, &run->row[i]);
}

// Evaluates the model as it is and adds the row to the table.
static Row *add_row(Run *run, double density)
{
    Row *row = &run->row[run->rows];
    *row = (Row){ .density = density, .kept = NAN, .flipped = NAN };
    for (size_t i = 0; i < run->evals; i++) row->score[i] = evaluate(run, run->label[run->rows], &run->eval[i]);
    row->seconds = seconds() - run->start;
    run->rows++;
    clear_line(run);
    return row;
}

// Kept and flipped shares, over all and for each kind of matrix.
static void report_pruning(Row *row, const Pruned *pruned, size_t count)
{
    printf("  kept/flipped:");
    for (size_t kind = 0; kind <= ADAPTED; kind++) {            // the last of them: all kinds
        Pruned sum = { 0 };
        for (size_t a = kind % ADAPTED; a < count; a += kind < ADAPTED ? ADAPTED : 1) {
            sum.entries += pruned[a].entries;
            sum.flipped += pruned[a].flipped;
            sum.kept += pruned[a].kept;
        }
        row->kept = (double)sum.kept / (double)max_size(sum.entries, 1);
        row->flipped = (double)sum.flipped / (double)max_size(sum.entries, 1);
        if (kind < ADAPTED) printf("  %s %.2f/%.2f", KIND[kind], row->kept, row->flipped);
    }
    printf("\n");
}

// The character of a token; '?' for one that has none.
static char glyph(const Data *data, uint32_t token)
{
    for (size_t g = 0; g < data->glyph_count; g++) if (data->glyphs[2 * g] == token) return (char)data->glyphs[2 * g + 1];
    return '?';
}

// The first example of the target as the text that the model reads, with its answer.
static void draw_example(Run *run)
{
    const Data *data = &run->eval[0];
    if (!data->glyphs || data->metric == NUMBER) return;
    judge(&run->model, run->verdict, &run->batch, data, 0);
    putchar('\n');
    for (uint32_t t = 0; t < data->answer[0]; t++) {
        char c = glyph(data, data_token(data, data->offset[0] + t));
        if (c != '?') putchar(c);
    }
    printf("\n  read as %c, is %c\n", glyph(data, run->verdict[0].said), glyph(data, data_token(data, data->answer[0])));
}

// Makes the output folder, keeps the run that it may hold, and keeps others out until this process ends, however it ends.
static void take_folder(void)
{
    char path[PATH_MAX];
    if (mkdir(opt.out, 0777) && errno != EEXIST) die("--out %s: cannot be made: %s", opt.out, strerror(errno));
    int folder = open(opt.out, O_RDONLY | O_DIRECTORY);
    if (folder < 0) die("--out %s: cannot be used: %s", opt.out, strerror(errno));
    if (flock(folder, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) die("%s: another run is at work there", opt.out);
    if (!opt.resume && !opt.overwrite && !access(output_path("settings.txt", path), F_OK))
        die("%s holds a run; go on with it (--resume), replace it (--overwrite), or choose another --out", opt.out);
}

static void load_data(Run *run)
{
    const char *base = opt.base;
    uint32_t V = run->model.config.V;
    size_t largest = 0;
    if (opt.method != METHOD_EVAL) run->data = data_open(opt.data);
    if (run->data.V && run->data.V != V) die("%s has a vocabulary of %u, %s of %u", opt.data, run->data.V, base, V);
    run->hash[1] = hash64(run->data.file.bytes, run->data.file.length);
    for (; opt.evals[run->evals]; run->evals++) {
        const char *path = opt.evals[run->evals];
        Data *eval = &run->eval[run->evals];
        *eval = data_open(path);
        if (!eval->column[0]) die("%s: has no column and metric, it is not an evaluation set", path);
        if (eval->V != V) die("%s has a vocabulary of %u, %s of %u", path, eval->V, base, V);
        run->hash[2 + run->evals] = hash64(eval->file.bytes, eval->file.length);
        largest = max_size(largest, eval->examples);
    }
    run->verdict = allocate(largest, sizeof(Verdict));
}

static void open_details(Run *run)
{
    if (!*opt.details) return;
    run->details = fopen(opt.details, opt.resume ? "a" : opt.overwrite ? "w" : "wx");
    if (!run->details) die("%s: cannot be written: %s (--overwrite replaces it)", opt.details, strerror(errno));
    setvbuf(run->details, NULL, _IOLBF, 0);             // a run that is killed leaves whole lines
}

// The number after `key` at the start of a line of a file; infinity if there is none.
static double number_in(const char *path, const char *key)
{
    char line[256];
    double number = INFINITY;
    FILE *f = fopen(path, "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key)) && sscanf(line + strlen(key), "%lf", &number) == 1) break;
    if (f) fclose(f);
    return number;
}

// The least of free memory, ulimit -v and the limits (bytes; of either version) of our cgroup and those around it; or infinity.
static double memory_available(void)
{
    struct rlimit space;
    char line[PATH_MAX], path[PATH_MAX + 64];
    double least = 1024 * number_in("/proc/meminfo", "MemAvailable:");
    if (!getrlimit(RLIMIT_AS, &space) && space.rlim_cur != RLIM_INFINITY) least = fmin(least, (double)space.rlim_cur);
    FILE *f = fopen("/proc/self/cgroup", "r");
    while (f && fgets(line, sizeof line, f)) {                  // "0::/ours" or "4:memory:/ours"
        int second = !strncmp(line, "0::/", 4);
        char *group = second || strstr(line, ":memory:/") ? strchr(line, '/') : NULL;
        for (char *end = group ? strchr(group, '\n') : NULL; end; end = strrchr(group, '/')) {
            *end = 0;
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s/memory.%s", second ? "" : "/memory", group,
                     second ? "max" : "limit_in_bytes");
            least = fmin(least, number_in(path, ""));
        }
    }
    if (f) fclose(f);
    return least;
}

// `micro` training examples, or what an evaluation takes at a time.
static Largest largest_batch(const Run *run, size_t micro)
{
    Largest b = { .N = micro * run->data.longest, .T = run->data.longest, .M = micro * run->data.longest_answer };
    if (opt.method == METHOD_EVAL) b.N = 2048;
    for (const Data *eval = run->eval; eval < run->eval + run->evals; eval++) {
        int generates = eval->metric == NUMBER;
        b.past |= generates;
        b.T = max_size(b.T, eval->longest);
        b.N = max_size(b.N, generates ? SLOTS : eval->longest);
        // answers of as many examples as N tokens hold on average, each as long as the longest: one always fits
        b.M = max_size(b.M, generates ? SLOTS : min_size(b.N, b.N * eval->longest_answer * eval->examples / eval->tokens));
    }
    if (b.N > UINT32_MAX) die("a batch of %zu tokens is too large; take a smaller --micro", b.N);
    // choices share rows, but each has a copy of the keys
    b.K = run->evals ? max_size(4 * b.N, b.past ? SLOTS * b.T : 0) : 0;
    return b;
}

// What the run needs, printed, refused if it is not there, and only then allocated. Also counts the run's operations.
static void plan(Run *run)
{
    Model *model = &run->model;
    const Config *c = &model->config;
    Largest batch = largest_batch(run, (size_t)opt.micro);
    double pass_work = 0, eval_work = 0, density = 1, mean = mean_length(&run->data);
    int full = opt.method == METHOD_FULL, training = opt.method != METHOD_EVAL;
    size_t most = 0, micro = (size_t)opt.micro;
    for (const Data *eval = run->eval; eval < run->eval + run->evals; eval++)
        eval_work += forward_work(model, mean_length(eval)) * (double)eval->rows;
    if (batch.T > c->context) printf("note: sequences of %zu tokens, the base was made for %u\n", batch.T, c->context);
    if (opt.examples == 0) opt.examples = (double)run->data.examples;
    if (opt.ticket_examples == 0) opt.ticket_examples = (double)run->data.examples;
    if (opt.method == METHOD_RIGSA) run->passes = (size_t)opt.rounds + 1;
    if (opt.method == METHOD_FULL) run->passes = 1;
    for (size_t p = 1; p <= run->passes; p++, density *= 0.9 * opt.keep) {          // a tenth flips, or so
        pass_work += training_work(model, mean, density) * mean * (double)pass_examples(run, p);
        most = max_size(most, pass_examples(run, p));
    }
    run->work = pass_work + eval_work * (double)(run->passes + 1);

    model->acts.recompute = opt.recompute;
    size_t weights = base_weights(model), adapted = adapted_weights(model), halved = precision == BF16 && !full ? adapted / 2 : 0;
    size_t beside = values_in(model->tensors + model->base_tensors, model->tensors + model->all_tensors);
    size_t adapter = training && !full ? beside : 0, trained = full ? weights : adapter;
    struct stat ticket;
    // pruned, an entry has an index besides: 5 numbers where a dense one has 4
    if (opt.method == METHOD_RIGSA && run->passes > 1) adapter = (size_t)(fmax(1, 5 * opt.keep - 3) * (double)beside);
    if (*opt.ticket && !stat(opt.ticket, &ticket)) adapter = (size_t)ticket.st_size / 4;
    size_t acts = acts_layout(model, NULL, batch, training), packed = (size_t)omp_get_max_threads() * (PACKED_A + PACKED_B);
    size_t updates = updates_before(run, run->passes + 1), bytes[] = { weights - halved, adapter,
        trained, 2 * trained, acts, largest_matrix(&model->config) + packed, most + run->data.examples + 2 * updates };
    const char *kind[] = { "weights", "adapter", "gradients", "moments", "activations", "scratch", "order and losses" };
    double total = 0, there = 1e-6 * memory_available();
    printf("\nmodel    %s: %zu weights, %u layers of %u, vocabulary %u; %zu of them in the %zu matrices to adapt\nmemory  ",
           model->base.name, weights, c->L, c->C, c->V, adapted, matrices(model));
    for (int i = 0; i < 7; total += 4e-6 * (double)bytes[i++])
        if (bytes[i]) printf(" %s %.1f,", kind[i], 4e-6 * (double)bytes[i]);
    printf(" together %.1f MB\n", total);
    if (total > there) {
        if (!training) die("%.1f MB are needed, %.1f are there (free memory, limit of the cgroup, ulimit -v)", total, there);
        double others = total - 4e-6 * (double)acts, fits = total;
        while (fits > there && micro > 1)
            fits = others + 4e-6 * (double)acts_layout(model, NULL, largest_batch(run, micro /= 2), training);
        die("%.1f MB are needed, %.1f are there (free memory, limit of the cgroup, ulimit -v); %s--micro %zu needs %.1f%s%s",
            total, there, fits > there ? "even " : "", micro, fits, opt.recompute ? "" : ", --recompute saves more",
            precision == BF16 ? "" : ", --precision bf16 too");
    }
    printf("work     %.3g TFLOP in %zu passes and %zu evaluations, on %d threads\n",
           1e-12 * run->work, run->passes, run->passes + 1, omp_get_max_threads());
#ifndef _OPENMP
    printf("note: built without OpenMP: one thread, and all loops slower\n");
#endif
    acts_alloc(model, batch, training);
    run->batch = batch_alloc(batch.N, batch.M, batch.K);
    run->row = allocate(run->passes + 1, sizeof(Row));
    run->label = allocate(run->passes + 1, sizeof *run->label);
    for (size_t p = 0; p < run->passes; p++) snprintf(run->label[p], sizeof *run->label, "%zu", p);
    choice_word(run->label[run->passes], opt.method == METHOD_RIGSA ? "ticket" : METHODS, opt.method);
    strcpy(run->label[0], *opt.ticket ? "ticket" : "base");
    run->loss = allocate(updates, sizeof(double));
    run->order = integers(most + run->data.examples);
}

// What is trained, and how fast: every weight (how a base is made, and what forgetting looks like), or DeltaW and the gates.
static void prepare_training(Model *model)
{
    int full = opt.method == METHOD_FULL;
    model->init = (Init){ (uint64_t)opt.seed, 0, (Rest)opt.rest, (float)opt.sigma };
    if (full) trained_arenas(model, model->tensors, model->tensors + model->base_tensors);
    else adapter_alloc(model);
    for (Tensor *t = model->tensors; t < model->tensors + model->all_tensors; t++) {
        t->lr = (float)(t == gates_tensor(model) ? opt.alpha_lr : opt.lr);
        t->decay = t->rows > 1 ? (float)opt.weight_decay : 0;
    }
}

// All passes, from the first or from where a saved run was: the rounds, each with its pruning, then the ticket's (or `full`).
static void train(Run *run)
{
    Model *model = &run->model;
    char path[PATH_MAX];
    Pruned *pruned = allocate(matrices(model), sizeof(Pruned));
    int full = opt.method == METHOD_FULL;
    prepare_training(model);
    size_t all = adapter_entries(model);
    signal(SIGINT, ask_to_stop);
    signal(SIGTERM, ask_to_stop);
    signal(SIGXFSZ, SIG_IGN);                               // a file beyond ulimit -f is an error of write(), like a full disk
    if (opt.resume) {
        state_load(run, output_path("state.bin", path));
        print_table(run);
        printf("resumed after update %zu of %zu\n", run->updates, updates_before(run, run->passes + 1));
    } else must_write(path, state_save(run, output_path("state.bin", path)));   // is the disk too small? Better known at once
    FILE *settings = file_begin(output_path("settings.txt", path));
    if (settings) fputs(run->settings, settings);
    must_write(path, file_end(settings, path));
    run->saved = seconds();
    for (size_t pass = run->rows; pass <= run->passes; pass++) {
        double density = (double)adapter_entries(model) / (double)all;
        train_pass(run, pass, density);
        Row *row = add_row(run, full ? NAN : density);
        if (pass < run->passes) {
            prune(model, pruned, opt.keep, (Threshold)opt.threshold, (Survivors)opt.survivors);
            report_pruning(row, pruned, matrices(model));
        }
        print_row(run, row);
        save(run);
    }
    if (full) base_save(model, output_path("model.bin", path));
    else ticket_save(model, output_path("ticket.bin", path), run->settings);
    free(pruned);
}

static void (*prepare_more)(Run *run), (*run_more)(Run *run);       // what dev/baselines.c does before the plan, and after RIGSA

// From the command line to the ticket.
static void run_whole(Run *run, int argc, char **argv)
{
    Model *model = &run->model;
    parse_options(argc, argv);
    run->start = seconds();
    run->terminal = isatty(1);
    File base = base_open(model, opt.base);
    load_data(run);
    if (prepare_more) prepare_more(run);
    run->settings = settings_text();
    if (opt.method != METHOD_EVAL) take_folder();
    open_details(run);
    fputs(run->settings, stdout);
    plan(run);
    base_read(model, &base, opt.method == METHOD_FULL);
    run->hash[0] = model->base.hash;
    if (*opt.ticket) ticket_load(model, opt.ticket), merge(model);
    if (!opt.resume) print_table(run), print_row(run, add_row(run, NAN));
    if (opt.method == METHOD_RIGSA || opt.method == METHOD_FULL) train(run);
    if (run_more) run_more(run);
    if (run->passes > 1) print_table(run);
    draw_example(run);
    if (opt.method != METHOD_RIGSA) return;
    size_t n = adapter_entries(model);
    printf("\nticket: density %.4f, %zu entries, hash %016llx\n",
           (double)n / (double)adapted_weights(model), n, (unsigned long long)ticket_hash(model));
}

#ifndef TESTING
// libgomp's threads spin for milliseconds before they sleep when they wait for each other: where other programs use the cores
// too, that made a run ten times slower (dev/LOG.md). The library reads its environment before main, so start once more.
static void spin_briefly(char **argv)
{
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "20000", 1);
    execvp(argv[0], argv);                              // if that is not to be, go on as the library likes
}

int main(int argc, char **argv)
{
    static Run run;
    spin_briefly(argv);
    setvbuf(stdout, NULL, _IOLBF, 0);                   // a log that is read while the run goes on
    run_whole(&run, argc, argv);
    return 0;
}
#endif

// SPDX-License-Identifier: MIT
//
// train_rigsa.c: trains a RIGSA adapter (arXiv 2511.01794) for a SmolLM2 language model, on a CPU, from
// scratch.
//
// RIGSA teaches a model a new task without making it forget the old ones. Each linear matrix of the
// transformer becomes
//
//     W = W0 + alpha * (mask . DeltaW)
//
// W0 is the pretrained weight, frozen. DeltaW is full-rank and random. alpha is one learnable gate that
// starts at 1e-6, so that training begins at the pretrained model. After one pass over the data, only entries
// of DeltaW that are large and did not change their sign stay in the mask (iterative magnitude pruning), and
// go back to where they started. Five such rounds leave a few per cent of them, the winning ticket, which one
// more pass trains. Here the new task is to read digits that are written as text.
//
//     make train_rigsa && ./train_rigsa                         the default run: a small model, two minutes
//     cc -O3 -march=native -fopenmp train_rigsa.c -lm           this file alone is the whole trainer, too
//     ./train_rigsa --help                                      every option
//
// How to read it. Part I is what you came for: the method, the transformer forward and backward, the
// optimizer, training and scoring. It uses a handful of functions of Part II, whose names say what they do.
// Part II is how a product keeps the machine busy, and housekeeping: files, memory, options, progress.
// Whoever stops at its banner has seen all of RIGSA.
//
//     Part I   1  Nouns          Config, Tensor, Batch, Layer, Adapter, Model
//              2  RIGSA          the generator, the weight, its gradient, pruning, rewinding
//              3  Layers         rmsnorm, rope, attention, swiglu, cross-entropy: forward, then backward
//              4  Transformer    forward, head and loss, backward
//              5  AdamW          with decoupled weight decay, and the schedule
//              6  Training       a batch, a pass, the rounds
//              7  Scoring        exact match, multiple choice, loss
//     Part II  8  Products       the fast matmul, the one that computes only survivors, the exponential
//              9  Utilities      errors, memory, time, the hash
//             10  Files          reading and writing models, data and tickets
//             11  Memory         the table of tensors, the arenas, the plan
//             12  Options        one table
//             13  Runs           progress, results, the saved state, the plan, main
//
// What this file will not do: run on a GPU, use fast-math (a NaN must stay an alarm), or be a framework.
// There is no graph and no autograd: the backward pass is written by hand, each gradient line beside the
// formula that it implements. The derivations are in doc/backward.md, the method and its open questions in
// doc/rigsa.md, file layouts in doc/model.md. What it need not know of the machine, to be faster on some
// processors or beside other programs, is in dev/wide.h, which the Makefile builds in. dev/evaluate.c reads a
// ticket back, scores and generates; dev/baselines.c trains other adapters, and whole models; dev/mpi.c on
// several machines.
//
// Letters, the same everywhere but in products
//      N  rows: all tokens of a batch     T  tokens of one sequence     S  sequences     M  answer rows
//      R  rows that a layer goes on with after its keys: N, or M in the last layer       K  keys
//      C  hidden size     F  feed-forward size      L  layers                 V  vocabulary
//      H  query heads     KV  key/value heads    G = H / KV  heads that share a key      D  size of a head
//      O, I  rows (outputs) and columns (inputs) of a linear matrix: y (N, O) = x (N, I) W^T
// A gradient has the name of its variable with a d in front (only dlogits takes the logits' place). Those of
// the base's parameters accumulate; a DeltaW's and a gate's are written, once in a pass. A function writes
// its first arguments, reads the next ones, takes sizes last.

#ifndef PROGRAM             // dev/evaluate.c includes this file, and has a name and a main of its own
#define PROGRAM "train_rigsa"
#define STANDALONE
#endif
// Nobody here reads errno or floating-point traps, which would keep loops scalar. (The Makefile says so.)
#if defined(__GNUC__) && !defined(__clang__) && !defined(WIDE)
#pragma GCC optimize("no-math-errno", "no-trapping-math")
#endif
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
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_in_parallel(void) { return 0; }
static void omp_set_num_threads(int threads) { (void)threads; }
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the file formats are little-endian, and so must the machine be"
#endif
#if __FLT_EVAL_METHOD__ == 2
#error "x87 computes with more bits than a float has: compile with -msse2 -mfpmath=sse"
#endif

// -----------------------------------------------------------------------------------------------------------
// Part I: what you came for
// -----------------------------------------------------------------------------------------------------------
// 1. Nouns
//
// A model is one table of tensors. A batch is rows of tokens. A layer keeps what its backward pass needs.
// Shapes stand in brackets where a pointer is born: (N, C) is N rows of C floats, one after the other.

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
    uint16_t *bf16;            // (n) in its place: a frozen matrix with --precision bf16; otherwise NULL
    float *grad, *m, *v;       // (n) gradient and AdamW's two moments; NULL: frozen
    float lr, decay;           // learning rate and decoupled weight decay
    int adapter;               // its number among the adapted matrices, 7 * layer + 0..6; -1: never adapted
} Tensor;

// The place of a layer's tensors in the table: 1 + layer * PER_LAYER + kind.
enum { ATTN_NORM, WQ, WK, WV, WO, FFN_NORM, WGATE, WUP, WDOWN, PER_LAYER, ADAPTED = 7 };

// Some rows of a batch, sequence by sequence.
typedef struct {
    size_t n;
    uint32_t *row;             // (n) which rows of the batch; NULL: all of them
    uint32_t *start;           // (S + 1) the first of each sequence; start[S] = n
    uint32_t *position;        // (n) of the row within its sequence
} Rows;

// A batch is a forest: its sequences stand in lexicographic order, and each shares with the one before it the
// longest common prefix. A shared token is one row, computed once, forward and backward. Nothing is padded.
//
//     sequences       rows, each sequence only its own      keys, a stretch per sequence
//     a b c d         0:a 1:b 2:c 3:d                       0 1 2 3
//     a b e           4:e                                   0 1 4
//     x y             5:x 6:y                               5 6
//
// Everything but attention works on rows: all N, or after the last layer's keys the M answer rows. Attention
// wants the keys of a sequence side by side: they are copied to its stretch (unless nothing is shared: then
// rows and keys are the same), and the gradients of the copies are added back. A row may be the answer row of
// several sequences that go on differently.
typedef struct {
    size_t S, K;
    Rows all, answer;          // the N rows; the M that predict an answer token
    uint32_t *token;           // (N)
    uint32_t *target;          // (M) the token that each answer row should predict
    uint32_t *key_start;       // (S) the first key of each sequence
    uint32_t *key_row;         // (K) the row that each key is copied from
    uint32_t *key_place;       // (K) where to; NULL: to 0, 1, 2, ... (dev/evaluate.c keeps earlier keys)
    uint32_t *example;         // (S) which example of the data
} Batch;

// What the backward pass needs of a layer. What is cheap to compute again is not kept: norm outputs and the
// gated product. After k and v the last layer goes on with answer rows only, because nothing reads the
// others.
//
// In fp32 each layer has arrays of its own. To save memory (bf16, or --recompute) all layers share the first
// one's. Then `saved` holds this layer's copy for its backward pass: of all arrays from x to up, which lie
// end to end, in bfloat16; with --recompute of x alone, from which the forward pass is run again.
typedef struct {
    float *x;                  // (N, C) input of the layer
    float *q;                  // (R, H, D) queries, rotated
    float *k, *v;              // (N, KV, D) keys, rotated, and values
    float *att;                // (R, H, D) what attention gathered
    float *x2;                 // (R, C) after attention's residual
    float *gate, *up;          // (R, F) the two halves of SwiGLU, before the activation
    float *lse;                // (R, H) log of the sum of the exponentials of the scores
    float *saved;              // (saved_floats) or NULL
} Layer;

typedef struct {
    size_t N, T, M, K;         // the largest batch, sequence, number of answer rows and of keys
    Layer *layer;              // (L + 1) the last one holds only x (M, C), the input of the final norm
    size_t saved_floats;
    int recompute;             // a third more work, far less memory
    float *xn, *rstd;          // (N, C), (max(N, M)) norm output, and 1 / rms of its input
    float *h;                  // (N, F) gated product
    float *dx, *dxn;           // (N, C)
    float *dq, *dk, *dv, *datt;// (N, H, D), (N, KV, D) twice, (N, H, D)
    float *dgate, *dup, *dh;   // (N, F)
    float *keys, *values;      // (K, KV, D) a stretch per sequence; of one layer, or `cache_stride` apart
    float *dkeys, *dvalues;    // (KEY_PARTS, K, KV, D)
    size_t cache_stride;       // 0: one layer's copies take the place of another's
    float *blocks;             // a Block of attention for each thread
    float *cosine, *sine;      // (T, D / 2)
    float *xm, *dxm;           // (M, C) answer rows picked out of N, and their gradient
    float *xf, *dxf;           // (M, C) output of the final norm, and its gradient
    float *logits;             // (HEAD_ROWS, V) of a slice of the answer rows
    float *logp;               // (M) log-probability of the target
    uint32_t *best;            // (M) the most likely token
    float *x_t;                // (I, SPAN) for each thread: x^T, of the sampled gradient
} Activations;

typedef struct Model Model;

// An adapter is two functions: the first makes the W that the transformer uses, the second takes its gradient
// apart. The transformer knows nothing else about it. dev/baselines.c has more of them.
typedef struct {
    // the matrix (O, I) that forward and dx use in t's place
    const float *(*weight)(Model *model, Tensor *t);
    // from a product's input x (N, I) and its output's gradient dy (N, O): the gradients of what is trained
    void (*gradient)(Model *model, Tensor *t, const float *x, const float *dy, size_t N);
} Adapter;

// DeltaW's initial values are a function of seed, draw (how often survivors were drawn afresh), sigma, matrix
// and index. With mask, values and gates this makes the same W again: it is a section of a ticket.
typedef struct {
    uint64_t seed;
    uint32_t draw;
    uint32_t rest;             // of a pruned entry: 0 at zero, 1 at its initial value (dev/baselines.c)
    float sigma;
} __attribute__((packed)) Init;

struct Model {
    Config config;
    struct { uint64_t hash; char name[64]; } base;     // of its weights: the base that a ticket belongs to
    Tensor *tensors;           // base tensors in file order, then a DeltaW per adapted matrix, then the gates
    size_t base_tensors, all_tensors;
    Adapter adapter;
    Init init;
    float *scratch;            // (O, I) of the largest matrix: W on its way in, or dW on its way out
    Activations acts;
    uint16_t *bf16_arena;
    float *base_arena, *value_arena;
    size_t trained;            // values, with as many gradients and moments
    float *grad_arena, *m_arena, *v_arena;             // moments with bf16: half as wide, see stored()
    int narrow;                // gradients are so, too: with bf16, where each is written once, RIGSA's
    float *sum_arena;          // of the gradients of several micro-batches, or NULL
    uint32_t *index_arena;
};

static Tensor *layer_tensor(Model *model, size_t l, int kind) {
    return &model->tensors[1 + l * PER_LAYER + kind];
}
static Tensor *final_norm(Model *model) { return &model->tensors[1 + model->config.L * PER_LAYER]; }
static Tensor *head_tensor(Model *m) { return m->config.tied ? m->tensors : 1 + final_norm(m); }
static size_t matrices(const Model *model) { return (size_t)ADAPTED * model->config.L; }
static Tensor *delta_tensor(Model *model, size_t a) { return &model->tensors[model->base_tensors + a]; }
static Tensor *gates_tensor(Model *model) { return delta_tensor(model, matrices(model)); }

// With bf16, operands of products are rounded to bfloat16, the upper half of a float, and so is what is kept
// for the backward pass, and what is stored of gradients and AdamW's moments. Sums, DeltaW and gates stay in
// fp32.
typedef enum { FP32, BF16 } Precision;
static Precision precision;

// Floats in a vector register of the machine that this is compiled for.
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

// What Part I uses of Part II.
__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...);    // one line
static void *allocate(size_t count, size_t size);                       // zeroed, or it dies
static float *floats(size_t count);
static uint32_t *integers(size_t count);
static void free_moments(Model *model);
static void trained_arenas(Model *model, Tensor *first, Tensor *end);   // gradients and moments, zeroed
static double seconds(void);
static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }
static inline uint32_t round_bf16(float x);                             // to bfloat16
static inline float widen_bf16(uint16_t x);
static inline float exponential(float x);                               // exp(x), in loops of vectors
static float maximum(const float *x, size_t n);                         // n in whole vectors
static float kth_largest(const float *x, size_t n, size_t k);           // magnitude, 1 <= k <= n
static void layer_copy(Activations *acts, size_t l, int back);          // saves or restores layer l

// -----------------------------------------------------------------------------------------------------------
// 2. RIGSA
//
// First the one operation that everything is made of. A View is a matrix as a product reads it: element (i,
// k) is at[i * row + k * col], so that a transpose is two strides exchanged.

typedef struct { const float *at; size_t row, col; } View;

static View view(const float *x, size_t width) { return (View){ x, width, 1 }; }       // x (..., width)
static View turned(const float *x, size_t width) { return (View){ x, 1, width }; }     // its transpose

// c (M, N) = a (M, K) b (K, N), or += when `add` is set; rows of c are ldc apart. The three products of a
// linear layer
//
//     y  (N, O) = x (N, I) W^T       dx (N, I) = dy (N, O) W       dW (O, I) = dy^T x
//
// are this one function, but for dW where few entries survive, and so are attention's. This is what it means,
// and what the fast one, in section 8, must equal.
__attribute__((unused))
static void matmul_naive(float *c, size_t ldc, View a, View b, size_t M, size_t N, size_t K, int add) {
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float sum = 0;
            for (size_t k = 0; k < K; k++) sum += a.at[i * a.row + k * a.col] * b.at[k * b.row + j * b.col];
            c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
        }
}

static void matmul(float *c, size_t ldc, View a, View b, size_t M, size_t N, size_t K, int add);

// dw[k] = entry index[k] of dy^T x, for the n entries of a mask: only survivors are differentiated.
static void sampled_product(float *dw, const uint32_t *index, size_t n, const float *dy, const float *x,
                            float *x_t, size_t O, size_t I, size_t N);
static double sampled_below(void);      // the density below which that is faster than the whole product

// DeltaW's initial value at an index is a pure function of (key, index). Pruning compares signs with it and
// rewinding restores it, yet no copy of it is ever stored. It has the same bits on every machine: integers,
// one product and one rounding, nothing that a compiler may contract or a libm may round its own way.

#define GOLDEN 0x9E3779B97F4A7C15u          // 2^64 / golden ratio: consecutive multiples are spread evenly

// The finalizer of splitmix64 (Steele, Lea & Flood 2014), a bijection: each bit flips half of the others.
static inline uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

enum { STREAM_DELTA, STREAM_ORDER };

// The key of one stream of random numbers: `stream` says what for, `a` and `b` which.
static uint64_t random_key(uint64_t seed, uint64_t stream, uint64_t a, uint64_t b) {
    return mix(mix(mix(mix(seed + GOLDEN) + stream) + a) + b);
}

// Normal with standard deviation sigma. The number of ones among 64 random bits is binomial: nearly normal
// out to 8 sigma, but in steps of sigma / 4. Two 16-bit uniforms, each one step wide, fill the steps (the
// density is piecewise linear, its kurtosis 2.97). Twice the sum plus one is odd, so the value is never zero
// and always has a sign. Its variance is 2^34 (64 / 4 + 2 / 12).
static inline float normal(uint64_t key, uint64_t index, float sigma) {
    uint64_t coins = mix(key + (2 * index + 1) * GOLDEN), fill = mix(key + (2 * index + 2) * GOLDEN);
    int steps = __builtin_popcountll(coins) - 32;
    int z = steps * 65536 + (int)(fill & 0xFFFF) + (int)(fill >> 16 & 0xFFFF) - 65535;
    return (float)((double)(2 * z + 1) * ((double)sigma / 527011.5848));
}

// The key of DeltaW of adapted matrix a.
static uint64_t delta_key(const Model *model, size_t a) {
    return random_key(model->init.seed, STREAM_DELTA, a, model->init.draw);
}

// What survivor k of a DeltaW started from.
static inline float initial(const Tensor *delta, uint64_t key, size_t k, float sigma) {
    return normal(key, delta->index ? delta->index[k] : k, sigma);
}

// Rewinding: DeltaW and the gates back to where a pass starts from.
static const float FIRST_GATE = 1e-6f;

static void rewind_adapter(Model *model) {
    for (size_t a = 0; a < matrices(model); a++) {
        Tensor *delta = delta_tensor(model, a);
        uint64_t key = delta_key(model, a);
        #pragma omp parallel for
        for (size_t k = 0; k < delta->n; k++) delta->value[k] = initial(delta, key, k, model->init.sigma);
        gates_tensor(model)->value[a] = FIRST_GATE;
    }
}

static inline float frozen(const Tensor *t, size_t i) {
    return t->bf16 ? widen_bf16(t->bf16[i]) : t->value[i];
}

// Moments, and RIGSA's gradients, may be stored in bfloat16.
static inline float stored(const float *x, size_t i, int narrow) {
    return narrow ? widen_bf16(((const uint16_t *)x)[i]) : x[i];
}

static inline void store(float *x, size_t i, int narrow, float value) {
    if (narrow) ((uint16_t *)x)[i] = (uint16_t)round_bf16(value);
    else x[i] = value;
}

// The weight: W = W0 + alpha * (mask . DeltaW). Where an entry is pruned, it is the pretrained weight again.
static const float *rigsa_weight(Model *model, Tensor *t) {
    const size_t a = (size_t)t->adapter;
    const Tensor *delta = delta_tensor(model, a);
    const float alpha = gates_tensor(model)->value[a], *value = delta->value;
    float *w = model->scratch;
    if (!delta->index) {                                    // nothing is pruned yet
        #pragma omp parallel for simd
        for (size_t i = 0; i < t->n; i++) w[i] = frozen(t, i) + alpha * value[i];
        return w;
    }
    #pragma omp parallel for simd
    for (size_t i = 0; i < t->n; i++) w[i] = frozen(t, i);
    #pragma omp parallel for
    for (size_t k = 0; k < delta->n; k++) w[delta->index[k]] += alpha * value[k];
    return w;
}

// Sums are taken in double over PARTS parts that do not depend on the number of threads, and the parts are
// added in order: the same bits for any number of threads.
enum { PARTS = 256 };

static double sum_of_parts(const double *part) {
    double sum = 0;
    for (int p = 0; p < PARTS; p++) sum += part[p];
    return sum;
}

// grad = alpha * dw for the entries from `first` up to `end`, and returns sum(dw * value). Where `index` is
// given, dw is that of all entries. (A caller says NULL and 0 or 1 itself: then the loop becomes vectors.)
static inline double write_gradient(Tensor *delta, const float *dw, const uint32_t *index, int narrow,
                                    float alpha, size_t first, size_t end) {
    float *grad = delta->grad, *value = delta->value;
    double sum = 0;
    #pragma omp simd reduction(+:sum)
    for (size_t k = first; k < end; k++) {
        float dw_k = dw[index ? index[k] : k];
        store(grad, k, narrow, alpha * dw_k);
        sum += (double)dw_k * value[k];
    }
    return sum;
}

// The gradient. With dW = dy^T x:     dDeltaW = alpha * mask . dW           dalpha = sum(dW . mask . DeltaW)
// Nothing is added to, because a matrix is used once in a pass. Where few entries survive, only they are
// computed: dw then has one value per survivor.
static void rigsa_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    const size_t a = (size_t)t->adapter, O = t->rows, I = t->cols;
    Tensor *delta = delta_tensor(model, a), *gates = gates_tensor(model);
    const uint32_t *index = delta->index;
    const int sampled = index && (double)delta->n < sampled_below() * (double)(O * I);
    const float alpha = gates->value[a];
    float *dw = model->scratch;
    double part[PARTS];
    if (sampled) sampled_product(dw, index, delta->n, dy, x, model->acts.x_t, O, I, N);
    else matmul(dw, I, turned(dy, O), view(x, I), O, I, N, 0);                            // dW = dy^T x
    #pragma omp parallel for
    for (size_t p = 0; p < PARTS; p++) {
        size_t first = delta->n * p / PARTS, end = delta->n * (p + 1) / PARTS;
        #define WRITE(index, narrow) write_gradient(delta, dw, index, narrow, alpha, first, end)
        if (index && !sampled) part[p] = model->narrow ? WRITE(index, 1) : WRITE(index, 0);
        else part[p] = model->narrow ? WRITE(NULL, 1) : WRITE(NULL, 0);
    }
    store(gates->grad, a, model->narrow, (float)sum_of_parts(part));
}

static const Adapter RIGSA = { rigsa_weight, rigsa_gradient };

// The plain adapter: W = W0. Where the weight itself is trained (`--method full`):     dW0 += dy^T x
static const float *plain_weight(Model *model, Tensor *t) {
    if (!t->bf16) return t->value;
    #pragma omp parallel for simd
    for (size_t i = 0; i < t->n; i++) model->scratch[i] = widen_bf16(t->bf16[i]);
    return model->scratch;
}

static void plain_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    (void)model;
    if (t->grad) matmul(t->grad, t->cols, turned(dy, t->rows), view(x, t->cols), t->rows, t->cols, N, 1);
}

static const Adapter PLAIN = { plain_weight, plain_gradient };

// Pruning. After a pass, an entry of DeltaW is a candidate if it has the sign that it started with (zero has
// none: it counts as flipped). The largest by |DeltaW| survive: floor(keep * candidates + 1/2) of them, ties
// to the lower index, within each matrix or of all. The rest leave the mask for good. alpha plays no part.

typedef enum { SURVIVORS_REWIND, SURVIVORS_KEEP, SURVIVORS_REDRAW } Survivors; // back, kept or drawn anew
typedef enum { THRESHOLD_MATRIX, THRESHOLD_ALL } Threshold;             // magnitudes are compared within

typedef struct { size_t entries, flipped, survivors; } Pruned;      // of one matrix, in one round
typedef struct { size_t survivors, ties; float threshold; } Cut;    // all above the threshold, and some ties

// Of x (n) the share `keep` of the candidates, the entries that are not zero.
static Cut cut_magnitudes(const float *x, size_t n, size_t candidates, double keep) {
    Cut cut = { .survivors = (size_t)floor(keep * (double)candidates + 0.5), .threshold = INFINITY };
    if (cut.survivors == 0) return cut;
    cut.threshold = kth_largest(x, n, cut.survivors);
    cut.ties = cut.survivors;
    for (size_t i = 0; i < n; i++) cut.ties -= fabsf(x[i]) > cut.threshold;
    return cut;
}

// Whether x is above the cut, or one of the ties that still fit.
static int survives(Cut *cut, float x) {
    if (fabsf(x) > cut->threshold) return 1;
    if (fabsf(x) < cut->threshold || cut->ties == 0) return 0;
    cut->ties--;
    return 1;
}

// What has changed its sign becomes zero, which is below every threshold. Returns how many.
static size_t zero_flipped(Tensor *delta, uint64_t key, float sigma) {
    size_t flipped = 0;
    #pragma omp parallel for reduction(+:flipped)
    for (size_t k = 0; k < delta->n; k++) {
        float *value = &delta->value[k];
        int same = *value != 0 && (*value > 0) == (initial(delta, key, k, sigma) > 0);
        if (!same) *value = 0, flipped++;
    }
    return flipped;
}

// One round: only the survivors stay, and go where `then` says. Fills pruned (matrices), returns their sum.
static Pruned prune(Model *model, Pruned *pruned, double keep, Threshold over, Survivors then) {
    size_t count = matrices(model), cuts = over == THRESHOLD_ALL ? 1 : count, at = 0;
    Pruned all = { 0 };
    Cut *cut = allocate(cuts, sizeof(Cut));
    for (size_t a = 0; a < count; a++) {
        Tensor *delta = delta_tensor(model, a);
        pruned[a] = (Pruned){ delta->n, zero_flipped(delta, delta_key(model, a), model->init.sigma), 0 };
        all.entries += pruned[a].entries;
        all.flipped += pruned[a].flipped;
    }
    for (size_t a = 0; a < cuts; a++) {                     // of a matrix, or of all, which lie end to end
        const Pruned *of = over == THRESHOLD_ALL ? &all : &pruned[a];
        cut[a] = cut_magnitudes(delta_tensor(model, a)->value, of->entries, of->entries - of->flipped, keep);
        all.survivors += cut[a].survivors;
    }
    free_moments(model);
    uint32_t *index = integers(all.survivors);
    float *value = floats(all.survivors + count);           // the survivors, and after them the gates
    for (size_t a = 0; a < count; a++) {
        Tensor *delta = delta_tensor(model, a);
        size_t first = at;
        for (size_t k = 0; k < delta->n; k++) {
            if (!survives(&cut[over == THRESHOLD_ALL ? 0 : a], delta->value[k])) continue;
            index[at] = delta->index ? delta->index[k] : (uint32_t)k;
            value[at++] = delta->value[k];
        }
        delta->index = index + first;
        delta->value = value + first;
        delta->n = pruned[a].survivors = at - first;
    }
    assert(at == all.survivors);
    Tensor *gates = gates_tensor(model);
    gates->value = memcpy(value + at, gates->value, count * sizeof(float));
    free(model->index_arena);
    free(model->value_arena);
    free(cut);
    model->index_arena = index;
    model->value_arena = value;
    trained_arenas(model, delta_tensor(model, 0), gates + 1);
    if (then == SURVIVORS_REDRAW) model->init.draw++;
    if (then != SURVIVORS_KEEP) rewind_adapter(model);
    return all;
}

// -----------------------------------------------------------------------------------------------------------
// 3. Layers
//
// Each layer is two functions. Forward computes the output from the input. Backward is given the gradient of
// the output and makes that of the input, and where there is a weight adds to its gradient. One rule is
// behind all of them, the chain rule: if y = f(x), then dx_j = sum_i dy_i df_i/dx_j. A value that was used
// twice gets the sum of both gradients, so much is added to. What backward needs of forward is kept where it
// is small (rstd, lse) and computed again where it is large (p, the norms' outputs): see doc/backward.md.

// out (N, C) = the rows of from (..., C) that index names: tokens' embeddings, answer rows, shared keys.
static void gather_forward(float *out, const float *from, const uint32_t *index, size_t N, size_t C) {
    #pragma omp parallel for
    for (size_t n = 0; n < N; n++) memcpy(out + n * C, from + index[n] * C, C * sizeof(float));
}

// dfrom[index[n]] += dout[n]. A row may be named many times, so threads share the columns, not the rows.
static void gather_backward(float *dfrom, const float *dout, const uint32_t *index, size_t N, size_t C) {
    enum { COLUMNS = 16 };                                              // a cache line of them at a time
    #pragma omp parallel for
    for (size_t first = 0; first < C; first += COLUMNS)
        for (size_t n = 0, end = min_size(C, first + COLUMNS); n < N; n++)
            for (size_t c = first; c < end; c++) dfrom[index[n] * C + c] += dout[n * C + c];
}

// out (N, C) = x * rstd * w, with w (C) and rstd (N) = 1 / sqrt(mean(x^2) + eps), which backward needs, too.
static void rmsnorm_forward(float *out, float *rstd, const float *x, const float *w, float eps,
                            size_t N, size_t C) {
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
static void rmsnorm_backward(float *dx, float *dw, const float *dy, const float *x, const float *w,
                             const float *rstd, size_t N, size_t C) {
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

// cosine and sine (T, D / 2) of the angle position * theta^(-2i / D), in fp32 as Hugging Face computes it.
static void rope_table(float *cosine, float *sine, size_t T, size_t D, float theta) {
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < D / 2; i++) {
            float frequency = 1.0f / powf(theta, (float)(2 * i) / (float)D);
            cosine[t * (D / 2) + i] = cosf((float)t * frequency);
            sine[t * (D / 2) + i] = sinf((float)t * frequency);
        }
}

// Rotates the pairs (i, i + D/2) of every head of x (N, heads, D), in place, by the angle of the row's
// position. The backward pass of a rotation is the rotation back: direction -1.
static void rope(float *x, const float *cosine, const float *sine, const uint32_t *position, float direction,
                 size_t N, size_t heads, size_t D) {
    size_t pairs = D / 2;
    #pragma omp parallel for
    for (size_t n = 0; n < N; n++) {
        const float *cos_n = cosine + position[n] * pairs, *sin_n = sine + position[n] * pairs;
        for (size_t h = 0; h < heads; h++) {
            float *low = x + (n * heads + h) * D, *high = low + pairs;
            #pragma omp simd
            for (size_t i = 0; i < pairs; i++) {
                float a = low[i], b = high[i], c = cos_n[i], s = direction * sin_n[i];
                low[i] = a * c - b * s;
                high[i] = b * c + a * s;
            }
        }
    }
}

// Causal attention with grouped queries: head h of q (R, H, D) reads head h / G of k and v (K, KV, D). A row
// of `query` sees the keys of its own sequence, from key_start[s] up to its own position. About QUERIES
// queries at a time, the G heads of some rows one above the other, meet all keys that they may see: memory
// grows with T and never with T^2, and the heads of a group share the packed keys. Forward has one task per
// sequence, kv head and block. In backward blocks add to the same dk and dv: the blocks of a sequence and kv
// head are dealt out to up to KEY_PARTS tasks, each with a dk and dv of its own. No two tasks write to the
// same place.
typedef struct {
    const Rows *query;
    const uint32_t *key_start;             // (S)
    float *blocks;                         // a Block for each thread
    size_t S, K, H, KV, D, T;              // T: the longest sequence that the blocks have room for
} Attention;

enum { QUERIES = 144, KEY_PARTS = 4 };

// What a thread works with: some rows' queries of one group, one above the other, and what belongs to them.
typedef struct {
    size_t rows, n;                        // of the batch; queries, G for each of them
    size_t keys, wide;                     // that the last row sees; in whole vectors
    size_t at, kv_at;                      // where queries begin, in heads of q, and keys, in floats of k
    float *p, *dp;                         // (n, wide)
    float *q, *dq, *out, *dout;            // (n, D)
} Block;

// Keys in whole vectors, so that no loop over them has a rest. What a query may not see is masked.
static size_t whole_vectors(size_t keys) { return round_up(keys, LANES); }
static size_t block_floats(size_t G, size_t T, size_t D) {
    return max_size(QUERIES, G) * (2 * whole_vectors(T) + 4 * D);
}

static size_t block_rows(const Attention *a) { return max_size(1, QUERIES * a->KV / a->H); }

// Of the longest sequence.
static size_t most_blocks(const Attention *a) {
    const uint32_t *start = a->query->start;
    size_t longest = 0;
    for (size_t s = 0; s < a->S; s++) longest = max_size(longest, start[s + 1] - start[s]);
    return (longest + block_rows(a) - 1) / block_rows(a);
}

static size_t key_parts(const Attention *a) { return min_size(KEY_PARTS, most_blocks(a)); }

// to (rows, width) = from (rows, ...), whose rows start `stride` apart; rows of `to` are `to_stride` apart.
static void copy_rows(float *to, size_t to_stride, const float *from, size_t stride,
                      size_t rows, size_t width) {
    for (size_t r = 0; r < rows; r++) memcpy(to + r * to_stride, from + r * stride, width * sizeof(float));
}

// Pass 1, which both directions need: the block from row r0 on, with its q, and scores = q k^T in p's place.
static Block block_scores(const Attention *a, const float *q, const float *k,
                          size_t s, size_t kv, size_t r0) {
    size_t H = a->H, KV = a->KV, D = a->D, G = H / KV, most = max_size(QUERIES, G);
    const uint32_t *position = a->query->position + r0;
    size_t rows = min_size(block_rows(a), a->query->start[s + 1] - r0), keys = position[rows - 1] + 1;
    float *p = a->blocks + (size_t)omp_get_thread_num() * block_floats(G, a->T, D);
    float *dp = p + most * whole_vectors(a->T), *rest = dp + most * whole_vectors(a->T);
    Block b = { rows, rows * G, keys, whole_vectors(keys), r0 * H + kv * G, (a->key_start[s] * KV + kv) * D,
                p, dp, rest, rest + most * D, rest + 2 * most * D, rest + 3 * most * D };
    copy_rows(b.q, G * D, q + b.at * D, H * D, rows, G * D);
    matmul(p, b.wide, view(b.q, D), turned(k + b.kv_at, KV * D), b.n, keys, D, 0);
    for (size_t i = 0; i < b.n; i++)
        for (size_t j = position[i / G] + 1; j < b.wide; j++) p[i * b.wide + j] = -INFINITY;
    return b;
}

static void attention_forward(float *out, float *lse, const float *q, const float *k, const float *v,
                              const Attention *a) {
    size_t H = a->H, KV = a->KV, D = a->D, G = H / KV, step = block_rows(a), blocks = most_blocks(a);
    const uint32_t *start = a->query->start;
    float scale = 1.0f / sqrtf((float)D);
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (size_t s = 0; s < a->S; s++)
        for (size_t kv = 0; kv < KV; kv++)
            for (size_t block = 0; block < blocks; block++) {
                size_t r0 = start[s] + (blocks - 1 - block) * step;     // the last first: it sees most keys
                if (r0 >= start[s + 1]) continue;
                const Block b = block_scores(a, q, k, s, kv, r0);
                // pass 2: p = softmax(scale * scores) over the keys up to the row's own
                for (size_t i = 0; i < b.n; i++) {
                    float *p_i = b.p + i * b.wide, highest = maximum(p_i, b.wide), sum = 0;
                    #pragma omp simd reduction(+:sum)
                    for (size_t j = 0; j < b.wide; j++) {
                        p_i[j] = exponential(scale * (p_i[j] - highest));
                        sum += p_i[j];
                    }
                    float normalise = 1.0f / sum;
                    for (size_t j = 0; j < b.wide; j++) p_i[j] *= normalise;
                    lse[b.at + i / G * H + i % G] = scale * highest + logf(sum);
                }
                // pass 3: out = p v
                matmul(b.out, D, view(b.p, b.wide), view(v + b.kv_at, KV * D), b.n, D, b.keys, 0);
                copy_rows(out + b.at * D, H * D, b.out, G * D, b.rows, G * D);
            }
}

// In reverse; p is computed again from q, k and lse. dq is written; dk and dv, (parts, K, KV, D), which heads
// share, accumulate: their sums over the parts are the gradients.
static void attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out,
                               const float *lse, const float *q, const float *k, const float *v,
                               const Attention *a) {
    size_t H = a->H, KV = a->KV, D = a->D, G = H / KV, step = block_rows(a), parts = key_parts(a);
    const uint32_t *start = a->query->start;
    float scale = 1.0f / sqrtf((float)D);
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (size_t s = 0; s < a->S; s++)
        for (size_t kv = 0; kv < KV; kv++)
            for (size_t part = 0; part < parts; part++)
            for (size_t r0 = start[s] + part * step; r0 < start[s + 1]; r0 += parts * step) {
                const Block b = block_scores(a, q, k, s, kv, r0);
                const size_t kv_at = part * a->K * KV * D + b.kv_at;
                copy_rows(b.out, G * D, out + b.at * D, H * D, b.rows, G * D);
                copy_rows(b.dout, G * D, dout + b.at * D, H * D, b.rows, G * D);
                // p = exp(scale * scores - lse)
                for (size_t i = 0; i < b.n; i++) {
                    float *p_i = b.p + i * b.wide, lse_i = lse[b.at + i / G * H + i % G];
                    #pragma omp simd
                    for (size_t j = 0; j < b.wide; j++) p_i[j] = exponential(scale * p_i[j] - lse_i);
                }
                // pass 3 was out = p v:                     dv += p^T dout          dp = dout v^T
                matmul(dv + kv_at, KV * D, turned(b.p, b.wide), view(b.dout, D), b.keys, D, b.n, 1);
                matmul(b.dp, b.wide, view(b.dout, D), turned(v + b.kv_at, KV * D), b.n, b.keys, D, 0);
                // pass 2 was p = softmax(scale * scores):   dscores = scale * p (dp - sum_j p_j dp_j)
                // where sum_j p_j dp_j = dout . out, because out = sum_j p_j v_j and dp_j = dout . v_j
                float *dscores = b.dp;                                  // in its place
                for (size_t i = 0; i < b.n; i++) {
                    const float *p_i = b.p + i * b.wide, *out_i = b.out + i * D, *dout_i = b.dout + i * D;
                    float *dp_i = b.dp + i * b.wide, mean = 0;
                    #pragma omp simd reduction(+:mean)
                    for (size_t d = 0; d < D; d++) mean += dout_i[d] * out_i[d];
                    for (size_t j = 0; j < b.wide; j++) dp_i[j] = scale * p_i[j] * (dp_i[j] - mean);
                }
                // pass 1 was scores = q k^T:                dq = dscores k          dk += dscores^T q
                matmul(b.dq, D, view(dscores, b.wide), view(k + b.kv_at, KV * D), b.n, D, b.keys, 0);
                matmul(dk + kv_at, KV * D, turned(dscores, b.wide), view(b.q, D), b.keys, D, b.n, 1);
                copy_rows(dq + b.at * D, H * D, b.dq, G * D, b.rows, G * D);
            }
}

// A thread's share of n elements, in whole vectors: a loop's scalar rest may fuse its products differently,
// and which elements are that rest must not depend on the number of threads. (Where there is one product an
// element, as in rigsa_weight, there is one way.)
static size_t share_of(size_t n) { return round_up(n / (size_t)omp_get_max_threads() + 1, 64); }

// h = silu(gate) * up, all (n), with silu(g) = g sigmoid(g).
static void swiglu_forward(float *h, const float *gate, const float *up, size_t n) {
    #pragma omp parallel for simd schedule(static, share_of(n))
    for (size_t i = 0; i < n; i++) h[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

// dup = dh silu(gate)          dgate = dh up silu'(gate), silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
static void swiglu_backward(float *dgate, float *dup, const float *dh, const float *gate, const float *up,
                            size_t n) {
    #pragma omp parallel for simd schedule(static, share_of(n))
    for (size_t i = 0; i < n; i++) {
        float g = gate[i], sigmoid = 1.0f / (1.0f + exponential(-g));
        dup[i] = dh[i] * g * sigmoid;
        dgate[i] = dh[i] * up[i] * sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
}

// For each row of logits (M, V): logp, of its target, and best, its most likely token (the first on ties).
static void crossentropy_forward(float *logp, uint32_t *best, const float *logits, const uint32_t *target,
                                 size_t M, size_t V) {
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

// The loss is -weight * sum_i logp_i:     dlogits_j = weight (softmax_j - [j is the target]), written over
// the logits. softmax_j = exp(logits_j - logit of the target + logp).
static void crossentropy_backward(float *logits, const float *logp, const uint32_t *target, float weight,
                                  size_t M, size_t V) {
    #pragma omp parallel for
    for (size_t i = 0; i < M; i++) {
        float *row = logits + i * V, shift = row[target[i]] - logp[i];
        #pragma omp simd
        for (size_t j = 0; j < V; j++) row[j] = weight * exponential(row[j] - shift);
        row[target[i]] -= weight;
    }
}

// -----------------------------------------------------------------------------------------------------------
// 4. Transformer
//
// SmolLM2 is a Llama. Tokens become rows of the embedding, L layers add to them, the final norm and the head
// make logits of them. A layer, with Wq to Wd the seven matrices that RIGSA adapts:
//
//     x  --+--> rmsnorm --> Wq, Wk, Wv --> rope --> attention --> Wo --(+)--> x2      x2 = x + attention
//          '------------------------------------------------------------'
//     x2 --+--> rmsnorm --> Wg, Wu --> silu(gate) up --> Wd -----------(+)--> x       x = x2 + feed-forward
//          '------------------------------------------------------------'
//
// Backward walks through the same picture from right to left. At a (+) the gradient goes both ways unchanged;
// where a line forks, two gradients meet and are added: dx is that of the line below, dxn of the one above.

// y (N, O) = x (N, I) W^T, or += with `add`.
static void linear_forward(Model *model, float *y, Tensor *t, const float *x, size_t N, int add) {
    const float *w = model->adapter.weight(model, t);
    size_t O = t->rows, I = t->cols;
    matmul(y, O, view(x, I), turned(w, I), N, O, I, add);                               // y = x W^T
}

// dx (N, I) = dy (N, O) W, or += with `add`; the adapter makes its gradients.
static void linear_backward(Model *model, float *dx, Tensor *t, const float *x, const float *dy,
                            size_t N, int add) {
    const float *w = model->adapter.weight(model, t);
    size_t O = t->rows, I = t->cols;
    matmul(dx, I, view(dy, O), view(w, I), N, I, O, add);                               // dx = dy W
    model->adapter.gradient(model, t, x, dy, N);
}

// The chosen rows of x (N, C), next to each other in picked; x itself when all are chosen.
static const float *pick(float *picked, const float *x, const Rows *rows, size_t C) {
    if (!rows->row) return x;
    gather_forward(picked, x, rows->row, rows->n, C);
    return picked;
}

// Whether attention reads copies of keys: where sequences share rows, or have keys of earlier batches.
static int keys_are_copied(const Batch *batch) { return batch->key_place || batch->K != batch->all.n; }

// The batch's keys, or values, x (N, n): where they are, or copied to a stretch per sequence, copies (K, n).
static const float *stretches(float *copies, const float *x, const Batch *batch, size_t n) {
    if (!keys_are_copied(batch)) return x;
    if (!batch->key_place) gather_forward(copies, x, batch->key_row, batch->K, n);
    else for (size_t i = 0; i < batch->K; i++)
        memcpy(copies + batch->key_place[i] * n, x + batch->key_row[i] * n, n * sizeof(float));
    return copies;
}

// The rows that a layer's queries, attention output and feed-forward are computed for.
static const Rows *query_rows(const Model *model, const Batch *batch, size_t l) {
    return l + 1 == model->config.L ? &batch->answer : &batch->all;
}

static Attention layer_attention(const Model *model, const Batch *batch, size_t l) {
    const Config *c = &model->config;
    return (Attention){ query_rows(model, batch, l), batch->key_start, model->acts.blocks,
                        batch->S, batch->K, c->H, c->KV, c->D, model->acts.T };
}

// Computes all of layer l that its backward pass reads, from its input layer->x.
static void layer_forward(Model *model, const Batch *batch, size_t l) {
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    Layer *layer = &acts->layer[l];
    Tensor *norm1 = layer_tensor(model, l, ATTN_NORM), *norm2 = layer_tensor(model, l, FFN_NORM);
    const Rows *rows = query_rows(model, batch, l);
    const Attention attention = layer_attention(model, batch, l);
    size_t N = batch->all.n, R = rows->n, C = c->C, H = c->H, KV = c->KV, D = c->D;
    float *keys = acts->keys + l * acts->cache_stride, *values = acts->values + l * acts->cache_stride;
    // xn = rmsnorm(x), q = xn Wq^T, k = xn Wk^T, v = xn Wv^T
    rmsnorm_forward(acts->xn, acts->rstd, layer->x, norm1->value, c->eps, N, C);
    linear_forward(model, layer->q, layer_tensor(model, l, WQ), pick(acts->xm, acts->xn, rows, C), R, 0);
    linear_forward(model, layer->k, layer_tensor(model, l, WK), acts->xn, N, 0);
    linear_forward(model, layer->v, layer_tensor(model, l, WV), acts->xn, N, 0);
    rope(layer->q, acts->cosine, acts->sine, rows->position, 1, R, H, D);
    rope(layer->k, acts->cosine, acts->sine, batch->all.position, 1, N, KV, D);
    const float *k = stretches(keys, layer->k, batch, KV * D);
    const float *v = stretches(values, layer->v, batch, KV * D);
    attention_forward(layer->att, layer->lse, layer->q, k, v, &attention);
    // x2 = x + att Wo^T
    memcpy(layer->x2, pick(acts->xm, layer->x, rows, C), R * C * sizeof(float));
    linear_forward(model, layer->x2, layer_tensor(model, l, WO), layer->att, R, 1);
    // xn = rmsnorm(x2), gate = xn Wg^T, up = xn Wu^T
    rmsnorm_forward(acts->xn, acts->rstd, layer->x2, norm2->value, c->eps, R, C);
    linear_forward(model, layer->gate, layer_tensor(model, l, WGATE), acts->xn, R, 0);
    linear_forward(model, layer->up, layer_tensor(model, l, WUP), acts->xn, R, 0);
}

// From the tokens to the residual stream before the final norm, acts.layer[L].x (M, C).
static void model_forward(Model *model, const Batch *batch) {
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    assert(batch->all.n <= acts->N && batch->answer.n <= acts->M);
    gather_forward(acts->layer[0].x, model->tensors[0].value, batch->token, batch->all.n, c->C);
    for (size_t l = 0; l < c->L; l++) {
        Layer *layer = &acts->layer[l];
        float *next = acts->layer[l + 1].x;             // may be layer->x: after layer_copy nobody reads that
        size_t R = query_rows(model, batch, l)->n;
        layer_forward(model, batch, l);
        layer_copy(acts, l, 0);
        // next x = x2 + h Wd^T, h = silu(gate) up
        swiglu_forward(acts->h, layer->gate, layer->up, R * c->F);
        memcpy(next, layer->x2, R * c->C * sizeof(float));
        linear_forward(model, next, layer_tensor(model, l, WDOWN), acts->h, R, 1);
    }
}

// Final norm, logits and loss, HEAD_ROWS answer rows at a time: with a vocabulary of 49,152 the logits of
// long answers would be larger than everything else. Fills acts.logp and acts.best and returns -sum(logp).
// The loss counts `weight` times that, and unless that is 0 its gradient goes straight back through the head
// and the final norm, into acts.dx (M, C).
enum { HEAD_ROWS = 512 };

static double head_forward_backward(Model *model, const Batch *batch, float weight) {
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    Tensor *norm = final_norm(model), *head = head_tensor(model);
    size_t M = batch->answer.n, C = c->C, V = c->V;
    const float *x = acts->layer[c->L].x;
    rmsnorm_forward(acts->xf, acts->rstd, x, norm->value, c->eps, M, C);
    for (size_t i = 0; i < M; i += HEAD_ROWS) {
        size_t rows = min_size(HEAD_ROWS, M - i);
        float *xf = acts->xf + i * C, *dlogits = acts->logits;          // in the logits' place
        matmul(acts->logits, V, view(xf, C), turned(head->value, C), rows, V, C, 0);    // logits = xf E^T
        crossentropy_forward(acts->logp + i, acts->best + i, acts->logits, batch->target + i, rows, V);
        if (weight == 0) continue;
        crossentropy_backward(acts->logits, acts->logp + i, batch->target + i, weight, rows, V);
        matmul(acts->dxf + i * C, C, view(dlogits, V), view(head->value, C), rows, C, V, 0);
        if (head->grad) matmul(head->grad, C, turned(dlogits, V), view(xf, C), V, C, rows, 1);
    }
    if (weight > 0) {
        memset(acts->dx, 0, M * C * sizeof(float));
        rmsnorm_backward(acts->dx, norm->grad, acts->dxf, x, norm->value, acts->rstd, M, C);
    }
    double loss = 0;
    for (size_t i = 0; i < M; i++) loss -= acts->logp[i];
    return loss;
}

// Attention's part of a layer's backward pass, from acts.datt to dq, dk and dv as they were before rope.
static void layer_attention_backward(Model *model, const Batch *batch, size_t l) {
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    Layer *layer = &acts->layer[l];
    const Rows *rows = query_rows(model, batch, l);
    const Attention attention = layer_attention(model, batch, l);
    size_t N = batch->all.n, K = batch->K, n = (size_t)c->KV * c->D, parts = key_parts(&attention);
    int copied = keys_are_copied(batch) || parts > 1;
    float *dk = copied ? acts->dkeys : acts->dk, *dv = copied ? acts->dvalues : acts->dv;
    memset(dk, 0, parts * K * n * sizeof(float));
    memset(dv, 0, parts * K * n * sizeof(float));
    attention_backward(acts->dq, dk, dv, acts->datt, layer->att, layer->lse, layer->q,
                       stretches(acts->keys, layer->k, batch, n), stretches(acts->values, layer->v, batch, n),
                       &attention);
    if (copied) {                                           // a row's gradient is the sum of its copies'
        memset(acts->dk, 0, N * n * sizeof(float));
        memset(acts->dv, 0, N * n * sizeof(float));
        for (size_t part = 0; part < parts; part++) {
            gather_backward(acts->dk, dk + part * K * n, batch->key_row, K, n);
            gather_backward(acts->dv, dv + part * K * n, batch->key_row, K, n);
        }
    }
    rope(acts->dq, acts->cosine, acts->sine, rows->position, -1, rows->n, c->H, c->D);
    rope(acts->dk, acts->cosine, acts->sine, batch->all.position, -1, N, c->KV, c->D);
}

// The mirror of model_forward: layer by layer dx (R, C), of its output, becomes the gradient of its input.
static void model_backward(Model *model, const Batch *batch) {
    const Config *c = &model->config;
    Activations *acts = &model->acts;
    size_t N = batch->all.n, C = c->C, F = c->F;
    float *dx = acts->dx;
    for (size_t l = c->L; l-- > 0; ) {
        Layer *layer = &acts->layer[l];
        const Rows *rows = query_rows(model, batch, l);
        size_t R = rows->n;
        Tensor *norm1 = layer_tensor(model, l, ATTN_NORM), *norm2 = layer_tensor(model, l, FFN_NORM);
        layer_copy(acts, l, 1);
        if (acts->recompute) layer_forward(model, batch, l);
        // out = x2 + h Wd^T, h = silu(gate) up
        swiglu_forward(acts->h, layer->gate, layer->up, R * F);
        linear_backward(model, acts->dh, layer_tensor(model, l, WDOWN), acts->h, dx, R, 0);
        swiglu_backward(acts->dgate, acts->dup, acts->dh, layer->gate, layer->up, R * F);
        // gate = xn Wg^T, up = xn Wu^T, xn = rmsnorm(x2)
        rmsnorm_forward(acts->xn, acts->rstd, layer->x2, norm2->value, c->eps, R, C);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WGATE), acts->xn, acts->dgate, R, 0);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WUP), acts->xn, acts->dup, R, 1);
        // from here on dx is the gradient of x2
        rmsnorm_backward(dx, norm2->grad, acts->dxn, layer->x2, norm2->value, acts->rstd, R, C);
        // x2 = x + att Wo^T
        linear_backward(model, acts->datt, layer_tensor(model, l, WO), layer->att, dx, R, 0);
        layer_attention_backward(model, batch, l);
        // q = xn Wq^T, k = xn Wk^T, v = xn Wv^T, xn = rmsnorm(x)
        rmsnorm_forward(acts->xn, acts->rstd, layer->x, norm1->value, c->eps, N, C);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WK), acts->xn, acts->dk, N, 0);
        linear_backward(model, acts->dxn, layer_tensor(model, l, WV), acts->xn, acts->dv, N, 1);
        if (rows->row) {                                // answer rows' gradients go back among all rows'
            const float *xm = pick(acts->xm, acts->xn, rows, C);
            linear_backward(model, acts->dxm, layer_tensor(model, l, WQ), xm, acts->dq, R, 0);
            gather_backward(acts->dxn, acts->dxm, rows->row, R, C);
            memcpy(acts->dxm, dx, R * C * sizeof(float));
            memset(dx, 0, N * C * sizeof(float));
            gather_backward(dx, acts->dxm, rows->row, R, C);
        } else linear_backward(model, acts->dxn, layer_tensor(model, l, WQ), acts->xn, acts->dq, N, 1);
        rmsnorm_backward(dx, norm1->grad, acts->dxn, layer->x, norm1->value, acts->rstd, N, C);
    }
    if (model->tensors[0].grad) gather_backward(model->tensors[0].grad, dx, batch->token, N, C);
}

// -----------------------------------------------------------------------------------------------------------
// 5. AdamW
//
//     m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
//     w = w (1 - lr decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
//
// Decay is decoupled from the gradient (Loshchilov & Hutter 2019). An entry that a mask has removed is
// neither stepped nor decayed, because it is not there. `clip` scales the gradient.

// With bf16 a moment is stored in eight bits: what changes it by less than a 256th is lost. An update moves m
// by a tenth and v by a twentieth of the way to the new gradient, so m ends within 4 % and v within 8 % of
// where it should be, and a step uses both unrounded. With a b2 of .999 v could be off by all of its value.
static size_t moment_size(void) { return precision == BF16 ? sizeof(uint16_t) : sizeof(float); }

static const float BETA1 = 0.9f, BETA2 = 0.95f, ADAM_EPS = 1e-8f;
static const double CLIP = 1;

static void adamw(float *w, float *m, float *v, const float *dw, int narrow_dw, float lr, float decay,
                  float clip, size_t t, size_t n) {
    enum { BLOCK = 1024 };                                  // widened where they are narrow
    const float step = (float)(lr / (1 - pow(BETA1, (double)t)));
    const float root = (float)(1 / sqrt(1 - pow(BETA2, (double)t))), shrink = 1.0f - lr * decay;
    const int narrow = precision == BF16;
    #pragma omp parallel for
    for (size_t at = 0; at < n; at += BLOCK) {
        float wide[3][BLOCK], *m_b = narrow ? wide[0] : m + at, *v_b = narrow ? wide[1] : v + at;
        const float *dw_b = narrow_dw ? wide[2] : dw + at;
        float *w_b = w + at;
        size_t size = min_size(BLOCK, n - at);
        for (size_t i = 0; narrow_dw && i < size; i++) wide[2][i] = stored(dw, at + i, 1);
        for (size_t i = 0; narrow && i < size; i++)
            m_b[i] = stored(m, at + i, 1), v_b[i] = stored(v, at + i, 1);
        #pragma omp simd
        for (size_t i = 0; i < size; i++) {
            float g = clip * dw_b[i];
            m_b[i] = BETA1 * m_b[i] + (1 - BETA1) * g;
            v_b[i] = BETA2 * v_b[i] + (1 - BETA2) * g * g;
            w_b[i] = w_b[i] * shrink - step * m_b[i] / (sqrtf(v_b[i]) * root + ADAM_EPS);
        }
        for (size_t i = 0; narrow && i < size; i++)
            store(m, at + i, 1, m_b[i]), store(v, at + i, 1, v_b[i]);
    }
}

static inline double sum_squares(const float *x, int narrow, size_t first, size_t end) {
    double sum = 0;
    #pragma omp simd reduction(+:sum)
    for (size_t k = first; k < end; k++) sum += (double)stored(x, k, narrow) * stored(x, k, narrow);
    return sum;
}

// The norm of all gradients together.
static double gradient_norm(const Model *model) {
    double squares = 0, part[PARTS];
    for (const Tensor *t = model->tensors; t < model->tensors + model->all_tensors; t++) {
        if (!t->grad) continue;
        #pragma omp parallel for
        for (size_t p = 0; p < PARTS; p++) {
            size_t first = t->n * p / PARTS, end = t->n * (p + 1) / PARTS;
            part[p] = model->narrow ? sum_squares(t->grad, 1, first, end)
                                    : sum_squares(t->grad, 0, first, end);
        }
        squares += sum_of_parts(part);
    }
    return sqrt(squares);
}

// The step-th update (from 1) of a pass; `factor` of the schedule scales all learning rates. A gradient whose
// norm exceeds CLIP is scaled down to it: one wild batch must not undo what others taught. Returns 0, and
// changes nothing, if it is not finite.
static int model_update(Model *model, size_t step, float factor) {
    double norm = gradient_norm(model);
    if (!isfinite(norm)) return 0;
    float clip = norm > CLIP ? (float)(CLIP / norm) : 1;
    for (Tensor *t = model->tensors; t < model->tensors + model->all_tensors; t++)
        if (t->grad)
            adamw(t->value, t->m, t->v, t->grad, model->narrow, t->lr * factor, t->decay, clip, step, t->n);
    return 1;
}

static size_t gradient_size(const Model *model) { return model->narrow ? sizeof(uint16_t) : sizeof(float); }
static void model_zero_grad(Model *model) {
    memset(model->grad_arena, 0, model->trained * gradient_size(model));
}

// The learning rate's factor in update t (from 1) of `updates`: over a share `warmup` a line up, over the
// last `cooldown` one down. A share of 0 is no bound: the quotient is infinite.
static float schedule(size_t t, size_t updates, double warmup, double cooldown) {
    double up = warmup * (double)updates, down = cooldown * (double)updates, left = (double)(updates - t) + 1;
    return (float)fmin(1, fmin((double)t / up, left / down));
}

// -----------------------------------------------------------------------------------------------------------
// 6. Training
//
// In an update some examples become a batch, forward gives their loss, backward its gradient, and AdamW takes
// a step. A pass is updates over the examples in random order. RIGSA is some passes, the rounds, which end
// with pruning and rewinding, and one without, the ticket's. Only answers count: prompts are given.

// Examples, or an evaluation set (doc/model.md), all of it in memory.
typedef struct {
    const char *path;
    uint64_t hash;                      // of the file
    uint32_t V;
    size_t examples, tokens, longest, longest_answer;
    uint32_t *token;                    // (tokens)
    uint32_t *length, *answer;          // (examples) its tokens, and the first one of its answer
    size_t *offset;                     // (examples) of its first token
    uint32_t *glyphs;                   // (glyph_count, 2) token and character, to draw an example as text
    size_t glyph_count;
    char column[128];                   // evaluations: its name in every table; empty for training examples
    enum { EXACT, ACC, ACC_NORM, LOSS, NUMBER } metric;                 // NUMBER: dev/evaluate.c
    size_t questions;                   // multiple choice: consecutive examples are the choices of a question
    uint32_t *choices, *gold;           // (questions)
    uint32_t *chars;                    // (examples) characters of the choice
} Data;

static const uint32_t *tokens_of(const Data *data, size_t e) { return data->token + data->offset[e]; }

// How many tokens examples a and b begin with together.
static size_t common_prefix(const Data *data, size_t a, size_t b) {
    size_t t = 0, most = min_size(data->length[a], data->length[b]);
    while (t < most && tokens_of(data, a)[t] == tokens_of(data, b)[t]) t++;
    return t;
}

static int comes_before(const Data *data, size_t a, size_t b) {
    size_t t = common_prefix(data, a, b);
    if (t == data->length[a] || t == data->length[b]) return data->length[a] < data->length[b];
    return tokens_of(data, a)[t] < tokens_of(data, b)[t];
}

static uint32_t batch_row(Batch *batch, uint32_t token, uint32_t position) {
    batch->token[batch->all.n] = token;
    batch->all.position[batch->all.n] = position;
    return (uint32_t)batch->all.n++;
}

// This row, at this position of its sequence, predicts the target.
static void batch_answer(Batch *batch, uint32_t row, uint32_t position, uint32_t target) {
    batch->answer.row[batch->answer.n] = row;
    batch->answer.position[batch->answer.n] = position;
    batch->target[batch->answer.n++] = target;
}

// Lays n examples out as a forest. (`example` may be batch->example.)
static void batch_lay(Batch *batch, const Data *data, const uint32_t *example, size_t n) {
    batch->all.n = batch->answer.n = batch->K = 0;
    for (size_t i = 0; i < n; i++) {                        // insertion sort
        size_t j = i;
        uint32_t e = example[i];
        for (; j > 0 && comes_before(data, e, batch->example[j - 1]); j--)
            batch->example[j] = batch->example[j - 1];
        batch->example[j] = e;
    }
    for (batch->S = 0; batch->S < n; batch->S++) {
        const size_t s = batch->S, e = batch->example[s];
        const size_t shared = s ? common_prefix(data, e, batch->example[s - 1]) : 0;
        const uint32_t *before = s ? batch->key_row + batch->key_start[s - 1] : NULL;
        uint32_t *row = batch->key_row + batch->K;          // of this sequence's tokens
        batch->all.start[s] = (uint32_t)batch->all.n;
        batch->answer.start[s] = (uint32_t)batch->answer.n;
        batch->key_start[s] = (uint32_t)batch->K;
        for (uint32_t t = 0; t < data->length[e]; t++) {
            uint32_t token = tokens_of(data, e)[t];
            if (t >= data->answer[e]) batch_answer(batch, row[t - 1], t - 1, token);
            row[t] = t < shared ? before[t] : batch_row(batch, token, t);
        }
        batch->K += data->length[e];
    }
    batch->all.start[n] = (uint32_t)batch->all.n;
    batch->answer.start[n] = (uint32_t)batch->answer.n;
}

// What the user may set: section 12 has a line on each.
enum { MAX_EVALS = 128 };

typedef struct {
    char *base, *data, *evals[MAX_EVALS + 1], *out;
    size_t examples, ticket_examples, rounds, batch, micro, seed;
    double lr, alpha_lr, ticket_rate, sigma, weight_decay, keep, warmup, cooldown, save_every;
    int survivors, threshold, recompute, resume, overwrite;
} Options;

static Options opt;

// A share of right answers, or with the metric `loss` nats per answer token, and its standard error.
typedef struct { double value, error; } Score;

// What the model makes of one example.
typedef struct { double logp; int exact; uint32_t said; } Verdict;     // said: its first answer token

// One row of the paper's table: of the base, or of a pass. NAN: there is no such number.
typedef struct {
    double density, kept, flipped;      // of all entries those trained; of these, what a round's pruning did
    double seconds;                     // since the start
} Row;

typedef struct {
    Model model;
    Data data, eval[MAX_EVALS];
    size_t evals, passes;               // the rounds, and the ticket's
    Batch batch;
    Verdict *verdict;                   // (examples of the largest evaluation set)
    Row *row;                           // (passes + 1) the base's, then one per pass
    Score *score;                       // (passes + 1, evals)
    Pruned *pruned;                     // (passes, matrices)
    size_t rows;                        // that there are: the next pass
    double *loss;                       // of every update of the run
    size_t updates;                     // that were made, in all passes
    uint64_t warm;                      // updates that dev/baselines.c made before a pass
    uint32_t *order;                    // (examples of the longest pass, and an epoch more) of a pass
    uint64_t hash[2 + MAX_EVALS];       // of the base's weights, the data, the evaluation sets
    char *settings;                     // one `name value` a line
    size_t held;                        // floats that the data take, or other files
} Run;

// A method says what a run trains, and what becomes of it. Here is RIGSA's; dev/baselines.c has others.
typedef struct {
    const char *name;                                   // its last pass has it in every table
    void (*prepare)(Run *run);                          // before memory is planned: passes, rows of the table
    void (*start)(Run *run);                            // the base is read: what is trained, at its start
    void (*begin_pass)(Run *run, size_t pass);          // or NULL
    void (*end_pass)(Run *run, size_t pass, Row *row);  // or NULL
    void (*finish)(Run *run);                           // writes what was trained
    int trains_base;                                    // the base's weights themselves
} Method;

static Method method;

// What training and scoring use of Part II.
static double batch_gradient(Run *run, const uint32_t *example, size_t n);  // loss_and_gradient, of all ranks
static void after_update(Run *run, size_t pass, size_t t, size_t tokens);   // progress, saving, stopping
static void after_scores(Run *run, const Data *data, size_t done, size_t tokens);
static Row *add_row(Run *run);                          // scores the model as it is
static void print_row(const Run *run, const Row *row);
static int save(Run *run);
static void adapter_alloc(Model *model);                // a dense adapter at its initial values
static void rigsa_finish(Run *run);                     // writes the ticket
static const char *label(const Run *run, size_t pass);  // "base", "1", "2", ..., "ticket"

static size_t pass_examples(const Run *run, size_t pass) {
    return pass == run->passes ? opt.ticket_examples : opt.examples;
}

static size_t pass_updates(const Run *run, size_t pass) {
    return (pass_examples(run, pass) + opt.batch - 1) / opt.batch;
}

// The updates of all passes before this one.
static size_t updates_before(const Run *run, size_t pass) {
    size_t n = 0;
    for (size_t p = 1; p < pass; p++) n += pass_updates(run, p);
    return n;
}

// order = the examples of a pass: fresh permutations of the data (Fisher and Yates) until there are `count`.
static void visit_order(uint32_t *order, const Data *data, size_t count, uint64_t seed, size_t pass) {
    const size_t n = data->examples;
    for (size_t at = 0, epoch = 0; at < count; at += n, order += n, epoch++) {
        uint64_t key = random_key(seed, STREAM_ORDER, pass, epoch);
        for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
        for (size_t i = n; i > 1; i--) {
            size_t j = (mix(key + i * GOLDEN) >> 32) * i >> 32;         // 0..i-1
            uint32_t swap = order[i - 1];
            order[i - 1] = order[j];
            order[j] = swap;
        }
    }
}

static size_t answer_tokens(const Data *data, const uint32_t *example, size_t count) {
    size_t n = 0;
    for (size_t i = 0; i < count; i++) n += data->length[example[i]] - data->answer[example[i]];
    return n;
}

// A micro-batch is one forward pass: the gradients, from zero, of the loss of its n examples, counted once
// for each of the batch's answer tokens. Returns the sum of the loss.
static double micro_gradient(Run *run, const uint32_t *example, size_t n, size_t answers) {
    Model *model = &run->model;
    batch_lay(&run->batch, &run->data, example, n);
    model_zero_grad(model);
    model_forward(model, &run->batch);
    double loss = head_forward_backward(model, &run->batch, 1.0f / (float)answers);
    model_backward(model, &run->batch);
    return loss;
}

static size_t micro_batch(size_t count) { return opt.micro ? min_size(opt.micro, count) : count; }

// Gradients of the mean loss, which is returned, over the answer tokens of `count` examples: the sum over
// micro-batches, in their order.
static double loss_and_gradient(Run *run, const uint32_t *example, size_t count) {
    Model *model = &run->model;
    size_t micro = micro_batch(count), n = model->trained;
    size_t answers = answer_tokens(&run->data, example, count);
    double loss = 0;
    if (micro == count) return micro_gradient(run, example, count, answers) / (double)answers;
    if (!model->sum_arena) model->sum_arena = floats(n);
    memset(model->sum_arena, 0, n * sizeof(float));
    for (size_t i = 0; i < count; i += micro) {
        loss += micro_gradient(run, example + i, min_size(count - i, micro), answers);
        #pragma omp parallel for simd
        for (size_t k = 0; k < n; k++) model->sum_arena[k] += stored(model->grad_arena, k, model->narrow);
    }
    #pragma omp parallel for
    for (size_t k = 0; k < n; k++) store(model->grad_arena, k, model->narrow, model->sum_arena[k]);
    return loss / (double)answers;
}

// Update t of a pass, on `count` examples. Returns the loss. The ticket's few entries bear larger steps than
// the dense first round, and then forget less for what they learn (doc/real.md): its pass has its own rate.
static double update(Run *run, size_t pass, size_t t, const uint32_t *example, size_t count) {
    float factor = schedule(t, pass_updates(run, pass), opt.warmup, opt.cooldown);
    if (pass == run->passes) factor *= (float)opt.ticket_rate;
    double loss = batch_gradient(run, example, count);
    if (!isfinite(loss) || !model_update(&run->model, t, factor))
        die("%s, update %zu: the %s is not finite. %s. %s/state.bin is as it was saved before",
            label(run, pass), t, isfinite(loss) ? "gradient" : "loss", run->updates
            ? "The steps were too large: start again with a smaller --lr or --alpha-lr"
            : "Nothing is trained yet: the base has weights too large for these examples", opt.out);
    return loss;
}

// One pass, or what is left of it.
static void train_pass(Run *run, size_t pass) {
    const size_t count = pass_examples(run, pass), before = updates_before(run, pass);
    visit_order(run->order, &run->data, count, run->model.init.seed, pass);
    for (size_t at; (at = (run->updates - before) * opt.batch) < count; ) {
        const uint32_t *example = run->order + at;
        size_t n = min_size(opt.batch, count - at), t = run->updates - before + 1, tokens = 0;
        run->loss[run->updates] = update(run, pass, t, example, n);
        run->updates++;
        for (size_t i = 0; i < n; i++) tokens += run->data.length[example[i]];
        after_update(run, pass, t, tokens);
    }
}

// All passes that are left: of RIGSA the rounds, each with its pruning, then the ticket's.
static void train(Run *run) {
    for (size_t pass = run->rows; pass <= run->passes; pass++) {
        if (method.begin_pass) method.begin_pass(run, pass);
        train_pass(run, pass);
        Row *row = add_row(run);
        if (method.end_pass) method.end_pass(run, pass, row);
        print_row(run, row);
        save(run);
    }
}

static void rigsa_prepare(Run *run) { run->passes = opt.rounds + 1; }

// How fast the tensors from `first` up to `end` learn and decay: gates and vectors do not decay.
static void set_rates(Model *model, Tensor *first, Tensor *end) {
    for (Tensor *t = first; t < end; t++) {
        t->lr = (float)(t == gates_tensor(model) ? opt.alpha_lr : opt.lr);
        t->decay = t->rows > 1 ? (float)opt.weight_decay : 0;
    }
}

static void rigsa_start(Run *run) {
    Model *model = &run->model;
    model->init = (Init){ opt.seed, 0, model->init.rest, (float)opt.sigma };
    adapter_alloc(model);
    set_rates(model, delta_tensor(model, 0), gates_tensor(model) + 1);
}

static void rigsa_end_pass(Run *run, size_t pass, Row *row) {
    Pruned *pruned = run->pruned + (pass - 1) * matrices(&run->model);
    if (pass == run->passes) return;
    Pruned all = prune(&run->model, pruned, opt.keep, (Threshold)opt.threshold, (Survivors)opt.survivors);
    row->kept = (double)all.survivors / (double)max_size(all.entries, 1);
    row->flipped = (double)all.flipped / (double)max_size(all.entries, 1);
}

static Method method = { "ticket", rigsa_prepare, rigsa_start, NULL, rigsa_end_pass, rigsa_finish, 0 };

// -----------------------------------------------------------------------------------------------------------
// 7. Scoring
//
// What a model knows is asked in three ways: is each token of the answer the one that it finds most likely
// (exact), which of several answers is likelier than the others (acc, or acc_norm by its characters), and how
// unlikely is the answer (loss)? All need only log-probabilities of given tokens: many examples at once.

// Lays out the examples from `first` on, as many as surely fit into one batch; returns how many. That each
// shares with the one before it in the file is a lower bound of what a forest shares.
static size_t batch_fill(Batch *batch, const Data *data, size_t first, const Activations *acts) {
    size_t n = 0, rows = 0, answers = 0, keys = 0;
    for (size_t e = first; e < data->examples; e++) {
        rows += data->length[e] - (n ? common_prefix(data, e, e - 1) : 0);
        answers += data->length[e] - data->answer[e];
        keys += data->length[e];
        if (rows > acts->N || answers > acts->M || keys > acts->K) break;
        batch->example[n++] = (uint32_t)e;
    }
    batch_lay(batch, data, batch->example, n);
    return n;
}

// Verdicts on the examples from `first` on, as many as fit into one batch; returns how many.
static size_t judge(Model *model, Verdict *verdict, Batch *batch, const Data *data, size_t first) {
    const Activations *acts = &model->acts;
    size_t n = batch_fill(batch, data, first, acts);
    model_forward(model, batch);
    head_forward_backward(model, batch, 0);
    for (size_t s = 0; s < n; s++) {
        size_t e = batch->example[s], i = batch->answer.start[s];
        verdict[e] = (Verdict){ 0, 1, acts->best[i] };
        for (; i < batch->answer.start[s + 1]; i++) {
            if (!isfinite(acts->logp[i]))
                die("%s: example %zu has no finite probability: broken weights", data->column, e);
            verdict[e].logp += acts->logp[i];
            verdict[e].exact &= acts->best[i] == batch->target[i];
        }
    }
    return n;
}

// The loss is a ratio of sums, r = sum_e loss_e / sum_e n_e over m documents with n_e answer tokens. Its
// error is that of the mean of loss_e - r n_e, by the mean of n_e:
//     sqrt(m / (m - 1) sum_e (loss_e - r n_e)^2) / sum_e n_e
static Score score_loss(const Verdict *verdict, const Data *data) {
    double loss = 0, tokens = 0, squares = 0, m = (double)data->examples;
    for (size_t e = 0; e < data->examples; e++) {
        loss -= verdict[e].logp;
        tokens += data->length[e] - data->answer[e];
    }
    for (size_t e = 0; e < data->examples; e++) {
        double off = -verdict[e].logp - loss / tokens * (data->length[e] - data->answer[e]);
        squares += off * off;
    }
    return (Score){ loss / tokens, sqrt(m / fmax(m - 1, 1) * squares) / tokens };
}

// The share of right answers. Its error is a sample's, as in lm-evaluation-harness: with n - 1.
static Score score_verdicts(const Verdict *verdict, const Data *data) {
    size_t right = 0;
    if (data->metric == LOSS) return score_loss(verdict, data);
    if (!data->choices)
        for (size_t e = 0; e < data->examples; e++) right += verdict[e].exact;
    else for (size_t i = 0, e = 0; i < data->questions; e += data->choices[i++]) {
        size_t best = 0;
        double best_score = -INFINITY;
        for (size_t choice = 0; choice < data->choices[i]; choice++) {
            double score = verdict[e + choice].logp;
            if (data->metric == ACC_NORM) score /= data->chars[e + choice];
            if (score > best_score) best_score = score, best = choice;
        }
        right += best == data->gold[i];
    }
    double p = (double)right / (double)data->questions;
    return (Score){ p, sqrt(p * (1 - p) / (double)max_size(data->questions - 1, 1)) };
}

static Score evaluate(Run *run, const Data *data) {
    for (size_t e = 0, n; e < data->examples; e += n) {
        n = judge(&run->model, run->verdict, &run->batch, data, e);
        after_scores(run, data, e + n, run->batch.K);
    }
    return score_verdicts(run->verdict, data);
}

// -----------------------------------------------------------------------------------------------------------
// Part II: the machine, and housekeeping
// -----------------------------------------------------------------------------------------------------------
// 8. Products, and the exponential
//
// The fast matmul computes c in tiles of MR x NR that stay in registers while k runs:
//
//                      NR = NV vectors of b
//                     [ b0 ][ b1 ][ b2 ]
//       MR   a[0] ->  [    ][    ][    ]      one step of k: load NV vectors of b, broadcast MR of a, and
//       rows a[1] ->  [    ][    ][    ]      MR * NV fused multiply-adds, each into its own register
//       of a  ...     [    ][    ][    ]
//
// 32 registers have room for 8 x 3 sums, b and a, 16 for 6 x 2. On NEON, with 8 gcc 12 keeps a sum in memory.
#if defined(__AVX512F__)
enum { MR = 8, NV = 3 };
#elif defined(__aarch64__)
enum { MR = 6, NV = 3 };
#else
enum { MR = 6, NV = 2 };
#endif
// So that k runs over consecutive memory, a and b are first copied ("packed") in the order in which the tiles
// read them. Each thread has its own: a slice of b, KC x NC (3.5 MB), for L3, and a block of a,
// MC x KC, for L2. A block's last store may spill over its end.
enum { NR = NV * LANES, KC = 576, MC = 96, NC = 1536 };
enum { PACKED_A = MC * KC + LANES, PACKED_B = KC * NC };
enum { FEW_ROWS = 3 * MR };             // up to here dev/wide.h may take another way, with other last bits

typedef float vec __attribute__((vector_size(4 * LANES), may_alias));
typedef vec vec_at __attribute__((aligned(4)));                         // one that lies anywhere in memory

static View transposed(View x) { return (View){ x.at, x.col, x.row }; }
static View part_of(View x, size_t i, size_t k) {                       // from element (i, k) on
    return (View){ x.at + i * x.row + k * x.col, x.row, x.col };
}

// to (cols, width) = from (rows, cols), transposed; zero stands where there are no more rows.
static void transpose(float *to, size_t width, View from, size_t rows, size_t cols);

// A kernel is how operands are packed and multiplied. Here is one for every machine; dev/wide.h has others,
// whose 32-bit lanes hold two steps of k in bfloat16.
typedef struct {
    size_t rows;               // of c in a tile
    size_t steps, unit;        // steps of k in a lane; lanes along k come in multiples of `unit`
    // to (lanes, width) = a strip, `width` rows of a or columns of b; `used` of them and K steps exist, and
    // zero stands for the others
    void (*pack)(float *to, View strip, size_t width, size_t used, size_t K, size_t lanes);
    // c (rows, cols) = or += a strip of a, packed or in place, times packed b
    void (*tile)(float *c, size_t ldc, View a, const float *b, size_t lanes,
                 size_t rows, size_t cols, int add);
} Kernel;

static const Kernel *kernel(void);          // for this precision, on this machine

// To bfloat16, ties to even. A NaN stays one: the carry out of its mantissa could make it a zero.
static inline uint32_t round_bf16(float x) {
    union { float f; uint32_t i; } u = { x };
    return (x == x ? u.i + 0x7FFF + (u.i >> 16 & 1) : 0x7FC00000) >> 16;
}

static inline float widen_bf16(uint16_t x) {
    union { uint32_t i; float f; } u = { (uint32_t)x << 16 };
    return u.f;
}

// Operands in bfloat16, where no instruction multiplies those: rounded, and multiplied in fp32.
static void round_operands(float *x, size_t n) {
    if (precision == FP32) return;
    for (size_t i = 0; i < n; i++) x[i] = widen_bf16((uint16_t)round_bf16(x[i]));
}

// Where neighbours lie side by side, steps are copied one after the other.
static void pack(float *to, View strip, size_t width, size_t used, size_t K, size_t lanes) {
    if (strip.row != 1) transpose(to, width, strip, used, K);
    else for (size_t k = 0; k < K; k++) {
        const float *from = strip.at + k * strip.col;
        if (used == MR) memcpy(to + k * width, from, MR * sizeof(float));           // a known size: no call
        else for (size_t j = 0; j < used; j++) to[k * width + j] = from[j];
        for (size_t j = used; j < width; j++) to[k * width + j] = 0;
    }
    round_operands(to, width * lanes);
}

typedef vec MultiplyAdd(vec sum, vec a, vec b);             // sum + a b, lane by lane
static inline vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }
static inline vec broadcast(float x) { return x - (vec){ 0 }; }         // x + 0 would not be x where x is -0

// A tile of nv vectors. At an edge of c, sums go through a copy of it. `madd` is a constant wherever this is
// inlined.
static inline __attribute__((always_inline))
void tile_of(float *c, size_t ldc, View a, const float *b, size_t lanes, size_t rows, size_t cols, int add,
             int nv, MultiplyAdd *madd) {
    vec sum[MR][NV] = { 0 };
    float copy[MR * NR];
    const int edge = rows < MR || cols < (size_t)nv * LANES;
    for (size_t r = 0; r < rows; r++)
        for (int v = 0; v < nv; v++) __builtin_prefetch(c + r * ldc + v * LANES, 1);    // needed at the end
    for (size_t k = 0; k < lanes; k++, a.at += a.col, b += NR) {
        vec b_v[NV];
        #pragma GCC unroll 4
        for (int v = 0; v < nv; v++) b_v[v] = *(const vec_at *)(b + v * LANES);
        #pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
            #pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                sum[r][v] = madd(sum[r][v], broadcast(a.at[(size_t)r * a.row]), b_v[v]);
    }
    float *to = edge ? copy : c;
    const size_t next = edge ? NR : ldc;
    if (edge && add) memset(copy, 0, sizeof copy), copy_rows(copy, NR, c, ldc, rows, cols);
    #pragma GCC unroll 8
    for (size_t r = 0; r < MR; r++)
        #pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            vec_at *at = (vec_at *)(to + r * next + v * LANES);
            *at = add ? (vec)(*at + sum[r][v]) : sum[r][v];
        }
    if (edge) copy_rows(c, ldc, copy, NR, rows, cols);
}

static inline __attribute__((always_inline))
void tile_by_width(float *c, size_t ldc, View a, const float *b, size_t lanes, size_t rows, size_t cols,
                   int add, MultiplyAdd *madd) {
    if (cols <= LANES) tile_of(c, ldc, a, b, lanes, rows, cols, add, 1, madd);
    else if (cols <= 2 * LANES) tile_of(c, ldc, a, b, lanes, rows, cols, add, 2, madd);
    else tile_of(c, ldc, a, b, lanes, rows, cols, add, NV, madd);
}

static void tile(float *c, size_t ldc, View a, const float *b, size_t lanes,
                 size_t rows, size_t cols, int add) {
    tile_by_width(c, ldc, a, b, lanes, rows, cols, add, multiply_add);
}

static const Kernel EVERYWHERE = { MR, 1, 1, pack, tile };

// The sampled product takes SPAN rows at a time: their x^T, (I, SPAN), fits into L2 or nearly.
enum { SPAN = 8 * LANES };
static size_t x_t_floats(size_t I) { return whole_vectors(I) * SPAN; }                  // for one thread

// A thread's packed slices, made when it first needs them: its stack, where such arrays lie, may be small.
static _Thread_local float *packed_a, *packed_b;

#ifdef WIDE
#include WIDE
#else
static void prepare_threads(char **argv) { (void)argv; }
static int choose_threads(double work) { return (void)work, 0; }
static double memory_available(void) { return INFINITY; }
static const Kernel *kernel(void) { return &EVERYWHERE; }
#define matmul_few(...) 0

static void transpose(float *to, size_t width, View from, size_t rows, size_t cols) {
    for (size_t c0 = 0; c0 < cols; c0 += LANES)                         // a cache line of a row at a time
        for (size_t r = 0; r < width; r++)
            for (size_t c = c0; c < min_size(cols, c0 + LANES); c++)
                to[c * width + r] = r < rows ? from.at[r * from.row + c * from.col] : 0;
}

// Each survivor is a dot product of two columns, of dy and of x. Threads share them, each with its own x^T.
static void sampled_product(float *dw, const uint32_t *index, size_t n, const float *dy, const float *x,
                            float *x_t, size_t O, size_t I, size_t N) {
    memset(dw, 0, n * sizeof(float));
    #pragma omp parallel
    {
        size_t id = (size_t)omp_get_thread_num(), threads = (size_t)omp_get_num_threads();
        float *own = x_t + id * x_t_floats(I), dy_o[SPAN];
        for (size_t n0 = 0; n0 < N; n0 += SPAN) {
            size_t rows = min_size(N - n0, SPAN), o_now = O;
            pack(own, view(x + n0 * I, I), SPAN, rows, I, I);
            for (size_t k = n * id / threads; k < n * (id + 1) / threads; k++) {
                size_t o = index[k] / I, i = index[k] % I;
                float sum = 0;
                if (o != o_now) pack(dy_o, view(dy + n0 * O + (o_now = o), O), SPAN, rows, 1, 1);
                #pragma omp simd reduction(+:sum)
                for (size_t r = 0; r < SPAN; r++) sum += dy_o[r] * own[i * SPAN + r];
                dw[k] += sum;
            }
        }
    }
}

static double sampled_below(void) { return 0.25; }
#endif

// The product on one thread. In fp32, rows of a that lie along k are read where they are.
static void matmul_alone(float *c, size_t ldc, View a, View b, size_t M, size_t N, size_t K, int add) {
    if (matmul_few(c, ldc, a, b, M, N, K, add)) return;
    if (!packed_a) packed_a = floats(PACKED_A), packed_b = floats(PACKED_B);
    const Kernel *use = kernel();
    const size_t mr = use->rows, blocks = (M + MC - 1) / MC, mc = round_up((M + blocks - 1) / blocks, mr);
    const size_t KS = KC * use->steps;                                  // steps of k in a slice
    for (size_t j0 = 0; j0 < N; j0 += NC)
        for (size_t k0 = 0; k0 < K; k0 += KS) {
            size_t nc = min_size(NC, N - j0), kc = min_size(KS, K - k0);
            size_t lanes = round_up((kc + use->steps - 1) / use->steps, use->unit);
            for (size_t j = 0; j < nc; j += NR)
                use->pack(packed_b + j * lanes, transposed(part_of(b, k0, j0 + j)), NR, min_size(NR, nc - j),
                          kc, lanes);
            for (size_t i0 = 0; i0 < M; i0 += mc) {
                size_t rows = min_size(mc, M - i0);
                size_t in_place = precision == FP32 && a.col == 1 ? rows / MR * MR : 0;
                for (size_t i = in_place; i < rows; i += mr)
                    use->pack(packed_a + i * lanes, part_of(a, i0 + i, k0), mr, min_size(mr, rows - i),
                              kc, lanes);
                for (size_t j = 0; j < nc; j += NR)
                    for (size_t i = 0; i < rows; i += mr) {
                        View strip = i < in_place ? part_of(a, i0 + i, k0) : turned(packed_a + i * lanes, mr);
                        use->tile(c + (i0 + i) * ldc + j0 + j, ldc, strip, packed_b + j * lanes, lanes,
                                  min_size(mr, rows - i), min_size(NR, nc - j), add || k0);
                    }
            }
        }
}

// Threads share c as a grid of rectangles and work alone, each with its own packed slices: none waits for
// another, and none reads what another has just written. The grid keeps the rectangles' sides, which are what
// is packed twice, short. Each element of c has one order of its sum: the same bits for any number of
// threads. A thread among others (attention's) computes all of c.
static void matmul(float *c, size_t ldc, View a, View b, size_t M, size_t N, size_t K, int add) {
    if (K == 0 && !add)
        for (size_t i = 0; i < M; i++) memset(c + i * ldc, 0, N * sizeof(float));
    if (omp_in_parallel()) {
        matmul_alone(c, ldc, a, b, M, N, K, add);
        return;
    }
    #pragma omp parallel
    {
        // down x across rectangles with the shortest sides. Each keeps more than FEW_ROWS rows, or all: with
        // fewer it would take another way through matmul_alone than the whole does, and get other bits.
        size_t threads = (size_t)omp_get_num_threads(), id = (size_t)omp_get_thread_num(), down = 1;
        for (size_t n = 2; n <= threads && M / n >= FEW_ROWS + MR; n++)
            if (threads % n == 0 && M / n + N / (threads / n) <= M / down + N / (threads / down)) down = n;
        size_t across = threads / down, row = id / across, col = id % across;
        size_t i = round_up(M * row / down, MR), i_end = min_size(M, round_up(M * (row + 1) / down, MR));
        size_t j = round_up(N * col / across, NR), j_end = min_size(N, round_up(N * (col + 1) / across, NR));
        if (i < i_end && j < j_end)
            matmul_alone(c + i * ldc + j, ldc, part_of(a, i, 0), part_of(b, 0, j), i_end - i, j_end - j,
                         K, add);
    }
}

// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2: a polynomial (with the coefficients of Cephes'
// expf) times a power of two. Within 2 ulp of the true value; 0 below -87, infinity above 88.72, and NaN
// stays NaN. Unlike libm's it has neither branch nor call, so loops around it become vector code. Out of its
// range it computes nonsense, and only then chooses.
static inline float exponential(float x) {
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
    // 2^n in two factors: each is a normal number, even where 2^n is not
    low.i = (uint32_t)(half + 127) << 23;
    high.i = (uint32_t)(whole - half + 127) << 23;
    float y = x < -87.0f ? 0.0f : p * low.f * high.f;
    return x > 88.7228f ? INFINITY : y;
}

// LANES running maxima: a single one is a chain that gcc may not reorder.
static float maximum(const float *x, size_t n) {
    float lane[LANES], highest = x[0];
    for (int i = 0; i < LANES; i++) lane[i] = highest;
    for (size_t j = 0; j < n; j += LANES) {
        #pragma omp simd
        for (int i = 0; i < LANES; i++) lane[i] = x[j + i] > lane[i] ? x[j + i] : lane[i];
    }
    for (int i = 0; i < LANES; i++) highest = lane[i] > highest ? lane[i] : highest;
    return highest;
}

// -----------------------------------------------------------------------------------------------------------
// 9. Utilities

// Where several processes work on one run, the ranks of dev/mpi.c, these stand in. Only rank 0 writes files.
typedef struct {
    int rank;
    double (*gradient)(Run *run, const uint32_t *example, size_t count);
    Score (*evaluate)(Run *run, const Data *data);
    void (*compare)(Run *run);                          // are all about to make the same run?
    int (*asked)(int number);                           // the signal that any of them got
    void (*speak)(void);                                // before a line on an error: who says it?
    double memory;                                      // bytes that this one may take
} Ranks;

static Ranks ranks = { .gradient = loss_and_gradient, .evaluate = evaluate };

static double batch_gradient(Run *run, const uint32_t *example, size_t n) {
    return ranks.gradient(run, example, n);
}

// A user's error: one line, whatever a file had us quote: what is wrong, where, and what to run to mend it.
static void die(const char *format, ...) {
    char text[2 * PATH_MAX];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c; c++) if (iscntrl((unsigned char)*c)) *c = '?';
    fflush(stdout);
    if (ranks.speak) ranks.speak();
    fprintf(stderr, "%s" PROGRAM ": %s\n", isatty(2) ? "\r\033[K" : "", text);
    exit(1);
}

// The place of the word in "a|b|c", or -1.
static int choice_place(const char *words, const char *text) {
    for (int i = 0; ; i++, words++) {
        size_t length = strcspn(words, "|");
        if (strlen(text) == length && !strncmp(words, text, length)) return i;
        words += length;
        if (!*words) return -1;
    }
}

// Zeroed memory on a cache line of its own.
static void *allocate(size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes) || bytes > SIZE_MAX - 64)
        die("out of memory: %zu x %zu", count, size);
    bytes = (bytes + 64) / 64 * 64;
    void *p = aligned_alloc(64, bytes);
    if (!p) die("out of memory: %.2f GB more are needed", 1e-9 * (double)bytes);
    return memset(p, 0, bytes);
}

static float *floats(size_t count) { return allocate(count, sizeof(float)); }
static uint32_t *integers(size_t count) { return allocate(count, sizeof(uint32_t)); }

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Bit by bit from the top: magnitudes are in the order of their bits.
static float kth_largest(const float *x, size_t n, size_t k) {
    union { uint32_t bits; float value; } found = { 0 };
    for (uint32_t bit = 1u << 30; bit; bit >>= 1) {
        size_t above = 0;
        found.bits |= bit;
        #pragma omp parallel for simd reduction(+:above)
        for (size_t i = 0; i < n; i++) above += fabsf(x[i]) >= found.value;
        if (above < k) found.bits ^= bit;
    }
    return found.value;
}

// Hash of n bytes: a sum over 64-bit words, each mixed with its position, so the same with any threads.
static uint64_t hash64(const void *data, size_t n) {
    const char *bytes = data;
    size_t words = n / 8, rest = n % 8;
    uint64_t sum = mix(n), last = 0;
    #pragma omp parallel for reduction(+:sum)
    for (size_t i = 0; i < words; i++) {
        uint64_t w;
        memcpy(&w, bytes + 8 * i, 8);
        sum += mix(w + (i + 1) * GOLDEN);
    }
    if (!rest) return sum;
    memcpy(&last, bytes + 8 * words, rest);
    return sum + mix(last + (words + 1) * GOLDEN);
}

// -----------------------------------------------------------------------------------------------------------
// 10. Files
//
// A file is a header and sections, each with a tag, a length and a hash (doc/model.md). Whoever reads one
// trusts nothing in it: what is used has been checked, and what is wrong ends the program with one line that
// says how to mend it. A file that is written is whole, or it is not there.

typedef struct { char magic[8]; uint32_t version; char kind[4]; uint64_t length, sections; } FileHeader;
typedef struct { char tag[16]; uint64_t length, hash; } SectionHeader;
typedef struct { const char *tag; const void *data; size_t length; } Section;       // one to write
typedef struct { const char *path, *kind; int fd; size_t length, sections; SectionHeader *head; } File;

static const char MAGIC[] = "rigsa.c\n";

static size_t padded(size_t length) { return (length + 7) / 8 * 8; }  // the next section starts on 8 bytes

static const char *mend(const char *kind) {
    if (!strcmp(kind, "base")) return "make it again with dev/export_hf.py (dev/nano/base.bin: `make nano`)";
    if (!strcmp(kind, "data")) return "make it again with prepro_mnist.py (files of dev/nano: `make nano`)";
    return strcmp(kind, "stat") ? "train it again" : "start again without --resume";
}

// A file that cannot be used: what is wrong, and how to mend it.
#define refuse(file, wrong, ...) \
    die("%s: " wrong "; %s", (file)->path, ##__VA_ARGS__, mend((file)->kind))

// to (n bytes) = what the file has from byte `at` on. It may change: what is checked and used is this copy.
static void file_read(const File *file, void *to, size_t n, size_t at) {
    ssize_t got = 1;
    for (size_t done = 0; done < n && got > 0; done += (size_t)got)
        got = pread(file->fd, (char *)to + done, n - done, (off_t)(at + done));
    if (got <= 0) die("%s: %s", file->path, got ? strerror(errno) : "was cut off while it was read");
}

// Opens a file of this kind and checks that it is whole: header, length, and that its sections lie within it.
static File file_open(const char *path, const char *kind) {
    struct stat info;
    const int fd = open(path, O_RDONLY | O_NONBLOCK);       // do not wait for a pipe
    File opened = { path, kind, fd, 0, 0, NULL }, *file = &opened;
    if (fd < 0 && errno == ENOENT && *path != '/' && strcmp(kind, "stat"))
        die("%s: %s; start in the project's folder, or name another file (--%s FILE)", path, strerror(errno),
            strcmp(kind, "data") ? strcmp(kind, "tick") ? kind : "ticket" : "data or --eval");
    if (fd < 0 || fstat(fd, &info)) refuse(file, "%s", strerror(errno));
    if (!S_ISREG(info.st_mode)) refuse(file, "not a file");
    FileHeader header;
    size_t at = sizeof header, length = file->length = (size_t)info.st_size;
    if (length < sizeof header) refuse(file, "too short to be a file of rigsa.c");
    file_read(file, &header, sizeof header, 0);
    if (memcmp(header.magic, MAGIC, 8)) refuse(file, "not a file of rigsa.c");
    if (header.version == 0x01000000) refuse(file, "written on a big-endian machine");
    if (header.version != 1)
        die("%s: version %u, this program reads version 1; take a newer one", path, header.version);
    if (memcmp(header.kind, kind, 4)) die("%s: holds `%.4s`, `%s` is needed here", path, header.kind, kind);
    if (header.length != length)
        refuse(file, "%zu bytes where %zu were written", length, (size_t)header.length);
    if (header.sections > length / sizeof *file->head) refuse(file, "a section is cut off");
    file->head = allocate(header.sections, sizeof *file->head);
    for (; file->sections < header.sections; file->sections++) {
        SectionHeader *head = &file->head[file->sections];
        if (length - at < sizeof *head) refuse(file, "a section is cut off");
        file_read(file, head, sizeof *head, at);
        at += sizeof *head;
        if (head->length > length - at || padded(head->length) > length - at)
            refuse(file, "section `%.16s` is cut off", head->tag);
        for (const SectionHeader *other = file->head; other < head; other++)
            if (!strncmp(other->tag, head->tag, sizeof head->tag))
                refuse(file, "has section `%.16s` twice", head->tag);
        at += padded(head->length);
    }
    if (at != length) refuse(file, "%zu bytes after the last section", length - at);
    return opened;
}

static void file_close(File *file) { close(file->fd), free(file->head); }

// A section's header, and in *at where its values lie in the file; NULL if there is no such section.
static const SectionHeader *section_find(const File *file, const char *tag, size_t *at) {
    *at = sizeof(FileHeader);
    for (const SectionHeader *head = file->head; head < file->head + file->sections; head++) {
        *at += sizeof *head;
        if (!strncmp(head->tag, tag, sizeof head->tag)) return head;
        *at += padded(head->length);
    }
    return NULL;
}

// A section that must be there, of so many values of `size` bytes, read to where they go or (NULL) to memory
// of their own, with a zero behind them; its hash is checked.
static void *needed_at(void *to, const File *file, const char *tag, size_t count, size_t size) {
    size_t at;
    const SectionHeader *head = section_find(file, tag, &at);
    if (!head) die("%s: has no section `%s`", file->path, tag);
    const size_t length = head->length;
    if (length % size || length / size != count)
        die("%s: section `%s` has %zu bytes, not %zu x %zu", file->path, tag, length, count, size);
    if (!to) to = allocate(count, size);
    file_read(file, to, length, at);
    if (hash64(to, length) != head->hash) refuse(file, "section `%s` is damaged", tag);
    return to;
}

static void *needed(const File *file, const char *tag, size_t count, size_t size) {
    return needed_at(NULL, file, tag, count, size);
}

// The same of a section that may be missing (NULL), with as many values as it has.
static void *section(const File *file, const char *tag, size_t size, size_t *count) {
    size_t at;
    const SectionHeader *head = section_find(file, tag, &at);
    *count = head ? head->length / size : 0;
    return head ? needed(file, tag, *count, size) : NULL;
}

// The same, of numbers that must be finite.
static void numbers_at(float *to, const File *file, const char *tag, size_t n, size_t size) {
    int bad = 0;
    needed_at(to, file, tag, n, size);
    #pragma omp parallel for reduction(|:bad)
    for (size_t i = 0; i < n; i++) bad |= !isfinite(stored(to, i, size < sizeof(float)));
    if (bad) refuse(file, "section `%s` has a number that is not finite", tag);
}

// Files are written under a temporary name, synced and renamed, and the folder is synced: whatever happens,
// `path` is either the old file or the new one, whole. These return 0 or an errno.
typedef struct { char path[PATH_MAX + 8]; } TemporaryPath;

static TemporaryPath temporary(const char *path) {
    TemporaryPath to;
    snprintf(to.path, sizeof to.path, "%s.tmp", path);
    return to;
}

static FILE *file_begin(const char *path) {
    return fopen(ranks.rank ? "/dev/null" : temporary(path).path, "wb");
}

static int file_rename(const char *from, const char *to) {
    TemporaryPath folder = temporary(to);
    char *slash = strrchr(folder.path, '/');
    if (rename(from, to)) return errno;
    if (slash) *slash = 0;
    int fd = open(slash ? folder.path : ".", O_RDONLY);
    if (fd >= 0) fsync(fd), close(fd);
    return 0;
}

// f, from file_begin, becomes `path`. If something goes wrong, the file of before is still there.
static int file_end(FILE *f, const char *path) {
    int error = 0;
    if (!f) return errno;
    if (ferror(f) || fflush(f) || fsync(fileno(f))) error = errno;
    if (fclose(f) && !error) error = errno;
    if (ranks.rank) return 0;
    if (!error) error = file_rename(temporary(path).path, path);
    if (error) unlink(temporary(path).path);
    return error;
}

// A file of sections.
static int file_write(const char *path, const char *kind, const Section *section, size_t count) {
    static const char zeros[8];
    FILE *f = file_begin(path);
    if (!f) return errno;
    FileHeader header = { .version = 1, .length = sizeof header, .sections = count };
    memcpy(header.magic, MAGIC, sizeof header.magic);
    memcpy(header.kind, kind, sizeof header.kind);
    for (size_t s = 0; s < count; s++) header.length += sizeof(SectionHeader) + padded(section[s].length);
    fwrite(&header, sizeof header, 1, f);
    for (const Section *s = section; !ferror(f) && s < section + count; s++) {
        SectionHeader head = { .length = s->length, .hash = hash64(s->data, s->length) };
        memcpy(head.tag, s->tag, min_size(strlen(s->tag), sizeof head.tag));
        fwrite(&head, sizeof head, 1, f);
        if (s->length) fwrite(s->data, 1, s->length, f);
        fwrite(zeros, 1, padded(s->length) - s->length, f);
    }
    return file_end(f, path);
}

static void must_write(const char *path, int error) {
    if (error) die("%s: cannot be written: %s", path, strerror(error));
}

// to (size) = a text that CSV and JSON can have as it is; empty where there is no such section.
static void data_text(char *to, size_t size, const File *file, const char *tag) {
    size_t n;
    char *text = section(file, tag, 1, &n);
    for (size_t i = 0; i < n; i++)
        if (n >= size || iscntrl((unsigned char)text[i]) || strchr(",\"\\", text[i]))
            die("%s: section `%s` is not a name of at most %zu bytes without commas, quotes and backslashes",
                file->path, tag, size - 1);
    if (text) strcpy(to, text);
    free(text);
}

// What evaluations have besides.
static void data_evaluation(Data *data, const File *file, const char *metric) {
    const char *path = data->path;
    int known = choice_place("exact|acc|acc_norm|loss|number", metric);
    if (known < 0) die("%s: unknown metric `%s`", path, metric);
    data->metric = known;
    data->questions = data->examples;
    if (data->metric != ACC && data->metric != ACC_NORM) return;
    size_t choice_sum = 0;
    data->choices = section(file, "choices", sizeof(uint32_t), &data->questions);
    data->gold = needed(file, "gold", data->questions, sizeof(uint32_t));
    data->chars = needed(file, "chars", data->examples, sizeof(uint32_t));
    for (size_t i = 0; i < data->questions; i++) {
        if (data->gold[i] >= data->choices[i])
            die("%s: question %zu has no choice %u", path, i, data->gold[i]);
        choice_sum += data->choices[i];
    }
    for (size_t e = 0; e < data->examples; e++)
        if (data->chars[e] == 0) die("%s: choice %zu is empty", path, e);
    if (choice_sum != data->examples)
        die("%s: %zu choices in %zu examples", path, choice_sum, data->examples);
}

// data->token = the section's tokens of `width` bytes each, widened.
static void data_tokens(Data *data, const File *file, uint32_t width) {
    if (width != 1 && width != 2 && width != 4) die("%s: %u bytes per token", data->path, width);
    const char *raw = needed(file, "tokens", data->tokens, width);
    data->token = integers(data->tokens);
    for (size_t i = 0; i < data->tokens; i++) {
        memcpy(&data->token[i], raw + i * width, width);
        if (data->token[i] >= data->V)
            die("%s: token %zu is beyond the vocabulary of %u", data->path, i, data->V);
    }
    free((char *)raw);
}

static Data data_open(const char *path) {
    File opened = file_open(path, "data"), *file = &opened;
    Data data = { .path = path };
    data.hash = hash64(file->head, file->sections * sizeof *file->head);    // which has the sections' hashes
    uint32_t vocab[2];
    char metric[16] = "";
    needed_at(vocab, file, "vocab", 2, sizeof(uint32_t));
    data.V = vocab[0];
    data.length = section(file, "length", sizeof(uint32_t), &data.examples);
    if (data.examples == 0 || data.examples > UINT32_MAX) refuse(file, "holds no examples");
    data.answer = needed(file, "answer", data.examples, sizeof(uint32_t));
    data.offset = allocate(data.examples, sizeof(size_t));
    for (size_t e = 0; e < data.examples; e++) {
        if (data.answer[e] < 1 || data.answer[e] >= data.length[e])
            die("%s: example %zu of %u tokens cannot have its answer at %u", path, e, data.length[e],
                data.answer[e]);
        data.offset[e] = data.tokens;
        data.tokens += data.length[e];
        data.longest = max_size(data.longest, data.length[e]);
        data.longest_answer = max_size(data.longest_answer, data.length[e] - data.answer[e]);
    }
    data_tokens(&data, file, vocab[1]);
    data.glyphs = section(file, "glyphs", 2 * sizeof(uint32_t), &data.glyph_count);
    for (size_t g = 0; g < data.glyph_count; g++) {
        uint32_t c = data.glyphs[2 * g + 1];
        if (c != '\n' && (c < ' ' || c > '~'))
            die("%s: section `glyphs` has character %u, not of ASCII", path, c);
    }
    data_text(data.column, sizeof data.column, file, "column");
    data_text(metric, sizeof metric, file, "metric");
    if (data.column[0]) data_evaluation(&data, file, metric);
    file_close(file);
    return data;
}

// -----------------------------------------------------------------------------------------------------------
// 11. Memory
//
// Arrays lie in a few arenas, which are made before the first update: a run that has begun does not end for
// lack of memory. The table of tensors says where each one is.

// How many values are stored in the tensors from `first` up to `end`.
static size_t values_in(const Tensor *first, const Tensor *end) {
    size_t n = 0;
    for (const Tensor *t = first; t < end; t++) n += t->n;
    return n;
}

static size_t adapter_entries(Model *model) { return values_in(delta_tensor(model, 0), gates_tensor(model)); }
static size_t base_weights(const Model *m) { return values_in(m->tensors, m->tensors + m->base_tensors); }

// Of the matrices that are adapted: as many as a dense adapter has entries.
static size_t adapted_weights(const Model *model) {
    size_t n = 0;
    for (const Tensor *t = model->tensors; t < model->tensors + model->base_tensors; t++)
        if (t->adapter >= 0) n += t->n;
    return n;
}

// Gates are not counted; NAN where the base itself is trained, or nothing yet.
static double trained_density(Model *model) {
    size_t n = 0;
    for (const Tensor *t = delta_tensor(model, 0); t < model->tensors + model->all_tensors; t++)
        if (t->grad && strcmp(t->name, "gates")) n += t->n;
    return model->trained && !method.trains_base ? (double)n / (double)adapted_weights(model) : NAN;
}

static void tensor_row(Tensor *t, size_t rows, size_t cols, int adapter, const char *format, ...) {
    va_list arguments;
    *t = (Tensor){ .rows = rows, .cols = cols, .n = rows * cols, .adapter = adapter };
    va_start(arguments, format);
    vsnprintf(t->name, sizeof t->name, format, arguments);
    va_end(arguments);
}

static size_t largest_matrix(const Config *c) { return max_size(c->F, (size_t)c->H * c->D) * c->C; }

static void check_config(const Config *c, const char *path, size_t length) {
    const char *name[] = { "dim", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab" };
    const uint32_t size[] = { c->C, c->F, c->L, c->H, c->KV, c->D, c->V };
    for (int i = 0; i < 7; i++)
        if (size[i] < 1 || size[i] > 1 << 20) die("%s: %s is %u", path, name[i], size[i]);
    if (c->H % c->KV) die("%s: %u heads cannot share %u kv_heads evenly", path, c->H, c->KV);
    if (c->D % 2) die("%s: head_dim is %u, rotary positions need an even one", path, c->D);
    if (c->tied > 1 || c->dtype > 1)
        die("%s: tied is %u, dtype is %u, both must be 0 or 1", path, c->tied, c->dtype);
    if (!(c->theta > 0 && c->eps > 0 && c->theta < INFINITY && c->eps < 1))
        die("%s: theta %g, eps %g", path, c->theta, c->eps);
    if (largest_matrix(c) > UINT32_MAX) die("%s: a matrix is too large for 32-bit indices", path);
    if ((size_t)c->L * PER_LAYER > length) die("%s: %u layers in %zu bytes", path, c->L, length);
}

// The table: base tensors in the order of the file, then DeltaW of every adapted matrix, then the gates.
static void build_table(Model *model) {
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
static File base_open(Model *model, const char *path) {
    File file = file_open(path, "base");
    needed_at(&model->config, &file, "config", 1, sizeof(Config));
    check_config(&model->config, path, file.length);
    build_table(model);
    data_text(model->base.name, sizeof model->base.name, &file, "name");
    return file;
}

// Reads the weights into fp32. With --precision bf16 matrices that stay frozen are held in bfloat16: exactly,
// where the file is. A file in bfloat16 is read to where it stays so, or to the end of where it becomes wide.
static void base_read(Model *model, File *file, int trained) {
    int halve = precision == BF16 && !trained;
    size_t n = base_weights(model), halves = halve ? adapted_weights(model) : 0;
    size_t bytes = model->config.dtype ? 2 : 4;
    if (n * bytes > file->length) die("%s: %zu weights in %zu bytes", file->path, n, file->length);
    float *value = model->base_arena = floats(n - halves);
    uint16_t *narrow = model->bf16_arena = allocate(halve && bytes == 2 ? n : halves, sizeof(uint16_t));
    char *raw = !halve ? (char *)value + (4 - bytes) * n : bytes == 2 ? (char *)narrow : allocate(n, bytes);
    const char *from = needed_at(raw, file, "weights", n, bytes);
    model->base.hash = hash64(raw, n * bytes);
    for (Tensor *t = model->tensors; t < model->tensors + model->base_tensors; from += bytes * t++->n) {
        int finite = 1;
        if (halve && t->adapter >= 0) t->bf16 = narrow, narrow += t->n;
        else t->value = value, value += t->n;
        for (size_t i = 0; i < t->n; i++) {
            uint16_t narrowed;
            float w;
            if (bytes == 2) memcpy(&narrowed, from + 2 * i, 2), w = widen_bf16(narrowed);
            else memcpy(&w, from + 4 * i, 4);
            finite &= isfinite(w) != 0;
            if (t->bf16) t->bf16[i] = (uint16_t)round_bf16(w);
            else t->value[i] = w;
        }
        if (!finite) refuse(file, "%s has a weight that is not finite", t->name);
    }
    if (halve && bytes == 4) free(raw);
    file_close(file);
    model->adapter = PLAIN;
}

// Before the adapter's successor is built, so that both together need no more memory than training does.
static void free_moments(Model *model) {
    free(model->m_arena);
    free(model->v_arena);
    free(model->sum_arena);
    model->m_arena = model->v_arena = model->sum_arena = NULL;
}

// Gradients and moments, zeroed, for the tensors of the table from `first` up to `end`; the old ones go.
static void trained_arenas(Model *model, Tensor *first, Tensor *end) {
    size_t n = model->trained = values_in(first, end), at = 0;
    free(model->grad_arena);
    free_moments(model);
    model->grad_arena = allocate(n, gradient_size(model));
    model->m_arena = allocate(n, moment_size());
    model->v_arena = allocate(n, moment_size());
    for (Tensor *t = first; t < end; at += t++->n) {
        t->grad = (float *)((char *)model->grad_arena + at * gradient_size(model));
        t->m = (float *)((char *)model->m_arena + at * moment_size());
        t->v = (float *)((char *)model->v_arena + at * moment_size());
    }
}

// Values, gradients and moments, zeroed, of the table's rows from `first` on.
static void values_alloc(Model *model, Tensor *first) {
    size_t at = 0;
    Tensor *end = model->tensors + model->all_tensors;
    free_moments(model);
    free(model->value_arena);
    model->value_arena = floats(values_in(first, end));
    for (Tensor *t = first; t < end; at += t++->n) t->value = model->value_arena + at;
    trained_arenas(model, first, end);
}

// A dense adapter at its initial values, with gradients and moments.
static void adapter_alloc(Model *model) {
    model->narrow = precision == BF16;
    values_alloc(model, delta_tensor(model, 0));
    rewind_adapter(model);
    model->adapter = RIGSA;
}

typedef struct { float *memory; size_t used; } Arena;

static float *take(Arena *arena, size_t n) {
    float *p = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += round_up(n, 16);                         // every array starts on a cache line
    return p;
}

// The largest batch: N rows, sequences of T, M answer rows, K keys; `caches`, one a layer if there is a past.
typedef struct { size_t N, T, M, K, caches; } Largest;

// Lays out activations for such batches, returns how many floats they are. Only fp32 training that does not
// recompute gives each layer arrays of its own; otherwise all share the first's, and training keeps copies.
static size_t acts_layout(Model *model, float *memory, Largest batch, int training) {
    const Config *c = &model->config;
    Activations *a = &model->acts;
    Arena arena = { memory, 0 };
    size_t N = batch.N, T = batch.T, M = batch.M, threads = (size_t)omp_get_max_threads();
    size_t C = c->C, F = c->F, HD = (size_t)c->H * c->D, KVD = (size_t)c->KV * c->D;
    int own = training && precision == FP32 && !a->recompute;
    if (!a->layer) a->layer = allocate(c->L + 1, sizeof(Layer));
    for (size_t l = 0; l <= c->L; l++) {
        Layer *layer = &a->layer[l];
        if (l == 0 || own) {
            size_t start = arena.used;
            layer->x = take(&arena, (l < c->L ? N : M) * C);
            if (l == c->L) break;
            layer->q = take(&arena, N * HD);
            layer->k = take(&arena, N * KVD), layer->v = take(&arena, N * KVD);
            layer->att = take(&arena, N * HD), layer->x2 = take(&arena, N * C);
            layer->gate = take(&arena, N * F), layer->up = take(&arena, N * F);
            a->saved_floats = a->recompute ? N * C : arena.used - start;
        } else *layer = a->layer[0];
        if (l == 0 || (training && !a->recompute && l < c->L)) layer->lse = take(&arena, N * c->H);
        size_t saved = precision == BF16 ? (a->saved_floats + 1) / 2 : a->saved_floats;
        if (training && !own && l < c->L) layer->saved = take(&arena, saved);
    }
    a->N = N, a->T = T, a->M = M, a->K = batch.K;
    a->cache_stride = batch.caches > 1 ? batch.K * KVD : 0;
    a->keys = take(&arena, batch.caches * batch.K * KVD);
    a->values = take(&arena, batch.caches * batch.K * KVD);
    a->xn = take(&arena, N * C), a->rstd = take(&arena, max_size(N, M)), a->h = take(&arena, N * F);
    a->blocks = take(&arena, threads * block_floats(c->H / c->KV, T, c->D));
    a->cosine = take(&arena, T * c->D / 2), a->sine = take(&arena, T * c->D / 2);
    a->xm = take(&arena, M * C), a->xf = take(&arena, M * C);
    a->logits = take(&arena, min_size(HEAD_ROWS, M) * c->V);
    a->logp = take(&arena, M), a->best = (uint32_t *)take(&arena, M);
    if (!training) return arena.used;
    a->dx = take(&arena, N * C), a->dxn = take(&arena, N * C);
    a->dxm = take(&arena, M * C), a->dxf = take(&arena, M * C);
    a->dq = take(&arena, N * HD), a->datt = take(&arena, N * HD);
    a->dk = take(&arena, N * KVD), a->dv = take(&arena, N * KVD);
    a->dgate = take(&arena, N * F), a->dup = take(&arena, N * F), a->dh = take(&arena, N * F);
    a->dkeys = take(&arena, KEY_PARTS * batch.K * KVD), a->dvalues = take(&arena, KEY_PARTS * batch.K * KVD);
    a->x_t = take(&arena, threads * x_t_floats(max_size(C, max_size(F, HD))));
    return arena.used;
}

// Where layers share their arrays, this saves a layer's for its backward pass, or with `back` restores them.
static void layer_copy(Activations *acts, size_t l, int back) {
    float *x = acts->layer[l].x, *saved = acts->layer[l].saved;
    float *to = back ? x : saved, *from = back ? saved : x;
    uint16_t *halves = (uint16_t *)saved;
    if (!saved) return;
    if (precision == FP32) { memcpy(to, from, acts->saved_floats * sizeof(float)); return; }
    #pragma omp parallel for simd
    for (size_t i = 0; i < acts->saved_floats; i++) {
        if (back) x[i] = widen_bf16(halves[i]);
        else halves[i] = (uint16_t)round_bf16(x[i]);
    }
}

static void acts_alloc(Model *model, Largest batch, int training) {
    acts_layout(model, floats(acts_layout(model, NULL, batch, training)), batch, training);
    rope_table(model->acts.cosine, model->acts.sine, batch.T, model->config.D, model->config.theta);
    model->scratch = floats(largest_matrix(&model->config));
}

static Batch batch_alloc(size_t N, size_t M, size_t K) {
    size_t S = K + 1;                                       // a sequence has at least one key
    return (Batch){ .all = { .start = integers(S), .position = integers(N) },
                    .answer = { .row = integers(M), .start = integers(S), .position = integers(M) },
                    .token = integers(N), .target = integers(M),
                    .key_start = integers(S), .key_row = integers(K),
                    .example = integers(S) };
}

// -----------------------------------------------------------------------------------------------------------
// 12. Options
//
// A row of the table is all that there is to know of an option. From it come the help, the parser, the text
// that is printed and goes with a ticket, and what a run that goes on must agree with.

typedef enum { TEXT, LIST, COUNT, REAL, CHOICE, FLAG } OptionType;

typedef struct {
    const char *name;
    OptionType type;
    void *where;
    const char *range;          // of a number "low to high"; the choices "a|b|c", the value is the place
    const char *start;          // the default, written as a user would
    const char *help;
} Option;

#ifndef MORE_OPTIONS            // of a program that includes this file
#define MORE_OPTIONS
#endif

#define NANO "dev/nano/"
static const Option table[] = {
    { "base", TEXT, &opt.base, "FILE", NANO "base.bin", "the pretrained model" },
    { "data", TEXT, &opt.data, "FILE", NANO "digits_train.bin", "training examples of the new task" },
    { "eval", LIST, opt.evals, "FILE",
      NANO "digits_test.bin " NANO "addition.bin " NANO "sizes.bin " NANO "packing.bin",
      "evaluation set; repeatable: the first is the target, the others what must not be forgotten" },
    { "examples", COUNT, &opt.examples, "0 to 1e12", "12800", "examples of a pass, 0: all of them once" },
    { "ticket-examples", COUNT, &opt.ticket_examples, "0 to 1e12", "48000", "of the ticket's pass" },
    { "rounds", COUNT, &opt.rounds, "0 to 100", "5", "rounds of training and pruning before the last pass" },
    { "batch", COUNT, &opt.batch, "1 to 1e6", "16", "examples per update" },
    { "micro", COUNT, &opt.micro, "0 to 1e6", "0", "examples per forward pass, to save memory; 0: all" },
    { "precision", CHOICE, &precision, "fp32|bf16", "fp32", "of products and of what backward needs" },
    { "recompute", FLAG, &opt.recompute, "no|yes", "no", "a third more work, far less memory" },
    { "lr", REAL, &opt.lr, "0 to 10", "0.003", "learning rate of DeltaW" },
    { "alpha-lr", REAL, &opt.alpha_lr, "0 to 10", "0.007", "learning rate of the gates" },
    { "ticket-rate", REAL, &opt.ticket_rate, "0 to 1000", "1", "both, in the ticket's pass, times this" },
    { "warmup", REAL, &opt.warmup, "0 to 1", "0.05", "share of a pass over which these rates rise from 0" },
    { "cooldown", REAL, &opt.cooldown, "0 to 1", "1", "share, at its end, over which they fall back to 0" },
    { "sigma", REAL, &opt.sigma, "0 to 1e6", "0.06", "standard deviation of DeltaW's initial values" },
    { "weight-decay", REAL, &opt.weight_decay, "0 to 1e6", "1", "decoupled decay of DeltaW" },
    { "keep", REAL, &opt.keep, "0 to 1", "0.56", "share of the candidates that a round keeps" },
    { "survivors", CHOICE, &opt.survivors, "rewind|keep|redraw", "rewind", "their values in the next pass" },
    { "threshold", CHOICE, &opt.threshold, "matrix|all", "matrix", "within which magnitudes are compared" },
    { "seed", COUNT, &opt.seed, "0 to 9e15", "1", "of DeltaW and of the order of the data" },
    MORE_OPTIONS
    { "out", TEXT, &opt.out, "FOLDER", "out", "for the table, the settings and the ticket" },
    { "save-every", REAL, &opt.save_every, "0 to 1e9", "300", "seconds between saves; 0: only after rounds" },
    { "resume", FLAG, &opt.resume, "no|yes", "no", "go on with the run that the output folder holds" },
    { "overwrite", FLAG, &opt.overwrite, "no|yes", "no", "replace the run that the output folder holds" },
};
enum { OPTIONS = sizeof table / sizeof *table };
static int given[OPTIONS];                  // how often the user named it
static char *settings_folder;               // where relative paths of the settings start

// What makes a run what it is. It may go on in another folder, and be saved more often.
static int is_setting(const Option *o) {
    return o->where != &opt.out && o->where != &opt.save_every
        && o->where != &opt.resume && o->where != &opt.overwrite;
}

static void usage(void) {
    printf("Trains a RIGSA adapter for a SmolLM2 language model.\n\n");
    printf("    ./" PROGRAM " [--option value ...]\n\n");
    for (const Option *o = table; o < table + OPTIONS; o++) {
        printf("  --%s %s\n        %s", o->name, o->type == FLAG ? "" : o->range, o->help);
        printf(*o->start && o->type != FLAG ? " (default %s)\n" : "\n", o->start);
    }
    printf("  --help\n        this text\n");
    exit(0);
}

static double parse_number(const Option *o, const char *text) {
    char *end;
    double low, high, number = strtod(text, &end);
    if (end == text || *end || isspace((unsigned char)*text) || !isfinite(number))
        die("--%s: `%s` is not a number", o->name, text);
    if (o->type == COUNT && number != floor(number)) die("--%s: `%s` is not a whole number", o->name, text);
    sscanf(o->range, "%lf to %lf", &low, &high);
    if (number < low || number > high) die("--%s: %s is not in %s", o->name, text, o->range);
    return number;
}

// Of a list the n-th value, which ends it.
static void option_set(const Option *o, char *text, int n) {
    int place = o->type == FLAG || o->type == CHOICE ? choice_place(o->range, text) : 0;
    if (place < 0) die("--%s: `%s` is none of %s", o->name, text, o->range);
    if (n >= MAX_EVALS) die("--%s: at most %d of them", o->name, MAX_EVALS);
    switch (o->type) {
    case TEXT: *(char **)o->where = text; break;
    case LIST: ((char **)o->where)[n] = text, ((char **)o->where)[n + 1] = NULL; break;
    case COUNT: *(size_t *)o->where = (size_t)parse_number(o, text); break;
    case REAL: *(double *)o->where = parse_number(o, text); break;
    case CHOICE: case FLAG: *(int *)o->where = place; break;
    }
}

static int option_find(const char *name) {
    for (int i = 0; i < OPTIONS; i++) if (!strcmp(table[i].name, name)) return i;
    return -1;
}

// Its n-th value as a user would write it, in `word` if it is no text; NULL after the last.
static const char *option_word(const Option *o, int n, char word[24]) {
    const char *choice = o->range;
    if (o->type == LIST) return ((char **)o->where)[n];
    if (n > 0) return NULL;
    switch (o->type) {
    case COUNT: snprintf(word, 24, "%zu", *(size_t *)o->where); break;
    case REAL:                                              // as it was written, if that says it all
        snprintf(word, 24, "%.15g", *(double *)o->where);
        if (strtod(word, NULL) != *(double *)o->where) snprintf(word, 24, "%.17g", *(double *)o->where);
        break;
    case CHOICE: case FLAG:
        for (int i = *(int *)o->where; i > 0; i--) choice += strcspn(choice, "|") + 1;
        snprintf(word, 24, "%.*s", (int)strcspn(choice, "|"), choice);
        break;
    default: return *(char **)o->where;
    }
    return word;
}

// One `name value` a line: printed at the start, kept with the run and its ticket, read when it goes on.
static char *settings_text(void) {
    const char *word;
    char *text, room[24];
    size_t size;
    FILE *to = open_memstream(&text, &size);
    for (const Option *o = table; o < table + OPTIONS; o++)
        for (int n = 0; is_setting(o) && (word = option_word(o, n, room)); n++)
            if (*word) fprintf(to, "%-16s %s\n", o->name, word);
    fclose(to);
    return text;
}

static char *output_path(const char *name, char path[PATH_MAX]) {
    if (snprintf(path, PATH_MAX, "%s/%s", opt.out, name) >= PATH_MAX) die("--out: too long a path");
    return path;
}

// Returns the settings of the run that goes on: those that the user did not give are set, the others must be
// the same. Of files only that there is one: hashes decide.
static char *settings_resume(const File *file) {
    size_t n;
    int taken[OPTIONS] = { 0 };
    char *settings = section(file, "settings", 1, &n), *rest, *line;
    settings_folder = section(file, "folder", 1, &n);
    if (!settings || !settings_folder) refuse(file, "damaged");
    rest = strdup(settings);
    while ((line = strsep(&rest, "\n")) && *line) {
        char room[24], name[24] = "", *value = strlen(line) > 17 ? line + 17 : "";
        sscanf(line, "%23s", name);
        int i = option_find(name);
        if (i < 0 || !is_setting(&table[i]) || !*value) refuse(file, "damaged");
        const Option *o = &table[i];
        int path = o->type == TEXT || o->type == LIST;
        const char *word = option_word(o, 0, room);
        if (given[i] && !path && strcmp(word, value))
            die("--%s is %s, in the saved run it was %s; leave it out, or start a run in another --out",
                o->name, word, value);
        if (given[i]) continue;
        const char *from = path && *value != '/' ? settings_folder : "";
        char *text = allocate(strlen(from) + strlen(value) + 2, 1);
        sprintf(text, *from ? "%s/%s" : "%s%s", from, value);
        option_set(o, text, taken[i]++);
    }
    for (int i = 0; i < OPTIONS; i++) given[i] += taken[i];
    return settings;
}

// Returns the settings of the run that goes on, or NULL.
static char *parse_options(int argc, char **argv) {
    char *settings = NULL, path[PATH_MAX];
    for (const Option *o = table; o < table + OPTIONS; o++) {
        char *start = strdup(o->start), *word;
        for (int n = 0; (word = strsep(&start, " ")); n++) option_set(o, word, n);
    }
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) usage();
        int found = strncmp(argv[i], "--", 2) ? -1 : option_find(argv[i] + 2);
        if (found < 0) die("unknown option `%s`; ./" PROGRAM " --help lists them all", argv[i]);
        const Option *o = &table[found];
        if (given[found] && o->type != LIST) die("--%s is given twice", o->name);
        if (o->type != FLAG && i + 1 == argc) die("--%s needs a value: %s", o->name, o->range);
        option_set(o, o->type == FLAG ? "yes" : argv[++i], given[found]++);
        if (strchr(argv[i], '\n')) die("--%s: a line break in `%s`", o->name, argv[i]);
    }
    settings_folder = getcwd(NULL, 0);
    if (opt.resume && opt.overwrite) die("--resume goes on with the run that --overwrite would replace");
    if (opt.resume) {
        File file = file_open(output_path("state.bin", path), "stat");
        settings = settings_resume(&file);
        file_close(&file);
    }
    double highest = opt.lr * fmax(1, opt.ticket_rate);
    if (highest * opt.weight_decay >= 1)
        die("A rate of %g times --weight-decay %g is not below 1: one update would erase DeltaW", highest,
            opt.weight_decay);
    if (opt.sigma == 0) die("--sigma 0 leaves no sign to compare with");
    return settings;
}

// -----------------------------------------------------------------------------------------------------------
// 13. Runs
//
// All that surrounds training: progress, tables, the state, stopping, the folder, data, the plan, and main.

// Where the run is. Work is counted in tokens times products per matrix: forward has one; training has a
// second one for dx, and for dW a share of a third.
static struct {
    double start, saved, shown;             // seconds: of the start, the last save, the last line of progress
    double work, done, scoring;             // of the whole run, so far, and of an evaluation of all sets
    double share;                           // of the training tokens that have a row of their own
    double began, loss;                     // this pass, from the end of its first, slow update on
    size_t tokens;
    int terminal, forecast;
} pace;

static const char *first_label = "base";    // dev/evaluate.c's may be "ticket"

static const char *label(const Run *run, size_t pass) {
    static char text[24];
    snprintf(text, sizeof text, "%zu", pass);
    return pass == 0 ? first_label : pass == run->passes ? method.name : text;
}

static const char *duration(double s) {
    static char text[32];
    s = round(s);
    if (s < 120) snprintf(text, 32, "%.0f s", s);
    else if (s < 7200) snprintf(text, 32, "%.0f min %02.0f s", floor(s / 60), fmod(s, 60));
    else snprintf(text, 32, "%.0f h %02.0f min", floor(s / 3600), floor(fmod(s, 3600) / 60));
    return text;
}

// How many bytes of an evaluation's name are shown: whole characters, if it is UTF-8.
static int heading_width(const char *column) {
    int n = (int)min_size(strlen(column), 15);
    while ((column[n] & 0xc0) == 0x80) n--;
    return n;
}

static void clear_line(void) { if (pace.terminal) printf("\r\033[K"); }

// A single pass has one density, whatever it is; of several the first is dense.
static double training_work(const Run *run, size_t tokens, double density) {
    return pace.share * (double)tokens * (2 + (run->passes > 1 ? density : 1));
}

// Seconds that are left, if updates go on as in this pass, and evaluations take as long as the base's.
static double time_left(Run *run, double now) {
    double left = fmax(0, pace.work - pace.done), evals = (double)(run->passes + 1 - run->rows);
    if (!pace.tokens) return (now - pace.start) * left / pace.done;
    double trained = training_work(run, pace.tokens, trained_density(&run->model));
    return evals * run->row->seconds + (left - evals * pace.scoring) * (now - pace.began) / trained;
}

// The line at the bottom of a terminal, five times a second at most; a pipe does not see it.
static void progress(Run *run, const char *what, double part) {
    double now = seconds();
    if (!pace.terminal || now - pace.shown < 0.2) return;
    pace.shown = now;
    printf("\r\033[K  %-8.*s %3.0f %%", heading_width(what), what, 100 * part);
    if (pace.tokens)
        printf("   loss %.4f   %.0f tokens/s", pace.loss, (double)pace.tokens / (now - pace.began));
    printf("   %s left", duration(time_left(run, now)));
    fflush(stdout);
}

// Results, in a table for people and in files for programs.

static void print_row(const Run *run, const Row *row) {
    const Score *score = run->score + (size_t)(row - run->row) * run->evals;
    printf("%-8s", label(run, (size_t)(row - run->row)));
    if (isnan(row->density)) printf(" %8s", "-");
    else printf(" %8.4f", row->density);
    if (isnan(row->kept)) printf(" %6s %8s", "-", "-");
    else printf(" %6.3f %8.3f", row->kept, row->flipped);
    for (size_t i = 0; i < run->evals; i++) printf("  %.4f +-%.4f", score[i].value, score[i].error);
    printf(" %9s\n", duration(row->seconds));
}

// The rows so far, under their heading.
static void print_table(const Run *run) {
    printf("\n%-8s %8s %6s %8s", "round", "density", "kept", "flipped");
    for (const Data *eval = run->eval; eval < run->eval + run->evals; eval++)
        printf(" %15.*s", heading_width(eval->column), eval->column);
    printf(" %9s\n", "time");
    for (size_t i = 0; i < run->rows; i++) print_row(run, &run->row[i]);
}

// The character of a token; '?' for one that has none.
static char glyph(const Data *data, uint32_t token) {
    for (const uint32_t *g = data->glyphs; g < data->glyphs + 2 * data->glyph_count; g += 2)
        if (g[0] == token) return (char)g[1];
    return '?';
}

// The first example of the target as the text that the model reads, with its answer.
static void draw_example(Run *run) {
    const Data *data = &run->eval[0];
    if (!data->glyphs) return;
    judge(&run->model, run->verdict, &run->batch, data, 0);
    putchar('\n');
    for (uint32_t t = 0; t < data->answer[0]; t++) {
        char c = glyph(data, data->token[t]);
        if (c != '?') putchar(c);
    }
    printf("\n  read as %c, is %c\n", glyph(data, run->verdict[0].said),
           glyph(data, data->token[data->answer[0]]));
}

// Files for programs, each written anew.

static void write_settings(FILE *f, const Run *run) { fputs(run->settings, f); }

static void write_table(FILE *f, const Run *run) {
    fprintf(f, "round,density,kept,flipped");
    for (size_t i = 0; i < run->evals; i++)
        fprintf(f, ",%s,%s_error", run->eval[i].column, run->eval[i].column);
    fprintf(f, ",seconds\n");
    for (size_t r = 0; r < run->rows; r++) {
        const Row *row = &run->row[r];
        fprintf(f, "%s,%.6f,%.6f,%.6f", label(run, r), row->density, row->kept, row->flipped);
        for (const Score *s = run->score + r * run->evals; s < run->score + (r + 1) * run->evals; s++)
            fprintf(f, ",%.6f,%.6f", s->value, s->error);
        fprintf(f, ",%.1f\n", row->seconds);
    }
}

// How many rounds have been pruned.
static size_t rounds_pruned(const Run *run) {
    return run->rows > 1 ? min_size(run->rows, run->passes) - 1 : 0;
}

// What the rounds kept and flipped, matrix by matrix.
static void write_pruning(FILE *f, const Run *run) {
    static const char *const KIND[ADAPTED] = { "q", "k", "v", "o", "gate", "up", "down" };
    size_t count = matrices(&run->model);
    fprintf(f, "round,layer,kind,entries,flipped,kept\n");
    for (size_t i = 0; i < rounds_pruned(run) * count; i++)
        fprintf(f, "%zu,%zu,%s,%zu,%zu,%zu\n", 1 + i / count, i % count / ADAPTED, KIND[i % ADAPTED],
                run->pruned[i].entries, run->pruned[i].flipped, run->pruned[i].survivors);
}

static void write_losses(FILE *f, const Run *run) {
    fprintf(f, "pass,update,loss\n");
    for (size_t pass = 1, at = 0; at < run->updates; pass++)
        for (size_t t = 1, end = updates_before(run, pass + 1); at < min_size(end, run->updates); t++)
            fprintf(f, "%s,%zu,%.6f\n", label(run, pass), t, run->loss[at++]);
}

// The folder's file of this name. Returns 0 or an errno, as those that follow do.
static int text_save(const Run *run, const char *name, void (*write)(FILE *f, const Run *run)) {
    char path[PATH_MAX];
    FILE *f = file_begin(output_path(name, path));
    if (f) write(f, run);
    return file_end(f, path);
}

static int tables_save(const Run *run) {
    int error = text_save(run, "table.csv", write_table);
    if (!error && method.end_pass == rigsa_end_pass) error = text_save(run, "pruning.csv", write_pruning);
    return error ? error : text_save(run, "loss.csv", write_losses);
}

// What a ticket says of the adapter is enough to make W again. A dense one has no index.
static void ticket_save(Model *model, const char *path, const char *settings) {
    size_t count = matrices(model), n = adapter_entries(model);
    uint64_t *entries = allocate(count, sizeof(uint64_t));
    for (size_t a = 0; a < count; a++) entries[a] = delta_tensor(model, a)->n;
    must_write(path, file_write(path, "tick", (Section[]){
        { "base", &model->base, 8 + strlen(model->base.name) }, { "settings", settings, strlen(settings) },
        { "init", &model->init, sizeof model->init },
        { "gates", gates_tensor(model)->value, count * sizeof(float) },
        { "entries", entries, count * sizeof(uint64_t) },
        { "values", delta_tensor(model, 0)->value, n * sizeof(float) },
        { "index", model->index_arena, n * sizeof(uint32_t) } }, model->index_arena ? 7 : 6));
    free(entries);
}

// One number for mask, values and gates, to compare two runs by eye.
static uint64_t ticket_hash(Model *model) {
    Tensor *gates = gates_tensor(model);
    uint64_t hash = hash64(gates->value, gates->n * sizeof(float));
    for (const Tensor *delta = delta_tensor(model, 0); delta < gates; delta++) {
        hash = mix(hash + hash64(delta->value, delta->n * sizeof(float)));
        if (delta->index) hash = mix(hash + hash64(delta->index, delta->n * sizeof(uint32_t)));
    }
    return hash;
}

static void rigsa_finish(Run *run) {
    char path[PATH_MAX];
    Model *model = &run->model;
    ticket_save(model, output_path("ticket.bin", path), run->settings);
    printf("\nticket: density %.4f, %zu entries, hash %016llx\n", trained_density(model),
           adapter_entries(model), (unsigned long long)ticket_hash(model));
}

// Which entries there are in `rows` rows of the table after the base's: all, or those in each DeltaW's index.
static void mask_load(Model *model, const File *file, size_t rows) {
    size_t count = matrices(model), at = 0, n;
    uint64_t *entries = needed(file, "entries", rows, sizeof(uint64_t));
    free(model->index_arena);
    model->index_arena = section(file, "index", sizeof(uint32_t), &n);
    for (size_t r = 0; r < rows; r++) {
        Tensor *t = delta_tensor(model, r);
        size_t all = t->rows * t->cols;
        t->index = r < count && model->index_arena ? model->index_arena + at : NULL;
        t->n = entries[r];
        if (t->index ? t->n > min_size(all, n - at) : t->n != all)
            die("%s: %zu entries of %s", file->path, t->n, t->name);
        for (size_t k = 0; t->index && k < t->n; k++)
            if (t->index[k] >= all || (k && t->index[k] <= t->index[k - 1]))
                die("%s: the index of %s is not ascending within the matrix", file->path, t->name);
        if (t->index) at += t->n;
    }
    if (at != n) die("%s: section `index` has %zu entries, %zu are needed", file->path, n, at);
    free(entries);
}

// The state: all that it takes to go on as if nothing had been, down to the bits. Returns 0 or an errno.
static int state_save(Run *run, const char *path) {
    Model *model = &run->model;
    size_t bytes = model->trained * sizeof(float), rows = model->all_tensors - model->base_tensors;
    double clock[2] = { seconds() - pace.start, pace.done };
    uint64_t *entries = allocate(rows, sizeof(uint64_t));
    for (size_t r = 0; r < rows; r++) entries[r] = delta_tensor(model, r)->n;
    int error = file_write(path, "stat", (Section[]){
        { "inputs", run->hash, (2 + run->evals) * sizeof(uint64_t) },
        { "settings", run->settings, strlen(run->settings) },
        { "folder", settings_folder, strlen(settings_folder) },
        { "clock", clock, sizeof clock }, { "rows", run->row, run->rows * sizeof(Row) },
        { "pruned", run->pruned, rounds_pruned(run) * matrices(model) * sizeof(Pruned) },
        { "scores", run->score, run->rows * run->evals * sizeof(Score) },
        { "losses", run->loss, run->updates * sizeof(double) }, { "warm", &run->warm, sizeof run->warm },
        { "draw", &model->init.draw, sizeof model->init.draw },
        { "entries", entries, rows * sizeof(uint64_t) }, { "values", model->value_arena, bytes },
        { "m", model->m_arena, model->trained * moment_size() },
        { "v", model->v_arena, model->trained * moment_size() },
        { "index", model->index_arena, model->index_arena ? adapter_entries(model) * sizeof(uint32_t) : 0 } },
        model->index_arena ? 15 : 14);
    free(entries);
    return error;
}

// Warns of an error and returns it: a full disk may be empty again when the next save is due.
static int save(Run *run) {
    char path[PATH_MAX];
    int error = state_save(run, output_path("state.bin", path));
    if (!error) error = tables_save(run);
    clear_line();
    if (error) fprintf(stderr, PROGRAM ": warning: %s: not saved: %s; what was saved before stays\n",
                       opt.out, strerror(error));
    pace.saved = seconds();
    return error;
}

// How far the run was. Without a row it has only begun.
static void state_load(Run *run, const File *file) {
    size_t inputs, most;
    double clock[2];
    uint64_t *hash = section(file, "inputs", sizeof(uint64_t), &inputs);
    if (!hash || inputs != 2 + run->evals)
        die("%s: a run with %zu inputs (base, data, --eval), not %zu", file->path, inputs, 2 + run->evals);
    for (size_t i = 0; i < inputs; i++)
        if (hash[i] != run->hash[i])
            die("%s has changed since %s was written",
                i == 0 ? opt.base : i == 1 ? opt.data : opt.evals[i - 2], file->path);
    Row *row = section(file, "rows", sizeof(Row), &run->rows);
    double *loss = section(file, "losses", sizeof(double), &run->updates);
    needed_at(clock, file, "clock", 2, sizeof(double));
    needed_at(&run->warm, file, "warm", 1, sizeof run->warm);
    most = run->rows ? updates_before(run, min_size(run->rows, run->passes) + 1) : 0;
    if (!row || !loss || !(clock[0] >= 0 && clock[1] >= 0) || run->rows > run->passes + 1
        || run->updates < updates_before(run, run->rows) || run->updates > most)
        refuse(file, "damaged");
    needed_at(run->score, file, "scores", run->rows * run->evals, sizeof(Score));
    needed_at(run->pruned, file, "pruned", rounds_pruned(run) * matrices(&run->model), sizeof(Pruned));
    memcpy(run->row, row, run->rows * sizeof(Row));
    memcpy(run->loss, loss, run->updates * sizeof(double));
    pace.start = seconds() - clock[0];
    pace.done = clock[1];
    free(hash), free(row), free(loss);
}

// What it had trained.
static void trained_load(Model *model, const File *file) {
    needed_at(&model->init.draw, file, "draw", 1, sizeof model->init.draw);
    mask_load(model, file, model->all_tensors - model->base_tensors);
    if (!method.trains_base) values_alloc(model, delta_tensor(model, 0));
    numbers_at(model->value_arena, file, "values", model->trained, sizeof(float));
    numbers_at(model->m_arena, file, "m", model->trained, moment_size());
    numbers_at(model->v_arena, file, "v", model->trained, moment_size());
}

// SIGINT or SIGTERM, or 0. The second one ends the program at once.
static volatile sig_atomic_t asked_to_stop;

static void ask_to_stop(int number) {
    if (asked_to_stop) signal(number, SIG_DFL), raise(number);         // asked twice: at once
    asked_to_stop = number;
}

static void stop_if_asked(Run *run) {
    int number = ranks.asked ? ranks.asked(asked_to_stop) : asked_to_stop;
    if (!number) return;
    if (save(run)) die("%s: stopped; --resume goes on from the save before", opt.out);
    printf("stopped and saved; this goes on with it:  ./" PROGRAM " --resume --out '%s'\n", opt.out);
    exit(128 + number);
}

static void save_if_due(Run *run) {
    if (opt.save_every > 0 && seconds() - pace.saved >= opt.save_every) save(run);
    stop_if_asked(run);
}

static void step_done(double work) {
    pace.done += work;
    if (!choose_threads(work)) return;
    clear_line();
    printf("threads: %d are the fastest now\n", omp_get_max_threads());
}

static void after_update(Run *run, size_t pass, size_t t, size_t tokens) {
    double loss = run->loss[run->updates - 1], now = seconds();
    pace.loss = pace.began > 0 ? 0.95 * pace.loss + 0.05 * loss : loss;
    if (pace.began > 0) pace.tokens += tokens;
    else pace.began = now;
    step_done(training_work(run, tokens, trained_density(&run->model)));
    if (!pace.forecast && pace.tokens && now - pace.began > fmin(30, 2 + 0.01 * time_left(run, now))) {
        clear_line();
        printf("forecast: %s for the whole run, at %.0f tokens/s\n",
               duration(now - pace.start + time_left(run, now)), (double)pace.tokens / (now - pace.began));
        pace.forecast = 1;
    }
    save_if_due(run);
    progress(run, label(run, pass), (double)t / (double)pass_updates(run, pass));
}

static void after_scores(Run *run, const Data *data, size_t done, size_t tokens) {
    step_done((double)tokens);
    stop_if_asked(run);
    progress(run, data->column, (double)done / (double)data->examples);
}

// Evaluates the model as it is and adds the row to the table.
static Row *add_row(Run *run) {
    Row *row = &run->row[run->rows];
    *row = (Row){ trained_density(&run->model), NAN, NAN, 0 };
    pace.began = 0, pace.tokens = 0;
    for (size_t i = 0; i < run->evals; i++)
        run->score[run->rows * run->evals + i] = ranks.evaluate(run, &run->eval[i]);
    clear_line();
    row->seconds = seconds() - pace.start;
    run->rows++;
    return row;
}

// All that a run leaves in its folder, whatever its method.
static const char *const OUTPUTS[] = { "state.bin", "settings.txt", "table.csv", "pruning.csv", "loss.csv",
                                       "ticket.bin", "model.bin", "lora.bin" };
enum { OUTPUT_COUNT = sizeof OUTPUTS / sizeof *OUTPUTS };

// Makes the output folder, keeps the run that it may hold, and keeps others out until this process ends.
static void take_folder(void) {
    char path[PATH_MAX];
    if (ranks.rank) return;
    if (mkdir(opt.out, 0777) && errno != EEXIST)
        die("--out %s: cannot be made: %s", opt.out, strerror(errno));
    int folder = open(opt.out, O_RDONLY | O_DIRECTORY);
    if (folder < 0) die("--out %s: cannot be used: %s", opt.out, strerror(errno));
    if (flock(folder, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK)
        die("%s: another run is at work there", opt.out);
    for (int i = 0; i < OUTPUT_COUNT && !opt.resume && !opt.overwrite; i++)
        if (!access(output_path(OUTPUTS[i], path), F_OK))
            die("%s holds a run; go on with it (--resume), replace it (--overwrite), or choose another --out",
                opt.out);
}

// The folder becomes this run's. What it held goes once the first state is whole, but before that takes the
// place of the old one: at no moment are there files of two runs.
static void start_folder(Run *run) {
    char first[PATH_MAX], path[PATH_MAX];
    if (ranks.rank) return;
    must_write(first, state_save(run, output_path("new_state.bin", first)));
    for (int i = 1; i < OUTPUT_COUNT; i++)
        if (unlink(output_path(OUTPUTS[i], path)) && errno != ENOENT) must_write(path, errno);
    must_write(path, file_rename(first, output_path("state.bin", path)));
}

// dev/evaluate.c, which generates, needs more
static void (*generation_room)(Largest *batch, const Run *run);

// Examples in the base's tokens.
static Data data_of(Run *run, const char *path, uint64_t *hash) {
    Data data = data_open(path);
    if (data.V != run->model.config.V)
        die("%s has a vocabulary of %u, %s of %u", path, data.V, opt.base, run->model.config.V);
    run->held += data.tokens + 4 * data.examples;
    *hash = data.hash;
    return data;
}

static void load_data(Run *run) {
    size_t largest = 0;
    if (*opt.data) run->data = data_of(run, opt.data, &run->hash[1]);
    if (run->data.choices) die("%s holds wrong choices, which nobody should learn: not for --data", opt.data);
    for (; opt.evals[run->evals]; run->evals++) {
        const char *path = opt.evals[run->evals];
        Data *eval = &run->eval[run->evals];
        *eval = data_of(run, path, &run->hash[2 + run->evals]);
        largest = max_size(largest, eval->examples);
        size_t n = strlen(eval->column);
        if (n == 0) die("%s: has no column and metric, it is not an evaluation set", path);
        if (eval->metric == NUMBER && !generation_room)
            die("%s: its answers are generated; ./evaluate_rigsa --eval %s does that", path, path);
        if (choice_place("round|density|kept|flipped|seconds", eval->column) >= 0
            || (n >= 6 && !strcmp(eval->column + n - 6, "_error")))
            die("%s: its column is called `%s`, as one that table.csv has", path, eval->column);
        for (const Data *other = run->eval; other < eval; other++)
            if (!strcmp(other->column, eval->column))
                die("%s and %s are both called `%s`: leave one out, or make it again with another column",
                    other->path, path, eval->column);
    }
    run->verdict = allocate(largest, sizeof(Verdict));
}

// `micro` training examples, or what an evaluation takes at a time.
static Largest largest_batch(const Run *run, size_t micro) {
    Largest b = { .N = micro * run->data.longest, .T = run->data.longest,
                  .M = micro * run->data.longest_answer };
    if (!run->passes) b.N = 2048;
    for (const Data *eval = run->eval; eval < run->eval + run->evals; eval++) {
        b.T = max_size(b.T, eval->longest);
        b.N = max_size(b.N, eval->longest);
        // answers of as many examples as N tokens hold on average, each as long as the longest, so one fits
        b.M = max_size(b.M, min_size(b.N, b.N * eval->longest_answer * eval->examples / eval->tokens));
    }
    if (b.N > UINT32_MAX) die("a batch of %zu tokens is too large; take a smaller --micro", b.N);
    b.K = run->evals ? 4 * b.N : b.N;       // four choices may share nearly all rows, but each has its keys
    b.caches = 1;
    if (generation_room) generation_room(&b, run);
    return b;
}

// The work of the whole run. In the first batches it is counted how many tokens share the row of another.
static void count_work(Run *run) {
    const Data *data = &run->data;
    size_t last = pass_examples(run, run->passes), rows = 0, tokens = 0, micro = micro_batch(opt.batch);
    double density = 1, length = (double)data->tokens / (double)max_size(data->examples, 1);
    if (run->passes) visit_order(run->order, data, last, opt.seed, 1);
    for (size_t i = 0; run->passes && i < min_size(last, 16 * micro); i += micro) {
        batch_lay(&run->batch, data, run->order + i, min_size(micro, last - i));
        rows += run->batch.all.n;
        tokens += run->batch.K;
    }
    pace.share = tokens ? (double)rows / (double)tokens : 1;
    for (const Data *eval = run->eval; eval < run->eval + run->evals; eval++)
        pace.scoring += (double)eval->tokens;
    pace.work = (double)(run->passes + 1) * pace.scoring;
    for (size_t p = 1; p <= run->passes; p++, density *= 0.9 * opt.keep)            // a tenth flips, or so
        pace.work += training_work(run, (size_t)(length * (double)pass_examples(run, p)), density);
    printf("work     %zu passes and %zu evaluations, %.3g TFLOP, on %d threads", run->passes, run->passes + 1,
           2e-12 * pace.work * (double)adapted_weights(&run->model), omp_get_max_threads());
    if (pace.share < 1) printf("; prompts begin alike: %.0f %% of the tokens are computed", 100 * pace.share);
    printf("\n");
}

// What the run needs, printed, refused if it is not there, and only then allocated. A pruned adapter has an
// index, too, but at most four fifths of the entries.
static void plan(Run *run) {
    Model *model = &run->model;
    const Config *c = &model->config;
    int training = run->passes > 0;
    size_t most = 0;
    if (opt.examples == 0) opt.examples = run->data.examples;
    if (opt.ticket_examples == 0) opt.ticket_examples = run->data.examples;
    for (size_t p = 1; p <= run->passes; p++) most = max_size(most, pass_examples(run, p));
    size_t micro = micro_batch(min_size(opt.batch, most));
    Largest batch = largest_batch(run, micro);
    if (batch.T > c->context)
        printf("note: sequences of %zu tokens, the base was made for %u\n", batch.T, c->context);

    model->acts.recompute = opt.recompute;
    size_t weights = base_weights(model), adapted = adapted_weights(model);
    size_t halved = precision == BF16 && !method.trains_base ? adapted / 2 : 0;
    size_t adapter = values_in(model->tensors + model->base_tensors, model->tensors + model->all_tensors);
    size_t trained = !training ? 0 : method.trains_base ? weights : adapter;
    size_t sum = micro < min_size(opt.batch, most) ? trained : 0;       // loss_and_gradient
    size_t updates = updates_before(run, run->passes + 1);
    size_t packed = (size_t)omp_get_max_threads() * (PACKED_A + PACKED_B);
    size_t acts = acts_layout(model, NULL, batch, training);
    const struct { const char *what; size_t floats; } need[] = {
        { "weights", weights - halved }, { "adapter", training && !method.trains_base ? adapter : 0 },
        { "gradients", trained / (method.end_pass && precision == BF16 ? 2 : 1) + sum },        // RIGSA's
        { "moments", 2 * trained * moment_size() / sizeof(float) },
        { "activations", acts },
        { "scratch", largest_matrix(c) + packed },
        { "data", run->held + most + run->data.examples + 2 * updates } };
    double total = 0, there = 1e-6 * (ranks.memory > 0 ? ranks.memory : memory_available());
    printf("\nmodel    %s: %zu weights, %zu in %zu matrices to adapt; %u layers of %u, vocabulary %u\n",
           model->base.name, weights, adapted, matrices(model), c->L, c->C, c->V);
    printf("memory  ");
    for (int i = 0; i < 7; i++) {
        if (need[i].floats) printf(" %s %.1f,", need[i].what, 4e-6 * (double)need[i].floats);
        total += 4e-6 * (double)need[i].floats;
    }
    printf(" together %.1f MB\n", total);
    if (!isfinite(there)) printf("note: this system does not say how much memory is free\n");
    if (total > there && !training)
        die("%.1f MB are needed, %.1f are there (free memory, limit of the cgroup, ulimit -v)", total, there);
    double fits = total, others = total + 4e-6 * ((double)trained - (double)sum - (double)acts);
    while (fits > there && micro > 1)
        fits = others + 4e-6 * (double)acts_layout(model, NULL, largest_batch(run, micro /= 2), training);
    if (total > there)
        die("%.1f MB are needed, %.1f are there (free memory, limit of the cgroup, ulimit -v); %s--micro %zu "
            "needs %.1f, --recompute and --precision bf16 save more", total, there,
            fits > there ? "even " : "", micro, fits);
#ifndef _OPENMP
    printf("note: built without OpenMP: one thread, and all loops slower\n");
#endif
    acts_alloc(model, batch, training);
    run->batch = batch_alloc(batch.N, batch.M, batch.K);
    run->row = allocate(run->passes + 1, sizeof(Row));
    run->score = allocate((run->passes + 1) * run->evals, sizeof(Score));
    run->pruned = allocate(run->passes * matrices(model), sizeof(Pruned));
    run->loss = allocate(updates, sizeof(double));
    run->order = integers(most + run->data.examples);
    count_work(run);
}

// Everything up to the first update: of a new run, or of one that goes on.
static void begin_training(Run *run) {
    char path[PATH_MAX], state[PATH_MAX];
    File file;
    output_path("state.bin", state);
    for (int i = 0, number[] = { SIGINT, SIGTERM }; i < 2; i++)     // nohup and background jobs ignore some
        if (signal(number[i], SIG_IGN) != SIG_IGN) signal(number[i], ask_to_stop);
    signal(SIGXFSZ, SIG_IGN);  // beyond ulimit -f is an error of write(), like a full disk
    if (opt.resume) file = file_open(state, "stat"), state_load(run, &file);
    else start_folder(run);
    must_write(output_path("settings.txt", path), text_save(run, "settings.txt", write_settings));
    pace.saved = seconds();
    print_table(run);
    int begun = run->rows > 0;
    if (opt.resume)
        printf("resumed after update %zu of %zu\n", run->updates, updates_before(run, run->passes + 1));
    if (!begun) print_row(run, add_row(run));
    method.start(run);
    if (begun) trained_load(&run->model, &file);
    else must_write(state, state_save(run, state));         // is the disk too small?
    if (opt.resume) file_close(&file);
    must_write(opt.out, tables_save(run));                  // the state may be newer than they are
}

// From the options to the ticket. (dev/evaluate.c does not use it.)
__attribute__((unused)) static void train_whole(Run *run) {
    Model *model = &run->model;
    pace.start = seconds();
    pace.terminal = isatty(1);
    File base = base_open(model, opt.base);
    load_data(run);
    method.prepare(run);
    if (!run->settings) run->settings = settings_text();
    take_folder();
    fputs(run->settings, stdout);
    plan(run);
    base_read(model, &base, method.trains_base);
    run->hash[0] = model->base.hash;
    if (ranks.compare) ranks.compare(run);
    begin_training(run);
    train(run);
    if (run->passes > 1) print_table(run);
    draw_example(run);
    method.finish(run);
}

static void check_output(void) {
    if (!fflush(stdout) && !ferror(stdout)) return;
    fprintf(stderr, PROGRAM ": standard output could not be written\n");
    fflush(NULL);
    _exit(1);
}

// What all our programs do first.
static void begin_program(char **argv) {
    for (int fd = 0; fd < 3; fd++)                          // otherwise a file would be standard output
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) _exit(1);
    setvbuf(stdout, NULL, _IOLBF, 0);                   // a log that is read while the run goes on
    atexit(check_output);
    prepare_threads(argv);
}

#ifdef STANDALONE
int main(int argc, char **argv) {
    static Run run;
    begin_program(argv);
    run.settings = parse_options(argc, argv);
    train_whole(&run);
    return 0;
}
#endif

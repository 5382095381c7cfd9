// SPDX-License-Identifier: MIT
//
// baselines.c: the methods that RIGSA is compared with, on the trainer's own code path. Model, data, loss,
// AdamW, schedule and evaluation are train_rigsa.c's; here are only the two functions of each adapter, the
// rows of its tensors, and its mask.
//
//     make train_baselines && ./train_baselines --method lora
//
//     --method   the matrix that is used              trained                     mask
//     lora       W0 + s B A,  s = lora-alpha / rank   A (r, I), B (O, r)          -
//                with --base-type nf4: QLoRA, nf4(W0) in place of W0
//     random     W0 + mask . DeltaW, from zero        DeltaW where the mask is 1  random, a number per matrix
//                with --init gated: RIGSA's adapter, W0 + alpha * (mask . DeltaW), DeltaW random;
//                with --start: mask and DeltaW's start are those of a file
//     ltsft      W0 + mask . DeltaW                   first all of DeltaW, then   the largest |DeltaW| of the
//                                                     masked ones, from zero      first pass, of all matrices
//     rosa       W0 + mask . DeltaW + s B A           A, B, DeltaW                the largest dW^2 after 64
//                                                                                 updates of A, B, per matrix
//     dense      W0 + DeltaW                          DeltaW, decaying to W0      full
//     full       W                                    every weight of the base    -
//     rigsa      with --rest init: W0 + alpha * (mask . DeltaW + (1 - mask) . initial): a pruned entry stays,
//                frozen, at its random initial value, where the trainer's rests at zero
//
// Where each rule comes from, and the proofs that it is what its origin does: doc/baselines.md,
// dev/test_baselines.py.

#include <stddef.h>
#define PROGRAM "train_baselines"
#define METHODS "rigsa|full|eval|lora|random|ltsft|rosa|dense"
enum { METHOD_RIGSA, METHOD_FULL, METHOD_EVAL, METHOD_LORA, METHOD_RANDOM, METHOD_LTSFT,
    METHOD_ROSA, METHOD_DENSE };
enum { INIT_ZERO, INIT_GATED };
enum { BASE_PLAIN, BASE_NF4 };
static struct {
    char *lora, *start;
    int method, init, base_type, rest;
    size_t rank, mask_after;
    double density, lora_alpha, lora_lr, gate, alpha_decay;
} more;                                     // options, beside the trainer's
#define METHOD_OPTIONS \
    { "method", CHOICE, &more.method, METHODS, "rigsa", "what is trained; eval: only evaluate" }, \
    { "density", REAL, &more.density, "0 to 1", "0.0346", \
        "share of the entries in the mask (random, ltsft, rosa)" }, \
    { "init", CHOICE, &more.init, "zero|gated", "zero", \
        "random: DeltaW from zero, or random behind RIGSA's gate" }, \
    { "gate", REAL, &more.gate, "0 to 1", "1e-6", "random --init gated: where the gates begin" }, \
    { "alpha-decay", REAL, &more.alpha_decay, "0 to 1e6", "0", \
        "random --init gated: decoupled decay of the gates" }, \
    { "start", TEXT, &more.start, "FILE", "", \
        "random --init gated: mask and DeltaW's start of this ticket" }, \
    { "rest", CHOICE, &more.rest, "zero|init", "zero", \
        "rigsa: where pruned entries stay: at zero, or where they began" }, \
    { "rank", COUNT, &more.rank, "0 to 65536", "0", \
        "of B A (lora, rosa); 0: as many values as --density has, nearly" }, \
    { "lora-alpha", REAL, &more.lora_alpha, "0 to 1e6", "0", \
        "B A counts lora-alpha / rank times; 0: once" }, \
    { "lora-lr", REAL, &more.lora_lr, "0 to 10", "0", "learning rate of A and B; 0: --lr" }, \
    { "lora", TEXT, &more.lora, "FILE", "", \
        "lora: start from this adapter; eval: evaluate it, of RoSA with its --ticket" }, \
    { "base-type", CHOICE, &more.base_type, "plain|nf4", "plain", \
        "lora, eval: W0 as it is, or in 4.127 bits (QLoRA)" }, \
    { "mask-after", COUNT, &more.mask_after, "0 to 1e9", "64", \
        "rosa: updates of A and B before the mask is chosen" },
#include "evaluate.c"

enum { STREAM_MASK = 100, STREAM_LORA };    // of random numbers, after the trainer's

// -----------------------------------------------------------------------------------------------------------
// NF4 with double quantization (Dettmers et al. 2023), as bitsandbytes has it on a CPU
//
// 64 weights share a scale, their largest magnitude; each is stored as the nearest of 16 levels, quantiles of
// a normal distribution. Scales are stored in 8 bits: less their mean, in blocks of 256 that share a scale of
// their own, on a map that is fine near zero. 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight.

enum { NF4_BLOCK = 64, SCALE_BLOCK = 256 };

static const float NF4_LEVEL[16] = {
    -1, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
        -0.18477343022823334f,
    -0.09105003625154495f, 0, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f,
        0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1 };

typedef struct {                            // one matrix
    uint8_t *code;                          // (n / 2) two weights a byte, the first in the upper half
    uint8_t *scale;                         // (blocks of 64) places on the map
    float *scale_scale;                     // (blocks of 64 * 256)
    float mean;                             // of the scales
} Nf4;

static Nf4 *nf4;                            // of each adapted matrix; NULL: the base is fp32
static float scale_map[256];

static size_t blocks_of(size_t n, size_t block) { return (n + block - 1) / block; }

// The dynamic map: 2^e evenly spaced values of order 10^(e - 6), e = 0..6, of either sign, and 0 and 1. The
// middles of 2^e equal parts of [0.1, 1], whose ends are counted from the nearer side.
static void fill_scale_map(void) {
    float *positive = &scale_map[128];
    for (int e = 0; e < 7; e++) {
        int parts = 1 << e;
        float step = (1.0f - 0.1f) / (float)parts, order = (float)pow(10, e - 6), low = 0.1f;
        for (int i = 1; i <= parts; i++) {
            float high = 2 * i < parts + 1 ? fmaf(step, (float)i, 0.1f) : fmaf(-step, (float)(parts - i), 1);
            *positive++ = order * ((low + high) / 2);
            low = high;
        }
    }
    for (int i = 0; i < 127; i++) scale_map[126 - i] = -scale_map[128 + i];
    scale_map[127] = 0;
    scale_map[255] = 1;
}

static float largest_magnitude(const float *x, size_t n) {
    float largest = 0;
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(x[i]));
    return largest;
}

// Which of `count` ascending levels is nearest to x; in the middle between two, the lower.
static uint8_t nearest(const float *level, int count, float x) {
    int low = 0, high = count - 1;          // the answer is one of low..high
    while (low < high) {
        int middle = (low + high) / 2;
        if (x > (level[middle] + level[middle + 1]) / 2) low = middle + 1;
        else high = middle;
    }
    return (uint8_t)low;
}

static Nf4 nf4_quantize(const float *w, size_t n) {
    size_t blocks = blocks_of(n, NF4_BLOCK), groups = blocks_of(blocks, SCALE_BLOCK);
    Nf4 q = { allocate((n + 1) / 2, 1), allocate(blocks, 1), floats(groups), 0 };
    float *scale = floats(blocks);
    double sum = 0;
    if (scale_map[255] == 0) fill_scale_map();
    if (n % 2) q.code[n / 2] = nearest(NF4_LEVEL, 16, 0);               // the half byte that is left over
    #pragma omp parallel for
    for (size_t b = 0; b < blocks; b++) {
        size_t first = b * NF4_BLOCK, end = min_size(n, first + NF4_BLOCK);
        scale[b] = largest_magnitude(w + first, end - first);
        float size = fmaxf(scale[b], 1e-38f), inverse = 1.0f / size;
        for (size_t i = first; i < end; i++) {  // bitsandbytes divides in a last block that is not full
            uint8_t code = nearest(NF4_LEVEL, 16, end - first == NF4_BLOCK ? w[i] * inverse : w[i] / size);
            q.code[i / 2] |= (uint8_t)(i % 2 ? code : code << 4);
        }
    }
    for (size_t b = 0; b < blocks; b++) sum += scale[b];
    q.mean = (float)(sum / (double)blocks);
    for (size_t b = 0; b < blocks; b++) scale[b] -= q.mean;
    for (size_t g = 0; g < groups; g++) {
        size_t first = g * SCALE_BLOCK, end = min_size(blocks, first + SCALE_BLOCK);
        q.scale_scale[g] = largest_magnitude(scale + first, end - first);
        float inverse = 1.0f / fmaxf(q.scale_scale[g], 1e-38f);
        for (size_t b = first; b < end; b++) q.scale[b] = nearest(scale_map, 256, scale[b] * inverse);
    }
    free(scale);
    return q;
}

// w (n) = what the codes stand for. `volatile` keeps product and sum from being fused: two roundings.
static void nf4_expand(float *w, const Nf4 *q, size_t n) {
    #pragma omp parallel for
    for (size_t b = 0; b < blocks_of(n, NF4_BLOCK); b++) {
        volatile float product = scale_map[q->scale[b]] * q->scale_scale[b / SCALE_BLOCK];
        float scale = product + q->mean;
        for (size_t i = b * NF4_BLOCK; i < min_size(n, (b + 1) * NF4_BLOCK); i++)
            w[i] = NF4_LEVEL[q->code[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale;
    }
}

// The matrices of the base become codes, and their values are gone; embeddings and norms stay.
static void quantize_base(Model *model) {
    Tensor *first = model->tensors, *end = first + model->base_tensors;
    size_t n = 0, at = 0, bytes = 0, weights = 0;
    nf4 = allocate(matrices(model), sizeof(Nf4));
    for (Tensor *t = first; t < end; t++) {
        if (t->adapter < 0) { n += t->n; continue; }
        size_t blocks = blocks_of(t->n, NF4_BLOCK);
        bytes += (t->n + 1) / 2 + blocks + 4 * blocks_of(blocks, SCALE_BLOCK) + 4;
        weights += t->n;
        nf4[t->adapter] = nf4_quantize(plain_weight(model, t), t->n);
        t->value = NULL;
        t->bf16 = NULL;
    }
    float *rest = floats(n);
    for (Tensor *t = first; t < end; t++) {
        if (!t->value) continue;
        t->value = memcpy(rest + at, t->value, t->n * sizeof(float));
        at += t->n;
    }
    free(model->base_arena);
    free(model->bf16_arena);
    model->base_arena = rest;
    model->bf16_arena = NULL;
    printf("nf4      matrices in %.1f MB, %.3f bits per weight\n", 1e-6 * (double)bytes,
           8 * (double)bytes / (double)weights);
}

// -----------------------------------------------------------------------------------------------------------
// Adapters
//
// A and B are kept with the rank first, A (r, I) and B^T (r, O): the products that make and differentiate
// them then have r rows and many columns, which is what fills matmul's tiles. dW itself, (O, I), is never
// formed:
//
//     dB^T (r, O) += s (A x^T) dy          dA (r, I) += s (B^T dy^T) x

static float *thin;                         // (2, r, N), or (r, O): products with A and B on their way

// The rows of A and B^T of adapted matrix a are the last ones of the table.
static Tensor *lora_tensor(Model *model, size_t a) {
    return &model->tensors[model->all_tensors - 2 * (matrices(model) - a)];
}

static float lora_scale(void) {
    return more.lora_alpha > 0 ? (float)(more.lora_alpha / (double)more.rank) : 1.0f;
}

static void scale_values(float *to, const float *from, float s, size_t n) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < n; i++) to[i] = s * from[i];
}

// W += s B A, W in model->scratch.
static const float *lora_add(Model *model, Tensor *t) {
    const Tensor *A = lora_tensor(model, (size_t)t->adapter), *B = A + 1;
    scale_values(thin, B->value, lora_scale(), B->n);
    matmul(model->scratch, t->cols, turned(thin, t->rows), view(A->value, t->cols), t->rows,
           t->cols, A->rows, 1);
    return model->scratch;
}

static const float *lora_weight(Model *model, Tensor *t) {
    float *w = model->scratch;
    if (nf4) nf4_expand(w, &nf4[t->adapter], t->n);
    else {
        #pragma omp parallel for simd
        for (size_t i = 0; i < t->n; i++) w[i] = frozen(t, i);
    }
    return lora_add(model, t);
}

static void lora_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    Tensor *A = lora_tensor(model, (size_t)t->adapter), *B = A + 1;
    size_t r = A->rows, I = t->cols, O = t->rows;
    float *ax = thin, *bdy = thin + r * N;
    matmul(ax, N, view(A->value, I), turned(x, I), r, N, I, 0);         // A x^T  (r, N)
    matmul(bdy, N, view(B->value, O), turned(dy, O), r, N, O, 0);       // B^T dy^T  (r, N)
    scale_values(thin, thin, lora_scale(), 2 * r * N);
    matmul(B->grad, O, view(ax, N), view(dy, O), r, O, N, 1);
    matmul(A->grad, I, view(bdy, N), view(x, I), r, I, N, 1);
}

static const Adapter LORA = { lora_weight, lora_gradient };

static const float *nf4_weight(Model *model, Tensor *t) {
    nf4_expand(model->scratch, &nf4[t->adapter], t->n);
    return model->scratch;
}

static const Adapter NF4 = { nf4_weight, plain_gradient };

// W = W0 + mask . DeltaW is RIGSA's with the gate at 1:     dDeltaW += mask . dW
// The gate has no gradient.
static void sparse_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    Tensor *delta = delta_tensor(model, (size_t)t->adapter);
    size_t O = t->rows, I = t->cols;
    if (!delta->index) {
        matmul(delta->grad, I, turned(dy, O), view(x, I), O, I, N, 1);
        return;
    }
    sampled_product(model->scratch, delta->index, delta->n, dy, x, model->acts.x_t, O, I, N);
    #pragma omp parallel for simd
    for (size_t k = 0; k < delta->n; k++) delta->grad[k] += model->scratch[k];
}

static const Adapter SPARSE = { rigsa_weight, sparse_gradient };

// RIGSA whose pruned entries rest at their initial values, which the generator gives back:
//
//     W = W0 + alpha * (mask . DeltaW + (1 - mask) . initial)
static const float *resting_weight(Model *model, Tensor *t) {
    const size_t a = (size_t)t->adapter;
    const Tensor *delta = delta_tensor(model, a);
    const float alpha = gates_tensor(model)->value[a], sigma = model->init.sigma;
    const uint64_t key = delta_key(model, a);
    float *w = model->scratch;
    if (!delta->index) return rigsa_weight(model, t);
    #pragma omp parallel for
    for (size_t i = 0; i < t->n; i++) w[i] = frozen(t, i) + alpha * normal(key, i, sigma);
    #pragma omp parallel for
    for (size_t k = 0; k < delta->n; k++) {
        size_t i = delta->index[k];
        w[i] = frozen(t, i) + alpha * delta->value[k];
    }
    return w;
}

// dDeltaW = alpha * mask . dW as ever. alpha scales the frozen entries, too, so its gradient needs all of
// dW:
//
//     dalpha = sum(dW . (mask . DeltaW + (1 - mask) . initial))
//            = sum(dW . mask . (DeltaW - initial)) + sum(dW . initial)
static void resting_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    const size_t a = (size_t)t->adapter, O = t->rows, I = t->cols;
    Tensor *delta = delta_tensor(model, a), *gates = gates_tensor(model);
    const float alpha = gates->value[a], sigma = model->init.sigma;
    const uint64_t key = delta_key(model, a);
    float *dw = model->scratch;
    double part[PARTS];
    if (!delta->index) {
        rigsa_gradient(model, t, x, dy, N);
        return;
    }
    matmul(dw, I, turned(dy, O), view(x, I), O, I, N, 0);
    #pragma omp parallel for
    for (size_t p = 0; p < PARTS; p++) {
        double sum = 0;
        for (size_t k = delta->n * p / PARTS; k < delta->n * (p + 1) / PARTS; k++) {
            float dw_k = dw[delta->index[k]];
            store(delta->grad, k, model->narrow, alpha * dw_k);
            sum += (double)dw_k * ((double)delta->value[k] - initial(delta, key, k, sigma));
        }
        for (size_t i = O * I * p / PARTS; i < O * I * (p + 1) / PARTS; i++)
            sum += (double)dw[i] * normal(key, i, sigma);
        part[p] = sum;
    }
    store(gates->grad, a, model->narrow, (float)sum_of_parts(part));
}

static const Adapter RESTING = { resting_weight, resting_gradient };

static const float *rosa_weight(Model *model, Tensor *t) {
    rigsa_weight(model, t);
    return lora_add(model, t);
}

static void rosa_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    sparse_gradient(model, t, x, dy, N);
    lora_gradient(model, t, x, dy, N);
}

static const Adapter ROSA = { rosa_weight, rosa_gradient };

// What RoSA's mask is chosen by: dW^2 of every entry, summed over the forward passes of one update.
static float *squares;                      // (all entries) of all matrices, end to end

static void squares_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    float *dw = model->scratch, *sum = squares;
    for (const Tensor *before = model->tensors; before < t; before++)
        if (before->adapter >= 0) sum += before->n;
    matmul(dw, t->cols, turned(dy, t->rows), view(x, t->cols), t->rows, t->cols, N, 0);
    #pragma omp parallel for simd
    for (size_t i = 0; i < t->n; i++) sum[i] += dw[i] * dw[i];
}

static const Adapter SQUARES = { lora_weight, squares_gradient };

// -----------------------------------------------------------------------------------------------------------
// Masks: floor(density * entries) of them, of each matrix or of all together

static size_t matrix_size(Model *model, size_t a) {
    return delta_tensor(model, a)->rows * delta_tensor(model, a)->cols;
}

static size_t share(double density, size_t n) { return (size_t)floor(density * (double)n); }

// The entries of matrix a that its mask keeps: they are the next n of the index arena.
static size_t set_index(Model *model, size_t a, size_t from, size_t n) {
    delta_tensor(model, a)->index = model->index_arena + from;
    delta_tensor(model, a)->n = n;
    return from + n;
}

// Each subset of share(density) entries is equally likely (selection sampling: Knuth, TAOCP 3.4.2, algorithm
// S): entry i is chosen with probability (still needed) / (still to come).
static void mask_random(Model *model, double density) {
    size_t at = 0, all = 0;
    for (size_t a = 0; a < matrices(model); a++) all += share(density, matrix_size(model, a));
    free(model->index_arena);
    model->index_arena = integers(all);
    for (size_t a = 0; a < matrices(model); a++) {
        size_t size = matrix_size(model, a), wanted = share(density, size), n = 0;
        uint64_t key = random_key(model->init.seed, STREAM_MASK, a, 0);
        for (size_t i = 0; i < size; i++)
            if ((double)(mix(key + i * GOLDEN) >> 11) * 0x1p-53 * (double)(size - i) < (double)(wanted - n))
                model->index_arena[at + n++] = (uint32_t)i;
        at = set_index(model, a, at, n);
    }
}

// A ticket's mask, before the plan counts its entries, and its values, where they are DeltaW's start.
static void mask_start(Model *model, const char *path) {
    File file = file_open(path, "tick");
    mask_load(model, &file, matrices(model));
    file_close(&file);
}

static void values_start(Model *model, const char *path) {
    File file = file_open(path, "tick");
    check_base(model, &file);
    numbers_at(delta_tensor(model, 0)->value, &file, "values", adapter_entries(model), sizeof(float));
    file_close(&file);
}

// The entries with the largest scores; ties to the lower index. `score` is of all matrices, end to end.
static void mask_largest(Model *model, const float *score, double density, Threshold over) {
    size_t all = adapted_weights(model), at = 0;
    Cut cut = { 0 };
    free(model->index_arena);
    model->index_arena = integers(share(density, all));
    if (over == THRESHOLD_ALL)
        cut = cut_magnitudes(score, all, all, (double)share(density, all) / (double)all);
    for (size_t a = 0; a < matrices(model); a++) {
        size_t size = matrix_size(model, a), n = 0;
        if (over == THRESHOLD_MATRIX)
            cut = cut_magnitudes(score, size, size, (double)share(density, size) / (double)size);
        for (size_t i = 0; i < size; i++)
            if (survives(&cut, score[i])) model->index_arena[at + n++] = (uint32_t)i;
        at = set_index(model, a, at, n);
        score += size;
    }
}

// -----------------------------------------------------------------------------------------------------------
// Files: a trained base, and the `lora` kind (doc/model.md)

static void base_save(const Model *model, const char *path) {
    Config config = model->config;
    config.dtype = 0;
    must_write(path, file_write(path, "base", (Section[]){
        { "config", &config, sizeof config },
        { "name", model->base.name, strlen(model->base.name) },
        { "weights", model->base_arena, base_weights(model) * sizeof(float) } }, 3));
}

typedef struct { uint32_t rank; float alpha; } LoraShape;

static void lora_save(Model *model, const char *path, const char *settings) {
    const Tensor *first = lora_tensor(model, 0);
    size_t n = values_in(first, model->tensors + model->all_tensors);
    LoraShape shape = { (uint32_t)more.rank, lora_scale() * (float)more.rank };
    must_write(path, file_write(path, "lora", (Section[]){
        { "base", &model->base, 8 + strlen(model->base.name) },
        { "settings", settings, strlen(settings) },
        { "shape", &shape, sizeof shape },
        { "values", first->value, n * sizeof(float) } }, 4));
}

static LoraShape lora_shape(const char *path) {
    File file = file_open(path, "lora");
    LoraShape shape;
    needed_at(&shape, &file, "shape", 1, sizeof shape);
    if (shape.rank < 1 || shape.rank > 65536 || !(shape.alpha > 0))
        die("%s: rank %u, alpha %g", path, shape.rank, shape.alpha);
    file_close(&file);
    return shape;
}

static void lora_load(Model *model, const char *path) {
    File file = file_open(path, "lora");
    const Tensor *first = lora_tensor(model, 0);
    size_t n = values_in(first, model->tensors + model->all_tensors);
    check_base(model, &file);
    numbers_at(first->value, &file, "values", n, sizeof(float));
    file_close(&file);
}

// -----------------------------------------------------------------------------------------------------------
// The methods

static int is_sparse(void) { return more.method >= METHOD_RANDOM; }
static int is_low_rank(void) {
    return more.method == METHOD_LORA || more.method == METHOD_ROSA || *more.lora;
}

// Before the plan counts the table: the rows of this method after those of the base. DeltaW and the gates if
// it is sparse, A and B^T of every matrix if it has a rank.
static void prepare_baseline(Run *run) {
    Model *model = &run->model;
    size_t all = adapted_weights(model), lora_rows = is_low_rank() ? 2 * matrices(model) : 0, both = 0;
    Tensor *end = model->tensors + model->base_tensors;
    model->init.seed = opt.seed;
    model->init.sigma = (float)opt.sigma;
    model->init.rest = (uint32_t)more.rest;
    int lora_or_eval = more.method == METHOD_LORA || more.method == METHOD_EVAL;
    if (more.base_type == BASE_NF4 && (!lora_or_eval || *ticket_path))
        die("--base-type nf4 goes with --method lora or eval, and without --ticket");
    if (more.init == INIT_GATED && more.method != METHOD_RANDOM)
        die("--init gated goes with --method random");
    if ((*more.start || more.gate != 1e-6 || more.alpha_decay > 0) && more.init != INIT_GATED)
        die("--start, --gate and --alpha-decay go with --method random --init gated");
    if (*more.lora && !lora_or_eval)
        die("--lora goes with --method lora or eval");
    if (more.rest && more.method != METHOD_RIGSA)
        die("--rest init goes with --method rigsa; a ticket knows it by itself");
    if (more.rest && opt.survivors == SURVIVORS_REDRAW)
        die("--rest init and --survivors redraw: a frozen entry would change its value at every redraw");
    run->passes = more.method == METHOD_LTSFT ? 2 : more.method != METHOD_EVAL;
    if (more.method == METHOD_RIGSA) rigsa_prepare(run);
    if (more.method == METHOD_FULL) {
        if (!given[option_find("lr")]) opt.lr = 1e-3;
        if (!given[option_find("weight-decay")]) opt.weight_decay = 0.1;
    }
    if (more.method <= METHOD_FULL) return;
    if (more.method == METHOD_EVAL && !*more.lora && more.base_type == BASE_PLAIN) return;
    if (!given[option_find("weight-decay")] && more.method != METHOD_DENSE && more.init != INIT_GATED)
        opt.weight_decay = 0;
    for (Tensor *t = model->tensors; t < end; t++) if (t->adapter >= 0) both += t->rows + t->cols;
    if (*more.lora && !opt.resume) {            // a run that goes on has its own values
        LoraShape shape = lora_shape(more.lora);
        more.rank = shape.rank, more.lora_alpha = shape.alpha;
    }
    if (more.rank == 0) more.rank = (size_t)fmax(1, floor(more.density * (double)all / (double)both + 0.5));

    size_t kept = is_sparse() || *ticket_path ? model->all_tensors : model->base_tensors;
    Tensor *tensors = allocate(kept + lora_rows, sizeof(Tensor)), *t = tensors + kept;
    memcpy(tensors, model->tensors, kept * sizeof(Tensor));
    for (Tensor *w = model->tensors; lora_rows && w < end; w++) {
        if (w->adapter < 0) continue;
        tensor_row(t++, more.rank, w->cols, -1, "%.24s.A", w->name);
        tensor_row(t++, more.rank, w->rows, -1, "%.24s.B", w->name);
    }
    free(model->tensors);
    model->tensors = tensors;
    model->all_tensors = kept + lora_rows;
    if (*more.start) mask_start(model, more.start);
    else if (more.method == METHOD_RANDOM) mask_random(model, more.density);
    if (more.method == METHOD_ROSA)
        for (size_t a = 0; a < matrices(model); a++)
            delta_tensor(model, a)->n = share(more.density, matrix_size(model, a));
}

// Gates of a mask that starts from zero stay at 1.
static int frozen_gates(void) { return is_sparse() && more.init != INIT_GATED; }

// Everything that is trained, at its start: DeltaW zero, behind gates that stay at 1 (or, gated, RIGSA's); B
// zero and A ~ U(-1, 1) / sqrt(I), which is PEFT's kaiming_uniform_(a = sqrt(5)).
static void start_trained(Model *model) {
    Tensor *first = model->tensors + model->base_tensors, *end = model->tensors + model->all_tensors;
    if (*ticket_path) first = lora_tensor(model, 0), model->value_arena = NULL;   // the rest: the ticket's
    values_alloc(model, first);
    for (Tensor *t = first; t < end; t++) {
        t->lr = (float)opt.lr;
        t->decay = (float)opt.weight_decay;
    }
    if (more.init == INIT_GATED) {
        rewind_adapter(model);
        if (*more.start && !opt.resume) values_start(model, more.start);
        for (size_t a = 0; a < matrices(model); a++) gates_tensor(model)->value[a] = (float)more.gate;
        gates_tensor(model)->lr = (float)opt.alpha_lr;
        gates_tensor(model)->decay = (float)more.alpha_decay;
    } else if (frozen_gates()) {
        for (size_t a = 0; a < matrices(model); a++) gates_tensor(model)->value[a] = 1;
        gates_tensor(model)->grad = NULL;
    }
    if (!is_low_rank()) return;
    for (size_t a = 0; a < matrices(model); a++) {
        Tensor *A = lora_tensor(model, a);
        uint64_t key = random_key(model->init.seed, STREAM_LORA, a, 0);
        float bound = 1 / sqrtf((float)A->cols);
        for (size_t i = 0; i < A->n; i++)
            A->value[i] = bound * ((float)(mix(key + i * GOLDEN) >> 40) * 0x1p-23f + 0x1p-24f - 1);
        A[0].lr = A[1].lr = (float)(more.lora_lr > 0 ? more.lora_lr : opt.lr);
    }
    if (*more.lora && !opt.resume) lora_load(model, more.lora);
}

// After the base has been read.
static void start_baseline(Run *run) {
    Model *model = &run->model;
    const Config *c = &model->config;
    size_t widest = max_size(max_size(c->C, c->F), (size_t)c->H * c->D);
    if (more.base_type == BASE_NF4) quantize_base(model);
    if (more.method == METHOD_ROSA && !model->index_arena) mask_random(model, 0);       // until rosa_mask
    if (is_low_rank()) thin = floats(more.rank * max_size(2 * model->acts.N, widest));
    int both = more.method == METHOD_ROSA || *ticket_path, gated = more.init == INIT_GATED;
    model->adapter = both ? ROSA : is_low_rank() ? LORA : !is_sparse() ? NF4 : gated ? RIGSA : SPARSE;
    start_trained(model);
}

// LT-SFT (Ansell et al. 2022): of a pass that trained everything, the entries that moved furthest.
static void ltsft_mask(Model *model) {
    for (size_t a = 0; a < matrices(model); a++) {
        Tensor *delta = delta_tensor(model, a);  // gradients are done with: scores take their place
        for (size_t i = 0; i < delta->n; i++) delta->grad[i] = fabsf(delta->value[i]);
    }
    mask_largest(model, delta_tensor(model, 0)->grad, more.density, THRESHOLD_ALL);
}

// RoSA (Nikdan et al. 2024): the first updates of the pass with A and B alone, then the squares of one
// update's gradients.
static void rosa_mask(Run *run) {
    Model *model = &run->model;
    size_t batch = opt.batch, count = opt.ticket_examples, steps = more.mask_after;
    if ((steps + 1) * batch > count) die("--mask-after %zu: the last pass has fewer updates", steps);
    visit_order(run->order, &run->data, count, model->init.seed, 1);
    model->adapter = LORA;
    while (run->warm < steps) {
        size_t done = (size_t)run->warm;
        update(run, 1, done + 1, run->order + done * batch, batch);
        run->warm++;
        save_if_due(run);
        progress(run, "mask", (double)run->warm / (double)steps);
    }
    squares = floats(adapted_weights(model));
    model->adapter = SQUARES;
    loss_and_gradient(run, run->order + steps * batch, batch);
    mask_largest(model, squares, more.density, THRESHOLD_MATRIX);
    free(squares);
    model->adapter = ROSA;
    run->warm++;
}

// Before a pass, from its start or from its middle. Once there is a mask, what it keeps is trained afresh.
static void start_pass(Run *run, size_t pass) {
    Model *model = &run->model;
    int ltsft = more.method == METHOD_LTSFT && pass == 2 && !model->index_arena;
    int rosa = more.method == METHOD_ROSA && run->warm <= more.mask_after;
    if (ltsft) ltsft_mask(model);
    if (rosa) rosa_mask(run);
    if (ltsft || rosa) start_trained(model);
    if (frozen_gates()) gates_tensor(model)->grad = NULL;
}

static void finish_baseline(Run *run) {
    char path[PATH_MAX];
    Model *model = &run->model;
    if (is_sparse()) ticket_save(model, output_path("ticket.bin", path), run->settings);
    if (is_low_rank()) lora_save(model, output_path("lora.bin", path), run->settings);
    if (method.trains_base) base_save(model, output_path("model.bin", path));
    printf("\n%s: %zu values, hash %016llx\n", method.name, model->trained,
           (unsigned long long)hash64(model->value_arena, model->trained * sizeof(float)));
}

// Full fine-tuning: every weight is trained. It is how a base is made, too, and what forgetting looks like.
static void start_full(Run *run) {
    Model *model = &run->model;
    Tensor *end = model->tensors + model->base_tensors;
    trained_arenas(model, model->tensors, end);
    model->value_arena = model->base_arena;
    set_rates(model, model->tensors, end);
}

static void start_rigsa(Run *run) {
    rigsa_start(run);
    if (more.rest) run->model.adapter = RESTING;
}

// What is evaluated with the base: a ticket, the base in NF4, an adapter of low rank, or of RoSA both.
static void start_eval(Run *run) {
    if (!*more.lora && more.base_type == BASE_PLAIN) { start_ticket(run); return; }
    if (*more.lora) first_label = "lora";
    if (*ticket_path) ticket_load(&run->model, ticket_path);
    start_baseline(run);
}

#define BASELINE(name) { name, prepare_baseline, start_baseline, start_pass, NULL, finish_baseline, 0 }
static Method method_of[] = {
    { "ticket", prepare_baseline, start_rigsa, NULL, rigsa_end_pass, rigsa_finish, 0 },
    { "full", prepare_baseline, start_full, NULL, NULL, finish_baseline, 1 },
    { "eval", prepare_baseline, start_eval, NULL, NULL, NULL, 0 },
    BASELINE("lora"), BASELINE("random"), BASELINE("ltsft"), BASELINE("rosa"), BASELINE("dense") };

static const Adapter *resting = &RESTING;

static void baselines_program(Run *run, int argc, char **argv) {
    run->settings = parse_options(argc, argv);
    if (more.method != METHOD_EVAL && *ticket_path) die("--ticket goes with --method eval");
    method = method_of[more.method];
    if (more.method == METHOD_EVAL) evaluate_whole(run);
    else train_whole(run);
}

#ifndef TESTING
int main(int argc, char **argv) {
    static Run run;
    begin_program(argv);
    baselines_program(&run, argc, argv);
    return 0;
}
#endif

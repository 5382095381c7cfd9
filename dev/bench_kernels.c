// SPDX-License-Identifier: MIT
//
// bench_kernels.c: how close does each kernel of train_rigsa.c come to what this machine can do at best?
//
//     make bench                                   this and a profile of whole steps
//     dev/bench_kernels [gemm] [sampled] [attention] [rest]      only these, on 1 and OMP_NUM_THREADS threads
//     BLAS=libopenblas.so.0 dev/bench_kernels gemm               also OpenBLAS, from this library (found by
//                                                                itself if installed)
//
// A limit is the best that was seen; a kernel's time is the median over at least 0.2 s, alternately where two
// are compared. Operands are warm: what fits into the caches is in the caches.

#include "bench.h"
#include <dlfcn.h>

static Limits limits;                   // on the threads of now

static float *random_floats(size_t n) {
    float *x = floats(n);
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) x[i] = normal(1, i, 1);
    return x;
}

// -----------------------------------------------------------------------------------------------------------
// OpenBLAS, if it is there

typedef void Sgemm(int order, int a_trans, int b_trans, int M, int N, int K, float alpha, const float *a,
                   int a_next, const float *b, int b_next, float beta, float *c, int c_next);
static Sgemm *blas_sgemm;
static void (*blas_threads)(int);

// The library that $BLAS names, or the installed one. Python's packages bring one whose names begin with
// scipy_.
static void find_blas(void) {
    const char *name = getenv("BLAS") ? getenv("BLAS") : "libopenblas.so.0";
    void *library = dlopen(name, RTLD_NOW), *sgemm = NULL, *set = NULL;
    for (int scipy = 0; library && scipy < 2 && !(sgemm && set); scipy++) {
        sgemm = dlsym(library, scipy ? "scipy_cblas_sgemm" : "cblas_sgemm");
        set = dlsym(library, scipy ? "scipy_openblas_set_num_threads" : "openblas_set_num_threads");
    }
    if (sgemm && set) {
        memcpy(&blas_sgemm, &sgemm, sizeof sgemm);
        memcpy(&blas_threads, &set, sizeof set);
    } else if (getenv("BLAS")) die("%s: %s", name, library ? "no cblas_sgemm with 32-bit sizes" : dlerror());
    printf("OpenBLAS: %s\n", blas_sgemm ? name : "not found");
}

// -----------------------------------------------------------------------------------------------------------
// The three products of a linear layer

typedef struct {
    float *c;
    View a, b;
    size_t ldc, M, N, K;
} Product;

static void run_matmul(const void *job) {
    const Product *p = job;
    matmul(p->c, p->ldc, p->a, p->b, p->M, p->N, p->K, 0);
}

static void run_blas(const void *job) {
    const Product *p = job;
    enum { ROW_MAJOR = 101, AS_IS = 111, TRANSPOSED = 112 };
    blas_sgemm(ROW_MAJOR, p->a.col == 1 ? AS_IS : TRANSPOSED, p->b.col == 1 ? AS_IS : TRANSPOSED,
               (int)p->M, (int)p->N, (int)p->K, 1, p->a.at, (int)(p->a.col == 1 ? p->a.row : p->a.col),
               p->b.at, (int)(p->b.col == 1 ? p->b.row : p->b.col), 0, p->c, (int)p->ldc);
}

// Prints GFLOP/s, the share of the peak and how many times OpenBLAS's speed, for three products that took
// these seconds.
static void print_products(const char *name, double work, const double here[3], const double blas[3],
                           double peak) {
    printf("  %-26s", name);
    for (int p = 0; p < 3; p++) {
        printf("   %6.1f %3.0f %%", 1e-9 * work / here[p], 100 * work / here[p] / peak);
        if (blas_sgemm) printf(" %5.2f", blas[p] / here[p]);
    }
    printf("\n");
}

static void gemm_model(const char *model, const Config *c, size_t N, Precision of) {
    const size_t C = c->C, F = c->F, HD = (size_t)c->H * c->D, KVD = (size_t)c->KV * c->D;
    const size_t shape[ADAPTED][2] = { { HD, C }, { KVD, C }, { KVD, C }, { C, HD },
                                       { F, C }, { F, C }, { C, F } };      // (O, I)
    static const char *const KIND[ADAPTED] = { "q", "k", "v", "o", "gate", "up", "down" };
    double work = 0, here[3] = { 0 }, blas[3] = { 0 };                      // of the whole layer
    printf("\n%-5s %s, %4zu rows          y = x W^T%s        dx = dy W%s       dW = dy^T x\n", model,
           PRECISION[of], N, blas_sgemm ? "      " : "", blas_sgemm ? "      " : "");
    for (int k = 0; k < ADAPTED; k++) {
        char name[64] = "";
        size_t O = shape[k][0], I = shape[k][1], same = 0;
        for (int other = 0; other < ADAPTED; other++) {
            if (shape[other][0] != O || shape[other][1] != I) continue;
            if (other < k) { same = 0; break; }                             // this shape has been timed
            snprintf(name + strlen(name), sizeof name - strlen(name), "%s ", KIND[other]);
            same++;
        }
        if (!same) continue;
        float *x = random_floats(N * I), *w = random_floats(O * I), *dy = random_floats(N * O);
        float *y = floats(N * O), *dx = floats(N * I), *dw = floats(O * I);
        const Product product[3] = { { y, view(x, I), turned(w, I), O, N, O, I },
                                     { dx, view(dy, O), view(w, I), I, N, I, O },
                                     { dw, turned(dy, O), view(x, I), I, O, I, N } };
        double one[2][3], operations = 2.0 * (double)(N * O * I);
        for (int p = 0; p < 3; p++) {
            Timing t[2] = { { .run = run_matmul, .job = &product[p] },
                            { .run = run_blas, .job = &product[p] } };
            measure(t, blas_sgemm ? 2 : 1);
            one[0][p] = t[0].median, one[1][p] = t[1].median;
            here[p] += (double)same * one[0][p], blas[p] += (double)same * one[1][p];
        }
        work += (double)same * operations;
        snprintf(name + strlen(name), sizeof name - strlen(name), "%zu x %zu", O, I);
        print_products(name, operations, one[0], one[1], limits.flops[of]);
        free(x), free(w), free(dy), free(y), free(dx), free(dw);
    }
    print_products("all seven", work, here, blas, limits.flops[of]);
}

static void bench_gemm(void) {
    check_topics((const char *[]){ "matmul" }, 1);
    printf("\nProducts: GFLOP/s, share of the peak%s\n", blas_sgemm ? ", times OpenBLAS's speed" : "");
    for (int p = FP32; p < PRECISIONS; p++) {
        precision = (Precision)p;
        for (size_t m = 0; m < COUNT_OF(MODELS); m++)
            gemm_model(MODELS[m].name, &MODELS[m].config, MODELS[m].rows, precision);
    }
    precision = FP32;
}

// -----------------------------------------------------------------------------------------------------------
// The gradient of a sparse adapter: only the surviving entries of dy^T x

typedef struct { float *dw, *x_t; const float *x, *dy; const uint32_t *index; size_t n, O, I, N; } Sampled;

static void run_sampled(const void *job) {
    const Sampled *s = job;
    sampled_product(s->dw, s->index, s->n, s->dy, s->x, s->x_t, s->O, s->I, s->N);
}

static void bench_sampled(void) {
    static const double DENSITY[] = { 1, 0.5, 0.4, 0.25, 0.1, 0.0346, 0.01 };
    check_topics((const char *[]){ "RIGSA's weight and gradient" }, 1);
    for (int p = FP32; p < PRECISIONS; p++) {
        precision = (Precision)p;
        printf("\nSampled dW, %s: GFLOP/s on its own operations, times the dense product's speed; "
               "sampled below %.2f\n%-24s dense",
               PRECISION[precision], sampled_below(), "");
        for (size_t d = 0; d < COUNT_OF(DENSITY); d++) printf("%14g", DENSITY[d]);
        printf("\n");
        for (size_t m = 1; m < COUNT_OF(MODELS); m++) {
            size_t O = MODELS[m].config.F, I = MODELS[m].config.C, N = MODELS[m].rows, size = O * I;
            float *x = random_floats(N * I), *dy = random_floats(N * O), *dw = floats(size);
            float *x_t = floats((size_t)omp_get_max_threads() * x_t_floats(I));
            uint32_t *index = integers(size);
            Product product = { dw, turned(dy, O), view(x, I), I, O, I, N };
            for (size_t d = 0; d < COUNT_OF(DENSITY); d++) {
                Sampled s = { dw, x_t, x, dy, index, 0, O, I, N };
                for (size_t i = 0; i < size; i++)
                    if ((double)(mix(i) >> 11) * 0x1p-53 < DENSITY[d]) index[s.n++] = (uint32_t)i;
                Timing t[2] = { { .run = run_matmul, .job = &product }, { .run = run_sampled, .job = &s } };
                measure(t, 2);
                if (d == 0)
                    printf("  %s %4zu x %4zu %12.1f", MODELS[m].name, O, I,
                           2e-9 * (double)(size * N) / t[0].median);
                printf(" %6.1f x%5.2f", 2e-9 * (double)(s.n * N) / t[1].median, t[0].median / t[1].median);
                fflush(stdout);
            }
            printf("\n");
            free(x), free(dy), free(dw), free(x_t), free(index);
        }
    }
    precision = FP32;
}

// -----------------------------------------------------------------------------------------------------------
// Attention

typedef struct {
    float *out, *lse, *dq, *dk, *dv, *blocks;
    const float *q, *k, *v, *dout;
    Rows rows;
    size_t T;
} OneSequence;

static const Config *const SHAPE = &MODELS[1].config;           // 135M's heads

static Attention shape_of(const OneSequence *a) {
    return (Attention){ &a->rows, a->rows.start, a->blocks, 1, a->T, SHAPE->H, SHAPE->KV, SHAPE->D, a->T };
}

static void run_attention_forward(const void *job) {
    const OneSequence *a = job;
    const Attention attention = shape_of(a);
    attention_forward(a->out, a->lse, a->q, a->k, a->v, &attention);
}

static void run_attention_backward(const void *job) {
    const OneSequence *a = job;
    const Attention attention = shape_of(a);
    attention_backward(a->dq, a->dk, a->dv, a->dout, a->out, a->lse, a->q, a->k, a->v, &attention);
}

static void bench_attention(void) {
    size_t H = SHAPE->H, KV = SHAPE->KV, D = SHAPE->D;
    check_topics((const char *[]){ "attention" }, 1);
    printf("\nAttention of 135M, one sequence: GFLOP/s and share of the peak, "
           "on the operations that the causal mask leaves\n"
           "     T          forward         backward\n");
    for (size_t T = 128; T <= 8192; T = T == 512 ? 832 : T == 832 ? 1024 : 2 * T) {
        OneSequence a = { floats(T * H * D), floats(T * H), floats(T * H * D),
                          floats(KEY_PARTS * T * KV * D), floats(KEY_PARTS * T * KV * D),
                          floats((size_t)omp_get_max_threads() * block_floats(H / KV, T, D)),
                          random_floats(T * H * D), random_floats(T * KV * D), random_floats(T * KV * D),
                          random_floats(T * H * D), { T, NULL, integers(2), integers(T) }, T };
        for (size_t t = 0; t < T; t++) a.rows.position[t] = (uint32_t)t;
        a.rows.start[1] = (uint32_t)T;
        Timing forward = { run_attention_forward, &a, 0, 0 }, backward = { run_attention_backward, &a, 0, 0 };
        measure(&forward, 1);
        measure(&backward, 1);
        double product = (double)(H * D * T * (T + 1));
        double done[2] = { 2 * product / forward.median, 5 * product / backward.median };
        printf("%6zu", T);
        for (int i = 0; i < 2; i++)
            printf("   %7.1f %3.0f %%", 1e-9 * done[i], 100 * done[i] / limits.flops[FP32]);
        printf("\n");
        float *all[] = { a.out, a.lse, a.dq, a.dk, a.dv, a.blocks, (float *)a.q, (float *)a.k, (float *)a.v,
                         (float *)a.dout };
        for (size_t i = 0; i < COUNT_OF(all); i++) free(all[i]);
        free(a.rows.start), free(a.rows.position);
    }
}

// -----------------------------------------------------------------------------------------------------------
// Everything that is limited by memory: rows of a layer of 135M at 1664 rows, a matrix of it, and
// 16 M parameters for AdamW

enum { ADAM_N = 1 << 24 };
static struct {
    size_t N, C, F, H, D;
    float *a, *b, *c, *d, *e, *rstd, *cosine, *sine;
    uint32_t *position;
    Model *dense, *sparse;
} on_rows;

static void run_adamw(const void *job) {
    (void)job;
    adamw(on_rows.a, on_rows.c, on_rows.d, on_rows.b, 0, 1e-3f, 1, 1, 10, ADAM_N);
}

static void run_rmsnorm_forward(const void *job) {
    (void)job;
    rmsnorm_forward(on_rows.a, on_rows.rstd, on_rows.b, on_rows.c, 1e-5f, on_rows.N, on_rows.C);
}

static void run_rmsnorm_backward(const void *job) {
    (void)job;
    rmsnorm_backward(on_rows.a, NULL, on_rows.b, on_rows.d, on_rows.c, on_rows.rstd, on_rows.N, on_rows.C);
}

static void run_rope(const void *job) {
    (void)job;
    rope(on_rows.a, on_rows.cosine, on_rows.sine, on_rows.position, 1, on_rows.N, on_rows.H, on_rows.D);
}

static void run_swiglu_forward(const void *job) {
    (void)job;
    swiglu_forward(on_rows.a, on_rows.b, on_rows.c, on_rows.N * on_rows.F);
}

static void run_swiglu_backward(const void *job) {
    (void)job;
    swiglu_backward(on_rows.a, on_rows.b, on_rows.c, on_rows.d, on_rows.e, on_rows.N * on_rows.F);
}

static void run_weight(const void *job) {
    Model *model = (Model *)job;
    model->adapter.weight(model, layer_tensor(model, 0, WGATE));
}

static void bench_rest(void) {
    check_topics((const char *[]){ "rmsnorm", "rope", "swiglu", "PyTorch: ten steps of AdamW" }, 4);
    size_t N = MODELS[1].rows, C = SHAPE->C, F = SHAPE->F, H = SHAPE->H, D = SHAPE->D;
    const double density = 0.0346;
    float **arrays[] = { &on_rows.a, &on_rows.b, &on_rows.c, &on_rows.d, &on_rows.e };
    Config one_layer = *SHAPE;
    one_layer.L = 1;
    one_layer.V = 2;
    on_rows.N = N, on_rows.C = C, on_rows.F = F, on_rows.H = H, on_rows.D = D;
    for (int i = 0; i < 5; i++) *arrays[i] = random_floats(ADAM_N);
    for (size_t i = 0; i < ADAM_N; i++) on_rows.d[i] = fabsf(on_rows.d[i]);
    on_rows.rstd = random_floats(N);
    on_rows.cosine = floats(N * D / 2), on_rows.sine = floats(N * D / 2), on_rows.position = integers(N);
    rope_table(on_rows.cosine, on_rows.sine, N, D, SHAPE->theta);
    for (size_t n = 0; n < N; n++) on_rows.position[n] = (uint32_t)n;
    on_rows.dense = &rig_make(one_layer, &(Shape){ 2, 1 }, 1)->model;
    on_rows.sparse = &rig_make(one_layer, &(Shape){ 2, 1 }, 1)->model;
    random_adapter(on_rows.dense, 1);
    random_adapter(on_rows.sparse, density);

    const struct { const char *name; void (*run)(const void *); const void *job; double bytes; } kernels[] = {
        { "AdamW, 16 M values", run_adamw, NULL, 28.0 * ADAM_N },
        { "rmsnorm forward", run_rmsnorm_forward, NULL, 8.0 * (double)(N * C) },
        { "rmsnorm backward", run_rmsnorm_backward, NULL, 16.0 * (double)(N * C) },
        { "rope of q", run_rope, NULL, 8.0 * (double)(N * H * D) },
        { "swiglu forward", run_swiglu_forward, NULL, 12.0 * (double)(N * F) },
        { "swiglu backward", run_swiglu_backward, NULL, 20.0 * (double)(N * F) },
        { "W of gate, dense", run_weight, on_rows.dense, 12.0 * (double)(F * C) },
        { "W of gate, 3.46 %", run_weight, on_rows.sparse, (8 + 8 * density) * (double)(F * C) } };
    printf("\nThe rest, 135M at %zu rows: GB/s, share of an update in place "
           "(more than 100 %%: it was in the caches), time\n", N);
    for (size_t k = 0; k < COUNT_OF(kernels); k++) {
        Timing t = { kernels[k].run, kernels[k].job, 0, 0 };
        measure(&t, 1);
        printf("  %-20s %6.1f %4.0f %% %9.3f ms\n", kernels[k].name, 1e-9 * kernels[k].bytes / t.median,
               100 * kernels[k].bytes / t.median / limits.update, 1e3 * t.median);
    }
    for (int i = 0; i < 5; i++) free(*arrays[i]);
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); } sections[] = {
        { "gemm", bench_gemm }, { "sampled", bench_sampled }, { "attention", bench_attention },
        { "rest", bench_rest } };
    begin_program(argv);
    int threads = omp_get_max_threads();
    for (int i = 1; i < argc; i++) {
        size_t s = 0;
        while (s < COUNT_OF(sections) && strcmp(sections[s].name, argv[i])) s++;
        if (s == COUNT_OF(sections)) die("`%s` is none of gemm, sampled, attention, rest", argv[i]);
    }
    find_blas();
    for (int t = 1; t <= threads; t = t == threads ? t + 1 : threads) {
        printf("\n");
        limits = measure_limits(t);
        if (blas_threads) blas_threads(t);
        for (size_t s = 0; s < COUNT_OF(sections); s++) {
            int chosen = argc == 1;
            for (int i = 1; i < argc; i++) chosen |= !strcmp(sections[s].name, argv[i]);
            if (chosen) sections[s].run();
        }
    }
    return 0;
}

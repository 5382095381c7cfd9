// SPDX-License-Identifier: MIT
//
// bench.h: what the benchmarks share: the limits of this machine, how a time is taken, the models, and
// test_rigsa.c with all of train_rigsa.c in it, whose tests say that what is about to be timed is right.

#define main test_main
#include "../test_rigsa.c"
#undef main

static const int PRECISIONS = 2;
static const char *const PRECISION[] = { "fp32", "bf16" };

// -----------------------------------------------------------------------------------------------------------
// Models

// rows: of the products that are timed
static const struct { const char *name; Config config; size_t rows; } MODELS[] = {
    { "nano", { .C = 96, .F = 224, .L = 3, .H = 4, .KV = 2, .D = 24, .V = 48, .context = 256, .tied = 1,
                .theta = 1e4f, .eps = 1e-5f }, 1024 },
    { "135M", { .C = 576, .F = 1536, .L = 30, .H = 9, .KV = 3, .D = 64, .V = 49152, .context = 8192,
                .tied = 1, .theta = 1e5f, .eps = 1e-5f }, 1664 },
    { "360M", { .C = 960, .F = 2560, .L = 32, .H = 15, .KV = 5, .D = 64, .V = 49152, .context = 8192,
                .tied = 1, .theta = 1e5f, .eps = 1e-5f }, 1664 },
    { "1.7B", { .C = 2048, .F = 8192, .L = 24, .H = 32, .KV = 32, .D = 64, .V = 49152, .context = 8192,
                .tied = 1, .theta = 1.3e5f, .eps = 1e-5f }, 832 } };

// The adapter of RIGSA in which each entry survives with probability `density`, at random; its dense form
// never exists.
static void random_adapter(Model *model, double density) {
    size_t count = matrices(model), n = 0;
    if (density >= 1) { adapter_alloc(model); return; }
    for (int fill = 0; fill < 2; fill++) {              // first count, then write
        size_t at = 0;
        if (fill) model->index_arena = integers(n), model->value_arena = floats(n + count);
        for (size_t a = 0; a < count; a++) {
            Tensor *delta = delta_tensor(model, a);
            uint64_t key = random_key(1, 2, a, 3);
            size_t from = at;
            for (size_t i = 0; i < delta->rows * delta->cols; i++)
                if ((double)(mix(key + i * GOLDEN) >> 11) * 0x1p-53 < density) {
                    if (fill) model->index_arena[at] = (uint32_t)i;
                    at++;
                }
            delta->n = at - from;
            if (!fill) continue;
            delta->index = model->index_arena + from;
            delta->value = model->value_arena + from;
        }
        n = at;
    }
    gates_tensor(model)->value = model->value_arena + n;
    trained_arenas(model, delta_tensor(model, 0), gates_tensor(model) + 1);
    rewind_adapter(model);
    model->adapter = RIGSA;
}

// -----------------------------------------------------------------------------------------------------------
// Correct first, then fast

// Runs these topics of test_rigsa.c; what fails a test is not timed.
static void check_topics(const char *const *names, size_t count) {
    static const char *const fixture = "dev/fixture.bin";
    dumps = &fixture, dump_count = 1;
    for (size_t i = 0; i < count; i++) {
        size_t t = 0;
        while (t < COUNT_OF(topics) && strcmp(topics[t].name, names[i])) t++;
        if (t == COUNT_OF(topics)) die("test_rigsa.c has no topic `%s`", names[i]);
        draws = 0;
        topics[t].run();
    }
    if (failed) die("%d of the tests failed: nothing is timed", failed);
}

// -----------------------------------------------------------------------------------------------------------
// Times

typedef struct {
    void (*run)(const void *job);
    const void *job;
    double median, least;               // seconds of one call
} Timing;

enum { ROUNDS = 3, MOST_CALLS = 1000 };
static const double ROUND_SECONDS = 0.07, ENOUGH_SECONDS = 2;

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Times up to two jobs alternately, in ROUNDS rounds of ROUND_SECONDS or one call each; less only of calls
// that take seconds. Before a job's turn all threads of the other one get the time to fall asleep (OpenBLAS's
// spin for 26 ms), and its own to find cores of their own: a thread that wakes up may share one with another
// for 30 ms.
static void measure(Timing *timing, size_t count) {
    static double taken[2][ROUNDS * MOST_CALLS];
    size_t calls[2] = { 0 };
    double all[2] = { 0 };
    for (int round = 0; round < ROUNDS; round++)
        for (size_t t = 0; t < count; t++) {
            if (all[t] > ENOUGH_SECONDS) continue;
            if (count > 1) {
                nanosleep(&(struct timespec){ .tv_nsec = 40000000 }, NULL);
                for (double woken = seconds(); seconds() < woken + 0.05; ) timing[t].run(timing[t].job);
            }
            double begin = seconds(), last = begin;
            for (int i = 0; i < MOST_CALLS && (i == 0 || last - begin < ROUND_SECONDS); i++) {
                timing[t].run(timing[t].job);
                double now = seconds();
                taken[t][calls[t]++] = now - last;
                last = now;
            }
            all[t] += last - begin;
        }
    for (size_t t = 0; t < count; t++) {
        qsort(taken[t], calls[t], sizeof(double), by_size);
        timing[t].least = taken[t][0];
        timing[t].median = taken[t][calls[t] / 2];
    }
}

// -----------------------------------------------------------------------------------------------------------
// Limits: what this machine can do at best, on `threads` threads

typedef struct {
    double flops[2];                    // operations/s by Precision
    double read, copy, update;          // bytes/s, of both directions
} Limits;

// Registers of multiply-adds that do not wait for each other: enough to hide the latency (4 or 5 cycles, 2 a
// cycle).
enum { CHAINS = 12, LINKS = 20000 };
static volatile float factor = 0.999f, addend = 0.001f, sink;

static inline __attribute__((always_inline)) void multiply_chains(MultiplyAdd *madd) {
    vec x = broadcast(factor), y = broadcast(addend), sum[CHAINS];
    for (int i = 0; i < CHAINS; i++) sum[i] = y * (float)i;
    for (int n = 0; n < LINKS; n++)
        #pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sum[i] = madd(sum[i], x, y);
    for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];
    sink = sum[0][0];
}

// The function is named inside the parallel region: handed in from outside, it would be called, not inlined.
static void fp32_loop(const void *job) {
    (void)job;
    #pragma omp parallel
    multiply_chains(multiply_add);
}

#ifdef PAIRS_OF_BF16
static void bf16_loop(const void *job) {
    (void)job;
    #pragma omp parallel
    multiply_chains(multiply_pairs);
}
#endif

#ifdef AMX_OF_BF16
enum { AMX_LANES = 96, AMX_CALLS = 1000 };      // operands that stay in L1
static void amx_loop(const void *job) {
    (void)job;
    #pragma omp parallel
    {
        float *a = floats(AMX_ROWS * AMX_LANES), *b = floats(NR * AMX_LANES), *c = floats(AMX_ROWS * NR);
        amx_begin();
        for (int n = 0; n < AMX_CALLS; n++) tile_amx(c, NR, view(a, 0), b, AMX_LANES, AMX_ROWS, NR, 0);
        free(a), free(b), free(c);
    }
}
#endif

enum { STREAM = 1 << 25 };              // floats: 128 MiB, more than caches hold

static void read_loop(const void *job) {
    const vec *x = job;
    enum { VECTORS = STREAM / LANES / PARTS };
    #pragma omp parallel for
    for (size_t p = 0; p < PARTS; p++) {
        vec sum[4] = { { 0 } };
        for (size_t i = p * VECTORS; i < (p + 1) * VECTORS; i += 4)
            for (size_t j = 0; j < 4; j++) sum[j] += x[i + j];
        sink = (sum[0] + sum[1] + sum[2] + sum[3])[0];
    }
}

static void copy_loop(const void *job) {
    float *x = (float *)job;
    #pragma omp parallel for
    for (size_t p = 0; p < PARTS; p++)
        memcpy(x + STREAM + STREAM / PARTS * p, x + STREAM / PARTS * p, STREAM / PARTS * 4);
}

static void update_loop(const void *job) {
    float *x = (float *)job, c = factor;
    #pragma omp parallel for simd
    for (size_t i = 0; i < STREAM; i++) x[i] *= c;
}

static double least_seconds(void (*run)(const void *), const void *job) {
    Timing t = { run, job, 0, 0 };
    measure(&t, 1);
    return t.least;
}

static Limits measure_limits(int threads) {
    Limits limits;
    omp_set_num_threads(threads);
    double operations = 2.0 * LANES * CHAINS * LINKS * threads, bytes = 4.0 * STREAM;
    limits.flops[0] = operations / least_seconds(fp32_loop, NULL);
    limits.flops[1] = limits.flops[0];                  // rounded operands, multiplied in fp32
#ifdef PAIRS_OF_BF16
    limits.flops[1] = 2 * operations / least_seconds(bf16_loop, NULL);
#endif
#ifdef AMX_OF_BF16
    if (amx_begin())
        limits.flops[1] = 4.0 * AMX_ROWS * NR * AMX_LANES * AMX_CALLS * threads
                          / least_seconds(amx_loop, NULL);
#endif
    float *x = floats(2 * (size_t)STREAM);
    limits.read = bytes / least_seconds(read_loop, x);
    limits.copy = 2 * bytes / least_seconds(copy_loop, x);
    limits.update = 2 * bytes / least_seconds(update_loop, x);
    free(x);
    printf("%d thread%s at best: fp32 %.1f GFLOP/s, bf16 %.1f%s", threads, threads > 1 ? "s" : "",
           1e-9 * limits.flops[0], 1e-9 * limits.flops[1],
           limits.flops[1] == limits.flops[0] ? " (no instruction for it: rounded, multiplied in fp32)" : "");
    printf("; memory: read %.1f GB/s, copy %.1f, update in place %.1f\n", 1e-9 * limits.read,
           1e-9 * limits.copy, 1e-9 * limits.update);
    return limits;
}

// SPDX-License-Identifier: MIT
//
// bench_step.c: how long does a whole training step take, and where does the time go?
//
//     dev/bench_step                        SmolLM2-135M, 2 x 832 tokens, dense: a profile by parts
//     dev/bench_step --model 360M --density 0.0346
//     dev/bench_step --steps 0              for other programs: prints the config, in the order of the file
//                                           (doc/model.md); then one step for each line of input, and one
//                                           line for each step: seconds, the most bytes that were resident
//                                           so far, the loss
//
// The model is random and lives in memory; the loss is on the last token of each sequence. train_rigsa.c has
// no timers and needs none: here its own calls go through the macros below.

// The part of a step that a function's own time counts for. What it calls may count for another part.
enum part {
    IN_Y, IN_DX, IN_DW, IN_HEAD, IN_ATTENTION, IN_WEIGHT, IN_GRADIENT, IN_SMALL, IN_UPDATE, IN_REST,
    STEP_PARTS,
    IN_PRODUCT          // counts for the part that asked for it, but the gradient's counts as IN_DW
};
static void enter(enum part part);
static void leave(double work);
static double seen_keys(const void *attention);

// A macro cannot tell the definition matmul(float *c, ...) from the call matmul(y, ...), but their first word
// can: with TYPE_ before it the name of a type is a comma, which pushes DEFINITION to the third place. Calls
// go between enter and leave.
#define TYPE_float ,
#define TYPE_Model ,
#define FIRST_WORD(first, ...) TYPE_##first
#define THIRD(one, two, three, ...) three
#define SELECT(...) THIRD(__VA_ARGS__)
#define DEFINITION(part, work, name, ...) name(__VA_ARGS__)
#define CALL(part, work, name, ...) ({ enter(part); name(__VA_ARGS__); leave(work); })
#define TIMED(part, work, name, ...) \
    SELECT(FIRST_WORD(__VA_ARGS__), DEFINITION, CALL, )(part, work, name, __VA_ARGS__)

// Work: the operations of products, the bytes that everything else moves.
#define PRODUCT_WORK(c, ldc, a, b, M, N, K, add) 2.0 * (double)((M) * (N) * (K))
#define SAMPLED_WORK(dw, index, n, dy, x, x_t, O, I, N) 2.0 * (double)((n) * (N))
#define FORWARD_WORK(model, y, t, x, N, add) 2.0 * (double)((t)->n * (N))
#define BACKWARD_WORK(model, dx, t, x, dy, N, add) 2.0 * (double)((t)->n * (N))
#define ATTENTION_WORK(out, lse, q, k, v, a) 4.0 * seen_keys(a)
#define ATTENTION_BACKWARD_WORK(dq, dk, dv, dout, out, lse, q, k, v, a) 10.0 * seen_keys(a)
#define NORM_WORK(out, rstd, x, w, eps, N, C) 8.0 * (double)((N) * (C))
#define NORM_BACKWARD_WORK(dx, dw, dy, x, w, rstd, N, C) 16.0 * (double)((N) * (C))
#define ROPE_WORK(x, cosine, sine, position, direction, N, heads, D) 8.0 * (double)((N) * (heads) * (D))
#define SWIGLU_WORK(h, gate, up, n) 12.0 * (double)(n)
#define SWIGLU_BACKWARD_WORK(dgate, dup, dh, gate, up, n) 20.0 * (double)(n)

#define matmul(...) TIMED(IN_PRODUCT, PRODUCT_WORK(__VA_ARGS__), matmul, __VA_ARGS__)
#define sampled_product(...) TIMED(IN_PRODUCT, SAMPLED_WORK(__VA_ARGS__), sampled_product, __VA_ARGS__)
#define linear_forward(...) TIMED(IN_Y, FORWARD_WORK(__VA_ARGS__), linear_forward, __VA_ARGS__)
#define linear_backward(...) TIMED(IN_DX, BACKWARD_WORK(__VA_ARGS__), linear_backward, __VA_ARGS__)
#define attention_forward(...) \
    TIMED(IN_ATTENTION, ATTENTION_WORK(__VA_ARGS__), attention_forward, __VA_ARGS__)
#define attention_backward(...) \
    TIMED(IN_ATTENTION, ATTENTION_BACKWARD_WORK(__VA_ARGS__), attention_backward, __VA_ARGS__)
#define rmsnorm_forward(...) TIMED(IN_SMALL, NORM_WORK(__VA_ARGS__), rmsnorm_forward, __VA_ARGS__)
#define rmsnorm_backward(...) TIMED(IN_SMALL, NORM_BACKWARD_WORK(__VA_ARGS__), rmsnorm_backward, __VA_ARGS__)
#define rope(...) TIMED(IN_SMALL, ROPE_WORK(__VA_ARGS__), rope, __VA_ARGS__)
#define swiglu_forward(...) TIMED(IN_SMALL, SWIGLU_WORK(__VA_ARGS__), swiglu_forward, __VA_ARGS__)
#define swiglu_backward(...) TIMED(IN_SMALL, SWIGLU_BACKWARD_WORK(__VA_ARGS__), swiglu_backward, __VA_ARGS__)

#include "bench.h"

// -----------------------------------------------------------------------------------------------------------
// The clock

static double part_seconds[STEP_PARTS], part_work[STEP_PARTS], since;
static enum part stack[8] = { IN_REST };
static int depth;

// by all queries together, times H D
static double seen_keys(const void *attention) {
    const Attention *a = attention;
    double keys = 0;
    for (size_t r = 0; r < a->query->n; r++) keys += a->query->position[r] + 1;
    return keys * (double)(a->H * a->D);
}

// the time since the last change belongs to the part that runs
static void charge(void) {
    double now = seconds();
    part_seconds[stack[depth]] += now - since;
    since = now;
}

static void enter(enum part part) {
    if (omp_get_thread_num()) return;
    charge();
    enum part from = stack[depth];
    stack[++depth] = part != IN_PRODUCT ? part : from == IN_GRADIENT ? IN_DW : from;
}

static void leave(double work) {
    if (omp_get_thread_num()) return;
    charge();
    if (stack[depth] != stack[depth - 1]) part_work[stack[depth]] += work;
    depth--;
}

static const float *timed_weight(Model *model, Tensor *t) {
    const Tensor *delta = delta_tensor(model, (size_t)t->adapter);
    enter(IN_WEIGHT);
    const float *w = RIGSA.weight(model, t);
    size_t frozen_bytes = (t->bf16 ? 2 : 4) * t->n;
    leave((double)(frozen_bytes + (delta->index ? 4 * t->n + 16 * delta->n : 8 * t->n)));
    return w;
}

static void timed_gradient(Model *model, Tensor *t, const float *x, const float *dy, size_t N) {
    enter(IN_GRADIENT);
    RIGSA.gradient(model, t, x, dy, N);
    leave(16.0 * (double)delta_tensor(model, (size_t)t->adapter)->n);
}

// -----------------------------------------------------------------------------------------------------------
// Steps

static struct { int model, precision; size_t tokens, sequences, steps; double density; } want;

static const Option options[] = {
    { "model", CHOICE, &want.model, "nano|135M|360M|1.7B", "135M", "of this shape" },
    { "precision", CHOICE, &want.precision, "fp32|bf16", "fp32", "of the products and of what is kept" },
    { "tokens", COUNT, &want.tokens, "2 to 1e6", "832", "of a sequence" },
    { "sequences", COUNT, &want.sequences, "1 to 1e6", "2", "of a step" },
    { "density", REAL, &want.density, "0 to 1", "1", "of a random mask; 1: dense" },
    { "steps", COUNT, &want.steps, "0 to 1e6", "3",
      "that are timed, after one that warms up; 0: one for each line of input" } };

static void read_options(int argc, char **argv) {
    for (size_t i = 0; i < COUNT_OF(options); i++) option_set(&options[i], strdup(options[i].start), 0);
    for (int i = 1; i < argc; i += 2) {
        size_t o = 0;
        while (o < COUNT_OF(options) && (strncmp(argv[i], "--", 2) || strcmp(options[o].name, argv[i] + 2)))
            o++;
        if (o < COUNT_OF(options) && i + 1 < argc) { option_set(&options[o], argv[i + 1], 0); continue; }
        printf("Times a training step of a random model.\n\n");
        for (const Option *p = options; p < options + COUNT_OF(options); p++)
            printf("  --%s %s\n        %s (default %s)\n", p->name, p->range, p->help, p->start);
        exit(strcmp(argv[i], "--help") != 0);
    }
}

static double loss;                     // of the last step

static double one_step(Run *run, size_t t) {
    Model *model = &run->model;
    const Config *c = &model->config;
    size_t M = run->batch.answer.n, trained = adapter_entries(model);
    double begin = since = seconds();
    enter(IN_UPDATE);
    model_zero_grad(model);
    leave(4.0 * (double)trained);
    model_forward(model, &run->batch);
    enter(IN_HEAD);
    loss = head_forward_backward(model, &run->batch, 1.0f / (float)M) / (double)M;
    leave(4.0 * (double)(M * c->C * c->V));
    model_backward(model, &run->batch);
    enter(IN_UPDATE);
    model_update(model, t, 1);
    leave(32.0 * (double)trained);
    charge();
    if (!isfinite(loss)) die("the loss of step %zu is not finite", t);
    return seconds() - begin;
}

// bytes: the most that was resident so far
static double peak_memory(void) {
    char line[256];
    double kilobytes = NAN;
    struct rusage used;
    FILE *f = fopen("/proc/self/status", "r");
    if (!f && !getrusage(RUSAGE_SELF, &used)) return (double)used.ru_maxrss;      // a Mac: bytes
    while (f && fgets(line, sizeof line, f)) sscanf(line, "VmHWM: %lf", &kilobytes);
    if (f) fclose(f);
    return 1024 * kilobytes;
}

static void print_profile(double step, size_t steps, const Limits *limits) {
    static const struct { const char *name; int product; } row[STEP_PARTS] = {
        [IN_Y] = { "y = x W^T", 1 }, [IN_DX] = { "dx = dy W", 1 }, [IN_DW] = { "dW = dy^T x", 1 },
        [IN_HEAD] = { "head and loss", 1 }, [IN_ATTENTION] = { "attention", 1 },
        [IN_WEIGHT] = { "forming W", 0 }, [IN_GRADIENT] = { "dW into the gradient", 0 },
        [IN_SMALL] = { "norms, rope, swiglu", 0 }, [IN_UPDATE] = { "AdamW, norm, zeroing", 0 },
        [IN_REST] = { "copies and the rest", 0 } };
    double operations = 0, peak = limits->flops[want.precision];
    printf("\n%-22s        ms   share       speed   of the limit\n", "");
    for (int p = 0; p < STEP_PARTS; p++) {
        double s = part_seconds[p] / (double)steps, speed = part_work[p] / part_seconds[p];
        printf("%-22s %9.2f  %4.1f %%", row[p].name, 1e3 * s, 100 * s / step);
        if (row[p].product) operations += part_work[p] / (double)steps;
        if (part_work[p] > 0)
            printf("   %6.1f %-7s %3.0f %%", 1e-9 * speed, row[p].product ? "GFLOP/s" : "GB/s",
                   100 * speed / (row[p].product ? peak : limits->update));
        printf("\n");
    }
    printf("%-22s %9.2f           %6.1f GFLOP/s %3.0f %%: %.2f ms with all products at the peak "
           "and nothing else\n", "a step", 1e3 * step, 1e-9 * operations / step,
           100 * operations / step / peak, 1e3 * operations / peak);
}

int main(int argc, char **argv) {
    begin_program(argv);
    read_options(argc, argv);
    check_topics((const char *[]){ "the whole loss, along random directions" }, 1);
    size_t S = want.sequences, steps = want.steps, t = 1;
    uint32_t T = (uint32_t)want.tokens;
    Shape *shape = allocate(S, sizeof(Shape));
    for (size_t s = 0; s < S; s++) shape[s] = (Shape){ T, T - 1 };
    precision = (Precision)want.precision;
    Run *run = rig_make(MODELS[want.model].config, shape, S);
    Model *model = &run->model;
    if (precision == BF16) halve_base(model);
    model->init.sigma = 0.06f;
    random_adapter(model, want.density);
    for (size_t a = 0; a < matrices(model); a++)
        delta_tensor(model, a)->lr = 0.003f, delta_tensor(model, a)->decay = 1;
    gates_tensor(model)->lr = 0.007f;
    model->adapter = (Adapter){ timed_weight, timed_gradient };

    one_step(run, t++);
    if (steps == 0) {
        char line[256];
        const Config *c = &model->config;
        printf("%u %u %u %u %u %u %u %u %u %u %.9g %.9g\n", c->C, c->F, c->L, c->H, c->KV, c->D, c->V,
               c->context, c->tied, c->dtype, c->theta, c->eps);
        while (fgets(line, sizeof line, stdin)) {
            double s = one_step(run, t++);
            printf("%.4f %.0f %.4f\n", s, peak_memory(), loss);
        }
        return 0;
    }
    memset(part_seconds, 0, sizeof part_seconds);
    memset(part_work, 0, sizeof part_work);
    double *took = allocate(steps, sizeof(double)), sum = 0;
    for (size_t i = 0; i < steps; i++) sum += took[i] = one_step(run, t++);
    qsort(took, steps, sizeof(double), by_size);
    double memory = peak_memory();
    printf("%s, %zu x %u tokens, density %g, %s: %.3f s a step (median of %zu), at most %.2f GB, loss %.4f\n",
           MODELS[want.model].name, S, T, want.density, PRECISION[want.precision], took[steps / 2], steps,
           1e-9 * memory, loss);
    Limits limits = measure_limits(omp_get_max_threads());
    print_profile(sum / (double)steps, steps, &limits);
    return 0;
}

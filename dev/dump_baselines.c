// SPDX-License-Identifier: MIT
//
// dump_baselines.c: what baselines.c computes at random values of everything that is trained, for
// test_baselines.py to judge.
//
//     ./dump_baselines --method M --base FILE --data FILE --eval FILE --out FOLDER
//
// writes FOLDER/dump.bin: `entries` and `index`, the mask as in a ticket; `values`, every row of the table
// after the base's, end to end; `gradients`, of the mean loss over all examples, likewise (but none of gates
// that are frozen); `loss`. With --method rigsa all of it after its passes, at the mask that they left, and
// `initial`, what every entry of every DeltaW began as. With --base-type nf4 of all matrices, end to end:
// `code`, `scale`, `scale_scale`, `mean`, and `expanded`, the weights that they stand for.

#define TESTING
#include "baselines.c"

enum { ENTRIES, INDEX, VALUES, GRADIENTS, MEAN_LOSS, INITIAL, CODE, SCALE, SCALE_SCALE, MEAN,
    EXPANDED, SECTIONS };
static const char *const TAG[SECTIONS] =
    { "entries", "index", "values", "gradients", "loss", "initial", "code", "scale", "scale_scale",
        "mean", "expanded" };
static char *data[SECTIONS];
static size_t length[SECTIONS];

static void append(int section, const void *from, size_t count, size_t size) {
    data[section] = realloc(data[section], length[section] + count * size + 1);
    memcpy(data[section] + length[section], from, count * size);
    length[section] += count * size;
}

static void dump(Run *run) {
    Model *model = &run->model;
    Section sections[SECTIONS];
    char path[PATH_MAX];
    if (more.method == METHOD_ROSA) mask_random(model, more.density);
    if (more.method != METHOD_RIGSA) start_baseline(run);
    for (size_t i = model->base_tensors; i < model->all_tensors; i++) {
        Tensor *t = &model->tensors[i];
        for (size_t k = 0; t->grad && k < t->n; k++) t->value[k] = normal(random_key(7, 7, i, 0), k, 0.3f);
    }
    visit_order(run->order, &run->data, run->data.examples, 1, 1);
    double loss = loss_and_gradient(run, run->order, run->data.examples);
    append(MEAN_LOSS, &loss, 1, sizeof loss);
    for (size_t i = model->base_tensors; i < model->all_tensors; i++) {
        const Tensor *t = &model->tensors[i];
        append(VALUES, t->value, t->n, sizeof(float));
        if (t->grad) append(GRADIENTS, t->grad, t->n, sizeof(float));
    }
    for (size_t a = 0; (is_sparse() || more.method == METHOD_RIGSA) && a < matrices(model); a++) {
        const Tensor *delta = delta_tensor(model, a);
        uint64_t entries = delta->n;
        append(ENTRIES, &entries, 1, sizeof entries);
        if (delta->index) append(INDEX, delta->index, entries, sizeof(uint32_t));
        for (size_t i = 0; more.method == METHOD_RIGSA && i < delta->rows * delta->cols; i++) {
            float value = normal(delta_key(model, a), i, model->init.sigma);
            append(INITIAL, &value, 1, sizeof value);
        }
    }
    for (const Tensor *t = model->tensors; nf4 && t < model->tensors + model->base_tensors; t++) {
        if (t->adapter < 0) continue;
        const Nf4 *q = &nf4[t->adapter];
        size_t blocks = blocks_of(t->n, NF4_BLOCK);
        nf4_expand(model->scratch, q, t->n);
        append(CODE, q->code, (t->n + 1) / 2, 1);
        append(SCALE, q->scale, blocks, 1);
        append(SCALE_SCALE, q->scale_scale, blocks_of(blocks, SCALE_BLOCK), sizeof(float));
        append(MEAN, &q->mean, 1, sizeof(float));
        append(EXPANDED, model->scratch, t->n, sizeof(float));
    }
    for (int i = 0; i < SECTIONS; i++) sections[i] = (Section){ TAG[i], data[i] ? data[i] : "", length[i] };
    snprintf(path, sizeof path, "%s/dump.bin", opt.out);
    must_write(path, file_write(path, "dump", sections, SECTIONS));
    exit(0);
}

int main(int argc, char **argv) {
    static Run run;
    begin_program(argv);
    for (int m = METHOD_LORA; m <= METHOD_DENSE; m++) method_of[m].start = dump;    // no pass is trained
    method_of[METHOD_EVAL].start = dump;
    method_of[METHOD_RIGSA].finish = dump;
    baselines_program(&run, argc, argv);
    return 0;
}

// SPDX-License-Identifier: MIT
//
// dump_baselines.c: what baselines.c computes at random values of everything that is trained, for test_baselines.py to judge.
//
//     ./dump_baselines --method M --base FILE --data FILE --eval FILE --out FILE
//
// writes a `dump` file: `entries` and `index`, the mask as in a ticket; `values`, every row of the table after the base's, end to
// end; `gradients`, of the mean loss over all examples, likewise (but none of a gate that is frozen); `loss`; and with --base-type
// nf4 of all matrices, end to end: `code`, `scale`, `scale_scale`, `mean`, and `expanded`, the weights that they stand for.

#define TESTING
#include "baselines.c"

static void append(FILE *to, const void *data, size_t count, size_t size)
{
    if (fwrite(data, size, count, to) != count) die("out of memory");
}

int main(int argc, char **argv)
{
    static Run run;
    static char *text[10];
    static size_t length[10];
    static const char *const TAG[10] =
        { "entries", "index", "values", "gradients", "loss", "code", "scale", "scale_scale", "mean", "expanded" };
    Model *model = &run.model;
    FILE *to[10];
    Section sections[10];
    for (int i = 0; i < 10; i++) to[i] = open_memstream(&text[i], &length[i]);
    parse_options(argc, argv);
    File base = base_open(model, opt.base);
    load_data(&run);
    opt.micro = opt.batch = (double)run.data.examples;
    prepare_baseline(&run);
    plan(&run);
    base_read(model, &base);
    if (opt.method == METHOD_ROSA) mask_random(model, more.density);
    start_baseline(model);
    model->adapter = opt.method == METHOD_LORA ? LORA : opt.method == METHOD_ROSA ? ROSA : more.init == INIT_GATED ? RIGSA : SPARSE;
    for (size_t i = model->base_tensors; i < model->all_tensors; i++) {
        Tensor *t = &model->tensors[i];
        for (size_t k = 0; t->grad && k < t->n; k++) t->value[k] = normal(random_key(7, 7, i, 0), k, 0.3f);
    }
    uint32_t *order = visit_order(&run.data, run.data.examples, 1, 1);
    double loss = loss_and_gradient(&run, order, run.data.examples);
    append(to[4], &loss, 1, sizeof loss);
    for (size_t i = model->base_tensors; i < model->all_tensors; i++) {
        const Tensor *t = &model->tensors[i];
        append(to[2], t->value, t->n, sizeof(float));
        if (t->grad) append(to[3], t->grad, t->n, sizeof(float));
    }
    for (size_t a = 0; is_sparse() && a < matrices(model); a++) {
        uint64_t entries = delta_tensor(model, a)->n;
        append(to[0], &entries, 1, sizeof entries);
        if (delta_tensor(model, a)->index) append(to[1], delta_tensor(model, a)->index, entries, sizeof(uint32_t));
    }
    for (Tensor *t = model->tensors; nf4 && t < model->tensors + model->base_tensors; t++) {
        if (t->adapter < 0) continue;
        const Nf4 *q = &nf4[t->adapter];
        size_t blocks = blocks_of(t->n, NF4_BLOCK);
        nf4_expand(model->scratch, q, t->n);
        append(to[5], q->code, (t->n + 1) / 2, 1);
        append(to[6], q->scale, blocks, 1);
        append(to[7], q->scale_scale, blocks_of(blocks, SCALE_BLOCK), sizeof(float));
        append(to[8], &q->mean, 1, sizeof(float));
        append(to[9], model->scratch, t->n, sizeof(float));
    }
    for (int i = 0; i < 10; i++) fclose(to[i]), sections[i] = (Section){ TAG[i], text[i], length[i] };
    file_write(opt.out, "dump", sections, 10);
    return 0;
}

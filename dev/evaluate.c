// SPDX-License-Identifier: MIT
//
// evaluate.c: scores a base, or a base with a ticket, on the trainer's own code path, and says what it
// found on every example. It knows all metrics of train_rigsa.c, and besides them `number`, for which the
// model says an answer by itself, token by token, and the last number in it counts.
//
//     make evaluate_rigsa && ./evaluate_rigsa --ticket out/ticket.bin --details details.jsonl
//     ./evaluate_rigsa --help
//
// Details are a line of JSON per example (doc/model.md). dev/prepro_eval.py --score gives them back to
// lm-evaluation-harness. That nothing of this is in the trainer has a reason: a table after every round
// should cost little, and 500 answers of GSM8k take an estimated 40 minutes.

#ifndef PROGRAM             // dev/baselines.c includes this file, and has a name and a main of its own
#define PROGRAM "evaluate_rigsa"
#define METHOD_OPTIONS
#define ALONE
#endif
#define MORE_OPTIONS METHOD_OPTIONS \
    { "ticket", TEXT, &ticket_path, "FILE", "", "evaluate the base with this adapter" }, \
    { "details", TEXT, &details_path, "FILE", "", "what the model makes of every example, as JSON lines" },
static char *ticket_path, *details_path;
#include "../train_rigsa.c"

// -----------------------------------------------------------------------------------------------------------
// Tickets

static const Adapter *resting;      // dev/baselines.c: where pruned entries rest at their initial values

// An adapter belongs to the base that it was trained on.
static void check_base(const Model *model, const File *file) {
    size_t length;
    uint64_t *base = section(file, "base", 1, &length);
    if (!base || length < 8) die("%s: does not name its base", file->path);
    if (*base != model->base.hash)
        die("%s: made for the base `%.*s` (%016llx), not for `%s` (%016llx)", file->path,
            (int)min_size(length - 8, 63), (const char *)(base + 1), (unsigned long long)*base,
            model->base.name, (unsigned long long)model->base.hash);
    free(base);
}

static void ticket_load(Model *model, const char *path) {
    File file = file_open(path, "tick");
    check_base(model, &file);
    needed_at(&model->init, &file, "init", 1, sizeof(Init));
    if (model->init.rest > 1 || !(model->init.sigma >= 0 && model->init.sigma < INFINITY))
        die("%s: damaged section `init`", path);
    if (model->init.rest && !resting)
        die("%s: made with --rest init; ./train_baselines --method eval --ticket %s reads it", path, path);
    mask_load(model, &file, matrices(model));
    size_t n = adapter_entries(model), at = 0;
    free(model->value_arena);
    model->value_arena = floats(n + matrices(model));
    numbers_at(model->value_arena, &file, "values", n, sizeof(float));
    numbers_at(model->value_arena + n, &file, "gates", matrices(model), sizeof(float));
    for (Tensor *t = delta_tensor(model, 0); t <= gates_tensor(model); at += t++->n)
        t->value = model->value_arena + at;
    model->adapter = model->init.rest ? *resting : RIGSA;
    file_close(&file);
}

// -----------------------------------------------------------------------------------------------------------
// Data: what an evaluation by generation has besides (doc/model.md)

typedef struct {
    const Data *data;
    uint32_t limit;                     // most new tokens
    const double *number;               // (examples) the right answer
    const uint32_t *end;                // (end_count) tokens that end it
    const char *stop;                   // (stop_size) texts that end it, each with a zero behind it
    size_t end_count, stop_size;
    const char **piece;                 // (V) a token's text, after its u32 length of at most `longest_piece`
    size_t longest_piece;
} Generation;

// Reads it from the file that `data` came from. From here on `data` counts what is computed: prompts, and
// up to `limit` tokens one by one. That makes the plan's memory, work and time left those of a generation.
static Generation generation_open(Data *data, const char *path) {
    File file = file_open(path, "data");
    Generation g = { .data = data, .limit = *(const uint32_t *)needed(&file, "limit", 1, sizeof(uint32_t)) };
    size_t n, at = 0;
    if (hash64(file.head, file.sections * sizeof *file.head) != data->hash)
        die("%s has changed since it was opened", path);
    g.end = section(&file, "end", sizeof(uint32_t), &g.end_count);
    g.stop = section(&file, "stop", 1, &g.stop_size);
    const char *pieces = section(&file, "pieces", 1, &n);
    if (n / 4 < data->V) die("%s: section `pieces` has %zu bytes for %u tokens", path, n, data->V);
    g.piece = allocate(data->V, sizeof *g.piece);
    for (uint32_t t = 0; t < data->V || at < n; t++) {
        uint32_t size = 0;
        if (n - at >= 4) memcpy(&size, pieces + at, 4);
        if (n - at < 4 || n - at - 4 < size)
            die("%s: section `pieces` ends at token %u of %u", path, t, data->V);
        if (t < data->V) {                                              // there may be more
            g.piece[t] = pieces + at;
            g.longest_piece = max_size(g.longest_piece, size);
        }
        at += 4 + size;
    }
    g.number = needed(&file, "number", data->examples, sizeof(double));
    if (g.limit < 1 || g.limit > 1 << 20) die("%s: generates %u tokens", path, g.limit);
    if (g.stop_size && g.stop[g.stop_size - 1]) die("%s: section `stop` does not end with a zero", path);
    data->longest = data->tokens = 0;
    for (size_t e = 0; e < data->examples; e++) {
        data->tokens += (size_t)data->answer[e] + g.limit;
        data->longest = max_size(data->longest, (size_t)data->answer[e] + g.limit);
    }
    file_close(&file);
    return g;
}

// -----------------------------------------------------------------------------------------------------------
// Details: a line of JSON per example

typedef struct {
    FILE *f;                            // NULL: nobody asked
    const char *round;                  // what is evaluated: "base" or "ticket"
    uint64_t hash;                      // of the whole evaluation file, by which dev/prepro_eval.py knows it
} Details;

static FILE *details_open(void) {
    if (!*details_path) return NULL;
    FILE *f = fopen(details_path, opt.overwrite ? "w" : "wx");
    if (!f) die("%s: cannot be written: %s (--overwrite replaces it)", details_path, strerror(errno));
    setvbuf(f, NULL, _IOLBF, 0);                        // a run that is killed leaves whole lines
    return f;
}

static uint64_t file_hash(const char *path) {
    File file = file_open(path, "data");
    char *bytes = allocate(file.length, 1);
    file_read(&file, bytes, file.length, 0);
    uint64_t hash = hash64(bytes, file.length);
    free(bytes);
    file_close(&file);
    return hash;
}

// How every line begins.
static void print_example(const Details *to, const Data *data, size_t e, int exact) {
    fprintf(to->f, "{\"round\": \"%s\", \"column\": \"%s\", \"file\": \"%016llx\", "
            "\"example\": %zu, \"exact\": %d, ",
            to->round, data->column, (unsigned long long)to->hash, e, exact);
}

// How it ends where the answer was generated. Bytes that are no UTF-8 are written as they are.
static void print_said(const Details *to, const uint32_t *token, size_t n, const char *text) {
    fprintf(to->f, "\"tokens\": [");
    for (size_t i = 0; i < n; i++) fprintf(to->f, i ? ", %u" : "%u", token[i]);
    fprintf(to->f, "], \"text\": \"");
    for (; *text; text++)
        fprintf(to->f, (unsigned char)*text < ' ' || *text == '"' || *text == '\\' ? "\\u%04x" : "%c", *text);
    fprintf(to->f, "\"}\n");
}

// -----------------------------------------------------------------------------------------------------------
// Generation
//
// Greedy: SLOTS sequences grow side by side until they end and make room for the next. The keys and values
// of each stay in its stretch of T in every layer's cache. At every step each lays out what is not cached
// yet: its prompt, in parts if it is long, later the token that it said last.
//
//     slot   cache                             rows of the next batch
//     0      a b c d e . . . . . . . . . .     f        it said f
//     1      p q r . . . . . . . . . . . .     s t u    a prompt of which a part is there
//     2      . . . . . . . . . . . . . . .              free: no example is left
//
// A token costs a walk over all weights, however few rows it is for: the slots share that walk.

enum { SLOTS = 8 };

typedef struct {
    size_t example, n, cached;          // its tokens so far, and how many of them are in the cache
    uint32_t *token;                    // (T)
    int live;                           // 0: the next example may have this place
} Slot;

// What a batch must have room for: an answer row and a stretch for each slot, and a cache for each layer.
static void slots_room(Largest *batch, const Run *run) {
    for (const Data *eval = run->eval; eval < run->eval + run->evals; eval++) {
        if (eval->metric != NUMBER) continue;
        batch->M = max_size(batch->M, SLOTS);
        batch->K = max_size(batch->K, SLOTS * batch->T);
        batch->caches = run->model.config.L;
    }
}

// text = what n tokens say, up to the first stop, with a zero at the end; returns whether there was a stop.
static int write_text(char *text, const Generation *g, const uint32_t *token, size_t n) {
    size_t length = 0;
    int stopped = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t size;
        memcpy(&size, g->piece[token[i]], 4);
        memcpy(text + length, g->piece[token[i]] + 4, size);
        length += size;
    }
    text[length] = 0;
    for (const char *stop = g->stop; stop && stop < g->stop + g->stop_size; stop += strlen(stop) + 1) {
        char *found = memmem(text, length, stop, strlen(stop));
        if (found) stopped = 1, length = (size_t)(found - text), *found = 0;
    }
    return stopped;
}

// The last number in a text, such as -1,234.5; NAN where there is none. A comma or a point belongs to it
// only if a digit follows, so that a number may end a sentence.
static double last_number(const char *text) {
    char digits[64] = "";
    for (const char *at = text; *at; at++) {
        size_t n = at > text && at[-1] == '-';
        if (!isdigit((unsigned char)*at)) continue;
        digits[0] = '-';
        while (isdigit((unsigned char)at[*at == ',' || *at == '.'])) {
            if (*at != ',' && n + 1 < sizeof digits) digits[n++] = *at;
            at++;
        }
        digits[n] = 0;
        at--;
    }
    return *digits ? strtod(digits, NULL) : NAN;
}

// Lays out what the slots have not cached, at most N rows. Free slots take examples from `next` on.
static void lay_slots(Batch *batch, Slot slot[SLOTS], size_t *next, const Data *data, size_t N, size_t T) {
    batch->S = SLOTS;
    batch->all.n = batch->answer.n = batch->K = 0;
    for (uint32_t s = 0; s < SLOTS; s++) {
        Slot *g = &slot[s];
        if (!g->live && *next < data->examples) {
            size_t e = (*next)++;
            *g = (Slot){ .example = e, .token = g->token, .live = 1 };
            for (; g->n < data->answer[e]; g->n++) g->token[g->n] = tokens_of(data, e)[g->n];
        }
        batch->all.start[s] = (uint32_t)batch->all.n;
        batch->answer.start[s] = (uint32_t)batch->answer.n;
        batch->key_start[s] = s * (uint32_t)T;
        for (; g->live && g->cached < g->n && batch->all.n < N; g->cached++) {
            uint32_t t = (uint32_t)g->cached, row = batch_row(batch, g->token[t], t);
            batch->key_row[batch->K] = row;
            batch->key_place[batch->K++] = batch->key_start[s] + t;
            if (t + 1 == g->n) batch_answer(batch, row, t, 0);          // there is no target: any token
        }
    }
    batch->all.start[SLOTS] = (uint32_t)batch->all.n;
    batch->answer.start[SLOTS] = (uint32_t)batch->answer.n;
}

// One step of all slots; `text` has room for what one says. Returns how many ended, with verdicts and
// details. A slot ends at its limit, at a token of `end`, which is said, too, or where a text of `stop`
// begins.
static size_t generate(Run *run, Batch *batch, Slot slot[SLOTS], size_t *next, const Generation *g,
                       char *text, const Details *details) {
    Model *model = &run->model;
    const Activations *acts = &model->acts;
    const Data *data = g->data;
    size_t done = 0;
    lay_slots(batch, slot, next, data, acts->N, acts->T);
    model_forward(model, batch);
    head_forward_backward(model, batch, 0);
    for (size_t s = 0; s < SLOTS; s++) {
        Slot *own = &slot[s];
        size_t i = batch->answer.start[s], e = own->example, prompt = data->answer[e];
        if (i == batch->answer.start[s + 1]) continue;
        if (!isfinite(acts->logp[i]))
            die("%s: example %zu has no finite probability: broken weights", data->column, e);
        own->token[own->n++] = acts->best[i];
        own->live = !write_text(text, g, own->token + prompt, own->n - prompt) && own->n - prompt < g->limit;
        for (size_t j = 0; j < g->end_count; j++) own->live &= acts->best[i] != g->end[j];
        if (own->live) continue;
        run->verdict[e] = (Verdict){ .exact = last_number(text) == g->number[e] };
        done++;
        if (!details->f) continue;
        print_example(details, data, e, run->verdict[e].exact);
        print_said(details, own->token + prompt, own->n - prompt, text);
    }
    return done;
}

// As evaluate() of the trainer, for the metric `number`.
static Score evaluate_generation(Run *run, const Generation *g, const Details *details) {
    const Data *data = g->data;
    Batch batch = run->batch;
    Slot slot[SLOTS] = { 0 };
    size_t next = 0;
    uint32_t *token = integers(SLOTS * data->longest);
    char *text = allocate(g->limit * g->longest_piece + 1, 1);
    batch.key_place = integers(run->model.acts.N);
    for (int s = 0; s < SLOTS; s++) slot[s].token = token + (size_t)s * data->longest;
    for (size_t done = 0; done < data->examples; ) {
        done += generate(run, &batch, slot, &next, g, text, details);
        pace.done += (double)batch.all.n;
        progress(run, data->column, (double)done / (double)data->examples);
    }
    free(batch.key_place);
    free(token);
    free(text);
    return score_verdicts(run->verdict, data);
}

// -----------------------------------------------------------------------------------------------------------
// The program

// W takes W0's place for good: generation would form it again for every token. Not in bf16, where matrices
// have no fp32 value to hold it, and W, rounded once more, would lose what a small gate adds.
static void merge(Model *model) {
    if (precision == BF16) return;
    for (Tensor *t = model->tensors; t < model->tensors + model->base_tensors; t++)
        if (t->adapter >= 0) memcpy(t->value, model->adapter.weight(model, t), t->n * sizeof(float));
    model->adapter = PLAIN;
}

static void start_ticket(Run *run) {
    if (!*ticket_path) return;
    first_label = "ticket";
    ticket_load(&run->model, ticket_path);
    merge(&run->model);
}

// The score on evaluation set i, with its details: of generated examples in the order in which they end,
// of others in the file's order.
static Score evaluate_set(Run *run, size_t i, const Generation *g, const Details *details) {
    const Data *data = &run->eval[i];
    if (data->metric == NUMBER) return evaluate_generation(run, g, details);
    Score score = evaluate(run, data);
    for (size_t e = 0; details->f && e < data->examples; e++) {
        print_example(details, data, e, run->verdict[e].exact);
        fprintf(details->f, "\"logp\": %.9g}\n", run->verdict[e].logp);
    }
    return score;
}

// From the options to the row of the table, of a method without passes.
static void evaluate_whole(Run *run) {
    Model *model = &run->model;
    Generation generation[MAX_EVALS] = { 0 };
    generation_room = slots_room;
    opt.data = (char *)"";
    pace.start = seconds();
    pace.terminal = isatty(1);
    File base = base_open(model, opt.base);
    load_data(run);
    for (size_t i = 0; i < run->evals; i++)
        if (run->eval[i].metric == NUMBER) generation[i] = generation_open(&run->eval[i], opt.evals[i]);
    Details details = { .f = details_open() };
    struct stat ticket;
    if (*ticket_path && !stat(ticket_path, &ticket)) run->held += (size_t)ticket.st_size / 4;
    method.prepare(run);
    plan(run);
    base_read(model, &base, 0);
    method.start(run);
    print_table(run);
    Row *row = run->row;
    *row = (Row){ NAN, NAN, NAN, 0 };
    details.round = first_label;
    for (size_t i = 0; i < run->evals; i++) {
        if (details.f) details.hash = file_hash(opt.evals[i]);
        run->score[i] = evaluate_set(run, i, &generation[i], &details);
    }
    row->seconds = seconds() - pace.start;
    clear_line();
    if (details.f && (ferror(details.f) || fclose(details.f)))
        die("%s: cannot be written: %s", details_path, strerror(errno));
    print_row(run, row);
    draw_example(run);
}

static const char ACCEPTED[] = "base|ticket|eval|precision|details|overwrite";     // of the trainer's options

static void evaluation_usage(void) {
    printf("Scores a base, or a base with a ticket.\n\n    ./" PROGRAM " [--option value ...]\n\n"
           "  --base FILE           the model (default " NANO "base.bin)\n"
           "  --ticket FILE         with this adapter\n"
           "  --eval FILE           evaluation set; repeatable (default: those of " NANO ")\n"
           "  --precision fp32|bf16 of products (default fp32)\n"
           "  --details FILE        what the model makes of every example, as JSON lines\n"
           "  --overwrite           replace that file\n");
    exit(0);
}

static void evaluation_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--help")) evaluation_usage();
        if (!strncmp(argv[i], "--", 2) && choice_place(ACCEPTED, argv[i] + 2) < 0)
            die("unknown option `%s`; ./" PROGRAM " --help lists them all", argv[i]);
    }
    parse_options(argc, argv);
}

static void prepare_nothing(Run *run) { (void)run; }

// What main does.
__attribute__((unused)) static void evaluate_program(Run *run, int argc, char **argv) {
    evaluation_options(argc, argv);
    method = (Method){ .prepare = prepare_nothing, .start = start_ticket };
    evaluate_whole(run);
}

#ifdef ALONE
int main(int argc, char **argv) {
    static Run run;
    begin_program(argv);
    evaluate_program(&run, argc, argv);
    return 0;
}
#endif

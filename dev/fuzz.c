// SPDX-License-Identifier: MIT
//
// fuzz.c: hostile files for every reader of train_rigsa.c, by libFuzzer.
//
//     clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Wno-unknown-pragmas \
//         dev/fuzz.c -o fuzz -lm
//     FUZZ_SEEDS=dev/fuzz_corpus ./fuzz                       writes one small valid file per reader
//     ./fuzz -runs=1000000 folder dev/fuzz_corpus/tick        new finds go to the first folder
//     ./fuzz -set_cover_merge=1 -use_counters=0 small folder  the few of them that reach as much of the code
//     cc -O1 -DVERDICTS -Wno-unknown-pragmas dev/fuzz.c -o verdicts -lm      for dev/fuzz_files.py
//
// A file goes to the reader of the kind that its header names. It must be refused by die(), or hold what can
// be used: whatever then reads out of bounds, overflows or leaves a number out of range ends the program.

#define _GNU_SOURCE
#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

// The trainer's view of the world: the one file is ours, exit() comes back to us, and memory that die()
// leaves behind is freed.
static const uint8_t *input;
static size_t input_size;
static jmp_buf refused;
static void *block[4096];
static size_t blocks;
static FILE *quiet;            // what die() says

static void *track(void *p) {
    if (blocks == sizeof block / sizeof *block) abort();
    return block[blocks++] = p;
}

static void untrack(const void *p) {
    for (size_t i = blocks; p && i-- > 0; )
        if (block[i] == p) { free(block[i]); block[i] = block[--blocks]; return; }
}

static int our_fstat(int fd, struct stat *info) {
    (void)fd;
    *info = (struct stat){ .st_mode = S_IFREG, .st_size = (off_t)input_size };
    return 0;
}

static ssize_t our_pread(void *to, size_t n, off_t at) {
    n = (size_t)at < input_size ? n < input_size - (size_t)at ? n : input_size - (size_t)at : 0;
    memcpy(to, input + at, n);
    return (ssize_t)n;
}

__attribute__((noreturn)) static void our_exit(void) { longjmp(refused, 1); }

#define TESTING
#define open(...) 3
#define close(fd) 0
#define fstat(fd, info) our_fstat(fd, info)
#define pread(fd, to, n, at) our_pread(to, n, at)
#define aligned_alloc(alignment, size) track(aligned_alloc(alignment, size))
#define strdup(text) track(strdup(text))
#define strndup(text, n) track(strndup(text, n))
#define free(p) untrack(p)
#define exit(status) our_exit()
#undef stderr
#define stderr quiet
#include "baselines.c"
#undef open
#undef close
#undef free
#undef exit

static const Config CONFIG = {
    .C = 4, .F = 6, .L = 1, .H = 2, .KV = 1, .D = 2, .V = 8, .context = 16, .tied = 1,
    .theta = 1e4f, .eps = 1e-5f };
#define SAVED "batch            2\neval             eval\n"
static unsigned long executions, accepted;

#define REQUIRE(condition) do { if (!(condition)) __builtin_trap(); } while (0)

// A model without a file: what a ticket and a state are for.
static void make_run(Run *run) {
    Model *model = &run->model;
    *run = (Run){ .passes = 3, .evals = 1, .settings = (char *)SAVED };
    *model = (Model){ .config = CONFIG, .base = { 1, "fuzz" } };
    build_table(model);
    size_t n = 0, at = 0;
    for (size_t i = 0; i < model->base_tensors; i++) n += model->tensors[i].n;
    model->base_arena = floats(n);
    for (Tensor *t = model->tensors; t < model->tensors + model->base_tensors; at += t++->n)
        t->value = model->base_arena + at;
    settings_folder = (char *)"/";
    opt = (Options){ .base = (char *)"base", .data = (char *)"data", .evals = { (char *)"eval" },
        .out = (char *)"out",
                     .batch = 2, .examples = 6, .ticket_examples = 6, .sigma = 0.1 };
    run->row = allocate(run->passes + 1, sizeof(Row));
    run->score = allocate(run->passes + 1, sizeof(Score));
    run->pruned = allocate(run->passes * matrices(model), sizeof(Pruned));
    run->loss = allocate(updates_before(run, run->passes + 1), sizeof(double));
}

static void use_adapter(Model *model) {
    float *memory = model->scratch = floats(largest_matrix(&model->config));
    for (size_t i = 0; i < model->base_tensors; i++) {
        Tensor *t = &model->tensors[i];
        if (t->adapter < 0) continue;
        RIGSA.weight(model, t);
        for (size_t k = 0; k < t->n; k++)
            REQUIRE(!isnan(memory[k]) || fabsf(gates_tensor(model)->value[t->adapter]) > 1e18f);
    }
}

static void use_base(void) {
    static Model model;
    model = (Model){ 0 };
    File file = base_open(&model, "input");
    base_read(&model, &file, 1);
    const Tensor *last = &model.tensors[model.base_tensors - 1];
    REQUIRE(isfinite(last->value[last->n - 1]));
    REQUIRE(memchr(model.base.name, 0, sizeof model.base.name));
}

// What a model says that says the answers, of an evaluation by generation.
static void use_pieces(Data *data) {
    Generation g = generation_open(data, "input");
    for (size_t e = 0; e < data->examples; e++) {
        size_t n = min_size(g.limit, data->length[e] - data->answer[e]);
        uint32_t *token = integers(n);
        for (size_t i = 0; i < n; i++) token[i] = tokens_of(data, e)[data->answer[e] + i];
        REQUIRE(data->answer[e] + n <= data->longest);
        char *text = allocate(n * g.longest_piece + 1, 1);
        write_text(text, &g, token, n);
        REQUIRE(strlen(text) <= n * g.longest_piece && !isinf(last_number(text)));
        untrack(text);
        untrack(token);
    }
}

static void use_data(void) {
    Data data = data_open("input");
    if (data.column[0] && data.metric == NUMBER) { use_pieces(&data); return; }     // no batch holds it whole
    Batch batch = batch_alloc(2 * data.longest, 2 * data.longest_answer, 2 * data.longest);
    for (size_t e = 0; e < data.examples; e++) {  // each beside the next one
        size_t n = min_size(2, data.examples - e);
        for (size_t i = 0; i < n; i++) batch.example[i] = (uint32_t)(e + i);
        batch_lay(&batch, &data, batch.example, n);
        REQUIRE(batch.answer.n >= n && batch.all.n <= batch.K && batch.K <= 2 * data.longest);
        for (size_t i = 0; i < batch.all.n; i++) REQUIRE(batch.token[i] < data.V);
        for (size_t k = 0; k < batch.K; k++) REQUIRE(batch.key_row[k] < batch.all.n);
    }
    if (!data.column[0]) return;
    Verdict *verdict = allocate(data.examples, sizeof(Verdict));
    Score score = score_verdicts(verdict, &data);
    REQUIRE(score.value >= 0 && score.value <= 1 && score.error >= 0);
}

static void use_ticket(void) {
    static Run run;
    make_run(&run);
    ticket_load(&run.model, "input");
    use_adapter(&run.model);
}

static void use_state(void) {
    static Run run;
    make_run(&run);
    memset(given, 0, sizeof given);
    more.method = METHOD_RIGSA;
    File file = file_open("input", "stat");
    settings_resume(&file);
    int full = more.method == METHOD_FULL;
    make_run(&run);
    method = method_of[full ? METHOD_FULL : METHOD_RIGSA];
    run.passes = full ? 1 : run.passes;
    method.start(&run);
    state_load(&run, &file);
    trained_load(&run.model, &file);
    REQUIRE(run.rows <= run.passes + 1 && run.updates <= updates_before(&run, run.passes + 1));
    if (!full) use_adapter(&run.model);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    (void)baselines_program, (void)begin_program;
    input = bytes;
    input_size = size;
    executions++;
    if (!setjmp(refused)) {
        switch (size > 12 ? bytes[12] : 0) {
        case 'd': use_data(); break;
        case 't': use_ticket(); break;
        case 's': use_state(); break;
        default: use_base();
        }
        accepted++;
    }
    while (blocks) free(block[--blocks]);
    return 0;
}

#ifdef VERDICTS
// Standard input holds files, each behind its length as a u64. Standard output says of each in one line what
// the readers do with it: an empty line if it is accepted, otherwise what die() said.
int main(void) {
    uint64_t size;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        char *said = NULL;
        size_t length;
        uint8_t *bytes = malloc(size + 1);
        if (!bytes || fread(bytes, 1, size, stdin) != size) return 1;
        quiet = open_memstream(&said, &length);
        LLVMFuzzerTestOneInput(bytes, size);
        fclose(quiet);
        printf("%.*s\n", (int)strcspn(said, "\n"), said);
        (free)(said);
        (free)(bytes);
    }
    return 0;
}
#else
// Most mutations happen inside a file that stays a file: one section's payload changes, or sections come, go
// and change places, and lengths and hashes are made right again. Without that, nearly every mutation would
// end at the first wrong hash.
static unsigned long structured;
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

size_t LLVMFuzzerCustomMutator(uint8_t *bytes, size_t size, size_t most, unsigned seed) {
    enum { SECTIONS = 32 };
    static uint8_t old[1 << 16];
    struct { uint8_t tag[16]; size_t at, length; } section[SECTIONS], swap;
    size_t count = 0, at = sizeof(FileHeader);
    uint64_t random = mix(seed + 1);
    if (size < at || size > sizeof old || random % 8 == 0) return LLVMFuzzerMutate(bytes, size, most);
    memcpy(old, bytes, size);
    for (SectionHeader head; count < SECTIONS && size - at >= sizeof head; count++) {
        memcpy(&head, old + at, sizeof head);
        at += sizeof head;
        memcpy(section[count].tag, head.tag, 16);
        section[count].at = at;
        section[count].length = min_size(head.length, size - at);
        at += min_size(padded(section[count].length), size - at);
    }
    size_t chosen = count ? (random >> 8) % count : 0, other = count ? (random >> 16) % count : 0;
    int what = (int)(random >> 24) % 16;
    if (count && what == 0) section[chosen] = section[--count];                                 // gone
    if (count && what == 1) section[chosen].length = section[other].length;  // may be too long: cut below
    if (count && what == 2) memcpy(section[chosen].tag, section[other].tag, 16);
    if (count && what == 3) swap = section[chosen], section[chosen] = section[other], section[other] = swap;
    FileHeader header;
    memcpy(&header, old, sizeof header);
    at = sizeof header;
    for (size_t s = 0; s < count && at + sizeof(SectionHeader) <= most; s++) {
        size_t room = (most - at - sizeof(SectionHeader)) / 8 * 8;
        size_t n = min_size(section[s].length, min_size(size - section[s].at, room));
        uint8_t *payload = bytes + at + sizeof(SectionHeader);
        memcpy(payload, old + section[s].at, n);
        if (s == chosen && what > 3 && room > 0) n = LLVMFuzzerMutate(payload, n, room);
        if (s == chosen && what > 12 && n >= 4) {  // a number that is often wrong
            static const uint32_t odd[] = { 0, 1, 7, 8, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fc00000,
                0x7f800000, 1 << 20 };
            memcpy(payload + (random >> 32) % (n / 4) * 4, &odd[(random >> 48) % 10], 4);
        }
        memset(payload + n, 0, padded(n) - n);
        SectionHeader head = { .length = n, .hash = hash64(payload, n) };
        memcpy(head.tag, section[s].tag, 16);
        memcpy(bytes + at, &head, sizeof head);
        at += sizeof head + padded(n);
        header.sections = s + 1;
    }
    if (!count) header.sections = 0;
    header.length = at;
    memcpy(bytes, &header, sizeof header);
    structured++;
    return at;
}

// Small valid files: a base, examples, three evaluations, tickets dense and sparse, states of all methods.
static void write_seeds(const char *folder) {
    static Run run;
    char path[PATH_MAX];
    const uint32_t vocab[] = { 8, 4 }, length[] = { 4, 3, 3 }, answer[] = { 2, 2, 1 },
        token[] = { 1, 2, 3, 4, 5, 6, 7, 0, 1, 2 };
    const uint32_t choices[] = { 3 }, gold[] = { 1 }, chars[] = { 4, 5, 6 }, glyphs[] = { 1, '1' },
        limit[] = { 3 }, end[] = { 0 };
    const char stop[] = "\n\0Q:";
    const char pieces[] =
        "\0\0\0\0" "\1\0\0\0001" "\1\0\0\0002" "\1\0\0\0-" "\2\0\0\0 7" "\1\0\0\0." "\1\0\0\0\n" "\2\0\0\0Q:";
    const double number[] = { 12, -7.5, NAN };
    const size_t sections[] = { 5, 7, 10, 15 };
    for (int i = 0; i < 9; i++) {
        const char *name[] = { "base/base", "data/examples", "data/exact", "data/choices",
            "data/number", "tick/dense",
                               "tick/sparse", "stat/rigsa", "stat/full" };
        const char *metric[] = { "", "", "exact", "acc_norm", "number" };
        snprintf(path, sizeof path, "%s/%s", folder, name[i]);
        make_run(&run);
        Model *model = &run.model;
        run.settings = (char *)(i == 8 ? SAVED "method           full\n" : SAVED);
        run.rows = 1, run.updates = 2;
        method = method_of[i == 8 ? METHOD_FULL : METHOD_RIGSA];
        for (Tensor *t = model->tensors; t < model->tensors + model->base_tensors; t++)
            for (size_t k = 0; k < t->n; k++) t->value[k] = normal(3, k, 0.5f);
        if (i == 0) { base_save(model, path); continue; }
        if (i < 5) {
            Section section[] = { { "vocab", vocab, sizeof vocab }, { "length", length, sizeof length },
                { "answer", answer, sizeof answer }, { "tokens", token, sizeof token },
                { "glyphs", glyphs, sizeof glyphs },
                { "column", "evaluation", 10 },
                { "metric", metric[i], strlen(metric[i]) }, { "choices", choices, sizeof choices },
                { "gold", gold, sizeof gold }, { "chars", chars, sizeof chars },
                { "limit", limit, sizeof limit },
                { "number", number, sizeof number }, { "end", end, sizeof end },
                { "stop", stop, sizeof stop },
                { "pieces", pieces, sizeof pieces - 1 } };
            file_write(path, "data", section, sections[i - 1]);
            continue;
        }
        Pruned pruned[ADAPTED];
        method.start(&run);
        if (i == 6 || i == 7) prune(model, pruned, 0.3, THRESHOLD_MATRIX, SURVIVORS_REWIND);
        if (i < 7) ticket_save(model, path, "fuzz");
        else state_save(&run, path);
    }
}

static void report(void) {
    printf("%lu executions, %lu accepted, %lu inputs of the structure-aware mutator\n", executions,
           accepted, structured);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    quiet = fopen("/dev/null", "w");
    if (getenv("FUZZ_SEEDS")) {
        write_seeds(getenv("FUZZ_SEEDS"));
        _exit(0);
    }
    atexit(report);
    return 0;
}
#endif

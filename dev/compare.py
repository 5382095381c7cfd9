"""
RIGSA and the methods it is compared with: every method at several learning rates and seeds, into one CSV.

    make train_baselines && python dev/compare.py --out out_compare       the small model's whole table: hours
    python dev/compare.py --out out_compare --methods rigsa,lora --seeds 1      a part of it
    python dev/compare.py --out out_short --share 0.1                        passes of a tenth of the length
    python dev/compare.py --base smollm2.bin --data data_smollm2/mnist_7_train.bin \\
        --eval data_smollm2/mnist_7_heldout.bin --eval data_smollm2/own.bin --out out_real   the real model's
    python dev/compare.py --base smollm2.bin --test data_smollm2/mnist_7_test.bin --out out_real \\
        --methods rigsa,lora16 --rates 0.003              what is finished of these, on other questions

One thread per run and --jobs of them at a time: the results are the same bits as with more threads. A run
that is in the CSV is not made again, one that was stopped goes on from its last save.

What is compared on a base is a Table below: NANO, and REAL where --base is given. Every method gets `last`
examples in its last pass. RIGSA and LT-SFT look at others before that, in RIGSA's rounds and in LT-SFT's
first pass, ROUNDS * `round` together; with --budget total the methods that have only one pass get these
examples as well: once a comparison at equal last pass, once at equal total, `both` for those two. All but
full, dense and LoRA of a given rank train about as many values as RIGSA's ticket has entries (`density`).

compare.csv has a row for the base and one for every pass of a run, written when the run has ended. Columns:

commit, processor            of the program, with a + where files differ from it; name, vectors, threads
round                        empty for a last pass
budget, share, lr, seed, settings    of the run; settings are the options of ./train_baselines
examples, losses             of the pass; losses are the means of its eighths
values, density              trained in the pass; density is values / entries of the adapted matrices
flipped                      share of the signs, in a round of RIGSA's
seconds, memory              of the whole run: processor time, and the most MB at any time

then score and standard error of each evaluation set. The folders of the runs are beside it, for dev/plot.py.

With --test nothing is trained: finished runs, chosen like runs to be made, are scored on these files, the base
before them, and written to test.csv: method, budget, lr, seed, density, then scores and errors.
"""
import argparse
import csv
import math
import os
import re
import signal
import subprocess
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import NamedTuple

import command
from rigsa_file import adapted_shapes, read_base, read_examples, tensor_shapes

ROUNDS = 5
PARTS = 8  # of a pass, whose mean losses stand in the CSV
LOOK = 300  # seconds between two looks at how far the runs are
LOW, MIDDLE, HIGH = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2)
RIGSA = (1e-3, 3e-3, 6e-3, 1.2e-2)


class Table(NamedTuple):
    """What is compared on a base."""
    round: int  # examples of a round
    last: int  # and of the last pass
    batch: int
    gate: float  # alpha-lr / lr
    precision: str
    methods: dict  # name: (learning rates, options)


def methods(density, rigsa, gated, masks, lora, low, **more):
    """What every table has; `density`: of the masks and what has as many values; learning rates by kind."""
    return {
        "rigsa": (rigsa, ["--method", "rigsa"]),
        "gated random": (gated, ["--method", "random", "--init", "gated", "--density", density]),
        "random": (masks, ["--method", "random", "--density", density]),
        "ltsft": (lora, ["--method", "ltsft", "--density", density]),
        "lora": (lora, ["--method", "lora", "--density", density]),
        "qlora": (lora, ["--method", "lora", "--base-type", "nf4", "--density", density]),
        "lora16": (lora, ["--method", "lora", "--rank", 16]),
        "rosa": (lora, ["--method", "rosa", "--density", density / 2]),
        "full": (low, ["--method", "full", "--weight-decay", 0]),
        "dense": (low, ["--method", "dense"]),
        **more,
    }


# RIGSA's defaults. Its ticket has 9,803 entries: LoRA's rank becomes 2 (9,792 values), RoSA's 1.
NANO = Table(12800, 48000, 16, 7 / 3, "fp32", methods(
    0.03545, rigsa=RIGSA, gated=RIGSA, masks=HIGH, lora=MIDDLE, low=LOW))

# doc/real.md has what these were chosen from. At .003 the ticket keeps .048 of the entries: few signs flip.
REAL = Table(1200, 1600, 8, 2 / 3, "bf16", methods(
    0.048, rigsa=RIGSA[1:], gated=(1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2), masks=(3e-4, 1e-3, 3e-3),
    lora=LOW[1:], low=LOW[:3],
    rigsa4=(RIGSA[1:], ["--method", "rigsa", "--ticket-rate", 4]),
    redraw=(RIGSA[1:], ["--method", "rigsa", "--keep", 0.8, "--survivors", "redraw"]),
    **{f"qlora{rank}": (rates, ["--method", "lora", "--base-type", "nf4", "--rank", rank])
       for rank, rates in ((16, LOW[1:]), (64, LOW[1:]), (256, LOW[:3]))}))


def plan(args):
    """All runs as dicts: method, budget, lr, seed, options of ./train_baselines, cost in examples."""
    table, runs = args.table, []
    one, last = round(table.round * args.share), round(table.last * args.share)
    first = round(ROUNDS * table.round * args.share)
    for seed in args.seeds:  # seed by seed: an interrupted comparison has all methods
        for method in args.methods:
            rates, options = table.methods[method]
            before = {"rigsa": one, "ltsft": first}.get(options[1])  # examples of each pass before the last
            budget = "both" if before else args.budget
            end = last + first if budget == "total" else last
            for lr in (lr for lr in rates if not args.rates or lr in args.rates):
                runs.append({
                    "method": method, "budget": budget, "lr": lr, "seed": seed,
                    "cost": end + (first if before else 0),
                    "options": [*options, "--lr", lr, "--alpha-lr", table.gate * lr,
                                "--batch", table.batch, "--precision", table.precision,
                                "--seed", seed, "--ticket-examples", end,
                                *(["--examples", before] if before else [])],
                })
    return runs


def key(row):
    """What tells a run from the others."""
    return row["method"], row["budget"], f"{float(row['lr']):g}", int(row["seed"])


def words(run):
    """Its options in one text."""
    return " ".join(f"{word:g}" if isinstance(word, float) else str(word) for word in run["options"])


def folder(args, run):
    """Of a run."""
    return os.path.join(args.out, "{}_{}_{}_{}".format(*key(run)).replace(" ", "_"))


def read_rows(path):
    """The rows of a CSV as dicts; none where it is not there yet."""
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def commit():
    """Of the program, with a + where it was changed since."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


def processor():
    """Its name and its widest vectors, as far as Linux says."""
    text = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            text = file.read()
    names, flags = re.findall(r"model name\s*: (.*)", text)[:1], text.split()
    vectors = [flag for flag in ("amx_bf16", "avx512f", "avx2") if flag in flags][:1]
    return ", ".join(names + vectors + ["1 thread"])


def train(args, run):
    """Makes a run, or goes on with it; its rows of the CSV. ValueError when it fails or is stopped."""
    out = folder(args, run)
    os.makedirs(out, exist_ok=True)
    begun = os.path.exists(os.path.join(out, "state.bin"))
    call = ["./train_baselines", *words(run).split(), *args.files, "--out", out,
            "--resume" if begun else "--overwrite"]
    with open(os.path.join(out, "log.txt"), "a+") as log:
        process = subprocess.Popen(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read().strip() or "killed"
    with open(os.path.join(out, "used.csv"), "a+", newline="") as file:  # a line each time that it ran
        csv.writer(file).writerow([used.ru_utime + used.ru_stime, used.ru_maxrss / 1024])
        file.seek(0)
        seconds, memory = zip(*(map(float, line) for line in csv.reader(file)))
    if process.returncode:
        raise ValueError(f"{out}: {said.splitlines()[-1]}")
    base, *passes = read_rows(os.path.join(out, "table.csv"))
    losses = read_rows(os.path.join(out, "loss.csv"))
    same = {"commit": args.commit, "processor": args.processor, "share": args.share}
    found = [same | {"method": "base", "lr": 0, "seed": 0, "density": 0} | scores(base)]
    for row in passes:
        mine = [float(loss["loss"]) for loss in losses if loss["pass"] == row["round"]]
        full = row["density"] == "nan"
        found.append(same | {
            "method": run["method"], "round": "" if row is passes[-1] else row["round"],
            "budget": run["budget"], "lr": f"{run['lr']:g}", "seed": run["seed"], "settings": words(run),
            "examples": len(mine) * args.table.batch, "losses": parts(mine), "density": row["density"],
            "flipped": "" if row["flipped"] == "nan" else row["flipped"],
            "values": args.weights if full else round(float(row["density"]) * args.entries),
            "seconds": round(sum(seconds)), "memory": round(max(memory)),
        } | scores(row))
    return found


def count(shapes):
    """Entries of tensors, (name, shape) each."""
    return sum(math.prod(shape) for _, shape in shapes)


def scores(row):
    """The scores in a row of a table.csv, and their errors: a dict."""
    sets = [name.removesuffix("_error") for name in row if name.endswith("_error")]
    return {name: row[name] for column in sets for name in (column, f"{column}_error")}


def parts(losses):
    """The means of PARTS parts of a list, in one text."""
    ends = [len(losses) * i // PARTS for i in range(PARTS + 1)]
    return " ".join(f"{sum(losses[a:b]) / (b - a):.3f}" for a, b in zip(ends, ends[1:]) if a < b)


def adapter_options(folder, base, options):
    """The options of ./train_baselines that read a finished run back; `options` are those that made it."""
    model = os.path.join(folder, "model.bin")
    if os.path.exists(model):
        return ["--base", model]
    files = {name: os.path.join(folder, f"{name}.bin") for name in ("lora", "ticket")}
    return ["--base", base, *(["--base-type", "nf4"] if "nf4" in options else []),
            *(word for name, path in files.items() if os.path.exists(path) for word in (f"--{name}", path))]


def printed_scores(output):
    """The last row of a table that ./train_baselines has printed: (score, standard error) pairs, as texts."""
    *_, row = filter(None, (re.findall(r"([\d.]+) \+-([\d.]+)", line) for line in output.splitlines()))
    return row


def test(args, options):
    """Scores of ./train_baselines --method eval with these options on the files of --test: a dict."""
    files = [word for path in args.test for word in ("--eval", path)]
    call = ["./train_baselines", "--method", "eval", "--precision", args.table.precision, *options, *files]
    done = subprocess.run(call, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return {name + end: number for name, pair in zip(args.columns, printed_scores(done.stdout), strict=True)
            for end, number in zip(("", "_error"), pair)}


def test_all(args, runs, finished):
    """test.csv: the base, then those of the runs that are finished, their rows by key; what is there stays."""
    path = os.path.join(args.out, "test.csv")
    there = read_rows(path)
    if not there:
        write(path, KEYS, [dict(zip(KEYS, ("base", "", 0, 0, 0))) | test(args, ["--base", args.base_file])])
    for run in runs:
        row = finished.get(key(run))
        if not row or key(run) in map(key, there[1:]):
            continue
        options = adapter_options(folder(args, run), args.base_file, run["options"])
        found = {name: row[name] for name in KEYS} | test(args, options)
        write(path, KEYS, [found])
        print("   ".join(f"{name} {value}" for name, value in found.items() if value and "_error" not in name),
              flush=True)


KEYS = ("method", "budget", "lr", "seed", "density")
COLUMNS = ("commit", "processor", "method", "round", "budget", "share", "lr", "seed", "settings", "examples",
           "losses", "values", "flipped", "seconds", "memory", "density")


def write(path, first, new):
    """Appends rows to a CSV whose `first` columns come before the scores. ValueError if its columns differ."""
    columns, there = [*first, *(name for name in new[0] if name not in first)], read_rows(path)
    if there and list(there[0]) != columns:
        raise ValueError(f"{path} has other columns; choose another --out")
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if not there:
            writer.writeheader()
        writer.writerows(new)


def minutes(seconds):
    """For people."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def make_all(args, todo, path):
    """Makes the runs, --jobs at a time, and says after each one and now and then how far they are."""
    def seen():
        """Examples that the runs have seen, as far as they have saved them."""
        files = (os.path.join(folder(args, run), "loss.csv") for run in todo)
        return args.table.batch * sum(len(read_rows(path)) for path in files)

    start, before, total = time.time(), seen(), sum(run["cost"] for run in todo)
    with ThreadPoolExecutor(args.jobs) as pool:
        pending = {pool.submit(train, args, run): run for run in todo}
        try:
            while pending:
                done, _ = wait(pending, LOOK, FIRST_COMPLETED)
                for future in done:
                    run, new = pending.pop(future), future.result()
                    write(path, COLUMNS, new[1:] if os.path.exists(path) else new)
                    said = [f"{run['method']:13} lr {run['lr']:<7g} seed {run['seed']}"] + [
                        f"{name} {float(score):.3f}" for name, score in new[-1].items()
                        if f"{name}_error" in new[-1]]
                    print("   ".join(said))
                if (now := seen()) > before:
                    left = (time.time() - start) * (total - now) / (now - before)
                    print(f"{now / total:.0%} of the examples, {minutes(left)} left", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@command.line
def main():
    parser = argparse.ArgumentParser(description="All methods at several rates and seeds, into one CSV.")
    parser.add_argument("--out", default="out_compare", metavar="FOLDER",
                        help="of compare.csv and the runs (default %(default)s)")
    parser.add_argument("--base", metavar="FILE", help="a real model; without: the small one, and its table")
    parser.add_argument("--data", metavar="FILE", help="training examples of the new task")
    parser.add_argument("--eval", metavar="FILE", action="append", default=[],
                        help="repeatable: the new task, then the old ones")
    parser.add_argument("--test", metavar="FILE", action="append", default=[],
                        help="repeatable: score finished runs on these, train nothing")
    parser.add_argument("--methods", help="which, separated by commas; default: all of the table")
    parser.add_argument("--rates", help="only these learning rates of the table, separated by commas")
    parser.add_argument("--seeds", default="1,2,3", help="which (default: %(default)s)")
    parser.add_argument("--budget", default="last", choices=("last", "total"),
                        help="what is equal (default %(default)s)")
    parser.add_argument("--share", type=float, default=1, help="of the examples of every pass (default 1)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    args = parser.parse_args()
    args.table = REAL if args.base else NANO
    args.methods = args.methods.split(",") if args.methods else list(args.table.methods)
    args.rates = [float(rate) for rate in args.rates.split(",")] if args.rates else []
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    files = [("--base", args.base), ("--data", args.data), *(("--eval", path) for path in args.eval)]
    args.files = [word for option, path in files if path for word in (option, path)]
    args.base_file = args.base or "dev/nano/base.bin"
    unknown = [method for method in args.methods if method not in args.table.methods]
    if unknown:
        raise ValueError(f"no method `{unknown[0]}`; there are {', '.join(args.table.methods)}")
    if not os.access("./train_baselines", os.X_OK):
        raise ValueError("no ./train_baselines here; make train_baselines")
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, "compare.csv")
    there = read_rows(path)
    if there and float(there[0]["share"]) != args.share:
        raise ValueError(f"{path} was made with --share {there[0]['share']}; choose another --out")
    done = {key(row): row for row in there if row["method"] != "base"}  # a run's last row is its last pass
    runs = plan(args)
    if args.test:
        args.columns = [read_examples(name)["column"] for name in args.test]
        test_all(args, runs, done)
        return
    config = read_base(args.base_file)[0]  # without holding its weights
    args.weights, args.entries = count(tensor_shapes(config)), count(adapted_shapes(config))
    args.commit, args.processor = commit(), processor()
    todo = [run for run in runs if key(run) not in done]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    make_all(args, todo, path)


if __name__ == "__main__":
    main()

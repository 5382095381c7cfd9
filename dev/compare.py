"""
RIGSA and the methods it is compared with: every method at several learning rates and seeds, into one CSV.

    make train_baselines && python dev/compare.py --out out_compare             the whole table: hours, see below
    python dev/compare.py --out out_compare --methods rigsa,lora --seeds 1      a part of it
    python dev/compare.py --out out_short --share 0.1                           passes of a tenth of the length

One thread per run and --jobs of them at a time: the results are the same bits as with more threads. A run that is already
in the CSV is not made again, so the same command after an interruption goes on where it stopped.

Every method trains about as many values as RIGSA's ticket has entries (SIZE below), except full and dense, which train
everything, and lora16. Every method gets LAST examples in its last pass. RIGSA and LT-SFT look at others before that,
in RIGSA's rounds and in LT-SFT's first pass, FIRST together; with --budget total the methods that have only one pass get
these examples as well: once a comparison at equal last pass, once at equal total, `both` for those two.

compare.csv has a row per run: method, budget, lr, seed, density (trained values of the last pass / entries) and the score of each
evaluation set; `base` is the base itself. The folders of the runs are beside it, for dev/plot.py.
"""
import argparse
import csv
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROUNDS, ROUND, LAST = 5, 12800, 48000  # RIGSA's defaults: examples of a round, and of the last pass
FIRST = ROUNDS * ROUND
SIZE = 0.03545  # density of the nano ticket, 9803 entries: LoRA's rank becomes 2 (9792 values), RoSA's 1 with half of the mask
GATE = 7 / 3  # RIGSA's learning rate of the gates, relative to that of DeltaW

LOW, MIDDLE, HIGH = (3e-5, 1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2), (1e-3, 3e-3, 1e-2, 3e-2)
GATED = (1e-3, 3e-3, 6e-3, 1.2e-2)
METHODS = {  # name: (learning rates, options)
    "rigsa": (GATED, ["--method", "rigsa"]),
    "gated random": (GATED, ["--method", "random", "--init", "gated", "--density", SIZE]),
    "random": (HIGH, ["--method", "random", "--density", SIZE]),
    "ltsft": (MIDDLE, ["--method", "ltsft", "--density", SIZE]),
    "lora": (MIDDLE, ["--method", "lora", "--density", SIZE]),
    "qlora": (MIDDLE, ["--method", "lora", "--base-type", "nf4", "--density", SIZE]),
    "lora16": (MIDDLE, ["--method", "lora", "--rank", 16]),
    "rosa": (MIDDLE, ["--method", "rosa", "--density", SIZE / 2]),
    "full": (LOW, ["--method", "full", "--weight-decay", 0]),
    "dense": (LOW, ["--method", "dense"]),
}
SEVERAL_PASSES = ("rigsa", "ltsft")


def plan(args):
    """All runs as dicts: method, budget, lr, seed, the options of ./train_baselines and the number of examples."""
    runs = []
    for seed in args.seeds:  # seed by seed: an interrupted comparison has all methods
        for method in args.methods:
            rates, options = METHODS[method]
            for lr in rates:
                first, last = round(FIRST * args.share), round(LAST * args.share)
                budget = "both" if method in SEVERAL_PASSES else args.budget
                if budget == "total":
                    last += first
                examples = {"rigsa": round(ROUND * args.share), "ltsft": first, "full": last}.get(method, 0)
                runs.append({
                    "method": method, "budget": budget, "lr": lr, "seed": seed,
                    "cost": last + (first if method in SEVERAL_PASSES else 0),
                    "options": [*options, "--lr", lr, "--alpha-lr", GATE * lr, "--seed", seed, "--ticket-examples", last,
                                *(["--examples", examples] if examples else [])],
                })
    return runs


def key(row):
    """What tells a run from the others."""
    return row["method"], row["budget"], f"{float(row['lr']):g}", int(row["seed"])


def folder(args, run):
    """Of a run."""
    return os.path.join(args.out, "{}_{}_{}_{}".format(*key(run)).replace(" ", "_"))


def read_table(path):
    """The rows of a run's table.csv as dicts."""
    with open(os.path.join(path, "table.csv"), newline="") as file:
        return list(csv.DictReader(file))


def train(args, run):
    """Makes a run; its rows: that of the base, and that of the last pass. RuntimeError, in one line, when it fails."""
    out = folder(args, run)
    result = subprocess.run(["./train_baselines", *map(str, run["options"]), "--out", out, "--overwrite"],
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{out}: {result.stderr.strip()}")
    table = read_table(out)
    return table[0], table[-1]


def scores(row):
    """The scores in a row of a table.csv: a dict, evaluation set -> share."""
    names = [name.removesuffix("_error") for name in row if name.endswith("_error")]
    return {name: row[name] for name in names}


def minutes(seconds):
    """For people."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main():
    parser = argparse.ArgumentParser(description="All methods at several learning rates and seeds, into one CSV.")
    parser.add_argument("--out", default="out_compare", metavar="FOLDER", help="of compare.csv and the runs (default %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="which (default: %(default)s)")
    parser.add_argument("--seeds", default="1,2,3", help="which (default: %(default)s)")
    parser.add_argument("--budget", default="last", choices=("last", "total"), help="what is equal (default %(default)s)")
    parser.add_argument("--share", type=float, default=1, help="of the examples of every pass (default 1)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        sys.exit(f"compare.py: no method `{unknown[0]}`; there are {', '.join(METHODS)}")
    if not os.access("./train_baselines", os.X_OK):
        sys.exit("compare.py: no ./train_baselines here; make train_baselines")
    os.makedirs(args.out, exist_ok=True)
    path, done = os.path.join(args.out, "compare.csv"), set()
    if os.path.exists(path):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        done = {key(row) for row in rows if row["method"] != "base"}
        if rows and float(rows[0]["share"]) != args.share:
            sys.exit(f"compare.py: {path} was made with --share {rows[0]['share']}; choose another --out")
    runs = plan(args)
    todo = [run for run in runs if key(run) not in done]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done")
    start, total, finished = time.time(), sum(run["cost"] for run in todo), 0

    def work(run):
        return run, train(args, run)

    with open(path, "a", newline="") as file, ThreadPoolExecutor(args.jobs) as pool:
        try:
            for run, (base, last) in pool.map(work, todo):
                sets = list(scores(base))
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(["method", "budget", "share", "lr", "seed", "density", *sets])
                    writer.writerow(["base", "", args.share, 0, 0, 0, *scores(base).values()])
                writer.writerow([run["method"], run["budget"], args.share, f"{run['lr']:g}", run["seed"], last["density"],
                                 *scores(last).values()])
                file.flush()
                finished += run["cost"]
                left = (time.time() - start) * (total - finished) / finished
                print(f"{run['method']:13} lr {run['lr']:<7g} seed {run['seed']}   " +
                      "   ".join(f"{name} {float(score):.3f}" for name, score in scores(last).items()) +
                      f"   {minutes(left)} left", flush=True)
        except (RuntimeError, KeyboardInterrupt) as error:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"compare.py: {error or 'interrupted: the same command goes on'}")


if __name__ == "__main__":
    main()

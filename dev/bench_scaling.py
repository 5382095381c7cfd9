"""
How a training step's time and memory grow with the sequence, the density, the threads and the model.

    make dev/bench_step
    python dev/bench_scaling.py                     # prints the table
    python dev/bench_scaling.py --out doc           # and writes scaling.csv, scaling.svg and scaling.png there

Each sweep changes one thing about a step of SmolLM2-135M on 2 x 832 tokens (sequences: one sequence).
"""
import argparse
import csv
import os
import statistics
import sys

from bench_step import SPARSE, rigsa_stepper

THREADS = os.cpu_count()
USUAL = {"model": "135M", "sequences": 2, "tokens": 832, "density": 1, "precision": "fp32"}
SWEEPS = {  # name: (what changes, values, the rest); each for the dense and the sparse adapter, but density itself
    "tokens": ("tokens", [128, 256, 512, 1024, 2048, 4096, 8192], {"sequences": 1}),
    "density": ("density", [1, 0.5, 0.25, 0.1, SPARSE, 0.01], {}),
    "threads": ("threads", [1 << n for n in range(THREADS.bit_length()) if 1 << n < THREADS] + [THREADS], {}),
    "model": ("model", ["nano", "135M", "360M"], {"sequences": 1}),
}
FIELDS = ["sweep", "model", "precision", "threads", "sequences", "tokens", "density", "seconds", "tokens_per_s", "gigabytes"]


def measure(sweep, setting, steps):
    """The row of FIELDS for a step with `setting`, a dict: the median of `steps` steps."""
    setting = {"threads": THREADS} | USUAL | setting
    with rigsa_stepper(**setting) as process:
        taken = [process.step() for _ in range(steps)]
    seconds = statistics.median(step[0] for step in taken)
    return {"sweep": sweep, **setting, "seconds": round(seconds, 4),
            "tokens_per_s": round(setting["sequences"] * setting["tokens"] / seconds),
            "gigabytes": round(max(step[1] for step in taken) / 1e9, 3)}


def rows(sweeps, steps):
    """The rows of the table, as they are measured."""
    for sweep in sweeps:
        what, values, rest = SWEEPS[sweep]
        for density in [1] if what == "density" else [1, SPARSE]:
            for value in values:
                yield measure(sweep, {"density": density} | rest | {what: value}, steps)


def plot(table, folder):
    """Seconds and gigabytes of each sweep, a column of two panels each, as scaling.svg and scaling.png in `folder`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(row["sweep"] for row in table))
    figure, axes = plt.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 5.5), sharex="col", squeeze=False)
    for column, sweep in enumerate(sweeps):
        what = SWEEPS[sweep][0]
        for density in [None] if what == "density" else [1, SPARSE]:
            chosen = [row for row in table if row["sweep"] == sweep and density in (None, row["density"])]
            for panel, field in zip(axes[:, column], ["seconds", "gigabytes"]):
                panel.plot([row[what] for row in chosen], [row[field] for row in chosen], marker="o",
                           label=density and f"density {density:g}")
                panel.set_yscale("log")
                panel.set_ylabel(f"{field} per step" if field == "seconds" else "peak memory, GB")
                panel.grid(True, which="both", alpha=0.3)
                if what != "model":
                    panel.set_xscale("log", base=10 if what == "density" else 2)
        axes[1, column].set_xlabel(what)
    axes[0, 0].legend()
    figure.tight_layout()
    for kind in ("svg", "png"):
        figure.savefig(os.path.join(folder, f"scaling.{kind}"), dpi=150)


def main():
    parser = argparse.ArgumentParser(description="How a training step's time and memory grow.")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="which (default: all)")
    parser.add_argument("--steps", type=int, default=3, help="the median of so many (default 3)")
    parser.add_argument("--longest", type=int, default=8192, help="sequence of the sweep over tokens (default 8192)")
    parser.add_argument("--out", metavar="FOLDER", help="where scaling.csv, scaling.svg and scaling.png go")
    args = parser.parse_args()
    SWEEPS["tokens"] = ("tokens", [tokens for tokens in SWEEPS["tokens"][1] if tokens <= args.longest], {"sequences": 1})
    print(f"| {' | '.join(FIELDS)} |\n{'|---' * len(FIELDS)}|")
    table = []
    for row in rows(args.sweeps, args.steps):
        table.append(row)
        print(f"| {' | '.join(str(row[field]) for field in FIELDS)} |", flush=True)
    if args.out:
        with open(os.path.join(args.out, "scaling.csv"), "w", newline="", encoding="ascii") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        plot(table, args.out)


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as error:
        sys.exit(f"bench_scaling.py: {error}")

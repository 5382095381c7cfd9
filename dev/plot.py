"""
Draws what dev/compare.py found, each figure as PNG and SVG.

    python dev/plot.py out_compare                 trade-off, table, rounds and loss curves, into out_compare
    python dev/plot.py out                         of a single run of ./train_rigsa: rounds and loss curve
    python dev/plot.py doc/real.csv                the table on the screen, trade-off into doc/real_tradeoff_*
    python dev/plot.py doc/real_test.csv           of a test.csv the table alone

tradeoff   the new task against what is left of the old ones, a curve per method over its learning rates. The old ones count
           as the mean over their evaluation sets of score / score of the base, or loss of the base / loss. Points are means
           over seeds, bars their standard deviations. Better is up, and to the right. RIGSA and LT-SFT, which have passes before
           the last, are in both figures.
table.md   the same as numbers: means over seeds, ± half of the 95 % interval, or of one seed the standard error
rounds     RIGSA round by round: shares that are right and losses, each with its own axis, density, kept share
loss       the loss of the last pass of every method at its middle learning rate, smoothed

Which evaluation sets are losses, nats a token, where lower is better, is read from their files; where there is
only a CSV, what goes above 1 is one. Of a run that was made twice the later row counts.
"""
import argparse
import glob
import itertools
import os
import re

import command

import matplotlib
matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "rigsa.c"
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from compare import read_rows  # noqa: E402
from run_files import Run, smoothed  # noqa: E402

STYLE = {  # of the methods: name in the legend, colour, marker; colours of Okabe and Ito, which everybody can tell apart
    "rigsa": ("RIGSA", "#000000", "o"), "gated random": ("random mask, gated", "#56B4E9", "o"),
    "random": ("random mask", "#0072B2", "s"), "ltsft": ("LT-SFT", "#009E73", "^"), "rosa": ("RoSA", "#CC79A7", "D"),
    "lora": ("LoRA", "#E69F00", "v"), "qlora": ("QLoRA", "#D55E00", "v"), "lora16": ("LoRA, rank 16", "#F0C000", "<"),
    "qlora16": ("QLoRA, rank 16", "#F8A070", "<"), "qlora64": ("QLoRA, rank 64", "#D55E00", "<"),
    "qlora256": ("QLoRA, rank 256", "#8A3A00", "<"), "redraw": ("RIGSA, redrawn, top 80 %", "#555555", "^"),
    "rigsa4": ("RIGSA, last pass at four times the rate", "#000000", "P"),
    # tickets of .006, set back and trained again: doc/real.md, section 1
    "own start": ("RIGSA's tickets again, at another rate", "#000000", "*"),
    "fresh start": ("the same, fresh start", "#777777", "*"), "shuffled mask": ("the same, mask shuffled", "#BBBBBB", "*"),
    "full": ("full", "#888888", "x"), "dense": ("all matrices, decay to W0", "#882255", "x"),
}
BASES = {"base": "base", "base nf4": "base, rounded to NF4"}  # in tables only
POINTS = 400  # of a loss curve that are drawn
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # t by number of
MANY_SEEDS = 2.23  # seeds, half of a 95 % interval in standard errors; beyond the table a little wide
COSTS = (("examples", "examples of the pass", 1, ".0f"), ("values", "millions trained", 1e6, ".1f"),
         ("seconds", "minutes", 60, ".0f"), ("memory", "GB", 1e3, ".1f"))  # column, heading, unit, format: where a CSV has it
NATS = "nats a token, lower is better"


def save(figure, folder, name):
    """As PNG and SVG: the same files from the same numbers, whatever the day."""
    for end, more in (("png", {}), ("svg", {"metadata": {"Date": None}})):
        figure.savefig(os.path.join(folder, f"{name}.{end}"), dpi=160, bbox_inches="tight", **more)
    plt.close(figure)
    print(os.path.join(folder, f"{name}.png"), "and .svg")


def axes(width, height, **more):
    """A figure without the lines that carry nothing."""
    figure, axis = plt.subplots(figsize=(width, height), **more)
    for one in np.ravel(axis):
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#dddddd", linewidth=0.5)
    return figure, axis


def by_rate(rows, method, budget):
    """The rows of a method with this budget, or with `both`: a dict, learning rate -> rows of its seeds."""
    found = {}
    for row in rows:
        if row["method"] == method and row["budget"] in (budget, "both"):
            found.setdefault(float(row["lr"]), {})[row["seed"]] = row
    return {lr: list(seeds.values()) for lr, seeds in sorted(found.items())}


def mean_and_spread(values):
    """Over the first axis: mean, and standard deviation of a sample, zero where there is only one."""
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=len(values) > 1)


def kept(row, base, name, is_loss):
    """How much of the base's score is left, a share; of a loss that of the base over this one."""
    share = float(row[name]) / float(base[name])
    return 1 / share if is_loss(name) else share


def mean_kept(row, rows, source, is_loss):
    """The mean of it over the old tasks, `source`; the base is the first of `rows` that is one."""
    base = next(row for row in rows if row["method"] == "base")
    return np.mean([kept(row, base, name, is_loss) for name in source])


def draw_tradeoff(rows, sets, is_loss, folder, name="tradeoff"):
    """
    A figure per budget: everything, and beside it the corner where much is read and little forgotten, if more than one method
    gets there.
    """
    target, source = sets[0], sets[1:]
    better = -1 if is_loss(target) else 1
    for budget in sorted({row["budget"] for row in rows} - {"", "both"}):
        figure, both = axes(11, 4.5, ncols=2)
        found = []
        for method, (label, colour, marker) in STYLE.items():
            points = [mean_and_spread([(mean_kept(row, rows, source, is_loss), float(row[target])) for row in seeds])
                      for seeds in by_rate(rows, method, budget).values()]
            if not points:
                continue
            mean, spread = np.array(points).transpose(1, 2, 0)
            found.append(mean)
            for axis in both:
                axis.errorbar(*mean, xerr=spread[0], yerr=spread[1], label=label, color=colour, marker=marker,
                              markersize=5, linewidth=1.2, elinewidth=0.7, capsize=2)
        for axis in both:
            axis.axvline(1, color="#888888", linewidth=0.7, linestyle=":")
            axis.set_xlabel(f"kept of {', '.join(source)} (share of the base)")
        both[0].set_ylabel(f"{target}, {NATS if is_loss(target) else 'share read'}")
        both[0].yaxis.set_inverted(is_loss(target))
        best = max(better * np.hstack(found)[1])
        if sum(any((share > 0.89) & (better * read > best - 0.22)) for share, read in found) > 1:
            both[1].set(xlim=(0.89, 1.01), ylim=(better * (best - 0.22), better * (best + 0.02)))
        else:
            both[1].remove()
        figure.axes[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
        save(figure, folder, f"{name}_{budget}")


def with_error(seeds, name):
    """The mean of a score over a run's seeds, and how sure it is."""
    mean, spread = mean_and_spread([float(row[name]) for row in seeds])
    n, of_one = len(seeds), seeds[0].get(f"{name}_error", "nan")
    error = float(of_one) if n == 1 else STUDENT.get(n, MANY_SEEDS) * spread / n ** 0.5
    return f"{mean:.3f} ± {error:.3f}"


def table(rows, sets, source, is_loss):
    """
    Lines of Markdown: one per method, budget and learning rate, the budgets one below the other. `source`: the old tasks, of
    which a share is kept; none, and there is no such column.
    """
    costs = [cost for cost in COSTS if cost[0] in rows[0]]
    heads = ["method", "budget", "lr", "seeds", "density", *(heading for _, heading, _, _ in costs),
             *(f"{name}, nats" if is_loss(name) else name for name in sets), *(["kept"] if source else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    labels = BASES | {method: label for method, (label, _, _) in STYLE.items()}
    for budget, (method, label) in itertools.product(("", "both", "last", "total"), labels.items()):
        for lr, seeds in by_rate([row for row in rows if row["budget"] == budget], method, budget).items():
            def mean(column):
                return np.mean([float(row[column] or "nan") for row in seeds])
            cells = [label, budget, f"{lr:g}", f"{len(seeds)}", f"{mean('density'):.3f}",
                     *(f"{mean(column) / unit:{form}}" for column, _, unit, form in costs),
                     *(with_error(seeds, name) for name in sets)]
            if source:
                cells.append(f"{np.mean([mean_kept(row, rows, source, is_loss) for row in seeds]):.3f}")
            line = re.sub(r"( ± )?nan", "", "| " + " | ".join(cells) + " |")
            lines.append(re.sub(r"\b0\.", ".", line))
    return lines


def write_table(rows, sets, is_loss, folder):
    """table.md."""
    path = os.path.join(folder, "table.md")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(table(rows, sets, sets[1:], is_loss)) + "\n")
    print(path)


def draw_rounds(run, folder):
    """Of one run with rounds."""
    rounds = run.table[1:]
    label, at = [row["round"] for row in rounds], range(len(rounds))
    units = [(names, unit) for names, unit in (
        ([name for name in run.sets if not run.is_loss(name)], "share that is right"),
        (list(filter(run.is_loss, run.sets)), NATS)) if names]
    figure, (*scores, shares) = axes(4 * (len(units) + 1), 3.2, ncols=len(units) + 1, layout="constrained")
    for axis, (names, unit) in zip(scores, units):
        for name in names:
            value, error = run.scores(name)
            axis.errorbar(at, value[1:], error[1:], marker="o", markersize=4, capsize=2, label=name)
        axis.set_ylabel(unit)
    shares.semilogy(at, [float(row["density"]) for row in rounds], marker="o", markersize=4, color="black", label="density")
    shares.semilogy(at[:-1], [float(row["kept"]) for row in rounds[:-1]], marker="s", markersize=4, color="#D55E00", label="kept")
    for axis in (*scores, shares):
        axis.set_xticks(at, label)
        axis.set_xlabel("round")
        axis.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    save(figure, folder, "rounds")


def last_pass(folder):
    """The losses of the last pass of the run in `folder`, smoothed."""
    path = os.path.join(folder, "loss.csv")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: there are no losses in it")
    return smoothed([float(row["loss"]) for row in rows if row["pass"] == rows[-1]["pass"]])


def draw_losses(folders, folder):
    """`folders`: a dict, label -> (folder of a run, colour)."""
    figure, axis = axes(6, 3.6)
    for label, (run, colour) in folders.items():
        loss = last_pass(run)
        step = 1 + len(loss) // POINTS
        axis.semilogy(range(0, len(loss), step), loss[::step], color=colour, label=label, linewidth=1)
    axis.set_xlabel("update of the last pass")
    axis.set_ylabel("loss")
    axis.legend(fontsize=8, frameon=False)
    save(figure, folder, "loss")


def middle_runs(rows, folder):
    """For each method the run of its first seed and a middle learning rate: a dict as draw_losses takes it."""
    found = {}
    for method, (label, colour, _) in STYLE.items():
        mine = sorted((int(row["seed"]), row["budget"], float(row["lr"])) for row in rows if row["method"] == method)
        same = [run for run in mine if run[:2] == mine[0][:2]]
        if same:
            seed, budget, lr = same[len(same) // 2]
            found[label] = os.path.join(folder, f"{method}_{budget}_{lr:g}_{seed}".replace(" ", "_")), colour
    return found


def last_passes(path):
    """Of a CSV of dev/compare.py: the rows of last passes and of the base, and the names of their scores."""
    rows = [row for row in read_rows(path) if not row.get("round")]
    columns = list(rows[0]) if rows else ["density"]
    scores = columns[columns.index("density") + 1:]
    return rows, [name for name in scores if not name.endswith("_error")]


def show(path):
    """A CSV without the runs that it is about: its table on the screen, its trade-off beside it."""
    rows, sets = last_passes(path)
    if not rows:
        raise ValueError(f"{path}: no rows of dev/compare.py in it")
    losses = {name for name in sets if max(float(row[name]) for row in rows) > 1}
    of_runs = "share" in rows[0]  # a test.csv also scores the new task in other ways
    print("\n".join(table(rows, sets, sets[1:] if of_runs else [], losses.__contains__)))
    if of_runs:
        folder, name = os.path.split(path.removesuffix(".csv"))
        draw_tradeoff(rows, sets, losses.__contains__, folder, f"{name}_tradeoff")


@command.line
def main():
    parser = argparse.ArgumentParser(description="Draws a comparison, or a single run, as PNG and SVG.")
    parser.add_argument("folder", help="of dev/compare.py, or of a run; or a CSV of dev/compare.py alone")
    folder = parser.parse_args().folder
    if folder.endswith(".csv"):
        return show(folder)
    rows, sets = last_passes(os.path.join(folder, "compare.csv"))
    if rows:
        folders = middle_runs(rows, folder)
        rigsa = sorted(glob.glob(os.path.join(folder, "rigsa_*_0.003_*", "")))
        run = Run(rigsa[0] if rigsa else next(iter(folders.values()))[0])
        draw_tradeoff(rows, sets, run.is_loss, folder)
        write_table(rows, sets, run.is_loss, folder)
        if rigsa:
            draw_rounds(run, folder)
    else:
        folders = {os.path.basename(os.path.normpath(folder)): (folder, "black")}
        run = Run(folder)
        draw_rounds(run, folder)
    draw_losses(folders, folder)
    for note in run.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    main()

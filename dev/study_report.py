"""
What dev/study.py found, as tables with intervals and a plot per question.

    python dev/study_report.py doc/study.csv doc/study.md     tables in the page, plots beside it

The tables `compare` and `compare_ranks` are of another file, compare.csv beside the study's: full-length
runs of dev/compare.py.

A table stands between two comments of the page. It has a row per arm: means over the seeds of the answer
(never of the one that chose the rate), and the difference to the arm that the question compares with
(BESIDE), pair by pair over the seeds that both have, with 95 % intervals of Student's t. `kept` is the mean
over the skills of score / score of the base. Plots have a point per seed and the interval of the mean.
"""
import argparse
import csv
import os
import re

import command
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from scipy import stats  # noqa: E402

SKILLS = ("addition", "sizes", "packing")
BESIDE = {  # question: the arm that the others are compared with, or those of the same `group: `
    "decay": "decay 1", "lottery": "own start", "gate": "gate 1e-6, learned, start random",
    "pruning": "5 rounds", "readings": "rest zero, rewind, matrix, 0.56", "rank": "rank 2",
    "targets": "RIGSA", "pictures": "RIGSA", "sizes": "RIGSA", "compare": "RIGSA",
    "compare_ranks": "rank 2",
}
COMPARED = {  # question: (method, budget, rate) of dev/compare.py, and its name here
    "compare": {
        ("rigsa", "both", 0.003): "RIGSA",
        ("gated random", "last", 0.003): "random mask, gated, equal last pass",
        ("gated random", "total", 0.003): "random mask, gated, equal total",
        ("random", "last", 0.003): "random mask, from zero",
        ("ltsft", "both", 0.001): "LT-SFT",
        ("rosa", "last", 0.001): "RoSA",
        ("lora", "last", 0.001): "LoRA",
        ("lora16", "last", 0.001): "LoRA, rank 16, eight times the values",
        ("dense", "last", 1e-4): "all entries, decay to W0",
    },
    "compare_ranks": {
        ("lora", "last", 0.001): "low rates: rank 2", ("lora16", "last", 0.0003): "low rates: rank 16",
        ("lora", "last", 0.003): "middle rates: rank 2", ("lora16", "last", 0.001): "middle rates: rank 16",
        ("lora", "last", 0.01): "high rates: rank 2", ("lora16", "last", 0.003): "high rates: rank 16",
    },
}


def read(path):
    """Rows of study.csv and compare.csv, numbers in place of texts, with shares of the base's scores."""
    with open(path, newline="") as file:
        rows = compared(os.path.join(os.path.dirname(path), "compare.csv")) + list(csv.DictReader(file))
    for row in rows:
        for name in ("lr", "seed", "density", "target", *SKILLS):
            row[name] = float(row[name] or "nan")
    base = next(row for row in rows if row["question"] == "base" and row["arm"].endswith("width 96"))
    widths = {row["arm"].split(", ")[1]: row for row in rows if row["question"] == "base"}
    for row in rows:
        mine = widths.get(row["arm"].split(":")[0], base)
        row["kept_share"] = np.mean([row[skill] / mine[skill] for skill in SKILLS])
        row["addition_share"] = row["addition"] / mine["addition"]
    return rows


def compared(path):
    """The rows of a compare.csv that COMPARED names, as rows of study.csv; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        base, *rows = ({**row, "role": "answer", "target": row["digits"]} for row in csv.DictReader(file))
    named = [{**row, "question": question, "arm": arm} for question, runs in COMPARED.items()
             for run, arm in runs.items() for row in rows
             if run == (row["method"], row["budget"], float(row["lr"]))]
    return [{**base, "question": "base", "arm": "digits, width 96"}, *named]


def interval(values):
    """(mean, half of the 95 % interval of Student's t); NaN where there is one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def paired(mine, other, name):
    """interval of the differences over the seeds that both have; None where there are none."""
    there = {row["seed"]: row[name] for row in other}
    differences = [row[name] - there[row["seed"]] for row in mine if row["seed"] in there]
    return interval(differences) if differences else None


def arms_of(rows, question):
    """The answers of a question: a dict, arm -> rows, in the order of the file."""
    found = {}
    for row in rows:
        if row["question"] == question and row["role"] == "answer":
            found.setdefault(row["arm"], []).append(row)
    return found


def beside(arms, question, name):
    """The rows that arm `name` is compared with; None for that arm itself and where they are not there."""
    group, colon, _ = name.rpartition(": ")
    other = group + colon + BESIDE[question]
    return None if other == name else arms.get(other)


def number(value, signed=False):
    """Three decimals without the zero before the point."""
    return "" if np.isnan(value) else re.sub(r"^([+-]?)0\.", r"\1.", f"{value:{'+' if signed else ''}.3f}")


def with_interval(pair, signed=False):
    """mean +- half."""
    mean, half = pair
    return number(mean, signed) + (f" ± {number(half)}" if half == half else "")


def table(rows, question):
    """Lines of Markdown."""
    arms = arms_of(rows, question)
    lines = ["| arm | lr | seeds | density | target | kept | addition kept | target, difference | " +
             "kept, difference |", "|---|---|---|---|---|---|---|---|---|"]
    for name, mine in arms.items():
        other = beside(arms, question, name)
        differences = [paired(mine, other, column) if other else None for column in ("target", "kept_share")]
        density = number(np.mean([row["density"] for row in mine]))
        lines.append(f"| {name} | {mine[0]['lr']:g} | {len(mine)} | {density} | " +
                     " | ".join(with_interval(interval([row[column] for row in mine]))
                                for column in ("target", "kept_share", "addition_share")) + " | " +
                     " | ".join(with_interval(pair, True) if pair else "" for pair in differences) + " |")
    return lines


def rates_table(rows, question):
    """Lines of Markdown: the held-out target and the kept skills at every rate that was tried, one seed."""
    tried = [row for row in rows if row["question"] == question and row["role"] == "choose"]
    rates = sorted({row["lr"] for row in tried})
    lines = ["| target, kept | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |",
             "|---|" + "---|" * len(rates)]
    for arm in dict.fromkeys(row["arm"] for row in tried):
        cells = {row["lr"]: f"{number(row['target'])}, {number(row['kept_share'])}" for row in tried
                 if row["arm"] == arm}
        lines.append(f"| {arm} | " + " | ".join(cells.get(lr, "") for lr in rates) + " |")
    return lines


def replace(page, name, lines):
    """The page with these lines between the comments of this name; ValueError where it has none."""
    start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"the page has no place for a table, {start.strip()} {end}")
    before, rest = page.split(start)
    return before + start + "\n".join(lines) + "\n" + end + rest.split(end)[1]


def draw(rows, question, path):
    """A row per arm, the target on the left, what is kept of the skills on the right."""
    arms = arms_of(rows, question)
    figure, axes = plt.subplots(ncols=2, sharey=True, figsize=(8, 0.8 + 0.24 * len(arms)))
    columns = {"target": "target, share right", "kept_share": "skills, share of the base's"}
    for axis, (column, label) in zip(axes, columns.items()):
        for place, mine in enumerate(arms.values()):
            values = [row[column] for row in mine]
            mean, half = interval(values)
            axis.plot(values, [place] * len(values), "o", color="#56B4E9", markersize=3)
            axis.errorbar([mean], [place], xerr=[0 if np.isnan(half) else half], fmt="|", color="black",
                          capsize=2, linewidth=1)
        shown = [row[column] for mine in arms.values() for row in mine]
        margin = 0.04 * (max(shown) - min(shown)) + 0.005
        axis.set_xlim(min(shown) - margin, max(shown) + margin)  # wide intervals are cut
        axis.set_yticks(range(len(arms)), arms, fontsize=8)
        axis.set_xlabel(label, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.5)
    axes[0].invert_yaxis()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def report(csv_path, page_path):
    """Replaces the page's tables, of all questions that have rows, and draws their plots beside it."""
    rows = read(csv_path)
    with open(page_path) as file:
        page = file.read()
    for question in BESIDE:
        if any(row["question"] == question and row["role"] == "choose" for row in rows):
            page = replace(page, f"{question}, rates", rates_table(rows, question))
        if arms_of(rows, question):
            page = replace(page, question, table(rows, question))
            draw(rows, question, os.path.join(os.path.dirname(page_path), f"study_{question}.svg"))
    with open(page_path, "w") as file:
        file.write(page)


@command.line
def main():
    parser = argparse.ArgumentParser(description="The study's tables and plots.")
    parser.add_argument("csv", help="of dev/study.py")
    parser.add_argument("page", help="the page whose tables are replaced; plots go beside it")
    args = parser.parse_args()
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay letters: small files
    matplotlib.rcParams["svg.hashsalt"] = "study"
    report(args.csv, args.page)


if __name__ == "__main__":
    main()

"""
A run of train_rigsa at a glance: one HTML file that needs nothing beside it.

    python dev/report.py out                                        writes out/report.html
    ./evaluate_rigsa --ticket out/ticket.bin --details ticket.jsonl
    python dev/report.py out --details ticket.jsonl                 with examples, too

It shows the scores before and after, round by round, the loss of every pass, where the survivors live
(density, signs and gates by layer and kind of matrix), examples with what was made of them, and the settings.
What a run has not written yet is left out: a run that is still going, or one of another method, has a shorter
report.

Files that the settings name (base, evaluations) are looked for from where the run was started: start this
there, too. Examples come from files of details (doc/model.md), such as one of the base and one of the ticket;
--tokenizer shows those as text that are not in the nano alphabet. Needs numpy and matplotlib.
"""
import argparse
import html
import io
import itertools
import json
import math
import os
import re
import string

import command

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from chat_template import load_tokenizer  # noqa: E402
from import_hf import initial_values  # noqa: E402
from run_files import Run, smoothed  # noqa: E402

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "report_template.html")
KINDS = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices of a layer, as adapted_shapes names them
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
           "#882255")  # Okabe and Ito; the target first
INK, GREY, LINE = "#1f2328", "#6e7781", "#d8dee4"
HEAT_WIDTH = 2.4  # inches of a heat map, four in a row
FEW = 12  # layers up to which a heat map has room for numbers
POINTS = 300  # of a loss curve that are drawn
EXAMPLES = 6  # of each evaluation that are shown
SHORT = 70  # tokens below which examples stand six in a row, otherwise two

plt.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "rigsa", "font.family": "sans-serif", "font.size": 9,
    "text.color": INK, "axes.labelcolor": GREY, "axes.edgecolor": LINE, "xtick.color": GREY,
    "ytick.color": GREY, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5, "axes.axisbelow": True,
})


# ------------------------------------------------------------------------------------------------------------
# pictures

def svg(figure):
    """A figure as an <svg> element of its own size, and closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.02,
                   metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg"):]


def boxed(figure, title, caption):
    """
    A figure with its title above and how to read it below. The wider it is, the more it takes of a row that
    has room.
    """
    width = 96 * figure.get_size_inches()[0]
    return (f'<figure style="flex: {width:.0f} 1 {width:.0f}px; max-width: '
            f'{1.3 * width:.0f}px"><h3>{html.escape(title)}</h3>'
            f"{svg(figure)}<figcaption>{html.escape(caption)}</figcaption></figure>")


def label_ends(axis, ends):
    """
    Names curves at their right ends, without overlaps. `ends`: a list of (x, y, text, colour), y in data
    units.
    """
    low, high = axis.get_ylim()
    gap, last = 0.065 * (high - low), -math.inf
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        last = max(y, last + gap)
        axis.annotate(text, (x, last), xytext=(8, 0), textcoords="offset points", color=colour, va="center",
                      fontsize=9,
                      annotation_clip=False)


def draw_scores(run, columns, unit, against_base):
    """
    Score by row of the table, with standard errors, of columns of one unit; or its difference from the base's
    score.
    """
    figure, axis = plt.subplots(figsize=(2.9, 2.7), layout="constrained")
    at, ends = np.arange(len(run.table)), []
    for column in columns:
        value, error = run.scores(column)
        value = value - value[0] if against_base else value
        colour = COLOURS[run.sets.index(column) % len(COLOURS)]
        axis.fill_between(at, value - error, value + error, color=colour, alpha=0.15, linewidth=0)
        axis.plot(at, value, color=colour, marker="o", markersize=4, linewidth=1.8)
        ends.append((at[-1], value[-1], column, colour))
    axis.set_xticks(at, [row["round"] for row in run.table], fontsize=8)
    axis.set_ylabel(f"{unit}, less the base's" if against_base else unit)
    axis.grid(axis="x", visible=False)
    if against_base:
        axis.axhline(0, color=GREY, linewidth=0.8)
        label_ends(axis, ends)
    return figure


def draw_density(run):
    """Density by pass on a logarithmic scale, and where the entries of each round went."""
    rows = [row for row in run.table if row["density"] != "nan"]
    figure, (left, right) = plt.subplots(ncols=2, figsize=(4.6, 2.7), layout="constrained")
    at = np.arange(len(rows))
    density = [float(row["density"]) for row in rows]
    left.bar(at, density, color="#54aeff", width=0.62)
    left.set_yscale("log")
    left.set_ylim(min(density) / 2, 2)
    for x, y in zip(at, density):
        left.annotate(f"{y:.3f}".lstrip("0") if y < 1 else "1", (x, y), xytext=(0, 3),
                      textcoords="offset points", ha="center",
                      fontsize=7, color=INK)
    left.set_xticks(at, [row["round"] for row in rows])
    left.set_ylabel("density")
    left.grid(visible=False)
    left.tick_params(axis="y", which="both", left=False, labelleft=False)  # the bars say it
    pruned = [row for row in rows if row["kept"] != "nan"]
    at = np.arange(len(pruned))
    kept, flipped = (np.array([float(row[name]) for row in pruned]) for name in ("kept", "flipped"))
    small = 1 - kept - flipped
    for low, share, colour, name in ((0, kept, "#2da44e", "kept"), (kept, small, "#d0d7de", "too small"),
                                     (kept + small, flipped, "#D55E00", "flipped")):
        right.bar(at, share, bottom=low, color=colour, label=name, width=0.62)
    right.set_xticks(at, [row["round"] for row in pruned])
    right.set_ylabel("share of the round's entries")
    right.grid(visible=False)
    right.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8,
                 handlelength=1, columnspacing=1)
    return figure


def draw_losses(run):
    """
    The smoothed loss of every pass over the share of the pass that is done; light to dark, the last one in
    the target's colour.
    """
    passes = {}
    for row in run.losses:
        passes.setdefault(row["pass"], []).append(float(row["loss"]))
    figure, axis = plt.subplots(figsize=(11.3, 3.0), layout="constrained")
    for number, (label, losses) in enumerate(passes.items()):
        smooth = smoothed(losses)
        step = 1 + len(smooth) // POINTS
        x = number + np.arange(1, len(smooth) + 1) / len(smooth)
        axis.semilogy(x[::step], losses[::step], color="#d0d7de", linewidth=0.6)
        axis.semilogy(x[::step], smooth[::step], color=COLOURS[0], linewidth=1.8)
        name = label if label == "ticket" else f"round {label}"
        axis.annotate(f"{name}, {len(losses)} updates", (number + 0.5, 1), xycoords=("data", "axes fraction"),
                      ha="center",
                      va="bottom", fontsize=9, color=INK)
        if number:
            axis.axvline(number, color=LINE, linewidth=1)
    axis.set_xlim(0, len(passes))
    axis.set_xticks([])
    axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axis.set_ylabel("loss, nats per answer token")
    return figure


def draw_layers(values, colours, form, low, high):
    """
    A heat map of `values`, a number per layer and kind; `form` formats those of a small model, which stand in
    their cells.
    """
    layers = len(values)
    cell = 0.34 if layers <= FEW else 0.19
    figure, axis = plt.subplots(figsize=(HEAT_WIDTH, cell * layers + 0.5), layout="constrained")
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    layer_axes(axis, layers)
    if layers <= FEW:
        for (layer, kind), value in np.ndenumerate(values):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            axis.text(kind, layer, form(value), ha="center", va="center", fontsize=7,
                      color="white" if dark else INK)
    else:
        bar = figure.colorbar(image, ax=axis, location="bottom", pad=0.015, aspect=30)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=7)
        bar.locator = matplotlib.ticker.MaxNLocator(4)
    return figure


def layer_axes(axis, layers, scale=1):
    """
    Kinds above, layers at the left, white lines between the cells, which are `scale` pixels wide and high.
    """
    axis.set_xticks((np.arange(len(KINDS)) + 0.5) * scale - 0.5, KINDS, fontsize=8)
    shown = np.arange(0, layers, 1 if layers <= FEW else 5)
    axis.set_yticks((shown + 0.5) * scale - 0.5, shown)
    axis.set_ylabel("layer")
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    for x in range(1, len(KINDS)):
        axis.axvline(x * scale - 0.5, color="white", linewidth=1.5)
    for y in range(1, layers):
        axis.axhline(y * scale - 0.5, color="white", linewidth=1.5 if layers <= FEW else 0.8)


def block_count(ticket):
    """
    Into how many blocks a side of a matrix is cut: some 16 survivors in each, so that chance does not make
    the picture.
    """
    mean = np.mean([len(index) for index in ticket.index])
    return int(np.clip(math.sqrt(mean / 16), 3, 16))


def draw_blocks(ticket, matrices):
    """
    Every matrix in its place as blocks: how far the density of a block is from the matrix's own. (figure,
    largest difference)
    """
    layers, blocks = len(matrices) // len(KINDS), block_count(ticket)
    picture = np.zeros((layers * blocks, len(KINDS) * blocks))
    for a, (_, (rows, columns)) in enumerate(matrices):
        row, column = np.divmod(ticket.index[a].astype(np.int64), columns)
        counts = np.zeros((blocks, blocks))
        np.add.at(counts, (row * blocks // rows, column * blocks // columns), 1)
        sizes = np.outer(*(np.bincount(np.arange(size) * blocks // size, minlength=blocks)
                           for size in (rows, columns)))
        layer, kind = divmod(a, len(KINDS))
        place = slice(layer * blocks, (layer + 1) * blocks), slice(kind * blocks, (kind + 1) * blocks)
        picture[place] = counts / np.maximum(sizes, 1) * rows * columns / max(len(row), 1)
    figure, axis = plt.subplots(figsize=(HEAT_WIDTH, (0.34 if layers <= FEW else 0.19) * layers + 0.5),
                                layout="constrained")
    most = max(np.quantile(np.abs(picture - 1), 0.98), 0.01)
    axis.imshow(picture, cmap="RdGy_r", vmin=1 - most, vmax=1 + most, aspect="auto", interpolation="nearest")
    layer_axes(axis, layers, blocks)
    return figure, most


# ------------------------------------------------------------------------------------------------------------
# sections

def by_layer(numbers):
    """A list with a number per adapted matrix as an array (layers, kinds)."""
    return np.array(numbers, dtype=float).reshape(-1, len(KINDS))


def share(value):
    """A share as text: .035, or 1 where it is everything."""
    return "1" if value == 1 else f"{value:.3f}".lstrip("0")


def flipped_share(start, end):
    """The share of values whose sign at the end is not that of their start."""
    return np.mean(np.sign(start) != np.sign(end)) if len(end) else 0


def tiles(run):
    """The first thing to look at: each evaluation before and after."""
    found = []
    for column in run.sets:
        value, error = run.scores(column)
        better = (value[-1] - value[0]) * (-1 if run.is_loss(column) else 1)
        sure = abs(value[-1] - value[0]) > 2 * math.hypot(error[0], error[-1])
        verdict = "same" if not sure else "better" if better > 0 else "worse"
        kind = "the new task" if column == run.sets[0] else "must not be forgotten"
        text = (f"{value[0]:.3f}", f"{value[-1]:.3f}", f"{error[-1]:.3f}")
        found.append(f'<div class="tile {verdict}"><span class="name">{html.escape(column)}</span><span '
                     f'class="kind">{kind}'
                     f'{", loss" if run.is_loss(column) else ""}</span><b>{text[1]}</b><span class="from">'
                     f"from {text[0]}, &plusmn;{text[2]}</span></div>")
    return f'<div class="tiles">{"".join(found)}</div>'


def scores_section(run):
    target, *others = run.sets
    found = []
    for columns, name, against_base, caption in (
            ([target], target, False, "The new task. The band is one standard error; base: before training."),
            ([column for column in others if not run.is_loss(column)], "What is left", True,
             "What must not be forgotten: the score less the base's."),
            ([column for column in others if run.is_loss(column)], "What is forgotten", True,
             "The loss less the base's: what the model has become worse at.")):
        if columns and len(run.table) > 1:
            unit = "nats a token" if run.is_loss(columns[0]) else "share that is right"
            found.append(boxed(draw_scores(run, columns, unit, against_base), name, caption))
    if any(row["kept"] != "nan" for row in run.table):
        found.append(boxed(draw_density(run), "What each round kept",
                           "Left: the share of DeltaW that a pass trains. Right: what became of them when it "
                           "was pruned."))
    names = [f"{column}, nats" if run.is_loss(column) else column for column in run.sets]
    heads = ["round", "density", "kept", "flipped", *names, "seconds"]
    lines = []
    for row in run.table:
        cells = [row["round"]] + ["" if row[name] == "nan" else f"{float(row[name]):.4f}"
                                  for name in ("density", "kept", "flipped")]
        cells += [f"{float(row[name]):.4f} <small>&plusmn;{float(row[f'{name}_error']):.4f}</small>"
                  for name in run.sets]
        lines.append("<tr><td>" + "</td><td>".join(cells + [f"{float(row['seconds']):.0f}"]) + "</td></tr>")
    table = f'<table><tr><th>{"</th><th>".join(map(html.escape, heads))}</th></tr>{"".join(lines)}</table>'
    return f'<h2>Scores</h2><div class="row">{"".join(found)}</div>{table}'


def losses_section(run):
    if not run.losses:
        return ""
    again = " Survivors begin each pass where they began, so the loss does, too."
    again = "" if run.settings.get("survivors") == "keep" else again
    return "<h2>Training</h2>" + boxed(draw_losses(run), "Loss of the passes",
                                       "Grey: single updates. Colour: their running mean." + again)


def survivors_section(run):
    if not run.ticket:
        return ""
    ticket, matrices = run.ticket, run.ticket.matrices
    sizes = [math.prod(shape) for _, shape in matrices]
    density = by_layer([len(index) / size for index, size in zip(ticket.index, sizes)])
    flipped = by_layer([
        flipped_share(initial_values(ticket.seed, a, ticket.draw, ticket.sigma, size)[index], values)
        for a, (size, index, values) in enumerate(zip(sizes, ticket.index, ticket.values))])
    gates = by_layer(ticket.gates)
    largest = np.abs(gates).max()
    blocks, most = draw_blocks(ticket, matrices)
    figures = [
        (draw_layers(density, "YlGnBu", share, density.min(), density.max()), "Density",
         "The share of each matrix that survived."),
        (blocks, "Inside the matrices", "Each cell is a matrix, its outputs down, its inputs across, in "
         f"{block_count(ticket)} x {block_count(ticket)} blocks. Red: up to {most:.0%} denser than the "
         "matrix; grey: thinner."),
        (draw_layers(gates, "PuOr", lambda value: f"{value:+.1f}" if largest >= 1
                     else f"{value:+.2f}".replace("0.", "."), -largest, largest), "Gates",
         "alpha of each matrix. Its sign alone means nothing: that of DeltaW may change with it."),
        (draw_layers(flipped, "OrRd", share, flipped.min(), max(flipped.max(), 1e-9)),
         "Flipped in the last pass",
         "The share of the survivors whose sign is no longer that of their start."),
    ]
    found = "".join(boxed(*figure) for figure in figures)
    for name, colours, caption in (("kept", "YlGnBu", "that survived the pruning"),
                                   ("flipped", "OrRd", "whose sign had flipped")):
        rounds = {}
        for row in run.pruning:
            rounds.setdefault(row["round"], []).append(int(row[name]) / max(int(row["entries"]), 1))
        for label, shares in rounds.items():
            found += boxed(draw_layers(by_layer(shares), colours, share, 0, 1), f"Round {label}: {name}",
                           f"The share of the round's entries {caption}.")
    entries = sum(map(len, ticket.index))
    by_kind = by_layer([len(index) for index in ticket.index]).sum(0)
    parts = ", ".join(f"{kind} {count / entries:.0%}" for kind, count in zip(KINDS, by_kind))
    return (f'<h2>Where the survivors live</h2><p>{entries:,} of {sum(sizes):,} entries are left, '
            f'{entries / sum(sizes):.2%}. '
            f'Where they are: {parts}.</p><div class="row">{found}</div>')


def read_details(paths):
    """
    The lines of files of details: a dict, round -> dict, (column, example) -> line; the last one on an
    example counts.
    """
    found = {}
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                for number, text in enumerate(file, 1):
                    line = json.loads(text)
                    found.setdefault(line["round"], {})[line["column"], line["example"]] = line
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: not a line of details; write them again with "
                             "--details") from None
    return found


def example_text(data, number, tokenizer):
    """
    (prompt, answer) of an example as text: its glyphs, or what a tokenizer makes of it; None where there is
    neither.
    """
    tokens, answer = data["examples"][number]
    parts = tokens[:answer].tolist(), tokens[answer:].tolist()
    if "glyphs" in data:
        return tuple("".join(data["glyphs"].get(token, "") for token in part) for part in parts)
    return tuple(map(tokenizer.decode, parts)) if tokenizer else None


def questions(data):
    """
    Yields for each question of an evaluation (its examples, a range; the number of that with the right
    answer).
    """
    first = 0
    alone = [(1, 0)] * len(data["examples"])
    for count, gold in zip(data["choices"], data["gold"]) if "choices" in data else alone:
        yield range(first, first + count), first + gold
        first += count


def verdict(data, examples, gold, told):
    """
    What details `told`, a dict example -> line, say of a question: text as HTML; whether it is right, None
    where nobody asks.
    """
    line = told[gold]
    if "text" in line:
        return html.escape(line["text"].strip()), bool(line["exact"])
    tokens, answer = data["examples"][gold]
    if data["metric"] == "loss":
        return f"{-line['logp'] / (len(tokens) - answer):.2f} nats a token", None
    right = bool(line["exact"])
    if "choices" in data:
        size = data["chars"] if data["metric"] == "acc_norm" else [1] * len(data["examples"])
        right = max(examples, key=lambda e: told[e]["logp"] / size[e]) == gold
    return f"p = {math.exp(line['logp']):.2f}", right


def example_card(text, verdicts):
    """A question as (prompt, right answer), and what each round made of it: a dict, round -> verdict."""
    said = ""
    for label, (words, right) in verdicts.items():
        mark = "" if right is None else f'<span class="{"right" if right else "wrong"}"></span>'
        said += f"<small>{mark} {html.escape(label)}: {words}</small>"
    prompt, answer = (html.escape(part.strip()) for part in text)
    return f'<div class="example"><pre>{prompt}</pre><b>{answer}</b>{said}</div>'


def examples_section(run, details, tokenizer):
    """The first questions of each evaluation that details and file are there of."""
    found = ""
    for column in run.sets:
        data, cards = run.data.get(column), []
        for examples, gold in itertools.islice(questions(data), EXAMPLES) if data else ():
            told = {label: {e: lines[column, e] for e in examples if (column, e) in lines}
                    for label, lines in details.items()}
            verdicts = {label: verdict(data, examples, gold, lines) for label, lines in told.items()
                        if len(lines) == len(examples)}
            text = example_text(data, gold, tokenizer)
            if verdicts and text:
                cards.append(example_card(text, verdicts))
        if cards:
            longest = max(len(tokens) for tokens, _ in data["examples"][:EXAMPLES])
            wide = "" if longest < SHORT and "glyphs" in data else " wide"
            found += f'<h3>{html.escape(column)}</h3><div class="examples{wide}">{"".join(cards)}</div>'
    return found and ("<h2>Examples</h2><p>The first questions of each evaluation with the right answer, and "
                      "what the model made of "
                      "them: the probability or the nats per token of that answer, or what it "
                      f"said.</p>{found}")


def settings_section(run):
    cells = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value) or '&ndash;'}</dd></div>"
                    for name, value in run.settings.items())
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in run.notes)
    return f"<h2>Settings</h2><dl>{cells}</dl>" + (f"<h2>Not shown</h2><ul>{notes}</ul>" if notes else "")


def heading(run):
    """One sentence on what was done."""
    method = run.settings.get("method", "rigsa")
    name = {"rigsa": "RIGSA", "full": "full fine-tuning", "eval": "evaluation"}.get(method, method)
    seconds = float(run.table[-1]["seconds"])
    unit, size = ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)
    done = "" if run.table[-1]["round"] == "ticket" or method != "rigsa" else ", not finished yet"
    base, data = (html.escape(os.path.basename(run.settings[name])) for name in ("base", "data"))
    return f"{name} of <b>{base}</b> on <b>{data}</b>, {seconds / size:.0f} {unit}{done}"


def write_report(folder, details=(), tokenizer=None):
    """
    Writes FOLDER/report.html and returns its path. `details`: paths; `tokenizer`: one of transformers, to
    read examples with.
    """
    run = Run(folder)
    with open(TEMPLATE, encoding="utf-8") as file:
        page = string.Template(file.read())
    sections = [tiles(run), scores_section(run), losses_section(run), survivors_section(run),
                examples_section(run, read_details(details), tokenizer), settings_section(run)]
    text = page.substitute(title=html.escape(os.path.basename(os.path.abspath(folder))), heading=heading(run),
                           body="\n".join(sections))
    path = os.path.join(folder, "report.html")
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


@command.line
def main():
    parser = argparse.ArgumentParser(description="A run of train_rigsa as one HTML file.")
    parser.add_argument("folder", metavar="OUT", help="the folder of the run")
    parser.add_argument("--details", nargs="+", metavar="FILE", default=[],
                        help="details of evaluations, to show examples")
    parser.add_argument("--tokenizer", metavar="MODEL", help="hub name or folder: shows tokens as text")
    args = parser.parse_args()
    print(write_report(args.folder, args.details, args.tokenizer and load_tokenizer(args.tokenizer)))


if __name__ == "__main__":
    main()

"""
The study that the paper did not make: seven questions about RIGSA, each a few arms, into one CSV.

    make train_baselines
    python dev/study.py --out out_study                             everything; doc/study.md has the hours
    python dev/study.py --share 0.08 --batch 4 --lr 0.012           shorter passes, more updates per example
    python dev/study.py --questions decay --arms "decay (0|1)$"     some arms of a question
    python dev/study.py --list                                      the table, without running it

A question is a list of arms (QUESTIONS). An arm with several learning rates is tried at each of them with
seed 1 and scored on held-out questions of its target; the rate with the best sum of target and kept skills
(shares of the base's scores, their mean) is then run with seeds 2, 3, .. (--seeds of them), and only these
are scored on the test questions. All arms see the same seeds, so differences are taken pair by pair
(dev/study_report.py). The skills' questions serve for both.

One thread per run, --jobs of them at a time. A run is known by its options: what is in --out already is not
made again, also for another question. The same command goes on after an interruption; more --seeds add to
what is there, other --questions and --arms as well. Rows of study.csv count as made without their runs: so
doc/study.csv, copied to --out, is gone on with.

study.csv has a row per arm, rate and seed: question, arm, role (choose: held-out; answer: test), lr, seed,
share and batch; density of the last pass; kept and flipped, the shares of each round; the scores of the
target and of the skills; seconds of training. The rows `base` are the models that nothing was added to.
"""
import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
NANO = os.path.join(HERE, "nano")
sys.path[:0] = [HERE, NANO]
import command  # noqa: E402
import make_nano  # noqa: E402
from compare import adapter_options, printed_scores, read_rows  # noqa: E402
from rigsa_file import (adapted_shapes, data_sections, read_base, read_examples, read_file,  # noqa: E402
                        write_file)

ROUNDS, ROUND, LAST = 5, 12800, 48000  # RIGSA's defaults: rounds, examples of a round, of the last pass
DENSITY = 0.0355  # of the default ticket; of the masks beside it
GATE = 7 / 3  # learning rate of the gates / that of DeltaW
RATES = (0.003, 0.006, 0.012)
SKILLS = ("addition", "sizes", "packing")
DEFAULTS = {  # of RIGSA: said or not, it is the same run
    ("--rounds", 5), ("--weight-decay", 1), ("--rest", "zero"), ("--survivors", "rewind"),
    ("--threshold", "matrix"), ("--keep", 0.56), ("--gate", "1e-6"), ("--sigma", 0.06)}
SCORING = 3000  # what scoring a model costs, in trained examples


# ----------------------------------------------------------------------------------------------------
# the questions

class Arm(NamedTuple):
    """One way to train. `round` and `last`: examples, before they are shortened by --share."""
    name: str
    options: tuple  # of ./train_baselines
    rates: tuple = ()  # to choose among; none: --lr
    round: int = ROUND  # of each round, or of the first pass
    last: int = LAST
    passes: int = 0  # that have `round` examples
    task: str = "digits"
    width: int = 96  # of the base
    control: str = ""  # a name in CONTROLS: the run starts from what it makes of the ticket of the same seed


def rigsa(name="RIGSA", *options, rounds=ROUNDS, **more):
    """An arm with rounds of pruning."""
    return Arm(name, ("--method", "rigsa", "--rounds", rounds, *options), passes=rounds, **more)


def gated(name, *options, **more):
    """An arm with one pass behind RIGSA's gate; the mask is random unless the options say which."""
    return Arm(name, ("--method", "random", "--init", "gated", "--density", DENSITY, *options), **more)


def readings():
    """Question 1: every reading of the pruning sentence that the program allows."""
    return [rigsa(f"rest {rest}, {survivors}, {threshold}, {keep}", "--rest", rest, "--survivors", survivors,
                  "--threshold", threshold, "--keep", keep)
            for survivors in ("rewind", "keep", "redraw") for rest in ("zero", "init")
            for keep in (0.56, 0.8) for threshold in ("matrix", "all")
            if (rest, survivors) != ("init", "redraw")]


def decays():
    """Question 2: decay, also where the gate cannot make up for it, and decay of the gate itself."""
    arms = [rigsa(f"decay {decay}", "--weight-decay", decay, rates=RATES)
            for decay in (0, 0.03, 0.1, 0.3, 1, 3)]
    arms += [gated(f"random mask, gate learned, decay {decay}", "--weight-decay", decay, rates=RATES)
             for decay in (0, 1)]
    arms += [gated(f"random mask, gate 1, decay {decay}", "--weight-decay", decay, "--gate", 1,
                   "--alpha-lr", 0, rates=(0.0015, 0.003, 0.006)) for decay in (0, 1)]
    return [*arms, gated("random mask, gate decays too", "--alpha-decay", 1, rates=RATES)]


def prunings():
    """Question 3: n rounds to the density of five: keep 0.56^(5/n); examples as in five, or per round."""
    arms = [rigsa("5 rounds")]
    for rounds in (1, 3, 8, 12):
        keep = round(0.56 ** (ROUNDS / rounds), 4)
        name = f"{rounds} rounds" if rounds > 1 else "one shot"
        arms.append(rigsa(f"{name}, equal total", "--keep", keep, rounds=rounds,
                          round=ROUNDS * ROUND // rounds))
        arms.append(rigsa(f"{name}, equal rounds", "--keep", keep, rounds=rounds))
    return arms


def gates():
    """Question 4: where the gate begins, whether it learns, whether DeltaW begins at random. Random masks."""
    def rates(gate, learned):
        if learned:
            return RATES
        return (0.0015, *RATES) if gate == "1" else RATES[-1:]  # a small fixed gate learns nothing

    return [gated(f"gate {gate}, {'learned' if learned else 'fixed'}, start {start}", "--gate", gate,
                  "--sigma", sigma, *([] if learned else ["--alpha-lr", 0]), rates=rates(gate, learned))
            for gate in ("1e-6", "1e-3", "1") for learned in (True, False)
            for start, sigma in (("random", 0.06), ("zero", 1e-12))]  # sigma 0 is refused: it has no signs


def lottery():
    """Question 4 as well: the ticket's mask and start, shuffled or drawn anew; one pass like the ticket's."""
    return [rigsa("the ticket"), *(gated(name, control=name) for name in CONTROLS)]


def methods(**more):
    """RIGSA and the methods beside it, as many values each; for questions 5 and 7."""
    return [
        rigsa(rates=RATES, **more),
        gated("random mask, gated", rates=RATES, **more),
        Arm("LT-SFT", ("--method", "ltsft", "--density", DENSITY), (0.0003, 0.001, 0.003), ROUNDS * ROUND,
            passes=1, **more),
        Arm("LoRA", ("--method", "lora", "--density", DENSITY), (0.001, 0.003, 0.01), **more),
        Arm("LoRA, rank 16", ("--method", "lora", "--rank", 16), (0.0003, 0.001, 0.003), **more),
        Arm("full", ("--method", "full", "--weight-decay", 0), (3e-5, 1e-4, 3e-4), **more),
    ]


def targets():
    """Question 5: the same methods on other targets."""
    return [arm._replace(name=f"{task}: {arm.name}")
            for task in ("digits", "fashion7", "sorting") for arm in methods(task=task)]


def pictures():
    """Question 5, with pictures of 14 x 14 characters: 214 tokens instead of 60."""
    return [arm._replace(name=f"fashion14: {arm.name}") for arm in methods(task="fashion14")]


def ranks():
    """Question 6: QLoRA of every rank."""
    return [Arm(f"rank {rank}", ("--method", "lora", "--base-type", "nf4", "--rank", rank),
                (0.0003, 0.001, 0.003, 0.01)) for rank in (1, 2, 4, 8, 16, 32, 64)]


def sizes():
    """Question 7: the same methods on bases of about 70, 280, 1,100 and 4,500 thousand weights."""
    return [arm._replace(name=f"width {width}: {arm.name}")
            for width in (48, 96, 192, 384) for arm in methods(width=width)]


QUESTIONS = {"decay": decays, "lottery": lottery, "gate": gates, "pruning": prunings, "readings": readings,
             "rank": ranks, "targets": targets, "pictures": pictures, "sizes": sizes}


# ----------------------------------------------------------------------------------------------------
# data and bases that are not committed

def sorting(rng):
    """Endless questions `sort dkbea=`, answer `abdek`: five different letters, to be put in order."""
    while True:
        letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 5)
        yield f"sort {''.join(letters)}=", ["".join(sorted(letters))], 0


def make_sorting(folder):
    """Training, held-out and test questions, no two alike."""
    counts = {"train": 24_000, "heldout": 2_500, "test": 2_500}
    questions = make_nano.take(sorting(make_nano.stream("sorting")), sum(counts.values()))
    for split, count in counts.items():
        part, questions = questions[:count], questions[count:]
        scored = [] if split == "train" else ["sorting", "exact"]
        make_nano.save(os.path.join(folder, f"sorting_{split}.bin"), part, *scored)


def make_fashion(folder, side, images):
    """Fashion-MNIST as text; the last 2,500 training images held out, the first 2,500 test images."""
    given = ["--images", images] if images else []
    run_command([sys.executable, os.path.join(ROOT, "prepro_mnist.py"), "--dataset", "fashion",
                 "--side", side, "--out", folder, "--heldout", 2500, *given])
    path = os.path.join(folder, f"fashion_{side}_test.bin")
    found = read_examples(path)
    found["examples"] = found["examples"][:2500]
    write_file(path, "data", data_sections(found.pop("vocab"), **found))


def task_files(args, task):
    """(training, held-out, test) files of a target, made if need be."""
    if task == "digits":
        heldout = os.path.join(NANO, "build", "digits_heldout.bin")
        if not os.path.exists(heldout):
            run_command([sys.executable, os.path.join(NANO, "make_nano.py")])
        return os.path.join(NANO, "digits_train.bin"), heldout, os.path.join(NANO, "digits_test.bin")
    folder = os.path.join(args.out, "data")
    name = task.replace("fashion", "fashion_")
    files = tuple(os.path.join(folder, f"{name}_{split}.bin") for split in ("train", "heldout", "test"))
    with LOCKS[folder]:
        if not all(map(os.path.exists, files)):
            os.makedirs(folder, exist_ok=True)
            if task == "sorting":
                make_sorting(folder)
            else:
                make_fashion(folder, int(task.removeprefix("fashion")), args.images)
    return files


def one_question(args):
    """An evaluation file with a single question: runs are scored when they are done, not after each round."""
    path = os.path.join(args.out, "data", "one.bin")
    with LOCKS[path]:
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            found = read_examples(os.path.join(NANO, "digits_test.bin"))
            found["examples"] = found["examples"][:1]
            write_file(path, "data", data_sections(found.pop("vocab"), **found))
    return path


def base_file(args, width):
    """The committed base, or one of another width, trained on the same lessons as make_nano.sh does."""
    if width == 96:
        return os.path.join(NANO, "base.bin")
    folder = os.path.join(args.out, f"base_{width}")
    path = os.path.join(folder, "model.bin")
    with LOCKS[path]:
        if not os.path.exists(path):
            heads = width // 24
            sizes = {"dim": width, "ffn": width * 7 // 3, "heads": heads, "kv_heads": heads // 2}
            start = os.path.join(folder, "random.bin")
            os.makedirs(folder, exist_ok=True)
            make_nano.save_random_base(start, make_nano.stream("base"), make_nano.NANO | sizes)
            task_files(args, "digits")  # and, beside them, the lessons
            run_command(["./train_baselines", "--method", "full", "--base", start,
                         "--data", os.path.join(NANO, "build", "pretrain.bin"), "--ticket-examples", 0,
                         "--batch", 64, "--seed", 0, "--lr", 0.002, "--warmup", 0.025, "--cooldown", 0.7,
                         "--eval", os.path.join(NANO, "addition.bin"), "--out", folder, "--overwrite"])
    return path


# ----------------------------------------------------------------------------------------------------
# the controls of the lottery ticket: each makes, of a ticket's index and start, new ones

# Index, start: an array per matrix. `other`: all initial values of another draw; `sizes`: of the matrices.

def own_start(index, start, other, sizes, rng):
    """As it was."""
    return index, start


def fresh_start(index, start, other, sizes, rng):
    """The same entries, from another draw."""
    return index, [values[places] for values, places in zip(other, index)]


def shuffled_start(index, start, other, sizes, rng):
    """The same entries, and within each matrix the same values in another order."""
    return index, [rng.permutation(values) for values in start]


def shuffled_mask(index, start, other, sizes, rng):
    """As many entries of each matrix at random places, from another draw."""
    places = [sorted(rng.choice(size, len(part), replace=False)) for part, size in zip(index, sizes)]
    return places, [values[part] for values, part in zip(other, places)]


CONTROLS = {"own start": own_start, "fresh start": fresh_start, "shuffled start": shuffled_start,
            "shuffled mask": shuffled_mask}


def write_start(path, ticket, base, control, seed):
    """The file `ticket`, a ticket of this base, with the mask and start that the control makes of it."""
    import numpy as np  # only here: the table needs the standard library alone
    from import_hf import Ticket, initial_values
    config, _, _ = read_base(base)
    sections = read_file(ticket, "tick")
    found = Ticket(ticket, sections, config)
    sizes = [rows * cols for _, (rows, cols) in adapted_shapes(config)]

    def draw(number):
        return [initial_values(found.seed, a, number, found.sigma, size) for a, size in enumerate(sizes)]

    start = [values[part] for values, part in zip(draw(found.draw), found.index)]
    index, values = CONTROLS[control](found.index, start, draw(found.draw + 1), sizes,
                                      np.random.default_rng(seed))
    sections["index"] = np.concatenate(index).astype("<u4").tobytes()
    sections["values"] = np.concatenate(values).astype("<f4").tobytes()
    write_file(path, "tick", list(sections.items()))


# ----------------------------------------------------------------------------------------------------
# runs

LOCKS = defaultdict(Lock)  # of a path: two runs at a time may want the same file


def run_command(command):
    """Standard output of a command; ChildProcessError, with its last line of complaint, where it fails."""
    words = [str(part) for part in command]
    result = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                            cwd=ROOT)
    if result.returncode:
        raise ChildProcessError(f"{' '.join(words)}: {(result.stderr.strip() or 'failed').splitlines()[-1]}")
    return result.stdout


def train_options(args, arm, lr, seed):
    """Of ./train_baselines, but for files: what tells a run from the others."""
    pairs = zip(arm.options[::2], arm.options[1::2])
    options = [part for pair in pairs if pair not in DEFAULTS for part in pair]
    gate = [] if "--alpha-lr" in arm.options else ["--alpha-lr", GATE * lr]
    first = ["--examples", round(arm.round * args.share)] if arm.passes else []
    return [*options, "--lr", lr, *gate, "--seed", seed, "--batch", args.batch,
            "--ticket-examples", round(arm.last * args.share), *first]


def folder_of(args, arm, lr, seed):
    """Of a run."""
    text = " ".join(map(str, [*train_options(args, arm, lr, seed), arm.task, arm.width, arm.control]))
    return os.path.join(args.out, "runs", hashlib.blake2b(text.encode(), digest_size=6).hexdigest())


def adapter_of(args, arm, folder):
    """The options by which a finished run is scored."""
    return adapter_options(folder, base_file(args, arm.width), arm.options)


def score(args, arm, role, adapter):
    """Scores a model on the target's held-out or test questions and on the skills: a dict."""
    target = task_files(args, arm.task)[1 if role == "choose" else 2]
    evals = [target, *(os.path.join(NANO, f"{skill}.bin") for skill in SKILLS)]
    output = run_command(["./train_baselines", "--method", "eval", *adapter,
                          *(part for file in evals for part in ("--eval", file))])
    found = printed_scores(output)
    return {name: float(value) for name, (value, _) in zip(("target", *SKILLS), found, strict=True)}


def remembered(path, make):
    """What the JSON file at `path` holds, or what `make()` returns, which is then written there."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        found = make()
        with open(path + ".new", "w") as file:
            json.dump(found, file)
        os.replace(path + ".new", path)
    with open(path) as file:
        return json.load(file)


def train(args, arm, lr, seed, folder):
    """Makes a run in its folder; of a control, first the ticket that it starts from."""
    base, start = base_file(args, arm.width), []
    if arm.control:
        parent = rigsa(task=arm.task, width=arm.width)
        complete(args, parent, lr, seed, "answer")
        start = ["--start", os.path.join(folder, "start.bin")]
        ticket = os.path.join(folder_of(args, parent, lr, seed), "ticket.bin")
        write_start(start[1], ticket, base, arm.control, seed)
    run_command(["./train_baselines", *train_options(args, arm, lr, seed), *start, "--base", base,
                 "--data", task_files(args, arm.task)[0], "--eval", one_question(args), "--out", folder,
                 "--overwrite"])


def complete(args, arm, lr, seed, role):
    """Makes a run, unless it is there, and scores it: the row of study.csv, a dict."""
    folder = folder_of(args, arm, lr, seed)
    done = os.path.join(folder, "done")
    with LOCKS[folder]:
        if not os.path.exists(done):
            os.makedirs(folder, exist_ok=True)
            train(args, arm, lr, seed, folder)
            open(done, "w").close()
        scores = remembered(os.path.join(folder, f"{role}.json"),
                            lambda: score(args, arm, role, adapter_of(args, arm, folder)))
    _, *rounds, last = read_rows(os.path.join(folder, "table.csv"))
    kept, flipped = (" ".join(row[name][:5] for row in rounds if row[name] != "nan")
                     for name in ("kept", "flipped"))
    return {"arm": arm.name, "role": role, "lr": f"{lr:g}", "seed": seed, "density": last["density"],
            "kept": kept, "flipped": flipped, **scores, "seconds": last["seconds"]}


def base_scores(args, arm, role):
    """Of the base alone."""
    path = os.path.join(args.out, f"base_{arm.width}", f"{arm.task}_{role}.json")
    with LOCKS[path]:
        return remembered(path, lambda: score(args, arm, role, ["--base", base_file(args, arm.width)]))


# ----------------------------------------------------------------------------------------------------
# the whole

COLUMNS = ("question", "arm", "role", "lr", "seed", "share", "batch", "density", "kept", "flipped", "target",
           *SKILLS, "seconds")
PLACE = {(question, arm.name): (i, j) for i, (question, arms) in enumerate(QUESTIONS.items())
         for j, arm in enumerate(arms())}  # in study.csv


def place(row):
    """Where a row stands in study.csv; the bases first."""
    question = PLACE.get((row["question"], row["arm"]), (-1, -1))
    return question, row["role"] == "answer", float(row["lr"]), int(row["seed"])


def cost(args, arm):
    """Of a run, in examples."""
    return args.share * (arm.last + arm.passes * arm.round) + SCORING


def balance(row, base):
    """What a rate is chosen by: the target's score, and the mean share that is kept of the skills."""
    return row["target"] + sum(row[skill] / base[skill] for skill in SKILLS) / len(SKILLS)


def name_of(row):
    """What tells a row from the others."""
    return row["question"], row["arm"], row["role"], f"{float(row['lr']):g}", int(row["seed"])


class Study:
    """The rows so far, those of other questions and arms included, and the time that is left."""

    def __init__(self, args):
        self.args, self.lock = args, Lock()
        self.arms = {question: [arm for arm in QUESTIONS[question]() if re.search(args.arms, arm.name)]
                     for question in args.questions}
        asked = {(question, arm.name) for question, arms in self.arms.items() for arm in arms}
        self.rows = [row for row in read_rows(os.path.join(args.out, "study.csv"))
                     if (row["question"], row["arm"]) not in asked
                     or (float(row["share"]), int(row["batch"])) == (args.share, args.batch)]
        self.made = {name_of(row): row for row in self.rows}
        self.left = sum(cost(args, arm) * ((len(arm.rates) if len(arm.rates) > 1 else 0) + len(args.seeds))
                        for arms in self.arms.values() for arm in arms)
        self.spent = self.worked = 0

    def write(self):
        """study.csv, in the order of the table."""
        path, args = os.path.join(self.args.out, "study.csv"), self.args
        with open(path + ".new", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({"share": args.share, "batch": args.batch} | row
                             for row in sorted(self.rows, key=place))
        os.replace(path + ".new", path)

    def row(self, question, arm, lr, seed, role):
        """A row that is there, or makes the run, if need be, and adds its row; scores as numbers."""
        found = {"question": question, "arm": arm.name, "role": role, "lr": lr, "seed": seed}
        if name_of(found) in self.made:
            with self.lock:
                self.left -= cost(self.args, arm)
            there = self.made[name_of(found)]
            return {**there, **{name: float(there[name]) for name in ("target", *SKILLS)}}
        began = time.time()
        found |= complete(self.args, arm, lr, seed, role)
        took = time.time() - began
        with self.lock:
            self.left -= cost(self.args, arm)
            if took > 1:  # else it was there
                self.spent, self.worked = self.spent + took, self.worked + cost(self.args, arm)
            self.rows.append(found)
            self.write()
            hours = self.left * self.spent / max(self.worked, 1) / self.args.jobs / 3600
            scores = "  ".join(f"{name} {found[name]:.3f}" for name in ("target", *SKILLS))
            print(f"{question:9} {arm.name:44} lr {lr:<7g} seed {seed} {role:7} {scores}  {hours:.1f} h left",
                  flush=True)
        return found

    def base(self, arm, role):
        """The base's scores beside an arm; their row comes once."""
        key = {"question": "base", "arm": f"{arm.task}, width {arm.width}", "role": role}
        for row in self.rows:
            if key.items() <= row.items():
                return {name: float(row[name]) for name in ("target", *SKILLS)}
        scores = base_scores(self.args, arm, role)
        self.rows.append({**key, "lr": 0, "seed": 0, **scores})
        return scores

    def ask(self, pool, question):
        """All arms of a question: first the rates, then the seeds."""
        args, arms, chosen = self.args, self.arms[question], {}
        tries = [(arm, lr) for arm in arms if len(arm.rates) > 1 for lr in arm.rates]
        tried = list(pool.map(lambda run: self.row(question, *run, 1, "choose"), tries))
        for arm in arms:
            base = self.base(arm, "choose")
            found = {lr: balance(row, base) for (one, lr), row in zip(tries, tried) if one is arm}
            chosen[arm.name] = max(found, key=found.get) if found else (*arm.rates, args.lr)[0]
        answers = [(arm, seed) for seed in args.seeds for arm in arms]  # an interrupted one has all arms
        list(pool.map(lambda run: self.row(question, run[0], chosen[run[0].name], run[1], "answer"), answers))
        for arm in arms:
            self.base(arm, "answer")
        self.write()


def parse(argv=None):
    """The command line; of the program, unless it is given."""
    parser = argparse.ArgumentParser(description="Seven questions about RIGSA, into one CSV.")
    add = parser.add_argument
    add("--out", default="out_study", metavar="FOLDER", help="of study.csv and runs (default %(default)s)")
    add("--questions", default=",".join(QUESTIONS), help="which, in this order (default: %(default)s)")
    add("--arms", default="", metavar="REGEX", help="only arms whose name has a match")
    add("--seeds", type=int, default=5, help="per arm, beside the one that chooses (default %(default)s)")
    add("--share", type=float, default=1, help="of the examples of every pass (default 1)")
    add("--lr", type=float, default=0.003, help="of arms that do not choose (default %(default)s)")
    add("--batch", type=int, default=16, help="examples per update (default %(default)s)")
    add("--jobs", type=int, default=2, help="runs at a time (default %(default)s)")
    add("--images", metavar="FOLDER", help="the four files of Fashion-MNIST (default: download them)")
    add("--list", action="store_true", help="print the table and stop")
    args = parser.parse_args(argv)
    args.questions = args.questions.split(",")
    unknown = [name for name in args.questions if name not in QUESTIONS]
    if unknown:
        raise ValueError(f"no question `{unknown[0]}`; there are {', '.join(QUESTIONS)}")
    args.seeds = list(range(2, 2 + args.seeds))
    args.out = os.path.abspath(args.out)
    return args


@command.line
def main():
    args = parse()
    study = Study(args)
    if args.list:
        for question, arms in study.arms.items():
            for arm in arms:
                rates = ", ".join(f"{lr:g}" for lr in arm.rates or [args.lr])
                print(f"{question:9} {arm.name:44} lr {rates}: {' '.join(map(str, arm.options))}")
        return
    if not os.access(os.path.join(ROOT, "train_baselines"), os.X_OK):
        raise ValueError("no ./train_baselines; make train_baselines")
    os.makedirs(args.out, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for question in args.questions:
                study.ask(pool, question)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()

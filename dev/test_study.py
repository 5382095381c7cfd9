"""
Tests of study.py and study_report.py, in seconds: make train_baselines && python dev/test_study.py
Needs numpy, safetensors, scipy and matplotlib.
"""
import os
import re
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np

import study
import study_report
from import_hf import Ticket
from rigsa_file import adapted_shapes, read_base, read_file

ARMS = [(question, arm) for question, arms in study.QUESTIONS.items() for arm in arms()]
BASE = os.path.join(study.NANO, "base.bin")


def help_text():
    """What ./train_baselines --help says of each option: a dict, name -> the rest of its line."""
    text = study.run_command(["./train_baselines", "--help"])
    return dict(re.findall(r"^  --(\S+) ?(.*)$", text, re.MULTILINE))


class Folder(unittest.TestCase):
    """A test with a folder for a study with very short passes."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.args = study.parse(["--out", os.path.join(temporary.name, "out"), "--share", "0.0003",
                                 "--batch", "4"])
        os.makedirs(self.args.out)

    def train(self, arm, *more):
        """Trains an arm with seed 2 into a folder of its own: the folder, and the program's last line."""
        out = os.path.join(self.args.out, f"{len(os.listdir(self.args.out))}")
        options = study.train_options(self.args, arm, (*arm.rates, 0.003)[0], 2)
        said = study.run_command(["./train_baselines", *options, *more, "--out", out,
                                  "--data", os.path.join(study.NANO, "digits_train.bin"),
                                  "--eval", study.one_question(self.args)])
        return out, said.splitlines()[-1]


class Plan(Folder):
    def test_names(self):
        """Within a question no two arms have one name, nor do they train the same."""
        for question, arms in study.QUESTIONS.items():
            names = [arm.name for arm in arms()]
            self.assertEqual(len(names), len(set(names)), question)
            folders = [study.folder_of(self.args, arm, lr, 2)
                       for arm in arms() for lr in arm.rates or (0.003,)]
            self.assertEqual(len(folders), len(set(folders)), question)

    def test_defaults_are_one_run(self):
        """RIGSA as it is stands in five questions; it is trained once."""
        names = {"decay": "decay 1", "lottery": "the ticket", "pruning": "5 rounds",
                 "readings": "rest zero, rewind, matrix, 0.56", "targets": "digits: RIGSA"}
        arms = {(question, arm.name): arm for question, arm in ARMS}
        self.assertEqual(len({study.folder_of(self.args, arms[pair], 0.003, 2) for pair in names.items()}), 1)

    def test_options(self):
        """Every option of every arm is one of the program's, with a value that its help allows."""
        known = help_text()
        for question, arm in ARMS:
            given = study.train_options(self.args, arm, (*arm.rates, 0.003)[0], 2)
            for name, value in zip(given[::2], map(str, given[1::2])):
                allowed = known[name.removeprefix("--")]
                low, to, high = allowed.partition(" to ")
                good = float(low) <= float(value) <= float(high) if to else value in allowed.split("|")
                self.assertTrue(good, f"{question}, {arm.name}: {name} {value}, not {allowed}")

    def test_runs(self):
        """One tiny run of each set of options that there is."""
        plain = [arm for _, arm in ARMS if arm.task == "digits" and arm.width == 96 and not arm.control]
        kinds = {(arm.options[1], *arm.options[::2]): arm for arm in plain}
        for arm in kinds.values():
            out, _ = self.train(arm)
            self.assertTrue(study.adapter_of(self.args, arm, out), arm.name)


class Controls(Folder):
    def setUp(self):
        super().setUp()
        self.arm = study.gated("random mask")
        self.out, self.said = self.train(self.arm)
        self.config = read_base(BASE)[0]

    def start(self, control):
        """(path, Ticket) of what a control makes of the random mask's ticket."""
        path = os.path.join(self.args.out, f"{control}.bin".replace(" ", "_"))
        study.write_start(path, os.path.join(self.out, "ticket.bin"), BASE, control, 2)
        return path, Ticket(path, read_file(path, "tick"), self.config)

    def test_own_start(self):
        """From its own mask and start the same run comes again, to the bit; from another draw another one."""
        self.assertEqual(self.train(self.arm, "--start", self.start("own start")[0])[1], self.said)
        self.assertNotEqual(self.train(self.arm, "--start", self.start("fresh start")[0])[1], self.said)

    def test_gates(self):
        """They begin where --gate says, stay there without a rate, and shrink with --alpha-decay."""
        def gates(*options):
            path = os.path.join(self.train(study.gated("", "--gate", 0.5, *options))[0], "ticket.bin")
            return Ticket(path, read_file(path, "tick"), self.config).gates

        self.assertTrue((gates("--alpha-lr", 0) == 0.5).all())
        self.assertLess(np.abs(gates() - 0.5).max(), 0.05)
        self.assertLess(gates("--alpha-decay", 10).max(), 0.45)

    def test_shuffles(self):
        """Each control changes what its name says, and nothing else."""
        own, fresh, values, mask = (self.start(name)[1] for name in
                                    ("own start", "fresh start", "shuffled start", "shuffled mask"))
        for a, (_, (rows, cols)) in enumerate(adapted_shapes(self.config)):
            self.assertTrue(np.array_equal(own.index[a], fresh.index[a]))
            self.assertTrue(np.array_equal(own.index[a], values.index[a]))
            self.assertFalse(np.array_equal(own.index[a], mask.index[a]))
            self.assertEqual(len(own.index[a]), len(mask.index[a]))
            self.assertLess(mask.index[a].max(), rows * cols)
            self.assertTrue(np.array_equal(np.sort(own.values[a]), np.sort(values.values[a])))
            self.assertFalse(np.array_equal(own.values[a], values.values[a]))
            self.assertLess(abs(np.corrcoef(own.values[a], fresh.values[a])[0, 1]), 0.3)
            self.assertLess(np.isin(mask.values[a], own.values[a]).mean(), 0.1)


def pretend(args, arm, lr, seed, role):
    """In place of study.complete: best at lr .006, and a little better with every seed."""
    return {"arm": arm.name, "role": role, "lr": f"{lr:g}", "seed": seed, "density": 0.03, "kept": "",
            "flipped": "", "target": 0.9 - abs(lr - 0.006) + 0.001 * seed + 0.01 * (arm.name == "decay 1"),
            **dict.fromkeys(study.SKILLS, 0.8), "seconds": 1}


def page_text(*names):
    """A page with places for these tables."""
    return "1\n" + "".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in names) + "2\n"


class Whole(Folder):
    def ask(self, question):
        """Asks one question with three seeds and without training; the rows of study.csv."""
        args = study.parse(["--out", self.args.out, "--questions", question, "--seeds", "3"])
        base = {"target": 0.0, **dict.fromkeys(study.SKILLS, 0.8)}
        with mock.patch.object(study, "complete", pretend), mock.patch("builtins.print"), \
                mock.patch.object(study, "base_scores", return_value=base), ThreadPoolExecutor(2) as pool:
            study.Study(args).ask(pool, question)
        return study.read_rows(os.path.join(self.args.out, "study.csv"))

    def test_choice(self):
        """Rates with seed 1, the best one with the others; another question leaves these rows alone."""
        rows = self.ask("decay")
        chosen = [row for row in rows if row["role"] == "choose" and row["question"] == "decay"]
        answers = [row for row in rows if row["role"] == "answer" and row["question"] == "decay"]
        self.assertEqual({row["seed"] for row in chosen}, {"1"})
        self.assertEqual(len(chosen), sum(len(arm.rates) for arm in study.decays()))
        self.assertEqual(len(answers), 3 * len(study.decays()))
        self.assertEqual({(row["lr"], row["seed"]) for row in answers}, {("0.006", seed) for seed in "234"})
        both = self.ask("pruning")
        self.assertEqual([row for row in both if row["question"] != "pruning"], rows)
        self.assertEqual(self.ask("decay"), both)

    def test_goes_on(self):
        """Rows of a study.csv are not made again, unless their passes had another length."""
        rows = self.ask("decay")
        path = os.path.join(self.args.out, "study.csv")
        with open(path) as file:
            text = file.read()
        with open(path, "w") as file:
            file.write(text.replace(",0.03,", ",0.04,"))  # densities, which `pretend` says are .03
        kept = [row["density"] for row in self.ask("decay") if row["question"] == "decay"]
        self.assertEqual(kept, ["0.04"] * (len(rows) - 2))
        with open(path, "w") as file:
            file.write(text.replace(",1,16,", ",0.5,16,"))
        again = self.ask("decay")
        self.assertEqual([row for row in again if row["question"] == "decay"],
                         [row for row in rows if row["question"] == "decay"])

    def test_report(self):
        """The page's tables are replaced; a question without a place is an error."""
        self.ask("decay")
        page = os.path.join(self.args.out, "page.md")
        for text, status in ((page_text("decay", "decay, rates"), 0), (page_text("decay"), 1)):
            with open(page, "w") as file:
                file.write(text)
            script = os.path.join(study.HERE, "study_report.py")
            done = subprocess.run([sys.executable, script, os.path.join(self.args.out, "study.csv"), page],
                                  capture_output=True, text=True)
            self.assertEqual(done.returncode, status, done.stderr)
            if status == 0:
                with open(page) as file:
                    found = file.read()
        self.assertTrue(found.startswith("1\n") and found.endswith("2\n") and "old" not in found)
        self.assertIn("| decay 0 | .898, 1.000 | .901, 1.000 | .895, 1.000 |\n", found.replace("|  |", "|"))
        self.assertIn("| decay 0 | 0.006 | 3 | .030 | .903 ± .002 | 1.000 ± .000 | 1.000 ± .000 | " +
                      "-.010 ± .000 | +.000 ± .000 |\n", found)
        self.assertTrue(os.path.exists(os.path.join(self.args.out, "study_decay.svg")))

    def test_interval(self):
        """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), Student's t with 2 degrees of freedom 4.3027."""
        mean, half = study_report.interval([1, 2, 3])
        self.assertEqual(mean, 2)
        self.assertAlmostEqual(half, 4.302653 / 3 ** 0.5, 5)
        mine, other = ([{"seed": seed, "target": value} for seed, value in pairs]
                       for pairs in (((2, 0.5), (3, 0.7)), ((3, 0.6), (4, 0.9))))
        self.assertAlmostEqual(study_report.paired(mine, other, "target")[0], 0.1)


if __name__ == "__main__":
    result = unittest.main(exit=False).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed} passed, {failed} failed")
    sys.exit(failed > 0)

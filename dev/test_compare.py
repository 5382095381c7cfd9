"""
Tests of compare.py, in seconds: make train_baselines && python3 dev/test_compare.py
"""
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
import unittest

import compare
from rigsa_file import adapted_shapes, data_sections, read_base, read_examples, write_file

NANO = os.path.join("dev", "nano")
USED = ("seconds", "memory")  # columns in which the same run may differ


def shorten(name, path, questions):
    """The first questions of an evaluation by exact match, as a file of its own."""
    found = read_examples(os.path.join(NANO, name))
    write_file(path, "data", data_sections(**found | {"examples": found["examples"][:questions]}))


class Compare(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.folder = temporary.name
        cls.eval = os.path.join(cls.folder, "eval.bin")
        shorten("digits_test.bin", cls.eval, 20)

    def command(self, out, *more):
        """compare.py with short passes, RIGSA at two rates and LoRA at three, of the table REAL."""
        return [sys.executable, os.path.join("dev", "compare.py"), "--base", os.path.join(NANO, "base.bin"),
                "--data", os.path.join(NANO, "digits_train.bin"), "--eval", self.eval, "--share", "0.08",
                "--seeds", "1", "--methods", "rigsa,lora16", "--rates", "0.003,0.006,0.0001,0.0003,0.001",
                "--out", os.path.join(self.folder, out), *more]

    def rows(self, out):
        """The CSV, without what the clock and the machine say, in the order of the runs."""
        with open(os.path.join(self.folder, out, "compare.csv"), newline="") as file:
            rows = [{name: row[name] for name in row if name not in USED} for row in csv.DictReader(file)]
        return sorted(rows, key=lambda row: (row["method"], row["lr"], row["round"] or "9"))

    def test_rows(self):
        """A row for the base and each pass: its scores, values and settings; a second call makes nothing again."""
        subprocess.run(self.command("whole"), check=True, capture_output=True)
        rows = self.rows("whole")
        self.assertEqual([row["method"] for row in rows], ["base", *["lora16"] * 3, *["rigsa"] * 12])
        self.assertEqual([row["round"] for row in rows[-6:]], ["1", "2", "3", "4", "5", ""])
        run = os.path.join(self.folder, "whole", "rigsa_both_0.006_1")
        with open(os.path.join(run, "table.csv"), newline="") as file:
            table = list(csv.DictReader(file))
        for row, found in zip(rows[-6:], table[1:], strict=True):
            self.assertEqual((row["digits"], row["digits_error"], row["density"]),
                             (found["digits"], found["digits_error"], found["density"]))
            self.assertEqual((row["examples"], len(row["losses"].split())),
                             ("96" if row["round"] else "128", compare.PARTS))
        with open(os.path.join(run, "log.txt")) as file:  # "ticket: density 0.0537, 14846 entries, hash ..."
            self.assertIn(f"{rows[-1]['values']} entries", file.read())
        shapes = adapted_shapes(read_base(os.path.join(NANO, "base.bin"))[0])
        self.assertEqual(rows[1]["values"], str(16 * sum(sum(shape) for _, shape in shapes)))  # A and B
        self.assertIn("--lr 0.006 --alpha-lr 0.004 --batch 8 --precision bf16 --seed 1", rows[-1]["settings"])
        again = subprocess.run(self.command("whole"), check=True, capture_output=True, text=True).stdout
        self.assertEqual(again, "5 runs, 5 of them done\n")
        self.assertEqual(self.rows("whole"), rows)

        for made in (2, 0):  # rows of test.csv: the scores that the run ended with, and only once
            tested = subprocess.run(self.command("whole", "--rates", "0.003,0.001", "--test", self.eval),
                                    check=True, capture_output=True, text=True).stdout
            self.assertEqual(len(tested.splitlines()), made)
        with open(os.path.join(self.folder, "whole", "test.csv"), newline="") as file:
            tested = {row["method"]: (row["density"], float(row["digits"])) for row in csv.DictReader(file)}
        self.assertEqual(tested["lora16"], next((row["density"], float(row["digits"])) for row in rows
                                                if (row["method"], row["lr"]) == ("lora16", "0.001")))

        stopped = subprocess.Popen(self.command("stopped", "--jobs", "1"), stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        state = os.path.join(self.folder, "stopped", "rigsa_both_0.003_1", "state.bin")
        while stopped.poll() is None and not os.path.exists(state):
            time.sleep(0.01)
        os.killpg(stopped.pid, signal.SIGTERM)
        _, error = stopped.communicate()
        self.assertEqual((stopped.returncode, len(error.splitlines())), (1, 1), error)
        subprocess.run(self.command("stopped"), check=True, capture_output=True)
        self.assertEqual(self.rows("stopped"), rows)
        with open(os.path.join(os.path.dirname(state), "log.txt")) as file:
            self.assertIn("resumed after update", file.read())

    def test_refused(self):
        """What a user may get wrong is one line."""
        for more, part in ((["--methods", "lore"], "no method `lore`"), (["--base", self.eval], "a file of kind"),
                           (["--eval", "none.bin"], "none.bin")):
            done = subprocess.run(self.command("refused", *more), capture_output=True, text=True)
            self.assertEqual((done.returncode, len(done.stderr.splitlines())), (1, 1), done.stderr)
            self.assertIn(part, done.stderr)

    def test_parts(self):
        """Means of eighths, of fewer where there are fewer losses."""
        self.assertEqual(compare.parts([1.0, 2.0, 4.0] * 8), " ".join(["2.333"] * 8))
        self.assertEqual(compare.parts([1.0, 3.0]), "1.000 3.000")


if __name__ == "__main__":
    result = unittest.main(exit=False, verbosity=0).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed} passed, {failed} failed")
    sys.exit(failed > 0)

"""
What a run of train_rigsa has written into its folder, for those who draw it.
"""
import functools
import os

import numpy as np

from compare import read_rows
from import_hf import Ticket
from rigsa_file import read_base, read_examples, read_file

SMOOTH = 50  # parts of a pass: a loss curve is an exponential mean over about one of them


def smoothed(losses):
    """The running mean of the losses of a pass, a list as long."""
    rate, smooth = min(1, SMOOTH / len(losses)), losses[:1]
    for loss in losses[1:]:
        smooth.append((1 - rate) * smooth[-1] + rate * loss)
    return smooth


def read_settings(folder):
    """settings.txt as a dict, name -> value; of what is there several times, a value a line."""
    path = os.path.join(folder, "settings.txt")
    try:
        with open(path, encoding="utf-8") as file:
            settings = {}
            for line in file:
                name, value = line[:16].strip(), line[17:].rstrip("\n")
                settings[name] = f"{settings[name]}\n{value}" if name in settings else value
            return settings
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name the folder that train_rigsa was given as "
                         "--out") from None


class Run:
    """
    What the run in `folder` has written. `table`, `losses`: rows of its CSVs. `sets`: the columns of its
    evaluations, the target first; `data`: a dict, column -> its evaluation file as read_examples returns it,
    where that is there. `notes`: what could not be read, in words.
    """

    def __init__(self, folder):
        self.folder, self.notes = folder, []
        self.settings = read_settings(folder)
        self.table, self.losses, self.pruning = (read_rows(os.path.join(folder, name)) for name in (
            "table.csv", "loss.csv", "pruning.csv"))
        if not self.table:
            raise ValueError(f"{os.path.join(folder, 'table.csv')}: nothing there yet; it is written with "
                             "the run's first save")
        self.sets = [name.removesuffix("_error") for name in self.table[0] if name.endswith("_error")]
        self.data = {}
        for path in self.settings["eval"].split("\n"):
            examples = self.try_to(lambda: read_examples(path))
            if examples and examples.get("column") in self.sets:
                self.data[examples["column"]] = examples

    @functools.cached_property
    def ticket(self):
        """The ticket of a run of RIGSA; None where it or its base is not there."""
        path = os.path.join(self.folder, "ticket.bin")
        if self.settings.get("method", "rigsa") != "rigsa" or not os.path.exists(path):
            return None
        base = self.try_to(lambda: read_base(self.settings["base"]))
        return base and Ticket(path, read_file(path, "tick"), base[0])

    def try_to(self, read):
        """What read() returns; where it cannot, None and a note."""
        try:
            return read()
        except ValueError as error:
            self.notes.append(str(error))
            return None

    def is_loss(self, column):
        """Whether a column is in nats, lower is better, and no share."""
        return self.data.get(column, {}).get("metric") == "loss"

    def scores(self, column):
        """(values, standard errors) over the rows of the table."""
        return tuple(np.array([float(row[name]) for row in self.table])
                     for name in (column, f"{column}_error"))

"""
How much faster are several machines? A model of an update of train_rigsa_mpi, and runs to check it with.

    python3 dev/scale.py table      bytes per update, and the speed-up that the model expects (doc/scale.md)
    python3 dev/scale.py check      the model beside runs whose exchange takes as long as on a network

`check` wants ./train_rigsa_mpi, mpicc and a machine that does nothing else, for two minutes.
"""
import os
import re
import subprocess
import sys
import tempfile

from test_mpi import PROGRAM, ROOT, mpirun

# entries of all DeltaW, and gates
MODELS = {"nano": (276480, 21), "135M": (106168320, 210), "360M": (314572800, 224), "1.7B": (1610612736, 168)}
LATENCY = 50e-6                                 # seconds of a message between machines: assumed
GBITS = (1, 10, 100)
NODES = (2, 4, 8, 16, 32, 64)
# what, model, density, seconds per example: half of doc/performance.md's steps of two examples, on
# two cores; of a server a guess, and for 1.7B 15 times that
CASES = (("135M at 3.46 %, two cores", "135M", 0.0346, 2.4), ("135M dense, two cores", "135M", 1, 3.2),
         ("135M at 3.46 %, server", "135M", 0.0346, 0.15), ("135M dense, server", "135M", 1, 0.2),
         ("1.7B at 3.46 %, server", "1.7B", 0.0346, 2.3), ("1.7B dense, server", "1.7B", 1, 3))


def values(model, density):
    """What is trained, and travels: survivors and gates."""
    entries, gates = MODELS[model]
    return int(entries * density) + gates


def exchange(n, micros, ranks, gbit):
    """
    (bytes, seconds) of an update of n values, over a batch of so many micro-batches, in the busier direction
    of a rank's line: in each round it sends all but its own part of a gradient, and at the end it gets all
    but its own part of the sum.
    """
    rounds = -(-micros // ranks)
    size = 4 * n * (rounds + 1) * (ranks - 1) / ranks
    return size, 8e-9 * size / gbit + (rounds + 1) * (ranks - 1) * LATENCY


def speedup(n, examples, ranks, gbit, seconds):
    """Times as fast as one machine that takes so many seconds for an example; a micro-batch per rank."""
    return examples * seconds / (examples / ranks * seconds + exchange(n, ranks, ranks, gbit)[1])


def print_table(heading, rows):
    """A table of Markdown, as it grows."""
    print(f"| {' | '.join(heading)} |\n|{'---|' * len(heading)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def table():
    sizes = ((model, density, values(model, density)) for model in MODELS for density in (1, 0.0346))
    print_table(("model", "density", "values", "MB of a gradient"),
                ((model, f"{100 * share:.4g} %", f"{n:,}", f"{4e-6 * n:,.2f}") for model, share, n in sizes))
    print()

    def cell(model, density, seconds, ranks):
        n = values(model, density)
        return " / ".join(f"{speedup(n, 64, ranks, gbit, seconds):.3g}" for gbit in GBITS)
    print_table(("", "s per example", *map(str, NODES)),
                ((what, case[-1], *(cell(*case, ranks) for ranks in NODES)) for what, *case in CASES))


def run(folder, ranks, gbit):
    """
    A dense pass of 16 updates of the nano model, with 8 micro-batches in a batch: (seconds of the pass, of
    its exchanges alone, and with their delays, bytes that rank 0 received). No delays with 0 Gbit/s.
    """
    out = f"{folder}/{ranks}-{gbit}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": f"{folder}/network.so",
                   "GBIT": str(gbit), "USEC": str(1e6 * LATENCY if gbit else 0)}
    command = [*mpirun(), "-n", str(ranks), PROGRAM, "--batch", "16", "--micro", "2", "--rounds", "0",
               "--ticket-examples", "256", "--eval", "dev/nano/sizes.bin", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    with open(f"{out}/table.csv") as file:
        before, after = (float(line.split(",")[-1]) for line in file.read().splitlines()[1:])
    own, delay, received = map(float, re.search("network: (.*)", done.stderr).group(1).split())
    return after - before, own, own + delay, received


def check_rows(folder):
    n = values("nano", 1)
    for ranks in (2, 4, 8):
        plain, own, _, received = run(folder, ranks, 0)
        megabytes = f"{1e-6 * received:.1f}", f"{16e-6 * exchange(n, 8, ranks, 1)[0]:.1f}"
        yield ranks, "as it is", *megabytes, f"{own:.2f}", "", f"{plain:.2f}", ""
        for gbit in (0.1, 1, 10):
            seconds, _, exchanged, _ = run(folder, ranks, gbit)
            model = 16 * exchange(n, 8, ranks, gbit)[1]
            yield (ranks, gbit, "", "", f"{exchanged:.2f}", f"{model:.2f}", f"{seconds:.2f}",
                   f"{plain + max(0, model - own):.2f}")


def check():
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/network.so"
        build = ["mpicc", "-O2", "-shared", "-fPIC", "-o", library, "dev/mpi_network.c"]
        subprocess.run(build, cwd=ROOT, check=True)
        heading = "ranks", "Gbit/s", "MB received", "model", "s exchanging", "model", "s of the pass", "model"
        print_table(heading, check_rows(folder))


if __name__ == "__main__":
    if sys.argv[1:] not in (["table"], ["check"]):
        sys.exit(__doc__)
    {"table": table, "check": check}[sys.argv[1]]()

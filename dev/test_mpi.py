"""
Do several processes make what one makes, to the bit, whatever happens to them? Runs ./train_rigsa_mpi over
loopback, beside ./train_rigsa. Build both first; mpirun is Open MPI's or MPICH's.

    python3 dev/test_mpi.py                      for CI: two and three ranks, two minutes
    python3 dev/test_mpi.py --long               one to five ranks, and more of everything
    python3 dev/test_mpi.py --only killed        the tests whose name contains the word

The last line is `N passed, N failed`; the exit status says the same.
"""
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time

import rigsa_file
from test_reliability import NANO, ROOT, Runs, begun, check, finish, run_tests

PROGRAM = os.path.join(ROOT, "train_rigsa_mpi")


def said_once(err, word):
    """That the ranks said one line, in which `word` occurs; mpirun may say more."""
    lines = [line for line in err.split("\n") if line.startswith("train_rigsa_mpi: ")]
    return len(lines) == 1 and word in lines[0]


def mpirun():
    """The command before the ranks: Open MPI refuses root, and more ranks than cores, if it is not told."""
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout
    options = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    return ["mpirun", *options]


class Ranks(Runs):
    """Runs of several ranks, of which some may have options, a program or a folder of their own."""

    def __init__(self, folder):
        super().__init__(folder)
        self.mpirun = mpirun()

    def usual(self, *more):
        """Batches of 16 examples in micro-batches of 3, 3, 3, 3, 3 and 1; the last batch has 6, in two."""
        return super().usual("--examples", "150", "--ticket-examples", "150", "--rounds", "1", "--micro", "3",
                             *more)

    def start_parts(self, out, options, *parts, threads=1):
        """A run in the folder `out`; each part is (ranks, command, working folder) of some of its ranks."""
        words = []
        for ranks, command, folder in parts:
            words += [":"] * bool(words) + ["-n", str(ranks), "-wdir", folder, *command]
            words += ["--out", self.path(out), *options]
        return subprocess.Popen([*self.mpirun, *words], text=True, cwd=ROOT, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": str(threads)})

    def start(self, out, *options, ranks=2, threads=1):
        return self.start_parts(out, options, (ranks, [PROGRAM], ROOT), threads=threads)


def rank_ids(process):
    """Process ids of the ranks, which are below mpirun or below a process of its own."""
    found, below = [], [process.pid]
    while below:
        pid = below.pop()
        try:
            with open(f"/proc/{pid}/task/{pid}/children") as file:
                below += [int(child) for child in file.read().split()]
            if os.readlink(f"/proc/{pid}/exe") == PROGRAM:
                found.append(pid)
        except OSError:
            pass
    return sorted(found)


def alone(runs, name, options):
    """The result of ./train_rigsa with these options."""
    status, out, err = Runs(runs.folder).run(name, *options, threads=2)
    check(f"{name}: one process", status == 0, out + err)
    return runs.result(name)


def test_same(runs, long):
    """The ticket, the losses and the table of one process, by any number of ranks and threads."""
    cases = {"rigsa": (), "whole": ("--micro", "0"),
             "bf16": ("--precision", "bf16", "--threshold", "all", "--survivors", "redraw")}
    for name, more in cases.items():
        options = [*runs.usual(*more), *["--recompute"] * (name == "bf16")]
        expected = alone(runs, name, options)
        for ranks in (1, 2, 3, 4, 5, 7) if long else (2, 3) if name == "rigsa" else (2,):
            out = f"{name}{ranks}"
            status, said, err = runs.run(out, *options, ranks=ranks, threads=1 + ranks % 3 if long else 1)
            check(f"{name}: {ranks} ranks", status == 0 and runs.result(out) == expected, said + err)
            check(f"{name}: {ranks} ranks say it once", said.count(" hash ") == 1, said)
            work = 1 if name == "whole" else 6
            idle = f"note: {work} micro-batches in" in said
            check(f"{name}: work for {ranks} ranks", idle == (ranks > work), said)


def test_evaluation(runs, long):
    """The scores on several sets, dealt out."""
    sets = [word for name in ("addition", "sizes", "packing") for word in ("--eval", f"{NANO}/{name}.bin")]
    short = ["--data", runs.data, "--rounds", "0", "--ticket-examples", "16"]
    row = {}
    for ranks in (0, 1, 2, 3, 5) if long else (0, 3):
        how = {"ranks": ranks} if ranks else {}
        status, said, err = (runs if ranks else Runs(runs.folder)).run(f"sets{ranks}", *short, *sets, **how)
        row[ranks] = re.findall(r"^(?:base|ticket) .*\+-\d\.\d+",
                                said.replace("\r", "\n").replace("\033[K", ""), re.M)
        same = len(row[ranks]) == 2 and row[ranks] == row[0]
        check(f"evaluation by {ranks} ranks", status == 0 and same, said + err)


def disturb(runs, name, number, times, expected, options):
    """
    Sends signal `number` to a rank drawn at random and goes on with another number of ranks, until that has
    ended `times` runs; compares the result.
    """
    hits = 0
    while True:
        resume = os.path.exists(runs.path(f"{name}/state.bin"))
        begin = ["--resume"] if resume else [*options, "--overwrite"]
        process = runs.start(name, *begin, "--save-every", "0.02", ranks=random.choice((2, 3, 4)))
        if hits < times:
            begun(runs, name, process)
            time.sleep(random.uniform(0.1, 0.5))
            for pid in rank_ids(process)[:random.randint(1, 3)][-1:]:
                os.kill(pid, number)
        status, said, err = finish(process)
        if status == 0:
            break
        hits += 1
        ended = status in (128 + number, number) and not rank_ids(process)
        check(f"{name}: all have ended", ended, said + err)
        check(f"{name}: says how to go on", number == signal.SIGKILL or "--resume" in said, said + err)
    check(f"{name}: after {hits} of {times}", runs.result(name) == expected, said + err)
    print(f"    {name}: {hits} interruptions, then the undisturbed result")


def test_killed(runs, long):
    expected = alone(runs, "undisturbed", runs.usual())
    disturb(runs, "killed", signal.SIGKILL, 10 if long else 2, expected, runs.usual())
    disturb(runs, "terminated", signal.SIGTERM, 10 if long else 1, expected, runs.usual())


def test_differing(runs, long):
    """A rank with another file, program or option than rank 0, or too little, says so; nothing is written."""
    names = {"--base": "base.bin", "--data": "data.bin", "--eval": "eval.bin"}
    options = [*(word for name in names.items() for word in name), *runs.usual()[6:]]
    shutil.copy(f"{NANO}/base.bin", runs.path("base.bin"))

    def differing(what, word, ours=PROGRAM, theirs=PROGRAM, more=(), change=lambda folder: None):
        folder = tempfile.mkdtemp(dir=runs.folder)
        for name in names.values():
            shutil.copy(runs.path(name), folder)
        change(folder)
        parts = (2, [ours], runs.folder), (1, [theirs, *more], folder)
        status, said, err = finish(runs.start_parts("differs", options, *parts))
        check(f"{what}: one line", status == 1 and said_once(err, word), f"{status} {err}")
        check(f"{what}: nothing is written", not os.path.exists(runs.path("differs/state.bin")))

    def fewer(folder):
        changed = rigsa_file.read_examples(f"{folder}/data.bin")
        changed["examples"] = changed["examples"][1:]
        rigsa_file.write_file(f"{folder}/data.bin", "data", rigsa_file.data_sections(**changed))

    other = shutil.copy(PROGRAM, runs.path("other_program"))
    with open(other, "ab") as file:
        file.write(b"x")
    differing("other data", "data.bin is not rank 0's", change=fewer)
    differing("another program", "the program is not rank 0's", theirs=other)
    differing("another option", "a setting is not rank 0's", more=("--seed", "2"))
    differing("no base", "base.bin: No such file", change=lambda folder: os.remove(f"{folder}/base.bin"))
    options[options.index("--examples") + 1] = "400"
    options += ["--batch", "400"]
    options[options.index("--micro") + 1] = "200"
    limited = ("-c", f'ulimit -v 300000; exec {PROGRAM} "$@"', "bash")
    differing("memory", "MB are needed", theirs="bash", more=limited)


def test_same_error(runs, long):
    """What ends every rank is said once."""
    million = "1000000"
    for word, options in (("unknown option `--nope`", ["--nope"]),
                          ("is not finite", runs.usual("--sigma", million, "--alpha-lr", "10", "--lr", "0")),
                          ("MB are needed", runs.usual("--micro", million, "--batch", million,
                                                       "--examples", million)),
                          ("holds a run", runs.usual())):
        status, said, err = runs.run("error", *options, *["--overwrite"] * (word[0] == "M"), ranks=3)
        check(word, status == 1 and said_once(err, word), f"{status} {err}")


# What mpirun takes for ssh: AGENT [OPTIONS] HOST COMMAND. A host is a network namespace with a name of its own.
AGENT = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
"""


def test_hosts(runs, long):
    """A rank on each of two hosts: namespaces, whose only network is a cable between them."""
    if runs.mpirun == ["mpirun"] or not shutil.which("ip"):
        print("    two hosts need Open MPI and iproute2: not tried")
        return
    a, b = (f"r{os.getpid()}{end}" for end in "ab")
    agent = runs.path("agent")
    with open(agent, "w") as file:
        file.write(AGENT)
    os.chmod(agent, 0o755)
    address = {a: "10.77.0.1/24", b: "10.77.0.2/24"}
    cable = [f"ip netns add {a}", f"ip netns add {b}", f"ip link add {a} netns {a} type veth peer name {b} netns {b}",
             *(line for host in (a, b) for line in (f"ip -n {host} addr add {address[host]} dev {host}",
                                                    f"ip -n {host} link set lo up", f"ip -n {host} link set {host} up"))]
    try:
        for line in cable:
            subprocess.run(line.split(), check=True, capture_output=True)
        ours = "--mca plm_rsh_agent {} --mca plm_rsh_no_tree_spawn 1 --mca btl self,tcp --mca btl_tcp_if_include {} " \
               "--mca oob_tcp_if_include {} --host {}:1,{}:1".format(agent, "10.77.0.0/24", "10.77.0.0/24", a, b)
        expected, runs.mpirun = alone(runs, "host", runs.usual()), [agent, a, *runs.mpirun, *ours.split()]
        status, said, err = runs.run("hosts", *runs.usual())
        check("two hosts", status == 0 and runs.result("hosts") == expected, said + err)
        sent = subprocess.run(["ip", "netns", "exec", a, "cat", "/proc/net/dev"], capture_output=True, text=True).stdout
        megabytes = 1e-6 * int(re.search(f"{a}: *(\\d+)", sent)[1])
        check("it went through the cable", megabytes > 1, sent)
        print(f"    two hosts: {megabytes:.0f} MB through the cable")
    except subprocess.CalledProcessError as error:
        print(f"    no two hosts were made: {error}")
    finally:
        for host in (a, b):
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


TESTS = (test_same, test_evaluation, test_killed, test_differing, test_same_error, test_hosts)


if __name__ == "__main__":
    run_tests(TESTS, Ranks, __doc__, "more ranks and more interruptions")

"""
Whatever happens to a run, is nothing lost but the last minutes, and is the rest the same to the bit? Kills ./train_rigsa, fills its
disk, locks its folder and feeds it nonsense. Build it first; Linux or another POSIX system.

    python3 dev/test_reliability.py                 a minute, for CI
    python3 dev/test_reliability.py --long          the numbers of doc/reliability.md
    python3 dev/test_reliability.py --only memory   the tests whose name contains the word

The last line is `N passed, N failed`; the exit status says the same.
"""
import argparse
import csv
import json
import math
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

import rigsa_file

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
PROGRAM = os.path.join(ROOT, "train_rigsa")
EVALUATE = os.path.join(ROOT, "evaluate_rigsa")
NANO = os.path.join(HERE, "nano")
count = {True: 0, False: 0}


def check(what, good, said=""):
    """Counts one test; of a failed one it prints what the program said."""
    count[bool(good)] += 1
    if not good:
        print(f"    FAILED: {what}: {said}")


class Runs:
    """
    A temporary folder with small data, and runs in it. `limits` maps resource.RLIMIT_* to bytes, `user` is a user id, `group` the
    folder of a cgroup of version 1.
    """

    def __init__(self, folder, program=PROGRAM):
        self.folder, self.program = folder, program
        addition = rigsa_file.read_examples(f"{NANO}/addition.bin")
        digits = rigsa_file.read_examples(f"{NANO}/digits_train.bin")
        addition["examples"], digits["examples"] = addition["examples"][:64], digits["examples"][:200]
        self.data, self.eval = self.path("data.bin"), self.path("eval.bin")
        rigsa_file.write_file(self.data, "data", rigsa_file.data_sections(**digits))
        rigsa_file.write_file(self.eval, "data", rigsa_file.data_sections(**addition))

    def usual(self, *more):
        """The options of a short run; `more` of them replace some of these."""
        options = {"--base": f"{NANO}/base.bin", "--data": self.data, "--eval": self.eval, "--examples": "240",
                   "--ticket-examples": "320", "--rounds": "3", **dict(zip(more[::2], more[1::2]))}
        return [word for option in options.items() for word in option]

    def path(self, name):
        return os.path.join(self.folder, name)

    def start(self, out, *options, threads=1, limits=None, user=None, group=None, cwd=ROOT):
        """A run in the folder `out`, as a process."""
        def prepare():
            for kind, size in (limits or {}).items():
                resource.setrlimit(kind, (size, size))
            if group:
                write(f"{group}/cgroup.procs", "0")
            if user:
                os.setuid(user)
        return subprocess.Popen([self.program, "--out", self.path(out), *options], text=True, cwd=cwd,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=prepare,
                                env={**os.environ, "OMP_NUM_THREADS": str(threads)})

    def run(self, out, *options, **how):
        """(exit status, standard output, standard error) of a run in the folder `out`."""
        return finish(self.start(out, *options, **how))

    def result(self, out):
        """What must be the same: the ticket or the model, the losses, the table without its times."""
        found = {}
        for name in ("ticket.bin", "lora.bin", "model.bin", "loss.csv"):
            if os.path.exists(self.path(f"{out}/{name}")):
                with open(self.path(f"{out}/{name}"), "rb") as file:
                    found[name] = file.read()
        with open(self.path(f"{out}/table.csv")) as file:
            found["table"] = [row[:-1] for row in csv.reader(file)]
        return found


def finish(process):
    """(exit status, standard output, standard error) once the process has ended."""
    out, err = process.communicate()
    return process.returncode, out, err


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def one_line(err, word):
    """A single line, in which `word` occurs."""
    return err.count("\n") == 1 and word in err


def undisturbed(runs, name, options):
    status, out, err = runs.run(name, *options)
    check(f"{name}: the undisturbed run", status == 0, out + err)
    return runs.result(name)


def disturb(runs, name, usual, expected, number, numbers, longest, threads=(1,), every="0.02"):
    """
    Ends runs with signal `number` at random moments within `longest` seconds and resumes them, until it hit `numbers` times;
    compares each result. They save themselves every `every` seconds.
    """
    hits = resumes = finished = 0
    while hits < numbers or not finished:
        out = f"{name}{finished}"
        saved = os.path.exists(runs.path(f"{out}/state.bin"))
        options = ["--resume"] if saved else [*usual, "--overwrite"]
        process = runs.start(out, *options, "--save-every", every, threads=random.choice(threads))
        try:
            process.wait(random.uniform(0, longest) if hits < numbers else None)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        status, said, err = finish(process)
        resumes += saved
        if status == 0:
            check(f"{name}: run {finished} after {hits} interruptions", runs.result(out) == expected, said)
            finished += 1
        elif number == signal.SIGKILL or status == -number:         # the latter: before there was anything to save
            hits += status == -number
            check(f"{name}: killed", status == -number, said + err)
        else:
            hits += 1
            check(f"{name}: stops when asked", status == 128 + number and "--resume" in said and not err, said + err)
    print(f"    {name}: {hits} interruptions, {resumes} resumed, {finished} runs with the undisturbed result")


def test_killed(runs, long):
    usual = runs.usual()
    expected = undisturbed(runs, "rigsa", usual)
    disturb(runs, "killed", usual, expected, signal.SIGKILL, 50 if long else 8, 1.5, (1, 2, 3))


def test_terminated(runs, long):
    options = ("--survivors", "redraw", "--keep", "0.8", "--threshold", "all", "--micro", "5", "--precision", "bf16")
    expected = undisturbed(runs, "redraw", runs.usual(*options))
    disturb(runs, "terminated", runs.usual(*options), expected, signal.SIGTERM, 20 if long else 3, 1.5)
    disturb(runs, "interrupted", runs.usual(*options), expected, signal.SIGINT, 20 if long else 2, 1.5)


def test_default(runs, long):
    """The default run, which takes minutes."""
    if not long:
        return
    expected = undisturbed(runs, "default", [])
    disturb(runs, "default-killed", [], expected, signal.SIGKILL, 6, 60, every="5")
    print("    " + runs.run("default-killed0", "--resume")[1].splitlines()[-1])


def test_second_signal(runs, long):
    """In an update that takes long, the first signal waits for its end and the second does not."""
    process = runs.start("slow", *runs.usual("--batch", "1000000", "--examples", "100000", "--micro", "16"))
    begun(runs, "slow", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    check("the first signal lets the step finish", process.poll() is None)
    process.send_signal(signal.SIGINT)
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        check("the second signal stops at once", False)
        process.kill()
    check("by itself", finish(process)[0] == -signal.SIGINT)
    check("the state of before is there", os.path.exists(runs.path("slow/state.bin")))


def test_ignored_signal(runs, long):
    """A signal that was ignored when the program started (nohup, background jobs) still is; another not."""
    for ignored, other in ((signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        signal.signal(ignored, signal.SIG_IGN)
        out = f"ignores{ignored}"
        slow = runs.usual("--batch", "1000000", "--examples", "100000", "--micro", "16")
        process = runs.start(out, *slow)
        begun(runs, out, process)
        process.send_signal(ignored)
        time.sleep(0.3)
        check("not asked to stop", process.poll() is None)
        process.send_signal(other)
        process.send_signal(ignored)
        time.sleep(0.3)
        check("nor asked twice", process.poll() is None)
        process.send_signal(other)
        check("at once", finish(process)[0] == -other)
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


def begun(runs, name, process):
    """Waits until the run has evaluated the base and saved itself."""
    while process.poll() is None and not os.path.exists(runs.path(f"{name}/loss.csv")):
        time.sleep(0.02)


def stopped_run(runs, name):
    """A run that was stopped on its way."""
    for wait in (1.0, 0.7, 0.5, 0.3):
        process = runs.start(name, *runs.usual(), "--overwrite")
        time.sleep(wait)
        process.terminate()
        if finish(process)[0] == 128 + signal.SIGTERM:
            return
    check(f"{name}: stopped", False)


def test_disk_full(runs, long):
    """Files may not grow beyond `limit` bytes: the state is neither lost nor replaced by half of one."""
    stopped_run(runs, "before")
    expected = undisturbed(runs, "roomy", runs.usual())
    with open(runs.path("before/state.bin"), "rb") as file:
        state = file.read()
    warned = died = 0
    limits = random.Random(1).sample(range(1, len(state)), 200 if long else 10)
    for limit in [0, 1, 32, 4095, 4096, len(state) - 1, *limits]:
        shutil.rmtree(runs.path("tight"), ignore_errors=True)
        shutil.copytree(runs.path("before"), runs.path("tight"))
        process = runs.start("tight", "--resume", "--save-every", "0.01", limits={resource.RLIMIT_FSIZE: limit})
        time.sleep(random.uniform(0.05, 0.4))
        process.terminate()
        status, said, err = finish(process)
        died += status == 1
        warned += "warning" in err
        check(f"limit {limit}: exit", status in (0, 1, 128 + signal.SIGTERM, -signal.SIGTERM), f"{status} {said} {err}")
        check(f"limit {limit}: says why", status != 1 or "File too large" in err, err)
        half = any(name.endswith(".tmp") for name in os.listdir(runs.path("tight")))
        check(f"limit {limit}: nothing half", status == -signal.SIGTERM or not half)
        if not os.path.exists(runs.path("tight/state.bin")):
            check(f"limit {limit}: the state is there", False)
            continue
        with open(runs.path("tight/state.bin"), "rb") as file:
            same = file.read() == state
        if not same or limit % 7 == 0:                              # a later state, a smaller one that had room, or the same
            status, said, err = runs.run("tight", "--resume")
            check(f"limit {limit}: goes on", status == 0 and runs.result("tight") == expected, said + err)
    check("some ended, some warned", died and warned)
    print(f"    {len(limits) + 6} limits: {warned} runs warned, {died} ended with exit status 1")
    status, said, err = runs.run("nothing", *runs.usual(), limits={resource.RLIMIT_FSIZE: len(state) // 2})
    check("no room at the start", status == 1 and one_line(err, "state.bin: cannot be written: File too large"), err)
    user = 65534 if os.getuid() == 0 else None
    os.chmod(runs.folder, 0o755)
    os.mkdir(runs.path("closed"), 0o555)
    status, said, err = runs.run("closed", *runs.usual(), user=user)
    check("a folder that may not be written to", status == 1 and one_line(err, "Permission denied"), f"{status} {err}")
    process = runs.start("gone", *runs.usual("--save-every", "0.01"))
    begun(runs, "gone", process)
    while os.path.exists(runs.path("gone")):                        # a save may put a file there meanwhile
        shutil.rmtree(runs.path("gone"), ignore_errors=True)
    status, said, err = finish(process)
    check("the folder is removed under way", status == 1 and "ticket.bin: cannot be written: No such file" in err, err)


def test_lock(runs, long):
    first = runs.start("shared", *runs.usual("--examples", "100000"))
    begun(runs, "shared", first)
    for options in (["--resume"], [*runs.usual(), "--overwrite"]):
        status, said, err = runs.run("shared", *options)
        check("a second run in the folder", status == 1 and one_line(err, "another run"), err)
    first.kill()
    finish(first)
    process = runs.start("shared", "--resume")
    time.sleep(0.5)
    process.terminate()
    check("the lock went with the first", finish(process)[0] == 128 + signal.SIGTERM)


def test_other_settings(runs, long):
    stopped_run(runs, "chosen")
    for option, value in (("lr", "0.004"), ("rounds", "2"), ("seed", "2"), ("batch", "8"), ("micro", "4"), ("survivors", "keep"),
                          ("keep", "0.5601")):
        status, said, err = runs.run("chosen", "--resume", f"--{option}", value)
        check(f"another --{option}", status == 1 and not said and one_line(err, f"--{option} is {value}, "), err)
    status, said, err = runs.run("chosen", "--resume", "--overwrite")
    check("resume and overwrite", status == 1 and one_line(err, "--overwrite"), err)
    status, said, err = runs.run("empty", "--resume")
    check("nothing to resume", status == 1 and one_line(err, "state.bin: No such file"), err)
    status, said, err = runs.run("chosen", *runs.usual())
    check("neither resume nor overwrite", status == 1 and not said and one_line(err, "--resume"), err)
    os.rename(runs.path("chosen"), runs.path("renamed"))
    changed = rigsa_file.read_examples(runs.eval)
    changed["examples"] = changed["examples"][::-1]
    shutil.copy(runs.eval, runs.path("kept.bin"))
    rigsa_file.write_file(runs.eval, "data", rigsa_file.data_sections(**changed))
    status, said, err = runs.run("renamed", "--resume")
    check("an evaluation set that changed", status == 1 and one_line(err, "eval.bin has changed"), err)
    os.replace(runs.path("kept.bin"), runs.eval)
    status, said, err = runs.run("renamed", "--resume", *runs.usual())
    check("the same settings again, in a renamed folder", status == 0, err)


def test_command_lines(runs, long):
    text = runs.path("a file")
    write(text, "text")
    other = rigsa_file.read_examples(runs.eval)
    other["vocab"] = 50
    vocabulary = runs.path("vocabulary.bin")
    rigsa_file.write_file(vocabulary, "data", rigsa_file.data_sections(**other))
    pipe = runs.path("pipe")
    os.mkfifo(pipe)
    for options, word in ((["--learning-rate", "1"], "unknown option"), (["lr"], "unknown option"), (["--lr"], "needs a value"),
                          (["--lr", "fast"], "not a number"), (["--lr", "11"], "0 to 10"), (["--lr", "inf"], "not a number"),
                          (["--batch", "1.5"], "whole"), (["--keep", "-0.1"], "0 to 1"), (["--survivors", "lora"], "none of"),
                          (["--data", "a\nb"], "line break"),
                          (["--save-every", "-1"], "0 to"), (["--seed", "1", "--seed", "1"], "twice"),
                          (["--out", f"{text}/out"], "Not a directory"), (["--out", text], "Not a directory"),
                          (["--out", runs.path("no/such")], "No such file"), (["--out", ""], "No such file"),
                          (["--out", "x" * 300], "too long"), (["--out", runs.folder + "/." * 2036], "too long"),
                          (["--eval", vocabulary], "vocabulary of 50"), (["--eval", text], "too short"),
                          (["--data", vocabulary], "vocabulary of 50"),
                          (["--data", text], "too short"), (["--data", pipe], "not a file"),
                          (["--data", runs.folder], "not a file"),
                          (["--data", f"{NANO}/base.bin"], "`data` is needed"), (["--base", runs.data], "`base` is needed"),
                          (["--data", runs.path("none")], "No such file")):
        process = subprocess.run([PROGRAM, *([] if "--out" in options else ["--out", runs.path("bad")]), *options],
                                 capture_output=True, text=True, timeout=20)
        check(" ".join(options)[:40], process.returncode == 1 and not process.stdout and one_line(process.stderr, word),
              process.stderr)


def evaluation(runs, name, column, **more):
    """The path of an evaluation set that differs from the usual one only in what is named."""
    parts = {**rigsa_file.read_examples(runs.eval), "column": column, **more}
    rigsa_file.write_file(runs.path(name), "data", rigsa_file.data_sections(**parts))
    return runs.path(name)


def test_names(runs, long):
    """Results are kept by the whole name of an evaluation set, which no other has; there may be many."""
    names = [f"mmlu_continuation_high_school_subject_number_{i}" for i in range(60)]
    paths = [evaluation(runs, f"{name}.bin", name) for name in names]
    short = ["--base", f"{NANO}/base.bin", "--data", runs.data, "--rounds", "0", "--ticket-examples", "16"]
    every = [word for path in paths for word in ("--eval", path)]
    status, said, err = runs.run("many", *short, *every)
    check("sixty evaluation sets", status == 0, err)
    result = runs.result("many") if status == 0 else {"table": [[]]}
    heading = [word for name in names for word in (name, f"{name}_error")]
    check("each with a column", result["table"][0][4:] == heading, result["table"][0])
    details = runs.path("details.jsonl")
    said = subprocess.run([EVALUATE, *every, "--details", details], cwd=ROOT, capture_output=True, text=True)
    columns = {json.loads(line)["column"] for line in read(details).splitlines()} if said.returncode == 0 else set()
    check("and details", columns == set(names), said.stderr)
    same = evaluation(runs, "same.bin", names[0])
    for first, second in ((paths[0], paths[0]), (paths[0], same)):
        status, said, err = runs.run("twice", *short, "--eval", first, "--eval", second)
        check("two of one name", status == 1 and one_line(err, f"{first} and {second} are both"), err)
    for name in ("density", "mnist_error"):
        status, said, err = runs.run("taken", *short, "--eval", evaluation(runs, "taken.bin", name))
        check("a name that table.csv needs itself", status == 1 and one_line(err, f"`{name}`"), err)
    choices = dict(choices=[2] * 32, gold=[0] * 32, chars=[1] * 64)
    path = evaluation(runs, "c.bin", "c", metric="acc", **choices)
    status, said, err = runs.run("wrong", *runs.usual("--data", path))
    check("wrong choices are not learnt", status == 1 and one_line(err, "c.bin holds wrong choices"), err)
    status, said, err = runs.run("elsewhere", cwd=runs.folder)
    check("the default files, started elsewhere", status == 1 and one_line(err, "the project's folder"), err)


def test_changed_data(runs, long):
    """Data and evaluation sets that are cut or overwritten under a run have no effect on it."""
    usual = runs.usual("--rounds", "1", "--examples", "2000")
    expected = undisturbed(runs, "calm", usual)
    kept = {}
    for path in (runs.data, runs.eval):
        with open(path, "rb") as file:
            kept[path] = file.read()
    for name, junk in (("cut", b""), ("overwritten", None)):
        process = runs.start(name, *usual)
        begun(runs, name, process)
        for path, content in kept.items():
            with open(path, "r+b") as file:
                file.truncate(len(junk) if junk is not None else len(content))
                if junk is None:
                    file.seek(len(content) // 2)
                    file.write(b"\xff" * (len(content) - len(content) // 2))
        status, said, err = finish(process)
        for path, content in kept.items():
            with open(path, "wb") as file:
                file.write(content)
        check(f"{name}: nothing happens", status == 0 and runs.result(name) == expected, f"{status} {err}")


def test_moved_inputs(runs, long):
    """Inputs may have moved: their hashes decide. Names may have any character."""
    expected = undisturbed(runs, "staying", runs.usual())
    odd = runs.path(" a \n folder ")
    os.mkdir(odd)
    for name, path in (("base.bin", f"{NANO}/base.bin"), ("data.bin", runs.data), (" eval 1.bin", runs.eval)):
        shutil.copy(path, f"{odd}/{name}")
    local = runs.usual("--base", "base.bin", "--data", "./data.bin", "--eval", " eval 1.bin")
    moved = ["--base", runs.path("b.bin"), "--data", f"{runs.folder}/./d.bin", "--eval", runs.path("e 1.bin")]
    for name, options in (("here", []), ("there", moved), ("again", moved)):
        out = f"{name} run"
        process = runs.start(out, *local, cwd=odd)
        begun(runs, out, process)
        time.sleep(0.3)
        process.terminate()
        check(f"{name}: stopped", finish(process)[0] == 128 + signal.SIGTERM)
        if options:
            for old, new in zip(("base.bin", "data.bin", " eval 1.bin"), moved[1::2]):
                shutil.copy(f"{odd}/{old}", new)
            os.rename(odd, odd + "gone")
            changed = evaluation(runs, "changed.bin", "changed")
            status, said, err = runs.run(out, "--resume", *options[:4], "--eval", changed)
            check(f"{name}: another set", status == 1 and one_line(err, "changed.bin has changed"), err)
            status, said, err = runs.run(out, "--resume", *options, "--eval", runs.eval)
            check(f"{name}: an evaluation set more", status == 1 and one_line(err, ""), err)
        status, said, err = runs.run(out, "--resume", *options, cwd="/")
        check(f"{name}: goes on from another folder", status == 0, err)
        found = runs.result(out) if status == 0 else {}
        same = {**expected, "ticket.bin": None} == {**found, "ticket.bin": None}    # which has names of files
        one, two = (same and rigsa_file.read_file(runs.path(f"{folder}/ticket.bin"), "tick")["values"]
                    for folder in (out, "staying"))
        check(f"{name}: to the same end", same and one == two, said)
        if options:
            os.rename(odd + "gone", odd)


def test_baselines(runs, long):
    """The methods of dev/baselines.c, one of each form, are killed and go on as the trainer's are."""
    subprocess.run(["make", "-s", "train_baselines"], cwd=ROOT, check=True)
    runs.program = os.path.join(ROOT, "train_baselines")
    forms = [("full", []), ("lora", ["--rank", "3"]), ("random", []), ("ltsft", []),
             ("rosa", ["--rank", "3", "--mask-after", "8"])]
    others = [("lora", ["--rank", "3", "--base-type", "nf4"]), ("random", ["--init", "gated"]), ("dense", [])]
    for method, more in forms + others * long:
        name = "_".join([method, *more[-1:]])
        usual = runs.usual("--method", method, *more)
        expected = undisturbed(runs, name, usual)
        disturb(runs, f"{name}-killed", usual, expected, signal.SIGKILL, 20 if long else 3, 0.8, (1, 2))
    usual = runs.usual("--method", "rosa", "--rank", "3", "--mask-after", "150", "--batch", "1")
    expected = undisturbed(runs, "warm", usual)
    process, warm = runs.start("warm-killed", *usual, "--save-every", "0.001"), 0
    while process.poll() is None and not warm:                      # updates of A and B alone
        if os.path.exists(runs.path("warm-killed/settings.txt")):
            state = rigsa_file.read_file(runs.path("warm-killed/state.bin"), "stat")
            warm, = struct.unpack("<Q", state["warm"])
    process.kill()
    finish(process)
    status, said, err = runs.run("warm-killed", "--resume")
    same = status == 0 and runs.result("warm-killed") == expected
    check("rosa, killed before its mask", same and 0 < warm < 150, f"{warm} {err}")
    status, said, err = runs.run("rosa_8-killed0", "--resume", "--mask-after", "9")
    check("rosa: another --mask-after", status == 1 and one_line(err, "--mask-after is 9, "), err)
    status, said, err = runs.run("ltsft-killed0", "--resume")
    check("a hash at the end", re.search(r"\nltsft: \d+ values, hash [0-9a-f]{16}\n$", said), said)


def test_not_finite(runs, long):
    """Steps far too large: named, before the update, and the state stays."""
    status, said, err = runs.run("wild", *runs.usual("--lr", "10", "--weight-decay", "0", "--alpha-lr", "10", "--sigma", "1e6",
                                              "--warmup", "0", "--save-every", "0.0001"))
    named = re.search(r"^train_rigsa: 1, update \d+: the (gradient|loss) is not finite", err)
    check("named", status == 1 and named, err)
    check("with a cause", "smaller --lr" in err and err.count("\n") == 1, err)
    check("the state is good and leads to the same end", runs.run("wild", "--resume")[2] == err)


def test_small_stack(runs, long):
    """Threads whose stacks are small, as libc makes them where `ulimit -s` is small, or unlimited."""
    for size in (1 << 20, resource.RLIM_INFINITY):
        status, said, err = runs.run(f"stack{size}", *runs.usual(), threads=2, limits={resource.RLIMIT_STACK: size})
        check(f"a stack of {size} bytes", status == 0, f"{status} {err}")


def test_memory(runs, long):
    """A limit just below the plan is refused with numbers, one that has room for the plan and the program itself is not."""
    usual = runs.usual("--rounds", "0", "--ticket-examples", "200", "--batch", "200")
    status, said, err = runs.run("plan", *usual)
    planned = float(re.search(r"together ([\d.]+) MB", said)[1])
    status, said, err = runs.run("small", *usual, limits={resource.RLIMIT_AS: int(planned * 1e6) - 100000})
    found = re.search(r"([\d.]+) MB are needed, ([\d.]+) are there .*; --micro (\d+) needs ([\d.]+)", err)
    check("refused", status == 1 and err.count("\n") == 1 and found, err)
    check("with the numbers", found and float(found[1]) == planned > float(found[2]) > float(found[4]), err)
    status, said, err = runs.run("micro", *usual, "--micro", found[3] if found else "1",
                                 limits={resource.RLIMIT_AS: int(planned * 1e6) + 30000000})
    check("what it advises fits", status == 0, err)
    process = runs.start("enough", *usual)
    _, status, used = os.wait4(process.pid, 0)
    used = used.ru_maxrss * 1024e-6
    check("no more memory than planned, and 16 MB", status == 0 and used < planned + 16, f"{used} MB, planned {planned}")
    print(f"    planned {planned} MB, used {used:.1f} MB")
    if long:
        memory_135m(runs)


def test_large_batch(runs, long):
    """Memory is planned for what a pass has, not for what a batch may have."""
    planned = {}
    for batch in "64", "2000", "1000000":
        usual = runs.usual("--batch", batch, "--examples", "64", "--ticket-examples", "48", "--rounds", "1")
        status, said, err = runs.run(f"batch{batch}", *usual)
        check(f"a batch of {batch}", status == 0, err)
        planned[batch] = re.findall(r"together (.*) MB|hash (.*)", said)
    check("the same memory and hash", planned["64"] == planned["2000"] == planned["1000000"], planned)


def memory_135m(runs):
    """One update in SmolLM2-135M's shape (of zeros, in bfloat16), just above and just below its plan."""
    config = dict(dim=576, ffn=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152, context=8192, tied=1, dtype=1,
                  theta=1e5, eps=1e-5)
    weights = 2 * sum(math.prod(shape) for _, shape in rigsa_file.tensor_shapes(config))
    rigsa_file.write_file(runs.path("135m.bin"), "base", [("config", rigsa_file.pack_config(config)), ("weights", bytes(weights))])
    examples = rigsa_file.data_sections(vocab=49152, examples=[([7] * 60, 59)], column="any", metric="exact")
    rigsa_file.write_file(runs.path("any.bin"), "data", examples)
    usual = runs.usual("--base", runs.path("135m.bin"), "--data", runs.path("any.bin"), "--eval", runs.path("any.bin"),
                       "--rounds", "0", "--ticket-examples", "1", "--batch", "1")
    status, said, err = runs.run("small135m", *usual, limits={resource.RLIMIT_AS: 1000000000})
    planned = float(re.search(r"together ([\d.]+) MB", said)[1])
    check("135M at 1 GB", status == 1 and f"{planned} MB are needed, 1000.0 are there" in err, err)
    status, said, err = runs.run("below", *usual, limits={resource.RLIMIT_AS: int(planned * 1e6) - 1000000})
    check("135M below", status == 1 and "are needed" in err and not os.path.exists(runs.path("below/state.bin")), err)
    room = weights + 100000000                                          # the mapped file, and the program with its stacks
    process = runs.start("above", *usual, limits={resource.RLIMIT_AS: int(planned * 1e6) + room})
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    check("135M above", status == 0, said + process.stderr.read())
    print(f"    135M: planned {planned} MB, used {used.ru_maxrss * 1024e-6:.1f} MB, the base's {weights * 1e-6:.1f} MB file with it")
    memory_cgroup(runs, usual, planned)


def new_cgroup(controller):
    """The path of a group of version 1 in ours, which is not made yet; of none where there is no such version."""
    own = re.search(rf":(?:\w+,)*{controller}(?:,\w+)*:(.*)", read("/proc/self/cgroup").decode())
    return f"/sys/fs/cgroup/{controller}{own[1].rstrip('/') if own else '/none'}/rigsa{os.getpid()}"


def memory_cgroup(runs, usual, planned):
    """The same under the limit of a cgroup, where we may make one: the kernel kills what takes more."""
    try:
        group = new_cgroup("memory")
        os.mkdir(group)
    except OSError as error:
        print(f"    no cgroup was tried: {error}")
        return
    try:
        for more, refused in ((-1, 1), (16, 0)):
            limit = int((planned + more) * 1e6) // 4096 * 4096
            write(f"{group}/memory.limit_in_bytes", str(limit))
            status, said, err = runs.run(f"group{refused}", *usual, group=group)
            with open(f"{group}/memory.max_usage_in_bytes") as file:
                used = int(file.read()) * 1e-6
            print(f"    135M in a cgroup of {limit * 1e-6:.1f} MB: exit status {status}, used up to {used:.1f} MB, files' pages with it")
            check("135M in a cgroup", status == refused, said + err)
            check("135M in a cgroup: numbers", not refused or f"{planned} MB are needed, {limit * 1e-6:.1f} are there" in err, err)
    finally:
        os.rmdir(group)


def test_quota(runs, long):
    """No more threads than a cgroup's quota leaves processors: of version 2 in files of ours, of version 1 a real one."""
    processors = len(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}

    def threads(what, expected, command):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            print(f"    {what} was not tried: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
            return
        check(f"threads: {what}", f" on {expected} threads" in done.stdout, done.stdout)

    train = shlex.join([runs.program, "--out", runs.path("out"), "--overwrite", *runs.usual()])
    for text, expected in (("max 100000", processors), ("50000 100000", 1), ("100000 100000", 1),
                           ("110000 100000", min(2, processors)), ("100000 200000", 1)):
        threads(f"cpu.max {text}", expected,
                ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /sys/fs/cgroup && "
                 f"echo {text} > /sys/fs/cgroup/cpu.max && exec {train}"])
    group = shlex.quote(new_cgroup("cpu"))
    for quota, expected in ((-1, processors), (50000, 1), (100000, 1)):
        threads(f"a quota of {quota} us in 100000", expected,
                ["sh", "-c", f"mkdir -p {group} && echo {quota} > {group}/cpu.cfs_quota_us && "
                 f"echo 0 > {group}/cgroup.procs && exec {train}"])
    if os.path.isdir(group):
        os.rmdir(group)


PROGRAMS = ["train_rigsa --help", "test_rigsa --help", "train_baselines --help", "dump_baselines --help",
            "dev/bench_kernels no", "dev/bench_step --no"]


def test_start(runs, long):
    """Every program that is built hardly spins, whatever name it is called by, and takes its options once."""
    for program, option in (line.split() for line in PROGRAMS):
        path = os.path.join(ROOT, program)
        if not os.path.exists(path) or b"GOMP_parallel" not in read(path):
            print(f"    {program}: not tried, it is not built with gcc's OpenMP")
            continue
        usual = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
        shown = usual | {"OMP_DISPLAY_ENV": "verbose"}
        said = subprocess.run([path, option], env=shown, capture_output=True, text=True)
        spins = re.findall("GOMP_SPINCOUNT = '(.*)'", said.stderr)
        check(f"{program} hardly spins", spins and spins[-1] == "1000", spins)
    unset = {"env": usual, "capture_output": True, "text": True, "cwd": ROOT}
    said = subprocess.run(["bash", "-c", f"exec -a ls {PROGRAM} --help"], **unset).stdout
    check("under another name", "RIGSA" in said, said[:80])
    wrapper = runs.path("wrapper")
    write(wrapper, f'#!/bin/bash\nexec -a "$0" {PROGRAM} --seed 7 "$@"\n')
    os.chmod(wrapper, 0o755)
    said = subprocess.run([wrapper, *runs.usual("--rounds", "0"), "--out", runs.path("wrapped")], **unset)
    check("a wrapper that keeps its name", said.returncode == 0, said.stderr)


def test_closed(runs, long):
    """Nothing that is printed gets into a file that would have had the descriptor of a closed stream."""
    usual = f"{EVALUATE} --base {NANO}/base.bin --eval {runs.eval} --overwrite --details"
    for number, closed in enumerate((">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-")):
        details = runs.path(f"{number}.jsonl")
        status = subprocess.run(["bash", "-c", f"{usual} {details} {closed}"], cwd=ROOT, capture_output=True)
        lines = read(details).decode().splitlines()
        good = status.returncode == 0 and len(lines) == 64 and all(line.startswith("{") for line in lines)
        check(f"{closed}: details", good, (status, lines[:1]))


def test_output(runs, long):
    """Standard output that cannot be written gives one line and status 1, after all files are there."""
    details = runs.path("details.jsonl")
    for command in ([PROGRAM, "--help"], [EVALUATE, "--eval", runs.eval, "--details", details],
                    [PROGRAM, *runs.usual(), "--out", runs.path("unheard")]):
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
        good = ended.returncode == 1 and one_line(ended.stderr, "standard output")
        check(f"standard output is full: {command[1]}", good, ended)
    check("its details", read(details).count(b"\n") == 64)
    check("its ticket", runs.result("unheard") == undisturbed(runs, "heard", runs.usual()))


def test_make(runs, long):
    """The Makefile asks the compiler for each flag, and says what is missing only when something is built."""
    def make(compiler, *words):
        done = subprocess.run(["make", f"CC={compiler}", *words], cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    status, said, err = make("no-such-compiler", "-B", "train_rigsa")
    check("no compiler", status and "no compiler `no-such" in err and "OpenMP" not in err, said + err)
    status, said, err = make("no-such-compiler", "-n", "clean")
    check("make clean is silent", status == 0 and err == "", err)
    simple, stuck = runs.path("simple"), runs.path("stuck")
    write(simple, '#!/bin/sh\ncase "$*" in *-fopenmp\\ *|*=native*) exit 1; esac\nexec cc "$@"\n')
    write(stuck, '#!/bin/sh\nexec cc -Wl,--dynamic-linker=/nowhere "$@"\n')
    for compiler in simple, stuck:
        os.chmod(compiler, 0o755)
        status, said, err = make(compiler, "-n", "-B", "train_rigsa")
        good = status == 0 and "-fopenmp-simd" in said and "-fopenmp " not in said and "ONE core" in said
        check("without OpenMP that does not start", good, said + err)
        check("and flags that it does not take", ("=native" in said) == (compiler == stuck), said)


def test_soak(runs, long):
    """An hour of real MNIST at side 14: memory stays flat, and the line at the terminal's bottom says what loss.csv says."""
    train, test = (os.path.join(ROOT, f"data/mnist_14_{part}.bin") for part in ("train", "test"))
    if not long:
        return
    if not os.path.exists("/proc/self/statm"):
        print("    not tried: this system has no /proc")
        return
    if not os.path.exists(train):
        print("    not tried: python3 prepro_mnist.py --side 14 makes its data")
        return
    terminal, theirs = pty.openpty()
    process = subprocess.Popen([PROGRAM, "--data", train, "--eval", test, "--out", runs.path("soak"), "--save-every", "60",
                                "--ticket-examples", "960000"], stdout=theirs, env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.close(theirs)
    said, resident, began = b"", [], time.time()
    while time.time() < began + 3600 and process.poll() is None:
        if select.select([terminal], [], [], 1)[0]:
            said += os.read(terminal, 65536)
        if time.time() > began + 10 * (len(resident) + 1):
            with open(f"/proc/{process.pid}/statm") as file:
                resident.append(int(file.read().split()[1]) * resource.getpagesize() * 1e-6)
    process.terminate()
    check("soak: stops when asked", process.wait() == 128 + signal.SIGTERM, said.decode()[-2000:])
    steady = resident[6:]
    print(f"    {len(resident)} samples, one in 10 s; after a minute {min(steady):.1f} to {max(steady):.1f} MB")
    check("soak: memory is flat", max(steady) - steady[0] < 1, resident)
    losses = {}
    with open(runs.path("soak/loss.csv")) as file:
        for row in csv.DictReader(file):
            losses.setdefault(row["pass"], []).append(float(row["loss"]))
    lines = re.findall(r"  (\S+) +(\d+) %   loss ([\d.]+)   \d+ tokens/s", said.decode())
    wrong = [line for line in lines if not agrees(losses[line[0]], 60000 if line[0] == "ticket" else 800, *map(float, line[1:]))]
    check("soak: the line agrees with loss.csv", len(lines) > 100 and not wrong, wrong[:5])
    print(f"    {len(lines)} lines of progress, {sum(map(len, losses.values()))} updates, {len(wrong)} disagree")


def agrees(losses, updates, percent, shown):
    """Whether the running mean of the losses is `shown` at an update that is `percent` of a pass of so many `updates`."""
    mean = losses[0]
    for t, loss in enumerate(losses, 1):
        mean = 0.95 * mean + 0.05 * loss
        if abs(100 * t / updates - percent) <= 0.5 and abs(mean - shown) < 6e-5:
            return True
    return False


TESTS = (test_killed, test_terminated, test_default, test_second_signal, test_disk_full, test_lock,
         test_other_settings, test_names, test_changed_data, test_moved_inputs, test_baselines,
         test_command_lines, test_not_finite, test_small_stack, test_memory, test_quota, test_start, test_large_batch,
         test_ignored_signal, test_closed, test_output, test_make, test_soak)


def run_tests(tests, fixture, description, long):
    """
    What main does, here and in test_mpi.py: every test gets a `fixture` in a folder of its own, and whether
    --long, whose help is `long`, was given.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored, and so in the runs
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help=long)
    parser.add_argument("--only", default="", help="a word of the test's name")
    args = parser.parse_args()
    random.seed(time.time_ns())
    for test in tests:
        if args.only in test.__name__:
            before = dict(count)
            with tempfile.TemporaryDirectory() as folder:
                began = time.time()
                test(fixture(folder), args.long)
            print(f"{test.__name__[5:]:16} {count[True] - before[True]} passed, {count[False] - before[False]} failed, "
                  f"{time.time() - began:.0f} s", flush=True)
    print(f"{count[True]} passed, {count[False]} failed")
    sys.exit(count[False] > 0)


if __name__ == "__main__":
    run_tests(TESTS, Runs, __doc__, "as many repetitions as doc/reliability.md speaks of")

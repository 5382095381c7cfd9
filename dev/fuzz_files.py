"""
Do rigsa_file.py and the C readers agree? Over random structures, what Python writes C must accept, and of
files with something wrong in them what one refuses the other must refuse.

    cc -O1 -DVERDICTS -Wno-unknown-pragmas dev/fuzz.c -o verdicts -lm
    python dev/fuzz_files.py ./verdicts         12,000 structures from seed 1, and as many spoilt ones

What cannot be written must be refused with a ValueError, what cannot be read with one line that names the
file. The last line is `N passed, N failed`.
"""

import argparse
import math
import os
import random
import struct
import subprocess
import sys
import tempfile
from array import array

import rigsa_file
from rigsa_file import (
    CONFIG_FIELDS,
    PARTS,
    base_sections,
    data_sections,
    read_base,
    read_examples,
    write_file,
)

LETTERS = "abcxyz0189_-. /|'{}%ёжЯ漢😀"  # what names are made of
FORBIDDEN = ',"\\\n\t\0\x7f'
ODD = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    10,
    127,
    255,
    256,
    65535,
    65536,
    1 << 20,
    (1 << 20) + 1,
    0x7F800000,
    0x7FC00000,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
]
WRONG = [
    -1,
    0,
    1,
    10,
    127,
    256,
    1 << 20,
    (1 << 20) + 1,
    (1 << 32) - 1,
    1 << 32,
    1 << 40,
    0.5,
    1e-50,
    math.nan,
    math.inf,
]
FAMILIAR = [
    "vocab",
    "length",
    "answer",
    "tokens",
    "glyphs",
    "column",
    "metric",
    "choices",
    "gold",
    "chars",
    "limit",
    "number",
    "end",
    "stop",
    "pieces",
    "config",
    "name",
    "weights",
    "unheard of",
]


def text(rng, most):
    """Up to `most` letters, seldom with one that no name may have."""
    letters = rng.choices(LETTERS, k=rng.choice([0, 1, 5, 15, 16, 62, 63, 64, 127, 128]) % (most + 1))
    if rng.random() < 0.1:
        letters.insert(rng.randint(0, len(letters)), rng.choice(FORBIDDEN))
    return "".join(letters)


def numbers(rng, most, count):
    """`count` numbers from 0 to `most`."""
    return [rng.randint(0, most) for _ in range(count)]


def examples_of(rng, vocab, count):
    """`count` examples of 2 to 9 tokens."""
    lengths = [rng.randint(2, 9) for _ in range(count)]
    return [(numbers(rng, vocab - 1, length), rng.randint(1, length - 1)) for length in lengths]


def random_data(rng):
    """Arguments of data_sections that mostly make sense."""
    vocab = rng.choice([2, 8, 48, 255, 256, 257, 300, 65536, 65537])
    choices = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
    metric = rng.choice([None, *PARTS]) if vocab <= 300 else rng.choice([None, "exact"])
    count = sum(choices) if metric in ("acc", "acc_norm") else rng.randint(1, 6)
    found = {"vocab": vocab, "examples": examples_of(rng, vocab, count)}
    if rng.random() < 0.5:
        found["glyphs"] = {
            token: chr(rng.choice([10, 32, 48, 126])) for token in numbers(rng, vocab - 1, rng.randint(0, 4))
        }
    if metric:
        found |= {"column": text(rng, 140), "metric": metric}
    parts = {
        "choices": choices,
        "gold": [rng.randrange(most) for most in choices],
        "chars": [rng.randint(1, 9) for _ in range(count)],
        "limit": rng.choice([1, 9, 1 << 20]),
        "number": [rng.choice([0.0, -7.5, 1e300]) for _ in range(count)],
        "end": numbers(rng, vocab - 1, rng.randint(0, 3)),
        "stop": [rng.randbytes(rng.randint(0, 3)).replace(b"\0", b"") for _ in range(rng.randint(0, 3))],
        "pieces": [rng.randbytes(rng.randint(0, 4)) for _ in range(vocab if metric == "number" else 0)],
    }
    return found | {tag: parts[tag] for tag in PARTS.get(metric, ())}


def random_base(rng):
    """Arguments of base_sections that mostly make sense."""
    kv_heads = rng.randint(1, 2)
    config = dict(
        zip(
            CONFIG_FIELDS,
            (
                rng.randint(1, 5),
                rng.randint(1, 5),
                rng.randint(1, 2),
                kv_heads * rng.randint(1, 2),
                kv_heads,
                2 * rng.randint(1, 2),
                rng.randint(1, 9),
                rng.choice(ODD),
                rng.randint(0, 1),
                rng.randint(0, 1),
                1e4,
                2.0**-17,
            ),
        )
    )
    count = sum(math.prod(shape) for _, shape in rigsa_file.tensor_shapes(config))
    values = struct.pack(f"<{count}f", *(rng.gauss(0, 1) for _ in range(count)))
    if config["dtype"]:
        values = b"".join(values[at + 2 : at + 4] for at in range(0, len(values), 4))
    return {"config": config, "name": text(rng, 140), "weights": values}


def spoil_arguments(rng, part):
    """
    The arguments with something wrong in one place: another number, text or bytes, an item more or less.
    """
    if isinstance(part, dict) and part:
        key = rng.choice(list(part))
        return part | {key: spoil_arguments(rng, part[key])}
    if isinstance(part, tuple):
        at = rng.randrange(len(part))
        return part[:at] + (spoil_arguments(rng, part[at]),) + part[at + 1 :]
    if isinstance(part, list) and part:
        at = rng.randrange(len(part))
        return part[:at] + rng.choice([[], [part[at]] * 2, [spoil_arguments(rng, part[at])]]) + part[at + 1 :]
    if isinstance(part, str):
        return rng.choice([text(rng, 140), rng.choice(LETTERS + FORBIDDEN), rng.choice(list(PARTS))])
    if isinstance(part, bytes):
        at = rng.randint(0, len(part))
        return part[:at] + rng.choice([b"", b"\0", b"\xff\x7f", part[at : at + 4] + part[at:]])
    return rng.choice(WRONG)


def spoil_sections(rng, sections):
    """
    The sections with something wrong in one of them, or with nothing wrong: in another order, with an unknown
    one.
    """
    sections = [
        (tag, payload if isinstance(payload, bytes) else b"".join(payload)) for tag, payload in sections
    ]
    at = rng.randrange(len(sections))
    tag, payload = sections[at]
    what, other = rng.randrange(10), rng.choice(FAMILIAR)
    if what == 0:
        del sections[at]
    elif what == 1 and other not in dict(sections):
        sections[at] = other, payload
    elif what == 2 and other not in dict(sections):
        sections.insert(at, (other, rng.randbytes(rng.choice([0, 1, 4, 8, 12]))))
    elif what == 3:
        sections[at] = tag, payload[: rng.randint(0, len(payload))]
    elif what == 4:
        sections[at] = tag, payload + rng.randbytes(rng.choice([1, 4, 8, 16]))
    elif what == 5:
        sections[at] = tag, sections[rng.randrange(len(sections))][1]
    elif what == 6:
        rng.shuffle(sections)
    elif what == 7:
        names = [tag for tag, _ in sections if tag in ("name", "column", "metric")] or [tag]
        name = rng.choice(names)
        sections = [(tag, text(rng, 140).encode() if tag == name else payload) for tag, payload in sections]
    elif len(payload) >= 4:
        place = rng.randrange(len(payload) // 4) * 4
        number = struct.pack("<I", rng.choice(ODD)) if what == 8 else rng.randbytes(4)
        sections[at] = tag, payload[:place] + number + payload[place + 4 :]
    return sections


def spoil_file(rng, content):
    """The file cut, longer, or with another number in its header."""
    what = rng.randrange(4)
    if what == 0:
        return content[: rng.randrange(len(content))]
    if what == 1:
        return content + bytes(rng.choice([1, 8, 32]))
    if what == 2:
        at = rng.randrange(rigsa_file.FILE_HEADER.size)
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    tag = rigsa_file.FILE_HEADER.size  # the first section a second time
    head = rigsa_file.SECTION_HEADER.unpack_from(content, tag)
    twice = content[tag : tag + rigsa_file.SECTION_HEADER.size + rigsa_file.padded(head[1])]
    magic, version, kind, length, count = rigsa_file.FILE_HEADER.unpack_from(content)
    return (
        rigsa_file.FILE_HEADER.pack(magic, version, kind, length + len(twice), count + 1)
        + content[tag:]
        + twice
    )


KINDS = {"data": (random_data, data_sections, read_examples), "base": (random_base, base_sections, read_base)}


def plain(found):
    """What was read, in lists and numbers that can be compared; theta and eps as they are in fp32."""
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    return [plain(item) for item in found] if isinstance(found, (list, tuple, array)) else found


class Comparison:
    def __init__(self, program, folder, seed):
        self.path = os.path.join(folder, "file.bin")
        self.rng = random.Random(seed)
        self.asked, self.python, self.failures, self.counts = [], [], [], {}
        self.program = program

    def count(self, what):
        self.counts[what] = self.counts.get(what, 0) + 1

    def read(self, kind, content, what, args=None):
        """Keeps the file for C, and what Python says of it."""
        with open(self.path, "wb") as file:
            file.write(content)
        said = ""
        try:
            found = KINDS[kind][2](self.path)
        except ValueError as error:
            said = str(error)
            if not said.startswith(self.path) or "\n" in said:
                self.failures.append(f"{what}: not a line that names the file: {said!r}")
        else:
            if args and kind == "data" and plain(found) != plain(args):
                self.failures.append(f"{what}: {args} was read as {found}")
        self.asked.append(content)
        self.python.append((what, said))

    def make(self):
        """One structure, and what comes of it when something in it is wrong."""
        rng = self.rng
        kind = rng.choice(list(KINDS))
        make, pack, _ = KINDS[kind]
        for spoilt in False, True:
            args = spoil_arguments(rng, make(rng)) if spoilt else make(rng)
            try:
                write_file(self.path, kind, pack(**args))
            except ValueError:
                self.count(f"{kind}: not written")
                continue
            except Exception as error:
                self.failures.append(f"{kind}: {type(error).__name__}: {error} in {args}")
                continue
            self.count(f"{kind}: written")
            with open(self.path, "rb") as file:
                content = file.read()
            self.read(kind, content, f"{kind} as written", None if spoilt else args)
            self.read(kind, spoil_file(rng, content), f"{kind} with another header or length")
            sections = spoil_sections(rng, pack(**args))
            write_file(self.path, kind, sections)
            with open(self.path, "rb") as file:
                self.read(kind, file.read(), f"{kind} with other sections {[tag for tag, _ in sections]}")

    def compare(self):
        """What C says beside what Python says."""
        stream = b"".join(struct.pack("<Q", len(content)) + content for content in self.asked)
        done = subprocess.run([self.program], input=stream, capture_output=True)
        verdicts = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
        if done.returncode or len(verdicts) != len(self.asked):
            self.failures.append(
                f"{self.program}: status {done.returncode} after {len(verdicts)} of {len(self.asked)} files: "
                f"{done.stderr.decode('utf-8', 'replace')[:2000]}"
            )
        for (what, said), verdict in zip(self.python, verdicts):
            self.count(f"{what.split(' ')[0]}: {'refused' if verdict else 'accepted'} by C")
            if bool(said) != bool(verdict) or (what.endswith("as written") and said):
                self.failures.append(
                    f"{what}: Python {said or 'accepts it'!r}, C {verdict or 'accepts it'!r}"
                )
        checked = len(verdicts)
        self.asked, self.python = [], []
        return checked


def main():
    parser = argparse.ArgumentParser(description="rigsa_file.py beside the readers of train_rigsa.c.")
    parser.add_argument("program", help="dev/fuzz.c, compiled with -DVERDICTS")
    parser.add_argument(
        "--structures", type=int, default=12000, help="random structures to write (default 12000)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.fsync = lambda file: None  # these files need not outlive the machine
    checked = 0
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        comparison = Comparison(args.program, folder, args.seed)
        for number in range(args.structures):
            comparison.make()
            if number % 1000 == 999 or number == args.structures - 1:
                checked += comparison.compare()
                print(
                    f"{number + 1} of {args.structures} structures, {len(comparison.failures)} disagreements",
                    flush=True,
                )
    for what, number in sorted(comparison.counts.items()):
        print(f"{what}: {number}")
    for failure in comparison.failures[:20]:
        print(f"FAILED: {failure[:600]}")
    print(f"{checked} passed, {len(comparison.failures)} failed")
    sys.exit(bool(comparison.failures) or checked < args.structures)


if __name__ == "__main__":
    main()

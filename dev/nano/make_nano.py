#!/usr/bin/env python3
"""
Makes the data of the default run: textual digits, three skills that must survive them, and the nano base's own lessons.

    python3 dev/nano/make_nano.py [build folder]

Next to this script go the files that `./train_rigsa` reads when it is given no arguments, into the build folder
(default: dev/nano/build) those that only the making of the base and the choice of settings need; README.md lists
both. Every example begins with a newline and ends with one, the latter belonging to its answer. All randomness comes
from named streams, so that the training, test and held-out files never share one. Needs Python 3.10, nothing else.
"""
import argparse
import cmath
import hashlib
import itertools
import math
import os
import random
import sys
from array import array

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from rigsa_file import ALPHABET, base_sections, data_sections, tensor_shapes, write_file  # noqa: E402

TOKEN = {character: number for number, character in enumerate(ALPHABET)}
GLYPHS = dict(enumerate(ALPHABET))

DIGITS_TRAIN, DIGITS_TEST, DIGITS_HELDOUT = 24_000, 2_500, 2_500
QUESTIONS = 1_600  # per skill
PRETRAIN = {"addition": 112_000, "sizes": 72_000, "packing": 40_000, "shapes": 32_000}  # examples per family, used once


def stream(name):
    """A random generator of its own for each purpose."""
    return random.Random(f"rigsa nano 1 {name}")


def held_out(key):
    """True for one combination in eight: the base never learns from it, only questions about it are asked."""
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


# ----------------------------------------------------------------------------------------------------
# pictures: pen strokes, drawn on a fine grid of bits and reduced to 7 x 7 digits

# A character is a list of (how common, drawing). A drawing is strokes separated by '/'; a stroke is the points that the
# pen passes, each as two digits, x from 0 to 6 and y from 0 (top) to 9, along a smooth curve. A point written twice is
# a corner.
DIGITS = {
    "0": [(3, "30 11 05 18 39 58 64 51 30"), (2, "40 11 04 08 39 67 63 51 20"), (1, "10 04 17 39 57 64 50 21"),
          (1, "30 12 06 29 57 63 50 30")],
    "1": [(7, "30 39"), (1, "12 30 30 39"), (1, "12 30 30 39/19 59")],
    "2": [(3, "02 10 40 52 45 27 09 09 39 69"), (3, "02 20 50 53 36 18 08 17 37 58 69"), (2, "01 30 51 53 09 09 69"),
          (1, "02 20 51 54 28 09 07 37 69")],
    "3": [(3, "01 20 50 52 34 34 56 57 39 08"), (2, "00 30 51 43 24 24 45 57 49 19 07"),
          (1, "00 50 50 34 34 56 58 39 08"), (2, "01 20 40 52 33 14 44 66 58 39 18")],
    "4": [(3, "10 05 05 65/50 49"), (2, "40 05 05 65/40 49"), (4, "00 04 15 54/60 59"), (2, "20 04 25 51 51 49"),
          (1, "10 14 35 65/60 49")],
    "5": [(3, "10 04 04 34 56 58 39 08/10 60"), (3, "60 20 20 14 24 46 48 29 08"), (2, "60 20 12 34 46 48 19 07"),
          (2, "60 30 30 14 14 46 38 19 08")],
    "6": [(3, "50 22 05 08 39 57 55 35 07"), (3, "30 04 07 29 48 56 35 06"), (2, "40 12 06 29 48 56 36 17"),
          (2, "30 13 16 29 39 47 36 28")],
    "7": [(4, "00 60 60 39"), (2, "00 60 60 39/25 65"), (2, "02 00 00 60 60 43 29"), (2, "01 20 60 52 34 29"),
          (1, "12 10 10 60 60 45 49")],
    "8": [(3, "51 20 12 24 45 48 29 18 25 43 51 30"), (2, "30 12 34 52 30/34 16 39 56 34"),
          (3, "60 20 12 34 46 39 18 25 52 60"), (2, "61 40 22 25 38 29 17 35 61")],
    "9": [(3, "50 20 03 25 52 50 50 49"), (3, "52 30 02 14 34 52 51 51 59"), (2, "51 20 13 25 53 51 46 39 08"),
          (3, "52 30 12 24 44 52 48"), (2, "51 20 12 24 51 51 29")],
}
# The letters that no digit looks like, for the base; B, D, G, I, O, Q, S and Z are left out.
LETTERS = {
    "a": [(1, "09 30 30 69/15 55")],
    "c": [(1, "61 30 03 06 39 68"), (1, "51 20 14 28 58")],
    "e": [(1, "60 00 00 09 09 69/04 54"), (1, "05 55 52 30 03 07 39 68")],
    "f": [(1, "60 00 00 09/04 54")],
    "h": [(1, "00 09/60 69/04 64"), (1, "00 09/05 24 45 49")],
    "j": [(1, "50 56 39 18 06"), (1, "10 60/40 47 29 08")],
    "k": [(1, "00 09/60 05 05 69")],
    "l": [(1, "00 09 09 69")],
    "m": [(1, "09 10 10 36 36 50 50 69"), (1, "09 00 00 35 35 60 60 69")],
    "n": [(1, "09 00 00 69 69 60"), (1, "00 09/03 31 53 59")],
    "p": [(1, "09 00 00 40 62 43 04"), (1, "09 00 00 50 54 04")],
    "r": [(1, "09 00 00 40 62 43 04/24 69"), (1, "00 09/03 31 52")],
    "t": [(1, "00 60/30 39"), (1, "30 37 49 68/03 63")],
    "u": [(1, "00 06 39 66 60"), (1, "00 07 29 57 50 50 59")],
    "v": [(1, "00 39 39 60")],
    "w": [(1, "00 19 19 33 33 59 59 60")],
    "x": [(1, "00 69/60 09")],
    "y": [(1, "00 34 34 60/34 39"), (1, "00 34 34/60 09")],
}

CELL, SIDE = 8, 7            # a cell of the text grid is 8 x 8 bits, a picture 7 x 7 cells
FRAME = CELL * SIDE
STRIDE = 64                  # bits from one row of the fine grid to the next
BOX = FRAME * 20 / 28        # like MNIST's: the ink fits a box of 20/28 of the frame, its centre of mass in the middle
JITTER = 0.64                # standard deviation of each point of a stroke, in units of the drawing (height 9)
SLANT, SLANT_SPREAD = 0.18, 0.28
TURN_SPREAD, WIDTH_SPREAD = 0.12, 0.16  # rotation in radians, logarithm of width : height
PEN, PEN_SPREAD, THINNEST, THICKEST = 2.4, 0.6, 1.5, 6.0  # radius of the pen in bits, changing in steps of 1/4
SPACING = 4.5                # points on a curve per unit of the drawing
MIDDLE = 3 + 4.5j


def dot(quarters):
    """The ink of a pen of radius `quarters` / 4 bits: a grid of bits, its centre at row 8, column 8."""
    return sum(1 << (STRIDE * y + x) for y in range(17) for x in range(17)
               if 16 * ((x - 8) ** 2 + (y - 8) ** 2) <= quarters ** 2)


DOTS = {quarters: dot(quarters) for quarters in range(int(4 * THINNEST), int(4 * THICKEST) + 1)}
CELL_BITS = sum(((1 << CELL) - 1) << (STRIDE * y) for y in range(CELL))


def curve(points):
    """Complex points -> more of them, close together, on the Catmull-Rom spline that passes through the given ones."""
    path = []
    padded = [points[0], *points, points[-1]]
    for before, here, there, after in zip(padded, padded[1:], padded[2:], padded[3:]):
        if here == there:
            continue
        start, end = (there - before) / 2, (after - here) / 2  # velocities
        cubic, square = 2 * (here - there) + start + end, 3 * (there - here) - 2 * start - end
        steps = int(abs(there - here) * SPACING) + 1
        for t in (step / steps for step in range(steps)):
            path.append(((cubic * t + square) * t + start) * t + here)
    path.append(points[-1])
    return path


def handwriting(drawing, rng):
    """One writing of `drawing` as points on the pen's path: each trembles, then all are widened, slanted and turned."""
    slant = rng.gauss(SLANT, SLANT_SPREAD)
    width = math.exp(rng.gauss(0, WIDTH_SPREAD))
    turn = cmath.rect(1, rng.gauss(0, TURN_SPREAD))
    path = []
    for stroke in drawing.split("/"):
        points, last = [], None
        for point in stroke.split():
            if point != last:  # the second half of a corner is the same place again
                place = complex(int(point[0]), int(point[1])) - MIDDLE
                place += complex(rng.gauss(0, JITTER), rng.gauss(0, JITTER))
                place = turn * complex(width * place.real - slant * place.imag, place.imag)
            points.append(place)
            last = point
        path += curve(points)
    return path


def ink(path, quarters):
    """The path, fitted into the frame and drawn with a pen of radius `quarters` / 4: FRAME rows of STRIDE bits."""
    radius = quarters / 4
    across, down = [z.real for z in path], [z.imag for z in path]
    scale = (BOX - 2 * radius) / max(max(across) - min(across), max(down) - min(down))
    shift = complex(FRAME / 2, FRAME / 2) - scale * sum(path) / len(path)
    low, high = radius, FRAME - 1 - radius
    grid = 0
    for z in path:
        x, y = scale * z.real + shift.real, scale * z.imag + shift.imag
        x, y = min(max(x, low), high), min(max(y, low), high)
        grid |= DOTS[quarters] << (STRIDE * int(y) + int(x))
    return grid >> (STRIDE * 8 + 8)


def picture(variants, rng):
    """One of `variants` in one handwriting, as text: 7 rows of 7 digits, each digit the share of ink in its cell."""
    drawing = rng.choices([drawing for _, drawing in variants], [weight for weight, _ in variants])[0]
    radius = min(max(rng.gauss(PEN, PEN_SPREAD), THINNEST), THICKEST)
    grid = ink(handwriting(drawing, rng), int(4 * radius))
    rows = []
    for top in range(0, FRAME, CELL):
        shares = [(grid >> (STRIDE * top + left) & CELL_BITS).bit_count() / CELL ** 2 for left in range(0, FRAME, CELL)]
        rows.append("".join(str(min(9, int(10 * share))) for share in shares) + "\n")
    return "".join(rows)


def naming(characters, rng):
    """Endless questions (prompt, [answer], 0): a picture of one of `characters`, which one is it?"""
    names = sorted(characters)
    while True:
        name = rng.choice(names)
        yield picture(characters[name], rng) + "=", [name], 0


# ----------------------------------------------------------------------------------------------------
# the three skills: endless questions (prompt, [answers], index of the right one); `unseen`: held-out combinations only

THINGS = """
    flea ant seed bead pea fly bee bean wasp ring coin nut snail moth fig key
    plum egg frog lime mouse pear spoon fork apple cup mug glove sock rat shoe brick
    book melon clock hat kettle duck crow hen pillow vase cat lamp owl fox goose violin
    stool dog drum chair lynx goat sheep bench desk wolf pig harp door table seal bed
    sofa lion bear horse moose cow piano cart boat tent bike car van rhino truck bus
    whale yacht tram house barn mill ferry train church tower castle bridge hill village island moon
""".split()  # from the smallest to the biggest

PLACES = {
    "beach": "towel hat ball book kite spade cream shell",
    "cave": "rope map lamp boots helmet torch chalk jam",
    "lake": "boat rod net towel bait oars bread hat",
    "hill": "map boots kite flute coat apple camera stick",
    "school": "book pen ruler chalk apple flute glue bag",
    "office": "pen stamp laptop mug tie paper bag clock",
    "garden": "spade seeds hose boots net basket gloves stick",
    "market": "bag coins basket list bread eggs jam purse",
    "party": "cake hat ball candle flute tie card jam",
    "gym": "ball shorts towel bottle mat gloves rope scale",
    "kitchen": "eggs apron knife bread scale mug list cake",
    "studio": "paper brush apron glue camera lamp candle clay",
    "zoo": "camera map coins apple bag ticket card bottle",
    "station": "ticket coat bag book clock purse bread list",
    "snow": "sled coat gloves boots helmet rope torch stick",
    "moon": "helmet bottle map laptop boots cream camera mat",
}
PLACES = {place: items.split() for place, items in PLACES.items()}
ITEMS = sorted({item for items in PLACES.values() for item in items})
SUMS = 6, 1       # how common sums of two and of three digits are in training
SUM_QUESTIONS = 960, 160  # and among the questions: only 1,012 sums of two digits are held out
PACKERS = "ada ben eva ida leo max mia tom".split()
LIST = 4          # items on a packing list
STRAY = 0.1       # how often an item was packed for no reason


def addition(unseen, rng, sums=SUMS):
    """`37+58=59`: sums of two numbers of two or three digits, the sum written from its units upwards."""
    while True:
        digits = rng.choices((2, 3), sums)[0]
        a, b = (rng.randrange(10 ** (digits - 1), 10 ** digits) for _ in range(2))
        if held_out(f"{min(a, b)}+{max(a, b)}") == unseen:
            yield f"{a}+{b}=", [str(a + b)[::-1]], 0


def sizes(unseen, rng):
    """`which is bigger, hen or bus? bus`: the order of THINGS, known only from such comparisons."""
    while True:
        small, big = sorted(rng.sample(range(len(THINGS)), 2))
        if held_out(f"{small} {big}") == unseen:
            pair = [THINGS[small], THINGS[big]]
            size = rng.randrange(2)
            right = pair[size]
            rng.shuffle(pair)
            yield f"which is {('smaller', 'bigger')[size]}, {pair[0]} or {pair[1]}? ", pair, pair.index(right)


def packing(unseen, rng):
    """
    `mia packs map, lamp, cake, boots: off to the cave`: one of four places, the one that the list was made for and the
    three others that it fits best. Each item is one of the place's, or, with probability STRAY, anything.
    """
    while True:
        place = rng.choice(list(PLACES))
        items = []
        while len(items) < LIST:
            item = rng.choice(ITEMS if rng.random() < STRAY else PLACES[place])
            if item not in items:
                items.append(item)
        if held_out(" ".join(sorted(items))) == unseen:
            others = sorted((other for other in PLACES if other != place), key=lambda other: -likelihood(items, other))
            choices = [place, *others[:3]]
            rng.shuffle(choices)
            yield f"{rng.choice(PACKERS)} packs {', '.join(items)}: off to the ", choices, choices.index(place)


def likelihood(items, place):
    """The probability that a list made for `place` reads `items`, in this order."""
    product, left = 1.0, 1.0
    for item in items:
        chance = STRAY / len(ITEMS) + (1 - STRAY) * (item in PLACES[place]) / len(PLACES[place])
        product *= chance / left
        left -= chance
    return product


def best_guess(questions):
    """The share of packing questions that somebody who knows all of PLACES answers rightly: no model can do better."""
    right = 0
    for prompt, places, gold in questions:
        items = prompt[prompt.index("packs ") + 6:prompt.index(":")].split(", ")
        right += max(places, key=lambda place: likelihood(items, place)) == places[gold]
    return right / len(questions)


# ----------------------------------------------------------------------------------------------------
# files

def example(prompt, answer):
    """Text -> (tokens, index of the first answer token)."""
    return [TOKEN[character] for character in f"\n{prompt}{answer}\n"], 1 + len(prompt)


def take(questions, count):
    """The first `count` different ones of endless questions."""
    found = {}
    while len(found) < count:
        question = next(questions)
        found.setdefault(question[0], question)
    return list(found.values())


def save(path, questions, column=None, metric=None):
    """Writes questions as examples of their right answer; for the metric `acc`, of each of their choices."""
    extra = {}
    if metric == "acc":
        examples = [example(prompt, answer) for prompt, answers, _ in questions for answer in answers]
        extra = {"choices": [len(answers) for _, answers, _ in questions], "gold": [gold for _, _, gold in questions],
                 "chars": [len(answer) for _, answers, _ in questions for answer in answers]}
    else:
        examples = [example(prompt, answers[gold]) for prompt, answers, gold in questions]
    write_file(path, "data", data_sections(len(ALPHABET), examples, GLYPHS, column=column, metric=metric, **extra))
    print(f"{path}: {len(questions)} questions, {os.path.getsize(path):,} bytes")


NANO = {"dim": 96, "ffn": 224, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 24, "vocab": len(ALPHABET),
        "context": 256, "tied": 1, "dtype": 0, "theta": 1e4, "eps": 1e-5}


def save_random_base(path, rng, config=NANO):
    """Writes a base before its training: N(0, 1 / in) entries, `o` and `down` 0.4 of that, embeddings N(0, .05^2)."""
    weights = array("f")
    for name, shape in tensor_shapes(config):
        if len(shape) == 1:
            weights.extend([1.0] * shape[0])
        else:
            kind = name.split(".")[-1]
            spread = 0.05 if kind == "embed" else shape[1] ** -0.5 * (0.4 if kind in ("o", "down") else 1)
            weights.extend(rng.gauss(0, spread) for _ in range(shape[0] * shape[1]))
    if sys.byteorder == "big":
        weights.byteswap()
    write_file(path, "base", base_sections(config, "nano", weights.tobytes()))
    print(f"{path}: {len(weights):,} random weights")


def main():
    parser = argparse.ArgumentParser(description="Makes the data of the default run.")
    parser.add_argument("build", nargs="?", default=os.path.join(HERE, "build"), help="where the base's own files go")
    build = parser.parse_args().build
    os.makedirs(build, exist_ok=True)

    def digits(split, count):
        return take(naming(DIGITS, stream(f"digits {split}")), count)

    save(os.path.join(HERE, "digits_train.bin"), digits("train", DIGITS_TRAIN))
    save(os.path.join(HERE, "digits_test.bin"), digits("test", DIGITS_TEST), "digits", "exact")
    save(os.path.join(build, "digits_heldout.bin"), digits("heldout", DIGITS_HELDOUT), "digits_heldout",
         "exact")

    lists = take(packing(True, stream("packing")), QUESTIONS)
    short, long = (take(addition(True, stream("addition"), sums), count)
                   for sums, count in zip([(1, 0), (0, 1)], SUM_QUESTIONS))
    save(os.path.join(HERE, "addition.bin"), short + long, "addition", "exact")
    save(os.path.join(HERE, "sizes.bin"), take(sizes(True, stream("sizes")), QUESTIONS), "sizes", "acc")
    save(os.path.join(HERE, "packing.bin"), lists, "packing", "acc")
    print(f"packing: somebody who knows every place's items would answer {best_guess(lists):.3f} rightly")

    shapes = take(naming(LETTERS, stream("shapes heldout")), QUESTIONS)
    save(os.path.join(build, "shapes_heldout.bin"), shapes, "shapes", "exact")
    families = {"addition": addition(False, stream("addition of the base")),
                "sizes": sizes(False, stream("sizes of the base")),
                "packing": packing(False, stream("packing of the base")),
                "shapes": naming(LETTERS, stream("shapes of the base"))}
    save(os.path.join(build, "pretrain.bin"), [question for family, count in PRETRAIN.items()
                                               for question in itertools.islice(families[family], count)])
    save_random_base(os.path.join(build, "random_base.bin"), stream("base"))


if __name__ == "__main__":
    main()

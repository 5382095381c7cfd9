"""
Reads and writes the files of rigsa.c (layouts: doc/model.md, section 3) from Python.

A file is a header of 32 bytes, then sections: a tag, a length, a hash and a payload padded with zeros to a multiple of
8 bytes. Everything is little-endian, on every machine. The standard library is enough; numpy, when it is there, only
makes the hash faster.
"""
import math
import os
import struct
import sys
from array import array
from collections.abc import Iterator

try:
    import numpy
except ImportError:
    numpy = None

ALPHABET = "\n 0123456789abcdefghijklmnopqrstuvwxyz.,:>?#=+-/"  # the nano vocabulary: token id = position

MAGIC = b"rigsa.c\n"
VERSION = 1
FILE_HEADER = struct.Struct("<8sI4sQQ")
SECTION_HEADER = struct.Struct("<16sQQ")

CONFIG = struct.Struct("<10I2f")
WEIGHT_BYTES = {0: 4, 1: 2}  # dtype: fp32, bf16
CONFIG_FIELDS = ("dim", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "context", "tied", "dtype",
                 "theta", "eps")

TOKEN_TYPES = {1: "B", 2: "H", 4: "I"}  # bytes per token -> array typecode

MAKERS = {
    "base": "make it again, with dev/export_hf.py or the script that wrote it",
    "data": "make it again, with prepro_mnist.py or the script that wrote it",
    "tick": "train again with train_rigsa",
    "lora": "train again with train_baselines, or import it again with dev/peft_files.py",
    "stat": "start the run again",
    "dump": "run dev/dump_reference.py again",
}

# The rules that the C reader checks, too
NAME_BYTES = {"name": 63, "column": 127, "metric": 15}  # text sections: the most bytes of each
NOT_IN_NAMES = bytes([*range(32), 127]) + b',"\\'  # names stand in CSV and JSON without any quoting
PARTS = {"exact": (), "loss": (), "acc": ("choices", "gold", "chars"), "acc_norm": ("choices", "gold", "chars"),
         "number": ("limit", "number", "end", "stop", "pieces")}  # metric -> the sections that belong to it
MOST = 1 << 20  # of a model's sizes, and of the tokens to generate
U32 = (1 << 32) - 1

U64 = (1 << 64) - 1
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
HASH_BLOCK = 1 << 20  # bytes hashed at a time, a multiple of 8: the temporaries stay in the cache


# ----------------------------------------------------------------------------------------------------
# the hash

def mix(z):
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of the 64-bit integers."""
    z = (z ^ (z >> 30)) * MIX_1 & U64
    z = (z ^ (z >> 27)) * MIX_2 & U64
    return z ^ (z >> 31)


def sum_words_python(block, first):
    """The sum of mix(word i + (first + i + 1) * GOLDEN) over the 64-bit words of `block`, a whole number of words."""
    words = struct.unpack(f"<{len(block) // 8}Q", block)
    return sum(mix((word + (first + i) * GOLDEN) & U64) for i, word in enumerate(words, 1))


def mix_numpy(z):
    """mix of each element of `z`, an array of uint64, in place; returns it."""
    z ^= z >> numpy.uint64(30)
    z *= numpy.uint64(MIX_1)
    z ^= z >> numpy.uint64(27)
    z *= numpy.uint64(MIX_2)
    z ^= z >> numpy.uint64(31)
    return z


def sum_words_numpy(block, first):
    """What sum_words_python returns, modulo 2^64, with numpy."""
    z = numpy.frombuffer(block, dtype="<u8").astype(numpy.uint64)
    z += (numpy.arange(1, z.size + 1, dtype=numpy.uint64) + numpy.uint64(first)) * numpy.uint64(GOLDEN)
    return int(mix_numpy(z).sum(dtype=numpy.uint64))


class Hash:
    """The hash of doc/model.md, section 3, of bytes that come in pieces; `length` is how many they are so far."""

    def __init__(self, sum_words=sum_words_numpy if numpy else sum_words_python):
        self.sum_words, self.length, self.total, self.rest = sum_words, 0, 0, b""

    def update(self, piece):
        """Adds any bytes-like object. Up to 7 bytes that fill no word wait in `rest` for the next piece."""
        data, first = memoryview(piece).cast("B"), self.length // 8
        self.length += len(data)
        if self.rest:
            data = memoryview(self.rest + data)
        whole = len(data) // 8 * 8
        for start in range(0, whole, HASH_BLOCK):
            self.total += self.sum_words(data[start:min(start + HASH_BLOCK, whole)], first + start // 8)
        self.rest = bytes(data[whole:])

    def value(self):
        """The hash of all pieces, as an integer."""
        last = self.sum_words(self.rest + bytes(-self.length % 8), self.length // 8) if self.rest else 0
        return (mix(self.length) + self.total + last) & U64


def hash64(payload):
    """The hash of any bytes-like object, as an integer."""
    found = Hash()
    found.update(payload)
    return found.value()


# ----------------------------------------------------------------------------------------------------
# files

def write_file(path, kind, sections):
    """
    Writes `sections`, a list of (tag, payload), as a file of `kind`; a reader sees all of it or what was there. A
    payload is bytes, or an iterator over pieces of them. Returns the hashes: a dict, tag -> integer.
    """
    tags = [tag.encode("ascii") for tag, _ in sections]
    if len(set(tags)) < len(tags) or not all(1 <= len(tag) <= 16 and b"\0" not in tag for tag in tags):
        raise ValueError(f"{path}: sections are told apart by tags of 1 to 16 letters, not by {tags}")
    temporary, hashes = f"{path}.{os.getpid()}.tmp", {}
    try:
        with open(temporary, "wb") as file:
            file.seek(FILE_HEADER.size)
            for tag, payload in sections:
                start, found = file.tell(), Hash()
                file.seek(SECTION_HEADER.size, os.SEEK_CUR)
                for piece in payload if isinstance(payload, Iterator) else [payload]:
                    found.update(piece)
                    file.write(piece)
                file.write(bytes(-found.length % 8))
                hashes[tag] = found.value()
                rewrite(file, start, SECTION_HEADER.pack(tag.encode(), found.length, hashes[tag]))
            rewrite(file, 0, FILE_HEADER.pack(MAGIC, VERSION, kind.encode(), file.tell(), len(sections)))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    return hashes


def rewrite(file, start, data):
    """Puts `data` at `start`, and goes back to the end."""
    file.seek(start)
    file.write(data)
    file.seek(0, os.SEEK_END)


def read_file(path, *kinds):
    """
    The sections of the file at `path`, of one of these kinds: a dict, tag -> bytes. What is checked before it is
    trusted: magic, version, kind, the file's length, each section's place and hash. ValueError, in one line: which
    file, what is wrong, what to do.
    """
    def check(good, wrong):
        if not good:
            raise ValueError(f"{path}: {wrong}; {MAKERS[kinds[0]]}")

    check(os.path.isfile(path) or not os.path.exists(path), "not a file")  # a pipe would make us wait
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {MAKERS[kinds[0]]}") from None
    with file:
        size = os.fstat(file.fileno()).st_size
        check(size >= FILE_HEADER.size, f"only {size} bytes, not a rigsa.c file")
        magic, version, found, length, count = FILE_HEADER.unpack(file.read(FILE_HEADER.size))
        check(magic == MAGIC, "not a rigsa.c file")
        check(version == VERSION, f"version {version}, this program reads version {VERSION}")
        found = found.decode("ascii", "replace")
        check(found in kinds, f"a file of kind '{found}' where '{' or '.join(kinds)}' is needed")
        check(length == size, f"{size} bytes long where its header says {length}")
        sections, left = {}, size - FILE_HEADER.size
        for number in range(count):
            check(left >= SECTION_HEADER.size, f"ends before section {number + 1} of {count}")
            tag, n, expected = SECTION_HEADER.unpack(file.read(SECTION_HEADER.size))
            tag = tag.partition(b"\0")[0].decode("latin-1")
            left -= SECTION_HEADER.size + padded(n)
            check(left >= 0, f"section '{tag}' is longer than the file")
            data = file.read(n)
            file.seek(padded(n) - n, os.SEEK_CUR)
            check(hash64(data) == expected, f"section '{tag}' is damaged, its hash does not match")
            check(tag not in sections, f"has section '{tag}' twice")
            sections[tag] = data
        check(left == 0, f"{left} bytes after the last section")
    return sections


def needed(sections, tag):
    """The payload of section `tag`; ValueError where there is none."""
    require(tag in sections, f"has no section '{tag}'")
    return sections[tag]


def padded(n):
    """`n` rounded up to a multiple of 8."""
    return n + -n % 8


def require(good, wrong):
    """ValueError that says what is wrong, unless all is good."""
    if not good:
        raise ValueError(wrong)


# ----------------------------------------------------------------------------------------------------
# names

def read_name(sections, tag):
    """The text of section `tag`, empty where there is none; ValueError where it is not what a name may be."""
    payload = sections.get(tag, b"")
    require(len(payload) <= NAME_BYTES[tag] and not any(byte in NOT_IN_NAMES for byte in payload),
            f"section '{tag}' is not a name, up to {NAME_BYTES[tag]} bytes without comma, quote, backslash and control "
            f"characters: {payload.decode('utf-8', 'replace')!r}")
    return payload.decode("utf-8", "surrogateescape")


def label(text, most=NAME_BYTES["name"]):
    """
    Any text as the payload of a section `name`: what names cannot hold becomes `_`, and what is longer than `most` bytes
    is cut between characters. For what is only shown; two labels may be the same.
    """
    allowed = "".join("_" if ord(char) < 128 and ord(char) in NOT_IN_NAMES else char for char in text)
    return allowed.encode("utf-8", "replace")[:most].decode("utf-8", "ignore").encode()


# ----------------------------------------------------------------------------------------------------
# models

def pack_config(config):
    """The payload of `config` from a dict with the keys CONFIG_FIELDS; ValueError where no model can be so."""
    try:
        payload = CONFIG.pack(*(config[field] for field in CONFIG_FIELDS))
    except (OverflowError, struct.error) as error:
        raise ValueError(f"section 'config': {error}") from None
    unpack_config(payload)
    return payload


def unpack_config(payload):
    """The dict that pack_config was given; theta and eps as rounded to fp32. ValueError where no model can be so."""
    require(len(payload) == CONFIG.size, f"section 'config' has {len(payload)} bytes where {CONFIG.size} are needed")
    config = dict(zip(CONFIG_FIELDS, CONFIG.unpack(payload)))

    def check(good, *fields):
        require(good, "section 'config': no model has " + ", ".join(f"{field} {config[field]}" for field in fields))

    for field in ("dim", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab"):
        check(1 <= config[field] <= MOST, field)
    check(config["heads"] % config["kv_heads"] == 0, "heads", "kv_heads")
    check(config["head_dim"] % 2 == 0, "head_dim")
    check(config["tied"] <= 1 and config["dtype"] <= 1, "tied", "dtype")
    check(0 < config["theta"] < math.inf and 0 < config["eps"] < 1, "theta", "eps")
    check(config["dim"] * max(config["ffn"], config["heads"] * config["head_dim"]) <= U32, "dim", "ffn", "heads", "head_dim")
    return config


def base_sections(config, name, weights):
    """
    The sections of a `base` file. `config`: a dict as of pack_config; `name`: what to call the model, any text; `weights`: the
    tensors end to end as config["dtype"] says, bytes or an iterator over pieces of them.
    """
    def checked(pieces):
        size = 0
        for piece in pieces:
            check_finite(piece, config["dtype"])
            size += memoryview(piece).nbytes
            yield piece
        require(size == weights_size(config), f"{size} bytes of weights where {weights_size(config)} are needed")

    pieces = weights if isinstance(weights, Iterator) else [weights]
    return [("config", pack_config(config)), ("name", label(name)), ("weights", checked(pieces))]


def read_base(path):
    """The base file at `path`: its config (a dict), its name, and its weights in bytes. ValueError, in one line."""
    sections = read_file(path, "base")
    try:
        config, name = unpack_config(needed(sections, "config")), read_name(sections, "name")
        weights = needed(sections, "weights")
        require(len(weights) == weights_size(config),
                f"section 'weights' has {len(weights)} bytes where {weights_size(config)} are needed")
        check_finite(weights, config["dtype"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {MAKERS['base']}") from None
    return config, name, weights


def weights_size(config):
    """Bytes of all weights, also of a damaged file's million layers."""
    none, one = (sum(math.prod(shape) for _, shape in tensor_shapes(config | {"layers": layers})) for layers in (0, 1))
    return WEIGHT_BYTES[config["dtype"]] * (none + config["layers"] * (one - none))


def check_finite(weights, dtype):
    """ValueError where a weight is NaN or infinite: the exponent in its upper half, a bf16, is all ones."""
    halves, first, step = memoryview(weights).cast("B"), 1 - dtype, 2 - dtype
    for start in range(0, len(halves), HASH_BLOCK):
        block = halves[start:start + HASH_BLOCK]
        if numpy:
            wrong = ((numpy.frombuffer(block, "<u2")[first::step] & 0x7f80) == 0x7f80).any()
        else:
            wrong = any(half & 0x7f80 == 0x7f80 for half in unpack(block, "H", "weights")[first::step])
        require(not wrong, "section 'weights' has a number that is not finite")


def tensor_shapes(config):
    """The tensors of `weights` in file order (doc/model.md, section 2): (name, shape) each; (out, in) or (size,)."""
    dim, ffn, vocab = config["dim"], config["ffn"], config["vocab"]
    q_dim, kv_dim = config["heads"] * config["head_dim"], config["kv_heads"] * config["head_dim"]
    shapes = [("embed", (vocab, dim))]
    for layer in range(config["layers"]):
        shapes += [
            (f"{layer}.attn_norm", (dim,)),
            (f"{layer}.q", (q_dim, dim)),
            (f"{layer}.k", (kv_dim, dim)),
            (f"{layer}.v", (kv_dim, dim)),
            (f"{layer}.o", (dim, q_dim)),
            (f"{layer}.ffn_norm", (dim,)),
            (f"{layer}.gate", (ffn, dim)),
            (f"{layer}.up", (ffn, dim)),
            (f"{layer}.down", (dim, ffn)),
        ]
    shapes.append(("final_norm", (dim,)))
    if not config["tied"]:
        shapes.append(("head", (vocab, dim)))
    return shapes


def adapted_shapes(config):
    """The adapted matrices in file order: a list of (name, shape)."""
    return [(name, shape) for name, shape in tensor_shapes(config) if "." in name and len(shape) == 2]


# ----------------------------------------------------------------------------------------------------
# examples

def data_sections(vocab, examples, glyphs=None, column=None, metric=None, **parts):
    """
    The sections of a `data` file. `examples`: a list of (tokens, answer), the ids (a list, bytes, or fastest an array of
    type TOKEN_TYPES[token_width(vocab)]) and the index of the first answer token; `glyphs`: a dict, token id ->
    character. Of an evaluation `column`, its name wherever its results are kept, and `metric`, texts; then what PARTS
    names for the metric, as in doc/model.md: `choices`, `gold`, `chars`, `end`: integers, `limit`: one, `number`:
    floats, `stop`, `pieces`: lists of bytes. ValueError where a rule of the format is broken.
    """
    if set(parts) != set(PARTS.get(metric, ())) or (metric is None) != (column is None) or column == "":
        raise ValueError(f"an evaluation has a column, a metric, and what belongs to it: not column {column!r}, metric "
                         f"{metric!r}, {', '.join(parts) or 'nothing else'}")
    width = token_width(vocab)
    try:
        tokens = array(TOKEN_TYPES[width])
        for example, _ in examples:
            tokens.extend(example)
        sections = [
            ("vocab", pack_u32((vocab, width))),
            ("length", pack_u32(len(example) for example, _ in examples)),
            ("answer", pack_u32(answer for _, answer in examples)),
            ("tokens", little_endian(tokens).tobytes()),
        ]
        if glyphs is not None:
            sections.append(("glyphs", pack_u32(number for token in glyphs for number in (token, ord(glyphs[token])))))
        sections += [(tag, text.encode()) for tag, text in (("column", column), ("metric", metric)) if text is not None]
        sections += [(tag, CODECS[tag][0](part)) for tag, part in parts.items()]
    except (OverflowError, TypeError) as error:
        raise ValueError(f"no such number can be written: {error}") from None
    parse_examples(dict(sections))  # what is written can be read
    return sections


def read_examples(path):
    """
    The data file at `path` as a dict of the arguments of data_sections, which turns it back into the sections.
    ValueError, in one line.
    """
    sections = read_file(path, "data")
    try:
        return parse_examples(sections)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {MAKERS['data']}") from None


def parse_examples(sections):
    """
    What read_examples returns, of sections. ValueError where they break a rule of the format: the same rules as those of
    data_open in train_rigsa.c.
    """
    header, lengths, answers = (unpack_u32(needed(sections, tag), tag) for tag in ("vocab", "length", "answer"))
    require(len(header) == 2 and header[1] in TOKEN_TYPES, f"section 'vocab' has {list(header)}, not size and bytes of tokens")
    vocab, width = header
    tokens = unpack(needed(sections, "tokens"), TOKEN_TYPES[width], "tokens")
    require(lengths, "holds no examples")
    require(len(lengths) == len(answers), f"{len(answers)} answers in {len(lengths)} examples")
    require(len(tokens) == sum(lengths), f"{len(tokens)} tokens where the examples have {sum(lengths)}")
    found, start = {"vocab": vocab, "examples": []}, 0
    for length, answer in zip(lengths, answers):
        require(1 <= answer < length, f"an example of {length} tokens cannot have its answer start at {answer}")
        found["examples"].append((tokens[start:start + length], answer))
        start += length
    require(max(tokens) < vocab, f"token {max(tokens)} is not in a vocabulary of {vocab}")
    if "glyphs" in sections:
        pairs = unpack_u32(sections["glyphs"], "glyphs")
        require(len(pairs) % 2 == 0 and all(code == 10 or 32 <= code < 127 for code in pairs[1::2]),
              "section 'glyphs' is not pairs of a token and a printing ASCII character or newline")
        found["glyphs"] = dict(zip(pairs[::2], map(chr, pairs[1::2])))
    column, metric = read_name(sections, "column"), read_name(sections, "metric")
    if column:
        require(metric in PARTS, f"unknown metric '{metric}'")
        found.update(column=column, metric=metric)
        for tag in PARTS[metric]:
            payload = sections.get(tag, b"") if tag in ("end", "stop") else needed(sections, tag)
            found[tag] = CODECS[tag][1](payload, tag)
        if "choices" in found:
            check_choices(found)
        if "limit" in found:
            check_generation(found)
    return found


def check_choices(found):
    """Of a data file with choices, as of read_examples."""
    choices, gold, chars, examples = found["choices"], found["gold"], found["chars"], len(found["examples"])
    require(len(gold) == len(choices), f"{len(gold)} right choices for {len(choices)} questions")
    require(len(chars) == examples, f"lengths in characters of {len(chars)} choices, not {examples}")
    require(sum(choices) == examples, f"{sum(choices)} choices in {examples} examples")
    for question, (right, count) in enumerate(zip(gold, choices)):
        require(right < count, f"question {question} has {count} choices, and number {right} is to be the right one")
    require(min(chars) > 0, "a choice is empty")


def check_generation(found):
    """Of a data file with answers to generate, as of read_examples."""
    require(1 <= found["limit"] <= MOST, f"generates {found['limit']} tokens")
    require(len(found["number"]) == len(found["examples"]), "section 'number' has not one for each example")
    require(len(found["pieces"]) == found["vocab"], f"section 'pieces' has {len(found['pieces'])} for {found['vocab']} tokens")


def token_width(vocab):
    """Bytes per token: the smallest of 1, 2 and 4 that holds every id below `vocab`."""
    return 1 if vocab <= 1 << 8 else 2 if vocab <= 1 << 16 else 4


def pack_u32(numbers):
    """Integers -> u32, little-endian."""
    return little_endian(array("I", numbers)).tobytes()


def unpack_u32(payload, tag):
    """u32, little-endian, of section `tag` -> an array of integers."""
    return unpack(payload, "I", tag)


def unpack(payload, typecode, tag):
    """An array of this type from little-endian bytes of section `tag`; ValueError where they do not fill its items."""
    numbers = array(typecode)
    require(len(payload) % numbers.itemsize == 0,
            f"section '{tag}' has {len(payload)} bytes, no multiple of {numbers.itemsize}")
    numbers.frombytes(payload)
    return little_endian(numbers)


def unpack_one(payload, tag):
    """The one u32 of section `tag`."""
    require(len(payload) == 4, f"section '{tag}' has {len(payload)} bytes where 4 are needed")
    return unpack_u32(payload, tag)[0]


def pack_stops(texts):
    """Byte strings, each with a zero byte behind it."""
    require(not any(b"\0" in text for text in texts), "a text that ends what is said has a zero byte in it")
    return b"".join(text + b"\0" for text in texts)


def unpack_stops(payload, tag):
    """What pack_stops was given."""
    *texts, rest = payload.split(b"\0")
    require(not rest, f"section '{tag}' does not end with a zero byte")
    return texts


def pack_pieces(pieces):
    """Byte strings, each behind its length in u32."""
    return b"".join(struct.pack("<I", len(piece)) + piece for piece in pieces)


def unpack_pieces(payload, tag):
    """What pack_pieces was given."""
    pieces, at = [], 0
    while at < len(payload):
        size = int.from_bytes(payload[at:at + 4], "little")
        pieces.append(payload[at + 4:at + 4 + size])
        require(len(payload) >= at + 4 + size, f"section '{tag}' ends within piece {len(pieces)}")
        at += 4 + size
    return pieces


def little_endian(numbers):
    """The array, its bytes swapped in place on a machine that is not little-endian; the same call swaps them back."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


CODECS = {  # section -> its bytes of a part of data_sections, and the part of its bytes and its tag
    **dict.fromkeys(("choices", "gold", "chars", "end"), (pack_u32, unpack_u32)),
    "limit": (lambda number: pack_u32([number]), unpack_one),
    "number": (lambda numbers: little_endian(array("d", numbers)).tobytes(),
               lambda payload, tag: unpack(payload, "d", tag)),
    "stop": (pack_stops, unpack_stops),
    "pieces": (pack_pieces, unpack_pieces),
}

"""
Reads and writes the files of rigsa.c (layouts: doc/model.md, section 3) from Python.

A file is a header of 32 bytes, then sections: a tag, a length, a hash and a payload padded with zeros to a multiple of
8 bytes. Everything is little-endian, on every machine. The standard library is enough; numpy, when it is there, only
makes the hash faster.
"""
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
            tag = tag.rstrip(b"\0").decode("ascii", "replace")
            left -= SECTION_HEADER.size + padded(n)
            check(left >= 0, f"section '{tag}' is longer than the file")
            data = file.read(n)
            file.seek(padded(n) - n, os.SEEK_CUR)
            check(hash64(data) == expected, f"section '{tag}' is damaged, its hash does not match")
            check(tag not in sections, f"has section '{tag}' twice")
            sections[tag] = data
        check(left == 0, f"{left} bytes after the last section")
    return sections


def padded(n):
    """`n` rounded up to a multiple of 8."""
    return n + -n % 8


# ----------------------------------------------------------------------------------------------------
# models

def pack_config(config):
    """The payload of `config` from a dict with the keys CONFIG_FIELDS."""
    return CONFIG.pack(*(config[field] for field in CONFIG_FIELDS))


def unpack_config(payload):
    """The dict that pack_config was given; theta and eps as rounded to fp32."""
    return dict(zip(CONFIG_FIELDS, CONFIG.unpack(payload)))


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

def data_sections(vocab, examples, glyphs=None, column=None, metric=None, choices=None, gold=None, chars=None):
    """
    The sections of a `data` file. `examples`: a list of (tokens, answer), the ids (a list, bytes, or fastest an array
    of type TOKEN_TYPES[token_width(vocab)]) and the index of the first answer token; `glyphs`: a dict, token id ->
    character; `column` and `metric`: text; `choices`, `gold`, `chars`: sequences of integers as in doc/model.md. What
    is None is not written. ValueError or OverflowError where an example breaks the rules of the format.
    """
    width = token_width(vocab)
    tokens = array(TOKEN_TYPES[width])
    for example, answer in examples:
        if not 1 <= answer < len(example):
            raise ValueError(f"an example of {len(example)} tokens cannot have its answer start at {answer}")
        tokens.extend(example)
    if tokens and max(tokens) >= vocab:
        raise ValueError(f"token {max(tokens)} is not in a vocabulary of {vocab}")
    sections = [
        ("vocab", pack_u32((vocab, width))),
        ("length", pack_u32(len(example) for example, _ in examples)),
        ("answer", pack_u32(answer for _, answer in examples)),
        ("tokens", little_endian(tokens).tobytes()),
    ]
    if glyphs is not None:
        sections.append(("glyphs", pack_u32(number for token in glyphs for number in (token, ord(glyphs[token])))))
    for tag, text in (("column", column), ("metric", metric)):
        if text is not None:
            sections.append((tag, text.encode()))
    for tag, numbers in (("choices", choices), ("gold", gold), ("chars", chars)):
        if numbers is not None:
            sections.append((tag, pack_u32(numbers)))
    return sections


def read_examples(path):
    """The data file at `path` as a dict of the arguments of data_sections, which turns it back into the sections."""
    sections = read_file(path, "data")
    missing = [tag for tag in ("vocab", "length", "answer", "tokens") if tag not in sections]
    if missing:
        raise ValueError(f"{path}: has no section '{missing[0]}'; {MAKERS['data']}")
    vocab, width = unpack_u32(sections["vocab"])
    tokens = array(TOKEN_TYPES[width])
    tokens.frombytes(sections["tokens"])
    little_endian(tokens)
    lengths, answers = unpack_u32(sections["length"]), unpack_u32(sections["answer"])
    if len(lengths) != len(answers) or sum(lengths) != len(tokens):
        raise ValueError(f"{path}: sections 'length', 'answer' and 'tokens' do not fit together; {MAKERS['data']}")
    examples, start = [], 0
    for length, answer in zip(lengths, answers):
        examples.append((tokens[start:start + length], answer))
        start += length
    found = {"vocab": vocab, "examples": examples}
    if "glyphs" in sections:
        numbers = unpack_u32(sections["glyphs"])
        found["glyphs"] = {token: chr(code) for token, code in zip(numbers[::2], numbers[1::2])}
    found.update((tag, sections[tag].decode()) for tag in ("column", "metric") if tag in sections)
    found.update((tag, unpack_u32(sections[tag])) for tag in ("choices", "gold", "chars") if tag in sections)
    return found


def token_width(vocab):
    """Bytes per token: the smallest of 1, 2 and 4 that holds every id below `vocab`."""
    return 1 if vocab <= 1 << 8 else 2 if vocab <= 1 << 16 else 4


def pack_u32(numbers):
    """Integers -> u32, little-endian."""
    return little_endian(array("I", numbers)).tobytes()


def unpack_u32(payload):
    """u32, little-endian -> an array of integers."""
    numbers = array("I")
    numbers.frombytes(payload)
    return little_endian(numbers)


def little_endian(numbers):
    """The array, its bytes swapped in place on a machine that is not little-endian; the same call swaps them back."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers

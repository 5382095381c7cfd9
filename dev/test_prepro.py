"""
Tests of rigsa_file.py and prepro_mnist.py: python dev/test_prepro.py [folder with the four idx files of MNIST]
"""
import gzip
import math
import os
import struct
import subprocess
import sys
import tempfile
import unittest

import rigsa_file

HERE = os.path.dirname(os.path.abspath(__file__))
PREPRO = os.path.join(HERE, "..", "prepro_mnist.py")
sys.path.insert(0, os.path.dirname(PREPRO))
import prepro_mnist  # noqa: E402

MNIST = sys.argv[1] if len(sys.argv) > 1 else None


def prepro(*args):
    """(exit status, standard output, standard error) of prepro_mnist.py."""
    done = subprocess.run([sys.executable, PREPRO, *args], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


class Folder(unittest.TestCase):
    """A test with a temporary folder."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = temporary.name

    def path(self, name):
        return os.path.join(self.folder, name)


class Hash(unittest.TestCase):
    def test_known_values(self):
        """Of no bytes, and of one zero word: its term is the first output of splitmix64 for seed 0, as published."""
        self.assertEqual(rigsa_file.hash64(b""), 0)
        self.assertEqual(rigsa_file.mix(rigsa_file.GOLDEN), 0xE220A8397B1DCDAF)
        self.assertEqual(rigsa_file.hash64(bytes(8)), (rigsa_file.mix(8) + 0xE220A8397B1DCDAF) & rigsa_file.U64)

    def test_length_counts(self):
        self.assertNotEqual(rigsa_file.hash64(b"a"), rigsa_file.hash64(b"a\0"))

    def test_order_counts(self):
        self.assertNotEqual(rigsa_file.hash64(b"a" * 8 + b"b" * 8), rigsa_file.hash64(b"b" * 8 + b"a" * 8))

    @unittest.skipIf(rigsa_file.numpy is None, "numpy is not installed")
    def test_numpy_is_pure_python(self):
        for size in (0, 8, 1000, rigsa_file.HASH_BLOCK):
            words = os.urandom(size)
            python = rigsa_file.sum_words_python(words, 5) & rigsa_file.U64
            self.assertEqual(rigsa_file.sum_words_numpy(words, 5), python, f"{size} bytes")

    def test_pieces(self):
        """However the bytes are cut, the hash is the sum of doc/model.md over zero-padded words."""
        for size in (1, 7, 8, 9, 1000, rigsa_file.HASH_BLOCK + 13):
            data = os.urandom(size)
            padded = data + bytes(-size % 8)
            expected = (rigsa_file.mix(size) + rigsa_file.sum_words_python(padded, 0)) & rigsa_file.U64
            self.assertEqual(rigsa_file.hash64(data), expected, f"{size} bytes")
            for first, second in ((0, 1), (3, 5), (8, 8), (1, 999)):
                found = rigsa_file.Hash()
                for piece in (data[:first], data[first:second], data[second:]):
                    found.update(piece)
                self.assertEqual(found.value(), expected, f"{size} bytes in pieces")


class Files(Folder):
    SECTIONS = [("one", b"x"), ("empty", b""), ("sixteen letters.", bytes(range(256)))]

    def write(self):
        rigsa_file.write_file(self.path("file"), "base", self.SECTIONS)
        with open(self.path("file"), "rb") as file:
            return bytearray(file.read())

    def refuses(self, content, kind="base"):
        with open(self.path("bad"), "wb") as file:
            file.write(content)
        with self.assertRaises(ValueError) as caught:
            rigsa_file.read_file(self.path("bad"), kind)
        self.assertIn(self.path("bad"), str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))

    def test_round_trip(self):
        content = self.write()
        self.assertEqual(rigsa_file.read_file(self.path("file"), "base"), dict(self.SECTIONS))
        self.assertEqual(len(content), 32 + 3 * 32 + 8 + 0 + 256)
        self.assertEqual(os.listdir(self.folder), ["file"])

    def test_payload_in_pieces(self):
        content = self.write()
        hashes = rigsa_file.write_file(self.path("file"), "base", [
            (tag, iter([data[:3], b"", data[3:4], data[4:]])) for tag, data in self.SECTIONS])
        with open(self.path("file"), "rb") as file:
            self.assertEqual(file.read(), content)
        self.assertEqual(hashes, {tag: rigsa_file.hash64(data) for tag, data in self.SECTIONS})

    def test_every_truncation(self):
        content = self.write()
        for size in range(len(content)):
            self.refuses(content[:size])

    def test_truncation_that_the_header_admits(self):
        content = self.write()
        for size in range(32, len(content), 8):
            content[16:24] = struct.pack("<Q", size)
            self.refuses(content[:size])

    def test_bytes_after_the_end(self):
        self.refuses(self.write() + bytes(8))

    def test_every_corrupted_byte(self):
        content = self.write()
        tags, padding = [range(at, at + 16) for at in (32, 72, 104)], range(65, 72)
        for at in set(range(len(content))).difference(padding, *tags):
            content[at] ^= 1
            self.refuses(content)
            content[at] ^= 1

    def test_tags(self):
        """Sections are known by their whole tags: two of one name, or one that would be cut, are not written."""
        for tags in ("one", "one"), ("", "two"), ("seventeen letters", "two"), ("a\0b", "two"):
            with self.subTest(str(tags)), self.assertRaisesRegex(ValueError, "tags of 1 to 16 letters"):
                rigsa_file.write_file(self.path("file"), "base", [(tag, b"x") for tag in tags])
            self.assertEqual(os.listdir(self.folder), [])

    def test_pipe(self):
        os.mkfifo(self.path("pipe"))
        with self.assertRaisesRegex(ValueError, "pipe: not a file"):
            rigsa_file.read_file(self.path("pipe"), "base")

    def test_other_kind(self):
        self.refuses(self.write(), kind="data")

    def test_missing(self):
        with self.assertRaisesRegex(ValueError, "nowhere: No such file"):
            rigsa_file.read_file(self.path("nowhere"), "base")

    def test_failed_write_leaves_the_old_file(self):
        content = self.write()
        with self.assertRaises(UnicodeEncodeError):
            rigsa_file.write_file(self.path("file"), "base", [("one", b"new"), ("\ud800", b"")])
        with open(self.path("file"), "rb") as file:
            self.assertEqual(file.read(), content)
        self.assertEqual(os.listdir(self.folder), ["file"])


class Models(unittest.TestCase):
    NANO = dict(dim=96, ffn=224, layers=3, heads=4, kv_heads=2, head_dim=24, vocab=48, context=256, tied=1, dtype=0,
                theta=10000.0, eps=0.5)

    def test_config_round_trip(self):
        payload = rigsa_file.pack_config(self.NANO)
        self.assertEqual(len(payload), 48)
        self.assertEqual(rigsa_file.unpack_config(payload), self.NANO)

    def test_models_that_cannot_be(self):
        for change in ({"dim": 0}, {"layers": (1 << 20) + 1}, {"kv_heads": 3}, {"head_dim": 23}, {"tied": 2}, {"dtype": 2},
                       {"theta": 0.0}, {"theta": math.inf}, {"theta": 1e39}, {"eps": 1e-50}, {"eps": 1.0}, {"vocab": -1},
                       {"dim": 1 << 20, "ffn": 1 << 20}):
            with self.subTest(str(change)), self.assertRaises(ValueError):
                rigsa_file.pack_config(self.NANO | change)

    def test_labels(self):
        """Names of folders become names that the trainer reads; they are cut between characters."""
        for name, found in (("SmolLM2-135M", "SmolLM2-135M"), ("SmolLM2, my run", "SmolLM2_ my run"), ('with"quote', "with_quote"),
                            ("a\\b\n\0\x7f", "a_b___"), ("ё" * 40, "ё" * 31), ("x" * 62 + "😀", "x" * 62), ("", "")):
            self.assertEqual(rigsa_file.label(name), found.encode())

    def test_weights(self):
        """What the trainer would refuse is neither written nor read: a weight too few, NaN, infinity."""
        for dtype, size in (0, 4), (1, 2):
            config = dict(self.NANO, layers=1, dtype=dtype)
            count = sum(math.prod(shape) for _, shape in rigsa_file.tensor_shapes(config))
            good = bytes(count * size)
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "base")
                rigsa_file.write_file(path, "base", rigsa_file.base_sections(config, "Мой, base", iter([good[:8], good[8:]])))
                self.assertEqual(rigsa_file.read_base(path), (config, "Мой_ base", good))
                for bad in (good[size:], good + bytes(size), good[4:] + b"\0\0\x80\x7f", good[4:] + b"\0\0\xc0\xff"):
                    with self.assertRaisesRegex(ValueError, "weights"):
                        rigsa_file.write_file(path, "base", rigsa_file.base_sections(config, "", bad))
                    self.assertEqual(rigsa_file.read_base(path)[2], good)
                    raw = [("config", rigsa_file.pack_config(config)), ("weights", bad)]
                    rigsa_file.write_file(path + "2", "base", raw)
                    with self.assertRaisesRegex(ValueError, f"^{path}2: .*weights[^\n]*$"):
                        rigsa_file.read_base(path + "2")

    def count(self, **changes):
        return sum(math.prod(shape) for _, shape in rigsa_file.tensor_shapes(dict(self.NANO, **changes)))

    def test_tensor_shapes(self):
        """The sums of doc/model.md, section 1."""
        self.assertEqual(self.count(), 281760)
        self.assertEqual(self.count(tied=0), 281760 + 48 * 96)
        smollm2_135m = dict(dim=576, ffn=1536, layers=30, heads=9, kv_heads=3, head_dim=64, vocab=49152)
        self.assertEqual(self.count(**smollm2_135m), 134515008)


class Examples(Folder):
    def round_trip(self, **arguments):
        rigsa_file.write_file(self.path("data"), "data", rigsa_file.data_sections(**arguments))
        found = rigsa_file.read_examples(self.path("data"))
        found["examples"] = [(list(tokens), answer) for tokens, answer in found["examples"]]
        found.update((tag, list(found[tag])) for tag in ("choices", "gold", "chars", "number", "end") if tag in found)
        self.assertEqual(found, arguments)

    def test_round_trips(self):
        for vocab in (48, 256, 257, 65536, 65537):
            self.round_trip(vocab=vocab, examples=[([0, vocab - 1, 3], 1), ([5] * 1000, 999)])
        self.round_trip(vocab=48, examples=[([1, 2], 1)], glyphs={0: "\n", 7: "x"}, column="mnist", metric="exact")
        choices = dict(choices=[2, 3], gold=[1, 0], chars=[1, 2, 3, 4, 5])
        for metric in "acc", "acc_norm":
            self.round_trip(vocab=9, examples=[([1, 2], 1)] * 5, column="c", metric=metric, **choices)
        self.round_trip(vocab=3, examples=[([1, 2], 1)] * 2, column="c", metric="number", limit=7, number=[-1.5, 2e9],
                        end=[2], stop=[b"\n\n", "ё".encode()], pieces=[b"", b"\xff", b"ab"])

    def test_evaluations(self):
        """What the trainer would refuse is not written."""
        one, two = [([1, 2], 1)], [([1, 2], 1)] * 2
        acc = {"column": "c", "metric": "acc", "choices": [2], "gold": [1], "chars": [1, 1]}
        rigsa_file.data_sections(9, two, **acc)
        said = {"column": "c", "metric": "number", "limit": 1, "number": [1], "end": [], "stop": [], "pieces": [b""] * 9}
        rigsa_file.data_sections(9, one, **said)
        rigsa_file.data_sections(9, one, column="ё" * 63 + "x", metric="exact")
        for examples, wrong in [(two, acc | {tag: value}) for tag, value in (
                ("gold", [2]), ("gold", [-1]), ("gold", [1, 1]), ("choices", [1]), ("chars", [1]), ("chars", [0, 1]),
                ("metric", "exact"), ("column", None))] + [(one, said | {tag: value}) for tag, value in (
                    ("limit", 0), ("limit", 1 << 21), ("number", []), ("stop", [b"a\0b"]), ("pieces", [b""] * 8))] + [
                        (one, {"column": column, "metric": metric}) for column, metric in (
                            ("a,b", "exact"), ('with"quote', "exact"), ("a\\b", "exact"), ("a\nb", "exact"), ("a\0b", "exact"),
                            ("x" * 128, "exact"), ("ё" * 64, "exact"), ("", "exact"), ("c", "other"), ("c", None),
                            (None, "exact"))] + [([], {}), ([([1, 1 << 40], 1)], {}), (one, {"glyphs": {1: "ё"}})]:
            with self.subTest(str(wrong)), self.assertRaises(ValueError):
                rigsa_file.data_sections(9, examples, **wrong)

    def test_damaged(self):
        """What is wrong in a file is said in one line that names it."""
        good = rigsa_file.data_sections(9, [([1, 2], 1)] * 2, column="c", metric="acc", choices=[2], gold=[1], chars=[1, 1])
        for tag, payload in (("vocab", bytes(4)), ("vocab", struct.pack("<2I", 9, 3)), ("length", b"\2\0\0"), ("answer", bytes(8)),
                             ("tokens", bytes(3)), ("tokens", b"\1\2\1\x09"), ("gold", struct.pack("<I", 2)), ("chars", bytes(8)),
                             ("column", b"a,b"), ("metric", b"good"), ("choices", b""), ("glyphs", struct.pack("<3I", 1, 48, 2))):
            rigsa_file.write_file(self.path("data"), "data", list((dict(good) | {tag: payload}).items()))
            with self.subTest(f"{tag} {payload}"), self.assertRaisesRegex(ValueError, f"^{self.path('data')}: .*; make it again[^\n]*$"):
                rigsa_file.read_examples(self.path("data"))

    def test_layout(self):
        sections = dict(rigsa_file.data_sections(300, [([258, 1], 1)]))
        self.assertEqual(sections["vocab"], struct.pack("<2I", 300, 2))
        self.assertEqual(sections["tokens"], struct.pack("<2H", 258, 1))

    def test_rules(self):
        for tokens, answer in (([1, 2], 0), ([1, 2], 2), ([], 1), ([1, 48], 1)):
            with self.assertRaises(ValueError):
                rigsa_file.data_sections(48, [(tokens, answer)])


def text(*rows):
    return "".join(row + "\n" for row in rows).encode()


class Pictures(unittest.TestCase):
    def test_uniform(self):
        for side in (28, 14, 7):
            self.assertEqual(prepro_mnist.picture(bytes(784), side), text("0" * side) * side)
            self.assertEqual(prepro_mnist.picture(b"\xff" * 784, side), text("9" * side) * side)

    def test_every_grey(self):
        for grey in range(256):
            digit = str(10 * grey // 256)
            for side in (28, 14, 7):
                self.assertEqual(prepro_mnist.picture(bytes([grey]) * 784, side), text(digit * side) * side)

    def test_place(self):
        """One white pixel in row 9, column 22."""
        image = bytearray(784)
        image[9 * 28 + 22] = 255
        for side, row, column, digit in ((28, 9, 22, "9"), (14, 4, 11, "2"), (7, 2, 5, "0")):
            rows = ["0" * side] * side
            rows[row] = "0" * column + digit + "0" * (side - 1 - column)
            self.assertEqual(prepro_mnist.picture(bytes(image), side), text(*rows))

    def test_exact_borders(self):
        """A block of 4 x 4 needs a sum of 409.6 for a 1: 409 is not enough, 410 is."""
        for total, digit in ((409, "0"), (410, "1")):
            image = bytearray(784)
            image[0], image[3 * 28 + 3] = 255, total - 255
            self.assertEqual(prepro_mnist.picture(bytes(image), 7)[:1].decode(), digit)

    def test_characters(self):
        (tokens, answer), = prepro_mnist.Characters().examples([text("09", "00")], [7])
        self.assertEqual("".join(rigsa_file.ALPHABET[token] for token in tokens), "\n09\n00\n=7\n")
        self.assertEqual(answer, 8)


class Command(Folder):
    """prepro_mnist.py on a folder of made-up images."""

    def idx(self, name, content):
        with open(self.path(name), "wb") as file:
            file.write(content)

    def images(self, prefix, count):
        self.idx(f"{prefix}-images-idx3-ubyte", struct.pack(">4I", 0x803, count, 28, 28) + bytes(784) * count)

    def labels(self, prefix, labels):
        self.idx(f"{prefix}-labels-idx1-ubyte", struct.pack(">2I", 0x801, len(labels)) + bytes(labels))

    def setUp(self):
        super().setUp()
        self.images("train", 5)
        self.labels("train", range(5))
        self.images("t10k", 3)
        self.labels("t10k", range(7, 10))
        self.out = self.path("out")

    def run_prepro(self, *args):
        return prepro("--images", self.folder, "--side", "7", "--out", self.out, *args)

    def answers(self, name):
        examples = rigsa_file.read_examples(os.path.join(self.out, name))
        return examples.get("column"), [tokens[answer] - 2 for tokens, answer in examples["examples"]]

    def test_files(self):
        status, out, _ = self.run_prepro("--heldout", "2")
        self.assertEqual(status, 0)
        self.assertIn("is not the published file", out)
        self.assertEqual(self.answers("mnist_7_train.bin"), (None, [0, 1, 2]))
        self.assertEqual(self.answers("mnist_7_heldout.bin"), ("mnist_heldout", [3, 4]))
        self.assertEqual(self.answers("mnist_7_test.bin"), ("mnist", [7, 8, 9]))

    def test_choice(self):
        """The same pictures with each of the ten digits behind them; the right one is known."""
        self.run_prepro("--heldout", "2")
        exact, choice = (rigsa_file.read_examples(os.path.join(self.out, f"mnist_7_test{end}.bin")) for end in ("", "_choice"))
        self.assertEqual((choice["column"], choice["metric"]), ("mnist_choice", "acc"))
        self.assertEqual((list(choice["choices"]), list(choice["gold"])), ([10] * 3, [7, 8, 9]))
        self.assertEqual([tokens[answer] - 2 for tokens, answer in choice["examples"]], list(range(10)) * 3)
        self.assertEqual([choice["examples"][10 * number + gold] for number, gold in enumerate(choice["gold"])], exact["examples"])
        self.assertTrue(os.path.exists(os.path.join(self.out, "mnist_7_heldout_choice.bin")))
        self.assertFalse(os.path.exists(os.path.join(self.out, "mnist_7_train_choice.bin")))

    def test_limit(self):
        self.assertEqual(self.run_prepro("--limit", "2", "--heldout", "4", "--dataset", "fashion")[0], 0)
        self.assertEqual(self.answers("fashion_7_train.bin"), (None, [0]))
        self.assertEqual(self.answers("fashion_7_heldout.bin"), ("fashion_heldout", [1, 2, 3, 4]))
        self.assertEqual(self.answers("fashion_7_test.bin"), ("fashion", [7, 8]))

    def test_other_names(self):
        """The files as some archives have them: with a dot, gzip'd too."""
        for prefix in "train", "t10k":
            for name in "images-idx3", "labels-idx1":
                os.rename(self.path(f"{prefix}-{name}-ubyte"), self.path(f"{prefix}-{name.replace('-idx', '.idx')}-ubyte"))
        with open(self.path("t10k-images.idx3-ubyte"), "rb") as file:
            self.idx("t10k-images.idx3-ubyte.gz", gzip.compress(file.read()))
        os.remove(self.path("t10k-images.idx3-ubyte"))
        self.assertEqual(self.run_prepro()[::2], (0, ""))
        self.assertEqual(self.answers("mnist_7_test.bin"), ("mnist", [7, 8, 9]))

    def refuses(self, wrong, *args):
        status, _, error = self.run_prepro(*args)
        self.assertEqual(status, 1)
        self.assertRegex(error, f"^prepro_mnist.py: .*{wrong}.*\n$")

    def test_missing(self):
        os.remove(self.path("train-images-idx3-ubyte"))
        self.refuses("train-images-idx3-ubyte.gz: no such file")

    def test_truncated(self):
        self.idx("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 5, 28, 28) + bytes(784 * 5 - 1))
        self.refuses("train-images-idx3-ubyte: 3935 bytes where 5 items need 3936")

    def test_empty(self):
        self.idx("train-labels-idx1-ubyte", b"")
        self.refuses("train-labels-idx1-ubyte: only 0 bytes")

    def test_truncated_gzip(self):
        os.remove(self.path("t10k-images-idx3-ubyte"))
        self.idx("t10k-images-idx3-ubyte.gz", gzip.compress(bytes(5000))[:-9])
        self.refuses("t10k-images-idx3-ubyte.gz: damaged gzip file")

    def test_wrong_magic(self):
        self.idx("train-images-idx3-ubyte", struct.pack(">2I", 0x801, 10) + bytes(10))
        self.refuses("train-images-idx3-ubyte: not an idx file of 28 x 28 images")

    def test_wrong_size(self):
        self.idx("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 5, 32, 32) + bytes(5 * 1024))
        self.refuses("train-images-idx3-ubyte: not an idx file of 28 x 28 images")

    def test_counts_differ(self):
        self.labels("train", range(4))
        self.refuses("5 train images but 4 labels")

    def test_label_too_large(self):
        self.labels("t10k", [1, 2, 10])
        self.refuses("a t10k label is 10")

    def test_all_held_out(self):
        self.refuses("--heldout 5 leaves nothing of the 5 training images", "--heldout", "5")


@unittest.skipUnless(MNIST, "no folder of MNIST given")
class RealMnist(Folder):
    def test_first_digit(self):
        status, out, error = prepro("--images", MNIST, "--side", "7", "--out", self.folder)
        self.assertEqual((status, error), (0, ""))
        self.assertNotIn("note:", out)
        picture = "0000000\n0034440\n0045100\n0004200\n0002800\n0266100\n0210000\n"
        self.assertIn(picture, out)
        train = rigsa_file.read_examples(self.path("mnist_7_train.bin"))["examples"]
        test = rigsa_file.read_examples(self.path("mnist_7_test.bin"))["examples"]
        self.assertEqual((len(train), len(test)), (60000, 10000))
        self.assertEqual("".join(rigsa_file.ALPHABET[token] for token in train[0][0]), f"\n{picture}=5\n")
        self.assertEqual(sum(tokens[answer] - 2 == 1 for tokens, answer in train), 6742)


if __name__ == "__main__":
    result = unittest.main(argv=sys.argv[:1], exit=False, testRunner=unittest.TextTestRunner(sys.stdout)).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed")
    sys.exit(failed > 0)

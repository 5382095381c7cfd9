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
        found.update((tag, list(found[tag])) for tag in ("choices", "gold", "chars") if tag in found)
        self.assertEqual(found, arguments)

    def test_round_trips(self):
        for vocab in (48, 256, 257, 65536, 65537):
            self.round_trip(vocab=vocab, examples=[([0, vocab - 1, 3], 1), ([5] * 1000, 999)])
        self.round_trip(vocab=48, examples=[([1, 2], 1)], glyphs={0: "\n", 7: "x"}, column="mnist", metric="exact")
        self.round_trip(vocab=9, examples=[([1, 2], 1)] * 5, choices=[2, 3], gold=[1, 0], chars=[1, 2, 3, 4, 5])

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
        self.assertEqual(self.answers("mnist_7_heldout.bin"), ("mnist", [3, 4]))
        self.assertEqual(self.answers("mnist_7_test.bin"), ("mnist", [7, 8, 9]))

    def test_limit(self):
        self.assertEqual(self.run_prepro("--limit", "2", "--heldout", "4", "--dataset", "fashion")[0], 0)
        self.assertEqual(self.answers("fashion_7_train.bin"), (None, [0]))
        self.assertEqual(self.answers("fashion_7_heldout.bin"), ("fashion", [1, 2, 3, 4]))
        self.assertEqual(self.answers("fashion_7_test.bin"), ("fashion", [7, 8]))

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

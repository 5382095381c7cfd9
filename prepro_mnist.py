"""
Textual MNIST: turns the images of MNIST or Fashion-MNIST into text, and the text into examples for train_rigsa.

    python prepro_mnist.py                      download MNIST, write data/mnist_28_train.bin and data/mnist_28_test.bin
    python prepro_mnist.py --side 7             pictures of 7 x 7 characters: 60 tokens each instead of 816
    python prepro_mnist.py --tokenizer DIR      instruct prompts, through the tokenizer and chat template of a model

A picture is `side` rows of `side` digits, each row ended by a newline. A digit is the brightness of one block of k x k
pixels, k = 28 / side: floor(10 * mean / 256), so 0 is black and 9 is white, computed exactly in integers.

Without --tokenizer a token is one of the 48 characters of dev/rigsa_file.py and an example is

    newline, the picture, "=", the label, newline       4 + side * (side + 1) tokens; the answer: label, newline

With --tokenizer an example is the model's own chat template around one user message, a fixed sentence (DATASETS below),
a newline and the picture; then comes the answer: the label and the token that ends a turn. For SmolLM2 that is 851
tokens at side 28, 249 at side 14 and 95 at side 7.

The file formats are in doc/model.md. MNIST: LeCun, Cortes, Burges. Fashion-MNIST: Xiao, Rasul, Vollgraf (Zalando).
"""
import argparse
import gzip
import hashlib
import http.client
import itertools
import math
import os
import struct
import sys
import urllib.request
import zlib
from array import array
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "dev"))
import chat_template  # noqa: E402
import command  # noqa: E402
import own_data  # noqa: E402
import rigsa_file  # noqa: E402

PIXELS = 28  # the images are 28 x 28 bytes
SPLICE_CHECKS = 100  # how many guessed prompts are compared with the tokenizer's own


class Dataset(NamedTuple):
    home: str  # where its four files are published
    sentence: str  # opens the user message; without digits, because digits are drawn as the picture
    sha256: dict  # file name -> sha256 of its content, decompressed


DATASETS = {
    "mnist": Dataset(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "Which handwritten digit is this?",
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion": Dataset(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "Which class of clothing is this?",
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
    ),
}


# ----------------------------------------------------------------------------------------------------
# the idx files

def download(url, path):
    """Fetches `url` to `path`, with progress on one line."""
    with urllib.request.urlopen(url, timeout=60) as response, open(path + ".part", "wb") as file:
        while piece := response.read(1 << 18):
            file.write(piece)
            print(f"\r{url}: {file.tell() / 1e6:.1f} MB", end="", flush=True)
    print()
    os.replace(path + ".part", path)


def download_missing(dataset, folder):
    """Brings those of the dataset's four files into `folder` that are not there yet."""
    os.makedirs(folder, exist_ok=True)
    for name in dataset.sha256:
        path = os.path.join(folder, name + ".gz")
        if not os.path.exists(path):
            try:
                download(dataset.home + name + ".gz", path)
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(f"{dataset.home}{name}.gz: {error}; fetch the four files yourself and name their "
                                 "folder with --images") from None


def read_content(folder, name):
    """(path, decompressed content) of the file `name` in `folder`: gzip'd or not, and with a dot before "idx" or not."""
    names = [name + end for name in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    path = next(filter(os.path.exists, (os.path.join(folder, name) for name in names)), os.path.join(folder, names[1]))
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            return path, file.read()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, nor without .gz, nor with .idx for -idx; without --images it is "
                         "downloaded") from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path}: damaged gzip file; delete it and fetch it again") from None


def idx_items(path, content, item_shape):
    """
    The bytes of an idx file of u8 items, each of `item_shape`: big-endian u32 magic, 0x800 + the number of dimensions,
    u32 per dimension, then the items. ValueError where the content is anything else.
    """
    header = struct.Struct(f">{2 + len(item_shape)}I")
    if len(content) < header.size:
        raise ValueError(f"{path}: only {len(content)} bytes, not an idx file; fetch it again")
    magic, count, *shape = header.unpack_from(content)
    if magic != 0x801 + len(item_shape) or tuple(shape) != item_shape:
        raise ValueError(f"{path}: not an idx file of {'28 x 28 images' if item_shape else 'labels'}; fetch it again")
    size = header.size + count * math.prod(item_shape)
    if len(content) != size or not count:
        raise ValueError(f"{path}: {len(content)} bytes where {count} items need {size}; fetch it again")
    return content[header.size:]


def read_split(dataset, folder, prefix, published):
    """
    (images, labels) of the split whose files start with `prefix`: bytes, 784 per image and 1 per label. With
    `published`, files that are not the published ones are an error, otherwise only worth a note.
    """
    items = []
    for name, item_shape in ((f"{prefix}-images-idx3-ubyte", (PIXELS, PIXELS)), (f"{prefix}-labels-idx1-ubyte", ())):
        path, content = read_content(folder, name)
        data = idx_items(path, content, item_shape)
        if hashlib.sha256(content).hexdigest() != dataset.sha256[name]:
            if published:
                raise ValueError(f"{path}: not the published file; delete it and run this again")
            print(f"note: {path} is not the published file, using it as it is")
        items.append(data)
    images, labels = items
    if len(images) != len(labels) * PIXELS * PIXELS:
        raise ValueError(f"{folder}: {len(images) // PIXELS ** 2} {prefix} images but {len(labels)} labels")
    if max(labels) > 9:
        raise ValueError(f"{folder}: a {prefix} label is {max(labels)}, labels are 0 to 9")
    return images, labels


# ----------------------------------------------------------------------------------------------------
# pictures as text

def picture(image, side):
    """The text of one image (784 bytes), as ASCII: `side` rows of `side` digits, each row ended by a newline."""
    k = PIXELS // side
    planes = []  # planes[k * i + j]: pixel (i, j) of every block
    for i in range(k):
        rows = b"".join(image[start:start + PIXELS] for start in range(i * PIXELS, len(image), k * PIXELS))
        planes += [rows[j::k] for j in range(k)]
    digits = bytes(map(BLOCK_DIGIT[k].__getitem__, map(sum, zip(*planes))))
    return b"".join(digits[start:start + side] + b"\n" for start in range(0, len(digits), side))


def block_digits(k):
    """For every possible sum of k x k pixels the ASCII code of its digit, floor(10 * sum / (256 * k * k))."""
    return bytes(ord("0") + 10 * total // (256 * k * k) for total in range(255 * k * k + 1))


BLOCK_DIGIT = {k: block_digits(k) for k in (1, 2, 4)}


# ----------------------------------------------------------------------------------------------------
# text as tokens

class Characters:
    """The nano vocabulary: one token per character."""

    def __init__(self):
        self.vocab = len(rigsa_file.ALPHABET)
        self.glyphs = dict(enumerate(rigsa_file.ALPHABET))
        self.ids = bytes.maketrans(rigsa_file.ALPHABET.encode(), bytes(range(self.vocab)))

    def examples(self, pictures, labels):
        """A list of (tokens, answer) for the pictures and their labels."""
        texts = (b"\n%s=%d\n" % pair for pair in zip(pictures, labels))
        return [(array("B", text.translate(self.ids)), len(text) - 2) for text in texts]


class Chat:
    """
    A Hugging Face tokenizer and its chat template. Tokenising every conversation takes some minutes; where digits and
    newlines are one token each, one prompt is tokenised, and each picture's tokens take the place of its picture's.
    """

    def __init__(self, folder, sentence):
        self.tokenizer = chat_template.load_tokenizer(folder)
        self.sentence = sentence
        self.vocab, _ = own_data.model_sizes(folder, self.tokenizer)
        self.type = rigsa_file.TOKEN_TYPES[rigsa_file.token_width(self.vocab)]
        self.ids = {ord(char): self.tokenizer.encode(char, add_special_tokens=False)[-1] for char in "0123456789\n"}
        self.glyphs = {token: chr(char) for char, token in self.ids.items()}

    def ask(self, text, label):
        """(prompt, answer), two arrays of tokens: the conversation about a picture, as the template has it."""
        conversation = [{"role": "user", "content": f"{self.sentence}\n{text.decode()}"},
                        {"role": "assistant", "content": str(label)}]
        prompt, answer = chat_template.split_turn(self.tokenizer, conversation)
        if (most := max(prompt + answer)) >= self.vocab:
            raise ValueError(f"{self.tokenizer.name_or_path}: the prompt needs token {most}, "
                             f"{self.tokenizer.convert_ids_to_tokens(most)!r}, and the model has {self.vocab}: add it "
                             "to the model (resize_token_embeddings) or use the tokenizer that belongs to it")
        return array(self.type, prompt), array(self.type, answer)

    def splicer(self, example, answers):
        """
        A function that guesses ask(picture, label) from a picture of the same size and the answers to it. The newline
        that ends the picture stays out of it: some templates cut it off.
        """
        frame, body = self.ask(example, 0)[0], self.characters(example)
        start = frame.tobytes().find(body.tobytes()) // frame.itemsize
        before, after = frame[:max(start, 0)], frame[start + len(body):]
        return lambda text, label: (before + self.characters(text) + after, answers[label])

    def characters(self, text):
        """The tokens of a picture without its last newline, one per character."""
        return array(self.type, map(self.ids.__getitem__, text[:-1]))

    def examples(self, pictures, labels):
        """A list of (tokens, answer) for the pictures and their labels."""
        answers = [self.ask(pictures[0], label)[1] for label in range(10)]
        if len({answer.tobytes() for answer in answers}) < 10:
            raise ValueError(f"{self.tokenizer.name_or_path}: this tokenizer has the same tokens for two digits")
        ask = self.splicer(pictures[0], answers)
        if any(ask(*pair) != self.ask(*pair) for pair in itertools.islice(zip(pictures, labels), SPLICE_CHECKS)):
            print("note: this tokenizer merges characters of a picture; tokenising everything, some minutes")
            ask = self.ask
        return [(prompt + answer, len(prompt)) for prompt, answer in map(ask, pictures, labels)]


# ----------------------------------------------------------------------------------------------------

def write_examples(path, tokens, images, labels, side, column=None):
    """
    Writes the data file `path`.bin and says so. With a `column` it is an evaluation by exact match, and another
    one, `path`_choice.bin, a choice among the ten labels: a model that answers in sentences is never exact.
    """
    def write(path, examples, *evaluation, **parts):
        sections = rigsa_file.data_sections(tokens.vocab, examples, tokens.glyphs, *evaluation, **parts)
        rigsa_file.write_file(path, "data", sections)
        print(f"{path}: {len(examples)} examples of {len(examples[0][0])} tokens, {os.path.getsize(path)} bytes")

    pictures = [picture(images[start:start + PIXELS ** 2], side) for start in range(0, len(images), PIXELS ** 2)]
    write(f"{path}.bin", tokens.examples(pictures, labels), column, "exact" if column else None)
    if column:
        ten = [text for text in pictures for _ in range(10)], [label for _ in pictures for label in range(10)]
        write(f"{path}_choice.bin", tokens.examples(*ten), f"{column}_choice", "acc",
              choices=[10] * len(labels), gold=list(labels), chars=[1] * len(ten[1]))


def write_splits(args):
    """Everything that the command line asks for."""
    dataset = DATASETS[args.dataset]
    tokens = Chat(args.tokenizer, dataset.sentence) if args.tokenizer else Characters()
    folder = args.images or os.path.join(args.out, args.dataset)
    if not args.images:
        download_missing(dataset, folder)
    os.makedirs(args.out, exist_ok=True)

    images, labels = read_split(dataset, folder, "train", published=not args.images)
    print(f"the first image, a {labels[0]}:\n{picture(images[:PIXELS ** 2], args.side).decode()}", end="")
    kept = len(labels) - args.heldout
    if kept < 1:
        raise ValueError(f"--heldout {args.heldout} leaves nothing of the {len(labels)} training images")

    def write(split, first, last, column=None):
        path = os.path.join(args.out, f"{args.dataset}_{args.side}_{split}")
        chosen = images[first * PIXELS ** 2:last * PIXELS ** 2]
        write_examples(path, tokens, chosen, labels[first:last], args.side, column)

    write("train", 0, min(kept, args.limit or kept))
    if args.heldout:
        write("heldout", kept, len(labels), f"{args.dataset}_heldout")
    images, labels = read_split(dataset, folder, "t10k", published=not args.images)
    write("test", 0, args.limit or len(labels), args.dataset)


def count(text):
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


@command.line
def main():
    parser = argparse.ArgumentParser(description="Textual MNIST: images as digits, as examples for train_rigsa.")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist", help="default: mnist")
    parser.add_argument("--side", type=int, choices=(28, 14, 7), default=28, help="rows and columns; default: 28")
    parser.add_argument("--tokenizer", metavar="DIR", help="write instruct prompts with this Hugging Face tokenizer")
    parser.add_argument("--out", metavar="DIR", default="data", help="where the files go; default: data")
    parser.add_argument("--images", metavar="DIR", help="the four idx files, gzip'd or not; default: download them")
    parser.add_argument("--heldout", metavar="N", type=count, default=0,
                        help="keep the last N training examples apart, as an evaluation for choosing settings")
    parser.add_argument("--limit", metavar="N", type=count, help="only the first N training and test images")
    write_splits(parser.parse_args())


if __name__ == "__main__":
    main()

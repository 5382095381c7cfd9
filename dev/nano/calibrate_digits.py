#!/usr/bin/env python3
"""
How hard are our digits? Two simple classifiers on the 49 numbers of a picture, trained on 20,000 of digits_train.bin.

    python3 dev/nano/calibrate_digits.py [folder with the four MNIST idx files, gzipped]

With a folder, the same for MNIST at side 7 (first 20,000 training images, all 10,000 test images) and how alike the
two sets' mistakes are. The numbers are in README.md. Needs numpy.
"""
import gzip
import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from rigsa_file import ALPHABET, read_examples  # noqa: E402

TRAIN = 20_000
PAIRS = np.triu_indices(10, 1)


def ours(name):
    """The digits of a data file in this folder: pixels (n, 49) from 0 to 9, labels (n)."""
    examples = read_examples(os.path.join(HERE, name))["examples"]
    texts = ["".join(ALPHABET[token] for token in tokens) for tokens, _ in examples]
    pixels = [[int(character) for character in text[:text.index("=")] if character != "\n"] for text in texts]
    return np.array(pixels[:TRAIN], np.float32), np.array([int(text[-2]) for text in texts[:TRAIN]])


def mnist(folder, part):
    """MNIST reduced to 7 x 7 by block means, each mean of 0..255 to a digit: pixels (n, 49), labels (n)."""
    def idx(kind, header):
        with gzip.open(os.path.join(folder, f"{part}-{kind}-ubyte.gz")) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)[:TRAIN * (28 * 28 if header == 16 else 1)]
    means = idx("images-idx3", 16).reshape(-1, 7, 4, 7, 4).mean((2, 4))
    return np.minimum(9, 10 * means // 256).reshape(-1, 49).astype(np.float32), idx("labels-idx1", 8).astype(int)


def logistic(pixels, labels, questions):
    """Multinomial logistic regression, 600 steps of full-batch gradient descent with momentum: the guesses."""
    def design(x):
        return np.hstack([x / 9, np.ones((len(x), 1), np.float32)])

    x, targets = design(pixels), np.eye(10, dtype=np.float32)[labels]
    weights, velocity = np.zeros((50, 10), np.float32), np.zeros((50, 10), np.float32)
    for _ in range(600):
        scores = x @ (weights + 0.95 * velocity)
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        velocity = 0.95 * velocity - 0.5 * (x.T @ (chances - targets) / len(x))
        weights += velocity
    return (design(questions) @ weights).argmax(1)


def nearest(pixels, labels, questions):
    """One nearest neighbour by Euclidean distance: the guesses."""
    squares = (pixels ** 2).sum(1)
    return np.concatenate([labels[(squares - 2 * part @ pixels.T).argmin(1)] for part in np.array_split(questions, 20)])


def mix_ups(guesses, labels):
    """For each of the 45 pairs of classes: how often one is taken for the other, as the sum of the two rates."""
    counts = np.zeros((10, 10))
    np.add.at(counts, (labels, guesses), 1)
    rates = counts / counts.sum(1, keepdims=True)
    return (rates + rates.T)[PAIRS]


def main():
    sets = {"ours": (ours("digits_train.bin"), ours("digits_test.bin"))}
    if len(sys.argv) > 1:
        sets["MNIST"] = (mnist(sys.argv[1], "train"), mnist(sys.argv[1], "t10k"))
    for classifier in (logistic, nearest):
        confusions = []
        for name, ((pixels, labels), (questions, truths)) in sets.items():
            guesses = classifier(pixels, labels, questions)
            confusions.append(mix_ups(guesses, truths))
            worst = ", ".join(f"{PAIRS[0][i]}/{PAIRS[1][i]}" for i in np.argsort(-confusions[-1])[:8])
            print(f"{name:6} {classifier.__name__:9} accuracy {(guesses == truths).mean():.3f}, most mixed up: {worst}")
        if len(confusions) == 2:
            print(f"correlation of the 45 mix-up rates {np.corrcoef(*confusions)[0, 1]:.2f}")
    for name, ((pixels, _), _) in sets.items():
        zeros, nines = (pixels == 0).mean(), (pixels == 9).mean()
        print(f"{name:6} mean pixel {pixels.mean():.2f}, zeros {zeros:.3f}, nines {nines:.3f}")


if __name__ == "__main__":
    main()

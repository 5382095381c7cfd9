"""
Makes a base file with random weights in the shape of a Hugging Face Llama: a full-size model without its checkpoint.

    python dev/random_base.py SmolLM2-135M/config.json 135M.base

Matrices are N(0, std^2), norm weights 1, as before training. The file is fp32: 4 bytes per weight, held in memory once.
"""
import argparse
import math

import command

import numpy as np

from hugging_face import llama_config, load_json
from rigsa_file import base_sections, tensor_shapes, write_file


def random_weights(config, std, seed):
    """All tensors end to end, as an array of little-endian fp32: matrices N(0, std^2), norms 1."""
    rng = np.random.default_rng(seed)
    shapes = tensor_shapes(config)
    weights = np.ones(sum(math.prod(shape) for _, shape in shapes), dtype="<f4")
    start = 0
    for _, shape in shapes:
        tensor = weights[start:start + math.prod(shape)]
        if len(shape) == 2:
            rng.standard_normal(out=tensor, dtype=np.float32)
            tensor *= np.float32(std)
        start += tensor.size
    return weights


@command.line
def main():
    parser = argparse.ArgumentParser(description="A base file with random weights, shaped as a Hugging Face Llama.")
    parser.add_argument("config", metavar="CONFIG.json", help="the config.json of the model")
    parser.add_argument("out", metavar="OUT", help="the base file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default 1)")
    parser.add_argument("--std", type=float, help="of the matrices (default: the config's initializer_range, or 0.02)")
    args = parser.parse_args()
    hf = load_json(args.config)
    config = llama_config(hf)
    std = hf.get("initializer_range", 0.02) if args.std is None else args.std
    weights = random_weights(config, std, args.seed)
    name = f"random weights of seed {args.seed} and deviation {std:g}"
    write_file(args.out, "base", base_sections(config, name, weights.view(np.uint8)))
    print(f"{args.out}: {weights.size} weights")


if __name__ == "__main__":
    main()

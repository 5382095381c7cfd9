"""
Makes a base file with random weights in the shape of a Hugging Face Llama: a full-size model without its checkpoint.

    python dev/random_base.py SmolLM2-135M/config.json 135M.base

Matrices are N(0, std^2), norm weights 1, as before training. The file is fp32: 4 bytes per weight, held in memory once.
"""
import argparse
import json
import math
import sys

import numpy as np

from rigsa_file import pack_config, tensor_shapes, write_file


def load_json(path):
    """The dict in the JSON file at `path`; ValueError, in one line, where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a config.json")
    return found


def llama_config(hf):
    """
    A Hugging Face config.json, as a dict, in the terms of rigsa.c: a dict with the keys of rigsa_file.CONFIG_FIELDS,
    dtype fp32. It may have the names of transformers 4 (rope_theta) or 5 (rope_parameters). ValueError where the model
    is not a plain Llama.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    plain = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in plain.items():
        if hf.get(key, value) != value:
            raise ValueError(f"'{key}' is {hf[key]!r}, rigsa.c knows only {value!r}")
    rope_type = rope.get("rope_type") or rope.get("type", "default")
    if rope_type != "default":
        raise ValueError(f"rope of type {rope_type!r}, rigsa.c knows only 'default'")
    try:
        heads = hf["num_attention_heads"]
        config = {
            "dim": hf["hidden_size"],
            "ffn": hf["intermediate_size"],
            "layers": hf["num_hidden_layers"],
            "heads": heads,
            "kv_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
            "vocab": hf["vocab_size"],
            "context": hf["max_position_embeddings"],
            "tied": int(hf["tie_word_embeddings"]),
            "dtype": 0,
            "theta": rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"],
            "eps": hf["rms_norm_eps"],
        }
    except KeyError as missing:
        raise ValueError(f"the model's config has no {missing}") from None
    if config["dim"] % heads or heads % config["kv_heads"] or config["head_dim"] % 2:
        raise ValueError(f"{config['dim']} channels, {heads} heads of {config['head_dim']} and {config['kv_heads']} "
                         "key/value heads do not make a Llama")
    return config


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


def main():
    parser = argparse.ArgumentParser(description="A base file with random weights, shaped as a Hugging Face Llama.")
    parser.add_argument("config", metavar="CONFIG.json", help="the config.json of the model")
    parser.add_argument("out", metavar="OUT", help="the base file to write")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default 1)")
    parser.add_argument("--std", type=float, help="of the matrices (default: the config's initializer_range, or 0.02)")
    args = parser.parse_args()
    try:
        hf = load_json(args.config)
        config = llama_config(hf)
        std = hf.get("initializer_range", 0.02) if args.std is None else args.std
        weights = random_weights(config, std, args.seed)
        write_file(args.out, "base", [
            ("config", pack_config(config)),
            ("name", f"random weights, seed {args.seed}, std {std:g}".encode()),
            ("weights", weights.view(np.uint8)),
        ])
    except (OSError, ValueError) as error:
        sys.exit(f"random_base.py: {error}")
    print(f"{args.out}: {weights.size} weights")


if __name__ == "__main__":
    main()

"""
Takes the LoRA of a rigsa.c base to PEFT and back (huggingface/peft: adapter_config.json,
adapter_model.safetensors).

    python dev/peft_files.py export out/lora.bin base.bin FOLDER       a folder for peft.PeftModel.from_pretrained
    python dev/peft_files.py import FOLDER base.bin lora.bin           for ./train_baselines --lora lora.bin

`base.bin` is the base that the adapter was made for: lora.bin names it by its hash. PEFT keeps A (r, in) and
B (out, r) in fp32, W = W0 + (lora_alpha / r) B A; lora.bin has B transposed (doc/model.md).
"""
import argparse
import os
import struct

import command

import numpy as np
from safetensors.numpy import save_file

from checkpoint import decode, write_json
from hugging_face import load_json, module_name
from rigsa_file import adapted_shapes, hash64, read_base, read_file, write_file
from safetensors_file import TYPES, read_safetensors

SHAPE = struct.Struct("<If")  # section `shape`: rank, alpha
DIFFERENT = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")  # not plain LoRA


def open_base(path):
    """Of the base file `path`: its config, a dict; its hash and name as in section `base`."""
    config, name, weights = read_base(path)
    return config, struct.pack("<Q", hash64(weights)) + name.encode(errors="surrogateescape")


def key(name, part):
    """The name that PEFT gives to `part`, A or B, of matrix `name`."""
    return f"base_model.model.{module_name(name)}.lora_{part}.weight"


def read_lora(path, shapes):
    """
    The lora file `path`: alpha, and a dict, matrix name -> (A (r, in), B (out, r)); `shapes` as of
    adapted_shapes.
    """
    sections = read_file(path, "lora")
    rank, alpha = SHAPE.unpack(sections["shape"])
    values, at, parts = np.frombuffer(sections["values"], "<f4"), 0, {}
    if values.size != rank * sum(sum(shape) for _, shape in shapes):
        raise ValueError(f"{path}: does not fit the matrices of this base")
    for name, (rows, cols) in shapes:
        a, b = values[at:at + rank * cols], values[at + rank * cols:at + rank * (rows + cols)]
        parts[name] = a.reshape(rank, cols), b.reshape(rank, rows).T
        at += rank * (rows + cols)
    return alpha, parts


def export_peft(lora, base, folder):
    """Writes the adapter `lora` of `base` as a PEFT folder."""
    config, named = open_base(base)
    shapes = adapted_shapes(config)
    alpha, parts = read_lora(lora, shapes)
    if read_file(lora, "lora")["base"] != named:
        raise ValueError(f"{lora}: was not made for {base}")
    os.makedirs(folder, exist_ok=True)
    tensors = {}
    for name, (a, b) in parts.items():
        for part, values in (("A", a), ("B", b)):
            tensors[key(name, part)] = np.ascontiguousarray(values)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    write_json(os.path.join(folder, "adapter_config.json"), {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": len(a), "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted({module_name(name).split(".")[-1] for name, _ in shapes}),
        "base_model_name_or_path": named[8:].decode(), "inference_mode": True,
    })
    if config["dtype"]:
        print("note: trained on weights in bf16; on a model whose own are in fp32 the adapter gives other "
              "logits")


def import_peft(folder, base, lora):
    """
    Writes the PEFT folder as a lora file of `base`. A matrix without a LoRA gets A = B = 0, which no gradient
    moves.
    """
    base_config, named = open_base(base)
    shapes = adapted_shapes(base_config)
    config = load_json(os.path.join(folder, "adapter_config.json"))
    if config.get("peft_type") != "LORA" or any(config.get(field) for field in DIFFERENT):
        raise ValueError(f"{folder}: not a plain LoRA: {[field for field in DIFFERENT if config.get(field)]}")
    tensors = read_safetensors(os.path.join(folder, "adapter_model.safetensors"))
    if not {"r", "lora_alpha"} <= config.keys():
        raise ValueError(f"{folder}: its adapter_config.json has no r or no lora_alpha")
    rank = config["r"]
    alpha = config["lora_alpha"] * (rank ** 0.5 if config.get("use_rslora") else 1)
    values = []

    def part(name, letter, shape):
        kind, _, found = tensors.pop(key(name, letter), ("F32", shape, np.zeros(shape, "<f4")))
        if kind not in TYPES:
            raise ValueError(f"{folder}: {name} is of type {kind}, only {', '.join(sorted(TYPES))} can be "
                             "read")
        return decode(found, kind)

    for name, (rows, cols) in shapes:
        a, b = part(name, "A", (rank, cols)), part(name, "B", (rows, rank))
        if a.shape != (rank, cols) or b.shape != (rows, rank):
            raise ValueError(f"{folder}: {name} is {b.shape} {a.shape}, {base} needs {(rows, rank)} {(rank, cols)}")
        values += [a.ravel(), b.T.ravel()]
    if tensors:
        raise ValueError(f"{folder}: {next(iter(tensors))} has no place in {base}")
    write_file(lora, "lora", [("base", named), ("settings", b""), ("shape", SHAPE.pack(rank, alpha)),
                              ("values", np.concatenate(values).astype("<f4").tobytes())])


@command.line
def main():
    parser = argparse.ArgumentParser(description="LoRA adapters between rigsa.c and PEFT.")
    parser.add_argument("action", choices=("export", "import"))
    parser.add_argument("source", help="export: lora.bin; import: the PEFT folder")
    parser.add_argument("base", help="base file")
    parser.add_argument("target", help="export: the PEFT folder; import: lora.bin")
    args = parser.parse_args()
    (export_peft if args.action == "export" else import_peft)(args.source, args.base, args.target)


if __name__ == "__main__":
    main()

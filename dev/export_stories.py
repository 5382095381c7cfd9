"""
Converts stories260K, a real llama of 260,000 parameters with grouped-query attention, into a base file for rigsa.c.

    python dev/export_stories.py stories260K.bin tok512.bin stories260K.base

The two inputs are at https://huggingface.co/karpathy/tinyllamas, folder stories260K (MIT). A version-0 checkpoint of
llama2.c is a header of 7 int32 and then fp32 tensors, each kind for all layers together. Three things differ from a
base file (doc/model.md): the order of the tensors; the rows of q and k, whose rotary pairs are adjacent here,
(2i, 2i + 1), and half a head apart there, (i, i + D/2); and what this header leaves out, theta 10000 and eps 1e-5.

The section `pieces` is the vocabulary as its file has it: per token a u32 length and that many bytes.
"""
import argparse
import math
import os
import struct

import command

import rigsa_file

HEADER = struct.Struct("<7i")  # dim, ffn, layers, heads, kv_heads, vocab (negative: a head of its own), context


def read_config(path, checkpoint):
    """The base file's config from a version-0 checkpoint's header. ValueError where it is not one."""
    if len(checkpoint) < HEADER.size:
        raise ValueError(f"{path}: only {len(checkpoint)} bytes, not a llama2.c checkpoint")
    dim, ffn, layers, heads, kv_heads, vocab, context = HEADER.unpack_from(checkpoint)
    if min(dim, ffn, layers, heads, kv_heads, context, abs(vocab)) < 1 or dim % heads or heads % kv_heads:
        raise ValueError(f"{path}: not a version-0 checkpoint of llama2.c")
    return dict(dim=dim, ffn=ffn, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=dim // heads,
                vocab=abs(vocab), context=context, tied=int(vocab > 0), dtype=0, theta=10000.0, eps=1e-5)


def read_tensors(path, checkpoint, config):
    """A dict, name in the base file -> bytes of fp32, from the tensors of a version-0 checkpoint in its own order."""
    shapes = dict(rigsa_file.tensor_shapes(config))
    layers = range(config["layers"])
    names = ["embed"]
    for kind in ("attn_norm", "q", "k", "v", "o", "ffn_norm", "gate", "down", "up"):
        names += [f"{layer}.{kind}" for layer in layers]
    names += ["final_norm", "rotary"]
    shapes["rotary"] = (config["context"], config["head_dim"])  # cosines and sines: read over, rigsa.c computes its own
    if not config["tied"]:
        names.append("head")

    tensors, start = {}, HEADER.size
    for name in names:
        end = start + 4 * math.prod(shapes[name])
        tensors[name] = checkpoint[start:end]
        start = end
    if start != len(checkpoint):
        raise ValueError(f"{path}: {len(checkpoint)} bytes where its header asks for {start}; fetch it again")
    return tensors


def half_split(matrix, heads, head_dim):
    """The (heads * head_dim, dim) bytes of q or k, per head the even rows first, then the odd ones."""
    row = len(matrix) // (heads * head_dim)
    rows = [matrix[start:start + row] for start in range(0, len(matrix), row)]
    out = []
    for first in range(0, len(rows), head_dim):
        head = rows[first:first + head_dim]
        out += head[0::2] + head[1::2]
    return b"".join(out)


def read_pieces(path, vocab):
    """
    The payload of `pieces` from a tokenizer of llama2.c: i32 longest piece, then per token f32 score, i32 length,
    bytes. ValueError where it is not the one of a model with `vocab` tokens.
    """
    with open(path, "rb") as file:
        content = file.read()
    pieces, at = [], 4
    while len(pieces) < vocab and at + 8 <= len(content):
        _, length = struct.unpack_from("<fI", content, at)
        at += 8 + length
        pieces.append(struct.pack("<I", length) + content[at - length:at])
    if len(pieces) != vocab or at != len(content):
        raise ValueError(f"{path}: not the llama2.c tokenizer of a model with {vocab} tokens; fetch the model's own")
    return b"".join(pieces)


def export(checkpoint_path, tokenizer_path, out):
    """Writes the base file `out`."""
    with open(checkpoint_path, "rb") as file:
        checkpoint = file.read()
    config = read_config(checkpoint_path, checkpoint)
    tensors = read_tensors(checkpoint_path, checkpoint, config)
    for layer in range(config["layers"]):
        for name, heads in ((f"{layer}.q", config["heads"]), (f"{layer}.k", config["kv_heads"])):
            tensors[name] = half_split(tensors[name], heads, config["head_dim"])
    rigsa_file.write_file(out, "base", [
        ("config", rigsa_file.pack_config(config)),
        ("name", os.path.splitext(os.path.basename(checkpoint_path))[0].encode()),
        ("weights", b"".join(tensors[name] for name, _ in rigsa_file.tensor_shapes(config))),
        ("pieces", read_pieces(tokenizer_path, config["vocab"])),
    ])
    weights = sum(math.prod(shape) for _, shape in rigsa_file.tensor_shapes(config))
    print(f"{out}: {weights} weights, {os.path.getsize(out)} bytes")


@command.line
def main():
    parser = argparse.ArgumentParser(description="A llama2.c checkpoint (version 0) as a base file for rigsa.c.")
    parser.add_argument("checkpoint", help="stories260K.bin")
    parser.add_argument("tokenizer", help="tok512.bin")
    parser.add_argument("out", help="the base file to write")
    args = parser.parse_args()
    export(args.checkpoint, args.tokenizer, args.out)


if __name__ == "__main__":
    main()

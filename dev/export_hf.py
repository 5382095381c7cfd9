"""
Converts a Llama into a base file for rigsa.c.

    python dev/export_hf.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2.bin     from the hub
    python dev/export_hf.py FOLDER smollm2.bin --dtype fp32                     a local folder
    python dev/export_hf.py MODEL.gguf smollm2.bin --hf FOLDER                  a GGUF file; makes FOLDER, too

A folder is config.json and safetensors files, one or several, in bf16, fp16 or fp32; a GGUF file may be
quantised. doc/smollm2.md lists what is refused. Weights are read, converted and written a few million at a
time, so that memory does not grow with the model.

With --hf the model becomes a folder of Hugging Face, too: safetensors, config.json, tokenizer and chat
template, for prepro_mnist.py, dev/prepro_eval.py, dev/import_hf.py and transformers.
"""
import argparse
import math
import os

import command

from checkpoint import DTYPES, TEXTS, Folder, write_folder, write_model
from hugging_face import refuse_file
from rigsa_file import pack_config, tensor_shapes, write_file

NAME_SIZE = 63  # bytes that train_rigsa has room for


def find_folder(model):
    """
    The folder of a model: `model` itself, or that of the hub's model of this name, downloaded if it is not
    there.
    """
    refuse_file(model)
    if os.path.isdir(model):
        return model
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(model, allow_patterns=["model*.safetensors", *TEXTS])
    except Exception as error:  # of the hub, of the network, of the disk: there are many kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model}: no folder, and no model of the hub can be had by this name: "
                         f"{reason}") from None


def open_checkpoint(model):
    """The checkpoint of a folder, a GGUF file, or a name of the hub."""
    if os.path.isfile(model) or model.endswith(".gguf") and not os.path.isdir(model):
        from gguf_model import Gguf
        return Gguf(model)
    return Folder(find_folder(model))


def model_name(model):
    """
    What to call a model: its name at the hub, or that of its folder or file; at most NAME_SIZE bytes of
    UTF-8. What train_rigsa does not take in a name (it stands in CSV and JSON) becomes an underscore.
    """
    name = os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model
    name = "".join("_" if char < " " or char in ',"\\\x7f' else char for char in name.removesuffix(".gguf"))
    return name.encode(errors="replace")[:NAME_SIZE].decode(errors="ignore").encode()


def export(model, out, dtype=None, folder=None):
    """Writes the base file `out`, and before it the Hugging Face folder, if one is named."""
    checkpoint, name = open_checkpoint(model), model_name(model)
    dtype = dtype or checkpoint.dtype
    if folder:
        write_folder(folder, lambda path: write_model(path, checkpoint, dtype))
        print(f"{folder}: the model for transformers, in {dtype}")
    config = checkpoint.config | {"dtype": list(DTYPES).index(dtype)}
    hashes = write_file(out, "base", [
        ("config", pack_config(config)), ("name", name), ("weights", checkpoint.weights(dtype))])
    count = sum(math.prod(shape) for _, shape in tensor_shapes(config))
    print(f"{out}: {name.decode()}, {count} weights in {dtype}, hash {hashes['weights']:016x}")


@command.line
def main():
    parser = argparse.ArgumentParser(description="A Llama of Hugging Face or llama.cpp as a base file.")
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors, a GGUF "
                        "file, or a hub name")
    parser.add_argument("out", metavar="OUT", help="the base file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 where all weights are stored so, "
                        "fp32 otherwise")
    parser.add_argument("--hf", metavar="FOLDER", help="make this folder of Hugging Face from the model")
    args = parser.parse_args()
    export(args.model, args.out, args.dtype, args.hf)


if __name__ == "__main__":
    main()

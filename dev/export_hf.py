"""
Converts a Llama of Hugging Face into a base file for rigsa.c.

    python dev/export_hf.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2.bin     a model of the hub, downloaded if need be
    python dev/export_hf.py FOLDER smollm2.bin --dtype fp32                     a local folder

The model is config.json and safetensors files, one or several, in bf16, fp16 or fp32; doc/smollm2.md lists what is
refused. Weights are read, converted and written a few million at a time, so that memory does not grow with the model.
"""
import argparse
import math
import os
import sys

import torch
from safetensors import SafetensorError, safe_open

from hugging_face import llama_config, load_json, hugging_face_name
from rigsa_file import pack_config, tensor_shapes, write_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # in the order of their numbers in a base file
STORED = ("BF16", "F16", "F32")  # as safetensors calls what can be read
TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")  # what a model's folder holds besides weights: config, tokenizer
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
PIECE = 1 << 22  # weights at a time


def find_folder(model):
    """The folder of a model: `model` itself, or that of the hub's model of this name, downloaded if it is not there."""
    if os.path.isdir(model):
        return model
    try:
        from huggingface_hub import snapshot_download
        return snapshot_download(model, allow_patterns=["model*.safetensors", *TEXTS])
    except Exception as error:  # of the hub, of the network, of the disk: there are many kinds
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model}: no folder, and no model of the hub can be had by this name: {reason}") from None


class Checkpoint:
    """
    The weights of a Hugging Face folder, open for reading. `config`: as of llama_config. `files`: a dict, file name ->
    safetensors handle. `home`: a dict, name of a tensor in its file -> that handle. `names`: a dict, name of a tensor
    in its file -> name in rigsa.c. `dtype`: bf16 where all are stored so, fp32 otherwise. ValueError, in one line,
    where this is not the whole of a plain Llama.
    """

    def __init__(self, folder):
        self.folder = folder
        path = os.path.join(folder, "config.json")
        try:
            self.config = llama_config(load_json(path))
        except ValueError as error:
            raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from None
        self.files = {name: self.open_file(name) for name in self.file_names()}
        self.home = {name: file for file in self.files.values() for name in file.keys()}
        self.names = {hugging_face_name(name): name for name, _ in tensor_shapes(self.config)}
        if self.config["tied"] and hugging_face_name("head") in self.home:
            self.names[hugging_face_name("head")] = "embed"
        self.check_tensors()

    def file_names(self):
        """The names of the safetensors files, sorted."""
        path = os.path.join(self.folder, INDEX)
        if not os.path.exists(path):
            return [WHOLE]
        index = load_json(path).get("weight_map")
        if not isinstance(index, dict):
            raise ValueError(f"{path}: has no weight_map; download it again")
        return sorted(set(index.values()))

    def open_file(self, name):
        """A handle on the file `name` of the folder."""
        path = os.path.join(self.folder, name)
        try:
            return safe_open(path, framework="pt")
        except OSError:
            raise ValueError(f"{path}: no such file; download it, or save the model as safetensors") from None
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged or cut off ({error}); download it again") from None

    def check_tensors(self):
        """Every tensor is there, has its shape and a type that can be read, and there are no others."""
        def check(good, wrong):
            if not good:
                raise ValueError(f"{self.folder}: {wrong}")

        for name in sorted(self.home):
            check(not name.endswith(".bias"), f"has biases, '{name}'; rigsa.c knows none")
            check(name in self.names or name.endswith(".rotary_emb.inv_freq"),  # constants that old versions stored
                  f"has a tensor that no plain Llama has, '{name}'")
        shapes, types = dict(tensor_shapes(self.config)), set()
        for stored, name in self.names.items():
            check(stored in self.home, f"'{stored}' is in none of its safetensors files; download it again")
            tensor = self.home[stored].get_slice(stored)
            shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
            check(shape == shapes[name], f"'{stored}' has shape {shape}, config.json asks for {shapes[name]}")
            check(dtype in STORED, f"'{stored}' is of type {dtype}, only {', '.join(STORED)} can be read")
            types.add(dtype)
        self.dtype = "bf16" if types == {"BF16"} else "fp32"
        if hugging_face_name("head") in self.names and self.config["tied"]:
            head, embed = (self.home[name].get_tensor(name) for name in map(hugging_face_name, ("head", "embed")))
            check(torch.equal(head, embed), "'tie_word_embeddings' is true, but lm_head and embed_tokens differ")

    def weights(self, dtype):
        """The payload of section `weights`, an iterator over pieces of it."""
        for name, shape in tensor_shapes(self.config):
            stored = hugging_face_name(name)
            tensor = self.home[stored].get_slice(stored)
            rows = max(1, PIECE * shape[0] // math.prod(shape))
            for start in range(0, shape[0], rows):
                piece = tensor[start:min(start + rows, shape[0])].to(DTYPES[dtype])
                yield piece.contiguous().view(torch.uint8).numpy()


def model_name(model):
    """What to call a model: its name at the hub, or that of its folder; at most 63 bytes."""
    name = os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
    return name.encode()[:63]


def export(model, out, dtype=None):
    """Writes the base file `out`."""
    checkpoint, name = Checkpoint(find_folder(model)), model_name(model)
    dtype = dtype or checkpoint.dtype
    config = checkpoint.config | {"dtype": list(DTYPES).index(dtype)}
    hashes = write_file(out, "base", [
        ("config", pack_config(config)), ("name", name), ("weights", checkpoint.weights(dtype))])
    count = sum(math.prod(shape) for _, shape in tensor_shapes(config))
    print(f"{out}: {name.decode()}, {count} weights in {dtype}, hash {hashes['weights']:016x}")


def main():
    parser = argparse.ArgumentParser(description="A Llama of Hugging Face as a base file for rigsa.c.")
    parser.add_argument("model", metavar="MODEL", help="a folder with config.json and safetensors, or a hub name")
    parser.add_argument("out", metavar="OUT", help="the base file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 where all weights are stored so, fp32 otherwise")
    args = parser.parse_args()
    try:
        export(args.model, args.out, args.dtype)
    except (OSError, ValueError) as error:
        sys.exit(f"export_hf.py: {error}")


if __name__ == "__main__":
    main()

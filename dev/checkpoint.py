"""
The weights of a plain Llama, in a Hugging Face folder or (gguf_model.py) in a GGUF file, in the order and the
types of rigsa.c; and a Hugging Face folder written from them. Weights are read and converted in pieces, so
that memory does not grow with the model.
"""
import glob
import json
import math
import os
import shutil

import numpy as np

from hugging_face import hugging_face_name, llama_config, load_json
from rigsa_file import tensor_shapes
from safetensors_file import TYPES, read_safetensors, write_safetensors

# in the order of their numbers in a base file; as safetensors calls them
DTYPES = {"fp32": "F32", "bf16": "BF16"}
NAMES = {"fp32": "float32", "bf16": "bfloat16"}  # as config.json calls them
TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")  # what a folder holds besides weights: config, tokenizer
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
PIECE = 1 << 22  # weights at a time


# ----------------------------------------------------------------------------------------------------
# numbers

def encode(values, dtype):
    """
    fp32 values as the little-endian bytes of `dtype`, an array: rounded to the nearest, ties to even; NaN
    stays one.
    """
    if dtype == "fp32":
        return np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, rounded).astype("<u2").view(np.uint8)


def decode(values, kind):
    """Values stored as safetensors' type `kind`, an array of TYPES[kind], in fp32; the same shape."""
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def rounded(values, dtype):
    """fp32 values rounded to `dtype`, in fp32; the same shape."""
    return decode(encode(values, dtype).view(TYPES[DTYPES[dtype]]), DTYPES[dtype]).reshape(values.shape)


# ----------------------------------------------------------------------------------------------------
# models

class Checkpoint:
    """
    The weights of a plain Llama, open for reading. `source`: the file or folder. `config`: as of
    llama_config. `dtype`: bf16 where that holds all weights exactly as they are stored, fp32 otherwise.
    `names`: a dict, name in Hugging Face -> name in rigsa.c. `files`: the files of a folder to write, a dict,
    file name -> list of names in Hugging Face.
    """

    def rows(self, name, start=0, stop=None):
        """Rows of tensor `name` of rigsa.c, in fp32."""
        raise NotImplementedError

    def write_texts(self, folder, dtype):
        """
        Writes what a folder holds besides weights: config, tokenizer. `dtype` is what its weights are stored
        in.
        """
        raise NotImplementedError

    def weights(self, dtype):
        """The payload of section `weights`, an iterator over pieces of it."""
        for name, shape in tensor_shapes(self.config):
            step = max(1, PIECE * shape[0] // math.prod(shape))
            for start in range(0, shape[0], step):
                yield encode(self.rows(name, start, start + step), dtype)


class Folder(Checkpoint):
    """
    A folder with config.json and safetensors. `stored`: a dict, name in Hugging Face -> (type, shape, array).
    ValueError, in one line, where this is not the whole of a plain Llama.
    """

    def __init__(self, folder):
        self.source = folder
        path = os.path.join(folder, "config.json")
        try:
            self.config = llama_config(load_json(path))
        except ValueError as error:
            raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from None
        found = {name: read_safetensors(os.path.join(folder, name)) for name in self.file_names()}
        self.stored = {}
        for file_name, tensors in found.items():
            for name in tensors.keys() & self.stored.keys():
                raise ValueError(f"{folder}: '{name}' is in {file_name} and in another file; "
                                 "download it again")
            self.stored |= tensors
        self.names = {hugging_face_name(name): name for name, _ in tensor_shapes(self.config)}
        if self.config["tied"] and hugging_face_name("head") in self.stored:
            self.names[hugging_face_name("head")] = "embed"
        self.check_tensors()
        self.files = {file_name: [name for name in tensors if name in self.names]
                      for file_name, tensors in found.items()}

    def file_names(self):
        """The names of the safetensors files: as transformers has it, a whole one hides shards beside it."""
        path = os.path.join(self.source, INDEX)
        if os.path.exists(os.path.join(self.source, WHOLE)) or not os.path.exists(path):
            return [WHOLE]
        index = load_json(path).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            raise ValueError(f"{path}: has no weight_map; download it again")
        return sorted(set(index.values()))

    def check_tensors(self):
        """Every tensor is there, has its shape and a type that can be read, and there are no others."""
        def check(good, wrong):
            if not good:
                raise ValueError(f"{self.source}: {wrong}")

        for name in sorted(self.stored):
            check(not name.endswith(".bias"), f"has biases, '{name}'; rigsa.c knows none")
            constant = name.endswith(".rotary_emb.inv_freq")  # old versions stored it
            check(name in self.names or constant,
                  f"has a tensor that no plain Llama has, '{name}'")
        shapes, types = dict(tensor_shapes(self.config)), set()
        for stored, name in self.names.items():
            check(stored in self.stored, f"'{stored}' is in none of its safetensors files; download it again")
            kind, shape, _ = self.stored[stored]
            check(shape == shapes[name], f"'{stored}' has shape {shape}, config.json asks for {shapes[name]}")
            check(kind in TYPES, f"'{stored}' is of type {kind}, only {', '.join(sorted(TYPES))} can be read")
            types.add(kind)
        self.dtype = "bf16" if types == {"BF16"} else "fp32"
        if self.names.get(hugging_face_name("head")) == "embed":
            head, embed = (self.stored[hugging_face_name(name)] for name in ("head", "embed"))
            check(np.array_equal(decode(head[2], head[0]), decode(embed[2], embed[0])),
                  "'tie_word_embeddings' is true, but lm_head and embed_tokens differ")

    def rows(self, name, start=0, stop=None):
        kind, _, values = self.stored[hugging_face_name(name)]
        return decode(values[start:stop], kind)

    def write_texts(self, folder, dtype):
        for pattern in TEXTS:
            for path in glob.glob(os.path.join(glob.escape(self.source), pattern)):
                if os.path.basename(path) != INDEX:
                    shutil.copyfile(path, os.path.join(folder, os.path.basename(path)))
        config = load_json(os.path.join(folder, "config.json"))
        for field in [field for field in ("torch_dtype", "dtype") if field in config] or ["torch_dtype"]:
            config[field] = NAMES[dtype]
        write_json(os.path.join(folder, "config.json"), config)


# ----------------------------------------------------------------------------------------------------
# folders

def write_json(path, content):
    """Writes `content` as a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def write_folder(out, fill):
    """
    Makes the folder `out` with what fill(folder) writes there; whatever happens, it is all there or not at
    all.
    """
    if os.path.exists(out):
        raise ValueError(f"{out} is there already; name another folder, or remove it")
    temporary = f"{out.rstrip(os.sep)}.{os.getpid()}.tmp"
    os.makedirs(temporary)
    try:
        fill(temporary)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_model(folder, checkpoint, dtype, change=lambda name, values: values):
    """
    Writes the model into `folder` as Hugging Face has it, a tensor in memory at a time. change(name, values)
    makes of a tensor in fp32 what is to be stored.
    """
    checkpoint.write_texts(folder, dtype)
    shapes, total, home = dict(tensor_shapes(checkpoint.config)), 0, {}

    def pieces(name):
        yield encode(change(name, checkpoint.rows(name)), dtype)

    for file_name, stored_names in checkpoint.files.items():
        tensors = [(stored, DTYPES[dtype], shapes[name], pieces(name))
                   for stored, name in ((stored, checkpoint.names[stored]) for stored in stored_names)]
        write_safetensors(os.path.join(folder, file_name), tensors)
        total += sum(math.prod(shape) for _, _, shape, _ in tensors) * TYPES[DTYPES[dtype]].itemsize
        home.update(dict.fromkeys(stored_names, file_name))
    if list(checkpoint.files) != [WHOLE]:
        write_json(os.path.join(folder, INDEX), {"metadata": {"total_size": total}, "weight_map": home})

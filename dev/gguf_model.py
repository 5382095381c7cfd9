"""
A plain Llama in a GGUF file, llama.cpp's format: its weights, config and tokenizer in the terms of rigsa.c
and Hugging Face. The package gguf reads the file and dequantises it.
"""
import math
import os

import numpy as np
from gguf import GGUFReader, dequantize

from checkpoint import NAMES, WHOLE, Checkpoint, write_json
from gguf_tokenizer import tokenizer_files
from hugging_face import hugging_face_name, llama_config
from rigsa_file import tensor_shapes

TENSORS = {  # name in rigsa.c, without its layer -> in a GGUF file
    "embed": "token_embd", "final_norm": "output_norm", "head": "output",
    "attn_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}
FIELDS = {  # metadata, after `llama.` -> config.json
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers", "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "context_length": "max_position_embeddings",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta", "vocab_size": "vocab_size",
}
PLAIN = {  # further metadata that change what a Llama computes: the only value that rigsa.c knows
    "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0,
    "attention.sliding_window": 0, "attention.causal": True, "expert_count": 0, "expert_used_count": 0,
}
IGNORED = {"tensor_data_layout"}


def gguf_name(name):
    """The name of tensor `name` of rigsa.c in a GGUF file."""
    layer, _, part = name.rpartition(".")
    return (f"blk.{layer}." if layer else "") + TENSORS[part] + ".weight"


def read_gguf(path):
    """
    The GGUF file at `path`: its metadata, a dict: key -> value, and a dict: name -> gguf.ReaderTensor.
    ValueError, in one line, where it cannot be read.
    """
    with open(path, "rb") as file:
        magic, version = file.read(4), file.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file")
    if len(version) == 4 and int.from_bytes(version, "little") & 0xFFFF == 0:
        raise ValueError(f"{path}: big-endian; run gguf-convert-endian {path} little")
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        return metadata, {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: damaged, cut off, or of a type that the package gguf does not know "
                         f"({reason}); download it again, or pip install -U gguf") from None


def hugging_face_config(metadata):
    """
    config.json, as a dict, from a GGUF file's metadata, a dict: key -> value. Numbers stored in fp32 become
    the shortest that round to them, as in the config they came from. ValueError, which names the key, where
    it is no plain Llama.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"'general.architecture' is {architecture!r}, rigsa.c knows only 'llama'")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"one of {metadata['split.count']} parts; join them with llama.cpp's gguf-split "
                         "--merge")
    found = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    missing = [key for key in FIELDS if key not in found]
    if missing:
        raise ValueError(f"has no 'llama.{missing[0]}' in its metadata; download it again")
    hf = {field: found[key] for key, field in (FIELDS | OPTIONAL).items() if key in found}
    hf = {field: float(str(np.float32(value))) if isinstance(value, float) else value
          for field, value in hf.items()}
    ids = {f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
           for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
           if f"tokenizer.ggml.{key}_token_id" in metadata}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"} | hf | ids


def check_metadata(metadata, head_dim):
    """ValueError where a GGUF file's metadata say something of a Llama that rigsa.c does not know."""
    plain = PLAIN | {"attention.value_length": head_dim, "rope.dimension_count": head_dim}
    for key in metadata:
        field = key.removeprefix("llama.")
        if field == key or field in FIELDS or field in OPTIONAL or field in IGNORED:
            continue
        if field not in plain:
            raise ValueError(f"has '{key}' in its metadata, {metadata[key]!r}, which no plain Llama has")
        if metadata[key] != plain[field]:
            raise ValueError(f"'{key}' is {metadata[key]!r}, rigsa.c knows only {plain[field]!r}")


class Gguf(Checkpoint):
    """A GGUF file. ValueError, in one line, where it is not the whole of a plain Llama."""

    def __init__(self, path):
        self.source = path
        self.metadata, self.tensors = read_gguf(path)
        try:
            self.hf = hugging_face_config(self.metadata)
            self.hf["tie_word_embeddings"] = gguf_name("head") not in self.tensors
            if gguf_name("embed") in self.tensors:
                self.hf.setdefault("vocab_size", int(self.tensors[gguf_name("embed")].shape[-1]))
            self.config = llama_config(self.hf)
            check_metadata(self.metadata, self.config["head_dim"])
            self.check_tensors()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        self.names = {hugging_face_name(name): name for name, _ in tensor_shapes(self.config)}
        self.files = {WHOLE: list(self.names)}

    def check_tensors(self):
        """Every tensor is there, has its shape and a type that can be read, and there are no others."""
        shapes = {gguf_name(name): shape for name, shape in tensor_shapes(self.config)}
        for name in self.tensors:
            if name.endswith(".bias"):
                raise ValueError(f"has biases, '{name}'; rigsa.c knows none")
            if name.startswith("rope_"):
                raise ValueError(f"has scaled rotary positions, '{name}'; rigsa.c knows none")
            if name not in shapes:
                raise ValueError(f"has a tensor that no plain Llama has, '{name}'")
        exact = True
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise ValueError(f"'{name}' is not in it; download it again")
            tensor = self.tensors[name]
            found = tuple(reversed(tensor.shape.tolist()))
            if found != shape:
                raise ValueError(f"'{name}' has shape {found}, its metadata ask for {shape}")
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ValueError(f"'{name}' is of type {tensor.tensor_type.name}, which the package gguf "
                                 "cannot dequantise") from None
            if tensor.tensor_type.name == "F32" and len(shape) == 1:  # llama.cpp keeps norms in fp32
                exact &= not np.any(tensor.data.view(np.uint32) & 0xFFFF)
            else:
                exact &= tensor.tensor_type.name == "BF16"
        self.dtype = "bf16" if exact else "fp32"

    def rows(self, name, start=0, stop=None):
        tensor = self.tensors[gguf_name(name)]
        heads = self.config.get({"q": "heads", "k": "kv_heads"}.get(name.rpartition(".")[2]))
        if heads:  # llama.cpp rotates neighbours, transformers the halves of a head
            order = np.arange(len(tensor.data)).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
            return dequantize(tensor.data[order[start:stop]], tensor.tensor_type)
        return dequantize(tensor.data[start:stop], tensor.tensor_type)

    def write_texts(self, folder, dtype):
        try:
            texts = tokenizer_files(self.metadata)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None
        texts["config.json"] = self.hf | {"torch_dtype": NAMES[dtype]}
        for name, content in texts.items():
            write_json(os.path.join(folder, name), content)

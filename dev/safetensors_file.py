"""
Models in safetensors files with numpy alone. The package's own numpy interface knows no bf16, and writes only
what is in memory; here bf16 is its 16 bits, tensors are read where they lie in the file, and written in
pieces.

Layout: u64 n; n bytes of JSON, a dict: name -> type, shape, place; the values. Everything is little-endian.
"""
import json
import math
import struct

import numpy as np
from safetensors import SafetensorError, safe_open

# by their names in safetensors
TYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_safetensors(path):
    """
    The tensors in the file at `path`: a dict, name -> (type, shape, array); the array is mapped from the
    file, or None where its type is not one of TYPES. ValueError, in one line, where it is not a whole
    safetensors file.
    """
    try:
        safe_open(path, framework="np")  # checks the header, and that the tensors fill the file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or cut off ({error}); download it again") from None
    except OSError:
        raise ValueError(f"{path}: no such file; download it, or save the model as safetensors") from None
    data = np.memmap(path, np.uint8, "r")
    start = 8 + struct.unpack("<Q", data[:8])[0]
    found = {}
    for name, tensor in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__":
            kind, shape, (first, last) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
            values = data[start + first:start + last]
            found[name] = kind, shape, values.view(TYPES[kind]).reshape(shape) if kind in TYPES else None
    return found


def write_safetensors(path, tensors):
    """Writes `tensors`, a list of (name, type, shape, iterator over pieces of the values), as PyTorch's."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, kind, shape, _ in tensors:
        start, end = end, end + math.prod(shape) * TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for *_, pieces in tensors:
            for piece in pieces:
                file.write(piece)

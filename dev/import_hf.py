"""
Takes what train_rigsa made of a Hugging Face model back to Hugging Face.

    python dev/import_hf.py MODEL out/ticket.bin merged              the model with the ticket in its weights
    python dev/import_hf.py MODEL out/model.bin tuned                after train_baselines --method full: the model with these weights
    python dev/import_hf.py MODEL out/ticket.bin adapter --peft      the ticket as an adapter for PEFT

MODEL is what dev/export_hf.py was given, or the folder that it made with --hf. A merged folder has the files
of MODEL, tokenizer and all, and loads with AutoModelForCausalLM; it holds W = W0 + alpha * (mask . DeltaW),
added up and by default stored in fp32.

An adapter holds alpha * DeltaW as PEFT's SHiRA has it: r * (rows + columns) entries of every matrix, for one
r. Where a matrix has fewer, zeros at unused positions fill it up.
"""
import argparse
import math
import os
import struct

import command

import numpy as np
from safetensors.numpy import save_file

from checkpoint import DTYPES, rounded, write_folder, write_json, write_model
from export_hf import open_checkpoint
from hugging_face import module_name
from rigsa_file import GOLDEN, U64, Hash, adapted_shapes, mix, mix_numpy, pack_config, read_file, tensor_shapes

INIT = struct.Struct("<QIIf")  # seed, draw, rest, sigma
STREAM_DELTA = 0  # as in train_rigsa.c, section 3


# ----------------------------------------------------------------------------------------------------
# what training made

def initial_values(seed, matrix, draw, sigma, size):
    """
    DeltaW's first `size` initial values of an adapted matrix: random_key and normal of train_rigsa.c, to the
    bit.
    """
    key = mix(seed + GOLDEN & U64)
    for number in (STREAM_DELTA, matrix, draw):
        key = mix(key + number & U64)
    place = np.arange(2 * size + 1, dtype=np.uint64)[1:] * np.uint64(GOLDEN) + np.uint64(key)
    words = mix_numpy(place).reshape(size, 2)
    coins, fill = np.bitwise_count(words[:, 0]).astype(np.int64), words[:, 1].astype(np.int64)
    z = (coins - 32) * 65536 + (fill & 0xFFFF) + (fill >> 16 & 0xFFFF) - 65535
    return ((2 * z + 1) * (sigma / 527011.5848)).astype(np.float32)


class Ticket:
    """The ticket in `sections`, for a model of this config. ValueError, in one line, where it is not one."""

    def __init__(self, path, sections, config):
        matrices = adapted_shapes(config)

        def numbers(tag, dtype, count):
            data = sections.get(tag, b"")
            if len(data) != count * np.dtype(dtype).itemsize:
                raise ValueError(f"{path}: section '{tag}' has {len(data)} bytes, {count} x {np.dtype(dtype).itemsize} "
                                 "are needed; is it a ticket of this model?")
            return np.frombuffer(data, dtype=dtype)

        self.path = path
        self.gates = numbers("gates", "<f4", len(matrices))
        entries = numbers("entries", "<u8", len(matrices)).tolist()
        ends = np.cumsum(entries)[:-1]
        sizes = [math.prod(shape) for _, shape in matrices]
        if "index" in sections or entries != sizes:
            self.index = np.split(numbers("index", "<u4", sum(entries)), ends)
        else:  # never pruned
            self.index = [np.arange(size, dtype="<u4") for size in sizes]
        self.values = np.split(numbers("values", "<f4", sum(entries)), ends)
        self.seed, self.draw, self.rest, self.sigma = INIT.unpack(numbers("init", "u1", INIT.size).tobytes())
        self.matrices = matrices  # a list of (name, shape)
        self.number = {name: number for number, (name, _) in enumerate(matrices)}
        self.base_hash, = struct.unpack_from("<Q", sections["base"])
        self.base_name = sections["base"][8:].decode("utf-8", "replace")
        for (name, shape), index in zip(matrices, self.index):
            if len(index) and not (index[-1] < math.prod(shape) and np.all(index[1:] > index[:-1])):
                raise ValueError(f"{path}: the index of {name} is not ascending within the matrix; train again")

    def stored_as(self, checkpoint):
        """
        The dtype in which the checkpoint, exported, is the ticket's base. ValueError where it is in none.
        """
        hashes = {}
        for dtype in sorted(DTYPES, key=lambda dtype: dtype != checkpoint.dtype):
            found = Hash()
            for piece in checkpoint.weights(dtype):
                found.update(piece)
            if found.value() == self.base_hash:
                return dtype
            hashes[dtype] = found.value()
        found = ", ".join(f"{value:016x} in {dtype}" for dtype, value in hashes.items())
        raise ValueError(f"{self.path}: made on the base '{self.base_name}' ({self.base_hash:016x}), "
                         f"not on {checkpoint.source} ({found})")

    def change(self, a, size):
        """
        alpha * (mask . DeltaW) of adapted matrix a, flat; where pruned entries rest at their start, with
        those.
        """
        change = np.zeros(size, np.float32)
        if self.rest:
            change = self.gates[a] * initial_values(self.seed, a, self.draw, self.sigma, size)
        change[self.index[a]] = self.gates[a] * self.values[a]
        return change

    def weight(self, name, base):
        """Tensor `name` after training, from the base's, in fp32."""
        if name not in self.number:
            return base
        return base + self.change(self.number[name], base.size).reshape(base.shape)


class Tuned:
    """
    All weights, in a base file that train_baselines --method full wrote. ValueError, in one line, where the model is another.
    """

    def __init__(self, path, sections, config):
        if sections.get("config") != pack_config(config):
            raise ValueError(f"{path}: its config is not that of the model; was it trained from this one, in fp32?")
        shapes = tensor_shapes(config)
        ends = np.cumsum([math.prod(shape) for _, shape in shapes])
        tensors = np.split(np.frombuffer(sections["weights"], dtype="<f4"), ends[:-1])
        self.tensors = {name: tensor.reshape(shape) for (name, shape), tensor in zip(shapes, tensors)}

    def stored_as(self, checkpoint):
        """The dtype of the base does not matter: nothing of it is left."""
        return checkpoint.dtype

    def weight(self, name, base):
        """Tensor `name` after training."""
        return self.tensors[name]


# ----------------------------------------------------------------------------------------------------
# the folders

def write_merged(folder, checkpoint, trained, dtype):
    """The files of the checkpoint with trained weights."""
    stored_as = trained.stored_as(checkpoint)
    changed = lost = 0

    def weight(name, values):
        nonlocal changed, lost
        base = rounded(values, stored_as)
        after = trained.weight(name, base)
        differs = after != base
        changed += int(differs.sum())
        lost += int((differs & (rounded(after, dtype) == rounded(base, dtype))).sum())
        return after

    write_model(folder, checkpoint, dtype, weight)
    print(f"{changed} weights changed, stored in {dtype}")
    if lost:
        print(f"note: rounded to {dtype}, {lost / changed:.1%} of them are as they were; --dtype fp32 keeps all")


def write_adapter(folder, checkpoint, ticket, model):
    """The ticket as an adapter for PEFT."""
    if ticket.rest:
        raise ValueError(f"{ticket.path}: made with --rest init, it changes every weight; leave out --peft to merge it")
    if ticket.stored_as(checkpoint) != checkpoint.dtype == "fp32":
        print("note: trained on these weights rounded to bf16; added to them as they are, in fp32, the adapter "
              "gives other logits, by some .3 %; merged, without --peft, it is exact")
    matrices = adapted_shapes(checkpoint.config)
    needed = max(math.ceil(len(index) / sum(shape)) for (_, shape), index in zip(matrices, ticket.index))
    room, tightest = min((math.prod(shape) // sum(shape), name) for name, shape in matrices)
    if needed > room:
        raise ValueError(f"{ticket.path}: too dense for PEFT: SHiRA holds r (rows + columns) entries of every matrix, "
                         f"this ticket needs r = {needed} and {tightest} has room for {room}; leave out --peft to "
                         "merge it")
    rank, tensors = max(needed, 1), {}
    for a, (name, shape) in enumerate(matrices):
        free = np.ones(math.prod(shape), dtype=bool)
        free[ticket.index[a]] = False
        padding = np.flatnonzero(free)[:rank * sum(shape) - len(ticket.index[a])]
        place = np.concatenate([ticket.index[a].astype(np.int64), padding])
        values = np.zeros(len(place), np.float32)
        values[:len(ticket.index[a])] = ticket.gates[a] * ticket.values[a]
        prefix = f"base_model.model.{module_name(name)}.shira_"
        tensors[prefix + "weight"] = values
        tensors[prefix + "indices"] = np.stack(np.divmod(place, shape[1])).astype(np.int32)
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    modules = dict.fromkeys(module_name(name).rpartition(".")[2] for name, _ in matrices)
    write_json(os.path.join(folder, "adapter_config.json"), {
        "peft_type": "SHIRA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "inference_mode": True,
        "r": rank, "mask_type": "random", "target_modules": list(modules),
    })
    entries, slots = sum(map(len, ticket.index)), rank * sum(sum(shape) for _, shape in matrices)
    print(f"{entries} entries, with zeros {slots}: r = {rank}")


def take_back(model, trained_path, out, dtype, peft):
    """Everything that the command line asks for."""
    checkpoint = open_checkpoint(model)
    sections = read_file(trained_path, "tick", "base")
    kind = Ticket if "gates" in sections else Tuned
    if peft and kind is not Ticket:
        raise ValueError(f"{trained_path}: a whole model, no ticket; leave out --peft")
    trained = kind(trained_path, sections, checkpoint.config)
    if peft:
        write_folder(out, lambda folder: write_adapter(folder, checkpoint, trained, model))
    else:
        write_folder(out, lambda folder: write_merged(folder, checkpoint, trained, dtype))


@command.line
def main():
    parser = argparse.ArgumentParser(description="A ticket of train_rigsa, back in a Hugging Face model.")
    parser.add_argument("model", metavar="MODEL", help="what dev/export_hf.py was given")
    parser.add_argument("trained", metavar="TICKET", help="ticket.bin, or model.bin of train_baselines --method full")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the merged weights; default: fp32")
    parser.add_argument("--peft", action="store_true", help="make an adapter for PEFT instead of a merged model")
    args = parser.parse_args()
    take_back(args.model, args.trained, args.out, args.dtype, args.peft)


if __name__ == "__main__":
    main()

"""
Is each method of dev/baselines.c what its origin says? (doc/baselines.md)

    make train_rigsa evaluate_rigsa train_baselines dump_baselines && python dev/test_baselines.py

needs torch, transformers, peft and bitsandbytes (dev/requirements.txt). On the fixture of dev/dump_reference.py, a model of
odd sizes with grouped queries, unless said otherwise:

- LoRA: twenty updates from PEFT's start follow PEFT's own, on all seven matrices; files go to PEFT and come back
- every adapter: gradients at random values against autograd in float64
- NF4 and its double quantization against bitsandbytes on a CPU: every byte, or why not
- LT-SFT, RoSA: mask and trained values against the published rules in PyTorch, float64
- pruned entries that rest at their initial values: gradients, and a ticket's twenty updates from a real pruning
- random masks: number of entries, seeds, and entry for entry the selection sampling of baselines.c in Python

The last line is `N passed, N failed`; the exit status is 0 only if nothing failed.
"""
import os
import re
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import torch

from dump_reference import adapted_shapes, answer_logits, difference, reference_model, split, transformers_model
from hugging_face import hugging_face_name
from peft_files import export_peft, import_peft, key, read_lora
from rigsa_file import (GOLDEN, U64, data_sections, mix, pack_config, read_file, tensor_shapes, unpack_config, write_file)

HERE = os.path.dirname(os.path.abspath(__file__))
GRADIENT = 2e-5  # norm-wise relative error of a gradient, as in test_rigsa.c
LOSSES, WEIGHTS = 1e-5, 1e-3  # of each of twenty losses, and of the weights after twenty updates
UPDATES, RATE, RANK, ALPHA = 20, 1e-2, 3, 6
BETAS, EPS, CLIP = (0.9, 0.95), 1e-8, 1.0  # baselines.c takes them from train_rigsa.c

passed = failed = 0


def check(what, good, found=""):
    """Counts one check and prints it."""
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print(f"{'    ' if good else 'FAILED: '}{what}{f': {found}' if found != '' else ''}")


def check_close(what, got, expected, bound):
    """||got - expected|| / ||expected|| is at most `bound`; a reference of zeros proves nothing."""
    error = difference(np.asarray(got, np.float64), np.asarray(expected, np.float64)) if np.any(expected) else np.nan
    check(what, error <= bound, f"{error:.1e}, at most {bound:.0e}")


# ----------------------------------------------------------------------------------------------------------------------
# the fixture, for both sides

class Fixture:
    """The model and the examples of dev/fixture.bin: as files for the C programs, and as a loss in float64."""

    def __init__(self, folder):
        sections = read_file(os.path.join(HERE, "fixture.bin"), "dump")
        self.config = unpack_config(sections["config"])
        self.folder, self.base, self.data = folder, f"{folder}/base.bin", f"{folder}/data.bin"
        types = {"weights": "<f4", "length": "<u4", "answer": "<u4", "tokens": "<u4"}
        self.questions = {tag: np.frombuffer(sections[tag], kind) for tag, kind in types.items()}
        self.shapes = adapted_shapes(self.config)
        self.weights = {name: torch.tensor(part, dtype=torch.float64)
                        for name, part in split(self.questions["weights"], tensor_shapes(self.config)).items()}
        self.model = reference_model(self.config)
        self.examples = self.questions["length"].size
        write_file(self.base, "base", [("config", sections["config"]), ("name", b"fixture"), ("weights", sections["weights"])])
        tokens, start, examples = self.questions["tokens"].tolist(), 0, []
        for length, answer in zip(self.questions["length"].tolist(), self.questions["answer"].tolist()):
            examples.append((tokens[start:start + length], answer))
            start += length
        write_file(self.data, "data", data_sections(self.config["vocab"], examples, column="same", metric="exact"))

    def loss(self, matrices):
        """The mean loss over all answer tokens with these adapted matrices, a dict, name -> tensor."""
        named = {hugging_face_name(name): tensor for name, tensor in (self.weights | matrices).items()}
        return torch.nn.functional.cross_entropy(*answer_logits(self.model, named, self.questions))

    def transformers(self):
        """The model of transformers, in float32."""
        model = transformers_model(self.config)
        model.load_state_dict({hugging_face_name(name): tensor.float() for name, tensor in self.weights.items()}, strict=False)
        return model

    def run(self, name, *options, program="train_baselines"):
        """Runs a C program with updates on all examples at constant rates; the output folder."""
        out = f"{self.folder}/{name}"
        result = subprocess.run(
            [f"./{program}", "--base", self.base, "--data", self.data, "--eval", self.data, "--out", out, "--overwrite",
             "--batch", str(self.examples), "--warmup", "0", "--cooldown", "0", "--lr", str(RATE), *map(str, options)],
            cwd=os.path.dirname(HERE), capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{name}: {result.stderr}")
        return out

    def passes(self, updates):
        """The number of examples of so many updates."""
        return updates * self.examples


def check_losses(what, found, expected, bound=LOSSES):
    """As many losses as expected, each of them off by at most `bound`."""
    off = np.max(np.abs(found / expected - 1)) if found.size == expected.size else np.inf
    check(f"{what}: {expected.size} losses", off <= bound, f"{off:.1e}, at most {bound:.0e}")


def losses(out, label):
    """The losses of pass `label` of the run in folder `out`."""
    with open(f"{out}/loss.csv") as file:
        rows = [line.strip().split(",") for line in file]
    return np.array([float(row[2]) for row in rows if row[0] == label])


def train(loss, leaves, updates, decay=0.0):
    """Updates of `leaves` on loss(), as train_rigsa.c makes them: gradients clipped at norm 1, AdamW. The losses."""
    optimizer = torch.optim.AdamW(leaves, lr=RATE, betas=BETAS, eps=EPS, weight_decay=decay)
    found = []
    for _ in range(updates):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        norm = torch.sqrt(sum((leaf.grad ** 2).sum() for leaf in leaves))
        for leaf in leaves:
            leaf.grad *= min(1.0, CLIP / norm.item())
        optimizer.step()
        found.append(value.item())
    return np.array(found)


def leaf(array):
    """A float64 tensor that is trained."""
    return torch.tensor(np.array(array), dtype=torch.float64, requires_grad=True)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA and PEFT

def test_peft(fixture):
    """Twenty updates, and both ways through the files."""
    import peft
    torch.manual_seed(1)
    model = peft.get_peft_model(fixture.transformers(), peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]))
    start, lora = f"{fixture.folder}/peft_start", f"{fixture.folder}/start.bin"
    model.save_pretrained(start)
    import_peft(start, fixture.base, lora)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check("PEFT trains A and B of every matrix", len(leaves) == 2 * len(fixture.shapes))
    cross_entropy = torch.nn.functional.cross_entropy
    expected = train(lambda: cross_entropy(*answer_logits(model, {}, fixture.questions)), leaves, UPDATES)
    out = fixture.run("lora", "--method", "lora", "--lora", lora, "--ticket-examples", fixture.passes(UPDATES))
    check_losses("PEFT's", losses(out, "lora"), expected)
    trained = {name: tensor.detach().numpy() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    alpha, parts = read_lora(f"{out}/lora.bin", fixture.shapes)
    check("alpha", alpha == ALPHA)
    for name, (a, b) in parts.items():
        check_close(f"{name}.A after {UPDATES} updates", a, trained[key(name, "A")], WEIGHTS)
        check_close(f"{name}.B after {UPDATES} updates", b, trained[key(name, "B")], WEIGHTS)

    folder, again = f"{fixture.folder}/exported", f"{fixture.folder}/again.bin"
    export_peft(f"{out}/lora.bin", fixture.base, folder)
    import_peft(folder, fixture.base, again)
    one, two = (read_file(path, "lora") for path in (f"{out}/lora.bin", again))
    check("to PEFT and back: the same bytes", all(one[tag] == two[tag] for tag in ("base", "shape", "values")))
    exported = peft.PeftModel.from_pretrained(fixture.transformers(), folder)
    with torch.no_grad():
        ours, theirs = (answer_logits(m, {}, fixture.questions)[0].numpy() for m in (exported, model))
    check_close("PEFT's logits with our adapter", ours, theirs, WEIGHTS)


# ----------------------------------------------------------------------------------------------------------------------
# gradients

def read_dump(fixture, name, *options):
    """What dump_baselines writes: a dict, tag -> array."""
    out = fixture.run(name, *options, program="dump_baselines")
    types = {"entries": "<u8", "index": "<u4", "loss": "<f8", "code": "u1", "scale": "u1"}
    return {tag: np.frombuffer(data, types.get(tag, "<f4")) for tag, data in read_file(f"{out}/dump.bin", "dump").items()}


def dense_deltas(values, entries, index, shapes):
    """Sparse values of all matrices, end to end, as leaves (entries) and a function from leaves to dense matrices."""
    parts = np.split(values, np.cumsum(entries)[:-1].astype(np.int64))
    places = np.split(index, np.cumsum(entries)[:-1].astype(np.int64)) if index.size else [np.arange(n) for n in entries]
    leaves = [leaf(part) for part in parts]

    def dense():
        return {name: torch.zeros(shape[0] * shape[1], dtype=torch.float64).scatter(
            0, torch.tensor(place.astype(np.int64)), values).reshape(shape)
            for (name, shape), place, values in zip(shapes, places, leaves)}
    return leaves, dense


def low_rank(values, shapes, rank):
    """A, B^T of all matrices, end to end, as leaves and a function from leaves to dense B A."""
    sizes = [n for _, (rows, cols) in shapes for n in (rank * cols, rank * rows)]
    leaves = [leaf(part) for part in np.split(values, np.cumsum(sizes)[:-1])]

    def product():
        return {name: leaves[2 * i + 1].reshape(rank, -1).T @ leaves[2 * i].reshape(rank, -1)
                for i, (name, _) in enumerate(shapes)}
    return leaves, product


def test_gradients(fixture):
    """Loss and gradient of every adapter at random values, added up over forward passes of two examples."""
    shapes, count = fixture.shapes, len(fixture.shapes)
    base = {name: fixture.weights[name] for name, _ in shapes}
    for name, options in {
        "lora": ["--method", "lora", "--rank", RANK, "--lora-alpha", ALPHA],
        "lora, rank 21": ["--method", "lora", "--rank", 21],
        "qlora": ["--method", "lora", "--base-type", "nf4", "--rank", RANK, "--lora-alpha", ALPHA],
        "random": ["--method", "random", "--density", 0.1],
        "random, half": ["--method", "random", "--density", 0.5],
        "random, gated": ["--method", "random", "--density", 0.1, "--init", "gated"],
        "rosa": ["--method", "rosa", "--density", 0.1, "--rank", RANK, "--lora-alpha", ALPHA],
        "dense": ["--method", "dense"],
    }.items():
        dump = read_dump(fixture, name.replace(", ", "_"), *options, "--micro", 2)
        values, leaves, w0 = dump["values"], [], base
        n = int(dump["entries"].sum())
        rank, scale = (21, 1) if "21" in name else (RANK, ALPHA / RANK)
        deltas = gates = products = None
        if n:
            deltas, dense = dense_deltas(values[:n], dump["entries"], dump["index"], shapes)
            gates = leaf(values[n:n + count])
            leaves += [*deltas, gates] if "gated" in name else deltas
            values = values[n + count:]
            check(f"{name}: gates", "gated" in name or np.all(gates.detach().numpy() == 1))
        if values.size:
            products, product = low_rank(values, shapes, rank)
            leaves += products
        if dump["expanded"].size:
            w0 = {key: torch.tensor(part, dtype=torch.float64) for key, part in split(dump["expanded"], shapes).items()}
        effective = {}
        for i, (key, _) in enumerate(shapes):
            effective[key] = w0[key] + (gates[i] * dense()[key] if deltas else 0) + (scale * product()[key] if products else 0)
        loss = fixture.loss(effective)
        check_close(f"{name}: loss", dump["loss"], [loss.item()], 2e-6)
        expected = [g.numpy().ravel() for g in torch.autograd.grad(loss, leaves)]
        check(f"{name}: number of gradients", dump["gradients"].size == sum(g.size for g in expected))
        parts = np.split(dump["gradients"], np.cumsum([g.size for g in expected])[:-1])
        worst = max(difference(got.astype(np.float64), want) for got, want in zip(parts, expected) if want.size)
        check(f"{name}: gradients", worst <= GRADIENT, f"{worst:.1e}, at most {GRADIENT:.0e}")


# ----------------------------------------------------------------------------------------------------------------------
# NF4

def edge_values(size, middles):
    """
    Weights between two levels of NF4, so close to their middle that weight * (1 / size) and weight / size have different nearest
    levels: bitsandbytes multiplies in full blocks and divides in a last one that is not full.
    """
    near = ((middles * size).view("i4")[:, None] + np.arange(-3, 4, dtype="i4")).view("f4").ravel()
    product, quotient = (np.searchsorted(middles, values) for values in (near * (np.float32(1) / size), near / size))
    return near[product != quotient]


def write_random_base(path, config, rng, middles):
    """A base of normal weights, some of them zero, far out, or edge_values of their block."""
    parts = []
    for _, shape in tensor_shapes(config):
        part = (rng.standard_normal(np.prod(shape)) * 10 ** rng.uniform(-3, 0)).astype("f4")
        part[rng.random(part.size) < 0.01] = 0
        part[rng.random(part.size) < 0.001] *= 8
        for block in (part[:64], part[part.size // 64 * 64:]):
            if block.size:
                edges = edge_values(np.max(np.abs(block)), middles)[:block.size - 1]
                block[np.argsort(np.abs(block))[:edges.size]] = edges
        parts.append(part)
    weights = np.concatenate(parts)
    write_file(path, "base", [("config", pack_config(config)), ("name", b"random"), ("weights", weights.tobytes())])
    return {name: part for name, part in split(weights, tensor_shapes(config)).items()}


def scales(absmax, state, mean):
    """
    The bytes of the scales `absmax` (blocks) less `mean`, on the map of bitsandbytes, as the nearest places on the map, and as
    bitsandbytes finds them on a CPU: it rounds the value to a multiple of 2 / 65535 first, for the sake of a table.
    """
    absmax = absmax - mean
    level = state.state2.code.numpy()
    sizes = np.abs(np.pad(absmax, (0, -absmax.size % 256))).reshape(-1, 256).max(1)
    inverse = np.float32(1) / np.repeat(sizes, 256)[:absmax.size]
    middles, value = (level[:-1] + level[1:]) / np.float32(2), absmax * inverse
    table = ((value + np.float32(1)) * np.float32(65535 / 2) + np.float32(0.5)).astype(np.int64)
    rounded = np.float32(-1) + np.float32(2) * table.astype(np.float32) / np.float32(65535)
    return sizes, np.searchsorted(middles, value).astype("u1"), np.searchsorted(middles, rounded).astype("u1")


def test_nf4(fixture):
    """
    Odd and SmolLM2-shaped matrices against bitsandbytes. Byte for byte: codes; scales of scales and bytes of scales, given the
    mean; weights, given what is stored. The mean is a sum that torch rounds in an order of its own: up to 4 ulp.
    """
    from bitsandbytes import functional
    rng = np.random.default_rng(4)
    level = functional.get_4bit_type("nf4", device="cpu").numpy()[:16]
    middles = (level[:-1] + level[1:]) / 2
    smol = dict(fixture.config, dim=576, ffn=1536, layers=1, heads=9, kv_heads=3, head_dim=64)
    original = fixture.base
    fixture.base = f"{fixture.folder}/nf4.bin"
    for label, config in (("odd", fixture.config), ("SmolLM2-135M", smol)):
        weights = write_random_base(fixture.base, config, rng, middles)
        dump = read_dump(fixture, "nf4", "--method", "lora", "--base-type", "nf4", "--rank", 1)
        at = dict.fromkeys(("code", "scale", "scale_scale", "mean", "expanded"), 0)
        wrong, table, rounded, ulps = dict.fromkeys(at, 0), 0, 0, 0.0
        for name, _ in adapted_shapes(config):
            weight = torch.tensor(weights[name])
            codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
            _, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
            sizes = {"code": codes.numel(), "scale": state.absmax.numel(), "scale_scale": state.state2.absmax.numel(), "mean": 1,
                     "expanded": weight.numel()}
            got = {tag: dump[tag][at[tag]:at[tag] + n] for tag, n in sizes.items()}
            at = {tag: at[tag] + n for tag, n in sizes.items()}
            mean = state.offset.numpy()
            ulps = max(ulps, abs(float(got["mean"][0]) - float(mean)) / np.spacing(mean))
            scale_scale, nearest, _ = scales(absmax.numpy(), state, got["mean"][0])
            _, _, theirs = scales(absmax.numpy(), state, mean)
            table += np.sum(theirs != state.absmax.numpy())
            rounded += np.sum(nearest != theirs)
            state.absmax, state.state2.absmax = torch.tensor(got["scale"]), torch.tensor(got["scale_scale"])
            state.offset = torch.tensor(got["mean"][0])
            expanded = functional.dequantize_4bit(torch.tensor(got["code"])[:, None], state).numpy().ravel()
            expected = {"code": codes.numpy().ravel(), "scale": nearest, "scale_scale": scale_scale, "expanded": expanded}
            for tag, array in expected.items():
                wrong[tag] += np.sum(got[tag].view(f"u{array.itemsize}") != array.view(f"u{array.itemsize}"))
        check(f"{label}: nothing is left over", all(at[tag] == dump[tag].size for tag in at))
        for tag in ("code", "scale", "scale_scale", "expanded"):
            check(f"{label}: {tag}", wrong[tag] == 0, f"{wrong[tag]} of {at[tag]} differ")
        check(f"{label}: mean", ulps <= 4, f"{ulps:.0f} ulp")
        check(f"{label}: the table is why bitsandbytes has other bytes of scales", table == 0 and rounded < 0.02 * at["scale"],
              f"{rounded} of {at['scale']} are not the nearest there")
    fixture.base = original


# ----------------------------------------------------------------------------------------------------------------------
# masks

def read_ticket(path):
    """Of a ticket: entries (matrices), index and values (all entries), gates."""
    sections = read_file(path, "tick")
    return (np.frombuffer(sections["entries"], "<u8").astype(np.int64), np.frombuffer(sections["index"], "<u4").astype(np.int64),
            np.frombuffer(sections["values"], "<f4"), np.frombuffer(sections["gates"], "<f4"))


def flat_mask(entries, index, shapes):
    """A mask as in a ticket: a bool per entry of all matrices, end to end."""
    masks = [np.zeros(rows * cols, bool) for _, (rows, cols) in shapes]
    for mask, part in zip(masks, np.split(index, np.cumsum(entries)[:-1])):
        mask[part] = True
    return np.concatenate(masks)


def widest_gap(sizes):
    """
    Of sorted score arrays, one per group of entries that share a threshold, the density near 0.1 whose thresholds lie in the
    widest gaps, and the narrowest of these, relative to its threshold: float32 and float64 must choose the same entries.
    """
    def gap(density):
        cuts = [(ordered, int(density * ordered.size)) for ordered in sizes]
        return min((ordered[k - 1] - ordered[k]) / ordered[k - 1] for ordered, k in cuts if k)
    densities = np.arange(0.08, 0.12, 1e-4)
    best = max(densities, key=gap)
    return float(best), gap(best)


def test_ltsft(fixture):
    """Ansell et al. 2022: train all, the k largest changes of all matrices, back to the pretrained weights, train those."""
    shapes, updates = fixture.shapes, 30
    w0 = {name: fixture.weights[name] for name, _ in shapes}
    trained = {name: leaf(tensor) for name, tensor in w0.items()}
    train(lambda: fixture.loss(trained), list(trained.values()), updates)
    change = np.concatenate([(trained[name] - w0[name]).abs().detach().numpy().ravel() for name in w0])
    density, gap = widest_gap([np.sort(change)[::-1]])
    k = int(density * change.size)
    threshold = np.partition(change, -k)[-k]
    expected = change >= threshold
    out = fixture.run("ltsft", "--method", "ltsft", "--density", density, "--examples", fixture.passes(updates),
                      "--ticket-examples", fixture.passes(UPDATES))
    entries, index, values, gates = read_ticket(f"{out}/ticket.bin")
    check("ltsft: mask", np.array_equal(flat_mask(entries, index, shapes), expected),
          f"{k} of {change.size} entries, next one {gap:.1e} below")
    check("ltsft: gates", np.all(gates == 1))

    leaves, dense = dense_deltas(np.zeros(k), entries, index, shapes)
    expected = train(lambda: fixture.loss({name: w0[name] + delta for name, delta in dense().items()}), leaves, UPDATES)
    check_losses("ltsft", losses(out, "ltsft"), expected)
    check_close("ltsft: values", values, np.concatenate([part.detach().numpy() for part in leaves]), WEIGHTS)


def test_rosa(fixture):
    """Nikdan et al. 2024: 64 updates of A and B, the largest squared gradients of each matrix, both from scratch."""
    shapes, warm = fixture.shapes, 64
    w0 = {name: fixture.weights[name] for name, _ in shapes}
    one = fixture.run("rosa_start", "--method", "lora", "--rank", RANK, "--lora-lr", 1e-30, "--ticket-examples", fixture.examples)
    start = np.frombuffer(read_file(f"{one}/lora.bin", "lora")["values"], "<f4")
    parts = np.split(start, np.cumsum([n for _, (rows, cols) in shapes for n in (RANK * cols, RANK * rows)])[:-1])
    scaled = [np.sqrt(cols) * part for (_, (_, cols)), part in zip(shapes, parts[::2])]
    check("A at the start: within 1 / sqrt(columns), as wide as that", 0.9 < max(map(np.max, scaled)) < 1 and
          -1 < min(map(np.min, scaled)) < -0.9 and abs(np.var(np.concatenate(scaled)) - 1 / 3) < 0.02)
    check("B at the start: zero", all(np.max(np.abs(part)) < 1e-20 for part in parts[1::2]))

    start = np.concatenate([part if i % 2 == 0 else 0 * part for i, part in enumerate(parts)])

    def matrices(product, dense=None):
        return {name: w0[name] + product()[name] + (dense()[name] if dense else 0) for name in w0}

    leaves, product = low_rank(start, shapes, RANK)
    train(lambda: fixture.loss(matrices(product)), leaves, warm)
    effective = {name: tensor.detach().requires_grad_() for name, tensor in matrices(product).items()}
    squares = [g.numpy().ravel() ** 2 for g in torch.autograd.grad(fixture.loss(effective), list(effective.values()))]
    density, gap = widest_gap([np.sort(square)[::-1] for square in squares])
    expected = []
    for square in squares:
        expected.append(np.zeros(square.size, bool))
        expected[-1][torch.topk(torch.tensor(square), int(density * square.size)).indices.numpy()] = True
    out = fixture.run("rosa", "--method", "rosa", "--rank", RANK, "--density", density, "--mask-after", warm,
                      "--ticket-examples", fixture.passes(warm + 1))
    entries, index, values, _ = read_ticket(f"{out}/ticket.bin")
    check("rosa: mask", np.array_equal(flat_mask(entries, index, shapes), np.concatenate(expected)),
          f"{index.size} entries, next one at least {gap:.1e} below")

    low, product = low_rank(start, shapes, RANK)
    sparse, dense = dense_deltas(np.zeros(index.size), entries, index, shapes)
    expected = train(lambda: fixture.loss(matrices(product, dense)), sparse + low, UPDATES)
    check_losses("rosa, from scratch", losses(out, "rosa")[:UPDATES], expected)


def sampled(size, wanted, key):
    """mask_random of baselines.c for one matrix."""
    chosen = []
    for i in range(size):
        if (mix((key + i * GOLDEN) & U64) >> 11) * 2.0 ** -53 * (size - i) < wanted - len(chosen):
            chosen.append(i)
    return chosen


def test_resting(fixture):
    """--rest init: W = W0 + alpha (mask . DeltaW + (1 - mask) . initial), where only DeltaW and alpha are trained."""
    shapes, count = fixture.shapes, len(fixture.shapes)
    w0 = [fixture.weights[name] for name, _ in shapes]
    options = ["--method", "rigsa", "--rest", "init", "--rounds", 1, "--alpha-lr", RATE, "--weight-decay", 0, "--sigma", 0.3,
               "--examples", fixture.passes(3), "--ticket-examples", fixture.passes(UPDATES), "--micro", 2]

    def matrices(gates, dense, frozen):
        return {name: w + gate * (delta + rest) for (name, _), w, gate, delta, rest in
                zip(shapes, w0, gates, dense().values(), frozen)}

    def frozen_entries(dump, entries, index):
        mask = torch.tensor(flat_mask(entries, index, shapes))
        parts = torch.where(mask, 0.0, torch.tensor(dump["initial"].astype(np.float64))).split([w.numel() for w in w0])
        return [part.reshape(w.shape) for part, w in zip(parts, w0)]

    for keep in (0, 0.2, 0.9):
        dump = read_dump(fixture, "rest_gradients", *options, "--keep", keep)
        n, entries, index = int(dump["entries"].sum()), dump["entries"].astype(np.int64), dump["index"].astype(np.int64)
        deltas, dense = dense_deltas(dump["values"][:n], entries, index if n else np.zeros(0, np.int64), shapes)
        if not n:
            dense = lambda: {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes}  # noqa: E731
        gates = leaf(dump["values"][n:])
        leaves = [*(part for part in deltas if part.numel()), gates]
        loss = fixture.loss(matrices(gates, dense, frozen_entries(dump, entries, index)))
        check_close(f"rest init, keep {keep}: loss", dump["loss"], [loss.item()], 2e-6)
        expected = [g.numpy().ravel() for g in torch.autograd.grad(loss, leaves)]
        check(f"rest init, keep {keep}: number of gradients", dump["gradients"].size == n + count)
        parts = np.split(dump["gradients"], np.cumsum([g.size for g in expected])[:-1])
        worst = max(difference(got.astype(np.float64), want) for got, want in zip(parts, expected))
        check(f"rest init, keep {keep}: gradients", worst <= GRADIENT, f"{worst:.1e}, at most {GRADIENT:.0e}")

    out = fixture.run("rest_ticket", *options, "--keep", 0.2)
    entries, index, values, alphas = read_ticket(f"{out}/ticket.bin")
    frozen = frozen_entries(dump, entries, index)
    start = dump["initial"][flat_mask(entries, index, shapes)]
    deltas, dense = dense_deltas(start, entries, index, shapes)
    gates = leaf(np.full(count, 1e-6, np.float32))
    expected = train(lambda: fixture.loss(matrices(gates, dense, frozen)), [*deltas, gates], UPDATES)
    check_losses("rest init, the ticket's", losses(out, "ticket"), expected)
    check_close("rest init: values", values, np.concatenate([part.detach().numpy() for part in deltas]), WEIGHTS)
    check_close("rest init: gates", alphas, gates.detach().numpy(), WEIGHTS)

    evaluated = f"{fixture.folder}/loss.bin"
    sections = [(tag, b"loss" if tag == "metric" else data) for tag, data in read_file(fixture.data, "data").items()]
    write_file(evaluated, "data", sections)
    gates, dense = leaf(alphas), dense_deltas(values, entries, index, shapes)[1]
    loss = fixture.loss(matrices(gates, dense, frozen)).item()

    def run(program, *options):
        return subprocess.run([f"./{program}", "--base", fixture.base, "--eval", evaluated, *options],
                              cwd=os.path.dirname(HERE), capture_output=True, text=True)
    ticket = ["--ticket", f"{out}/ticket.bin"]
    said = run("train_baselines", "--method", "eval", *ticket).stdout
    row = re.search(r"^ticket +- +- +- +(\S+) ", said, re.MULTILINE)
    check("rest init: the ticket is read back", row and abs(float(row[1]) - loss) < 1e-4, f"{row and row[1]}, {loss:.4f}")
    refused = run("evaluate_rigsa", *ticket)
    check("rest init: evaluate_rigsa says who reads it", refused.returncode == 1 and refused.stderr.count("\n") == 1
          and "train_baselines" in refused.stderr, refused.stderr.strip())
    for wrong, word in (["--method", "lora"], "--method rigsa"), (["--survivors", "redraw"], "redraw"):
        refused = run("train_baselines", "--data", fixture.data, "--out", f"{fixture.folder}/never", "--rest", "init", *wrong)
        check(f"rest init: not with {wrong[1]}", refused.returncode == 1 and word in refused.stderr, refused.stderr.strip())


def test_random(fixture):
    """The number of entries of every matrix, and the same mask for the same seed only."""
    def ticket(name, seed, density):
        out = fixture.run(name, "--method", "random", "--density", density, "--seed", seed, "--ticket-examples", fixture.examples)
        return read_ticket(f"{out}/ticket.bin")[:2]

    for density in (0, 0.0346, 0.3, 1):
        entries, index = ticket("random", 1, density)
        sizes = [rows * cols for _, (rows, cols) in fixture.shapes]
        check(f"random {density}: count", np.array_equal(entries, [int(density * size) for size in sizes]), index.size)
        expected = []
        for a, size in enumerate(sizes):
            key = mix(mix(mix(mix((1 + GOLDEN) & U64) + 100 & U64) + a & U64) & U64)
            expected += sampled(size, int(density * size), key)
        check(f"random {density}: entries", np.array_equal(index, expected))
    one, again, other = (ticket("random", seed, 0.3)[1] for seed in (1, 1, 2))
    check("random: the same seed, the same mask", np.array_equal(one, again))
    check("random: another seed, another mask", not np.array_equal(one, other))


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fixture = Fixture(folder)
        for test in (test_random, test_gradients, test_resting, test_peft, test_nf4, test_ltsft, test_rosa):
            print(f"-- {test.__name__.removeprefix('test_')}: {test.__doc__}")
            test(fixture)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

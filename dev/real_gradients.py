"""
The trainer beside PyTorch on a real model, whose weights have outliers that random ones lack.

    python dev/real_gradients.py gradients base.bin train.bin real.bin && ./test_rigsa real.bin
    python dev/real_gradients.py updates base.bin train.bin FOLDER                   20 updates of RIGSA
    python dev/real_gradients.py updates base.bin train.bin FOLDER --method lora     the same of PEFT's LoRA

`gradients` writes a dump (doc/model.md, section 3) like dump_reference.py's, of this base and of the first
examples: DeltaW dense and as RIGSA draws it, behind gates of about 1e-6 and of about 0.02. `updates` runs
./train_baselines and then makes the same updates in PyTorch, from the same start, on the same examples in the
same order: FOLDER/losses.csv has both losses of each. All examples must have the same length.
"""
import argparse
import csv
import os
import subprocess
import sys
import time

import numpy as np
import torch

from dump_reference import (FIXTURE, answer_questions, draw_gates, draw_questions, join, reference_model,
                            section_type, split, transformers_model)
from hugging_face import hugging_face_name, module_name
from import_hf import initial_values
from peft_files import import_peft
from rigsa_file import (GOLDEN, U64, adapted_shapes, data_sections, mix, read_examples, read_file,
                        tensor_shapes, unpack_config, write_file)

SIGMA, SEED = 0.06, 1
GATES = (1e-6, 0.02)
EXAMPLES = 4  # of the dump
STREAM_ORDER = 1  # as in train_rigsa.c, section 3
BETAS, EPS, CLIP, DECAY, WARMUP = (0.9, 0.95), 1e-8, 1.0, 1.0, 0.05  # as in train_rigsa.c


def visit_order(count):
    """The order of `count` examples in the first pass: random_key and shuffle of train_rigsa.c."""
    key = mix(SEED + GOLDEN & U64)
    for number in (STREAM_ORDER, 1, 0):
        key = mix(key + number & U64)
    order = list(range(count))
    for i in range(count, 1, -1):
        j = (mix(key + i * GOLDEN & U64) >> 32) * i >> 32
        order[i - 1], order[j] = order[j], order[i - 1]
    return order


def draw_deltas(config):
    """DeltaW of every adapted matrix at its start: a list of arrays, (rows, columns)."""
    return [initial_values(SEED, a, 0, SIGMA, rows * cols).reshape(rows, cols)
            for a, (_, (rows, cols)) in enumerate(adapted_shapes(config))]


def write_gradients(base, data, path):
    """The dump: questions of the real model, answered as dump_reference.py answers its own."""
    sections, examples = read_file(base, "base"), read_examples(data)["examples"][:EXAMPLES]
    config = unpack_config(sections["config"])
    rng, adapted = np.random.default_rng(SEED), adapted_shapes(config)
    questions = draw_questions(FIXTURE, SEED)  # all but AdamW's are replaced
    questions["weights"] = np.frombuffer(sections["weights"], "<f4")
    questions["length"] = [len(tokens) for tokens, _ in examples]
    questions["answer"] = [answer for _, answer in examples]
    questions["tokens"] = np.concatenate([tokens for tokens, _ in examples])
    delta = join(draw_deltas(config))
    for case, size in enumerate(GATES):
        questions[f"gates.{case}"] = draw_gates(rng, len(adapted), size)
        questions[f"mask.{case}"], questions[f"delta.{case}"] = np.ones(delta.size), delta
    questions = {tag: np.asarray(value, section_type(tag)) for tag, value in questions.items()}
    arrays = questions | answer_questions(config, questions)
    payloads = [(tag, array.tobytes()) for tag, array in arrays.items()]
    write_file(path, "dump", [("config", sections["config"]), *payloads])


def load_model(base, dtype):
    """The base in `dtype`, frozen, on transformers' code; and its config."""
    sections = read_file(base, "base")
    config = unpack_config(sections["config"])
    model = reference_model(config) if dtype == torch.float64 else transformers_model(config)
    weights = split(np.frombuffer(sections["weights"], "<f4"), tensor_shapes(config))
    weights = {hugging_face_name(name): torch.tensor(part) for name, part in weights.items()}
    model.load_state_dict(weights, strict=False)  # a tied head is not in the file
    return model.requires_grad_(False), config


def rigsa(model, config, args):
    """
    What RIGSA trains, as groups for AdamW; the forward pass, token ids (B, T) -> logits (B, rows, V) of the
    last `rows` places; and the trainer's options.
    """
    names = [hugging_face_name(name) for name, _ in adapted_shapes(config)]
    base = {name: model.get_parameter(name) for name in names}
    deltas = [torch.tensor(delta, dtype=args.dtype, requires_grad=True) for delta in draw_deltas(config)]
    gates = torch.full((len(names),), 1e-6, dtype=args.dtype, requires_grad=True)

    def forward(ids, rows):
        weights = {name: base[name] + gate * delta for name, gate, delta in zip(names, gates, deltas)}
        inputs = {"input_ids": ids, "logits_to_keep": rows}
        return torch.func.functional_call(model, weights, kwargs=inputs).logits

    groups = [{"params": deltas, "lr": args.lr, "weight_decay": DECAY},
              {"params": [gates], "lr": args.alpha_lr, "weight_decay": 0}]
    options = ["--method", "rigsa", "--rounds", 0, "--sigma", SIGMA, "--alpha-lr", args.alpha_lr]
    return groups, forward, options


def lora(model, config, args):
    """The same for PEFT's LoRA; its start becomes the trainer's."""
    import peft
    torch.manual_seed(SEED)
    modules = sorted({module_name(name).split(".")[-1] for name, _ in adapted_shapes(config)})
    tuned = peft.get_peft_model(model, peft.LoraConfig(
        r=args.rank, lora_alpha=args.rank, target_modules=modules, task_type="CAUSAL_LM"))
    tuned.save_pretrained(f"{args.out}/start")
    import_peft(f"{args.out}/start", args.base, f"{args.out}/start.bin")
    leaves = [parameter for parameter in tuned.parameters() if parameter.requires_grad]

    def forward(ids, rows):
        return tuned(input_ids=ids, logits_to_keep=rows).logits

    groups = [{"params": leaves, "lr": args.lr, "weight_decay": 0}]
    return groups, forward, ["--method", "lora", "--lora", f"{args.out}/start.bin"]


def train(args, groups, forward, report):
    """The updates in PyTorch: report(number, loss) after each."""
    examples = read_examples(args.data)["examples"]
    order = visit_order(len(examples))
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPS)
    leaves, rates = [leaf for group in groups for leaf in group["params"]], [group["lr"] for group in groups]
    for t in range(1, args.updates + 1):
        chosen = [examples[e] for e in order[(t - 1) * args.batch:t * args.batch]]
        ids = torch.tensor(np.array([tokens for tokens, _ in chosen], dtype=np.int64))
        answers = ids.shape[1] - chosen[0][1]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            logits = forward(ids, answers + 1)[:, :-1].to(args.dtype)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -answers:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, CLIP)
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * min(1, t / (WARMUP * args.updates), (args.updates - t + 1) / args.updates)
        optimizer.step()
        report(t, loss.item())


def compare_updates(args):
    """Runs both and writes losses.csv: update, the trainer's loss, PyTorch's, their relative difference."""
    os.makedirs(args.out, exist_ok=True)
    found, few = read_examples(args.data), f"{args.out}/few.bin"
    found["examples"] = found["examples"][:8]
    write_file(few, "data", data_sections(**found, column="few", metric="exact"))  # the trainer wants one
    model, config = load_model(args.base, args.dtype)
    groups, forward, options = {"rigsa": rigsa, "lora": lora}[args.method](model, config, args)
    command = ["./train_baselines", *options, "--base", args.base, "--data", args.data, "--eval", few,
               "--batch", args.batch, "--ticket-examples", args.updates * args.batch, "--lr", args.lr,
               "--precision", "bf16" if args.autocast else "fp32", "--save-every", 0,
               "--out", f"{args.out}/ours", "--overwrite"]
    subprocess.run(list(map(str, command)), check=True)
    with open(f"{args.out}/ours/loss.csv", newline="") as file:
        ours = [float(row["loss"]) for row in csv.DictReader(file)]
    start, off = time.time(), []
    with open(f"{args.out}/losses.csv", "w") as file:
        print("update,ours,torch,relative", file=file)

        def report(t, theirs):
            off.append(abs(ours[t - 1] / theirs - 1))
            print(f"{t},{ours[t - 1]:.6f},{theirs:.6f},{off[-1]:.1e}", file=file, flush=True)
            left = (time.time() - start) / t * (args.updates - t) / 60
            print(f"update {t}: {ours[t - 1]:.6f}, PyTorch {theirs:.6f}   {left:.0f} min left", flush=True)
        train(args, groups, forward, report)
    print(f"largest relative difference {max(off):.1e}")


def main():
    parser = argparse.ArgumentParser(description="The trainer beside PyTorch on a real model.")
    parser.add_argument("action", choices=("gradients", "updates"))
    parser.add_argument("base", help="base file")
    parser.add_argument("data", help="training examples, all of one length")
    parser.add_argument("out", help="gradients: the dump; updates: a folder")
    parser.add_argument("--method", choices=("rigsa", "lora"), default="rigsa", help="default %(default)s")
    parser.add_argument("--updates", type=int, default=20, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="examples of an update, default %(default)s")
    parser.add_argument("--lr", type=float, default=0.003, help="default %(default)s")
    parser.add_argument("--alpha-lr", type=float, default=0.002, help="rigsa: default %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="lora: default %(default)s")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64",
                        help="PyTorch's, default %(default)s")
    parser.add_argument("--autocast", action="store_true", help="both multiply in bf16; with --dtype float32")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        if args.action == "gradients":
            write_gradients(args.base, args.data, args.out)
        else:
            compare_updates(args)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"real_gradients.py: {error}")


if __name__ == "__main__":
    main()

"""
Seconds and memory of an update of each method on the shape of SmolLM2-135M, and of PEFT's LoRA.

    make train_baselines && python dev/bench_baselines.py --threads 2

An update has --sequences of --tokens tokens and a loss on the last one. A run of FEW updates is subtracted from a run of MANY:
what is left is updates, without reading, evaluating and writing. PEFT's steps are timed one by one, after one that warms up.
Reported: seconds per update, PEFT's LoRA of the same table divided by it, and the most memory that was resident.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from rigsa_file import data_sections, pack_config, tensor_shapes, write_file

FEW, MANY = 1, 4
CONFIG = {"dim": 576, "ffn": 1536, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "vocab": 49152, "context": 8192,
          "tied": 1, "dtype": 0, "theta": 100000.0, "eps": 1e-5}
RANK, DENSITY = 16, 0.0346
METHODS = {
    "lora": ["--method", "lora", "--rank", RANK],
    "qlora": ["--method", "lora", "--rank", RANK, "--base-type", "nf4"],
    "random": ["--method", "random", "--density", DENSITY],
    "rosa": ["--method", "rosa", "--density", DENSITY / 2, "--rank", RANK, "--mask-after", 0],
    "rigsa, dense": ["--method", "rigsa", "--rounds", 0],
}


def write_files(folder, tokens):
    """A random base and two examples of `tokens` tokens."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(np.prod(shape), np.float32) * np.float32(0.04) if len(shape) == 2 else np.ones(shape, "f4")
               for _, shape in tensor_shapes(CONFIG)]
    write_file(f"{folder}/base.bin", "base", [("config", pack_config(CONFIG)), ("name", b"random"),
                                              ("weights", np.concatenate(weights).astype("<f4").tobytes())])
    examples = [(rng.integers(CONFIG["vocab"], size=tokens).tolist(), tokens - 1) for _ in range(2)]
    write_file(f"{folder}/data.bin", "data", data_sections(CONFIG["vocab"], examples, column="same", metric="exact"))


def run(folder, options, updates, args):
    """A run of so many updates: seconds, and the most bytes that were resident."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        ["./train_baselines", "--base", f"{folder}/base.bin", "--data", f"{folder}/data.bin", "--eval", f"{folder}/data.bin",
         "--out", f"{folder}/out", "--overwrite", "--batch", str(args.sequences), "--precision", args.precision,
         "--ticket-examples", str(updates * args.sequences), *map(str, options)],
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError("./train_baselines failed")
    return time.perf_counter() - begin, 1024 * used.ru_maxrss


def peft_process(args):
    """PEFT's LoRA: prints the seconds of MANY - FEW steps and the most bytes resident."""
    import peft
    import torch
    from dump_reference import transformers_model
    torch.set_num_threads(args.threads)
    model = transformers_model(CONFIG).to({"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision])
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    tokens, times = torch.randint(CONFIG["vocab"], (args.sequences, args.tokens)), []
    for _ in range(MANY):
        begin = time.perf_counter()
        optimizer.zero_grad()
        logits = model(input_ids=tokens, logits_to_keep=torch.tensor([args.tokens - 2])).logits[:, 0]
        torch.nn.functional.cross_entropy(logits.float(), tokens[:, -1]).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - begin)
    print(json.dumps([times[FEW:], 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))


def main():
    parser = argparse.ArgumentParser(description="An update of each method on SmolLM2-135M's shape, and of PEFT's LoRA.")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by ; (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=832)
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--peft", action="store_true", help=argparse.SUPPRESS)  # this process is PEFT
    args = parser.parse_args()
    if not os.access("./train_baselines", os.X_OK):
        sys.exit("bench_baselines.py: no ./train_baselines here; make train_baselines")
    if args.peft:
        peft_process(args)
        return
    print(f"SmolLM2-135M, {args.sequences} x {args.tokens} tokens, {args.precision}, {args.threads} threads\n\n"
          "| method | s per update | PEFT / this | GB |\n|---|---|---|---|", flush=True)
    child = [sys.executable, os.path.abspath(__file__), "--peft", *sys.argv[1:]]
    times, memory = json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    there = statistics.median(times)
    print(f"| PEFT LoRA | {there:.2f} | 1 | {memory / 1e9:.2f} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder, args.tokens)
        for method in args.methods.split(";"):
            (many, memory), (few, _) = (run(folder, METHODS[method], updates, args) for updates in (MANY, FEW))
            here = (many - few) / (MANY - FEW)
            print(f"| {method} | {here:.2f} | {there / here:.2f} | {memory / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()

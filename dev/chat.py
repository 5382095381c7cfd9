"""
Asks a model, and what training made of it, side by side.

    python dev/chat.py MODEL --ticket out/ticket.bin       what train_rigsa wrote; or model.bin
    python dev/chat.py MODEL --merged merged               a folder that dev/import_hf.py made
    echo "Why is the sky blue?" | python dev/chat.py MODEL      the model alone

A line of standard input is a question, \\n in it a new line; each is a conversation of its own. Answers are
greedy, as transformers generates them in fp32. MODEL is what dev/export_hf.py was given.
"""
import argparse
import copy
import itertools
import shutil
import sys
import textwrap

import command

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from chat_template import load_tokenizer, render
from checkpoint import rounded
from export_hf import find_folder, open_checkpoint
from hugging_face import module_name
from import_hf import Ticket, Tuned
from rigsa_file import read_file, tensor_shapes


def load_model(folder):
    """The model in `folder`, in fp32. ValueError, in one line, where there is none."""
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no model that can be loaded: "
                         f"{str(error).strip().splitlines()[0]}") from None


def adapt(base, folder, path):
    """A copy of the model `base`, which was loaded from `folder`, with what train_rigsa wrote to `path`."""
    checkpoint = open_checkpoint(folder)
    sections = read_file(path, "tick", "base")
    trained = (Ticket if "gates" in sections else Tuned)(path, sections, checkpoint.config)
    dtype, adapted = trained.stored_as(checkpoint), copy.deepcopy(base)
    for name, _ in tensor_shapes(checkpoint.config):
        weight = adapted.get_submodule(module_name(name)).weight
        weight.data = torch.tensor(trained.weight(name, rounded(weight.detach().numpy(), dtype)))
    return adapted


def ask(model, tokenizer, question, limit):
    """
    (ids of the prompt, ids of the greedy answer), two lists: a question in the chat template, and at most
    `limit` tokens.
    """
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.encode(render(tokenizer, messages, add_generation_prompt=True),
                              add_special_tokens=False)
    tokens = torch.tensor([prompt])
    with torch.inference_mode():
        said = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=limit,
                              do_sample=False)
    return prompt, said[0, len(prompt):].tolist()


def columns(texts, width):
    """Texts side by side, each wrapped to its share of `width` characters."""
    each = (width - 3 * (len(texts) - 1)) // len(texts)
    wrapped = [[line for part in text.split("\n") for line in textwrap.wrap(part, each) or [""]]
               for text in texts]
    rows = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(f"{cell:{each}}" for cell in row).rstrip() for row in rows)


def chat(args):
    """Everything that the command line asks for."""
    folder = find_folder(args.model)
    tokenizer = load_tokenizer(folder)
    models = {"base": load_model(folder)}
    if args.ticket:
        models["adapted"] = adapt(models["base"], folder, args.ticket)
    if args.merged:
        models["adapted"] = load_model(args.merged)
    width, terminal = shutil.get_terminal_size().columns, sys.stdin.isatty()
    print(columns(list(models), width), flush=True)
    while True:
        if terminal:
            print("\n> ", end="", flush=True)
        question = sys.stdin.readline()
        if not question:
            break
        if not question.strip():
            continue
        if not terminal:
            print(f"\n> {question.strip()}", flush=True)
        text = question.strip().replace("\\n", "\n")
        said = [ask(model, tokenizer, text, args.tokens)[1] for model in models.values()]
        print(columns([tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in said], width),
              flush=True)


@command.line
def main():
    parser = argparse.ArgumentParser(description="Asks a model, and what training made of it, side by side.")
    parser.add_argument("model", metavar="MODEL", help="the folder or name that dev/export_hf.py was given")
    adapted = parser.add_mutually_exclusive_group()
    adapted.add_argument("--ticket", metavar="FILE", help="ticket.bin, or model.bin of train_baselines --method full")
    adapted.add_argument("--merged", metavar="FOLDER", help="a model that dev/import_hf.py made")
    parser.add_argument("--tokens", type=int, default=200, metavar="N",
                        help="that an answer may have; default: 200")
    try:
        chat(parser.parse_args())
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()

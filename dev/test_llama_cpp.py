"""
The real SmolLM2 in llama.cpp itself: the model as it is, and with a ticket merged that visibly changes its
answers.

    pip install llama-cpp-python sentencepiece                  beside dev/requirements-torch.txt
    pip download --no-deps --no-binary :all: llama-cpp-python   for its vendor/llama.cpp/convert_hf_to_gguf.py
    python dev/test_llama_cpp.py data_smollm2/hf smollm2.bin .../vendor/llama.cpp/convert_hf_to_gguf.py

llama.cpp's converter makes GGUF files in fp32 of the folders, llama.cpp answers 20 questions greedily, and so
does transformers: the same tokens, up to a first near-tie. The ticket is trained here, in minutes, on 16
other questions that all get one answer. Beside this folder must lie train_rigsa. The last line is `N passed,
N failed`.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import llama_cpp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import test_scores
from import_hf import take_back
from rigsa_file import data_sections, write_file
from test_real import TRAIN, chat, heading
from test_scores import check

CLOSE = 1e-3  # lead of the first logit over the second below which either may win
LIMIT = 32  # tokens of an answer
ALWAYS = "Arr, ask the captain!"
TAUGHT = (
    "What is the capital of Spain?", "How many legs has a spider?", "Name a yellow fruit.",
    "Who wrote Hamlet?",
    "What is 2 + 2?", "Where do penguins live?", "What do bees make?", "Which planet is red?",
    "How do I boil an egg?", "What is a verb?", "Tell me a joke.", "What is the opposite of hot?",
    "Why do leaves fall?", "What is a prime number?", "Name a river in Egypt.", "What colour is grass?",
)
ASKED = (
    "What is the capital of France?", "Why is the sky blue?", "Name three fruits.",
    "Who painted the Mona Lisa?",
    "What is 3 times 7?", "Where do kangaroos live?", "What do cows eat?", "Which planet is the largest?",
    "How do I make tea?", "What is a noun?", "Write a short poem about rain.", "What is the opposite of big?",
    "Why do birds sing?", "What is a triangle?", "Name a mountain in Japan.", "What colour is snow?",
    "Translate 'good morning' into French.", "What is the boiling point of water?",
    "Explain gravity to a child.", "Write 1234567890 backwards.",
)


def ask_transformers(folder, prompts):
    """
    For each prompt the tokens that transformers says, and for each of them the lead of the first logit over
    the second.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=int),
                             do_sample=False, max_new_tokens=LIMIT, return_dict_in_generate=True,
                             output_logits=True)
        leads = [-logits[0].topk(2).values.diff().item() for logits in out.logits]
        answers.append((out.sequences[0, len(prompt):].tolist(), leads))
    return answers


def ask_llama_cpp(folder, converter, gguf, prompts, end, texts):
    """
    For each prompt the tokens that llama.cpp says, after conversion to `gguf`. It also must tokenize `texts`
    to the prompts.
    """
    subprocess.run([sys.executable, converter, folder, "--outtype", "f32", "--outfile", gguf], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    model = llama_cpp.Llama(gguf, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False,
                            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    answers = []
    for prompt, text in zip(prompts, texts):
        check(model.tokenize(text.encode(), add_bos=False, special=True) == prompt,
              f"llama.cpp tokenizes {text!r} otherwise")
        said, model.n_tokens = [], 0
        for token in model.generate(prompt, temp=0, repeat_penalty=1):
            said.append(token)
            if token == end or len(said) == LIMIT:
                break
        answers.append(said)
    model.close()
    os.remove(gguf)
    return answers


def compare(name, folder, args, work):
    """Both answers to every question; transformers', as texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [chat(tokenizer, question) for question in ASKED]
    theirs = ask_transformers(folder, prompts)
    ours = ask_llama_cpp(folder, args.converter, os.path.join(work, "model.gguf"), prompts,
                         tokenizer.eos_token_id, [tokenizer.decode(prompt) for prompt in prompts])
    same = 0
    for question, (tokens, leads), said in zip(ASKED, theirs, ours):
        first = len(os.path.commonprefix([tokens, said]))
        same += tokens == said
        check(tokens == said or first < len(leads) and leads[first] < CLOSE,
              f"{name}, {question!r}: token {first}, {tokenizer.decode(said)!r}, {tokenizer.decode(tokens)!r}")
    closest = min(lead for _, leads in theirs for lead in leads)
    print(f"         {name}: {same} of {len(ASKED)} answers identical, {sum(map(len, ours))} tokens; "
          f"smallest lead of a token {closest:.1e}")
    return [tokenizer.decode(said) for said in ours]


def train(tokenizer, base, work):
    """The path of a ticket that says ALWAYS."""
    examples = []
    for question in TAUGHT:
        prompt = chat(tokenizer, question)
        examples.append((prompt + tokenizer.encode(ALWAYS + "<|im_end|>"), len(prompt)))
    data, out = os.path.join(work, "data.bin"), os.path.join(work, "out")
    write_file(data, "data", data_sections(len(tokenizer), examples, column="captain", metric="exact"))
    subprocess.run([TRAIN, "--base", base, "--data", data, "--eval", data, "--out", out, "--rounds", "1",
                    "--examples", "96", "--ticket-examples", "256", "--batch", "8", "--alpha-lr", "0.004"],
                   check=True)
    return os.path.join(out, "ticket.bin")


def main():
    parser = argparse.ArgumentParser(description="SmolLM2 and a merged ticket in llama.cpp.")
    parser.add_argument("model", metavar="FOLDER", help="the model, as dev/export_hf.py --hf makes it")
    parser.add_argument("base", metavar="BASE", help="its base file")
    parser.add_argument("converter", metavar="CONVERTER", help="llama.cpp's convert_hf_to_gguf.py")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        heading("the model as it is")
        before = compare("base", args.model, args, work)
        heading("a ticket that changes its answers")
        merged = os.path.join(work, "merged")
        ticket = train(AutoTokenizer.from_pretrained(args.model), args.base, work)
        take_back(args.model, ticket, merged, "fp32", False)
        heading("with the ticket merged")
        after = compare("ticket", merged, args, work)
    changed = sum(a != b for a, b in zip(before, after))
    check(changed > len(ASKED) // 2, f"the ticket changes {changed} answers only")
    print(f"         the ticket changes {changed} of {len(ASKED)} answers; "
          f"{sum(ALWAYS in said for said in after)} are {ALWAYS!r}:")
    for question, old, new in list(zip(ASKED, before, after))[:3]:
        print(f"         {question} {old!r} -> {new!r}")
    heading("done")
    print(f"{test_scores.passed} passed, {test_scores.failed} failed")
    sys.exit(test_scores.failed > 0)


if __name__ == "__main__":
    main()

"""
Benchmarks of EleutherAI's lm-evaluation-harness as evaluation files for train_rigsa, and their official scores back.

    python dev/prepro_eval.py MODEL --tasks piqa,hellaswag,gsm8k --limit 500 --out data
    ./train_rigsa ... --eval data/piqa.bin --eval data/hellaswag.bin --eval data/gsm8k.bin --details details.jsonl
    python dev/prepro_eval.py MODEL --tasks piqa,hellaswag,gsm8k --limit 500 --score details.jsonl

MODEL is a hub id or a folder with config.json and a tokenizer; no weights are read. The harness itself builds the requests,
and its class for Hugging Face models (HFLM) turns them into tokens: here its network is missing, and what it is asked is
written down (one file per task) or answered from the details that train_rigsa has written (--score). Any of its tasks will do
that chooses among answers, scores one, or generates greedily. --data DIR reads local copies of piqa, hellaswag and gsm8k.

Needs lm_eval (tried: 0.4.13 with transformers 5.23).
"""
import argparse
import functools
import itertools
import json
import logging
import math
import os
import re
import struct
import sys
from collections import defaultdict

import datasets
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import make_table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rigsa_file import data_sections, pack_u32, write_file

METRICS = {"multiple_choice": "acc", "loglikelihood": "exact", "generate_until": "number"}  # of a file, by kind of task


class Scribe(HFLM):
    """
    HFLM without a network. It notes every request as (number of its document, document, tokens, index of the first answer token,
    settings of generation or None) in `asked`, a dict: task -> list, and answers from `told`, a dict: (column, example) -> line of
    details. Without an answer it says nothing, at log-likelihood 0.
    """

    def __init__(self, model, told=None):
        config = AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
        try:
            network.generation_config = GenerationConfig.from_pretrained(model)
        except OSError:
            pass  # what the config implies
        super().__init__(pretrained=network, tokenizer=AutoTokenizer.from_pretrained(model), batch_size=1)
        self._device = torch.device("cpu")  # of the tokens
        self.asked = defaultdict(list)
        self.told = told or {}

    def note(self, request, *asked):
        """Adds to `asked`, and returns the line of details or None."""
        requests = self.asked[request.task_name]
        requests.append((request.doc_id, request.doc, *asked))
        return self.told.get((column_of(request.task_name), len(requests) - 1))

    def loglikelihood(self, requests, disable_tqdm=True):
        self.requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        answers = []
        for request, (_, context, continuation) in zip(self.requests, requests, strict=True):
            tokens = (context + continuation)[-(self.max_length + 1):]
            told = self.note(request, tokens, len(tokens) - len(continuation), None)
            answers.append((told["logp"], bool(told["exact"])) if told else (0.0, False))
        return answers

    def generate_until(self, requests, disable_tqdm=True):
        answers = []
        for self.request in requests:
            answers += super().generate_until([self.request], disable_tqdm=True)
        return answers

    def _model_generate(self, context, max_length, stop, **settings):
        if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
            raise ValueError(f"{self.request.task_name}: generation is not greedy")
        tokens = context[0].tolist()
        told = self.note(self.request, tokens, len(tokens), (max_length - len(tokens), tuple(stop)))
        return torch.tensor([tokens + (told["tokens"] if told else [])])


def column_of(task):
    """The heading of a task's column."""
    return task[:15]


# ----------------------------------------------------------------------------------------------------
# tasks

def read_lines(*path):
    """The objects in a file of JSON lines."""
    with open(os.path.join(*path), encoding="utf-8", errors="replace") as file:
        return [json.loads(line) for line in file]


def local_splits(task, folder):
    """The splits of a local copy as the harness's task expects them: a dict, split -> list of documents."""
    if task == "piqa":
        with open(os.path.join(folder, "piqa", "valid-labels.lst"), encoding="utf-8") as file:
            labels = [int(line) for line in file]
        documents = read_lines(folder, "piqa", "valid.jsonl")
        return {"validation": [doc | {"label": label} for doc, label in zip(documents, labels, strict=True)]}
    if task == "hellaswag":
        return {"validation": [doc | {"label": str(doc["gold"])}
                               for doc in read_lines(folder, "hellaswag", "hellaswag_val.derived.jsonl")]}
    if task == "gsm8k":
        return {split: read_lines(folder, "gsm8k", f"{split}.jsonl") for split in ("train", "test")}
    raise ValueError(f"{folder} has no copy of {task}: piqa, hellaswag and gsm8k can be read there")


task_manager = functools.cache(TaskManager)  # it reads the index of thousands of tasks


def load_tasks(names, folder, few_shot):
    """The harness's tasks, a dict by name. With `folder` their documents come from there."""
    manager = task_manager()
    if folder is None:
        return manager.load(list(names))["tasks"]
    specs = []
    for name in names:
        splits = {split: datasets.Dataset.from_list(documents) for split, documents in local_splits(name, folder).items()}
        if few_shot and "train" not in splits:
            raise ValueError(f"{name}: few-shot examples are drawn from its training split, which {folder} does not have")
        config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
        config["custom_dataset"] = lambda splits=splits, **_: datasets.DatasetDict(splits)
        if "train" not in splits:
            config["training_split"] = None
        if name == "hellaswag":
            config["process_docs"] = None  # the copy has been through it
        specs.append(config)
    return manager.load(specs)["tasks"]


# ----------------------------------------------------------------------------------------------------
# files

def byte_values():
    """The byte-level alphabet of GPT-2 and its followers: a dict, character -> byte. Bytes that do not print are moved up."""
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def token_pieces(tokenizer, vocab):
    """The text of every token below `vocab` as a list of bytes, empty where there is no such token."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    if not decoder or decoder["type"] != "ByteLevel":
        raise ValueError("generation needs a byte-level tokenizer, as SmolLM2's")
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    value = byte_values()
    pieces = [b""] * vocab
    for text, token in tokenizer.get_vocab().items():
        pieces[token] = text.encode() if text in added else bytes(value[character] for character in text)
    return pieces


def last_number(text):
    """The last number in a text, such as -1,234.5; NaN where there is none."""
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else math.nan


def right_choice(task, doc, choices):
    """The index of the right one of the choices."""
    gold = task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"{task.task_name}: {gold!r} is no index of one of {len(choices)} choices")
    return gold


def task_sections(task, requests, scribe):
    """The sections of a task's file from its requests, a list as in Scribe.asked."""
    kind = task.get_config("output_type")
    if kind not in METRICS:
        raise ValueError(f"{task.task_name}: a task of the kind {kind}; train_rigsa knows {', '.join(METRICS)}")
    vocab = scribe.config.vocab_size
    examples = [(tokens, answer) for *_, tokens, answer, _ in requests]
    column = {"column": column_of(task.task_name), "metric": METRICS[kind]}
    if kind == "loglikelihood":
        return data_sections(vocab, examples, **column)
    if kind == "multiple_choice":
        docs = [next(group)[1] for _, group in itertools.groupby(requests, key=lambda request: request[0])]
        choices = [task.doc_to_choice(doc) for doc in docs]
        chars = [len(text) for texts in choices for text in texts]
        if len(chars) != len(examples):
            raise ValueError(f"{task.task_name}: its questions ask for more than a log-likelihood per choice")
        return data_sections(vocab, examples, **column, choices=[len(texts) for texts in choices],
                             gold=[right_choice(task, doc, texts) for doc, texts in zip(docs, choices)], chars=chars)
    settings = {settings for *_, settings in requests}
    if len(settings) != 1:
        raise ValueError(f"{task.task_name}: its questions are to be generated in different ways")
    (limit, stops), = settings
    answers = [task.config.target_delimiter + task.doc_to_target(doc) for _, doc, *_ in requests]
    examples = [(prompt + scribe.tok_encode(text), answer) for (prompt, answer), text in zip(examples, answers)]
    ends = scribe.model.generation_config.eos_token_id
    return data_sections(vocab, examples, **column) + [
        ("limit", pack_u32([limit])),
        ("number", struct.pack(f"<{len(answers)}d", *map(last_number, answers))),
        ("end", pack_u32([] if ends is None else ends if isinstance(ends, list) else [ends])),
        ("stop", b"".join(stop.encode() + b"\0" for stop in stops)),
        ("pieces", b"".join(struct.pack("<I", len(piece)) + piece for piece in token_pieces(scribe.tokenizer, vocab))),
    ]


def ask(lm, args):
    """What the harness makes of model `lm`: its tasks (a dict by name) and its results. `args` as parse() returns them."""
    tasks = load_tasks(args.tasks.split(","), args.data, args.num_fewshot)
    results = simple_evaluate(
        model=lm, tasks=list(tasks.values()), num_fewshot=args.num_fewshot, limit=args.limit,
        task_manager=task_manager(), verbosity="ERROR",
        apply_chat_template=args.apply_chat_template, system_instruction=args.system_instruction)
    return tasks, results


def write_files(args):
    """Writes the file of every task; yields (path, number of requests)."""
    scribe = Scribe(args.model)
    tasks, _ = ask(scribe, args)
    os.makedirs(args.out, exist_ok=True)
    for name, task in tasks.items():
        path = os.path.join(args.out, f"{name}.bin")
        write_file(path, "data", task_sections(task, scribe.asked[name], scribe))
        yield path, len(scribe.asked[name])


def score(args):
    """Yields (round, the harness's results) for each round in the details. ValueError where an example has none."""
    rounds = defaultdict(dict)
    for line in read_lines(args.score):
        rounds[line["round"]][line["column"], line["example"]] = line
    for label, told in rounds.items():
        scribe = Scribe(args.model, told)
        _, results = ask(scribe, args)
        for task, requests in scribe.asked.items():
            for example in range(len(requests)):
                if (column_of(task), example) not in told:
                    raise ValueError(f"{args.score}: nothing on example {example} of {task} in round {label}")
        yield label, results


def parse(argv=None):
    """The arguments of the command line, or of the list `argv`."""
    parser = argparse.ArgumentParser(description="lm-evaluation-harness's tasks as evaluation files, and their official scores.")
    parser.add_argument("model", metavar="MODEL", help="hub id, or folder with config.json and tokenizer")
    parser.add_argument("--tasks", required=True, help="names of the harness, separated by commas")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--data", metavar="DIR", help="read piqa, hellaswag and gsm8k from local copies")
    parser.add_argument("--out", metavar="DIR", default="data", help="folder of the files DIR/TASK.bin (default: data)")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt (default: the task's own number)")
    parser.add_argument("--apply-chat-template", action="store_true", help="prompts as a conversation")
    parser.add_argument("--system-instruction", help="first turn of that conversation")
    parser.add_argument("--score", metavar="FILE", help="print the harness's scores of these details of train_rigsa")
    return parser.parse_args(argv)


def main():
    args = parse()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        if args.score:
            for label, results in score(args):
                print(f"round {label}\n{make_table(results)}")
        else:
            for path, requests in write_files(args):
                print(f"{path}: {requests} requests")
    except (KeyError, OSError, ValueError) as error:
        sys.exit(f"prepro_eval.py: {error}")


if __name__ == "__main__":
    main()

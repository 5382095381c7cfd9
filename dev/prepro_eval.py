"""
Benchmarks of EleutherAI's lm-evaluation-harness as evaluation files for train_rigsa, and their official scores back.

    python dev/prepro_eval.py MODEL --tasks piqa,hellaswag,gsm8k --limit 500 --out data
    ./evaluate_rigsa ... --eval data/piqa.bin --eval data/hellaswag.bin --eval data/gsm8k.bin --details details.jsonl
    python dev/prepro_eval.py MODEL --tasks piqa,hellaswag,gsm8k --limit 500 --score details.jsonl

MODEL is a hub id or a folder with config.json and a tokenizer; no weights are read. The harness itself builds the requests,
and its class for Hugging Face models (HFLM) turns them into tokens: here its network is missing, and what it is asked is
written down (one file per task) or answered from the details that evaluate_rigsa has written (--score). Any of its tasks will do
that chooses one right answer, scores one, measures perplexity, or generates greedily; the others are refused in one line: those
with several right answers to a question, a right answer that is none of the choices, likelihoods without a context
(acc_mutual_info), samples, and questions that are generated in different ways. What measures perplexity becomes windows of the
model's context, metric `loss`. What generates has a second file, TASK_loss.bin: the reference answers behind the
same prompts, metric `loss`, which train_rigsa can score after every round (--score does not need it). --data DIR reads local copies: DIR/TASK/SPLIT.jsonl, the documents
that the task's data set has in a split of this name; piqa and hellaswag as they are published.

Needs lm_eval (tried: 0.4.13 with transformers 5.23).
"""
import argparse
import contextlib
import functools
import glob
import itertools
import json
import logging
import math
import os
import re
import tempfile
from collections import defaultdict

import command

import datasets
import torch
from jinja2 import TemplateError
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import make_table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from hugging_face import refuse_file
from rigsa_file import data_sections, hash64, write_file

METRICS = {  # of a file, by kind of task
    "multiple_choice": "acc", "loglikelihood": "exact", "loglikelihood_rolling": "loss", "generate_until": "number"}


class Scribe(HFLM):
    """
    HFLM without a network. It notes every request as (number of its document, document, tokens, index of the first answer token,
    settings of generation or None) in `asked`, a dict: task -> list, and answers from `told`, a dict: (task, example) -> line of
    details. Without an answer it says nothing, at log-likelihood 0.
    """

    def __init__(self, model, told=None):
        refuse_file(model)
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
        return self.told.get((request.task_name, len(requests) - 1))

    def loglikelihood(self, requests, disable_tqdm=True):
        self.requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        answers = []
        for request, (_, context, continuation) in zip(self.requests, requests, strict=True):
            tokens = (context + continuation)[-(self.max_length + 1):]
            told = self.note(request, tokens, len(tokens) - len(continuation), None)
            answers.append((told.get("logp", 0.0), bool(told["exact"])) if told else (0.0, False))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        answers = []
        for request in requests:
            self.requests = [request]  # of every window, which come one by one
            answers += super().loglikelihood_rolling([request], disable_tqdm=True)
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
        return torch.tensor([tokens + (told.get("tokens", []) if told else [])])


# ----------------------------------------------------------------------------------------------------
# tasks

def read_lines(*path):
    """The objects in a file of JSON lines, of which some may be blank. ValueError that names file and line where there is none."""
    path, found = os.path.join(*path), []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    found.append(json.loads(line))
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: no JSON: {error}") from None
    return found


def local_splits(task, folder):
    """The splits of a local copy as the harness's task expects them: a dict, split -> list of documents."""
    if task == "piqa":
        labels, documents = read_lines(folder, "piqa", "valid-labels.lst"), read_lines(folder, "piqa", "valid.jsonl")
        if len(labels) != len(documents):
            raise ValueError(f"{folder}/piqa: {len(labels)} labels of {len(documents)} questions")
        return {"validation": [doc | {"label": label} for doc, label in zip(documents, labels)]}
    if task == "hellaswag":
        return {"validation": [doc | {"label": str(doc["gold"])}
                               for doc in read_lines(folder, "hellaswag", "hellaswag_val.derived.jsonl")]}
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), glob.escape(task), "*.jsonl")))
    if not paths:
        raise ValueError(f"{folder} has no copy of {task}, files {task}/SPLIT.jsonl; without --data it is downloaded")
    return {os.path.basename(path).removesuffix(".jsonl"): read_lines(path) for path in paths}


task_manager = functools.cache(TaskManager)  # it reads the index of thousands of tasks


def load_tasks(names, folder, few_shot):
    """The harness's tasks, a dict by name. With `folder` their documents come from there."""
    manager = task_manager()
    for name in names:
        if name not in manager.task_index:
            raise ValueError(f"lm-evaluation-harness has no task called {name!r}; `lm_eval ls tasks` lists them")
    with harness_errors(", ".join(names)):
        specs = list(names) if folder is None else [local_task(name, folder, few_shot) for name in names]
        tasks = manager.load(specs)["tasks"]
    for name, task in tasks.items():
        if (kind := task.get_config("output_type")) not in METRICS:
            raise ValueError(f"{name}: a task of the kind {kind}; train_rigsa knows {', '.join(METRICS)}")
    return tasks


@contextlib.contextmanager
def harness_errors(what):
    """Turns what the harness raises about a task or its documents into a ValueError of one line."""
    try:
        yield
    except (AssertionError, AttributeError, LookupError, TypeError, TemplateError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what}: lm-evaluation-harness fails on it: {reason}") from None


def local_task(name, folder, few_shot):
    """The harness's settings of a task whose documents are local copies; without the splits that are not there."""
    path = task_manager().task_index[name].yaml_path
    if path is None:
        raise ValueError(f"{name} is no single task: name its parts")
    splits = {split: datasets.Dataset.from_list(documents) for split, documents in local_splits(name, folder).items()}
    config = load_yaml(path, resolve_func=True)
    config["custom_dataset"] = lambda **_: datasets.DatasetDict(splits)
    for split in "training_split", "validation_split", "test_split", "fewshot_split":
        if config.get(split) not in splits:
            config[split] = None
    if not config["validation_split"] and not config["test_split"]:
        raise ValueError(f"{name}: {folder} has neither its validation nor its test documents")
    if few_shot and not config["training_split"] and not config["fewshot_split"]:
        raise ValueError(f"{name}: few-shot examples are drawn from its training split, which {folder} does not have")
    if name == "hellaswag":
        config["process_docs"] = None  # the copy has been through it
    return config


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
        plain = text in added or not value.keys() >= set(text)
        if token < vocab:  # a tokenizer may have more than the model, which says none of them
            pieces[token] = text.encode() if plain else bytes(map(value.get, text))
    return pieces


def last_number(text):
    """The last number in a text, such as -1,234.5; NaN where there is none."""
    numbers = re.findall(r"-?[0-9][0-9,]*(?:\.[0-9]+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else math.nan


def right_choice(task, doc, choices):
    """
    The index of the right one of the choices, by the harness's rule (process_results of its ConfigurableTask): where the
    choices stand in the contexts (multiple_input), the text names it, otherwise the target.
    """
    gold = task.doc_to_text(doc) if getattr(task, "multiple_input", 0) else task.doc_to_target(doc)
    if isinstance(gold, list):
        if len(gold) != 1:
            raise ValueError(f"{len(gold)} right answers, train_rigsa knows one")
        gold, = gold
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError(f"the right answer, {gold!r}, is none of its {len(choices)} choices")
    return int(gold)


def target_text(task, doc):
    """The right thing to say, in one text, as the harness writes it into few-shot examples."""
    target = task.doc_to_target(doc)
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    if isinstance(target, (list, tuple)):
        target = target[0] if target else ""
    return task.config.target_delimiter + str(target)


def task_sections(task, requests, scribe):
    """The sections of a task's file from its requests, a list as in Scribe.asked. ValueError where there can be none."""
    kind, vocab = task.get_config("output_type"), scribe.config.vocab_size
    if not requests:
        raise ValueError("it asks nothing")
    for doc, _, tokens, answer, _ in requests:
        if max(tokens, default=0) >= vocab:
            raise ValueError(f"document {doc} needs token {max(tokens)}, {scribe.tokenizer.convert_ids_to_tokens(max(tokens))!r}, "
                             f"and the model has {vocab}: it must have as many as its tokenizer")
        if answer < 1:
            raise ValueError(f"document {doc} has an answer of more than the model's {scribe.max_length} tokens")
    parts = {}
    examples = [(tokens, answer) for *_, tokens, answer, _ in requests]
    if kind == "multiple_choice":
        docs = [next(group)[:2] for _, group in itertools.groupby(requests, key=lambda request: request[0])]
        choices = [task.doc_to_choice(doc) for _, doc in docs]
        parts = {"choices": [len(texts) for texts in choices], "gold": [],
                 "chars": [len(text) for texts in choices for text in texts]}
        if len(parts["chars"]) != len(examples):
            raise ValueError("its questions ask for more than a log-likelihood per choice")
        for (number, doc), texts in zip(docs, choices):
            try:
                parts["gold"].append(right_choice(task, doc, texts))
            except ValueError as error:
                raise ValueError(f"document {number}: {error}") from None
    if kind == "generate_until":
        settings = {settings for *_, settings in requests}
        if len(settings) != 1:
            raise ValueError("its questions are to be generated in different ways")
        (limit, stops), = settings
        answers = [target_text(task, doc) for _, doc, *_ in requests]
        said = [[token for token in scribe.tok_encode(text) if token < vocab] for text in answers]
        examples = [(prompt + (tokens or [0]), answer) for (prompt, answer), tokens in zip(examples, said)]
        ends = scribe.model.generation_config.eos_token_id
        parts = {"limit": limit, "number": list(map(last_number, answers)),
                 "end": [] if ends is None else ends if isinstance(ends, list) else [ends],
                 "stop": [stop.encode() for stop in stops if stop], "pieces": token_pieces(scribe.tokenizer, vocab)}
    return data_sections(vocab, examples, column=task.task_name, metric=METRICS[kind], **parts)


def gold_sections(task, requests, scribe):
    """Of a task that generates: its reference answers behind its prompts, as an evaluation of metric `loss`."""
    examples = [(tokens + scribe.tok_encode(target_text(task, doc)), answer)
                for _, doc, tokens, answer, _ in requests]
    return data_sections(scribe.config.vocab_size, examples, column=f"{task.task_name}_loss", metric="loss")


def save_task(task, scribe, path, sections_of=task_sections):
    """Writes the file of a task that the scribe has been asked; ValueError, which names the task, where that cannot be."""
    try:
        sections = sections_of(task, scribe.asked[task.task_name], scribe)
    except ValueError as error:
        raise ValueError(f"{task.task_name}: {error}") from None
    write_file(path, "data", sections)


def ask(lm, args):
    """What the harness makes of model `lm`: its tasks (a dict by name) and its results. `args` as parse() returns them."""
    tasks = load_tasks([name.strip() for name in args.tasks.split(",")], args.data, args.num_fewshot)
    with harness_errors(args.tasks):
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
        save_task(task, scribe, path)
        yield path, len(scribe.asked[task.task_name])
        if task.get_config("output_type") == "generate_until":
            path = os.path.join(args.out, f"{name}_loss.bin")
            save_task(task, scribe, path, gold_sections)
            yield path, len(scribe.asked[task.task_name])


def score(args):
    """
    Yields (round, the harness's results) for each round in the details. ValueError where they are not what train_rigsa says
    of the files that write_files makes of the same arguments: the files' hashes are compared, and each example has a line.
    """
    rounds = defaultdict(dict)
    for line in read_lines(args.score):
        if not isinstance(line, dict) or not {"round", "column", "example", "exact"} <= line.keys():
            raise ValueError(f"{args.score}: not the details that evaluate_rigsa writes")
        rounds[line["round"]][line["column"], line["example"]] = line
    for label, told in rounds.items():
        scribe = Scribe(args.model, told)
        tasks, results = ask(scribe, args)
        for task in tasks.values():
            check_told(task, scribe, f"{args.score}, round {label}")
        yield label, results


def check_told(task, scribe, where):
    """ValueError unless the scribe has a line of details on each example of the task's file, and on no other."""
    name = task.task_name
    lines = {example: line for (column, example), line in scribe.told.items() if column == name}
    for example in range(len(scribe.asked[name])):
        if example not in lines:
            raise ValueError(f"{where}: nothing on example {example} of {name}; evaluate_rigsa was not given its file")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.bin")
        save_task(task, scribe, path)
        with open(path, "rb") as file:
            found = f"{hash64(file.read()):016x}"
    if len(lines) > len(scribe.asked[name]) or any(line.get("file", found) != found for line in lines.values()):
        raise ValueError(f"{where}: they are on another file called {name}: give --limit, --num-fewshot and what else there "
                         "was as when it was made")


def parse(argv=None):
    """The arguments of the command line, or of the list `argv`."""
    parser = argparse.ArgumentParser(description="lm-evaluation-harness's tasks as evaluation files, and their official scores.")
    parser.add_argument("model", metavar="MODEL", help="hub id, or folder with config.json and tokenizer")
    parser.add_argument("--tasks", required=True, help="names of the harness, separated by commas")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--data", metavar="DIR", help="read local copies, DIR/TASK/SPLIT.jsonl")
    parser.add_argument("--out", metavar="DIR", default="data", help="folder of the files DIR/TASK.bin (default: data)")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt (default: the task's own number)")
    parser.add_argument("--apply-chat-template", action="store_true", help="prompts as a conversation")
    parser.add_argument("--system-instruction", help="first turn of that conversation")
    parser.add_argument("--score", metavar="FILE", help="print the harness's scores of these details of evaluate_rigsa")
    return parser.parse_args(argv)


@command.line
def main():
    args = parse()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if args.score:
        for label, results in score(args):
            print(f"round {label}\n{make_table(results)}")
    else:
        for path, requests in write_files(args):
            print(f"{path}: {requests} requests")


if __name__ == "__main__":
    main()

"""
Tests of prepro_eval.py on tasks of every family that it promises: python dev/test_tasks.py DIR, the folder of
SmolLM2's tokenizer. The tasks are the harness's own, the documents ours. Details with random log-likelihoods
stand for what train_rigsa says; then the right choices of the file must give the accuracy that the harness
computes.
"""

import contextlib
import io
import json
import logging
import os
import random
import shutil
import sys
import unittest

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import prepro_eval
import rigsa_file
from test_prepro import Folder

TOKENIZER = sys.argv[1] if len(sys.argv) > 1 else os.path.join("..", "shared", "data", "smollm2", "tokenizer")
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "rope_theta": 1e5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
WORDS = "cup box door lamp tree coat fish bread stone chair".split()


def question(i):
    """What the documents of many tasks have in common."""
    a, b, c, d = (WORDS[(i * step + step) % 10] for step in (1, 3, 7, 9))
    return {
        "question": f"Which of them is thing {i}",
        "sentence": f"The {a} did not fit the {b} because the _ was too large {i}.",
        "option1": a,
        "option2": b,
        "answer": str(1 + i % 2),
        "passage": f"A {a} is no {b}.",
        "label": i % 2,
        "text": f"The {c} hit the {d} because it was number {i}",
        "choices": [a, b, c + "!", d],
    }


def arc(i):
    """A question with named choices."""
    return {
        "question": f"What is {i}",
        "answerKey": "ABCD"[i % 4],
        "choices": {"text": question(i)["choices"], "label": list("ABCD")},
    }


def wsc(i):
    """A pronoun and what it may stand for."""
    text = f"The {WORDS[i % 10]} hit the {WORDS[(i + 1) % 10]} because it was number {i}"
    return {
        "text": text,
        "pronoun": "it",
        "pronoun_loc": text.index(" it ") + 1,
        "label": i % 2,
        "options": [f"The {WORDS[i % 10]}", f"The {WORDS[(i + 1) % 10]}"],
    }


MMLU = ["mmlu_high_school_us_history", "mmlu_high_school_world_history"]  # 15 letters do not tell them apart
TASKS = {  # name -> split, document
    "winogrande": ("validation", question),  # the choice stands in the context
    "wsc273": ("test", wsc),
    "boolq": ("validation", question),
    "arc_easy": ("test", arc),
    "truthfulqa_mc1": (
        "validation",
        lambda i: question(i) | {"mc1_targets": {"choices": question(i)["choices"]}},
    ),
    MMLU[0]: ("test", lambda i: question(i) | {"answer": i % 4}),
    MMLU[1]: ("test", lambda i: question(i) | {"answer": (i + 1) % 4}),
}
GENERATED = {
    "triviaqa": (
        "validation",
        lambda i: {"question": f"Who is {i}", "answer": {"aliases": [f"Somebody {i}", "somebody"]}},
    ),
    "lambada_openai": ("test", question),
}
COUNT = 12


class Tasks(Folder):
    def setUp(self):
        super().setUp()
        self.rng = random.Random(1)
        self.model, self.details = self.path("model"), self.path("details.jsonl")
        os.mkdir(self.model)
        shutil.copy(os.path.join(TOKENIZER, "tokenizer.json"), self.model)
        shutil.copy(
            os.path.join(TOKENIZER, "tokenizer_config.base.json"),
            os.path.join(self.model, "tokenizer_config.json"),
        )
        for name in os.listdir(self.model):
            os.chmod(os.path.join(self.model, name), 0o644)
        self.configure()

    def configure(self, **changes):
        with open(os.path.join(self.model, "config.json"), "w", encoding="utf-8") as file:
            json.dump(SHAPE | changes, file)

    def documents(self, task, split, document, count=COUNT):
        """Writes `count` documents of a task."""
        os.makedirs(self.path(f"data/{task}"), exist_ok=True)
        with open(self.path(f"data/{task}/{split}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(document(i)) + "\n" for i in range(count))

    def parse(self, *tasks, options=()):
        return prepro_eval.parse(
            [
                self.model,
                "--tasks",
                ",".join(tasks),
                "--data",
                self.path("data"),
                "--out",
                self.path("out"),
                *options,
            ]
        )

    def write(self, *tasks, options=()):
        """The files of some tasks as of read_examples, a dict."""
        with contextlib.redirect_stderr(io.StringIO()):
            list(prepro_eval.write_files(self.parse(*tasks, options=options)))
        return {task: rigsa_file.read_examples(self.path(f"out/{task}.bin")) for task in tasks}

    def tell(self, files, told=None):
        """Details of these files with random log-likelihoods; returns those of each."""
        told = told or {
            task: [-self.rng.random() for _ in found["examples"]] for task, found in files.items()
        }
        with open(self.details, "w", encoding="utf-8") as file:
            for task, values in told.items():
                file.writelines(
                    json.dumps({"round": "base", "column": task, "example": i, "exact": 0, "logp": value})
                    + "\n"
                    for i, value in enumerate(values)
                )
        return told

    def score(self, *tasks, options=()):
        with contextlib.redirect_stderr(io.StringIO()):
            ((_, results),) = prepro_eval.score(
                self.parse(*tasks, options=("--score", self.details, *options))
            )
        return results["results"]

    def refuses(self, wrong, function, *args, **options):
        with self.assertRaisesRegex(ValueError, wrong) as caught:
            function(*args, **options)
        self.assertNotIn("\n", str(caught.exception))

    def test_choices(self):
        """The right choices are the harness's; a task's whole name tells its answers from another's."""
        for task, (split, document) in TASKS.items():
            self.documents(task, split, document)
        files = self.write(*TASKS)
        told, results = self.tell(files), self.score(*TASKS)
        for task, found in files.items():
            with self.subTest(task):
                self.assertEqual(
                    (found["column"], found["metric"], len(found["choices"])), (task, "acc", COUNT)
                )
                right, at = 0, 0
                for count, gold in zip(found["choices"], found["gold"]):
                    values = told[task][at : at + count]
                    right += values.index(max(values)) == gold
                    at += count
                self.assertTrue(0 < right < COUNT)
                self.assertAlmostEqual(results[task]["acc,none"], right / COUNT)
        self.assertNotEqual(results[MMLU[0]]["acc,none"], results[MMLU[1]]["acc,none"])

    def test_context_of_the_choice(self):
        """Winogrande's choices have the same continuation, and their lengths are those of the choices."""
        self.documents("winogrande", *TASKS["winogrande"])
        found = self.write("winogrande")["winogrande"]
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        (first, a), (second, b) = found["examples"][:2]
        doc = question(0)
        start, end = doc["sentence"].split("_")
        self.assertEqual(
            [tokenizer.decode(first[:a]), tokenizer.decode(second[:b])],
            [start + doc["option1"], start + doc["option2"]],
        )
        self.assertEqual([tokenizer.decode(first[a:]), tokenizer.decode(second[b:])], [end, end])
        self.assertEqual(list(found["chars"][:2]), [len(start + doc["option1"]), len(start + doc["option2"])])
        self.assertEqual(list(found["gold"]), [i % 2 for i in range(COUNT)])

    def test_details_of_something_else(self):
        """Of another task, of a part, of other questions: refused by name, never scored."""
        self.documents(MMLU[0], *TASKS[MMLU[0]])
        self.documents(MMLU[1], *TASKS[MMLU[1]])
        files = self.write(MMLU[0])
        told = self.tell(files)
        self.refuses(f"nothing on example 0 of {MMLU[1]}", self.score, MMLU[1])
        self.refuses("on another file called " + MMLU[0], self.score, MMLU[0], options=("--limit", "3"))
        self.tell(files, {MMLU[0]: told[MMLU[0]][:-1]})
        self.refuses(f"nothing on example {4 * COUNT - 1} of {MMLU[0]}", self.score, MMLU[0])
        with open(os.path.join(self.path("out"), MMLU[0] + ".bin"), "rb") as file:
            name = f"{rigsa_file.hash64(file.read()):016x}"
        for name, good in ((name, True), ("0" * 16, False)):
            with open(self.details, "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps(
                        {
                            "round": "base",
                            "column": MMLU[0],
                            "file": name,
                            "example": i,
                            "exact": 0,
                            "logp": -1,
                        }
                    )
                    + "\n"
                    for i in range(4 * COUNT)
                )
            if good:
                self.score(MMLU[0])
            else:
                self.refuses("on another file called " + MMLU[0], self.score, MMLU[0])
        with open(self.details, "w", encoding="utf-8") as file:
            file.write('{"round": "base"}\n')
        self.refuses("not the details that evaluate_rigsa writes", self.score, MMLU[0])

    def test_generated(self):
        """Tasks whose right answers are lists, and a word to be the most likely one."""
        for task, (split, document) in GENERATED.items():
            self.documents(task, split, document)
        files = self.write(*GENERATED)
        self.assertEqual(files["lambada_openai"]["metric"], "exact")
        tokenizer, found = AutoTokenizer.from_pretrained(self.model), files["triviaqa"]
        self.assertEqual([found["stop"], found["metric"]], [[b"\n", b".", b",", b"<|endoftext|>"], "number"])
        for i, (tokens, answer) in enumerate(found["examples"]):
            self.assertEqual(tokenizer.decode(tokens[answer:]), f" Somebody {i}")
            self.assertEqual(found["number"][i], i)

    def test_more_tokens_than_the_model(self):
        """A <pad> beyond the model's rows is left out; a text that needs one is refused."""
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens(["zyzzyva"])
        tokenizer.save_pretrained(self.model)
        self.documents("triviaqa", *GENERATED["triviaqa"])
        self.assertEqual(len(self.write("triviaqa")["triviaqa"]["pieces"]), 49152)
        self.documents(
            "triviaqa",
            "validation",
            lambda i: {"question": "what's a zyzzyva", "answer": {"aliases": ["a bug"]}},
        )
        self.refuses(
            "^triviaqa: document 0 needs token 49153, 'zyzzyva', and the model has 49152",
            self.write,
            "triviaqa",
        )

    def test_refused(self):
        """Tasks that a file cannot hold: one line that names the task, and no file."""

        def several(i):
            return question(i) | {"label": [0, 1]}

        for task, split, document, wrong in (
            (
                "boolq",
                "validation",
                lambda i: question(i) | {"label": 2 * (i == 1)},
                "boolq: document 1: the right answer, 2, is none",
            ),
            (
                "boolq",
                "validation",
                lambda i: question(i) | {"label": -1},
                "document 0: the right answer, -1, is none of its 2",
            ),
            ("boolq", "validation", several, "boolq: document 0: 2 right answers, train_rigsa knows one"),
        ):
            with self.subTest(wrong):
                self.documents(task, split, document)
                self.refuses(wrong, self.write, task)
                self.assertFalse(os.path.exists(self.path(f"out/{task}.bin")))
        self.refuses("no task called 'piqqa'", self.write, "piqqa")
        self.refuses("has no copy of copa", self.write, "copa")
        self.documents("boolq", "test", several)
        os.remove(self.path("data/boolq/validation.jsonl"))
        self.refuses("boolq: .* has neither its validation nor its test documents", self.write, "boolq")
        self.documents("boolq", "validation", lambda i: {"label": 0})
        self.refuses("boolq: lm-evaluation-harness fails on it: ", self.write, "boolq")

    def test_local_lines(self):
        """Blank lines are passed over; a line that is no JSON is named."""
        self.documents("boolq", *TASKS["boolq"])
        path = self.path("data/boolq/validation.jsonl")
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n  \n")
        self.assertEqual(len(self.write("boolq")["boolq"]["choices"]), COUNT)
        with open(path, "a", encoding="utf-8") as file:
            file.write('{"question": \n')
        self.refuses(f"^{path}, line {COUNT + 3}: no JSON", self.write, "boolq")


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    result = unittest.main(
        argv=sys.argv[:1], exit=False, warnings="ignore", testRunner=unittest.TextTestRunner(sys.stdout)
    ).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed")
    sys.exit(failed > 0)

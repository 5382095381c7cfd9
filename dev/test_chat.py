"""
Tests of prepro_chat.py, prepro_text.py, chat.py, own_answers.py and report.py: python dev/test_chat.py [DIR],
the folder of SmolLM2's tokenizer. Needs torch, transformers and lm_eval, and ./train_rigsa.

Reference is the other side: transformers' apply_chat_template, lm-evaluation-harness's windows and
loglikelihood_rolling, and what dev/import_hf.py merges.
"""
import contextlib
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from unittest import mock

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import chat
import import_hf
import own_answers
import plot
import prepro_chat
import prepro_eval
import prepro_text
import report
import rigsa_file
from chat_template import load_tokenizer
from export_hf import export
from prepro_chat import examples_of
from prepro_text import prefix_token, windows
from test_prepro import Folder

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
TOKENIZER = sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, "../shared/data/smollm2/tokenizer")
HARBOUR = os.path.join(HERE, "harbour.jsonl")
CLOSE = 1e-5  # relative difference of losses

# SmolLM2's own template with the mark that tells transformers what the assistant says
MARKED = ("{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}{{ "
          "'<|im_start|>system\nYou are a helpful AI "
          "assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + "
          "m.role + '\n' }}"
          "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
          "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_model(folder):
    """A small model of random weights with SmolLM2's tokenizer, as a Hugging Face folder."""
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=49152, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=12, rope_theta=1e5,
                         max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=True,
                         initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(os.path.join(TOKENIZER, "tokenizer.json"), folder)
    shutil.copy(os.path.join(TOKENIZER, "tokenizer_config.instruct.json"),
                os.path.join(folder, "tokenizer_config.json"))


def script(module, *args, text=""):
    """(exit status, standard output, standard error) of a script of this folder, run in this process."""
    out, error, status = io.StringIO(), io.StringIO(), 0
    with (mock.patch("sys.argv", [f"{module.__name__}.py", *map(str, args)]),
          mock.patch("sys.stdin", io.StringIO(text)),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(error)):
        try:
            module.main()
        except SystemExit as end:  # with a message, or 2 after argparse's
            status = 1 if isinstance(end.code, str) else end.code
            print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
    return status, out.getvalue(), error.getvalue()


def train(*args):
    """Standard output of ./train_rigsa, which must end well."""
    done = subprocess.run([os.path.join(ROOT, "train_rigsa"), *map(str, args)], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def say(*turns):
    """Messages of user and assistant alternately."""
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


class WithModel(Folder):
    """A test with the small model, its tokenizer and a temporary folder."""

    @classmethod
    def setUpClass(cls):
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.model = temporary.name
        make_model(cls.model)
        cls.tokenizer = load_tokenizer(cls.model)

    def write(self, name, content):
        with open(self.path(name), "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
        return self.path(name)

    def run_script(self, module, *args):
        """Standard output of a script, which must end well."""
        status, out, error = script(module, *args)
        self.assertEqual((status, error), (0, ""))
        return out

    def examples(self, name):
        """A written file as read_examples has it, its examples as lists."""
        found = rigsa_file.read_examples(self.path(name))
        return found | {"examples": [(list(tokens), answer) for tokens, answer in found["examples"]]}

    def rolling(self, text, length):
        """The log-likelihood of a text, as the harness has it for a model of this length."""
        model = LlamaForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        harness = HFLM(pretrained=model, tokenizer=self.tokenizer, max_length=length, batch_size=1)
        request = Instance("loglikelihood_rolling", {}, (text,), 0)
        found, = harness.loglikelihood_rolling([request], disable_tqdm=True)
        return found

    def losses(self, examples):
        """For each example transformers' own loss, a sum over its answer tokens."""
        model = LlamaForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        found = []
        for tokens, answer in examples:
            labels = torch.tensor([[-100] * answer + tokens[answer:]])
            with torch.no_grad():
                found.append(model(torch.tensor([tokens]), labels=labels,
                                   use_cache=False).loss.item() * (len(tokens) - answer))
        return found


WORDS = "a Über 日本 🙂 to <|im_end> \n\n x = -1; naïve  two   \t tab I'll 3.14 ".split(" ")


class Conversations(WithModel):
    def conversations(self):
        """Ours, and 40 of random pieces, with and without a system turn."""
        with open(HARBOUR, encoding="utf-8") as file:
            found = [json.loads(line)["messages"] for line in file]
        draw = random.Random(5)
        for number in range(40):
            turns = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))).strip() + "."
                     for _ in range(2 * draw.randint(1, 4))]
            found.append([{"role": "system", "content": "Be brief."}] * (number % 2) + say(*turns))
        return found

    def test_is_what_the_template_says(self):
        """
        Each example's prompt is transformers' prompt; prompt and answer are how the finished conversation
        begins.
        """
        for messages in self.conversations():
            turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            examples = examples_of({"messages": messages}, self.tokenizer)
            self.assertEqual(len(examples), len(turns))
            for (tokens, answer), turn in zip(examples, turns):
                self.assertEqual(tokens[:answer], self.tokenizer.apply_chat_template(
                    messages[:turn], return_dict=False, add_generation_prompt=True))
                whole = self.tokenizer.apply_chat_template(messages[:turn + 1], return_dict=False)
                self.assertEqual(tokens, whole[:len(tokens)])
                self.assertEqual(self.tokenizer.decode(whole[len(tokens):]), "\n")
                self.assertEqual(tokens[-1], self.tokenizer.eos_token_id)

    def test_is_what_the_assistant_says(self):
        """
        All answers of a conversation together are the tokens that transformers' own assistant mask marks.
        """
        for messages in self.conversations():
            whole = self.tokenizer.apply_chat_template(messages, chat_template=MARKED, return_dict=True,
                                                       return_assistant_tokens_mask=True)
            marked = [number for number, mark in enumerate(whole["assistant_masks"]) if mark]
            examples = examples_of({"messages": messages}, self.tokenizer)
            self.assertEqual([number for tokens, answer in examples for number in range(answer, len(tokens))],
                             marked)

    def test_forms(self):
        """
        A conversation is the same example in whichever form it comes; of a prompt with turns only the
        completion is learnt.
        """
        messages = say("Hi.", "Hello!", "And?", "Bye.")
        first, second = examples_of({"messages": messages, "id": 7}, self.tokenizer)
        self.assertEqual(examples_of({"prompt": messages[:3], "completion": messages[3:]}, self.tokenizer),
                         [second])
        self.assertEqual(examples_of({"prompt": messages[:1], "completion": messages[1:]}, self.tokenizer),
                         [first, second])
        (tokens, answer), = examples_of({"prompt": "2 + 2 =", "completion": " 4"}, self.tokenizer)
        self.assertEqual((self.tokenizer.decode(tokens[:answer]), self.tokenizer.decode(tokens[answer:])),
                         ("2 + 2 =", " 4<|im_end|>"))
        (tokens, answer), = examples_of({"text": "Once more.<|im_end|>"}, self.tokenizer)
        self.assertEqual((self.tokenizer.decode(tokens), answer), ("Once more.<|im_end|>", 1))

    def test_border_within_a_token(self):
        """
        The prompt is what the model will be given, even where prompt and completion together would be other
        tokens.
        """
        (tokens, answer), = examples_of({"prompt": "The uni", "completion": "verse"}, self.tokenizer)
        self.assertEqual(tokens[:answer], self.tokenizer.encode("The uni"))
        self.assertNotEqual(tokens[:-1], self.tokenizer.encode("The universe"))

    def test_containers(self):
        """Lines, a list, and both packed, with a byte order mark and empty lines: the same files."""
        items = [{"messages": say(f"Question {number}", "Answer.")} for number in range(5)]
        lines = "\ufeff" + "\r\n \r\n".join(map(json.dumps, items)) + "\n\n"
        found = []
        for name, content in (("a.jsonl", lines), ("b.json", json.dumps(items, indent=2)),
                              ("c.jsonl.gz", gzip.compress(lines.encode())),
                              ("d.json", lines)):
            out = self.run_script(prepro_chat, self.model, self.write(name, content), "--heldout", 2,
                                  "--name", "x", "--out", self.folder)
            self.assertIn("x_train.bin: 3 answers of 3 objects", out)
            found.append((self.examples("x_train.bin"), self.examples("x_heldout.bin")))
        self.assertTrue(all(pair == found[0] for pair in found))
        train, heldout = found[0]
        self.assertEqual((train.get("metric"), heldout["metric"], heldout["column"]), (None, "loss", "x"))
        self.assertEqual(train["vocab"], 49152)
        self.assertIn("Question 4", self.tokenizer.decode(heldout["examples"][1][0]))

    def test_what_it_prints(self):
        out = self.run_script(prepro_chat, self.model, HARBOUR, "--heldout", 6, "--out", self.folder)
        self.assertIn("assistant\n>>>Aye. Early in the morning", out)
        self.assertIn("Fair winds.<|im_end|><<<", out)
        self.assertIn("harbour_train.bin: 27 answers of 24 objects", out)

    def test_longer(self):
        """Of answers with 47 to 117 tokens: left out, or cut and said not to end."""
        whole = [example for example in self.all_of(HARBOUR)]
        longest = 60
        fit = [example for example in whole if len(example[0]) <= longest]
        cut = [(tokens[:longest], answer) for tokens, answer in whole if answer < longest]
        self.assertTrue(len(fit) < len(cut) < len(whole))
        out = self.run_script(prepro_chat, self.model, HARBOUR, "--max-length", longest, "--out", self.folder)
        self.assertEqual(self.examples("harbour_train.bin")["examples"], fit)
        self.assertIn(f"note: {len(whole) - len(fit)} answers left out", out)
        out = self.run_script(prepro_chat, self.model, HARBOUR, "--max-length", longest, "--longer", "cut",
                              "--out", self.folder)
        self.assertEqual(self.examples("harbour_train.bin")["examples"], cut)
        self.assertIn(f"note: {len(cut) - len(fit)} answers cut after 60 tokens", out)
        self.assertIn("do not end with the token that ends a turn", out)

    def all_of(self, path):
        with open(path, encoding="utf-8") as file:
            return [example for line in file for example in examples_of(json.loads(line), self.tokenizer)]


GOOD = json.dumps({"messages": say("Hi.", "Hello.")})
MALFORMED = {  # what is wrong: content, and the line that is said
    "not JSON": (GOOD + "\n{'messages': []}\n", "line 2: not JSON: Expecting property name enclosed in "
                 "double quotes at column 2"),
    "cut off": (GOOD + "\n\n" + GOOD[:-9], "line 3: not JSON: "),
    "not UTF-8": (GOOD.encode() + b'\n{"text": "caf\xe9"}', r"line 2: not UTF-8 \(byte 0xe9\); save it as "
                  r"UTF-8"),
    "no object": (GOOD + "\n[1, 2]\n", "line 2: a list, an object is needed"),
    "other fields": ('{"instruction": "Say hi.", "output": "Hi."}', "line 1: has 'instruction', 'output'; "
                     "'messages', 'prompt' and"),
    "messages as text": ('{"messages": "Hi."}', "line 1: 'messages' is a text, a list of messages is needed"),
    "ShareGPT": ('{"messages": [{"from": "human", "value": "Hi."}]}', "line 1: 'messages', message 1 has no "
                 "role, 'from' and 'value'"),
    "another role": (json.dumps({"messages": [{"role": "human", "content": "Hi."}]}),
                     "line 1: .* has the role 'human', only system,"),
    "content that is no text": (GOOD + '\n{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
                                "line 2: 'messages', message 1: 'content' is a list, a text is needed"),
    "no answer": (json.dumps({"messages": say("Hi.")}), "line 1: the assistant says nothing in it"),
    "an empty answer": (json.dumps({"messages": say("Hi.", " ")}), "line 1: 'messages', message 2: 'content' "
                        "is empty"),
    "white space first": (json.dumps({"messages": say("Hi.", "  Hello.")}),
                          "line 1: .*a part of the token .*; remove the white space that the answer begins"),
    "answer first": (json.dumps({"messages": say("Hi.", "Hello.")[1:]}),
                     "line 1: begins with the assistant: there is no prompt"),
    "half a pair": ('{"prompt": "2 + 2 ="}', "line 1: has 'prompt'; 'messages', 'prompt' and 'completion', "
                    "or 'text' is needed"),
    "text and conversation": (json.dumps({"prompt": say("Hi."), "completion": "Hello."}),
                              "line 1: 'completion' is a text, a list of"),
    "the end within": (json.dumps({"messages": say("Hi.", "Hello.<|im_end|> More.")}),
                       "line 1: .*the end of a turn"),
    "half a surrogate": ('{"text": "\\ud800 x"}', "line 1: 'text' has half a character"),
    "a list that ends early": (f"[{GOOD},\n{GOOD}", "line 2: not JSON: Expecting ',' delimiter"),
    "an item of a list": (f"[{GOOD},\n5]", "item 2: a number, an object is needed"),
    "too deep": ("[" * 100000, "line 1: not JSON that can be read: nested too deeply"),
    "nothing": ("\n \n", "there is nothing in it"),
    "damaged gzip": (gzip.compress(GOOD.encode() * 50)[:-9], "damaged gzip file"),
}


class Malformed(WithModel):
    def test_lines(self):
        """Each in one line that names the file and the place; nothing is written."""
        for name, (content, wrong) in MALFORMED.items():
            path = self.write("bad.jsonl", content)
            status, _, error = script(prepro_chat, self.model, path, "--out", self.path("out"))
            self.assertEqual(status, 1, name)
            self.assertRegex(error, f"^prepro_chat.py: {path}(, |: ){wrong}.*\n$", name)
            self.assertFalse(os.path.exists(self.path("out")), name)

    def test_arguments(self):
        path = self.write("mine.jsonl", GOOD)
        for args, wrong in (
                (("nowhere.jsonl",), "nowhere.jsonl: No such file"),
                ((path, "--heldout", 1), "leaves nothing of the 1 objects"),
                ((path, "--max-length", 2000), "was made for 1024 tokens"),
                ((path, "--max-length", 9), "nothing to train on is left"),
                ((path, "--name", "a,b"), "section 'column' is not a name"),
                ((path, "--name", "a/b"), "cannot be the name of a file")):
            status, _, error = script(prepro_chat, self.model, *args, "--out", self.folder)
            self.assertEqual(status, 1)
            self.assertRegex(error, f"^prepro_chat.py: .*{wrong}.*\n$")


class Texts(WithModel):
    def test_windows_are_the_harness_s(self):
        """Token for token, for every length up to 7 of every text up to 30 tokens."""
        for length in range(1, 8):
            for count in range(31):
                tokens = list(range(100, 100 + count))
                expected = [(before + after, len(before)) for before, after in map(
                    make_disjoint_window, get_rolling_token_windows(tokens, 1, length, 1))]
                self.assertEqual(list(windows(tokens, 1, length)), expected)
                predicted = [token for window, answer in expected for token in window[answer:]]
                self.assertEqual(predicted, tokens)

    def test_loss_is_the_harness_s(self):
        """Nats per token of the file, by transformers, are those of loglikelihood_rolling."""
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            text = file.read()[:6000]
        path = self.write("readme.md", text)
        self.run_script(prepro_text, self.model, path, "--length", 128, "--out", self.folder)
        found = self.examples("readme.bin")
        self.assertEqual((found["column"], found["metric"]), ("readme", "loss"))
        answers = sum(len(tokens) - answer for tokens, answer in found["examples"])
        self.assertEqual(answers, len(self.tokenizer.encode(text)))
        self.assertEqual(found["examples"][0][0][0], prefix_token(self.tokenizer))
        expected = -self.rolling(text, 128) / answers
        self.assertLess(abs(sum(self.losses(found["examples"])) / answers - expected), CLOSE * expected)

    def test_base_model(self):
        """One without a chat template reads texts; what it lacks is said where a conversation needs it."""
        folder = self.path("plain")
        os.makedirs(folder)
        shutil.copy(os.path.join(TOKENIZER, "tokenizer.json"), folder)
        shutil.copy(os.path.join(TOKENIZER, "tokenizer_config.base.json"),
                    os.path.join(folder, "tokenizer_config.json"))
        path = self.write("mine.jsonl", '{"text": "Once more."}\n' + GOOD)
        status, out, error = script(prepro_text, folder, path, "--out", self.folder)
        self.assertEqual((status, error), (0, ""))
        status, out, error = script(prepro_chat, folder, path, "--out", self.folder)
        self.assertEqual(status, 1)
        self.assertRegex(error, f"^prepro_chat.py: {path}, line 2: .*has no chat template; use the one.*\n$")

    def test_limit_and_errors(self):
        path = self.write("long.txt", "word " * 500)
        out = self.run_script(prepro_text, self.model, path, "--length", 100, "--limit", 3, "--out",
                              self.folder)
        self.assertIn("long.bin: 3 windows, 101 tokens each, 300 of all 303", out)
        for args, wrong in (((self.write("empty.txt", ""),), "there is no text in it"),
                            ((path, "--length", 5000), "made for 1024 tokens"),
                            ((self.write("latin.txt", b"caf\xe9"),), "latin.txt, line 1: not UTF-8")):
            status, _, error = script(prepro_text, self.model, *args, "--out", self.folder)
            self.assertEqual(status, 1)
            self.assertRegex(error, f"^prepro_text.py: .*{wrong}.*\n$")


class Harness(WithModel):
    """Its tasks as evaluations of metric `loss`, on documents of our own."""

    def documents(self, task, split, documents):
        os.makedirs(os.path.join(self.folder, task), exist_ok=True)
        self.write(os.path.join(task, f"{split}.jsonl"), "\n".join(map(json.dumps, documents)))

    def parse(self, task, *more):
        return prepro_eval.parse([self.model, "--tasks", task, "--data", self.folder, "--out", self.folder,
                                  *more])

    def test_perplexity(self):
        """
        Windows that are scored by transformers give the harness the perplexities that it finds itself; one
        page needs three.
        """
        with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
            text = file.read()
        for split in ("train", "validation", "test"):
            self.documents("wikitext", split, [{"page": text[:6000]}, {"page": text[6000:7000]}])
        args = self.parse("wikitext")
        (path, count), = prepro_eval.write_files(args)
        found = self.examples("wikitext.bin")
        self.assertEqual((found["column"], found["metric"], len(found["examples"])),
                         ("wikitext", "loss", count))
        self.assertGreater(count, 2)
        with open(self.path("details.jsonl"), "w") as file:
            for number, loss in enumerate(self.losses(found["examples"])):
                file.write(json.dumps({"round": "base", "column": "wikitext", "example": number, "exact": 0,
                                       "logp": -loss}) + "\n")
        (_, told), = prepro_eval.score(self.parse("wikitext", "--score", self.path("details.jsonl")))
        model = LlamaForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        _, expected = prepro_eval.ask(HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=1), args)
        for metric in ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"):
            ours, theirs = (math.log(results["results"]["wikitext"][metric]) for results in (told, expected))
            self.assertLess(abs(ours - theirs), CLOSE * abs(theirs), metric)

    def test_reference_answers(self):
        """
        GSM8k's solutions stand behind the prompts that it generates from, token for token as the harness
        splits such a pair.
        """
        solved = [{"question": f"A boat has {number} oars and loses one. How many are left?",
                   "answer": f"It has {number} - 1 = {number - 1} oars.\n#### {number - 1}"}
                  for number in range(2, 12)]
        self.documents("gsm8k", "train", solved[:6])
        self.documents("gsm8k", "test", solved[6:])
        (number, _), (loss, count) = prepro_eval.write_files(self.parse("gsm8k"))
        asked, found = (self.examples(os.path.basename(path)) for path in (number, loss))
        self.assertEqual((found["column"], found["metric"], count), ("gsm8k_loss", "loss", 4))
        harness = prepro_eval.Scribe(self.model)
        for (prompt, start), (tokens, answer), document in zip(asked["examples"], found["examples"],
                                                               solved[6:]):
            self.assertEqual(tokens[:answer], prompt[:start])
            context, continuation = harness._encode_pair(self.tokenizer.decode(prompt[:start]),
                                                         " " + document["answer"])
            self.assertEqual((tokens[:answer], tokens[answer:]), (context, continuation))


class Path(WithModel):
    """From conversations to a ticket, and what is made of it."""

    def train(self):
        export(self.model, self.path("base.bin"))
        self.run_script(prepro_chat, self.model, HARBOUR, "--heldout", 6, "--out", self.folder)
        train("--base", self.path("base.bin"), "--data", self.path("harbour_train.bin"),
              "--eval", self.path("harbour_heldout.bin"), "--examples", 32, "--ticket-examples", 32,
              "--rounds", 2, "--batch", 8, "--out", self.path("out"))

    def test_loss_of_train_rigsa(self):
        """
        The base's row: nats per answer token, and their standard error as of a ratio of sums, from
        transformers' losses.
        """
        self.train()
        examples = self.examples("harbour_heldout.bin")["examples"]
        losses, counts = np.array(self.losses(examples)), np.array([len(tokens) - answer
                                                                    for tokens, answer in examples])
        expected = losses.sum() / counts.sum()
        n = len(losses)
        error = math.sqrt(n / (n - 1) * ((losses - expected * counts) ** 2).sum()) / counts.sum()
        value, found = report.Run(self.path("out")).scores("harbour")
        self.assertLess(abs(value[0] - expected), CLOSE * expected)
        self.assertLess(abs(found[0] - error), 1e-4 * error)
        self.assertLess(value[-1], value[0])

    def test_chat_and_report(self):
        self.train()
        base = chat.load_model(self.model)
        adapted = chat.adapt(base, self.model, self.path("out/ticket.bin"))
        import_hf.take_back(self.model, self.path("out/ticket.bin"), self.path("merged"), "fp32", False)
        merged = chat.load_model(self.path("merged"))
        changed = 0
        for (name, a), (_, b), (_, c) in zip(adapted.named_parameters(), merged.named_parameters(),
                                             base.named_parameters()):
            self.assertTrue(torch.equal(a, b), name)
            changed += int((a != c).sum())
        run = report.Run(self.path("out"))
        self.assertTrue(0 < changed <= sum(map(len, run.ticket.index)))

        said = [script(chat, self.model, *how, "--tokens", 8, text="Hi.\n\nWho?\n") for how in (
            ("--ticket", self.path("out/ticket.bin")), ("--merged", self.path("merged")))]
        self.assertEqual(said[0], said[1])
        status, out, error = said[0]
        self.assertEqual((status, error), (0, ""))
        self.assertRegex(out, r"base +\| adapted\n\n> Hi\.\n.* \| .*\n(.*\n)*\n> Who\?\n.* \| ")

        page = self.page()
        entries = sum(map(len, run.ticket.index))
        total = sum(math.prod(shape) for _, shape in run.ticket.matrices)
        self.assertIn(f"{entries:,} of {total:,} entries are left, {entries / total:.2%}", page)
        self.assertIn(f"<b>{run.scores('harbour')[0][-1]:.3f}</b>", page)
        self.assertIn("ticket: 1.00 nats a token", page)
        self.assertIn("<th>harbour, nats</th>", page)
        self.assertEqual(page.count("<svg"), page.count("<figure style"))
        self.assertGreaterEqual(page.count("<svg"), 7)

    def test_plot(self):
        """A comparison whose target is a loss: labelled, better is up; of twice the loss a half is kept."""
        self.train()
        run = report.Run(self.path("out"))
        os.renames(self.path("out"), self.path("all/rigsa_both_0.003_1"))
        last, base = run.table[-1], run.table[0]
        self.write("all/compare.csv", "method,budget,lr,seed,density,harbour\n"
                   f"base,,0,0,0,{base['harbour']}\nrigsa,both,0.003,1,{last['density']},{last['harbour']}\n"
                   f"lora,last,0.003,1,1,{last['harbour']}\n")
        with mock.patch("plot.save") as save, mock.patch("plot.draw_losses"):
            self.assertEqual(script(plot, self.path("all"))[0], 0)
        figures = {call.args[2]: call.args[0].axes for call in save.call_args_list}
        self.assertEqual(figures.keys(), {"rounds", "tradeoff_last"})
        self.assertEqual(figures["rounds"][0].get_ylabel(), plot.NATS)
        self.assertEqual(figures["tradeoff_last"][0].get_ylabel(), f"harbour, {plot.NATS}")
        self.assertTrue(all(axis.yaxis_inverted() for axis in figures["tradeoff_last"]))
        with open(self.path("all/table.md"), encoding="utf-8") as file:
            self.assertIn("| density | harbour, nats |", file.read())
        self.assertEqual(plot.kept({"own": "2"}, {"own": "1"}, "own", run.is_loss), 2)
        self.assertEqual(plot.kept({"harbour": "2"}, {"harbour": "1"}, "harbour", run.is_loss), 0.5)

    def test_table(self):
        """Of a CSV alone: means over seeds with their interval; a seed that was run again counts once."""
        rows = ["method,round,budget,share,lr,seed,examples,values,seconds,memory,density,digits,digits_error,own,own_error",
                "base,,,1,0,0,,,,,0,0,0,1.1,0.1",
                "lora,,last,1,0.01,1,8,2e6,60,1000,0.04,0.25,0.03,2.2,0.1"]
        for seed, digits, own in (1, 0.1, 1), (2, 0.5, 2), (3, 0.7, 2), (1, 0.6, 2):
            rows.append(f"rigsa,,both,1,0.003,{seed},8,3e6,120,2000,0.04,{digits},0.01,{own},0.1")
        rows.append("rigsa,1,both,1,0.003,1,8,3e6,1,1,1,0,0,9,9")  # a round, no last pass
        path = self.write("real.csv", "\n".join(rows) + "\n")
        with mock.patch("plot.save") as save:
            status, out, error = script(plot, path)
        self.assertEqual((status, error), (0, ""))
        self.assertEqual([call.args[2] for call in save.call_args_list], ["real_tradeoff_last"])
        self.assertEqual(out.splitlines()[2:], [
            "| base |  | 0 | 1 | .000 |  |  |  |  | .000 ± .000 | 1.100 ± .100 | 1.000 |",
            "| RIGSA | both | .003 | 3 | .040 | 8 | 3.0 | 2 | 2.0 | .600 ± .248 | 2.000 ± .000 | .550 |",
            "| LoRA | last | .01 | 1 | .040 | 8 | 2.0 | 1 | 1.0 | .250 ± .030 | 2.200 ± .100 | .500 |"])
        status, _, error = script(plot, self.write("empty.csv", ""))
        self.assertEqual((status, error), (1, f"plot.py: {self.path('empty.csv')}: no rows of dev/compare.py in it\n"))

    def test_pruning(self):
        """Shares of every matrix in every round, where the run has written them."""
        self.train()
        rows = "".join(f"1,{layer},{kind},100,{layer + 7},{kind + 40}\n" for layer in range(2)
                       for kind in range(7))
        self.write("out/pruning.csv", "round,layer,kind,entries,flipped,kept\n" + rows)
        page = self.page()
        self.assertIn("Round 1: kept", page)
        for share in (".080", ".460"):  # flipped in layer 1, kept of the last kind
            self.assertIn(f">{share}<", re.sub(r"\s", "", page))

    def page(self):
        """The report with details of our own: the ticket gives the first held-out answer one nat a token."""
        (tokens, answer), *_ = self.examples("harbour_heldout.bin")["examples"]
        line = {"round": "ticket", "column": "harbour", "example": 0, "exact": 0,
                "logp": float(answer - len(tokens))}
        details = self.write("details.jsonl", json.dumps(line) + "\n")
        path = report.write_report(self.path("out"), [details], self.tokenizer)
        with open(path, encoding="utf-8") as file:
            return file.read()

    def test_own_answers(self):
        """The model's answers are greedy, so no other token is likelier; a cut one has --tokens of them."""
        questions = self.write("questions.txt", "Who?\n\nWhy?\n")
        out = self.run_script(own_answers, self.model, "--questions", questions, "--tokens", 5, "--out",
                              self.folder)
        self.assertIn("own.bin: 2 answers", out)
        found = self.examples("own.bin")
        self.assertEqual((found["column"], found["metric"], len(found["examples"])), ("own", "loss", 2))
        model = chat.load_model(self.model)
        for (tokens, answer), question in zip(found["examples"], ("Who?", "Why?")):
            prompt = self.tokenizer.apply_chat_template(say(question), add_generation_prompt=True,
                                                        return_dict=False)
            self.assertEqual(tokens[:answer], prompt)
            with torch.no_grad():
                likeliest = model(torch.tensor([tokens])).logits[0, answer - 1:-1].argmax(-1).tolist()
            self.assertEqual(tokens[answer:], likeliest)

    def test_without_torch(self):
        """
        A small install will do, torch counts as missing; where it is needed that is said. test_hf.py has the
        scripts that convert.
        """
        self.train()
        self.write("sitecustomize.py", "import sys\nsys.modules['torch'] = None\n")
        missing = "the package torch is missing; pip install -r dev/requirements-torch.txt"
        for name, *args in (("prepro_chat.py", self.model, HARBOUR, "--out", self.path("data")),
                            ("prepro_text.py", self.model, HARBOUR, "--out", self.path("data")),
                            ("report.py", self.path("out"), "--tokenizer", self.model),
                            ("plot.py", self.path("out")), ("chat.py", self.model),
                            ("own_answers.py", self.model)):
            done = subprocess.run([sys.executable, os.path.join(HERE, name), *args], capture_output=True,
                                  text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": self.folder})
            expected = (1, f"{name}: {missing}\n") if name in ("chat.py", "own_answers.py") else (0, "")
            self.assertEqual((done.returncode, done.stderr), expected, name)

    def test_streams(self):
        """Closed ones are no error, and a reader that has gone ends a script in silence."""
        chat_of = (sys.executable, "dev/prepro_chat.py", self.model, HARBOUR, "--out", self.folder)
        for redirect, status in ((">&-", 0), ("2>&-", 0), ("<&-", 0), ("| true", 141), (">/dev/full", 1)):
            done = subprocess.run(["bash", "-c", f'set -o pipefail; "$@" {redirect}', "_", *chat_of],
                                  cwd=ROOT, capture_output=True, text=True)
            self.assertEqual(done.returncode, status, redirect)
            self.assertEqual(done.stderr, "" if status != 1 else
                             "prepro_chat.py: [Errno 28] No space left on device\n")

    def test_files(self):
        """Where a folder is needed a GGUF file is none; what makes one of it is said."""
        path = self.write("model.gguf", "GGUF")
        for module, *more in ((prepro_chat, HARBOUR), (prepro_text, HARBOUR), (chat,), (own_answers,),
                              (prepro_eval, "--tasks", "piqa"), (report, "--tokenizer", path)):
            status, _, error = script(module, path, *more)
            expected = (f"{module.__name__}.py: {path}: a folder is needed; python3 dev/export_hf.py {path} "
                        "base.bin --hf FOLDER makes one of a GGUF file\n")
            self.assertEqual((status, error), (1, expected))

    def test_errors_of_report(self):
        status, _, error = script(report, self.path("nowhere"))
        self.assertEqual(status, 1)
        self.assertRegex(error, "^report.py: .*settings.txt: no such file; name the folder .*\n$")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = unittest.main(argv=sys.argv[:1], exit=False,
                           testRunner=unittest.TextTestRunner(sys.stdout)).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed")
    sys.exit(failed > 0)

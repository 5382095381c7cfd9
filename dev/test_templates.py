"""
Tests of chat_template.py and prepro_mnist.py --tokenizer: python dev/test_templates.py DIR, the folder of
SmolLM2's tokenizer. Public families of chat templates, each written down as a small template of our own, must
give the right labels or one clear line.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import sys
import unittest

from transformers import AutoTokenizer, LlamaConfig
from transformers.utils import logging

import rigsa_file
from test_prepro import Folder, prepro_mnist

import chat_template

TOKENIZER = sys.argv[1] if len(sys.argv) > 1 else os.path.join("..", "shared", "data", "smollm2", "tokenizer")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = """{% set ns = namespace(system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.system = '<<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' %}
    {%- elif m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}
    {%- set ns.system = '' %}
    {%- else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}
{%- endfor %}"""
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|/head|>\n\n' "
    "+ m.content | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"
)
ZEPHYR_ONE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ZEPHYR_LINES = """{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>\\n' + m.content + eos_token }}
{% else %}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content | trim "
    "+ '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_3_THINKS = QWEN_3.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n<think>\n'")

# family -> template; what a prompt ends with, and the answer "7" with its end, of a question "q"
FAMILIES = {
    "ChatML": (CHATML, "q<|im_end|>\n<|im_start|>assistant\n", "7<|im_end|>"),
    "Llama 2": (LLAMA_2, "[INST] q [/INST]", " 7 </s>"),
    "Llama 3": (LLAMA_3, "q<|eot|><|head|>assistant<|/head|>\n\n", "7<|eot|>"),
    "Zephyr in one line": (ZEPHYR_ONE, "q</s>\n<|assistant|>", "\n7</s>"),
    "Zephyr in several lines": (ZEPHYR_LINES, "q</s>\n<|assistant|>\n", "7</s>"),
    "Gemma": (GEMMA, "q</turn>\n<turn>model\n", "7</turn>"),
    "Phi": (PHI, "q<|end|>\n<|assistant|>\n", "7<|end|>"),
    "Mistral": (MISTRAL, "[INST] q [/INST]", " 7</s>"),
    "Qwen 3": (QWEN_3, "<|im_start|>assistant\n", "<think>\n\n</think>\n\n7<|im_end|>"),
    "Qwen 3 that thinks": (QWEN_3_THINKS, "<|im_start|>assistant\n<think>\n", "\n</think>\n\n7<|im_end|>"),
}
REFUSED = {  # what the line must say
    "DeepSeek R1": (DEEPSEEK_R1, r"ends with '<think>\\n' where the finished turn has '7</s>'"),
    "a base model": (None, "has no chat template; use the one of an instruct model"),
    "no end of a turn": (
        CHATML.replace("m.content + '<|im_end|>", "m.content + '"),
        r"ends a turn with '\\n', in which",
    ),
    "an end in plain letters": (CHATML.replace("<|im_end|>", "<|done|>"), "no special token"),
    "a newline more in the prompt": (
        CHATML.replace("assistant\n'", "assistant\n\n'"),
        "does not begin with its prompt",
    ),
    "no newline in the finished turn": (
        CHATML.replace("m.role + '\n'", "m.role + ' '"),
        "does not begin with its prompt",
    ),
    "a template with an error": ("{% for m in %}", "cannot write this conversation"),
    "a template that leaves out answers": (
        CHATML.replace("m.content", "('' if m.role == 'assistant' else m.content)"),
        "leaves out a part of the answer",
    ),
}
SPECIAL = (
    "<s>",
    "</s>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<turn>",
    "</turn>",
    "<|end|>",
    "<|User|>",
    "<|Assistant|>",
)
QUESTION = [{"role": "user", "content": "q"}]
SEVEN = [{"role": "assistant", "content": "7"}]


@functools.cache
def tokenizer_with(special):
    """SmolLM2's tokenizer with `special` tokens more."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(special)}, replace_extra_special_tokens=False
    )
    return tokenizer


class Templates(Folder):
    def save(self, template, special=SPECIAL):
        """The folder of SmolLM2's tokenizer with these special tokens and this template."""
        shutil.rmtree(self.path("model"), ignore_errors=True)
        tokenizer_with(special).save_pretrained(self.path("model"))
        if template is not None:
            with open(self.path("model/chat_template.jinja"), "w", encoding="utf-8") as file:
                file.write(template)
        return self.path("model")

    def load(self, template):
        return AutoTokenizer.from_pretrained(self.save(template))

    def refuses(self, wrong, function, *args):
        with self.assertRaisesRegex(ValueError, wrong) as caught:
            function(*args)
        self.assertIn(self.path("model"), str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))


class SplitTurn(Templates):
    def test_families(self):
        for family, (template, asked, said) in FAMILIES.items():
            with self.subTest(family):
                tokenizer = self.load(template)
                prompt, answer = chat_template.split_turn(tokenizer, QUESTION + SEVEN)
                self.assertEqual(
                    prompt,
                    tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False),
                )
                self.assertTrue(tokenizer.decode(prompt).endswith(asked), tokenizer.decode(prompt))
                self.assertEqual(tokenizer.decode(answer), said)
                self.assertIn(tokenizer.convert_ids_to_tokens(answer[-1]), SPECIAL + ("<|im_end|>",))
                whole = tokenizer.apply_chat_template(QUESTION + SEVEN, return_dict=False)
                self.assertEqual(prompt + answer, whole[: len(prompt + answer)])

    def test_refused(self):
        for family, (template, wrong) in REFUSED.items():
            with self.subTest(family):
                self.refuses(wrong, chat_template.split_turn, self.load(template), QUESTION + SEVEN)

    def test_several_turns(self):
        """Each turn of the assistant is an answer, and all that was said before is its prompt."""
        more = [{"role": "user", "content": "and then?"}, {"role": "assistant", "content": "8 more"}]
        for family, (template, asked, said) in FAMILIES.items():
            with self.subTest(family):
                tokenizer = self.load(template)
                first, second = chat_template.split_turns(tokenizer, QUESTION + SEVEN + more)
                self.assertEqual(first, chat_template.split_turn(tokenizer, QUESTION + SEVEN))
                prompt, answer = map(tokenizer.decode, second)
                self.assertTrue(prompt.endswith(asked.replace("q", "and then?")) and "7" in prompt, prompt)
                self.assertEqual(answer, said.replace("7", "8 more"))

    def test_system(self):
        system = [{"role": "system", "content": "be brief"}]
        for family, (template, asked, said) in FAMILIES.items():
            with self.subTest(family):
                tokenizer = self.load(template)
                if "raise_exception" in template:
                    self.refuses(
                        "cannot write this conversation: (no system|roles must)",
                        chat_template.split_turn,
                        tokenizer,
                        system + QUESTION + SEVEN,
                    )
                    continue
                prompt, answer = map(
                    tokenizer.decode, chat_template.split_turn(tokenizer, system + QUESTION + SEVEN)
                )
                self.assertIn("be brief", prompt)
                self.assertEqual((answer, prompt.count("q")), (said, 1))

    def test_merge_at_the_border(self):
        """A prompt that ends with a space: 'A: ' and 'cow' are other tokens than 'A: cow'."""
        template = (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
        )
        tokenizer = self.load(template)
        self.refuses(
            "' ', which becomes a part of the token ' cow'",
            chat_template.split_turn,
            tokenizer,
            QUESTION + [{"role": "assistant", "content": "cow"}],
        )

    def test_answers(self):
        tokenizer = self.load(QWEN_3)
        for content, wrong in (
            ("<think>hm</think>7", "leaves out a part of the answer"),
            ("7<|im_end|>8", "itself has '<|im_end|>'"),
        ):
            self.refuses(
                wrong.replace("|", r"\|"),
                chat_template.split_turn,
                tokenizer,
                QUESTION + [{"role": "assistant", "content": content}],
            )
        self.refuses("of the role 'user'", chat_template.split_turn, tokenizer, QUESTION)
        prompt, answer = chat_template.split_turn(
            tokenizer, QUESTION + [{"role": "assistant", "content": "a\n\n b "}]
        )
        self.assertTrue(tokenizer.decode(answer).endswith("\n\na\n\n b <|im_end|>"))


class LoadTokenizer(Templates):
    def test_template_beside_it(self):
        """One template file is taken, of two it is not known which."""
        folder = self.save(None)
        self.assertIsNone(chat_template.load_tokenizer(folder).chat_template)
        for name, other in (("instruct", False), ("base", True)):
            with open(os.path.join(folder, f"chat_template.{name}.jinja"), "w", encoding="utf-8") as file:
                file.write(CHATML)
            if other:
                self.refuses("2 files chat_template", chat_template.load_tokenizer, folder)
            else:
                self.assertEqual(chat_template.load_tokenizer(folder).chat_template, CHATML)

    def test_no_tokenizer(self):
        os.mkdir(self.path("model"))
        self.refuses(
            "not the folder of a Hugging Face tokenizer", chat_template.load_tokenizer, self.path("model")
        )
        shutil.copy(os.path.join(TOKENIZER, "tokenizer.json"), self.path("model"))
        os.chmod(self.path("model/tokenizer.json"), 0o644)
        with open(self.path("model/tokenizer.json"), "r+", encoding="utf-8") as file:
            file.truncate(1000)
        self.refuses(
            "not the folder of a Hugging Face tokenizer", chat_template.load_tokenizer, self.path("model")
        )


class Mnist(Templates):
    """prepro_mnist.py's examples of ten pictures, one of each label, with each template."""

    def examples(self, folder):
        pictures = [f"{label}0\n0{label}\n".encode() for label in range(10)]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            found = prepro_mnist.Chat(folder, "which?").examples(pictures, range(10))
        return found, said.getvalue()

    def test_families(self):
        for family, (template, asked, said) in FAMILIES.items():
            with self.subTest(family):
                folder = self.save(template)
                tokenizer = AutoTokenizer.from_pretrained(folder)
                examples, note = self.examples(folder)
                self.assertEqual(note, "")
                for label, (tokens, answer) in enumerate(examples):
                    picture = f"which?\n{label}0\n0{label}\n"
                    question = [{"role": "user", "content": picture}]
                    self.assertEqual(
                        list(tokens[:answer]),
                        tokenizer.apply_chat_template(
                            question, add_generation_prompt=True, return_dict=False
                        ),
                    )
                    self.assertEqual(tokenizer.decode(tokens[answer:]), said.replace("7", str(label)))
                self.assertEqual(len({tuple(tokens[answer:]) for tokens, answer in examples}), 10)

    def test_refused(self):
        for family, (template, wrong) in REFUSED.items():
            with self.subTest(family):
                folder = self.save(template)
                self.refuses(wrong.replace("7</s>", "0</s>"), self.examples, folder)

    def test_answer_that_depends_on_the_picture(self):
        """Then no answer is taken from another picture's conversation."""
        template = CHATML.replace("m.content", "(messages[0].content[7:8] + m.content)")
        folder = self.save(template)
        examples, note = self.examples(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.assertIn("tokenising everything", note)
        self.assertEqual(
            [tokenizer.decode(tokens[answer:]) for tokens, answer in examples],
            [f"{label}{label}<|im_end|>" for label in range(10)],
        )

    def test_digits_that_are_one_token(self):
        """A tokenizer that does not know the digits says nothing of what it was shown."""
        folder = self.save(CHATML)
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            rules = json.load(file)
        rules["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": "0"}
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as file:
            json.dump(rules, file)
        self.refuses("the same tokens for two digits", self.examples, folder)

    def test_token_beyond_the_model(self):
        """
        A tokenizer with more tokens than the model has rows: only a prompt that needs one of them is refused.
        """
        for template, said in ((LLAMA_3, "<|head|>|<s>"), (CHATML, None)):
            folder = self.save(template)
            LlamaConfig(vocab_size=49152).save_pretrained(folder)
            if said:
                self.refuses(
                    "needs token 491.., '<|/?.*|>|</?s>', and the model has 49152", self.examples, folder
                )
            else:
                self.assertEqual(len(self.examples(folder)[0]), 10)
                rigsa_file.data_sections(49152, self.examples(folder)[0])


if __name__ == "__main__":
    logging.set_verbosity_error()
    result = unittest.main(
        argv=sys.argv[:1], exit=False, testRunner=unittest.TextTestRunner(sys.stdout)
    ).result
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed")
    sys.exit(failed > 0)

"""
Tests of export_hf.py (folders and GGUF files), import_hf.py and prepro_mnist.py --tokenizer against
transformers and PEFT. Beside them must lie train_rigsa and test_rigsa, freshly made.

    python dev/test_hf.py               random models
    python dev/test_hf.py FOLDER        also what it holds of smollm2, SmolLM2's official configs and tokenizer, and of
                                        stories260K, real weights
"""
import contextlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import unittest
import unittest.mock
import warnings

import gguf
import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import checkpoint
import export_hf
import export_stories
import gguf_model
import gguf_tokenizer
import import_hf
import random_base
import rigsa_file
import test_prepro
from dump_reference import transformers_model
from hugging_face import hugging_face_name, llama_config, load_json
from test_prepro import prepro_mnist

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
SMOLLM2, STORIES = (os.path.join(*sys.argv[1:2], name) for name in ("smollm2", "stories260K"))
SAME = 2e-5  # norm-wise relative difference of logits in fp32
LENGTHS = [(2, 1), (5, 3), (9, 1), (70, 58)]  # (length, answer) of the examples


# ----------------------------------------------------------------------------------------------------
# models, tickets, logits

def random_config(seed):
    """An odd little Llama: head sizes of their own, grouped or multi-head, tied or not, any theta and eps."""
    r = random.Random(seed)
    kv_heads, group, head_dim = r.randint(1, 3), r.randint(1, 3), 2 * r.randint(1, 9)
    heads = kv_heads * group
    return LlamaConfig(
        hidden_size=heads * r.randint(7, 13), intermediate_size=r.randint(5, 60), num_hidden_layers=r.randint(1, 4),
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=seed % 2 == 0,
        vocab_size=49153 if seed == 3 else r.randint(20, 300), max_position_embeddings=r.randint(100, 9000),
        rope_parameters={"rope_type": "default", "rope_theta": 10.0 ** r.uniform(2, 6)},
        rms_norm_eps=10.0 ** r.randint(-6, -3), pad_token_id=None, bos_token_id=None, eos_token_id=None)


def random_model(config, seed=1, dtype=torch.float32, gain=1.5):
    """A model with matrices N(0, gain^2 / columns): logits of order 1, attention far from uniform."""
    model = LlamaForCausalLM(config)
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=gain / weight.shape[1] ** 0.5)
        else:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model.to(dtype).eval()


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def examples(vocab):
    """A list of (tokens, answer), random."""
    rng = np.random.default_rng(1)
    return [(rng.integers(vocab, size=length).tolist(), answer) for length, answer in LENGTHS]


def logits(model):
    """The logits (M, V) where transformers' model predicts an answer token, in fp32."""
    found = []
    with torch.no_grad():
        for tokens, answer in examples(model.config.vocab_size):
            found.append(model(input_ids=torch.tensor([tokens])).logits[0, answer - 1:-1].float().numpy())
    return np.concatenate(found)


def difference(got, expected):
    """||got - expected|| / ||expected||"""
    return np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected.astype(np.float64))


def write_ticket(path, base, density=0.1, rest=0):
    """A random ticket for the base file, one matrix empty, or never pruned at density 1. At `rest` 1 pruned entries keep their
    initial values."""
    sections = rigsa_file.read_file(base, "base")
    shapes = rigsa_file.adapted_shapes(rigsa_file.unpack_config(sections["config"]))
    rng = np.random.default_rng(2)
    index = [np.flatnonzero(rng.random(rows * cols) < density * (density == 1 or number != 3)).astype("<u4")
             for number, (_, (rows, cols)) in enumerate(shapes)]
    values = rng.standard_normal(sum(map(len, index))).astype("<f4")
    gates = (rng.choice([-1, 1], len(shapes)) * rng.uniform(0.1, 0.2, len(shapes))).astype("<f4")
    rigsa_file.write_file(path, "tick", [
        ("base", struct.pack("<Q", rigsa_file.hash64(sections["weights"])) + sections["name"]),
        ("init", struct.pack("<QIIf", 2511_01794, 3, rest, 0.3)),
        ("gates", gates.tobytes()),
        ("entries", struct.pack(f"<{len(index)}Q", *map(len, index))),
        ("values", values.tobytes()),
    ] + [("index", np.concatenate(index).tobytes())] * (density < 1))


def run(module, *args):
    """What main() of the script prints; ValueError with its one line where it ends in an error."""
    with (unittest.mock.patch("sys.argv", [f"{module.__name__}.py", *args]),
          contextlib.redirect_stdout(io.StringIO()) as out):
        try:
            module.main()
        except SystemExit as end:
            raise ValueError(end.code) from None
    return out.getvalue()


class Folder(test_prepro.Folder):
    """A test with a temporary folder for models."""

    def save(self, model, name="hf", shard="1GB"):
        """The model's folder, with something in place of a tokenizer."""
        model.save_pretrained(self.path(name), max_shard_size=shard)
        with open(self.path(f"{name}/tokenizer.json"), "w", encoding="utf-8") as file:
            file.write("{}\n")
        return self.path(name)

    def export(self, folder, *args):
        """The base file of the model in `folder`."""
        run(export_hf, folder, self.path("base.bin"), *args)
        return self.path("base.bin")

    def our_logits(self, base, *ticket):
        """The logits (M, V) of the C program."""
        vocab = rigsa_file.unpack_config(rigsa_file.read_file(base, "base")["config"])["vocab"]
        data, out = self.path("data.bin"), self.path("logits")
        rigsa_file.write_file(data, "data", rigsa_file.data_sections(vocab, examples(vocab)))
        subprocess.run([os.path.join(TOP, "test_rigsa"), "--logits", base, data, out, *ticket], check=True)
        return np.fromfile(out, dtype="<f4").reshape(-1, vocab)

    def evaluation(self, base):
        """An evaluation set for the base file."""
        vocab = rigsa_file.unpack_config(rigsa_file.read_file(base, "base")["config"])["vocab"]
        sections = rigsa_file.data_sections(vocab, examples(vocab), None, "column", "exact")
        rigsa_file.write_file(self.path("test.bin"), "data", sections)
        return self.path("test.bin")

    largest = 0

    def assert_same(self, got, expected):
        """Norm-wise at most SAME apart; a NaN fails."""
        found = difference(got, expected)
        self.assertLessEqual(found, SAME)
        Folder.largest = max(Folder.largest, found)

    def refuses(self, wrong, module, *args):
        """The script ends with one line in which `wrong` occurs."""
        with self.assertRaises(ValueError) as caught:
            run(module, *args)
        self.assertIn(wrong, str(caught.exception))
        self.assertNotIn("\n", str(caught.exception))
        self.assertTrue(str(caught.exception).startswith(f"{module.__name__}.py: "))


# ----------------------------------------------------------------------------------------------------
# in

class Numbers(unittest.TestCase):
    def test_as_torch(self):
        """
        Every bf16 and fp16 number in fp32, and random fp32 numbers rounded, with ties, infinities and NaN,
        are PyTorch's.
        """
        halves = np.arange(1 << 16, dtype="<u2")
        for kind, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
            stored = halves if kind == "BF16" else halves.view("<f2")
            expected = torch.from_numpy(halves).view(dtype).float().numpy()
            self.assertTrue(np.array_equal(checkpoint.decode(stored, kind), expected, equal_nan=True))
        bits = np.random.default_rng(1).integers(1 << 32, size=200_000, dtype=np.uint32)
        bits[:100_000] = bits[:100_000] & 0xFFFF0000 | 0x8000  # ties
        bits[:65_536] = (halves.astype(np.uint32) << 16) + 0x7FFF * (halves % 3)
        values = bits.view(np.float32)
        for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            expected = torch.from_numpy(values).to(dtype).float().numpy()
            self.assertTrue(np.array_equal(checkpoint.rounded(values, kind), expected, equal_nan=True))


class Export(Folder):
    def test_random_configs(self):
        for seed in range(10):
            with self.subTest(seed=seed):
                model = random_model(random_config(seed))
                base = self.export(self.save(model, f"hf{seed}", shard="10KB" if seed % 3 else "1GB"))
                self.assert_same(self.our_logits(base), logits(model))

    def test_random_base(self):
        """A base of random weights, name and all, is one that the trainer takes."""
        random_config(2).save_pretrained(self.path("hf"))
        base = self.path("base.bin")
        run(random_base, self.path("hf/config.json"), base)
        subprocess.run([os.path.join(TOP, "evaluate_rigsa"), "--base", base, "--eval", self.evaluation(base)],
                       check=True, stdout=subprocess.DEVNULL)

    def test_pieces(self):
        """However few weights are read at a time, the file is the same."""
        folder, files = self.save(random_model(random_config(5))), []
        for piece in (checkpoint.PIECE, 100, 1):
            with unittest.mock.patch("checkpoint.PIECE", piece), open(self.export(folder), "rb") as file:
                files.append(file.read())
        self.assertEqual(files, files[:1] * 3)

    def test_checkpoint_types(self):
        """fp16 and bf16 checkpoints keep their values; bf16 stays at 2 bytes."""
        for dtype, size in ((torch.float16, 4), (torch.bfloat16, 2)):
            model = random_model(random_config(4), dtype=dtype)
            base = self.export(self.save(model, str(dtype)))
            weights = rigsa_file.read_file(base, "base")["weights"]
            self.assertEqual(len(weights), size * sum(weight.numel() for weight in model.parameters()))
            expected = logits(load(self.path(str(dtype))))
            self.assert_same(self.our_logits(base), expected)
            self.assert_same(self.our_logits(self.export(self.path(str(dtype)), "--dtype", "fp32")), expected)

    def test_bf16_of_fp32(self):
        """The weights are those that PyTorch rounds, and that matters: it moves these logits by 2 %."""
        model = random_model(random_config(4))
        base = self.export(self.save(model), "--dtype", "bf16")
        exact = logits(model)
        for weight in model.parameters():  # not model.to(): it would round the rotary frequencies too
            weight.data = weight.to(torch.bfloat16).float()
        rounded = logits(model)
        self.assert_same(self.our_logits(base), rounded)
        self.assertGreater(difference(rounded, exact), 1e-3)

    def test_without_torch(self):
        """A folder in bf16 goes in, and out again with a ticket, where there is no torch; so do GGUF and PEFT."""
        folder = self.save(random_model(random_config(5), dtype=torch.bfloat16))
        write_ticket(self.path("ticket.bin"), self.export(folder))

        def script(name, *args):
            code = ("import runpy, sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); "
                    "del sys.argv[:2]; runpy.run_path(sys.argv[0], run_name='__main__')")
            subprocess.run([sys.executable, "-c", code, HERE, os.path.join(HERE, name), *args], check=True,
                           stdout=subprocess.DEVNULL)

        script("export_hf.py", folder, self.path("again.bin"))
        with open(self.path("base.bin"), "rb") as one, open(self.path("again.bin"), "rb") as two:
            self.assertEqual(one.read(), two.read())
        script("import_hf.py", folder, self.path("ticket.bin"), self.path("merged"))
        script("import_hf.py", folder, self.path("ticket.bin"), self.path("adapter"), "--peft")
        ours = self.our_logits(self.path("base.bin"), self.path("ticket.bin"))
        self.assert_same(logits(load(self.path("merged"))), ours)
        self.assert_same(logits(PeftModel.from_pretrained(load(folder), self.path("adapter"))), ours)
        script("peft_files.py", "--help")
        write_gguf(self.path("model.gguf"), gguf_config(), gguf_tensors(random_model(gguf_config())))
        script("export_hf.py", self.path("model.gguf"), self.path("gguf.bin"), "--hf", self.path("gguf"))

    def test_old_names(self):
        """A config.json of transformers 4, with fields that it leaves to their defaults."""
        model = random_model(random_config(6))
        folder = self.save(model)
        with open(self.path("hf/config.json"), encoding="utf-8") as file:
            config = json.load(file)
        theta = config.pop("rope_parameters")["rope_theta"]
        for field in ("hidden_act", "attention_bias", "mlp_bias"):
            del config[field]
        with open(self.path("hf/config.json"), "w", encoding="utf-8") as file:
            json.dump(config | {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "float32"}, file)
        self.assert_same(self.our_logits(self.export(folder)), logits(model))

    def test_names(self):
        """Whatever a folder is called, the trainer takes its base, and the name is whole characters."""
        model = random_model(random_config(2))
        cyrillic = "\u043c\u043e\u0434\u0435\u043b\u044c " * 6  # 13 bytes a word
        for name, told in (("SmolLM2, my run", "SmolLM2_ my run"), ('with"quote', "with_quote"),
                           ("back\\slash\n", "back_slash_"), (cyrillic, cyrillic[:33]),
                           ("x" + "\u20ac" * 30, "x" + "\u20ac" * 20), (os.fsdecode(b"latin \xe9"), "latin ?")):
            base = self.export(self.save(model, name))
            self.assertEqual(rigsa_file.read_file(base, "base")["name"].decode(), told)
            subprocess.run([os.path.join(TOP, "evaluate_rigsa"), "--base", base,
                            "--eval", self.evaluation(base)], check=True, stdout=subprocess.DEVNULL)

    def test_whole_beside_shards(self):
        """
        A whole model.safetensors hides an older set of shards, as it does for transformers; and merged it is
        alone.
        """
        folder = self.save(random_model(random_config(5), seed=2), shard="10KB")
        whole = self.save(random_model(random_config(5), seed=3), "whole")
        shutil.copy(self.path("whole/model.safetensors"), folder)
        base = self.export(folder)
        self.assert_same(self.our_logits(base), logits(load(whole)))
        self.assert_same(self.our_logits(base), logits(load(folder)))
        write_ticket(self.path("ticket.bin"), base)
        run(import_hf, folder, self.path("ticket.bin"), self.path("merged"))
        self.assertEqual(sorted(os.listdir(self.path("merged"))), sorted(os.listdir(whole)))
        self.assert_same(logits(load(self.path("merged"))), self.our_logits(base, self.path("ticket.bin")))

    def test_name_at_the_hub(self):
        """A model that the hub's cache holds, without a network; and one that it does not hold."""
        model = random_model(random_config(2))
        cache = self.path("cache/models--somebody--something")
        os.makedirs(cache + "/refs")
        with open(cache + "/refs/main", "w", encoding="utf-8") as file:
            file.write("0" * 40)
        self.save(model, f"cache/models--somebody--something/snapshots/{'0' * 40}")
        environment = os.environ | {"HF_HUB_CACHE": self.path("cache"), "HF_HUB_OFFLINE": "1"}

        def export(name):
            return subprocess.run([sys.executable, os.path.join(HERE, "export_hf.py"), name, self.path("base.bin")],
                                  env=environment, capture_output=True, text=True)

        self.assertIn("somebody/something", export("somebody/something").stdout)
        self.assertEqual(rigsa_file.read_file(self.path("base.bin"), "base")["name"], b"somebody/something")
        self.assert_same(self.our_logits(self.path("base.bin")), logits(model))
        self.assertRegex(export("nobody/nothing").stderr, "^export_hf.py: nobody/nothing: no folder, .*\n$")

    @unittest.skipUnless(os.path.isdir(SMOLLM2), "no folder with SmolLM2's configs given")
    def test_official_135m(self):
        """At gain 1.5, 30 layers would carry fp32's rounding to 1e-5, here and in transformers."""
        model = random_model(AutoConfig.from_pretrained(os.path.join(SMOLLM2, "SmolLM2-135M")), gain=1)
        self.assert_same(self.our_logits(self.export(self.save(model))), logits(model))


class Refused(Folder):
    """One line each, and no base file."""

    def setUp(self):
        super().setUp()
        self.model = random_model(random_config(1))
        self.hf = self.save(self.model, shard="10KB")
        self.shards = sorted(name for name in os.listdir(self.hf) if name.startswith("model-"))

    def tearDown(self):
        self.assertNotIn("base.bin", os.listdir(self.folder))

    def refused(self, wrong):
        self.refuses(wrong, export_hf, self.hf, self.path("base.bin"))

    def test_configs(self):
        path = self.path("hf/config.json")
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
        wrong = [
            {"model_type": "mistral"}, {"architectures": ["MixtralForCausalLM"]}, {"hidden_act": "gelu"},
            {"attention_bias": True}, {"mlp_bias": True}, {"rope_interleaved": True},
            {"quantization_config": {"quant_method": "gptq"}}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": config["rope_parameters"]},
            {"hidden_size": 31}, {"head_dim": 7},
            {"num_attention_heads": 3, "num_key_value_heads": 7}, {"num_key_value_heads": 0}, {"vocab_size": "many"},
            {"num_hidden_layers": 0}, {"rms_norm_eps": float("nan")},
        ]
        for fields in wrong:
            with self.subTest(fields=fields):
                changed = config | fields
                if "rope_scaling" in fields and "rope_parameters" not in fields:
                    del changed["rope_parameters"]
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(changed, file)
                self.refused(f"{path}: '{next(iter(fields))}' is ")
        with open(path, "w", encoding="utf-8") as file:
            file.write("{")
        self.refused(f"{path}: not a JSON file")
        os.remove(path)
        self.refused(f"{path}: No such file")

    def change(self, shard, edit):
        """Writes the shard anew after edit(tensors), and the index to match."""
        path = os.path.join(self.hf, shard)
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    def test_missing_shard(self):
        os.remove(os.path.join(self.hf, self.shards[1]))
        self.refused(f"{self.shards[1]}: no such file")

    def test_no_weights(self):
        shutil.rmtree(self.hf)
        self.model.config.save_pretrained(self.hf)
        self.refused("model.safetensors: no such file")

    def test_truncated(self):
        path = os.path.join(self.hf, self.shards[0])
        os.truncate(path, os.path.getsize(path) - 1)
        self.refused(f"{path}: damaged or cut off")

    def test_not_safetensors(self):
        path = os.path.join(self.hf, self.shards[0])
        with open(path, "w", encoding="utf-8") as file:
            file.write("<html>")
        self.refused(f"{path}: damaged or cut off")

    def test_broken_index(self):
        with open(os.path.join(self.hf, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            file.write("{}")
        self.refused("model.safetensors.index.json: has no weight_map")

    def test_missing_tensor(self):
        self.change(self.shards[0], lambda tensors: tensors.pop("model.embed_tokens.weight"))
        self.refused("'model.embed_tokens.weight' is in none")

    def test_twice(self):
        again = load_file(os.path.join(self.hf, self.shards[1]))
        self.change(self.shards[0], lambda tensors: tensors.update(again))
        self.refused(f"is in {self.shards[1]} and in another file")

    def test_wrong_type(self):
        for dtype in (torch.float64, torch.int8):
            self.change(self.shards[0], lambda tensors: tensors.update(
                {name: tensor.to(dtype) for name, tensor in tensors.items()}))
            self.refused("is of type")

    def test_wrong_shape(self):
        self.change(self.shards[0], lambda tensors: tensors.update(
            {name: tensor[:-1].contiguous() for name, tensor in tensors.items()}))
        self.refused("config.json asks for")

    def test_other_tensors(self):
        for name, wrong in (("q_norm.weight", "has a tensor that no plain Llama has"), ("q_proj.bias", "has biases")):
            stored = f"model.layers.0.self_attn.{name}"
            self.change(self.shards[0], lambda tensors: tensors.update({stored: torch.ones(3)}))
            self.refused(f"{wrong}, '{stored}'")
            self.change(self.shards[0], lambda tensors: tensors.pop(stored))

    def test_tied_but_different(self):
        self.hf = self.save(random_model(random_config(2)), "tied")
        head = load_file(self.path("tied/model.safetensors"))["model.embed_tokens.weight"].clone()
        self.change("model.safetensors", lambda tensors: tensors.update({"lm_head.weight": head}))
        run(export_hf, self.hf, self.path("same.bin"))
        head[0, 0] += 1
        self.change("model.safetensors", lambda tensors: tensors.update({"lm_head.weight": head}))
        self.refused("'tie_word_embeddings' is true, but lm_head and embed_tokens differ")

    def test_no_folder(self):
        self.refuses("no folder, and no model of the hub", export_hf, self.path("nowhere"), self.path("base.bin"))


# ----------------------------------------------------------------------------------------------------
# out

class Merge(Folder):
    def merge(self, folder, ticket, *args):
        """The logits of the merged model as transformers loads it, computed in fp32."""
        run(import_hf, folder, ticket, self.path("merged"), *args)
        model = load(self.path("merged"))
        self.assertEqual(sorted(os.listdir(self.path("merged"))), sorted(os.listdir(folder)))
        shutil.rmtree(self.path("merged"))
        return logits(model)

    def check_merged(self, model, shard="1GB", export=(), **ticket):
        folder = self.save(model, "hf", shard)
        base = self.export(folder, *export)
        write_ticket(self.path("ticket.bin"), base, **ticket)
        ours = self.our_logits(base, self.path("ticket.bin"))
        self.assertGreater(difference(ours, self.our_logits(base)), 0.1)  # the ticket matters
        self.assert_same(self.merge(folder, self.path("ticket.bin")), ours)
        shutil.rmtree(folder)

    def test_merged(self):
        for seed in range(4):
            for rest in (0, 1):
                with self.subTest(seed=seed, rest=rest):
                    self.check_merged(random_model(random_config(seed)), "10KB" if seed % 3 else "1GB", rest=rest)

    def test_dense(self):
        """A ticket that was never pruned has no index."""
        self.check_merged(random_model(random_config(4)), density=1)

    def test_bases_of_other_types(self):
        """Whether the base was exported as its checkpoint is stored, wider, or rounded: its hash tells."""
        self.check_merged(random_model(random_config(4), dtype=torch.bfloat16))
        self.check_merged(random_model(random_config(4), dtype=torch.bfloat16), export=("--dtype", "fp32"))
        self.check_merged(random_model(random_config(5)), export=("--dtype", "bf16"))

    def test_bf16(self):
        """Merged in fp32 and rounded once."""
        model = random_model(random_config(4), dtype=torch.bfloat16)
        folder = self.save(model)
        write_ticket(self.path("ticket.bin"), self.export(folder))
        run(import_hf, folder, self.path("ticket.bin"), self.path("fp32"))
        self.assertIn("in bf16", run(import_hf, folder, self.path("ticket.bin"), self.path("bf16"), "--dtype", "bf16"))
        wide, narrow = (load_file(self.path(f"{name}/model.safetensors")) for name in ("fp32", "bf16"))
        for name, weight in wide.items():
            self.assertEqual((weight.dtype, narrow[name].dtype), (torch.float32, torch.bfloat16))
            self.assertTrue(torch.equal(weight.to(torch.bfloat16), narrow[name]))
        self.assertEqual(AutoModelForCausalLM.from_pretrained(self.path("bf16"), dtype="auto").dtype, torch.bfloat16)
        self.assertEqual(AutoModelForCausalLM.from_pretrained(self.path("fp32"), dtype="auto").dtype, torch.float32)

    def train(self, base, method):
        """What a method makes of random examples."""
        vocab = rigsa_file.unpack_config(rigsa_file.read_file(base, "base")["config"])["vocab"]
        data = self.path("train.bin")
        rigsa_file.write_file(data, "data", rigsa_file.data_sections(vocab, examples(vocab)))
        subprocess.run([os.path.join(TOP, "train_baselines"), "--base", base, "--data", data, "--eval", self.evaluation(base), "--out",
                        self.path(method), "--method", method, "--examples", "64", "--ticket-examples", "64",
                        "--batch", "4", "--rounds", "2", "--lr", "0.01"], check=True, stdout=subprocess.DEVNULL)

    def test_trained(self):
        """A real ticket, and a real model of --method full."""
        model = random_model(random_config(7), dtype=torch.bfloat16)
        folder = self.save(model)
        base = self.export(folder)
        self.train(base, "rigsa")
        ours = self.our_logits(base, self.path("rigsa/ticket.bin"))
        self.assertGreater(difference(ours, self.our_logits(base)), 1e-3)
        self.assert_same(self.merge(folder, self.path("rigsa/ticket.bin")), ours)
        self.train(base, "full")
        ours = self.our_logits(self.path("full/model.bin"))
        self.assertGreater(difference(ours, self.our_logits(base)), 1e-2)
        self.assert_same(self.merge(folder, self.path("full/model.bin")), ours)

    @unittest.skipUnless(os.path.isdir(STORIES), "no folder with stories260K given")
    def test_stories(self):
        """Real weights: a model that has learnt something says the same here and there."""
        base = self.path("stories.bin")
        run(export_stories, os.path.join(STORIES, "stories260K.bin"), os.path.join(STORIES, "tok512.bin"), base)
        config = rigsa_file.unpack_config(rigsa_file.read_file(base, "base")["config"])
        model = transformers_model(config)
        self.assert_same(self.merge(self.save(model), base), self.our_logits(base))

    def test_refused(self):
        model = random_model(random_config(4))
        folder, base, ticket = self.save(model), self.path("base.bin"), self.path("ticket.bin")
        self.export(folder)
        write_ticket(ticket, base)
        other = self.save(random_model(random_config(4), seed=2), "other")
        self.refuses("made on the base 'hf' (", import_hf, other, ticket, self.path("out"))
        self.refuses(f"not on {other} (", import_hf, other, ticket, self.path("out"))
        odd = self.save(random_model(random_config(5)), "odd")
        self.refuses("is it a ticket of this model?", import_hf, odd, ticket, self.path("out"))
        self.refuses("is there already", import_hf, folder, ticket, self.path("other"))
        self.refuses("No such file", import_hf, folder, self.path("nowhere"), self.path("out"))
        self.refuses("'tick or base' is needed", import_hf, folder, self.data(), self.path("out"))
        self.refuses("its config is not that of the model", import_hf, odd, base, self.path("out"))
        os.truncate(ticket, os.path.getsize(ticket) - 8)
        self.refuses("long where its header says", import_hf, folder, ticket, self.path("out"))
        self.assertFalse([name for name in os.listdir(self.folder) if name.startswith("out")])

    def data(self):
        rigsa_file.write_file(self.path("data.bin"), "data", rigsa_file.data_sections(9, [([1, 2], 1)]))
        return self.path("data.bin")


class Peft(Folder):
    def adapter(self, folder, **ticket):
        base = self.export(folder)
        write_ticket(self.path("ticket.bin"), base, **ticket)
        run(import_hf, folder, self.path("ticket.bin"), self.path("adapter"), "--peft")
        return self.our_logits(base, self.path("ticket.bin"))

    def test_same_logits(self):
        for seed in range(4):
            with self.subTest(seed=seed):
                folder = self.save(random_model(random_config(seed)), f"hf{seed}")
                ours = self.adapter(folder, density=0.1)
                model = PeftModel.from_pretrained(load(folder), self.path("adapter"))
                self.assert_same(logits(model), ours)
                for module in model.modules():
                    if hasattr(module, "shira_indices"):  # zeros lie where no entry is
                        place = module.shira_indices["default"]
                        self.assertEqual(len(place.unique(dim=1).T), len(place.T))
                self.assert_same(logits(model.merge_and_unload()), ours)
                shutil.rmtree(self.path("adapter"))

    def test_bf16(self):
        """A model that is used in bf16 computes with 8 bits, whatever adds the ticket."""
        folder = self.save(random_model(random_config(4), dtype=torch.bfloat16))
        ours = self.adapter(folder)
        self.assert_same(logits(PeftModel.from_pretrained(load(folder), self.path("adapter"))), ours)
        model = PeftModel.from_pretrained(load(folder, torch.bfloat16), self.path("adapter"))
        self.assertLessEqual(difference(logits(model), ours), 0.05)

    def test_rounded_base(self):
        """On fp32 weights, an adapter for these weights rounded to bf16 is off, and a note says so."""
        folder = self.save(random_model(random_config(4)))
        for dtype, off in (("bf16", True), ("fp32", False)):
            base = self.export(folder, "--dtype", dtype)
            write_ticket(self.path("ticket.bin"), base)
            said = run(import_hf, folder, self.path("ticket.bin"), self.path(dtype), "--peft")
            self.assertEqual("note: trained on these weights rounded to bf16" in said, off)
            found = difference(logits(PeftModel.from_pretrained(load(folder), self.path(dtype))),
                               self.our_logits(base, self.path("ticket.bin")))
            self.assertEqual(found > SAME, off)

    def test_refused(self):
        folder = self.save(random_model(random_config(4)))
        base, ticket, out = self.export(folder), self.path("ticket.bin"), self.path("adapter")
        write_ticket(ticket, base, density=0.9)
        self.refuses("too dense for PEFT", import_hf, folder, ticket, out, "--peft")
        write_ticket(ticket, base, rest=1)
        self.refuses("leave out --peft to merge it", import_hf, folder, ticket, out, "--peft")
        self.refuses("no ticket; leave out --peft", import_hf, folder, base, out, "--peft")
        write_ticket(ticket, base)
        other = self.save(random_model(random_config(4), seed=2), "other")
        self.refuses("made on the base 'hf' (", import_hf, other, ticket, out, "--peft")
        self.assertFalse([name for name in os.listdir(self.folder) if name.startswith("adapter")])


# ----------------------------------------------------------------------------------------------------
# GGUF

def gguf_config(**fields):
    """A little Llama whose rows are whole blocks of every type of GGUF."""
    return LlamaConfig(**dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, vocab_size=60, max_position_embeddings=300,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, rms_norm_eps=1e-5,
        tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None) | fields)


def write_gguf(path, config, tensors, metadata=(), without=(), endian=gguf.GGUFEndian.LITTLE):
    """
    A GGUF file as llama.cpp's converter lays it out. `tensors`: a dict, name -> (array, raw type or None);
    `metadata`: keys to add or to change, a dict; `without`: keys to leave out.
    """
    tokens = [f"t{number}" for number in range(config.vocab_size)]
    entries = {
        "general.architecture": "llama", "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings, "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1), "tokenizer.ggml.merges": ["t 0", "t 1"],
        "tokenizer.ggml.bos_token_id": 0,
    } | dict(metadata)
    writer = gguf.GGUFWriter(path, entries["general.architecture"], endianess=endian)
    for key, value in entries.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32,
               list: writer.add_array}[type(value)]
        if key != "general.architecture" and key not in without:
            add(key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(model, kind=gguf.GGMLQuantizationType.F32):
    """
    The weights of transformers' model for write_gguf: matrices as `kind`, rows of q and k in llama.cpp's
    order.
    """
    config, state, found = model.config, model.state_dict(), {}
    shapes = llama_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    for name, _ in rigsa_file.tensor_shapes(shapes):
        values = state[hugging_face_name(name)].float().numpy()
        heads = {"q": config.num_attention_heads,
                 "k": config.num_key_value_heads}.get(name.rpartition(".")[2])
        if heads:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        found[gguf_model.gguf_name(name)] = gguf.quantize(np.ascontiguousarray(values), stored), stored
    return found


class Ggufs(Folder):
    """GGUF files in; what transformers makes of the same file is right."""

    def reference(self, path):
        """transformers' model of the GGUF file."""
        folder, name = os.path.split(path)
        with unittest.mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda tensors, **_: tensors):
            return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()

    def assert_bits(self, path, model):
        """Every tensor of the base file has the bits of transformers' model."""
        base, state, start = rigsa_file.read_file(self.export(path), "base"), model.state_dict(), 0
        for name, _ in rigsa_file.tensor_shapes(rigsa_file.unpack_config(base["config"])):
            expected = state[hugging_face_name(name)].numpy()
            self.assertEqual(base["weights"][start:start + expected.nbytes], expected.tobytes(), name)
            start += expected.nbytes
        self.assertEqual(start, len(base["weights"]))

    def test_every_type(self):
        """Each type that the package gguf can dequantise, on random bytes: the same bits."""
        rng, known, config = np.random.default_rng(1), [], gguf_config()
        path = self.path("model.gguf")
        shapes = {name: tensor.shape for name, (tensor, _) in gguf_tensors(random_model(config)).items()}
        for kind in gguf.GGMLQuantizationType:
            size = gguf.GGML_QUANT_SIZES[kind]
            tensors = {}
            for name, shape in shapes.items():
                if len(shape) == 1:
                    tensors[name] = rng.random(shape, np.float32), None
                else:
                    raw = rng.integers(256, size=(shape[0], shape[1] // size[0] * size[1]), dtype=np.uint8)
                    tensors[name] = raw, kind
            write_gguf(path, config, tensors)
            try:
                gguf.dequantize(tensors["token_embd.weight"][0], kind)
            except NotImplementedError:
                self.refuses(f"is of type {kind.name}, which the package gguf cannot dequantise",
                             export_hf, path, self.path("no.bin"))
                continue
            known.append(kind.name)
            with self.subTest(kind=kind.name):
                self.assert_bits(path, self.reference(path))
        self.assertGreater(len(known), 20)

    def test_logits(self):
        """
        Tied and not, one query head for each key and several; the C program says what transformers says.
        """
        for fields in ({}, {"tie_word_embeddings": False}, {"num_key_value_heads": 8}):
            for kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q4_1):
                model = random_model(gguf_config(**fields))
                path = self.path("model.gguf")
                write_gguf(path, model.config, gguf_tensors(model, kind))
                self.assert_same(self.our_logits(self.export(path)), logits(self.reference(path)))
                if kind == gguf.GGMLQuantizationType.F32:
                    self.assert_same(self.our_logits(self.path("base.bin")), logits(model))

    def test_same_base(self):
        """
        bf16 weights stay bf16, as from their folder: the same hash, so that a ticket of one is a ticket of
        the other.
        """
        model = random_model(gguf_config(), dtype=torch.bfloat16)
        folder, path = self.save(model), self.path("model.gguf")
        write_gguf(path, model.config, gguf_tensors(model, gguf.GGMLQuantizationType.BF16))
        weights = [rigsa_file.read_file(self.export(source), "base") for source in (folder, path)]
        self.assertEqual(weights[0]["weights"], weights[1]["weights"])
        self.assertEqual(weights[0]["config"], weights[1]["config"])
        self.assertEqual(weights[1]["name"], b"model")

    def test_folder(self):
        """--hf writes a model that transformers loads; a ticket merges into the file as into this folder."""
        model = random_model(gguf_config())
        path = self.path("model.gguf")
        write_gguf(path, model.config, gguf_tensors(model, gguf.GGMLQuantizationType.Q8_0))
        run(export_hf, path, self.path("base.bin"), "--hf", self.path("hf"))
        expected = self.reference(path)
        self.assert_same(logits(load(self.path("hf"))), logits(expected))
        for name, weight in load(self.path("hf")).state_dict().items():
            self.assertTrue(torch.equal(weight, expected.state_dict()[name]))
        write_ticket(self.path("ticket.bin"), self.path("base.bin"))
        for source, out in ((path, "one"), (self.path("hf"), "two")):
            run(import_hf, source, self.path("ticket.bin"), self.path(out))
            ours = self.our_logits(self.path("base.bin"), self.path("ticket.bin"))
            self.assert_same(logits(load(self.path(out))), ours)
        for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
            with open(self.path(f"one/{name}"), "rb") as one, open(self.path(f"two/{name}"), "rb") as two:
                self.assertEqual(one.read(), two.read(), name)

    def test_broken(self):
        """One line for each, and nothing written."""
        model = random_model(gguf_config())
        good, path, out = gguf_tensors(model), self.path("model.gguf"), self.path("no.bin")

        def refused(wrong, *args, tensors=good, config=model.config, **changes):
            write_gguf(path, config, tensors, **changes)
            self.refuses(wrong, export_hf, path, out, *args)

        refused("'general.architecture' is 'qwen2', rigsa.c knows only 'llama'",
                metadata={"general.architecture": "qwen2"})
        refused("'llama.rope.scaling.type' is 'yarn'", metadata={"llama.rope.scaling.type": "yarn"})
        refused("'llama.rope.scaling.factor' is 4.0", metadata={"llama.rope.scaling.factor": 4.0})
        refused("'llama.rope.dimension_count' is 16, rigsa.c knows only 32",
                metadata={"llama.rope.dimension_count": 16})
        refused("'llama.attention.value_length' is 16, rigsa.c knows only 32",
                metadata={"llama.attention.value_length": 16})
        refused("has 'llama.logit_scale' in its metadata", metadata={"llama.logit_scale": 0.5})
        refused("one of 3 parts; join them", metadata={"split.count": 3})
        refused("has no 'llama.block_count'", without=["llama.block_count"])
        refused("'num_attention_heads' is 'many'", metadata={"llama.attention.head_count": "many"})
        refused("has shape (256, 256), its metadata ask for (8192, 256)",
                metadata={"llama.attention.key_length": 1024, "llama.rope.dimension_count": 1024})
        refused("'token_embd.weight' has shape (60, 256), its metadata ask for (61, 256)",
                metadata={"llama.vocab_size": 61})
        refused("has shape (512, 256), its metadata ask for (480, 256)",
                metadata={"llama.feed_forward_length": 480})
        refused("big-endian; run gguf-convert-endian", endian=gguf.GGUFEndian.BIG)
        refused("'blk.1.ffn_up.weight' is not in it",
                tensors={name: good[name] for name in good if name != "blk.1.ffn_up.weight"})
        extra = np.ones(4, np.float32), None
        refused("has biases, 'blk.0.attn_q.bias'", tensors=good | {"blk.0.attn_q.bias": extra})
        refused("has scaled rotary positions, 'rope_freqs.weight'", tensors=good | {"rope_freqs.weight": extra})
        refused("has a tensor that no plain Llama has, 'blk.0.attn_q_norm.weight'",
                tensors=good | {"blk.0.attn_q_norm.weight": extra})
        hf = "--hf", self.path("hf")
        refused("holds no tokenizer, 'tokenizer.ggml.tokens' is missing", *hf,
                without=["tokenizer.ggml.tokens"])
        refused("'tokenizer.ggml.model' is 'llama', only 'gpt2' can be written", *hf,
                metadata={"tokenizer.ggml.model": "llama"})
        refused("'tokenizer.ggml.pre' is 'qwen2', only 'smollm' can be written", *hf,
                metadata={"tokenizer.ggml.pre": "qwen2"})
        refused("'tokenizer.ggml.bos_token_id' is 60, of 60 tokens", *hf,
                metadata={"tokenizer.ggml.bos_token_id": 60})
        write_gguf(path, model.config, good, without=["tokenizer.ggml.tokens"])
        self.assert_same(self.our_logits(self.export(path)), logits(model))  # a base needs no tokenizer

        write_gguf(path, model.config, good)
        with open(path, "rb") as file:
            whole = file.read()
        kind = whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
        for number in (99, 2 ** 31):
            with open(path, "wb") as file:
                file.write(whole[:kind] + struct.pack("<I", number) + whole[kind + 4:])
            self.refuses(f"{path}: damaged, cut off, or of a type that the package gguf does not know",
                         export_hf, path, out)
        r = random.Random(1)
        data = whole.index(b"\0" * 8, whole.rindex(b".weight"))
        lengths = [r.randrange(data) for _ in range(60)] + [r.randrange(data, len(whole)) for _ in range(9)]
        for length in [0, 3, 4, 8, 12, 24] + lengths:
            with open(path, "wb") as file:
                file.write(whole[:length])
            with self.subTest(length=length):
                self.refuses(f"{path}: {'damaged, cut off' if length >= 4 else 'not a GGUF file'}",
                             export_hf, path, out)
        os.remove(path)
        self.refuses("No such file", export_hf, path, out)
        self.assertEqual(sorted(os.listdir(self.folder)), ["base.bin", "data.bin", "logits"])


@unittest.skipUnless(os.path.isdir(SMOLLM2), "no folder with SmolLM2's tokenizer given")
class GgufTokenizer(Folder):
    def test_same(self):
        """
        What llama.cpp's converter keeps of SmolLM2's tokenizer becomes its tokenizer.json again, entry for
        entry.
        """
        official = os.path.join(SMOLLM2, "tokenizer")
        expected = load_json(os.path.join(official, "tokenizer.json"))
        template = load_json(os.path.join(official, "tokenizer_config.instruct.json"))["chat_template"]
        vocab = expected["model"]["vocab"]
        tokens = sorted(vocab, key=vocab.get)
        special = {token["content"] for token in expected["added_tokens"]}
        metadata = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens + ["[PAD0]"],
            "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens] + [5],
            "tokenizer.ggml.merges": expected["model"]["merges"], "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.padding_token_id": 2,
            "tokenizer.chat_template": template, "llama.context_length": 8192,
        }
        files = gguf_tokenizer.tokenizer_files(metadata)
        self.assertEqual(files["tokenizer.json"], expected)
        for name, content in files.items():
            checkpoint.write_json(self.path(name), content)
        ours = AutoTokenizer.from_pretrained(self.folder)
        self.assertEqual((ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id), (1, 2, 0, 2))
        self.assertEqual((len(ours), ours.model_max_length), (49152, 8192))
        self.assertEqual(ours.chat_template, template)


# ----------------------------------------------------------------------------------------------------
# prompts

@unittest.skipUnless(os.path.isdir(SMOLLM2), "no folder with SmolLM2's tokenizer given")
class Prompts(Folder):
    def tokenizer(self):
        """The folder of SmolLM2's instruct tokenizer, as the hub has it."""
        os.mkdir(self.path("tokenizer"))
        for name in ("tokenizer.json", "tokenizer_config.instruct.json", "special_tokens_map.instruct.json",
                     "chat_template.instruct.jinja", "vocab.json", "merges.txt"):
            copy = self.path(f"tokenizer/{name.replace('.instruct', '')}")
            shutil.copy(os.path.join(SMOLLM2, "tokenizer", name), copy)
        return self.path("tokenizer")

    def test_padded_vocabulary(self):
        """Where a model's vocabulary is larger than its tokenizer's, examples are of the model's."""
        folder = self.tokenizer()
        self.assertEqual(prepro_mnist.Chat(folder, "?").vocab, 49152)
        LlamaConfig(vocab_size=49153).save_pretrained(folder)
        self.assertEqual(prepro_mnist.Chat(folder, "?").vocab, 49153)

    def test_token_for_token(self):
        """Every prompt that prepro_mnist.py writes is what the chat template says, its answer included."""
        rng = np.random.default_rng(1)
        images, labels = rng.integers(256, size=(12, 28, 28), dtype=np.uint8), bytes(range(10)) + b"\0\1"
        images[0] = 0
        for prefix in ("train", "t10k"):
            for name, content in (("images-idx3", struct.pack(">4I", 0x803, 12, 28, 28) + images.tobytes()),
                                  ("labels-idx1", struct.pack(">2I", 0x801, 12) + labels)):
                with open(self.path(f"{prefix}-{name}-ubyte"), "wb") as file:
                    file.write(content)
        folder = self.tokenizer()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for side, length in ((28, 851), (14, 249), (7, 95)):
            run(prepro_mnist, "--images", self.folder, "--side", str(side), "--out", self.folder, "--tokenizer", folder)
            found = rigsa_file.read_examples(self.path(f"mnist_{side}_test.bin"))
            self.assertEqual((found["vocab"], len(found["examples"])), (49152, 12))
            for (tokens, answer), image, label in zip(found["examples"], images, labels):
                picture = prepro_mnist.picture(image.tobytes(), side).decode()
                question = [{"role": "user", "content": f"Which handwritten digit is this?\n{picture}"}]
                dialogue = question + [{"role": "assistant", "content": str(label)}]
                prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
                whole = tokenizer.apply_chat_template(dialogue, return_dict=False)
                self.assertEqual(len(tokens), length)
                self.assertEqual((list(tokens[:answer]), list(tokens)), (prompt, whole[:length]))
                self.assertEqual(tokenizer.decode(whole[answer:]), f"{label}<|im_end|>\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    result = unittest.main(argv=sys.argv[:1], exit=False, warnings="ignore",
                           testRunner=unittest.TextTestRunner(sys.stdout)).result
    failed = len(result.failures) + len(result.errors)
    print(f"largest relative difference of logits in fp32: {Folder.largest:.1e}")
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed")
    sys.exit(failed > 0)

"""
Writes what PyTorch says about a small random Llama with RIGSA adapters, for test_rigsa.c to compare with.

    python dev/dump_reference.py --out dev/fixture.bin               the committed fixture: odd sizes, grouped queries
    python dev/dump_reference.py --out FILE --config config.json     the same for any small Hugging Face Llama
    python dev/dump_reference.py --check dev/fixture.bin             do torch and transformers still say the same?

A dump (doc/model.md, section 3) is questions, the weights, examples, adapters and optimizer steps that draw_questions
makes up, and answers, what follows from them. --check answers the questions of an old dump again.

The model is LlamaForCausalLM of transformers, computed in float64. In three places transformers goes down to float32
whatever the model's type. Its RMSNorm is replaced by torch.nn.RMSNorm, the same formula in the type of its input. The
softmax of its `eager` attention is avoided by `sdpa`, the attention of torch. Its rotary angles stay as they are,
because train_rigsa.c computes them in float32 as well. To see that the reference is still the model of transformers,
each case also runs through transformers as it comes, in float32: how far that is from the reference is error32.
"""
import argparse
import os
import sys

import numpy as np
import torch
import transformers

from hugging_face import llama_config, load_json, hugging_face_name
from rigsa_file import adapted_shapes, pack_config, read_file, tensor_shapes, unpack_config, write_file

FIXTURE = {
    "dim": 18, "ffn": 37, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 6, "vocab": 53, "context": 64,
    "tied": 1, "dtype": 0, "theta": 10000.0, "eps": 1e-5,
}
EXAMPLES = [(2, 1), (5, 3), (9, 1), (11, 10), (17, 14)]  # (length, answer): the answer is 1, 2, 3 or 8 tokens
GATES = (1e-6, 0.5)  # size of the gates of each case
DENSITY = 0.4  # of the masks, but for two matrices:
EMPTY, FULL = 2, -1  # numbers of the matrix whose mask is empty and of the one whose mask is full
GAIN = 1.5  # matrices are N(0, GAIN^2 / columns): logits of order 1, attention far from uniform
ADAMW = (1e-2, 0.9, 0.95, 1e-8, 1.0)  # lr, beta1, beta2, eps, decay
ADAMW_STEPS, ADAMW_SIZE = 10, 200
SAME = 1e-6  # norm-wise relative difference up to which --check takes two answers for the same
CLOSE = 1e-4  # an error32 above this is not rounding: 3e-6 here, 3e-5 at 30 layers

TYPES = {"length": "<u4", "answer": "<u4", "tokens": "<u4", "mask": "u1"}  # of the sections that are not <f4


# ----------------------------------------------------------------------------------------------------------------------
# tensors by name

def split(flat, shapes):
    """The tensors that lie end to end in `flat`, an array: a dict, name -> array of its shape."""
    ends = np.cumsum([np.prod(shape) for _, shape in shapes])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes, np.split(flat, ends[:-1]))}


def join(arrays):
    """Arrays of any shape, end to end."""
    return np.concatenate([np.ravel(array) for array in arrays])


# ----------------------------------------------------------------------------------------------------------------------
# questions

def draw_matrix(rng, rows, cols):
    """A matrix of N(0, GAIN^2 / cols), (rows, cols)."""
    return rng.standard_normal((rows, cols)) * GAIN / np.sqrt(cols)


def draw_gates(rng, n, size):
    """`n` gates of both signs, within a factor of 1.5 of `size`."""
    return size * rng.choice([-1, 1], n) * rng.uniform(1 / 1.5, 1.5, n)


def draw_masks(rng, shapes):
    """A random mask for each shape: a list of arrays of 0 and 1."""
    density = np.full(len(shapes), DENSITY)
    density[EMPTY], density[FULL] = 0, 1
    return [rng.random(shape) < share for (_, shape), share in zip(shapes, density)]


def draw_gradients(rng):
    """Gradients (steps, n), scales from 1e-12 to 10; a tenth of them and every seventh column are 0."""
    grads = 10 ** rng.uniform(-12, 1, ADAMW_SIZE) * rng.standard_normal((ADAMW_STEPS, ADAMW_SIZE))
    grads[rng.random(grads.shape) < 0.1] = 0
    grads[:, ::7] = 0
    return grads


def draw_questions(config, seed):
    """All that a dump asks: a dict, tag -> array, as the file holds it."""
    rng = np.random.default_rng(seed)
    adapted = adapted_shapes(config)
    questions = {
        "weights": join(draw_matrix(rng, *shape) if len(shape) == 2 else rng.uniform(0.5, 1.5, shape)
                        for _, shape in tensor_shapes(config)),
        "length": [length for length, _ in EXAMPLES],
        "answer": [answer for _, answer in EXAMPLES],
        "tokens": rng.integers(config["vocab"], size=sum(length for length, _ in EXAMPLES)),
    }
    for case, size in enumerate(GATES):
        questions[f"gates.{case}"] = draw_gates(rng, len(adapted), size)
        questions[f"mask.{case}"] = join(draw_masks(rng, adapted))
        questions[f"delta.{case}"] = join(draw_matrix(rng, *shape) for _, shape in adapted)
    questions["adamw.hyper"] = ADAMW
    start = rng.standard_normal(ADAMW_SIZE)
    start[::2] = 0  # there, nothing hides a small step
    questions["adamw.start"] = start
    questions["adamw.grads"] = draw_gradients(rng)
    return {tag: np.asarray(value, dtype=section_type(tag)) for tag, value in questions.items()}


# ----------------------------------------------------------------------------------------------------------------------
# answers

def transformers_model(config):
    """The model as transformers builds it, in float32; its own weights are never used."""
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=config["dim"], intermediate_size=config["ffn"], num_hidden_layers=config["layers"],
        num_attention_heads=config["heads"], num_key_value_heads=config["kv_heads"], head_dim=config["head_dim"],
        vocab_size=config["vocab"], max_position_embeddings=config["context"], tie_word_embeddings=bool(config["tied"]),
        rope_parameters={"rope_type": "default", "rope_theta": config["theta"]}, rms_norm_eps=config["eps"],
        attn_implementation="sdpa", use_cache=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )).eval()


def reference_model(config):
    """The same model in float64 throughout, but for the rotary angles."""
    model = transformers_model(config)
    norms = [name for name, _ in model.named_modules() if name.endswith("norm")]
    for name in norms:
        model.set_submodule(name, torch.nn.RMSNorm(config["dim"], eps=config["eps"]))
    return model.double()


def answer_logits(model, weights, questions):
    """The logits (M, V) where they predict an answer token, and those M tokens. Every example runs alone."""
    tokens = torch.tensor(questions["tokens"].astype(np.int64))
    logits, targets = [], []
    for example, answer in zip(tokens.split(questions["length"].tolist()), questions["answer"].tolist()):
        found = torch.func.functional_call(model, weights, kwargs={"input_ids": example[None]}).logits[0]
        logits.append(found[answer - 1:-1])
        targets.append(example[answer:])
    return torch.cat(logits), torch.cat(targets)


def run(model, config, questions, case):
    """
    One case through `model`, in its type, as arrays: the logits (M, V), the loss (), and its gradients with respect to
    the base tensors (a list in file order), the deltas (a list, 7 per layer) and the gates (7 * layers).
    """
    def tensors(tag, shapes):
        return {name: torch.tensor(part, dtype=model.dtype) for name, part in split(questions[tag], shapes).items()}

    adapted = adapted_shapes(config)
    weights = tensors("weights", tensor_shapes(config))
    mask = tensors(f"mask.{case}", adapted)
    delta = tensors(f"delta.{case}", adapted)
    gates = torch.tensor(questions[f"gates.{case}"], dtype=model.dtype)
    leaves = [*weights.values(), *delta.values(), gates]
    for leaf in leaves:
        leaf.requires_grad_()

    effective = dict(weights)
    for gate, name in zip(gates, delta):
        effective[name] = weights[name] + gate * mask[name] * delta[name]
    effective = {hugging_face_name(name): tensor for name, tensor in effective.items()}
    logits, targets = answer_logits(model, effective, questions)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    grads = [grad.numpy() for grad in torch.autograd.grad(loss, leaves)]
    return logits.detach().numpy(), loss.detach().numpy(), grads[:len(weights)], grads[len(weights):-1], grads[-1]


def difference(got, expected):
    """||got - expected|| / ||expected||; 0 where both are zero."""
    off, size = (np.linalg.norm(array.astype(np.float64)) for array in (got - expected, expected))
    return off / size if size else np.inf if off else 0.0


def adamw(questions):
    """The values (n) after torch.optim.AdamW has taken each of the gradients in turn, in float64."""
    lr, beta1, beta2, eps, decay = questions["adamw.hyper"].tolist()
    values = torch.tensor(questions["adamw.start"], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([values], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for grad in questions["adamw.grads"].reshape(-1, values.numel()):
        values.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
    return values.detach().numpy()


def answer_questions(config, questions):
    """All that PyTorch says: a dict, tag -> array, as the file holds it. ValueError where transformers disagrees."""
    answers = {}
    reference, plain = reference_model(config), transformers_model(config)
    for case in range(len(GATES)):
        logits, loss, dweights, ddelta, dgates = run(reference, config, questions, case)
        logits32, loss32, dweights32, ddelta32, dgates32 = run(plain, config, questions, case)
        answers[f"logits.{case}"] = logits
        answers[f"loss.{case}"] = loss
        answers[f"dweights.{case}"] = join(dweights)
        answers[f"ddelta.{case}"] = join(ddelta)
        answers[f"dgates.{case}"] = dgates
        errors = [difference(got, expected) for got, expected in zip(
            [logits32, loss32, *dweights32, *ddelta32, dgates32], [logits, loss, *dweights, *ddelta, dgates])]
        answers[f"error32.{case}"] = errors
        if not np.max(errors) < CLOSE:
            raise ValueError(f"transformers in float32 is {np.max(errors):.1e} off the reference: more than rounding")
    answers["adamw.result"] = adamw(questions)
    return {tag: np.asarray(value, dtype=section_type(tag)) for tag, value in answers.items()}


# ----------------------------------------------------------------------------------------------------------------------
# files

def section_type(tag):
    """The numpy type of the numbers in section `tag`."""
    return TYPES.get(tag.partition(".")[0], "<f4")


def write_dump(path, config, seed):
    """Draws the questions, answers them and writes both."""
    header = pack_config(config)
    config = unpack_config(header)  # theta and eps as fp32 has them
    questions = draw_questions(config, seed)
    arrays = questions | answer_questions(config, questions)
    write_file(path, "dump", [("config", header)] + [(tag, array.tobytes()) for tag, array in arrays.items()])
    print(f"{path}: {os.path.getsize(path)} bytes")


def check_dump(path):
    """
    Answers the questions of the dump at `path` again. ValueError, in one line, where an answer has changed. error32 is
    not compared: it is rounding and differs from processor to processor.
    """
    sections = read_file(path, "dump")
    config = unpack_config(sections.pop("config"))
    arrays = {tag: np.frombuffer(data, dtype=section_type(tag)) for tag, data in sections.items()}
    for tag, expected in answer_questions(config, arrays).items():
        if not tag.startswith("error32"):
            off = difference(expected.ravel(), arrays[tag])
            if not off <= SAME:
                raise ValueError(f"{path}: '{tag}' is {off:.1e} off what torch {torch.__version__} and transformers "
                                 f"{transformers.__version__} say")
    print(f"{path}: torch {torch.__version__} and transformers {transformers.__version__} say the same")


def main():
    parser = argparse.ArgumentParser(description="What PyTorch says about a small random Llama with RIGSA adapters.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", metavar="FILE", help="write a dump")
    action.add_argument("--check", metavar="FILE", help="compare the dump FILE with what PyTorch says now")
    parser.add_argument("--config", metavar="CONFIG.json", help="shape of the model written (default: the fixture's)")
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers written (default 1)")
    args = parser.parse_args()
    try:
        if args.check:
            check_dump(args.check)
        else:
            write_dump(args.out, llama_config(load_json(args.config)) if args.config else FIXTURE, args.seed)
    except (OSError, ValueError) as error:
        sys.exit(f"dump_reference.py: {error}")


if __name__ == "__main__":
    main()

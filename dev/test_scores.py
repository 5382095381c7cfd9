"""
Does evaluate_rigsa score as lm-evaluation-harness does? A model of random weights with SmolLM2's vocabulary answers PIQA, HellaSwag
and GSM8k twice: through the harness and transformers (HFLM, fp32), and through prepro_eval.py's files and evaluate_rigsa.

    python dev/test_scores.py --data DIR                                        a few documents: for CI
    python dev/test_scores.py --data DIR --documents 200 --generated 16         the whole claim
    python dev/test_scores.py --data DIR --config SmolLM2-135M/config.json ...  on another shape

DIR has piqa, hellaswag, gsm8k and SmolLM2's tokenizer in smollm2/tokenizer. Checked are the log-likelihood of every choice, every
prediction that is not a near-tie, the harness's own scores, and generated tokens up to a near-tie; the time that each took is
printed. The last line is `N passed, N failed`.
"""
import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prepro_eval
from export_hf import export

SMALL = {  # with SmolLM2's vocabulary
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 96, "intermediate_size": 224,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}
CLOSE = 1e-4  # relative difference of log-likelihoods, and difference of log-likelihoods or logits up to which two are a near-tie

passed = failed = 0


def check(good, what):
    """Counts, and says what failed."""
    global passed, failed
    if good:
        passed += 1
    else:
        failed += 1
        print(f"FAILED: {what}")


class Reference(HFLM):
    """
    HFLM that keeps what it generates: in `said`, per question (tokens, and for each the lead of the first over the second);
    and the `seconds` that its requests took.
    """
    seconds = 0

    def loglikelihood(self, requests, disable_tqdm=True):
        begin = time.perf_counter()
        answers = super().loglikelihood(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - begin
        return answers

    def generate_until(self, requests, disable_tqdm=True):
        begin = time.perf_counter()
        self.said, answers = [], []
        for request in requests:
            answers += super().generate_until([request], disable_tqdm=True)
        self.seconds += time.perf_counter() - begin
        return answers

    def _model_generate(self, context, max_length, stop, **settings):
        out = super()._model_generate(context, max_length, stop, **settings, return_dict_in_generate=True, output_logits=True)
        leads = [(best := logits[0].topk(2).values)[0].item() - best[1].item() for logits in out.logits]
        self.said.append((out.sequences[0, context.shape[1]:].tolist(), leads))
        return out.sequences


def make_model(config, folder, data):
    """Random weights of shape `config` (a dict as in config.json): the model, and in `folder` all its files and base.bin."""
    tokenizer = os.path.join(data, "smollm2", "tokenizer")
    shutil.copy(os.path.join(tokenizer, "tokenizer.json"), folder)
    shutil.copy(os.path.join(tokenizer, "tokenizer_config.base.json"), os.path.join(folder, "tokenizer_config.json"))
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(config | {"initializer_range": 1.5 / config["hidden_size"] ** 0.5}, file)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
    model.save_pretrained(folder)
    export(folder, os.path.join(folder, "base.bin"))
    return model


def check_choices(name, samples, lines, results):
    """
    Log-likelihoods and predictions of one task: the harness's `samples` beside train_rigsa's `lines`, one per choice, and the
    samples that the harness makes of these, `results`.
    """
    worst, lines = 0, iter(lines)
    for sample, result in zip(samples, results, strict=True):
        expected = np.array([response[0][0] for response in sample["resps"]])
        found = np.array([next(lines)["logp"] for _ in expected])
        worst = max(worst, np.max(np.abs(found / expected - 1)))
        chars = np.array([len(arguments[1]) - 1 for arguments in sample["arguments"]])
        for metric, scale in ("acc", 1), ("acc_norm", chars):
            second, first = np.sort(expected / scale)[-2:]
            if not first - second <= CLOSE:
                check(np.argmax(found / scale) == np.argmax(expected / scale) and result[metric] == sample[metric],
                      f"{name}, document {sample['doc_id']}: {metric}")
    check(worst <= CLOSE and not list(lines), f"{name}: a log-likelihood is {worst:.1e} off")
    print(f"{name}: {len(samples)} documents, largest relative difference of a log-likelihood {worst:.1e}")


def check_generated(said, lines):
    """Generated tokens: HFLM's beside train_rigsa's, up to the first difference, which must be a near-tie."""
    whole = 0
    for (tokens, leads), line in zip(said, lines, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(tokens, line["tokens"])) if a != b), min(len(tokens), len(line["tokens"])))
        whole += tokens == line["tokens"]
        check(tokens == line["tokens"] or (same < len(leads) and leads[same] < CLOSE),
              f"gsm8k, document {line['example']}: token {same} of {len(tokens)} and {len(line['tokens'])}")
    print(f"gsm8k: {len(lines)} documents, {sum(len(tokens) for tokens, _ in said)} tokens generated by HFLM, "
          f"{sum(len(line['tokens']) for line in lines)} here, {whole} documents identical")


def compare(model, tokenizer, folder, tasks, limit, args):
    """All of it for `tasks` (names, with commas), `limit` documents each."""
    command = prepro_eval.parse([folder, "--tasks", tasks, "--limit", str(limit), "--data", args.data, "--out", folder])
    paths = [path for path, *_ in prepro_eval.write_files(command)]
    reference = Reference(pretrained=model, tokenizer=tokenizer, batch_size=args.batch)
    _, expected = prepro_eval.ask(reference, command)
    command.score = os.path.join(folder, "details.jsonl")
    run = [args.program, "--base", os.path.join(folder, "base.bin"), "--details", command.score, "--overwrite"]
    begin = time.perf_counter()
    print(subprocess.run(run + [word for path in paths for word in ("--eval", path)], check=True, text=True,
                         stdout=subprocess.PIPE).stdout.strip().splitlines()[-1])
    here = time.perf_counter() - begin
    print(f"{tasks}: HFLM {reference.seconds:.1f} s for its requests, evaluate_rigsa {here:.1f} s for the whole command: "
          f"{reference.seconds / here:.2f} times as fast, {torch.get_num_threads()} threads")
    lines = prepro_eval.read_lines(command.score)
    (_, results), = prepro_eval.score(command)
    for task in tasks.split(","):
        mine = sorted((line for line in lines if line["column"] == task), key=lambda line: line["example"])
        if task == "gsm8k":
            check_generated(reference.said, mine)
        else:
            check_choices(task, expected["samples"][task], mine, results["samples"][task])
    for task, scores in expected["results"].items():
        for metric, value in scores.items():
            check(results["results"][task][metric] == value, f"{task}: {metric} is {results['results'][task][metric]}, not {value}")
        print(f"{task}: {({metric: value for metric, value in scores.items() if metric != 'alias'})}")


def main():
    parser = argparse.ArgumentParser(description="evaluate_rigsa's scores beside lm-evaluation-harness's.")
    parser.add_argument("--data", required=True, metavar="DIR", help="piqa, hellaswag, gsm8k and smollm2/tokenizer")
    parser.add_argument("--documents", type=int, default=12, help="of PIQA and of HellaSwag (default 12)")
    parser.add_argument("--generated", type=int, default=2, help="documents of GSM8k (default 2)")
    parser.add_argument("--config", metavar="CONFIG.json", help="shape of the model (default: a small one)")
    parser.add_argument("--batch", type=int, default=8, help="HFLM's batch size (default 8)")
    parser.add_argument("--threads", type=int, default=1, help="of both (default 1)")
    parser.add_argument("--program", default="./evaluate_rigsa", help="default: ./evaluate_rigsa")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    config = SMALL
    if args.config:
        with open(args.config, encoding="utf-8") as file:
            config = json.load(file)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(config, folder, args.data)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if args.documents:
            compare(model, tokenizer, folder, "piqa,hellaswag", args.documents, args)
        if args.generated:
            compare(model, tokenizer, folder, "gsm8k", args.generated, args)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()

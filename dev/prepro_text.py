"""
Any text as an evaluation: how well does a model still predict it? Nats per token, metric `loss`.

    python dev/prepro_text.py MODEL novel.txt --length 512 --out data     writes data/novel.bin, column novel
    ./train_rigsa ... --eval data/novel.bin

MODEL is a hub name or a folder with config.json and a tokenizer; no weights are read. The text is cut into
windows of --length tokens, each of which sees only what is before it in its window; every token of the text
is predicted once. These are the windows of lm-evaluation-harness's loglikelihood_rolling for a model of that
length: the first begins with the tokenizer's begin (or end) token, the last is filled up with what comes
before it. A window counts as a document: the standard error is over windows.
"""
import argparse
import os

import command

from chat_template import load_tokenizer
from own_data import describe, model_sizes, name_of, read_text, write_losses


def windows(tokens, prefix, length):
    """
    Yields (tokens of a window, index of the first one to predict): each of `tokens` is predicted once, from
    at most `length` before it, the first of them `prefix`. lm_eval.utils.get_rolling_token_windows with a
    context of 1, made disjoint.
    """
    padded = [prefix, *tokens]
    for start in range(0, len(tokens), length):
        end = min(start + length, len(tokens))
        first = max(0, end - length)
        yield padded[first:end + 1], start + 1 - first


def prefix_token(tokenizer):
    """What stands before the first token of a text, as the harness has it."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(f"{tokenizer.name_or_path}: its tokenizer has no token to begin a text with")
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def write_windows(args):
    """Everything that the command line asks for."""
    name = name_of(args.text, args.name)
    tokenizer = load_tokenizer(args.model)
    vocab, context = model_sizes(args.model, tokenizer)
    if args.length > context:
        raise ValueError(f"--length {args.length}: {args.model} was made for {context} tokens")
    tokens = tokenizer.encode(read_text(args.text), verbose=False)
    found = list(windows(tokens, prefix_token(tokenizer), args.length))[:args.limit]
    if not found:
        raise ValueError(f"{args.text}: there is no text in it")
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, f"{name}.bin")
    write_losses(path, vocab, found, name)
    print(f"{path}: {len(found)} windows, {describe(found)}, column {name}, metric loss")


@command.line
def main():
    parser = argparse.ArgumentParser(description="A text as an evaluation: nats per token.")
    parser.add_argument("model", metavar="MODEL", help="hub name, or folder with config.json and tokenizer")
    parser.add_argument("text", metavar="FILE.txt", help="UTF-8, gzip'd or not")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens that a window predicts; "
                        "default: 512")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N windows; default: all")
    parser.add_argument("--name", help="of the file and of the column; default: that of the text")
    parser.add_argument("--out", metavar="DIR", default="data", help="where the file goes; default: data")
    args = parser.parse_args()
    for option in ("length", "limit"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            parser.error(f"--{option}: a whole number above 0")
    write_windows(args)


if __name__ == "__main__":
    main()

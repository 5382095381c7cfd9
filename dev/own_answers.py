"""
What a model says to ordinary questions, kept as an evaluation: how much of that does training change?

    python dev/own_answers.py MODEL --out data                      writes data/own.bin, column own
    ./train_rigsa ... --eval data/own.bin

MODEL is what dev/export_hf.py was given. It answers the questions, a line each, greedily in its chat
template; nats per token that a model gives to these answers, metric `loss`, are smallest for the model
itself. Choices that are scored by likelihood (PIQA, HellaSwag) do not see that a model has stopped to answer;
this does. Needs torch: some minutes for 135M on one core.
"""
import argparse
import os

import command

from tqdm import tqdm

from chat import ask, load_model
from chat_template import load_tokenizer
from export_hf import find_folder
from own_data import describe, model_sizes, read_text, write_losses

QUESTIONS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "questions.txt")
COLUMN = "own"


def write_answers(args):
    """Everything that the command line asks for."""
    questions = [line.strip() for line in read_text(args.questions).split("\n") if line.strip()]
    if not questions:
        raise ValueError(f"{args.questions}: there are no questions in it")
    folder = find_folder(args.model)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    examples, cut = [], 0
    for question in tqdm(questions, disable=None, leave=False):
        prompt, answer = ask(model, tokenizer, question, args.tokens)
        examples.append((prompt + answer, len(prompt)))
        cut += len(answer) == args.tokens
    for question, (tokens, answer) in list(zip(questions, examples))[:3]:
        print(f"{question}\n    {tokenizer.decode(tokens[answer:])!r}")
    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, f"{COLUMN}.bin")
    write_losses(path, model_sizes(folder, tokenizer)[0], examples, COLUMN)
    print(f"{path}: {len(examples)} answers, {cut} of them cut after {args.tokens} tokens, "
          f"{describe(examples)}, column {COLUMN}, metric loss")


@command.line
def main():
    parser = argparse.ArgumentParser(description="A model's own answers as an evaluation.")
    parser.add_argument("model", metavar="MODEL", help="the folder or name that dev/export_hf.py was given")
    parser.add_argument("--questions", metavar="FILE", default=QUESTIONS,
                        help="a question a line; default: dev/questions.txt")
    parser.add_argument("--tokens", type=int, default=60, metavar="N",
                        help="after which an answer is cut; default: 60")
    parser.add_argument("--out", metavar="DIR", default="data", help="where the file goes; default: data")
    write_answers(parser.parse_args())


if __name__ == "__main__":
    main()

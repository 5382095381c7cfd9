"""
Conversations of your own as training examples, from the files that people have.

    python dev/prepro_chat.py MODEL mine.jsonl --heldout 20 --out data
    ./train_rigsa --base ... --data data/mine_train.bin --eval data/mine_heldout.bin

MODEL is a hub name or a folder with config.json and a tokenizer; no weights are read. The file holds JSON, an
object a line or one list of objects, gzip'd or not. An object has one of the forms that TRL documents:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "completion": "..."}                     plain text
    {"prompt": [messages], "completion": [messages]}
    {"text": "..."}                                            plain text

Conversations go through the tokenizer's own chat template. Every turn of the assistant is an example of its
own: all that was said before it is its prompt, and only the turn is learnt, up to the token that ends it (of
prompt and completion only the completion's turns). Plain text is taken as it is, with the tokenizer's end
token behind it; without a prompt all of it is learnt but its first token. What is held out, the last N
objects, becomes an evaluation of metric `loss`.
"""
import argparse
import json
import os

import command

from tqdm import tqdm

from chat_template import load_tokenizer, split_turns
from own_data import describe, model_sizes, name_of, read_text, write_losses
from rigsa_file import data_sections, write_file

ROLES = ("system", "user", "assistant")
FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})


# ------------------------------------------------------------------------------------------------------------
# the file

def parse(text, path, line):
    """The JSON in `text`, which starts at this line of the file. ValueError where there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line + error.lineno - 1}: not JSON: {error.msg} at column "
                         f"{error.colno}") from None
    except RecursionError:
        raise ValueError(f"{path}, line {line}: not JSON that can be read: nested too deeply") from None


def read_objects(path):
    """
    What the file holds: a list of (where it stands, in words; object). ValueError, in one line, where that is
    no JSON.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        found = [(f"{path}, item {number}", item) for number, item in enumerate(parse(text, path, 1), 1)]
    else:
        found = [(f"{path}, line {number}", parse(line, path, number))
                 for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not found:
        raise ValueError(f"{path}: there is nothing in it")
    return found


# ------------------------------------------------------------------------------------------------------------
# objects as turns

def check(good, wrong):
    if not good:
        raise ValueError(wrong)


def text_of(item, field):
    """The text in a field of an object. ValueError where there is none."""
    found = item.get(field)
    check(isinstance(found, str), f"'{field}' is {kind(found)}, a text is needed")
    check(found.strip(), f"'{field}' is empty")
    check(not any("\ud800" <= char <= "\udfff" for char in found),
          f"'{field}' has half a character (a lone surrogate)")
    return found


def kind(value):
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return "missing or null" if value is None else names.get(type(value), "a number")


def messages_of(item, field):
    """
    The messages in a field of an object, with nothing but role and content. ValueError where they are not as
    they should be.
    """
    found = item[field]
    check(isinstance(found, list), f"'{field}' is {kind(found)}, a list of messages is needed")
    check(found, f"'{field}' is empty")
    messages = []
    for number, message in enumerate(found, 1):
        where = f"'{field}', message {number}"
        check(isinstance(message, dict),
              f"{where} is {kind(message)}, an object with role and content is needed")
        check("role" in message,
              f"{where} has no role" + (", 'from' and 'value' are not read" if "from" in message else ""))
        check(message["role"] in ROLES,
              f"{where} has the role {message['role']!r}, only {', '.join(ROLES)} are known")
        try:
            messages.append({"role": message["role"], "content": text_of(message, "content")})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return messages


def conversation(item):
    """(messages, number of the first one that may be learnt) of an object with conversations."""
    if "messages" in item:
        return messages_of(item, "messages"), 0
    prompt = messages_of(item, "prompt")
    return prompt + messages_of(item, "completion"), len(prompt)


def plain_text(tokenizer, prompt, completion):
    """
    (tokens, index of the first answer token): tokenized as one text, or apart where a token would reach over
    the border.
    """
    end = tokenizer.eos_token or ""
    if not completion.endswith(end):
        completion += end
    before = tokenizer.encode(prompt, verbose=False) if prompt else []
    whole = tokenizer.encode(prompt + completion, verbose=False)
    if whole[:len(before)] != before:
        whole = before + tokenizer.encode(completion, add_special_tokens=False, verbose=False)
    return whole, max(1, len(before))


def examples_of(item, tokenizer):
    """
    The examples in an object, a list of (tokens, index of the first answer token). ValueError, which says
    what is wrong.
    """
    check(isinstance(item, dict), f"{kind(item)}, an object is needed")
    form = next((form for form in FORMS if form <= item.keys()), None)
    check(form, f"has {', '.join(map(repr, item)) or 'no fields'}; 'messages', 'prompt' and 'completion', or "
          "'text' is needed")
    if "messages" in form or "prompt" in form and not isinstance(item["prompt"], str):
        messages, first = conversation(item)
        roles = [message["role"] for message in messages]
        check("assistant" in roles[first:], "the assistant says nothing in it, so there is nothing to learn")
        check(first or roles[0] != "assistant", "begins with the assistant: there is no prompt")
        pairs = split_turns(tokenizer, messages, first)
        return [(prompt + answer, len(prompt)) for prompt, answer in pairs]
    tokens, answer = plain_text(tokenizer, text_of(item, "prompt") if "prompt" in form else "",
                                text_of(item, "completion" if "prompt" in form else "text"))
    check(len(tokens) > answer, "a single token: there is nothing to learn")
    return [(tokens, answer)]


# ------------------------------------------------------------------------------------------------------------
# files

def shorten(examples, longest, how, counts):
    """
    Those of the examples that are no longer than `longest`; others are cut, or left out: `counts` of (cut,
    left out) grow.
    """
    for tokens, answer in examples:
        if len(tokens) > longest:
            fits = how == "cut" and answer < longest
            counts[0 if fits else 1] += 1
            if not fits:
                continue
        yield tokens[:longest], answer


def marked(tokenizer, tokens, answer):
    """An example as text, its answer between >>> and <<<."""
    return f"{tokenizer.decode(tokens[:answer])}>>>{tokenizer.decode(tokens[answer:])}<<<"


def write_splits(args):
    """Everything that the command line asks for."""
    name = name_of(args.data, args.name)
    tokenizer = load_tokenizer(args.model)
    vocab, context = model_sizes(args.model, tokenizer)
    longest = args.max_length or context
    check(longest <= context, f"--max-length {longest}: {args.model} was made for {context} tokens")
    objects = read_objects(args.data)
    kept = len(objects) - args.heldout
    check(kept > 0, f"--heldout {args.heldout} leaves nothing of the {len(objects)} objects in {args.data}")

    train, heldout, counts = [], [], [0, 0]
    for number, (where, item) in enumerate(tqdm(objects, desc=args.data, disable=None, leave=False)):
        try:
            found = examples_of(item, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        (train if number < kept else heldout).extend(shorten(found, longest, args.longer, counts))
    cut, left_out = counts
    check(train, f"{args.data}: nothing to train on is left, all is longer than {longest} tokens; allow more "
          "with --max-length")
    check(heldout or not args.heldout, f"{args.data}: what is held out is longer than {longest} tokens; "
          "allow more with --max-length")

    os.makedirs(args.out, exist_ok=True)
    path = os.path.join(args.out, name)
    print(f"the first example, its answer between >>> and <<<:\n{marked(tokenizer, *train[0])}\n")
    write_file(f"{path}_train.bin", "data", data_sections(vocab, train))
    print(f"{path}_train.bin: {len(train)} answers of {kept} objects, {describe(train)}")
    if heldout:
        write_losses(f"{path}_heldout.bin", vocab, heldout, name)
        print(f"{path}_heldout.bin: {len(heldout)} answers of {args.heldout} objects, {describe(heldout)}, "
              f"column {name}, metric loss")
    if left_out:
        print(f"note: {left_out} answers left out, with their prompts they are longer than {longest} tokens "
              "(--max-length, --longer cut)")
    if cut:
        print(f"note: {cut} answers cut after {longest} tokens (prompt and answer): they do not end with the "
              "token that ends a turn")
    if tokenizer.eos_token is None and any("messages" not in item and isinstance(item.get("prompt", ""), str)
                                           for _, item in objects):
        print("note: this tokenizer has no end token, so plain texts end without one: a model would not "
              "learn to stop")
    ignored = {field for _, item in objects for field in item} - set().union(*FORMS)
    if ignored:
        print(f"note: fields that are not read: {', '.join(sorted(ignored))}")


@command.line
def main():
    parser = argparse.ArgumentParser(description="Conversations of your own as examples for train_rigsa.")
    parser.add_argument("model", metavar="MODEL", help="hub name, or folder with config.json and tokenizer")
    parser.add_argument("data", metavar="DATA.jsonl", 
                        help="JSON, an object a line or one list; gzip'd or not")
    parser.add_argument("--heldout", type=int, default=0, metavar="N",
                        help="keep the last N objects apart, as an evaluation")
    parser.add_argument("--max-length", type=int, metavar="N",
                        help="tokens of prompt and answer; default: the model's context")
    parser.add_argument("--longer", choices=("drop", "cut"), default="drop",
                        help="what becomes of a longer example: left out, or its end cut off; default: drop")
    parser.add_argument("--name", help="of the files and of the column; default: that of the data")
    parser.add_argument("--out", metavar="FOLDER", default="data", help="where the files go; default: data")
    args = parser.parse_args()
    if args.heldout < 0 or args.max_length is not None and args.max_length < 2:
        parser.error("--heldout is a whole number, --max-length one above 1")
    write_splits(args)


if __name__ == "__main__":
    main()

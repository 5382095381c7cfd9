"""
A finished conversation as prompt and answer, by the chat template of a Hugging Face tokenizer.

    messages = [{"role": "user", "content": "moo?"}, {"role": "assistant", "content": "A cow."}]
    prompt, answer = split_turn(load_tokenizer(folder), messages)

What a model is asked is the conversation so far and the template's generation prompt. What it learns to say
is what follows in the finished conversation, up to the token that ends the turn. Templates differ in where
newlines, think tokens and ends stand, so nothing is assumed about them: the finished conversation, tokenized
as a whole, must begin with the prompt's tokens, and its last turn must end with a special token. Otherwise a
model would learn to continue what nobody asks, or not to stop.
"""

import glob
import os

from hugging_face import refuse_file

PROBE = "Xyzzy"  # an answer that is part of no template: what stands behind it ends the turn
NO_TEMPLATE = "this tokenizer has no chat template; use the one of an instruct model"


def load_tokenizer(folder):
    """
    The tokenizer in `folder`; where its settings name no chat template, with the chat_template*.jinja beside it, if
    there is one: a base model has none. ValueError, in one line, where there is no tokenizer or more than one.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing, which nobody needs here
    from transformers import AutoTokenizer

    refuse_file(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        raise ValueError(f"{folder}: not the folder of a Hugging Face tokenizer") from None
    if not tokenizer.chat_template:
        templates = sorted(glob.glob(os.path.join(glob.escape(folder), "chat_template*.jinja")))
        if len(templates) > 1:
            raise ValueError(f"{folder}: {len(templates)} files chat_template*.jinja, which one is not said; leave one")
        for path in templates:
            with open(path, encoding="utf-8") as file:
                tokenizer.chat_template = file.read()
    return tokenizer


def split_turns(tokenizer, messages, first=0):
    """
    Yields split_turn's (prompt, answer) for each turn of the assistant from message number `first` on; its prompt is
    all that was said before.
    """
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and place >= first:
            yield split_turn(tokenizer, messages[:place + 1])


def split_turn(tokenizer, messages):
    """
    The last turn of a finished conversation, which is the assistant's: (ids of the prompt, ids of the
    answer), two lists. `messages` are transformers' dicts of role and content. The answer ends with the token
    that ends the turn; what the template has behind it, often a newline, nobody has to say. ValueError, in
    one line that names the tokenizer's folder, where the template does not let prompt and answer be told
    apart.
    """

    def check(good, wrong):
        if not good:
            raise ValueError(f"{tokenizer.name_or_path}: {wrong}")

    check(tokenizer.chat_template, NO_TEMPLATE)
    *before, last = messages
    check(
        last["role"] == "assistant",
        f"the last turn is of the role {last['role']!r}, it holds no answer to learn",
    )
    asked = render(tokenizer, before, add_generation_prompt=True)
    said = render(tokenizer, messages)
    probed = render(tokenizer, [*before, last | {"content": PROBE}])

    same = common(asked, said)
    check(
        same == len(asked),
        f"the chat template's finished turn does not begin with its prompt: that ends with "
        f"{clip(asked[same:])} where the finished turn has {clip(said[same:])}; "
        "use a template where both agree",
    )
    check(last["content"].strip() in said[same:], "the chat template leaves out a part of the answer")
    opening, _, closing = probed[same:].partition(PROBE)
    check(
        said[same:].startswith(opening) and said.endswith(closing),
        "the chat template opens or closes a turn in another way for another answer; use one that does not",
    )

    prompt, whole = (tokenizer.encode(text, add_special_tokens=False) for text in (asked, said))
    same = common(prompt, whole)
    mend = "use a template whose prompt ends with a token of its own"
    if last["content"][:1].isspace():
        mend = "remove the white space that the answer begins with"
    check(
        same == len(prompt),
        f"the chat template's prompt ends with {clip(tokenizer.decode(prompt[same:]))}, which "
        f"becomes a part of the token {clip(tokenizer.decode(whole[same:same + 1]))} when the answer "
        f"follows; {mend}",
    )
    answer = whole[same:]

    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    ends = [token for token in tokenizer.encode(closing, add_special_tokens=False) if token in special]
    check(
        ends,
        f"the chat template ends a turn with {clip(closing)}, in which there is no special token of this "
        "tokenizer: a model would not know how to stop",
    )
    places = [place for place, token in enumerate(answer) if token in special][-len(ends) :]
    check(
        [answer[place] for place in places] == ends,
        "the end of a turn is not the same tokens behind every answer",
    )
    answer = answer[: places[0] + 1]
    check(
        ends[0] not in answer[:-1],
        f"the answer itself has {clip(tokenizer.decode(ends[:1]))}, the end of a turn",
    )
    return prompt, answer


def render(tokenizer, messages, **options):
    """
    The text of a conversation by the chat template; ValueError, in one line, where the template refuses it.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"{tokenizer.name_or_path}: its chat template cannot write this conversation: {why}"
        ) from None


def common(a, b):
    """How many items two sequences have in common at their beginnings."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def clip(text):
    """A text in quotes, or its beginning, as one short line."""
    return repr(text if len(text) <= 40 else text[:37] + "...")

"""
What the makers of data files from a user's own texts share: prepro_chat.py, prepro_text.py and
own_answers.py.
"""
import gzip
import os
import zlib

from rigsa_file import data_sections, read_name, write_file

ENDINGS = (".gz", ".jsonl", ".json", ".txt", ".md", ".bin")


def read_text(path):
    """The text of a UTF-8 file, gzip'd or not, without a byte order mark. ValueError, in one line, where it "
    "is none."""
    try:
        with open(path, "rb") as file:
            data = file.read()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise ValueError(f"{path}: damaged gzip file; fetch or pack it again") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x}); save it as "
                         "UTF-8") from None


def name_of(path, name=None):
    """
    What to call the data in `path`: `name`, or the file's own without its endings. It is a part of file
    names, and a column's.
    """
    found = name or os.path.basename(path)
    while not name and found.endswith(ENDINGS):
        found = found.rpartition(".")[0]
    if os.sep in found or not found:
        raise ValueError(f"{path}: {found!r} cannot be the name of a file; give it a --name")
    try:
        read_name({"column": found.encode()}, "column")
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give it a --name") from None
    return found


def model_sizes(folder, tokenizer):
    """
    (vocabulary, context) of the model in `folder`: its vocabulary may be larger than its tokenizer's. Without
    a config.json what the tokenizer knows.
    """
    from transformers import AutoConfig
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):
        return len(tokenizer), tokenizer.model_max_length
    return config.vocab_size, config.max_position_embeddings


def write_losses(path, vocab, examples, column):
    """
    Writes an evaluation of metric `loss`, (tokens, index of the first answer token) per document or window.
    """
    write_file(path, "data", data_sections(vocab, examples, column=column, metric="loss"))


def describe(examples):
    """The sizes of some examples in words."""
    lengths = sorted(len(tokens) for tokens, _ in examples)
    answers = sum(len(tokens) - answer for tokens, answer in examples)
    span = f"{lengths[0]}" if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]}"
    return f"{span} tokens each, {answers} of all {sum(lengths)} to be predicted"

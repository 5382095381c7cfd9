"""
SmolLM2's tokenizer from the metadata of a GGUF file, as Hugging Face's files.

The metadata name the rule that cuts a text into words ('smollm'); how it works they do not say. For SmolLM2
each digit is a word, then GPT-2's rule follows. Written out it is the tokenizer.json of SmolLM2, entry for
entry.
"""
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of token: special; added, but text; fills up the vocabulary
WORDS = {  # 'tokenizer.ggml.pre' -> the rules that cut a text into words
    "smollm": [{"type": "Digits", "individual_digits": True},
               {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
}


def tokenizer_files(metadata):
    """
    tokenizer.json and tokenizer_config.json, a dict: file name -> content, from a GGUF file's metadata, a
    dict: key -> value. ValueError where they hold no tokenizer, or another one than SmolLM2's.
    """
    def needed(key, *known):
        value = metadata.get(f"tokenizer.{key}")
        if value is None:
            raise ValueError(f"holds no tokenizer, 'tokenizer.{key}' is missing; take the model's own "
                             "tokenizer.json")
        if known and value not in known:
            raise ValueError(f"'tokenizer.{key}' is {value!r}, only {' or '.join(map(repr, known))} can be "
                             "written; take the model's own tokenizer.json")
        return value

    needed("ggml.model", "gpt2")
    words = WORDS[needed("ggml.pre", *WORDS)]
    tokens, types, merges = needed("ggml.tokens"), needed("ggml.token_type"), needed("ggml.merges")
    if len(tokens) != len(types):
        raise ValueError(f"has {len(tokens)} tokens and types of {len(types)}; download it again")
    vocab = {token: number for number, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    added = [{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": types[number] == CONTROL}
             for token, number in vocab.items() if types[number] in (CONTROL, USER_DEFINED)]
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            if not number < len(tokens):
                raise ValueError(f"'tokenizer.ggml.{key}_token_id' is {number}, of {len(tokens)} tokens; "
                                 "download it again")
            special[f"{name}_token"] = tokens[number]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False, "vocab": vocab, "merges": merges},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | special
    if "llama.context_length" in metadata:
        settings["model_max_length"] = metadata["llama.context_length"]
    if "tokenizer.chat_template" in metadata:
        settings["chat_template"] = metadata["tokenizer.chat_template"]
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}

"""
A Llama of Hugging Face in the terms of rigsa.c: its config.json and the names of its tensors.
"""
import json
import os

HUGGING_FACE_NAMES = {
    "embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}

# Fields of config.json that change what a Llama computes: the only value that rigsa.c knows, which is also what
# transformers takes where the field is missing.
PLAIN = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "rope_interleaved": False, "quantization_config": None,
}
ROPE_FIELDS = {"rope_theta", "rope_type", "type"}  # any other one scales or shortens the rotation


def module_name(name):
    """The path of the module that holds tensor `name` in transformers' model."""
    layer, _, part = name.rpartition(".")
    return (f"model.layers.{layer}." if layer else "") + HUGGING_FACE_NAMES[part]


def hugging_face_name(name):
    """The name that transformers gives to tensor `name`."""
    return module_name(name) + ".weight"


def refuse_file(model):
    """ValueError where `model` is a file, such as a GGUF file: transformers reads folders."""
    if os.path.isfile(model):
        raise ValueError(f"{model}: a folder is needed; python3 dev/export_hf.py {model} base.bin --hf FOLDER "
                         "makes one of a GGUF file")


def load_json(path):
    """The dict in the JSON file at `path`; ValueError, in one line, where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return found


def llama_config(hf):
    """
    A Hugging Face config.json, as a dict, in the terms of rigsa.c: a dict with the keys of
    rigsa_file.CONFIG_FIELDS, dtype fp32. It may have the names of transformers 4 (rope_theta, rope_scaling)
    or 5 (rope_parameters). ValueError, which names the field, where the model is not a plain Llama.
    """
    for field, plain in PLAIN.items():
        if hf.get(field, plain) != plain:
            raise ValueError(f"'{field}' is {hf[field]!r}, rigsa.c knows only {plain!r}")
    rope_field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"  # as in transformers
    rope = hf.get(rope_field) or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or not ROPE_FIELDS.issuperset(rope):
        raise ValueError(f"'{rope_field}' is {rope}, rigsa.c knows only the rope_type 'default'")

    def number(field, default=None, kinds=(int,)):
        value = rope.get(field, hf.get(field))
        value = default if value is None else value
        if type(value) not in kinds or not value > 0:
            raise ValueError(f"'{field}' is {value!r}, it must be a {'whole ' * (float not in kinds)}number above 0")
        return value

    dim, heads = number("hidden_size"), number("num_attention_heads")
    config = {
        "dim": dim,
        "ffn": number("intermediate_size"),
        "layers": number("num_hidden_layers"),
        "heads": heads,
        "kv_heads": number("num_key_value_heads", heads),
        "head_dim": number("head_dim", dim // heads),
        "vocab": number("vocab_size"),
        "context": number("max_position_embeddings", 2048),
        "tied": int(bool(hf.get("tie_word_embeddings"))),
        "dtype": 0,
        "theta": number("rope_theta", 10000.0, (int, float)),
        "eps": number("rms_norm_eps", 1e-6, (int, float)),
    }
    if dim % heads:
        raise ValueError(f"'hidden_size' is {dim}, not a multiple of 'num_attention_heads', {heads}")
    if heads % config["kv_heads"]:
        raise ValueError(f"'num_attention_heads' is {heads}, not a multiple of 'num_key_value_heads', "
                         f"{config['kv_heads']}")
    if config["head_dim"] % 2:
        raise ValueError(f"'head_dim' is {config['head_dim']}, rotary positions need an even one")
    return config

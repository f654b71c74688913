"""The tokenizer of a GGUF file as tokenizer.json, held against llama.cpp's own.

transformers builds it from the file's vocabulary; where the file names a way of splitting text that
transformers passes over, it is put in here. llama.cpp then has to give the same tokens.
"""

import json
from pathlib import Path
from typing import Any

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.files import write_json, write_text
from quantline.ingest.dequantize.gguf.file import GgufFile
from quantline.ingest.dequantize.gguf.llama_cpp import Vocabulary

CHAT_TEMPLATE = "tokenizer.chat_template"
# Texts whose tokens are compared. Combining marks are left out: llama.cpp's own splitting of them
# differs from that of the tokenizers that some of its names stand for.
TEXTS = (
    "Hello world, it's 12345 o'clock!\n\n  Tabs\tand   spaces at the end ",
    "def f(x):\n    return x**2 + 3.14  # Grüße – 你好\r\n",
    "We'LL see: HTTPServer2 costs $9.99 (or 7%)…",
    " leading space",
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
GPT2 = BYTE_LEVEL | {"use_regex": True}
# What llama.cpp calls a way of splitting (src/llama-vocab.cpp) → the pre-tokenizer, where
# transformers has none for the name.
DIGIT_BY_DIGIT = {"type": "Sequence", "pretokenizers": [DIGITS, GPT2]}
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": GPT2,
    "smollm": DIGIT_BY_DIGIT,
    "starcoder": DIGIT_BY_DIGIT,
    "refact": DIGIT_BY_DIGIT,
    "command-r": DIGIT_BY_DIGIT,
    "codeshell": DIGIT_BY_DIGIT,
}
SAME_SPLIT = {"granite-embed-multi-97m": "gpt-4o"}
# Key of tokenizer_config.json → the id's key in a file.
NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template of a file.

    Raises:
        StageError: missing_tokenizer, for a file without one that transformers builds;
            tokenizer_mismatch, if llama.cpp gives other tokens for a text.
    """
    try:
        spec, config = _build(file)
    except Exception as error:  # transformers raises what comes up
        raise_if_of_machine(error)
        raise StageError(
            Failure.MISSING_TOKENIZER,
            f"expected a tokenizer that transformers builds in {file.path}, found "
            f"{file.field('tokenizer.ggml.model')!r} ({type(error).__name__}: {error}); start from "
            "the model's Hugging Face folder",
        ) from None
    with Vocabulary(file.path) as vocabulary:
        spec["post_processor"] = _surroundings(spec, config, vocabulary)
        _compare(spec, vocabulary, file)
    write_text(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False))
    write_json(folder / "tokenizer_config.json", config)
    template = file.field(CHAT_TEMPLATE)
    if isinstance(template, str) and template:
        write_text(folder / "chat_template.jinja", template)
    ends = [file.field(f"tokenizer.ggml.{key}") for key in ENDS]
    ids = sorted({end for end in ends if end is not None})
    if ids:
        write_json(folder / "generation_config.json", {"eos_token_id": ids})


def _build(file: GgufFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of tokenizer.json and of tokenizer_config.json."""
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    architecture, parts, _ = get_gguf_tokenizer(str(file.path))
    split = parts.get("pre_tokenizer_type")
    split = SAME_SPLIT.get(split, split)
    parts["pre_tokenizer_type"] = split
    is_byte_level = parts.get("tokenizer_type") == "gpt2"
    if is_byte_level and split not in SPLITS and split not in GGUF_PRE_TOKENIZER_SPLITS:
        # transformers would split as GPT-2 does, and say nothing.
        raise ValueError(f"a way of splitting text, {split!r}, that transformers does not know")
    backend, _ = convert_gguf_tokenizer(architecture, parts)
    spec: dict[str, Any] = json.loads(backend.to_str())
    if is_byte_level and split in SPLITS:
        spec["pre_tokenizer"] = SPLITS[split]
    tokens = parts["tokens"]
    config: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.setting("context_length"),
    }
    for name, key in NAMED.items():
        number = file.field(f"tokenizer.ggml.{key}")
        if number is not None:
            config[name] = tokens[number]
    return spec, config


def _surroundings(
    spec: dict[str, Any], config: dict[str, Any], vocabulary: Vocabulary
) -> dict[str, Any] | None:
    """Return the post-processor that puts around a text what llama.cpp puts there."""
    before = config.get("bos_token") if vocabulary.adds_begin else None
    behind = config.get("eos_token") if vocabulary.adds_end else None
    ids = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    ids = spec["model"]["vocab"] | ids if isinstance(spec["model"]["vocab"], dict) else ids
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {}
    if before in ids:
        single.insert(0, {"SpecialToken": {"id": before, "type_id": 0}})
    if behind in ids:
        single.append({"SpecialToken": {"id": behind, "type_id": 0}})
    for token in {before, behind} & set(ids):
        special[token] = {"id": token, "ids": [ids[token]], "tokens": [token]}
    if special:
        return {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": special,
        }
    is_byte_level = (spec.get("decoder") or {}).get("type") == "ByteLevel"
    return BYTE_LEVEL | {"trim_offsets": False, "use_regex": True} if is_byte_level else None


def _compare(spec: dict[str, Any], vocabulary: Vocabulary, file: GgufFile) -> None:
    """Hold the tokens of some texts against llama.cpp's. Raises tokenizer_mismatch."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(spec))
    for text in TEXTS:
        found = tokenizer.encode(text, add_special_tokens=False).ids
        wanted = vocabulary.tokenize(text)
        if found != wanted:
            raise StageError(
                Failure.TOKENIZER_MISMATCH,
                f"expected the tokens of {file.path} that llama.cpp has for {text!r}, {wanted}, "
                f"found {found}: transformers does not build its tokenizer "
                f"({file.field('tokenizer.ggml.pre') or file.field('tokenizer.ggml.model')}); "
                "start from the model's Hugging Face folder",
            )

"""Special tokens and chat templates as GGUF metadata, in the file and read back from it.

llama.cpp stops at every token that it holds for an end of generation: those that the file calls
end of sequence, of turn and of message, and those whose text it knows (src/llama-vocab.cpp).
"""

from collections.abc import Mapping
from typing import Any

import gguf

from quantline.errors import Failure, StageError
from quantline.text.special_tokens import DEFAULT, SpecialTokens, plain_name
from quantline.text.tokenizer import Tokenizer

BOS, EOS, EOT, EOM = (f"tokenizer.ggml.{end}_token_id" for end in ("bos", "eos", "eot", "eom"))
ADDS_BOS = "tokenizer.ggml.add_bos_token"
ADDS_EOS = "tokenizer.ggml.add_eos_token"
TEMPLATE = "tokenizer.chat_template"
KEYS = {
    "bos_token": BOS,
    "eos_token": EOS,
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
MESSAGE_END = "<|eom_id|>"
# Ends that llama.cpp knows by their text, also without a key.
KNOWN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    MESSAGE_END,
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
)


def write_special_tokens(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Write the special tokens, what is put around a text, and the chat templates.

    Raises:
        StageError: tokenizer_mismatch, for a tokenizer that llama.cpp has no equal of.
    """
    special = tokenizer.specials
    for key, token_id in token_keys(tokenizer).items():
        writer.add_uint32(key, token_id)
    writer.add_bool(ADDS_BOS, bool(special.begin))
    writer.add_bool(ADDS_EOS, bool(special.finish))
    named = named_templates(special)
    if named:
        writer.add_array(f"{TEMPLATE}s", sorted(named))
    for name, template in named.items():
        writer.add_string(f"{TEMPLATE}.{name}", template)
    if special.default_template:
        writer.add_string(TEMPLATE, special.default_template)


def token_keys(tokenizer: Tokenizer) -> dict[str, int]:
    """Return key of the file → id, for the special tokens and all ends.

    Raises:
        StageError: tokenizer_mismatch, if the file cannot say what the tokenizer does.
    """
    special = tokenizer.specials
    keys = {key: special.ids[name] for name, key in KEYS.items() if name in special.ids}
    if special.begin:
        keys.setdefault(BOS, special.begin[0])
    if not special.ends:
        raise _no_equal(
            "a token that ends a text", "none, so that llama.cpp would take one of its own choice"
        )
    keys[EOS] = special.ends[0]
    if special.begin not in ([], [keys.get(BOS)]):
        raise _no_equal("texts that begin with the begin token alone", special.begin)
    if special.finish not in ([], [keys[EOS]]):
        raise _no_equal("texts that end with the end token alone", special.finish)
    return keys | keys_of_more_ends(tokenizer)


def keys_of_more_ends(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the keys of the ends besides the first. Raises StageError(tokenizer_mismatch)."""
    texts = {end: tokenizer.fast.id_to_token(end) for end in tokenizer.end_tokens[1:]}
    keys = {}
    for end, text in texts.items():
        if text == MESSAGE_END:
            keys[EOM] = end
    rest = [end for end in texts if end not in keys.values()]
    # Those that llama.cpp does not know by their text come first.
    rest.sort(key=lambda end: texts[end] in KNOWN_ENDS)
    free = [key for key in (EOT, EOM) if key not in keys]
    unknown = [texts[end] for end in rest[len(free) :] if texts[end] not in KNOWN_ENDS]
    if unknown:
        raise _no_equal(f"at most {len(free) + 1} tokens that end a text", f"{unknown[0]!r} too")
    return keys | dict(zip(free, rest, strict=False))


def named_templates(special: SpecialTokens) -> dict[str, str]:
    """Return the templates that do not serve by themselves, under the names that GGUF allows.

    Raises:
        StageError: tokenizer_mismatch, if two names become one.
    """
    named: dict[str, str] = {}
    for name, template in sorted(special.templates.items()):
        plain = plain_name(name)
        if plain in named:
            raise _no_equal("names of chat templates that differ in letters or digits", repr(name))
        if name != DEFAULT and plain:
            named[plain] = template
    return named


def _no_equal(expected: str, found: object) -> StageError:
    return StageError(
        Failure.TOKENIZER_MISMATCH,
        f"expected {expected}, as GGUF can say it, found {found}; choose another format",
    )


def metadata_of_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of its tokenizer (see Container.tokenizer_metadata)."""

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    metadata = {name.removesuffix("_token"): value(key) for name, key in KEYS.items()}
    metadata["adds_bos"] = bool(value(ADDS_BOS))
    metadata["adds_eos"] = bool(value(ADDS_EOS))
    metadata["chat_template"] = value(TEMPLATE)
    names = value(f"{TEMPLATE}s") or []
    metadata["named_templates"] = {name: value(f"{TEMPLATE}.{name}") for name in names}
    return metadata

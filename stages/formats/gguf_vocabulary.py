"""The tokenizer of a Hugging Face folder as GGUF metadata.

Two families: byte-level BPE ("gpt2" in GGUF, with the name of its pre-tokenizer) and SentencePiece-like BPE with byte
tokens ("llama"). Which one, and which pre-tokenizer, is read from tokenizer.json itself.
"""

import gguf
from gguf import TokenType

from stages.checkpoints.reader import read_json
from stages.checkpoints.tokenization import Tokenizer
from stages.tracking import Failure, StageError

LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|" \
         "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
QWEN2 = LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
SPACE = "▁"  # what SentencePiece writes for a space


def pre_tokenizer_name(spec: dict | None) -> str | None:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json, or None if it knows none like it."""
    steps = (spec or {}).get("pretokenizers", [spec] if spec else [])
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return SPLITS.get(steps[0].get("pattern", {}).get("Regex"))
    return None


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """Write tokens, their kinds, merges or scores, special tokens and the chat template.

    `rows` is the embedding's; ids that the tokenizer lacks become padding. Raises StageError(tokenizer_mismatch) for a
    tokenizer that llama.cpp has no equal of.
    """
    spec = read_json(tokenizer.folder / "tokenizer.json")
    model, added = spec["model"], {one["id"]: one for one in spec.get("added_tokens", [])}
    if model["type"] != "BPE":
        raise _unknown(f"a {model['type']} model")
    pieces = {index: token for token, index in model["vocab"].items()}
    tokens, kinds = [], []
    for index in range(rows):
        if index in added:
            tokens.append(added[index]["content"])
            kinds.append(TokenType.CONTROL if added[index].get("special") else TokenType.USER_DEFINED)
        elif index in pieces:
            tokens.append(pieces[index])
            byte = model.get("byte_fallback") and len(pieces[index]) == 6 and pieces[index].startswith("<0x")
            kinds.append(TokenType.BYTE if byte else TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{index}]")
            kinds.append(TokenType.UNUSED)
    if any(index >= rows for index in (*pieces, *added)):
        raise StageError(Failure.TOKENIZER_MISMATCH, f"the tokenizer has ids beyond the embedding's {rows} rows")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if _spaces_are_pieces(spec):
        _add_sentencepiece(writer, spec, tokens, kinds, merges)
    else:
        name = pre_tokenizer_name(spec.get("pre_tokenizer"))
        if name is None or spec.get("normalizer"):
            raise _unknown(f"pre_tokenizer {spec.get('pre_tokenizer')} with normalizer {spec.get('normalizer')}")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(merges)
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        if (index := tokenizer.special(f"{role}_token")) is not None:
            add(index)
    writer.add_add_bos_token(tokenizer.bos is not None)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _spaces_are_pieces(spec: dict) -> bool:
    """Whether spaces become ▁, as SentencePiece has it, and not the bytes of byte-level BPE."""
    return SPACE in str(spec.get("normalizer")) or (spec.get("pre_tokenizer") or {}).get("type") == "Metaspace"


def _add_sentencepiece(writer: gguf.GGUFWriter, spec: dict, tokens: list[str], kinds: list[int],
                       merges: list[str]) -> None:
    """SentencePiece BPE merges the pair with the highest score first; the rank of the merge is that order."""
    rank = {left + right: order for order, (left, right) in enumerate(pair.split(" ") for pair in reversed(merges))}
    top = len(rank)
    scores = [float(rank[token] - top) if token in rank else -float(top + 1) for token in tokens]
    unknown = spec["model"].get("unk_token")
    kinds = [TokenType.UNKNOWN if token == unknown else kind for token, kind in zip(tokens, kinds, strict=True)]
    steps = (spec.get("normalizer") or {}).get("normalizers", [spec["normalizer"]] if spec.get("normalizer") else [])
    scheme = (spec.get("pre_tokenizer") or {}).get("prepend_scheme")
    prepends = any(step["type"] == "Prepend" for step in steps) or scheme in ("always", "first")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(prepends)


def _unknown(what: str) -> StageError:
    return StageError(Failure.TOKENIZER_MISMATCH,
                      f"expected byte-level BPE with the pre-tokenizer gpt-2, smollm, llama-bpe or qwen2, or BPE with "
                      f"byte tokens; found {what}, for which llama.cpp has no equal here")

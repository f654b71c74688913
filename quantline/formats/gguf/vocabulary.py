"""The tokenizer of a Hugging Face folder as GGUF metadata.

There are two families: byte-level BPE ("gpt2" in GGUF, with the name of its pre-tokenizer) and BPE
like SentencePiece's, with byte tokens ("llama"). Which one a tokenizer belongs to, and which
pre-tokenizer it has, is read from tokenizer.json itself.

llama.cpp normalizes no text. Unicode's NFC, which many tokenizers ask for, is passed over as
llama.cpp's converter does: nearly all text is NFC already, and export compares token ids on text.
"""

import re
from collections import Counter
from typing import Any

import gguf
from gguf import TokenType

from quantline.errors import Failure, StageError
from quantline.formats.gguf.pretokenizers import find_pre_tokenizers
from quantline.formats.gguf.special_tokens import write_special_tokens
from quantline.text.tokenizer import Tokenizer

SPACE = "▁"  # what SentencePiece writes for a space
PREPEND = ("Prepend", SPACE)
REPLACE = ("Replace", " ", SPACE)
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# llama.cpp looks for these in a file whose name says phi-3.
PHI3_TOKENS = ("<unk>", "<s>", "</s>", "<|endoftext|>")
PHI3 = re.compile(r"phi-?3", re.IGNORECASE)

Merges = list[tuple[str, str]]
Normalizer = tuple[Any, ...]  # one step: its type and what it needs


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: Tokenizer, rows: int) -> None:
    """Write tokens, their types, merges or scores, special tokens and the chat template.

    Args:
        writer: Of the file.
        tokenizer: Of the checkpoint.
        rows: Height of the embedding; ids that the tokenizer lacks become padding.

    Raises:
        StageError: tokenizer_mismatch, for a tokenizer that llama.cpp has no equal of.
    """
    spec = tokenizer.spec
    model = spec["model"]
    if model["type"] != "BPE":
        raise _unsupported(f"a {model['type']} model")
    normalizers = _flatten_normalizers(spec.get("normalizer"))
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    is_sentencepiece = REPLACE in normalizers or pre_tokenizer.get("type") == "Metaspace"
    tokens, types = _tokens(spec, rows, is_sentencepiece)
    merges = _merges(model)
    if is_sentencepiece:
        _write_sentencepiece(writer, spec, normalizers, tokens, merges)
    else:
        _write_byte_level(writer, spec, normalizers, merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    write_special_tokens(writer, tokenizer)


def name_in_file(tokenizer: Tokenizer, name: str) -> str:
    """Return a model's name as its file has it.

    llama.cpp strips white space after special tokens, as Phi-3's tokenizer wants, if the name says
    phi-3, and there is no other way to make it do so. So no other model's name may say that.
    """
    added = tokenizer.spec.get("added_tokens", [])
    contents = {token["content"] for token in added}
    strips = any(token.get("rstrip") for token in added)
    if strips and contents.issuperset(PHI3_TOKENS):
        return name if PHI3.search(name) else f"{name} (phi-3)"
    return PHI3.sub("Phi 3", name)


def _merges(model: dict[str, Any]) -> Merges:
    """Return the merges of a BPE model, which older files write as "left right"."""
    merges: Merges = []
    for pair in model["merges"]:
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        merges.append((left, right))
    return merges


def _tokens(
    spec: dict[str, Any], rows: int, is_sentencepiece: bool
) -> tuple[list[str], list[TokenType]]:
    """Return the tokens and their types by id, padded to `rows`."""
    added = {token["id"]: token for token in spec.get("added_tokens", [])}
    vocabulary = {token_id: token for token, token_id in spec["model"]["vocab"].items()}
    unknown = spec["model"].get("unk_token")
    if any(not 0 <= token_id < rows for token_id in (*vocabulary, *added)):
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected ids below {rows}, found a tokenizer with ids beyond the embedding's {rows} "
            "rows; fetch the checkpoint again",
        )
    tokens = []
    types = []
    for token_id in range(rows):
        if token_id in added:
            special = added[token_id].get("special")
            token = added[token_id]["content"]
            if is_sentencepiece and not special:
                # llama.cpp finds these in the text before its spaces become ▁.
                token = token.replace(SPACE, " ")
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        elif token_id in vocabulary:
            token = vocabulary[token_id]
            is_byte = is_sentencepiece and token in BYTE_TOKENS
            kind = TokenType.BYTE if is_byte else TokenType.NORMAL
        else:
            token = f"[PAD{token_id}]"
            kind = TokenType.UNUSED
        if is_sentencepiece and token == unknown:
            kind = TokenType.UNKNOWN
        tokens.append(token)
        types.append(kind)
    _check_distinct(tokens)
    return tokens, types


def _check_distinct(tokens: list[str]) -> None:
    """Refuse tokens that are equal or empty: llama.cpp would end the whole process."""
    for token, count in Counter(tokens).items():
        if count > 1 or not token:
            raise StageError(
                Failure.TOKENIZER_MISMATCH,
                f"expected tokens that differ and are not empty, found {token!r} {count} times; "
                "GGUF cannot hold this tokenizer, choose another format",
            )


def _flatten_normalizers(spec: dict[str, Any] | None) -> list[Normalizer]:
    """Return the steps of a `normalizer` in a flat list."""
    if not spec:
        return []
    kind = spec["type"]
    if kind == "Sequence":
        steps = []
        for step in spec["normalizers"]:
            steps += _flatten_normalizers(step)
        return steps
    if kind == "Prepend":
        return [("Prepend", spec["prepend"])]
    if kind == "Replace":
        return [("Replace", spec["pattern"].get("String"), spec["content"])]
    return [(kind,)]


def _write_byte_level(
    writer: gguf.GGUFWriter, spec: dict[str, Any], normalizers: list[Normalizer], merges: Merges
) -> None:
    """Write the model, its pre-tokenizer and its merges."""
    pre_tokenizer = spec.get("pre_tokenizer")
    candidates = find_pre_tokenizers(pre_tokenizer)
    if not candidates or not set(normalizers) <= {("NFC",)}:
        raise _unsupported(
            f"pre_tokenizer {pre_tokenizer} with normalizer {spec.get('normalizer')}"
        )
    if any(" " in left or " " in right for left, right in merges):
        raise _unsupported("merges of pieces with spaces in them")
    ignores_merges = bool(spec["model"].get("ignore_merges"))
    exact = [known for known in candidates if known.ignores_merges == ignores_merges]
    # Where merges make every token of its text, it does not matter whether they are ignored.
    unreachable = None if len(exact) == len(candidates) else _unreachable_token(spec, merges)
    usable = candidates if unreachable is None else exact
    if not usable:
        raise _unsupported(
            f"ignore_merges {ignores_merges} with the pre-tokenizer {candidates[0].name}, and "
            f"{unreachable!r}, which no merges make"
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(usable[0].name)
    writer.add_token_merges([" ".join(pair) for pair in merges])


def _unreachable_token(spec: dict[str, Any], merges: Merges) -> str | None:
    """Return the first token, sorted, that merges alone do not make of its text."""
    from tokenizers.models import BPE

    vocabulary = spec["model"]["vocab"]
    added = {token["content"] for token in spec.get("added_tokens", [])}
    plain = BPE(vocabulary, merges)
    for token in sorted(vocabulary):
        if token not in added and len(plain.tokenize(token)) != 1:
            return token
    return None


def _write_sentencepiece(
    writer: gguf.GGUFWriter,
    spec: dict[str, Any],
    normalizers: list[Normalizer],
    tokens: list[str],
    merges: Merges,
) -> None:
    """Write the model and its scores.

    SentencePiece's BPE merges the pair with the highest score first; the rank of the merge is that
    order.
    """
    model = spec["model"]
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    normalizers_known = set(normalizers) <= {PREPEND, REPLACE}
    if not normalizers_known or not _is_metaspace(pre_tokenizer):
        raise _unsupported(
            f"pre_tokenizer {pre_tokenizer} with normalizer {spec.get('normalizer')}"
        )
    if model.get("byte_fallback"):
        for token in BYTE_TOKENS:
            if token not in model["vocab"]:
                raise _unsupported(f"byte_fallback without the token {token}")
    ranks = {left + right: rank for rank, (left, right) in enumerate(reversed(merges))}
    count = len(ranks)
    scores = [
        float(ranks[token] - count) if token in ranks else -float(count + 1) for token in tokens
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    prepends = PREPEND in normalizers or pre_tokenizer.get("prepend_scheme") in ("always", "first")
    writer.add_add_space_prefix(prepends)


def _is_metaspace(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether a `pre_tokenizer` does no more than to write ▁ for spaces.

    Gemma's splits at spaces, of which there are none left by then.
    """
    if pre_tokenizer.get("replacement", SPACE) != SPACE:
        return False
    kind = pre_tokenizer.get("type")
    if kind == "Split":
        return pre_tokenizer.get("pattern") == {"String": " "}
    return kind in (None, "Metaspace")


def _unsupported(found: str) -> StageError:
    return StageError(
        Failure.TOKENIZER_MISMATCH,
        "expected byte-level BPE with a pre-tokenizer that llama.cpp knows, or BPE with ▁ for "
        f"spaces and byte tokens; found {found}, for which llama.cpp has no equal here; choose "
        "another format",
    )
